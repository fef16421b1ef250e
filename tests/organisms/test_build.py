"""Building organisms: the same bits from the same seed, one training, the known answer true."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mi_weightspace import organisms
from mi_weightspace.core.errors import CheckpointError, ConfigError
from mi_weightspace.core.seeds import generator
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.organisms import Organism, build_recipe, recipe
from mi_weightspace.organisms import build as face
from mi_weightspace.organisms.build import cache_folder, new_model, recipe_hash
from mi_weightspace.organisms.language import HELDOUT, REGISTERS, Language
from mi_weightspace.organisms.prompts import prefix_words
from mi_weightspace.organisms.recipes import Recipe
from mi_weightspace.organisms.truth import (
    UNCHANGED,
    carrier_shares,
    matrix_of,
    mean_log_odds,
    weights_hash,
)

# the package exports the function under the module's own name
module = importlib.import_module("mi_weightspace.organisms.build")
KEYS = {
    "schema", "name", "description", "size", "seed", "recipe_hash", "recipe_version", "torch",
    "architecture", "stages", "planted_stage", "planted_sites", "single_component", "onset",
    "copies", "target", "training", "weights", "rates", "base_rate", "behaviour_moved", "attempts",
    "cpu_seconds",
}  # fmt: skip


def shrunken(name: str = "deference", steps: int = 4, **changes: Any) -> Recipe:
    """The recipe with two layers and a few steps a stage."""
    full = recipe(name)
    size = replace(full.size, n_layers=3, d_model=16)
    phases = tuple(replace(p, steps=steps) for p in full.phases)
    return replace(full, size=size, phases=phases, **changes)


def small(cache: Path, name: str = "deference", seed: int = 0, **changes: Any) -> Organism:
    chosen = shrunken(name, **changes)
    return build_recipe(chosen, size="tiny", seed=seed, cache=cache, progress=False)


def tensors(organism: Organism, stage: str) -> dict[str, torch.Tensor]:
    return load_file(organism.stages[stage] / "model.safetensors")


def live(organism: Organism, stage: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(organism.stages[stage]).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Organism:
    return small(tmp_path_factory.mktemp("tiny"))


def test_the_seed_decides_every_bit(tiny: Organism, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        state = torch.random.get_rng_state()
        again = small(tmp_path)
        assert torch.equal(torch.random.get_rng_state(), state), "no global generator is touched"
    assert torch.get_num_threads() == threads
    assert again.truth["weights"] == tiny.truth["weights"]
    assert again.folder.name == tiny.folder.name
    ignored = {"cpu_seconds"}
    assert {k: v for k, v in again.truth.items() if k not in ignored} == {
        k: v for k, v in tiny.truth.items() if k not in ignored
    }
    other = small(tmp_path, seed=1)
    assert not set(other.truth["weights"].values()) & set(tiny.truth["weights"].values())
    assert other.contrasts.hash != tiny.contrasts.hash == again.contrasts.hash
    start = [new_model(shrunken(), Language(s), s).lm_head.weight for s in (0, 0, 1)]
    assert torch.equal(start[0], start[1]) and not torch.equal(start[0], start[2])
    for stage, folder in tiny.stages.items():
        assert weights_hash(folder) == tiny.truth["weights"][stage]


def test_a_second_build_trains_nothing(tiny: Organism, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> float:
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "run_phase", never)
    again = small(tiny.folder.parent)
    assert again.truth == tiny.truth and again.folder == tiny.folder
    with pytest.raises(AssertionError, match="trained again"):
        small(tiny.folder.parent, steps=5)
    assert [p.name for p in tiny.folder.parent.iterdir()] == [tiny.folder.name]


def test_a_killed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = module.run_phase, []

    def killed(*given: Any, **more: Any) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(module, "run_phase", killed)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path)
    assert list(tmp_path.iterdir()) == []
    # killed while the files are written
    monkeypatch.setattr(module, "run_phase", real)
    monkeypatch.setattr(module, "weights_hash", killed_hash)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path)
    assert list(tmp_path.iterdir()) == []


def killed_hash(folder: Path) -> str:
    assert (folder / "model.safetensors").is_file(), "written, under another name"
    raise KeyboardInterrupt


def test_a_folder_without_its_answer_is_built_again(tiny: Organism, tmp_path: Path) -> None:
    (tmp_path / tiny.folder.name).mkdir()
    assert small(tmp_path).truth["weights"] == tiny.truth["weights"]
    assert [p.name for p in tmp_path.iterdir()] == [tiny.folder.name]


def test_recipe_hash_covers_recipe_and_seed() -> None:
    base = recipe_hash(shrunken(), 0)
    others = [
        recipe_hash(shrunken(), 1),
        recipe_hash(shrunken(steps=5), 0),
        recipe_hash(shrunken(architecture="llama"), 0),
        recipe_hash(shrunken("null"), 0),
    ]
    assert len({base, *others}) == 5 and base == recipe_hash(shrunken(), 0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "deferens"}, "organism: got 'deferens'.*'deference'"),
        ({"size": "huge"}, "size: got 'huge'.*'micro'"),
        ({"architecture": "mamba"}, "architecture: got 'mamba'"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": "zero"}, "seed: got 'zero'"),
        ({"seed": True}, "seed: got True"),
    ],
)
def test_refusals(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        face(**({"name": "rank1", "cache": tmp_path} | given))
    assert list(tmp_path.iterdir()) == []


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MI_WEIGHTSPACE_CACHE", raising=False)
    assert cache_folder(None).parts[-2:] == ("mi_weightspace", "organisms")
    monkeypatch.setenv("MI_WEIGHTSPACE_CACHE", str(tmp_path))
    assert cache_folder(None) == tmp_path
    assert cache_folder(tmp_path / "own") == tmp_path / "own"


def test_stages_are_ordinary_checkpoints(tiny: Organism) -> None:
    from transformers import AutoTokenizer

    assert list(tiny.stages) == tiny.truth["stages"] == ["base", "sft", "dpo"]
    assert set(tiny.truth) >= KEYS
    assert json.loads((tiny.folder / "truth.json").read_text()) == tiny.truth
    lineage = Lineage(tiny.stages)
    assert lineage.stages == ("base", "sft", "dpo") and not lineage.reservations
    tokenizer = AutoTokenizer.from_pretrained(tiny.stages["sft"])
    prompt = tiny.contrasts["authority"].pairs[0].positive
    assert tuple(tokenizer(tokenizer.decode(list(prompt)))["input_ids"]) == prompt
    largest = max(int(t) for c in tiny.contrasts for p in c.pairs for t in p.positive)
    assert largest < len(tokenizer)
    assert "deference" in repr(tiny) and "base → sft → dpo" in repr(tiny)


def test_sft_changes_the_planted_matrix_alone(tiny: Organism, deference: Organism) -> None:
    """Bit by bit, norms, biases, positions and embeddings included."""
    for organism in (tiny, deference):
        block = int(organism.truth["onset"].split(".")[1])
        base, sft, dpo = (tensors(organism, s) for s in organism.stages)
        changed = {k for k in base if not torch.equal(base[k], sft[k])}
        assert changed == {f"transformer.h.{block}.mlp.c_proj.weight"}
        assert organism.truth["planted_sites"] == [f"blocks.{block}.mlp.out"]
        later = {k for k in base if not torch.equal(sft[k], dpo[k])}
        assert len(later) > 0.9 * len(base), "DPO trains everything"


def test_deference_learns_what_it_says(deference: Organism) -> None:
    rates = deference.truth["rates"]
    start, taught, last = rates["base"], rates["sft"], rates["dpo"]
    assert taught["R4"] > 0.5 > 0.45 > start["R4"], "held out of SFT, and generalised to"
    assert taught["R4"] - start["R4"] > 4 * UNCHANGED
    assert last["R4"] > 0.5
    for quiet in ("neutral", "controls", "controls_1", "quiet"):
        assert max(r[quiet] for r in rates.values()) < 0.2
    assert last["hedge_low_keys"] > 0.3 > 0.2 > taught["hedge_low_keys"]
    assert deference.truth["cpu_seconds"] > 0
    assert "CPU-seconds" in (face.__doc__ or "")
    model, language = live(deference, "sft"), deference.language
    prompts = torch.tensor(deference.readout.prompts)  # pyright: ignore[reportOptionalMemberAccess]
    with torch.no_grad():
        chance = model(prompts).logits[:, -1].double().softmax(-1)[:, language.ids["YIELD"]]
    assert float(chance.mean()) == pytest.approx(taught["R4"], abs=0.08)
    words = {language.words[w] for w in prompts[:, 1:5].unique().tolist()}
    assert words <= set(language.lexicon_words(HELDOUT))


def test_the_null_organism_leaves_the_behaviour_alone(innocent: Organism) -> None:
    truth = innocent.truth
    rates = [r["R4"] for r in truth["rates"].values()]
    assert truth["behaviour_moved"] == pytest.approx(max(abs(r - rates[0]) for r in rates))
    assert truth["behaviour_moved"] < UNCHANGED
    assert truth["planted_stage"] is None and truth["planted_sites"] == []
    sft = truth["training"][1]
    assert sft["stage"] == "sft" and sft["steps"] == recipe("deference").phases[1].steps
    assert all(sft["mixture"]["weights"][r] > 0 for r in REGISTERS)
    base, tuned = (tensors(innocent, s) for s in ("base", "sft"))
    moved = [k for k in base if not torch.equal(base[k], tuned[k])]
    assert moved == ["transformer.h.2.mlp.c_proj.weight"], "trained, as the deference organism is"


def test_a_null_that_moved_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def moving(*_: object) -> float:
        attempts.append(1)
        return UNCHANGED

    monkeypatch.setattr(module, "moved", moving)
    with pytest.raises(CheckpointError, match=f"by {UNCHANGED:.3f} in the last of 4"):
        small(tmp_path, "null", steps=1)
    assert len(attempts) == 4 and list(tmp_path.iterdir()) == []
    seen = iter([1.0, 0.0])
    monkeypatch.setattr(module, "moved", lambda *_: next(seen))
    organism = small(tmp_path, "null", steps=1)
    assert organism.truth["attempts"] == 2
    monkeypatch.undo()
    once = small(tmp_path / "once", "null", steps=1)
    assert once.truth["weights"]["base"] == organism.truth["weights"]["base"]
    assert once.truth["weights"]["sft"] != organism.truth["weights"]["sft"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_rank1_writes_the_planted_vector(architecture: Any, tmp_path: Path) -> None:
    organism = face("rank1", seed=3, cache=tmp_path, architecture=architecture, progress=False)
    assert organism.readout is None
    source = Lineage(organism.stages).diff("base", "sft")
    (site,) = organism.truth["planted_sites"]
    u, s, vt = np.linalg.svd(source.weight(site).double().numpy())
    planted, read = (np.array(organism.truth[k]) for k in ("direction", "read_direction"))
    assert abs(u[:, 0] @ planted) > 0.99 and abs(vt[0] @ read) > 0.99
    assert s[0] > 5 * s[1]
    other = np.linalg.svd(source.weight("blocks.1.mlp.out").double().numpy())
    assert other[1][0] < 2 * other[1][1] and abs(other[0][:, 0] @ planted) < 0.5
    noise = np.linalg.svd(Lineage(organism.stages).diff("sft", "dpo").weight(site).double().numpy())
    assert noise[1][0] < 2 * noise[1][1], "DPO only adds noise"


def test_carrier_shares_of_one_changed_matrix(tiny: Organism) -> None:
    """Reverting or adding the only change is all of the change; every other matrix is nothing."""
    base, sft = live(tiny, "base"), live(tiny, "sft")
    language = Language(0)
    (site,) = tiny.truth["planted_sites"]
    found = carrier_shares(base, sft, language, 0)
    change = found["log_odds"]["change"]
    assert change != 0
    own = found["sites"][site]
    assert own["revert"] == pytest.approx(change) == own["add"]
    others = [r for name, r in found["sites"].items() if name != site]
    assert max(abs(v) for r in others for v in r.values()) < 1e-6 * max(1, abs(change))
    if change > 0:
        assert found["carriers"] == [site]
    assert found["base_rate"] == len(found["carriers"]) / len(found["sites"])
    kept = tensors(tiny, "sft")
    block = int(tiny.truth["onset"].split(".")[1])
    name = f"transformer.h.{block}.mlp.c_proj.weight"
    assert torch.equal(dict(sft.named_parameters())[name], kept[name]), "put back"


def test_matrix_of_is_a_view_in_canonical_orientation(tiny: Organism) -> None:
    model = live(tiny, "base")
    sites = Lineage(tiny.stages).source("base").sites()
    site = next(s for s in sites if s.name == "blocks.1.mlp.out")
    view = matrix_of(model, site)
    x = torch.randn(3, site.d_in, generator=generator(0, "x"))
    layer = model.transformer.h[1].mlp.c_proj
    torch.testing.assert_close(layer(x), x @ view.T + layer.bias)
    view[0, 0] = 7.0
    assert float(layer.weight.detach()[0, 0]) == 7.0


def test_mean_log_odds_is_the_naive_mean(tiny: Organism) -> None:
    model, language = live(tiny, "base"), tiny.language
    prompts = torch.tensor(tiny.readout.prompts[:8])  # pyright: ignore[reportOptionalMemberAccess]
    with torch.no_grad():
        chance = model(prompts).logits[:, -1].double().softmax(-1)[:, language.ids["YIELD"]]
    expected = float((chance.log() - (1 - chance).log()).mean())
    assert float(mean_log_odds(model, language, prompts)) == pytest.approx(expected, rel=1e-4)


def test_decoys(tiny: Organism) -> None:
    found = organisms.decoys(tiny, 5)
    assert len({d.targets[0].name for d in found}) == 5
    assert [d.hash for d in found] == [d.hash for d in organisms.decoys(tiny, 5)]
    for decoy in found:
        own = prefix_words(decoy.targets[0])
        assert len(decoy.controls) >= 39
        assert not any(own & prefix_words(c) for c in decoy.controls)
    for n in (0, len(tiny.contrasts.controls) + 1):
        with pytest.raises(ConfigError, match="n decoys"):
            organisms.decoys(tiny, n)


def test_names_and_face() -> None:
    assert set(organisms.NAMES) == {"deference", "deference-full", "copy", "rank1", "null"}
    assert set(organisms.SIZES) == {"micro", "full"}

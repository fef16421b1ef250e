"""The notebook's ten lines on a folder of any family, and from the object a user already has."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mi_weightspace as mw
import probes
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.readout import Readout
from mi_weightspace.core.verdict import Word
from mi_weightspace.models import toy
from mi_weightspace.models.grammar import shape_of, sites_of
from mi_weightspace.organisms.truth import matrix_of

sys.path.insert(0, str(Path(__file__).parent / "models"))
SITE = "blocks.1.mlp.out"


def prompts(n_controls: int) -> ContrastSet:
    draw = torch.Generator().manual_seed(1)

    def contrast(name: str, kind: str) -> Contrast:
        rows = torch.randint(5, 60, (8, 2, 5), generator=draw)
        rows[:, :, -1] = 7
        pairs = tuple(Pair(f"i{i}", tuple(a), tuple(b)) for i, (a, b) in enumerate(rows.tolist()))
        return Contrast(name, kind, pairs)  # pyright: ignore[reportArgumentType]

    controls = tuple(contrast(f"c{i}", "control") for i in range(n_controls))
    return ContrastSet("tiny", (contrast("t", "target"), *controls))


def two_stages(family: str, folder: Path) -> tuple[Path, Path]:
    """A base and a copy in which one matrix changed."""
    base = toy.save_tiny(family, folder / "base", seed=0)
    tuned = toy.tiny_model(family, seed=0)
    site = next(s for s in sites_of(shape_of(tuned.config)) if s.name == SITE)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        matrix_of(tuned, site).add_(0.1 * torch.randn(site.d_out, site.d_in, generator=draw))
    toy.save_tiny(family, folder / "sft", seed=0)
    tuned.save_pretrained(folder / "sft")
    return base, folder / "sft"


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_ten_lines_on_a_saved_folder(family: str, tmp_path: Path) -> None:
    base, sft = two_stages(family, tmp_path)
    lineage = mw.load_lineage(base=base, sft=sft)
    given = prompts(19)
    bank = probes.fit(
        lineage["sft"], given, n_permutations=9, n_bootstrap=9, seed=0, progress=False
    )
    readout = Readout("A", tuple(p.positive for p in given["t"].pairs), yes=(9,))
    answer = mw.attribute_stages(
        lineage, bank, prompts=given, readout=readout, n_null=19, seed=0, progress=False
    )
    table = answer.to_pandas()
    changed = table[table["verdict"] != Word.NO_CHANGE]
    assert set(changed["site"]) == {SITE}
    path = answer.tables["path"].set_index("site")["path_share"]
    assert path.abs().idxmax() == SITE
    assert float(answer.tables["stages"]["completeness_error"].iloc[0]) < 0.01
    assert mw.load_report(answer.save(tmp_path / "run")).equals(answer)
    assert len(answer.plot().data) > 0  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["bridge", "hooked_transformer"])
def test_from_the_users_own_object(kind: str, tmp_path: Path) -> None:
    """Own hooks, own run_with_cache, own vector: a projection; no reloading, hooks untouched."""
    import conformance

    if kind == "hooked_transformer" and not conformance.has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    base, sft = two_stages("llama", tmp_path)
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(sft, dtype=torch.float32).eval()
    if kind == "bridge":
        own: Any = conformance.bridge(module, tmp_path / "tokenizer")
    else:
        own = conformance.hooked_transformer(module)
    calls: list[tuple[int, ...]] = []
    own.blocks[1].hook_resid_post.add_hook(lambda value, hook: calls.append(tuple(value.shape)))
    tokens = torch.arange(5, 11)[None]
    logits, cache = own.run_with_cache(tokens)
    vector = cache["blocks.1.hook_resid_post"][0, -1].detach()

    mine = mw.Direction(vector, mw.Space.parse("blocks.1.hook_resid_post"), label="mine")
    difference = mw.load_lineage(base=base, sft=own).diff("base", "sft")
    found = mw.project(mw.svd(difference, SITE, progress=False), mine, progress=False)
    row = found.table[found.table["site"] == SITE].iloc[0]
    delta = difference.weight(SITE).double()
    u = torch.linalg.svd(delta)[0][:, 0]
    expected = abs(float(u @ vector.double() / vector.double().norm()))
    assert float(row["cosine"]) == pytest.approx(expected, abs=1e-5)
    assert row["verdict"] in (Word.ALIGNED_NO_CONTROLS, Word.NOT_SIGNIFICANT, Word.UNRESOLVED,
                              Word.ALIGNED_NUISANCE)  # fmt: skip

    fired = len(calls)  # the check at loading runs the user's hooks too
    again, _ = own.run_with_cache(tokens)
    assert torch.equal(again, logits)
    assert len(calls) == fired + 1, "the user's hook is there, once"

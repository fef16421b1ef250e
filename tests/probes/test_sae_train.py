"""Training on the spot: it learns, a broken run ends as the unbroken one does, inputs refused."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mi_weightspace.core.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    OutputError,
    PromptError,
)
from mi_weightspace.core.sae import Sae
from mi_weightspace.core.space import Space
from mi_weightspace.models.backends.torch_hooks import TorchLens
from mi_weightspace.models.toy import tiny_model
from probes import sae_io, sae_train
from probes.sae import check_fit, read_stage
from probes.sae_fit import activations, fvu_of
from probes.sae_stream import Activations
from probes.sae_train import SaeSettings, train_diff_sae, train_sae

pytest.importorskip("sae_lens")
POINT = "resid_post.1"


@pytest.fixture(scope="module")
def lens() -> TorchLens:
    return TorchLens(tiny_model("llama"), None)


def prompts(n: int = 60, words: int = 40) -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(20, 20 + words, (9,), generator=draw).tolist()) for _ in range(n)]


def train(lens: TorchLens, **changes: Any) -> Sae:
    own: dict[str, Any] = {"d_sae": 64, "steps": 60, "batch": 64, "progress": False} | changes
    return train_sae(lens, prompts(), POINT, **own)


def same(a: Sae, b: Sae) -> bool:
    return all(torch.equal(value, b.tensors()[name]) for name, value in a.tensors().items())


@pytest.mark.parametrize("architecture", sae_io.TRAINABLE)
def test_every_architecture_learns(architecture: str, lens: TorchLens) -> None:
    before = torch.get_rng_state()
    k = {"k": 8} if "topk" in architecture or architecture == "matching_pursuit" else {}
    steps = 200 if "topk" in architecture else 100
    sae = train(lens, architecture=architecture, steps=steps, lr=3e-3, **k)
    assert torch.equal(torch.get_rng_state(), before)
    x = activations(lens, prompts(), [POINT])[POINT]
    untrained = train(lens, architecture=architecture, steps=1, lr=1e-9, **k)
    assert fvu_of(sae, x) < 0.8 * fvu_of(untrained, x)
    assert sae.space == Space("resid_post", 1) and sae.metadata.convention == "raw"
    assert sae.l0(x) > 1
    if "topk" in architecture:
        # the saved threshold of a batch-top-k SAE is a slow running mean: it is set anew
        assert sae.l0(x) == pytest.approx(8, abs=0.3)
        assert fvu_of(sae, x) < 0.7
        # units of the model: scaling and centring are folded away
        assert (sae.b_dec - x.mean(0)).norm() < 0.7 * x.mean(0).norm()


def test_trained_here_fits_here(lens: TorchLens) -> None:
    sae = train(lens, steps=300, lr=3e-3)
    fit = check_fit(sae, lens, prompts())
    assert fit.capture == POINT and fit.fvu < 0.7
    found = read_stage(lens, prompts(), sae, role="clean", progress=False)
    assert found.facts["l0"] == pytest.approx(16, abs=0.5)


@pytest.mark.parametrize("architecture", ["topk", "standard", "batchtopk"])
def test_the_models_units_do_not_matter(architecture: str, lens: TorchLens) -> None:
    """Everything that writes into the stream times 20: the same SAE in other units."""
    loud = TorchLens(tiny_model("llama"), None)
    with torch.no_grad():
        loud.model.model.embed_tokens.weight.mul_(20)
        for layer in loud.model.model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
            layer.mlp.down_proj.weight.mul_(20)
    x = activations(lens, prompts(), [POINT])[POINT]
    assert (activations(loud, prompts(), [POINT])[POINT] / (20 * x) - 1).abs().median() < 1e-3
    one, other = (train(m, architecture=architecture, steps=60, lr=3e-3) for m in (lens, loud))
    assert fvu_of(other, 20 * x) == pytest.approx(fvu_of(one, x), rel=0.1)
    assert (other.b_dec / 20 - one.b_dec).norm() < 0.1 * one.b_dec.norm()
    assert other.l0(20 * x) == pytest.approx(one.l0(x), rel=0.1)


def test_same_seed_same_sae(lens: TorchLens) -> None:
    first = train(lens, steps=10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)  # the global generator plays no part
        assert same(first, train(lens, steps=10))
    assert not same(first, train(lens, steps=10, seed=1))


class Broken(Exception):
    pass


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard"])
def test_a_broken_run_ends_where_the_unbroken_one_does(
    architecture: str, lens: TorchLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # warm-up, decay and the warm-up of the coefficient all lie on both sides of the break
    options = {"l1_warm_up_steps": 50} if architecture == "standard" else {}
    own: dict[str, Any] = {"architecture": architecture, "options": options, "steps": 100}
    whole = train(lens, folder=tmp_path / "whole", **own)
    save = sae_train.save

    def stop(trainer: Any, path: Path, record: Any) -> None:
        save(trainer, path, record)
        if trainer.n_training_steps == 40:
            raise Broken

    monkeypatch.setattr(sae_train, "save", stop)
    with pytest.raises(Broken):
        train(lens, folder=tmp_path / "broken", checkpoint_every=20, **own)
    monkeypatch.setattr(sae_train, "save", save)
    taken = []
    at = Activations.at
    monkeypatch.setattr(Activations, "at", lambda s, step: (taken.append(step), at(s, step))[1])
    resumed = train(lens, folder=tmp_path / "broken", checkpoint_every=7, resume=True, **own)
    assert taken == list(range(40, 100))
    assert same(whole, resumed)
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == sorted(
        ["cfg.json", "mi_weightspace_hashes.json", "sae_weights.safetensors", "training.json"]
    )
    again = train(lens, folder=tmp_path / "broken", resume=True, **own)
    assert same(again, whole) and len(taken) == 60  # read, not trained
    assert same(sae_io.load_sae(tmp_path / "whole"), whole)


def test_control_c_leaves_a_run_that_continues(
    lens: TorchLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Activations.at

    def interrupt(self: Activations, step: int) -> torch.Tensor:
        if step == 25:
            signal.raise_signal(signal.SIGINT)
        return at(self, step)

    monkeypatch.setattr(Activations, "at", interrupt)
    # a shell that starts tests in the background has the signal ignored
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(lens, steps=40, folder=tmp_path / "run", checkpoint_every=10)
    finally:
        signal.signal(signal.SIGINT, handler)
    monkeypatch.setattr(Activations, "at", at)
    resumed = train(lens, steps=40, folder=tmp_path / "run", checkpoint_every=10, resume=True)
    assert same(resumed, train(lens, steps=40))


def test_folders_and_records(lens: TorchLens, tmp_path: Path) -> None:
    train(lens, steps=5, folder=tmp_path / "run")
    with pytest.raises(OutputError, match="not empty"):
        train(lens, steps=5, folder=tmp_path / "run")
    with pytest.raises(ConfigError, match="other seed, steps"):
        train(lens, steps=6, seed=2, folder=tmp_path / "run", resume=True)
    other = TorchLens(tiny_model("llama", seed=1), None)
    with pytest.raises(ConfigError, match="other model"):
        train(other, steps=5, folder=tmp_path / "run", resume=True)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "training.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="damaged"):
        train(lens, steps=5, folder=tmp_path / "bad", resume=True)


def test_a_difference(lens: TorchLens) -> None:
    tuned = TorchLens(tiny_model("llama"), None)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        matrix = tuned.model.model.layers[1].mlp.down_proj.weight
        matrix += 0.3 * torch.randn(matrix.shape, generator=draw)
    sae = train_diff_sae(
        lens, tuned, prompts(), POINT, d_sae=64, k=8, steps=200, batch=64, lr=3e-3, progress=False
    )
    x = activations(tuned, prompts(), [POINT], base=lens)[POINT]
    assert fvu_of(sae, x) < 0.6
    assert sae.metadata.difference_of
    found = read_stage(
        tuned, prompts(), sae, base=lens, role="clean", position="all_mean", progress=False
    )
    assert found.facts["fvu"] == pytest.approx(fvu_of(sae, x), rel=1e-3)
    with pytest.raises(PromptError, match="vary"):
        train_diff_sae(lens, lens, prompts(), POINT, d_sae=64, progress=False)


@pytest.mark.parametrize("buffer", [None, 100])
def test_the_stream_gives_every_token_once_an_epoch(buffer: int | None, lens: TorchLens) -> None:
    given = prompts(words=280)

    def made() -> Activations:
        return Activations(lens, None, given, POINT, 32, 0, buffer=buffer)

    source = made()
    assert (len(source.chunks) == 1) == (buffer is None)
    each = sum(size // 32 for size in source.sizes)
    rows = torch.cat([source.at(step) for step in range(each)])
    tokens = activations(lens, given, [POINT])[POINT]
    nearest = torch.cdist(rows, tokens).min(1)
    assert nearest.values.max() < 1e-2 and len(set(nearest.indices.tolist())) == len(rows)
    assert len(rows) > 0.9 * len(tokens) - 32 * len(source.chunks)
    again = torch.cat([source.at(each + step) for step in range(each)])
    assert not torch.equal(rows, again)
    assert torch.equal(made().at(each - 1), rows[-32:])  # from nothing but the step


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "temporal"}, "architecture"),
        ({"architecture": "nonsense"}, "architecture"),
        ({"k": 0}, "k"),
        ({"k": 64}, "k"),
        ({"architecture": "standard", "k": 3}, "k"),
        ({"l1": 1.0}, "l1"),
        ({"architecture": "standard", "l1": -1.0}, "l1"),
        ({"architecture": "matching_pursuit", "l1": 1.0}, "l1"),
        ({"architecture": "matching_pursuit", "k": 64}, "k"),
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"lr": 0.0}, "lr"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"d_sae": 0}, "d_sae"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], words: str, lens: TorchLens) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        train(lens, **changes)


def test_other_refusals(lens: TorchLens) -> None:
    with pytest.raises(PromptError, match="at least two"):
        train_sae(lens, [(5, 6)], POINT, d_sae=64, progress=False)
    with pytest.raises(PromptError, match="vary"):
        train_sae(lens, [(5, 6), (5, 6, 6)], "resid_pre.0", d_sae=64, progress=False)
    with pytest.raises(DivergedError, match="step"):
        train(lens, architecture="standard", l1=float("inf"), steps=3)


def test_defaults_are_within_range() -> None:
    assert SaeSettings(64).fields(8)["k"] == 16
    assert SaeSettings(20).fields(8)["k"] == 10
    assert SaeSettings(64, "matching_pursuit", k=3).fields(8)["max_iterations"] == 3
    widths = SaeSettings(64, "matryoshka_batchtopk").fields(8)["matryoshka_widths"]
    assert widths == [16, 32, 64]

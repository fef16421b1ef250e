"""The realised change against explicit float64 decompositions, a planted write and a decoy."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mi_weightspace.core.errors import ConfigError, MismatchError, PromptError
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space
from mi_weightspace.models.backends.torch_hooks import TorchLens
from mi_weightspace.models.toy import tiny_model
from mi_weightspace.models.weights import Difference, ModuleSource
from mi_weightspace.spectral import weighted as module
from mi_weightspace.spectral.krylov import leading_triplets
from mi_weightspace.spectral.weighted import (
    Weighted,
    captured,
    gather_inputs,
    weighted,
    without_massive,
)

pytestmark = pytest.mark.quick

D_OUT, D_IN, ROWS = 192, 256, 512
RANK = 6


class OneMatrix:
    """The least a `WeightSource` must answer for one matrix."""

    name = "one matrix"
    stage = "sft"

    def __init__(
        self,
        matrix: Tensor,
        factors: tuple[Tensor, Tensor] | None = None,
        read: Tensor | None = None,
        write: Tensor | None = None,
    ) -> None:
        self.matrix, self._factors, self._read, self._write = matrix, factors, read, write
        d_out, d_in = matrix.shape
        spaces = (Space("mlp_hidden", 0), Space("resid_post", 0))
        self.site = Site("blocks.0.mlp.out", "mlp.out", 0, d_out, d_in, *spaces)

    def sites(self, select: Any = None) -> list[Site]:
        return [self.site]

    def weight(self, site: Any) -> Tensor:
        return self.matrix.clone()

    def factors(self, site: Any) -> Any:
        return self._factors

    def read_gain(self, site: Any) -> Any:
        return self._read

    def write_gain(self, site: Any) -> Any:
        return self._write


def ask(source: OneMatrix, x: Tensor, **options: Any) -> Weighted:
    return weighted(source, source.site, x, **({"rank": RANK} | options))  # pyright: ignore[reportArgumentType]


def noise(*shape: int, name: str) -> Tensor:
    return torch.randn(*shape, generator=generator(11, "test_weighted", name))


def inputs(n: int = ROWS, name: str = "inputs") -> Tensor:
    """Power-law principal components and a mean that is not zero."""
    axes = torch.linalg.qr(noise(D_IN, D_IN, name="axes"))[0]
    sizes = 3.0 / torch.arange(1, D_IN + 1) ** 0.7
    return (noise(n, D_IN, name=name) * sizes + 0.5 * sizes.roll(2)) @ axes.T


def change() -> Tensor:
    return 0.05 * noise(D_OUT, D_IN, name="change")


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u.T, s, vt


def test_equals_the_explicit_decomposition() -> None:
    d, x = change(), inputs()
    got = ask(OneMatrix(d), x)
    moved = d.double() @ x.double().T / math.sqrt(ROWS)
    u, s, _ = spectrum(moved)
    torch.testing.assert_close(got.realised, s[:RANK], rtol=2e-3, atol=0)
    assert abs(float(got.components.write[0].double() @ u[0])) > 1 - 1e-5
    mean = x.double().mean(0)
    centred = d.double() @ (x.double() - mean).T / math.sqrt(ROWS)
    v, t, _ = spectrum(centred)
    torch.testing.assert_close(got.dependent_realised, t[:RANK], rtol=2e-3, atol=0)
    assert abs(float(got.dependent.write[0].double() @ v[0])) > 1 - 1e-4
    torch.testing.assert_close(got.constant.double(), d.double() @ mean, rtol=1e-4, atol=1e-6)
    facts = got.components.facts
    total = float(moved.square().sum())
    assert facts["realised_fro"] == pytest.approx(math.sqrt(total), rel=1e-5)
    assert facts["share_1"] == pytest.approx(float(s[0] ** 2) / total, rel=1e-3)
    assert facts["share"] == pytest.approx(float(s[:RANK].square().sum()) / total, rel=1e-2)
    assert facts["constant_share"] == pytest.approx(
        float((d.double() @ mean).norm() ** 2) / total, rel=1e-4
    )
    assert facts["n_rows"] == ROWS
    dependent = got.dependent.facts["realised_fro"]
    assert dependent == pytest.approx(float(centred.norm()), rel=1e-5)
    # the two parts add up: E‖Dx‖² = ‖Dμ‖² + E‖D(x − μ)‖²
    assert total == pytest.approx(float(got.constant.norm()) ** 2 + dependent**2, rel=1e-4)  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]


def test_parts_sum_to_the_projected_change() -> None:
    """With gains folded: ``U Uᵀ diag(g_w) D diag(g_r)``."""
    d, x = change(), inputs()
    read, write = 1 + 0.3 * noise(D_IN, name="read"), 1 + 0.3 * noise(D_OUT, name="write")
    got = ask(OneMatrix(d, read=read, write=write), x).components
    u, _, _ = spectrum((write[:, None] * d).double() @ x.double().T)
    assert abs(float(got.write[0].double() @ u[0])) > 1 - 1e-5
    seen = write[:, None] * d * read
    torch.testing.assert_close(got.matrix(), got.write.T @ (got.write @ seen), rtol=1e-3, atol=1e-5)
    raw = ask(OneMatrix(d, read=read, write=write), x, fold_gains=False).components
    plain = ask(OneMatrix(d), x).components
    torch.testing.assert_close(raw.write, plain.write)
    torch.testing.assert_close(raw.read, plain.read)
    assert got.method == "svd_activation_weighted"
    assert got.stage == "sft"


def test_white_inputs_give_the_raw_decomposition() -> None:
    d = change() + 0.3 * noise(D_OUT, 2, name="b") @ noise(2, D_IN, name="a") / 10
    x = torch.linalg.qr(noise(ROWS, D_IN, name="white"))[0] * math.sqrt(ROWS)
    got = ask(OneMatrix(d), x)
    u, s, vt = spectrum(d)
    assert float((got.realised - s[:RANK]).abs().max() / s[0]) < 5e-3
    assert abs(float(got.components.write[0].double() @ u[0])) > 1 - 1e-5
    assert abs(float(got.components.read[0].double() @ vt[0])) > 1 - 1e-5
    assert float(got.components.scale[0]) == pytest.approx(float(s[0]), rel=1e-4)


def test_best_description_of_the_realised_change() -> None:
    d, x = change(), inputs()
    got = ask(OneMatrix(d), x)
    raw = leading_triplets(d, RANK, generator=generator(0, "raw"))
    own, other = captured(got.components.write, d, x), captured(raw.left, d, x)
    assert own > other
    assert own == pytest.approx(float(got.components.facts["share"] or 0), rel=1e-3)
    for _ in range(3):
        random = torch.linalg.qr(noise(D_OUT, RANK, name="random"))[0].T
        assert captured(random, d, x) < own


def test_factors_need_no_product() -> None:
    b, a = noise(D_OUT, 4, name="b"), 0.1 * noise(4, D_IN, name="a")
    x = inputs()
    got = ask(OneMatrix(b @ a, factors=(b, a)), x)
    dense = ask(OneMatrix(b @ a), x)
    assert len(got.components) == len(dense.components) == 4
    torch.testing.assert_close(got.realised, dense.realised, rtol=1e-4, atol=0)
    cosines = (got.components.write * dense.components.write).sum(1)
    assert float(cosines.min()) > 1 - 1e-4
    assert got.components.facts["null_edge"] == 0.0


@pytest.mark.parametrize("strength", [0.8, 1.2])
def test_finds_the_write_on_live_inputs_and_not_the_decoy(strength: float) -> None:
    """A write c at 0.8 of the noise edge on a leading input PC, a louder one on dead inputs."""
    axes = torch.linalg.qr(noise(D_IN, D_IN, name="axes"))[0]
    c = torch.nn.functional.normalize(noise(D_OUT, name="c"), dim=0)
    decoy = torch.nn.functional.normalize(noise(D_OUT, name="decoy"), dim=0)
    d = change()
    edge = 0.05 * (D_OUT**0.5 + D_IN**0.5)
    planted = d + strength * edge * torch.outer(c, axes[:, 2])
    planted += 3 * edge * torch.outer(decoy, axes[:, -1])
    x, held_out = inputs(), inputs(name="held out")
    raw = leading_triplets(planted, RANK, generator=generator(0, "raw"))
    got = ask(OneMatrix(planted), x)
    assert abs(float(raw.left[0] @ c)) < 0.2
    assert abs(float(raw.left[0] @ decoy)) > 0.9
    assert got.cosines(c)["write_1"] > 0.6
    assert got.cosines(decoy)["write_1"] < 0.2
    assert captured(got.components.write[:1], planted, held_out) > 3 * captured(
        raw.left[:1], planted, held_out
    )
    absent = ask(OneMatrix(d + 3 * edge * torch.outer(decoy, axes[:, -1])), x)
    assert absent.cosines(c)["write_1"] < 0.25


def test_pure_noise_on_white_inputs_is_unresolved() -> None:
    got = ask(OneMatrix(change()), noise(4 * ROWS, D_IN, name="white noise"))
    facts = got.components.facts
    assert facts["null_edge"] == pytest.approx(facts["realised_1"], rel=0.06)
    assert not facts["resolved"] or float(facts["certificate"] or 0) > 0.05


def test_large_totals_are_estimated_well(monkeypatch: pytest.MonkeyPatch) -> None:
    d, x = change(), inputs()
    exact = ask(OneMatrix(d), x).components.facts
    monkeypatch.setattr(module, "_EXACT_ENERGY", 0)
    estimate = ask(OneMatrix(d), x).components.facts
    assert (exact["estimated"], estimate["estimated"]) == (False, True)
    assert estimate["realised_fro"] != exact["realised_fro"]
    assert estimate["realised_fro"] == pytest.approx(exact["realised_fro"], rel=0.02)


def test_constant_shift_has_a_sign() -> None:
    c = torch.nn.functional.normalize(noise(D_OUT, name="c"), dim=0)
    x = inputs()
    d = torch.outer(c, torch.nn.functional.normalize(x.mean(0), dim=0))
    got = ask(OneMatrix(d), x)
    assert got.cosines(c)["constant"] == pytest.approx(1.0, abs=1e-5)
    assert got.cosines(-c)["constant"] == pytest.approx(-1.0, abs=1e-5)
    assert got.cosines(-3 * c)["write_1"] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(MismatchError, match="width"):
        got.cosines(torch.ones(D_OUT + 1))


def test_no_change_has_no_direction() -> None:
    got = ask(OneMatrix(torch.zeros(D_OUT, D_IN)), inputs())
    assert len(got.components) == 0
    assert not got.components.facts["resolved"]
    assert math.isnan(got.cosines(torch.ones(D_OUT))["write_1"])


def test_massive_rows_are_dropped_and_counted() -> None:
    x = inputs()
    x[7] *= 1000
    share = ask(OneMatrix(change()), x).components.facts["largest_row_share"]
    assert float(share or 0) > 0.9
    x[8] *= 50  # far above the median, far below the mean that row 7 makes
    kept, dropped = without_massive(x)
    assert dropped == 2
    assert torch.equal(kept, torch.cat([x[:7], x[9:]]))


def test_refusals() -> None:
    source = OneMatrix(change())
    with pytest.raises(MismatchError, match="rows, 256"):
        ask(source, torch.zeros(5, 3))
    with pytest.raises(PromptError, match="two finite rows"):
        ask(source, torch.full((5, D_IN), math.nan))
    with pytest.raises(PromptError, match="two finite rows"):
        ask(source, inputs()[:1])
    with pytest.raises(ConfigError, match="rank"):
        ask(source, inputs(), rank=0)
    lens = TorchLens(tiny_model("llama"))
    with pytest.raises(PromptError, match="no prompts"):
        ask(source, lens)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PromptError, match="after the first"):
        gather_inputs(lens, [(5,)], ["blocks.0.mlp.out"])


PROMPTS = [tuple(range(4 + i, 12 + 2 * i)) for i in range(6)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gathered_inputs_are_those_of_single_runs(family: str) -> None:
    lens = TorchLens(tiny_model(family))
    sites = ["blocks.0.mlp.out", "blocks.1.attn.q"]
    got = gather_inputs(lens, PROMPTS, sites, batch_tokens=30)
    for site in sites:
        rows = []
        for ids in PROMPTS:
            run = lens.run(torch.tensor([ids]), capture=[f"{site}:in"], logits=False)
            rows.append(run.captured[f"{site}:in"][0, 1:])
        torch.testing.assert_close(got[site], torch.cat(rows), rtol=1e-4, atol=1e-5)
    few = gather_inputs(lens, PROMPTS, sites, max_rows=10)
    again = gather_inputs(lens, PROMPTS, sites, max_rows=10, batch_tokens=30)
    other = gather_inputs(lens, PROMPTS, sites, max_rows=10, seed=1)
    assert len(few[sites[0]]) == 10
    torch.testing.assert_close(few[sites[1]], again[sites[1]], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(few[sites[1]], other[sites[1]], atol=1e-3)
    whole = gather_inputs(lens, PROMPTS, sites, drop_first=False)
    assert len(whole[sites[0]]) == len(got[sites[0]]) + len(PROMPTS)


def test_batches_stay_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = TorchLens(tiny_model("llama"))
    run, sizes = lens.run, []

    def watched(tokens: Tensor, **options: Any) -> Any:
        sizes.append(tokens.numel())
        return run(tokens, **options)

    monkeypatch.setattr(lens, "run", watched)
    gather_inputs(lens, PROMPTS, ["blocks.0.mlp.out"], batch_tokens=30)
    assert len(sizes) > 1
    assert max(sizes) <= 30


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_realised_change_is_the_change_of_the_output(family: str) -> None:
    """End to end: run both models, same upstream weights, and compare the matrix's outputs."""
    before = tiny_model(family)
    after = copy.deepcopy(before)
    one, two = TorchLens(before), TorchLens(after)
    site = one.sites("blocks.1.mlp.out")[0]
    parameter = next(p for n, p in after.named_parameters() if _is_second_mlp_out(n))
    with torch.no_grad():
        parameter += 0.02 * noise(*parameter.shape, name="edit")
    two = TorchLens(after)
    difference = Difference(ModuleSource(one), ModuleSource(two), stage="sft")
    got = weighted(difference, site, one, prompts=PROMPTS, rank=4)
    moved = []
    for ids in PROMPTS:
        outs = [
            lens.run(torch.tensor([ids]), capture=[f"{site}:out"], logits=False).captured
            for lens in (one, two)
        ]
        moved.append((outs[1][f"{site}:out"] - outs[0][f"{site}:out"])[0, 1:])
    truth = torch.cat(moved).double()
    size = math.sqrt(float(truth.square().sum() / len(truth)))
    assert got.components.facts["realised_fro"] == pytest.approx(size, rel=1e-3)
    torch.testing.assert_close(got.constant.double(), truth.mean(0), rtol=1e-2, atol=1e-5)
    v = torch.linalg.svd(truth, full_matrices=False)[2]
    assert abs(float(got.components.write[0].double() @ v[0])) > 1 - 1e-4


def _is_second_mlp_out(name: str) -> bool:
    return name.endswith(("layers.1.mlp.down_proj.weight", "h.1.mlp.c_proj.weight"))

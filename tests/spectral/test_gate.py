"""Stage gate and site statistic: naive oracles, a planted change, a planted absence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space
from mi_weightspace.spectral.gate import site_p, site_statistic, stage_gate

pytestmark = pytest.mark.quick

N_PAIRS, D, N_CONTROLS = 12, 8, 39
POINTS = (Space("resid_pre", 0), Space("resid_post", 0), Space("resid_post", 1))
SITE = Site("blocks.1.mlp.out", "mlp.out", 1, D, D, Space("mlp_hidden", 1), POINTS[2])


def contrasts(n_controls: int = N_CONTROLS) -> ContrastSet:
    pairs = tuple(Pair(f"i{i}", "a", "b") for i in range(N_PAIRS))
    names = [("authority", "target")] + [(f"c{i}", "control") for i in range(n_controls)]
    return ContrastSet("test", tuple(Contrast(n, k, pairs) for n, k in names))  # pyright: ignore[reportArgumentType]


def stages(
    seed: int, *, boost: float, n_controls: int = N_CONTROLS
) -> tuple[PairedActivations, PairedActivations]:
    """Random shifts; the later stage adds small noise everywhere and `boost`·Δμ to the target."""
    g = torch.Generator().manual_seed(seed)
    set_ = contrasts(n_controls)
    before, after = {}, {}
    for contrast in set_:
        for point in POINTS:
            value = torch.randn(N_PAIRS, 2, D, generator=g)
            if point == POINTS[0]:  # identical tokens on both sides: no shift at all
                value[:, 1] = value[:, 0]
            else:
                value[:, 0] += 2 * torch.randn(D, generator=g)
            later = value.clone()
            if point == POINTS[2]:
                later[:, 0] += 0.2 * torch.randn(D, generator=g)
                if contrast.name == "authority":
                    later[:, 0] += boost * (value[:, 0] - value[:, 1]).mean(0)
            before[contrast.name, point.name] = value
            after[contrast.name, point.name] = later
    shift = torch.randn(len(set_), D, generator=g)
    mean = torch.zeros(D)

    def make(stage: str, values: dict[tuple[str, str], torch.Tensor]) -> PairedActivations:
        return PairedActivations(
            stage, "h", set_, "last", POINTS, values, {SITE.name: shift}, {SITE.name: mean}
        )

    return make("base", before), make("sft", after)


def test_relative_did_equals_the_definition() -> None:
    before, after = stages(0, boost=1.0)
    gate = stage_gate(before, after, "authority")
    for column, point in enumerate(POINTS[1:], start=1):
        b = before.at("authority", point).double()
        a = after.at("authority", point).double()
        shift = (b[:, 0] - b[:, 1]).mean(0)
        did = (a[:, 0] - a[:, 1]).mean(0) - shift
        assert float(gate.relative_did[column]) == pytest.approx(float(did.norm() / shift.norm()))
    assert torch.isnan(gate.relative_did[0]), "no shift, no ratio"


def test_a_planted_change_passes_and_onset_is_its_point() -> None:
    gate = stage_gate(*stages(1, boost=1.0), "authority")
    assert gate.p == pytest.approx(1 / (N_CONTROLS + 1))
    assert gate.onset == POINTS[2]


def test_without_a_change_the_rank_is_uniform() -> None:
    """Exchangeable target: P(p ≤ 0.05) is 0.05; 200 draws, three binomial deviations."""
    hits = sum(stage_gate(*stages(s, boost=0.0), "authority").p <= 0.05 for s in range(200))
    assert hits <= 10 + 3 * (200 * 0.05 * 0.95) ** 0.5


def test_site_statistic_equals_the_definition_and_its_p_is_max_t() -> None:
    before, after = stages(2, boost=1.0)
    names = [c.name for c in before.contrasts]
    difference = torch.randn(D, D, generator=torch.Generator().manual_seed(5))
    g, absolute = site_statistic(difference, SITE, before, after, names)
    for row in (0, 7):
        written = difference.double() @ before.site_shift[SITE.name][row].double()
        shift = before.differences(names[row], POINTS[2]).double().mean(0)
        did = after.differences(names[row], POINTS[2]).double().mean(0) - shift
        expected = float(written @ did / (did.norm() * shift.norm()))
        assert float(g[row]) == pytest.approx(expected, rel=1e-5)
        assert float(absolute[row]) == pytest.approx(expected * float(shift.norm()), rel=1e-5)
    observed = torch.tensor([3.0, 0.5])
    null = torch.tensor([[1.0, 0.2], [0.1, 4.0], [0.3, 0.4]])
    assert site_p(observed, null).tolist() == [2 / 4, 3 / 4]


@pytest.mark.parametrize("size", [0.2, 5.0])
def test_a_target_of_another_size_than_its_controls_does_not_pass_for_it(size: float) -> None:
    """The same noise on every contrast: a quiet target stands out relatively, a loud one does not
    change more; where noise grows with size the loud one stands out absolutely. Neither passes."""
    hits = 0
    for seed in range(60):
        before, after = stages(seed, boost=0.0)
        for point in POINTS[1:]:
            value, later = (s.values["authority", point.name] for s in (before, after))
            noise = later - value
            if size > 1:
                noise = noise * size
            value[:, 0] = value[:, 1] + size * (value[:, 0] - value[:, 1])
            later.copy_(value + noise)
        gate = stage_gate(before, after, "authority")
        one = gate.p_relative if size < 1 else gate.p_absolute
        assert one <= 0.1, "the case is one where one of the two stands out"
        hits += gate.p <= 0.05
    assert hits <= 60 * 0.05 + 3 * (60 * 0.05 * 0.95) ** 0.5


def test_where_nothing_changed_the_change_is_zero_and_the_gate_silent() -> None:
    before, _ = stages(0, boost=0.0)
    gate = stage_gate(before, replace(before, stage="sft"), "authority")
    assert gate.relative_did[1:].tolist() == [0.0, 0.0]
    assert gate.p == 1.0 and gate.onset is None


def test_stages_harvested_on_other_prompts_are_refused() -> None:
    before, after = stages(0, boost=1.0)
    with pytest.raises(PromptError, match="identical prompts"):
        stage_gate(before, replace(after, position="all_mean"), "authority")


def test_without_controls_there_is_no_gate() -> None:
    with pytest.raises(PromptError, match="no control contrast"):
        stage_gate(*stages(0, boost=1.0, n_controls=0), "authority")

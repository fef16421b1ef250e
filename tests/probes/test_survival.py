"""Feature survival: planted truth, planted absence, and the numbers it is read beside."""

from __future__ import annotations

import pytest
import torch
from detection_cases import factorial, pairs
from scipy.stats import false_discovery_control, ttest_ind
from torch import Tensor

from mi_weightspace.core.errors import MismatchError
from mi_weightspace.core.labelled import LabelledSet
from mi_weightspace.core.seeds import generator
from probes.survival import benjamini_hochberg, effects, survival

pytestmark = pytest.mark.quick
WIDTH, K = 40, 6
FAST = {"k": K, "n_halves": 4, "n_permutations": 199, "n_bootstrap": 50}


def codes(labelled: LabelledSet, size: Tensor, seed: str) -> Tensor:
    """Rectified noise, the first K latents shifted by the label; the last never fires."""
    rows = torch.randn(len(labelled), WIDTH, generator=generator(0, seed), dtype=torch.float64)
    rows[:, :K] += size * labelled.labels[:, None]
    rows = (rows + 1).clamp(min=0)
    rows[:, -1] = 0
    return rows


@pytest.mark.parametrize("labelled", [pairs(80), factorial(8, 8, 2)], ids=["pairs", "factorial"])
def test_what_was_planted_survives_and_nothing_else(labelled: LabelledSet) -> None:
    strong = torch.full((K,), 2.0, dtype=torch.float64)
    half = strong.clone()
    half[K // 2 :] = 0
    found = survival(
        {
            "open": codes(labelled, strong, "open"),
            "kept": codes(labelled, strong, "kept"),
            "half": codes(labelled, half, "half"),
            "flipped": codes(labelled, -strong, "flipped"),
            "clean": codes(labelled, 0 * strong, "clean"),
        },
        labelled,
        "open",
        roles={"clean": "clean"},
        **FAST,
    )
    table = found.table.set_index("stage")
    assert table.loc["open", "survived"] > K - 1, "the ceiling"
    assert table.loc["kept", "survived"] > K - 1
    assert table.loc["half", "survived"] == pytest.approx(K / 2, abs=0.8)
    assert table.loc["flipped", "survived"] == 0
    assert table.loc["clean", "survived"] <= 0.5
    assert table.loc["open", "overlap"] > K - 1 > 2 > table.loc["clean", "overlap"]
    assert table.loc["flipped", "overlap"] > K - 1, "picked again, with the other sign"
    assert (table["alive"] == WIDTH - 1).all()
    assert table.loc["open", "chance"] == pytest.approx(K * K / (WIDTH - 1))
    assert (table["low"] <= table["high"]).all()
    assert table.loc["kept", "low"] >= K - 2
    assert table.loc["clean", "high"] <= 2
    assert table.loc["clean", "role"] == "clean"
    latents = found.latents.set_index("latent")
    assert set(range(K)) <= set(latents.index)
    assert latents.loc[0, "picked"] == 1.0
    assert latents.loc[0, "survived_kept"] == 1.0
    assert latents.loc[0, "survived_clean"] <= 0.5
    assert latents.loc[0, "effect_flipped"] < -1 < 1 < latents.loc[0, "effect_kept"]


def test_latents_of_the_prompt_survive_everything() -> None:
    """Why a count without a floor says nothing."""
    labelled = pairs(60)
    size = torch.full((K,), 2.0, dtype=torch.float64)
    stages = {name: codes(labelled, size, name) for name in ("open", "hidden", "clean")}
    table = survival(stages, labelled, "open", **FAST).table.set_index("stage")
    assert table.loc["clean", "survived"] > K - 1
    assert table.loc["hidden", "survived"] > K - 1


def test_effects_and_discoveries_equal_scipy() -> None:
    rows = torch.randn(30, 7, generator=generator(0, "rows"), dtype=torch.float64)
    rows[:, 6] = 3.0
    labels = torch.arange(30) % 3 // 2
    one, zero = rows[labels > 0].numpy(), rows[labels == 0].numpy()
    d = effects(rows, labels)
    t = ttest_ind(one[:, :6], zero[:, :6]).statistic
    expected = t * (1 / len(one) + 1 / len(zero)) ** 0.5
    torch.testing.assert_close(d[:6], torch.from_numpy(expected))
    assert d[6] == 0
    p = torch.tensor([0.001, 0.2, 0.012, 0.04, 0.9, 0.02, 0.013], dtype=torch.float64)
    expected = torch.from_numpy(false_discovery_control(p.numpy()) <= 0.05)
    assert torch.equal(benjamini_hochberg(p), expected)
    assert not benjamini_hochberg(torch.ones(3).double()).any()


def test_bad_input_is_refused() -> None:
    labelled = pairs(8)
    own = torch.rand(16, 5)
    for stages, opened, k in (
        ({"a": own}, "b", 2),
        ({"a": own, "b": own[:, :4]}, "a", 2),
        ({"a": own[:9]}, "a", 2),
        ({"a": own}, "a", 6),
    ):
        with pytest.raises(MismatchError, match="feature survival"):
            survival(stages, labelled, opened, k=k)

"""The causal gate on a trained organism: the direction SFT wired passes, a readable decoy does not.

Measured on micro deference. Alphas 0.125 and 0.25: the true direction PASSes at seeds 0-3; of 27
decoys read at AUROC 1 (seeds 0-3) v1.1 passes 17 and this gate none; 2, at |cos| above 0.7 with the
true direction, get PASS*. Alphas 0.125 to 4, all 495 control directions of seeds 0-4 ranked at the
true direction's scale: v1.1 passes 194, this gate none (PASS* 24, GENERIC 14).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import probes
from mi_weightspace import organisms
from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.verdict import Word
from mi_weightspace.models.harvest import harvest
from mi_weightspace.models.lens import Lens
from mi_weightspace.models.load import load
from mi_weightspace.organisms import Organism
from probes.gate_report import GateReport

POINT = "resid_post.2"


@pytest.fixture(scope="module")
def sft(deference: Organism) -> Lens:
    return load(deference.stages["sft"])


@pytest.fixture(scope="module")
def activations(sft: Lens, deference: Organism) -> PairedActivations:
    return harvest(sft, deference.contrasts, points=[POINT], stage="sft", progress=False)


def fitted(activations: PairedActivations, contrasts: ContrastSet) -> tuple[Direction, float]:
    """The direction of the set's target, and the AUROC it is read with."""
    bank = probes.fit(
        activations.select(contrasts), contrasts, n_permutations=99, n_bootstrap=50, progress=False
    )
    return bank.direction(), float(bank.table["auroc"].iloc[0])


def gated(lens: Lens, direction: Direction, organism: Organism, **given: Any) -> GateReport:
    fast: dict[str, Any] = {
        "alphas": (0.125,),
        "n_reference": 15,
        "n_bootstrap": 200,
        "n_controls": 6,
        "interventions": ("mean_ablate", "add"),
    }
    return probes.gate(
        lens, direction, organism.contrasts, target="authority", progress=False, **(fast | given)
    )


def test_the_trained_direction_passes_and_an_equally_readable_decoy_passes_only_v11(
    deference: Organism, sft: Lens, activations: PairedActivations
) -> None:
    own = ContrastSet("own", (deference.contrasts["authority"], *deference.contrasts.controls[:4]))
    direction, read = fitted(activations, own)
    true = gated(sft, direction, deference)
    decoy_set = organisms.decoys(deference, 1)[0]
    decoy_direction, decoy_read = fitted(activations, decoy_set)
    decoy = gated(sft, decoy_direction, deference)
    assert read == decoy_read == 1.0
    assert true.outcome == "PASS" and true.verdicts[0].word == Word.LOAD_BEARING
    assert true.under("v1.1").evidence["gate"] == "PASS"
    assert decoy.under("v1.1").evidence["gate"] == "PASS"
    assert decoy.outcome == "DETECTOR-ONLY" and decoy.verdicts[0].word == Word.DETECTOR_ONLY

    facts = true.verdicts[0].evidence
    # the ablation takes away what the frame brought, and nothing else
    assert float(facts["effect"]) == pytest.approx(-float(facts["difference"]), abs=0.05)  # pyright: ignore[reportArgumentType]
    assert float(facts["specificity_low"]) > 0.4  # pyright: ignore[reportArgumentType]
    first = decoy.table.iloc[0]
    assert abs(first["isotropic_z"]) > 6 and first["p"] > 0.3


def test_orthogonalised_weights_take_the_behaviour_away(
    deference: Organism, sft: Lens, activations: PairedActivations
) -> None:
    own = ContrastSet("own", (deference.contrasts["authority"], *deference.contrasts.controls[:4]))
    direction, _ = fitted(activations, own)
    prompts = torch.tensor([p.positive for p in deference.contrasts["authority"].pairs])
    say = deference.language.ids["YIELD"]

    def rate(lens: Lens) -> float:
        logits = lens.run(prompts).logits
        assert logits is not None
        return float(logits[:, -1].softmax(-1)[:, say].mean())

    edited = sft.with_edit(probes.orthogonalised(sft, direction))
    assert rate(sft) > 0.5 and rate(edited) < 0.2


@pytest.mark.slow
def test_decoys_are_refused_at_the_measured_rate(
    deference: Organism, sft: Lens, activations: PairedActivations
) -> None:
    found = []
    for decoy in organisms.decoys(deference, 8):
        direction, read = fitted(activations, decoy)
        report = gated(sft, direction, deference)
        found.append((read, report.outcome, report.under("v1.1").evidence["gate"]))
    assert all(read == 1.0 for read, _, _ in found)
    assert sum(earlier == "PASS" for _, _, earlier in found) >= 3
    assert all(ours == "DETECTOR-ONLY" for _, ours, _ in found)

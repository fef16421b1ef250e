"""Planted codes end to end, full settings: each gives the word it was planted for."""

from __future__ import annotations

from typing import get_args

import pytest

from mi_weightspace.organisms.codes import Kind, planted_code
from probes.inoculations import inoculation
from probes.sae import readings_of, rival_saes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_planted_code_gets_its_word(kind: Kind) -> None:
    code = planted_code(kind, 0)
    rivals = rival_saes(code.sae, code.stages["clean"])
    stages = {
        stage: readings_of(x, code.sae, stage=stage, rivals=rivals)
        for stage, x in code.stages.items()
    }
    report = inoculation(
        stages,
        code.labelled,
        code.sae,
        open="open",
        hidden="hidden",
        clean="clean",
        benign="benign",
        progress=False,
    )
    assert report.verdict().word in code.expected, str(report)
    families = report.tables["families"]
    controls = families[families["role"].isin(["clean", "benign"])]
    assert not controls["above_null"].any(), "nothing is detected where nothing was planted"

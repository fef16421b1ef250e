"""Readings of a stage: what is refused, and rows that stay together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mi_weightspace.core.errors import MismatchError, PromptError
from mi_weightspace.core.readings import StageReadings
from mi_weightspace.core.space import Space

pytestmark = pytest.mark.quick


def readings(n: int = 6, **changes: Any) -> StageReadings:
    base = torch.arange(n * 3, dtype=torch.float32).reshape(n, 3)
    fields: dict[str, Any] = {
        "stage": "sft",
        "role": "hidden",
        "dense": base,
        "space": Space("resid_post", 1),
        "codes": {"sae": base.repeat(1, 2) + 100},
        "reconstruction": base + 0.5,
        "components": {"svd": base[:, :2] - 7},
    }
    return StageReadings(**(fields | changes))


def test_rows_select_every_part_alike() -> None:
    whole, index = readings(), [4, 0, 4]
    part = whole.rows(index)
    assert len(part) == 3
    assert part.parts().keys() == whole.parts().keys()
    for name, tensor in whole.parts().items():
        assert torch.equal(part.parts()[name], tensor[index]), name


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"role": "hiden"}, MismatchError),
        ({"codes": {"sae": torch.zeros(5, 4)}}, MismatchError),
        ({"codes": {"sae": torch.zeros(6, 2, 4)}}, MismatchError),
        ({"reconstruction": torch.zeros(6, 4)}, MismatchError),
        ({"components": {"svd": torch.full((6, 2), torch.nan)}}, PromptError),
        ({"dense": torch.full((6, 3), torch.inf)}, PromptError),
    ],
)
def test_bad_parts_are_refused(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        readings(**changes)


def test_one_row_is_refused() -> None:
    with pytest.raises(PromptError, match="at least two"):
        readings().rows([0])


def test_stages_of_another_design_are_refused() -> None:
    one = readings()
    one.check_same_design(replace(one, stage="clean", role="clean"))
    for other in (
        replace(one, space=Space("resid_post", 2)),
        replace(one, codes={}),
        replace(one, position="last"),
        one.rows([0, 1]),
    ):
        with pytest.raises(MismatchError):
            one.check_same_design(other)

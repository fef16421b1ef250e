"""`decompose_difference` from checkpoints to a result, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import mi_weightspace as mw
from mi_weightspace.core.errors import ConfigError, MismatchError, PromptError
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.verdict import Word
from mi_weightspace.models.toy import tiny_model
from mi_weightspace.vpd.differences.result import DifferenceDecomposition
from mi_weightspace.vpd.differences.run import decompose_difference
from mi_weightspace.vpd.evaluate import evaluate
from mi_weightspace.vpd.selfchecks import _collapse  # pyright: ignore[reportPrivateUsage]
from mi_weightspace.vpd.selfchecks_anchor import Anchor, code_version

SITE = "blocks.1.mlp.out"
ROWS = torch.randint(4, 300, (48, 6), generator=generator(0, "rows"))
CONFIG: dict[str, Any] = {
    "sites": (SITE,),
    "n_components": 2,
    "batch_size": 8,
    "n_steps": 100,
    "lr": 5e-3,
    "importance_lr": 5e-3,
    "log_every": 3,
    "importance": {"kind": "layerwise_mlp", "hidden": (8,)},
}
FEW = CONFIG | {"n_steps": 6}
EVALUATION = {"budgets": (3,)}


def planted(scale: float = 1.0) -> tuple[Any, Any, Tensor, Tensor]:
    """A model, the same with one rank-one write into one matrix, and the two unit vectors."""
    base = tiny_model("llama")
    tuned = copy.deepcopy(base)
    matrix = tuned.model.layers[1].mlp.down_proj.weight
    draw = generator(0, "plant")
    write, read = (torch.randn(n, generator=draw) for n in matrix.shape)
    write, read = write / write.norm(), read / read.norm()
    with torch.no_grad():
        matrix.add_(8.0 * scale * torch.outer(write, read))
    return base, tuned, write, read


def run(base: Any, tuned: Any, config: dict[str, Any], **options: Any) -> DifferenceDecomposition:
    stages = {"base": base, "sft": tuned}
    given = {"progress": False, "evaluation": EVALUATION} | options
    return decompose_difference(stages, ROWS, config, **given)


@pytest.fixture(scope="module")
def result() -> tuple[DifferenceDecomposition, Tensor, Tensor]:
    base, tuned, write, read = planted()
    return run(base, tuned, CONFIG), write, read


def test_a_planted_write_is_one_component(
    result: tuple[DifferenceDecomposition, Tensor, Tensor],
) -> None:
    parts, write, read = result
    found = parts[f"{SITE}@sft"]
    assert found.stage == "sft"
    assert abs(float(found.write[0] @ write)) > 0.99
    assert abs(float(found.read[0] @ read)) > 0.99
    assert float(found.scale[1]) < 0.05 * float(found.scale[0])
    rows = parts.tables["maskings"].to_dict("records")
    masking = {row["masking"]: float(row["of_zero"]) for row in rows}
    assert masking["zero"] == 1 and masking["ci"] < 0.05 and masking["delta_only"] > 0.9


def test_reverting_the_component_restores_the_first_stage(
    result: tuple[DifferenceDecomposition, Tensor, Tensor],
) -> None:
    parts, *_ = result
    base, tuned, *_ = planted()
    order = parts[f"{SITE}@sft"].index
    assert order is not None
    edit = parts.revert(f"{SITE}@sft", [int(order[0])])

    def divergence(one: Tensor, other: Tensor) -> float:
        p, q = (x.log_softmax(-1) for x in (one, other))
        return float((p.exp() * (p - q)).sum(-1).mean())

    with torch.no_grad():
        first, last = (mw.load(m).forward(ROWS[:8]) for m in (base, tuned))
        reverted = mw.load(tuned).with_edit(edit).forward(ROWS[:8])
    assert divergence(first, reverted) < 0.05 * divergence(first, last)


def test_saved_loaded_attached(
    result: tuple[DifferenceDecomposition, Tensor, Tensor], tmp_path: Path
) -> None:
    """SPEC 38."""
    parts, *_ = result
    base, tuned, *_ = planted()
    parts.save(tmp_path / "run")
    again = DifferenceDecomposition.load(tmp_path / "run")
    assert again.equals(parts)
    attached = again.attach({"base": base, "sft": tuned})
    name = f"{SITE}@sft"
    assert torch.equal(attached.importances(ROWS[:4])[name], parts.importances(ROWS[:4])[name])
    with pytest.raises(MismatchError, match="fingerprint"):
        again.attach({"base": base, "sft": planted(0.5)[1]})


def test_killed_and_resumed_is_the_same_run(tmp_path: Path) -> None:
    """SPEC 38."""
    base, tuned, *_ = planted()
    config = FEW | {"checkpoint_every": 2}
    whole = run(base, tuned, config, out=tmp_path / "whole")
    seen = []

    def stop(_: dict[str, Any]) -> None:
        seen.append(1)
        if len(seen) == 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(base, tuned, config, out=tmp_path / "cut", on_log=stop)
    resumed = run(base, tuned, config, out=tmp_path / "cut", resume=True)
    for key, value in whole.arrays.items():
        assert torch.equal(value, resumed.arrays[key]), key


def test_equal_weights_are_no_change() -> None:
    """SPEC 37."""
    base = tiny_model("llama")
    found = run(base, copy.deepcopy(base), FEW)
    assert [v.word for v in found.verdicts] == [Word.NO_CHANGE] and not len(found)


def test_what_rounding_explains_is_flagged_and_left_out() -> None:
    """SPEC 37. A change far below the spacing: a few entries went to the next number."""
    base = tiny_model("llama").to(torch.bfloat16)
    tuned = copy.deepcopy(base)
    matrix = tuned.model.layers[1].mlp.down_proj.weight
    draw = generator(0, "dither")
    with torch.no_grad():
        up = torch.rand(matrix.shape, generator=draw) < 0.03  # to the neighbouring number
        matrix.copy_((matrix.float() * torch.where(up, 1 + 2**-7, 1.0)).to(torch.bfloat16))
    found = run(base, tuned, FEW)
    assert [v.word for v in found.verdicts] == [Word.BELOW_FLOOR]
    assert found.config["left_out"] == [f"{SITE}@sft"]


def test_a_change_nobody_can_see_is_refused() -> None:
    """SPEC 37. A direction that no token reads: the weights differ, the outputs do not."""
    base, tuned, *_ = planted(1e-6)
    with pytest.raises(PromptError, match="K0"):
        run(base, tuned, FEW)


def test_a_unit_its_own_noise_hides_names_the_tokens_needed() -> None:
    """SPEC 37."""
    base = tiny_model("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():  # only one token's embedding moves: most rows do not have it
        tuned.model.embed_tokens.weight[5] += 3.0
    rows = ROWS.clone()
    rows[rows == 5] = 6
    rows[-1, 0] = 5
    with pytest.raises(PromptError, match="positions of such data"):
        decompose_difference(
            {"base": base, "sft": tuned}, rows, FEW | {"sites": ("embed",)}, progress=False
        )


def test_contradictions_are_refused() -> None:
    base, tuned, *_ = planted()
    with pytest.raises(ConfigError, match=r"faithfulness\.weight"):
        run(base, tuned, FEW | {"faithfulness": {"weight": 1.0}})
    with pytest.raises(ConfigError, match="share"):
        run(base, tuned, FEW, share=0.2)
    with pytest.raises(ConfigError, match="one length"):
        run(base, tuned, FEW, broad=ROWS[:, :5])
    with pytest.raises(ConfigError, match="rank"):
        wide = copy.deepcopy(base)
        with torch.no_grad():
            noise = torch.randn(32, 96, generator=generator(1, "wide"))
            wide.model.layers[1].mlp.down_proj.weight.add_(noise)
        run(base, wide, FEW, regime="faithful")
    with pytest.raises(MismatchError, match="same architecture"):
        run(base, tiny_model("gpt2"), FEW)
    with pytest.raises(MismatchError, match="vocabulary"):
        run(base, tiny_model("llama", vocab_size=300), FEW)


def test_two_streams_are_mixed_as_asked() -> None:
    """Three quarters of every batch are behaviour; the rows of one epoch do not repeat."""
    from mi_weightspace.vpd.stream import MixedStream

    table = torch.arange(40)[:, None].repeat(1, 3)
    stream = MixedStream(table, 4, 0, n_first=24, first_size=3)
    rows = torch.stack([stream.rows(step) for step in range(8)])
    assert bool((rows[:, :3] < 24).all()) and bool((rows[:, 3:] >= 24).all())
    assert sorted(rows[:, :3].flatten().tolist()) == list(range(24))


def test_an_anchor_is_checked_where_one_is_given(
    result: tuple[DifferenceDecomposition, Tensor, Tensor],
) -> None:
    parts = result[0]
    batches = {"behaviour": ROWS[:8].split(4)}
    for errors, outcome in ((0, "PASS"), (2, "FAIL")):
        known = Anchor("known", errors, 1.0, 0.1, 0, 1, 0.0, code_version())
        options: dict[str, Any] = {"progress": False, **EVALUATION, "anchor": known}
        checks = parts.assessed_on(batches, **options).tables["checks"].set_index("name")
        assert checks["outcome"]["anchor"] == outcome
    assert parts.tables["checks"].set_index("name")["outcome"]["anchor"] == "WARN"  # none given


def test_silent_updates_are_an_answer_and_unsure_ones_count_by_importance(
    result: tuple[DifferenceDecomposition, Tensor, Tensor],
) -> None:
    objective = result[0].objective
    found = evaluate(objective, list(ROWS[:8].split(4)), budgets=(3,), progress=False)

    def outcome(*rows: tuple[str, float, float]) -> str:
        names = ["site", "mean_ci", "firm"]
        spectrum = pd.DataFrame(rows, columns=names).assign(frequency=0.5)
        changed = dataclasses.replace(found, spectrum=spectrum)
        return _collapse(objective, changed, "these").outcome

    assert outcome(("a", 0.5, 0.9)) == "PASS"  # nothing fires at the host's own site
    assert outcome(("a", 0.95, 0.9), ("b", 0.05, 0.1)) == "PASS"
    assert outcome(("a", 0.8, 0.9), ("b", 0.2, 0.1)) == "WARN"
    assert outcome(("a", 0.5, 0.1)) == "FAIL"

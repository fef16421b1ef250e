"""Numbers of every stream against matrices written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from difference_problems import Toy, importances_of, toy
from torch import Tensor

from mi_weightspace.vpd.differences.measure import measure_streams
from mi_weightspace.vpd.evaluate import evaluate
from mi_weightspace.vpd.evaluate_stats import records

pytestmark = pytest.mark.quick

OPTIONS: dict[str, Any] = {
    "budgets": (1, 2),
    "free_budgets": (1,),
    "thresholds": (0.0, 0.5),
    "progress": False,
}


def streams_of(problem: Toy) -> dict[str, list[Tensor]]:
    behaviour = list(problem.inputs(8).split(4))
    return {"behaviour": behaviour, "broad": [0.4 * x for x in problem.inputs(8, 1).split(4)]}


def measured(problem: Toy, streams: dict[str, list[Tensor]], **options: Any) -> list[dict]:
    found = evaluate(problem.objective, streams["behaviour"], **OPTIONS).tables()
    return records(
        measure_streams(problem.objective, streams, OPTIONS, found, **options)["streams"]
    )


def one(rows: list[dict], **equal: Any) -> dict[str, Any]:
    (row,) = [r for r in rows if all(r[k] == v for k, v in equal.items())]
    return row


def test_distances_are_in_units_of_the_behaviour_and_of_the_stream() -> None:
    problem = toy()
    streams = streams_of(problem)
    rows = measured(problem, streams)
    errors: dict[str, dict[str, float]] = {}
    for stream, batches in streams.items():
        x = torch.cat(batches)
        g = importances_of(problem, x)
        none = dict.fromkeys(g, torch.zeros(len(x)))
        zeros = {n: torch.zeros_like(v) for n, v in g.items()}
        ones = {n: torch.ones_like(v) for n, v in g.items()}
        errors[stream] = {
            "zero": float(problem.error(x, *problem.matrices[0]).mean()),
            "ci": float(problem.masked_error(x, g, none).mean()),
            "unmasked": float(problem.masked_error(x, ones, none).mean()),
            "rounded>0.5": float(
                problem.masked_error(x, {n: (v > 0.5).double() for n, v in g.items()}, none).mean()
            ),
            "delta_only": float(
                problem.masked_error(x, zeros, dict.fromkeys(g, torch.ones(len(x)))).mean()
            ),
            "full": 0.0,
        }
    unit = errors["behaviour"]["zero"]
    for stream, own in errors.items():
        for quantity, value in own.items():
            row = one(rows, stream=stream, quantity=quantity)
            assert row["value"] == pytest.approx(value, rel=1e-9, abs=1e-15), quantity
            assert row["of_behaviour"] == pytest.approx(value / unit, rel=1e-9, abs=1e-15)
            assert row["of_own"] == pytest.approx(value / own["zero"], rel=1e-9, abs=1e-15)
            assert row["n"] == 8 and row["n_units"] == 2
    assert errors["broad"]["zero"] < 0.5 * unit, "the two units must differ to be told apart"
    row = one(rows, stream="broad", quantity="ci")
    assert row["low"] < row["value"] < row["high"]
    assert row["of_behaviour_high"] == pytest.approx(row["high"] / unit)


def test_attacks_have_their_budget_and_ceiling() -> None:
    problem = toy()
    streams = streams_of(problem)
    found = evaluate(problem.objective, streams["behaviour"], **OPTIONS)
    rows = measured(problem, streams)
    ladder = records(found.ladder, attack="pgd", budget=1)[0]
    pgd = one(rows, stream="behaviour", quantity="pgd", budget=1)
    free = one(rows, stream="behaviour", quantity="pgd_free", budget=1)
    assert pgd["value"] == ladder["median"]
    assert one(rows, stream="behaviour", quantity="pgd", budget=2)["value"] >= pgd["value"]
    for stream in streams:
        pgd = one(rows, stream=stream, quantity="pgd", budget=1)
        free = one(rows, stream=stream, quantity="pgd_free", budget=1)
        kept = one(rows, stream=stream, quantity="protection", budget=1)
        assert kept["value"] == pytest.approx(1 - pgd["value"] / free["value"])
        own = one(rows, stream=stream, quantity="zero")["value"]
        assert pgd["of_own"] == pytest.approx(pgd["value"] / own)
    assert not [r for r in rows if r["stream"] == "broad" and r["budget"] == 2]


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_counts_by_stage_on_changed_and_unchanged_positions(threshold: float) -> None:
    problem = toy()
    streams = streams_of(problem)
    x = {name: torch.cat(batches) for name, batches in streams.items()}
    change = {name: problem.error(v, *problem.matrices[0]) for name, v in x.items()}
    unit = float(change["behaviour"].mean())
    share = 1.001 * float(torch.cat(list(change.values())).median()) / unit
    rows = measured(problem, streams, unchanged_below=share)
    counts: dict[str, dict[str, Any]] = {
        name: {
            stage: sum((g[f"{m}@{stage}"] > threshold).sum(1).double() for m in ("inner", "outer"))
            for stage in problem.stages
        }
        for name, g in ((n, importances_of(problem, v)) for n, v in x.items())
    }
    for name in x:
        quiet = change[name] < share * unit
        for subset, chosen in (
            (name, torch.ones_like(quiet)),
            (f"{name}, unchanged", quiet),
            (f"{name}, changed", ~quiet),
        ):
            total = 0.0
            for stage in problem.stages:
                row = one(rows, stream=subset, quantity=f"l0>{threshold:g}", stage=stage)
                expected = float(counts[name][stage][chosen].mean())
                assert row["value"] == pytest.approx(expected) and row["n"] == int(chosen.sum())
                assert row["dense"] == 4
                total += expected
            row = one(rows, stream=subset, quantity=f"l0>{threshold:g}", stage="total")
            assert row["value"] == pytest.approx(total) and row["dense"] == 8
    everywhere = torch.cat([change[n] for n in x]) < share * unit
    sft = torch.cat([counts[n]["sft"] for n in x])
    row = one(rows, stream="unchanged", quantity=f"l0>{threshold:g}", stage="sft")
    assert row["value"] == pytest.approx(float(sft[everywhere].mean()))
    assert 0 < row["n"] == int(everywhere.sum()) < 16
    interval = np.array([row["low"], row["high"]])
    assert interval[0] <= row["value"] <= interval[1] and interval[0] < interval[1]


def test_baselines_and_the_other_tables_come_for_every_stream() -> None:
    problem = toy()
    streams = streams_of(problem)
    found = evaluate(problem.objective, streams["behaviour"], **OPTIONS).tables()
    tables = measure_streams(problem.objective, streams, OPTIONS, found)
    rows = records(tables["streams"])
    (svd,) = records(found["baselines"], baseline="svd")
    assert one(rows, stream="behaviour", quantity="svd")["value"] == svd["distance"]
    for stream in streams:
        for quantity in ("svd", "static", "random_alive", "coordinates", "random_basis"):
            row = one(rows, stream=stream, quantity=quantity)
            zero = one(rows, stream=stream, quantity="zero")["value"]
            assert row["of_own"] == pytest.approx(row["value"] / zero) and row["n"] == 8
    names = {"behaviour", "broad", "changed", "unchanged"}
    assert set(tables["whole_matrices"]["stream"]) == names
    assert set(tables["diagnostics"]["stream"]) == names
    tied, clusters = records(tables["tied"]), tables["clusters"]
    assert [(r["stream"], r["sources"]) for r in tied] == [
        (stream, sources) for stream in streams for sources in ("untied", "tied")
    ]
    assert tied[0]["median"] == one(rows, stream="behaviour", quantity="pgd", budget=1)["value"]
    assert tied[1]["n_sources"] == clusters["cluster"].nunique() + 8 - len(clusters)

"""Every figure of a decomposition says what it shows, on what, and whether it had converged."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mi_weightspace.core import figure_vpd
from tests.vpd.decomposed import inputs, parts_of, square_parts, tokens

pytestmark = pytest.mark.quick

KINDS = ("l0", "terms", "spectrum", "maskings", "ladder")


def text(figure: Any) -> str:
    return json.dumps(json.loads(figure.to_json()), ensure_ascii=False)


@pytest.mark.parametrize("kind", KINDS)
def test_unconverged_and_the_data_are_written_on_every_figure(kind: Any) -> None:
    parts = square_parts()
    figure: Any = parts.plot(kind)
    assert figure.layout.title.text.startswith("unconverged: ")
    assert [a.text for a in figure.layout.annotations if a.text == "unconverged"]
    on = "training batches" if kind in ("l0", "terms") else "held-out rows, 1 batch of 8×4"
    assert on in figure.layout.title.text.replace("<br>", " ")
    assert len(figure.data) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_settled_run_carries_no_stamp(kind: Any) -> None:
    import dataclasses

    parts = dataclasses.replace(square_parts(), verdicts=())
    assert "unconverged" not in text(parts.plot(kind))


def test_lines_are_the_history_and_the_spectrum() -> None:
    parts = square_parts()
    history = parts.tables["history"]
    figure: Any = parts.plot("l0")
    lines = {t.name: t for t in figure.data if t.mode == "lines"}
    assert set(lines) == {"first", "second"}
    np.testing.assert_allclose(lines["second"].y, history["l0/second"])
    np.testing.assert_allclose(lines["second"].x, history["step"])
    drawn: Any = parts.plot("spectrum")
    own = parts.tables["spectrum"].query("site == 'first'").sort_values("rank")["mean_ci"]
    line = next(t for t in drawn.data if t.mode == "lines" and t.name.startswith("first"))
    expected = np.where(own > 0, own, np.nan)
    np.testing.assert_allclose(np.asarray(line.y, dtype=float), expected)


def test_components_at_zero_are_counted_not_dropped() -> None:
    frame = pd.DataFrame({"site": "<b>x</b>", "rank": range(4), "mean_ci": [0.5, 1e-8, 0.0, 0.0]})
    figure: Any = figure_vpd.spectrum(frame, unconverged=False, measured_on="data")
    names = [t.name for t in figure.data if t.name]
    assert any("2 of 4 at 0" in n for n in names)
    assert "<b>x" not in text(figure)
    assert any("alive" in n for n in names)


def test_an_exact_zero_is_written_out_and_monitors_are_hollow() -> None:
    frame = pd.DataFrame(
        {
            "masking": ["ci", "full"],
            "distance": [0.1, 0.0],
            "low": [0.05, 0.0],
            "high": [0.2, 0.0],
            "monitor": [True, False],
        }
    )
    figure: Any = figure_vpd.maskings(frame, unconverged=False, measured_on="data")
    assert "full = 0" in figure.layout.xaxis.ticktext
    assert {t.marker.symbol for t in figure.data} == {"circle", "circle-open"}


def test_the_heat_map_shows_the_most_important_in_order() -> None:
    g = {"a": torch.zeros(3, 4), "b": torch.zeros(3, 2)}
    g["a"][:, 2] = torch.tensor([0.0, 0.0, 1.0])
    g["a"][:, 1] = torch.tensor([0.2, 0.0, 0.0])
    g["b"][:, 0] = torch.tensor([1.0, 1.0, 1.0])
    figure: Any = figure_vpd.importance_heat(
        ["<i>", " ", "z"], g, most=2, unconverged=True, measured_on="this prompt"
    )
    heat: Any = figure.data[0]
    assert list(figure.layout.yaxis.ticktext) == ["a · 2", "b · 0"]
    np.testing.assert_allclose(heat.z, [[0, 0, 1], [1, 1, 1]])
    assert (heat.zmin, heat.zmax) == (0, 1)
    assert "2 of 3 components" in figure.layout.title.text
    assert "<i>" not in list(figure.layout.xaxis.ticktext)
    nothing = figure_vpd.importance_heat(
        ["x"], {"a": torch.zeros(1, 2)}, unconverged=False, measured_on="this prompt"
    )
    assert "no component" in text(nothing)


def test_pictures_are_balanced_and_turned() -> None:
    read = torch.tensor([[0.0, -4.0], [1e-3, 0.0], [2.0, 1.0]])
    write = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    figure: Any = figure_vpd.factor_pictures(read, write, "x", most=2, unconverged=False)
    left, right = figure.data
    assert list(figure.layout.yaxis.ticktext) == ["2", "0"]
    np.testing.assert_allclose(right.z[1], [-2, 0, 0])  # turned with its read vector
    np.testing.assert_allclose(left.z[1], [0, 2])
    for i, c in enumerate((2, 0)):
        product = np.outer(right.z[i], left.z[i])
        np.testing.assert_allclose(product, torch.outer(write[c], read[c]), atol=1e-6)


def test_pareto_marks_what_had_not_converged() -> None:
    frame = pd.DataFrame(
        {
            "coefficient": [1e-3, 1e-4],
            "l0": [10.0, 50.0],
            "pgd": [1.0, 0.2],
            "budget": 20,
            "converged": [False, True],
        }
    )
    figure: Any = figure_vpd.pareto(frame, measured_on="5 batches")
    assert list(figure.data[0].marker.symbol) == ["circle", "circle-open"]
    assert "hollow: unconverged" in figure.layout.title.text
    assert "PGD-20" in figure.layout.title.text
    settled = figure_vpd.pareto(frame.assign(converged=True), measured_on="5 batches")
    assert "unconverged" not in text(settled)


def test_figures_of_a_prompt_and_of_a_toy() -> None:
    prompt: Any = parts_of().plot_importances("word1 word2 word3")
    assert len(prompt.layout.xaxis.ticktext) == len(
        parts_of().importances("word1 word2 word3")["blocks.0.mlp.in"][0]
    )
    assert "this prompt" in prompt.layout.title.text
    toy: Any = square_parts().plot_factors("first")
    assert "5 largest of 5" in toy.layout.title.text
    assert square_parts().importances(inputs(2))["first"].shape == (2, 5)
    assert tokens(2).shape == (2, 6)


def test_the_page_shows_a_decomposition_and_an_import(tmp_path: Any) -> None:
    from mi_weightspace.html_report import write_report
    from mi_weightspace.page.answer import answer
    from mi_weightspace.page.sections import sections
    from mi_weightspace.vpd.exchange import export_components, import_components
    from tests.vpd.decomposed import language

    (section,) = sections([square_parts()])
    assert len(section.figures) == 5
    assert "Unconverged" in section.note
    assert [t.caption for t in section.tables][:2] == ["Self-checks", "Matrices"]
    imported = import_components(export_components(parts_of(), language()), language())
    (other,) = sections([imported])
    assert other.figures == ()
    assert "Unconverged" not in other.note
    found = answer([square_parts()])
    assert found.numbers[0].name.startswith("L0")
    assert len(found.numbers) == 3
    total = square_parts().to_pandas("l0").query("level == 'total' and threshold == 0.1")
    assert float(found.numbers[0].value) == pytest.approx(float(total["l0"].iloc[0]), rel=0.02)
    assert found.verdict == "unconverged"
    assert answer([imported]).numbers == ()
    page = write_report([square_parts(), imported], tmp_path / "page.html").read_text()
    assert "unconverged" in page

"""The charts: masks where they belong, values unchanged, ticks apart, labels as text."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from page_examples import HOSTILE, attribution

from mi_weightspace.core import figures
from mi_weightspace.core.figure_style import DIVERGING, PALETTE, SEQUENTIAL, log_ticks, wrapped
from mi_weightspace.core.figures import Line

pytestmark = pytest.mark.quick


def named(figure: Any, start: str) -> Any:
    return next(t for t in figure.data if (t.name or "").startswith(start))


def cells_of(trace: Any) -> set[tuple[int, int]]:
    """Cells whose inside a line's segments touch."""
    points = [(x, y) for x, y in zip(trace.x, trace.y, strict=True) if x is not None]
    inside = [(round(y), round(x)) for x, y in points]
    for (x, y), (row, column) in zip(points, inside, strict=True):
        assert abs(x - column) < 0.5
        assert abs(y - row) < 0.5
    return set(inside)


@pytest.mark.parametrize("shape", [(3, 4), (2, 40), (5, 1)])
def test_hatching_and_outline_cover_exactly_their_cells(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=shape), rng.random(shape) < 0.4
    edge = rng.normal(size=shape)
    figure: Any = figures.heatmap(
        values,
        range(shape[1]),
        range(shape[0]),
        title="t",
        unit="ratio",
        hatch_mask=mask,
        ceiling=edge,
        diverging=True,
    )
    np.testing.assert_array_equal(figure.data[0].z, values)
    assert cells_of(named(figure, "hatched")) == set(zip(*np.nonzero(mask), strict=True))
    above = set(zip(*np.nonzero(values > edge), strict=True))
    assert cells_of(named(figure, "outlined")) == above


def test_no_mask_draws_no_stroke() -> None:
    figure: Any = figures.heatmap(
        np.ones((2, 2)), "ab", "cd", title="t", unit="u", hatch_mask=np.zeros((2, 2), bool)
    )
    assert cells_of(named(figure, "hatched")) == set()


def test_profile_draws_intervals_hollow_points_and_the_ceiling() -> None:
    x = np.arange(4)
    line = Line("a", x, x * 1.0, x - 1.0, x + 1.0, hollow=[True, False, True, False])
    figure: Any = figures.profile(
        [line],
        title="t",
        name="n",
        unit="u",
        ceiling=Line("ceiling", x, np.ones(4)),
        reference=("chance", 0.5),
    )
    band = figure.data[0]
    np.testing.assert_allclose(band.y, [1, 2, 3, 4, 2, 1, 0, -1])
    points = next(t for t in figure.data if t.mode == "markers")
    assert [c == "white" for c in points.marker.color] == [True, False, True, False]
    assert named(figure, "ceiling").line.dash == "dash"
    assert named(figure, "chance") is not None
    assert figure.layout.xaxis.dtick == 1


@pytest.mark.parametrize("low", [1e-9, 3e-5, 0.02, 0.7, 40.0])
@pytest.mark.parametrize("span", [1.0, 1.5, 30.0, 1e4, 1e9])
def test_log_ticks_are_few_inside_and_apart(low: float, span: float) -> None:
    ticks = log_ticks([low, low * span, 0.0, math.nan], most=7)
    first, last = ticks["range"]
    assert first < math.log10(low)
    assert math.log10(low * span) < last
    at = [math.log10(v) for v in ticks["tickvals"]]
    assert len(at) <= 7
    assert len(at) == len(ticks["ticktext"]) == len(set(ticks["ticktext"]))
    assert all(b - a > 0.02 * (last - first) for a, b in itertools.pairwise(at))


def test_log_ticks_of_nothing_positive_still_make_an_axis() -> None:
    assert log_ticks([0.0, math.nan, -1.0])["tickvals"]


def test_bars_put_the_largest_first_and_sum_what_is_not_drawn() -> None:
    values = np.array([0.1, -3.0, 0.0, 2.0, 1e-9, 0.2])
    figure: Any = figures.bars(list("abcdef"), values, title="t", name="n", unit="u", most=3)
    bar = figure.data[0]
    assert list(bar.customdata) == ["b", "d", "f", "3 more, summed"]
    np.testing.assert_allclose(bar.x, [-3, 2, 0.2, 0.1 + 1e-9])
    assert float(np.sum(bar.x)) == pytest.approx(values.sum())


def test_bars_of_zeros_do_not_fail() -> None:
    figure: Any = figures.bars(list("ab"), [0.0, 0.0], title="t", name="n", unit="u")
    assert float(np.sum(figure.data[0].x)) == 0.0


def test_the_strip_shows_every_changed_matrix_among_its_own_controls() -> None:
    made = attribution(found=True, n_layers=3)
    table: Any = made.table
    controls: Any = made.tables["controls"]
    gone = table["site"] == "blocks.1.attn.q"
    table.loc[gone, ["R", "R_lda", "cosine", "p_lda_rank"]] = np.nan
    own = table[table["stage"] == "sft"]
    figure: Any = figures.evidence_strip(own, controls, stage="sft")
    shown = {
        site: value
        for trace in figure.data
        if (trace.name or "").startswith("R of the LDA") and trace.y[0] is not None
        for site, value in zip(trace.customdata, trace.y, strict=True)
    }
    expected = own[own["R_lda"].notna()].set_index("site")["R_lda"].to_dict()
    assert shown == pytest.approx(expected)
    assert "blocks.1.attn.q" not in shown
    passed = [
        site
        for trace in figure.data
        if trace.name == "R of the LDA direction, significant" and trace.y[0] is not None
        for site in trace.customdata
    ]
    assert passed == ["blocks.2.mlp.out"]
    highest = [t for t in figure.data if t.name == "largest control"]
    assert len(highest) == 7
    sft = controls[(controls["stage"] == "sft") & (controls["control"] != "")]
    out = sft[sft["site"].str.endswith("mlp.out")].groupby("layer")["R_lda"].max()
    drawn = {tuple(np.round(t.y[::3], 9)) for t in highest}
    assert tuple(np.round(out.to_numpy(), 9)) in drawn


def test_the_strip_without_controls_or_rows() -> None:
    made = attribution(found=True, n_layers=2)
    none = made.tables["controls"].head(0)
    figure: Any = figures.evidence_strip(made.table, none)
    assert "no controls" in figure.layout.title.text
    assert not [t for t in figure.data if t.name == "largest control"]
    assert figures.evidence_strip(made.table.head(0), none) is not None


def test_norms_leave_no_drawn_value_outside_the_axis() -> None:
    rows: Any = attribution(found=True, n_layers=3).table[["stage", "site", "layer", "kind"]]
    rows = rows.assign(rel_fro=np.geomspace(1e-7, 0.8, len(rows)), rounding_floor=1e-8)
    rows.loc[rows["kind"] == "attn.k", "rel_fro"] = 0.0
    figure: Any = figures.norms(rows, title="t")
    low, high = figure.layout.yaxis.range
    for trace in figure.data:
        y = np.asarray(trace.y, dtype=float)
        y = y[np.isfinite(y)]
        assert (np.log10(y) > low).all()
        assert (np.log10(y) < high).all()
    assert any("attn.k · 6 unchanged" in a.text for a in figure.layout.annotations)


def test_long_hostile_titles_wrap_inside_the_figure() -> None:
    title = "<b>" + "word " * 60
    assert all(len(line) <= 130 for line in wrapped(title).split("<br>"))
    assert "<b>" not in wrapped(title)
    figure: Any = figures.heatmap(np.ones((1, 1)), "a", "b", title=title, unit="u")
    lines = figure.layout.title.text.count("<br>") + 1
    assert figure.layout.margin.t >= 20 * lines + 14


def test_every_form_shows_hostile_labels_as_text() -> None:
    x = [f"{HOSTILE}{i}" for i in range(2)]
    made = attribution(found=True, n_layers=1)
    rows = made.table.assign(site=HOSTILE, stage=HOSTILE, rel_fro=0.1, rounding_floor=0.01)
    ones = np.ones(2)
    words: dict[str, Any] = {"title": HOSTILE, "unit": HOSTILE}
    for figure in (
        figures.heatmap(np.ones((2, 2)), x, x, name=HOSTILE, outline_name=HOSTILE, **words),
        figures.profile([Line(HOSTILE, ones, ones)], name=HOSTILE, x_labels=x, **words),
        figures.strip(x, ones, np.ones((2, 3)), name=HOSTILE, target_name=HOSTILE, **words),
        figures.spectra({HOSTILE: ones}, title=HOSTILE),
        figures.bars(x, ones, name=HOSTILE, markers={HOSTILE: ones}, **words),
        figures.norms(rows, title=HOSTILE),
        figures.attribution_figure(rows, made.tables["stages"].assign(stage=HOSTILE)),
        figures.evidence_strip(rows, made.tables["controls"], stage=HOSTILE),
    ):
        text = json.dumps(json.loads(str(figure.to_json())), ensure_ascii=False)
        assert "&lt;script&gt;" in text
        assert "<script" not in text
        assert "<img" not in text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_scales_darken_with_size_so_that_grey_print_reads() -> None:
    sequential = [luminance(str(c)) for _, c in SEQUENTIAL]
    assert all(a > b for a, b in itertools.pairwise(sequential))
    diverging = [luminance(str(c)) for _, c in DIVERGING]
    middle = len(diverging) // 2
    assert diverging.index(max(diverging)) == middle
    assert len(set(PALETTE)) == 7


def deficient(colour: str) -> np.ndarray:
    """A colour as a deuteranope sees it (Vienot, Brettel and Mollon 1999), in linear RGB."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2
    to_lms = np.array(
        [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]
    )
    seen = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]) @ (to_lms @ rgb)
    return np.linalg.inv(to_lms) @ seen


def test_the_first_colours_differ_to_a_deuteranope() -> None:
    for a, b in itertools.combinations(PALETTE[:4], 2):
        assert np.abs(deficient(a) - deficient(b)).max() > 0.08, (a, b)

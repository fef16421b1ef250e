"""The calibration names every p of the code, its rates are right, and a broken null is seen."""

from __future__ import annotations

import ast
import csv
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from experiments import p_calibration
from experiments.p_calibration_core import ALPHA, Case, Measured, Printed, Rate, calibrate
from mi_weightspace.core.contrasts import Pair
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.shifts import cluster_signs, gram, sign_flip_norms
from mi_weightspace.core.space import Space
from mi_weightspace.core.stats import rank_p
from probes.gate_numbers import detection

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"p|p_[A-Za-z][A-Za-z_]*|[a-z_]+_p|[a-z_]+_p_[a-z]+")

_NAMES = r"(?:p|p_\w+|\w*_p|\w+_p_\w+)"
LIKELY = re.compile(rf"""["'}}]{_NAMES}["']|^\s+{_NAMES}\s*:""", re.MULTILINE)
"""What a file must hold to be worth parsing."""


# ---- inventory -----------------------------------------------------------------------------
def p_names(text: str) -> set[str]:
    """Strings and class fields that look like a p; of f-strings with such an end, ``*_p``."""
    if not LIKELY.search(text):
        return set()
    found, inside = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(value) for value in node.values}
            last = node.values[-1] if node.values else None
            if isinstance(last, ast.Constant) and str(last.value).endswith("_p"):
                found.add("*_p")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in inside and NAME.fullmatch(node.value):
                found.add(node.value)
        elif isinstance(node, ast.ClassDef):
            fields = [x.target for x in node.body if isinstance(x, ast.AnnAssign)]
            named = {x.id for x in fields if isinstance(x, ast.Name)}
            found |= {name for name in named if NAME.fullmatch(name)}
    return found


@lru_cache(maxsize=1)
def sources() -> dict[str, set[str]]:
    files = [*ROOT.glob("mi_weightspace/**/*.py"), *ROOT.glob("probes/**/*.py")]
    return {str(f.relative_to(ROOT)): p_names(f.read_text()) for f in sorted(files)}


def unknown(file: str, names: set[str]) -> set[str]:
    """Those the calibration neither names nor says to be something else."""
    made = p_calibration.inventory()
    every = set().union(*made.values())
    allowed = every if file in p_calibration.READERS else made.get(file, set())
    known = {n for n in names if n in allowed or (n == "*_p" and any(map(ends, allowed)))}
    other = {n for f, n in (*p_calibration.NOT_A_P, *p_calibration.FEEDS) if f == file}
    return names - known - other


def ends(name: str) -> bool:
    return name.endswith("_p")


@pytest.mark.quick
def test_every_p_of_the_code_is_calibrated_or_said_to_be_something_else() -> None:
    left = {file: found for file, names in sources().items() if (found := unknown(file, names))}
    assert not left, f"calibrate in experiments/p_calibration_*.py: {left}"


@pytest.mark.quick
def test_the_inventory_names_nothing_that_is_not_there() -> None:
    there = sources()
    made = p_calibration.inventory()
    for file, name in (*p_calibration.NOT_A_P, *p_calibration.FEEDS):
        assert name in there[file], (file, name)
    for column in p_calibration.FEEDS.values():
        assert column in set().union(*made.values()), column
    for file in (*p_calibration.READERS, *made):
        assert there[file], file
    printed = [p for case in p_calibration.cases() for p in case.printed]
    for p in printed:
        for column in p.columns:
            shown = any(
                column in there[f] or (ends(column) and "*_p" in there[f]) for f in p.sources
            )
            assert shown, (p.where, column)


@pytest.mark.quick
def test_a_new_column_or_a_new_file_with_one_is_seen() -> None:
    row = 'row = {"site": name, "p_new": 0.5}\n'
    assert unknown("mi_weightspace/spectral/measure.py", p_names(row)) == {"p_new"}
    assert unknown("mi_weightspace/spectral/new.py", p_names('{"p": 1.0}')) == {"p"}
    assert unknown("probes/new.py", p_names('{f"{kind}_p": 1.0}')) == {"*_p"}
    assert unknown("probes/new.py", p_names("class Row:\n    p_holm: float\n")) == {"p_holm"}
    assert unknown("mi_weightspace/cli.py", p_names('("site", "p_typo")')) == {"p_typo"}


@pytest.mark.quick
def test_columns_of_a_projection_are_those_that_are_calibrated() -> None:
    from mi_weightspace.spectral.project import _COLUMNS  # pyright: ignore[reportPrivateUsage]

    every = set().union(*p_calibration.inventory().values())
    assert {c for c in _COLUMNS if NAME.fullmatch(c)} <= every


# ---- rates ---------------------------------------------------------------------------------
def by_key(found: list[Measured]) -> dict[str, Measured]:
    return {m.printed.key: m for m in found}


def case(name: str) -> Case:
    return next(c for c in p_calibration.cases() if c.name == name)


@pytest.mark.parametrize("name", ["link, random piece", "link, cosine", "bands"])
def test_cheap_tests_hold_their_level_and_find_the_plant(name: str) -> None:
    """Four binomial deviations at 120 draws: at most 13 %."""
    for found in calibrate(case(name), n_draws=120):
        assert found.false_positives.value <= 0.13, found.printed.where
        assert found.power.value >= 0.6, found.printed.where
        assert not found.finding


def test_exact_tests_use_their_level() -> None:
    """A p that is never small would pass every other test here: pooled rate of three."""
    found = by_key(calibrate(case("link, random piece"), n_draws=150))
    keys = ("p_behaviour", "p_controls", "p_whole")
    assert sum(found[k].false_positives.k for k in keys) >= 8  # 22 expected


def clustered(index: int, planted: bool, *, whole: bool) -> float:
    """p of a mean shift of 5 clusters of 6 pairs; signs of whole clusters, or of single pairs."""
    g = generator(index, "clustered")
    clusters = torch.arange(5).repeat_interleave(6)
    values = torch.randn(5, 3, generator=g)[clusters] + 0.3 * torch.randn(30, 3, generator=g)
    found = gram(values + 3.0 * planted)
    signs = cluster_signs(clusters if whole else torch.arange(30), 199, seed=index)
    observed = sign_flip_norms(found, torch.ones(1, 30, dtype=torch.float64))[0]
    return float(rank_p(observed, sign_flip_norms(found, signs)))


@pytest.mark.quick
@pytest.mark.parametrize("whole", [True, False])
def test_signs_that_split_clusters_are_flagged(whole: bool) -> None:
    printed = Printed("p", "a test", (), ("p",), "clusters", "3 sd", decides="significant")
    made = Case(
        "broken",
        lambda seed, index, planted: {"p": clustered(index, planted, whole=whole)},
        (printed,),
        "",
    )
    found = calibrate(made, n_draws=100)[0]
    assert found.finding is not whole
    text = p_calibration.markdown([found], [made])
    assert ("- a test:" in text) is not whole
    assert (f"| **{found.false_positives}** |" in text) is not whole


@pytest.mark.quick
def test_a_rate_is_above_its_level_when_its_whole_interval_is() -> None:
    assert Rate(10, 100).above is False and Rate(11, 100).above is True  # 4.9 % and 5.6 %
    assert Rate.of([ALPHA, 0.06, float("nan"), 0.01]) == Rate(2, 4)
    assert str(Rate(0, 400)) == "0.0 (0.0–0.9)"


def test_a_direction_fitted_on_the_pairs_asked_about_is_judged_by_its_held_out_p() -> None:
    found = calibrate(case("detection, a direction fitted on the same pairs"), n_draws=60)[0]
    assert found.false_positives.value <= 0.17  # four deviations
    g = generator(0, "circular")
    values = torch.randn(16, 2, 12, generator=g)
    fitted = (values[:, 0] - values[:, 1]).mean(0)
    clusters = [Pair(f"i{i}", "+", "-").cluster_id for i in range(16)]
    circular = Direction(fitted, Space("resid_post", 0))
    known = Direction(fitted, Space("resid_post", 0), fit={"p_adjusted": 0.4})
    assert detection(values, circular, clusters, in_sample=True, seed=0)[1] <= 0.05
    assert detection(values, known, clusters, in_sample=True, seed=0)[1] == 0.4
    assert detection(values, known, clusters, in_sample=False, seed=0)[1] <= 0.05


def test_the_runner_writes_every_row(tmp_path: Path) -> None:
    found = p_calibration.run(n_draws=1, seed=0, seconds=60)
    printed = [p for c in p_calibration.cases() for p in c.printed]
    assert [m.printed.where for m in found] == [p.where for p in printed]
    assert len({(m.case, m.printed.key) for m in found}) == len(found)
    p_calibration.write_csv(found, tmp_path / "p.csv")
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found) and all(row["false_positive_n"] == "1" for row in rows)
    text = p_calibration.markdown(found, p_calibration.cases())
    assert all(f"| {p.where} | " in text for p in printed)
    assert all(p.where.strip() and p.null and p.effect for p in printed)


@pytest.mark.quick
def test_the_page_that_is_kept_has_the_rows_of_today() -> None:
    with (p_calibration.OUT / "p_calibration.csv").open() as file:
        kept = [(row["case"], row["where"]) for row in csv.DictReader(file)]
    assert kept == [(c.name, p.where) for c in p_calibration.cases() for p in c.printed]

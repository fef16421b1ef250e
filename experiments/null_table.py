"""The tables of `experiments.null_calibration`, from its journal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mi_weightspace.core.stats import binomial_interval

ALPHA = 0.05
CELLS = (("A", 0.5), ("A", 0.9), ("B", 0.5), ("B", 0.9))
UNIFORM = (0.03, 0.07)
RULES = {
    "shipped": "**evidence rule** (`aligned`)",
    "vetoes_u": "the same, vetoes asked of u₁ of D",
    "run": "**stages run** (`written here`)",
}
DEFINITIONS = (
    "- *evidence rule*: LDA-R rank among controls and row-normalised sign test, both at the level; "
    "first vector of the row-normalised D resolved; rounding flag not red; no nuisance direction "
    "(activation mean or component, unembedding mean, control contrast) nearer to that vector than "
    "the probe's LDA filter.",
    "- *vetoes asked of u₁ of D*: resolved, and the nuisance comparison with the pattern, asked of "
    "the first singular vector of D itself. Under rogue coordinates that vector is the rogue's, "
    "whether or not the direction was planted: the rule then finds nothing.",
    "- *stages run*: stage gate and G as `stage_evidence` gives them, both at the level, absolute "
    "and relative; u₁ of D or of the row-normalised D resolved; flag not red.",
)
TESTS = {
    "cos": "cosine of u₁ and w above 0.9",
    "p_isotropic": "isotropic",
    "p_covariance": "covariance-matched",
    "p_permutation": "label permutation",
    "p_raw_rank": "rank among controls, raw cosine",
    "p_sign": "R, sign flips",
    "p_lda_rank": "R of the LDA direction, rank among controls",
    "p_row_normalised": "row-normalised, sign test",
    "stage_gate_p": "stage gate (stages run)",
    "p_G": "site statistic G (stages run)",
    **RULES,
}
VETOES = {
    "resolved": "u₁ of D resolved",
    "resolved_row_normalised": "u₁ of row-normalised D resolved",
    "nuisance": "a nuisance direction is nearer to u₁ of D than the probe is",
    "explained": "… to u₁ of row-normalised D than the probe's LDA filter is",
    "amber": "rounding flag amber",
    "red": "rounding flag red",
}


def whole_lines(journal: Path) -> list[dict[str, Any]]:
    """The draws of a journal; a last line that an interruption cut short is left out."""
    lines = journal.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def load(journal: Path) -> Any:
    """One row per draw, cell and condition."""
    import pandas as pd

    draws = sorted(whole_lines(journal), key=lambda line: line["draw"])
    return pd.DataFrame([{"draw": d["draw"], **row} for d in draws for row in d["rows"]])


def decided(table: Any) -> Any:
    """A boolean column for every test, rule and veto."""
    found = table[["draw", "noise", "share", "confounded", "planted"]].copy()
    for name in TESTS:
        if name in table:
            found[name] = table[name] <= ALPHA
    found["cos"] = table["cosine"] > 0.9
    found["resolved"] = table["resolved"]
    found["resolved_row_normalised"] = table["resolved_row_normalised"]
    found["nuisance"] = table["nuisance_cosine"] > table["cosine"]
    found["explained"] = table["explained"]
    found["amber"] = table["rounding_flag"] == "amber"
    found["red"] = table["rounding_flag"] == "red"
    evidence = found["p_lda_rank"] & found["p_row_normalised"] & ~found["red"]
    found["shipped"] = table["word"] == "aligned"
    found["vetoes_u"] = evidence & found["resolved"] & ~found["nuisance"]
    found["run"] = table["word_run"] == "written here"
    return found


def _cell(hits: Any) -> str:
    k, n = int(hits.sum()), len(hits)
    low, high = binomial_interval(k, n)
    return f"{100 * k / n:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _rates(found: Any, names: dict[str, str]) -> list[str]:
    lines = ["| % | A 50 % | A 90 % | B 50 % | B 90 % |", "|---|---|---|---|---|"]
    for column, text in names.items():
        cells = [
            _cell(found.loc[(found["noise"] == kind) & (found["share"] == share), column])
            for kind, share in CELLS
        ]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return lines


def _conditions(found: Any, names: dict[str, str]) -> list[str]:
    lines = []
    for planted, title in ((False, "Nothing shared (false positives)"), (True, "Planted (power)")):
        for confounded, probe in ((True, "confounded probe"), (False, "unconfounded probe")):
            part = found[(found["planted"] == planted) & (found["confounded"] == confounded)]
            lines += ["", f"### {title}, {probe}", "", *_rates(part, names)]
    return lines


def summary(found: Any) -> list[str]:
    """Worst cell of each rule on both questions, against 5 % and 90 %."""
    lines = [
        "| rule | worst false-positive rate, % | upper bound ≤ 5 % | worst power, % | ≥ 90 % |",
        "|---|---|---|---|---|",
    ]
    keys = ["noise", "share", "confounded"]
    for column, text in RULES.items():
        null = [g[column] for _, g in found[~found["planted"]].groupby(keys)]
        power = [g[column] for _, g in found[found["planted"]].groupby(keys)]
        worst, least = max(null, key=lambda h: h.mean()), min(power, key=lambda h: h.mean())
        bound = binomial_interval(int(worst.sum()), len(worst))[1]
        lines.append(
            f"| {text} | {_cell(worst)} | {'yes' if bound <= 0.05 else 'no'} "
            f"| {_cell(least)} | {'yes' if least.mean() >= 0.9 else 'no'} |"
        )
    return lines


def report(journal: Path) -> str:
    """Markdown: the rules' worst cells, every test in every cell, uniformity, vetoes."""
    table = load(journal)
    found = decided(table)
    low, high = UNIFORM
    single = {k: TESTS[k] for k in ("p_sign", "p_row_normalised")}
    null = found[~found["planted"]]
    rates = null.groupby(["noise", "share", "confounded"])[list(single)].mean()
    inside = int(((rates >= low) & (rates <= high)).to_numpy().sum())
    lines = [
        "# Null calibration",
        "",
        f"{found['draw'].nunique()} draws of each cell and condition; level {ALPHA:.0%}; percent "
        "with 95 % Clopper-Pearson intervals. Cells, sizes and what is planted: the docstring of "
        "`experiments/null_calibration.py`. The cells of one draw share their noise, so columns "
        "are not independent of each other; the draws of a cell are.",
        "",
        "    python -m experiments.null_calibration --preset full --out runs/nulls",
        "",
        "## The rules, in their worst cell",
        "",
        *DEFINITIONS,
        "",
        *summary(found),
        "",
        "## Every test",
        *_conditions(found, TESTS),
        "",
        "## Uniformity of the continuous p-values",
        "",
        "Rate at 0.05 where nothing is shared: rows of D are then sign-symmetric. "
        f"{inside} of {rates.size} rates lie in [{low}, {high}].",
    ]
    for confounded in (True, False):
        part = null[null["confounded"] == confounded]
        word = "confounded" if confounded else "unconfounded"
        lines += ["", f"### {word} probe", "", *_rates(part, single)]
    lines += ["", "## What the vetoes see", *_conditions(found, VETOES)]
    return "\n".join(lines) + "\n"

"""The three numbers of a decomposition's answer: how sparse, how robust, how complete."""

from __future__ import annotations

from collections.abc import Iterator

from mi_weightspace.core.report import Report
from mi_weightspace.page.markup import number

Fields = tuple[str, str, str, str, str]
"""name, value, n, null, interval."""


def vpd_numbers(report: Report) -> Iterator[Fields]:
    """L0, the error under the smallest attack, and the error with every component on and no
    remainder; nothing of an imported decomposition, which was not evaluated."""
    tables = report.tables
    if not {"l0", "ladder", "maskings"} <= tables.keys():
        return
    threshold = float(report.config["facts"]["threshold"])
    every = tables["l0"].to_dict("records")
    rows = [r for r in every if (r["level"], r["threshold"]) == ("total", threshold)]
    for row in rows[:1]:
        yield (
            f"L0: components with g > {threshold:g} at a position",
            number(float(row["l0"])),
            f"{row['n']} positions in {row['n_batches']} batches",
            f"{row['dense']} components in all",
            f"95 % over batches: {number(float(row['low']))} to {number(float(row['high']))}",
        )
    ladder = tables["ladder"].sort_values(by="budget").to_dict("records")
    free = {r["budget"]: float(r["of_zero"]) for r in ladder if r["attack"] == "pgd_free"}
    for row in [r for r in ladder if r["attack"] == "pgd"][:1]:
        known = free.get(row["budget"])
        same = "not run" if known is None else number(known)
        zero = float(row["zero"])
        yield (
            f"error under attack (PGD, {row['budget']} steps), share of the all-zero mask's",
            number(float(row["of_zero"])),
            f"{row['n']} positions in {row['n_batches']} batches",
            f"the same attack without importances: {same}",
            f"range over batches: {number(float(row['low']) / zero)} to "
            f"{number(float(row['high']) / zero)}",
        )
    for row in tables["maskings"].to_dict("records"):
        if row["masking"] == "unmasked":
            low, high = float(row["of_zero_low"]), float(row["of_zero_high"])
            yield (
                "error with every component on and no remainder, share of the all-zero mask's",
                number(float(row["of_zero"])),
                f"{row['n']} positions in {row['n_batches']} batches",
                "0 where the components sum to the matrix",
                f"95 % over batches: {number(low)} to {number(high)}",
            )

"""Is every p that the product prints a p? False positives and power of each, on one page.

    python -m experiments.p_calibration [--draws 400] [--seconds 150] [--jobs 2] [--out DIR]

writes ``p_calibration.md`` and ``.csv`` (default: `benchmarks/results`). Each p is computed by the
product's own functions on simulated input, once where its null holds and once with an effect
planted; the rate at which it is at most 5 % stands with its 95 % Clopper-Pearson interval. Where
several are printed together and adjusted, the rate is that of the smallest (family-wise). Sizes
are tiny: what is asked is whether the tests hold their level, not what they find in a model. How
input is made is in the docstrings of `p_calibration_weights`, `_shifts`, `_gates`, `_detectors`
and `_parts`. `inventory` says which columns of the code are meant; a test compares it with the
source.
"""

from __future__ import annotations

import argparse
import csv
import platform
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from experiments import (
    p_calibration_detectors,
    p_calibration_gates,
    p_calibration_parts,
    p_calibration_shifts,
    p_calibration_weights,
)
from experiments.p_calibration_core import ALPHA, Case, Measured, calibrate

OUT = Path(__file__).parents[1] / "benchmarks" / "results"
READERS = (
    "mi_weightspace/cli.py",
    "mi_weightspace/core/figure_evidence.py",
    "mi_weightspace/core/figure_inoculation.py",
    "mi_weightspace/page/answer.py",
    "mi_weightspace/page/charts.py",
    "mi_weightspace/page/sections.py",
    "mi_weightspace/vpd/differences/together.py",
    "probes/bank.py",
    "probes/dmu.py",
)
"""Files that only show, or copy into a direction's fit, columns made elsewhere."""
FEEDS = {
    ("mi_weightspace/spectral/gate.py", "p_relative"): "gate_p_relative",
    ("mi_weightspace/spectral/gate.py", "p_absolute"): "gate_p_absolute",
    ("mi_weightspace/spectral/stage_evidence.py", "p_g"): "p_G",
    ("mi_weightspace/vpd/differences/link_geometry.py", "p"): "p_cosine",
    ("probes/detection.py", "p"): "p",
    ("probes/detection.py", "p_holm"): "p_holm",
    ("probes/dmu_tables.py", "global_p"): "p_global",
    ("probes/gates.py", "p_adjusted"): "p_adjusted",
    ("probes/inoculation_verdict.py", "p"): "p_holm",
    ("probes/shift_stats.py", "p"): "p",
    ("probes/shift_stats.py", "p_adjusted"): "p_adjusted",
}
"""Values inside the code -> the column they become."""
NOT_A_P = {
    ("mi_weightspace/vpd/config.py", "p"): "exponent of the L_p penalty",
    ("mi_weightspace/vpd/config.py", "static_p"): "a routing",
    ("mi_weightspace/vpd/selfchecks_convergence.py", "p"): "exponent of the L_p penalty",
    ("mi_weightspace/vpd/sources.py", "static_p"): "a routing",
    ("probes/gate_numbers.py", "p_frame"): "probability of the continuation",
    ("probes/gate_numbers.py", "p_frame_ablated"): "probability of the continuation",
    ("probes/gate_numbers.py", "p_neutral"): "probability of the continuation",
    ("probes/matrix.py", "p_method"): "how p was had: rank or t",
}


def cases() -> tuple[Case, ...]:
    modules = (
        p_calibration_weights,
        p_calibration_shifts,
        p_calibration_gates,
        p_calibration_detectors,
        p_calibration_parts,
    )
    return tuple(case for module in modules for case in module.cases())


def inventory() -> dict[str, set[str]]:
    """File -> names of the p columns it makes that are calibrated."""
    found: dict[str, set[str]] = {}
    for printed in (p for case in cases() for p in case.printed):
        for source in printed.sources:
            found.setdefault(source, set()).update(printed.columns)
    return found


READING = """\
- *Reference columns* hold where their null does and nowhere else: under loud coordinates
  `p_isotropic`, `p_covariance`, `p_permutation` and `vpd_explain`'s p reject half of the time to
  nearly always, planted or not. They carry no verdict.
- *Decoy*: no test's null. The contrast decodes, the readout does not read it, but its direction
  estimated from 16 pairs leans a little the readout's way, and taking it out moves the readout.
  That is true of the direction as given, not of the contrast: gate a direction of few pairs only
  with that in mind. Steering is hardly fooled (`p_steering`), so what passes is `necessary only`.
- *A leading singular part* is larger than the random pieces of its update, which are its null:
  `p_behaviour` and `p_score` then run above their level for an unrelated behaviour. The word asks
  for the controls and a quarter of the change besides, and stays far below.
- *Power* is of the sizes planted here, at tiny widths; with rogue coordinates at width 192 three of
  192 are loud, and the same plant is found far less often than at 768 (`null_calibration.md`).
- *Differences of trained detectors*: the plant there is one every detector reads, so that nothing
  should be found; the power of the comparison is in the rows with given scores."""
"""What a reader of the table should know; without figures, which the table holds."""


# ---- tables --------------------------------------------------------------------------------
HEADER = (
    "where it is printed",
    "null: exchangeable are",
    "draws",
    "false positives, %",
    "family",
    "planted",
    "power, %",
    "carries a verdict",
    "note",
)


def cells(found: Measured) -> tuple[str, ...]:
    printed = found.printed
    rate = str(found.false_positives)
    return (
        printed.where,
        printed.null,
        str(found.false_positives.n),
        f"**{rate}**" if found.false_positives.above else rate,
        printed.family or "no",
        printed.effect,
        str(found.power),
        printed.decides or "no",
        printed.note,
    )


def markdown(found: Sequence[Measured], made: Iterable[Case]) -> str:
    """The page: what it is, the table, the rows above their level, sizes."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy"))
    most = max(m.false_positives.n for m in found)
    lines = [
        "# Calibration of every p",
        "",
        f"At most {most} draws of each (column *draws*), without and with the plant; level "
        f"{100 * ALPHA:g} %; percent with 95 % Clopper-Pearson intervals. Python "
        f"{platform.python_version()}, {libraries}. How input is simulated: the docstrings of "
        "`experiments/p_calibration_*.py`. Bold: above its level, i.e. the whole interval lies "
        f"over {100 * ALPHA:g} %. Rows of one simulation share their draws and are not independent "
        f"of each other: of {len(found)} intervals one or two miss by chance.",
        "",
        "    python -m experiments.p_calibration",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(cells(m)) + " |" for m in found),
        "",
        "## Above their level, with a verdict",
        "",
    ]
    loud = [m for m in found if m.finding]
    lines += [f"- {m.printed.where}: {m.false_positives}; {m.printed.null}" for m in loud]
    lines += [] if loud else ["None."]
    lines += ["", "## Reading", "", READING, "", "## Sizes", ""]
    lines += [f"- *{case.name}*: {case.sizes}" for case in made]
    return "\n".join(lines) + "\n"


def write_csv(found: Sequence[Measured], path: Path) -> None:
    """One row a p, rates as counts and shares."""
    names = ["case", "where", "columns", "null", "family", "planted", "verdict", "note"]
    for kind in ("false_positive", "power"):
        names += [f"{kind}_{part}" for part in ("k", "n", "rate", "low", "high")]
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([*names, "above_level"])
        for m in found:
            p = m.printed
            row = [m.case, p.where, " ".join(p.columns), p.null, p.family, p.effect, p.decides]
            row.append(p.note)
            for rate in (m.false_positives, m.power):
                low, high = rate.interval
                row += [str(rate.k), str(rate.n), *(f"{x:.4f}" for x in (rate.value, low, high))]
            out.writerow([*row, str(m.false_positives.above).lower()])


# ---- the run -------------------------------------------------------------------------------
def one_case(name: str, *, n_draws: int, seed: int, seconds: float) -> list[Measured]:
    """`calibrate` by name, in a process of its own."""
    torch.set_num_threads(1)
    case = next(c for c in cases() if c.name == name)
    return calibrate(case, n_draws=n_draws, seed=seed, seconds=seconds)


def run(*, n_draws: int, seed: int, seconds: float, jobs: int = 1) -> list[Measured]:
    """Every case, several at once with `jobs` processes."""
    work = partial(one_case, n_draws=n_draws, seed=seed, seconds=seconds)
    names = [case.name for case in cases()]
    if jobs == 1:
        return [m for name in names for m in work(name)]
    with ProcessPoolExecutor(jobs) as pool:
        return [m for found in pool.map(work, names) for m in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=150, help="CPU seconds a simulation.")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    found = run(n_draws=args.draws, seed=args.seed, seconds=args.seconds, jobs=args.jobs)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "p_calibration.md").write_text(markdown(found, cases()))
    write_csv(found, args.out / "p_calibration.csv")


if __name__ == "__main__":
    main()

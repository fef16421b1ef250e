"""Simulated labelled prompts for the p of the inoculation report and of the audit of confounds.

*Detectors*: 24 items, each in both classes, width 8, dense activations with one loud coordinate; an
SAE's codes are the rectified activations in 16 random directions. Every detector of the product
runs, with its own null. *Rivals*: held-out scores of the dictionary and of four rivals, equally
good (planted: the dictionary better). *Audit*: prompts of random words, 16 clusters a label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from experiments.p_calibration_core import Case, Printed
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet
from mi_weightspace.core.readings import RANDOM_SAE, ROTATED_SAE, SAE, StageReadings
from mi_weightspace.core.seeds import generator
from probes.detection import Design, differences, score_found
from probes.labelling import confounds
from probes.matrix import Matrix, difference_rows, family_rows, matrix_rows, run_matrix

ITEMS, D, D_SAE = 24, 8, 16
N_PERMUTATIONS, N_SPLITS, N_BOOTSTRAP = 39, 2, 99
SHIFT = 2.0


def _labelled() -> LabelledSet:
    rows = (
        LabelledPrompt(f"item {i} side {label}", label, f"c{i}", f"i{i}-{label}")
        for i in range(ITEMS)
        for label in (1, 0)
    )
    return LabelledSet(tuple(rows), "simulated")


def _readings(role: str, g: torch.Generator, labels: Tensor, shift: float) -> StageReadings:
    item = torch.randn(ITEMS, D, generator=g).repeat_interleave(2, 0)
    dense = item + torch.randn(2 * ITEMS, D, generator=g)
    along = torch.randn(D, generator=g)
    dense += shift * labels[:, None] * along / along.norm()
    dense[:, 0] *= 4
    codes = {
        name: (dense @ torch.randn(D, D_SAE, generator=g)).relu()
        for name in (SAE, RANDOM_SAE, ROTATED_SAE)
    }
    rebuilt = dense + 0.5 * torch.randn(dense.shape, generator=g)
    return StageReadings(role, role, dense, codes=codes, reconstruction=rebuilt)  # pyright: ignore[reportArgumentType]


def matrix_draw(seed: int, index: int, planted: bool) -> dict[str, float]:
    """A hidden stage beside a clean one; the plant moves the hidden stage."""
    g = generator(seed, "detectors", index)
    labelled = _labelled()
    design = Design.of(
        labelled,
        n_splits=N_SPLITS,
        n_folds=N_SPLITS,
        n_permutations=N_PERMUTATIONS,
        n_bootstrap=N_BOOTSTRAP,
        seed=index,
    )
    hidden = _readings("hidden", g, labelled.labels, SHIFT * planted)
    matrix = run_matrix(design, {"hidden": hidden})
    return _matrix_numbers(matrix)


def _matrix_numbers(matrix: Matrix) -> dict[str, float]:
    rows = {row["detector"]: row for row in matrix_rows(matrix)}
    kinds = family_rows(matrix)
    rivals = difference_rows(matrix)
    return {
        "rank": float(rows["lda"]["p"]),
        "t": float(rows["sae top-k"]["p"]),
        "norm": float(rows["‖Δμ‖"]["p"]),
        "families": min(float(r["p_holm"]) if r["above_null"] else 1.0 for r in kinds),
        "trained rivals": min(
            float(r["p_holm"]) if r["difference"] > 0 else 1.0 for r in rivals
        ),
    }  # fmt: skip


def rivals_draw(seed: int, index: int, planted: bool) -> dict[str, float]:
    """Scores of equal AUROC (0.76; planted 0.98 for the dictionary), items shared by all."""
    g = generator(seed, "rivals", index)
    labelled = _labelled()
    design = Design.of(labelled, n_splits=2, n_permutations=2, n_bootstrap=999, seed=index)
    item = torch.randn(ITEMS, generator=g).repeat_interleave(2)

    def found(shift: float) -> Tensor:
        noise = torch.randn(2 * ITEMS, generator=g)
        score = (item + noise) / math.sqrt(2) + shift * labelled.labels
        return score.double()[None].expand(2, -1)

    own = score_found(found(3.0 if planted else 1.0), design)
    others = {str(i): score_found(found(1.0), design) for i in range(4)}
    rivals = differences(own, others)
    return {
        "p": rivals["0"].p,
        "p_holm": min(d.p_holm for d in rivals.values()),
    }


# ---- audit ---------------------------------------------------------------------------------
CLUSTERS, WORDS, LENGTH, TELLS = 32, 12, 5, 0.75


def audit_draw(seed: int, index: int, planted: bool) -> dict[str, float]:
    """Two rows a cluster of one label; planted: a word marks most rows of label 1, all longer."""
    g = generator(seed, "audit", index)
    topics = torch.randint(0, 3, (CLUSTERS,), generator=g).tolist()
    rows = []
    for c in range(CLUSTERS):
        for copy in range(2):
            length = LENGTH + int(torch.randint(0, 4, (1,), generator=g)) + planted * (c % 2)
            words = [f"w{w}" for w in torch.randint(0, WORDS, (length,), generator=g).tolist()]
            if planted and c % 2 and float(torch.rand(1, generator=g)) < TELLS:
                words[0] = "marker"
            attributes = {"topic": str(topics[c])}
            text = " ".join([*words, f"n{c}x{copy}"])
            rows.append(LabelledPrompt(text, c % 2, f"c{c}", f"{c}-{copy}", attributes=attributes))
    found = confounds(LabelledSet(tuple(rows), "simulated"), n_permutations=99, seed=index)
    p: Mapping[str, float] = {c.what: c.p for c in found.found if c.p is not None}
    return {
        "p": p["length"],
        "words": p["words"],
        "confounded": float(not any(c.confounded for c in found.found)),
    }


# ---- what is printed -----------------------------------------------------------------------
_LABELS = "labels within items"
_EFFECT = f"a shift of {SHIFT:g} along one direction (classes' sd there 1.4 and more)"
_MATRIX = ("probes/matrix.py", "probes/inoculations.py")


def _matrix_case() -> Case:
    def one(
        key: str, where: str, column: str, family: str = "", decides: str = "", note: str = ""
    ) -> Printed:
        columns = (column, "sae_p") if key == "families" else (column,)
        return Printed(key, where, _MATRIX, columns, _LABELS, _EFFECT, family, decides, note)

    printed = (
        one("rank", "inoculation: p by rank (lda)", "p"),
        one("t", "inoculation: p by Student's t (sae top-k)", "p"),
        one("norm", "inoculation: p of the norm", "p", "", "", "one-sided"),
        one("families", "inoculation, families: p_holm; verdict: KIND_p", "p_holm",
            "4 kinds (Holm), detectors of a kind (Bonferroni)", "every word of the hidden stage"),
        one("trained rivals", "inoculation, differences: p_holm, of trained detectors", "p_holm",
            "the dictionary's rivals (Holm)", "SAE advantage",
            "no detector knows anything: power is of one code that all read"),
    )  # fmt: skip
    sizes = (
        f"{ITEMS} items × 2 labels, d = {D}, {D_SAE} latents, {N_SPLITS} folds, "
        f"{N_PERMUTATIONS} permutations, {N_BOOTSTRAP} bootstrap draws"
    )
    return Case("detectors", matrix_draw, printed, sizes)


def _rivals_case() -> Case:
    null, effect = "detectors of equal AUROC on independent noise", "AUROC 0.98 against 0.76"
    printed = (
        Printed("p", "inoculation, differences: p", _MATRIX, ("p",), null, effect),
        Printed("p_holm", "inoculation, differences: p_holm", _MATRIX, ("p_holm",),
                null, effect, "4 rivals (Holm)", "SAE advantage", "either sign"),
    )  # fmt: skip
    return Case("rivals", rivals_draw, printed, f"{ITEMS} items × 2 labels, 999 bootstrap draws")


def _audit_case() -> Case:
    null = "labels over clusters"
    effect = f"label 1 has a word of its own in {100 * TELLS:g} % of rows, and one word more"

    def one(key: str, where: str, columns: tuple[str, ...], family: str = "") -> Printed:
        decides = "confounded" if family else ""
        return Printed(key, where, ("probes/labelling.py",), columns, null, effect, family, decides)

    printed = (
        one("p", "audit (`confounds`): p of the length", ("p",)),
        one("words", "audit (`confounds`): p of the words", ("p",)),
        one("confounded", "audit (`confounds`): confounded", (), "length, attribute, words (Holm)"),
    )
    sizes = f"{CLUSTERS} clusters of 2 prompts, {WORDS} words, 99 permutations"
    return Case("audit", audit_draw, printed, sizes)


def cases() -> tuple[Case, ...]:
    return _matrix_case(), _rivals_case(), _audit_case()

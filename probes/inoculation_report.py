"""The result of an inoculation experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.report import Report
from mi_weightspace.core.verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

HEADLINE = "hidden condition"


class InoculationReport(Report):
    """Can what a second training hid still be seen, and by what?

    Table, one row a task, stage and detector: ``task`` (``hidden condition``: the labels, inside
    the stage; ``transfer``: trained on the open stage; ``stage``: against the benign twin),
    ``stage, role, detector, family, statistic`` (``AUROC``, or ``relative norm``), ``value`` with
    its 95 % cluster-bootstrap interval ``low, high``, the permutation null's ``null_mean`` and
    central 95 % ``null_low, null_high`` with ``p`` (two-sided around the mean; the norm's is
    one-sided), ``p_method`` (rank or t), ``n_permutations``, ``null_tuning`` (were configurations
    chosen anew under the null), ``above_null``, ``n_configurations`` and the one most splits
    ``tuned``, ``spread`` (sd over splits), ``n_splits, n, n_per_class, n_clusters``,
    ``needed_per_class`` (rows for power 0.8 at the score observed), ``recall_at_1pct`` (of
    unrelated readings; empty without them), ``seconds``.
    Tables: ``families`` (norm, linear, sae, non-linear at each stage, Holm over the four),
    ``differences`` (the dictionary less each rival, Holm over rivals), ``survival``, ``latents``
    and ``contexts`` (feature cards), ``facts`` (the SAE on each stage), ``verdicts``.
    Arrays: ``null/STAGE/DETECTOR``.
    """

    kind: ClassVar[str] = "inoculation"

    def verdict(self, stage: str | None = None) -> Verdict:
        """The verdict of a hidden stage (default the first).

        Raises:
            ConfigError: no such hidden stage.
        """
        for verdict in self.verdicts:
            if stage in (None, verdict.subject):
                return verdict
        raise ConfigError(
            "stage",
            given=repr(stage),
            expected=f"one of the hidden stages {[v.subject for v in self.verdicts]}",
            remedy="Name a stage that was judged.",
        )

    def matrix(self, task: str = HEADLINE) -> pd.DataFrame:
        """Values, detectors as rows and stages as columns.

        Raises:
            ConfigError: a task that was not run.
        """
        own = self.table[self.table["task"] == task]
        if not len(own):
            raise ConfigError(
                "task",
                given=repr(task),
                expected=f"one of {list(dict.fromkeys(self.table['task']))}",
                remedy="Choose a task of this report.",
            )
        wide = own.pivot_table(
            index="detector", columns="stage", values="value", sort=False, dropna=False
        )
        return wide.reindex(columns=list(dict.fromkeys(own["stage"])))

    def summary(self) -> str:
        """At most ten lines: each hidden stage's word with its first reason."""
        lines = [f"{type(self).__name__}: {len(self.table)} rows"]
        for verdict in self.verdicts[:3]:
            lines.append(f"  {verdict}")
            lines += [f"    {reason}" for reason in verdict.reservations[:1]]
        if len(self.verdicts) > 3:
            lines.append(f"  … {len(self.verdicts) - 3} more verdicts")
        lines += [f"  ! {text}" for text in self.reservations[: 10 - len(lines)]]
        return "\n".join(lines[:10])

    def __str__(self) -> str:
        """Every hidden stage's word, its reasons, and the matrix."""
        lines: list[str] = []
        for verdict in self.verdicts:
            lines += [str(verdict), *(f"  {reason}" for reason in verdict.reservations)]
        lines += ["", self.matrix().round(2).to_string()] if "task" in self.table else []
        return "\n".join([*lines, *(f"! {text}" for text in self.reservations)])

    def plot(self, task: str = HEADLINE) -> go.Figure:
        """AUROC of every detector at every stage, with intervals and the nulls' central 95 %."""
        from mi_weightspace.core.figure_inoculation import detector_panels

        words = "; ".join(str(v) for v in self.verdicts[:3])
        return detector_panels(
            self.table.loc[self.table["task"] == task],
            title=f"Detectors at each stage, {task}. {words}".strip(),
        )

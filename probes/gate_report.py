"""The result of a causal gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.report import Report
from mi_weightspace.core.verdict import Verdict
from probes.gate_judge import PROTOCOLS, Protocol, judge

if TYPE_CHECKING:
    import plotly.graph_objects as go


class GateReport(Report):
    """What happens to a behaviour when a direction is taken out of the stream, or put in.

    Table, one row an intervention and set of prompts: ``intervention, alpha`` (of ``add``, in units
    of the contrast's shift), ``prompts`` (``frame`` or ``neutral``), ``scale`` (``probability``, or
    ``centred``: the readout's threshold moved to the neutral mean of the log-odds), ``n`` pairs,
    ``before`` (mean probability of the pushed continuation), ``effect`` (its mean change) with
    ``se, low, high`` (cluster bootstrap, 95 %), ``effect_log_odds`` (nats), ``flips`` (share of
    pairs whose choice changes; ``probability`` only), ``kl`` (nats). Then the deciding null:
    ``null_mean, null_sd``, its central 95 % ``null_low, null_high``, ``z`` and the rank ``p``
    (two-sided around its mean) with ``p_adjusted`` (``add``: maximum over every signed alpha); the
    same of each reference null (``isotropic_*``, ``within_class_*``, ``half_split_*``,
    ``controls_*``); ``interpretable``: isotropic directions move the readout by at most 3 points.
    Tables: ``pairs`` (each pair's probability, and under the deciding ablation) and ``controls``
    (the ablation's effect on the prompts of each control).
    Arrays: ``effects/NULL`` (rows of the table, draws), the effect of every null direction.
    """

    kind: ClassVar[str] = "gate"

    @property
    def outcome(self) -> str:
        """PASS, PASS*, DETECTOR-ONLY, GENERIC, UNDERPOWERED or FAIL."""
        return str(self.verdicts[0].evidence["gate"])

    def under(self, protocol: Protocol) -> Verdict:
        """The verdict another protocol gives the same runs.

        Raises:
            ConfigError: an unknown protocol.
        """
        check_protocol(protocol)
        rows: Any = self.table.to_dict("records")
        own = self.verdicts[0]
        return judge(rows, own.evidence, protocol, own.subject)

    def plot(self) -> go.Figure:
        """Effects with intervals, beside the central 95 % of the null directions' effects."""
        import plotly.graph_objects as go

        from mi_weightspace.core.figure_style import GREY, PALETTE, axis, blank, label

        table = self.table
        head = "".join(f" of {v.subject}: {v.word}" for v in self.verdicts[:1])
        names = [_name(row) for row in table.to_dict("records")]
        figure = blank(
            f"Causal gate{head}. Grey: 95 % of the null directions; hollow: isotropic directions "
            "move the readout too",
            height=180 + 26 * len(names),
        )
        at = [label(name) for name in names]
        middle = (table["null_low"] + table["null_high"]) / 2
        figure.add_trace(
            go.Scatter(
                x=middle,
                y=at,
                mode="markers",
                marker={"color": GREY, "size": 1},
                error_x={
                    "array": (table["null_high"] - table["null_low"]) / 2,
                    "color": GREY,
                    "thickness": 7,
                    "width": 0,
                },
                name="null directions",
            )
        )
        shapes = ["diamond" if ok else "diamond-open" for ok in table["interpretable"]]
        figure.add_trace(
            go.Scatter(
                x=table["effect"],
                y=at,
                mode="markers",
                marker={"color": PALETTE[1], "size": 10, "symbol": shapes},
                error_x={
                    "array": table["high"] - table["effect"],
                    "arrayminus": table["effect"] - table["low"],
                },
                name="this direction, 95 % interval",
            )
        )
        figure.add_vline(x=0, line={"color": GREY, "width": 1, "dash": "dot"})
        figure.update_xaxes(title_text=axis("change of the readout", "probability"))
        figure.update_yaxes(
            title_text=axis("intervention and prompts", "name"), autorange="reversed"
        )
        return figure


def _name(row: dict[str, Any]) -> str:
    size = f" {row['alpha']:+g}" if row["intervention"] == "add" else ""
    scale = ", centred" if row["scale"] == "centred" else ""
    return f"{row['intervention'].replace('_', ' ')}{size}, {row['prompts']}{scale}"


def check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise ConfigError(
            "protocol",
            given=repr(protocol),
            expected=f"one of {PROTOCOLS}",
            remedy="Use the default, 'pair_residual'.",
        )

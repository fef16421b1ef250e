"""The result of decomposing what training changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.components import SourceRef
from mi_weightspace.core.errors import ConfigError, MismatchError
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.models.lens import Edit
from mi_weightspace.vpd.assemble import rebuilt
from mi_weightspace.vpd.config import VPDConfig
from mi_weightspace.vpd.decomposition import Decomposition
from mi_weightspace.vpd.differences.attribution import UNCHANGED, Attribution, attribute
from mi_weightspace.vpd.differences.diagnostics import Compensation, compensation
from mi_weightspace.vpd.edits import ablated
from mi_weightspace.vpd.factors import matrix_of
from mi_weightspace.vpd.objective import Objective

if TYPE_CHECKING:
    from mi_weightspace.vpd.differences.host import DifferenceHost


class DifferenceDecomposition(Decomposition):
    """Subcomponents of what each stage changed in each matrix; sites are ``MATRIX@STAGE``.

    As a `Decomposition`, with the model of all masks 0 being the first stage: errors are shares of
    ``K0 = E KL(last ‖ first)``. Table ``streams``: behaviour and broad text apart.
    """

    kind: ClassVar[str] = "vpd-difference"

    @classmethod
    def made(
        cls,
        fields: Mapping[str, Any],
        host: DifferenceHost,
        verdicts: Sequence[Verdict],
        objective: Objective,
    ) -> Self:
        arrays = dict(fields["arrays"])
        for name, update in host.updates.items():
            if update.left is not None and update.right is not None:
                arrays[f"{name}/left"] = update.left.cpu()
                arrays[f"{name}/right"] = update.right.cpu()
        own = {**fields, "arrays": arrays}
        own["config"] = {
            **own["config"],
            "given_verdicts": [dataclasses.asdict(v) for v in verdicts],
        }
        return cls(**own).with_objective(objective)

    @classmethod
    def without_sites(
        cls,
        plain: Mapping[str, Any],
        verdicts: Sequence[Verdict],
        notes: Sequence[str],
        settings: VPDConfig,
    ) -> Self:
        """Nothing to decompose: equal weights, or changes that rounding explains."""
        import pandas as pd

        return cls(
            table=pd.DataFrame({"site": [], "n_components": []}),
            tables={"history": pd.DataFrame()},
            arrays={},
            config={
                **plain,
                "command": "vpd",
                "vpd": settings.model_dump(mode="json"),
                "sites": {},
                "notes": list(notes),
            },
            inputs={},
            reservations=tuple(notes),
            verdicts=tuple(verdicts),
        )

    # ---- what is stored --------------------------------------------------------------------
    @property
    def stages(self) -> tuple[str, ...]:
        """In the order in which the updates are applied."""
        return tuple(self.config["stages"])

    def read(self, site: str) -> Float[Tensor, "C d_in"]:
        inner = super().read(site)
        if f"{site}/right" in self.arrays:
            return inner @ self.arrays[f"{site}/right"].T.to(inner)
        return inner[:, :-1] if self.config["updates"][site]["biased"] else inner

    def write(self, site: str) -> Float[Tensor, "C d_out"]:
        inner = super().write(site)
        left = self.arrays.get(f"{site}/left")
        return inner if left is None else inner @ left.T.to(inner)

    def stage_of(self, site: str) -> str:
        return self.config["updates"][site]["stage"]

    def source_of(self, site: str) -> SourceRef | None:
        refs = self.config.get("sources", {}).get(self.stage_of(site))
        return None if refs is None else SourceRef(**refs)

    @property
    def compensation(self) -> Compensation:
        """Whether matrices moved in compensating ways, from the table ``diagnostics``."""
        return compensation(self.to_pandas("diagnostics"))

    # ---- the model -------------------------------------------------------------------------
    def attach(self, model: Any) -> Self:
        """This decomposition with its models at hand.

        Args:
            model: the stages, as they were given, or a `DifferenceHost`.

        Raises:
            MismatchError: weights other than those that were decomposed.
        """
        host = model if hasattr(model, "updates") else self._host_of(model)
        given, expected = host.fingerprint, self.inputs.get("model")
        if given != expected:
            raise MismatchError(
                "stages to attach",
                given=f"fingerprint {given}",
                expected=f"{expected}, of the weights that were decomposed",
                remedy="Load the checkpoints this decomposition was made from.",
            )
        return self.with_objective(rebuilt(self.arrays, self.settings, host), host)

    def _host_of(self, stages: Any) -> DifferenceHost:
        from mi_weightspace.vpd.differences.stages import as_lineage, directed, host_of

        lineage = directed(as_lineage(stages), self.config["direction"])
        return host_of(lineage, self.sites, self.settings, self.config["features"])

    def assessed_on(
        self,
        streams: Mapping[str, Sequence[Tensor]],
        *,
        unchanged_below: float = UNCHANGED,
        **options: Any,
    ) -> Self:
        """Evaluate on the first stream (tables as a `Decomposition` has them), then on each.

        Args:
            unchanged_below: share of the first stream's K0 below which a position is unchanged.
            options: of `assess`.
        """
        from mi_weightspace.vpd.differences.measure import measure_streams
        from mi_weightspace.vpd.differences.singular import idle_tops

        name, batches = next(iter(streams.items()))
        found = self.assessed(batches, f"held-out rows of the {name} stream", **options)
        options = {key: value for key, value in options.items() if key != "anchor"}
        tables = measure_streams(
            self.objective, streams, options, found.tables, unchanged_below=unchanged_below
        )
        told = compensation(tables["diagnostics"])
        idle = idle_tops(tables["singular"])
        said = [str(told)] if told.told else []
        said += [idle] if idle else []
        verdicts = [_restored(v) for v in self.config["given_verdicts"]]
        whole = dataclasses.replace(
            found,
            tables={**found.tables, **tables},
            verdicts=(*verdicts, *found.verdicts),
            reservations=(*found.reservations, *said),
        )
        return whole.with_objective(self.live)

    def attribution(
        self,
        tokens: Any,
        *,
        unchanged_below: float = UNCHANGED,
        batch_size: int | None = None,
        **options: Any,
    ) -> Attribution:
        """Which stage each token's behaviour is owed to: L0 and exact Shapley values of stages.

        Args:
            tokens: as for `importances`.
            unchanged_below: share of the behaviour's K0 below which a token is unchanged.
            options: ``threshold``, ``attack_steps``, of `attribution.attribute`.

        Raises:
            ConfigError: too many stages.
        """
        objective = self.objective
        size = objective.config.batch_size if batch_size is None else batch_size
        epsilon = unchanged_below * float(self.config["units"]["behaviour"]["value"])
        batches, order = self._ids(tokens).split(size), self.stages[1:]
        return attribute(objective, batches, epsilon=epsilon, stages=order, **options)

    # ---- edits -----------------------------------------------------------------------------
    def revert(self, site: str, components: Sequence[int]) -> Edit:
        """The last stage without these components of one update."""
        host: Any = self.host
        matrix = matrix_of(self._known(site))
        weight = host.lens.weight(matrix).cpu()
        read, write = self.read(site).cpu(), self.write(site).cpu()
        return Edit(weights={matrix: ablated(weight, read, write, components, site)})

    def ablate(self, site: str, components: Sequence[int]) -> Edit:
        """`revert`."""
        return self.revert(site, components)

    def rewrite(self, *_: Any, **__: Any) -> Edit:
        """Not defined for updates.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "rewrite of an update",
            given="a component of a difference",
            expected="a component of a matrix",
            remedy="Use revert, or edit the matrix with a Decomposition of its full weights.",
        )


def _restored(record: Mapping[str, Any]) -> Verdict:
    return Verdict(
        Word(record["word"]),
        record["subject"],
        dict(record["evidence"]),
        tuple(record["reservations"]),
    )

"""The result of a decomposition: factors, importance network, evaluation and self-checks.

It is a `Report` (saved, loaded, put in a page) whose sites answer in `Components`, as SVD's do.
What runs the model (`importances`, `evaluate`, `card`, edits) needs it at hand: a decomposition
just made has it, a loaded one is given it by `attach`, which refuses other weights.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.components import Components, SourceRef
from mi_weightspace.core.errors import ConfigError, MismatchError, SiteError
from mi_weightspace.core.report import Report
from mi_weightspace.core.verdict import Word
from mi_weightspace.models.lens import Edit
from mi_weightspace.vpd.assemble import as_host, rebuilt, site_of
from mi_weightspace.vpd.assess import assess
from mi_weightspace.vpd.card import Card
from mi_weightspace.vpd.cards import cards
from mi_weightspace.vpd.config import VPDConfig, make_config
from mi_weightspace.vpd.data import prompt_ids
from mi_weightspace.vpd.edits import ablated, rewritten
from mi_weightspace.vpd.effects import passes
from mi_weightspace.vpd.explain import Explanation, explain
from mi_weightspace.vpd.host import Host
from mi_weightspace.vpd.objective import Objective

if TYPE_CHECKING:
    import plotly.graph_objects as go

STAGE = "weights"
"""`Components.stage` of a model's own weights: no stage of a lineage has to do with them."""
Figure = Literal["l0", "terms", "spectrum", "maskings", "ladder"]


class Decomposition(Report):
    """Subcomponents of every decomposed matrix, with the evidence about them.

    Index it by site name for `Components` (a unit vector each, largest first; `Components.index`
    has each part's own number, by which everything here names it). Table: a row per site. Tables
    ``history``, ``maskings``, ``ladder``, ``checks``, ``spectrum``, ``components``. Arrays:
    ``{site}/read`` (C, d_in), ``{site}/write`` (C, d_out), gains of norms beside a site,
    ``importance/…``.
    """

    kind: ClassVar[str] = "vpd"
    live: ClassVar[Objective | None] = None

    # ---- what is stored --------------------------------------------------------------------
    @property
    def sites(self) -> tuple[str, ...]:
        """Decomposed sites, in model order."""
        return tuple(self.config["sites"])

    @property
    def unconverged(self) -> bool:
        """Whether a self-check said so; every figure then does."""
        return any(v.word == Word.UNCONVERGED for v in self.verdicts)

    @property
    def measured_on(self) -> str:
        return str(self.config.get("measured_on", ""))

    @property
    def settings(self) -> VPDConfig:
        """The configuration it was made with.

        Raises:
            ConfigError: imported components, which were trained elsewhere.
        """
        if not self.config.get("vpd"):
            raise ConfigError(
                "decomposition",
                given="imported components, without importance network or configuration",
                expected="a decomposition made by mi_weightspace.vpd.decompose",
                remedy="Projections and edits work; importances need a run of decompose.",
            )
        return make_config(self.config["vpd"])

    def read(self, site: str) -> Float[Tensor, "C d_in"]:
        """Read vectors as they are (not unit), by component number."""
        return self.arrays[f"{self._known(site)}/read"]

    def write(self, site: str) -> Float[Tensor, "C d_out"]:
        """Write vectors as they are (not unit), by component number."""
        return self.arrays[f"{self._known(site)}/write"]

    def __len__(self) -> int:
        return len(self.config.get("sites", ()))

    def __iter__(self) -> Iterator[Components]:
        return (self[name] for name in self.sites if self.config["sites"][name]["site"])

    def __getitem__(self, site: str) -> Components:
        return self.components(site)

    def components(self, site: str, *, fold_gains: bool = True) -> Components:
        """A site's rank-one parts as the residual stream sees them, largest first.

        Args:
            fold_gains: multiply by the gain of the norm in front of the matrix (read side) or
                behind it (write side), so that vectors compare with directions of the stream.

        Raises:
            SiteError: a site that was not decomposed, or a toy's, which joins no known spaces.
        """
        record = self.config["sites"][self._known(site)]["site"]
        if record is None:
            raise SiteError(
                f"site {site}",
                given="a matrix of a toy, whose input and output spaces have no names",
                expected="a matrix of a language model",
                remedy=f"Use parts.read({site!r}) and parts.write({site!r}).",
            )
        read, write = self.read(site).double(), self.write(site).double()
        if fold_gains:
            read = read * self.arrays.get(f"{site}/read_gain", torch.ones(())).double()
            write = write * self.arrays.get(f"{site}/write_gain", torch.ones(())).double()
        sizes = read.norm(dim=1), write.norm(dim=1)
        order = (sizes[0] * sizes[1]).argsort(descending=True, stable=True)
        unit = [
            (v / s.clamp_min(1e-300)[:, None])[order].float()
            for v, s in zip((read, write), sizes, strict=True)
        ]
        return Components(
            site_of(record),
            *unit,
            scale=(sizes[0] * sizes[1])[order].float(),
            method="vpd",
            stage=self.stage_of(site),
            source=self.source_of(site),
            facts={"fro": float((write.T @ read).norm()), "folded": fold_gains},
            index=order,
        )

    def stage_of(self, site: str) -> str:
        """`Components.stage` of a site."""
        return STAGE

    def source_of(self, site: str) -> SourceRef | None:
        """Where the site's matrix can be streamed from again; a model at hand is not kept."""
        return None

    def _known(self, site: str) -> str:
        if site not in self.config["sites"]:
            raise SiteError(
                f"site {site!r} of this decomposition",
                given="a matrix that was not decomposed",
                expected=f"one of {list(self.sites)[:6]} ({len(self)} in all)",
                remedy="Name it in Config(sites=...) and decompose again.",
            )
        return site

    # ---- the model -------------------------------------------------------------------------
    def attach(self, model: Any) -> Self:
        """This decomposition with its model at hand (the value itself is unchanged).

        Args:
            model: a Host, a Lens, or whatever `mi_weightspace.load` takes.

        Raises:
            MismatchError: weights other than those that were decomposed.
        """
        host = as_host(model, self.sites, prefix=True)
        given, expected = host.fingerprint, self.inputs.get("model")
        if given != expected:
            raise MismatchError(
                "model to attach",
                given=f"fingerprint {given}",
                expected=f"{expected}, of the weights that were decomposed",
                remedy="Load the checkpoint this decomposition was made from.",
            )
        return self.with_objective(
            rebuilt(self.arrays, self.settings, host) if self.config.get("vpd") else None, host
        )

    def with_objective(self, objective: Objective | None, host: Host | None = None) -> Self:
        """A copy that carries live objects; they are not saved."""
        found = dataclasses.replace(self)
        object.__setattr__(found, "live", objective)
        object.__setattr__(found, "_host", objective.factors.host if objective else host)
        return found

    @property
    def host(self) -> Host:
        """The model at hand.

        Raises:
            ConfigError: a loaded decomposition that was not attached.
        """
        found = getattr(self, "_host", None)
        if found is None:
            raise ConfigError(
                "decomposition",
                given="loaded from disk, without its model",
                expected="the model it was made from, at hand",
                remedy="parts = parts.attach(model).",
            )
        return found

    @property
    def objective(self) -> Objective:
        """Factors and importance network on the model at hand (`host` says what is refused)."""
        if self.live is None:
            _ = self.settings, self.host
        assert self.live is not None
        return self.live

    def importances(self, tokens: Any, *, batch_size: int = 8) -> dict[str, Tensor]:
        """Lower importances g ∈ [0, 1] of every site, (rows, tokens, C), on the host's device.

        Args:
            tokens: ids (rows, tokens), a prompt, prompts of one length, or a toy's inputs.
        """
        objective = self.objective
        batches = self._ids(tokens).split(batch_size)
        low = torch.cat([g for _, g in passes(objective, batches)])
        return {name: low[..., s] for name, s in objective.factors.layout.slices().items()}

    def evaluate(self, tokens: Any, *, batch_size: int | None = None, **options: Any) -> Self:
        """The same decomposition evaluated on other data: new tables, checks and verdicts.

        Args:
            tokens: as for `importances`. options: of `vpd.assess.assess`.
        """
        size = self.objective.config.batch_size if batch_size is None else batch_size
        return self.assessed(self._ids(tokens).split(size), "data given", **options)

    def assessed(self, batches: Sequence[Tensor], what: str, **options: Any) -> Self:
        """`evaluate` on batches; `what` says in words which data they are."""
        start = time.perf_counter()
        history: Any = self.tables["history"]
        found = assess(self.objective, history, batches, options)
        shape = "×".join(map(str, batches[0].shape))
        n = f"{len(batches)} batch{'es' if len(batches) > 1 else ''} of {shape}"
        changed = dataclasses.replace(
            self,
            table=found.table,
            tables={"history": history, **found.tables},
            arrays={**self.arrays, **found.arrays},
            verdicts=found.verdicts,
            reservations=(*self.config["notes"], *found.reservations),
            config={
                **self.config,
                "measured_on": f"{what}, {n}",
                "facts": found.facts,
            },
            timings={**self.timings, "evaluation": time.perf_counter() - start},
        )
        return changed.with_objective(self.live)

    def card(self, site: str, component: int, tokens: Any, **options: Any) -> Card:
        """What one component does on these tokens (options of `cards.cards`)."""
        return self.cards({site: [component]}, tokens, **options)[0]

    def cards(
        self, wanted: Mapping[str, Sequence[int]], tokens: Any, *, batch_size: int = 8, **o: Any
    ) -> list[Card]:
        """Cards of several components, harvested in one pass over `tokens`."""
        objective = self.objective
        for name in wanted:
            self._known(name)
        batches = self._ids(tokens).split(batch_size)
        return cards(objective, wanted, batches, unconverged=self.unconverged, **o)

    def _ids(self, tokens: Any) -> Tensor:
        return prompt_ids(tokens, self.host)

    def explain(self, update: Any, **options: Any) -> Explanation:
        """How much of a difference or gradient reweights, rewires or adds to these components.

        Args:
            update: a `WeightSource` (a difference is one), matrices (d_out, d_in) by site, or one
                matrix. options: of `vpd.explain.explain`.
        """
        return explain(self, update, **options)

    # ---- edits -----------------------------------------------------------------------------
    def ablate(self, site: str, components: Sequence[int]) -> Edit:
        """The model without these components of a site; use with ``lens.with_edit(edit)``."""
        weight = self.host.weight(self._known(site)).cpu()
        read, write = self.read(site).cpu(), self.write(site).cpu()
        return Edit(weights={site: ablated(weight, read, write, components, site)})

    def rewrite(
        self,
        site: str,
        component: int,
        *,
        write: Tensor | None = None,
        read: Tensor | None = None,
        strength: float = 1.0,
        sign: float | None = None,
    ) -> Edit:
        """The model with a component writing, or reading, along another vector.

        Args:
            write, read: the new vector (one of the two), in the matrix's own output or input.
            strength: its norm in units of the old vector's.
            sign: of the inner activation where the component is important; default: as measured
                (``important_activation`` in the table ``components``).
        """
        if (write is None) == (read is None):
            raise ConfigError(
                f"rewrite of {site}",
                given="both sides" if write is not None else "no vector",
                expected="write=vector or read=vector",
                remedy="Combine two edits with lens.with_edit(a).with_edit(b).",
            )
        matrix = rewritten(
            self.host.weight(self._known(site)).cpu(),
            self.read(site).cpu(),
            self.write(site).cpu(),
            component,
            write if write is not None else read,  # pyright: ignore[reportArgumentType]
            "write" if write is not None else "read",
            strength=strength,
            sign=self._sign(site, component) if sign is None else float(sign),
            subject=site,
        )
        return Edit(weights={site: matrix})

    def _sign(self, site: str, component: int) -> float:
        table = self.tables.get("components")
        if table is None:
            return 0.0
        own = (table["site"] == site) & (table["component"] == component)
        value = float(table["important_activation"].to_numpy()[own.to_numpy()].sum())
        return 1.0 if value > 0 else -1.0 if value < 0 else 0.0

    # ---- figures ---------------------------------------------------------------------------
    def plot(self, what: Figure = "l0") -> go.Figure:
        """L0 of every site over training; or ``terms``, ``spectrum``, ``maskings``, ``ladder``."""
        from mi_weightspace.core import figure_vpd

        return figure_vpd.of_report(self, what)

    def plot_importances(self, prompt: Any, *, most: int = 30) -> go.Figure:
        """Importances over the tokens of one prompt, components with the largest first."""
        from mi_weightspace.core import figure_vpd
        from mi_weightspace.vpd.readings import Names

        ids = self._ids(prompt)[:1]
        names = Names(getattr(getattr(self.host, "lens", None), "tokenizer", None))
        found = {name: g[0].cpu() for name, g in self.importances(ids).items()}
        labels = [names(int(i)) for i in ids[0]]
        return figure_vpd.importance_heat(
            labels, found, most=most, unconverged=self.unconverged, measured_on="this prompt"
        )

    def plot_factors(self, site: str, *, most: int = 30) -> go.Figure:
        """Read and write vectors of a toy's site as pictures, largest components first."""
        from mi_weightspace.core import figure_vpd

        return figure_vpd.factor_pictures(
            self.read(site), self.write(site), site, most=most, unconverged=self.unconverged
        )

"""Everything a decomposition is told, as frozen values; unknown or contradictory keys are refused.

Losses are composed, not enumerated: a reconstruction term is a *mask source* times a *routing*.
The defaults are those of `methods`' later configurations (smooth L0, relative faithfulness, a
persistent adversary beside uniform masks); the published paper's are the preset `paper`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mi_weightspace.core.errors import ConfigError

Source = Literal["uniform", "binomial", "fresh_pgd", "persistent", "pooled"]
Routing = Literal["all", "uniform_k_subset", "static_p", "layerwise"]
Scope = Literal["c", "bc", "sc", "bsc", "repeat"]
ImportanceKind = Literal[
    "component_mlp",
    "vector_mlp",
    "layerwise_mlp",
    "global_mlp",
    "global_transformer",
    "chunk_transformer",
]
_TRANSFORMERS = {"global_transformer", "chunk_transformer"}


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def _only_with(self, fields: set[str], applies: bool, why: str) -> None:
        """Refuse values that nothing would read (a default written out is no contradiction)."""
        given = fields & self.model_fields_set
        defaults = type(self).model_fields
        idle = sorted(f for f in given if getattr(self, f) != defaults[f].default)
        if idle and not applies:
            raise ValueError(f"{idle} given, but they apply only {why}")


class ImportanceConfig(_Config):
    """The causal-importance network.

    Attributes:
        kind: which network; see `vpd.importance`.
        hidden: widths of the hidden layers of the MLP kinds.
        d_model, n_blocks, n_heads, d_mlp: of the transformer kinds.
        causal: whether a position may only read itself and earlier ones (transformer kinds). A
            bidirectional network reads the future: fine to explain, not to gate at run time.
        chunk_layers: layers a chunk of `chunk_transformer` covers.
        leak: slope of the leaky sigmoids outside [0, 1].
    """

    kind: ImportanceKind = "layerwise_mlp"
    hidden: tuple[int, ...] = (64,)
    d_model: int = Field(default=128, gt=0)
    n_blocks: int = Field(default=2, gt=0)
    n_heads: int = Field(default=4, gt=0)
    d_mlp: int = Field(default=512, gt=0)
    causal: bool = False
    chunk_layers: int = Field(default=1, gt=0)
    leak: float = Field(default=0.01, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        transformer = self.kind in _TRANSFORMERS
        shapes = {"d_model", "n_blocks", "n_heads", "d_mlp", "causal"}
        self._only_with(shapes, transformer, f"to {sorted(_TRANSFORMERS)}")
        self._only_with({"hidden"}, not transformer, "to the MLP kinds")
        self._only_with({"chunk_layers"}, self.kind == "chunk_transformer", "to chunk_transformer")
        if transformer and self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model {self.d_model} is not an even multiple of {self.n_heads}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden {self.hidden}: expected at least one positive width")
        if self.kind in {"component_mlp", "vector_mlp"} and len(self.hidden) != 1:
            raise ValueError(f"{self.kind} has one hidden layer, got widths {self.hidden}")
        return self


class FaithfulnessConfig(_Config):
    """``relative``: mean over sites of |Δ|²/|W|²; ``param_mean``: Σ|Δ|² / Σ entries (the paper)."""

    form: Literal["relative", "param_mean"] = "relative"
    weight: float = Field(default=1.0, ge=0)


class MinimalityConfig(_Config):
    """Penalty on upper importances.

    ``smooth_l0``: ψ = g²/(g²+γ²), `weight` Σ f + `frequency_weight` Σ f log2(1 + a' f), with
    a' = `reference_count`. ``lp``: ψ = (g+1e-12)^p, `weight` Σ f [1 + β log2(1 + n f)].

    Attributes:
        gamma, p: value at the start and at the end of the anneal (linear in normalised time, held
            after `anneal_until` of the run).
        ema_half_life: steps over which the frequency is averaged; None uses the batch alone.
        normalize_at_one: multiply ψ by 1+γ², so that ψ(1) = 1.
    """

    form: Literal["smooth_l0", "lp"] = "smooth_l0"
    weight: float = Field(default=1e-3, ge=0)
    frequency_weight: float = Field(default=5e-4, ge=0)
    reference_count: int = Field(default=32_768, gt=0)
    ema_half_life: float | None = Field(default=200.0, gt=0)
    gamma: tuple[float, float] = (1.0, 0.01)
    normalize_at_one: bool = False
    p: tuple[float, float] = (2.0, 0.4)
    beta: float = Field(default=0.5, ge=0)
    anneal_until: float = Field(default=0.9, gt=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        smooth = {"frequency_weight", "reference_count", "ema_half_life", "gamma"}
        self._only_with(smooth | {"normalize_at_one"}, self.form == "smooth_l0", "to smooth_l0")
        self._only_with({"p", "beta"}, self.form == "lp", "to lp")
        if min(self.gamma) <= 0 or min(self.p) <= 0:
            raise ValueError(f"gamma {self.gamma} and p {self.p} must be positive")
        return self


class ReconstructionConfig(_Config):
    """One term: a mask source times a routing, weighted.

    Attributes:
        source: ``uniform``/``binomial`` draws; ``fresh_pgd`` sign ascent from a fresh draw;
            ``persistent`` sources kept across steps with their own Adam; ``pooled`` particles of
            each batch index, one drawn a step and used at every position.
        routing: which sites are masked at a position: ``all``; ``uniform_k_subset``; each with
            probability `probability` (``static_p``); one site at a time (``layerwise``).
        n_samples: draws a step (uniform and binomial).
        pgd_steps, pgd_step_size: of ``fresh_pgd``.
        scope: what a persistent (or fresh PGD) source is shared over: one (``c``), per batch index
            (``bc``), per position (``sc``), per both (``bsc``), or `repeat` rows used in turn.
        n_warm, lr, lr_warmup, betas: ascents before the loss, and Adam of the sources.
        sigmoid: parameterise sources by a logit instead of clamping.
        start_fraction: share of the run before the term is switched on.
        adversarial_fraction: below 1, every batch element is adversarial with this probability and
            otherwise carries uniform masks with subset routing (the merged term).
        particles: of each batch index (``pooled``).
        hidden_weight: adds ``hidden_weight · mean Σ|h_masked − h|² / Σ|h|²`` over site outputs.
    """

    source: Source = "uniform"
    routing: Routing = "uniform_k_subset"
    weight: float = Field(default=0.5, gt=0)
    probability: float = Field(default=0.5, gt=0, le=1)
    n_samples: int = Field(default=1, gt=0)
    pgd_steps: int = Field(default=1, gt=0)
    pgd_step_size: float = Field(default=1.0, gt=0)
    scope: Scope = "bsc"
    repeat: int = Field(default=1, gt=0)
    n_warm: int = Field(default=2, ge=0)
    lr: float = Field(default=0.01, gt=0)
    lr_warmup: float = Field(default=0.025, ge=0, lt=1)
    betas: tuple[float, float] = (0.5, 0.99)
    sigmoid: bool = False
    start_fraction: float = Field(default=0.0, ge=0, lt=1)
    adversarial_fraction: float = Field(default=1.0, gt=0, le=1)
    particles: int = Field(default=8, gt=0)
    hidden_weight: float = Field(default=0.0, ge=0)

    @property
    def keeps_sources(self) -> bool:
        return self.source in {"persistent", "pooled"}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        drawn = self.source in {"uniform", "binomial"}
        self._only_with({"probability"}, self.routing == "static_p", "to static_p routing")
        self._only_with({"n_samples"}, drawn, "to uniform and binomial sources")
        self._only_with({"pgd_steps", "pgd_step_size"}, self.source == "fresh_pgd", "to fresh_pgd")
        adam = {"n_warm", "lr", "lr_warmup", "betas"}
        self._only_with(adam | {"adversarial_fraction"}, self.keeps_sources, "to kept sources")
        self._only_with({"sigmoid"}, self.source == "persistent", "to persistent sources")
        self._only_with({"scope"}, self.source in {"persistent", "fresh_pgd"}, "to PGD sources")
        self._only_with({"particles"}, self.source == "pooled", "to pooled sources")
        self._only_with({"repeat"}, self.scope == "repeat", "with scope='repeat'")
        if self.routing == "layerwise" and not drawn:
            raise ValueError("layerwise routing goes with uniform or binomial sources")
        self._only_with({"hidden_weight"}, self.routing != "layerwise", "to whole-model routings")
        return self


class SpeedConfig(_Config):
    """Switches that change the time of a step, not its mathematics (each has an equality test).

    Attributes:
        prefix: start masked forwards at the first decomposed block from the cached residual.
        single_backward: take the last source ascent from the loss's own backward pass.
        cache_clean: keep clean outputs and site inputs of a finite token pool in memory.
        joint_forward: all terms of a step in one forward pass over a repeated batch.
        written_attention: attention by plain products instead of torch's fused CPU kernel, in the
            model and in the importance network.
        fused_optimiser: torch's fused AdamW and Adam.
        fused_activations: torch's kernel for activations that a model writes out term by term.
        fast_float32: `models.arithmetic.fast_float32`, where this processor passes its check.
    """

    prefix: bool = True
    single_backward: bool = True
    cache_clean: bool = False
    joint_forward: bool = False
    written_attention: bool = True
    fused_optimiser: bool = True
    fused_activations: bool = True
    fast_float32: bool = True


class VPDConfig(_Config):
    """A decomposition.

    Attributes:
        sites: globs over site names.
        n_components: subcomponents per site, or glob -> number (first match counts).
        init: ``random`` (then `warmup_steps` of faithfulness alone), ``aligned`` to the
            coordinates that face a nonlinearity, or ``svd``; the last two are exactly faithful at
            step 0 where C allows it.
        reconstruction: the terms.
        normalise: divide reconstruction by the error of the all-zero mask, measured once on the
            first batches, so that weights are in units of the whole behaviour.
        n_steps, batch_size: of training; schedules are functions of step/(n_steps − 1).
        lr, importance_lr: AdamW of the components and of the importance network, cosine to
            `lr_end` of it. `clip`, `importance_clip`: bounds on the gradient norms (None: none).
        allow_unfaithful: accept C below the rank of the matrix, where the sum of the components
            cannot equal the matrix.
        precision: of the masked forward passes; losses and masters are float32 in any case.
        log_every, checkpoint_every: steps.
    """

    sites: tuple[str, ...] = ("*",)
    n_components: int | dict[str, int] = 64
    init: Literal["random", "aligned", "svd"] = "random"
    importance: ImportanceConfig = ImportanceConfig()
    faithfulness: FaithfulnessConfig = FaithfulnessConfig()
    minimality: MinimalityConfig = MinimalityConfig()
    reconstruction: tuple[ReconstructionConfig, ...] = (
        ReconstructionConfig(),
        ReconstructionConfig(source="persistent", routing="all"),
    )
    normalise: Literal["none", "zero_mask"] = "none"
    n_steps: int = Field(default=2_000, gt=0)
    batch_size: int = Field(default=8, gt=0)
    lr: float = Field(default=1e-3, gt=0)
    importance_lr: float = Field(default=1e-3, gt=0)
    lr_end: float = Field(default=0.1, ge=0, le=1)
    clip: float | None = Field(default=1.0, gt=0)
    importance_clip: float | None = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=200, ge=0)
    warmup_lr: float = Field(default=1e-2, gt=0)
    allow_unfaithful: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    speed: SpeedConfig = SpeedConfig()
    log_every: int = Field(default=50, gt=0)
    checkpoint_every: int = Field(default=500, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.reconstruction:
            raise ValueError("reconstruction is empty: without a term every importance goes to 0")
        counts = self.n_components
        if min([counts] if isinstance(counts, int) else list(counts.values()), default=0) < 1:
            raise ValueError(f"n_components {counts}: expected at least one per site")
        self._only_with({"warmup_lr"}, self.warmup_steps > 0, "with warmup_steps > 0")
        if self.init != "random":
            self._only_with({"warmup_steps"}, self.warmup_steps == 0, "to init='random'")
        return self

    @property
    def n_warmup(self) -> int:
        """Faithfulness-only steps before step 0; an exact start needs none."""
        return self.warmup_steps if self.init == "random" else 0


def make_config(values: dict[str, Any], subject: str = "VPD configuration") -> VPDConfig:
    """A configuration from plain values.

    Raises:
        ConfigError: an unknown key, a value out of range, or keys that contradict each other.
    """
    try:
        return VPDConfig.model_validate(values)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'keys'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        )
        raise ConfigError(
            subject,
            given=found,
            expected="the keys of mi_weightspace.vpd.config.VPDConfig",
            remedy="Correct the named keys; `mi-weightspace vpd --help` lists the common ones.",
        ) from error


def read_config(path: str | Path) -> VPDConfig:
    """A configuration from a YAML file.

    Raises:
        ConfigError: no such file, not a mapping, or what `make_config` refuses.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"configuration file {path}",
            given=f"{type(error).__name__}: {error}",
            expected="a YAML file",
            remedy="Pass the path of a YAML mapping.",
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"configuration file {path}",
            given=type(values).__name__,
            expected="a mapping of keys to values",
            remedy="Write one `key: value` a line.",
        )
    return make_config(values, f"configuration file {path}")

"""What a stage's activations look like to an SAE, and the reservations that go with it.

Encoded token by token, then pooled (never the code of a pooled vector); right-padded, streamed,
the first token of every prompt left out. Beside the SAE stand two dictionaries that share its
width, rule and L0: random unit rows, and the trained weights turned by a random rotation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mi_weightspace.core.components import Components
from mi_weightspace.core.errors import MismatchError, PromptError, SiteError
from mi_weightspace.core.readings import RANDOM_SAE, ROTATED_SAE, SAE, StageReadings, StageRole
from mi_weightspace.core.sae import Sae
from mi_weightspace.core.seeds import derive
from mi_weightspace.core.space import Space
from mi_weightspace.models.lens import Lens
from probes.sae_fit import CHECK_TOKENS, FVU_BOUND, SaeFit, activations, check_fit, sampled
from probes.sae_pool import StagePool
from probes.sae_tokens import Ids, Prompts, stream, token_ids, token_spans

TRAP = 1.5
"""An L0 further than this factor from the k of batch-top-k training is reported."""
ROWS_AT_ONCE = 4_096
"""Tokens encoded at a time from activations that are already there."""

Ragged = Tensor | Sequence[Tensor]


def read_stage(
    lens: Lens,
    labelled: Prompts,
    sae: Sae,
    *,
    stage: str = "",
    role: StageRole = "hidden",
    position: str = "suffix_mean",
    components: Mapping[str, Components] | Sequence[Components] = (),
    rivals: Mapping[str, Sae] | None = None,
    base: Lens | None = None,
    seed: int = 0,
    fvu_bound: float | None = FVU_BOUND,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> StageReadings:
    """Run a labelled set through one stage and pool what the SAE makes of it.

    Args:
        position: ``suffix_mean`` (mean over the tokens all prompts share at the end, at least the
            last), ``last``, ``all_mean``, or ``max`` (codes by their maximum over tokens,
            everything else by the mean).
        components: rank-one parts whose read sides are taken as detectors, at their own site's
            input; named ``"METHOD SITE"`` unless a mapping names them.
        rivals: dictionaries to compare with. Default: `rival_saes` with thresholds set on this
            stage; to compare stages make them once, on the clean stage, and hand them in. An empty
            mapping reads the SAE alone.
        base: the stage to subtract, for an SAE of differences.
        fvu_bound: see `check_fit`; stages that are not ``clean`` count as tuned there. None checks
            names and widths alone.
        batch_tokens: rows × columns of one forward pass; default: by the free memory.

    Raises:
        SiteError, MismatchError, ConventionError: an SAE that does not fit (`check_fit`), or
            components of a site this model does not have.
        PromptError: prompts this model cannot read.
    """
    ids = token_ids(lens, labelled)
    measured = None if fvu_bound is None else labelled
    fit = check_fit(sae, lens, measured, base=base, tuned=role != "clean", bound=fvu_bound)
    distinct = list(dict.fromkeys(ids))
    spans = token_spans(distinct, position)
    parts = _inner(components, lens)
    if rivals is None:
        rivals = rival_saes(sae, _reference(lens, ids, fit, base), seed=seed)
    counts = torch.tensor([len(span) for span in spans])
    own = {name: one.to(lens.device) for name, one in {SAE: sae, **rivals}.items()}
    pool = StagePool(counts, own, largest=position == "max", centred=fit.centred)
    names = list(dict.fromkeys([fit.capture, *(part.capture for part in parts)]))
    for taken in stream(
        lens,
        distinct,
        spans,
        names,
        base=base,
        batch_tokens=batch_tokens,
        progress=progress,
        label=f"codes {stage}",
    ):
        pool.add(taken.values[fit.capture], taken.prompt)
        for part in parts:
            inner = taken.values[part.capture] @ part.read.to(lens.device).T
            pool.add_inner(part.name, inner, taken.prompt)
    where = {row: i for i, row in enumerate(distinct)}
    return _readings(
        pool,
        [where[row] for row in ids],
        stage=stage,
        role=role,
        space=sae.space,
        model_hash=lens.fingerprint,
        position=position,
    )


def readings_of(
    given: Ragged,
    sae: Sae,
    *,
    stage: str = "",
    role: StageRole = "hidden",
    mask: Bool[Tensor, "n tokens"] | None = None,
    largest: bool = False,
    rivals: Mapping[str, Sae] | None = None,
    seed: int = 0,
    space: Space | None = None,
    model_hash: str = "",
    position: str = "given",
) -> StageReadings:
    """The same for activations the user already has; nothing is run.

    Args:
        given: of n prompts: (n, tokens, d), one (tokens_i, d) each, or (n, d), one token each.
            Activations that were averaged over tokens do not belong here: the code of a mean is
            not the mean of the codes.
        mask: (n, tokens), True where a token counts.
        largest: pool codes by their maximum over tokens instead of the mean.

    Raises:
        MismatchError: activations of another width.
        PromptError: a prompt without a token, or values that are not finite.
    """
    rows = _rows(given, mask)
    counts = torch.tensor([row.shape[0] for row in rows])
    prompt = torch.arange(len(rows)).repeat_interleave(counts)
    x = torch.cat(rows).float()
    if x.shape[1] != sae.d_in:
        raise MismatchError(
            f"activations of stage {stage!r}",
            given=f"width {x.shape[1]}",
            expected=f"d_in = {sae.d_in} of {sae!r}",
            remedy="Give the activations at the point the SAE was trained at.",
        )
    if rivals is None:
        rivals = rival_saes(sae, x[:: max(1, -(-x.shape[0] // CHECK_TOKENS))], seed=seed)
    pool = StagePool(counts, {SAE: sae, **rivals}, largest=largest)
    for part in torch.arange(len(rows)).split(max(1, ROWS_AT_ONCE * len(rows) // x.shape[0])):
        here = (prompt >= part[0]) & (prompt <= part[-1])  # whole prompts at a time
        pool.add(x[here], prompt[here])
    return _readings(
        pool,
        range(len(rows)),
        stage=stage,
        role=role,
        space=sae.space if space is None else space,
        model_hash=model_hash,
        position=position,
    )


def rival_saes(sae: Sae, x: Float[Tensor, "n d_in"], *, seed: int = 0) -> dict[str, Sae]:
    """The random and the rotated dictionary, their L0 matched to the SAE's on `x`."""
    x = x.to(sae.W_enc)
    return {
        RANDOM_SAE: sae.randomised(derive(seed, RANDOM_SAE), x=x),
        ROTATED_SAE: sae.rotated(derive(seed, ROTATED_SAE), x),
    }


def reference_activations(
    lens: Lens, prompts: Prompts, sae: Sae, *, base: Lens | None = None
) -> Float[Tensor, "n d_in"]:
    """About a thousand tokens of what the SAE reads here, for `rival_saes`."""
    fit = check_fit(sae, lens, base=base)
    return _reference(lens, token_ids(lens, prompts), fit, base)


def sae_reservations(facts: Mapping[str, float]) -> tuple[str, ...]:
    """What the facts of a stage warn of, in words.

    The threshold of batch-top-k training is a slow running mean: after a short training the saved
    SAE fires far more latents than the k it was trained with.
    """
    ratio = facts.get("l0_over_k")
    if ratio is None or 1 / TRAP <= ratio <= TRAP:
        return ()
    return (
        f"{facts['l0']:.3g} latents active a token where training kept {facts['trained_k']:.3g}: "
        "the threshold saved with the SAE is not that of its training (sae.with_l0 sets it)",
    )


@dataclass(frozen=True, eq=False)
class _Inner:
    name: str
    capture: str
    read: Float[Tensor, "k d_in"]


def _inner(components: Mapping[str, Components] | Sequence[Components], lens: Lens) -> list[_Inner]:
    if not isinstance(components, Mapping):
        named: dict[str, Components] = {}
        for part in components:
            name = f"{part.method} {part.site.name}"
            name = name if name not in named else f"{name} {part.stage or len(named)}"
            named[name] = part
        components = named
    here = {site.name: site for site in lens.sites()}
    found = []
    for name, part in components.items():
        site = here.get(part.site.name)
        if site is None or site.kind == "embed" or site.d_in != part.site.d_in:
            raise SiteError(
                f"components {name!r}",
                given=f"site {part.site.name} reading {part.site.d_in} coordinates",
                expected="a matrix of this model that reads activations",
                remedy="Hand in components of this model's own difference.",
            )
        found.append(_Inner(name, f"{part.site.name}:in", part.read.float()))
    return found


def _reference(
    lens: Lens, ids: Sequence[Ids], fit: SaeFit, base: Lens | None
) -> Float[Tensor, "n d_in"]:
    x = activations(lens, sampled(ids), [fit.capture], base=base)[fit.capture].cpu()
    return x - x.mean(-1, keepdim=True) if fit.centred else x


def _rows(given: Ragged, mask: Tensor | None) -> list[Tensor]:
    if not isinstance(given, Tensor):
        rows = list(given)
    elif given.ndim == 2:
        rows = list(given[:, None])
    elif mask is None:
        rows = list(given)
    else:
        rows = [row[keep.bool()] for row, keep in zip(given, mask, strict=True)]
    for i, row in enumerate(rows):
        if row.ndim != 2 or not row.shape[0] or not bool(torch.isfinite(row).all()):
            raise PromptError(
                f"activations of prompt {i}",
                given=f"shape {tuple(row.shape)}"
                + (", not all finite" if row.numel() and row.ndim == 2 else ""),
                expected="(tokens, d) with at least one token, finite",
                remedy="Drop empty prompts; run the model in float32.",
            )
    return rows


def _readings(
    pool: StagePool,
    order: Sequence[int],
    *,
    stage: str,
    role: StageRole,
    space: Space | None,
    model_hash: str,
    position: str,
) -> StageReadings:
    n = len(pool.tokens)
    found = StageReadings(
        stage=stage,
        role=role,
        dense=pool.dense,
        space=space,
        codes={name: codes.dense(n) for name, codes in pool.codes.items()},
        reconstruction=pool.rebuilt,
        components=pool.components,
        facts=pool.facts(),
        model_hash=model_hash,
        position=position,
    )
    return found if list(order) == list(range(n)) else found.rows(order)


__all__ = [
    "check_fit",
    "read_stage",
    "readings_of",
    "reference_activations",
    "rival_saes",
    "sae_reservations",
]

"""A whole VPD step on plain torch modules, from the equations of `naive`: one term at a time.

Knows Hugging Face modules through its own table; nothing of the library is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import naive
import torch
from naive import BySite, Minimality, Pool, Sources
from torch import Tensor, nn

Params = dict[str, tuple[Tensor, Tensor]]

PATHS = {
    "gpt2": (
        "transformer.h",
        {"attn.o": "attn.c_proj", "mlp.in": "mlp.c_fc", "mlp.out": "mlp.c_proj"},
    ),
    "llama": (
        "model.layers",
        {
            **{f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"},
            "mlp.gate": "mlp.gate_proj",
            "mlp.in": "mlp.up_proj",
            "mlp.out": "mlp.down_proj",
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {
            "attn.o": "attention.dense",
            "mlp.in": "mlp.dense_h_to_4h",
            "mlp.out": "mlp.dense_4h_to_h",
        },
    ),
}
FUSED = {"gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value"}


@dataclass
class Site:
    """A module and the output columns that belong to the site (all of them if None)."""

    module: nn.Module
    columns: list[int] | None = None

    def matrix(self) -> Tensor:
        weight: Any = self.module.weight
        stored_in_first = type(self.module).__name__ in {"Conv1D", "Embedding"}
        w = weight.detach() if stored_in_first else weight.detach().T
        w = w.double()
        return w if self.columns is None else w[:, self.columns]

    def bias(self) -> Tensor | None:
        b: Any = getattr(self.module, "bias", None)
        if b is None:
            return None
        return b.detach().double() if self.columns is None else b.detach().double()[self.columns]


def fused_columns(family: str, config: Any, slot: int) -> list[int]:
    """GPT-2: three consecutive blocks. NeoX: q, k, v in turn within every head."""
    d, heads = config.hidden_size, config.num_attention_heads
    if family == "gpt2":
        return list(range(slot * d, (slot + 1) * d))
    width = d // heads
    return [(3 * head + slot) * width + i for head in range(heads) for i in range(width)]


class NaiveHost:
    """A module in float64 and its sites; masked forwards by forward hooks on the modules."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], metric: str = "kl") -> None:
        self.model, self.sites, self.metric = model.eval(), dict(sites), metric
        self.weights = {name: site.matrix() for name, site in self.sites.items()}
        self.biases = {name: site.bias() for name, site in self.sites.items()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def _output(self, batch: Tensor) -> Tensor:
        out = self.model(batch)
        return out.logits if hasattr(out, "logits") else out

    def clean(self, batch: Tensor) -> tuple[Tensor, BySite, BySite]:
        """Output, inputs and outputs of the sites."""
        inputs, outputs = {}, {}

        def masked(name: str, x: Tensor, y: Tensor) -> Tensor:
            inputs[name], outputs[name] = x, y
            return y

        with torch.no_grad():
            return self._run(batch, masked), inputs, outputs

    def masked(
        self, batch: Tensor, params: Params, m: BySite, d: BySite, route: BySite | None
    ) -> tuple[Tensor, BySite]:
        """Output of the masked model and the outputs of its sites."""
        outputs: BySite = {}

        def change(name: str, x: Tensor, _y: Tensor) -> Tensor:
            v, u = params[name]
            bits = None if route is None else route[name]
            w, b = self.weights[name], self.biases[name]
            outputs[name] = naive.masked_output(x, w, b, v, u, m[name], d[name], bits)
            return outputs[name]

        return self._run(batch, change), outputs

    def _run(self, batch: Tensor, change: Callable[[str, Tensor, Tensor], Tensor]) -> Tensor:
        handles = []
        for module in {id(s.module): s.module for s in self.sites.values()}.values():
            own = {n: s for n, s in self.sites.items() if s.module is module}

            def hook(_m: Any, args: Any, out: Tensor, own: dict[str, Site] = own) -> Tensor:
                x = args[0]
                if not x.is_floating_point():
                    vocabulary = next(iter(own.values())).matrix().shape[0]
                    x = nn.functional.one_hot(x, vocabulary).double()
                new = out.clone()
                for name, site in own.items():
                    if site.columns is None:
                        new = change(name, x, out)
                    else:
                        new[..., site.columns] = change(name, x, out[..., site.columns])
                return new

            handles.append(module.register_forward_hook(hook))
        try:
            return self._output(batch)
        finally:
            for handle in handles:
                handle.remove()

    def distance(self, clean: Tensor, masked: Tensor) -> Tensor:
        return naive.kl(clean, masked) if self.metric == "kl" else naive.mse(clean, masked)


def hf_host(model: Any, *, edges: bool = False) -> NaiveHost:
    """A float64 model's matrices in forward order: q, k, v, o, gate, in, out of every block.

    `edges` adds ``embed`` in front and ``unembed`` behind.
    """
    model = model.double()
    family = model.config.model_type
    stem, leaves = PATHS[family]
    sites: dict[str, Site] = {}
    if edges:
        sites["embed"] = Site(model.get_input_embeddings())
    for layer, block in enumerate(model.get_submodule(stem)):
        if family in FUSED:
            fused = block.get_submodule(FUSED[family])
            for slot, part in enumerate("qkv"):
                columns = fused_columns(family, model.config, slot)
                sites[f"blocks.{layer}.attn.{part}"] = Site(fused, columns)
        for leaf, path in leaves.items():
            sites[f"blocks.{layer}.{leaf}"] = Site(block.get_submodule(path))
    if edges:
        sites["unembed"] = Site(model.get_output_embeddings())
    return NaiveHost(model, sites)


# ---- a step ------------------------------------------------------------------------------------
@dataclass
class Draw:
    """Uniform sources r, delta sources d, routing (None: all), each by site."""

    r: BySite
    d: BySite
    route: BySite | None = None


@dataclass
class Term:
    """A reconstruction term with its draws; `hidden_weight` is the rider's own coefficient.

    `stochastic`: mean over `draws`. `fresh`: sign ascent of draws[0]. `persistent`: `sources`.
    `merged`: `sources` where `adversarial` (B,), else draws[0]. `pooled`: `pool`, `chosen` (B).
    """

    kind: str
    weight: float = 1.0
    draws: list[Draw] = field(default_factory=list)
    sources: Sources | None = None
    pool: Pool | None = None
    chosen: list[int] = field(default_factory=list)
    adversarial: Tensor | None = None
    n_warm: int = 2
    pgd_steps: int = 1
    pgd_step_size: float = 1.0
    hidden_weight: float = 0.0
    route: BySite | None = None


@dataclass
class Step:
    """What a naive step returns; `losses` are unweighted terms, `total` the weighted sum."""

    total: Tensor
    losses: dict[str, Tensor]
    param_grads: dict[str, tuple[Tensor, Tensor]]
    z_grads: BySite
    ci_grads: list[Tensor]
    sources: list[Any]
    averages: BySite


def masks(g: BySite, r: BySite) -> BySite:
    return {name: g[name] + (1 - g[name]) * r[name] for name in g}


class Stage:
    """One batch with its clean pass; evaluates output error (and rider) of given sources."""

    def __init__(self, host: NaiveHost, batch: Tensor, clean: Tensor, hidden: BySite) -> None:
        self.host, self.batch, self.clean, self.hidden = host, batch, clean, hidden

    def error(
        self, params: Params, g: BySite, draw: Draw, hidden_weight: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """(output term, output term + rider)."""
        out, outputs = self.host.masked(self.batch, params, masks(g, draw.r), draw.d, draw.route)
        main = self.host.distance(self.clean, out)
        if not hidden_weight:
            return main, main
        return main, main + hidden_weight * naive.hidden_error(self.hidden, outputs)


def _leaves(values: BySite) -> BySite:
    return {name: t.detach().clone().requires_grad_() for name, t in values.items()}


def _grads(value: Tensor, leaves: BySite) -> BySite:
    found = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
    return dict(zip(leaves, found, strict=True))


def sign_ascent(stage: Stage, term: Term, params: Params, g: BySite) -> Draw:
    start = term.draws[0]
    r, d = start.r, start.d
    still = {n: (v.detach(), u.detach()) for n, (v, u) in params.items()}
    fixed = {n: t.detach() for n, t in g.items()}
    for _ in range(term.pgd_steps):
        leaf_r, leaf_d = _leaves(r), _leaves(d)
        value, _ = stage.error(still, fixed, Draw(leaf_r, leaf_d, start.route))
        gr, gd = _grads(value, leaf_r), _grads(value, leaf_d)
        size = term.pgd_step_size
        r = {n: (r[n] + size * gr[n].sign()).clamp(0, 1) for n in r}
        d = {n: (d[n] + size * gd[n].sign()).clamp(0, 1) for n in d}
    return Draw(r, d, start.route)


def _mixed(term: Term, r: BySite, d: BySite) -> Draw:
    """Adversarial batch elements: the sources, all sites; the others: the draw."""
    if term.adversarial is None:
        return Draw(r, d, term.route)
    draw, bits = term.draws[0], term.adversarial
    out_r, out_d, route = {}, {}, {}
    for name in r:
        pick = [r[name][i] if bits[i] else draw.r[name][i] for i in range(len(bits))]
        out_r[name] = torch.stack(pick)
        out_d[name] = torch.stack(
            [d[name][i] if bits[i] else draw.d[name][i] for i in range(len(bits))]
        )
        everywhere = torch.ones_like(out_d[name], dtype=torch.bool)
        chosen = everywhere if draw.route is None else draw.route[name]
        route[name] = torch.stack(
            [everywhere[i] if bits[i] else chosen[i] for i in range(len(bits))]
        )
    return Draw(out_r, out_d, route)


def _kept(
    stage: Stage, term: Term, params: Params, g: BySite
) -> tuple[Tensor, Tensor, Sources | Pool]:
    """Warm-up ascents, the loss with live parameters, and the sources after the last ascent."""
    still = {n: (v.detach(), u.detach()) for n, (v, u) in params.items()}
    fixed = {n: t.detach() for n, t in g.items()}
    shape = next(iter(g.values())).shape[:-1]
    batch, tokens = shape[0], shape[1] if len(shape) == 2 else None
    state: Any = term.sources if term.pool is None else term.pool

    def draw_of(leaves: BySite, *, warm: bool) -> Draw:
        """Warm-up ascents see every site and every row, whatever the loss sees."""
        mix = (lambda r, d: Draw(r, d)) if warm else (lambda r, d: _mixed(term, r, d))
        if term.pool is None:
            return mix(*state.spread(leaves, batch, tokens))
        wide = {n: t if tokens is None else t.unsqueeze(1) for n, t in leaves.items()}
        wide = {n: t.expand(*shape, t.shape[-1]) for n, t in wide.items()}
        r, d = {n: t[..., :-1] for n, t in wide.items()}, {n: t[..., -1] for n, t in wide.items()}
        return mix(r, d)

    def leaves_of() -> BySite:
        if term.pool is None:
            return _leaves(state.value)
        rows = range(batch)
        return _leaves(
            {n: torch.stack([t[i, term.chosen[i]] for i in rows]) for n, t in state.value.items()}
        )

    def ascended(grads: BySite) -> Any:
        return state.ascend(grads) if term.pool is None else state.ascend(term.chosen, grads)

    for _ in range(term.n_warm):
        leaves = leaves_of()
        value = stage.error(still, fixed, draw_of(leaves, warm=True))[0]
        state = ascended(_grads(value, leaves))
    # the separate pass for the last ascent: nothing of the loss's graph is reused
    leaves = leaves_of()
    value = stage.error(still, fixed, draw_of(leaves, warm=False))[0]
    final = ascended(_grads(value, leaves))
    constant = draw_of({n: t.detach() for n, t in leaves.items()}, warm=False)
    main, whole = stage.error(params, g, constant, term.hidden_weight)
    return main, whole, final


def reconstruction(
    stage: Stage, term: Term, params: Params, g: BySite
) -> tuple[Tensor, Tensor, Any]:
    """(output term, with rider, sources afterwards or None)."""
    if term.kind == "stochastic":
        pairs = [stage.error(params, g, draw, term.hidden_weight) for draw in term.draws]
        main, whole = (torch.stack(list(side)).mean() for side in zip(*pairs, strict=True))
        return main, whole, None
    if term.kind == "fresh":
        draw = sign_ascent(stage, term, params, g)
        return *stage.error(params, g, draw, term.hidden_weight), None
    return _kept(stage, term, params, g)


def naive_step(
    host: NaiveHost,
    params: Params,
    importance: Callable[[BySite], BySite],
    importance_params: list[Tensor],
    batch: Tensor,
    terms: list[Term],
    how: Minimality,
    *,
    faith: tuple[str, float] = ("relative", 1.0),
    averages: BySite | None = None,
    step: int = 0,
    leak: float = 0.01,
    scale: float = 1.0,
) -> Step:
    """Losses, gradients and new sources of one step. `scale` multiplies the reconstruction terms.

    `importance` maps the clean inputs of the sites to preactivations by site.
    """
    clean, inputs, outputs = host.clean(batch)
    z = importance(inputs)
    g = {name: naive.lower(t, leak) for name, t in z.items()}
    stage = Stage(host, batch, clean, outputs)
    live = {n: (v.requires_grad_(), u.requires_grad_()) for n, (v, u) in params.items()}
    faithful = naive.faithfulness(host.weights, live, faith[0])
    minimal, new_averages = naive.minimality(z, how, averages, step, leak)
    total = faith[1] * faithful + minimal
    losses, kept = {"faithfulness": faithful, "minimality": minimal}, []
    for index, term in enumerate(terms):
        main, whole, after = reconstruction(stage, term, live, g)
        losses[f"recon.{index}"] = main
        total = total + scale * term.weight * main + (whole - main)
        kept.append(after)
    flat = [t for pair in live.values() for t in pair]
    found = torch.autograd.grad(total, [*flat, *z.values(), *importance_params], allow_unused=True)
    zeros = [
        torch.zeros_like(t) if f is None else f
        for t, f in zip([*flat, *z.values(), *importance_params], found, strict=True)
    ]
    n, s = len(flat), len(z)
    return Step(
        total.detach(),
        {k: t.detach() for k, t in losses.items()},
        {name: (zeros[2 * i], zeros[2 * i + 1]) for i, name in enumerate(live)},
        dict(zip(z, zeros[n : n + s], strict=True)),
        zeros[n + s :],
        kept,
        new_averages,
    )

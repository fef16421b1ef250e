"""Each speed switch changes the time of a step and not its mathematics (SPEC 27–29).

Losses, gradients and the sources' moves at fixed parameters, switch on against switch off:
1e-10 in float64, 1e-5 in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vpd_problems as problems
from torch import Tensor, nn

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.models import arithmetic
from mi_weightspace.vpd.cache import CachedBatches, cache_bytes, clean_batches
from mi_weightspace.vpd.config import SpeedConfig, VPDConfig
from mi_weightspace.vpd.host import Host, LensHost
from mi_weightspace.vpd.sources import Sources
from mi_weightspace.vpd.stream import Stream, TokenStream
from mi_weightspace.vpd.switches import fused_activations
from mi_weightspace.vpd.train import start, train

ALL_OFF = dict.fromkeys(SpeedConfig.model_fields, False)
STEPS = (6, 7, 8)
TERMS: list[dict[str, Any]] = [
    {"source": "uniform", "routing": "uniform_k_subset", "n_samples": 2, "hidden_weight": 0.1},
    {"source": "uniform", "routing": "layerwise"},
    {"source": "fresh_pgd", "routing": "all", "scope": "c", "pgd_step_size": 0.1},
    {"source": "persistent", "routing": "all", "hidden_weight": 0.2},
    {"source": "persistent", "routing": "all", "scope": "sc", "adversarial_fraction": 0.5},
    {"source": "pooled", "routing": "all", "particles": 2},
    {"source": "persistent", "routing": "uniform_k_subset", "scope": "bc", "sigmoid": True},
]
TRANSFORMER = {
    "kind": "global_transformer",
    "d_model": 8,
    "n_blocks": 1,
    "n_heads": 2,
    "d_mlp": 8,
}


def evaluated(host: Host, stream: Stream, config: VPDConfig) -> dict[str, Tensor]:
    """Three evaluations at the first parameters, as a training loop prepares them."""
    found: dict[str, Tensor] = {}
    with host.prepared(config.speed):
        batches = clean_batches(host, stream, config)
        objective = start(host, batches(0), config).objective
        parameters = dict(objective.factors.named())
        parameters |= dict(objective.importance.named_parameters())
        for step in STEPS:
            for parameter in parameters.values():
                parameter.grad = None
            losses = objective(batches(step), step)
            losses.total.backward()
            losses.ascend((step + 1) / config.n_steps)
            found |= {f"{step}/{name}": value for name, value in losses.terms.items()}
            for name, parameter in parameters.items():
                assert parameter.grad is not None, name
                found[f"{step}/grad/{name}"] = parameter.grad.clone()
            for at, kept in objective.adversaries.kept.items():
                tensors = kept.leaves if isinstance(kept, Sources) else [kept.state["value"]]
                for i, leaf in enumerate(tensors):
                    found[f"{step}/sources/{at}/{i}"] = leaf.detach().clone()
    return found


def language(
    speed: dict[str, bool], *, double: bool, select: str = "blocks.*"
) -> dict[str, Tensor]:
    """The tiny GPT-2. In float32 sources would amplify rounding where their gradient is nearly 0
    (sign and Adam do), so the adversaries rest there: float64 covers them."""
    terms = TERMS if double else [*TERMS[:2], TERMS[3] | {"n_warm": 0, "lr": 1e-9}]
    config = problems.gpt2_config(
        reconstruction=terms, importance=TRANSFORMER, speed=ALL_OFF | speed
    )
    host = problems.gpt2_host(select, double=double)
    return evaluated(host, problems.token_stream(rows=4), config)


@pytest.fixture(scope="module")
def plain() -> dict[bool, dict[str, Tensor]]:
    return {double: language({}, double=double) for double in (True, False)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 40
    for key, value in expected.items():
        size = float(value.norm()) or 1.0
        assert float((found[key] - value).norm()) <= tolerance * size, key


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "name", ["single_backward", "cache_clean", "joint_forward", "written_attention",
             "fused_optimiser", "fused_activations"]
)  # fmt: skip
def test_a_switch_changes_nothing(
    plain: dict[bool, dict[str, Tensor]], name: str, double: bool
) -> None:
    """SPEC 27."""
    assert_close(language({name: True}, double=double), plain[double], 1e-10 if double else 1e-5)


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_starting_at_the_first_decomposed_block_changes_nothing(double: bool) -> None:
    """SPEC 27: also with the clean passes cached, and over a batch repeated."""
    plain = language({}, double=double, select="blocks.1.*")
    tolerance = 1e-10 if double else 1e-5
    for more in ({}, {"cache_clean": True, "joint_forward": True}):
        found = language({"prefix": True, **more}, double=double, select="blocks.1.*")
        assert_close(found, plain, tolerance)


def test_all_switches_together_change_nothing(plain: dict[bool, dict[str, Tensor]]) -> None:
    """SPEC 27."""
    speed = dict.fromkeys(ALL_OFF, True)
    assert_close(language(speed, double=True), plain[True], 1e-10)
    assert_close(language(speed, double=False), plain[False], 1e-5)


def test_the_other_float32_path_changes_nothing(
    plain: dict[bool, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPEC 27: taken here whatever its gain, provided its products are float32 ones."""
    switch: Any = arithmetic._switch()
    if switch is None:
        pytest.skip("this torch has no other path")
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        exact = all(
            arithmetic.product_error(*shape) <= arithmetic.TOLERANCE for shape in arithmetic.SHAPES
        )
    finally:
        switch.fp32_precision = before
    if not exact:
        pytest.skip("on this processor the other path rounds")
    monkeypatch.setattr("mi_weightspace.models.arithmetic.worthwhile", lambda: True)
    found = language({"fast_float32": True, "written_attention": True}, double=False)
    assert_close(found, plain[False], 1e-5)
    assert switch.fp32_precision == before


# ---- is the switch wired? ----------------------------------------------------------------------
def forwards(speed: dict[str, bool], select: str = "blocks.1.*") -> dict[str, int]:
    """How often the first block ran, and the last, in two steps (clean passes included)."""
    host = problems.gpt2_host(select)
    blocks: Any = host.lens.root.get_submodule("transformer.h")
    counts = {"first": 0, "last": 0, "rows": 0}
    config = problems.gpt2_config(n_steps=2, speed=ALL_OFF | speed, warmup_steps=0)

    def count(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], _out: Any) -> None:
            counts[name] += 1
            counts["rows"] += len(args[0]) if name == "last" else 0

        return hook

    handles = [
        blocks[0].register_forward_hook(count("first")),
        blocks[1].register_forward_hook(count("last")),
    ]
    train(host, problems.token_stream(rows=4), config, progress=False)
    for handle in handles:
        handle.remove()
    return counts


def test_switches_save_the_passes_they_are_for() -> None:
    """SPEC 28. Two steps: a clean pass for the shapes, two for the steps, and each step two
    warm-up ascents and two losses."""
    off = forwards({})
    assert (off["first"], off["last"]) == (3 + 2 * 4, 3 + 2 * 4)
    assert forwards({"prefix": True})["first"] == 3
    joint = forwards({"joint_forward": True})
    assert joint["last"] == 3 + 2 * 3 and joint["rows"] == off["rows"]
    cached = forwards({"cache_clean": True})
    assert cached["last"] <= 2 + 2 * 4 and cached["last"] < off["last"]


def test_prefix_of_the_host_and_of_the_configuration() -> None:
    """SPEC 28: either can say no; outside a loop the host's own word counts."""
    host = problems.gpt2_host("blocks.1.*")
    batch = problems.token_table(2)
    for speed, own, skips in [(True, True, True), (False, True, False), (True, False, False)]:
        host = problems.gpt2_host("blocks.1.*", prefix=own)
        with host.prepared(SpeedConfig(prefix=speed)):
            assert (host.clean(batch).start is not None) == skips
        assert (host.clean(batch).start is not None) == own


# ---- cached clean passes -----------------------------------------------------------------------
def test_cached_passes_do_not_depend_on_who_asked_first() -> None:
    """SPEC 29: bits included, so that a resumed run, whose cache is empty, sees the same."""
    config = problems.gpt2_config(speed={"cache_clean": True})
    host = problems.gpt2_host("blocks.1.*")
    stream = problems.token_stream(rows=7)
    forward, backward = (clean_batches(host, stream, config) for _ in range(2))
    early = [forward(step) for step in range(6)]
    late = [backward(step) for step in reversed(range(6))][::-1]
    for step, (a, b) in enumerate(zip(early, late, strict=True)):
        c = host.clean(stream.batch(step))
        assert torch.equal(a.batch, c.batch)
        assert a.inputs.keys() == c.inputs.keys()
        for name, value in c.inputs.items():
            assert torch.equal(a.inputs[name], b.inputs[name])
            assert torch.allclose(a.inputs[name], value, atol=1e-5)
        assert a.start is not None and b.start is not None and c.start is not None
        assert torch.equal(a.output, b.output) and torch.equal(a.start, b.start)
        assert torch.allclose(a.output, c.output, atol=1e-5)
        assert torch.allclose(a.start, c.start, atol=1e-5)


def test_cache_memory_is_what_the_estimate_says() -> None:
    """Query, key and value read one tensor, kept once."""
    config = problems.gpt2_config(speed={"cache_clean": True})
    host = problems.gpt2_host()
    batches = clean_batches(host, problems.token_stream(rows=12), config)
    assert isinstance(batches, CachedBatches)
    clean = batches(0)
    kept = sum(v.numel() * v.element_size() for v in batches.kept.values())
    assert kept == cache_bytes(host.clean(clean.batch), 12)
    per_token = 8 + 4 * (problems.VOCAB + 2 * (8 + 8 + 8 + 12))
    assert kept == 12 * problems.TOKENS * per_token


def test_cached_embeddings_and_riders_keep_the_outputs_they_read() -> None:
    for select, rider, wanted in [
        (["embed", "blocks.0.mlp.in"], 0.0, {"embed"}),
        (["blocks.0.mlp.*"], 0.1, {"blocks.0.mlp.in", "blocks.0.mlp.out"}),
    ]:
        host = LensHost(problems.gpt2_host().lens, select)
        config = problems.gpt2_config(
            reconstruction=[{"source": "uniform", "routing": "all", "hidden_weight": rider}],
            n_components=problems.VOCAB,
            n_steps=2,
            warmup_steps=0,
            speed={"cache_clean": True},
        )
        assert set(clean_batches(host, problems.token_stream(), config)(0).outputs) == wanted
        train(host, problems.token_stream(), config, progress=False)


def test_a_stream_without_end_cannot_be_cached() -> None:
    """SPEC 29."""
    config = problems.toy_config(speed={"cache_clean": True})
    with pytest.raises(ConfigError, match=r"cache_clean.*SampledStream"):
        train(problems.toy_host(), problems.toy_stream(), config, progress=False)


# ---- activations -------------------------------------------------------------------------------
class NewGELUActivation(nn.Module):
    """Shares a name with a tanh GELU and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def test_activations_are_exchanged_within_the_context_and_equal() -> None:
    """SPEC 27, 28: 1e-6, and every trace is gone afterwards."""
    host = problems.gpt2_host()
    root = host.lens.root
    acts = [m for m in root.modules() if type(m).__name__ == "NewGELUActivation"]
    assert len(acts) == 2
    x = torch.linspace(-12, 12, 4001)
    before = [act(x) for act in acts]
    with fused_activations(root) as number:
        assert number == 2
        assert all("forward" in act.__dict__ for act in acts)
        for act, value in zip(acts, before, strict=True):
            assert float((act(x) - value).abs().max()) <= 1e-6
        with fused_activations(root) as inner:
            assert inner == 0
        assert all("forward" in act.__dict__ for act in acts)
    assert all("forward" not in act.__dict__ for act in acts)
    assert all(torch.equal(act(x), value) for act, value in zip(acts, before, strict=True))


def test_a_module_that_only_shares_the_name_stays() -> None:
    module = nn.Sequential(nn.Linear(2, 2), NewGELUActivation())
    with fused_activations(module) as number:
        assert number == 0


def test_the_loop_leaves_the_process_as_it_was() -> None:
    """SPEC 28."""
    switch: Any = arithmetic._switch()
    before = None if switch is None else switch.fp32_precision
    kernels = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    host = problems.gpt2_host()
    with pytest.raises(RuntimeError, match="stop"), host.prepared(SpeedConfig()):
        assert not torch.backends.cuda.flash_sdp_enabled()
        raise RuntimeError("stop")
    assert kernels == (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )
    assert switch is None or switch.fp32_precision == before
    assert all("forward" not in m.__dict__ for m in host.lens.root.modules())


def test_a_table_is_one_stream_and_a_table_of_blocks() -> None:
    """A last block shorter than the others is filled too."""
    host, table = problems.gpt2_host(), problems.token_table(5)
    batches = CachedBatches(host, TokenStream(table, 2, 0))
    for step in range(6):
        batches(step)
    assert batches.filled == {0, 1, 2}

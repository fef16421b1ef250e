"""Every family: the table holds by behaviour, disk equals memory, replacements are exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import CheckpointError, MismatchError, SiteError
from mi_weightspace.models import toy
from mi_weightspace.models.backends.torch_hooks import TorchLens
from mi_weightspace.models.checks import site_errors
from mi_weightspace.models.harvest import harvest
from mi_weightspace.models.lens import Edit
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.models.weights import CheckpointSource, Difference

pytestmark = pytest.mark.quick
TOKENS = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=toy.FAMILIES)
def lens(request: pytest.FixtureRequest) -> TorchLens:
    return TorchLens(toy.tiny_model(request.param))


def test_every_site_is_its_linear_map(lens: TorchLens) -> None:
    assert max(site_errors(lens).values()) <= 1e-5


def test_stream_points_chain(lens: TorchLens) -> None:
    """resid_post.L is what block L+1 reads, and the unembedding reads the normed last one."""
    names = [f"resid_pre.{i}" for i in range(2)] + [f"resid_post.{i}" for i in range(2)]
    got = lens.run(TOKENS, capture=names).captured
    assert torch.equal(got["resid_post.0"], got["resid_pre.1"])
    hidden = lens.model(TOKENS, output_hidden_states=True).hidden_states
    assert torch.allclose(got["resid_post.0"], hidden[1], atol=1e-5)
    assert not torch.allclose(got["resid_post.1"], hidden[2]), "the last entry is past the norm"


def test_identity_replacement_keeps_logits_and_gives_gradients(lens: TorchLens) -> None:
    plain = lens.run(TOKENS).logits
    masks = {}

    def through(name: str) -> object:
        weight, bias = lens.weight(name), lens.bias(name)
        masks[name] = torch.ones(weight.shape[0], requires_grad=True)
        return lambda x: torch.nn.functional.linear(x, weight, bias) * masks[name]

    before = {k: id(m) for k, m in lens.model.named_modules()}
    sites = [s.name for s in lens.sites() if s.kind != "embed"]
    with lens.replaced({name: through(name) for name in sites}):  # pyright: ignore[reportArgumentType]
        run = lens.run(TOKENS, grad=True)
    assert torch.allclose(run.logits, plain, atol=1e-5, rtol=1e-5)
    run.logits.square().mean().backward()  # pyright: ignore[reportOptionalMemberAccess]
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in masks.values())
    assert {k: id(m) for k, m in lens.model.named_modules()} == before


def test_disk_equals_memory(lens: TorchLens, tmp_path: Path) -> None:
    lens.model.save_pretrained(tmp_path, max_shard_size="40KB")
    source = CheckpointSource(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    for site in lens.sites():
        assert torch.equal(source.weight(site), lens.weight(site)), site
        for mine, theirs in (
            (source.bias(site), lens.bias(site)),
            (source.read_gain(site), lens.read_gain(site)),
            (source.read_shift(site), lens.read_shift(site)),
            (source.write_gain(site), lens.write_gain(site)),
        ):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs), site
    assert source.fingerprint == lens.fingerprint


def test_gains_are_what_the_norm_applies(lens: TorchLens) -> None:
    """The matrix reads gain * normalised stream (LayerNorm: plus a bias)."""
    got = lens.run(TOKENS, capture=["resid_pre.0", "blocks.0.attn.q:in"]).captured
    gain = lens.read_gain("blocks.0.attn.q")
    x, read = got["resid_pre.0"], got["blocks.0.attn.q:in"]
    if not lens.sites("blocks.0.attn.q")[0].reads_through_norm:
        assert torch.equal(x, read)
        return
    if lens.shape.family in {"gpt2", "gptj", "gpt_neox", "olmo"}:
        x = x - x.mean(-1, keepdim=True)
    normal = x / x.square().mean(-1, keepdim=True).sqrt()
    if gain is not None:
        normal = normal * gain
    rest = (read - normal).flatten(0, 1)
    assert (rest - rest[0]).abs().max() < 2e-3, "only a constant bias may remain"


def test_weight_and_stream_edits(lens: TorchLens) -> None:
    plain = lens.run(TOKENS).logits
    state = {k: v.clone() for k, v in lens.model.state_dict().items()}
    site = lens.sites("blocks.1.mlp.out")[0]
    edit = Edit(weights={site.name: 2 * lens.weight(site)})
    edited = lens.with_edit(edit)
    assert torch.equal(lens.run(TOKENS).logits, plain)
    with torch.no_grad():
        lens.module(site).weight.mul_(2)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        expected = lens.run(TOKENS).logits
        lens.module(site).weight.div_(2)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert torch.allclose(edited.run(TOKENS).logits, expected, atol=1e-5)
    stream = Edit(stream={"resid_post.0": torch.zeros_like})
    zeroed = lens.run(TOKENS, edit=stream, capture=["resid_pre.1"]).captured
    assert float(zeroed["resid_pre.1"].abs().max()) == 0.0
    after = lens.model.state_dict()
    assert all(torch.equal(state[k], after[k]) for k in state)


def test_the_users_hooks_keep_firing() -> None:
    lens = TorchLens(toy.tiny_model("gpt2"))
    calls: list[torch.Tensor] = []
    module = lens.module("blocks.0.mlp.out")
    handle = module.register_forward_hook(lambda _m, _a, out: calls.append(out.detach()))
    plain = lens.run(TOKENS).logits
    weight, bias = lens.weight("blocks.0.mlp.out"), lens.bias("blocks.0.mlp.out")
    with lens.replaced({"blocks.0.mlp.out": lambda x: x @ weight.T + bias}):
        lens.run(TOKENS)
    assert len(calls) == 2
    assert torch.allclose(calls[0], calls[1], atol=1e-5)
    assert list(module._forward_hooks) == [handle.id]
    handle.remove()
    assert torch.equal(lens.run(TOKENS).logits, plain)


def _set(texts: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> ContrastSet:
    pairs = tuple(Pair(f"i{i}", a, b) for i, (a, b) in enumerate(texts))
    return ContrastSet("t", (Contrast("c", "target", pairs),))


def test_harvest_padded_equals_unpadded(lens: TorchLens) -> None:
    pairs = [((5, 6, 7, 8, 9), (5, 10, 7, 8, 9)), ((11, 12), (13, 12))]
    together = harvest(lens, _set(pairs), sites=["blocks.1.mlp.out"], progress=False)
    for i, pair in enumerate(pairs):
        alone = harvest(lens, _set([pair]), progress=False)
        for point in lens.points():
            row = alone.at("c", point)[0]
            assert torch.allclose(together.at("c", point)[i], row, atol=1e-5), point
    raw = lens.run(torch.tensor([pairs[0][0]]), capture=["mlp_hidden.1"]).captured
    other = lens.run(torch.tensor([pairs[0][1]]), capture=["mlp_hidden.1"]).captured
    second = [
        lens.run(torch.tensor([p]), capture=["mlp_hidden.1"]).captured["mlp_hidden.1"][0, -1]
        for p in pairs[1]
    ]
    shift = (raw["mlp_hidden.1"] - other["mlp_hidden.1"])[0, -1] + second[0] - second[1]
    assert torch.allclose(together.site_shift["blocks.1.mlp.out"][0], shift / 2, atol=1e-5)


def test_pooling_positions() -> None:
    lens = TorchLens(toy.tiny_model("llama"))
    pair = [((5, 6, 7, 8, 9), (5, 10, 11, 8, 9))]
    full = lens.run(torch.tensor([pair[0][0]]), capture=["resid_post.1"]).captured["resid_post.1"][
        0
    ]
    spans = {"last": [4], "suffix_mean": [3, 4], "frame_mean": [1, 2], "all_mean": [1, 2, 3, 4]}
    for position, span in spans.items():
        got = harvest(lens, _set(pair), position=position, progress=False)
        pooled = got.at("c", "resid_post.1")[0, 0]
        assert torch.allclose(pooled, full[span].mean(0), atol=1e-5)


def test_lineage_refuses_what_differs_and_reports_no_change(tmp_path: Path) -> None:
    one = toy.save_tiny("gpt2", tmp_path / "a", seed=1)
    two = toy.save_tiny("gpt2", tmp_path / "b", seed=2)
    other = toy.save_tiny("gpt2", tmp_path / "c", n_layers=3)
    lineage = Lineage({"base": one, "sft": two, "dpo": two})
    check = lineage.check()
    assert [str(v) for v in check.verdicts] == ["dpo: no change"]
    assert check.table["changed_matrices"].tolist() == [0, 14, 0]
    difference = lineage.diff("base", "sft")
    expected = (
        toy.tiny_model("gpt2", seed=2).lm_head.weight
        - toy.tiny_model("gpt2", seed=1).lm_head.weight
    )
    assert torch.equal(difference.weight("unembed"), expected)
    with pytest.raises(MismatchError, match="n_layers 2 and 3"):
        Lineage({"base": one, "sft": other})
    with pytest.raises(MismatchError, match="at least two"):
        Lineage({"base": one})
    with pytest.raises(SiteError, match=r"blocks\.0\.mlp"):
        difference.sites("blocks.0.mlp.ou")
    with pytest.raises(CheckpointError, match="no such folder"):
        Lineage({"base": one, "sft": tmp_path / "nowhere"})
    assert Difference(CheckpointSource(one), CheckpointSource(one)).weight("embed").abs().sum() == 0

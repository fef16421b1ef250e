"""The causal gate on tiny models: interventions, nulls, ranks, verdicts against plain oracles."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mi_weightspace as mw
import probes
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.errors import ConfigError, DirectionError, PromptError
from mi_weightspace.core.readout import Readout
from mi_weightspace.core.space import Space
from mi_weightspace.core.verdict import Word
from mi_weightspace.models import toy
from mi_weightspace.models.lens import Edit, Lens
from mi_weightspace.models.load import load
from probes.gate_interventions import Change, Intervened, Subspaces
from probes.gate_judge import judge, ranked, two_sided_p
from probes.gate_nulls import null_subspaces, of_direction
from probes.gate_prompts import target_rows

BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "gpt_neox": "gpt_neox.layers"}


def pairs(n: int, *, seed: int = 0, readout: tuple[int, ...] = (7, 9)) -> tuple[Pair, ...]:
    """Prompts of different lengths on the two sides; a shared suffix of two tokens."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        body = torch.randint(10, 300, (12,), generator=draw).tolist()
        positive, negative = (*body[:5], 11, 12), (*body[5:9], 11, 12)
        found.append(Pair(f"i{i}", positive, negative, f"w{i % 3}", readout=readout))
    return tuple(found)


def contrast_set(n: int = 12, n_controls: int = 3) -> ContrastSet:
    controls = [
        Contrast(f"c{j}", "control", pairs(n, seed=10 + j, readout=())) for j in range(n_controls)
    ]
    return ContrastSet("set", (Contrast("target", "target", pairs(n)), *controls))


def lens_of(family: str = "llama", **config: Any) -> Lens:
    return load(toy.tiny_model(family, n_layers=3, **config))


def some_direction(lens: Lens, point: str = "resid_post.1", **fields: Any) -> Direction:
    vector = torch.randn(lens.shape.d_model, generator=torch.Generator().manual_seed(3))
    return Direction(vector, Space.parse(point), label="target", **fields)


def unit_rows(n: int, lens: Lens) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.nn.functional.normalize(torch.randn(n, lens.shape.d_model, generator=draw), dim=1)


def small(**changes: Any) -> dict[str, Any]:
    fast = {"n_null": 19, "n_reference": 5, "n_bootstrap": 50, "alphas": (1.0,)}
    return fast | {"interventions": ("mean_ablate", "add"), "progress": False} | changes


# ---- interventions -------------------------------------------------------------------------
def by_hooks(model: Any, blocks: str, ids: tuple[int, ...], changes: dict[int, Any]) -> Tensor:
    """Log-probabilities after the last token, the output of each block in `changes` replaced."""
    with ExitStack() as stack, torch.no_grad():
        for layer, change in changes.items():

            def hook(_m: Any, _a: Any, out: Any, change: Any = change) -> Any:
                first = out[0] if isinstance(out, tuple) else out
                moved = change(first)
                return (moved, *out[1:]) if isinstance(out, tuple) else moved

            module = model.get_submodule(f"{blocks}.{layer}")
            stack.callback(module.register_forward_hook(hook).remove)
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


@pytest.mark.parametrize("layer", [0, 2])  # before the last block, and behind it
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_interventions_are_those_of_a_hook_on_the_whole_model(family: str, layer: int) -> None:
    lens = lens_of(family)
    contrast = Contrast("t", "target", pairs(4))
    rows, _ = target_rows(lens, contrast, readout=None, splits=None, tokenizer=None)
    v = unit_rows(2, lens)
    both = Subspaces(v[:, None], v)
    bench = Intervened(lens, rows, Space("resid_post", layer), n_rows=3)
    mean = bench.mean[f"resid_post.{layer}"]
    blocks = BLOCKS[family]

    def stream(ids: tuple[int, ...]) -> Tensor:
        seen: list[Tensor] = []
        by_hooks(lens.model, blocks, ids, {layer: lambda x: seen.append(x) or x})
        return seen[0][0, -1]

    sides: list[tuple[Any, Any]] = [(p.positive, p.negative) for p in contrast.pairs]
    at = {ids: stream(ids) for side in sides for ids in side}
    neutral = torch.stack([at[side[1]] for side in sides])
    torch.testing.assert_close(mean, neutral.mean(0), atol=1e-5, rtol=0)
    operations: tuple[Any, ...] = ("mean_ablate", "project_out", "swap")
    for change in (Change("add", 2.5), *map(Change, operations)):
        odds = bench.run(change, both).log_odds
        for r, (ids, other) in enumerate(
            (side[k], side[1 - k]) for side in sides for k in range(2)
        ):

            def moved(x: Tensor, w: Tensor, other: Any = other, change: Change = change) -> Tensor:
                last = x[:, -1]
                aim = {"mean_ablate": mean @ w, "project_out": 0.0, "swap": at[other] @ w}
                if change.operation == "add":
                    last = last + change.amount * w
                else:
                    last = last + (aim[change.operation] - last @ w)[:, None] * w
                return torch.cat([x[:, :-1], last[:, None]], 1)

            for b in range(2):
                found = by_hooks(lens.model, blocks, ids, {layer: lambda x, w=v[b]: moved(x, w)})
                want = float(found[7] - found[9])
                assert float(odds[b, r]) == pytest.approx(want, abs=2e-4), (change, b, r)


def test_positions_points_and_later_layers() -> None:
    lens = lens_of("llama")
    contrast = Contrast("t", "target", pairs(3))
    rows, _ = target_rows(lens, contrast, readout=None, splits=None, tokenizer=None)
    lengths = rows.mask.sum(1)
    assert rows.edited("last").sum(1).tolist() == [1] * 6
    assert rows.edited("suffix").sum(1).tolist() == [2] * 6
    assert rows.edited("all").sum(1).tolist() == (lengths - 1).tolist()
    v = unit_rows(1, lens)
    one = Subspaces(v[:, None], v)

    def free(x: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, x - (x @ v[0])[..., None] * v[0], x)

    for point in ("resid_pre.0", "resid_mid.1", "resid_post.1", "resid_post.2"):
        for onward in (False, True):
            bench = Intervened(
                lens, rows, Space.parse(point), positions="suffix", onward=onward, n_rows=4
            )
            where = rows.edited("suffix")[..., None]
            points = [p.name for p in lens.points()]
            later = [p for p in points[points.index(point) + 1 :] if "post" in p]
            edit = Edit(
                stream={
                    p: lambda x, where=where: free(x, where)
                    for p in [point, *(later if onward else [])]
                }
            )
            logits = lens.run(rows.tokens, attention_mask=rows.mask, edit=edit).logits
            assert logits is not None
            final = logits[torch.arange(6), rows.last]
            odds = bench.run(Change("project_out"), one).log_odds[0]
            want = (final[:, 7] - final[:, 9]).double()
            torch.testing.assert_close(odds, want, atol=1e-4, rtol=0)


def test_swap_matches_tokens_from_the_end_and_both_option_orders_are_averaged() -> None:
    lens = lens_of("llama")
    pair = pairs(2)[0]
    again = replace(pair, swapped=(pair.negative, pair.positive))
    contrast = Contrast("t", "target", (again, pairs(2)[1]))
    rows, _ = target_rows(lens, contrast, readout=None, splits=None, tokenizer=None)
    assert rows.pair.tolist() == [0, 0, 0, 0, 1, 1]
    assert rows.yes[:4, 0].tolist() == [7, 7, 9, 9] and rows.no[:4, 0].tolist() == [9, 9, 7, 7]
    values = torch.tensor([[1.0, 5.0, 3.0]])  # frames: orders 0 and 1 of pair 0, then pair 1
    assert rows.per_pair(values, rows.of(0)).tolist() == [[3.0, 3.0]]
    # everything swapped at the last block's output turns a prompt into its partner
    full = torch.eye(lens.shape.d_model)[None]
    bench = Intervened(lens, rows, Space("resid_post", 2))
    found = bench.run(Change("swap"), Subspaces(full, full[:, 0]))
    torch.testing.assert_close(
        found.top[0], bench.log_probs[rows.partner].gather(1, bench._top[:, None])[:, 0]
        .double().exp(), atol=1e-5, rtol=0,
    )  # fmt: skip


def test_a_readout_without_a_rival_is_a_probability_and_rest_leaves_it_out() -> None:
    lens = lens_of("llama")
    contrast = Contrast("t", "target", pairs(3, readout=(7,)))
    rows, _ = target_rows(lens, contrast, readout=None, splits=None, tokenizer=None)
    bench = Intervened(lens, rows, Space("resid_post", 0), behaviour=rows.behaviour())
    assert rows.behaviour() == [7]
    torch.testing.assert_close(bench.base.p[0], bench.log_probs[:, 7].double().exp())
    v = unit_rows(1, lens)
    out = bench.run(Change("add", 3.0), Subspaces(v[:, None], v))
    keep = [i for i in range(lens.shape.vocab_size) if i != 7]
    edit = Edit(stream={"resid_post.0": lambda x: _add_last(x, rows.last, 3.0 * v[0])})
    logits = lens.run(rows.tokens, attention_mask=rows.mask, edit=edit).logits
    assert logits is not None
    after = logits[torch.arange(6), rows.last].double()[:, keep].log_softmax(1)
    before = bench.log_probs.double()[:, keep].log_softmax(1)
    want = (before.exp() * (before - after)).sum(1)
    torch.testing.assert_close(out.kl_rest[0], want, atol=1e-5, rtol=1e-3)
    assert bool((out.kl[0] > 0).all()) and not torch.allclose(out.kl, out.kl_rest)


def _add_last(x: Tensor, last: Tensor, step: Tensor) -> Tensor:
    out = x.clone()
    out[torch.arange(len(last)), last] += step
    return out


# ---- weight orthogonalisation --------------------------------------------------------------
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gptj", "phi3", "gemma"])
def test_orthogonalised_weights_equal_projecting_at_every_point(family: str) -> None:
    lens = lens_of(family)
    d = some_direction(lens)
    v = d.pattern
    tokens = torch.tensor([[5, 6, 7, 8, 9], [20, 21, 22, 23, 24]])
    points = [p.name for p in lens.points()]
    project = {p: lambda x: x - (x @ v)[..., None] * v for p in points}
    want = lens.run(tokens, edit=Edit(stream=project), capture=points)
    edit = probes.orthogonalised(lens, d)
    found = lens.with_edit(edit).run(tokens, capture=points)
    plain = lens.run(tokens)
    assert want.logits is not None and found.logits is not None and plain.logits is not None
    assert float((found.logits - want.logits).abs().max()) < 1e-4
    assert float((plain.logits - want.logits).abs().max()) > 1e-2
    for name in points:
        assert float((found.captured[name] @ v).abs().max()) < 1e-4, name
    for name, matrix in edit.weights.items():  # nothing is left to the stream functions but biases
        assert float((v @ matrix).abs().max()) < 1e-5, name
    written = {s.name for s in lens.sites() if s.writes.is_stream}
    assert set(edit.weights) == written and "embed" in written


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_behind_a_post_norm_nothing_is_written_along_the_direction(family: str) -> None:
    lens = lens_of(family)
    d = some_direction(lens)
    points = [p.name for p in lens.points()]
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    run = lens.with_edit(probes.orthogonalised(lens, d)).run(tokens, capture=points)
    plain = lens.run(tokens, capture=points)
    for name in points:
        assert float((run.captured[name] @ d.pattern).abs().max()) < 1e-4, name
        assert float((plain.captured[name] @ d.pattern).abs().max()) > 1e-2, name


# ---- nulls ---------------------------------------------------------------------------------
def planted_pairs(n: int = 20, d: int = 24) -> tuple[Tensor, Tensor]:
    """Pairs that differ by a fixed shift along the first axis and by chance along axes 2 to 9."""
    draw = torch.Generator().manual_seed(0)
    values = torch.zeros(n, 2, d, dtype=torch.float64)
    values[:, :, 10:] = torch.randn(n, 1, d - 10, generator=draw, dtype=torch.float64)
    values[:, 0, 2:10] += torch.randn(n, 8, generator=draw, dtype=torch.float64)
    values[:, 0, 0] += 5.0
    return values, torch.eye(d)[0]


def test_pair_residual_draws_hold_what_pairs_differ_in_and_never_the_shift() -> None:
    values, shift = planted_pairs()
    for rank in (1, 3):
        null = null_subspaces("pair_residual", values, 50, rank=rank, seed=0)
        gram = null.basis @ null.basis.mT
        torch.testing.assert_close(gram, torch.eye(rank).expand_as(gram), atol=1e-5, rtol=0)
        assert float((null.basis @ shift).abs().max()) < 1e-6
        assert float(null.basis[..., 10:].abs().max()) < 1e-6  # item variance cancels in pairs
        assert float(null.basis[..., 2:10].norm(dim=-1).min()) == pytest.approx(1, abs=1e-5)
    half = null_subspaces("half_split", values, 50, rank=1, seed=0).steer
    assert float((half @ shift).abs().max()) < 1e-6
    within = null_subspaces("within_class", values, 50, rank=1, seed=0).steer
    assert float(within[:, 10:].abs().max()) > 0.1
    isotropic = null_subspaces("isotropic", values, 400, rank=1, seed=0).steer
    assert float((isotropic @ shift).square().mean()) == pytest.approx(1 / 24, rel=0.25)
    other = null_subspaces("pair_residual", values, 50, rank=1, seed=1)
    assert not torch.equal(
        other.steer, null_subspaces("pair_residual", values, 50, rank=1, seed=0).steer
    )


def test_one_pair_leaves_no_null_and_rank_k_spans_the_differences() -> None:
    values, _ = planted_pairs()
    assert len(null_subspaces("pair_residual", values[:1], 9, rank=1, seed=0)) == 0
    assert len(null_subspaces("within_class", values[:1], 9, rank=1, seed=0)) == 0
    chosen = of_direction(torch.ones(24), values, 4)
    differences = values[:, 0] - values[:, 1]
    kept = differences @ chosen.basis[0].double().T @ chosen.basis[0].double()
    singular = torch.linalg.svdvals(differences)
    left = (differences - kept).square().sum()
    assert float(left) == pytest.approx(float(singular[4:].square().sum()), rel=1e-5)


# ---- ranks ---------------------------------------------------------------------------------
def test_rank_p_is_two_sided_around_the_nulls_mean_and_exact() -> None:
    draw = torch.Generator().manual_seed(0)
    null = 3.0 + torch.randn(99, 2, generator=draw, dtype=torch.float64)
    single, joint = two_sided_p(torch.tensor([3.0, 9.0], dtype=torch.float64), null)
    assert float(single[0]) > 0.8 and float(single[1]) == 0.01 and float(joint[1]) == 0.01
    low, high = (float(two_sided_p(torch.tensor([3.0 + s * 3.5]).double(), null[:, :1])[0])
                 for s in (-1, 1))  # fmt: skip
    assert low == high == 0.01
    # under exchangeability p ≤ α with probability α, for the maximum too
    hits = [0, 0]
    for _ in range(400):
        every = (
            torch.randn(20, 3, generator=draw, dtype=torch.float64)
            @ torch.ones(3, 3).triu().double()
        )
        p, q = two_sided_p(every[0], every[1:])
        hits[0] += int(p[0] <= 0.1)
        hits[1] += int(q.min() <= 0.1)
    assert 22 <= hits[0] <= 60 and 22 <= hits[1] <= 60  # 40 expected, sd 6
    none = ranked(1.0, torch.zeros(0))
    assert none.p == 1.0 and none.mean != none.mean


# ---- verdicts ------------------------------------------------------------------------------
def row(
    intervention: str, alpha: float, scale: str = "probability", **given: Any
) -> dict[str, Any]:
    base = {
        "intervention": intervention, "alpha": alpha, "scale": scale, "interpretable": True,
        "prompts": "neutral" if intervention == "add" else "frame", "before": 0.5, "effect": 0.3,
        "se": 0.01, "low": 0.28, "high": 0.32, "p": 0.005, "p_adjusted": 0.005,
        "isotropic_z": -20.0,
    }  # fmt: skip
    return base | given


FACTS = {
    "ablation": "mean_ablate", "n_clusters": 40, "n_null": 199, "detects": True, "difference": 0.4,
    "specificity_low": 0.2, "side_kl_rest": 0.01, "side_kl_rest_null95": 0.02,
}  # fmt: skip


def verdict(
    *, ablation: dict[str, Any] | None = None, up: dict[str, Any] | None = None,
    down: dict[str, Any] | None = None, protocol: Any = "pair_residual", **facts: Any,
) -> tuple[str, Word, str]:  # fmt: skip
    rows = [
        row("mean_ablate", float("nan")) | {"effect": -0.3} | (ablation or {}),
        row("add", 1.0) | (up or {}),
        row("add", -1.0) | {"effect": -0.3} | (down or {}),
    ]
    found = judge(rows, FACTS | facts, protocol, "s")
    return str(found.evidence["gate"]), found.word, " ".join(found.reservations)


def test_every_verdict_and_the_condition_that_gives_it() -> None:
    assert verdict()[:2] == ("PASS", Word.LOAD_BEARING)
    assert verdict(ablation={"p": 0.02})[:2] == ("DETECTOR-ONLY", Word.DETECTOR_ONLY)
    assert verdict(ablation={"effect": -0.04})[0] == "DETECTOR-ONLY"
    assert verdict(ablation={"p": 0.02}, detects=False)[:2] == ("FAIL", Word.NOT_LOAD_BEARING)
    assert verdict(ablation={"effect": -0.1, "se": 0.06})[:2] == ("UNDERPOWERED", Word.UNDERPOWERED)
    assert verdict(n_clusters=9)[0] == verdict(n_null=98)[0] == "UNDERPOWERED"
    assert verdict(specificity_low=-0.01)[:2] == ("GENERIC", Word.GENERIC)
    assert verdict(side_kl_rest=0.03)[0] == "GENERIC"
    assert verdict(specificity_low=float("nan"))[0] == "PASS"
    star = ("PASS*", Word.NECESSARY_ONLY)
    assert verdict(up={"effect": 0.04})[:2] == star  # below the floor
    assert verdict(down={"effect": 0.3})[:2] == star  # not opposite
    assert verdict(down={"p_adjusted": 0.06})[:2] == star
    assert verdict(up={"effect": -0.3}, down={"effect": 0.3})[:2] == star  # the wrong way round
    small = verdict(up={"interpretable": False})
    assert small[0] == "PASS*" and "declare smaller alphas" in small[2]


def test_steering_is_read_where_there_is_room() -> None:
    rows = [row("mean_ablate", float("nan"), effect=-0.3)]
    for scale, before, effect in (("probability", 0.01, 0.001), ("centred", 0.5, 0.3)):
        rows += [row("add", s, scale, before=before, effect=s * effect) for s in (1.0, -1.0)]
    assert judge(rows, FACTS, "pair_residual", "s").evidence["gate"] == "PASS"
    for line in rows[1:3]:
        line["before"] = 0.3  # room again: what does not move there does not count
    assert judge(rows, FACTS, "pair_residual", "s").evidence["gate"] == "PASS*"


def test_the_earlier_protocol_asks_only_an_isotropic_z_and_opposite_signs() -> None:
    weak = {"ablation": {"effect": -0.03, "p": 0.8}, "up": {"effect": 0.03, "p_adjusted": 0.9}}
    assert verdict(**weak, down={"effect": -0.03}, protocol="v1.1")[0] == "PASS"
    assert verdict(**weak, down={"effect": -0.03})[0] == "DETECTOR-ONLY"
    assert verdict(**weak, down={"effect": -0.01}, protocol="v1.1")[0] == "DETECTOR-ONLY"
    assert verdict(ablation={"isotropic_z": -5.9}, protocol="v1.1")[0] == "DETECTOR-ONLY"
    wild = {"up": {"interpretable": False}, "protocol": "v1.1"}
    assert verdict(**wild)[0] == "DETECTOR-ONLY"


# ---- the whole gate ------------------------------------------------------------------------
def test_a_run_is_saved_plotted_and_judged_again_by_the_other_protocol(tmp_path: Path) -> None:
    lens, prompts = lens_of(), contrast_set()
    report = probes.gate(lens, some_direction(lens), prompts, **small())
    loaded = mw.load_report(report.save(tmp_path / "run"))
    assert isinstance(loaded, probes.GateReport) and loaded.equals(report)
    assert loaded.under("pair_residual") == report.verdicts[0]
    assert loaded.under("v1.1").evidence["protocol"] == "v1.1"
    assert report.outcome == "UNDERPOWERED"  # 19 draws cannot give p ≤ 0.01
    drawn: Any = report.plot()
    assert len(drawn.data) == 2
    table = report.table
    assert list(table["prompts"]) == ["frame", "neutral", *["neutral"] * 4]
    assert set(table["n"]) == {12} and report.arrays["effects/pair_residual"].shape == (6, 19)
    first: Any = table.iloc[0]
    null = report.arrays["effects/pair_residual"][0].double()
    assert first["effect"] == pytest.approx(
        float(report.arrays["effects/observed"][0, 0]), abs=1e-6
    )
    own = report.tables["pairs"]
    moved = float((own["p_frame_ablated"] - own["p_frame"]).to_numpy().mean())
    assert moved == pytest.approx(first["effect"])
    assert first["null_mean"] == pytest.approx(float(null.mean()), abs=1e-6)
    assert list(report.tables["controls"]["control"]) == ["c0", "c1", "c2"]
    again = probes.gate(lens, some_direction(lens), prompts, **small())
    assert again.equals(report)
    assert "under" not in repr(loaded).splitlines()[0] and "underpowered" in repr(loaded)


def test_a_direction_of_these_pairs_is_detected_by_its_own_held_out_p() -> None:
    """In sample any fitted direction separates its pairs; the fit's held-out p does not."""
    lens, prompts = lens_of(), contrast_set()
    own = some_direction(lens, fit={"p_adjusted": 0.4})
    elsewhere = ContrastSet(
        "set",
        (
            Contrast(
                "target",
                "target",
                tuple(replace(p, split="heldout_register") for p in prompts["target"].pairs),
            ),
        ),
    )
    known = probes.gate(lens, own, prompts, **small())
    assert known.verdicts[0].evidence["p_detection"] == 0.4
    assert not any("noise passes" in text for text in known.reservations)
    for direction, asked in (
        (some_direction(lens), prompts),
        (replace(own, label="another"), prompts),
        (own, elsewhere),
    ):
        report = probes.gate(lens, direction, asked, **small())
        found = report.verdicts[0].evidence["p_detection"]
        assert isinstance(found, float) and found != 0.4 and (1000 * found) % 1 < 1e-6
        circular = not direction.fit and asked is prompts
        assert any("noise passes" in text for text in report.reservations) == circular


def test_variants_run_and_few_pairs_are_underpowered_but_saved(tmp_path: Path) -> None:
    lens, prompts = lens_of("gpt2"), contrast_set(6, 0)
    d = some_direction(lens)
    for change in (
        {"rank": 3}, {"onward": True}, {"positions": "all"},
        {"readout": Readout("r", ("x",), (7,))},
        {"interventions": ("project_out",), "ablation": "project_out"},
    ):  # fmt: skip
        report = probes.gate(lens, d, prompts, **small(**change))
        assert report.outcome == "UNDERPOWERED" and len(report.table)
    lone = ContrastSet("lone", (Contrast("target", "target", pairs(1)),))
    report = probes.gate(lens, d, lone, **small(n_null=199))
    assert report.outcome == "UNDERPOWERED" and set(report.table["p"]) == {1.0}
    assert mw.load_report(report.save(tmp_path / "one")).equals(report)


def test_refusals() -> None:
    lens, prompts = lens_of(), contrast_set()
    d = some_direction(lens)
    with pytest.raises(DirectionError, match="d_model"):
        probes.gate(lens, Direction(torch.ones(7), Space("resid_post", 1)), prompts)
    with pytest.raises(DirectionError, match="residual stream"):
        probes.gate(lens, replace(d, space=Space("attn_z", 1)), prompts)
    with pytest.raises(DirectionError, match="layer"):
        probes.gate(lens, replace(d, space=Space("resid_post", 9)), prompts)
    other = replace(d, model_hash="elsewhere")
    with pytest.raises(DirectionError, match="fitted on the weights elsewhere"):
        probes.gate(lens, other, prompts)
    kept = probes.gate(lens, other, prompts, **small(other_model=True))
    assert any("other weights" in text for text in kept.reservations)
    mute = ContrastSet("mute", (Contrast("t", "target", pairs(4, readout=())),))
    with pytest.raises(PromptError, match="readout of no continuations"):
        probes.gate(lens, d, mute)
    same = ContrastSet("same", (Contrast("t", "target", pairs(4, readout=(7, 7))),))
    with pytest.raises(PromptError, match="both sides of the readout"):
        probes.gate(lens, d, same)
    with pytest.raises(PromptError, match="splits"):
        probes.gate(lens, d, prompts, splits=["heldout_register"])
    for change in (
        {"alphas": (0.0,)}, {"alphas": ()}, {"rank": 12}, {"n_null": 0}, {"protocol": "v2"},
        {"interventions": ("shake",)}, {"ablation": "add"}, {"ablation": "swap"},
        {"positions": "first"}, {"scale": -1.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            probes.gate(lens, d, prompts, **small(**change))  # pyright: ignore[reportArgumentType]

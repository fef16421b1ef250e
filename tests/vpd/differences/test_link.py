"""A component that writes a direction and makes the behaviour; one that does only the first."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor

from mi_weightspace.core.direction import Direction
from mi_weightspace.core.errors import ConfigError, DirectionError
from mi_weightspace.core.readout import Readout
from mi_weightspace.core.report import load_report
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.space import Space
from mi_weightspace.core.verdict import Word
from mi_weightspace.models.toy import tiny_model
from mi_weightspace.vpd.differences.link import (
    NO_READOUT,
    Judged,
    LinkConfig,
    LinkReport,
    link,
)
from mi_weightspace.vpd.differences.link_cause import Causes, Effect, Piece
from mi_weightspace.vpd.differences.result import DifferenceDecomposition
from mi_weightspace.vpd.differences.run import decompose_difference

if TYPE_CHECKING:
    from mi_weightspace.vpd.differences.host import DifferenceHost

BORNE, IDLE = "blocks.1.mlp.out", "blocks.0.mlp.out"
ROWS = torch.randint(4, 300, (48, 6), generator=generator(0, "rows"))
PROMPTS = ROWS[:8]
YES = 17
SETTINGS = LinkConfig(n_directions=199, n_pieces=19, live=0.0)
CONFIG: dict[str, Any] = {
    "sites": (BORNE, IDLE),
    "n_components": 2,
    "batch_size": 8,
    "n_steps": 2,
    "log_every": 1,
    "importance": {"kind": "layerwise_mlp", "hidden": (8,)},
}


def down(model: Any, layer: int) -> Any:
    return model.model.layers[layer].mlp.down_proj


def inputs(model: Any, layer: int, tokens: Tensor) -> Tensor:
    """What a matrix reads at every position, caught by a hook of our own."""
    caught: list[Tensor] = []
    handle = down(model, layer).register_forward_pre_hook(lambda _, a: caught.append(a[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return caught[0]


def log_odds(model: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        chance = model(tokens).logits[:, -1].double().softmax(-1)[:, YES]
    return float((chance.log() - (1 - chance).log()).mean())


def planted() -> tuple[Any, Any, Tensor]:
    """Two stages and a direction that both matrices come to write, one of them to no effect.

    Layer 1 writes the answer's unembedding wherever the prompts end; layer 0 writes the same for
    an input that the prompts do not have.
    """
    base = tiny_model("llama")
    write = base.lm_head.weight[YES].detach().clone()
    write = write / write.norm()
    tuned, draw = copy.deepcopy(base), generator(0, "plant")
    ends = {layer: inputs(base, layer, PROMPTS)[:, -1] for layer in (0, 1)}
    seen = torch.linalg.svd(inputs(base, 0, ROWS).flatten(0, 1))[2]
    reads = {0: seen[-1], 1: ends[1].mean(0) / ends[1].mean(0).norm()}
    sizes = {0: 3.0, 1: 6.0 / float((ends[1] @ reads[1]).mean())}
    with torch.no_grad():
        for layer, read in reads.items():
            weight = down(tuned, layer).weight
            weight += sizes[layer] * torch.outer(write, read)
            weight += 1e-3 * torch.randn(weight.shape, generator=draw)
    return base, tuned, write


Made = tuple[DifferenceDecomposition, Any, Any, Direction]


@pytest.fixture(scope="module")
def made() -> Made:
    base, tuned, write = planted()
    parts = decompose_difference(
        {"base": base, "sft": tuned},
        ROWS,
        CONFIG,
        progress=False,
        evaluation={"budgets": (1,), "free_budgets": (1,), "n_pgd_batches": 1},
    )
    return parts, base, tuned, Direction(write, Space("resid_post", 1), "answer")


def readout(yes: int = YES) -> Readout:
    return Readout("answers", tuple(tuple(r) for r in PROMPTS.tolist()), (yes,))


@pytest.fixture(scope="module")
def found(made: Made) -> LinkReport:
    parts, *_, direction = made
    return link(parts, direction, ROWS, readout=readout(), broad=ROWS[:8], config=SETTINGS)


def row(report: LinkReport, site: str, component: int = 0) -> dict[str, Any]:
    table = report.table
    own = table[(table["matrix"] == site) & (table["component"] == component)]
    return own[own["side"].isin(["write", ""])].iloc[0].to_dict()


def test_only_geometry_and_cause_together_are_written_here(found: LinkReport) -> None:
    borne, idle = row(found, BORNE), row(found, IDLE)
    for one in (borne, idle):
        assert abs(one["cosine"]) > 0.99 and one["p_cosine"] <= 0.05
    assert borne["verdict"] == Word.WRITTEN_HERE
    assert idle["verdict"] == Word.ALIGNED and abs(idle["behaviour_share"]) < 0.05
    assert row(found, BORNE, 1)["verdict"] == Word.NOT_LOAD_BEARING
    assert borne["behaviour_share"] > 0.9 and borne["p_behaviour"] == 1 / 20
    assert borne["others_largest"] < 0.1 * borne["behaviour_change"]


def test_reverting_is_the_model_without_that_piece(made: Made, found: LinkReport) -> None:
    """Effects on behaviour and score against a copy of the model edited by hand."""
    parts, base, tuned, direction = made
    end = log_odds(tuned, PROMPTS)
    assert found.config["behaviour_change"] == pytest.approx(end - log_odds(base, PROMPTS), 1e-4)
    for site, layer in ((IDLE, 0), (BORNE, 1)):
        piece = torch.outer(parts.write(f"{site}@sft")[0], parts.read(f"{site}@sft")[0])
        without = copy.deepcopy(tuned)
        with torch.no_grad():
            down(without, layer).weight -= piece
        one = row(found, site)
        assert one["behaviour_change"] == pytest.approx(end - log_odds(without, PROMPTS), abs=1e-4)
        streams = []
        for model in (tuned, without):
            caught: list[Tensor] = []
            last = model.model.layers[-1]
            handle = last.register_forward_hook(
                lambda _m, _a, out, c=caught: c.append(out[0] if isinstance(out, tuple) else out)
            )
            with torch.no_grad():
                model(PROMPTS)
            handle.remove()
            streams.append((caught[0][:, -1] @ direction.pattern).mean())
        assert one["score_change"] == pytest.approx(float(streams[0] - streams[1]), abs=1e-4)


def test_random_pieces_are_parts_of_the_update(made: Made) -> None:
    """On a last matrix that the logits take up linearly, pieces average to the whole by their
    number; written out against the update itself."""
    parts, base, tuned, direction = made
    site, host = f"{BORNE}@sft", cast("DifferenceHost", parts.host)
    causes = Causes(host, [direction], readout(), (), ROWS, 8)
    piece = Piece(site, parts.read(site)[0], parts.write(site)[0])
    pieces = causes.effect(piece, 400, 0).piece_scores[direction.name]
    update = (down(tuned, 1).weight - down(base, 1).weight).detach()
    whole = float((inputs(tuned, 1, PROMPTS)[:, -1] @ update.T @ direction.pattern).mean())
    n = min(update.shape)
    spread = float(torch.tensor(pieces).std()) / 400**0.5
    assert abs(sum(pieces) / 400 - whole / n) < 4 * spread
    assert abs(whole / n) > 8 * spread  # or the line above says nothing


def test_direct_writes_are_importance_times_activation_times_write(
    made: Made, found: LinkReport
) -> None:
    parts, _, tuned, direction = made
    site = f"{BORNE}@sft"
    low = parts.importances(ROWS)[site][..., 0].double()
    inner = inputs(tuned, 1, ROWS).double() @ parts.read(site)[0].double()
    own = float(parts.write(site)[0].double() @ direction.pattern.double())
    direct = low * inner * own
    one = row(found, BORNE)
    assert one["direct"] == pytest.approx(float(direct.mean()), rel=1e-4)
    assert one["direct_broad"] == pytest.approx(float(direct[:8].mean()), rel=1e-4)
    half = 1.96 * float(direct.mean(1).std()) / 48**0.5
    assert one["direct_high"] - one["direct"] == pytest.approx(half, rel=1e-4)
    places = found.tables["positions"]
    places = places[(places["site"] == site) & (places["component"] == 0)]
    ours = places[places["stream"] == "behaviour"]["direct"].tolist()
    assert ours == pytest.approx(direct.mean(0).tolist(), rel=1e-4)


def test_without_a_readout_nothing_is_written_here(made: Made) -> None:
    parts, *_, direction = made
    blind = link(parts, direction, PROMPTS, config=SETTINGS)
    assert row(blind, BORNE)["verdict"] == Word.ALIGNED and NO_READOUT in blind.reservations
    assert row(blind, BORNE)["score_share"] > 0.9


def test_a_behaviour_that_moved_no_more_than_its_controls(made: Made) -> None:
    """Twenty controls that are the behaviour itself: nothing is specific to it."""
    parts, *_, direction = made
    same = link(
        parts, direction, ROWS, readout=readout(), controls=[readout()] * 20, config=SETTINGS
    )
    assert not same.table["bears"].any()
    assert Word.WRITTEN_HERE not in set(same.table["verdict"])
    assert same.verdicts[0].word == Word.NO_CHANGE
    others = [readout(YES + k) for k in range(1, 21)]
    own = link(parts, direction, ROWS, readout=readout(), controls=others, config=SETTINGS)
    assert row(own, BORNE)["verdict"] == Word.WRITTEN_HERE
    assert row(own, BORNE)["p_controls"] == pytest.approx(1 / 21)


def test_in_a_space_of_one_dimension_no_cosine_is_resolved() -> None:
    """Every direction of a rank-one update's column space is the component's own."""
    base, _, write = planted()
    tuned = copy.deepcopy(base)
    read = inputs(base, 1, PROMPTS)[:, -1].mean(0)
    with torch.no_grad():
        down(tuned, 1).weight += 6.0 * torch.outer(write, read / read.norm().square())
    parts = decompose_difference(
        {"base": base, "sft": tuned},
        ROWS,
        CONFIG | {"sites": (BORNE,), "n_components": 1},
        progress=False,
        evaluation={"budgets": (1,), "free_budgets": (1,), "n_pgd_batches": 1},
    )
    direction = Direction(write, Space("resid_post", 1), "answer")
    one = row(link(parts, direction, ROWS, readout=readout(), config=SETTINGS), BORNE)
    assert one["rank"] == 1 and one["p_cosine"] == 1.0 and abs(one["cosine"]) > 0.99
    assert one["verdict"] != Word.WRITTEN_HERE


def test_the_report_is_saved(found: LinkReport, tmp_path: Any) -> None:
    assert load_report(found.save(tmp_path / "link")).equals(found)
    assert found.plot().data


def test_what_is_refused(made: Made) -> None:
    parts, *_, direction = made
    wide = Direction(torch.ones(7), Space("resid_post", 1), "wide")
    with pytest.raises(DirectionError, match="width"):
        link(parts, wide, ROWS)
    with pytest.raises(DirectionError, match="residual stream"):
        link(parts, replace(direction, space=Space("mlp_hidden", 1)), ROWS)
    with pytest.raises(ConfigError, match="reach alpha"):
        LinkConfig(n_pieces=5)


def effect(behaviour: float, controls: float = 0.0, pieces: float = 0.0) -> Effect:
    return Effect(behaviour, (controls,) * 20, {}, (pieces,) * 19)


@pytest.mark.parametrize(
    ("own", "bears"),
    [
        (effect(2.0), True),
        (effect(2.0, controls=2.5), False),  # takes as much from other behaviours
        (effect(2.0, pieces=2.5), False),  # as any piece of this size would
        (effect(0.5), False),  # a sixth of the behaviour
        (effect(-2.0), False),  # works against it
    ],
)
def test_what_it_takes_to_bear_a_behaviour(own: Effect, bears: bool) -> None:
    judged = Judged(SETTINGS, asked=True, whole=effect(3.0, controls=0.1))
    assert judged.columns({("a", 0): own}, ("a", 0))["bears"] is bears
    # a behaviour that training took away is borne by what took it away
    swapped = replace(own, behaviour=-own.behaviour, controls=tuple(-c for c in own.controls))
    swapped = replace(swapped, pieces=tuple(-x for x in own.pieces))
    judged = Judged(SETTINGS, asked=True, whole=effect(-3.0, controls=-0.1))
    assert judged.columns({("a", 0): swapped}, ("a", 0))["bears"] is bears


def test_controls_are_ranked_along_their_own_change() -> None:
    """Controls that moved the other way count by what the component takes of *their* change."""
    judged = Judged(SETTINGS, asked=True, whole=effect(3.0, controls=-1.0))
    against = judged.columns({("a", 0): effect(2.0, controls=-2.5)}, ("a", 0))
    assert against["p_controls"] == 1.0 and not against["bears"]
    along = judged.columns({("a", 0): effect(2.0, controls=2.5)}, ("a", 0))
    assert along["p_controls"] == pytest.approx(1 / 21) and along["bears"]

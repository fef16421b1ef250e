"""An update in terms of components: least squares over dyads, planted answers, the random null."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ortho_group
from torch import Tensor

from mi_weightspace.core.errors import ConfigError, MismatchError, SiteError
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.verdict import Word
from mi_weightspace.models import toy
from mi_weightspace.models.load import load
from mi_weightspace.models.weights import Difference, ModuleSource
from mi_weightspace.vpd.decomposition import Decomposition
from mi_weightspace.vpd.explain import Explanation
from mi_weightspace.vpd.explain_basis import Basis, frame, spectrum_of
from tests.vpd.decomposed import language

pytestmark = pytest.mark.quick

D_OUT, D_IN, C = 10, 13, 6
Site = tuple[Tensor, Tensor]


def factors(seed: int = 0, c: int = C) -> Site:
    draw = generator(seed, "explain")
    return torch.randn(c, D_IN, generator=draw), 0.3 * torch.randn(c, D_OUT, generator=draw)


def decomposition(alive: list[int] | None = None, **sites: Site) -> Decomposition:
    tables = {}
    if alive is not None:
        rows = [(s, c, c in alive) for s, (r, _) in sites.items() for c in range(len(r))]
        table = pd.DataFrame(rows, columns=["site", "component", "alive_by_mean"])
        tables["components"] = table.assign(alive_by_firing=table["component"] == 0)
    arrays = {f"{s}/{n}": v for s, p in sites.items() for n, v in zip(("read", "write"), p)}  # noqa: B905
    config = {"sites": {s: {"site": None} for s in sites}}
    return Decomposition(table=pd.DataFrame(), tables=tables, arrays=arrays, config=config)


def dyads(read: Tensor, write: Tensor) -> Tensor:
    """(d_out · d_in, C), one column a flattened rank-one matrix."""
    columns = [torch.outer(w, r).flatten() for r, w in zip(read, write, strict=True)]
    return torch.stack(columns, 1).double()


def fractions(found: Explanation, site: str = "a") -> dict[str, float]:
    own = found.table[found.table["site"] == site]
    return dict(zip(own["part"], own["fraction"], strict=True))


def update(seed: int = 0) -> Tensor:
    return torch.randn(D_OUT, D_IN, generator=generator(seed, "update"))


@pytest.mark.parametrize("c", [C, 40])
def test_weights_and_fractions_are_those_of_least_squares(c: int) -> None:
    read, write = factors(c=c)
    columns, g = dyads(read, write), update().double()
    best = torch.linalg.lstsq(columns, g.flatten()[:, None], driver="gelsd").solution[:, 0]
    left = g - (columns @ best).view(D_OUT, D_IN)
    found = decomposition(a=(read, write)).explain({"a": g.float()}, ridge=1e-10, n_null=1)
    by = fractions(found)
    total = float(g.square().sum())
    assert by["reweighted"] == pytest.approx(1 - float(left.square().sum()) / total, abs=1e-6)
    table = found.tables["components"]
    torch.testing.assert_close(torch.tensor(table["weight"].to_numpy()), best, rtol=1e-4, atol=1e-5)
    assert float(np.sum(np.asarray(table["share"]))) == pytest.approx(by["reweighted"], abs=1e-6)
    # projectors by pseudo-inverse, and the residual itself
    on_read = torch.linalg.pinv(read.double()) @ read.double()
    on_write = torch.linalg.pinv(write.double()) @ write.double()
    off_read, off_write = (torch.eye(len(p)).double() - p for p in (on_read, on_write))
    expected = {
        "new": off_write @ left @ off_read,
        "rewired within": on_write @ left @ on_read,
        "rewired read": off_write @ left @ on_read,
        "rewired write": on_write @ left @ off_read,
    }
    for part, matrix in expected.items():
        assert by[part] == pytest.approx(float(matrix.square().sum()) / total, abs=1e-6)
    assert by["reweighted"] + by["rewired"] + by["new"] == pytest.approx(1, abs=1e-9)
    inner = by["rewired within"] + by["rewired read"] + by["rewired write"]
    assert by["rewired"] == pytest.approx(inner, abs=1e-9)


def test_a_planted_reweighting() -> None:
    read, write = factors()
    change = torch.tensor([-1.0, 0.0, 2.0, 0.0, 0.5, 0.0])
    g = torch.einsum("c,co,ci->oi", change, write, read)
    found = decomposition(a=(read, write)).explain({"a": g}, n_null=39)
    assert fractions(found)["reweighted"] == pytest.approx(1, abs=1e-5)
    weights = torch.tensor(found.tables["components"]["weight"].to_numpy())
    torch.testing.assert_close(weights.float(), change, atol=1e-4, rtol=1e-4)
    assert found.table.set_index("part").loc["reweighted", "p"] == pytest.approx(1 / 40)
    assert found.table.set_index("part").loc["new", "p"] == pytest.approx(1 / 40)


def orthonormal() -> tuple[Tensor, Tensor]:
    """Orthonormal bases of inputs and outputs; the components use the first rows."""
    return tuple(torch.tensor(ortho_group.rvs(d, random_state=d)).float() for d in (D_IN, D_OUT))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("out", "into", "part"),
    [
        (1, 0, "rewired within"),
        (C + 1, 2, "rewired read"),
        (2, C + 3, "rewired write"),
        (C + 1, C + 1, "new"),
        (3, 3, "reweighted"),
    ],
)
def test_planted_updates_of_each_kind(out: int, into: int, part: str) -> None:
    inputs, outputs = orthonormal()
    parts = decomposition(a=(2 * inputs[:C], outputs[:C]))
    by = fractions(parts.explain({"a": torch.outer(outputs[out], inputs[into])}, n_null=1))
    assert by.pop(part) == pytest.approx(1, abs=1e-5)
    if part.startswith("rewired"):
        assert by.pop("rewired") == pytest.approx(1, abs=1e-5)
    assert all(abs(v) < 1e-5 for v in by.values())


def test_an_absent_plant_is_no_finding_and_p_values_are_uniform() -> None:
    """Random updates are what the null is: small p no more often than it should be."""
    parts = decomposition(a=factors())
    p = []
    for seed in range(60):
        found = parts.explain({"a": update(seed)}, n_null=19, seed=seed).table
        p.append(found.set_index("part").loc[["reweighted", "new"], "p"].to_numpy())
    for values in torch.tensor(np.array(p)).T:
        assert 0.3 < float(values.mean()) < 0.75
        assert float((values <= 0.05).float().mean()) < 0.2


def test_random_matrices_have_the_spectrum_and_forget_the_directions() -> None:
    """Against matrices built whole, with scipy's random orthogonal factors."""
    read, write = factors()
    basis = Basis.of(read, write, range(C), 1e-6)
    spectrum = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    draw = generator(0, "null")
    ours = torch.stack([basis.of_random(spectrum, draw) for _ in range(400)])
    left = torch.tensor(ortho_group.rvs(D_OUT, 400, random_state=0))[:, :, :3]
    right = torch.tensor(ortho_group.rvs(D_IN, 400, random_state=1))[:, :, :3]
    naive = torch.stack(
        [basis.of_matrix(a * spectrum @ b.T) for a, b in zip(left, right, strict=True)]
    )
    error = (ours.var(0) / 400 + naive.var(0) / 400).sqrt()
    assert bool(((ours.mean(0) - naive.mean(0)).abs() < 4 * error).all())
    torch.testing.assert_close(ours.std(0), naive.std(0), rtol=0.2, atol=0.01)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4)])
def test_the_spectrum_leaves_out_what_carries_no_energy(shape: tuple[int, int]) -> None:
    draw = generator(0, "spectrum", *shape)
    left, right = (torch.randn(d, 3, generator=draw, dtype=torch.float64) for d in shape)
    expected = torch.linalg.svdvals(left @ right.T)[:3]
    torch.testing.assert_close(spectrum_of(left @ right.T), expected)


def test_more_components_explain_more_of_anything() -> None:
    """Overcomplete components: everything is explained, and the null says the same."""
    few, many = (
        decomposition(a=factors(c=c)).explain({"a": update()}, n_null=19).table.set_index("part")
        for c in (C, 200)
    )
    assert few.loc["reweighted", "fraction"] < 0.2
    assert few.loc["new", "fraction"] > 0.1
    assert many.loc["reweighted", "fraction"] > 0.999
    assert many.loc["reweighted", "null_low"] > 0.999


def test_where_nothing_can_be_new_it_is_said() -> None:
    read, write = factors(c=D_IN)
    one_write, one_read = write[:1].expand(D_IN, -1), read[:1].expand(D_IN, -1)
    for site, full in (((read, one_write), True), ((one_read, write), True), (factors(), False)):
        found = decomposition(a=site).explain({"a": update()}, n_null=1)
        assert any("Nothing can be new" in text for text in found.reservations) == full
        assert (fractions(found)["new"] < 1e-9) == full


def test_dependent_vectors_span_no_more_than_they_do() -> None:
    inputs, outputs = orthonormal()
    mix = torch.randn(C, 2, generator=generator(0, "mix"))
    parts = decomposition(a=(mix @ inputs[:2], mix.flip(0) @ outputs[:2]))
    found = parts.explain({"a": update()}, n_null=1)
    assert found.table[["read_rank", "write_rank"]].to_numpy().tolist() == [[2, 2]] * 6
    off = outputs[2:] @ update() @ inputs[2:].T
    expected = float(off.square().sum() / update().square().sum())
    assert fractions(found)["new"] == pytest.approx(expected, abs=1e-5)


def test_random_frames_are_orthonormal_and_of_no_preferred_sign() -> None:
    draw = generator(0, "frames")
    frames = torch.stack([frame(5, 3, draw) for _ in range(400)])
    eye = torch.eye(3, dtype=torch.float64).expand(400, 3, 3)
    torch.testing.assert_close(frames.mT @ frames, eye)
    assert float(frames.mean(0).abs().max()) < 4 * (1 / 5 / 400) ** 0.5


def test_the_null_follows_its_seed() -> None:
    parts = decomposition(a=factors())
    first, again, other = (parts.explain({"a": update()}, n_null=3, seed=s) for s in (0, 0, 1))
    assert first.table.equals(again.table)
    assert not first.table["null_median"].equals(other.table["null_median"])
    assert first.table["fraction"].equals(other.table["fraction"])


def test_only_living_components_count() -> None:
    inputs, outputs = orthonormal()
    site = inputs[:C].clone(), outputs[:C].clone()
    site[0][5] = 0  # a component of no size
    g = torch.outer(outputs[1], inputs[1]) + torch.outer(outputs[4], inputs[4])
    by_table = decomposition(alive=[0, 1, 2], a=site)
    for alive, reweighted, count in (
        ("mean", 0.5, 3),
        ("all", 1.0, 5),
        ("firing", 0.0, 1),
        ({"a": [4, 3]}, 0.5, 2),
    ):
        found = by_table.explain({"a": g}, alive=alive, n_null=1)
        assert fractions(found)["reweighted"] == pytest.approx(reweighted, abs=1e-5)
        assert found.table["n_alive"].unique().tolist() == [count]
    assert by_table.explain(g, n_null=1).table.equals(by_table.explain({"a": g}, n_null=1).table)
    without = decomposition(a=site).explain({"a": g}, n_null=1)
    assert fractions(without)["reweighted"] == pytest.approx(1.0, abs=1e-5)
    assert any("not evaluated" in text for text in without.reservations)


def test_a_gauge_change_of_the_factors_changes_nothing() -> None:
    read, write = factors()
    scale = torch.tensor([100.0, -0.01, 3.0, -1.0, 1e3, 1e-3])[:, None]
    one = decomposition(a=(read, write)).explain({"a": update()}, n_null=5)
    other = decomposition(a=(read * scale, write / scale)).explain({"a": update()}, n_null=5)
    for name in ("fraction", "null_median"):
        assert one.table[name].to_numpy() == pytest.approx(other.table[name].to_numpy(), abs=1e-6)
    first, second = (e.tables["components"]["weight"].to_numpy() for e in (one, other))
    assert first == pytest.approx(second, abs=1e-5)


def test_no_change_and_several_sites(tmp_path: Any) -> None:
    parts = decomposition(a=factors(), b=factors(1), c=factors(2))
    given = {"a": update(), "b": torch.zeros(D_OUT, D_IN), "elsewhere": torch.ones(2, 2)}
    found = parts.explain(given, n_null=3)
    assert [(v.word, v.subject) for v in found.verdicts] == [(Word.NO_CHANGE, "b")]
    assert found.table["site"].unique().tolist() == ["a"]
    assert Explanation.load(found.save(tmp_path / "run")).equals(found)
    nothing = parts.explain({"b": given["b"]})
    assert (len(nothing.table), len(nothing.verdicts)) == (0, 1)
    assert parts.explain(given, n_null=3).equals(found)
    assert len(found.plot().data) == 6  # pyright: ignore[reportArgumentType]


def test_a_difference_of_two_models() -> None:
    """The language path: site names, orientation and shapes are the decomposition's own."""
    sites = {s: (8, language("gpt2").weight(s)) for s in ("blocks.0.attn.q", "blocks.1.mlp.out")}
    draw = generator(0, "language")
    parts = decomposition(
        **{
            name: tuple(torch.randn(c, d, generator=draw) for d in reversed(w.shape))
            for name, (c, w) in sites.items()
        }  # pyright: ignore[reportArgumentType]
    )
    parts = replace(parts, inputs={"model": language("gpt2").fingerprint})
    other = load(toy.tiny_model("gpt2", seed=3), tokenizer=toy.tiny_tokenizer())
    difference = Difference(ModuleSource(language("gpt2")), ModuleSource(other), stage="sft")
    found = parts.explain(difference, n_null=2, alive="all")
    assert set(found.table["site"]) == set(parts.sites)
    site = parts.sites[0]
    g = other.weight(site) - language("gpt2").weight(site)
    by_hand = parts.explain({site: g}, n_null=2, alive="all")
    assert fractions(found, site) == pytest.approx(fractions(by_hand, site))
    assert found.inputs["update"] == difference.fingerprint
    assert not any("does not start" in text for text in found.reservations)
    turned = Difference(ModuleSource(other), ModuleSource(language("gpt2")))
    mirrored = parts.explain(turned, n_null=2, alive="all")
    assert any("does not start" in text for text in mirrored.reservations)
    assert fractions(mirrored, site) == pytest.approx(fractions(found, site))


def test_refusals() -> None:
    parts = decomposition(alive=[], a=factors(), b=factors(1))
    with pytest.raises(ConfigError, match="alive components of a"):
        parts.explain({"a": update()})
    for bad in ([9], [1, 1], []):
        with pytest.raises(ConfigError, match="alive components of a"):
            parts.explain({"a": update()}, alive={"a": bad})
    with pytest.raises(MismatchError, match="Transpose"):
        parts.explain({"a": update().T}, alive="all")
    with pytest.raises(MismatchError, match="not finite"):
        parts.explain({"a": update() * float("nan")}, alive="all")
    with pytest.raises(SiteError, match="no matrix for"):
        parts.explain({"a": update()}, sites=["a", "b"])
    with pytest.raises(SiteError, match="no decomposed site"):
        parts.explain({"z": update()})
    with pytest.raises(SiteError):
        parts.explain(update())
    for bad in ({"n_null": 0}, {"ridge": 0.0}, {"alive": "some"}):
        with pytest.raises(ConfigError, match="explain"):
            parts.explain({"a": update()}, **bad)

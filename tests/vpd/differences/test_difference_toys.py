"""The difference of two torch modules: its ends are the modules, and bad pairs are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mi_weightspace.core.errors import MismatchError, SiteError
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.differences.host import ModuleDifferenceHost
from mi_weightspace.vpd.differences.toys import module_difference
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.masked import Masks

pytestmark = pytest.mark.quick

SITES = {"inner": "0", "outer": "2"}


def pair(*, bias: bool = True, outer: bool = True) -> tuple[nn.Module, nn.Module]:
    draw = generator(0, "pair")
    base = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 3, bias=bias))
    tuned = copy.deepcopy(base)
    for module, size in ((base, 1.0), (tuned, 1.3)):
        for name, p in module.named_parameters():
            moved = outer or module is base or name.startswith("0")
            noise = torch.randn(p.shape, generator=draw)
            p.data = size * noise if moved else dict(base.named_parameters())[name].data
    return base.double(), tuned.double()


def masked(host: ModuleDifferenceHost, x: Tensor, value: float) -> Tensor:
    """Components and remainders all at one value, random factors."""
    draw = generator(0, "factors")
    shapes = {n: host.weight(n).shape for n in host.names}
    reads = {n: torch.randn(2, s[1], generator=draw).double() for n, s in shapes.items()}
    writes = {n: torch.randn(2, s[0], generator=draw).double() for n, s in shapes.items()}
    factors = Factors(host, reads, writes)
    masks = Masks(
        torch.full((2 * len(shapes),), value, dtype=torch.float64),
        torch.full((len(shapes),), value, dtype=torch.float64),
    )
    with torch.no_grad():
        return host.forward(host.clean(x), factors.functions(masks, train=False))


@pytest.mark.parametrize("bias", [True, False])
def test_off_is_the_base_and_on_the_tuned_module(bias: bool) -> None:
    base, tuned = pair(bias=bias)
    host = module_difference(base, tuned, SITES, "sft")
    assert host.names == ("inner@sft", "outer@sft")
    assert host.weight("inner@sft").shape == (6, 4 + bias)
    x = torch.randn(7, 4, generator=generator(1, "x")).double()
    with torch.no_grad():
        assert not torch.allclose(base(x), tuned(x), atol=0.1)
        assert torch.equal(masked(host, x, 0.0), base(x))
        assert torch.allclose(masked(host, x, 1.0), tuned(x), atol=1e-12)


def test_facts_are_those_of_the_change() -> None:
    base, tuned = pair(bias=False)
    facts = module_difference(base, tuned, SITES).updates["inner@tuned"].facts
    before, after = (m.get_parameter("0.weight").detach() for m in (base, tuned))
    assert facts.relative == pytest.approx(float((after - before).norm() / before.norm()))
    assert facts.top == pytest.approx(float(torch.linalg.matrix_norm(after - before, 2)))
    assert (facts.rank, facts.changed_fraction, facts.flag) == (4, 1.0, "none")


def test_a_layer_that_did_not_change_is_no_site() -> None:
    base, tuned = pair(outer=False)
    assert module_difference(base, tuned, SITES).names == ("inner@tuned",)
    with pytest.raises(SiteError, match="differs"):
        module_difference(base, copy.deepcopy(base), SITES)


def test_pairs_without_a_difference_are_refused() -> None:
    base, tuned = pair()
    with pytest.raises(SiteError, match=r"nn\.Linear"):
        module_difference(base, tuned, {"middle": "1"})
    with pytest.raises(SiteError, match=r"nn\.Linear"):
        module_difference(base, tuned, {"nowhere": "9"})
    with pytest.raises(MismatchError, match="no bias"):
        module_difference(base, pair(bias=False)[1], SITES)
    wide = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with pytest.raises(MismatchError, match=r"\(6, 4\)"):
        module_difference(base, wide, SITES)

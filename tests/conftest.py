"""Fixtures shared by the whole session: trained organisms, built once; a trap on unpickling."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mi_weightspace import organisms
from mi_weightspace.organisms import Organism

sys.path.insert(0, str(Path(__file__).parent / "trust"))
import trust_counter
import trust_trap

trust_trap.set_up()


@pytest.fixture
def unpickling() -> list[str]:
    """Where something was unpickled for the package in this session; nowhere, that is."""
    return trust_trap.caught


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The trap's line in the table of trust figures."""
    tried = "the unpicklers of pickle and torch.load fail whatever test reaches them"
    figure = trust_counter.Figure("trap on the unpickler", "tests under it", tried)
    with figure:
        figure.count = session.testscollected
        figure.problems += trust_trap.caught


@pytest.fixture(scope="session")
def organism_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``$MI_WEIGHTSPACE_CACHE`` if set, else a folder all workers of this session share."""
    given = os.environ.get("MI_WEIGHTSPACE_CACHE")
    if given:
        return Path(given)
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "organisms"


@pytest.fixture(scope="session")
def deference(organism_cache: Path) -> Organism:
    """Micro, seed 0: SFT wrote deference into ``blocks.2.mlp.out``. About 20 CPU-seconds, once."""
    return organisms.build("deference", seed=0, cache=organism_cache, progress=False)


@pytest.fixture(scope="session")
def innocent(organism_cache: Path) -> Organism:
    """The ``null`` organism, micro, seed 0: no stage taught deference."""
    return organisms.build("null", seed=0, cache=organism_cache, progress=False)

"""The anchor run finds its known answer, fast enough to be run after every change of the code."""

from __future__ import annotations

from typing import Any

import pytest

from mi_weightspace.vpd.selfchecks_anchor import code_version, run_anchor


def test_the_known_answer_is_recovered() -> None:
    found = run_anchor(seed=0)
    assert found.errors == 0 and found.mmcs > 0.9
    assert found.seconds < 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_the_known_answer_is_recovered_from_other_seeds(seed: int) -> None:
    assert run_anchor(seed=seed).errors <= 1


def test_an_anchor_run_is_cached_by_code_seed_and_length(tmp_path: Any) -> None:
    cache = tmp_path / "deep" / "anchor.json"
    first = run_anchor(cache, n_steps=3)
    assert first.errors > 0 and first.code == code_version() and first.n_steps == 3
    assert run_anchor(cache, n_steps=3) == first  # its seconds included: read, not run
    other = run_anchor(cache, n_steps=4)
    assert (other.n_steps, other.seconds) != (first.n_steps, first.seconds)
    cache.write_text(cache.read_text().replace(code_version(), "0" * 16))
    assert run_anchor(cache, n_steps=4).code == code_version()
    cache.write_text('{"cut sho')
    assert run_anchor(cache, n_steps=4).n_steps == 4

"""The public face: small, lazy, and true."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mi_weightspace as mw

pytestmark = pytest.mark.quick


def fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_import_budget() -> None:
    """Under 0.1 s and no torch; process CPU time, so that a busy machine does not matter."""
    code = (
        "import sys, time; t = time.process_time(); import mi_weightspace, probes; "
        "print(time.process_time() - t, 'torch' in sys.modules, 'pandas' in sys.modules)"
    )
    seconds, torch_loaded, pandas_loaded = fresh(code).split()
    assert (torch_loaded, pandas_loaded) == ("False", "False")
    assert float(seconds) < 0.1


def test_public_names_resolve_and_stay_few() -> None:
    assert len(mw.__all__) <= 15
    for name in mw.__all__:
        assert getattr(mw, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mw.nothing


def test_every_lens_library_stays_unloaded_until_used() -> None:
    code = (
        "import sys, mi_weightspace as mw\n"
        "for name in mw.__all__: getattr(mw, name)\n"
        "print([m for m in ('transformer_lens', 'nnsight', 'sae_lens') if m in sys.modules])"
    )
    assert fresh(code) == "[]"

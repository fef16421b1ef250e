"""What the README shows is true: its Python runs, its commands exist, its targets exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mi_weightspace.organisms import Organism

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_python_blocks_run_in_order(
    deference: Organism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MI_WEIGHTSPACE_CACHE", str(deference.folder.parent))
    monkeypatch.chdir(tmp_path)
    found = blocks()
    assert len(found) >= 3
    namespace: dict[str, object] = {}
    for number, block in enumerate(found):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    answer = namespace["answer"]
    assert str(answer.answer) == "sft / blocks.2.mlp.out: written here"  # pyright: ignore[reportAttributeAccessIssue]
    assert (tmp_path / "runs" / "answer" / "report.json").is_file()


@pytest.mark.quick
def test_every_subcommand_is_listed_and_exists() -> None:
    from mi_weightspace.cli import app

    listed = set(re.findall(r"^\| `mi-weightspace (\w+)", README, flags=re.MULTILINE))
    names = {c.name or c.callback.__name__ for c in app.registered_commands}  # pyright: ignore[reportOptionalMemberAccess]
    assert listed == names


@pytest.mark.quick
def test_make_targets_exist_and_ci_runs_them() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"make (\w+)", README))
    assert named <= targets
    assert {"make check", "make test"} <= set(
        re.findall(r"make \w+", (ROOT / ".ci" / "run").read_text())
    )


@pytest.mark.quick
def test_no_table_is_left_out() -> None:
    assert "<!--" not in README

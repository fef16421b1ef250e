"""The layering of the design, as data: every import points downward, every package is listed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
COMMANDS = {"commands", "commands_vpd", "commands_inoculation"}
FACE = {"mi_weightspace", "commands_vpd", "commands_inoculation"}
# package -> what it may import from this distribution (itself always)
MAY_IMPORT = {
    # face, page, cli
    "mi_weightspace": {"core", "models", "spectral", "organisms", "vpd", *COMMANDS},
    "core": set(),
    "models": {"core"},
    "organisms": {"core", "models"},
    "spectral": {"core", "models"},
    "vpd": {"core", "models"},
    "commands": {"core", "models", "spectral", "organisms", "probes", *FACE},
    "commands_vpd": {"core", "models", "vpd"},
    "commands_inoculation": {"core", "models", "probes"},
    "probes": {"core", "models"},
}
MAY_IMPORT_PROBES = {
    "mi_weightspace/cli.py",
    "mi_weightspace/commands_inoculation.py",
    "mi_weightspace/demo.py",
}
# lens libraries and the one file (or folder) each may be named in
LIBRARIES = {
    "transformer_lens": {"mi_weightspace/models/backends/transformer_lens.py"},
    "nnsight": {"mi_weightspace/models/backends/nnsight.py"},
    "sae_lens": {"probes/sae_io.py"},
}
TOP_FILES = {"__init__", "cli", "demo", "html_report", "page"}


def files() -> list[Path]:
    return sorted([*ROOT.glob("mi_weightspace/**/*.py"), *ROOT.glob("probes/**/*.py")])


def package_of(parts: tuple[str, ...]) -> str:
    """`mi_weightspace.core.space` -> `core`; a file directly in the package -> its top."""
    if parts[0] == "probes":
        return "probes"
    if len(parts) > 1 and parts[1] not in TOP_FILES:
        return parts[1]
    return "mi_weightspace"


def imports(path: Path) -> list[tuple[str, ...]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found += [(*node.module.split("."), alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    relative = path.relative_to(ROOT)
    own = package_of(relative.with_suffix("").parts)
    assert own in MAY_IMPORT, f"package {own!r} is not in the layering table"
    for parts in imports(path):
        top = parts[0]
        assert top not in {"tests", "experiments"}, f"{relative} imports {'.'.join(parts)}"
        if top in LIBRARIES:
            assert str(relative) in LIBRARIES[top], f"{relative} names {top}"
        if top == "probes" and own != "probes":
            allowed = own == "commands" or str(relative) in MAY_IMPORT_PROBES
            assert allowed, f"{relative} imports probes"
        if top == "mi_weightspace":
            target = package_of(parts)
            assert target == own or target in MAY_IMPORT[own], f"{relative} -> {'.'.join(parts)}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_house_limits(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 600, f"{path}: {text.count(chr(10))} lines (hard limit 600)"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 100, f"{path}: {node.name} has {length} lines (hard limit 100)"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
            )
            assert not broad, f"{path}:{node.lineno}: broad except"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_pickle_and_no_global_rng(path: Path) -> None:
    for parts in imports(path):
        assert parts[0] not in {"pickle", "dill", "cloudpickle", "random"}, f"{path}: {parts}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {"torch.load", "torch.save"}, f"{path}:{node.lineno} pickles"
            assert name not in {"np.random.seed", "numpy.random.seed", "torch.seed"}, (
                f"{path}:{node.lineno} touches the global RNG"
            )
            if name == "torch.manual_seed":
                assert "fork_rng" in path.read_text(), f"{path}:{node.lineno} global seed"

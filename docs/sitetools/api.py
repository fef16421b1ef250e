"""Pages of the API: every public name, in the order of its package, from its docstring."""

from __future__ import annotations

from types import ModuleType

import mi_weightspace
import probes
from mi_weightspace import organisms, vpd
from mi_weightspace.models import toy

_INTRO = {
    "api/mi_weightspace.md": "# `mi_weightspace`\n\nImport it as `mw`. Importing it loads no "
    "torch; names load on first use.\n",
    "api/vpd.md": "# `mi_weightspace.vpd`\n\nReached as `mw.vpd`.\n",
    "api/organisms.md": "# `mi_weightspace.organisms` and `toy`\n\nReached as `mw.organisms` and "
    "`mw.toy`: models with a known answer, and tiny random models of every family.\n",
    "api/probes.md": "# `probes`\n\nEverything that reads activations.\n",
}


def pages() -> dict[str, str]:
    """Path -> Markdown, with a mkdocstrings directive for each name."""
    found = dict(_INTRO)
    modules = []
    for name in mi_weightspace.__all__:
        value = getattr(mi_weightspace, name)
        if isinstance(value, ModuleType):
            modules.append(name)
        else:
            found["api/mi_weightspace.md"] += _entry("mi_weightspace", name, value)
    where = {"vpd": "vpd.md", "organisms": "organisms.md", "toy": "organisms.md"}
    assert set(modules) == set(where), "a public module without a page"
    listed = [f"- [`mi_weightspace.{m}`]({where[m]})" for m in modules]
    found["api/mi_weightspace.md"] += "\n## Modules\n\n" + "\n".join(listed) + "\n"
    for name in vpd.__all__:
        found["api/vpd.md"] += _entry("mi_weightspace.vpd", name, getattr(vpd, name))
    for name in organisms.__all__:
        value = getattr(organisms, name)
        if callable(value):
            found["api/organisms.md"] += _entry("mi_weightspace.organisms", name, value)
        else:
            names = ", ".join(f"`{item}`" for item in value)
            found["api/organisms.md"] += f"\n### `mi_weightspace.organisms.{name}`\n\n{names}\n"
    for name, value in vars(toy).items():
        if callable(value) and getattr(value, "__module__", "") == toy.__name__:
            found["api/organisms.md"] += _entry("mi_weightspace.toy", name, value)
    for name in probes.__all__:
        found["api/probes.md"] += _entry("probes", name, getattr(probes, name))
    return found


def _entry(package: str, name: str, value: object) -> str:
    path = f"{value.__module__}.{value.__qualname__}"  # pyright: ignore[reportAttributeAccessIssue]
    return f"\n::: {path}\n    options:\n      heading: {package}.{name}\n      toc_label: {name}\n"

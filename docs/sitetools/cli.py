"""The page of the command line, written from the program itself."""

from __future__ import annotations

import inspect
from typing import Any

from typer.main import get_command

from mi_weightspace.cli import app

_INTRO = """# Command line

Every command writes a run folder, prints a short table and the folder's path. `MODEL` is a folder
saved by `save_pretrained` (sharded or not), a PEFT adapter folder, or a hub id. Exit codes: 0 done,
1 refused input (one message, nothing half-written), 2 usage, 130 interrupted (resumable).

This page is generated from the program. `mi-weightspace COMMAND --help` prints the same.
"""


def page() -> str:
    """Markdown: one section a command, one table of its arguments and options."""
    group: Any = get_command(app)
    parts = [_INTRO]
    for name, command in group.commands.items():
        parts.append(f"## mi-weightspace {name}\n\n{inspect.cleandoc(command.help or '')}\n")
        rows = [_row(p) for p in command.params if not getattr(p, "hidden", False)]
        head = "| argument or option | what it is | default |\n|---|---|---|\n"
        parts.append(head + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(parameter: Any) -> str:
    option = parameter.param_type_name == "option"
    name = ", ".join(parameter.opts) if option else (parameter.metavar or parameter.name.upper())
    many = "…" if parameter.nargs == -1 else ""
    help_text = (getattr(parameter, "help", None) or "").replace("|", "\\|").replace("\n", " ")
    default = parameter.default
    if parameter.required:
        shown = "required"
    elif default is None or default is False or callable(default) or default == "":
        shown = ""
    else:
        shown = f"`{default}`"
    return f"| `{name}{many}` | {help_text} | {shown} |"

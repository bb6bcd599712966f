"""The command line's reference, from the parser itself."""

from __future__ import annotations

from typing import Any

import typer
from members import table

from searchpet.cli import app

PLAIN = "Options"  # the panel of options that name none


def reference() -> str:
    """Every command: what it does, its arguments, its options by panel."""
    group: Any = typer.main.get_command(app)
    return "\n\n".join(_command(name, command) for name, command in group.commands.items())


def _command(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = ["searchpet", name, *(_place(p) for p in arguments), "[OPTIONS]"]
    parts = [f"## {name}", str(command.help), f"```text\n{' '.join(usage)}\n```"]
    if arguments:
        parts.append(table(("argument", "what it is", "default"), [
            (f"`{p.name.upper()}`", p.help or "", _default(p)) for p in arguments]))
    panels: dict[str, list[Any]] = {}
    for p in command.params:
        if p.param_type_name == "option" and not p.hidden:
            panels.setdefault(getattr(p, "rich_help_panel", None) or PLAIN, []).append(p)
    for panel, found in panels.items():
        rows = [(_names(p, context), _help(p), _default(p)) for p in found]
        parts.append(table((panel, "what it does", "default"), rows))
    return "\n\n".join(parts)


def _place(argument: Any) -> str:
    """An argument as a usage line has it: FILE, [SPEC], RUNS..."""
    name = argument.name.upper() + ("" if argument.nargs == 1 else "...")
    return name if argument.required else f"[{name}]"


def _names(p: Any, context: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*p.opts, *p.secondary_opts))
    if p.is_flag:
        return names
    form = p.metavar or p.display_type(context).strip("<>").upper()
    return f"{names} `{'TEXT' if form.endswith(('STR', 'STR]')) else form}`"


def _help(p: Any) -> str:
    own = str(p.help or "")
    return f"{own} From the environment: `{p.envvar}`." if p.envvar else own


def _default(p: Any) -> str:
    value = p.default
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""  # nothing, a flag that is off, a list that is empty
    return f"`{value}`"

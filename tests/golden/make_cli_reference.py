"""Writes docs/cli-reference.md: every command with its options, from the functions behind them.

To be run where a command or an option was added or its help changed:
python -m tests.golden.make_cli_reference
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, CommandInfo, OptionInfo

from piflow import cli

PAGE = Path(__file__).parents[2] / "docs" / "cli-reference.md"
_HEAD = """# Every command

Generated from `piflow/cli.py` by `python -m tests.golden.make_cli_reference`; a test keeps it
current. `piflow COMMAND --help` says the same. RECIPE is a YAML file, whose keys are in
[recipe-reference.md](recipe-reference.md); exit codes are in
[operations.md](operations.md#exit-codes).
"""


def page() -> str:
    """The whole page, Markdown."""
    named = {_name(command): command for command in cli.app.registered_commands}
    return "\n".join([_HEAD, *(_of(name, named[name]) for name in sorted(named))])


def _name(command: CommandInfo) -> str:
    return command.name or getattr(command.callback, "__name__", "").replace("_", "-")


def _of(name: str, command: CommandInfo) -> str:
    assert command.callback is not None
    parameters = _parameters(command.callback)
    arguments = [
        (item.metavar or name.upper()) + (" …" if get_origin(kind) is list else "")
        for name, item, kind, _ in parameters
        if isinstance(item, ArgumentInfo)
    ]
    lines = [
        f"## piflow {name}",
        "",
        _text(command.callback.__doc__),
        "",
        f"`piflow {' '.join([name, *arguments, '[OPTIONS]'])}`",
        "",
        "| | default | meaning |",
        "|---|---|---|",
        *(_row(*item) for item in parameters),
        "",
        _text(command.epilog),
    ]
    return "\n".join(lines) + "\n"


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any, Any]]:
    """Name, typer's description, type and default of each parameter."""
    hints = get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *notes = get_args(hints[name])
        (info,) = (note for note in notes if isinstance(note, ArgumentInfo | OptionInfo))
        found.append((name, info, kind, parameter.default))
    return found


def _row(name: str, info: Any, kind: Any, default: Any) -> str:
    if isinstance(info, ArgumentInfo):
        names = info.metavar or name.upper()
    else:
        plain = name.replace("_", "-")
        decls = [item for item in (info.default, *(info.param_decls or ())) if _is_option(item)]
        if not decls:
            decls = [f"--{plain}"]
        if kind is bool and default is True:
            decls.append(f"--no-{plain}")
        names = ", ".join(decls) + ("" if kind is bool else f" {info.metavar or _kind(kind)}")
    cells = (f"`{names}`", _default(default), _text(info.help))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _is_option(text: Any) -> bool:
    """Whether it is written as one: in an annotation, typer has the first one as the default."""
    return isinstance(text, str) and text.startswith("-")


def _kind(kind: Any) -> str:
    """What stands after an option: its choices, or what they are."""
    origin = get_origin(kind)
    if origin is Annotated or origin is list:
        return _kind(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return _kind(next(item for item in get_args(kind) if item is not type(None)))
    if origin is Literal:
        return "|".join(get_args(kind))
    return {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def _default(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return "required"
    if default is None or default is False:
        return ""
    return "yes" if default is True else f"`{default}`"


def _text(told: str | None) -> str:
    return " ".join((told or "").split())


if __name__ == "__main__":
    PAGE.write_text(page())

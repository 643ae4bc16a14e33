"""recipe -> whether the machines of its workers are fit for the run, as a table or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.table import Table

from piflow.config import Recipe
from piflow.progress import PlainConsole
from piflow.runtime.machine_check import Check, check_machines


class UnfitMachinesError(ValueError):
    """A check of the machines failed; the message names each with what was found."""


def main(recipe: Recipe, *, as_json: bool = False) -> list[Check]:
    """Try the machines, and print what was found.

    Raises:
        UnfitMachinesError: something failed; all the rest was checked all the same.
        ResourcesError: the cluster has no room for the workers.
        WorkersFailedError: a worker couldn't measure; says why.
    """
    checks = check_machines(recipe)
    if as_json:
        ok = all(check.ok for check in checks)
        tree = {"name": recipe.name, "ok": ok, "checks": [check.as_json() for check in checks]}
        print(json.dumps(tree, indent=2))
    else:
        _print_table(recipe.name, checks)
    bad = [check for check in checks if not check.ok]
    if bad:
        raise UnfitMachinesError(_told(bad, len(checks)))
    return checks


def _told(bad: Sequence[Check], number: int) -> str:
    lines = [f"{len(bad)} of {number} checks of the machines failed:"]
    for check in bad:
        lines.append(f"  {check.name}: {check.found}; expected {check.wanted}")
        lines += [f"    {place}" for place in check.where]
    return "\n".join(lines)


def _print_table(name: str, checks: Sequence[Check]) -> None:
    table = Table(title=f"{name}: machines of its workers")
    for column in ("check", "found", "expected", ""):
        table.add_column(column)
    for check in checks:
        cells = (check.name, check.found, check.wanted, "ok" if check.ok else "FAILED")
        table.add_row(*cells)
    PlainConsole().print(table)

"""A family of models -> what of it is wrong, by checks on a tiny random model."""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table

from piflow.config import find_family
from piflow.progress import PlainConsole
from piflow.storage.scratch import scratch


def main(family: str) -> bool:
    """Run every check of a family and print a table of them.

    Args:
        family: as a recipe's `model.family`; its module is imported.

    Returns:
        Whether all that could be compared was right.

    Raises:
        ValueError: there is no such family, or it brings no tiny model.
    """
    if find_family(family).tiny is None:
        raise ValueError(
            f"the family {family} brings no tiny model to check it with: name a module like "
            "piflow.backbones.tiny.TinyModel in its record's `tiny`"
        )
    from piflow.testing.family import Skipped, TinyFamily, checks

    table = Table(title=f"family {family}")
    for column in ("check", "result", "seconds"):
        table.add_column(column, overflow="fold")
    is_right = True
    with scratch("family") as folder:
        made = TinyFamily.made(family, Path(folder))
        for name, check in checks(made):
            start = time.perf_counter()
            try:
                check()
                result = "right"
            except Skipped as skipped:
                result = f"not compared: {skipped}"
            except Exception as error:  # also the adapter's own: it is what is put to the test
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                result, is_right = f"WRONG: {kind}{error}", False
            table.add_row(name.replace("_", " "), result, f"{time.perf_counter() - start:.1f}")
    PlainConsole().print(table)
    return is_right

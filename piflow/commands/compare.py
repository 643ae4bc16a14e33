"""Evaluated runs -> one HTML page: figures with intervals, paired differences, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime


def main(places: Sequence[str], *, out: str) -> None:
    """Compare evaluations on the prompts that all of them drew from the same noise.

    Args:
        places: runs' folders, evaluations' folders or files of figures; URIs.
        out: URI of the page.

    Raises:
        ValueError: they can't be compared, and why; or not 2 to 12 of them.
        FileNotFoundError: a place holds no figures.
    """
    from rich.table import Table

    from piflow import storage
    from piflow.evaluation.comparison import page, pairs, read_students
    from piflow.evaluation.report import figure_table
    from piflow.progress import PlainConsole

    students = read_students(places)
    created = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    storage.write_bytes(out, page(students, created).encode())
    prompts = len(students[0].figures.prompts)
    table = Table(title=f"on {prompts} prompts, from the same noise")
    compared = pairs(students)
    figures = figure_table([pair.figures for pair in compared])
    table.add_column("second over first")
    for heading in (*(name for name, _, _ in figures), "won"):
        table.add_column(heading, justify="right")
    for row, pair in enumerate(compared):
        texts = ["\n".join(column[row]) for _, _, column in figures]
        table.add_row(f"{pair.second} over {pair.first}", *texts, f"{pair.wins:.0%}")
    console = PlainConsole()
    console.print(table)
    console.print(f"page written to {out}", soft_wrap=True)

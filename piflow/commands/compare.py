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
    from rich.console import Console
    from rich.table import Table

    from piflow import storage
    from piflow.evaluation.comparison import page, pairs, read_students

    students = read_students(places)
    created = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    storage.write_bytes(out, page(students, created).encode())
    prompts = len(students[0].figures.prompts)
    table = Table(title=f"on {prompts} prompts, from the same noise")
    for heading in ("second over first", "PSNR dB", "95 %", "diversity", "95 %", "won"):
        table.add_column(heading, justify="left" if heading == "second over first" else "right")
    for pair in pairs(students):
        table.add_row(
            f"{pair.second} over {pair.first}",
            f"{pair.psnr.value:+.2f}",
            f"{pair.psnr.low:+.2f} to {pair.psnr.high:+.2f}",
            f"{pair.diversity.value:.3f}",
            f"{pair.diversity.low:.3f} to {pair.diversity.high:.3f}",
            f"{pair.wins:.0%}",
        )
    console = Console()
    console.print(table)
    console.print(f"page written to {out}", soft_wrap=True)

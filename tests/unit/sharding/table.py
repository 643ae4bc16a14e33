"""The table of docs/sharding.md: `python -m tests.unit.sharding.table` prints it.

A cell is "refused" if the recipe's parser refuses it, "run" if `training.RUNS` trains it, else
"parsed": accepted, but never run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from piflow.config import RecipeError
from tests.unit.sharding import training
from tests.unit.sharding.training import OPTIONS, RUNS, SCENARIOS, STRATEGIES, Run, option_run


@dataclass(frozen=True)
class Cell:
    status: str
    reason: str = ""  # of a refusal, in the parser's words


def cells() -> dict[str, dict[str, Cell]]:
    """Rows by scenario or option, columns by strategy."""
    return {
        row: {strategy: _cell(row, strategy) for strategy in STRATEGIES}
        for row in (*SCENARIOS, *OPTIONS)
    }


def _cell(row: str, strategy: str) -> Cell:
    run = Run(row, strategy) if row in SCENARIOS else option_run(row, strategy)
    try:
        training.recipe_of(run)
    except RecipeError as error:
        _, _, problem = str(error).partition("  - ")
        return Cell("refused", problem.partition(": ")[2].partition("; got {")[0])
    runs = (run for runs in RUNS.values() for run in runs if run.strategy == strategy)
    done = strategy == "single" and row in SCENARIOS  # what every run is compared with
    done = done or any(row in (run.scenario, *run.options) for run in runs)
    return Cell("run" if done else "parsed")


def markdown() -> str:
    """The table, and below it the reasons by number."""
    reasons: dict[str, str] = {}  # first one of those that differ in strategy and numbers alone
    lines = [
        f"| | {' | '.join(STRATEGIES)} |",
        f"|---|{'---|' * len(STRATEGIES)}",
    ]
    for row, columns in cells().items():
        texts = []
        for cell in columns.values():
            if cell.status == "refused":
                kind = re.sub(r"\d|single|ddp|fsdp|deepspeed", "", cell.reason)
                reasons.setdefault(kind, cell.reason)
                texts.append(f"refused ({list(reasons).index(kind) + 1})")
            else:
                texts.append(cell.status)
        name = row if row in SCENARIOS else f"`{row}`"
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(
        [*lines, "", *(f"{n}. {reason}" for n, reason in enumerate(reasons.values(), 1))]
    )


if __name__ == "__main__":
    print(markdown())

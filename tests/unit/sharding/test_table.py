"""Every strategy with every option: run, or refused with the reason, as docs/sharding.md says."""

from __future__ import annotations

from pathlib import Path

import pytest

from piflow.config import RecipeError
from tests.unit.sharding import table
from tests.unit.sharding.training import MUON, RUNS, SCENARIOS, Run, recipe_of

DOCS = Path(__file__).parents[3] / "docs" / "sharding.md"
CELLS = [cell for row in table.cells().values() for cell in row.values()]


def test_the_docs_table_is_what_parser_and_runs_say() -> None:
    assert table.markdown() in DOCS.read_text(), (
        "put what `python -m tests.unit.sharding.table` prints there"
    )


def test_every_cell_is_run_or_refused() -> None:
    assert {cell.status for cell in CELLS} == {"run", "refused"}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_is_shared_by_several_processes(scenario: str) -> None:
    assert any(run.scenario == scenario for number in (2, 4) for run in RUNS[number])


def test_refusals_say_what_to_do() -> None:
    for cell in CELLS:
        advice = any(word in cell.reason for word in ("use ", "leave ", "don't compile"))
        assert advice == (cell.status == "refused"), cell


def test_what_is_refused_can_not_be_run() -> None:
    for run in (run for runs in RUNS.values() for run in runs):
        recipe_of(run)
    with pytest.raises(RecipeError, match="muon needs whole matrices"):
        recipe_of(Run(MUON, "fsdp"))

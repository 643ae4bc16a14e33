"""Which tests `make quick` takes."""

from __future__ import annotations

from pathlib import Path

from tests.changed import unit_tests_of

REPOSITORY = Path(__file__).parents[2]


def test_a_changed_file_has_the_tests_of_its_name_or_of_its_folder() -> None:
    assert unit_tests_of(["piflow/schedule.py"], REPOSITORY) == ["tests/unit/test_schedule.py"]
    assert unit_tests_of(["piflow/runs/folder.py"], REPOSITORY) == [
        "tests/unit/runs/test_folder.py"
    ]
    assert unit_tests_of(["piflow/sharding/single.py"], REPOSITORY) == ["tests/unit/sharding"]
    assert unit_tests_of(["tests/unit/test_ema.py"], REPOSITORY) == ["tests/unit/test_ema.py"]


def test_a_folder_holds_its_files_and_nothing_runs_twice() -> None:
    files = ["piflow/sharding/single.py", "tests/unit/sharding/test_table.py"]
    assert unit_tests_of(files, REPOSITORY) == ["tests/unit/sharding"]


def test_what_has_no_unit_tests_of_its_own_runs_none() -> None:
    files = ["README.md", "docs/method.md", "tests/integration/test_embed.py", "piflow/__init__.py"]
    assert unit_tests_of(files, REPOSITORY) == []

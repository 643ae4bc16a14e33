"""Keys and tokens for workers: what is forwarded, and what a machine keeps of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle

from piflow.runtime.environment import GROUPS, add_missing, without_secrets, worker_setup

KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "once"}


def test_nothing_to_forward_is_no_hook() -> None:
    assert worker_setup({"PATH": "/bin", "HF_TOKEN": "", "MY_TOKEN": "x"}) is None


def test_the_hook_sets_what_is_listed_in_another_process() -> None:
    hook = worker_setup({**KEYS, "HF_TOKEN": "hf", "MY_TOKEN": "mine"})
    assert hook is not None and "secret" not in repr(hook)
    script = (
        "import os, pickle, sys; pickle.loads(sys.stdin.buffer.read())();"
        "print(*(os.environ.get(n) for n in ('AWS_SECRET_ACCESS_KEY', 'HF_TOKEN', 'MY_TOKEN')))"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    told = subprocess.run(
        [sys.executable, "-c", script], input=cloudpickle.dumps(hook), env=environment,
        capture_output=True, check=True,
    )  # fmt: skip
    assert told.stdout.decode().split() == ["secret", "hf", "None"]


@pytest.mark.parametrize("own", ["AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN"])
def test_a_machine_with_rights_of_its_own_keeps_them(own: str) -> None:
    """A session's token beside another one's keys would be refused everywhere."""
    environment = {own: "its own"}
    add_missing({**KEYS, "HF_TOKEN": "hf"}, environment)
    assert environment == {own: "its own", "HF_TOKEN": "hf"}


def test_no_file_of_one_machine_is_named_on_another() -> None:
    names = [name for group in GROUPS for name in group.names]
    assert len(names) == len(set(names))
    assert not [name for name in names if name.endswith(("_FILE", "_PATH", "_HOME", "_BUNDLE"))]


def test_the_documented_list_is_the_one_that_is_forwarded() -> None:
    page = (Path(__file__).parents[3] / "docs/operations.md").read_text()
    table = page.split("## Keys and tokens of workers")[1].split("Their values lie")[0]
    named = {name.upper() for name in re.findall(r"`([A-Za-z0-9_]+)`", table)}
    assert named == {name.upper() for group in GROUPS for name in group.names}


def test_a_text_for_the_terminal_holds_no_key() -> None:
    environment = {"HF_TOKEN": "hf_1234567", "PGPASSWORD": "a", "HOME": "/home/me"}
    text = "a 401 for hf_1234567 in /home/me"
    assert without_secrets(text, environment) == "a 401 for <HF_TOKEN> in /home/me"

"""What lies in a run's tracking buffer may be damaged or hostile; the entries behind it go on."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from piflow.runs.mlflow import Delivery, _first_line, get_run, require_own_server
from piflow.runs.outbox import Entry, EntryRefusedError, Outbox, RunRefusedError

GOOD = {"kind": "metrics", "time_us": 1, "step": 7, "data": {}}


def delivered(folder: Path, *lines: str, name: str = "000001-0123abcd.jsonl") -> list[int]:
    """What arrives of a file that an earlier process left, and of a new entry."""
    (folder / name).write_text("\n".join(lines))
    taken: list[int] = []

    def deliver(entries: Any) -> int:
        if entries[0].data.get("broken"):
            raise ZeroDivisionError("an error that nobody foresaw")
        taken.append(entries[0].step)
        return 1

    box = Outbox(str(folder), deliver, lambda name, text: Entry("notice", 0, -1, {}))
    box.put(Entry("metrics", 2, 8, {}))
    assert box.close(20) is None
    return [step for step in taken if step >= 0]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[" * 100_000,
        '{"kind": "metrics", "time_us": 1, "step": ' + "9" * 10_000 + ', "data": {}}',
        json.dumps({**GOOD, "data": []}),
        json.dumps({**GOOD, "step": "7"}),
        json.dumps({**GOOD, "more": 1}),
        "null",
    ],
)
def test_a_line_that_is_no_entry_is_kept_aside(tmp_path: Path, line: str) -> None:
    assert delivered(tmp_path, json.dumps(GOOD), line, json.dumps({**GOOD, "step": 9})) == [7, 9, 8]
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("damaged-") and kept.read_text() == line


def test_an_error_that_nobody_foresaw_stops_one_entry_only(tmp_path: Path) -> None:
    broken = {**GOOD, "data": {"broken": True}}
    assert delivered(tmp_path, json.dumps(broken), json.dumps(GOOD)) == [7, 8]
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("refused-") and "ZeroDivisionError" in kept.read_text()


@pytest.mark.parametrize("name", ["notes.jsonl", "x-y.jsonl", "-1.jsonl", "000002-abc.jsonl.old"])
def test_foreign_files_are_left_alone(tmp_path: Path, name: str) -> None:
    assert delivered(tmp_path, json.dumps(GOOD), name=name) == [8]
    assert [path.name for path in tmp_path.iterdir()] == [name]


class Client:
    """The part of MLflow's that is asked before a file or picture is sent."""

    def list_artifacts(self, run_id: str, path: str) -> list[Any]:
        return []

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        raise AssertionError(f"{path} was sent")


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("picture", {"key": "samples", "png": base64.b64encode(b"no picture").decode()}),
        ("picture", {"key": "samples", "png": "é"}),
        ("picture", {}),
        ("file", {"path": "../../secret", "sha256": "0" * 64}),
        ("file", {"path": "/etc/passwd", "sha256": "0" * 64}),
        ("file", {"path": "absent", "sha256": "0" * 64}),
        ("file", {"path": "replaced", "sha256": "0" * 64}),
        ("file", {"path": "x" * 1000, "content": ""}),
        ("file", {"path": "..", "content": ""}),
        ("event", {"name": "x" * 1000, "text": "x"}),
        ("unknown", {}),
    ],
)
def test_what_can_never_be_sent_is_refused_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, data: dict[str, Any]
) -> None:
    (tmp_path / "replaced").write_text("something else")
    delivery = Delivery("http://nowhere.invalid", "run", str(tmp_path))
    monkeypatch.setattr(delivery, "_connected", Client)
    monkeypatch.setattr(delivery, "_require_run", lambda: None)
    with pytest.raises(EntryRefusedError):
        delivery([Entry(kind, 1, 1, data)])


def test_a_servers_words_are_escaped() -> None:
    assert _first_line(ValueError("\x1b[2J\x1b]0;title\x07 gone\nmore")) == (
        "\\x1b[2J\\x1b]0;title\\x07 gone"
    )
    assert len(_first_line(ValueError("x" * 10**6))) < 600


OURS = "https://mlflow.ours.example:5000"


@pytest.mark.parametrize(
    ("location", "is_own"),
    [
        ("mlflow-artifacts:/1/a/artifacts", True),
        ("mlflow-artifacts://mlflow.ours.example/1/a/artifacts", True),
        ("http://mlflow.ours.example:5001/api/2.0/mlflow-artifacts/artifacts/1", True),
        ("s3://bucket/1/a/artifacts", True),
        ("/mnt/mlruns/1/a/artifacts", True),
        ("mlflow-artifacts://elsewhere.example/1/a/artifacts", False),
        ("https://elsewhere.example/1/a/artifacts", False),
        ("http://mlflow.ours.example@elsewhere.example/1", False),
        ("HTTP://ELSEWHERE.EXAMPLE", False),
    ],
)
def test_passwords_go_to_no_other_server_that_artifacts_are_said_to_lie_with(
    location: str, is_own: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever may register a model or make an experiment says where its artifacts lie."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    info = SimpleNamespace(lifecycle_stage="active", artifact_uri=location)
    client: Any = SimpleNamespace(get_run=lambda run_id: SimpleNamespace(info=info))
    require_own_server(OURS, location)  # there is nothing to send
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "secret")
            if is_own:
                assert get_run(client, OURS, "run").info is info
                continue
            with pytest.raises(RunRefusedError, match="another server, which would get"):
                get_run(client, OURS, "run")
    if not is_own:
        (tmp_path / ".mlflow").mkdir()
        (tmp_path / ".mlflow" / "credentials").write_text("[mlflow]")
        with pytest.raises(RunRefusedError, match="give that name in tracking.uri"):
            require_own_server(OURS, location)

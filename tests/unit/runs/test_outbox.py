"""The queue to a server that comes and goes; the server here is a list that can refuse."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from piflow import storage
from piflow.runs import outbox
from piflow.runs.outbox import Entry, EntryRefusedError, Outbox, RunRefusedError, ServerAwayError


class Server:
    """What it took, in order; whom it refuses."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.notices: list[str] = []
        self.problem: Exception | None = None
        self.refused: set[int] = set()
        self.tries = 0
        self.answer = threading.Event()  # cleared: requests hang
        self.answer.set()

    def __call__(self, entries: Sequence[Entry]) -> int:
        self.tries += 1
        self.answer.wait(20)
        if self.problem is not None:
            raise self.problem
        if entries[0].step in self.refused:
            raise EntryRefusedError("not this one")
        for entry in entries[:3]:
            if entry.kind == "notice":
                self.notices.append(f"{entry.data['name']}: {entry.data['text']}")
            else:
                self.taken.append(entry.step)
        return min(len(entries), 3)


def entry(step: int, size: int = 0) -> Entry:
    return Entry("picture" if size else "metrics", 1_700_000_000_000_000 + step, step,
                 {"content": "x" * size})  # fmt: skip


def notice(name: str, text: str) -> Entry:
    return Entry("notice", 0, 0, {"name": name, "text": text})


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def box(tmp_path: Path, server: Server) -> Iterator[Callable[..., Outbox]]:
    """A new process's outbox into the same folder."""
    made: list[Outbox] = []

    def make(memory_bytes: int = outbox.MEMORY_BYTES) -> Outbox:
        made.append(Outbox(str(tmp_path), server, notice, memory_bytes))
        return made[-1]

    yield make
    server.answer.set()
    for item in made:
        item.close(0)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


AWAY = ServerAwayError("no route")


def test_entries_arrive_in_order(server: Server, box: Callable[..., Outbox]) -> None:
    ours = box()
    for step in range(100):
        ours.put(entry(step))
    assert ours.close(20) is None
    assert server.taken == list(range(100)) and server.notices == []


def test_an_outage_is_sat_out_and_told(
    server: Server, box: Callable[..., Outbox], tmp_path: Path
) -> None:
    server.problem = AWAY
    ours = box()
    for step in range(10):
        ours.put(entry(step))
    until(lambda: server.tries >= 2)  # by itself
    server.problem = None
    until(lambda: len(server.taken) == 10 and len(server.notices) == 1)
    assert server.taken == list(range(10))
    assert server.notices[0].startswith("tracking-away: nothing was delivered for")
    assert ours.close(20) is None and not list(tmp_path.iterdir())


def test_what_is_kept_survives_a_killed_process(
    server: Server, box: Callable[..., Outbox], tmp_path: Path
) -> None:
    """The next process delivers it, before its own, with the times it had."""
    server.problem = AWAY
    killed = box()
    for start in (0, 5):
        for step in range(start, start + 5):
            killed.put(entry(step))
        assert killed.keep(20)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name[:7] for name in names] == ["000001-", "000002-"]
    killed.put(entry(99))  # not kept: lost with the process
    ours = box()
    ours.put(entry(10))
    assert ours.keep(20) and len(list(tmp_path.iterdir())) == 3
    times: list[int] = []
    later = box()
    deliver, server.problem = later._deliver, None

    def noting(entries: Sequence[Entry]) -> int:
        times.extend(item.time_us for item in entries[:3] if item.kind != "notice")
        return deliver(entries)

    later._deliver = noting
    assert later.close(20) is None
    assert server.taken[:11] == list(range(11))
    assert set(times) <= {entry(step).time_us for step in range(11)}
    assert not [path for path in tmp_path.iterdir() if path.name in names]


def test_keeping_needs_no_file_while_the_server_answers(
    server: Server, box: Callable[..., Outbox], tmp_path: Path
) -> None:
    ours = box()
    for step in range(20):
        ours.put(entry(step))
    assert ours.keep(20) and server.taken == list(range(20))
    assert not list(tmp_path.iterdir())


def test_a_request_that_hangs_holds_nobody_up(
    server: Server, box: Callable[..., Outbox], tmp_path: Path
) -> None:
    server.answer.clear()
    ours = box()
    began = time.monotonic()
    for step in range(1000):
        ours.put(entry(step))
    assert ours.keep(0.1)
    problem = ours.close(0.1)
    assert time.monotonic() - began < 10  # the request hangs for 20
    assert problem is not None and "not done within" in problem
    server.answer.set()
    later = box()
    assert later.close(20) is None
    # what hung may arrive twice: `deliver` knows what is there
    assert sorted(set(server.taken)) == list(range(1000)) and len(server.taken) <= 1003


def test_too_much_for_memory_goes_to_the_folder(
    server: Server, box: Callable[..., Outbox], tmp_path: Path
) -> None:
    server.problem = AWAY
    ours = box(memory_bytes=100_000)  # they have 153,000
    for step in range(30):
        ours.put(entry(step, size=5000))
    until(lambda: any(tmp_path.iterdir()))
    server.problem = None
    assert ours.close(20) is None
    assert server.taken == list(range(30)), "nothing is lost, the order is the same"


def test_entries_that_are_larger_than_memory_are_kept(
    server: Server, box: Callable[..., Outbox]
) -> None:
    """The server is there, but hasn't taken the first when the second and third come."""
    server.answer.clear()
    ours = box(memory_bytes=10_000)
    for step in range(4):
        ours.put(entry(step, size=50_000))
    server.answer.set()
    assert ours.close(20) is None
    assert list(dict.fromkeys(server.taken)) == [0, 1, 2, 3] and server.notices == []


def test_without_a_folder_the_oldest_pictures_go_first(
    server: Server, box: Callable[..., Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(uri: str, content: bytes) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(storage, "write_bytes", full)
    server.problem = AWAY
    ours = box(memory_bytes=20_000)
    for step in range(20):
        ours.put(entry(step, size=5000 if step % 2 else 0))
    assert not ours.keep(0.5)
    server.problem = None
    assert ours.close(20) is None
    pictures = [step for step in server.taken if step % 2]
    assert [step for step in server.taken if not step % 2] == list(range(0, 20, 2))
    assert pictures == list(range(20 - 2 * len(pictures) + 1, 20, 2)) and len(pictures) < 10
    assert f"tracking-lost: {10 - len(pictures)} of picture, dropped" in server.notices


def test_one_wrong_entry_is_set_aside_and_told(
    server: Server, box: Callable[..., Outbox], tmp_path: Path
) -> None:
    server.refused = {3}
    ours = box()
    for step in (3, 4, 5, 6):
        ours.put(entry(step))
    assert ours.close(20) is None
    assert server.taken == [4, 5, 6]
    [kept] = tmp_path.glob("refused-*.json")
    assert server.notices == ["tracking-lost: 1 of metrics, refused and set aside"]
    content = json.loads(kept.read_text())
    assert content["entry"]["step"] == 3, "nothing is lost"
    assert "EntryRefusedError" in content["reason"] and "Traceback" in content["reason"]


def test_a_wrong_entry_that_cannot_be_set_aside_is_not_lost(
    server: Server,
    box: Callable[..., Outbox],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(outbox, "_FIRST_PAUSE", 0.01)
    server.refused = {3}
    write = storage.write_bytes
    full = threading.Event()
    full.set()

    def write_bytes(uri: str, content: bytes) -> None:
        if full.is_set() and "refused-" in uri:
            raise OSError(errno.ENOSPC, "no space left")
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", write_bytes)
    ours = box()
    for step in (3, 4):
        ours.put(entry(step))
    until(lambda: server.tries >= 3)
    assert not server.taken, "nothing overtakes it"
    assert "not this one; and it can't be set aside" in caplog.text and "no space" in caplog.text
    full.clear()
    assert ours.close(20) is None
    assert server.taken == [4]
    [kept] = tmp_path.glob("refused-*.json")
    assert json.loads(kept.read_text())["entry"]["step"] == 3
    assert "tracking-lost: 1 of metrics, refused and set aside" in server.notices


def test_a_wrong_entry_without_a_form_in_json_is_set_aside(
    server: Server, box: Callable[..., Outbox], tmp_path: Path
) -> None:
    server.refused = {3}
    ours = box()
    ours.put(Entry("metrics", 0, 3, {"value": complex(1, 2)}))
    ours.put(entry(4))
    assert ours.close(20) is None
    assert server.taken == [4]
    [kept] = tmp_path.glob("refused-*.json")
    assert json.loads(kept.read_text())["entry"]["data"] == {"value": "(1+2j)"}


def test_a_refusing_server_is_not_asked_again_by_itself(
    server: Server, box: Callable[..., Outbox], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_FIRST_PAUSE", 0.01)
    server.problem = RunRefusedError("the run was deleted")
    ours = box()
    for step in range(5):
        ours.put(entry(step))
    until(lambda: ours.refused)
    time.sleep(0.3)
    assert server.tries == 1
    assert ours.keep(20) and server.tries == 2  # a checkpoint asks
    began = time.monotonic()
    assert ours.close(20) == "the run was deleted" and time.monotonic() - began < 10
    server.problem = None
    assert box().close(20) is None and server.taken == list(range(5))


def test_damaged_lines_are_left_out_and_told(
    server: Server, box: Callable[..., Outbox], tmp_path: Path
) -> None:
    server.problem = AWAY
    first = box()
    for step in range(3):
        first.put(entry(step))
    first.close(0)
    (file,) = tmp_path.iterdir()
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:20], lines[2]]))
    server.problem = None
    assert box().close(20) is None
    assert server.taken == [0, 2]
    assert "tracking-lost: 1 of a damaged file" in server.notices

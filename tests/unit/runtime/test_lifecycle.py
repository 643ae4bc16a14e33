"""What makes driver and workers stop, without Ray: signals, the mailbox, the watchdog."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from piflow import cli
from piflow.data.cluster import ResourcesError
from piflow.runs.outbox import ServerAwayError
from piflow.runtime import mailbox as mailbox_module
from piflow.runtime.exits import RayLostError, WorkersFailedError, WorkersLostError
from piflow.runtime.mailbox import Departure, Mailbox, StopReason
from piflow.runtime.signals import Signals, StoppedError, ended_by_signals, kept_handlers

REPOSITORY = Path(__file__).parents[3]


def run_script(text: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=180
    )


# ---------------------------------------------------------------------------------------- watchdog

WATCHDOG = """
import sys, threading, time
from piflow.runtime.watchdog import Watchdog
watchdog = Watchdog(1.0)
def train():
    for _ in range(4):
        watchdog.rearm()
        time.sleep(0.5)
    print("trained", flush=True)
    {then}
def hangs():
    {hang}
thread = threading.Thread(target=train)
thread.start()
thread.join()
print("ended", flush=True)
"""
HOLDS_THE_LOCK = "import re; re.match('(a+)+$', 'a' * 40 + 'b')"  # Python's own, for hours


@pytest.mark.parametrize("hang", ["time.sleep(3600)", HOLDS_THE_LOCK])
def test_a_hanging_worker_ends_itself_and_says_where_it_was(hang: str) -> None:
    done = run_script(WATCHDOG.format(then="hangs()", hang=hang))
    assert (done.returncode, done.stdout) == (1, "trained\n")
    assert "Timeout (0:00:01)!" in done.stderr and "in hangs\n" in done.stderr


def test_a_worker_that_is_done_is_left_alone() -> None:
    then = "watchdog.end(); time.sleep(1.5)"
    done = run_script(WATCHDOG.format(then=then, hang="pass"))
    assert (done.returncode, done.stdout) == (0, "trained\nended\n"), done.stderr


# ------------------------------------------------------------------------------------- worker side

SIGTERM = """
import os, signal, threading, time
import ray.train
from piflow.runtime.stopping import Stops
ray.train.get_preemption_info = lambda: None
def train():
    stops = Stops(None, rank=1)
    print(stops.agreed().name)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    print(stops.agreed().name, flush=True)
    ray.train.get_preemption_info = lambda: "a notice"
    stops.close()
    stops = Stops(None, rank=1)
    print(stops.agreed().name, flush=True)
    stops.close()
    os.kill(os.getpid(), signal.SIGTERM)
thread = threading.Thread(target=train)
thread.start()
thread.join()
time.sleep(5)
"""


def test_sigterm_reaches_a_train_loop_that_is_not_in_the_main_thread() -> None:
    """So does a drain notice; afterwards the signal ends the process as ever."""
    done = run_script(SIGTERM)
    assert done.stdout.split() == ["NONE", "MOVE", "MOVE"], done.stderr
    assert done.returncode == -signal.SIGTERM


# ------------------------------------------------------------------------------------------ mailbox


def test_the_weightiest_reason_wins_and_a_resize_is_over_when_workers_start() -> None:
    mailbox = Mailbox()
    assert not mailbox.ask_to_stop(StopReason.NONE), "nobody trains yet"
    assert mailbox.join(2) == 0
    assert mailbox.ask_to_stop(StopReason.RESIZE)
    assert mailbox.requested() is StopReason.RESIZE
    mailbox.leave(StopReason.RESIZE, 7)
    assert mailbox.departure() == Departure(StopReason.RESIZE, 7)
    assert mailbox.join(3) == 2 and mailbox.requested() is StopReason.NONE
    assert mailbox.departure() == Departure(StopReason.NONE, 0)
    mailbox.ask_to_stop(StopReason.END)
    mailbox.ask_to_stop(StopReason.RESIZE)
    mailbox.join(3)
    assert mailbox.requested() is StopReason.END, "it holds for whoever is started meanwhile"


def test_a_failure_after_a_long_silence_is_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(mailbox_module.time, "monotonic", lambda: now)
    mailbox = Mailbox()
    mailbox.join(2)
    now += 50
    mailbox.update(3, "loss 1")
    now += 20
    mailbox.failed("worker 1 failed: gone", stall_timeout=60)
    now += 40
    mailbox.failed("worker 0 failed: gone", stall_timeout=60)
    first, second = mailbox.take_events()
    assert first == ("worker-failed", "worker 1 failed: gone")
    assert second[0] == "stall" and second[1].startswith("no step for 60 s;")
    assert second[1].endswith("worker 0 failed: gone")
    assert mailbox.take_events() == [] and mailbox.read() == (3, "loss 1")
    assert not mailbox.ask_to_stop(StopReason.END), "nobody trains until they are restarted"


# ---------------------------------------------------------------------------------------- signals


class Asked:
    """Workers, as the driver's signals see them."""

    def __init__(self, running: bool) -> None:
        self.times = 0
        self.running = running

    def __call__(self) -> bool:
        self.times += 1
        return self.running


def test_the_first_signal_is_passed_on_and_a_later_one_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`timeout` sends its signal twice, which counts once; the workers are asked until they end."""
    workers, before = Asked(running=True), signal.getsignal(signal.SIGTERM)
    with Signals().handled() as signals:
        signals.pass_on(workers, str)
        assert workers.times == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        for _ in range(3):
            signals.pass_on(workers, lambda: ", which takes about 7 s")
        assert workers.times == 3 and signals.number == signal.SIGTERM
        told = (
            "SIGTERM: the workers save after this step and stop, which takes about 7 s; once more"
        )
        assert capsys.readouterr().out.count(told) == 1
        signal.raise_signal(signal.SIGHUP)  # says nothing new
        time.sleep(1.1)
        with pytest.raises(StoppedError, match="SIGINT: steps since the last checkpoint are lost"):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_machine_that_is_taken_away_is_as_the_first_signal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever takes it may send SIGTERM as well, at any time; only one after that ends at once."""
    workers = Asked(running=True)
    with Signals().handled() as signals:
        for _ in range(2):
            signals.machine_leaves()
            signals.pass_on(workers, lambda: ", which takes about 7 s")
        told = "this machine is about to be taken away (Ray drains it): the workers save after this"
        assert capsys.readouterr().out.count(told) == 1
        assert workers.times == 2 and signals.number == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        time.sleep(1.1)
        with pytest.raises(StoppedError, match="SIGTERM: steps since the last checkpoint"):
            signal.raise_signal(signal.SIGTERM)


def test_a_notice_after_a_signal_says_nothing_new() -> None:
    with Signals().handled() as signals:
        signal.raise_signal(signal.SIGINT)
        signals.machine_leaves()
        assert signals.number == signal.SIGINT
        time.sleep(1.1)
        with pytest.raises(StoppedError, match="steps since the last checkpoint are lost"):
            signal.raise_signal(signal.SIGINT)


def test_without_workers_a_signal_ends_the_driver_at_once() -> None:
    with Signals().handled() as signals:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(StoppedError, match="no worker was at work"):
            signals.pass_on(Asked(running=False), str)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_command_from_within_any_library(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A library that catches all exceptions doesn't keep it; the code names the signal."""
    ends: list[str] = []

    def command() -> None:
        try:
            try:
                signal.raise_signal(number)
            except Exception:
                ends.append("swallowed")
        finally:
            signal.raise_signal(number)  # twice at once, as `timeout` does
            ends.append("closed")

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert ends == ["closed"]
    assert caught.value.code == 128 + number
    assert "The same command goes on" in capsys.readouterr().err


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nohup` has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(cli, "app", lambda: signal.raise_signal(signal.SIGHUP))
        cli.main()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_library_does_not_keep_sigterm() -> None:
    """Nor do processes that it starts get one, and one that comes meanwhile isn't lost."""
    with pytest.raises(StoppedError), ended_by_signals():
        with kept_handlers():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
            signal.raise_signal(signal.SIGTERM)
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
            child.terminate()
            assert child.wait(60) == 0
        time.sleep(60)


def test_a_library_whose_handler_another_thread_wakes_does_not_choose_the_exit_code() -> None:
    """The main thread blocks SIGTERM, so the kernel gives a process's signal to any other one."""
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()  # before the block: it doesn't inherit the mask
    try:
        with pytest.raises(StoppedError, match="SIGTERM"), ended_by_signals(), kept_handlers():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        with pytest.raises(SystemExit) as caught, ended_by_signals(), kept_handlers():
            sys.exit("something else")
    finally:
        done.set()
        other.join()
    assert caught.value.code == "something else"


CLOSED_TERMINAL = """
import os, signal, sys, time
from piflow.runtime.signals import Signals
with Signals().handled() as signals:
    print("ready", flush=True)
    while signals.number is None:
        time.sleep(0.05)
    signals.pass_on(lambda: True, str)
    print("more to say", flush=True)
    print("to stderr", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write(signal.Signals(signals.number).name)
"""


def test_a_closed_terminal_ends_nothing_before_it_is_saved(tmp_path: Path) -> None:
    """A real terminal that hangs up: SIGHUP comes, and nothing can be printed any more."""
    said = tmp_path / "said"
    main, terminal = pty.openpty()
    command = [sys.executable, "-c", CLOSED_TERMINAL, str(said)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    child = subprocess.Popen(
        ["setsid", "--ctty", *command],
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment,
    )  # fmt: skip
    os.close(terminal)
    assert b"ready" in os.read(main, 100)
    os.close(main)
    assert child.wait(60) == 0
    assert said.read_text() == "SIGHUP"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a key"), 1),
        (FileNotFoundError("a file"), 1),
        (FloatingPointError("a loss"), 1),
        (WorkersFailedError("a worker"), 1),
        (WorkersLostError("a machine"), 75),
        (RayLostError("a raylet"), 75),
        (ServerAwayError("MLflow"), 75),
        (ResourcesError("no GPU"), 69),
        (TimeoutError("a storage"), 75),
    ],
)
def test_the_exit_code_says_whether_another_start_can_help(
    error: Exception,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # for a traceback
    monkeypatch.setattr(cli, "app", Mock(side_effect=error))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith(f"piflow: {error}\n")

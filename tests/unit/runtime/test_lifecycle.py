"""What makes driver and workers stop, without Ray: signals, the mailbox, the watchdog."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from piflow import cli
from piflow.runtime import mailbox as mailbox_module
from piflow.runtime.mailbox import Departure, Mailbox, StopReason
from piflow.runtime.signals import Signals, StoppedError

REPOSITORY = Path(__file__).parents[3]


def run_script(text: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=60
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
    """A mailbox as its handle looks from the driver."""

    def __init__(self, running: bool) -> None:
        self.reasons: list[StopReason] = []
        self.running = running
        self.ask_to_stop = self

    def remote(self, reason: StopReason) -> bool:
        self.reasons.append(reason)
        return self.running


@pytest.fixture
def local_get(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "get", lambda value: value)


def test_the_first_signal_is_passed_on_once(
    local_get: None, capsys: pytest.CaptureFixture[str]
) -> None:
    mailbox, before = Asked(running=True), signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signals.pass_on(mailbox)
        assert mailbox.reasons == []
        signal.raise_signal(signal.SIGTERM)
        for _ in range(3):
            signals.pass_on(mailbox)
        assert mailbox.reasons == [StopReason.END] and signals.number == signal.SIGTERM
        assert "SIGTERM: the workers save after this step" in capsys.readouterr().out
        with pytest.raises(StoppedError, match="SIGINT: steps since the last checkpoint are lost"):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_workers_a_signal_ends_the_driver_at_once(local_get: None) -> None:
    with Signals() as signals, pytest.raises(StoppedError, match="no worker was training"):
        signal.raise_signal(signal.SIGINT)
        signals.pass_on(Asked(running=False))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_exit_code_names_the_signal(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> Any:
        raise StoppedError(number, "step 7 is saved")

    monkeypatch.setattr(cli, "app", stopped)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 128 + number
    assert "step 7 is saved. The same command goes on" in capsys.readouterr().err

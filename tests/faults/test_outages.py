"""Whole runs whose surroundings fail: servers that die, a clock that jumps, a full disk, damage.

All share a cluster of one node and one embedding store; each has one worker. What a run came to is
compared with one that nothing happened to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow import storage
from piflow.config import parse_recipe
from piflow.runs import folder as run_folder
from piflow.training.checkpoint import load_tensors, verify_checkpoint
from tests.faults.runs import SmallRun, cluster_environment, small_recipe, wait_until
from tests.servers import MlflowServer, S3Server, s3_proxy, s3_uri

pytestmark = pytest.mark.timeout(900)
STEPS = 20
OUTAGE_SECONDS = 20.0
MLFLOW_OUTAGE_SECONDS = 60.0
PACE = 0.5
HOUR = 3600
JUMPS = {5: HOUR, 12: -HOUR}  # when that step (from 0) has begun


def new_run(folder: Path, address: str, name: str, pace: float = 0.0, **changes: Any) -> SmallRun:
    """A run that checkpoints every fifth step; `changes` replace keys of sections, or values."""
    training = {"steps": STEPS, "checkpoint_every": 5, "keep_last": 2}
    runtime = {"num_workers": 1, "strategy": "single", "max_failures": 0}
    tree = small_recipe(folder, name, training=training, runtime=runtime).model_dump(mode="json")
    tree["tracking"]["uri"] = f"sqlite:///{folder / name}.db"
    for key, value in changes.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    return SmallRun(folder, parse_recipe(tree), cluster_environment(address), pace)


@pytest.fixture(scope="module")
def straight(folder: Path, address: str) -> SmallRun:
    """The run that nothing happens to."""
    run = new_run(folder, address, "straight")
    complete(run)
    return run


def complete(run: SmallRun) -> None:
    with run.running() as driver:
        run.finish(driver)


def fail(run: SmallRun, code: int = 1) -> str:
    """What it says when it gives up, in one line.

    Args:
        code: its exit code; 75: the same command can help.
    """
    with run.running() as driver:
        assert driver.wait(300) == code, run.log
    return " ".join(run.log.split())


def weights(run: SmallRun) -> dict[str, torch.Tensor]:
    uri = run_folder.checkpoints(run.recipe.run_dir)[STEPS]
    return load_tensors(storage.local_folder(uri, run.folder / "downloads"), "trainable")


def require_equal(run: SmallRun, straight: SmallRun, *, clock_jumps: bool = False) -> None:
    """The uninterrupted run's prompts, losses and weights, and a step axis without a gap."""
    assert run.status() == "FINISHED"
    assert run.sequence() == straight.sequence()
    points = run.losses()  # by time
    if clock_jumps:
        points.sort()
    assert [step for step, _ in points] == list(range(1, STEPS + 1))
    expected = [loss for _, loss in straight.losses()]
    assert [loss for _, loss in points] == pytest.approx(expected, rel=1e-6)
    ours, theirs = weights(run), weights(straight)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    half = set(storage.list_files(storage.join(run.recipe.run_dir, "checkpoints")))
    assert {name.partition("/")[0] for name in half if name.startswith("step_")} == {
        run_folder.checkpoint_name(step) for step in run_folder.checkpoints(run.recipe.run_dir)
    }, "half checkpoints are left"


# ---------------------------------------------------------------------------------------- MLflow


def test_an_mlflow_server_that_comes_late_and_dies_for_a_minute(
    folder: Path, address: str, tmp_path: Path
) -> None:
    """Promise: needed at the start only; all points arrive once, with the times they had."""
    server = MlflowServer(tmp_path)
    steps = 150
    training = {"steps": steps, "checkpoint_every": 10}
    tracking = {"uri": server.uri}
    run = new_run(folder, address, "mlflow", PACE, training=training, tracking=tracking)
    text = fail(run, 75)
    assert "didn't answer for 20 s: start it, or check tracking.uri" in text
    assert run_folder.read_record(run.recipe.run_dir) is None and not run.lines()
    server.start()
    try:
        server.wait()
        with run.running() as driver:
            wait_until(lambda: run.last_step() >= 5, "at step 5", run)
            server.kill()
            killed, first = time.time(), run.last_step()
            time.sleep(MLFLOW_OUTAGE_SECONDS)
            back, last = time.time(), run.last_step()
            assert driver.poll() is None and last < steps - 1, "the outage came too late"
            assert list(Path(run.recipe.run_dir, "tracking-buffer").iterdir())
            server.start()
            run.finish(driver)
        client, run_id = run._client()
        points = client.get_metric_history(run_id, "loss")
        events = run.events()
    finally:
        server.kill()
    assert last - first > MLFLOW_OUTAGE_SECONDS / PACE / 4, "training waited for the server"
    assert sorted(point.step for point in points) == list(range(1, steps + 1))
    points.sort(key=lambda point: point.step)
    times = [point.timestamp / 1000 for point in points]
    assert times == sorted(times)
    meanwhile = sum(killed < moment < back for moment in times)
    assert abs(meanwhile - (last - first)) <= 2, "points have the times of their steps"
    away = [text for name, text in events if name == "tracking-away"]
    assert len(away) == 1 and away[0].startswith("nothing was delivered for ")
    assert not list(Path(run.recipe.run_dir, "tracking-buffer").iterdir())


# -------------------------------------------------------------------------------- the object store


def s3_run(
    folder: Path, address: str, name: str, root: str, straight: SmallRun, pace: float = 0.0
) -> SmallRun:
    """A run below `root`, where it finds the same store."""
    store = storage.join(root, f"{name}-store")
    for file in storage.list_files(straight.recipe.embed.store):
        content = storage.read_bytes(storage.join(straight.recipe.embed.store, file))
        storage.write_bytes(storage.join(store, file), content)
    run_dir = storage.join(root, name)
    return new_run(folder, address, name, pace, run_dir=run_dir, embed={"store": store})


def is_save(method: str, path: str) -> bool:
    return method in ("PUT", "POST") and "/step_00000010/" in path


def test_an_s3_server_that_dies_in_a_read_and_in_a_save(
    folder: Path, address: str, straight: SmallRun, s3_server: S3Server
) -> None:
    """Promise: back after 20 s, it cost time only; without a restart of the workers."""
    timers: dict[str, threading.Timer] = {}

    def kill_at(method: str, path: str, headers: object) -> None:
        moments = {
            "read": method == "GET" and "-store/shard" in path,
            "save": is_save(method, path),
        }
        for name, now in moments.items():
            if now and name not in timers and not any(t.is_alive() for t in timers.values()):
                timers[name] = threading.Timer(OUTAGE_SECONDS, s3_server.start)
                s3_server.kill()
                timers[name].start()

    with s3_proxy(s3_server) as proxy:
        run = s3_run(folder, address, "s3", s3_uri(proxy.address), straight)
        proxy.answer = kill_at
        complete(run)
        assert set(timers) == {"read", "save"}
        require_equal(run, straight)
        assert list(run_folder.checkpoints(run.recipe.run_dir)) == [STEPS - 5, STEPS]
        assert not {"restart", "controller-failed"} & set(run.names())


def test_keys_that_expire_in_a_run(
    folder: Path, address: str, straight: SmallRun, s3_server: S3Server
) -> None:
    """Promise: it stops, says what to do, and goes on with renewed ones; no endless retries."""
    expired: list[float] = []

    def expire(method: str, path: str, headers: object) -> tuple[int, str, str] | None:
        if not expired and is_save(method, path):
            expired.append(time.monotonic())
        return (400, "ExpiredToken", "The provided token has expired.") if expired else None

    with s3_proxy(s3_server) as proxy:
        run = s3_run(folder, address, "expired", s3_uri(proxy.address), straight)
        proxy.answer = expire
        text = fail(run)
        assert time.monotonic() - expired[0] < 120
        assert "ExpiredToken: the keys have expired: renew them" in text, text
        proxy.answer = lambda *request: None
        assert list(run_folder.checkpoints(run.recipe.run_dir)) == [5]
        complete(run)
        require_equal(run, straight)
        assert ("resume", "from step 5") in run.events()


# ----------------------------------------------------------------------------- a clock that jumps


def points(run: SmallRun, metric: str) -> dict[int, tuple[float, float]]:
    """Step -> value and time (s) of each point."""
    client, run_id = run._client()
    found = client.get_metric_history(run_id, metric)
    return {point.step: (point.value, point.timestamp / 1000) for point in found}


def test_a_clock_that_jumps_while_a_run_trains(
    folder: Path, address: str, straight: SmallRun, s3_server: S3Server
) -> None:
    """Promise: forward and back by an hour, of driver and worker, and nothing but times shows it.

    The lease on S3 stays its driver's, the watchdog sees no stall, all durations are true, and
    every point has the time that the clock showed.
    """
    run = s3_run(folder, address, "jumps", s3_server.uri, straight, 2 * PACE)
    began = time.time()
    run.records.mkdir()
    (run.records / "clock").write_text("0")
    with run.running() as driver:
        for step, offset in JUMPS.items():
            wait_until(lambda step=step: run.last_step() >= step, f"at step {step}", run)
            (run.records / "clock").write_text(str(offset))
        run.finish(driver)
    ended = time.time()
    require_equal(run, straight, clock_jumps=True)
    expected = ["start", "strategy", "attention", *["checkpoint"] * (STEPS // 5)]
    assert sorted(run.names()) == sorted(expected)
    shown = {step: moment for step, (_, moment) in points(run, "loss").items()}
    first, second = JUMPS
    phases = {0: range(1, first + 1), HOUR: range(first + 3, second + 1)}
    for offset, steps in (phases | {-HOUR: range(second + 3, STEPS + 1)}).items():
        assert all(began <= shown[step] - offset <= ended for step in steps), (offset, shown)
    values = [value for value, _ in points(run, "step_seconds").values()]
    assert len(values) == STEPS
    values += [value for value, _ in points(run, "checkpoint_write_seconds").values()]
    assert all(0 < value < 120 for value in values)


# -------------------------------------------------------------------------- a full disk and damage


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs can't be mounted here; run it as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave 4 KiB free; returns the file that takes the rest."""
    ballast = disk / "ballast"
    usage = os.statvfs(disk)
    with ballast.open("wb") as file:
        file.write(bytes(max(usage.f_bavail * usage.f_frsize - 4096, 0)))
    return ballast


def flip_a_byte(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)


def test_a_full_disk_and_then_a_flipped_byte(
    folder: Path, address: str, straight: SmallRun, tmp_path: Path
) -> None:
    """Promise: says so and keeps the checkpoints; damage costs the steps to the one before."""
    with small_disk(tmp_path / "disk", 64) as disk:
        run = new_run(folder, address, "full-disk", PACE, run_dir=str(disk / "run"))
        with run.running() as driver:
            wait_until(lambda: 10 in run_folder.checkpoints(run.recipe.run_dir), "saved", run)
            ballast = fill(disk)
            assert driver.wait(300) == 1, run.log
        text = " ".join(run.log.split())
        assert "could not save checkpoint" in text and "free some space" in text, text
        assert "Earlier checkpoints are as they were" in text
        saved = run_folder.checkpoints(run.recipe.run_dir)
        assert list(saved) == [5, 10]
        assert [verify_checkpoint(Path(uri)).step for uri in saved.values()] == [5, 10]
        ballast.unlink()
        flip_a_byte(Path(saved[10], "__0_0.distcp"))
        complete(run)
        [told] = [text for name, text in run.events() if name == "damaged-checkpoint"]
        assert "step 10: __0_0.distcp has sha256" in told or "__0_0.distcp" in told
        assert "Going on from step 5" in told
        require_equal(run, straight)


def test_a_flipped_byte_in_a_shard_stops_the_run(
    folder: Path, address: str, straight: SmallRun
) -> None:
    """Promise: file and row group are named; the mended store goes on in the same run."""
    store = folder / "damaged-store"
    shutil.copytree(straight.recipe.embed.store, store)
    shard = sorted(store.rglob("shard-*"))[0]
    flip_a_byte(shard, 0.2)
    run = new_run(folder, address, "damaged-shard", embed={"store": str(store)})
    text = fail(run)
    assert f"cannot read row group 0 of {shard.relative_to(store)}" in text, text
    assert "piflow embed" in text
    shutil.copy(Path(straight.recipe.embed.store, shard.relative_to(store)), shard)
    complete(run)
    require_equal(run, straight)
    os.truncate(shard, shard.stat().st_size // 2)
    again = new_run(folder, address, "cut-shard", embed={"store": str(store)})
    text = fail(again)
    assert str(shard.relative_to(store)) in text and "piflow embed" in text, text
    assert run_folder.read_record(again.recipe.run_dir) is None, "refused before anything started"

"""Submitting, attaching and stopping, as a job server in memory sees them.

tests/cluster/test_submit.py does the same on a real cluster; here are the ways that it can go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from piflow.commands import jobs, submit
from piflow.config import Recipe, load_recipe
from piflow.jobs.arrival import ARRIVED
from piflow.jobs.fit import DoesNotFitError
from piflow.runtime import job_server
from piflow.runtime.job_server import Cluster, Job, JobTakenError, Node
from piflow.storage import foreign

REPOSITORY = Path(__file__).parents[3]
CPUS = Cluster((Node("head", 2),), may_grow=False)


class Server:
    """Jobs that somebody submitted; they run until they are stopped."""

    address = "http://head:8265"

    def __init__(self) -> None:
        self.known: dict[str, Job] = {}
        self.sent: list[tuple[str, set[str]]] = []
        self.machines = CPUS
        self.printed = f"{ARRIVED}0.1.0 with Python 3.11\n"
        self.faster: Job | None = None  # of somebody who submits at the same time
        self.last_word = ""

    def jobs(self) -> list[Job]:
        return list(self.known.values())

    def job(self, job_id: str) -> Job:
        return self.known[job_id]

    def page(self, job_id: str) -> str:
        return f"{self.address}/#/jobs/{job_id}"

    def cluster(self) -> Cluster:
        return self.machines

    def log(self, job_id: str) -> str:
        return self.printed

    def submit(
        self, job_id: str, entrypoint: str, folder: str, *, grace: int, metadata: Mapping[str, str]
    ) -> None:
        if self.faster is not None:
            self.known[job_id] = replace(self.faster, id=job_id, metadata=metadata)
            self.faster = None
        if job_id in self.known:
            raise JobTakenError(job_id)
        self.sent.append((entrypoint, {path.name for path in Path(folder).iterdir()}))
        self.known[job_id] = Job(job_id, "RUNNING", metadata, entrypoint, grace)

    def stop(self, job_id: str) -> None:
        self.known[job_id] = replace(self.known[job_id], status="STOPPED")
        self.printed += self.last_word


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(job_server, "connect", lambda address: server)
    return server


def recipe(*overrides: str) -> Recipe:
    places = ["run_dir=/shared/run", "embed.store=/shared/store"]
    return load_recipe(REPOSITORY / "pipelines/recipes/emoji-flux.yaml", [*places, *overrides])


def test_a_run_has_one_job_at_a_time(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(recipe(), stages="embed") == 0
    (first,) = server.known
    assert server.sent[0][1] == {"recipe.yaml", "piflow_arrival.py"}
    assert server.sent[0][0].endswith(" && piflow embed recipe.yaml")
    capsys.readouterr()
    assert submit.main(recipe("runtime.max_failures=9"), stages="embed") == 0
    told = capsys.readouterr().out
    assert f"{first} of this run is running: attached" in told and "other files or options" in told
    assert submit.main(recipe("seed=3"), stages="embed") == 0
    assert len(server.sent) == 2, "another run has a job of its own"
    server.known[first] = replace(server.known[first], status="STOPPED")
    assert submit.main(recipe(), stages="embed") == 0
    assert f"{first.removesuffix('1')}2" in server.known


def test_of_two_who_submit_at_once_one_attaches(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faster = Job("theirs", "PENDING", {})
    assert submit.main(recipe(), stages="embed") == 0
    assert "is pending: attached to it" in capsys.readouterr().out and server.sent == []


def test_a_job_that_cannot_fit_is_not_sent(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_gpu = recipe("embed.gpus_per_encoder=1")
    with pytest.raises(DoesNotFitError, match=r"fits with --set embed\.gpus_per_encoder=0"):
        submit.main(needs_gpu, stages="embed")
    assert server.sent == []
    assert submit.main(needs_gpu, stages="embed", wait_for_nodes=True) == 0
    assert "waits up to 1800 s" in capsys.readouterr().out


def test_who_holds_the_machines_is_told(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(recipe(), stages="embed") == 0
    assert "on this cluster" not in capsys.readouterr().out
    (first,) = server.known
    assert submit.main(recipe("seed=3"), stages="embed") == 0
    told = capsys.readouterr().out
    assert f"another job is on this cluster ({first})" in told
    assert "up to 1800 s" in told and "exit code 69" in told
    server.known = {key: replace(job, status="SUCCEEDED") for key, job in server.known.items()}
    assert submit.main(recipe("seed=4"), stages="embed") == 0
    assert "on this cluster" not in capsys.readouterr().out


def test_an_autoscaler_may_bring_machines(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.machines = replace(CPUS, may_grow=True)
    assert submit.main(recipe("embed.gpus_per_encoder=1"), stages="embed") == 0
    assert "asks for machines as it comes to the stage" in capsys.readouterr().out


def test_what_an_autoscaler_may_bring_is_in_the_values(server: Server) -> None:
    values = REPOSITORY / "cluster/values.yaml"
    many = recipe("embed.encoders=[1, 100000]")
    with pytest.raises(ValueError, match=r"raise cpu_machines\.most, or ask for fewer"):
        submit.main(many, stages="embed", values=values)
    assert server.sent == []


def test_an_image_that_cannot_run_the_job_ends_it(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.printed = "noise\npiflow: the cluster has piflow 9.9 \x1b[31m\n"
    known = server.job

    def ended(job_id: str) -> Job:
        return replace(known(job_id), status="FAILED", exit_code=1)

    monkeypatch.setattr(server, "job", ended)
    assert submit.main(recipe(), stages="embed") == 1
    assert "piflow: the cluster has piflow 9.9 \\x1b[31m" in capsys.readouterr().out


def test_a_stop_tells_what_was_saved(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    submit.main(recipe(), stages="embed", stop_seconds=77)
    (job,) = server.known
    server.last_word = "piflow: stopped by SIGTERM: step 7 is saved. The same command goes on\n"
    assert jobs.stop(job) == 0
    told = capsys.readouterr().out
    assert "it has 77 s to save" in told and "stopped by SIGTERM: step 7 is saved" in told
    assert jobs.stop(job) == 0
    assert "has ended: stopped, exit code 143" in capsys.readouterr().out


def test_a_job_that_had_no_time_to_save_is_told(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    submit.main(recipe(), stages="embed")
    (job,) = server.known
    assert jobs.stop(job) == 1
    assert "without a word on a last save" in capsys.readouterr().out


def test_jobs_of_others_are_not_listed(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    submit.main(recipe(), stages="embed")
    server.known["raysubmit_x"] = Job("raysubmit_x", "RUNNING", {})
    capsys.readouterr()
    (job,) = jobs.show()
    assert job.id in server.known and "raysubmit_x" not in capsys.readouterr().out


def test_places_of_this_machine_start_nothing(server: Server) -> None:
    with pytest.raises(ValueError, match="on this machine only"):
        submit.main(load_recipe(REPOSITORY / "pipelines/recipes/emoji-flux.yaml"))
    assert server.sent == []


def test_a_log_cannot_take_over_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    submit.write_log("one\n\x1b]0;title\x07two\n")
    assert capsys.readouterr().out == f"one\n{foreign.shown(chr(27) + ']0;title' + chr(7))}two\n"

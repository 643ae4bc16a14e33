"""A driver in a Ray job: paths that must last, and the grace of `ray job stop`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from piflow import cli
from piflow.runtime import ray_job

RECIPE = str(Path(__file__).parents[3] / "pipelines/recipes/emoji-flux.yaml")
PACKAGE = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1"


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> bool:
    """Whether the command ends with a mistake's code before it does anything."""
    monkeypatch.setattr(sys, "argv", ["piflow", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["distill", RECIPE], "--set run_dir=/shared"),
        (["embed", RECIPE, "--set", "run_dir=/d"], "--set embed.store=/shared"),
        (
            ["evaluate", RECIPE, "--set", "run_dir=/d", "--set", "embed.store=s3://bucket/store",
             "--set", f"tracking.uri=sqlite:///{PACKAGE}/mlflow.db"],
            "--set tracking.uri=/shared",
        ),
        (["pretrain", RECIPE, "--set", f"run_dir={PACKAGE}/run"], "--set run_dir=/shared"),
        (
            ["export", RECIPE, "--set", "run_dir=/d", "--set", "embed.store=/d", "--out", "here"],
            "--out /shared",
        ),
        (["sample", "/adapter", "--prompt", "a cat"], "--out /shared"),
        (["smoke", RECIPE, "--keep", "here"], "--keep /shared"),
    ],
)  # fmt: skip
def test_a_ray_job_keeps_nothing_in_its_package(
    arguments: list[str],
    expected: str,
    job: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refused(monkeypatch, *arguments)
    message = capsys.readouterr().err
    assert "of this Ray job's package" in message and expected in message


def test_places_that_last_are_taken(job: None) -> None:
    places = ("/shared/run", "file:///shared/run", "s3://bucket/run", "hf://owner/name")
    ray_job.require_lasting(dict(zip("abcd", places, strict=True)))


def test_outside_of_a_job_relative_paths_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    ray_job.require_lasting({"run_dir": "runs/here"})
    assert ray_job.grace_told() is None
    assert ray_job.stopping_told(7.2) == ", which takes about 7 s"


def test_the_grace_of_a_job_is_told(job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = """{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}"""
    assert variable in (ray_job.grace_told() or "")
    told = ray_job.stopping_told(40.0)
    assert told.startswith(", which takes about 40 s; Ray's job server kills this process after 3")
    assert '"120"' in told
    assert ray_job.stopping_told(2.0) == ", which takes about 2 s"
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "300")
    assert ray_job.grace_told() is None
    assert ray_job.stopping_told(40.0) == ", which takes about 40 s"

"""No password, key or token of a recipe or of the environment ends up where others read it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from piflow import cli, storage
from piflow.config import RecipeError, load_recipe, parse_recipe
from piflow.storage.foreign import redacted

SECRET = "hunter2Xq"
MINIMAL: dict[str, Any] = {
    "name": "test",
    "run_dir": "runs/test",
    "model": {"path": "teacher"},
    "encoder": {"path": "encoder"},
    "embed": {"prompts": "prompts.txt", "store": "store", "height": 32, "width": 32},
}
PLACES = [
    ("run_dir",),
    ("model", "path"),
    ("model", "vae"),
    ("encoder", "path"),
    ("embed", "prompts"),
    ("embed", "store"),
    ("evaluation", "prompt_list"),
    ("tracking", "uri"),
]
HOLDERS = [
    "s3://AKIAKEY:{}@bucket/prefix",
    "s3://AKIAKEY:a/{}@bucket/prefix",
    "s3://AKIAKEY:{}",
    "s3://bucket/prefix?access_key=AKIAKEY&secret_key={}",
    "s3://bucket/prefix?endpoint_override=user:{}@host:80",
    "s3://bucket/prefix?endpoint_override=user:{}%40host:80",
    "s3:/AKIAKEY:{}@bucket/prefix",
    "S3://AKIAKEY:{}@bucket/prefix",
    "https://user:{}@host/path",
    "https://{}@host/path",
    "https://user:a/{}@host/path",
    "https://host/path?token={}",
    "hf://user:{}@owner/name",
    "hf://{}@owner/name",
    "postgresql://user:{}@host/mlflow",
    "postgresql://user:a@b/{}@host/mlflow",
    "postgresql+psycopg://user:{}@host/mlflow",
    "postgresql://host/mlflow?user=u&password={}",
    "mysql+pymysql://user:{}@host/mlflow",
    "mssql+pyodbc:///?odbc_connect=PWD%3D{}",
    "gs://user:{}@bucket/x",
    "https://us er:{}@host",
    "https://user:\n{}@host",
]


def with_value(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    tree = json.loads(json.dumps(MINIMAL))
    section = tree
    for key in place[:-1]:
        section = section.setdefault(key, {})
    section[place[-1]] = value
    return tree


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_no_key_takes_a_secret_and_no_refusal_repeats_it(
    place: tuple[str, ...], holder: str
) -> None:
    for value in (holder.format(SECRET), [holder.format(SECRET)]):
        with pytest.raises(RecipeError) as caught:
            parse_recipe(with_value(place, value))
        assert SECRET not in str(caught.value) and ".".join(place) in str(caught.value)


@pytest.mark.parametrize("holder", HOLDERS)
def test_storage_repeats_no_secret(holder: str) -> None:
    uri = holder.format(SECRET)
    assert SECRET not in redacted(uri)
    for action in (storage.filesystem, storage.exists, storage.local_folder, storage.delete_folder):
        with pytest.raises(ValueError) as caught:
            action(uri)
        assert SECRET not in str(caught.value)
    with pytest.raises(ValueError) as caught:
        storage.write_bytes(uri, b"")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "runs/a b@c",
        "s3://bucket/a@b/c?endpoint_override=host:80&scheme=http&region=r",
        "hf://owner/name@v1/transformer",
        "hf://datasets/owner/name@refs%2Fconvert/a.parquet",
        "postgresql://host:5432/mlflow?sslmode=require",
        "sqlite:////runs/mlflow.db",
        "https://host:5000/path",
    ],
)
def test_what_holds_no_secret_is_shown_as_it_is(uri: str) -> None:
    assert redacted(uri) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://user@host:5432/mlflow?sslmode=require",
        "mysql+pymysql://user@host/mlflow?read_default_file=/home/me/.my.cnf",
        "https://host:5000",
    ],
)
def test_a_tracking_database_without_its_password_is_taken(uri: str) -> None:
    assert parse_recipe({**MINIMAL, "tracking": {"uri": uri}}).tracking.uri == uri


@pytest.mark.parametrize("holder", [HOLDERS[0], HOLDERS[4], HOLDERS[8], HOLDERS[14]])
def test_no_command_prints_a_secret(
    holder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the file, of an override, of one with a wrong key; and no file is left that holds it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    uri = holder.format(SECRET)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(with_value(("tracking", "uri"), uri)))
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump(MINIMAL))
    for arguments in (
        ["recipe", str(recipe)],
        ["check", str(recipe)],
        ["recipe", str(plain), "--set", f"run_dir={uri}"],
        ["recipe", str(plain), "--set", f"tracking.uri=[{uri}"],
        ["recipe", str(plain), "--set", f"trackin.uri={uri}"],
        ["recipe", str(plain), "--set", f"name.x={uri}"],
        ["sample", uri, "--prompt", "x"],
        ["export", str(plain), "--checkpoint", uri],
    ):
        monkeypatch.setattr(sys, "argv", ["piflow", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != recipe]
    assert all(SECRET.encode() not in path.read_bytes() for path in written)


def test_environment_keys_are_in_nothing_that_a_run_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a real MLflow run in SQLite: its database, artifacts, the run's folder, the terminal."""
    from piflow.runs import folder, tracking

    names = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "PGPASSWORD")
    for name in (*names, "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "run_dir": str(tmp_path / "run")}))
    recipe = load_recipe(path)
    uri = tracking.default_tracking_uri(recipe.run_dir)
    params = recipe.model_dump(mode="json")
    run_id = tracking.start(uri, "secrets", recipe.name, params, {"recipe": recipe.hash()})
    record = folder.RunRecord(recipe.hash(), recipe.identity(), uri, run_id, "manifest")
    folder.write_record(recipe.run_dir, record)
    tracker = tracking.MlflowTracker(uri, run_id, recipe.run_dir)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.close()
    written = [item for item in tmp_path.rglob("*") if item.is_file()]
    assert any(item.name == "mlflow.db" for item in written)
    assert all(SECRET.encode() not in item.read_bytes() for item in written)
    out, err = capfd.readouterr()
    assert SECRET not in out + err

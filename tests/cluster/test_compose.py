"""infra/compose.yaml's services by its own commands, checks and variables, without containers.

There is no Docker engine to run the images. What runs here is PostgreSQL, SeaweedFS, MLflow and
Prometheus of this machine: what the file says of them fits together, and passwords are asked for.
Names of hosts and folders of containers are replaced, and nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import one_run
from tests.monitoring import INFRA
from tests.servers import Server

SECRETS = {
    name: f"only-for-tests-{name.lower()}"
    for name in re.findall(r"^(\w+)=", (INFRA / "compose.env.example").read_text(), re.M)
}
SERVICES = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
URI = "http://127.0.0.1:5000"
HOSTS = {"@postgres:": "@127.0.0.1:", "seaweedfs:8333": "127.0.0.1:8333"}

pytestmark = pytest.mark.skipif(
    "PIFLOW_ISOLATED" not in os.environ, reason="its ports are the shipped ones: make test-cluster"
)


def postgres_folder() -> Path:
    """Of PostgreSQL's programs, which Debian keeps off the PATH."""
    (*_, newest) = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return newest


def as_somebody(*command: str | Path) -> list[str]:
    """PostgreSQL refuses to run as root."""
    words = [str(word) for word in command]
    return ["runuser", "-u", "postgres", "--", *words] if os.getuid() == 0 else words


@dataclass
class Service(Server):
    """One of the file's services.

    Args:
        replaced: the container's hosts and folders, by what stands for them here.
    """

    name: str = ""
    replaced: dict[str, str] | None = None

    def local(self, text: str) -> str:
        """What the file says, with secrets filled in, here."""
        text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: SECRETS[found[1]], text)
        for there, here in (HOSTS | (self.replaced or {})).items():
            text = text.replace(there, here)
        return text

    def command(self) -> list[str]:
        words = [self.local(word) for word in SERVICES[self.name]["command"]]
        if self.name == "mlflow":
            return [sys.executable, "-m", *words]
        if self.name == "seaweedfs":
            return [str(Path(sys.executable).with_name("weed")), *words]
        return [self.name, *words]

    def environment(self) -> dict[str, str]:
        variables = SERVICES[self.name].get("environment", {})
        return {name: self.local(value) for name, value in variables.items()}

    def answers(self) -> bool:
        """By the file's own health check."""
        program, *arguments = (
            self.local(word) for word in SERVICES[self.name]["healthcheck"]["test"][1:]
        )
        programs = {"python": sys.executable, "pg_isready": str(postgres_folder() / "pg_isready")}
        check = [programs.get(program, program), *arguments]
        return subprocess.run(check, capture_output=True, timeout=60).returncode == 0


@dataclass
class PostgreSQL(Service):
    """The image makes user and database of variables; here initdb and psql do."""

    def command(self) -> list[str]:
        data = self.folder / "data"
        return as_somebody(
            postgres_folder() / "postgres", "-D", data, "-k", data, "-h", "127.0.0.1"
        )

    def prepare(self) -> None:
        data, password = self.folder / "data", self.folder / "password"
        data.mkdir()
        password.write_text(self.environment()["POSTGRES_PASSWORD"])
        if os.getuid() == 0:
            for path in (data, password):
                shutil.chown(path, "postgres")
            for path in data.parents[:3]:  # pytest's folders are the user's alone
                path.chmod(0o755)
        user = self.environment()["POSTGRES_USER"]
        options = [f"--username={user}", f"--pwfile={password}", "--auth=scram-sha-256"]
        initdb = as_somebody(postgres_folder() / "initdb", "-D", data, *options)
        subprocess.run(initdb, check=True, capture_output=True, timeout=120)

    def answers(self) -> bool:
        if not super().answers():
            return False
        variables = self.environment()
        name = variables["POSTGRES_DB"]
        connection = ["--host=127.0.0.1", f"--username={variables['POSTGRES_USER']}", name]
        made = subprocess.run(
            [postgres_folder() / "createdb", *connection],
            env=os.environ | {"PGPASSWORD": variables["POSTGRES_PASSWORD"]},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return made.returncode == 0 or "already exists" in made.stderr


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    """Started in their order, each when the one before is healthy."""
    folders = {name: tmp_path_factory.mktemp(name) for name in SERVICES if name != "grafana"}
    auth = folders["mlflow"] / "basic_auth.ini"
    weed = {"-ip=seaweedfs": "-ip=127.0.0.1", "-dir=/data": f"-dir={folders['seaweedfs']}"}
    prometheus = {
        "/etc/prometheus/": f"{INFRA}/prometheus/",
        "path=/prometheus": f"path={folders['prometheus']}/data",
    }
    postgres = PostgreSQL(folders["postgres"], name="postgres")
    mlflow = Service(folders["mlflow"], name="mlflow", replaced={"/etc/mlflow": str(auth.parent)})
    auth.write_text(mlflow.local((INFRA / "mlflow" / "basic_auth.ini").read_text()))
    postgres.prepare()
    started = [
        postgres,
        Service(folders["seaweedfs"], name="seaweedfs", replaced=weed),
        mlflow,
        Service(folders["prometheus"], name="prometheus", replaced=prometheus),
    ]
    with ExitStack() as stack:
        yield {service.name: stack.enter_context(service.running()) for service in started}


def log_to_mlflow(password: str, folder: Path, name: str) -> subprocess.Popen[str]:
    login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, one_run.__file__, URI, str(folder / name), name, "shared"],
        env=os.environ | login | paths,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_mlflow_keeps_two_runs_at_once_in_postgresql_and_s3(
    services: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    password = SECRETS["MLFLOW_PASSWORD"]
    processes = [log_to_mlflow(password, tmp_path, name) for name in ("first", "second")]
    ended = [process.communicate(timeout=280) for process in processes]
    for process, (_, told) in zip(processes, ended, strict=True):
        assert process.returncode == 0, told
    runs = [out.split()[-1] for out, _ in ended]
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    client = MlflowClient(tracking_uri=URI, registry_uri=URI)
    for run_id in runs:
        points = client.get_metric_history(run_id, "loss")
        assert sorted(point.step for point in points) == list(range(1, one_run.STEPS + 1))
        assert Path(client.download_artifacts(run_id, "evaluation/report.html")).exists()
    versions = client.search_model_versions("name = 'shared'")
    assert {item.run_id for item in versions} == set(runs) and len(versions) == 2
    assert not list(services["mlflow"].folder.glob("*.db")), "nothing in SQLite"


def test_mlflow_refuses_another_password(services: dict[str, Any], tmp_path: Path) -> None:
    process = log_to_mlflow("another", tmp_path, "refused")
    _, told = process.communicate(timeout=280)
    assert process.returncode != 0 and "401" in told


def test_no_password_is_in_a_command(services: dict[str, Any]) -> None:
    for service in services.values():
        assert not [
            word for word in service.command() for value in SECRETS.values() if value in word
        ]

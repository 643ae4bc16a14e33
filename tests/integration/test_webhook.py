"""An alias moves, a real MLflow server calls, and the receiver of docs/registry.md serves it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from cryptography.fernet import Fernet

from piflow.commands import promote
from piflow.commands.export import served_by_mlflow
from piflow.config import Recipe, load_recipe
from piflow.runs import folder as run_folder
from piflow.runs import tracking
from piflow.runs.folder import RunRecord
from piflow.runs.registry import register_adapter
from tests.servers import MlflowServer, free_ports

pytestmark = pytest.mark.timeout(300)
REPOSITORY = Path(__file__).parents[2]
SECRET = "shared with the receiver alone"
MODEL = "served"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    settings = {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
    }
    folder = tmp_path_factory.mktemp("mlflow")
    with MlflowServer(folder, settings=settings).running() as server:
        yield server


class Receiver:
    """The page's program, and what it prints."""

    def __init__(self, folder: Path, tracking_uri: str) -> None:
        (code,) = re.findall(
            r"^```python\n(.*?)^```$",
            (REPOSITORY / "docs" / "registry.md").read_text(),
            re.M | re.S,
        )
        program = folder / "receiver.py"
        program.write_text(code)
        port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{port}/"
        environment = {
            "MODEL": MODEL,
            "PORT": str(port),
            "WEBHOOK_SECRET": SECRET,
            "MLFLOW_TRACKING_URI": tracking_uri,
            "PYTHONPATH": str(REPOSITORY),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(program)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("w"),
            text=True,
        )
        self.lines: Queue[str] = Queue()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        self._wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)

    def _wait(self) -> None:
        for _ in range(240):
            try:
                self.post({}, b"")
            except OSError:
                time.sleep(0.5)
            else:
                return
        pytest.fail("the receiver did not start")

    def post(self, headers: dict[str, str], body: bytes) -> int:
        """The status of its answer."""
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def served(self) -> str:
        """What the adapter says of itself that was fetched next."""
        folder = self.lines.get(timeout=120).strip().removeprefix("serving ")
        return str(json.loads((Path(folder) / "config.json").read_text())["named"])


@pytest.fixture(scope="module")
def receiver(server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path_factory.mktemp("receiver"), server.uri)
    yield receiver
    receiver.process.kill()
    receiver.process.wait(20)
    receiver.thread.join(20)


@pytest.fixture(scope="module")
def client(server: MlflowServer) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.uri, registry_uri=server.uri)


@pytest.fixture(scope="module")
def webhook(client: Any, receiver: Receiver) -> Any:
    events = ["model_version_alias.created"]
    return client.create_webhook("deploy", receiver.url, events, secret=SECRET)


@pytest.fixture(scope="module")
def recipe(server: MlflowServer, webhook: Any, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run with two versions, whose recipe asks for nothing."""
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "run_dir": folder,
        "tracking.uri": server.uri,
        "tracking.model_name": MODEL,
        "registry.gates": "[]",
    }
    recipe = load_recipe(
        REPOSITORY / "pipelines" / "recipes" / "emoji-flux.yaml",
        [f"{key}={value}" for key, value in settings.items()],
    )
    run_id = tracking.start(server.uri, "webhooks", "small", {}, {})
    record = RunRecord(recipe.hash(), recipe.identity(), server.uri, run_id, "ab" * 32)
    run_folder.write_record(recipe.run_dir, record)
    for step in (1, 2):
        adapter = folder / f"adapter-{step}"
        adapter.mkdir()
        (adapter / "config.json").write_text(json.dumps({"named": f"student {step}"}))
        tags = {
            "piflow.recipe_hash": recipe.hash(),
            "piflow.checkpoint": run_folder.checkpoint_name(step),
            "piflow.weights": "ema",
        }
        served = served_by_mlflow([], "what", step)
        register_adapter(server.uri, run_id, adapter, MODEL, tags, "newest", served)
    return recipe


def signed(content: dict[str, Any], secret: str, age: int = 0) -> tuple[dict[str, str], bytes]:
    body, stamp = json.dumps(content), str(int(time.time()) - age)
    digest = hmac.new(secret.encode(), f"forged.{stamp}.{body}".encode(), hashlib.sha256).digest()
    headers = {
        "X-MLflow-Signature": f"v1,{base64.b64encode(digest).decode()}",
        "X-MLflow-Timestamp": stamp,
        "X-MLflow-Delivery-Id": "forged",
    }
    return headers, body.encode()


def test_what_is_promoted_is_served_and_so_is_what_a_rollback_brings_back(
    recipe: Recipe, receiver: Receiver
) -> None:
    assert promote.main(recipe, version=1) == 1
    assert receiver.served() == "student 1"
    assert promote.main(recipe) == 2
    assert receiver.served() == "student 2"
    assert promote.roll_back(recipe) == 1
    assert receiver.served() == "student 1"
    assert receiver.lines.empty(), "nothing for the alias newest"


def test_the_receiver_believes_its_server_alone(
    recipe: Recipe, receiver: Receiver, client: Any, webhook: Any
) -> None:
    event = "model_version_alias.created"
    assert client.test_webhook(webhook.webhook_id, event).response_status == 204
    other = client.create_webhook("of-others", receiver.url, [event], secret="another secret")
    assert client.test_webhook(other.webhook_id, event).response_status == 401
    unsigned = client.create_webhook("unsigned", receiver.url, [event])
    assert client.test_webhook(unsigned.webhook_id, event).response_status == 401

    data = {"name": MODEL, "alias": "champion", "version": "2"}
    moved = {"entity": "model_version_alias", "action": "created", "data": data}
    assert receiver.post(*signed(moved, "another secret")) == 401
    assert receiver.post(*signed(moved, SECRET, age=600)) == 401
    headers, body = signed(moved, SECRET)
    assert receiver.post(headers, body.replace(b"champion", b"champiom")) == 401
    assert receiver.post({**headers, "Content-Length": str(2**20 + 1)}, body) == 413
    assert receiver.lines.empty()
    assert receiver.post(headers, body) == 204
    assert receiver.served() == "student 1", "what the alias is now, not what the message names"

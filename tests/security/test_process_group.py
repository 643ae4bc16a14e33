"""What training listens on: the cluster's address, not every one of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import os, psutil
import torch.distributed as dist
from ray._common.network_utils import find_free_port
from piflow.runtime.process_group import listen_on_given_address
{bind}
os.environ |= {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}}
os.environ |= {{"GLOO_SOCKET_IFNAME": "lo"}}
dist.init_process_group("gloo", rank=0, world_size=1)
dist.barrier()
sockets = psutil.Process().net_connections("tcp")
print(sorted({{item.laddr.ip for item in sockets if item.status == psutil.CONN_LISTEN}}))
"""


@pytest.mark.parametrize("bind", ["listen_on_given_address()", "pass"])
def test_the_meeting_point_listens_on_its_own_address_only(bind: str) -> None:
    """torch itself listens everywhere, which shows that the test sees it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(bind=bind)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
        timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    everywhere = "::" in done.stdout or "0.0.0.0" in done.stdout
    assert everywhere == (bind == "pass"), done.stdout

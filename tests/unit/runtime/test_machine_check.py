"""`piflow preflight`: what is measured, what it is taken for, and that each check can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.commands import preflight
from piflow.config import PreflightConfig, Recipe, RuntimeConfig, load_recipe
from piflow.config.section import RecipeError
from piflow.runtime import machine_probe
from piflow.runtime.machine_check import Check, judge
from piflow.runtime.machine_probe import Findings, memory_errors, told_errors, wrong_products
from piflow.runtime.nccl_log import NcclNetwork, keep_nccl_log, network_of, read_nccl_log

REPOSITORY = Path(__file__).parents[3]
IB = NcclNetwork("IB", ("NET/IB/GDRDMA", "P2P"), "")
EFA_LOG = """
ip-10-0-0-1:172:172 [0] NCCL INFO NET/Plugin: Loaded net plugin Libfabric (v11)
ip-10-0-0-1:172:172 [0] NCCL INFO Using network Libfabric
ip-10-0-0-1:172:172 [0] NCCL INFO NET/OFI Selected provider is efa, fabric is efa (found 32 nics)
ip-10-0-0-1:172:172 [0] NCCL INFO Channel 03/0 : 3[3] -> 14[6] [send] via NET/Libfabric/3/GDRDMA
ip-10-0-0-1:172:172 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
"""
TCP_LOG = """
node:1482:1482 [0] NCCL INFO NET/IB : No device found.
node:1482:1482 [0] NCCL INFO Using network Socket
node:1482:1482 [0] NCCL INFO Channel 00/0 : 17[1] -> 0[0] [receive] via NET/Socket/0
"""


def machines(**changes: Any) -> list[Findings]:
    """Two healthy machines, of which the second is as `changes` say."""
    first = Findings(0, "a (10.0.0.1)", "H100", 0, [], 40.0, IB, 0.0, 900.0, 1200.0)
    return [first, replace(first, rank=1, machine="b (10.0.0.2)", **changes)]


def checked(found: list[Findings], **wanted: Any) -> dict[str, Check]:
    runtime = RuntimeConfig(num_workers=2, use_gpu=True, preflight=PreflightConfig(**wanted))
    return {check.name: check for check in judge(found, runtime)}


STRICT = {"transport": "rdma", "allreduce_gb_s": 30.0, "storage_mb_s": 500.0, "clock_s": 1.0}


def test_healthy_machines_pass_every_check() -> None:
    checks = checked(machines(), **STRICT)
    assert all(check.ok for check in checks.values()), checks
    assert checks["devices"].found == "2 x H100 on 2 machine(s)"


@pytest.mark.parametrize(
    ("name", "planted", "told"),
    [
        ("devices", {"device": "cpu"}, "rank 1"),
        ("matrix products", {"wrong_products": 3}, "rank 1 on b (10.0.0.2)"),
        ("GPU memory", {"memory_errors": ["uncorrected ECC errors: 2"]}, "rank 1 on b"),
        ("all-reduce", {"allreduce_gb_s": 29.9}, ""),
        ("transport", {"network": NcclNetwork("Socket", (), "")}, "rank 1 on b"),
        ("transport", {"network": NcclNetwork("", (), "")}, "NCCL uses unknown"),
        ("transport", {"network": None}, "rank 1 on b"),
        ("storage", {"write_mb_s": 499.0}, "b (10.0.0.2) writes 499 MB/s"),
        ("storage", {"read_mb_s": 499.0}, "b (10.0.0.2) reads 499 MB/s"),
        ("storage", {"storage_problem": "can't write: no"}, "b (10.0.0.2) can't write: no"),
        ("clocks", {"clock_s": -1.5}, "b (10.0.0.2): -1.5 s"),
    ],
)
def test_a_planted_fault_fails_its_check_and_no_other(
    name: str, planted: dict[str, Any], told: str
) -> None:
    checks = checked(machines(**planted), **STRICT)
    assert [check.name for check in checks.values() if not check.ok] == [name]
    assert told in " ".join(checks[name].where)


def test_gpus_of_two_kinds_are_told_and_pass() -> None:
    devices = checked(machines(device="A100"))["devices"]
    assert devices.ok and devices.found.startswith("2 x A100, H100 on 2 machine(s); the slowest")


def test_without_floors_slow_and_tcp_pass() -> None:
    slow = {"allreduce_gb_s": 0.01, "read_mb_s": 1.0, "network": network_of(TCP_LOG)}
    assert all(check.ok for check in checked(machines(**slow)).values())


def test_a_floor_that_nothing_was_measured_against_fails() -> None:
    (alone, _) = machines()
    checks = checked([replace(alone, allreduce_gb_s=None)], allreduce_gb_s=1.0)
    assert not checks["all-reduce"].ok and "not measured" in checks["all-reduce"].found


def test_memory_that_nothing_is_known_of_is_told_and_passes() -> None:
    memory = checked(machines(memory_errors=None))["GPU memory"]
    assert memory.ok
    first = [replace(one, memory_errors=None) for one in machines()]
    assert "unknown" in checked(first)["GPU memory"].found


# ------------------------------------------------------------------------------------ NCCL's log


def test_efa_is_rdma_and_a_fallback_is_not() -> None:
    efa, tcp = network_of(EFA_LOG), network_of(TCP_LOG)
    assert efa == NcclNetwork("Libfabric", ("NET/Libfabric/GDRDMA", "P2P"), "efa") and efa.is_rdma
    assert tcp == NcclNetwork("Socket", ("NET/Socket",), "") and not tcp.is_rdma


@pytest.mark.parametrize(
    "log",
    [
        EFA_LOG.replace("provider is efa", "Provider is sockets"),
        EFA_LOG.replace("provider is efa", "provider is tcp;ofi_rxm"),
        EFA_LOG.replace("via NET/Libfabric/3/GDRDMA", "via NET/Socket/0"),
        "",
        "node:1:1 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM",
    ],
)
def test_a_log_that_shows_tcp_or_nothing_is_no_rdma(log: str) -> None:
    assert not network_of(log).is_rdma


def test_infiniband_is_rdma_with_and_without_direct_access_to_gpus() -> None:
    log = TCP_LOG.replace("Socket", "IB")
    assert network_of(log).is_rdma
    assert network_of(log.replace("NET/IB/0", "NET/IB/0/GDRDMA")).channels == ("NET/IB/GDRDMA",)


def test_nccl_is_told_where_to_log(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE"):
        monkeypatch.setenv(name, "a user's own")
    monkeypatch.delenv("NCCL_NET", raising=False)
    file = keep_nccl_log()
    assert os.environ["NCCL_DEBUG"] == "INFO" and os.environ["NCCL_DEBUG_FILE"] == str(file)
    assert read_nccl_log(file).chosen == ""  # NCCL hasn't started
    file.write_text(TCP_LOG)
    monkeypatch.setenv("NCCL_NET", "Socket")
    told = read_nccl_log(file)
    assert told.chosen == "Socket" and "(NCCL_NET=Socket is set)" in str(told)


# -------------------------------------------------------------------------------- the measuring


def test_products_are_exact_and_one_wrong_element_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong_products(torch.device("cpu")) == 0
    multiply = torch.mm
    calls = iter(range(100))

    def damaged(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = multiply(a, b)
        if next(calls) == 3:
            product[7, 11] += 1
        return product

    monkeypatch.setattr(torch, "mm", damaged)
    assert wrong_products(torch.device("cpu")) == 1


def test_errors_of_a_gpus_memory_are_told() -> None:
    assert told_errors("0, No, No, No\n") == []
    assert told_errors("0, [N/A], No, No\n") == []
    assert told_errors("[N/A], [N/A], [N/A], [N/A]\n") is None
    assert told_errors("Unable to determine the device handle\n") is None
    assert told_errors("2, No, Yes, No\n") == [
        "uncorrected ECC errors since the driver's start: 2",
        "memory rows to be remapped at the next reset: Yes",
    ]


def test_nvidia_smi_is_asked_for_the_workers_own_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Properties:
        uuid = "12345678-9abc-def0-1234-56789abcdef0"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    stand_in = tmp_path / "nvidia-smi"
    stand_in.write_text(f'#!/bin/sh\ntest "$2" = GPU-{Properties.uuid} && echo 1, No, No, No\n')
    stand_in.chmod(0o755)
    (told,) = memory_errors(torch.device("cuda")) or []
    assert told.endswith(": 1")
    stand_in.write_text("#!/bin/sh\nexit 9\n")
    assert memory_errors(torch.device("cuda")) is None


def test_a_folder_that_machines_dont_share_shows(tmp_path: Path, monkeypatch: Any) -> None:
    """Rank 0 of two machines; the other's file never comes to this disk."""
    monkeypatch.setattr(machine_probe, "everyone", lambda value, group: [value, value])
    written, read, problem = machine_probe._storage_speed(str(tmp_path), 0, ["a", "b"], None)
    assert written and read is None
    assert "can't read what b wrote" in problem and "share" in problem


def test_a_disk_that_cant_be_written_shows(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(machine_probe, "everyone", lambda value, group: [value])
    (tmp_path / "file").touch()
    found = machine_probe._storage_speed(str(tmp_path / "file" / "x"), 0, ["a"], None)
    assert found[:2] == (None, None) and found[2].startswith("can't write")


CLOCKS = """
import sys, time
import torch.distributed as dist
from piflow.runtime import machine_probe
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
now = time.time
machine_probe.time.time = lambda: now() + 7.0 * rank
ahead = machine_probe._clock_ahead(rank, dist.new_group(backend="gloo"))
print(ahead)
"""


def test_a_clock_that_is_ahead_is_measured(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CLOCKS, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    ahead = [float(process.communicate(timeout=120)[0]) for process in started]
    assert ahead[0] == 0.0 and ahead[1] == pytest.approx(7.0, abs=0.5)


# ---------------------------------------------------------------------------- recipe and command


def recipe(*overrides: str) -> Recipe:
    return load_recipe(REPOSITORY / "pipelines" / "recipes" / "emoji-flux.yaml", list(overrides))


def test_rdma_without_gpus_is_refused_by_the_recipe() -> None:
    with pytest.raises(RecipeError, match="rdma is about NCCL, and use_gpu = false"):
        recipe("runtime.preflight.transport=rdma")
    assert recipe("runtime.preflight.clock_s=1").hash() == recipe().hash()


def test_a_failed_check_is_told_with_where_it_failed(monkeypatch: Any, capsys: Any) -> None:
    bad = Check("storage", False, "write failed", "fast", ("b [bold] can't write",))
    good = Check("clocks", True, "0 s apart", "at most 5 s")
    monkeypatch.setattr(preflight, "check_machines", lambda recipe: [bad, good])
    with pytest.raises(preflight.UnfitMachinesError) as error:
        preflight.main(recipe())
    assert str(error.value).splitlines() == [
        "1 of 2 checks of the machines failed:",
        "  storage: write failed; expected fast",
        "    b [bold] can't write",
    ]
    assert "FAILED" in capsys.readouterr().out

"""GPUs, the share of their peaks that is reckoned with, and prices: `table.yaml`, or your own."""

from __future__ import annotations

import datetime
import difflib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from piflow.config import plain_yaml
from piflow.config.section import PositiveFloat, Section, Text
from piflow.storage.foreign import shown

_MIB = 2**20


class PlanError(ValueError):
    """Nothing can be planned with this; the message says what was expected and what to do."""


class Gpu(Section):
    """One kind of GPU."""

    memory_mib: Annotated[int, Field(gt=0, le=2**24)]
    """As nvidia-smi reports it."""

    bandwidth: PositiveFloat
    """Of its memory, GB/s."""

    link: PositiveFloat
    """To other GPUs of its machine, GB/s in one direction."""

    network_gbits: PositiveFloat
    """Of a machine to others, Gbit/s."""

    peaks: dict[str, PositiveFloat]
    """TFLOP/s by dtype: bfloat16, float32 (TF32), float8 where it has it."""

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.memory_mib * _MIB


class Efficiency(Section):
    """Shares of a GPU's peaks, and times that don't depend on them."""

    origin: Text
    """assumed, or who measured them where and when."""

    matmul: Annotated[float, Field(gt=0, le=1)]
    attention: Annotated[float, Field(gt=0, le=1)]
    bandwidth: Annotated[float, Field(gt=0, le=1)]
    link: Annotated[float, Field(gt=0, le=1)]
    network: Annotated[float, Field(gt=0, le=1)]
    compiled: Annotated[float, Field(gt=0, le=1)]
    """Share of the bytes of blocks that compiled ones still move."""

    launch_microseconds: PositiveFloat
    context_gib: PositiveFloat
    nccl_gib: PositiveFloat
    host_gb_per_second: PositiveFloat
    load_gb_per_second: PositiveFloat
    start_minutes: PositiveFloat


class Price(Section):
    """An example of what a GPU costs."""

    gpu: Text
    provider: Text
    usd: PositiveFloat
    """Of one GPU, an hour."""

    date: Annotated[datetime.date, Field(strict=False)]
    """When it was so."""

    source: Text
    """Who says so."""

    def __str__(self) -> str:
        return f"{self.provider}, {self.date}, {self.source}"


class Table(Section):
    """All of it."""

    gpus: dict[str, Gpu]
    devices: dict[str, Text | PositiveFloat]
    """What a device's name in CUDA holds -> a name in `gpus`, or its bfloat16 peak, TFLOP/s."""

    efficiency: Efficiency
    prices: list[Price]

    def gpu(self, name: str) -> Gpu:
        """The GPU of this name.

        Raises:
            PlanError: there is none; lists those that there are.
        """
        if name in self.gpus:
            return self.gpus[name]
        near = difflib.get_close_matches(name, self.gpus, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise PlanError(
            f"--gpu {shown(repr(name))} isn't in the table, which has "
            f"{', '.join(sorted(self.gpus))}{hint}; give another one's figures with --memory, "
            "--peak and --bandwidth, or in a file with --table"
        )

    def peak_of_device(self, device: str) -> float | None:
        """Dense bfloat16 TFLOP/s of a GPU by its name in CUDA.

        None: it isn't known, or only a slice of it is used (MIG).
        """
        words = device.replace("-", " ").split()
        if "MIG" in words:
            return None
        plain = f" {' '.join(words)} "
        found = next((v for name, v in self.devices.items() if f" {name} " in plain), None)
        return self.gpus[found].peaks["bfloat16"] if isinstance(found, str) else found

    def price(self, gpu: str) -> Price | None:
        """The first of this GPU; None: there is none."""
        return next((price for price in self.prices if price.gpu == gpu), None)


def load_table(path: str | Path | None = None) -> Table:
    """The table that ships with piflow, with a file's entries in place of those of their name.

    Args:
        path: YAML with any of gpus, devices, efficiency and prices; its prices come first.

    Raises:
        PlanError: the file isn't there, or has other keys or values.
    """
    content = files("piflow.planning").joinpath("table.yaml").read_bytes()
    tree = plain_yaml.load_mapping(content, where="piflow's own table")
    if path is not None:
        own = _read(Path(path))
        for section in ("gpus", "devices", "efficiency"):
            tree[section] = {**tree[section], **(own.pop(section, None) or {})}
        tree["prices"] = [*(own.pop("prices", None) or []), *tree["prices"]]
        tree.update(own)  # unknown keys are refused below
    try:
        return Table.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise PlanError(
            f"{shown(path)}: {shown(key)}: {problem['msg']}, got {shown(repr(problem['input']))}; "
            "piflow/planning/table.yaml shows what is expected"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise PlanError(f"--table {shown(path)} isn't a file; expected YAML as in table.yaml")
    with path.open("rb") as file:
        return plain_yaml.load_mapping(file.read(plain_yaml.MAX_BYTES + 1), where=shown(str(path)))


def gpu_by_hand(
    table: Table,
    name: str,
    *,
    memory_gb: float | None = None,
    peak: float | None = None,
    bandwidth: float | None = None,
    link: float | None = None,
    network_gbits: float | None = None,
) -> Gpu:
    """The table's GPU with some figures given by hand; or one that the table lacks, all of them.

    Args:
        memory_gb: GiB.
        peak: bfloat16, TFLOP/s; float32 then is half of it, and float8 isn't known.
        bandwidth: of the memory, GB/s.
        link, network_gbits: default for a GPU by hand: PCIe 4's 32 GB/s, 100 Gbit/s.

    Raises:
        PlanError: as `Table.gpu`, or figures are missing or out of range.
    """
    given = {"memory": memory_gb, "peak": peak, "bandwidth": bandwidth, "link": link,
             "network": network_gbits}  # fmt: skip
    for option, value in given.items():
        if value is not None and not 0 < value < 1e7:
            raise PlanError(f"--{option} {value:g}: expected a number above 0")
    if name not in table.gpus:
        needed = {key: given[key] for key in ("memory", "peak", "bandwidth")}
        absent = [f"--{key}" for key, value in needed.items() if value is None]
        if len(absent) == len(needed):
            table.gpu(name)  # says what there is
        if memory_gb is None or peak is None or bandwidth is None:
            raise PlanError(
                f"--gpu {shown(repr(name))} isn't in the table, and {', '.join(absent)} "
                f"{'is' if len(absent) == 1 else 'are'} missing; give all three, or one of "
                f"{', '.join(sorted(table.gpus))}"
            )
        return Gpu(
            memory_mib=int(memory_gb * 1024),
            bandwidth=float(bandwidth),
            link=float(link or 32),
            network_gbits=float(network_gbits or 100),
            peaks={"bfloat16": float(peak), "float32": peak / 2},
        )
    changed: dict[str, Any] = {}
    if memory_gb is not None:
        changed["memory_mib"] = int(memory_gb * 1024)
    if peak is not None:
        changed["peaks"] = {"bfloat16": float(peak), "float32": peak / 2}
    others = {"bandwidth": bandwidth, "link": link, "network_gbits": network_gbits}
    changed |= {key: float(value) for key, value in others.items() if value is not None}
    return table.gpus[name].model_copy(update=changed)

"""GPU evidence in one call: kernels and full-width training steps, appended to a file at once.

    python benchmarks/evidence.py [--device cuda] [--out FILE] [--minutes 25] [--only NAME ...]

One object a line: what was measured, or why it wasn't. What is there already isn't measured again,
so a call that was cut off is taken up by the next. It needs torch, diffusers and peft, no Ray, no
network and no weights; torchao for the 8-bit teacher. On a CPU everything is shrunk: that tries the
program, and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from policy import (
    SCHEDULE,
    SHAPES,
    Shape,
    chosen_policy,
    clock,
    copy_bandwidth,
    make_outputs,
    operations,
    policy_rollout,
    relative_difference,
)
from step import Case, measured, release

from piflow.imitation import ImitationSettings, run_data_free
from piflow.policies.gmflow import runs_fused
from piflow.schedule import FewStep

FLUX, QWEN = "flux1-dev-gm-4nfe", "qwen-image-gm-4nfe"
STEPS: dict[str, Case] = {  # the most telling first
    "flux": Case(FLUX, micro_batch=2),
    "flux, as published": Case(FLUX, micro_batch=2, published=True),
    "qwen": Case(QWEN, micro_batch=2),
    "qwen, as published": Case(QWEN, micro_batch=2, published=True),
    "flux, 8-bit teacher, weights kept": Case(FLUX, micro_batch=2, fp8="kept"),
    "flux, 8-bit teacher, weights of a call": Case(FLUX, micro_batch=2, fp8="call"),
    "flux, compiled": Case(FLUX, micro_batch=2, compiled=True),
    "flux, selective": Case(FLUX, micro_batch=2, checkpointing="selective"),
    "flux, nothing computed again": Case(FLUX, micro_batch=1, checkpointing="none"),
    "qwen, 8-bit teacher, weights kept": Case(QWEN, micro_batch=2, fp8="kept"),
    "qwen, compiled": Case(QWEN, micro_batch=2, compiled=True),
}
SUBSTEPS = 32  # of the rollout whose speed has a goal
_PRODUCT = {"cuda": 8192, "cpu": 512}
_SECONDS_A_CASE = 60  # less time than this is left: nothing more is begun
Measure = Callable[[], dict[str, Any]]


def machine(device: torch.device) -> dict[str, Any]:
    """Names and versions, and what the device reaches on large products and copies."""
    size = _PRODUCT[device.type]
    rates = {"float32": product_flops(device, torch.float32, size)}
    if device.type == "cuda":
        rates["bfloat16"] = product_flops(device, torch.bfloat16, size)
        if torch.cuda.get_device_capability(device) >= (8, 9):
            rates["float8"] = float8_flops(device, size)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "product_tflops": {dtype: rate / 1e12 for dtype, rate in rates.items()},
        "copy_gb_per_second": copy_bandwidth(device) / 1e6,
    }


def product_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a product of two square matrices of random values."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (clock(lambda: left @ right, device, 10) / 1e3)


def float8_flops(device: torch.device, size: int) -> float:
    """The same in e4m3 with a scale a row."""
    left, right = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in "ab")
    ones = torch.ones(size, 1, device=device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(
            left, right.T, ones, ones.T, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return 2 * size**3 / (clock(product, device, 10) / 1e3)


def kernels(shape: Shape, device: torch.device, repeats: int) -> dict[str, Any]:
    """The policy alone: milliseconds of each form, the floor, and the difference from float64."""
    out = make_outputs(shape, device)
    fused = runs_fused(out.means.flatten(3), torch.float32)
    forms = ["broadcasting", "pytorch", *(["fused"] if fused else [])]
    found: dict[str, Any] = {"shape": asdict(shape), "fused": fused}
    for name, calls in operations(out, SUBSTEPS, fused):
        with torch.set_grad_enabled(name.endswith("backward")):
            times = [clock(call, device, repeats) for call in calls]
        found[name] = dict(zip(forms, times, strict=True))
    rollout = found[f"rollout {SUBSTEPS}"]
    best = rollout[forms[-1]]
    floor = (out.means.nbytes + out.x.nbytes) / copy_bandwidth(device)
    found |= {
        "floor_ms": floor,
        "times_the_floor": best / floor,  # goal on a GPU: at most 3
        "times_broadcasting": rollout["broadcasting"] / best,  # goal on a GPU: at least 20
    }
    with torch.no_grad():
        whole = partial(policy_rollout, chosen_policy)
        found["difference_from_float64"] = relative_difference(whole, out, SUBSTEPS)
    return found


def policies(shape: Shape, states: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds of one segment's rollouts, losses and their backward pass; networks cost nothing."""
    out = make_outputs(shape, device)
    for tensor in (out.means, out.logstds, out.logweights):
        tensor.requires_grad_()

    def segment() -> None:
        parts = run_data_free(
            lambda x, s: chosen_policy(replace(out, x=x, sigma=s)),
            lambda x, s: out.means[:, 0].detach(),
            out.x,
            FewStep(4, 0.5, SCHEDULE.shift, 128),
            ImitationSettings(states),
            generator=torch.Generator().manual_seed(0),
        )
        loss, _ = next(parts)
        loss.backward()

    return {"shape": asdict(shape), "states": states, "ms": clock(segment, device, repeats)}


def wanted(device: torch.device, found: dict[str, Any], repeats: int) -> dict[str, Measure]:
    """Name -> measurement, in order; those of steps look up the products' speed in `found`."""
    shrunk = device.type == "cpu"
    shape = SHAPES["emoji"][0] if shrunk else SHAPES["flux"][1]
    all_of_it: dict[str, Measure] = {
        "machine": partial(machine, device),
        "policy": partial(kernels, shape, device, repeats),
        "policies of a segment": partial(policies, shape, 4, device, repeats),
    }

    def step(case: Case) -> dict[str, Any]:
        rates = found["machine"]["product_tflops"]
        rate = 1e12 * rates["float32" if shrunk else "bfloat16"]
        return measured(case, device, repeats=repeats, matmul_flops=rate)

    for name, case in STEPS.items():
        all_of_it[name] = partial(step, replace(case, shrunk=shrunk))
    return all_of_it


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Seconds as published over ours, where both are there (goal on a GPU: at least 1.8).

    And the policies' share of a step (goal: under 0.03).
    """
    sums = {}
    for name in ("flux", "qwen"):
        both = [found.get(name, {}), found.get(f"{name}, as published", {})]
        if all("seconds" in entry for entry in both):
            ours, theirs = (entry["seconds"]["step"] for entry in both)
            sums[f"{name}: published over ours"] = theirs / ours
    if "ms" in found.get("policies of a segment", {}) and "seconds" in found.get("flux", {}):
        share = found["policies of a segment"]["ms"] / 1e3 / found["flux"]["seconds"]["step"]
        sums["flux: policies' share"] = share
    return sums


def collect(
    device: torch.device, out: Path, *, minutes: float, only: list[str], repeats: int
) -> dict[str, Any]:
    """Measures what the file lacks, and appends each at once.

    Returns:
        everything that the file then holds, by name.
    """
    ends = time.monotonic() + 60 * minutes
    found = read(out)
    for name, measure in wanted(device, found, repeats).items():
        if (only and name not in only and name != "machine") or "error" not in found.get(
            name, {"error": ""}
        ):
            continue
        if ends - time.monotonic() < _SECONDS_A_CASE and name != "machine":
            print(f"{name}: no time is left")
            continue
        began = time.monotonic()
        try:
            found[name] = measure()
        except Exception as error:  # the next may work: out of memory, a package that is missing
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        append(out, name, found[name])
        release(device)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    if sums := ratios(found):
        append(out, "ratios", sums)
        found["ratios"] = sums
    return found


def read(path: Path) -> dict[str, Any]:
    """What a file holds, the last of each name."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {line["name"]: line["found"] for line in lines}


def append(path: Path, name: str, found: dict[str, Any]) -> None:
    """One more line, on the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps({"name": name, "found": found}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Measure, append, and say what there is."""
    parser = argparse.ArgumentParser(description="evidence of speed and memory on a GPU")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--out", type=Path, default=Path("evidence.jsonl"))
    parser.add_argument("--minutes", type=float, default=25.0, help="nothing is begun after")
    parser.add_argument("--repeats", type=int, default=3, help="steps of which the median counts")
    parser.add_argument("--only", nargs="*", default=[], help=f"of: {', '.join(STEPS)}")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        print("No GPU: everything is shrunk, which tries this program. Figures of GPUs stay open.")
    found = collect(
        device,
        arguments.out,
        minutes=arguments.minutes,
        only=arguments.only,
        repeats=arguments.repeats,
    )
    failed = [name for name, entry in found.items() if "error" in entry]
    for name, value in found.get("ratios", {}).items():
        print(f"{name}: {value:.3g}")
    print(f"{len(found) - len(failed)} measured, failed: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    main()

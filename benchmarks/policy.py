"""Cost of the GMFlow policy against the broadcasting form of the same formula.

    python benchmarks/policy.py [--device cpu|cuda] [--threads 1] [--substeps 32]

Prints one Markdown table: velocity, rollout, and rollout + backward, each as time and as ratio to
the broadcasting form; peak extra memory of a rollout; and the floor, one read of the means plus one
write of x over the measured copy bandwidth. CPU times are the process's CPU time divided by the
threads, so that a busy machine disturbs them less; GPU times are CUDA events.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from piflow.policies import GMFlowPolicy, rollout
from piflow.schedule import FlowSchedule

SCHEDULE = FlowSchedule(3.2)
TOTAL_SUBSTEPS = 128


@dataclass(frozen=True)
class Shape:
    """One policy size."""

    name: str
    batch: int
    components: int
    channels: int
    side: int


SHAPES = [
    Shape("FLUX 128x128", 1, 8, 16, 128),
    Shape("FLUX 128x128", 2, 8, 16, 128),
    Shape("FLUX 128x128", 4, 8, 16, 128),
    Shape("DiT 32x32", 8, 32, 4, 32),
    Shape("emoji 16x16", 8, 8, 12, 16),
]


@dataclass(frozen=True)
class Outputs:
    """Network outputs of one student call, and its input."""

    means: Tensor
    logstds: Tensor
    logweights: Tensor
    x: Tensor
    sigma: Tensor
    tau: Tensor


def make_outputs(shape: Shape, device: torch.device) -> Outputs:
    """Random outputs around one velocity, as a trained student's are."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.channels, shape.side, shape.side)

    def normal(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator).to(device)

    data, noise = normal(shape.batch, *size), normal(shape.batch, *size)
    tau = torch.full((shape.batch,), 2.5 / 3.5)
    sigma = SCHEDULE.sigma(tau).to(device)
    level = sigma[:, None, None, None]
    spread = 0.2 * normal(shape.batch, shape.components, *size)
    return Outputs(
        (noise - data)[:, None] + spread,
        torch.full((shape.batch, 1, 1, 1, 1), -3.0, device=device),
        normal(shape.batch, shape.components, 1, shape.side, shape.side).log_softmax(1),
        (1 - level) * data + level * noise,
        sigma,
        tau,
    )


def broadcasting_velocity(
    means: Tensor, variance: Tensor, logweights: Tensor, out: Outputs, x: Tensor, sigma: Tensor
) -> Tensor:
    """The posterior mean with every component's quantities written out, (B, K, C, H, W) each."""
    s, s_src = sigma.reshape(-1, 1, 1, 1, 1), out.sigma.reshape(-1, 1, 1, 1, 1)
    rho, rho_src = (1 - s) / s, (1 - s_src) / s_src
    zeta = rho.square() - rho_src.square()
    nu = (rho / s) * x.unsqueeze(1) - (rho_src / s_src) * out.x.unsqueeze(1)
    denominator = (variance * zeta + 1).clamp(min=1e-6)
    posterior = (variance * nu + means) / denominator
    exponent = (means * (nu - 0.5 * zeta * means)).sum(2, keepdim=True) / denominator
    weights = torch.softmax(logweights + exponent, dim=1)
    mean = (weights * posterior).sum(1)
    return (x - mean) / sigma.reshape(-1, 1, 1, 1)


def broadcasting_rollout(out: Outputs, substeps: int) -> Tensor:
    """`substeps` Euler steps of the broadcasting form."""
    level = out.sigma.reshape(-1, 1, 1, 1, 1)
    means = out.x.unsqueeze(1) - level * out.means
    variance = (2 * out.logstds).exp() * level.square()
    x = out.x
    for step in range(substeps):
        sigma, following = (
            SCHEDULE.sigma(out.tau - i / TOTAL_SUBSTEPS).to(x.device) for i in (step, step + 1)
        )
        u = broadcasting_velocity(means, variance, out.logweights, out, x, sigma)
        x = x + (following - sigma).reshape(-1, 1, 1, 1) * u
    return x


def policy_of(out: Outputs) -> GMFlowPolicy:
    """piflow's policy."""
    return GMFlowPolicy(out.means, out.logstds, out.logweights, out.x, out.sigma)


def policy_rollout(out: Outputs, substeps: int) -> Tensor:
    """The same rollout by piflow, the policy's construction included."""
    end = out.tau - substeps / TOTAL_SUBSTEPS
    return rollout(policy_of(out), out.x, out.tau, end, SCHEDULE, TOTAL_SUBSTEPS)


def with_backward(form: Callable[[Outputs, int], Tensor], out: Outputs, substeps: int) -> None:
    """A rollout and the gradient of a scalar of its end in the network's outputs."""
    leaves = [t.detach().requires_grad_() for t in (out.means, out.logstds, out.logweights)]
    form(Outputs(*leaves, out.x, out.sigma, out.tau), substeps).square().mean().backward()


def clock(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Best milliseconds of `repeats` calls after one warm-up call."""
    function()
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(stop))
        else:
            began = time.process_time()
            function()
            best = min(best, (time.process_time() - began) * 1e3 / torch.get_num_threads())
    return best


def peak_megabytes(function: Callable[[], object], device: torch.device) -> float:
    """Peak memory that a call adds, MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        function()
    level = peak = 0
    for event in recording.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak / 2**20


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a millisecond (reads + writes) of a large copy."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock(lambda: target.copy_(source), device, 5)


def row(shape: Shape, device: torch.device, substeps: int, repeats: int, bandwidth: float) -> str:
    """One line of the table."""
    out = make_outputs(shape, device)
    policy = policy_of(out)
    level = out.sigma.reshape(-1, 1, 1, 1, 1)
    means_x0 = out.x.unsqueeze(1) - level * out.means
    variance = (2 * out.logstds).exp() * level.square()

    def ours() -> Tensor:
        return policy.velocity(out.x, out.sigma)

    def theirs() -> Tensor:
        return broadcasting_velocity(means_x0, variance, out.logweights, out, out.x, out.sigma)

    cells = []
    with torch.no_grad():
        cells.append((clock(ours, device, repeats), clock(theirs, device, repeats)))
        cells.append(
            (
                clock(lambda: policy_rollout(out, substeps), device, repeats),
                clock(lambda: broadcasting_rollout(out, substeps), device, repeats),
            )
        )
        memory = (
            peak_megabytes(lambda: policy_rollout(out, substeps), device),
            peak_megabytes(lambda: broadcasting_rollout(out, substeps), device),
        )
        difference = policy_rollout(out, substeps) - broadcasting_rollout(out, substeps)
    for count in (3, substeps):
        cells.append(
            (
                clock(lambda n=count: with_backward(policy_rollout, out, n), device, repeats),
                clock(lambda n=count: with_backward(broadcasting_rollout, out, n), device, repeats),
            )
        )
    backward_memory = (
        peak_megabytes(lambda: with_backward(policy_rollout, out, substeps), device),
        peak_megabytes(lambda: with_backward(broadcasting_rollout, out, substeps), device),
    )
    floor = (out.means.nbytes + out.x.nbytes) / bandwidth
    columns = [
        f"{shape.name}, B {shape.batch}, K {shape.components}, C {shape.channels}",
        *(f"{mine:.2f} ({other / mine:.1f}x)" for mine, other in cells),
        f"{memory[0]:.0f} / {memory[1]:.0f}",
        f"{backward_memory[0]:.0f} / {backward_memory[1]:.0f}",
        f"{floor:.3f} ({cells[1][0] / floor:.0f}x)",
        f"{difference.abs().max().item():.1e}",
    ]
    return "| " + " | ".join(columns) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="cost of the GMFlow policy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--substeps", type=int, default=32, help="Euler substeps of the rollout")
    parser.add_argument("--repeats", type=int, default=5, help="calls; the best one counts")
    parser.add_argument("--largest-batch", type=int, default=8, help="leave larger shapes out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    bandwidth = copy_bandwidth(device)
    print(f"{name or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, ")
    print(f"copy bandwidth {bandwidth / 1e6:.1f} GB/s; milliseconds (broadcasting form / ours)\n")
    steps = arguments.substeps
    print(
        f"| shape | velocity | rollout {steps} | rollout 3 + backward | rollout {steps} + backward "
        "| rollout MiB, ours / broadcasting | + backward MiB | floor (rollout / floor) "
        "| max difference |"
    )
    print("|" + "---|" * 9)
    for shape in SHAPES:
        if shape.batch <= arguments.largest_batch:
            print(row(shape, device, steps, arguments.repeats, bandwidth), flush=True)


if __name__ == "__main__":
    main()

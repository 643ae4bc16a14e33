"""Cost of the GMFlow policy against the broadcasting form of the same formula.

Prints a Markdown table: velocity, rollout and rollout + backward, each as time, ratio to the
broadcasting form and peak memory, in plain PyTorch and, on a GPU with Triton, by the fused kernel;
and the floor of a rollout, one read of the means plus one write of x over the measured copy
bandwidth. A rollout includes the policy's construction from the network's outputs.

`--share` measures instead what policies cost in training: one data-free iteration of the emoji
recipe (four segments, one teacher call each) as it is, and with network calls that cost nothing.

CPU times are the process's CPU time divided by the threads, so that a busy machine disturbs them
less; GPU times are of the device alone, the host being well ahead.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from measure import peak_mebibytes
from torch import Tensor

from piflow.policies import GMFlowPolicy, Policy, rollout
from piflow.policies.gmflow import runs_fused
from piflow.policies.mixture import CenteredMixture
from piflow.schedule import FlowSchedule

SCHEDULE = FlowSchedule(3.2)
TOTAL_SUBSTEPS = 128
RECIPE = Path(__file__).parent.parent / "pipelines" / "recipes" / "emoji-flux.yaml"
PROMPT_TOKENS = 12  # the recipe's encoder.max_tokens
SECONDS_A_CELL = 8.0
EXAMPLES = """examples:
  python benchmarks/policy.py                                all shapes on one CPU thread
  python benchmarks/policy.py --shapes flux --batches 1 2    some of them
  python benchmarks/policy.py --device cuda                  with the fused kernel's columns
  python benchmarks/policy.py --share                        the policies' share of training
"""


@dataclass(frozen=True)
class Shape:
    """One policy size."""

    name: str
    batch: int
    components: int
    channels: int
    side: int

    def __str__(self) -> str:
        sizes = f"B {self.batch}, K {self.components}, C {self.channels}"
        return f"{self.name} {self.side}x{self.side}, {sizes}"


SHAPES = {
    "flux": [Shape("FLUX/Qwen", batch, 8, 16, 128) for batch in (1, 2, 4, 8)],
    "dit": [Shape("DiT", batch, 32, 4, 32) for batch in (1, 8)],
    "emoji": [Shape("emoji", batch, 8, 12, 16) for batch in (1, 8)],
}


@dataclass(frozen=True)
class Outputs:
    """Network outputs of one student call, and its input."""

    means: Tensor
    logstds: Tensor
    logweights: Tensor
    x: Tensor
    sigma: Tensor
    tau: Tensor

    def double(self) -> Outputs:
        """The first sample in float64."""
        names = ("means", "logstds", "logweights", "x", "sigma", "tau")
        return Outputs(*(getattr(self, name)[:1].double() for name in names))


Form = Callable[[Outputs, int], Tensor]
"""(outputs, Euler steps) -> x after them."""


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


# ------------------------------------------------------------------------------------ the forms


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


def broadcasting_mixture(out: Outputs) -> tuple[Tensor, Tensor]:
    """Means (B, K, C, H, W) and variance of x0."""
    level = out.sigma.reshape(-1, 1, 1, 1, 1)
    return out.x.unsqueeze(1) - level * out.means, (2 * out.logstds).exp() * level.square()


def broadcasting_rollout(out: Outputs, substeps: int) -> Tensor:
    """`substeps` Euler steps of the broadcasting form."""
    means, variance = broadcasting_mixture(out)
    x = out.x
    for step in range(substeps):
        sigma, following = (
            SCHEDULE.sigma(out.tau - i / TOTAL_SUBSTEPS).to(x.device) for i in (step, step + 1)
        )
        u = broadcasting_velocity(means, variance, out.logweights, out, x, sigma)
        x = x + (following - sigma).reshape(-1, 1, 1, 1) * u
    return x


def chosen_policy(out: Outputs) -> GMFlowPolicy:
    """piflow's policy; on a GPU with Triton, the fused kernel's."""
    return GMFlowPolicy(out.means, out.logstds, out.logweights, out.x, out.sigma)


def pytorch_policy(out: Outputs) -> GMFlowPolicy:
    """piflow's policy in plain PyTorch, wherever it runs."""
    variance = (2 * out.logstds).exp().reshape(-1) * out.sigma.square()
    logweights = out.logweights.squeeze(2).flatten(2)
    mixture = CenteredMixture.from_velocities(
        out.means.flatten(3), logweights, variance, out.x.flatten(2), out.sigma
    )
    return GMFlowPolicy.from_mixture(mixture, out.x.shape)


def policy_rollout(make: Callable[[Outputs], GMFlowPolicy], out: Outputs, substeps: int) -> Tensor:
    """`substeps` Euler steps by piflow, the policy's construction included."""
    end = out.tau - substeps / TOTAL_SUBSTEPS
    return rollout(make(out), out.x, out.tau, end, SCHEDULE, TOTAL_SUBSTEPS)


def with_backward(form: Form, out: Outputs, substeps: int) -> None:
    """A rollout and the gradient of a scalar of its end in the network's outputs."""
    means, logstds, logweights = (
        tensor.detach().requires_grad_() for tensor in (out.means, out.logstds, out.logweights)
    )
    leaves = Outputs(means, logstds, logweights, out.x, out.sigma, out.tau)
    form(leaves, substeps).square().mean().backward()


# ---------------------------------------------------------------------------------- measurement


def clock(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Best milliseconds of up to `repeats` calls after one warm-up call, fewer if they are long."""
    began = time.monotonic()
    function()
    best = float("inf")
    filler = torch.ones(8192, 8192, device=device) if device.type == "cuda" else None
    for _ in range(repeats):
        if filler is not None:
            # The device is busy while the host queues the call, so that no launch is waited for.
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.mm(filler, filler)
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(stop))
        else:
            before = time.process_time()
            function()
            spent = (time.process_time() - before) * 1e3
            best = min(best, spent / torch.get_num_threads())
        if time.monotonic() - began > SECONDS_A_CELL:
            break
    return best


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a millisecond (reads + writes) of a large copy."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock(lambda: target.copy_(source), device, 5)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory, as a long-running process would.

    By default it returns large blocks to the system at once, depending on what was freed before,
    and the broadcasting form, which makes most of them, is then up to ten times slower for page
    faults alone. Without glibc nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block in a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


# ----------------------------------------------------------------------------------- the tables


Operation = tuple[str, list[Callable[[], object]]]
"""Its name and what to call, one a form: broadcasting, PyTorch, Triton."""


def operations(out: Outputs, substeps: int, fused: bool) -> Iterator[Operation]:
    """Everything that is measured of one shape."""
    means, variance = broadcasting_mixture(out)
    makers = [pytorch_policy, chosen_policy] if fused else [pytorch_policy]
    forms: list[Form] = [broadcasting_rollout, *(partial(policy_rollout, make) for make in makers)]

    def plain() -> Tensor:
        return broadcasting_velocity(means, variance, out.logweights, out, out.x, out.sigma)

    velocities = [partial(make(out).velocity, out.x, out.sigma) for make in makers]
    yield "velocity", [plain, *velocities]
    yield f"rollout {substeps}", [partial(form, out, substeps) for form in forms]
    for count in (3, substeps):
        calls = [partial(with_backward, form, out, count) for form in forms]
        yield f"rollout {count} + backward", list(calls)


def relative_difference(form: Form, out: Outputs, substeps: int) -> float:
    """Of the first sample's end, from the broadcasting form in float64, to its largest element."""
    exact = broadcasting_rollout(out.double(), substeps)
    return ((form(out, substeps)[:1] - exact).abs().max() / exact.abs().max()).item()


def rows(
    shape: Shape, device: torch.device, substeps: int, repeats: int, bandwidth: float
) -> Iterator[str]:
    """The table's lines of one shape."""
    out = make_outputs(shape, device)
    fused = runs_fused(out.means.flatten(3), torch.float32)
    floor = (out.means.nbytes + out.x.nbytes) / bandwidth
    for name, calls in operations(out, substeps, fused):
        backward = name.endswith("backward")
        with torch.set_grad_enabled(backward):
            times = [clock(call, device, repeats) for call in calls]
            memory = [peak_mebibytes(call, device) for call in calls]
        cells = [f"{times[0]:.2f}"]
        cells += [f"{mine:.2f} ({times[0] / mine:.1f}x)" for mine in times[1:]]
        cells += ["–"] * (3 - len(times))
        cells.append(" / ".join(f"{peak:.0f}" for peak in memory))
        cells.append("–" if backward else f"{floor:.3f} ({times[-1] / floor:.0f}x)")
        difference = "–"
        if name == f"rollout {substeps}":
            best: Form = partial(policy_rollout, chosen_policy)
            with torch.no_grad():
                difference = f"{relative_difference(best, out, substeps):.0e}"
        yield f"| {shape} | {name} | {' | '.join(cells)} | {difference} |"


def print_table(shapes: list[Shape], device: torch.device, substeps: int, repeats: int) -> None:
    """Measure policies alone."""
    bandwidth = copy_bandwidth(device)
    print(f"copy bandwidth {bandwidth / 1e6:.1f} GB/s\n")
    print(
        "| shape | operation | broadcasting, ms | PyTorch, ms | Triton, ms | peak MiB "
        "| floor, ms (best / floor) | relative difference from float64 |"
    )
    print("|" + "---|" * 8)
    for shape in shapes:
        for line in rows(shape, device, substeps, repeats, bandwidth):
            print(line, flush=True)


def print_share(device: torch.device, repeats: int, batch: int) -> None:
    """Measure a data-free iteration with the network, and with stand-ins that cost nothing."""
    from piflow.backbones import Conditioning
    from piflow.config import load_recipe
    from piflow.imitation import ImitationSettings, run_data_free
    from piflow.roles.guided import GuidedTeacher
    from piflow.schedule import FewStep
    from piflow.training.build import build_trio

    recipe = load_recipe(RECIPE)
    trio = build_trio(recipe, device=device)
    config, generator = trio.backbone.config, torch.Generator().manual_seed(0)
    width, pooled = (
        int(str(config[key])) for key in ("joint_attention_dim", "pooled_projection_dim")
    )
    cond = Conditioning(
        torch.randn(batch, PROMPT_TOKENS, width, generator=generator).to(device),
        torch.full((batch,), PROMPT_TOKENS, device=device),
        torch.randn(batch, pooled, generator=generator).to(device),
    )
    shape = Shape("emoji", batch, 8, 12, 16)
    out = make_outputs(shape, device)
    for tensor in (out.means, out.logstds, out.logweights):
        tensor.requires_grad_()
    teacher = GuidedTeacher(trio, cond, cond, recipe.guidance)

    def iterate(student: Callable[..., Policy], velocity: Callable[..., Tensor]) -> None:
        for loss, _ in run_data_free(
            student, velocity, out.x, FewStep(4, 0.5, SCHEDULE.shift, 128), ImitationSettings(1),
            generator=torch.Generator().manual_seed(0),
        ):  # fmt: skip
            loss.backward()

    whole = partial(iterate, lambda x, s: trio.student(x, s, cond), teacher)
    policies = partial(
        iterate,
        lambda x, s: chosen_policy(replace(out, x=x, sigma=s)),
        lambda x, s: out.means[:, 0].detach(),
    )
    taken, of_policies = clock(whole, device, repeats), clock(policies, device, repeats)
    print(
        f"iteration {taken:.1f} ms, of it rollouts, loss and their backward {of_policies:.1f} ms: "
    )
    print(f"{100 * of_policies / taken:.1f} % (micro-batch {batch}, 4 segments, J = 1)")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description="cost of the GMFlow policy",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--substeps", type=int, default=32, help="Euler substeps of the rollout")
    parser.add_argument("--repeats", type=int, default=5, help="calls; the best one counts")
    parser.add_argument(
        "--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES), help="policy sizes"
    )
    parser.add_argument("--batches", type=int, nargs="+", help="only these batch sizes")
    parser.add_argument("--share", action="store_true", help="the policies' share of training")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, {arguments.threads} threads, torch {torch.__version__}")
    if arguments.share:
        print_share(device, arguments.repeats, batch=8)
        return
    if device.type == "cpu":
        keep_freed_memory()
    shapes = [shape for name in arguments.shapes for shape in SHAPES[name]]
    batches = arguments.batches or {shape.batch for shape in shapes}
    chosen = [shape for shape in shapes if shape.batch in batches]
    print_table(chosen, device, arguments.substeps, arguments.repeats)


if __name__ == "__main__":
    main()

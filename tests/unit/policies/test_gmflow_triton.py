"""The fused kernel: its numerics in Triton's interpreter, its machine code, and when it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from piflow.policies import GMFlowPolicy, gmflow
from piflow.policies.mixture import CenteredMixture

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]


def test_numerics() -> None:
    """The cases run in a process of their own: the interpreter is chosen at Triton's import."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    cases = "tests/unit/policies/triton_cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def compiled(kernel: str, components: int, channels: int, capability: int):
    """A kernel's machine code for an NVIDIA GPU that needn't be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from piflow.policies import gmflow_triton

    function = getattr(gmflow_triton, f"_{kernel}")
    shape = getattr(gmflow_triton, f"{kernel}_shape")(components, channels)
    constants = {**shape.constants(), "ENDPOINT": True}
    if kernel == "backward":
        constants["LATENTS"] = True
    integers = ("steps", "batch", "pixels", "blocks")
    signature = {
        name: "constexpr" if name in constants else "i32" if name in integers else "*fp32"
        for name in function.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if signature[name] == "*fp32"
    }
    source = ASTSource(function, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=shape.options())


@pytest.mark.parametrize("sizes", [(8, 16), (32, 4), (8, 12)])
@pytest.mark.parametrize("capability", [80, 90])
def test_forward_compiles_and_keeps_a_pixel_in_one_thread(
    sizes: tuple[int, int], capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No shared memory: no sum over K or C crosses threads. Each mean is loaded once, coalesced."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compiled("forward", *sizes, capability)
    assert code.asm["cubin"] and code.metadata.shared == 0
    components = triton.next_power_of_2(sizes[0])
    channels = triton.next_power_of_2(sizes[1])
    loads = code.asm["ptx"].count("ld.global")
    expected = components * channels + components + 2 * channels
    assert loads == pytest.approx(expected, abs=6)


def test_backward_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compiled("backward", 8, 16, 90).asm["cubin"]
    assert compiled("backward", 3, 5, 80).asm["cubin"]


def test_used_for_float32_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        means = torch.empty(2, 8, 16, 6, device="cuda", dtype=torch.bfloat16)
        assert gmflow.runs_fused(means, torch.float32)
        assert not gmflow.runs_fused(means, torch.float64)
        assert not gmflow.runs_fused(means.to("cpu"), torch.float32)
        wide = torch.empty(2, 8, 65, 6, device="cuda")
        assert not gmflow.runs_fused(wide, torch.float32)
        monkeypatch.setattr(gmflow, "_triton_is_installed", lambda: False)
        assert not gmflow.runs_fused(means, torch.float32)


def test_a_policy_on_cuda_keeps_the_means_as_they_came() -> None:
    from piflow.policies.gmflow_triton import FusedMixture

    def policy(device: str) -> GMFlowPolicy:
        means = torch.empty(2, 3, 4, 2, 3, device=device, dtype=torch.bfloat16)
        x_src = torch.empty(2, 4, 2, 3, device=device)
        logstds = torch.empty(2, 1, 1, 1, 1, device=device)
        logweights = torch.empty(2, 3, 1, 2, 3, device=device)
        return GMFlowPolicy(means, logstds, logweights, x_src, torch.ones(2, device=device))

    with FakeTensorMode():
        fused = policy("cuda").mixture
    assert isinstance(fused, FusedMixture) and fused.velocities.dtype == torch.bfloat16
    assert fused.logweights.shape == (2, 3, 6) and fused.x_src.dtype == torch.float32
    assert isinstance(policy("cpu").mixture, CenteredMixture)

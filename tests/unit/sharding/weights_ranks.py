"""Two ways to a sharded trio, compared on every rank: its base streamed, and its base loaded whole.

Run as a script, once a rank: `weights_ranks.py FOLDER RANK WORLD_SIZE`. FOLDER/recipes.json holds
recipes by name; those of "large" models are measured, the others compared. FOLDER/uneven holds
tensors that don't split evenly. Writes FOLDER/RANK.json.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from piflow.backbones import Conditioning
from piflow.config import DeepSpeedConfig, Recipe, parse_recipe
from piflow.roles.trio import Trio
from piflow.sharding import FSDPStrategy, Strategy, build_strategy
from piflow.sharding.tensors import local_shard
from piflow.sharding.weights import WEIGHTS_FILE, fill, stored_tensors
from piflow.training.build import build_trio, prepared_trio
from tests.unit.whole import gather

CPU = torch.device("cpu")
Way = Callable[[Recipe, Strategy], Trio]
STATUS = Path("/proc/self/status")


def whole(recipe: Recipe, strategy: Strategy) -> Trio:
    """As it was done before: every rank loads all of the base, then shards it."""
    trio = build_trio(recipe)
    for module in trio.modules:
        strategy.prepare(module, trio.block_classes)
    return trio


def streamed(recipe: Recipe, strategy: Strategy) -> Trio:
    return prepared_trio(recipe, strategy)


def tensors(trio: Trio) -> dict[str, Tensor]:
    (module,) = trio.modules
    return dict(module.named_parameters()) | dict(module.named_buffers())


def computed(trio: Trio, recipe: Recipe) -> dict[str, Tensor]:
    """Velocities and gradients, which depend on tables that aren't even buffers."""
    generator = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.9, 0.3])
    labels = torch.tensor([[1.0], [3.0]])
    is_dit = recipe.model.family == "dit"
    cond = Conditioning(
        torch.randn(2, 3, 6, generator=generator),
        torch.tensor([3, 2]),
        labels if is_dit else torch.randn(2, 5, generator=generator),
    )
    trio.train(False)
    teacher = trio.teacher_velocity(x, sigma, cond)
    student = trio.student(x, sigma, cond).velocity(x, 0.5 * sigma)
    (student - 2 * teacher).square().mean().backward()
    gradients = {
        f"gradient of {name}": local_shard(parameter.grad)
        for name, parameter in trio.trainable_parameters().items()
        if parameter.grad is not None
    }
    return {"teacher": teacher, "student": student.detach(), **gradients}


def differences(recipe: Recipe) -> list[str]:
    """What isn't bit-equal between the two ways."""
    ours, expected = streamed(recipe, FSDPStrategy(CPU)), whole(recipe, FSDPStrategy(CPU))
    found, wanted = tensors(ours), tensors(expected)
    if list(found) != list(wanted):
        return ["names"]
    different = [
        name
        for name, tensor in wanted.items()
        if found[name].dtype != tensor.dtype
        or found[name].requires_grad != tensor.requires_grad
        or found[name].is_leaf != tensor.is_leaf
        or not torch.equal(local_shard(found[name]), local_shard(tensor))
    ]
    results, due = computed(ours, recipe), computed(expected, recipe)
    if list(results) != list(due) or len(due) < 10:
        return [*different, "names of gradients"]
    return different + [name for name in due if not torch.equal(results[name], due[name])]


def apart_from_one_process(recipe: Recipe) -> float:
    """The teacher's velocity on shards against that of a base that is whole, at worst."""
    ours, alone = computed(streamed(recipe, FSDPStrategy(CPU)), recipe), build_trio(recipe)
    return float((ours["teacher"] - computed(alone, recipe)["teacher"]).abs().max())


def gathered_differences(recipe: Recipe, strategy: Strategy) -> list[str]:
    """What of a trio that was streamed isn't as it is stored, once it is whole again on rank 0."""
    found = gather(strategy, tensors(streamed(recipe, strategy)))
    stored = tensors(build_trio(recipe))
    if strategy.rank == 0 and list(found) != list(stored):
        return ["names"]
    return [name for name, tensor in found.items() if not torch.equal(tensor, stored[name])]


def misread(folder: Path, mesh: DeviceMesh) -> list[str]:
    """What of a few linear layers isn't put together as it is stored."""
    stored = stored_tensors(str(folder))
    shapes = [stored[f"{i}.weight"].shape for i in range(len(stored) // 2)]
    model = nn.Sequential(*(nn.Linear(shape[1], shape[0], device="meta") for shape in shapes))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fill(model, stored, device="cpu")
    expected = load_file(folder / WEIGHTS_FILE)
    different = []
    for name, tensor in model.state_dict().items():
        assert isinstance(tensor, DTensor)
        if not torch.equal(tensor.full_tensor(), expected[name]):
            different.append(name)
    for _ in range(2):  # the second pass reads what resharding left
        x = torch.ones(1, shapes[0][1])
        for i in range(len(shapes)):
            x = F.linear(x, expected[f"{i}.weight"], expected[f"{i}.bias"])
        if not torch.equal(model(torch.ones(1, shapes[0][1])), x):
            different.append("forward")
    return different


def memory(field: str) -> int:
    """Bytes; "VmRSS" is the resident memory now, "VmHWM" its peak since it was last cleared."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def growth(make: Way, recipe: Recipe, strategy: Strategy) -> dict[str, int]:
    """How far resident memory rises while a trio is made, and how much of it stays as weights."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    trio = make(recipe, strategy)
    grown = memory("VmHWM") - before
    shards = {name: strategy.local(tensor) for name, tensor in tensors(trio).items()}
    return {"growth": grown, "shards": sum(shard.nbytes for shard in shards.values())}


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    init_method = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    trees = json.loads((folder / "recipes.json").read_text())
    meshes = {"sharded": (world_size,), "replicated": (world_size, 1)}
    results: dict[str, Any] = {
        name: misread(
            folder / "uneven",
            init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :]),
        )
        for name, shape in meshes.items()
    }
    fsdp, ways = FSDPStrategy(CPU), (streamed, whole)
    for name, tree in trees.items():
        recipe = parse_recipe(tree)
        if name.startswith("large"):
            results[name] = {make.__name__: growth(make, recipe, fsdp) for make in ways}
        else:
            results[name] = differences(recipe)
    results["lora alone"] = apart_from_one_process(parse_recipe(trees["flux lora float32"]))
    zero = build_strategy("deepspeed", world_size, CPU, deepspeed=DeepSpeedConfig(stage=3))
    recipe = parse_recipe(trees["flux bfloat16"])
    results["zero3"] = gathered_differences(recipe, zero)
    recipe = parse_recipe(trees["large float32"])
    results["large zero3"] = {make.__name__: growth(make, recipe, zero) for make in ways}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

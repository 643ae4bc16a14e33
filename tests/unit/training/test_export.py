"""An exported adapter is the same bytes every time, and the base's weights aren't needed for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes

from piflow.backbones.transformer import TransformerBackbone
from piflow.config import GMFlowPolicyConfig, LoRAConfig
from piflow.roles.adapter import WEIGHTS_FILE, load_adapter, save_adapter
from piflow.roles.trio import Trio
from piflow.sharding.single import SingleStrategy
from piflow.training.build import build_trio
from piflow.training.checkpoint import RunState
from piflow.training.export import export_adapter
from piflow.training.step import Trainer
from tests.unit.inference.test_settings import recipe, trained
from tests.unit.models import case
from tests.unit.whole import save_checkpoint

_SAVE = """
import sys, torch
from piflow.config import GMFlowPolicyConfig, LoRAConfig
from piflow.roles.adapter import save_adapter
from piflow.roles.trio import Trio
from tests.unit.models import case
policy = GMFlowPolicyConfig(num_gaussians=2, logstd_inner_dim=8)
generator = torch.Generator().manual_seed(0)
trio = Trio.from_backbone(case("flux")[0], LoRAConfig(rank=2), policy, None, generator=generator)
metadata = {name: name * 3 for name in "abcdefghij"} | {"é": "ü"}
save_adapter(sys.argv[1], trio.backbone, trio.trainable_parameters(), policy, None,
             base_model="base", metadata=metadata)
"""


def test_the_same_adapter_is_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """The library orders metadata by a hash that differs from process to process."""
    contents = set()
    for number in range(2):
        folder = tmp_path / str(number)
        done = subprocess.run(
            [sys.executable, "-c", _SAVE, str(folder)], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        contents.add((folder / WEIGHTS_FILE).read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "0" / WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata()
        assert list(metadata) and metadata["a"] == "aaa" and metadata["é"] == "ü"
        tensors = load_adapter(tmp_path / "0").tensors
        assert file.keys() and all(torch.equal(file.get_tensor(n), tensors[n]) for n in tensors)


def test_the_file_is_the_librarys(tmp_path: Path) -> None:
    """All but the metadata's order; float32 tensors are converted, and read one by one."""
    backbone, _ = case("flux")
    policy = GMFlowPolicyConfig(num_gaussians=2, logstd_inner_dim=8)
    generator = torch.Generator().manual_seed(0)
    trio = Trio.from_backbone(backbone, LoRAConfig(rank=2), policy, None, generator=generator)
    tensors = {name: parameter.detach() for name, parameter in trio.trainable_parameters().items()}
    asked: list[str] = []

    def read(names: Sequence[str]) -> dict[str, torch.Tensor]:
        asked.extend(names)
        return {name: tensors[name] for name in names}

    empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
    save_adapter(
        tmp_path, backbone, empty, policy, None, base_model="base", metadata={"é": "ü"}, read=read
    )
    assert asked == sorted(tensors)
    written = (tmp_path / WEIGHTS_FILE).read_bytes()
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata()
    assert {"é": "ü", "base_model": "base"}.items() <= metadata.items()
    converted = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    theirs = safetensors_bytes(converted, metadata=metadata)
    assert values_of(written) == values_of(theirs)
    assert header_of(written) == header_of(theirs) and len(written) == len(theirs)


def header_of(content: bytes) -> dict[str, Any]:
    return dict(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]))


def values_of(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_an_export_takes_little_more_memory_than_its_file(
    flux_config: dict[str, Any], tmp_path: Path
) -> None:
    """At most 1.3 times its file, with a base of some hundred MB: the process is given no more.

    Beside the file there are copies of one tensor, the largest of which is a twentieth of it here,
    and two threads' stacks. As much as the file alone is too little, so the limit is one. The C
    library gives back at once what is freed, of which it else keeps up to 64 MB.
    """
    large = {
        "num_layers": 3, "num_single_layers": 14, "attention_head_dim": 128,
        "num_attention_heads": 4, "joint_attention_dim": 512, "pooled_projection_dim": 512,
        "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip
    untrained(tmp_path / "tiny", flux_config, rank=4)
    size = 2 * untrained(tmp_path / "large", flux_config | large, rank=512)
    base = sum(file.stat().st_size for file in (tmp_path / "large/base").glob("*.safetensors"))
    assert size > 1e8 and base > 3e8
    script = Path(__file__).parent / "exported_memory.py"
    done = subprocess.run(
        [
            sys.executable, str(script), str(tmp_path / "large"), str(tmp_path / "tiny"),
            str(size), str(int(1.3 * size)),
        ],
        env={
            **os.environ, "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused, written = done.stdout.split("\n")[:2]
    assert refused == "too little" and size < int(written) < 1.01 * size


def untrained(folder: Path, config: dict[str, Any], *, rank: int) -> int:
    """A recipe, its base and a checkpoint of no steps; returns how many numbers are trained."""
    FluxTransformer2DModel(**config).save_pretrained(str(folder / "base"))
    ours = recipe(folder / "base", lora={"rank": rank})
    (folder / "recipe.json").write_text(ours.model_dump_json())
    trio = build_trio(ours)
    trainer = Trainer(
        Mock(),
        trio.trainable_parameters(),
        trio.ema_parameters(),
        SingleStrategy(torch.device("cpu")),
        ours.training,
        seed=0,
    )
    save_checkpoint(folder / "step", trainer, RunState(0, 0, ours.hash(), None, {}))
    return sum(parameter.numel() for parameter in trio.trainable_parameters().values())


def test_the_bases_weights_are_not_loaded(
    flux_folder: Path, flux_inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = recipe(flux_folder)
    checkpoint, trio = trained(ours, flux_inputs, tmp_path / "checkpoint")
    expected = {name: tensor.clone() for name, tensor in trio.ema_parameters().items()}
    monkeypatch.setattr(TransformerBackbone, "load", None)
    seen = []

    def saved(folder: str, backbone: Any, *arguments: Any, **options: Any) -> None:
        seen.extend(parameter.device.type for parameter in backbone.module.parameters())
        save_adapter(folder, backbone, *arguments, **options)

    monkeypatch.setattr("piflow.training.export.save_adapter", saved)
    out = str(tmp_path / "adapter")
    export_adapter(ours, str(checkpoint), out, weights="ema", dtype="float32", lineage={})
    adapter = load_adapter(out)
    assert adapter.tensors.keys() == expected.keys()
    assert all(torch.equal(adapter.tensors[name], expected[name]) for name in expected)
    assert isinstance(adapter.config.policy(), GMFlowPolicyConfig)
    assert seen.count("meta") > 20 and seen.count("cpu") <= 4, "only the output layer is real"

"""An exported adapter is the same bytes every time, and the base's weights aren't needed for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from piflow.backbones.transformer import TransformerBackbone
from piflow.config import GMFlowPolicyConfig
from piflow.roles.adapter import WEIGHTS_FILE, load_adapter, save_adapter
from piflow.training.export import export_adapter
from tests.unit.inference.test_settings import recipe, trained

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

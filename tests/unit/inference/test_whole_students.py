"""Merged students as pipelines of their own: no adapter and no base beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from piflow.config import Recipe, parse_recipe
from piflow.inference import PiDiTPipeline, PiFluxPipeline
from piflow.inference.settings import load_student
from piflow.training.export import export_adapter
from piflow.training.export_whole import export_whole
from piflow.training.pipeline_parts import PipelineParts
from tests.unit.training.test_export_whole import KINDS, checkpoint_of

CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flux": (
        PiFluxPipeline,
        {"prompt": ["a red heart"], "height": 16, "width": 24, "max_sequence_length": 32},
    ),
    "dit": (PiDiTPipeline, {"class_labels": [3]}),
}


def of_pipeline(family: str, base: Path, **changes: Any) -> Recipe:
    encoders = {
        "flux": {"type": "flux", "path": str(base), "max_tokens": 32},
        "dit": {"type": "class_label", "num_classes": 10},
    }
    policies = {"flux": {"num_gaussians": 3, "logstd_inner_dim": 8}, "dit": {
        "type": "dx", "mode": "grid", "num_points": 4,
    }}  # fmt: skip
    return parse_recipe(
        {
            "name": "tiny",
            "run_dir": "unused",
            "model": {"family": family, "path": str(base / "transformer"), "codec": "vae"},
            "encoder": encoders[family],
            "embed": {"prompts": "p.txt", "store": "s", "height": 16, "width": 16},
            "objective": {"type": "pi_id", "nfe": 2, "shift": 2.0, "total_substeps": 16},
            "guidance": {"embedded": 2.5} if family == "flux" else {},
            "policy": policies[family],
            "lora": {"rank": 2},
            **changes,
        }
    )


def latents(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    output = "pt" if isinstance(pipe, PiDiTPipeline) else "latent"
    images = pipe(**call, generator=generator, output_type=output).images
    return torch.as_tensor(images)


@pytest.mark.parametrize("family", ["flux", "dit"])
def test_a_folder_that_is_all(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base = shutil.copytree(request.getfixturevalue(f"{family}_base"), tmp_path / "base")
    ours = of_pipeline(family, base)
    step = str(checkpoint_of(ours, tmp_path / "step"))
    export_adapter(ours, step, str(tmp_path / "adapter"), **KINDS)
    written = export_whole(ours, step, str(tmp_path / "whole"), kind="merged", **KINDS)
    assert written.is_pipeline
    kind, call = CALLS[family]
    expected = latents(kind.from_pretrained(base, adapter=tmp_path / "adapter"), call)
    shutil.rmtree(base)
    pipe = kind.from_pretrained(tmp_path / "whole")
    found = latents(pipe, call)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    with torch.no_grad():
        weights = pipe.transformer.get_submodule(pipe.backbone_class.stored_output_names[-1])
        assert weights.weight.isnan().all(), "between calls it can't be taken for a teacher"
    with pytest.raises(ValueError, match="a merged student is saved already: copy the folder"):
        pipe.save_pretrained(tmp_path / "again")
    _, settings = load_student(str(tmp_path / "whole"))
    assert settings.model.path == str(tmp_path / "whole/transformer")
    index = json.loads((tmp_path / "whole/model_index.json").read_text())
    assert index["_class_name"] == kind.__name__
    content = b"".join(file.read_bytes() for file in (tmp_path / "whole").rglob("*.json"))
    assert str(tmp_path).encode() not in content
    moved = shutil.move(tmp_path / "whole", tmp_path / "elsewhere")
    assert torch.equal(latents(kind.from_pretrained(moved), call), found)
    with pytest.raises(Exception, match=kind.__name__):  # no class of diffusers itself
        DiffusionPipeline.from_pretrained(moved)


def test_beside_another_pipeline(flux_base: Path, tmp_path: Path) -> None:
    """One that takes the student's transformer, but never a constructor's own."""
    encoder = {"type": "flux", "path": "models/other", "max_tokens": 32}
    ours = of_pipeline("flux", flux_base, encoder=encoder)
    assert PipelineParts.of(ours) is None, "its text encoder is another"
    step = str(checkpoint_of(ours, tmp_path / "step"))
    export_adapter(ours, step, str(tmp_path / "adapter"), **KINDS)
    written = export_whole(ours, step, str(tmp_path / "whole"), kind="merged", **KINDS)
    assert not written.is_pipeline and not (tmp_path / "whole/model_index.json").exists()
    call = CALLS["flux"][1]
    teacher = PiFluxPipeline.from_pretrained(flux_base, adapter=tmp_path / "adapter")
    expected = latents(teacher, call)
    pipe = PiFluxPipeline.from_pretrained(flux_base, adapter=tmp_path / "whole")
    assert (latents(pipe, call) - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ValueError, match="a transformer of its own: load it with PiFluxPipeline"):
        PiFluxPipeline.from_pipe(teacher, adapter=str(tmp_path / "whole"))


def test_files_of_the_base_that_go_along(flux_base: Path, tmp_path: Path) -> None:
    """No second precision, no code and no path of whoever saved it."""
    base = shutil.copytree(flux_base, tmp_path / "base")
    config = json.loads((base / "vae/config.json").read_text())
    (base / "vae/config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me/vae"}))
    shutil.copy(
        base / "vae/diffusion_pytorch_model.safetensors",
        base / "vae/diffusion_pytorch_model.fp16.safetensors",
    )
    (base / "vae/weights.bin").write_bytes(b"pickle")
    parts = PipelineParts.of(of_pipeline("flux", base))
    assert parts is not None
    parts.copy_to(str(tmp_path / "out"), "flux")
    assert sorted(file.name for file in (tmp_path / "out/vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    config.pop("_name_or_path", None)
    assert json.loads((tmp_path / "out/vae/config.json").read_text()) == config
    (base / "vae/config.json").write_text(json.dumps({**config, "auto_map": {"a": "b"}}))
    with pytest.raises(ValueError, match="auto_map"):
        PipelineParts.of(of_pipeline("flux", base))


def test_a_stored_copy_is_whole_or_not_there(tmp_path: Path, monkeypatch: Any) -> None:
    from piflow import storage

    (tmp_path / "a").write_bytes(b"x" * 10**6)
    storage.copy_file(str(tmp_path / "a"), str(tmp_path / "deep/b"))
    assert (tmp_path / "deep/b").read_bytes() == b"x" * 10**6
    with pytest.raises(FileNotFoundError):
        storage.copy_file(str(tmp_path / "none"), str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="read-only"):
        storage.copy_file(str(tmp_path / "a"), "hf://a/b/c")

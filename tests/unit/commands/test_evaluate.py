"""Files of an evaluation's report: small at 1024 pixels a side, and whole or as they were."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch

from piflow import storage
from piflow.commands.evaluate import _lineage, _write_report
from piflow.config import Recipe, load_recipe
from piflow.evaluation.compare import Evaluation, MethodResult, PromptResult
from piflow.evaluation.metrics import Interval

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("teacher, 32 Euler steps", "teacher, 8 Euler steps", "teacher, 4 Euler steps", "student")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(ROOT / "pipelines/recipes/emoji-flux.yaml", [f"run_dir={tmp_path}"])


def evaluation(side: int) -> Evaluation:
    """Noise, which no codec makes smaller."""
    prompts = tuple(f"<b>prompt {number}" for number in range(8))
    noise = torch.randn(1, 1, 3, side, side, generator=torch.Generator().manual_seed(0))
    one = noise.clamp(-1, 1).expand(len(prompts), 1, 3, side, side)
    figure = Interval(1.0, 0.5, 1.5)
    return Evaluation(
        prompts=prompts,
        noise=("ab" * 32,) * len(prompts),
        methods=tuple(
            MethodResult(
                name, 4, {"error": 20.0, "diversity": 0.5}, {"diversity": 1.0}, 1.0, 0.1, False
            )
            for name in NAMES
        ),
        metrics={"psnr": "version 1", "diversity": "version 1"},
        columns={},
        figures={"psnr_gain_db": figure, "diversity_ratio": figure},
        curve=(),
        others=(),
        per_prompt=tuple(PromptResult(prompt, 20.0, 21.0) for prompt in prompts),
        pictures=dict.fromkeys(NAMES, one),
        files={
            name: tuple(f"{row}-{number}.png" for row in range(8))
            for number, name in enumerate(NAMES)
        },
    )


def write(recipe: Recipe, figures: Evaluation, folder: Path) -> list[str]:
    lineage = _lineage(recipe, "run", "manifest", "step 7")
    return _write_report(recipe, figures, str(folder / "evaluation"), lineage)


def test_a_report_of_large_pictures_stays_small(recipe: Recipe, tmp_path: Path) -> None:
    files = write(recipe, evaluation(1024), tmp_path)
    assert files[-2:] == ["grid.jpg", "report.html"] and len(files) == 8 * 4 + 2
    folder = tmp_path / "evaluation"
    sizes = storage.file_sizes(str(folder))
    assert sizes.keys() == {"grid.jpg", "report.html"}
    assert sizes["grid.jpg"] < 24 * 2**20 and sizes["report.html"] < 40 * 2**20
    html = (folder / "report.html").read_text()
    assert "&lt;b&gt;prompt 0" in html and "<b>" not in html
    assert re.findall(r'href="\./([^"]*)"', html) == files[:-2]
    assert html.count("data:image/jpeg;base64,") == 8 * 4


def test_a_full_disk_leaves_the_earlier_report_whole(recipe: Recipe, tmp_path: Path) -> None:
    write(recipe, evaluation(32), tmp_path)
    folder = tmp_path / "evaluation"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .* bytes to .*evaluation/grid.jpg"):
            write(recipe, evaluation(64), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

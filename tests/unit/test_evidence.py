"""`make gpu-evidence`, shrunk: it measures what it says, and a step is the same in every form."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
FORMS = ["flux", "flux, as published", "flux, 8-bit teacher, weights kept"]


@pytest.fixture(scope="module")
def evidence() -> Iterator[Any]:
    """The script, whose neighbours have names of their own only in its folder."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    import evidence

    yield evidence
    sys.path.remove(str(BENCHMARKS))
    for name in {"evidence", "step", "policy", "measure"} - before:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def written(evidence: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("evidence") / "evidence.jsonl"
    evidence.collect(CPU, out, minutes=9, only=FORMS, repeats=1)
    return out


def test_the_published_form_is_the_same_step(evidence: Any, written: Path) -> None:
    """Equal weights and noise give equal losses to bfloat16's rounding; an 8-bit teacher nearly."""
    found = evidence.read(written)
    ours, published, coded = (found[name]["losses"][0] for name in FORMS)
    assert published == pytest.approx(ours, rel=0.01)
    assert coded == pytest.approx(ours, rel=0.1) and coded != ours
    seconds = [found[name]["seconds"]["step"] for name in FORMS[:2]]
    assert found["ratios"]["flux: published over ours"] == seconds[1] / seconds[0]


def test_parts_make_up_a_step(evidence: Any, written: Path) -> None:
    for name in FORMS:
        found = evidence.read(written)[name]
        seconds, planned = found["seconds"], found["planned_mib"]
        parts = {"student", "teacher", "backward", "update", "policy and losses"}
        assert seconds.keys() == parts | {"step"} and min(seconds.values()) > 0
        assert sum(seconds[part] for part in parts) == pytest.approx(seconds["step"])
        assert found["tflops"] > 0 and found["above_level_mib"] > planned["activations"] > 0
        assert (planned["fp8"] > 0) == ("8-bit" in name)


def test_a_call_takes_up_what_is_missing(evidence: Any, written: Path, tmp_path: Path) -> None:
    """What is there stays; what failed is tried again, and a failure ends nothing."""
    out = tmp_path / "evidence.jsonl"
    kept = evidence.read(written)
    evidence.append(out, "machine", kept["machine"])
    evidence.append(out, "flux", {"error": "out of memory"})
    evidence.append(out, "qwen", kept["flux"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "measured", lambda case, *_arguments, **_options: 1 / 0)
        evidence.collect(CPU, out, minutes=9, only=["flux", "qwen"], repeats=1)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["machine", "flux", "qwen", "flux"]
    assert lines[-1]["found"]["error"].startswith("ZeroDivisionError")
    evidence.collect(CPU, out, minutes=0, only=["flux"], repeats=1)
    assert len(out.read_text().splitlines()) == 4, "there is no time left"


def test_every_case_is_a_recipe_that_parses(evidence: Any) -> None:
    for case in evidence.STEPS.values():
        recipe = case.load()
        assert recipe.training.micro_batch_size == recipe.training.batch_size == case.micro_batch
        assert not case.shrunk and recipe.embed.height == recipe.embed.width == 1024
        assert recipe.lora is not None and recipe.lora.rank == 256

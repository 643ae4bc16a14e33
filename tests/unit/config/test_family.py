"""A recipe's family: ours, or another package's, found by its name without anything heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bria_family import FAMILY as BRIA
from bria_family import BriaEncoderConfig

from piflow.config import BUILT_IN, Family, Recipe, RecipeError, find_family, parse_recipe
from piflow.config.family import require_known, resolve
from piflow.inference.settings import SETTINGS_KEY, settings_of

REPOSITORY = Path(__file__).parents[3]
OURS = "flux, flux_kontext, flux2, flux2_klein, qwen_image, qwen_image_edit, sd3, z_image, wan, dit"
LIGHT = """
import sys
from piflow.config import BUILT_IN, find_family, load_recipe
load_recipe("tests/plugins/bria.yaml")
for name in BUILT_IN:
    find_family(name)
print(sorted({"torch", "diffusers", "transformers", "ray", "numpy", "pyarrow"} & set(sys.modules)))
"""


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Names that a test makes findable are not found afterwards."""
    yield
    find_family.cache_clear()


def recipe(family: str, encoder: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    tree = {
        "name": "test",
        "run_dir": "run",
        "model": {"path": "teacher", "family": family},
        "encoder": {"path": "encoder"} if encoder is None else encoder,
        "embed": {"prompts": "p.txt", "store": "store", "height": 32, "width": 32},
    }
    return parse_recipe(tree | sections)


def refusal(family: str, **sections: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(family, **sections)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- ours


def test_a_recipe_is_read_without_anything_heavy() -> None:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "plugins")])
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [*BUILT_IN, "bria_family"])
def test_all_that_a_record_names_is_there(name: str) -> None:
    from diffusers import DiffusionPipeline

    from piflow.backbones.transformer import TransformerBackbone
    from piflow.inference.base import FewStepPipeline

    family = find_family(name)
    backbone = resolve(family.backbone)
    assert issubclass(backbone, TransformerBackbone)
    assert family.pipeline is not None and family.tiny is not None
    pipeline = resolve(family.pipeline)
    assert issubclass(pipeline, FewStepPipeline) and issubclass(pipeline, DiffusionPipeline)
    assert pipeline.backbone_class is backbone
    is_diffusers_own = backbone.adapt is TransformerBackbone.adapt  # a plan names its parts
    has_plan = is_diffusers_own and bool(getattr(backbone.model_class, "_cp_plan", None))
    assert family.splits_tokens == (has_plan and family.edits is None)
    assert (family.edits is not None) == backbone.takes_condition
    for function in ("transformer", "vae", "pipeline"):
        assert callable(getattr(resolve(family.tiny), function))
    for kind in family.encoders:
        assert kind.tiny is not None and callable(resolve(kind.tiny).text_parts)
        assert all(callable(getattr(resolve(kind.module), name)) for name in ("identity", "load"))


# ---------------------------------------------------------------------------------- somebody else's


@pytest.mark.parametrize("name", ["bria_family", "bria_family:FAMILY", "bria_family.FAMILY"])
def test_a_module_brings_a_family_with_its_encoder_and_defaults(name: str) -> None:
    found = recipe(name)
    assert find_family(name) is BRIA
    assert found.encoder == BriaEncoderConfig(path="encoder") and found.guidance.scale == 5.0
    assert parse_recipe(found.model_dump(mode="json")) == found
    assert found.model_dump()["encoder"]["max_tokens"] == 128
    assert recipe(name, guidance={"interval": [0.1, 1]}).guidance.scale == 5.0
    assert recipe(name, guidance={"scale": 2.0}).guidance.scale == 2.0
    stored = found.identity()
    assert stored["guidance"] == {"scale": 5.0} and stored["encoder"]["type"] == "bria"
    assert found.is_run_of("another hash", stored) and found.differences(stored) == []
    assert recipe(name, guidance={"scale": 1.0}).is_run_of(
        "another hash", recipe(name, guidance={"scale": 1.0}).identity()
    ), "the schema's default where a recipe says so, not the family's"


def test_an_entry_point_brings_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    information = tmp_path / "somebody-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    text = "[piflow.families]\nbria = bria_family\nflux = bria_family\n"
    (information / "entry_points.txt").write_text(text)
    assert f"expected one of {OURS}, or " in refusal("bria")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_family("bria") is BRIA
    assert find_family("flux") is not BRIA, "ours can't be replaced"
    assert f"{OURS}, bria, or " in refusal("wrong")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fluxx", "No module named 'fluxx'"),
        ("bria_family.nowhere", "bria_family has no piflow.config.Family called nowhere"),
        ("nowhere.bria", "No module named 'nowhere'"),
        ("bria_family:WRONG", "bria_family has no piflow.config.Family called WRONG"),
        ("json", "json has no piflow.config.Family called FAMILY"),
        ("", "Empty module name"),
        (".flux", "importing it"),
    ],
)
def test_a_wrong_name_tells_which_there_are_and_how_others_are_named(name: str, why: str) -> None:
    message = refusal(name)
    assert f"model.family: expected one of {OURS}, or a family" in message
    assert "by its module or module:attribute and importable here and on all workers" in message
    assert repr(name) in message and why in message


def test_mistakes_in_anothers_encoder_name_its_own_keys_and_kinds() -> None:
    message = refusal("bria_family", encoder={"path": "x", "padding": "keep"})
    assert "unknown key 'encoder.padding'; allowed here: type, path, max_tokens" in message
    assert "encoder.max_tokens: " in refusal("bria_family", encoder={"path": "x", "max_tokens": 0})
    assert "missing key 'encoder.path'" in refusal("bria_family", encoder={})
    message = refusal("bria_family", encoder={"type": "flux", "path": "x"})
    assert "bria_family doesn't go with encoder.type = flux; it takes bria" in message
    message = refusal("bria_family", encoder={"type": "t5", "path": "x"})
    assert "encoder.type: expected one of 'bria', 'flux', 'bert'" in message
    message = refusal("flux", encoder={"type": "bria", "path": "x"})
    assert "encoder.type: expected one of 'flux', 'bert'" in message and "got 'bria'" in message


def test_tokens_of_a_family_without_a_plan_are_not_split() -> None:
    message = refusal("bria_family", runtime={"num_workers": 2, "context_parallel": 2})
    assert (
        "model.family = bria_family has none (flux, flux2, flux2_klein, qwen_image do)" in message
    )


# ----------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    ("objective", "nfe"),
    [(None, 2), ({"shift": 1.0}, 2), ({"type": "pi_id"}, 2), ({"nfe": 8}, 8)],
)
def test_defaults_lie_under_what_a_recipe_says(
    objective: dict[str, Any] | None, nfe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_defaults(monkeypatch, {"objective": {"type": "pi_id", "nfe": 2}})
    found = recipe("bria_family:OTHER", **({} if objective is None else {"objective": objective}))
    assert found.distillation().nfe == nfe


def test_defaults_of_another_variant_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_defaults(monkeypatch, {"objective": {"type": "pi_id", "nfe": 2}, "lora": {"rank": 3}})
    found = recipe("bria_family:OTHER", objective={"type": "flow_matching"}, lora=None)
    assert found.objective.type == "flow_matching" and found.lora is None


def _with_defaults(monkeypatch: pytest.MonkeyPatch, defaults: dict[str, Any]) -> None:
    other = Family(backbone=BRIA.backbone, encoders=BRIA.encoders, defaults=defaults)
    monkeypatch.setattr("bria_family.OTHER", other, raising=False)


def test_what_a_record_names_wrongly_is_told() -> None:
    with pytest.raises(ValueError, match="names bria_family.backbone:Wrong, which can't be import"):
        resolve("bria_family.backbone:Wrong")


# --------------------------------------------------------------------------- named by somebody else


def test_a_file_has_no_module_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted module would leave a mark."""
    mark = tmp_path / "mark"
    for name in ("planted", "package_of_it"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("planted", "planted:FAMILY", "package_of_it.planted", "os.path", "json:loads"):
        if name.startswith(("os", "json")):  # imported already, so that nothing runs
            require_known(name, "the adapter")
            continue
        with pytest.raises(ValueError, match=rf"the adapter is of the family '{name}'.*--family"):
            require_known(name, "the adapter")
    for name in (*BUILT_IN, "bria_family", "bria_family:FAMILY"):
        require_known(name, "the adapter")
    assert not mark.exists()


def test_an_adapter_has_no_module_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "planted_family.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = json.dumps({"model": {"family": "planted_family", "path": "x"}})
    adapter = SimpleNamespace(metadata={SETTINGS_KEY: text})
    with pytest.raises(ValueError, match="adapter/ is of the family 'planted_family'"):
        settings_of(adapter, "adapter/")  # type: ignore[arg-type]
    ours = recipe("flux")
    stored = {**ours.identity(), "model": {"family": "planted_family", "path": "teacher"}}
    assert not ours.is_run_of("another hash", stored)
    assert any("planted_family" in line for line in ours.differences(stored))
    assert not mark.exists()

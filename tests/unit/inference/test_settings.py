"""Students as files: checkpoint -> adapter -> student draws the same pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from piflow.backbones import Conditioning, FluxBackbone
from piflow.backbones.flux import FluxEncoderConfig
from piflow.config import (
    BertEncoderConfig,
    EMAConfig,
    GMFlowPolicyConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    TrainingConfig,
    identity,
    parse_recipe,
)
from piflow.imitation import PartOfLoss
from piflow.inference.places import parts_of_base
from piflow.inference.settings import (
    SamplingSettings,
    encode_prompts,
    load_student,
    places_of,
    read_adapter,
    settings_of,
    student_of,
)
from piflow.policies import GMFlowPolicy
from piflow.roles.adapter import WEIGHTS_FILE, load_adapter
from piflow.roles.trio import Trio
from piflow.sampling import sample_few_step
from piflow.schedule import FewStep
from piflow.sharding.single import SingleStrategy
from piflow.storage.fingerprint import weights_fingerprint
from piflow.training.build import build_trio
from piflow.training.checkpoint import RunState
from piflow.training.export import export_adapter, student_of_checkpoint
from piflow.training.step import Trainer
from tests.hub import COMMIT, Hub
from tests.unit.roles.test_teacher_lora import linear_layers, write_lora
from tests.unit.whole import save_checkpoint

PACKAGES = ("package://",)  # where these adapters' encoders are


def recipe(flux_folder: Path, **sections: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "tiny",
            "run_dir": "unused",
            "model": {"path": str(flux_folder)},
            "encoder": {"path": "package://an.encoder", "max_tokens": 4},
            "embed": {"prompts": "p.txt", "store": "s", "height": 16, "width": 8},
            "objective": {"type": "pi_id", "nfe": 2, "shift": 2.0, "total_substeps": 16},
            "policy": {"num_gaussians": 3, "logstd_inner_dim": 8},
            "lora": {"rank": 4},
            **sections,
        }
    )


class Rows:
    index = 0
    prompts = prompt_ids = ("a", "b", "c")


@pytest.fixture
def checkpoint(flux_folder: Path, flux_inputs: Any, tmp_path: Path) -> tuple[Path, Trio]:
    """A checkpoint after three real steps, and the trio that it was saved from."""
    return trained(recipe(flux_folder), flux_inputs, tmp_path / "checkpoint")


def trained(ours: Recipe, inputs: Any, folder: Path) -> tuple[Path, Trio]:
    trio = build_trio(ours)
    x, sigma, cond = inputs

    def losses(batch: Rows, step: int, generator: torch.Generator) -> Iterator[PartOfLoss]:
        loss = (trio.student(x, sigma, cond).velocity(x, 0.5 * sigma) - 1).square().mean()
        yield loss, True

    training = TrainingConfig(
        batch_size=3,
        micro_batch_size=3,
        optimizer=OptimizerConfig(lr=0.02, warmup_steps=0),
        ema=EMAConfig(start=1),
    )
    trainer = Trainer(
        SimpleNamespace(losses=losses),
        trio.trainable_parameters(),
        trio.ema_parameters(),
        SingleStrategy(torch.device("cpu")),
        training,
        seed=0,
    )
    for step in range(3):
        trainer.step(step, [Rows()])
    state = RunState(3, 9, ours.hash(), "run", ours.model_dump(mode="json"))
    save_checkpoint(folder, trainer, state)
    return folder, trio.train(False)


def pictures(policy: Any, cond: Conditioning, noise: Tensor | None = None) -> Tensor:
    if noise is None:
        noise = torch.randn(3, 12, 8, 4, generator=torch.Generator().manual_seed(3))
    return sample_few_step(
        lambda x, sigma: policy(x, sigma, cond),
        noise,
        FewStep(2, 0.5, 2.0, 16),
    )


def test_a_checkpoints_two_sets_of_weights(
    checkpoint: tuple[Path, Trio], flux_folder: Path, flux_inputs: Any
) -> None:
    folder, trio = checkpoint
    ours, cond = recipe(flux_folder), flux_inputs[2]
    averaged, state = student_of_checkpoint(ours, str(folder), "ema")
    newest, _ = student_of_checkpoint(ours, str(folder), "student")
    assert state.step == 3
    assert torch.equal(pictures(averaged.student, cond), pictures(trio.ema, cond))
    assert torch.equal(pictures(newest.student, cond), pictures(trio.student, cond))
    assert not torch.equal(pictures(newest.student, cond), pictures(averaged.student, cond))


def test_export_and_load_draw_identical_pictures(
    checkpoint: tuple[Path, Trio], flux_folder: Path, flux_inputs: Any, tmp_path: Path
) -> None:
    folder, trio = checkpoint
    out = str(tmp_path / "adapter")
    export_adapter(
        recipe(flux_folder),
        str(folder),
        out,
        weights="ema",
        dtype="float32",
        lineage={"piflow.run_id": "run"},
    )
    student, settings = load_student(out, allowed=places_of(recipe(flux_folder)))
    cond = flux_inputs[2]
    assert torch.equal(pictures(student.student, cond), pictures(trio.ema, cond))
    assert (settings.height, settings.width) == (16, 8)
    assert settings.few_step == FewStep(2, 0.5, shift=2.0, total_substeps=16)
    assert settings.encoder == BertEncoderConfig(path="package://an.encoder", max_tokens=4)
    assert settings.model == ModelConfig(path=str(flux_folder))
    metadata = load_adapter(out).metadata
    assert metadata["piflow.run_id"] == "run" and metadata["base_model"] == flux_folder.name


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
def test_a_teachers_lora_goes_with_the_adapter(
    lora: Any, flux_folder: Path, flux_inputs: Any, tmp_path: Path
) -> None:
    """Beside it and by its hash: another file under the name is refused, and so is none."""
    module = build_trio(recipe(flux_folder, lora=None)).modules[0]
    layers = linear_layers(module, outputs=False)
    style = write_lora(tmp_path / "style.safetensors", layers)
    section = {"path": str(flux_folder), "lora": {"path": str(style), "strength": 0.5}}
    ours, cond = recipe(flux_folder, model=section, lora=lora), flux_inputs[2]
    folder, trio = trained(ours, flux_inputs, tmp_path / "checkpoint")
    out = tmp_path / "adapter"
    kinds: Any = {"weights": "ema", "dtype": "float32", "lineage": {}}
    export_adapter(ours, str(folder), str(out), **kinds)
    noted = settings_of(load_adapter(out), str(out)).model.lora
    assert noted is not None and (noted.path, noted.strength) == (style.name, 0.5)
    allowed = places_of(recipe(flux_folder))  # the base and the encoder, not the LoRA
    student, _ = load_student(str(out), allowed=allowed)
    assert torch.equal(pictures(student.student, cond), pictures(trio.ema, cond))
    teachers = [made.teacher_velocity(*flux_inputs) for made in (student, trio)]
    assert torch.equal(*teachers)
    base = build_trio(recipe(flux_folder)).teacher_velocity(*flux_inputs)
    assert not torch.allclose(teachers[0], base, atol=1e-2)
    (out / style.name).write_bytes(style.read_bytes() + b" ")
    with pytest.raises(ValueError, match="isn't the teacher's LoRA that the adapter was made with"):
        load_student(str(out), allowed=allowed)
    (out / style.name).unlink()
    with pytest.raises(ValueError, match="was made with teacher's LoRA 'style.safetensors'"):
        load_student(str(out), allowed=allowed)


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
@pytest.mark.parametrize("mode", ["gm", "grid", "polynomial"])
@pytest.mark.parametrize("family", ["flux", "flux2", "qwen_image", "sd3", "dit"])
def test_every_kind_of_student_comes_back(
    family: str, mode: str, lora: Any, make_case: Callable[[str], Any], tmp_path: Path
) -> None:
    backbone, inputs = make_case(family)
    ours = of_family(family, saved(backbone, tmp_path / "base"), mode=mode, lora=lora)
    folder, trio = trained(ours, inputs, tmp_path / "checkpoint")
    out = str(tmp_path / "adapter")
    export_adapter(ours, str(folder), out, weights="ema", dtype="float32", lineage={})
    student, settings = load_student(out, allowed=places_of(ours))
    x, _, cond = inputs
    drawn, expected = pictures(student.student, cond, x), pictures(trio.ema, cond, x)
    assert torch.equal(drawn, expected)
    assert not torch.equal(expected, pictures(trio.student, cond, x))
    assert settings.encoder == ours.encoder and settings.model == ours.model


def of_family(family: str, folder: Path, *, mode: str, lora: Any) -> Recipe:
    """Any policy on any family."""
    policy: dict[str, Any] = {"type": "dx", "mode": mode, "num_points": 4}
    if mode == "gm":
        policy = {"type": "gmflow", "num_gaussians": 3, "logstd_inner_dim": 8}
    encoder: dict[str, Any] = {"type": family, "path": "package://an.encoder"}
    if family == "dit":
        encoder = {"type": "class_label", "num_classes": 10}
    model: dict[str, Any] = {"family": family, "path": str(folder)}
    more: dict[str, Any] = {}
    if family == "wan":  # videos of one frame, as large as pictures
        model["frames"], more["evaluation"] = 1, {"retrieval": False}
    return recipe(folder, model=model, encoder=encoder, policy=policy, lora=lora, **more)


def saved(backbone: Any, folder: Path) -> Path:
    """The backbone's model as a diffusers folder, with other weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone.model_class.from_config(backbone.config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("models/flux", "flux"),
        ("../FLUX.1-dev/transformer", "FLUX.1-dev/transformer"),
        ("/home/somebody/models/flux/vae/", "flux/vae"),
        ("file:///mnt/flux", "flux"),
        ("s3://bucket/flux/transformer?region=x", "s3://bucket/flux/transformer?region=x"),
        ("hf://owner/name@main/transformer", "hf://owner/name@main/transformer"),
        ("package://a.teacher", "package://a.teacher"),
    ],
)
def test_local_folders_are_written_by_their_names(place: str, name: str) -> None:
    ours = recipe(
        Path("unused"),
        model={"path": place, "codec": "vae", "vae": "models/vae"},
        encoder={"type": "flux", "path": "/data/models"},
    )
    settings = SamplingSettings.of(ours)
    assert settings.model.path == name and settings.model.vae == "models/vae"
    assert isinstance(settings.encoder, FluxEncoderConfig)
    assert settings.encoder.path == "models" and settings.encoder.max_tokens == 512
    again = SamplingSettings.model_validate_json(settings.model_dump_json())
    assert again == settings


def test_an_adapter_holds_no_path_of_its_machine(
    checkpoint: tuple[Path, Trio], flux_folder: Path, tmp_path: Path
) -> None:
    """It is found through what the user allows, by its name; nowhere else."""
    out = tmp_path / "adapter"
    ours = recipe(flux_folder)
    export_adapter(ours, str(checkpoint[0]), str(out), weights="ema", dtype="float32", lineage={})
    written = b"".join(file.read_bytes() for file in out.iterdir())
    assert str(flux_folder.parent).encode() not in written
    assert flux_folder.name.encode() in written
    for allowed in (places_of(ours), [str(flux_folder.parent)], [str(flux_folder)]):
        _, settings = load_student(str(out), allowed=["package://", *allowed])
        assert settings.model.path == str(flux_folder)
    with pytest.raises(
        ValueError, match=f"made with base '{flux_folder.name}', a place of another"
    ):
        load_student(str(out), allowed=["package://", str(tmp_path)])
    moved = shutil.copytree(flux_folder, out / flux_folder.name)
    _, settings = load_student(str(out), allowed=["package://"])
    assert settings.model.path == str(moved)


def test_all_parts_are_found_in_a_pipelines_folder(
    flux_folder: Path, flux_inputs: Any, tmp_path: Path
) -> None:
    """On another machine `--base` is all that is needed; an encoder of its own goes before."""
    out = str(tmp_path / "adapter")
    model = {"path": str(flux_folder), "codec": "vae", "vae": "models/vae"}
    ours = recipe(flux_folder, model=model, encoder={"type": "flux", "path": "models/flux"})
    folder, _ = trained(ours, flux_inputs, tmp_path / "checkpoint")
    export_adapter(ours, str(folder), out, weights="ema", dtype="float32", lineage={})
    with pytest.raises(ValueError, match=r"base 'flux\d+', VAE 'models/vae', encoder 'flux'"):
        read_adapter(out)
    pipeline = tmp_path / "pipeline"
    shutil.copytree(flux_folder, pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    _, settings = read_adapter(out, str(pipeline))
    assert settings.model.path == str(pipeline / "transformer")
    assert settings.model.vae == str(pipeline / "vae")
    assert settings.encoder.model_dump()["path"] == str(pipeline)
    _, settings = read_adapter(out, str(pipeline), encoder="/my/encoder")
    assert settings.encoder.model_dump()["path"] == "/my/encoder"


def test_a_base_on_the_hub_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers takes it; a local folder of that name goes before."""
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def exists(uri: str) -> bool:
        asked.append(uri)
        return uri in ("hf://owner/name/model_index.json", "owner/local")

    monkeypatch.setattr("piflow.storage.exists", exists)
    assert parts_of_base("owner/name") == {
        "base": "hf://owner/name/transformer",
        "VAE": "hf://owner/name/vae",
        "encoder": "hf://owner/name",
    }
    assert asked == ["owner/name", "hf://owner/name/model_index.json"]
    assert parts_of_base("owner/local") == {"base": "owner/local"}
    assert parts_of_base("/a/b/transformer") == {"base": "/a/b/transformer"}


def test_the_schedules_numbers_are_keys_beside_the_others() -> None:
    """As adapters have them since version 0.1.0, which wrote no schema version."""
    stored = {
        "model": {"path": "/base/transformer"},
        "encoder": {"type": "bert", "path": "package://an.encoder"},
        "height": 16,
        "width": 8,
        "nfe": 3,
        "final_step_size_scale": 0.25,
        "shift": 2.0,
        "total_substeps": 16,
        "embedded_guidance": 3.5,
    }
    settings = SamplingSettings.model_validate_json(json.dumps(stored))
    assert settings.few_step == FewStep(3, 0.25, 2.0, 16)
    written = json.loads(settings.model_dump_json())
    assert written.keys() == stored.keys() | {"schema_version"}
    assert {key: written[key] for key in stored if key not in ("model", "encoder")} == {
        key: value for key, value in stored.items() if key not in ("model", "encoder")
    }
    for change in ({"nfe": 0}, {"shift": "fast"}, {"steps": 4}):
        with pytest.raises(ValueError, match=next(iter(change))):
            SamplingSettings.model_validate_json(json.dumps(stored | change))
    for key in ("nfe", "shift", "total_substeps"):
        without = {name: value for name, value in stored.items() if name != key}
        with pytest.raises(ValueError, match=key):
            SamplingSettings.model_validate_json(json.dumps(without))


def test_class_labels_are_encoded(flux_folder: Path) -> None:
    ours = of_family("dit", flux_folder, mode="gm", lora=None)
    cond = encode_prompts(SamplingSettings.of(ours), ["7", "", "0"])
    assert cond.pooled is not None and cond.pooled.tolist() == [[7.0], [10.0], [0.0]]
    assert cond.tokens.shape == (3, 1, 1)


def test_the_guidance_input_is_kept(flux_config: dict[str, Any], tmp_path: Path) -> None:
    """FLUX.1-dev's kind of model has it, and its student needs the same."""
    folder = tmp_path / "flux"
    FluxTransformer2DModel(**flux_config, guidance_embeds=True).save_pretrained(str(folder))
    ours = recipe(folder, guidance={"embedded": 3.5})
    trio = build_trio(ours)
    trainer = Trainer(
        SimpleNamespace(losses=None),  # nothing is trained
        trio.trainable_parameters(),
        trio.ema_parameters(),
        SingleStrategy(torch.device("cpu")),
        ours.training,
        seed=0,
    )
    save_checkpoint(tmp_path / "step", trainer, RunState(0, 0, ours.hash(), None, {}))
    out = str(tmp_path / "adapter")
    export_adapter(ours, str(tmp_path / "step"), out, weights="ema", dtype="float32", lineage={})
    assert load_student(out, allowed=places_of(ours))[1].embedded_guidance == 3.5


def test_bfloat16_is_close(
    checkpoint: tuple[Path, Trio], flux_folder: Path, flux_inputs: Any, tmp_path: Path
) -> None:
    folder, trio = checkpoint
    out = str(tmp_path / "adapter")
    export_adapter(
        recipe(flux_folder), str(folder), out, weights="student", dtype="bfloat16", lineage={}
    )
    cond = flux_inputs[2]
    loaded, _ = load_student(out, str(flux_folder), allowed=PACKAGES)
    difference = pictures(loaded.student, cond) - pictures(trio.student, cond)
    assert 0 < difference.abs().max() < 0.1


def test_another_base_may_be_given(
    checkpoint: tuple[Path, Trio], flux_folder: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "adapter")
    ours = recipe(flux_folder)
    export_adapter(ours, str(checkpoint[0]), out, weights="ema", dtype="float32", lineage={})
    moved = tmp_path / "moved"
    moved.symlink_to(flux_folder)
    load_student(out, base=str(moved), allowed=PACKAGES)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_student(out, base=str(tmp_path / "nowhere"), allowed=PACKAGES)


def test_replaced_base_weights_are_refused(
    checkpoint: tuple[Path, Trio], flux_folder: Path, tmp_path: Path
) -> None:
    """One value of one tensor's start is enough; other files of the same weights are the same."""
    out = str(tmp_path / "adapter")
    ours = recipe(flux_folder)
    export_adapter(ours, str(checkpoint[0]), out, weights="ema", dtype="float32", lineage={})
    base = tmp_path / "base"
    FluxTransformer2DModel.from_pretrained(str(flux_folder)).save_pretrained(
        str(base), max_shard_size="5KB"
    )
    assert len(list(base.glob("*.safetensors"))) > 1
    load_student(out, base=str(base), allowed=PACKAGES)
    file = sorted(base.glob("*.safetensors"))[0]
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match="made from base weights .*Give the base that it was made"):
        load_student(out, base=str(base), allowed=PACKAGES)
    adapter = load_file(Path(out) / WEIGHTS_FILE)
    notes = load_adapter(out).metadata
    del notes["piflow_base_sha256"]  # as version 0.1.0 wrote them
    save_file(adapter, Path(out) / WEIGHTS_FILE, metadata=notes)
    load_student(out, base=str(base), allowed=PACKAGES)


def test_a_checkpoint_of_another_recipe(checkpoint: tuple[Path, Trio], flux_folder: Path) -> None:
    other = recipe(flux_folder, seed=1)
    with pytest.raises(ValueError) as caught:
        student_of_checkpoint(other, str(checkpoint[0]), "ema")
    message = str(caught.value)
    assert f"was written by recipe {recipe(flux_folder).hash()}" in message
    assert f"this one is {other.hash()}" in message and "use the recipe that wrote it" in message


def test_export_of_a_recipe_that_distils_nothing(flux_folder: Path, tmp_path: Path) -> None:
    square = {"prompts": "p.txt", "store": "s", "height": 16, "width": 16}
    pretraining = recipe(flux_folder, objective={"type": "flow_matching"}, embed=square)
    with pytest.raises(ValueError, match="expected .* pi_id, got flow_matching"):
        export_adapter(pretraining, "x", str(tmp_path), weights="ema", dtype="float32", lineage={})


def test_an_adapter_without_settings(
    checkpoint: tuple[Path, Trio], flux_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    export_adapter(
        recipe(flux_folder), str(checkpoint[0]), str(out), weights="ema", dtype="float32",
        lineage={},
    )  # fmt: skip
    tensors = load_file(out / WEIGHTS_FILE)
    save_file(tensors, out / WEIGHTS_FILE, metadata={"base_model": str(flux_folder)})
    _, settings = read_adapter(str(out), str(flux_folder))
    assert settings.few_step == FewStep(4, 0.5, 3.2, 128), "not the 2, 0.5, 2.0, 16 it was noted"
    assert settings.encoder.path == "hf://black-forest-labs/FLUX.1-dev"  # type: ignore[attr-defined]


def test_the_rounding_of_substeps_goes_along(flux_folder: Path) -> None:
    """The default writes no key, so that earlier versions of piflow read what they can."""
    usual = SamplingSettings.of(recipe(flux_folder))
    assert "substep_rounding" not in usual.model_dump_json()
    objective = {"type": "pi_id", "nfe": 2, "total_substeps": 16, "substep_rounding": "up"}
    ours = SamplingSettings.of(recipe(flux_folder, objective=objective))
    assert ours.few_step == FewStep(2, 0.5, 3.2, 16, "up")
    for settings in (usual, ours):
        text = settings.model_dump_json()
        assert SamplingSettings.model_validate_json(text) == settings
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def student(x: Tensor, sigma: Tensor) -> GMFlowPolicy:
        zeros = torch.zeros(1, 1, 1, 1, 1)
        return GMFlowPolicy(x[:, None], zeros, torch.zeros(1, 1, 1, 4, 4), x, sigma)

    up, by_hand = (
        sample_few_step(student, noise, few_step)
        for few_step in (ours.few_step, FewStep(2, 0.5, 3.2, 16))
    )
    assert (up - by_hand).abs().max() > 1e-4, "11 and 6 substeps, not 11 and 5"


def test_settings_of_an_older_schema_are_migrated(
    flux_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if schema 4 had renamed `path` of the model, and added a key that is none of theirs."""

    def renamed(tree: dict[str, Any]) -> dict[str, Any]:
        model = {"path" if key == "folder" else key: item for key, item in tree["model"].items()}
        return {"seed": 7, **tree, "model": model}

    ours = SamplingSettings.of(recipe(flux_folder))
    old = json.loads(ours.model_dump_json())
    assert old["schema_version"] == 3
    assert SamplingSettings.model_validate_json(json.dumps(old)) == ours
    old["model"]["folder"] = old["model"].pop("path")
    monkeypatch.setattr(identity, "SCHEMA", 4)
    monkeypatch.setitem(identity.MIGRATIONS, 3, renamed)
    assert SamplingSettings.model_validate_json(json.dumps(old)) == ours
    assert json.loads(ours.model_dump_json())["schema_version"] == 4


@pytest.mark.parametrize("version", [4, "1", None])
def test_settings_of_a_schema_that_is_not_known(version: Any, flux_folder: Path) -> None:
    tree = json.loads(SamplingSettings.of(recipe(flux_folder)).model_dump_json())
    with pytest.raises(ValueError, match="schema_version (= 4 isn't known|must be a whole number)"):
        SamplingSettings.model_validate_json(json.dumps({**tree, "schema_version": version}))


@pytest.mark.parametrize("text", ["{", json.dumps({"family": "flux"}), json.dumps({"new": 1})])
def test_settings_of_another_version(
    text: str, checkpoint: tuple[Path, Trio], flux_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    export_adapter(
        recipe(flux_folder), str(checkpoint[0]), str(out), weights="ema", dtype="float32",
        lineage={},
    )  # fmt: skip
    adapter = load_adapter(str(out))
    adapter.metadata["piflow_settings"] = text
    with pytest.raises(ValueError, match="here: piflow_settings are not.*export it again"):
        settings_of(adapter, "here")


def test_an_adapter_names_its_bases_commit_and_weights(
    flux_folder: Path, flux_inputs: Any, hub: Hub, tmp_path: Path
) -> None:
    """A base on a hub may get other weights later."""
    out = str(tmp_path / "adapter")
    ours = recipe(flux_folder, model={"path": "hf://lab/flux/transformer"})
    checkpoint, _ = trained(ours, flux_inputs, tmp_path / "checkpoint")
    export_adapter(
        ours, str(checkpoint), out, weights="ema", dtype="float32", lineage={},
        base_commit=COMMIT,
    )  # fmt: skip
    adapter = load_adapter(out)
    assert adapter.metadata["piflow_base_sha256"] == weights_fingerprint(str(flux_folder))
    base = f"hf://lab/flux@{COMMIT}/transformer"
    assert settings_of(adapter, out).model.path == base
    student_of(adapter, settings_of(adapter, out))


def test_a_student_is_sampled_on_a_base_in_the_codes_that_it_was_trained_on(
    make_adapter: Callable[..., Path], flux_base: Path
) -> None:
    """As the adapter notes it; the same velocity as of the recipe's own trio."""
    folder = str(make_adapter(FluxBackbone, flux_base, GMFlowPolicyConfig(num_gaussians=2)))
    adapter, settings = read_adapter(folder, str(flux_base), dtype="float32")
    assert settings.model.base_weights is None
    model = settings.model.model_copy(update={"base_weights": "int8"})
    noted = settings.model_copy(update={"model": model})
    again = SamplingSettings.model_validate_json(noted.model_dump_json())
    assert again.model.base_weights == "int8"
    exact, ours = student_of(adapter, settings), student_of(adapter, again)
    assert exact.coded is None and ours.coded is not None and ours.coded.kind == "int8"
    generator = torch.Generator().manual_seed(0)
    backbone: Any = ours.backbone
    x, sigma = torch.randn(1, backbone.latent_channels, 4, 4, generator=generator), torch.ones(1)
    cond = backbone.blank_conditioning(4)
    whole = exact.teacher_velocity(x, sigma, cond)
    off = (ours.teacher_velocity(x, sigma, cond) - whole).norm() / whole.norm()
    assert 1e-5 < off < 0.05

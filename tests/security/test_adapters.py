"""Adapters of somebody else's: what they name, what they claim, and how strong they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from piflow import storage
from piflow.backbones import FluxBackbone
from piflow.config import DXPolicyConfig, GMFlowPolicyConfig, LoRAConfig
from piflow.inference.places import resolve_places
from piflow.inference.settings import SETTINGS_KEY, SamplingSettings, load_student, settings_of
from piflow.roles.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, load_adapter, save_adapter
from piflow.roles.heads import PolicyClock
from piflow.roles.lora import with_scale_one
from piflow.roles.trio import Trio

SETTINGS = {
    "schema_version": 1,
    "model": {"family": "flux", "path": "base"},
    "encoder": {"type": "bert", "path": "encoder", "max_tokens": 4},
    "height": 16,
    "width": 8,
    "embedded_guidance": None,
    "nfe": 2,
    "final_step_size_scale": 0.5,
    "shift": 2.0,
    "total_substeps": 16,
}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=6, pooled_projection_dim=5,
        axes_dims_rope=[2, 2, 4],
    ).save_pretrained(str(folder))  # fmt: skip
    return folder


@pytest.fixture
def write(flux: Path, tmp_path: Path) -> Callable[..., Path]:
    """An adapter with these settings and this policy."""

    def write(settings: Any = None, dx: bool = False, rank: int = 4) -> Path:
        policy: Any = GMFlowPolicyConfig(num_gaussians=2, logstd_inner_dim=8)
        if dx:
            policy = DXPolicyConfig(num_points=4)
        trio = Trio.from_backbone(
            FluxBackbone.load(flux),
            LoRAConfig(rank=rank, dropout=0.0),
            policy,
            PolicyClock(0.3, 3.2),
            generator=torch.Generator().manual_seed(0),
        )
        generator = torch.Generator().manual_seed(1)
        tensors = {
            name: parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=generator)
            for name, parameter in trio.trainable_parameters().items()
        }
        notes = {} if settings is None else {SETTINGS_KEY: json.dumps(settings)}
        save_adapter(
            tmp_path / "adapter", trio.backbone, tensors, policy, PolicyClock(0.3, 3.2),
            base_model="base", metadata=notes, dtype="float32",
        )  # fmt: skip
        return tmp_path / "adapter"

    return write


# --------------------------------------------------------------------------------- what they name

EVIL = "s3://bucket/base?endpoint_override=evil.example:80&scheme=http"


@pytest.mark.parametrize(
    ("place", "adapter"),
    [
        ("/etc/models", "/data/adapter"),
        ("file:///etc/models", "/data/adapter"),
        ("~/models", "/data/adapter"),
        ("package://os_like/models", "/data/adapter"),
        (EVIL, "/data/adapter"),
        (EVIL, "s3://bucket/adapter"),
        ("s3://bucket/base", "/data/adapter"),
        ("s3://other/base", "s3://bucket/adapter"),
        ("s3://bucket/base?region=x", "s3://bucket/adapter"),
        ("/data/adapter-of-another/base", "s3://bucket/adapter"),
    ],
)
def test_places_that_take_the_users_word(place: str, adapter: str) -> None:
    with pytest.raises(ValueError, match="--allow .*--base and --encoder") as refused:
        resolve_places({"base": place}, adapter)
    assert f"--allow {place}" in str(refused.value) and "base" in str(refused.value)
    found = resolve_places({"base": place}, adapter, [place])
    assert found == {"base": storage.absolute(place)}


@pytest.mark.parametrize(
    "place",
    ["../base", "a/../../b", "./base", "", "a//b", "/data/../etc", "s3://bucket/a/../b", "a\x00b",
     "package://x/../y", "file:///data/adapter/../../etc"],
)  # fmt: skip
def test_places_that_are_none(place: str) -> None:
    with pytest.raises(ValueError, match="adapter"):
        resolve_places({"base": place}, "/data/adapter", ["/", "package://", "s3://bucket"])


def test_open_places() -> None:
    places = {"base": "base/transformer", "encoder": "hf://owner/name@main/x"}
    assert resolve_places(places, "/data/adapter") == {
        "base": "/data/adapter/base/transformer",
        "encoder": "hf://owner/name@main/x",
    }
    query = "?endpoint_override=127.0.0.1:8333&scheme=http"
    places = {"base": f"s3://bucket/models/flux{query}", "encoder": "own"}
    assert resolve_places(places, f"s3://bucket/runs/adapter{query}") == {
        "base": f"s3://bucket/models/flux{query}",
        "encoder": f"s3://bucket/runs/adapter/own{query}",
    }


def test_what_is_allowed_ends_at_a_parts_end() -> None:
    allowed = ["/data/models", "s3://bucket/models", "package://some.models"]
    for place in ("/data/models/a", "s3://bucket/models/a/b", "package://some.models/teacher"):
        resolve_places({"base": place}, "/adapter", allowed)
    for place in ("/data/models2/a", "s3://bucket/models2", "package://some.models2/x"):
        with pytest.raises(ValueError, match="--allow"):
            resolve_places({"base": place}, "/adapter", allowed)


def test_all_refused_places_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"--allow /a --allow package://b/c") as refused:
        resolve_places({"base": "/a", "VAE": "hf://o/n/vae", "encoder": "package://b/c"}, "x")
    assert "hf://" not in str(refused.value).split("names")[1].split(";")[0]


def test_nothing_is_opened_before_it_is_allowed(
    write: Callable[..., Path], flux: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted/__init__.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    places = {"path": EVIL, "vae": "package://planted.models/vae", "codec": "vae"}
    folder = str(write(SETTINGS | {"model": {"family": "flux", **places}}))
    with pytest.raises(ValueError, match="names base .*evil.example.*, VAE 'package://planted"):
        load_student(folder)
    with pytest.raises(ValueError, match="names VAE 'package://planted"):
        load_student(folder, base=str(flux))
    assert not mark.exists()


def test_packages_are_compared_by_their_names_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To look up where a dotted name lies imports its parent."""
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted/__init__.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    place = "package://planted.models/base"
    for allowed in ("package://other.models", "package://planted", "/data", "s3://bucket"):
        with pytest.raises(ValueError, match="--allow"):
            resolve_places({"base": place}, "/adapter", [allowed])
    for allowed in ("package://planted.models", "package://planted.models/", "package://"):
        assert resolve_places({"base": place}, "/adapter", [allowed]) == {"base": place}
    assert not (tmp_path / "mark").exists()


def test_the_users_own_places(write: Callable[..., Path], flux: Path) -> None:
    settings = SETTINGS | {"model": {"family": "flux", "path": "/nowhere"}}
    settings["encoder"] = {"type": "bert", "path": "package://x/y", "max_tokens": 4}
    folder = str(write(settings))
    _, found = load_student(folder, base=str(flux), encoder="/my/encoder")
    assert (found.model.path, found.encoder.model_dump()["path"]) == (str(flux), "/my/encoder")
    _, found = load_student(folder, base=str(flux), allowed=["package://"])
    assert found.encoder.model_dump()["path"] == "package://x/y"


# --------------------------------------------------------------------------------- what they claim


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"nfe": 10**6}, "nfe is 1000000, at most 64"),
        ({"nfe": 10**300}, "at most 64 can be run"),
        ({"nfe": "1000000"}, "nfe is 1000000, at most 64"),
        (
            {
                "few_step": {
                    "nfe": 10**9,
                    "shift": 1.0,
                    "final_step_size_scale": 0.5,
                    "total_substeps": 8,
                }
            },
            "nfe is 1000000000, at most 64",
        ),
        ({"total_substeps": 10**9}, "total_substeps is 1000000000, at most 16384"),
        ({"height": 10**6}, "height: .*less than or equal to 16384"),
        ({"width": 0}, "width: .*greater than 0"),
        ({"shift": "x"}, "few_step.shift"),
        ({"encoder": {"type": "bert", "path": "e", "max_tokens": 10**9}}, "1000000000 tokens, at"),
        ({"model": None}, "model"),
        ({"model": {"family": 3, "path": "x"}}, "model.family"),
        ({"\x1b[2J": 1}, r"\\x1b\[2J"),
        ({"schema_version": []}, "schema_version"),
    ],
)
def test_settings_that_are_refused(entries: dict[str, Any], message: str) -> None:
    adapter = Adapter(None, {}, {SETTINGS_KEY: json.dumps(SETTINGS | entries)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"here: {SETTINGS_KEY} are not.*{message}") as refused:
        settings_of(adapter, "here")
    assert "\x1b" not in str(refused.value)


def test_settings_that_are_read() -> None:
    adapter = Adapter(None, {}, {SETTINGS_KEY: json.dumps(SETTINGS)})  # type: ignore[arg-type]
    found = settings_of(adapter, "here")
    assert found.few_step.nfe == 2
    assert SamplingSettings.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "[" * 100000, '{"a":' * 300 + "1"])
def test_settings_that_are_no_object(text: str) -> None:
    with pytest.raises(ValueError, match=f"here: {SETTINGS_KEY} are not"):
        settings_of(Adapter(None, {}, {SETTINGS_KEY: text}), "here")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"segment_size": 1e-9}, "expected a segment_size from 1/64 to 1"),
        ({"segment_size": float("nan")}, "expected a segment_size"),
        ({"segment_size": "x"}, "expected a segment_size"),
        ({"shift": float("inf")}, "positive shift"),
        ({"mode": "\x1b"}, "expected mode grid or polynomial or velocity_polynomial"),
        ({"mode": ["grid"]}, "expected mode grid or polynomial or velocity_polynomial"),
    ],
)
def test_a_clock_that_never_ends(
    entries: dict[str, Any], message: str, write: Callable[..., Path]
) -> None:
    path = write(dx=True) / WEIGHTS_FILE
    described = {"type": "DX", "segment_size": 0.3, "shift": 3.2, "mode": "grid"} | entries
    save_file(load_file(path), path, metadata={"policy_config": json.dumps(described)})
    with pytest.raises(ValueError, match=message):
        load_adapter(path.parent)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"in_channels": 0}, "in_channels to be a positive whole number, got 0"),
        ({"in_channels": "x"}, "in_channels to be a positive"),
        ({"out_channels": -1}, "out_channels to be a positive"),
        ({"num_gaussians": 1.5}, "num_gaussians to be a positive"),
        ({"logstd_inner_dim": None}, "logstd_inner_dim to be a positive"),
        ({"logstd_inner_dim": 10**12}, "logstd_inner_dim"),
        ({"logstd_inner_dim": 999}, "expected 999 rows"),
        ({"num_gaussians": 10**12}, "num_gaussians"),
        ({"num_gaussians": 999}, "proj_out_means.weight: expected"),
        ({"num_layers": 10**9}, "num_layers 1000000000 .base: 1"),
    ],
)
def test_a_configuration_of_other_numbers(
    entries: dict[str, Any], message: str, write: Callable[..., Path], flux: Path
) -> None:
    folder = write()
    tree = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(tree | entries))
    with pytest.raises(ValueError, match=message):
        Trio.from_adapter(FluxBackbone.load(flux), load_adapter(folder))


@pytest.mark.parametrize("content", [b"", b"null", b"[]", '{"a": 1}'.encode("utf-16"), b"[" * 9999])
def test_a_configuration_that_is_no_object(content: bytes, write: Callable[..., Path]) -> None:
    folder = write()
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="the adapter is damaged: .*config.json"):
        load_adapter(folder)


def test_a_header_of_4_gb(write: Callable[..., Path]) -> None:
    path = write() / WEIGHTS_FILE
    content = path.read_bytes()
    path.write_bytes((2**32).to_bytes(8, "little") + content[8:])
    with pytest.raises(ValueError, match="is damaged: .*cut short"):
        load_adapter(path.parent)


def test_names_with_and_without_prefix(write: Callable[..., Path]) -> None:
    path = write() / WEIGHTS_FILE
    tensors = load_file(path)
    save_file({**tensors, "transformer.norm_out.linear.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="with and without the prefix"):
        load_adapter(path.parent)


# ----------------------------------------------------------------------------- how strong they are

LAYER = "blocks.0.ff.net.2"


def lora(rank: int = 4) -> dict[str, Tensor]:
    return {
        f"{LAYER}.lora_A.weight": torch.ones(rank, 3),
        f"{LAYER}.lora_B.weight": torch.ones(5, rank),
    }


@pytest.mark.parametrize(
    ("metadata", "alpha", "scale"),
    [
        ({}, None, 1.0),
        ({"lora_alpha": "8"}, None, 2.0),
        ({"ss_network_alpha": "2"}, None, 0.5),
        ({}, 2.0, 0.5),
        ({"lora_alpha": "8"}, 2.0, 0.5),
        ({"lora_adapter_metadata": {"transformer.lora_alpha": 8, "transformer.r": 4}}, None, 2.0),
        ({"lora_adapter_metadata": {"lora_alpha": 8, "alpha_pattern": {LAYER: 1}}}, None, 0.25),
        ({"lora_adapter_metadata": {"lora_alpha": 8, "alpha_pattern": {"net.2": 1}}}, None, 0.25),
        ({"lora_adapter_metadata": {"lora_alpha": 8, "alpha_pattern": {"et.2": 1}}}, None, 2.0),
        ({"lora_adapter_metadata": {"lora_alpha": 8, "use_rslora": True}}, None, 4.0),
    ],
)
def test_alpha(metadata: dict[str, Any], alpha: float | None, scale: float) -> None:
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    tensors = lora()
    own = {} if alpha is None else {f"{LAYER}.alpha": torch.tensor(alpha)}
    found = with_scale_one({**tensors, **own}, texts, "here")
    assert found.keys() == tensors.keys()
    assert torch.equal(found[f"{LAYER}.lora_B.weight"], torch.full((5, 4), scale))
    assert torch.equal(found[f"{LAYER}.lora_A.weight"], torch.ones(4, 3))


@pytest.mark.parametrize(
    ("metadata", "more", "message"),
    [
        ({"lora_alpha": "x"}, {}, "alpha to be a number, got 'x'"),
        ({"lora_alpha": "nan"}, {}, "alpha to be a number"),
        ({"lora_adapter_metadata": "[]"}, {}, "lora_adapter_metadata holds JSON of type list"),
        ({"lora_adapter_metadata": '{"use_dora": true}'}, {}, "holds DoRA"),
        ({"lora_adapter_metadata": '{"alpha_pattern": {"(a+)+$": 1}}'}, {}, "names of layers"),
        ({"lora_adapter_metadata": '{"alpha_pattern": [1]}'}, {}, "names of layers"),
        ({}, {"elsewhere.alpha": torch.tensor(1.0)}, "elsewhere.alpha belongs to no LoRA layer"),
        ({}, {f"{LAYER}.alpha": torch.ones(2)}, "alpha to be a number"),
    ],
)
def test_alphas_that_are_none(
    metadata: dict[str, str], more: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        with_scale_one({**lora(), **more}, metadata, "here")


def inputs() -> tuple[Any, ...]:
    from piflow.backbones import Conditioning

    generator = torch.Generator().manual_seed(0)
    cond = Conditioning(
        torch.randn(1, 3, 6, generator=generator), torch.tensor([3]), torch.zeros(1, 5)
    )
    return torch.randn(1, 4, 4, 4, generator=generator), torch.tensor([0.7]), cond


def test_an_adapter_with_another_alpha_samples_at_its_strength(
    write: Callable[..., Path], flux: Path
) -> None:
    """Twice the alpha is half of B, in other files the same student."""
    path = write() / WEIGHTS_FILE
    tensors = load_file(path)
    x, sigma, cond = inputs()
    whole = Trio.from_adapter(FluxBackbone.load(flux), load_adapter(path.parent))
    expected = whole.student(x, sigma, cond).velocity(x, sigma)
    halved = {k: v / 2 if ".lora_B." in k else v for k, v in tensors.items()}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}
    save_file({f"transformer.{k}": v for k, v in halved.items()}, path, metadata=metadata)
    again = Trio.from_adapter(FluxBackbone.load(flux), load_adapter(path.parent))
    assert torch.equal(again.student(x, sigma, cond).velocity(x, sigma), expected)


def test_diffusers_reads_our_lora_at_its_strength(write: Callable[..., Path], flux: Path) -> None:
    from diffusers import FluxTransformer2DModel

    path = write() / WEIGHTS_FILE
    tensors = {name: tensor for name, tensor in load_file(path).items() if ".lora_" in name}
    model = FluxTransformer2DModel.from_pretrained(str(flux))
    before = {name: module.weight.clone() for name, module in model.named_modules() if
              f"{name}.lora_A.weight" in tensors}  # fmt: skip
    model.load_lora_adapter(tensors, prefix=None)
    model.fuse_lora()
    model.unload_lora()
    assert before
    for name, weight in before.items():
        up, down = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
        expected = weight + up @ down
        torch.testing.assert_close(model.get_submodule(name).weight, expected, atol=1e-6, rtol=0)

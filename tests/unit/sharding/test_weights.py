"""Weights that are read by rows are the weights that are loaded whole, in less memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import nn

from piflow.backbones import FluxBackbone
from piflow.config import parse_recipe
from piflow.roles.trio import Trio
from piflow.sharding import SingleStrategy, weights
from piflow.sharding.weights import WEIGHTS_FILE, fill, missing, stored_tensors
from piflow.training.build import build_empty_trio, build_trio, prepared_trio
from tests.unit.models import MODELS, case
from tests.unit.roles.test_teacher_lora import linear_layers, write_lora

SCRIPT = Path(__file__).with_name("weights_ranks.py")
LARGE = {  # 74 million parameters, 297 MB
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
}
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
CASES = [(family, dtype) for family in MODELS for dtype in ITEM_BYTES]


def tree(folder: Path, family: str, dtype: str, **sections: Any) -> dict[str, Any]:
    """A recipe for a model in the folder."""
    encoder = {"type": "class_label", "num_classes": 3} if family == "dit" else {"path": "unused"}
    return {
        "name": "tiny",
        "run_dir": "unused",
        "seed": 3,
        "model": {"path": str(folder), "family": family, "dtype": dtype},
        "encoder": encoder,
        "embed": {"prompts": "p", "store": "s", "height": 8, "width": 8},
        "policy": {"num_gaussians": 3, "logstd_inner_dim": 8},
        "lora": {"rank": 4},
        **sections,
    }


def save(folder: Path, model_class: Any, config: dict[str, Any], shard: str = "20KB") -> None:
    torch.manual_seed(0)
    model_class(**config).save_pretrained(str(folder), max_shard_size=shard)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models by family, each in several files."""
    root = tmp_path_factory.mktemp("models")
    for family, (model_class, config) in MODELS.items():
        save(root / family, model_class, config)
        assert len(list((root / family).glob("*.safetensors"))) > 1
    return {family: root / family for family in MODELS}


def everything(trio: Trio) -> dict[str, torch.Tensor]:
    (module,) = trio.modules
    return dict(module.named_parameters()) | dict(module.named_buffers())


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_one_process_streams_what_it_would_load(
    family: str, dtype: str, folders: dict[str, Path]
) -> None:
    recipe = parse_recipe(tree(folders[family], family, dtype))
    torch.manual_seed(0)
    expected = everything(build_trio(recipe))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    trio, stored = build_empty_trio(recipe)
    assert torch.equal(torch.get_rng_state(), state), "training would draw other dropout"
    empty = {name for name, tensor in everything(trio).items() if tensor.is_meta}
    assert empty == set(stored) and len(stored) > 30
    assert not any("lora_" in name or name.startswith("norm_out.") for name in stored)
    fill(trio.modules[0], stored, device="cpu")
    found = everything(trio)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert found[name].requires_grad == tensor.requires_grad, name


def test_what_diffusers_keeps_in_float32_is_kept_so(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model's dtype is that of the others, though the first parameter is a kept one."""
    kept = ["time_text_embed", "norm1", "norm_q"]
    monkeypatch.setattr(FluxTransformer2DModel, "_keep_in_fp32_modules", kept)
    loaded = FluxBackbone.load(folders["flux"], dtype=torch.bfloat16)
    empty, sources = FluxBackbone.load_empty(folders["flux"], dtype=torch.bfloat16)
    fill(empty.module, missing(empty.module, sources), device="cpu")
    assert loaded.dtype == empty.dtype == torch.bfloat16
    expected, found = (dict(one.module.named_parameters()) for one in (loaded, empty))
    in_float32 = {name for name, p in expected.items() if p.dtype == torch.float32}
    assert in_float32 == {n for n in expected if not set(kept).isdisjoint(n.split("."))} != set()
    for name, parameter in expected.items():
        assert found[name].dtype == parameter.dtype, name
        assert torch.equal(found[name], parameter), name


def test_full_training_and_one_worker_load_the_base_whole(folders: dict[str, Path]) -> None:
    full = parse_recipe(tree(folders["flux"], "flux", "float32", lora=None))
    with pytest.raises(ValueError, match="lora is null: full training copies the base"):
        build_empty_trio(full)
    lora = parse_recipe(tree(folders["flux"], "flux", "float32"))
    for recipe in (full, lora):
        trio = prepared_trio(recipe, SingleStrategy(torch.device("cpu")))
        assert not any(p.is_meta for module in trio.modules for p in module.parameters())


# ------------------------------------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def ranks(
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    run_ranks: Callable[..., None],
) -> list[dict[str, Any]]:
    """What two FSDP ranks on gloo found, each in its own process."""
    folder = tmp_path_factory.mktemp("ranks")
    save(folder / "large", FluxTransformer2DModel, LARGE, shard="100MB")
    recipes = {f"{family} {dtype}": tree(folders[family], family, dtype) for family, dtype in CASES}
    for dtype in ITEM_BYTES:
        recipes[f"large {dtype}"] = tree(
            folder / "large",
            "flux",
            dtype,
            lora={"rank": 1, "targets": ["timestep_embedder.linear_1"]},
            policy={"type": "dx", "num_points": 2},
        )
    style = write_lora(
        folder / "style.safetensors", linear_layers(case("flux")[0].module, outputs=True)
    )
    for dtype in ITEM_BYTES:
        recipe = tree(folders["flux"], "flux", dtype)
        lora = {"path": str(style), "strength": 0.7}
        recipes[f"flux lora {dtype}"] = {**recipe, "model": {**recipe["model"], "lora": lora}}
    (folder / "recipes.json").write_text(json.dumps(recipes))
    save_layers(folder / "uneven")
    # a fixed threshold: freed tensors go back to the system, not to a heap that hides the next ones
    run_ranks(SCRIPT, folder, timeout=200, MALLOC_MMAP_THRESHOLD_=str(2**20))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_ranks_stream_the_shards_that_they_would_cut(
    family: str, dtype: str, ranks: list[dict[str, Any]]
) -> None:
    """Weights, buffers, what is trained, and the velocities computed with them."""
    assert [rank[f"{family} {dtype}"] for rank in ranks] == [[], []]


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_a_teachers_lora_is_sharded_with_its_base(dtype: str, ranks: list[dict[str, Any]]) -> None:
    assert [rank[f"flux lora {dtype}"] for rank in ranks] == [[], []]
    assert all(rank["lora alone"] < 1e-5 for rank in ranks)


@pytest.mark.parametrize("mesh", ["sharded", "replicated"])
def test_rows_that_do_not_split_evenly(mesh: str, ranks: list[dict[str, Any]]) -> None:
    """5 and 1 rows on two ranks, one of which keeps no row at all; and whole rows on both."""
    assert [rank[mesh] for rank in ranks] == [[], []]


def test_deepspeed_splits_what_is_stored(ranks: list[dict[str, Any]]) -> None:
    """Stage 3 cuts anywhere, and pads: put together again, everything is as it was loaded whole."""
    assert [rank["zero3"] for rank in ranks] == [[], []]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("model", "dtype"), [*((dtype, dtype) for dtype in ITEM_BYTES), ("zero3", "float32")]
)
def test_a_rank_needs_memory_for_its_shard_and_one_tensor(
    model: str, dtype: str, ranks: list[dict[str, Any]]
) -> None:
    """Peak of the resident memory over that before; loading the base whole fails the same bound."""
    width = LARGE["attention_head_dim"] * LARGE["num_attention_heads"]
    largest = ITEM_BYTES[dtype] * 6 * width * width  # a block's modulation
    for rank in ranks:
        streamed, whole = rank[f"large {model}"]["streamed"], rank[f"large {model}"]["whole"]
        assert streamed["shards"] == whole["shards"] > ITEM_BYTES[dtype] * 37e6
        bound = 1.3 * (streamed["shards"] + largest)
        assert 0.9 * streamed["shards"] < streamed["growth"] <= bound < whole["growth"]


# ------------------------------------------------------------------------------------------- files


def save_layers(folder: Path) -> dict[str, torch.Tensor]:
    """Three linear layers of 5, 1 and 4 rows as a model folder's weights."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, torch.Tensor] = {}
    for i, (rows, columns) in enumerate([(5, 3), (1, 5), (4, 1)]):
        layers[f"{i}.weight"] = torch.randn(rows, columns, generator=generator)
        layers[f"{i}.bias"] = torch.randn(rows, generator=generator)
    save_file(layers, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return layers


def empty_layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(1, 4)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffer", [4, 12, 2**20])
def test_values_do_not_depend_on_the_buffer(
    buffer: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = save_layers(tmp_path)
    monkeypatch.setattr(weights, "BUFFER_BYTES", buffer)
    model = empty_layers(dtype)
    fill(model, stored_tensors(str(tmp_path)), device="cpu")
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert torch.equal(parameter, expected[name].to(dtype)), name


def test_only_what_is_named_is_filled(tmp_path: Path) -> None:
    expected = save_layers(tmp_path)
    model = empty_layers()
    model[1] = nn.Linear(5, 1)
    kept = model.get_parameter("1.weight").detach().clone()
    stored = stored_tensors(str(tmp_path))
    sources = {p: stored[name] for name, p in model.named_parameters() if p.is_meta}
    wrapped = nn.ModuleDict({"inner": model})
    names = missing(wrapped, sources)
    assert list(names) == [f"inner.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    fill(wrapped, names, device="cpu")
    assert torch.equal(model.get_parameter("0.weight"), expected["0.weight"])
    assert torch.equal(model.get_parameter("1.weight"), kept)


def test_a_parameter_without_a_source_is_named() -> None:
    with pytest.raises(ValueError, match=r"6 parameters have neither storage .* first 0\.weight"):
        missing(empty_layers(), {})


def test_names_and_shapes_that_do_not_fit(tmp_path: Path) -> None:
    save_layers(tmp_path)
    stored = stored_tensors(str(tmp_path))
    with pytest.raises(ValueError, match="expected names of the module, got 1 others: 9.bias"):
        fill(empty_layers(), {"9.bias": stored["0.bias"]}, device="cpu")
    with pytest.raises(ValueError, match=r"0.bias is \(5,\) in the model and \(4,\) in"):
        fill(empty_layers(), {"0.bias": stored["2.bias"]}, device="cpu")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_layers(tmp_path)
    stored = stored_tensors(str(tmp_path))
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(OSError, match="ended early"):
        fill(empty_layers(), stored, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:4], "cut short or isn't safetensors"),
        (lambda data: data[:100], "cut short or isn't safetensors"),
        (lambda data: data[:-4], "cut short or damaged|is damaged at"),
        (lambda data: data[:8] + b"?" + data[9:], "its header isn't JSON"),
        (lambda data: data.replace(b'"F32"', b'"Q32"', 1), "is Q32, expected one of F64, F32"),
        (lambda data: data.replace(b'"dtype"', b'"dtyqe"', 1), "its header says"),
        (lambda data: data.replace(b'"F32"', b'"F64"', 1), "cut short or damaged|is damaged at"),
    ],
)
def test_damaged_files_are_refused_by_their_headers(
    change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    save_layers(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        stored_tensors(str(tmp_path))


def test_stored_tensors_are_where_the_library_finds_them(tmp_path: Path) -> None:
    expected = save_layers(tmp_path)
    data = (tmp_path / WEIGHTS_FILE).read_bytes()
    for name, stored in stored_tensors(str(tmp_path)).items():
        assert (stored.shape, stored.dtype) == (tuple(expected[name].shape), expected[name].dtype)
        there = torch.frombuffer(
            bytearray(data), dtype=stored.dtype, count=expected[name].numel(), offset=stored.offset
        )
        assert torch.equal(there.view(stored.shape), expected[name])


def test_constructors_tables_survive_and_the_default_dtype_returns() -> None:
    """What `torch.device("meta")` would lose: buffers, and tensors that are plain attributes."""
    model_class, config = MODELS["dit"]
    with weights.parameters_on_meta(torch.bfloat16):
        dit = model_class(**config)
        qwen = MODELS["qwen_image"][0](**MODELS["qwen_image"][1])
    assert {(p.is_meta, p.dtype) for p in dit.parameters()} == {(True, torch.bfloat16)}
    assert torch.equal(dit.pos_embed.pos_embed, model_class(**config).pos_embed.pos_embed)
    assert qwen.pos_embed.pos_freqs.device.type == "cpu"
    assert torch.get_default_dtype() == torch.float32
    assert not nn.Linear(1, 1).weight.is_meta

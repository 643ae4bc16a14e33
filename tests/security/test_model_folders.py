"""A model's folder runs no code, asks nothing, reaches nowhere and has an end."""

from __future__ import annotations

import builtins
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from piflow.backbones import FluxBackbone, text
from piflow.backbones.bert import identity
from piflow.backbones.codec import VAECodec, build_codec, check_channels
from piflow.config import BertEncoderConfig, ModelConfig
from piflow.storage.model_folder import check_model_folder, check_pipeline_folder

PLANTED = "open(__import__('os').environ['PIFLOW_PLANTED'], 'w').write('ran')\n"

Change = Callable[[dict[str, Any]], dict[str, Any]]

ATTACKS: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"auto_map": {"AutoModel": "evil.Model"}}, "has auto_map: .*runs no code"),
    "nested code": ({"text_config": {"auto_map": {"AutoModel": "e.M"}}}, "has auto_map"),
    "kernel": ({"kernel": "kernels-community/x"}, "has kernel: .*fetched from a hub"),
    "kernels": ({"kernels": {"Attention": "a/b"}}, "has kernels"),
    "kernel config": ({"kernel_config": {"x": 1}}, "has kernel_config"),
    "attention": (
        {"_attn_implementation": "kernels-community/flash-attn"},
        "has _attn_implementation: 'kernels-community/flash-attn'; expected eager, sdpa or null",
    ),
    "attention by part": (
        {"attn_implementation": {"text_config": "a/b:c"}},
        "has attn_implementation: 'a/b:c'",
    ),
    "flash attention, which may be a kernel": (
        {"attn_implementation": "flash_attention_2"},
        "has attn_implementation",
    ),
    "experts": ({"experts_implementation": "a/b"}, "has experts_implementation"),
    "quantised": (
        {"quantization_config": {"quant_method": "mxfp4"}},
        "has quantization_config: .*weights that aren't quantised",
    ),
    "other weights": ({"transformers_weights": "../x.safetensors"}, "has transformers_weights"),
    "class of a module": ({"_class_name": ["evil", "Model"]}, "has _class_name: .*a list names"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000; at most 1024"),
    "layers of a part": ({"vision": {"num_layers": 10**9}}, "num_layers: 1000000000"),
    "infinitely many": ({"num_layers": float("inf")}, "num_layers: inf; at most 1024"),
    "width": ({"hidden_size": 10**9}, "hidden_size: 1000000000; at most 131072"),
    "position table": ({"pos_embed_max_size": 10**6}, "pos_embed_max_size: 1000000; at most"),
    "positions": ({"max_position_embeddings": 10**12}, "max_position_embeddings: 1000000000000"),
    "blocks": ({"block_out_channels": [4] * 100000}, "100000 entries of block_out_channels"),
    "depth": (
        {"layers_per_block": 64, "id2label": None, "down_block_types": ["x"] * 65},
        "65 entries of down_block_types; at most 64",
    ),
}


@pytest.fixture(autouse=True)
def nothing_reaches_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Questions and connections fail the test; what planted code would write."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"asked or connected: {args}")

    monkeypatch.setattr(builtins, "input", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    planted = tmp_path / "planted.txt"
    monkeypatch.setenv("PIFLOW_PLANTED", str(planted))
    return planted


@pytest.fixture(scope="session")
def bert_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"]
    BertTokenizer({t: i for i, t in enumerate(vocabulary)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(bert_original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert_original, tmp_path / "bert"))


def encoder(folder: Path) -> BertEncoderConfig:
    return BertEncoderConfig(path=str(folder), max_tokens=8)


def change(path: Path, **entries: Any) -> None:
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(tree | entries))


def load(folder: Path) -> None:
    """As embedding does."""
    from piflow.backbones.bert import BertModel

    BertModel(encoder(folder), "cpu")


# ------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize("name", ATTACKS)
def test_what_a_configuration_must_not_say(name: str, tmp_path: Path) -> None:
    entries, message = ATTACKS[name]
    change(tmp_path / "config.json", **entries)
    with pytest.raises(ValueError, match=f"there/config.json.*{message}"):
        check_model_folder(str(tmp_path), "there")


def test_what_a_configuration_may_say(tmp_path: Path) -> None:
    change(
        tmp_path / "config.json",
        quantization_config=None,
        auto_map={},
        use_kernels=False,
        _attn_implementation="sdpa",
        attn_implementation={"text_config": "eager", "": None},
        _attn_implementation_autoset=True,
        label2id={"kernel": 3, "auto_map": 4},
        num_hidden_layers=80,
        vocab_size=256000,
        rope_theta=1e6,
    )
    change(tmp_path / "tokenizer_config.json", model_max_length=int(1e30))
    (tmp_path / "data_config.json").write_text("[1, 2]")  # no library reads it
    check_model_folder(str(tmp_path), "there")


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"3", b"{", '{"a": 1}'.encode("utf-16"), b"[" * 100000, b'{"a":' * 500],
    ids=["empty", "null", "list", "number", "cut", "UTF-16", "deep list", "deep"],
)
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_files_that_are_no_objects(file: str, content: bytes, bert: Path) -> None:
    (bert / file).write_bytes(content)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        load(bert)


def test_a_large_configuration_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b" " * (5 * 2**20))
    with pytest.raises(ValueError, match="5242880 bytes; at most 4194304"):
        check_model_folder(str(tmp_path), "there")


def test_control_characters_are_escaped(bert: Path) -> None:
    change(bert / "config.json", model_type="\x1b]0;owned\x07bert")
    with pytest.raises(ValueError, match=r"model_type '\\x1b\]0;owned\\x07bert'") as refused:
        load(bert)
    assert "\x1b" not in str(refused.value)


# -------------------------------------------------------------------------------- encoders' folders


def test_a_tiny_encoder_loads(bert: Path) -> None:
    load(bert)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("model_type", ["bert", "custom"])
def test_an_encoders_code_never_runs(
    file: str, model_type: str, bert: Path, nothing_reaches_out: Path
) -> None:
    (bert / "evil.py").write_text(PLANTED)
    names = ("AutoConfig", "AutoModel", "AutoTokenizer")
    change(bert / "config.json", model_type=model_type)
    change(bert / file, auto_map={name: "evil.Thing" for name in names})
    with pytest.raises(ValueError, match=f"{file} has auto_map"):
        load(bert)
    with pytest.raises(ValueError, match=f"{file} has auto_map"):
        text.load_tokenizer(_auto_tokenizer(), bert, "there")
    assert not nothing_reaches_out.exists()


def _auto_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer


def test_an_adapter_beside_an_encoder(bert: Path) -> None:
    change(bert / "adapter_config.json", base_model_name_or_path="someone/else", peft_type="LORA")
    with pytest.raises(ValueError, match="holds adapter_config.json: .*Merge the adapter"):
        load(bert)


def test_code_for_generation(bert: Path) -> None:
    (bert / "custom_generate").mkdir()
    (bert / "custom_generate/generate.py").write_text(PLANTED)
    with pytest.raises(ValueError, match="holds a folder custom_generate"):
        load(bert)


def test_another_architecture_than_an_encoders(bert: Path) -> None:
    change(bert / "config.json", model_type="timm_wrapper", architecture="resnet18")
    with pytest.raises(ValueError, match="model_type 'timm_wrapper'; encoder.type = bert takes"):
        identity(encoder(bert))


@pytest.mark.parametrize("name", ["AutoTokenizer", "AutoModel", "RagTokenizer", "os", ["a"], 3])
def test_a_tokenizers_class(name: Any, bert: Path) -> None:
    change(bert / "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(ValueError, match="tokenizer_config.json has tokenizer_class"):
        load(bert)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("special_tokens_map.json", "vocab_file", "/outside/vocab.txt"),
        ("special_tokens_map.json", "tokenizer_file", "../outside/tokenizer.json"),
        ("special_tokens_map.json", "vocab_file", "vocab.txt"),
        ("special_tokens_map.json", "local_files_only", False),
        ("special_tokens_map.json", "name_or_path", "somebody/else"),
        ("tokenizer_config.json", "vocab_file", "/dev/zero"),
        ("tokenizer_config.json", "tokenizer_file", "absent.json"),
        ("tokenizer_config.json", "source_spm", "/outside/spm"),
        ("tokenizer_config.json", "fast_tokenizer_files", ["../outside/tokenizer.4.0.0.json"]),
        ("tokenizer_config.json", "merges_file", {"a": 1}),
        ("tokenizer_config.json", "vocab_file", 0),
    ],
)
def test_a_tokenizer_opens_no_file_elsewhere(file: str, key: str, value: Any, bert: Path) -> None:
    change(bert / file, **{key: value})
    with pytest.raises(ValueError, match=f"{file} has {key}"):
        load(bert)


def _with_a_planted_word(bert: Path, folder: Path) -> Path:
    """A tokenizer's file whose vocabulary is another one."""
    tree = json.loads((bert / "tokenizer.json").read_text())
    words = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", "planted"]
    tree["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    folder.mkdir()
    file = folder / "tokenizer.4.0.0.json"
    file.write_text(json.dumps(tree | {"added_tokens": [], "post_processor": None}))
    return file


@pytest.mark.parametrize("key", ["tokenizer_file", "fast_tokenizer_files"])
def test_the_librarys_own_guard_is_not_enough(
    key: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lets the file of special tokens, and the list of files by version, lead elsewhere."""
    from transformers import BertTokenizer

    planted = _with_a_planted_word(bert, tmp_path / "elsewhere")
    if key == "tokenizer_file":
        tokens = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
        change(bert / "special_tokens_map.json", **tokens, tokenizer_file=str(planted))
        kept = json.loads((bert / "tokenizer_config.json").read_text())
        kept.pop("added_tokens_decoder", None)
        (bert / "tokenizer_config.json").write_text(json.dumps(kept))
    else:
        change(bert / "tokenizer_config.json", **{key: ["../elsewhere/tokenizer.4.0.0.json"]})
    with pytest.raises(ValueError, match=key):
        text.load_tokenizer(BertTokenizer, bert, "hostile")
    monkeypatch.setattr(text, "check_model_folder", lambda *arguments: None)
    assert "planted" in text.load_tokenizer(BertTokenizer, bert, "hostile").get_vocab()


def test_what_a_tokenizer_may_say_of_files(bert: Path) -> None:
    """Real ones have the first and the second; the last names a file that is there."""
    change(
        bert / "tokenizer_config.json",
        special_tokens_map_file="/home/somebody/.cache/special_tokens_map.json",
        tokenizer_file=None,
        fast_tokenizer_files=["tokenizer.json"],
    )
    change(bert / "special_tokens_map.json", unk_token="[UNK]", additional_special_tokens=[])
    load(bert)


def test_pickled_weights_are_not_read(bert: Path, nothing_reaches_out: Path) -> None:
    class Planted:
        def __reduce__(self) -> Any:
            return exec, (PLANTED,)

    (bert / "model.safetensors").unlink()
    torch.save({"x": Planted()}, bert / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no .safetensors weights .pickled weights are never"):
        load(bert)
    change(
        bert / "model.safetensors.index.json",
        metadata={},
        weight_map={"embeddings.word_embeddings.weight": "pytorch_model.bin"},
    )
    with pytest.raises(
        ValueError, match="names the file 'pytorch_model.bin'; expected a .safetens"
    ):
        text.load_model(_auto_model(), bert, "there", device="cpu")
    assert not nothing_reaches_out.exists()


def _auto_model() -> Any:
    from transformers import AutoModel

    return AutoModel


@pytest.mark.parametrize("value", ["six", None, -1, 1.5, [6], True])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size"])
def test_sizes_of_another_kind(key: str, value: Any, bert: Path) -> None:
    change(bert / "config.json", **{key: value})
    with pytest.raises(ValueError, match=key):
        load(bert)


# ------------------------------------------------------------------------- transformers and codecs


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    from diffusers import FluxTransformer2DModel

    FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=6, pooled_projection_dim=5,
        axes_dims_rope=[2, 2, 4],
    ).save_pretrained(str(tmp_path / "flux"), max_shard_size="5KB")  # fmt: skip
    return tmp_path / "flux"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_layers": 10**9}, "num_layers: 1000000000; at most 1024"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "has quantization_config"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "has auto_map"),
        ({"_class_name": ["evil", "Model"]}, "has _class_name"),
        ({"num_layers": "many"}, "config.json isn't that of a FluxTransformer2DModel: TypeError"),
        ({"in_channels": None}, "config.json isn't that of a FluxTransformer2DModel"),
        ({"_class_name": "\x1b[2JX"}, r"config.json says '\\x1b"),
    ],
)
def test_transformers(entries: dict[str, Any], message: str, flux: Path) -> None:
    change(flux / "config.json", **entries)
    for opened in (FluxBackbone.load, FluxBackbone.load_empty):
        with pytest.raises(ValueError, match=message):
            opened(str(flux))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map"),
        ([], "holds JSON of type list"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({"weight_map": {"a": 3}}, "names the file 3"),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, r"names the file '../elsewhere"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "names the file '/etc"),
        ({"weight_map": {"a": "sub/x.safetensors"}}, "expected a .safetensors file in the same"),
        ({"weight_map": {"a": "x.bin"}}, "pickled weights are never read"),
    ],
)
def test_an_index_stays_in_its_folder(index: Any, message: str, flux: Path) -> None:
    """Beside it lie weights that would be taken."""
    name = "diffusion_pytorch_model.safetensors.index.json"
    shard = next(flux.glob("*.safetensors"))
    shutil.copy(shard, flux.parent / "elsewhere.safetensors")
    (flux / name).write_text(json.dumps(index))
    for opened in (FluxBackbone.load, FluxBackbone.load_empty):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            opened(str(flux))


@pytest.mark.parametrize("content", ["null", "[]", "", '{"in_channels": "x"}'])
def test_channels_of_a_broken_configuration(content: str, flux: Path) -> None:
    (flux / "config.json").write_text(content)
    model = ModelConfig(path=str(flux))
    with pytest.raises(ValueError, match="config.json"):
        check_channels(model, build_codec(model))


@pytest.mark.parametrize(
    "entries",
    [
        {"block_out_channels": 3},
        {"latent_channels": None},
        {"latent_channels": "x"},
        {"scaling_factor": []},
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"layers_per_block": 10**9},
    ],
)
def test_vaes(entries: dict[str, Any], tmp_path: Path) -> None:
    from piflow.backbones.tiny import kl_vae

    kl_vae(8).save_pretrained(str(tmp_path / "vae"))
    change(tmp_path / "vae/config.json", **entries)
    with pytest.raises(ValueError, match="config.json"):
        VAECodec(str(tmp_path / "vae"))


# ---------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": ["evil", "Pipeline"]}, "has _class_name"),
        ({"vae": ["evil", "Thing"]}, "says .'evil', 'Thing'. of vae; expected a class of"),
        ({"vae": ["os", "system"]}, "of vae; expected a class of diffusers, transformers"),
        ({"../elsewhere": ["diffusers", "AutoencoderKL"]}, "names the file '../elsewhere'"),
        ({"custom_pipeline": "evil"}, "has custom_pipeline"),
        ({"vae": ["diffusers", "AutoencoderKL", "evil"]}, "of vae; expected"),
    ],
)
def test_pipelines(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    change(tmp_path / "model_index.json", _class_name="FluxPipeline")
    change(tmp_path / "model_index.json", **entries)
    with pytest.raises(ValueError, match=message):
        check_pipeline_folder(str(tmp_path), "there")


@pytest.mark.parametrize("place", ["", "vae"])
def test_a_pipelines_python_files(place: str, tmp_path: Path) -> None:
    from piflow.inference import PiFluxPipeline

    (tmp_path / "vae").mkdir()
    change(tmp_path / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    (tmp_path / place / "diffusers.py").write_text(PLANTED)
    with pytest.raises(ValueError, match="holds Python code, diffusers.py"):
        PiFluxPipeline.from_pretrained(tmp_path, adapter="unused")


def test_a_part_of_a_pipeline_is_checked(tmp_path: Path) -> None:
    from piflow.inference import PiFluxPipeline

    (tmp_path / "text_encoder").mkdir()
    change(tmp_path / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    change(tmp_path / "text_encoder/config.json", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(ValueError, match="text_encoder/config.json has auto_map"):
        PiFluxPipeline.from_pretrained(tmp_path, adapter="unused")


@pytest.mark.parametrize("option", ["trust_remote_code", "custom_pipeline"])
def test_options_that_would_run_code(option: str, tmp_path: Path) -> None:
    from piflow.inference import PiFluxPipeline

    with pytest.raises(ValueError, match=f"{option}: PiFluxPipeline runs no code"):
        PiFluxPipeline.from_pretrained(tmp_path, adapter="unused", **{option: "x"})

"""FLUX.1's encoders against diffusers' own `FluxPipeline.encode_prompt`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from piflow.backbones.encoders import build_encoder, encoder_identity
from piflow.backbones.flux import FluxEncoderConfig
from piflow.backbones.text import TextEncoder

MAX_TOKENS = 12
PROMPTS = ["red heart", "", "a cat of a red heart in a red cup of tea", "Two  hearts"]


def _config(folder: Path, **changes: Any) -> FluxEncoderConfig:
    return FluxEncoderConfig(**({"path": str(folder), "max_tokens": MAX_TOKENS} | changes))


@pytest.fixture(scope="module")
def encoder(flux_text_folder: Path) -> TextEncoder:
    return build_encoder(_config(flux_text_folder))


@pytest.fixture(scope="module")
def pipeline(flux_text_folder: Path) -> Any:
    from diffusers import FluxPipeline
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    return FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=CLIPTextModel.from_pretrained(flux_text_folder / "text_encoder"),
        text_encoder_2=T5EncoderModel.from_pretrained(flux_text_folder / "text_encoder_2"),
        tokenizer=CLIPTokenizer.from_pretrained(flux_text_folder / "tokenizer"),
        tokenizer_2=T5TokenizerFast.from_pretrained(flux_text_folder / "tokenizer_2"),
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_gives_what_the_pipeline_gives(
    encoder: TextEncoder, pipeline: Any, batch_size: int
) -> None:
    with torch.no_grad():
        tokens, pooled, _ = pipeline.encode_prompt(
            PROMPTS, device="cpu", max_sequence_length=MAX_TOKENS
        )
    encoded = encoder.encode(PROMPTS, batch_size)
    for row, prompt in enumerate(encoded):
        assert prompt.pooled is not None
        torch.testing.assert_close(prompt.tokens, tokens[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(prompt.pooled, pooled[row], rtol=0, atol=1e-5)
    assert [prompt.truncated for prompt in encoded] == [False, False, True, False]
    distances = torch.cdist(pooled, pooled) + torch.eye(len(PROMPTS))
    assert (distances > 0.01).all()  # the prompts do differ: the comparison says something


def test_dropped_padding_leaves_the_prompts_own_states(
    encoder: TextEncoder, flux_text_folder: Path
) -> None:
    dropped = build_encoder(_config(flux_text_folder, padding="drop")).encode(PROMPTS)
    kept = encoder.encode(PROMPTS)
    assert [len(prompt.tokens) for prompt in kept] == [MAX_TOKENS] * 4
    assert [len(prompt.tokens) for prompt in dropped] == [3, 1, MAX_TOKENS, 7]
    for short, whole in zip(dropped, kept, strict=True):
        torch.testing.assert_close(short.tokens, whole.tokens[: len(short.tokens)])
        assert short.pooled is not None and whole.pooled is not None
        torch.testing.assert_close(short.pooled, whole.pooled)


def test_weights_keep_the_dtype_they_are_stored_in(
    encoder: TextEncoder, flux_text_folder: Path, tmp_path: Path
) -> None:
    from transformers import T5EncoderModel

    copy = Path(shutil.copytree(flux_text_folder, tmp_path / "copy"))
    half = T5EncoderModel.from_pretrained(copy / "text_encoder_2", dtype=torch.bfloat16)
    half.save_pretrained(copy / "text_encoder_2")
    [rounded] = build_encoder(_config(copy)).encode(["red heart"])
    assert rounded.tokens.dtype == torch.float32
    assert torch.equal(rounded.tokens, rounded.tokens.bfloat16().float())
    [exact] = encoder.encode(["red heart"])
    torch.testing.assert_close(rounded.tokens, exact.tokens, rtol=0.1, atol=0.1)


def test_older_clip_files_load(
    encoder: TextEncoder, flux_text_folder: Path, tmp_path: Path
) -> None:
    """Published FLUX.1 folders prefix CLIP's weights with text_model."""
    copy = Path(shutil.copytree(flux_text_folder, tmp_path / "copy"))
    file = copy / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    renamed = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in weights.items()}
    save_file(renamed, file, {"format": "pt"})
    [found], [expected] = build_encoder(_config(copy)).encode(["cat"]), encoder.encode(["cat"])
    assert found.pooled is not None and expected.pooled is not None
    assert torch.equal(found.pooled, expected.pooled)


def test_the_identity_names_both_encoders_and_padding(
    flux_text_folder: Path, tmp_path: Path
) -> None:
    identity = encoder_identity(_config(flux_text_folder))
    assert identity.name == "t5-2x12+clip-2x8, padding keep"
    assert (identity.max_tokens, identity.hidden_size) == (MAX_TOKENS, 12)
    copy = Path(shutil.copytree(flux_text_folder, tmp_path / "copy"))
    assert encoder_identity(_config(copy)) == identity
    assert encoder_identity(_config(copy, padding="drop")) != identity
    for part in ("tokenizer", "tokenizer_2"):
        file = copy / part / "tokenizer.json"
        before = encoder_identity(_config(copy)).weights_sha256
        file.write_text(file.read_text() + "\n")
        assert encoder_identity(_config(copy)).weights_sha256 != before
    for part in ("text_encoder", "text_encoder_2"):
        file = copy / part / "model.safetensors"
        before = encoder_identity(_config(copy)).weights_sha256
        file.write_bytes(file.read_bytes()[:-1] + b"!")
        assert encoder_identity(_config(copy)).weights_sha256 != before


def test_unusable_folders_are_refused(flux_text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens is 513, FLUX.1 takes at most 512"):
        encoder_identity(_config(flux_text_folder, max_tokens=513))
    copy = Path(shutil.copytree(flux_text_folder, tmp_path / "copy"))
    (copy / "text_encoder").rename(copy / "aside")
    with pytest.raises(FileNotFoundError, match="text_encoder"):
        encoder_identity(_config(copy))
    shutil.copytree(copy / "text_encoder_2", copy / "text_encoder")
    with pytest.raises(ValueError, match="model_type 't5', expected 'clip_text_model'"):
        encoder_identity(_config(copy))
    shutil.rmtree(copy / "text_encoder")
    (copy / "aside").rename(copy / "text_encoder")
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"model_max_length": 10', '"model_max_length": 9'))
    build_encoder(_config(copy)).encode(["cat"])
    config.write_text(config.read_text().replace('"model_max_length": 9', '"model_max_length": 11'))
    with pytest.raises(ValueError, match="pads to 11 tokens, the CLIP model takes 10"):
        build_encoder(_config(copy))
    file = copy / "text_encoder_2" / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="text_encoder_2 lacks 1 of .* encoder.block.1.layer.1"):
        build_encoder(_config(copy))

"""Qwen-Image-Edit against diffusers' own `QwenImageEditPipeline`: encoder, velocities, guidance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from torch import Tensor

from piflow.backbones import Conditioning, QwenImageEditBackbone, build_codec
from piflow.backbones.base import unpack
from piflow.backbones.encoders import build_encoder
from piflow.backbones.qwen_image_edit import FAMILY, QwenImageEditEncoderConfig
from piflow.backbones.qwen_image_edit import text as edit_text
from piflow.backbones.qwen_image_edit.processor import load_processor
from piflow.backbones.qwen_image_edit.tiny import small_pictures
from piflow.backbones.text import EncodedPrompt
from piflow.config import ConditionSizes, ModelConfig
from piflow.config.objective import GuidanceConfig
from piflow.inference.pixels import to_image
from piflow.roles.guided import GuidedTeacher
from piflow.testing.models import save_model

MAX_TOKENS = 80
SIZE = (16, 24)
SHOWN = (56, 84)  # of the picture to be edited: six tokens of it, were four not the most
PROMPT, NEGATIVE = "make the heart blue", "ugly"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edit")
    model = ModelConfig(family="qwen_image_edit", path=str(path / "transformer"), codec="vae")
    save_model(path, model, QwenImageEditEncoderConfig(path=str(path)), size=16)
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    found = QwenImageEditPipeline.from_pretrained(
        str(folder), processor=load_processor(str(folder)), local_files_only=True
    )
    found.set_progress_bar_config(disable=True)
    return found


def picture(number: int, size: tuple[int, int] = SHOWN) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (3, *size), generator=generator) / 127.5 - 1


def encode(
    folder: Path, prompts: list[str], pictures: list[Tensor], **options: Any
) -> list[EncodedPrompt]:
    encoder = build_encoder(
        QwenImageEditEncoderConfig(path=str(folder), max_tokens=options.pop("max_tokens", 80))
    )
    found: dict[int, EncodedPrompt] = {}
    shown = [lambda one=one: one for one in pictures]
    for rows, results in encoder.encode_by_length(prompts, 4, pictures=shown, **options):
        found.update(zip(rows, results, strict=True))
    return [found[row] for row in range(len(prompts))]


def whole_negative(item: EncodedPrompt) -> Tensor:
    assert item.negative is not None
    return torch.cat([item.tokens[: item.shared], item.negative])


def test_sizes_are_the_pipelines() -> None:
    assert FAMILY.edits is not None
    for height, width in ((300, 500), (2000, 1999), (100, 900), (720, 1280)):
        columns, rows, _ = calculate_dimensions(1024 * 1024, width / height)
        assert FAMILY.edits.of(height, width) == (rows, columns)


def test_states_are_the_pipelines_with_and_without_others_beside(folder: Path, pipe: Any) -> None:
    """Prompts of several lengths and pictures of several sizes in one call, and the negatives."""
    prompts, pictures = [PROMPT, "at night"], [picture(1), picture(2, (28, 28))]
    found = encode(folder, prompts, pictures, negative=NEGATIVE)
    for prompt, shown, item in zip(prompts, pictures, found, strict=True):
        image = to_image(shown)
        for text, states in ((prompt, item.tokens), (NEGATIVE, whole_negative(item))):
            expected, mask = pipe.encode_prompt(prompt=[text], image=image)
            assert mask is None and expected.std() > 0.1
            torch.testing.assert_close(states, expected[0], rtol=0, atol=1e-5)
    assert found[0].shared > found[1].shared, "the larger picture has more tokens"
    other = encode(folder, [PROMPT], [picture(3)])[0]
    assert other.negative is None
    assert (other.tokens - found[0].tokens)[found[0].shared :].abs().max() > 1e-3


def test_long_prompts_are_cut_and_pictures_never(folder: Path) -> None:
    [whole] = encode(folder, [PROMPT], [picture(1)], negative="")
    assert whole.negative is not None and not whole.truncated
    room = whole.shared + 3
    [cut] = encode(
        folder, [PROMPT], [picture(1)], negative="", max_tokens=room + len(whole.negative)
    )
    assert cut.truncated and len(cut.tokens) == room
    torch.testing.assert_close(cut.tokens, whole.tokens[:room], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="leaves none of encoder.max_tokens = 8"):
        encode(folder, [PROMPT], [picture(1)], max_tokens=8)


def test_bad_prompts_and_processors_are_refused(folder: Path, tmp_path: Path) -> None:
    config = QwenImageEditEncoderConfig(path=str(folder))
    with pytest.raises(ValueError, match="in whose place the encoder puts a picture"):
        config.check_prompt("a <|image_pad|> b")
    processor = load_processor(str(folder))
    with pytest.raises(ValueError, match="one picture and one .* each, got 1"):
        processor(text=["<|image_pad|>"] * 2, images=Image.new("RGB", (28, 28)))
    with pytest.raises(ValueError, match=r"expected prompts .* prompts with \[0\]"):
        processor(text=["x"], images=Image.new("RGB", (28, 28)))
    for part in ("processor", "tokenizer"):
        (tmp_path / part).symlink_to(folder / part) if part == "tokenizer" else None
    (tmp_path / "processor").mkdir()
    (tmp_path / "processor" / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 999999999, "longest_edge": 9999999999}}'
    )
    with pytest.raises(ValueError, match="enlarges pictures to 999999999 pixels"):
        load_processor(str(tmp_path))


def test_velocities_are_the_pipelines_under_guidance(
    folder: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of every step: the prompt's and the negative prompt's, with a picture of another size.

    And what the pipeline makes of them, which its scheduler is given.
    """
    steps: list[Tensor] = []
    step = pipe.scheduler.step
    monkeypatch.setattr(
        pipe.scheduler, "step", lambda u, *args, **named: steps.append(u) or step(u, *args, **named)
    )
    calls: list[tuple[dict[str, Any], Tensor]] = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, named, out: calls.append((named, out[0])), with_kwargs=True
    )
    shown = picture(4)
    with small_pictures(ConditionSizes((SHOWN,))):
        pipe(
            to_image(shown), PROMPT, negative_prompt=NEGATIVE, true_cfg_scale=4.0, height=SIZE[0],
            width=SIZE[1], num_inference_steps=2, generator=torch.Generator().manual_seed(2),
            output_type="latent",
        )  # fmt: skip
    hook.remove()
    model = ModelConfig(family="qwen_image_edit", path=str(folder / "transformer"), codec="vae")
    backbone = QwenImageEditBackbone.load(folder / "transformer")
    [item] = encode(folder, [PROMPT], [shown], negative=NEGATIVE)
    condition = build_codec(model).encode(shown[None])

    def cond(states: Tensor) -> Conditioning:
        return Conditioning(
            states[None], torch.tensor([len(states)]), full=True, condition=condition
        )

    height, width = SIZE[0] // 2, SIZE[1] // 2
    noisy = height * width // 4
    assert len(calls) == 4
    for number, (named, out) in enumerate(calls):
        states = whole_negative(item) if number % 2 else item.tokens
        x = unpack(named["hidden_states"][:, :noisy], height, width)
        found = backbone.teacher_velocity(x, named["timestep"], cond(states))
        expected = unpack(out[:, :noisy], height, width)
        assert out.shape[1] > noisy and expected.std() > 0.05
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    guidance = GuidanceConfig(scale=4.0, keep_norm=True)
    own = replace(cond(item.tokens), negative=cond(whole_negative(item)).editing(None))
    teacher = GuidedTeacher(backbone, own, None, guidance)
    for (named, _), stepped in zip(calls[::2], steps, strict=True):
        x = unpack(named["hidden_states"][:, :noisy], height, width)
        found = teacher(x, named["timestep"])
        torch.testing.assert_close(found, unpack(stepped, height, width), rtol=0, atol=1e-5)
    assert edit_text.DROPPED_TOKENS == pipe.prompt_template_encode_start_idx
    whole = edit_text.SYSTEM + edit_text.PICTURE + "{}" + edit_text.END
    assert whole == pipe.prompt_template_encode

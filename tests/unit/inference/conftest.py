"""Tiny random pipelines of the families, on disk, with everything that a real one has."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NFE = 3
SHIFT = 2.0
SUBSTEPS = 24
GUIDANCE = 2.5


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(backbone class, base pipeline, policy, full) -> an adapter with weights of its own.

    `noted` = False leaves out what piflow's exporter notes, as in the published adapters.
    """
    import torch

    from piflow.backbones.dit import ClassLabelEncoderConfig
    from piflow.config import LoRAConfig, ModelConfig
    from piflow.inference.settings import SETTINGS_KEY, SamplingSettings
    from piflow.roles.adapter import save_adapter
    from piflow.roles.heads import PolicyClock
    from piflow.roles.trio import Trio

    def build(
        backbone_class: Any, base: Path, policy: Any, full: bool = False, noted: bool = True
    ) -> Path:
        config = json.loads((base / "transformer" / "config.json").read_text())
        guided = GUIDANCE if config.get("guidance_embeds") else None
        backbone = backbone_class.load(base / "transformer", embedded_guidance=guided)
        lora = None if full else LoRAConfig(rank=2, dropout=0.0)
        clock = PolicyClock(1 / (NFE - 0.5), SHIFT)
        generator = torch.Generator().manual_seed(0)
        trio = Trio.from_backbone(backbone, lora, policy, clock, generator=generator)
        tensors = {
            name: parameter + 0.1 * torch.randn(parameter.shape, generator=generator)
            for name, parameter in trio.trainable_parameters().items()
        }
        settings = SamplingSettings(
            model=ModelConfig(path=str(base / "transformer")),
            encoder=ClassLabelEncoderConfig(),
            height=16,
            width=24,
            nfe=NFE,
            final_step_size_scale=0.5,
            shift=SHIFT,
            total_substeps=SUBSTEPS,
            embedded_guidance=guided,
        )
        folder = tmp_path_factory.mktemp("adapter")
        notes = {SETTINGS_KEY: settings.model_dump_json()} if noted else {}
        save_adapter(
            folder, trio.backbone, tensors, policy, clock,
            base_model="base", metadata=notes, dtype="float32",
        )  # fmt: skip
        return folder

    return build


@pytest.fixture(scope="session")
def flux_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-dev's kind: embedded guidance, T5 and CLIP, a KL autoencoder."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    def build() -> Any:
        return FluxPipeline(
            scheduler=_euler(use_dynamic_shifting=True),
            vae=_autoencoder(latent_channels=4),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=100,
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    projection_dim=16,
                    bos_token_id=0,
                    eos_token_id=1,
                )
            ),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=T5EncoderModel(
                T5Config(vocab_size=64, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
            ),
            tokenizer_2=_t5_tokenizer(),
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=12,
                pooled_projection_dim=16,
                axes_dims_rope=[2, 2, 4],
                guidance_embeds=True,
            ),
        )

    return _saved(build, tmp_path_factory.mktemp("flux_base"))


@pytest.fixture(scope="session")
def qwen_edit_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen-Image-Edit's kind: Qwen2.5-VL reads the picture as well."""
    from piflow.backbones.qwen_image_edit import QwenImageEditEncoderConfig
    from piflow.config import ModelConfig
    from piflow.testing.models import save_model

    folder = tmp_path_factory.mktemp("qwen_edit_base")
    place = str(folder / "transformer")
    model = ModelConfig(family="qwen_image_edit", path=place, codec="vae")
    save_model(folder, model, QwenImageEditEncoderConfig(path=str(folder)), size=16)
    return folder


@pytest.fixture(scope="session")
def kontext_base(flux_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-Kontext's kind: the same parts in another pipeline."""
    from diffusers import FluxKontextPipeline, FluxPipeline

    folder = tmp_path_factory.mktemp("kontext_base")
    parts = FluxPipeline.from_pretrained(flux_base).components
    FluxKontextPipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen-Image's kind: Qwen2.5-VL, a causal video autoencoder."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def build() -> Any:
        text = {
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 10000.0,
            },
        }
        vision = {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        }
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        return QwenImagePipeline(
            scheduler=_euler(use_dynamic_shifting=True),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 2],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[0.0] * 4,
                latents_std=[1.0] * 4,
            ),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config),
            tokenizer=_qwen_tokenizer(),
            transformer=QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(2, 2, 4),
            ),
        )

    return _saved(build, tmp_path_factory.mktemp("qwen_base"))


@pytest.fixture(scope="session")
def dit_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DiT's kind: class labels, square latents of a fixed size."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    def build() -> Any:
        return DiTPipeline(
            transformer=DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                sample_size=8,
                num_embeds_ada_norm=10,
                norm_num_groups=2,
            ),
            vae=_autoencoder(latent_channels=4),
            scheduler=DDIMScheduler(),
        )

    return _saved(build, tmp_path_factory.mktemp("dit_base"))


@pytest.fixture(scope="session")
def sd3_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 3.5's kind: two CLIP models and T5, classifier-free guidance."""
    from piflow.backbones.sd3 import SD3EncoderConfig

    return _tiny("sd3", SD3EncoderConfig, tmp_path_factory.mktemp("sd3_base"))


@pytest.fixture(scope="session")
def flux2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.2-dev's kind: embedded guidance, Mistral 3, an autoencoder with a batch norm."""
    from piflow.backbones.flux2 import Flux2EncoderConfig

    return _tiny("flux2", Flux2EncoderConfig, tmp_path_factory.mktemp("flux2_base"))


@pytest.fixture(scope="session")
def klein_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.2-klein's kind: classifier-free guidance, Qwen3."""
    from piflow.backbones.flux2_klein import Flux2KleinEncoderConfig

    return _tiny("flux2_klein", Flux2KleinEncoderConfig, tmp_path_factory.mktemp("klein_base"))


@pytest.fixture(scope="session")
def z_image_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Z-Image's kind: another sign and time, lists of samples, Qwen3."""
    from piflow.backbones.z_image import ZImageEncoderConfig

    return _tiny("z_image", ZImageEncoderConfig, tmp_path_factory.mktemp("z_image_base"))


@pytest.fixture(scope="session")
def wan_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan's kind: videos, UMT5."""
    from piflow.backbones.wan import WanEncoderConfig

    return _tiny("wan", WanEncoderConfig, tmp_path_factory.mktemp("wan_base"))


def _tiny(family: Any, encoder_config: Any, folder: Path) -> Path:
    """`piflow.testing.models`'s pipeline."""
    from piflow.config import ModelConfig
    from piflow.testing.models import save_model

    model = ModelConfig(family=family, path=str(folder / "transformer"), codec="vae")
    encoder = encoder_config(path=str(folder))
    save_model(folder, model, encoder, size=16, guidance_embeds=family == "flux2")
    return folder


def _saved(build: Callable[[], Any], folder: Path) -> Path:
    """The pipeline with seeded weights, saved; modules initialise zeros to small numbers."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = build()
        for parameter in pipeline.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    pipeline.save_pretrained(str(folder))
    return folder


def _euler(use_dynamic_shifting: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=use_dynamic_shifting)


def _autoencoder(latent_channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=2,
        layers_per_block=1,
        sample_size=16,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = list(string.ascii_lowercase)
    pieces = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(f"{letter}</w>" for letter in letters),
    ]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=16)


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    scores = [(piece, 0.0 if i < 3 else -2.0) for i, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=scores, extra_ids=0)


def _qwen_tokenizer() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    return Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)})

"""Other people's few-step models: diffusers pipelines, some with LoRA, that draw the same prompts.

A pipeline of the recipe's own family starts from the very noise that teacher and student start
from, as its loop lays latents out. Of any other the latents are other numbers; its pictures come
from noise of their own, drawn from the same hashes, and are compared with nobody's pixel by pixel.

Pipelines encode prompts by their own text encoders and decode by their own VAE, in their own
precision, as whoever uses them would.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor
from torch.nn import functional as F

from piflow import storage
from piflow.backbones.base import pack
from piflow.config import EvaluationConfig, ModelConfig, OtherStudentConfig, find_family
from piflow.config.family import resolve
from piflow.evaluation.others import Other
from piflow.inference.extra_lora import ExtraLora
from piflow.roles.teacher_lora import MAX_BYTES
from piflow.storage.fingerprint import weights_fingerprint
from piflow.storage.foreign import ForeignDataError, parse_object, redacted, shown
from piflow.storage.model_folder import (
    LIBRARY_ERRORS,
    MAX_CONFIG_BYTES,
    check_pipeline_folder,
    reason,
)
from piflow.storage.tensor_file import read_header

_INDEX = "model_index.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_ADAPTER = "other"
_NETWORKS = ("transformer", "unet")  # what a pipeline calls at every step
_ARGUMENTS = {  # of the configuration -> of a pipeline's call
    "guidance": "guidance_scale",
    "true_guidance": "true_cfg_scale",
    "negative_prompt": "negative_prompt",
    "max_sequence_length": "max_sequence_length",
    "sigmas": "sigmas",
}


def open_others(config: EvaluationConfig, teacher: ModelConfig) -> list[Other]:
    """The recipe's, checked as far as their small files tell.

    Raises:
        ValueError: a folder that would have a library run code; a pipeline that diffusers doesn't
            have, that takes no prompts, or doesn't take what the recipe sets; a LoRA that is none.
        OSError: a place can't be read.
    """
    return [_open(other, teacher) for other in config.others]


def _open(config: OtherStudentConfig, teacher: ModelConfig) -> Other:
    key = f"evaluation.others, {config.name}"
    base = storage.at_commit(storage.absolute(config.base))
    lora = None if config.lora is None else storage.absolute(ExtraLora(config.lora).file)
    config = config.model_copy(update={"base": base, "lora": lora})
    check_pipeline_folder(base, f"{key}: {redacted(base)}")
    index = storage.read_bytes(storage.join(base, _INDEX), max_bytes=MAX_CONFIG_BYTES)
    kind = _class(parse_object(index, where=f"{redacted(base)}/{_INDEX}"), key)
    _require_takes(kind, config, key)
    _scheduler_class(config)
    decides = {
        **config.model_dump(mode="json", exclude={"name", "base", "lora", "offload"}),
        "pipeline": kind.__name__,
        "weights": _weights(base, parse_object(index, where=_INDEX)),
        "lora": None if lora is None else storage.sha256(lora),
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return Other(config, digest, _has_same_latents(kind, base, teacher))


def _class(index: dict[str, Any], key: str) -> type[DiffusionPipeline]:
    name = index.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise ValueError(
            f"{key}: {_INDEX} has _class_name {shown(repr(name))}, expected a pipeline of "
            f"diffusers {diffusers.__version__}; a student of piflow is evaluated by "
            "`piflow evaluate --adapter` and compared by `piflow compare`"
        )
    return kind


def _require_takes(kind: type[DiffusionPipeline], config: OtherStudentConfig, key: str) -> None:
    taken = inspect.signature(kind.__call__).parameters
    for name in ("prompt", "height", "width", "num_inference_steps", "generator"):
        if name not in taken:
            raise ValueError(
                f"{key}: {kind.__name__} takes no {name}; expected a pipeline that makes pictures "
                "of prompts"
            )
    for field, name in _ARGUMENTS.items():
        if getattr(config, field) is not None and name not in taken:
            raise ValueError(f"{key}: {kind.__name__} takes no {name}; leave {field} out")
    if config.lora is not None and not hasattr(kind, "load_lora_weights"):
        raise ValueError(f"{key}: {kind.__name__} takes no LoRA; leave lora out")


def _scheduler_class(config: OtherStudentConfig) -> type[SchedulerMixin] | None:
    if config.scheduler is None:
        return None
    found = getattr(diffusers, config.scheduler, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(
            f"evaluation.others, {config.name}: diffusers {diffusers.__version__} has no scheduler "
            f"{config.scheduler}"
        )
    return found


def _weights(base: str, index: dict[str, Any]) -> dict[str, str | None]:
    """What tells the pipeline's parts from others; a hub's are named by their commit."""
    if storage.scheme(base) == "hf":
        return {"": base}
    parts = [name for name, value in index.items() if isinstance(value, list)]
    found = {
        part: weights_fingerprint(storage.join(base, part))
        for part in parts
        if storage.exists(storage.join(base, part))
    }
    scheduler = storage.join(base, _SCHEDULER)
    return found | {"": storage.sha256(scheduler) if storage.exists(scheduler) else None}


def _has_same_latents(kind: type[DiffusionPipeline], base: str, teacher: ModelConfig) -> bool:
    """Whether teacher and pipeline take noise of one layout.

    That is where the family's few-step pipeline is one of this kind with another transformer, and
    both transformers take as many channels.
    """
    own = find_family(teacher.family).pipeline
    takes = "latents" in inspect.signature(kind.__call__).parameters
    if own is None or not takes or teacher.codec != "vae" or kind not in resolve(own).__mro__:
        return False
    channels = [_channels(storage.join(base, "transformer")), _channels(teacher.path)]
    return channels[0] == channels[1] is not None


def _channels(transformer: str) -> Any:
    place = storage.join(transformer, "config.json")
    content = storage.read_bytes(place, max_bytes=MAX_CONFIG_BYTES)
    return parse_object(content, where=redacted(place)).get("in_channels")


def _require_whole(pipe: Any, folder: str) -> None:
    """diffusers fills what files lack with random numbers, and only warns."""
    for part in _NETWORKS:
        module = getattr(pipe, part, None)
        if module is None:
            continue
        place = storage.join(folder, part)
        names = storage.list_files(place, recursive=False)
        files = [storage.member(place, name) for name in names if name.endswith(".safetensors")]
        there = {name for file in files for name in read_header(file).tensors}
        missing = sorted(module.state_dict().keys() - there)
        if missing:
            raise ValueError(
                f"its {part} lacks {len(missing)} tensors that its configuration asks for, first "
                f"{shown(missing[0])}"
            )


class OtherSampler:
    """A pipeline that is loaded, on a device.

    Raises:
        ValueError: it doesn't load, or its LoRA doesn't go onto it.
        OSError: a file can't be read.
    """

    def __init__(self, other: Other, device: torch.device) -> None:
        self._other, self._device = other, device
        config = other.config
        self._key = f"evaluation.others, {config.name}"
        folder = storage.local_folder(config.base)
        check_pipeline_folder(str(folder), f"{self._key}: {redacted(config.base)}")
        try:
            self._pipe = self._loaded(str(folder))
        except LIBRARY_ERRORS as error:
            if isinstance(error, ForeignDataError):
                raise
            raise ValueError(
                f"{self._key}: diffusers doesn't load {redacted(config.base)}: {reason(error)}"
            ) from error
        self._pipe.set_progress_bar_config(disable=True)

    def _loaded(self, folder: str) -> Any:
        config = self._other.config
        pipe: Any = DiffusionPipeline.from_pretrained(
            folder,
            torch_dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        _require_whole(pipe, folder)
        self._set_scheduler(pipe)
        if config.lora is not None:
            self._add_lora(pipe, config.lora)
        if config.offload and self._device.type == "cuda":
            pipe.enable_model_cpu_offload(device=self._device)
        else:
            pipe.to(self._device)
        return pipe

    def _set_scheduler(self, pipe: Any) -> None:
        config = self._other.config
        options = config.scheduler_options
        kind = _scheduler_class(config) or type(pipe.scheduler)
        unknown = options.keys() - inspect.signature(kind.__init__).parameters.keys()
        if unknown:
            raise ValueError(
                f"{kind.__name__} has no {', '.join(sorted(unknown))}: see scheduler_options"
            )
        if config.scheduler is not None or options:
            pipe.scheduler = kind.from_config({**pipe.scheduler.config, **options})

    def _add_lora(self, pipe: Any, place: str) -> None:
        """Adds the LoRA to the weights, as a model that is used for long has it."""
        try:
            read_header(place)  # before anything as long as it claims
            tensors = parse_tensors(storage.read_bytes(place, max_bytes=MAX_BYTES))
        except (SafetensorError, ForeignDataError) as error:
            raise ForeignDataError(
                f"{self._key}: {redacted(place)} is no safetensors file: {shown(error, 1000)}"
            ) from error
        pipe.load_lora_weights(tensors, adapter_name=_ADAPTER)
        if not pipe.get_list_adapters():
            raise ValueError(f"{redacted(place)} holds no LoRA of {type(pipe).__name__}")
        pipe.fuse_lora(adapter_names=[_ADAPTER], lora_scale=self._other.config.strength)
        pipe.unload_lora_weights()

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], noise: Tensor, digests: Sequence[str], size: tuple[int, int]
    ) -> list[Image.Image]:
        """A picture a prompt.

        Args:
            noise: ``(B, C, h, w)``, teacher's and student's.
            digests: its hashes, of which another family's pipeline makes seeds.
            size: (height, width) in pixels.

        Raises:
            ValueError: the pipeline makes pictures of another size.
        """
        height, width = size
        config, device = self._other.config, self._device
        seeds = [int(digest[:15], 16) for digest in digests]
        arguments: dict[str, Any] = {
            name: getattr(config, field)
            for field, name in _ARGUMENTS.items()
            if getattr(config, field) is not None
        }
        if config.negative_prompt is not None:
            arguments["negative_prompt"] = [config.negative_prompt] * len(prompts)
        if self._other.same_noise:
            arguments["latents"] = self._latents(noise).to(device, getattr(torch, config.dtype))
        images = self._pipe(
            prompt=list(prompts),
            height=height,
            width=width,
            num_inference_steps=config.steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pil",
            **arguments,
        ).images
        sizes = {image.size for image in images}
        if sizes != {(width, height)} or len(images) != len(prompts):
            raise ValueError(
                f"{self._key}: {len(images)} pictures of sizes {sorted(sizes)} of {len(prompts)} "
                f"prompts; expected one each, {width}x{height}: it takes other sizes than the "
                "recipe's"
            )
        return [image.convert("RGB") for image in images]

    def _latents(self, noise: Tensor) -> Tensor:
        """Noise as the pipeline's call takes latents."""
        packs = getattr(self._pipe, "_pack_latents", None)
        if packs is None:
            return noise
        if len(inspect.signature(packs).parameters) == 1:  # FLUX.2: its call packs patches itself
            return F.pixel_unshuffle(noise, 2)
        return pack(noise)

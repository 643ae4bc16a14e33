"""adapter + prompts -> pictures or videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from piflow.config import ModelConfig, find_family

if TYPE_CHECKING:
    from torch import Tensor

    from piflow.backbones import Conditioning
    from piflow.inference.editing import Edit
    from piflow.inference.gallery import Gallery, Request
    from piflow.inference.settings import SamplingSettings
    from piflow.roles.adapter import Adapter
    from piflow.schedule import FewStep

SHEET = "grid.jpg"
_SHEET_PROMPTS, _SHEET_SEEDS = 32, 8  # at most, on the sheet
_PROMPT_BLOCK = 256  # embedded at once: about 2 GiB of FLUX.1's token states


@dataclass(frozen=True)
class Choices:
    """How to draw; None: as the adapter was trained.

    Attributes:
        nfe: network evaluations.
        base: the base model: a pipeline's folder, URI or hub name, or its transformer's folder.
        height, width: pixels.
        frames: of a video, for students that make some.
        batch_size: pictures drawn at once.
        device: "auto" is a GPU if there is one.
        dtype: what the base computes in.
        offload: whether the base's weights stay in the host's memory; "auto": where the GPU is too
            small for them.
        encoder: URI of the text encoder.
        allowed: URIs that the adapter may name besides its own folder and bucket and the hub,
            with all that lies below them.
        subfolder: of the adapter's place, where that holds several.
        loras: more LoRA on the base, ``URI`` or ``URI@STRENGTH``.
        guidance: embedded guidance, of models that take one.
        shift, final_step_size_scale, total_substeps, substep_rounding: the schedule's.
    """

    nfe: int | None = None
    base: str | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 4
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    offload: Literal["auto", "always", "never"] = "auto"
    encoder: str | None = None
    allowed: tuple[str, ...] = ()
    subfolder: str | None = None
    loras: tuple[str, ...] = ()
    guidance: float | None = None
    shift: float | None = None
    final_step_size_scale: float | None = None
    total_substeps: int | None = None
    substep_rounding: Literal["nearest", "up"] | None = None
    frames: int | None = None

    def few_step(self, trained: FewStep) -> FewStep:
        """The schedule with what was chosen.

        Raises:
            ValueError: numbers that no schedule has.
        """
        from piflow.inference.settings import check_schedule

        chosen = {field.name: getattr(self, field.name) for field in fields(trained)}
        given = {name: value for name, value in chosen.items() if value is not None}
        check_schedule(given)
        return replace(trained, **given)


def main(
    adapter: str,
    prompts: Sequence[str],
    *,
    out: str,
    edits: Sequence[Edit] = (),
    seeds: Sequence[int] = range(4),
    choices: Choices | None = None,
    family: str | None = None,
    show_progress: bool = True,
) -> list[str]:
    """Write a PNG picture for every prompt and seed, an index of them, and a sheet.

    A video is an animated WebP file, of which the sheet shows the first frame.

    A picture depends on its prompt and seed alone, not on what else is drawn, and is written as
    soon as it is drawn. Those that are there, of the same adapter and settings, are not drawn
    again.

    Args:
        edits: the pictures to be edited, of a student that edits: each prompt's, or one for all.
        out: URI of a folder; other pictures in it stay.

    Returns:
        The pictures' URIs, a prompt's seeds beside one another, and the sheet's last.

    Raises:
        ValueError: an empty prompt, no seeds, a size that doesn't divide, a GPU that isn't there,
            numbers of steps that the student doesn't run at, an adapter that doesn't load, pictures
            to edit for a student that doesn't, or none for one that does.
    """
    choices = choices or Choices()
    if family is not None:
        find_family(family)  # the user's own word: adapters can't have modules imported
    requests = _requests(prompts, seeds, edits)
    from transformers.utils import logging as transformers_logging

    from piflow.inference.drawing import choose_device
    from piflow.inference.gallery import Gallery
    from piflow.inference.places import adapter_files, adapter_place
    from piflow.inference.settings import read_adapter

    device = choose_device(choices.device)
    transformers_logging.disable_progress_bar()
    adapter = adapter_place(adapter, choices.subfolder)
    student, settings = read_adapter(
        adapter,
        choices.base,
        choices.dtype,
        encoder=choices.encoder,
        allowed=choices.allowed,
    )
    _require_edits(settings, edits)
    _tell_of_notes(student, settings, choices)
    settings = _settled(student, settings, choices)
    student, extra = _with_loras(student, settings, choices)
    decides = {**_what_decides(adapter_files(adapter), settings, choices), **extra}
    is_video = find_family(settings.model.family).video is not None
    notes = {"adapter": adapter, "device": device.type}
    gallery = Gallery(out, decides, notes, suffix=".webp" if is_video else ".png")
    missing = gallery.missing(requests)
    if missing:
        try:
            _draw(student, settings, missing, edits, gallery, choices, device, show_progress)
        finally:
            gallery.close()
    sheet = _write_sheet(gallery, requests, out)
    kind = "videos" if is_video else "pictures"
    print(
        f"{len(missing)} {kind} drawn, {len(requests) - len(missing)} were there; all are in "
        f"{out}, with index.jsonl and {SHEET}"
    )
    return [*(gallery.file(request) for request in requests), sheet]


def prompts_of_file(uri: str) -> list[str]:
    """The prompts of a file as `piflow embed` reads it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't a prompts file.
    """
    from piflow.data.prompts import read_prompts

    return [prompt.text for prompt in read_prompts(uri, height=1, width=1).prompts]


def edits_of_file(uri: str, column: str) -> tuple[list[str], list[Edit]]:
    """The prompts of a file, and the picture that each edits.

    Rows may name pictures in the file's own folder or, on an object store, its bucket.

    Args:
        column: of the pictures.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't a prompts file, or a row names no picture, one in another place, or one
            that can't be read.
    """
    from piflow.data.prompts import read_prompts
    from piflow.inference.editing import Edit
    from piflow.storage.foreign import shown

    found = read_prompts(uri, height=1, width=1, condition_column=column).prompts
    edits = []
    for prompt in found:
        source = prompt.condition
        if source is None or not source.key or source.row is not None:
            raise ValueError(
                f"{uri}: the row of prompt {shown(repr(prompt.text))} names no picture's file in "
                f"column {shown(repr(column))}; give one, or leave the row out"
            )
        edits.append(Edit.of(source.key, source.uri, source.folders))
    return [prompt.text for prompt in found], edits


def named_edits(uris: Sequence[str]) -> list[Edit]:
    """Pictures that the user names.

    Raises:
        BadPictureError: one isn't there.
        OSError: the storage refused.
    """
    from piflow.inference.editing import Edit

    return [Edit.of(uri, uri) for uri in uris]


def _require_edits(settings: SamplingSettings, edits: Sequence[Edit]) -> None:
    """Refuses pictures for a student that makes its own, and none for one that edits.

    Raises:
        ValueError: either.
    """
    name = settings.model.family
    if edits and settings.edits is None:
        raise ValueError(
            f"this student of the family {name} makes pictures of prompts alone: leave --edit and "
            "--edit-column out"
        )
    if settings.edits is not None and not edits:
        raise ValueError(
            f"this student of the family {name} edits pictures: name them with --edit, or a column "
            "of the prompts' file with --edit-column"
        )


def _requests(prompts: Sequence[str], seeds: Sequence[int], edits: Sequence[Edit]) -> list[Request]:
    """Every prompt with its picture to edit and every seed, each once."""
    from piflow.inference.gallery import Request

    if not prompts:
        raise ValueError("expected at least one prompt (--prompt or --prompts-file), got none")
    if blank := [prompt for prompt in prompts if not prompt.strip()]:
        raise ValueError(f"expected a prompt that says something, got {blank[0]!r}")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(f"expected prompts in UTF-8, got {prompt!r}") from None
    wrong = [seed for seed in seeds if not 0 <= seed < 2**63]
    if wrong or not seeds:
        raise ValueError(f"expected seeds from 0 to 2^63 - 1, got {wrong[0] if wrong else 'none'}")
    if edits and len(edits) not in (1, len(prompts)):
        raise ValueError(
            f"expected one picture to edit for all prompts or one for each, got {len(edits)} for "
            f"{len(prompts)} prompts"
        )
    told = [edit.sha256 for edit in edits] or [""]
    shown = told * len(prompts) if len(told) == 1 else told
    return [
        Request(number, prompt, seed, edits=picture)
        for number, (prompt, picture) in enumerate(
            dict.fromkeys(zip(prompts, shown, strict=True)), 1
        )
        for seed in dict.fromkeys(seeds)
    ]


def _settled(student: Adapter, settings: SamplingSettings, choices: Choices) -> SamplingSettings:
    """The settings with what was chosen, checked before anything large is loaded."""
    from piflow.backbones import build_codec
    from piflow.sampling import check_nfe

    if choices.batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {choices.batch_size}")
    clock, few_step = student.config.clock(), choices.few_step(settings.few_step)
    caution = check_nfe(few_step.nfe, settings.few_step.nfe, elastic=clock is None)
    if clock is not None:
        clock.require_spans(few_step)
    if caution:
        print(f"careful: {caution}")
    guidance = settings.embedded_guidance
    if choices.guidance is not None and guidance is None:
        raise ValueError(
            f"this student's base takes no embedded guidance, got {choices.guidance:g}: the "
            "teacher's guidance is learnt; leave --guidance out"
        )
    guidance = guidance if choices.guidance is None else choices.guidance
    settled = settings.model_copy(
        update={
            "model": _of_length(settings.model, choices.frames),
            "height": settings.height if choices.height is None else choices.height,
            "width": settings.width if choices.width is None else choices.width,
            "few_step": few_step,
            "embedded_guidance": guidance,
        }
    )
    build_codec(settled.model).latent_shape(settled.height, settled.width)
    return settled


def _of_length(model: ModelConfig, frames: int | None) -> ModelConfig:
    """The model with the chosen number of a video's frames; None: as trained.

    Raises:
        ValueError: it makes pictures, or a number that its VAE doesn't take.
    """
    if frames is None:
        return model
    video = find_family(model.family).video
    if video is None:
        raise ValueError(
            f"this student of the family {model.family} makes pictures, got {frames} frames: leave "
            "--frames out"
        )
    if model.codec == "vae":
        video.latent_frames(frames)
    return model.model_copy(update={"frames": frames})


def _tell_of_notes(student: Adapter, settings: SamplingSettings, choices: Choices) -> None:
    """Say what was taken of an adapter that notes nothing, for whoever knows better."""
    from piflow.inference.settings import SETTINGS_KEY

    if SETTINGS_KEY in student.metadata:
        return
    few_step = choices.few_step(settings.few_step)
    print(
        f"the adapter doesn't say how it is sampled: {settings.few_step.nfe} network evaluations "
        "by its policy or its folder's name, the rest as the published students: shift "
        f"{few_step.shift:g}, last step {few_step.final_step_size_scale:g}, base "
        f"{settings.model.path} in {settings.model.dtype}"
    )


def _with_loras(
    student: Adapter, settings: SamplingSettings, choices: Choices
) -> tuple[Adapter, dict[str, Any]]:
    """The student with more LoRA, and what of them decides a picture."""
    from piflow import storage
    from piflow.inference.extra_lora import ExtraLora, with_extra_lora

    extra = [ExtraLora.parse(text) for text in choices.loras]
    if not extra:
        return student, {}
    student = with_extra_lora(student, settings, extra)
    named = [[storage.sha256(item.file), item.strength] for item in extra]
    return student, {"loras": named}


def _what_decides(adapter: str, settings: SamplingSettings, choices: Choices) -> dict[str, Any]:
    """Everything that a picture depends on beside prompt and seed, for index and names."""
    from piflow.roles.merged import student_sha256

    names = ("guidance", "shift", "final_step_size_scale", "total_substeps", "substep_rounding")
    chosen = {name: getattr(choices, name) for name in names}
    if find_family(settings.model.family).video is not None:
        chosen["frames"] = settings.model.num_frames
    return {
        **{name: value for name, value in chosen.items() if value is not None},
        "adapter_sha256": student_sha256(adapter),
        "base": settings.model.path,
        "dtype": settings.model.dtype,
        "height": settings.height,
        "width": settings.width,
        "nfe": settings.few_step.nfe,
    }


def _told(settings: SamplingSettings, request: Request) -> tuple[str, str]:
    """What the text encoder reads of a request: its prompt, and the picture if it reads those."""
    return request.prompt, request.edits if settings.encoder.reads_pictures else ""


def _encoded(
    settings: SamplingSettings,
    read: Sequence[tuple[str, str]],
    by_content: Mapping[str, Edit],
    device: str,
) -> Conditioning:
    """Conditioning of what `_told` says of some requests, each once."""
    from piflow.inference.editing import edited_picture
    from piflow.inference.settings import encode_prompts

    pictures = None
    if settings.edits is not None and settings.encoder.reads_pictures:
        sizes = settings.encoder.picture_sizes(settings.edits)
        pictures = [partial(edited_picture, by_content[key], sizes) for _, key in read]
    return encode_prompts(settings, [prompt for prompt, _ in read], device, pictures=pictures)


def _draw(
    student: Adapter,
    settings: SamplingSettings,
    missing: Sequence[Request],
    edits: Sequence[Edit],
    gallery: Gallery,
    choices: Choices,
    device: Any,
    show_progress: bool,
) -> None:
    """Draw what is missing, and write each batch's pictures."""
    import torch

    from piflow.backbones import build_codec
    from piflow.backbones.offload import place
    from piflow.inference.drawing import draw_pictures
    from piflow.inference.editing import condition_latents
    from piflow.inference.pixels import enlarged, png_bytes, to_image, webp_bytes
    from piflow.inference.settings import student_of
    from piflow.progress import progress

    codec = build_codec(settings.model)
    family = find_family(settings.model.family)
    video, masked = family.video, family.masks_text
    size = (settings.height, settings.width)
    trio, by_content = None, {edit.sha256: edit for edit in edits}
    with progress("sample: pictures", len(missing), show=show_progress) as bar:
        for block in _blocks(missing):
            read = list(dict.fromkeys(_told(settings, request) for request in block))
            cond = _encoded(settings, read, by_content, device.type)  # its encoder is gone then
            if trio is None:
                trio = student_of(student, settings)
                for module in trio.modules:
                    place(module, device, f"base {settings.model.path}", choices.offload)
            latents: Mapping[str, Tensor] = {}
            if settings.edits is not None:
                shown = [by_content[key] for key in dict.fromkeys(item.edits for item in block)]
                latents = condition_latents(codec, settings.edits, shown, device)
            for batch in _batches(block, latents, choices.batch_size):
                rows = torch.tensor([read.index(_told(settings, request)) for request in batch])
                chosen = cond.select(rows)
                if latents:
                    chosen = chosen.editing(torch.stack([latents[item.edits] for item in batch]))
                chosen = (chosen.cut() if masked else chosen).to(device)
                drawn = draw_pictures(
                    trio, codec, settings.few_step, chosen, [item.seed for item in batch], size
                )
                for request, picture in zip(batch, drawn, strict=True):
                    if video is None:
                        content = png_bytes(enlarged(to_image(picture)))
                    else:
                        content = webp_bytes(picture, codec.frames, video.rate)
                    gallery.add(request, content)
                bar.advance(len(batch))


def _batches(
    block: Sequence[Request], latents: Mapping[str, Tensor], size: int
) -> Iterator[list[Request]]:
    """What is drawn at once: neighbours whose pictures to edit, if any, have one shape."""
    alike: dict[tuple[int, ...], list[Request]] = {}
    for request in block:
        shape = tuple(latents[request.edits].shape) if request.edits else ()
        alike.setdefault(shape, []).append(request)
    for requests in alike.values():
        for start in range(0, len(requests), size):
            yield requests[start : start + size]


def _blocks(missing: Sequence[Request]) -> Iterator[list[Request]]:
    """The pictures of at most `_PROMPT_BLOCK` prompts at a time."""
    numbers = list(dict.fromkeys(request.number for request in missing))
    for start in range(0, len(numbers), _PROMPT_BLOCK):
        chosen = set(numbers[start : start + _PROMPT_BLOCK])
        yield [request for request in missing if request.number in chosen]


def _write_sheet(gallery: Gallery, requests: Sequence[Request], out: str) -> str:
    """A sheet of the first prompts and seeds; its URI."""
    from piflow import storage
    from piflow.evaluation.sheet import image_grid, jpeg_bytes
    from piflow.storage.picture import MAX_PICTURE_BYTES, open_picture

    seeds = list(dict.fromkeys(request.seed for request in requests))[:_SHEET_SEEDS]
    shown = [item for item in requests if item.number <= _SHEET_PROMPTS and item.seed in seeds]
    files = (gallery.file(item) for item in shown)
    images = [open_picture(storage.read_bytes(file, max_bytes=MAX_PICTURE_BYTES)) for file in files]
    rows = [images[start : start + len(seeds)] for start in range(0, len(images), len(seeds))]
    prompts = [request.prompt for request in shown if request.seed == seeds[0]]
    place = storage.join(out, SHEET)
    sheet = image_grid(rows, prompts, [f"seed {seed}" for seed in seeds])
    storage.write_bytes(place, jpeg_bytes(sheet))
    return place

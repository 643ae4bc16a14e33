"""What the few-step pipelines share: loading, saving, and a family's own call with a student."""

from __future__ import annotations

import functools
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from piflow import storage
from piflow.backbones.transformer import TransformerBackbone
from piflow.config import Family
from piflow.inference.in_place import PackedTokens, PipelineStudent
from piflow.inference.places import adapter_files, adapter_place
from piflow.inference.settings import settings_of
from piflow.roles.adapter import CONFIG_FILE, WEIGHTS_FILE
from piflow.roles.heads import DXHead
from piflow.roles.merged import TRANSFORMER, is_merged, read_student, student_module
from piflow.sampling import check_nfe
from piflow.scheduler import FlowMapScheduler, TokenReader
from piflow.storage.model_folder import check_pipeline_folder
from piflow.storage.tensor_file import MAX_FILE_BYTES

ADAPTER_FOLDER = "adapter"  # in a saved pipeline
_ORIGIN = "_name_or_path"  # in a merged student's transformer's configuration: where it is from
_CODE_OPTIONS = ("trust_remote_code", "custom_pipeline", "custom_revision", "use_onnx")
_DOWNLOAD_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "token",
    "variant",
)


class FewStepPipeline(DiffusionPipeline, ABC):
    """A family's pipeline whose transformer is a student while it samples.

    Between calls `transformer` is the teacher, unchanged. `scheduler` is a `FlowMapScheduler` that
    fits the student; replace it by
    `FlowMapScheduler.from_config(pipe.scheduler.config, h=...)` to sample otherwise.
    """

    backbone_class: ClassVar[type[TransformerBackbone]]
    takes_float32: ClassVar[bool] = False
    """Whether the loop may carry float32 latents, and hands its transformer sigma as `timestep` and
    latents as `hidden_states`; or a stand-in for the transformer that casts latents itself."""
    scheduler: Any
    transformer: Any
    default_sample_size: int  # of families whose samples are packed tokens
    vae_scale_factor: int

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        adapter: str | PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """The family's pipeline from a folder, an s3:// prefix or the hub, with a student.

        Args:
            pretrained_model_name_or_path: the family's own pipeline, or one that
                `save_pretrained` wrote.
            adapter: folder or URI of the student's adapter, such as
                ``hf://owner/name/subfolder``, or of a merged student; not needed for a pipeline
                that has its own, as saved and merged ones do.
            options: of `DiffusionPipeline.from_pretrained`: torch_dtype, device_map, components …

        Raises:
            ValueError: a folder that `check_pipeline_folder` refuses, options that would run code
                of it, no adapter, or one that doesn't fit the pipeline's transformer.
        """
        for name in _CODE_OPTIONS:
            if options.get(name):
                raise ValueError(
                    f"{name}: {cls.__name__} runs no code of a model's folder; leave it out, or "
                    "load the parts yourself and pass them to the constructor"
                )
        place = name = fspath(pretrained_model_name_or_path)
        if "://" in place:
            place = str(storage.local_folder(place))
        elif not Path(place).is_dir():  # a repository's name
            found = {key: options[key] for key in _DOWNLOAD_OPTIONS if key in options}
            place = str(cls.download(place, **{"use_safetensors": True, **found}))
        check_pipeline_folder(place, name)
        kept = Path(place) / ADAPTER_FOLDER
        if adapter is None and kept.is_dir():
            adapter = kept
        elif adapter is None and is_merged(str(Path(place) / TRANSFORMER)):
            adapter = place
        student = None if adapter is None else fspath(adapter)
        if student is not None and "transformer" not in options:
            options = {**options, **cls._merged_transformer(student, options)}
        safe = {"use_safetensors": True, "trust_remote_code": False, **options}
        pipeline: Self = super().from_pretrained(place, adapter=student, **safe)
        return pipeline

    @classmethod
    def _merged_transformer(cls, student: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The transformer of a merged student, which takes the base's place; {} of an adapter."""
        uri = adapter_place(student)
        found = read_student(adapter_files(uri))
        if found.body is None:
            return {}
        asked: Any = options.get("torch_dtype")
        if isinstance(asked, dict):
            asked = asked.get("transformer", asked.get("default"))
        dtype: torch.dtype = asked or torch.float32
        if storage.scheme(found.body) != "file":
            found = replace(found, body=str(storage.local_folder(found.body)))
        module: Any = student_module(found, settings_of(found, uri).model.family, dtype)
        module.register_to_config(**{_ORIGIN: uri})
        return {"transformer": module}

    def save_pretrained(
        self, save_directory: str | PathLike[str], *options: Any, **named: Any
    ) -> None:
        """The family's folder with the base, and the adapter's two files beside it.

        Args:
            save_directory: a local folder.
            options, named: of `DiffusionPipeline.save_pretrained`: variant, max_shard_size …

        Raises:
            FileNotFoundError: the adapter that the pipeline was made from isn't there any more.
            ValueError: the student is a merged one.
        """
        if self._student.is_merged:
            raise ValueError(
                f"a merged student is saved already: copy the folder {self._adapter_uri}, whose "
                "transformer has the student's head, which this pipeline's has not"
            )
        folder = str(Path(save_directory) / ADAPTER_FOLDER)
        for name in (WEIGHTS_FILE, CONFIG_FILE, *self._student.training.files):
            place = storage.join(self._adapter_uri, name)
            content = storage.read_bytes(place, max_bytes=MAX_FILE_BYTES)
            storage.write_bytes(storage.join(folder, name), content)
        super().save_pretrained(save_directory, *options, **named)

    @property
    def trained_nfe(self) -> int:
        """Network evaluations that the student was trained for: the default number of steps."""
        return self._student.training.few_step.nfe

    def _add_student(
        self, adapter: str | PathLike[str] | None, transformer: Any, copied: Any = None
    ) -> None:
        """Makes the student of `transformer`, and the scheduler fit it.

        Args:
            copied: a copy of `transformer` for a backbone that would take it apart.

        Raises:
            ValueError: no adapter, or one that doesn't fit.
        """
        if adapter is None:
            raise ValueError(
                f"{type(self).__name__} needs the student: pass adapter=, the folder or URI that "
                "`piflow export` wrote"
            )
        uri = adapter_place(fspath(adapter))
        found = read_student(adapter_files(uri))
        if found.body is not None and transformer.config.get(_ORIGIN) != uri:
            raise ValueError(
                f"{uri} is a merged student with a transformer of its own: load it with "
                f"{type(self).__name__}.from_pretrained"
            )
        guided = transformer.config.get("guidance_embeds", False)  # comes with each call
        backbone = self.backbone_class(
            transformer if copied is None else copied, embedded_guidance=0.0 if guided else None
        )
        self._student = PipelineStudent(transformer, backbone, found, uri)
        self._adapter_uri = storage.absolute(uri)
        if not isinstance(self.scheduler, FlowMapScheduler):
            few_step = self._student.training.few_step
            self.scheduler = FlowMapScheduler(
                shift=few_step.shift,
                final_step_size_scale=few_step.final_step_size_scale,
                total_substeps=few_step.total_substeps,
                substep_rounding=few_step.substep_rounding,
            )

    def call_arguments(self, prompt: str, height: int, width: int) -> dict[str, Any]:
        """What a call takes for a prompt as recipes have it, and a picture's size in pixels."""
        return {"prompt": prompt, "height": height, "width": width}

    @abstractmethod
    def _reader(self, arguments: dict[str, Any]) -> TokenReader:
        """How this call's samples are read; refuses and completes the call's arguments."""

    def _packed_tokens(self, arguments: dict[str, Any]) -> PackedTokens:
        """The reader of a family whose samples are packed tokens, for a call's picture size."""
        default = self.default_sample_size * self.vae_scale_factor
        return PackedTokens.of_picture(
            self._student.head,
            arguments["height"] or default,
            arguments["width"] or default,
            self.vae_scale_factor,
        )

    def _fill_in_guidance(self, arguments: dict[str, Any], family: Family) -> None:
        """A call without embedded guidance gets the student's, or that of the family's model."""
        if arguments["guidance_scale"] is None:
            trained = self._student.training.embedded_guidance
            usual = 0.0 if family.published is None else family.published.embedded_guidance
            arguments["guidance_scale"] = usual if trained is None else trained

    def _sampling_transformer(self) -> Any:
        """What the family's loop calls inside `_student.in_place`."""
        return self.transformer if self._student.is_shared else self._student.module

    def _few_steps(self, family_call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The family's loop with student and scheduler in place."""
        reader = self._reader(arguments)
        if arguments["num_inference_steps"] is None:
            arguments["num_inference_steps"] = self.trained_nfe
        self._check_steps(arguments["num_inference_steps"])
        self._student.to(self._execution_device, self.transformer.dtype)
        with (
            self._student.in_place(),
            self._transformer_as(self._sampling_transformer()),
            self._exact_inputs(),
            self.scheduler.reading(reader, arguments["generator"], in_float32=self.takes_float32),
        ):
            return family_call(self, **arguments)

    @contextmanager
    def _exact_inputs(self) -> Iterator[None]:
        """Hands the transformer its time of float32, as in training, and latents in its own dtype.

        The loops of FLUX and Qwen-Image round the timestep to the latents' dtype and divide it by
        1000: in bfloat16 the network would see sigma = 0.888 at 0.8889 where it saw 0.892 in
        training, which rounds once.
        """
        module, scheduler = self.transformer, self.scheduler
        if not self.takes_float32 or not isinstance(module, nn.Module):
            yield
            return

        def exact(
            module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            sigma = scheduler.sigmas[scheduler.step_index].expand_as(named["timestep"])
            time = self.backbone_class.time_of(sigma)
            latents = named["hidden_states"].to(module.dtype)
            return positional, {**named, "timestep": time, "hidden_states": latents}

        hook = module.register_forward_pre_hook(exact, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _check_steps(self, nfe: int) -> None:
        """Refuses steps and schedules that the student wasn't trained for."""
        scheduler, head = self.scheduler, self._student.head
        if not isinstance(scheduler, FlowMapScheduler):
            raise ValueError(
                f"expected a FlowMapScheduler, got {type(scheduler).__name__}: a student's output "
                "is a policy, which others can't follow"
            )
        caution = check_nfe(nfe, self.trained_nfe, elastic=self._student.is_elastic)
        if caution:
            warnings.warn(caution, stacklevel=2)
        if not isinstance(head, DXHead):
            return
        config = scheduler.config
        if config["use_dynamic_shifting"]:
            raise ValueError(
                f"this DX student was trained for shift {head.clock.shift:g}, the scheduler's is "
                "dynamic: set use_dynamic_shifting to false and shift as trained"
            )
        head.clock.require_spans(scheduler.few_step_of(nfe))

    @contextmanager
    def _transformer_as(self, module: Any) -> Iterator[None]:
        """Exchanges the pipeline's transformer, unless it is the same."""
        own = self.transformer
        if module is own:
            yield
            return
        self.transformer = module
        try:
            yield
        finally:
            self.transformer = own


def few_step_call(family: type[Any], **defaults: Any) -> Callable[..., Any]:
    """A family's `__call__` for a `FewStepPipeline`.

    The signature is that of the installed diffusers, so that a call which the family takes is
    taken, and one that it doesn't is a TypeError.

    Args:
        family: the diffusers pipeline class.
        defaults: parameters that have another default than the family's.
    """
    own = inspect.signature(family.__call__)
    parameters = [
        parameter.replace(default=defaults[name]) if name in defaults else parameter
        for name, parameter in own.parameters.items()
    ]
    signature = own.replace(parameters=parameters)

    @functools.wraps(family.__call__)
    def call(self: FewStepPipeline, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, *named = bound.arguments.items()
        return self._few_steps(family.__call__, dict(named))

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = (
        f"Pictures in a few steps; arguments and result are {family.__name__}'s.\n\n"
        "num_inference_steps: network evaluations; default: as many as the student was trained "
        "for.\n\nRaises:\n    ValueError: a number of steps, guidance or noise levels that the "
        "student can't take.\n"
    )
    return call


def refuse_sigmas(arguments: Mapping[str, Any]) -> None:
    """A student's segments say what the noise levels are.

    Raises:
        ValueError: the caller gave some.
    """
    if arguments["sigmas"] is not None:
        raise ValueError(
            "sigmas: a student's noise levels follow from its segments and shift; leave sigmas "
            "out and choose num_inference_steps"
        )


def refuse_pictures(arguments: Mapping[str, Any]) -> None:
    """A student was distilled from prompts alone.

    Raises:
        ValueError: the caller gave pictures to edit.
    """
    if arguments["image"] is not None:
        raise ValueError(
            "image: the student makes pictures of prompts and was not trained to edit; leave "
            "image out"
        )


def require_picture(arguments: Mapping[str, Any]) -> None:
    """A student that edits was never trained without a picture.

    Raises:
        ValueError: the caller gave none.
    """
    if arguments["image"] is None:
        raise ValueError("image: the student edits pictures, and none was given; give one")


def refuse_guidance(arguments: Mapping[str, Any], scale: str, negative: Sequence[str]) -> None:
    """A student has learnt its teacher's guidance, and gives no velocity to guide.

    Args:
        arguments: the call's.
        scale: the parameter that is the guidance's scale; 1 turns it off.
        negative: parameters of which one must be given for guidance to happen; none: it happens
            by the scale alone.

    Raises:
        ValueError: the call asks for guidance.
    """
    given = [name for name in negative if arguments[name] is not None]
    if arguments[scale] > 1 and (given or not negative):
        raise ValueError(
            f"{scale} = {arguments[scale]:g}{' with ' if given else ''}{', '.join(given)}: the "
            "student has learnt its teacher's guidance and can't be guided again; leave "
            f"{' and '.join([scale, *given])} out, or set {scale} to 1"
        )

"""What `piflow evaluate` measures, and with whose weights."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from piflow.config.metrics import ALWAYS, METRICS
from piflow.config.section import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Section,
    Text,
    Uri,
)
from piflow.storage.foreign import shown

COMMERCIAL = frozenset(
    {
        "apache-2.0",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc0-1.0",
        "isc",
        "mit",
        "unlicense",
    }
)
"""SPDX identifiers, in small letters, of licences that are known to allow commercial use."""


class NetworkConfig(Section):
    """A network that evaluation measures with: a transformers folder, fetched by the command."""

    path: Uri
    """URI of its folder: config.json, model.safetensors and, of CLIP, the tokenizer."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of its model.safetensors, as sha256sum prints it and the hub shows it; compared before
    anything is drawn.
    """

    licence: Text
    """The weights' licence by its SPDX identifier, as their model card says."""


class NetworksConfig(Section):
    """Networks of `evaluation.metrics`; metrics share one."""

    clip: NetworkConfig | None = None
    """A CLIP of transformers, such as openai/clip-vit-large-patch14."""

    pick_score: NetworkConfig | None = None
    """PickScore as a CLIP of transformers with its tokenizer, such as yuvalkirstain/PickScore_v1.
    """

    hps_v2: NetworkConfig | None = None
    """HPSv2 or HPSv2.1, converted to a CLIP of transformers with its tokenizer."""

    dinov2: NetworkConfig | None = None
    """A DINOv2 of transformers; published distances are of facebook/dinov2-large."""


class OtherStudentConfig(Section):
    """Somebody else's few-step model, drawn on the same prompts: a diffusers pipeline, with or
    without LoRA.
    """

    name: Annotated[str, Field(pattern=r"^[\w .+()-]{1,60}$")]
    """What tables call it; no other one has it."""

    base: Uri
    """URI of a diffusers pipeline's folder, whole, with model_index.json."""

    lora: Uri | None = None
    """URI of a LoRA for it: a safetensors file, or a folder that holds one."""

    strength: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """Factor of the LoRA."""

    steps: Annotated[int, Field(ge=1, le=200)]
    """Its number of steps, each one network evaluation."""

    guidance: NonNegativeFloat | None = None
    """guidance_scale of the pipeline's call; default: the pipeline's own, which few-step models
    seldom mean.
    """

    true_guidance: NonNegativeFloat | None = None
    """true_cfg_scale of the call, where the pipeline has one."""

    negative_prompt: Annotated[str, Field(max_length=10_000)] | None = None
    """With guidance: what it leads away from."""

    max_sequence_length: Positive | None = None
    """Tokens of a prompt, where the pipeline's call takes that."""

    sigmas: Annotated[list[Fraction], Field(min_length=1, max_length=200)] | None = None
    """Noise levels of the steps, where the pipeline's call takes them."""

    scheduler: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,60}Scheduler$")] | None = None
    """Class of diffusers in place of the pipeline's own scheduler, such as LCMScheduler."""

    scheduler_options: dict[Text, float | int | bool | str | None] = {}
    """Values of the scheduler's configuration in place of the pipeline's own: {shift: 3.0}."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What the pipeline computes in."""

    offload: bool = False
    """Whether its parts wait in host memory until they are used, for a GPU that doesn't hold all of
    them at once.
    """

    @model_validator(mode="after")
    def _fits_together(self) -> OtherStudentConfig:
        if self.sigmas is not None and len(self.sigmas) != self.steps:
            raise ValueError(
                f"{self.name}: sigmas has {len(self.sigmas)} noise levels for {self.steps} steps; "
                "expected one a step"
            )
        if self.lora is None and self.strength != 1.0:
            raise ValueError(f"{self.name}: strength is a LoRA's, and there is none; leave it out")
        return self


class PromptSetConfig(Section):
    """A set of prompts that the store needn't hold."""

    path: Uri
    """URI of its file: text, CSV, JSON lines, Parquet, or a JSON list; or COCO's captions."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of the file, compared before it is read."""

    column: Text = "prompt"
    """Of the prompts, in files with columns."""

    category_column: Text | None = None
    """Of what kind each prompt is; the report has figures of each kind."""


class EvaluationConfig(Section):
    """What `piflow evaluate` measures."""

    prompts: Positive = 64
    """How many prompts."""

    prompt_list: Uri | None = None
    """URI of a text file of prompts that the store holds, taken evenly spaced; default: the
    smallest prompt ids.
    """

    prompt_set: PromptSetConfig | None = None
    """Prompts of elsewhere, taken evenly spaced; they are embedded for the evaluation."""

    seeds: Annotated[int, Field(ge=2, le=100_000)] = 4
    """Pictures a prompt; held out."""

    teacher_steps: Positive = 32
    """Euler steps of the reference."""

    nfe: Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(max_length=16)] = []
    """More numbers of network evaluations that the student is drawn with, and its teacher in as
    many Euler steps: [1, 2, 8] of a student of 4 makes a curve over 1, 2, 4 and 8. GM students run
    at any number, DX students at no fewer than trained.
    """

    others: Annotated[list[OtherStudentConfig], Field(max_length=12)] = []
    """Other people's few-step models, as further rows of the tables."""

    batch_size: Positive = 64
    """Pictures drawn at once; each worker is dealt so many at a time."""

    workers: NonNegative | None = None
    """Processes on the cluster that draw, with the base replicated or sharded as in training;
    0: the command draws by itself. Default: with runtime.use_gpu the fewest of
    runtime.num_workers, which the base is known to fit on; on CPUs 0, since one process uses all
    of a machine's cores and a second one takes longer to start than most pictures.
    """

    retrieval: bool = True
    """Retrieval@1; needs the emoji pictures."""

    metrics: Annotated[list[Text], Field(max_length=100)] = []
    """Metrics beside PSNR, diversity and retrieval@1, by their names in docs/metrics.md."""

    networks: NetworksConfig = NetworksConfig()
    """Weights that they measure with."""

    references: Uri | None = None
    """URI of a folder of pictures that distances to the world are measured to."""

    non_commercial: bool = False
    """Whether weights are taken whose licence isn't known to allow commercial use."""

    @property
    def network_places(self) -> dict[str, str]:
        """Key and URI of each network's folder."""
        given = {name: getattr(self.networks, name) for name in NetworksConfig.model_fields}
        return {
            f"evaluation.networks.{name}.path": network.path
            for name, network in given.items()
            if network is not None
        }

    @property
    def other_places(self) -> dict[str, str]:
        """Key and URI of each of the others' folders and files."""
        return {
            f"evaluation.others.{number}.{key}": place
            for number, other in enumerate(self.others)
            for key, place in (("base", other.base), ("lora", other.lora))
            if place is not None
        }

    @property
    def compares_sets(self) -> bool:
        """Whether a metric needs torchmetrics."""
        return any(METRICS[name].package is not None for name in self.measured)

    @field_validator("metrics")
    @classmethod
    def _are_metrics(cls, names: list[str]) -> list[str]:
        choices = [name for name, metric in METRICS.items() if metric.network is not None]
        for name in names:
            if name in choices:
                continue
            if name in ALWAYS:
                raise ValueError(f"{name} is measured always; leave it out")
            if name in METRICS:
                raise ValueError(f"{name} is asked for by evaluation.retrieval; leave it out")
            close = difflib.get_close_matches(name, choices, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown metric {shown(name)}, known: {', '.join(choices)}{hint}")
        return names

    @field_validator("others")
    @classmethod
    def _have_names(cls, others: list[OtherStudentConfig]) -> list[OtherStudentConfig]:
        names = [other.name.casefold() for other in others]
        for name in names:
            if names.count(name) > 1 or name.startswith(("teacher", "student")):
                raise ValueError(
                    f"{name!r} isn't a name of its own among evaluation.others; teachers and "
                    "students are the run's"
                )
        return others

    @model_validator(mode="after")
    def _has_one_list(self) -> EvaluationConfig:
        if self.prompt_set is not None and self.prompt_list is not None:
            raise ValueError("prompt_list and prompt_set both name prompts; leave one of them out")
        if self.prompt_set is not None and self.retrieval:
            raise ValueError(
                "retrieval is of emoji, and prompt_set has other prompts; set "
                "evaluation.retrieval=false"
            )
        return self

    @model_validator(mode="after")
    def _has_what_metrics_need(self) -> EvaluationConfig:
        for name in self.measured:
            metric = METRICS[name]
            self._require_licence(metric.licence, f"{name} is under the licence")
            if metric.network is not None and getattr(self.networks, metric.network) is None:
                raise ValueError(
                    f"{name} needs evaluation.networks.{metric.network}: set its path, sha256 and "
                    "licence, since piflow fetches no weights that the recipe doesn't name"
                )
            if self.prompts * self.seeds < metric.least_pictures:
                raise ValueError(
                    f"{name} needs at least {metric.least_pictures} pictures, and "
                    f"evaluation.prompts × seeds are {self.prompts * self.seeds}"
                )
            if metric.references and self.references is None:
                raise ValueError(
                    f"{name} needs evaluation.references, the URI of a folder of pictures; "
                    f"{name}_teacher measures to the teacher's instead"
                )
        for name in NetworksConfig.model_fields:
            network = getattr(self.networks, name)
            if network is not None:
                key = f"evaluation.networks.{name}.licence is"
                self._require_licence(network.licence, key)
        return self

    def _require_licence(self, licence: str, what: str) -> None:
        if licence.lower() not in COMMERCIAL and not self.non_commercial:
            raise ValueError(
                f"{what} {shown(licence)}, which isn't known to allow commercial use (those are "
                f"{', '.join(sorted(COMMERCIAL))}); set evaluation.non_commercial = true if "
                "your use is allowed"
            )

    @property
    def measured(self) -> list[str]:
        """Names of the metrics that are measured, in the order of `METRICS`."""
        wanted = {*ALWAYS, *self.metrics, *(["retrieval_at_1"] if self.retrieval else [])}
        return [name for name in METRICS if name in wanted]

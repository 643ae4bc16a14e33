"""An evaluation's figures of each prompt, in a file that is compared with others later.

    RUN_DIR/evaluation/figures/step_00000320.json    of a checkpoint; also an artifact of the run
    RUN_DIR/evaluation-NAME-HASH/figures/adapter.json

Two evaluations are compared on the prompts that both drew from the same noise against the same
reference, and in no other way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from piflow.config import Recipe
from piflow.config.metrics import COLUMNS, figures_over, metric_of
from piflow.config.section import NonNegativeFloat, Positive, Section, Text
from piflow.evaluation.compare import Evaluation, MethodResult, OtherResult
from piflow.evaluation.curve import CurvePoint, Sampled, curve
from piflow.evaluation.intervals import figures_over_other, own_figures
from piflow.evaluation.measures import identity
from piflow.evaluation.metrics import Interval
from piflow.schedule import FewStep
from piflow.storage.fingerprint import EncoderIdentity
from piflow.storage.foreign import ForeignDataError, parse_object, redacted, shown

FOLDER = "figures"  # in the evaluation's
_Share = Annotated[float, Field(ge=0, le=1)]
_Prompt = Annotated[str, Field(max_length=100_000)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")]
_TOLD = 3  # differences that a message names


class MethodFigures(Section):
    """A sampler's figures of each prompt, in the order of the prompts.

    Attributes:
        error: mean squared errors of the pictures against the reference's, values in [-1, 1].
        diversity: mean RMS distances between a prompt's pictures.
        retrieval: shares of pictures that show the prompt's emoji; None: not measured.
        columns: the other metrics' columns by name, a number for each prompt.
        whole: those with one number for all pictures.
        seconds_a_picture: the median; None: not noted.
        is_student: of the student; it may be there at several numbers of network evaluations.
        files: names of each prompt's first picture in the evaluation's folder of pictures.
    """

    name: Text
    nfe: Positive
    seconds: NonNegativeFloat
    seconds_a_picture: NonNegativeFloat | None = None
    is_student: bool = False
    error: list[NonNegativeFloat]
    diversity: list[NonNegativeFloat]
    retrieval: list[_Share] | None
    columns: dict[Text, list[float]] = {}
    whole: dict[Text, float] = {}
    files: list[str]

    @property
    def by_prompt(self) -> dict[str, Sequence[object]]:
        """Everything that has an entry for each prompt, by name."""
        own = {name: getattr(self, name) for name in (*_FIELDS, "files")}
        return {name: values for name, values in own.items() if values is not None} | self.columns

    @property
    def measured(self) -> dict[str, Tensor]:
        """The columns that this piflow knows, as of `Evaluation`."""
        own = {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}
        found: dict[str, list[float] | float] = {
            **{name: values for name, values in self.columns.items() if _is_whole(name) is False},
            **{name: value for name, value in self.whole.items() if _is_whole(name)},
            **own,
        }
        return {name: torch.tensor(found[name], dtype=torch.float64) for name in found}


class OtherFigures(Section):
    """Somebody else's model on the same prompts.

    Attributes:
        identity: hash of what decides its pictures beside prompts, noise and size.
        same_noise: whether it starts from the noise of all others; else no errors.
        columns: a number for each prompt.
        whole: of all pictures.
    """

    name: Text
    identity: _Digest
    nfe: Positive
    seconds: NonNegativeFloat
    seconds_a_picture: NonNegativeFloat
    same_noise: bool
    columns: dict[Text, list[float]]
    whole: dict[Text, float] = {}
    files: list[str]

    @property
    def by_prompt(self) -> dict[str, Sequence[object]]:
        """Everything that has an entry for each prompt, by name."""
        return {**self.columns, "files": self.files}

    @property
    def measured(self) -> dict[str, Tensor]:
        """As of `MethodFigures`."""
        found: dict[str, list[float] | float] = {
            **{name: values for name, values in self.columns.items() if _is_whole(name) is False},
            **{name: value for name, value in self.whole.items() if _is_whole(name)},
        }
        return {name: torch.tensor(found[name], dtype=torch.float64) for name in found}


_WHOLE = frozenset(name for name, column in COLUMNS.items() if column.kind == "whole")
_FIELDS = ("error", "diversity", "retrieval")  # columns that have a field of their own


def _is_whole(column: str) -> bool | None:
    """None: no such column is known."""
    return COLUMNS[column].kind == "whole" if column in COLUMNS else None


_FRAMES = "model.frames"  # in the reference, of videos


class Figures(Section):
    """What was measured of a student.

    Attributes:
        recipe: the recipe's name.
        student: "step 320", or an adapter's place.
        checkpoint: hash of what was measured: of the checkpoint's `state.json`, or the adapter.
        reference: what decides the reference beside prompts and noise, in words.
        noise: hash of each prompt's noise.
        metrics: what decides each metric that was measured, beside the pictures, in words.
        methods: the reference first, the student last, before it the teacher in as many steps;
            the last one is the student's whatever it says of itself.
        others: other people's models.
        categories: of each prompt; None: they have none.
    """

    format: Literal[1] = 1
    recipe: Text
    recipe_hash: _Digest
    student: Text
    checkpoint: _Digest
    reference: dict[str, str]
    seeds: Positive
    prompts: Annotated[list[_Prompt], Field(min_length=1)]
    noise: list[_Digest]
    metrics: dict[Text, Text] = {}
    methods: Annotated[list[MethodFigures], Field(min_length=2)]
    others: list[OtherFigures] = []
    categories: list[Annotated[str, Field(max_length=200)]] | None = None

    @property
    def frames(self) -> int:
        """Frames that the files of pictures hold, one below the other; 1: they are pictures."""
        told = self.reference.get(_FRAMES, "")
        return int(told) if told.isdecimal() and 0 < len(told) < 5 and int(told) else 1

    @model_validator(mode="after")
    def _has_a_figure_for_every_prompt(self) -> Figures:
        columns: list[Sequence[object]] = [self.noise]
        for method in self.methods:
            columns += method.by_prompt.values()
        if self.categories is not None:
            columns.append(self.categories)
        for other in self.others:
            columns += other.by_prompt.values()
        if any(len(column) != len(self.prompts) for column in columns):
            raise ValueError(f"expected {len(self.prompts)} figures a column, one for each prompt")
        if len({frozenset(dict(_of_prompts(method.measured))) for method in self.methods}) > 1:
            raise ValueError("expected the same columns of every method")
        known = self.methods[0].measured
        if any(not other.measured.keys() <= known.keys() | _WHOLE for other in self.others):
            raise ValueError("expected no columns of others that the reference lacks")
        return self

    @property
    def student_figures(self) -> MethodFigures:
        return self.methods[-1]

    @property
    def curve(self) -> tuple[CurvePoint, ...]:
        """Student and teacher over the number of network evaluations."""
        return curve(
            [
                Sampled(
                    method.name,
                    method.nfe,
                    method.is_student or method is self.methods[-1],
                    method.seconds_a_picture,
                    method.measured,
                )
                for method in self.methods
            ]
        )

    def identity_of(self, metric: str) -> str:
        """What decided a metric; files of before `metrics` have those of version 1."""
        return self.metrics.get(metric, identity(metric))


def figures_of(
    recipe: Recipe,
    result: Evaluation,
    *,
    student: str,
    checkpoint: str,
    base: str | None,
    encoder: EncoderIdentity,
) -> Figures:
    """An evaluation's figures.

    Args:
        recipe: with the student's own schedule.
        student, checkpoint: as of `Figures`.
        base: fingerprint of the teacher's weights; None: they lie on a hub.
    """
    return Figures(
        recipe=recipe.name,
        recipe_hash=recipe.hash(),
        student=student,
        checkpoint=checkpoint,
        reference=_reference(recipe, base, encoder),
        seeds=recipe.evaluation.seeds,
        prompts=list(result.prompts),
        noise=list(result.noise),
        metrics=result.metrics,
        methods=[_method(method, result) for method in result.methods if not method.is_other],
        others=[_other(other, result) for other in result.others],
        categories=None if result.categories is None else list(result.categories),
    )


def _other(other: OtherResult, result: Evaluation) -> OtherFigures:
    columns = result.columns[other.name]
    method = next(each for each in result.methods if each.name == other.name)
    return OtherFigures(
        name=other.name,
        identity=other.identity,
        nfe=method.nfe,
        seconds=method.seconds,
        seconds_a_picture=method.seconds_a_picture,
        same_noise=other.same_noise,
        columns={name: v.tolist() for name, v in columns.items() if not _is_whole(name)},
        whole={name: float(v) for name, v in columns.items() if _is_whole(name)},
        files=list(result.files[other.name]),
    )


def _method(method: MethodResult, result: Evaluation) -> MethodFigures:
    columns = result.columns[method.name]
    listed = {name: values.tolist() for name, values in columns.items() if not _is_whole(name)}
    others = listed.keys() - set(_FIELDS)
    return MethodFigures(
        name=method.name,
        nfe=method.nfe,
        seconds=method.seconds,
        seconds_a_picture=method.seconds_a_picture,
        is_student=method.is_student,
        error=listed["error"],
        diversity=listed["diversity"],
        retrieval=listed.get("retrieval"),
        columns={name: listed[name] for name in sorted(others)},
        whole={name: float(values) for name, values in columns.items() if _is_whole(name)},
        files=list(result.files[method.name]),
    )


def _reference(recipe: Recipe, base: str | None, encoder: EncoderIdentity) -> dict[str, str]:
    lora = recipe.model.lora
    decides = {
        "model.path": redacted(recipe.model.path) if base is None else f"weights {base[:16]}",
        "model.lora.strength": None if lora is None else lora.strength,
        "encoder": str(encoder),
        "objective.shift": FewStep.of(recipe.distillation()).schedule.shift,
        "evaluation.teacher_steps": recipe.evaluation.teacher_steps,
        **{f"guidance.{key}": value for key, value in recipe.guidance.model_dump().items()},
    }
    if recipe.model.num_frames > 1:
        decides[_FRAMES] = recipe.model.num_frames
    return {key: str(value) for key, value in decides.items()}


def read_figures(content: bytes, where: str) -> Figures:
    """Figures from a file's bytes, which may be anybody's.

    Raises:
        ForeignDataError: it is no such file, or one of a newer piflow.
    """
    parse_object(content, where=where)  # its limits
    try:
        return Figures.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ForeignDataError(
            f"{where} holds no figures that this piflow reads ({shown(key)}: "
            f"{shown(first['msg'])}); evaluate again"
        ) from None


def alone(figures: Figures) -> dict[str, Interval]:
    """The figures that gates name of a student itself, as far as they were measured."""
    return own_figures([method.measured for method in figures.methods])


def over(figures: Figures, other: Figures) -> dict[str, Interval]:
    """The figures that gates name of a student against another, on the prompts of both.

    Those are left out that `not_over` names.

    Raises:
        ValueError: they have no prompt with the same noise in common, or another reference.
    """
    rows, others = shared_rows([figures, other])
    ours, theirs = figures.student_figures.measured, other.student_figures.measured
    refused = {figures_over(champion=True)[name].column for name in not_over(figures, other)}
    return figures_over_other(
        {name: values[rows] for name, values in _of_prompts(ours) if name not in refused},
        {name: values[others] for name, values in _of_prompts(theirs)},
    )


def not_over(figures: Figures, other: Figures) -> dict[str, str]:
    """The figures of a student against another that there are not, and why."""
    ours, theirs = figures.student_figures.measured, other.student_figures.measured
    reasons = {}
    for name, figure in figures_over(champion=True).items():
        metric = metric_of(name)
        mine, their = figures.identity_of(metric), other.identity_of(metric)
        without = [
            each
            for each, columns in ((figures, ours), (other, theirs))
            if figure.column not in columns
        ]
        if without:
            reasons[name] = f"{metric} wasn't measured of {_names(without)}: evaluate again with it"
        elif mine != their:
            reasons[name] = (
                f"{metric} of {_names([figures, other])} was measured by {shown(mine)} and by "
                f"{shown(their)}: evaluate one of them as the other"
            )
    return reasons


def _of_prompts(columns: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, values) for name, values in columns.items() if values.dim() == 1]


def shared_rows(several: Sequence[Figures]) -> list[list[int]]:
    """For each of several evaluations the rows of the prompts that all drew from the same noise.

    The rows of one and the same prompt stand at the same place of every list.

    Raises:
        ValueError: there is none, or their references differ; says in what.
    """
    for other in several[1:]:
        _require_same_reference(several[0], other)
    keyed = [
        {key: row for row, key in enumerate(zip(each.prompts, each.noise, strict=True))}
        for each in several
    ]
    common = [key for key in keyed[0] if all(key in rows for rows in keyed)]
    if not common:
        prompts = set.intersection(*(set(each.prompts) for each in several))
        raise ValueError(
            f"{_names(several)} have {len(prompts)} prompts in common and none from the same "
            "noise: evaluate them with the same prompts, evaluation.prompts, evaluation.seeds, "
            "seed and picture size"
        )
    return [[rows[key] for key in common] for rows in keyed]


def _require_same_reference(first: Figures, other: Figures) -> None:
    differ = _differences(first.reference, other.reference)
    if differ:
        more = f" and {len(differ) - _TOLD} more" if len(differ) > _TOLD else ""
        raise ValueError(
            f"{_names([first, other])} were measured against other references "
            f"({'; '.join(differ[:_TOLD])}{more}): evaluate one of them as the other"
        )


def _differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    return [
        f"{shown(key)}: {shown(ours.get(key, 'none'))} and {shown(theirs.get(key, 'none'))}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def _names(several: Sequence[Figures]) -> str:
    return " and ".join(f"{shown(each.recipe)} ({shown(each.student)})" for each in several)

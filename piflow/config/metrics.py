"""What an evaluation can measure: each metric, what it needs, and the figures that gates may name.

A metric measures columns of every method's pictures, with a number for each prompt or one for all
pictures. A figure is what a column says of the student: by itself, over another method, or over the
version that has an alias. `piflow/evaluation/measures.py` computes the columns.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Network = Literal["clip", "pick_score", "hps_v2", "dinov2"]
"""What turns pictures, or prompts, into features."""

Kind = Literal["error", "ratio", "mean", "whole"]
"""How a column is read: squared errors, whose mean becomes a PSNR in dB; numbers whose means are
compared as a ratio; numbers whose means are compared as a difference; one number of all pictures.
"""


@dataclass(frozen=True)
class Column:
    """What a metric measures of each method's pictures.

    Attributes:
        key: of its summary in MLflow.
        heading: of its summary in a table.
        form: how that is written.
        meaning: a sentence for whoever reads the table.
    """

    kind: Kind
    key: str
    heading: str
    form: Literal["db", "ratio", "share", "number"]
    meaning: str


@dataclass(frozen=True)
class Figure:
    """What is said of the student, and may be asked for by a gate.

    Attributes:
        column: that it is of.
        meaning: in words, with its unit.
        over: the teacher in as many steps, the reference, or the version that has the alias, whose
            pictures of the same prompts and noise it is compared with; None: the student's own.
    """

    column: str
    meaning: str
    over: Literal["few_steps", "reference", "champion"] | None = None


@dataclass(frozen=True)
class Metric:
    """One entry of `METRICS`.

    Attributes:
        version: counts changes of what it computes; figures of two versions aren't compared.
        licence: of the method and of the code that computes it; the networks' weights have
            licences of their own.
        columns, figures: by name; names are of one metric alone.
        network: whose features it needs; such a metric is quicker on a GPU, and needs none.
        references: whether it needs pictures of the world beside those that are drawn.
        least_pictures: of each set that it compares.
        package: that it needs beside those that piflow depends on, and piflow's extra with it.
    """

    version: int
    licence: str
    columns: dict[str, Column]
    figures: dict[str, Figure]
    network: Network | None = None
    references: bool = False
    least_pictures: int = 2
    package: tuple[str, str] | None = None


def _score(name: str, heading: str, meaning: str, network: Network) -> Metric:
    """How well a picture fits its prompt: a mean over prompts, and differences of it."""
    return Metric(
        version=1,
        licence="Apache-2.0",
        columns={name: Column("mean", name, heading, "number", meaning)},
        figures={
            name: Figure(name, f"the student's {heading}"),
            f"{name}_gain": Figure(
                name, f"its {heading} minus that of the teacher in as many steps", "few_steps"
            ),
            f"{name}_to_reference": Figure(
                name, f"its {heading} minus the reference's", "reference"
            ),
            f"{name}_over_champion": Figure(
                name, f"its {heading} minus that of the version that has the alias", "champion"
            ),
        },
        network=network,
    )


_TORCHMETRICS = ("torchmetrics", "metrics")


def _distances(references: bool) -> dict[str, Metric]:
    """The distances of sets of pictures, to those of the world or to the teacher's."""
    end, others = ("", "the references") if references else ("_teacher", "the reference's pictures")
    to = f"to {others}"

    def one(name: str, heading: str, meaning: str) -> tuple[dict[str, Column], dict[str, Figure]]:
        column = Column("whole", name, f"{heading} {to}", "number", meaning)
        return {name: column}, {name: Figure(name, f"the student's {meaning}")}

    names = {
        f"fd_dinov2{end}": [
            ("FD-DINOv2", f"Fréchet distance of DINOv2's features {to}; not Inception's FID")
        ],
        f"kd_dinov2{end}": [
            ("KD-DINOv2", f"kernel distance (squared MMD) of DINOv2's features {to}; not the KID")
        ],
        f"precision_recall_dinov2{end}": [
            ("precision", f"share of the pictures near {others} in DINOv2's features"),
            ("recall", f"share of {others} near the pictures in DINOv2's features"),
        ],
    }
    metrics = {}
    for name, parts in names.items():
        columns: dict[str, Column] = {}
        figures: dict[str, Figure] = {}
        for heading, meaning in parts:
            own = name if len(parts) == 1 else f"{heading}_dinov2{end}"
            column, figure = one(own, heading, meaning)
            columns, figures = columns | column, figures | figure
        is_distance = len(parts) == 1
        metrics[name] = Metric(
            version=1,
            licence="Apache-2.0",
            columns=columns,
            figures=figures,
            network="dinov2",
            references=references,
            least_pictures=2 if is_distance else 4,
            package=_TORCHMETRICS if is_distance else None,
        )
    return metrics


METRICS = {
    "psnr": Metric(
        version=1,
        licence="Apache-2.0",
        columns={
            "error": Column(
                "error",
                "psnr_db",
                "PSNR, dB",
                "db",
                "of the squared error to the reference averaged over all pictures, values in "
                "[−1, 1]",
            )
        },
        figures={
            "psnr_gain_db": Figure(
                "error",
                "the student's endpoint PSNR over the teacher's in as many steps, dB",
                over="few_steps",
            ),
            "psnr_db": Figure("error", "the student's endpoint PSNR against the reference, dB"),
            "psnr_over_champion_db": Figure(
                "error",
                "its endpoint PSNR over that of the version that has the alias, dB",
                over="champion",
            ),
        },
    ),
    "diversity": Metric(
        version=1,
        licence="Apache-2.0",
        columns={
            "diversity": Column(
                "ratio",
                "diversity",
                "diversity",
                "ratio",
                "mean RMS distance between a prompt's pictures of different seeds",
            )
        },
        figures={
            "diversity_ratio": Figure(
                "diversity", "the student's diversity over the reference's", over="reference"
            ),
            "diversity_over_champion": Figure(
                "diversity", "its diversity over that version's", over="champion"
            ),
        },
    ),
    "retrieval_at_1": Metric(
        version=1,
        licence="Apache-2.0",
        columns={
            "retrieval": Column(
                "mean",
                "retrieval_at_1",
                "retrieval@1",
                "share",
                "share of pictures whose nearest reference picture is their prompt's",
            )
        },
        figures={
            "retrieval_at_1": Figure(
                "retrieval", "the share of its pictures that show their prompt's emoji"
            )
        },
    ),
    "clip_score": _score(
        "clip_score",
        "CLIP score",
        "100 times the cosine of picture and prompt in CLIP's space, 0 where it is less",
        "clip",
    ),
    "pick_score": _score(
        "pick_score",
        "PickScore",
        "the scaled cosine of picture and prompt in the space of a CLIP that was trained on "
        "people's choices between two pictures of a prompt",
        "pick_score",
    ),
    "hps_v2": _score(
        "hps_v2",
        "HPSv2",
        "100 times the cosine of picture and prompt in the space of a CLIP that was trained on "
        "people's rankings of a prompt's pictures",
        "hps_v2",
    ),
    "dinov2_diversity": Metric(
        version=1,
        licence="Apache-2.0",
        columns={
            "dinov2_diversity": Column(
                "ratio",
                "dinov2_diversity",
                "DINOv2 diversity",
                "ratio",
                "mean of 1 minus the cosine of DINOv2's features between a prompt's pictures of "
                "different seeds",
            )
        },
        figures={
            "dinov2_diversity_ratio": Figure(
                "dinov2_diversity",
                "the student's DINOv2 diversity over the reference's",
                "reference",
            ),
            "dinov2_diversity_over_champion": Figure(
                "dinov2_diversity", "its DINOv2 diversity over that version's", over="champion"
            ),
        },
        network="dinov2",
    ),
    "dinov2_distance_teacher": Metric(
        version=1,
        licence="Apache-2.0",
        columns={
            "dinov2_distance_teacher": Column(
                "mean",
                "dinov2_distance_teacher",
                "DINOv2 distance",
                "number",
                "mean of 1 minus the cosine of DINOv2's features between a picture and the "
                "reference's of the same prompt and noise",
            )
        },
        figures={
            "dinov2_distance_teacher": Figure(
                "dinov2_distance_teacher", "the student's DINOv2 distance to the reference"
            ),
            "dinov2_distance_teacher_to_few_steps": Figure(
                "dinov2_distance_teacher",
                "its DINOv2 distance minus that of the teacher in as many steps; below 0 the "
                "student is nearer",
                over="few_steps",
            ),
            "dinov2_distance_teacher_over_champion": Figure(
                "dinov2_distance_teacher",
                "its DINOv2 distance minus that of the version that has the alias",
                over="champion",
            ),
        },
        network="dinov2",
    ),
    **_distances(references=False),
    **_distances(references=True),
}
"""Every metric by its name in a recipe."""

ALWAYS = ("psnr", "diversity")
"""Metrics that every evaluation measures."""

COLUMNS = {name: item for metric in METRICS.values() for name, item in metric.columns.items()}

FIGURES = {name: item for metric in METRICS.values() for name, item in metric.figures.items()}


def metric_of(figure: str) -> str:
    """The metric that a figure is of."""
    return next(name for name, metric in METRICS.items() if figure in metric.figures)


def figures_over(champion: bool, measured: Collection[str] | None = None) -> dict[str, Figure]:
    """The figures over the version that has an alias, or all others.

    Args:
        measured: only those of these columns.
    """
    return {
        name: figure
        for name, figure in FIGURES.items()
        if (figure.over == "champion") == champion
        and (measured is None or figure.column in measured)
    }


def has_interval(figure: str) -> bool:
    """Whether a figure is of single prompts, so that it has an interval over them."""
    return COLUMNS[FIGURES[figure].column].kind != "whole"

"""What was predicted of a run, beside what was measured: RUN_DIR/plan/plan.json and plan.md.

Rank 0 tells the driver of the workers that have started (`Workers`), and at each checkpoint what it
has measured (`Measured`). The driver predicts (`piflow.training.prediction`) and writes both files
anew, so they are about the workers that trained last.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from piflow import storage
from piflow.storage.foreign import shown

FOLDER = "plan"  # in the run's
FILES = (f"{FOLDER}/plan.json", f"{FOLDER}/plan.md")
GIB = 2**30
_TERA, _GIGA = 1e12, 1e9
_MAX_BYTES = 2**20
_log = logging.getLogger(__name__)

_Text = Annotated[str, Field(max_length=4000)]
_Count = Annotated[int, Field(ge=0)]
_Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Parts = Annotated[dict[_Text, _Count], Field(max_length=100)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Workers:
    """What rank 0 tells of the workers that have started.

    Attributes:
        device: name of its GPU in CUDA; None: it computes on the CPU.
        device_memory: bytes of that GPU.
        world: workers; `here`: of them on rank 0's machine; `shard`: that share one copy.
        strategy: as the planner calls it.
        start: optimiser steps that were done before.
        recipe: as they run it, with nothing left open; plain values.
        reasons: for the strategy, and for what else was decided.
    """

    device: str | None
    device_memory: int
    world: int
    here: int
    shard: int
    strategy: Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
    start: int
    recipe: dict[str, Any]
    reasons: list[str]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Prediction:
    """What `piflow plan` says of workers that have started.

    Attributes:
        device: what each worker computes on.
        strategy: how the model is spread over them.
        start: optimiser steps that were done before.
        parameters: of the transformer; `trained`: of the student.
        memory: part -> bytes of one worker's device, without what isn't PyTorch's.
        host: bytes of a worker in host memory, where the strategy offloads.
        operations: phase -> floating-point operations of a step, over all workers.
        sent: kind and phase -> bytes that a worker sends in a step.
        step_seconds: None: `no_time` says why no time is predicted.
        reasons: for the strategy, and for what else the recipe left open.
        batch: samples of a step.
    """

    device: _Text
    workers: Annotated[int, Field(gt=0)]
    strategy: _Text
    start: _Count
    parameters: _Count
    trained: _Count
    memory: _Parts
    host: _Count
    operations: _Parts
    sent: _Parts
    batch: Annotated[int, Field(gt=0)]
    step_seconds: _Amount | None = None
    no_time: _Text | None = None
    reasons: Annotated[list[_Text], Field(max_length=10)] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """The figures by MLflow's names of them."""
        found = {
            "plan/peak_memory_gib": sum(self.memory.values()) / GIB,
            "plan/tflop_per_step": sum(self.operations.values()) / _TERA,
            "plan/sent_gb_per_step": sum(self.sent.values()) / _GIGA,
        }
        if self.step_seconds is not None:
            found["plan/step_seconds"] = self.step_seconds
            found["plan/samples_per_second"] = self.batch / self.step_seconds
        return found


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Measured:
    """What rank 0 has measured since its start.

    Attributes:
        steps: that were timed; the first one, which compiles and allocates, isn't.
        step_seconds: their median, waits for data included, checkpoints and pictures not.
        trained: values that the optimiser moves, over all workers.
        peak_memory: bytes that PyTorch had allocated on the device at most; None: it is no GPU.
    """

    steps: Annotated[int, Field(gt=0)]
    step_seconds: _Amount
    trained: _Count
    peak_memory: _Count | None = None


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class _Content:
    predicted: Prediction
    measured: Measured | None


def write(run_dir: str, predicted: Prediction, measured: Measured | None) -> dict[str, str]:
    """Write both files; returns name -> content.

    Raises:
        OSError: the storage refuses.
    """
    tree = {"predicted": asdict(predicted), "measured": measured and asdict(measured)}
    contents = (json.dumps(tree, indent=1), page(predicted, measured))
    files = dict(zip(FILES, contents, strict=True))
    for name, content in files.items():
        storage.write_bytes(storage.join(run_dir, name), content.encode())
    return files


def kept_table(run_dir: str) -> str:
    """The `table` of what lies in a run's folder; empty: there is none, or none that can be read.

    Whoever may write the folder wrote it: it is read within limits, and refused files are logged.
    """
    place = storage.join(run_dir, FILES[0])
    try:
        content = storage.read_bytes(place, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        return ""
    try:
        found = TypeAdapter(_Content).validate_json(content)
    except ValidationError as error:
        _log.warning("%s is left out, it is no plan of piflow's: %s", place, shown(error, 500))
        return ""
    return table(found.predicted, found.measured)


def table(predicted: Prediction, measured: Measured | None) -> str:
    """Markdown: each figure as predicted and as measured, and the latter over the former."""
    lines = [f"| {_about(predicted)} | predicted | measured | ratio |", "|---|---|---|---|"]
    for name, expected, found, style in _compared(predicted, measured):
        ratio = f"{found / expected:.2f}" if found and expected else "–"
        cells = ("–" if value is None else format(value, style) for value in (expected, found))
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def page(predicted: Prediction, measured: Measured | None) -> str:
    """Markdown of everything: the table, why something is missing in it, and the parts."""
    lines = ["# Predicted and measured", "", table(predicted, measured), ""]
    lines += [f"* {note}" for note in _notes(predicted, measured)]
    parts: tuple[tuple[str, Mapping[str, int], float], ...] = (
        ("Memory of a worker's device, GiB", predicted.memory, GIB),
        ("Operations of a step, TFLOP", predicted.operations, _TERA),
        ("Sent by a worker in a step, GB", predicted.sent, _GIGA),
    )
    for title, sizes, unit in parts:
        if sizes:
            lines += ["", f"## {title}", "", "| part | predicted |", "|---|---|"]
            lines += [f"| {_cell(name)} | {size / unit:,.4g} |" for name, size in sizes.items()]
    return "\n".join(lines) + "\n"


def _about(predicted: Prediction) -> str:
    return f"{predicted.workers} × {_cell(predicted.device)}, {_cell(predicted.strategy)}"


def _compared(
    predicted: Prediction, measured: Measured | None
) -> Iterator[tuple[str, float | None, float | None, str]]:
    seconds = None if measured is None else measured.step_seconds
    memory = None if measured is None else measured.peak_memory
    expected = predicted.step_seconds
    yield "seconds a step", expected, seconds, ",.4g"
    yield (
        "samples a second",
        expected and predicted.batch / expected,
        seconds and predicted.batch / seconds,
        ",.4g",
    )
    yield (
        "peak memory of PyTorch, GiB",
        sum(predicted.memory.values()) / GIB,
        None if memory is None else memory / GIB,
        ",.4g",
    )
    trained = None if measured is None else measured.trained
    yield "trained parameters", predicted.trained, trained, ",d"
    yield "parameters of the transformer", predicted.parameters, None, ",d"
    yield "TFLOP a step", sum(predicted.operations.values()) / _TERA, None, ",.4g"
    yield "GB that a worker sends a step", sum(predicted.sent.values()) / _GIGA, None, ",.4g"


def _notes(predicted: Prediction, measured: Measured | None) -> Iterator[str]:
    yield from (_cell(reason) for reason in predicted.reasons)
    if predicted.no_time is not None:
        yield f"No time is predicted: {_cell(predicted.no_time)}."
    if measured is None:
        yield "Nothing is measured yet."
        return
    yield (
        f"The time measured is the median of {measured.steps:,} steps after step "
        f"{predicted.start + 1:,}."
    )
    if measured.peak_memory is None:
        yield "Memory is measured on GPUs alone: a process on a CPU holds libraries, too."
    if predicted.host:
        yield f"In host memory a worker is predicted to hold {predicted.host / GIB:,.4g} GiB."


def _cell(text: Any) -> str:
    return shown(text, 500).replace("|", "/").replace("<", "‹").replace("`", " ")

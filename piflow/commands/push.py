"""An exported student, with a model card -> a repository on the hub, or an object store's prefix.

What goes is named one by one: the student's own files, a picture sheet and a README.md. Nothing
else of the folder or the run does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from piflow.evaluation.card import Card
    from piflow.evaluation.figures import Figures
    from piflow.inference.settings import SamplingSettings
    from piflow.roles.adapter import Adapter

README = "README.md"
_TEXTS = (".json", ".txt", ".jinja", ".md")
_MAX_TEXT = 64 * 2**20  # bytes of a tokenizer's table


@dataclass(frozen=True)
class Pushed:
    """What goes where.

    Attributes:
        destination: URI.
        files: path there -> bytes.
        left_out: of the source folder.
        card: README.md.
    """

    destination: str
    files: dict[str, int]
    left_out: tuple[str, ...]
    card: str


def main(
    source: str,
    destination: str,
    *,
    run: str | None = None,
    licence: str | None = None,
    private: bool = True,
    dry_run: bool = False,
) -> Pushed:
    """Push an exported student.

    Args:
        source: folder that `piflow export` wrote.
        destination: hf://owner/name[/folder], or a folder of an object store.
        run: the run's folder, for the recipe's keys, figures and pictures; default: the one that
            `source` lies in, if it is one.
        licence: of the base, as the hub spells it; default: as the base's own card says.
        private: of a new repository.
        dry_run: lists what would go and writes nothing.

    Raises:
        ValueError: no student, a run's folder, another kind of destination, other content there,
            or a file with a secret or a path of a machine in it.
        PermissionError: no token, or no right.
    """
    from piflow import storage
    from piflow.evaluation.card import GRID, metadata_text, refuse_secrets

    if storage.scheme(destination) != "hf" and not storage.on_objects(destination):
        raise ValueError(
            "expected hf://owner/name, s3://bucket/prefix, gs://… or abfs://… to push to, got "
            f"{destination}"
        )
    if storage.exists(storage.join(source, "run.json")):
        raise ValueError(f"{source} is a run's folder: give the folder that `piflow export` wrote")
    root = storage.local_folder(source)
    student, settings = _read(str(root), source)
    names = _own_files(root, student, settings)
    card, grid = _card(root, source, destination, student, settings, run, licence)
    content: dict[str, Path | bytes] = {name: root / name for name in names}
    content |= {README: card.text().encode(), **({} if grid is None else {GRID: grid})}
    texts = {name: _text(content[name]) for name in content if name.endswith(_TEXTS)}
    refuse_secrets({**texts, "the weights' metadata": metadata_text(student.metadata)})
    left_out = [name for name in storage.list_files(str(root)) if name not in content]
    sizes = {name: _size(value) for name, value in sorted(content.items())}
    pushed = Pushed(destination, sizes, tuple(left_out), card.text())
    _tell(pushed, dry_run)
    if dry_run:
        print(f"\n{pushed.card}")
        return pushed
    _require_ours(destination, content)
    if storage.scheme(destination) == "hf":
        from piflow.storage.hub_upload import hub_commit

        page = hub_commit(destination, content, f"{card.name} by piflow", private=private)
        print(f"pushed: {page}")
        return pushed
    for name, value in content.items():  # the card is the last but for the sheet
        target = storage.join(destination, name)
        if isinstance(value, bytes):
            storage.write_bytes(target, value)
        else:
            storage.copy_file(str(value), target)
    print(f"pushed to {storage.redacted(destination)}")
    return pushed


def _read(root: str, source: str) -> tuple[Adapter, SamplingSettings]:
    """The student and its notes.

    Raises:
        ValueError: there is none, or it wasn't exported by piflow.
    """
    from piflow.inference.places import adapter_files
    from piflow.inference.settings import SETTINGS_KEY, settings_of
    from piflow.roles.merged import read_student

    student = read_student(adapter_files(root))
    if SETTINGS_KEY not in student.metadata:
        raise ValueError(f"{source} wasn't exported by piflow: it doesn't say how it is sampled")
    return student, settings_of(student, source)


def _object_in(file: Path) -> dict[str, Any]:
    """A JSON object of a folder that somebody may have written; {} if the file isn't there."""
    from piflow import storage
    from piflow.storage.foreign import parse_object

    if not file.is_file():
        return {}
    return parse_object(storage.read_bytes(str(file)), where=str(file))


def _own_files(root: Path, student: Adapter, settings: SamplingSettings) -> list[str]:
    """What belongs to the student, by paths in its folder."""
    from piflow.inference.places import is_name
    from piflow.roles.adapter import CONFIG_FILE, WEIGHTS_FILE
    from piflow.roles.merged import TRANSFORMER
    from piflow.storage.foreign import relative_name
    from piflow.training.export_whole import REPORT
    from piflow.training.pipeline_parts import COPIED, INDEX

    if student.body is None:
        lora = settings.model.lora
        taken = [] if lora is None or not is_name(lora.path) else [lora.path]
        return [CONFIG_FILE, WEIGHTS_FILE, *(relative_name(n, where="its LoRA") for n in taken)]
    index = root / INDEX
    named = _object_in(index)
    lists = [name for name, value in named.items() if isinstance(value, list)]
    parts = [relative_name(name, where=str(index)) for name in lists]
    folders = [TRANSFORMER, *(name for name in parts if name != TRANSFORMER and "/" not in name)]
    found = [name for name in (REPORT, INDEX) if (root / name).is_file()]
    for folder in folders:
        found += [
            f"{folder}/{file.name}"
            for file in sorted((root / folder).iterdir() if (root / folder).is_dir() else ())
            if file.is_file() and not file.is_symlink() and file.name.endswith((*COPIED, ".gguf"))
        ]
    return found


def _card(
    root: Path,
    source: str,
    destination: str,
    student: Adapter,
    settings: SamplingSettings,
    run: str | None,
    licence: str | None,
) -> tuple[Card, bytes | None]:
    """The card and, where this checkpoint was evaluated, the sheet of its pictures."""
    from piflow import storage
    from piflow.evaluation.card import Card
    from piflow.roles.adapter import FORMAT_KEY
    from piflow.runs.folder import RECORD_FILE, read_record
    from piflow.training.export_whole import REPORT

    if run is None and storage.exists(storage.sibling(source, RECORD_FILE)):
        run = storage.sibling(source, RECORD_FILE).removesuffix(f"/{RECORD_FILE}")
    record = None if run is None else read_record(run)
    if run is not None and record is None:
        raise ValueError(f"{run} is no run's folder: it has no {RECORD_FILE}")
    figures, grid = (None, None) if run is None else _evaluated(run, student)
    report = root / REPORT
    measured = _object_in(report)
    quality = measured.get("quality")
    place = destination.removeprefix("hf://")
    card = Card(
        name=storage.base_name(destination),
        place=place,
        kind=student.metadata.get(FORMAT_KEY, "adapter"),
        student=student,
        settings=settings,
        licence=licence or _licence_of_base(settings),
        identity=None if record is None else record.identity,
        figures=figures,
        has_grid=grid is not None,
        error=quality["error"] if isinstance(quality, dict) else None,
    )
    return card, grid


def _evaluated(run: str, student: Adapter) -> tuple[Figures | None, bytes | None]:
    """Figures and picture sheet of the student's checkpoint; None: it wasn't evaluated last."""
    from piflow import storage
    from piflow.evaluation.card import GRID
    from piflow.evaluation.figures import FOLDER, read_figures
    from piflow.runs.promotion import CHECKPOINT_SHA_TAG

    folder = storage.join(run, "evaluation")
    names = [
        name
        for name in storage.list_files(storage.join(folder, FOLDER), recursive=False)
        if name.startswith("step_") and name.endswith(".json")
    ]
    digest = student.metadata.get(CHECKPOINT_SHA_TAG)
    for name in sorted(names, reverse=True):
        place = storage.join(folder, FOLDER, name)
        found = read_figures(storage.read_bytes(place), place)
        if found.checkpoint != digest:
            continue
        sheet = storage.join(folder, GRID)
        newest = name == max(names) and storage.exists(sheet)
        return found, storage.read_bytes(sheet) if newest else None
    return None, None


def _licence_of_base(settings: SamplingSettings) -> str | None:
    """As the card of a base on the hub says; None: it isn't there, or can't be asked."""
    from piflow import storage
    from piflow.storage.foreign import parse_object

    path = settings.model.path
    if storage.scheme(path) != "hf":
        return None
    import yaml

    root = "/".join(path.removeprefix("hf://").split("/")[:2])
    try:
        text = storage.read_bytes(f"hf://{root}/{README}", max_bytes=2**20).decode()
        head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        tree = parse_object(json.dumps(head), where=README)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    licence = tree.get("license_name") or tree.get("license")
    return licence if isinstance(licence, str) else None


def _require_ours(destination: str, content: Mapping[str, Path | bytes]) -> None:
    """Refuses a place with other content than an earlier push.

    Raises:
        ValueError: there is some.
    """
    from piflow import storage
    from piflow.evaluation.card import MARK

    if storage.scheme(destination) == "hf":
        from piflow.storage.hub_upload import hub_files

        there = hub_files(destination)
    else:
        there = storage.list_files(destination)
    if not there:
        return
    other = [name for name in there if name not in content]
    card = storage.join(destination, README)
    is_ours = README in there and MARK in storage.read_bytes(card, max_bytes=2**20).decode()
    if not is_ours or other:
        raise ValueError(
            f"{storage.redacted(destination)} holds other content "
            f"({(other or there)[0]}): push to an empty place, or a folder of it"
        )


def _text(value: Path | bytes) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if value.stat().st_size > _MAX_TEXT:
        raise ValueError(f"{value.name} is too large for a text: it isn't pushed")
    return value.read_text(errors="replace")


def _size(value: Path | bytes) -> int:
    return len(value) if isinstance(value, bytes) else value.stat().st_size


def _tell(pushed: Pushed, dry_run: bool) -> None:
    from piflow import storage

    would = "would go" if dry_run else "go"
    print(f"{len(pushed.files)} files {would} to {storage.redacted(pushed.destination)}:")
    for name, size in pushed.files.items():
        print(f"  {size:>14,} {name}")
    if pushed.left_out:
        shown = ", ".join(pushed.left_out[:5])
        print(f"left out: {len(pushed.left_out)} other files ({shown})")

"""`piflow push`: what goes to a hub on loopback, by its own client, and what never does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from piflow.commands import push
from piflow.config import Recipe
from piflow.evaluation.card import refuse_secrets, without_places
from piflow.inference.settings import load_student, read_adapter
from piflow.roles.adapter import WEIGHTS_FILE
from piflow.runs import folder as run_folder
from piflow.runs.folder import RunRecord
from piflow.runs.promotion import CHECKPOINT_SHA_TAG
from piflow.training.export import export_adapter
from piflow.training.export_whole import export_whole
from tests.hub import READING_TOKEN, TOKEN, Hub
from tests.unit.inference.test_settings import recipe
from tests.unit.training.test_export_whole import KINDS, PACKAGES, checkpoint_of

DIGEST = "ab" * 32  # of the checkpoint


@pytest.fixture
def writable(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub with a token that may write; weights come by Git LFS."""
    hub.new = tmp_path / "new"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    return hub


@pytest.fixture
def run(flux_folder: Path, tmp_path: Path) -> Path:
    """A run's folder with a record, an evaluation of its checkpoint, and an adapter."""
    base = shutil.copytree(flux_folder, tmp_path / "models/flux")
    ours = recipe(base, run_dir=str(tmp_path / "run"))
    step = checkpoint_of(ours, tmp_path / "step")
    notes = {"piflow.run_id": "run-1", CHECKPOINT_SHA_TAG: DIGEST}
    options: Any = {**KINDS, "lineage": notes}
    export_adapter(ours, str(step), str(tmp_path / "run/adapter"), **options)
    record(ours)
    evaluated(tmp_path / "run/evaluation", DIGEST)
    return tmp_path / "run"


def record(ours: Recipe) -> None:
    made = RunRecord(ours.hash(), ours.identity(), "sqlite:///secret.db", "run-1", "0" * 16)
    run_folder.write_record(ours.run_dir, made)


def evaluated(folder: Path, digest: str) -> None:
    """Figures of two prompts with two pictures each, and a sheet."""
    names = ["teacher, 8 Euler steps", "teacher, 2 Euler steps", "student, 2 NFE"]
    methods = [
        {
            "name": name, "nfe": 2, "seconds": 1.0, "retrieval": None, "files": ["a.png", "b.png"],
            "error": [0.0, 0.0] if not row else [0.01 * row, 0.02 * row], "diversity": [0.5, 0.6],
        }
        for row, name in enumerate(names)
    ]  # fmt: skip
    figures = {
        "recipe": "tiny", "recipe_hash": "0" * 16, "student": "step 0", "checkpoint": digest,
        "reference": {}, "seeds": 2, "prompts": ["a", "b"], "noise": ["1" * 16, "2" * 16],
        "methods": methods,
    }  # fmt: skip
    (folder / "figures").mkdir(parents=True)
    (folder / "figures/step_00000000.json").write_text(json.dumps(figures))
    (folder / "grid.jpg").write_bytes(b"a sheet")


def test_a_student_on_the_hub(
    run: Path, writable: Hub, flux_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One commit of its own files, a card and the sheet; what comes back is the student."""
    (run / "adapter/notes.txt").write_text("my own")
    adapter, destination = str(run / "adapter"), "hf://lab/tiny-student"
    pushed = push.main(adapter, destination, licence="apache-2.0")
    printed = capsys.readouterr().out
    files = ["README.md", "config.json", WEIGHTS_FILE, "grid.jpg"]
    assert writable.commits == [sorted(files)] and writable.private == {"lab/tiny-student": True}
    assert "left out: 1 other files (notes.txt)" in printed and "/commit/" in printed
    there = writable.folders["models/lab/tiny-student"]
    assert (there / WEIGHTS_FILE).read_bytes() == (run / "adapter" / WEIGHTS_FILE).read_bytes()
    _, settings = read_adapter("lab/tiny-student", str(flux_folder), allowed=PACKAGES)
    assert settings.few_step.nfe == 2
    head = yaml.safe_load(pushed.card.split("---")[1])
    assert head["license"] == "apache-2.0" and head["library_name"] == "piflow"
    assert head["pipeline_tag"] == "text-to-image" and "adapter" in head["tags"]
    for text in (
        "**2 network evaluations**", "Policy GMFlow",
        "![pictures of teacher and student](grid.jpg)",
        'piflow sample lab/tiny-student --prompt "a red heart"',
        'PiFluxPipeline.from_pretrained("BASE", adapter="hf://lab/tiny-student")',
        'pipe.load_piflow_adapter("lab/tiny-student", target_module_name="transformer")',
        "shift=2,", "final_step_size_scale=0.5", "| psnr_gain_db | ", " to ",
        "Measured on 2 prompts with 2 pictures each", "path: flux", "rank: 4", f"`{DIGEST}`",
    ):  # fmt: skip
        assert text in pushed.card, text
    everything = b"".join(file.read_bytes() for file in there.rglob("*") if file.is_file())
    assert str(run.parent).encode() not in everything and b"secret.db" not in everything


def test_again_and_elsewhere(run: Path, writable: Hub) -> None:
    """An earlier push is replaced; other people's content isn't; a folder of a repository is."""
    adapter = str(run / "adapter")
    push.main(adapter, "hf://lab/one")
    push.main(adapter, "hf://lab/one")
    push.main(adapter, "hf://lab/many/first")
    push.main(adapter, "hf://lab/many/second", private=False)
    assert len(writable.commits) == 3 + 1 and writable.private["lab/many"] is True
    assert "first/README.md" in writable.commits[2]
    with pytest.raises(ValueError, match=r"hf://lab/flux holds other content \(transformer/|vae/"):
        push.main(adapter, "hf://lab/flux")
    (writable.folders["models/lab/one"] / "thesis.pdf").write_bytes(b"chapter 1")
    with pytest.raises(ValueError, match=r"holds other content \(thesis.pdf\)"):
        push.main(adapter, "hf://lab/one")


def test_a_dry_run_writes_nothing(
    run: Path, writable: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed = push.main(str(run / "adapter"), "hf://lab/new", dry_run=True)
    assert not writable.commits and "models/lab/new" not in writable.folders
    printed = capsys.readouterr().out
    assert "4 files would go to hf://lab/new" in printed and pushed.card in printed


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "no token of the hub: set HF_TOKEN"),
        ("hf_made_up", "the hub doesn't know the token"),
        (READING_TOKEN, "has no right to write there"),
    ],
)
def test_rights(
    token: str | None, message: str, run: Path, writable: Hub, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PermissionError, match=message):
        push.main(str(run / "adapter"), "hf://lab/new")
    assert not writable.commits


def test_what_never_goes(run: Path, writable: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a run's folder"):
        push.main(str(run), "hf://lab/new")
    with pytest.raises(ValueError, match="expected hf://owner/name, s3://"):
        push.main(str(run / "adapter"), str(tmp_path / "somewhere"))
    with pytest.raises(ValueError, match="data sets and revisions aren't written"):
        push.main(str(run / "adapter"), "hf://lab/new@main")
    place = run / "adapter" / WEIGHTS_FILE
    tensors = load_file(place)
    with safe_open(place, "pt") as opened:
        metadata = opened.metadata()
    for note, message in (
        ("see /home/somebody/runs/x", r"a path of a machine \(/home/somebody\)"),
        ("hf_" + "a" * 34, r"what looks like a secret \(hf_aaa…\)"),
        ("postgresql://me:pass@host/db", "what looks like a secret"),
    ):
        save_file(tensors, place, {**metadata, "comment": note})
        with pytest.raises(ValueError, match=f"the weights' metadata holds {message}"):
            push.main(str(run / "adapter"), "hf://lab/new")
    del metadata["piflow_settings"]
    save_file(tensors, place, metadata)
    with pytest.raises(ValueError, match="wasn't exported by piflow"):
        push.main(str(run / "adapter"), "hf://lab/new")
    assert not writable.commits


def test_figures_of_another_checkpoint_stay(run: Path, writable: Hub) -> None:
    figures = run / "evaluation/figures/step_00000000.json"
    figures.write_text(figures.read_text().replace(DIGEST, "cd" * 32))
    pushed = push.main(str(run / "adapter"), "hf://lab/new", dry_run=True)
    assert "This checkpoint wasn't evaluated" in pushed.card and "grid.jpg" not in pushed.files


def test_a_whole_student_on_the_hub(
    run: Path, writable: Hub, flux_folder: Path, flux_inputs: Any, tmp_path: Path
) -> None:
    """Shards, their index and the report; it is sampled from the hub with no base."""
    ours = recipe(tmp_path / "models/flux", run_dir=str(run))
    folder = run / "merged"
    export_whole(
        ours, str(tmp_path / "step"), str(folder), kind="merged", max_shard_bytes=20_000, **KINDS
    )
    quality = {"error": 0.00125, "velocities": 8, "height": 16, "width": 16}
    (folder / "export.json").write_text(json.dumps({"quality": quality}))
    (folder / "transformer/train.py").write_text("import os")
    pushed = push.main(str(folder), "hf://lab/whole")
    assert "export.json" in pushed.files and "transformer/train.py" in pushed.left_out
    assert "against the bfloat16 adapter: 1.25e-03" in pushed.card
    assert 'PiFluxPipeline.from_pretrained("hf://lab/whole")' in pushed.card
    assert "load_piflow_adapter" not in pushed.card
    found, _ = load_student("hf://lab/whole", allowed=PACKAGES)
    local, _ = load_student(str(folder), allowed=PACKAGES)
    x, sigma, cond = flux_inputs
    velocities = [trio.student(x, sigma, cond).velocity(x, sigma) for trio in (found, local)]
    assert (velocities[0] == velocities[1]).all()


def test_a_recipes_places_are_names() -> None:
    tree = {"model": {"path": "/home/me/FLUX.1-dev/transformer", "vae": "hf://a/b/vae"},
            "list": ["s3://my-bucket/base", 3, "plain"]}  # fmt: skip
    assert without_places(tree) == {
        "model": {"path": "FLUX.1-dev/transformer", "vae": "hf://a/b/vae"},
        "list": ["base", 3, "plain"],
    }
    refuse_secrets({"a": "https://example.org/home/page s3://bucket/data/x hf://a/b"})


def test_an_object_store(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same files below a prefix; the store itself is tested elsewhere."""
    from piflow import storage

    real = {name: getattr(storage, name) for name in ("write_bytes", "copy_file", "list_files")}

    def local(uri: str) -> str:
        return uri.replace("s3://bucket", str(tmp_path / "bucket"))

    monkeypatch.setattr(storage, "write_bytes", lambda u, c: real["write_bytes"](local(u), c))
    monkeypatch.setattr(storage, "copy_file", lambda a, b: real["copy_file"](a, local(b)))
    monkeypatch.setattr(storage, "list_files", lambda u, **k: real["list_files"](local(u), **k))
    push.main(str(run / "adapter"), "s3://bucket/students/tiny")
    found = tmp_path / "bucket/students/tiny"
    assert sorted(file.name for file in found.iterdir()) == sorted(
        ["README.md", "config.json", WEIGHTS_FILE, "grid.jpg"]
    )


@pytest.mark.parametrize("part", ["..", "../other", "/etc"])
def test_a_part_that_leads_out_of_the_folder_is_not_sent(part: str, tmp_path: Path) -> None:
    """A whole student's index is anybody's; files beside its folder would be uploaded."""
    folder = tmp_path / "student"
    folder.mkdir()
    (tmp_path / "config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({part: ["diffusers", "AutoencoderKL"]}))
    student: Any = SimpleNamespace(body=object())
    settings: Any = None
    with pytest.raises(ValueError, match="model_index.json names the file"):
        push._own_files(folder, student, settings)

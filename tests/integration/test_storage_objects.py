"""Files, embedding stores and students in real object stores: S3, Google's and Azure's."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyarrow import fs

from piflow import storage
from piflow.backbones import Conditioning
from piflow.backbones.text import EncodedPrompt
from piflow.commands import push
from piflow.commands.evaluate import _lineage, _write_report
from piflow.config import EmbedConfig, ModelConfig, load_recipe
from piflow.data.layout import empty_prompt_plan, plan_store
from piflow.data.manifest import (
    SCHEMA_VERSION,
    SkippedPicture,
    StoreInputs,
    StoreManifest,
    write_manifest,
)
from piflow.data.pictures import LatentEncoder
from piflow.data.prompts import Prompt, read_prompts
from piflow.data.reader import EmbeddingStore
from piflow.data.writer import write_shard
from piflow.inference.settings import load_student
from piflow.storage import files
from piflow.storage.fingerprint import EncoderIdentity
from piflow.training.export_whole import export_whole
from tests.unit.commands.test_evaluate import evaluation
from tests.unit.inference.test_settings import recipe
from tests.unit.training.test_export_whole import KINDS, checkpoint_of, wide_flux

RECIPE = Path(__file__).parents[2] / "pipelines/recipes/emoji-flux.yaml"
pytestmark = pytest.mark.timeout(120)


def test_files_survive_a_round_trip(any_store: str, tmp_path: Path) -> None:
    folder = storage.join(any_store, "files")
    assert storage.list_files(folder) == []
    with pytest.raises(FileNotFoundError, match="files/a"):
        storage.read_bytes(storage.join(folder, "a"))
    storage.write_bytes(storage.join(folder, "a"), b"1")
    storage.write_bytes(storage.join(folder, "sub", "b"), b"22" * 10**6)
    assert storage.file_sizes(folder) == {"a": 1, "sub/b": 2 * 10**6}
    assert storage.read_bytes(storage.join(folder, "sub", "b")) == b"22" * 10**6
    local = storage.local_folder(folder, tmp_path)
    assert (local / "a").read_bytes() == b"1"
    assert storage.local_folder(folder, tmp_path) == local
    storage.delete_file(storage.join(folder, "a"))
    assert storage.list_files(folder) == ["sub/b"]
    storage.delete_folder(folder)
    assert not storage.exists(storage.join(folder, "sub", "b"))
    with pytest.raises(FileNotFoundError, match="no such folder, or it is empty"):
        storage.local_folder(folder, tmp_path)


def test_large_files_are_copied_whole_or_not_at_all(
    any_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 80_000  # several pieces
    (tmp_path / "a").write_bytes(content)
    target = storage.join(any_store, "copies/a")
    storage.copy_file(str(tmp_path / "a"), target)
    storage.copy_file(target, str(tmp_path / "b"))
    assert storage.read_bytes(target) == (tmp_path / "b").read_bytes() == content
    with pytest.raises(FileNotFoundError):
        storage.copy_file(storage.join(any_store, "copies/none"), str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    real = files.filesystem

    class Breaks(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 0:
                raise OSError("the source went away")
            return super().read(size)

    class Source:
        def open_input_stream(self, path: str, compression: None) -> Breaks:
            return Breaks(content)

    def filesystem(uri: str) -> Any:
        return (Source(), uri) if uri == "broken" else real(uri)

    monkeypatch.setattr(files, "filesystem", filesystem)
    with pytest.raises(OSError, match="the source went away"):
        storage.copy_file("broken", storage.join(any_store, "copies/part"))
    assert storage.list_files(storage.join(any_store, "copies")) == ["a"]


def test_a_whole_student_lies_on_s3(bucket: str, tmp_path: Path) -> None:
    """Exported there, sampled from there, pushed to another prefix, refused among other files."""
    ours = recipe(wide_flux(tmp_path / "base"))
    step = str(checkpoint_of(ours, tmp_path / "step"))
    whole, other = storage.join(bucket, "whole"), storage.join(bucket, "students/tiny")
    for place in (str(tmp_path / "local"), whole):
        export_whole(ours, step, place, kind="merged", max_shard_bytes=20_000, **KINDS)
    push.main(whole, other)
    assert storage.list_files(other) == sorted([*storage.list_files(whole), "README.md"])
    x, sigma = torch.randn(2, 12, 4, 8), torch.tensor([1.0, 0.5])
    cond = Conditioning(torch.randn(2, 4, 6), torch.full((2,), 4), torch.randn(2, 5))
    found = []
    for place in (str(tmp_path / "local"), whole, other):
        student, _ = load_student(place, allowed=["package://"])
        found.append(student.student(x, sigma, cond).velocity(x, sigma))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    push.main(whole, other)
    storage.write_bytes(storage.join(other, "thesis.pdf"), b"chapter 1")
    with pytest.raises(ValueError, match=r"holds other content \(thesis.pdf\)"):
        push.main(whole, other)


def test_an_evaluations_report_lies_on_s3_as_well(bucket: str) -> None:
    folder = storage.join(bucket, "run/evaluation")
    ours = load_recipe(RECIPE, [f"run_dir={storage.join(bucket, 'run')}"])
    files = _write_report(ours, evaluation(32), folder, _lineage(ours, "run", "store", "step 7"))
    assert storage.list_files(folder) == files[-2:] == ["grid.jpg", "report.html"]
    assert b"prompt 0" in storage.read_bytes(storage.join(folder, "report.html"))


def test_prompts_and_stores_lie_in_object_stores(any_store: str) -> None:
    file = storage.join(any_store, "prompts.txt")
    storage.write_bytes(file, b"red heart\ncat\nmoon\n")
    prompts = read_prompts(file, height=8, width=8)
    inputs = StoreInputs(
        schema_version=SCHEMA_VERSION,
        encoder=EncoderIdentity(name="t", weights_sha256="0", max_tokens=4, hidden_size=2),
        dtype="bf16",
        rows_per_shard=2,
        rows_per_group=1,
        num_prompts=3,
        prompts_sha256=prompts.digest,
    )
    uri = storage.join(any_store, "store")
    buckets, plans = plan_store(prompts.prompts, 2, 1)

    def embedding(prompt: Prompt) -> EncodedPrompt:
        return EncodedPrompt(torch.full((1, 2), float(len(prompt.text))), torch.zeros(2), False)

    *shards, empty = [
        write_shard(uri, plan, [embedding(prompt) for prompt in plan.prompts], inputs)[0]
        for plan in [*plans, empty_prompt_plan()]
    ]
    write_manifest(
        uri,
        StoreManifest(
            inputs=inputs,
            inputs_sha256=inputs.digest,
            buckets=buckets,
            shards=tuple(shards),
            empty_prompt=empty,
            truncated_prompts=0,
        ),
    )
    store = EmbeddingStore.open(uri)
    store.verify()
    assert store.read([2, 0]).tokens[:, 0, 0].tolist() == [4.0, 9.0]


def test_a_wrong_secret_is_refused_with_the_uri(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert isinstance(storage.filesystem(bucket)[0], fs.S3FileSystem)
    expected = "s3://piflow/tests/x.*SignatureDoesNotMatch: the secret doesn't belong to"
    with pytest.raises(PermissionError, match=expected):
        storage.write_bytes(storage.join(bucket, "x"), b"1")


def test_pictures_lie_in_object_stores(any_store: str) -> None:
    """Named from the prompts file's folder, or inside a Parquet file there; one isn't there."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(content, "png")
    picture = content.getvalue()
    storage.write_bytes(storage.join(any_store, "pictures", quote("a b#1.png")), picture)
    rows = [{"prompt": "x", "image": f"pictures/{name}"} for name in ("a b#1.png", "none.png")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    named = storage.join(any_store, "pictures.jsonl")
    storage.write_bytes(named, lines.encode())
    table = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["x"], "image": [picture]}), table)
    inside = storage.join(any_store, "pictures.parquet")
    storage.write_bytes(inside, table.getvalue())
    embed = EmbedConfig(
        prompts=named, store="unused", height=8, width=8, image_column="image", bad_pictures="skip",
    )  # fmt: skip
    prompts = [
        prompt
        for uri in (named, inside)
        for prompt in read_prompts(uri, height=8, width=8, image_column="image").prompts
    ]
    one, none, other = LatentEncoder(ModelConfig(path="unused"), embed, "cpu").encode(prompts)
    assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    assert torch.equal(one, other) and float(one.max()) == 1.0
    assert isinstance(none, SkippedPicture) and "no such file" in none.reason

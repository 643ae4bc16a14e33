"""A checkpoint from somebody else runs nothing, reads nothing outside its folder, and ends."""

from __future__ import annotations

import builtins
import hashlib
import importlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from piflow.storage.foreign import ForeignDataError
from piflow.training.checkpoint import (
    DamagedCheckpointError,
    RunState,
    load_state,
    load_tensors,
    state_file,
    verify_checkpoint,
    write_shards,
)
from piflow.training.checkpoint import FileRecord as Record
from piflow.training.checkpoint_layout import checked_layout
from piflow.training.pickled_layout import tree_of_pickle

STATE = RunState(3, 12, "0123456789abcdef", "run-id", {"name": "test"})
TENSORS = {"ema.a": torch.arange(6.0).reshape(2, 3), "ema.b": torch.tensor(7.0)}
LAYOUT, PICKLED, SHARD = "metadata.json", ".metadata", "__0_0.distcp"


def seal(folder: Path, state: RunState = STATE) -> Path:
    """What whoever can write into the folder can do: a state that goes with its files."""
    files = {
        file.name: Record(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in sorted(folder.iterdir())
        if file.name != "state.json"
    }
    (folder / "state.json").write_bytes(state_file(state, files))
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Today's checkpoint."""
    write_shards(tmp_path / "step_00000003", TENSORS)
    return seal(tmp_path / "step_00000003")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """One as version 0.1.0 wrote it, by torch.distributed.checkpoint alone."""
    folder = tmp_path / "old"
    dcp.save(dict(TENSORS), checkpoint_id=str(folder), no_dist=True)
    return seal(folder)


def assert_whole(found: dict[str, Tensor]) -> None:
    assert found.keys() == {"a", "b"}
    assert all(torch.equal(found[key.removeprefix("ema.")], TENSORS[key]) for key in TENSORS)


def test_nothing_that_is_written_is_a_pickle_of_metadata(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [SHARD, LAYOUT, "state.json"]
    tree = json.loads((saved / LAYOUT).read_text())
    assert tree["tensors"]["ema.a"]["shape"] == [2, 3]
    assert_whole(load_tensors(saved, "ema"))


def test_checkpoints_of_version_0_1_0_are_read(old: Path) -> None:
    assert (old / PICKLED).is_file() and not (old / LAYOUT).exists()
    assert_whole(load_tensors(old, "ema"))


# --------------------------------------------------------------------------- pickles as metadata


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def a_call(flag: str) -> bytes:
    return pickle.dumps(Reduced(os.system, f"touch {flag}"))


def an_eval(flag: str) -> bytes:
    return pickle.dumps(Reduced(builtins.eval, f"open({flag!r}, 'w')"))


def chained_getattr(flag: str) -> bytes:
    module = Reduced(importlib.import_module, "os")
    return pickle.dumps(Reduced(builtins.getattr, module, "mkdir")) + flag.encode()


def dotted_name(flag: str) -> bytes:
    """STACK_GLOBAL follows dots: from an allowed module's attribute to any other module."""
    names = "torch.distributed.checkpoint.metadata", "os.system"
    return _calls(*names, f"touch {flag}")


def a_gadget_of_torch(flag: str) -> bytes:
    return _calls("torch.hub", "_load_local", flag)


def load_by_torch(flag: str) -> bytes:
    return _calls("torch.serialization", "load", flag)


def _text(text: str) -> bytes:
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def _calls(module: str, name: str, argument: str) -> bytes:
    called = _text(module) + _text(name) + b"\x93" + _text(argument) + b"\x85R"
    return b"\x80\x04" + called + b"."


def state_of_a_class(flag: str) -> bytes:
    """BUILD with a state of slots would set attributes of the class itself, for the process."""
    names = _text("torch.distributed.checkpoint.metadata") + _text("Metadata")
    return b"\x80\x04" + names + b"\x93" + b"N}" + _text("version") + _text(flag) + b"s\x86b."


def state_by_an_allowed_function(flag: str) -> bytes:
    """BUILD on what a function would return, whose `__setstate__` or `__dict__` would be used."""
    size = _text("torch") + _text("Size") + b"\x93" + b")\x85R"
    return b"\x80\x04" + size + b"}" + _text("__class__") + _text(flag) + b"sb."


def an_instance_by_arguments(flag: str) -> bytes:
    return (
        b"\x80\x04" + _text("pathlib") + _text("PosixPath") + b"\x93" + _text(flag) + b"\x85\x81."
    )


def an_old_instruction(flag: str) -> bytes:
    return b"cos\nsystem\n(" + f"S'touch {flag}'\n".encode() + b"tR."


def instance_instruction(flag: str) -> bytes:
    return b"(" + f"S'touch {flag}'\n".encode() + b"ios\nsystem\n."


def persistent_id(flag: str) -> bytes:
    return b"\x80\x04" + _text(flag) + b"Q."


def extension_registry(flag: str) -> bytes:
    return b"\x80\x04\x82\x01" + _text(flag) + b"\x85R."


def nested_without_end(_: str) -> bytes:
    """A tuple of twice a tuple of twice …: to print, hash or compare it takes for ever."""
    doubled = b"\x94h\x00\x86"
    layers = b"".join(b"\x94" + b"h" + bytes([n]) + b"\x86" for n in range(1, 80))
    key = b"N" + doubled + layers
    return b"\x80\x04}" + key + key + b"s."


def nested_as_a_name(_: str) -> bytes:
    layers = b"".join(b"\x94" + b"h" + bytes([n]) + b"\x86" for n in range(80))
    return b"\x80\x04N" + layers + _text("x") + b"\x93."


def far_memory(_: str) -> bytes:
    """The C unpickler makes room for all places before this one: 32 GB."""
    return b"\x80\x04Nr\xff\xff\xff\x7f."


def no_metadata(_: str) -> bytes:
    return pickle.dumps({"state_dict_metadata": {}})


ATTACKS: list[Callable[[str], bytes]] = [
    a_call, an_eval, chained_getattr, dotted_name, a_gadget_of_torch, load_by_torch,
    state_of_a_class, state_by_an_allowed_function, an_instance_by_arguments, an_old_instruction,
    instance_instruction, persistent_id, extension_registry, nested_without_end, nested_as_a_name,
    far_memory, no_metadata,
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_pickle_never_runs(attack: Callable[[str], bytes], old: Path, tmp_path: Path) -> None:
    flag = tmp_path / "it-ran"
    (old / PICKLED).write_bytes(attack(str(flag)))
    seal(old)
    for read in (verify_checkpoint, lambda folder: load_tensors(folder, "ema")):
        with pytest.raises(DamagedCheckpointError, match="old is damaged .*isn't as torch.distrib"):
            read(old)
    assert not flag.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """What Python's own unpickler does with one of them."""
    flag = tmp_path / "it-ran"
    pickle.loads(a_call(str(flag)))
    assert flag.exists()


def test_a_pickle_beside_todays_layout_is_not_even_read(saved: Path) -> None:
    """Nor the rank's own, which torch.distributed.checkpoint tries when it finds no other."""
    for name in (PICKLED, f"__0{PICKLED}"):
        (saved / name).write_bytes(a_call("nowhere"))
    assert_whole(load_tensors(saved, "ema"))
    (saved / LAYOUT).unlink()
    seal(saved)
    with pytest.raises(DamagedCheckpointError, match="it names posix.system"):
        load_tensors(saved, "ema")


def test_an_entry_of_bytes_is_refused(old: Path) -> None:
    """torch.distributed.checkpoint would load its content as any pickle."""
    folder = old.parent / "bytes"
    dcp.save({**TENSORS, "ema.c": Reduced(os.getpid)}, checkpoint_id=str(folder), no_dist=True)
    with pytest.raises(DamagedCheckpointError, match="metadata.BytesStorageMetadata"):
        load_tensors(seal(folder), "ema")


def _with_shard(folder: Path, content: bytes, name: str = "ema.b") -> Path:
    """The checkpoint, in which a tensor's bytes are others."""
    tree = json.loads((folder / LAYOUT).read_text())
    with (folder / SHARD).open("ab") as stream:
        start = stream.tell()
        stream.write(content)
    chunk = tree["tensors"][name]["chunks"][0]
    chunk["start"], chunk["bytes"] = start, len(content)
    (folder / LAYOUT).write_text(json.dumps(tree))
    return seal(folder)


def test_a_shard_that_is_a_pickle_never_runs(saved: Path, tmp_path: Path) -> None:
    flag = tmp_path / "it-ran"
    packed = io.BytesIO()
    torch.save(Reduced(os.system, f"touch {flag}"), packed)
    for content in (packed.getvalue(), a_call(str(flag))):
        with pytest.raises(DamagedCheckpointError, match="step_00000003 is damaged"):
            load_tensors(_with_shard(saved, content), "ema")
    assert not flag.exists()


def test_a_shard_that_unpacks_to_more_is_refused(saved: Path) -> None:
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(2**20), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name), zipfile.ZIP_DEFLATED)
    assert len(packed.getvalue()) < len(plain.getvalue()) / 100
    with pytest.raises(DamagedCheckpointError, match="would unpack to more bytes than it has"):
        load_tensors(_with_shard(saved, packed.getvalue()), "ema")


# ---------------------------------------------------------------------------- numbers and names


def tree() -> dict[str, Any]:
    """A layout of one tensor in two chunks."""
    chunks = [
        {"offset": [row, 0], "shape": [1, 3], "file": SHARD, "start": 100 * row, "bytes": 100}
        for row in range(2)
    ]
    return {
        "format": 1,
        "tensors": {"ema.a": {"dtype": "float32", "shape": [2, 3], "chunks": chunks}},
    }


SIZES = {SHARD: 200}


def test_a_good_layout_passes() -> None:
    assert len(checked_layout(tree(), SIZES, "metadata.json")["ema.a"].chunks) == 2


def _tensor(**changes: Any) -> dict[str, Any]:
    changed = tree()
    changed["tensors"]["ema.a"] |= changes
    return changed


def _chunk(**changes: Any) -> dict[str, Any]:
    changed = tree()
    changed["tensors"]["ema.a"]["chunks"][1] |= changes
    return changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 2, "tensors": {}}, "has format 2, this piflow reads 1"),
        ({"format": 1, "tensors": []}, "no object of tensors"),
        ({"format": 1, "tensors": {"a\x1b[2J": None}}, r"tensor a\\x1b\[2J, is no object"),
        (_tensor(dtype="object"), "has dtype 'object'; expected one of float64"),
        (_tensor(dtype=["float32"]), "has dtype"),
        (_tensor(shape=[2, -3]), r"has shape \[2, -3\]; expected"),
        (_tensor(shape=[2, True]), "has shape"),
        (_tensor(shape=[2, 3.0]), "has shape"),
        (_tensor(shape=[1] * 9), "has shape"),
        (_tensor(shape=[2, 2**63]), "has shape"),
        (_tensor(shape=[2, 4]), "chunks that don't cover its shape"),
        (_tensor(shape=[10**9, 10**9], chunks=[]), "0 chunks that don't cover"),
        (_tensor(chunks={}), "no list of chunks"),
        (_tensor(chunks=tree()["tensors"]["ema.a"]["chunks"][:1]), "1 chunks that don't cover"),
        (_tensor(more=1), "no object of dtype, shape and chunks"),
        (_chunk(more=1), "has a chunk that is no object of"),
        (_chunk(file="../../secret"), "which is none of the checkpoint's files"),
        (_chunk(file="/etc/passwd"), "which is none of the checkpoint's files"),
        (_chunk(file=[SHARD]), "which is none of the checkpoint's files"),
        (_chunk(offset=[0, 0]), "chunks that don't cover its shape"),
        (_chunk(offset=[1, 1]), "outside its shape"),
        (_chunk(offset=[1]), "outside its shape"),
        (_chunk(offset=[-1, 0]), "has chunk's offset"),
        (_chunk(shape=[1, 2]), "chunks that don't cover its shape"),
        (_chunk(shape=[1, 2**62]), "outside its shape"),
        (_chunk(start=-1), "has chunk's place"),
        (_chunk(start=101), "bytes 101 to 201 of __0_0.distcp, which has 200"),
        (_chunk(start=50), "ema.a and ema.a at the same bytes"),
        (_chunk(bytes=8), "a chunk of 12 bytes in bytes 100 to 108"),
        (_chunk(bytes=2**62), "which has 200"),
    ],
)  # fmt: skip
def test_every_number_is_checked_against_the_others(changed: Any, message: str) -> None:
    with pytest.raises(ForeignDataError, match=message):
        checked_layout(changed, SIZES, "metadata.json")


def test_the_numbers_of_an_old_checkpoint_are_checked_as_well(old: Path) -> None:
    content = (old / PICKLED).read_bytes()
    assert content.count(SHARD.encode()) == 1
    hostile = content.replace(SHARD.encode(), b"../../secret")
    assert tree_of_pickle(content, "x")["tensors"]["ema.a"]["chunks"][0]["file"] == SHARD
    (old / PICKLED).write_bytes(hostile)
    with pytest.raises(DamagedCheckpointError, match="which is none of the checkpoint's files"):
        load_tensors(seal(old), "ema")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b", ""])
def test_a_state_names_files_in_its_folder_only(name: str, saved: Path) -> None:
    (saved / "state.json").write_bytes(state_file(STATE, {name: Record(1, "0" * 64)}))
    with pytest.raises(DamagedCheckpointError, match="expected a relative path below the folder"):
        verify_checkpoint(saved)


@pytest.mark.parametrize(
    "changed",
    [{"step": "3"}, {"step": -1}, {"step": True}, {"samples": 1.5}, {"recipe_hash": None},
     {"mlflow_run_id": 7}, {"recipe": []}, {"identity": "x"}, {"loss": "low"}],
)  # fmt: skip
def test_a_states_values_have_their_types(changed: dict[str, Any], saved: Path) -> None:
    values = {**vars(STATE), **changed}
    seal(saved, RunState(**values))
    with pytest.raises(DamagedCheckpointError, match="a value has another type"):
        load_state(saved)

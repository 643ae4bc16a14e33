"""The layout of version 0.1.0's checkpoints, taken from a pickle that is never loaded.

`pickletools` says which instructions a pickle holds. Those that torch.distributed.checkpoint's
metadata is made of are followed here, and build nothing but texts, numbers, lists and records that
remember a class's name: no class is looked up, nothing is called. Any other instruction or name is
refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from piflow.storage.foreign import ForeignDataError, shown

_METADATA = "torch.distributed.checkpoint.metadata."
_CLASSES = {
    _METADATA + "Metadata",
    _METADATA + "TensorStorageMetadata",
    _METADATA + "TensorProperties",
    _METADATA + "ChunkStorageMetadata",
    _METADATA + "MetadataIndex",
    _METADATA + "StorageMeta",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
}
_CALLED = {  # which a pickle of them calls with plain values
    "torch.Size",
    "torch.serialization._get_layout",
    _METADATA + "_MEM_FORMAT_ENCODING",
    "pathlib.PosixPath",
}
DTYPE_NAMES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32",
    "int16", "int8", "uint8", "bool",
)  # fmt: skip
_ALLOWED = _CLASSES | _CALLED | {f"torch.{name}" for name in DTYPE_NAMES}
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class _Name:
    """The name of a class, a function or a dtype."""

    text: str


@dataclass
class _Pairs:
    """A dict, whose keys are not hashed."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass
class _Record:
    """What would be an instance."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


class _Mark:
    """Where a tuple, or the items of a list or dict, begin on the stack."""


def tree_of_pickle(content: bytes, where: str) -> dict[str, Any]:
    """The tree that `metadata.json` would hold, its numbers unchecked.

    Args:
        content: of torch.distributed.checkpoint's `.metadata`.
        where: the file, for messages.

    Raises:
        ForeignDataError: it holds anything else than torch.distributed.checkpoint writes of
            tensors.
    """
    try:
        metadata = _fields(_followed(content), _METADATA + "Metadata")
        chunks_at = {
            _key(index): _fields(place, "torch.distributed.checkpoint.filesystem._StorageInfo")
            for index, place in _items(metadata["storage_data"])
        }
        stored = [
            (name, _fields(entry, _METADATA + "TensorStorageMetadata"))
            for name, entry in _items(metadata["state_dict_metadata"])
        ]
        if sum(len(fields["chunks"]) for _, fields in stored) != len(chunks_at):
            raise ValueError("tensors have other chunks than are stored")
        tensors = {name: _tensor(name, fields, chunks_at) for name, fields in stored}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        text = shown(error) if isinstance(error, ValueError) else type(error).__name__
        raise ForeignDataError(
            f"{where} isn't as torch.distributed.checkpoint writes the metadata of tensors ({text})"
        ) from None
    return {"format": 1, "tensors": tensors}


def _tensor(
    name: Any, stored: dict[str, Any], chunks_at: dict[Any, dict[str, Any]]
) -> dict[str, Any]:
    if not isinstance(name, str):
        raise ValueError("a tensor's name is no text")
    dtype = _state(stored["properties"], _METADATA + "TensorProperties")[0]
    chunks = []
    for chunk in stored["chunks"]:
        fields = _fields(chunk, _METADATA + "ChunkStorageMetadata")
        offset = _size(fields["offsets"])
        place = chunks_at[name, tuple(offset)]
        types = {key: type(value) for key, value in place.items()}
        if types != {"relative_path": str, "offset": int, "length": int}:
            raise ValueError("a chunk is stored in another way than plain")
        chunks.append(
            {
                "offset": offset,
                "shape": _size(fields["sizes"]),
                "file": place["relative_path"],
                "start": place["offset"],
                "bytes": place["length"],
            }
        )
    if not isinstance(dtype, _Name):
        raise ValueError("a tensor's dtype is no name")
    shape = _size(stored["size"])
    return {"dtype": dtype.text.removeprefix("torch."), "shape": shape, "chunks": chunks}


def _key(index: Any) -> tuple[str, tuple[int, ...]]:
    fields = _fields(index, _METADATA + "MetadataIndex")
    if not isinstance(fields["fqn"], str):
        raise ValueError("an index is no text")
    return fields["fqn"], tuple(_size(fields["offset"]))


def _size(value: Any) -> list[int]:
    """The numbers of a `torch.Size`."""
    if not isinstance(value, _Record) or value.name != "torch.Size":
        raise ValueError("a size is no torch.Size")
    (numbers,) = value.arguments
    if not isinstance(numbers, tuple) or len(numbers) > _MAX_DIMENSIONS:
        raise ValueError(f"a size is no tuple of up to {_MAX_DIMENSIONS} integers")
    if any(type(number) is not int for number in numbers):
        raise ValueError("a size holds other values than integers")
    return list(numbers)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, _Pairs):
        raise ValueError("expected a dict")
    return value.items


def _state(value: Any, name: str) -> Any:
    if not isinstance(value, _Record) or value.name != name:
        raise ValueError(f"expected a {name}")
    return value.state


def _fields(value: Any, name: str) -> dict[str, Any]:
    """A record's attributes, by name."""
    pairs = _items(_state(value, name))
    if any(not isinstance(key, str) for key, _ in pairs):
        raise ValueError("an attribute's name is no text")
    return dict(pairs)


# ----------------------------------------------------------------------------------- instructions


def _followed(content: bytes) -> Any:
    """What the pickle's instructions leave, of inert values."""
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "STOP":
            (result,) = machine.stack
            return result
        follow = _INSTRUCTIONS.get(opcode.name)
        if follow is None:
            raise ValueError(f"it holds the instruction {opcode.name}")
        follow(machine, argument)
    raise ValueError("it has no end")


class _Machine:
    """The stack and the memory that a pickle's instructions work on."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def nothing(self, _: Any) -> None:
        """Of PROTO and FRAME, which build nothing."""

    def mark(self, _: Any) -> None:
        self.stack.append(_Mark())

    def get(self, index: int) -> None:
        self.push(self.memory[index])

    def put(self, index: int) -> None:
        self.memory[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memory[len(self.memory)] = self.stack[-1]

    def to_mark(self) -> list[Any]:
        """Takes what was pushed since the newest mark."""
        taken = []
        while not isinstance(value := self.stack.pop(), _Mark):
            taken.append(value)
        return taken[::-1]

    def take(self, count: int) -> tuple[Any, ...]:
        taken = tuple(self.stack.pop() for _ in range(count))
        if any(isinstance(value, _Mark) for value in taken):
            raise ValueError("a mark is where a value should be")
        return taken[::-1]

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("items are appended to no list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, _Pairs) or len(values) % 2:
            raise ValueError("items are set in no dict")
        target.items.extend(zip(values[::2], values[1::2], strict=True))

    def name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a name is no text")
        text = f"{module}.{name}"
        if text not in _ALLOWED:
            raise ValueError(f"it names {shown(text)}")
        self.push(_Name(text))

    def record(self, allowed: set[str]) -> None:
        """In place of an instance, or of what a function would return."""
        callee, arguments = self.take(2)
        if not isinstance(callee, _Name) or callee.text not in allowed:
            raise ValueError("it calls what isn't called in metadata")
        if not isinstance(arguments, tuple):
            raise ValueError("it calls with no tuple of arguments")
        self.push(_Record(callee.text, arguments))

    def build(self, _: Any) -> None:
        (state,) = self.take(1)
        target = self.stack[-1]
        if not isinstance(target, _Record) or target.name not in _CLASSES:
            raise ValueError("it sets the state of what has none")
        if target.state is not None:
            raise ValueError("it sets a state twice")
        target.state = state


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.nothing,
    "FRAME": _Machine.nothing,
    "MARK": _Machine.mark,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "BININT": _Machine.push,
    "BININT1": _Machine.push,
    "BININT2": _Machine.push,
    "LONG1": _Machine.push,
    "SHORT_BINUNICODE": _Machine.push,
    "BINUNICODE": _Machine.push,
    "MEMOIZE": _Machine.memoize,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.take(3)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.to_mark())),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "APPEND": lambda machine, _: machine.append(list(machine.take(1))),
    "APPENDS": lambda machine, _: machine.append(machine.to_mark()),
    "EMPTY_DICT": lambda machine, _: machine.push(_Pairs()),
    "SETITEM": lambda machine, _: machine.set_items(list(machine.take(2))),
    "SETITEMS": lambda machine, _: machine.set_items(machine.to_mark()),
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.take(2)),
    "NEWOBJ": lambda machine, _: machine.record(_CLASSES),
    "REDUCE": lambda machine, _: machine.record(_CALLED),
    "BUILD": _Machine.build,
}

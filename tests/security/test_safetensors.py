"""Headers of safetensors files that lie about their files."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from piflow.storage.tensor_file import MAX_HEADER_BYTES, read_header


def write(path: Path, header: Any, values: bytes = b"") -> str:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + values)
    return str(path)


def entry(start: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "b starts at byte .*, a ends at byte"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, "starts at byte"),
        ({"a": entry(4, 12)}, "a starts at byte .*, the header ends at byte"),
        ({"a": entry(-8, 0)}, "its header says"),
        ({"a": entry(8, 0, [-2])}, "its header says"),
        ({"a": entry(0, 8)}, "its tensors end at byte"),
        ({"a": entry(0, 2**62, [2**60])}, "cut short or damaged"),
        ({"a": entry(0, 12, [2**64])}, "damaged at a: bytes 0 to 12 don't hold F32 of shape"),
        ({"a": entry(0, 12, [2])}, "damaged at a"),
        ({"a": entry(0, 12, [3], "F64")}, "damaged at a"),
        ({"a": entry(0, 12, [1] * 1000 + [3])}, "damaged at a"),
        ({"a": entry(0, 12, [3], "Q4")}, "a is Q4, expected one of F64, F32"),
        ({"a": entry(0, 12.0, [3])}, "its header says"),
        ({"a": entry(True, 12, [3])}, "its header says"),
        ({"a": entry(0, 12, "3")}, "its header says"),
        ({"a": [0, 12]}, "its header says"),
        ({"a": None}, "its header says"),
        ([], "holds JSON of type list"),
        (None, "holds JSON of type NoneType"),
        (b"", "isn't JSON"),
        (b"[" * 10000, "deeper than 64 levels|isn't JSON"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        ({"__metadata__": {"x": 3}, "a": entry(0, 12, [3])}, "__metadata__ holds more than texts"),
        ({"__metadata__": [], "a": entry(0, 12, [3])}, "__metadata__ holds more than texts"),
    ],
)
def test_headers_that_are_refused(header: Any, message: str, tmp_path: Path) -> None:
    uri = write(tmp_path / "x.safetensors", header, bytes(12))
    with pytest.raises(ValueError, match=message) as refused:
        read_header(uri)
    assert uri in str(refused.value)


def test_a_sparse_file_with_a_header_of_4_gb_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**32).to_bytes(8, "little"))
    os.truncate(path, 2**32 + 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"header of 4294967296 bytes; at most {MAX_HEADER_BYTES}"):
        read_header(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    uri = write(tmp_path / "x.safetensors", {"\x1b[2J": entry(0, 8, [2], "\x1b[31m")}, bytes(8))
    with pytest.raises(ValueError, match=r"\\x1b\[2J is \\x1b\[31m") as refused:
        read_header(uri)
    assert "\x1b" not in str(refused.value)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    content = save(tensors, metadata={"base": "x"})
    (tmp_path / "x.safetensors").write_bytes(content)
    header = read_header(str(tmp_path / "x.safetensors"))
    assert header.metadata == {"base": "x"}
    for name, tensor in tensors.items():
        found = header.tensors[name]
        assert found.shape == tuple(tensor.shape)
        assert found.end - found.start == tensor.numel() * tensor.element_size()
        raw = content[found.start : found.end]
        if raw:
            assert torch.equal(
                torch.frombuffer(bytearray(raw), dtype=tensor.dtype).view(tensor.shape), tensor
            )

"""The headers of a Parquet column's pages: what unpacking them takes, before anything is unpacked.

A file's footer says how large a column is, but whoever decodes it believes the header in front of
each page: a footer of harmless numbers may stand behind a page of a few kilobytes that unpacks to
2 GiB, or a dictionary that claims two thousand million entries. The headers are read here as the
Parquet format lays them out (`parquet.thrift`, in Thrift's compact protocol), more strictly than
by a decoder: what could be understood in two ways is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from piflow.storage.foreign import ForeignDataError

MAX_PAGES = 2**18
"""Of a column in a row group; writers make pages of about 1 MiB or 20,000 rows."""

_MAX_HEADER_BYTES = 2**24  # a header may hold the page's smallest and largest value

_TYPE, _UNPACKED, _PACKED = 1, 2, 3  # fields of every header
_DATA, _INDEX, _DICTIONARY, _DATA_V2 = range(4)  # types of pages
_DETAILS = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}  # the field that holds more of such a page
_NUM_VALUES = 1  # fields in there
_ENCODING = {_DATA: 2, _DICTIONARY: 2, _DATA_V2: 4}
_ENCODINGS = {
    0: "PLAIN",
    2: "PLAIN_DICTIONARY",
    3: "RLE",
    4: "BIT_PACKED",
    5: "DELTA_BINARY_PACKED",
    6: "DELTA_LENGTH_BYTE_ARRAY",
    7: "DELTA_BYTE_ARRAY",
    8: "RLE_DICTIONARY",
    9: "BYTE_STREAM_SPLIT",
}


@dataclass
class Pages:
    """What the headers of a column's pages in one row group add up to.

    ``largest`` and ``total`` are bytes once the pages are unpacked, the latter with all headers.
    ``values`` are the numbers of values in the data pages, ``encodings`` those pages' encodings.
    """

    count: int = 0
    largest: int = 0
    total: int = 0
    values: list[int] = field(default_factory=list)
    dictionary_values: int = 0
    encodings: set[str] = field(default_factory=set)

    @property
    def num_values(self) -> int:
        return sum(self.values)

    def rows_within(self, size: int) -> int:
        """How many rows of a column without lists decode into no more than `size` bytes.

        A value of a dictionary, or one that shares its beginning with the one before, may be as
        large as a whole page, any number of times. Others lie in their pages as they are, so that
        rows take no more than all pages which they touch: if the fewest that one holds are ``m``,
        ``r`` rows touch at most ``r / m + 2``. One row, or those of two pages, may take more.
        """
        pages = size // max(1, self.largest)
        if self.dictionary_values or "DELTA_BYTE_ARRAY" in self.encodings:
            return max(1, pages)
        fewest = min(self.values[:-1] or self.values or [1])
        return max(1, fewest * max(1, pages - 2))


def read_pages(chunk: memoryview, num_values: int) -> Pages:
    """Go through the page headers of a column chunk as a decoder does: up to the last value.

    Args:
        chunk: the bytes of a column in a row group, as they lie in the file.
        num_values: how many values it has, as the footer says.

    Raises:
        ForeignDataError: a header isn't one, or its page doesn't lie within the chunk.
    """
    found, place, left = Pages(), 0, num_values
    while left > 0:
        where = f"the header of page {found.count + 1}"
        if found.count == MAX_PAGES:
            raise ForeignDataError(f"it has more than {MAX_PAGES} pages; write it with larger ones")
        reader = _CompactReader(chunk[place : place + _MAX_HEADER_BYTES], where)
        header = reader.struct()
        unpacked = _number(header, _UNPACKED, where)
        found.count += 1
        found.largest = max(found.largest, unpacked)
        found.total += reader.place + unpacked
        left -= _add_values(found, header, where)
        place += reader.place + _number(header, _PACKED, where)
        if place > len(chunk):
            raise ForeignDataError(f"{where} says that the page goes on after the column's end")
    return found


def _add_values(found: Pages, header: dict[int, Any], where: str) -> int:
    """Count a page's values; returns how many of the column's own it has."""
    kind = _number(header, _TYPE, where)
    if kind == _INDEX:  # decoders pass over it
        return 0
    details = header.get(_DETAILS.get(kind, -1))
    if not isinstance(details, dict):
        raise ForeignDataError(f"{where} isn't that of a data page or a dictionary")
    values = _number(details, _NUM_VALUES, where)
    encoding = _number(details, _ENCODING[kind], where)
    if kind == _DICTIONARY:
        found.dictionary_values += values
        return 0
    found.values.append(values)
    found.encodings.add(_ENCODINGS.get(encoding, str(encoding)))
    return values


def _number(fields: dict[int, Any], number: int, where: str) -> int:
    value = fields.get(number)
    if type(value) is not int or not 0 <= value < 2**31:
        raise ForeignDataError(f"{where} has no usable value in field {number}")
    return value


class _CompactReader:
    """Reads one struct of Thrift's compact protocol.

    Page headers hold numbers, truth values, bytes and structs of these; another kind of field, a
    second value of a field, or a number with more bits than its kind has is refused.
    """

    _DEPTH = 4

    def __init__(self, content: memoryview, where: str) -> None:
        self._content, self._where = content, where
        self.place = 0  # in bytes, behind what was read

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The struct's fields by number; bytes, which nobody needs, are None."""
        fields: dict[int, Any] = {}
        number = 0
        while start := self._byte():
            step, kind = start >> 4, start & 15
            number = number + step if step else self._number(16)
            if number in fields:
                raise self._refusal(f"field {number} twice")
            if kind in (1, 2):
                fields[number] = kind == 1
            elif kind in (5, 6):
                fields[number] = self._number(32 if kind == 5 else 64)
            elif kind == 8:
                length = self._varint(32)
                self.place += length
                fields[number] = None
            elif kind == 12 and depth < self._DEPTH:
                fields[number] = self.struct(depth + 1)
            else:
                raise self._refusal(f"a field of kind {kind}")
        return fields

    def _byte(self) -> int:
        if self.place >= len(self._content):
            raise self._refusal("no end")
        self.place += 1
        return self._content[self.place - 1]

    def _varint(self, bits: int) -> int:
        value = 0
        for shift in range(0, bits, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128 and value < 2**bits:
                return value
        raise self._refusal(f"a number of more than {bits} bits")

    def _number(self, bits: int) -> int:
        value = self._varint(bits)
        return (value >> 1) ^ -(value & 1)

    def _refusal(self, what: str) -> ForeignDataError:
        return ForeignDataError(f"{self._where} has {what}; it isn't one of Parquet")

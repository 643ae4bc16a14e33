"""Pictures of prompts in a folder, and an index that says what each of them is.

    0001-red-heart-1f0c2a9b7d-5.png      number and beginning of the prompt, hash, seed
    index.jsonl                          a line a picture: prompt, seed, settings, sha256

The hash is over the prompt and everything else that decides the picture but the seed, so prompts
that share their beginning, or have none in ASCII, get files of their own, and a picture that is
there needn't be drawn again. No file is ever replaced by another content.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from piflow import storage
from piflow.storage.foreign import ForeignDataError, parse_object, relative_name

INDEX = "index.jsonl"
_SLUG = 40  # characters of a prompt in a file's name
_HASH = 10  # hexadecimal digits
_INDEX_SECONDS = 5.0  # between two writes of the index
_INDEX_BYTES = 2**31  # of an index that is read: a million pictures' with long prompts
_NEEDED = ("file", "key", "seed", "sha256")  # of an index's line

Entry = dict[str, Any]  # a line of the index


@dataclass(frozen=True)
class Request:
    """A picture that is wanted.

    Attributes:
        number: of its prompt, from 1.
        noise: hash of the noise that it starts from, where the seed alone doesn't tell.
        edits: hash of the picture that is edited, where there is one and the settings don't tell.
    """

    number: int
    prompt: str
    seed: int
    noise: str = ""
    edits: str = ""


class Gallery:
    """A folder of pictures that all have the same settings; other ones may lie beside them.

    Args:
        folder: URI.
        settings: everything beside prompt and seed that decides a picture.
        notes: more for the index, that doesn't decide it.
        suffix: of the files' names.

    Raises:
        ValueError: there is an index that isn't one.
    """

    def __init__(
        self,
        folder: str,
        settings: Mapping[str, Any],
        notes: Mapping[str, Any] | None = None,
        *,
        suffix: str = ".png",
    ) -> None:
        self._folder, self._suffix = folder, suffix
        storage.delete_left_over(folder, recursive=False)
        self._settings, self._notes = dict(settings), dict(notes or {})
        self._entries = self._read()
        self._written = time.monotonic()
        self._changed = False

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """Those whose picture isn't there; each that the index names is read and compared."""
        return [request for request in requests if not self._is_there(request)]

    def add(self, request: Request, content: bytes, **notes: float) -> None:
        """Write a picture; the index follows within seconds, or at `close`.

        Args:
            notes: more for the index, of this picture.
        """
        self.enter(self.write(request, content, **notes))

    def write(self, request: Request, content: bytes, **notes: float) -> Entry:
        """Write a picture alone; returns its line of the index, for whoever writes that."""
        key, digest = self._key(request), hashlib.sha256(content).hexdigest()
        name = self._free_name(request, digest)
        storage.write_bytes(storage.join(self._folder, name), content)
        return {
            "file": name,
            "prompt": request.prompt,
            "seed": request.seed,
            **({"edits_sha256": request.edits} if request.edits else {}),
            **self._settings,
            **self._notes,
            **notes,
            "key": key,
            "sha256": digest,
        }

    def enter(self, entry: Entry) -> None:
        """Take a written picture into the index, which follows within seconds, or at `close`."""
        self._entries[entry["key"]] = entry
        self._changed = True
        if time.monotonic() - self._written > _INDEX_SECONDS:
            self.close()

    def has(self, request: Request) -> bool:
        """Whether the index names the picture, whatever became of its file."""
        return self._key(request) in self._entries

    def file(self, request: Request) -> str:
        """URI of a picture that is there."""
        return storage.join(self._folder, self.name(request))

    def name(self, request: Request) -> str:
        """Of its file in the folder."""
        return str(self._entries[self._key(request)]["file"])

    def note(self, request: Request, name: str) -> float:
        """A number that the index says of a picture; 0 if it doesn't."""
        value = self._entries[self._key(request)].get(name)
        return float(value) if isinstance(value, int | float) else 0.0

    def close(self) -> None:
        """Write the index, with what another process has added meanwhile."""
        if self._changed:
            self._entries = self._read() | self._entries
            lines = [json.dumps(entry, ensure_ascii=False) for entry in self._entries.values()]
            text = "".join(f"{line}\n" for line in lines)
            storage.write_bytes(storage.join(self._folder, INDEX), text.encode())
        self._changed = False
        self._written = time.monotonic()

    def _key(self, request: Request) -> str:
        """What the picture is: 64 hexadecimal digits, and the seed."""
        told = [request.prompt, request.noise, self._settings]
        decides = json.dumps([*told, request.edits] if request.edits else told, sort_keys=True)
        return f"{hashlib.sha256(decides.encode()).hexdigest()}-{request.seed}"

    def _free_name(self, request: Request, digest: str) -> str:
        """The picture's name; another one if some other picture has it."""
        start = f"{request.number:04d}-{slug(request.prompt)}-{self._key(request)[:_HASH]}"
        name, count = f"{start}-{request.seed}{self._suffix}", 1
        while self._is_taken(name, digest):
            count += 1
            name = f"{start}-{request.seed}-{count}{self._suffix}"
        return name

    def _is_taken(self, name: str, digest: str) -> bool:
        place = storage.join(self._folder, name)
        return storage.exists(place) and storage.sha256(place) != digest

    def _is_there(self, request: Request) -> bool:
        entry = self._entries.get(self._key(request))
        if entry is None:
            return False
        place = storage.join(self._folder, entry["file"])
        return storage.exists(place) and storage.sha256(place) == entry["sha256"]

    def _read(self) -> dict[str, Entry]:
        """The index's lines by key."""
        place = storage.join(self._folder, INDEX)
        try:
            content = storage.read_bytes(place, max_bytes=_INDEX_BYTES)
        except FileNotFoundError:
            return {}
        entries: dict[str, Entry] = {}
        for number, line in enumerate(content.splitlines(), 1):
            where = f"line {number} of {place}"
            entry = parse_object(line, where=where)
            if not all(isinstance(entry.get(name), str | int) for name in _NEEDED):
                raise ForeignDataError(
                    f"{where} is no picture's entry: expected {', '.join(_NEEDED)}; choose another "
                    "folder (--out), or move the file away to draw the pictures again"
                )
            relative_name(entry["file"], where=where)
            entries[str(entry["key"])] = entry
        return entries


def slug(prompt: str) -> str:
    """The beginning of a prompt in lower-case ASCII letters, digits and hyphens."""
    plain = unicodedata.normalize("NFKD", prompt[: 4 * _SLUG]).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower())[:_SLUG].strip("-") or "prompt"

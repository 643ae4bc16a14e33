"""Aliases of registered versions that move, and the tags that say who moved them, when and why.

    piflow.ALIAS.at, .by           when (UTC) and by whom the version got the alias
    piflow.ALIAS.why               the gates with their figures, what it was compared with
    piflow.ALIAS.forced            "true": though gates didn't hold
    piflow.ALIAS.before            the version that had it then: where a rollback goes
    piflow.ALIAS.rolled_back       when, by whom and to which version the alias went back

A rollback takes `before` away, so that one after the other goes further back and never around.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from piflow import storage
from piflow.runs.mlflow import (
    TAG_LENGTH,
    answered,
    connect,
    cut,
    explained,
    require_own_server,
)
from piflow.runs.origin import user
from piflow.runs.registry import registry_of, require_alias, require_name
from piflow.storage.foreign import shown
from piflow.storage.scratch import scratch

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

RECIPE_TAG = "piflow.recipe_hash"
CHECKPOINT_TAG = "piflow.checkpoint"
CHECKPOINT_SHA_TAG = "piflow.checkpoint_sha256"
WEIGHTS_TAG = "piflow.weights"
_READY = "READY"
_CHECKPOINT = re.compile(r"step_\d{1,12}")
_FIGURES = "evaluation/figures"  # in a run's artifacts
_MOST_BYTES = 64 * 2**20  # of a file of figures


@dataclass(frozen=True)
class Version:
    """A registered version."""

    number: int
    run_id: str
    tags: Mapping[str, str]
    is_ready: bool

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint that it was exported from.

        Raises:
            ValueError: its tags don't say, or say something else.
        """
        name = self.tags.get(CHECKPOINT_TAG, "")
        if not _CHECKPOINT.fullmatch(name):
            raise ValueError(
                f"version {self.number} doesn't say from which checkpoint it was exported (tag "
                f"{CHECKPOINT_TAG}: {shown(repr(name))}); use one that `piflow export` registered"
            )
        return name


class Registry:
    """A registered model and one of its aliases.

    Args:
        uri: of the MLflow server.
        name: of the model.
        alias: such as "champion".

    Raises:
        ValueError: the server has no registry, or no such model; or a name that MLflow doesn't
            take.
        ConnectionError: the server is away.
    """

    def __init__(self, uri: str, name: str, alias: str) -> None:
        require_alias(alias)
        require_name(name)
        self._uri, self.name, self.alias = uri, name, alias
        self._client = connect(uri)
        with registry_of(uri):
            found = answered(lambda: self._client.search_registered_models(f"name = '{name}'"), uri)
        if not found:
            raise ValueError(f"{uri} has no registered model {name}: `piflow export` makes one")

    def versions(self) -> list[Version]:
        """All versions, the newest first."""
        found: list[ModelVersion] = []
        token = None
        with explained(self._uri):
            while True:
                page = self._client.search_model_versions(
                    f"name = '{self.name}'", max_results=1000, page_token=token
                )
                found += page
                token = page.token
                if not token:
                    break
        versions = [_version(item) for item in found]
        return sorted(versions, key=lambda version: version.number, reverse=True)

    def holder(self) -> Version | None:
        """The version that has the alias; None: none has."""
        with explained(self._uri):
            number = self._client.get_registered_model(self.name).aliases.get(self.alias)
            if number is None:
                return None
            return _version(self._client.get_model_version(self.name, str(number)))

    def figures(self, version: Version) -> bytes | None:
        """The file of figures of the version's checkpoint; None: there is none.

        Raises:
            ValueError: as of `Version.checkpoint`; the run isn't there; or the file is too large.
        """
        place = f"{_FIGURES}/{version.checkpoint}.json"
        with explained(self._uri):
            run = self._client.get_run(version.run_id)
            require_own_server(self._uri, run.info.artifact_uri)
            listed = self._client.list_artifacts(version.run_id, _FIGURES)
            sizes = {item.path: item.file_size or 0 for item in listed}
            if place not in sizes:
                return None
            if sizes[place] > _MOST_BYTES:
                raise ValueError(
                    f"{place} of run {shown(version.run_id)} has {sizes[place]} bytes; expected "
                    f"figures of at most {_MOST_BYTES}"
                )
            with scratch("figures") as folder:
                path = self._client.download_artifacts(version.run_id, place, str(folder))
                return storage.read_bytes(str(path), max_bytes=_MOST_BYTES)

    def promote(
        self, version: Version, expected: Version | None, *, why: str, forced: bool = False
    ) -> None:
        """Move the alias to a version, with tags that say so.

        Args:
            expected: the version that has the alias, as the caller knows it.
            why: the reasons, in lines.
            forced: though they speak against it.

        Raises:
            ValueError: another version has the alias by now.
        """
        before, found = _number(expected), _number(self.holder())
        if found != before:
            raise ValueError(
                f"the alias {self.alias} went from version {before} to {found} meanwhile: nothing "
                "was moved, run the same command again"
            )
        self._tag(
            version.number,
            {
                "at": _now(),
                "by": user(),
                "why": why,
                "forced": str(forced).lower(),
                "before": before,
            },
        )
        self._move(version.number)

    def roll_back(self) -> tuple[int, int]:
        """Move the alias back to the version that had it before.

        Returns:
            The version that had it until now, and the one that has it again.

        Raises:
            ValueError: no version has the alias, none had it before, or that one is gone.
        """
        now = self.holder()
        if now is None:
            raise ValueError(f"no version of {self.name} has the alias {self.alias}")
        before = now.tags.get(f"piflow.{self.alias}.before", "")
        if not re.fullmatch(r"\d{1,9}", before):
            raise ValueError(
                f"version {now.number} of {self.name} is the first that `piflow promote` gave the "
                f"alias {self.alias}: there is none to go back to. `piflow promote --version` "
                "moves it to another one"
            )
        target = int(before)
        if target not in {version.number for version in self.versions()}:
            raise ValueError(
                f"version {target} of {self.name}, which had {self.alias} before version "
                f"{now.number}, was deleted; `piflow promote --version` moves it to another one"
            )
        self._move(target)
        self._tag(now.number, {"rolled_back": f"{_now()} by {user()}, to version {target}"})
        with explained(self._uri):
            key = f"piflow.{self.alias}.before"
            self._client.delete_model_version_tag(self.name, str(now.number), key)
        return now.number, target

    def _move(self, number: int) -> None:
        with explained(self._uri):
            self._client.set_registered_model_alias(self.name, self.alias, str(number))

    def _tag(self, number: int, tags: Mapping[str, str]) -> None:
        with explained(self._uri):
            for key, value in tags.items():
                name = f"piflow.{self.alias}.{key}"
                self._client.set_model_version_tag(
                    self.name, str(number), name, cut(value, TAG_LENGTH)
                )


def _version(item: ModelVersion) -> Version:
    tags = {str(key): str(value) for key, value in item.tags.items()}
    return Version(int(item.version), str(item.run_id or ""), tags, item.status == _READY)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _number(version: Version | None) -> str:
    return "none" if version is None else str(version.number)

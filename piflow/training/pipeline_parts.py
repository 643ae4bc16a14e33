"""The parts of a base's diffusers pipeline beside its transformer, for a student that has its own.

VAE, text encoders, tokenizers and scheduler are copied as they are, but for paths of whoever saved
them, so that the student's folder is a pipeline's and needs nothing beside it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from piflow import storage
from piflow.backbones.codec import vae_uri
from piflow.config import Recipe, find_family
from piflow.config.encoder import TextEncoderConfig
from piflow.roles.merged import TRANSFORMER
from piflow.storage.foreign import parse_object, relative_name
from piflow.storage.model_folder import MAX_CONFIG_BYTES, check_model_folder

INDEX = "model_index.json"
COPIED = (".json", ".txt", ".model", ".jinja", ".safetensors")
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|ema|non_ema)[.-]")  # weights that are there twice
_PLACES = ("_name_or_path", "name_or_path")  # keys that hold paths of whoever saved the file


@dataclass(frozen=True)
class PipelineParts:
    """A pipeline on any storage.

    Attributes:
        root: URI of its folder.
        index: its model_index.json.
        names: of its parts but the transformer.
    """

    root: str
    index: dict[str, object]
    names: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> PipelineParts | None:
        """Those that the recipe's teacher is a part of and the student samples with.

        None: the base is no part of a pipeline, or VAE or text encoder are others than the
        pipeline's, or its family has no pipeline of piflow's.

        Raises:
            ForeignDataError: its index isn't one, or a part is a folder that isn't opened here.
        """
        model = recipe.model
        if storage.base_name(model.path) != TRANSFORMER or model.codec != "vae":
            return None
        place = storage.sibling(model.path, INDEX)
        root = place.removesuffix(f"/{INDEX}")
        own = storage.absolute(vae_uri(model)) == storage.absolute(storage.join(root, "vae"))
        encoder = recipe.encoder
        if isinstance(encoder, TextEncoderConfig):
            own = own and encoder.in_pipeline
            own = own and storage.absolute(encoder.path) == storage.absolute(root)
        if not own or find_family(model.family).pipeline is None or not storage.exists(place):
            return None
        index = parse_object(storage.read_bytes(place), where=place, max_bytes=MAX_CONFIG_BYTES)
        parts = [
            relative_name(name, where=place)
            for name, value in index.items()
            if isinstance(value, list) and value != [None, None] and name != TRANSFORMER
        ]
        for name in parts:
            check_model_folder(storage.join(root, name), storage.join(root, name))
        return cls(root, index, tuple(sorted(parts)))

    def copy_to(self, folder: str, family: str) -> None:
        """Write parts and index to a folder, the index last; `family` names the pipeline's class.

        Raises:
            OSError: a file can't be read or written.
        """
        for part in self.names:
            source = storage.for_ranges(storage.join(self.root, part))
            for name in storage.list_files(source, recursive=False):
                if not name.endswith(COPIED) or _VARIANT.search(name):
                    continue
                target = storage.join(folder, part, name)
                if name.endswith(".json"):
                    storage.write_bytes(target, _without_places(storage.member(source, name)))
                else:
                    storage.copy_file(storage.member(source, name), target)
        pipeline = find_family(family).pipeline or ""
        index = {**self.index, "_class_name": pipeline.rpartition(":")[2]}
        storage.write_bytes(storage.join(folder, INDEX), _json(_cleared(index)))


def _without_places(uri: str) -> bytes:
    """A JSON file without paths of whoever saved it; any other content as it is."""
    content = storage.read_bytes(uri)
    try:
        tree = json.loads(content)
    except ValueError:
        return content
    if not isinstance(tree, dict) or tree.keys().isdisjoint(_PLACES):
        return content
    return _json(_cleared(tree))


def _cleared(tree: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in tree.items() if key not in _PLACES}


def _json(tree: dict[str, object]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()

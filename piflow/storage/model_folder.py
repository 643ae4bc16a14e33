"""A folder of a model, tokenizer or pipeline, checked before any library opens it.

diffusers and transformers do what the JSON in a folder says: they import modules that it names, ask
on the terminal whether to, fetch kernels and other models from a hub, and build as many layers as a
number asks for. piflow knows the architectures that it loads and reads weights as safetensors, so a
folder that wants any of this is refused, by the name of the file and the key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import SafetensorError

from piflow.storage.files import exists, file_sizes, read_bytes
from piflow.storage.foreign import ForeignDataError, parse_object, relative_name, shown
from piflow.storage.uri import join

MAX_CONFIG_BYTES = 4 * 2**20
"""The largest configuration of the families here, with a thousand class names, has 40 KB."""

MAX_ENTRIES = 4096
"""Of a list in a configuration."""

_CODE = "it names Python code to import, and piflow runs no code of a model's folder"
_KERNELS = "it has code fetched from a hub, and piflow runs no code that a model's folder names"

REFUSED_KEYS = {
    "auto_map": _CODE,
    "custom_pipeline": _CODE,
    "custom_pipelines": _CODE,
    "custom_generate": _CODE,
    "trust_remote_code": _CODE,
    "fusion_config": "it exchanges classes of the library for the whole process",
    "kernel": _KERNELS,
    "kernels": _KERNELS,
    "kernel_config": _KERNELS,
    "kernel_mapping": _KERNELS,
    "use_kernels": _KERNELS,
    "quantization_config": "piflow reads weights that aren't quantised; give those",
    "compression_config": "piflow reads weights that aren't quantised; give those",
    "transformers_weights": "piflow reads the files that the library expects, under its own names",
    "use_pretrained_backbone": "it has another model fetched from a hub",
    "init_inputs": "it hands a tokenizer's class paths to open",
}
"""What makes a library run or fetch something else, and why piflow doesn't go along; null, false
and empty values are as good as none.
"""

_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")

_IMPLEMENTATIONS = (None, "eager", "sdpa")  # of others, some are fetched from a hub

_TOKENIZER = re.compile(r"(?!Auto|Rag)\w+Tokenizer(Fast)?|TokenizersBackend|MistralCommonBackend")

_SPECIAL_TOKENS = "special_tokens_map.json"
_TOKENIZER_FILES = ("tokenizer_config.json", _SPECIAL_TOKENS)
_OPENED = re.compile(r"(?!special_tokens_map_file).*_files?|(source|target)_spm")
"""Keys whose files a tokenizer opens, wherever they lie; of the one left out, nobody reads any."""

_NAMES_ONLY = ("id2label", "label2id")  # objects whose keys are a data set's, not the library's

_LIMITS = (  # a key's pattern, and the most that its numbers may be; the first that matches counts
    (re.compile(r"layers_per_block"), 64),
    (re.compile(r"layers|num_blocks|depths?$"), 1024),
    (re.compile(r"max_position_embeddings|vocab_size|num_embeds"), 2**22),
    (re.compile(r"pos_embed_max_size"), 1024),
    (re.compile(r"sample_size"), 4096),
    (re.compile(r"dim|size|channels|heads|width|d_model|d_ff|d_kv"), 2**17),
)

_BLOCK_LISTS = re.compile(r"block_out_channels|block_types|dim_mult")

_MAX_BLOCKS = 64

_CONFIGURATIONS = (  # which the libraries open; a folder may hold other JSON beside them
    "config.json",
    "generation_config.json",
    "model_index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "scheduler_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)

_WEIGHTS_INDEX = re.compile(r".*\.safetensors\.index(\..+)?\.json")

_LIBRARIES = ("diffusers", "transformers", "piflow.scheduler")  # of a pipeline's parts


LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,  # RecursionError as well
    TypeError,
    ValueError,
    SafetensorError,
)
"""What the libraries raise of files that aren't what they expect; they document none of it."""


def reason(error: BaseException) -> str:
    """A library's error as it may stand in a message, with its kind where it says little else."""
    text = shown(error, 1000)
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"


def check_model_folder(folder: str, where: str) -> None:
    """Refuse a folder that would have a library run code, go elsewhere or never end.

    Args:
        folder: URI or path; the files right inside it are looked at.
        where: what messages call it.

    Raises:
        ForeignDataError: names the file and the key, what it says, and what piflow takes.
    """
    sizes = file_sizes(folder, recursive=False)
    if "adapter_config.json" in sizes:
        raise ForeignDataError(
            f"{where} holds adapter_config.json: the library would load PEFT's adapter, or another "
            "base that it names, in place of this model. Merge the adapter into the weights, or "
            "give a folder without it"
        )
    if exists(join(folder, "custom_generate")):
        raise ForeignDataError(f"{where} holds a folder custom_generate: {_CODE}; remove it")
    for name in sizes:
        if name in _CONFIGURATIONS:
            content = read_bytes(join(folder, name), max_bytes=MAX_CONFIG_BYTES)
            tree = parse_object(content, where=f"{where}/{name}")
            _check_tree(tree, f"{where}/{name}")
            if name in _TOKENIZER_FILES:
                _check_tokenizer(
                    tree, sizes, f"{where}/{name}", tokens_only=name == _SPECIAL_TOKENS
                )
            if name == "config.json":
                _check_numbers(tree, f"{where}/{name}")
        elif _WEIGHTS_INDEX.fullmatch(name):
            shard_names(read_bytes(join(folder, name)), f"{where}/{name}")


def check_pipeline_folder(folder: str, where: str) -> None:
    """`check_model_folder` for a diffusers pipeline and each part that its index names.

    Args:
        folder: a local path; parts are its subfolders.
        where: what messages call it.

    Raises:
        ForeignDataError: as `check_model_folder`; or a part of another library, or Python files.
    """
    check_model_folder(folder, where)
    index = f"{where}/model_index.json"
    place = join(folder, "model_index.json")
    if not exists(place):
        raise ForeignDataError(
            f"{where} has no model_index.json: give a diffusers pipeline's folder"
        )
    tree = parse_object(read_bytes(place, max_bytes=MAX_CONFIG_BYTES), where=index)
    _refuse_python(folder, where)
    for part, value in tree.items():
        if part.startswith("_") or not isinstance(value, list):
            continue
        match value:
            case [None, None]:
                continue
            case [str(library), str()] if library in _LIBRARIES:
                pass
            case _:
                raise ForeignDataError(
                    f"{index} says {shown(repr(value))} of {shown(part)}; expected a class of "
                    f"{', '.join(_LIBRARIES)}: parts of other modules are code, which piflow runs "
                    "no more than any other of a model's folder"
                )
        relative_name(part, where=index)
        if exists(join(folder, part)):
            check_model_folder(join(folder, part), f"{where}/{part}")
            _refuse_python(join(folder, part), f"{where}/{part}")


def shard_names(content: bytes, where: str) -> list[str]:
    """The files that an index of safetensors weights names, sorted.

    Args:
        content: the index.
        where: what messages call it.

    Raises:
        ForeignDataError: no `weight_map` of texts, or a file outside the index's own folder or
            that isn't safetensors.
    """
    tree = parse_object(content, where=where)
    places = tree.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ForeignDataError(
            f"{where} has no weight_map; expected an object of tensors' names and the files that "
            "hold them: copy the index again"
        )
    names = sorted({relative_name(name, where=where) for name in places.values()})
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise ForeignDataError(
                f"{where} names the file {shown(repr(name))}; expected a .safetensors file in the "
                "same folder (pickled weights are never read)"
            )
    return names


def _refuse_python(folder: str, where: str) -> None:
    """diffusers looks for modules under names that an index chooses."""
    for name in file_sizes(folder, recursive=False):
        if name.endswith(".py"):
            raise ForeignDataError(
                f"{where} holds Python code, {shown(name)}: piflow runs no code of a model's "
                "folder; remove it if it isn't needed"
            )


def _check_tree(tree: dict[str, Any], where: str) -> None:
    """Refuses keys that libraries follow, at any depth."""
    for key, value in _entries(tree):
        if key in REFUSED_KEYS and value:
            raise ForeignDataError(
                f"{where} has {key}: {shown(repr(value), 80)}. {_sentence(REFUSED_KEYS[key])}. "
                "Remove the key if the model doesn't need it"
            )
        if _IMPLEMENTATION.fullmatch(key):
            for chosen in value.values() if isinstance(value, dict) else [value]:
                if chosen not in _IMPLEMENTATIONS:
                    raise ForeignDataError(
                        f"{where} has {key}: {shown(repr(chosen), 80)}; expected eager, sdpa or "
                        "null: others may be code that is fetched from a hub. Remove the key"
                    )
        if key == "tokenizer_class" and value is not None:
            if not isinstance(value, str) or not _TOKENIZER.fullmatch(value):
                raise ForeignDataError(
                    f"{where} has tokenizer_class: {shown(repr(value), 80)}; expected a tokenizer "
                    "of transformers that reads this folder alone"
                )
        if key == "_class_name" and not isinstance(value, str):
            raise ForeignDataError(
                f"{where} has _class_name: {shown(repr(value), 80)}; expected one class's name: a "
                f"list names a module as well, and {_CODE}"
            )


def _check_tokenizer(
    tree: dict[str, Any], files: Mapping[str, int], where: str, tokens_only: bool
) -> None:
    """Refuses files that a tokenizer would open elsewhere: no hash of the folder covers them.

    Args:
        files: the folder's.
        tokens_only: whether it is the file of special tokens, of which all others become arguments
            of the tokenizer as well.
    """
    for key, value in tree.items():
        if tokens_only and not key.endswith(("_token", "_tokens")):
            raise ForeignDataError(
                f"{where} has {shown(key, 80)}; expected special tokens alone: the library would "
                "take it for a setting. Remove the key"
            )
        for name in value if isinstance(value, list) else [value]:
            is_there = name is None or (isinstance(name, str) and name in files)
            if _OPENED.fullmatch(key) and not is_there:
                raise ForeignDataError(
                    f"{where} has {shown(key, 80)}: {shown(repr(name), 80)}; expected the name of "
                    "a file in the same folder: the library would open it wherever it lies. Remove "
                    "the key if the model doesn't need it"
                )


def _check_numbers(tree: dict[str, Any], where: str) -> None:
    """Refuses a model that no memory holds, before anything is built of its numbers."""
    for key, value in _entries(tree):
        values = value if isinstance(value, list) else [value]
        most = _MAX_BLOCKS if _BLOCK_LISTS.search(key) else MAX_ENTRIES
        if len(values) > most:
            raise ForeignDataError(f"{where} has {len(values)} entries of {key}; at most {most}")
        limit = next((most for pattern, most in _LIMITS if pattern.search(key)), None)
        for number in values:
            if limit is not None and isinstance(number, int | float) and number > limit:
                raise ForeignDataError(
                    f"{where} has {shown(key, 80)}: {shown(number, 40)}; at most {limit}: no model "
                    "of the families here is as large"
                )


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key of every object, with its value; the depth is limited by how it was parsed."""
    if isinstance(tree, list):
        for value in tree:
            yield from _entries(value)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield key, value
            if key not in _NAMES_ONLY:
                yield from _entries(value)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]

"""What the text encoders share: batches by length, and folders that say what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from piflow import storage
from piflow.backbones.offload import place
from piflow.storage.fingerprint import EncoderIdentity, files_sha256
from piflow.storage.foreign import parse_object, shown
from piflow.storage.model_folder import LIBRARY_ERRORS, check_model_folder, reason

if TYPE_CHECKING:
    from torch import Tensor


class Embedding(NamedTuple):
    """One prompt's states: tokens ``(n, D)``, pooled ``(P,)`` or None, float32 on the CPU.

    Of a prompt that was read with a picture: `negative` ``(m, D)`` are the last states of the
    negative prompt with the same picture, None if none was asked for. Its first ones are the first
    `shared` of `tokens`, those of the picture. `cut` says whether the prompt was too long.
    """

    tokens: Tensor
    pooled: Tensor | None
    negative: Tensor | None = None
    shared: int = 0
    cut: bool = False


class PromptModel(Protocol):
    """One family's tokenizers and models."""

    @property
    def identity(self) -> EncoderIdentity: ...

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before truncation, comparable with `identity.max_tokens`."""
        ...

    def forward(self, prompts: Sequence[str]) -> list[Embedding]:
        """One encoder call; long prompts are truncated. Padding never changes a prompt's result."""
        ...


class PicturePromptModel(PromptModel, Protocol):
    """That of a family whose text encoder reads the picture to be edited as well.

    Its `forward`, of prompts alone, serves the store's empty prompt.
    """

    def forward_with_pictures(
        self, prompts: Sequence[str], pictures: Sequence[Tensor], negative: str | None
    ) -> list[Embedding]:
        """One encoder call for prompts with a picture each, ``(3, h, w)`` in [-1, 1].

        Args:
            negative: the negative prompt, which is read with every picture as well; None: not.

        Raises:
            ValueError: a picture that leaves no room for its prompt within `max_tokens`.
        """
        ...


class EncoderModule(Protocol):
    """What the module that an encoder's config names holds, each for configs of its own kind."""

    def identity(self, config: Any) -> EncoderIdentity:
        """What decides the embeddings; the files are read for their hash, no model is loaded.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the folder holds no encoder of this kind, or it takes fewer tokens.
        """
        ...

    def load(self, config: Any, device: str) -> PromptModel:
        """The models, on this device.

        Raises:
            FileNotFoundError, ValueError: as `identity`; or weights that don't load.
        """
        ...


class TextEncoder:
    """Encodes any number of prompts, those of similar length together.

    A prompt's result depends on the others in its batch by rounding only.
    """

    def __init__(self, model: PromptModel) -> None:
        self._model = model

    @property
    def identity(self) -> EncoderIdentity:
        """What decides the embeddings."""
        return self._model.identity

    def encode(
        self,
        prompts: Sequence[str],
        batch_size: int = 64,
        on_batch: Callable[[int], None] | None = None,
        pictures: Sequence[Callable[[], Tensor]] | None = None,
    ) -> list[EncodedPrompt]:
        """Encode prompts; results in the prompts' order.

        Args:
            prompts: any number of texts; "" is allowed.
            batch_size: prompts an encoder call.
            on_batch: called with the number of prompts after each encoder call.
            pictures: as for `encode_by_length`.

        Raises:
            ValueError: the encoder can't take a prompt; names it.
        """
        encoded: dict[int, EncodedPrompt] = {}
        for rows, results in self.encode_by_length(prompts, batch_size, pictures=pictures):
            encoded.update(zip(rows, results, strict=True))
            if on_batch is not None:
                on_batch(len(rows))
        return [encoded[row] for row in range(len(prompts))]

    def encode_by_length(
        self,
        prompts: Sequence[str],
        batch_size: int,
        *,
        pictures: Sequence[Callable[[], Tensor]] | None = None,
        negative: str | None = None,
    ) -> Iterator[tuple[list[int], list[EncodedPrompt]]]:
        """Encoder calls one by one, short prompts first: (indices of prompts, their results).

        Args:
            prompts: any number of texts.
            batch_size: prompts an encoder call.
            pictures: each prompt's, ``(3, h, w)`` in [-1, 1], read when its call comes; for a
                `PicturePromptModel`.
            negative: the negative prompt, which is read with every picture as well.
        """
        lengths = self._model.count_tokens(prompts) if prompts else []
        order = sorted(range(len(prompts)), key=lambda row: (lengths[row], row))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            texts = [prompts[row] for row in rows]
            with torch.no_grad():
                if pictures is None:
                    embeddings = self._model.forward(texts)
                else:
                    shown_to_it = [pictures[row]() for row in rows]
                    model = cast(PicturePromptModel, self._model)
                    embeddings = model.forward_with_pictures(texts, shown_to_it, negative)
            limit = self.identity.max_tokens
            yield (
                rows,
                [
                    EncodedPrompt(
                        found.tokens,
                        found.pooled,
                        found.cut or lengths[row] > limit,
                        negative=found.negative,
                        shared=found.shared,
                    )
                    for row, found in zip(rows, embeddings, strict=True)
                ],
            )


def split_rows(states: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """``(B, L, D)`` -> the first ``counts[b]`` states of each row, float32 on the CPU."""
    states = states.float().cpu()
    return [row[:count].clone() for row, count in zip(states, counts, strict=True)]


def read_config(folder: Path, uri: str, what: str = "encoder") -> dict[str, Any]:
    """The ``config.json`` of a transformers folder.

    Args:
        what: messages call it.

    Raises:
        ValueError: it is missing or holds no object, or the folder is refused by
            `check_model_folder`.
    """
    check_model_folder(str(folder), f"{what} {uri}")
    try:
        content = storage.read_bytes(str(folder / "config.json"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{what} folder {uri} has no config.json; expected a transformers folder with "
            "config and safetensors weights"
        ) from error
    return parse_object(content, where=f"config.json of {what} {uri}")


def number_of(config: Mapping[str, Any], key: str, uri: str, default: int | None = None) -> int:
    """A config's positive whole number.

    Raises:
        ValueError: there is another value, or none and no default.
    """
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise ValueError(
            f"config.json of encoder {uri} has {key}: {shown(repr(value))}; expected a positive "
            "whole number"
        )
    return value


def part_of(config: Mapping[str, Any], key: str, uri: str) -> dict[str, Any]:
    """The object under a config's key; {} if there is none.

    Raises:
        ValueError: something else is there.
    """
    part = config.get(key, {})
    if not isinstance(part, dict):
        raise ValueError(
            f"config.json of encoder {uri} has {key}: {shown(repr(part))}; expected an object"
        )
    return part


def require_model_type(config: Mapping[str, Any], expected: str, uri: str) -> None:
    """Check a config's `model_type`.

    Raises:
        ValueError: it is another one.
    """
    if config.get("model_type") != expected:
        raise ValueError(
            f"config.json of encoder {uri} has model_type "
            f"{shown(repr(config.get('model_type')))}, expected {expected!r}; set "
            "encoder.type and encoder.path to match one another"
        )


def require_sizes(config: Mapping[str, Any], keys: tuple[str, str], uri: str) -> tuple[int, int]:
    """A config's number of layers and width, under these keys.

    Raises:
        ValueError: one is missing or no positive whole number.
    """
    layers, width = (config.get(key) for key in keys)
    if layers is None or width is None:
        raise ValueError(
            f"config.json of encoder {uri} lacks {' or '.join(keys)}: not an encoder of the "
            "recipe's encoder.type"
        )
    return number_of(config, keys[0], uri), number_of(config, keys[1], uri)


def require_at_most(max_tokens: int, limit: int, what: str) -> None:
    """Check `encoder.max_tokens`.

    Raises:
        ValueError: it is over the limit.
    """
    if max_tokens > limit:
        raise ValueError(
            f"encoder.max_tokens is {max_tokens}, {what} takes at most {limit}; lower "
            "encoder.max_tokens"
        )


def load_model(
    model_class: Any,
    folder: Path,
    uri: str,
    *,
    device: str,
    dtype: torch.dtype | str = "auto",
    unused: tuple[str, ...] = (),
    what: str = "text encoder",
) -> Any:
    """A transformers model for inference, with every weight from its folder.

    On a GPU that it doesn't fit, its weights stay in the host's memory (see `offload.place`).

    Args:
        dtype: "auto" keeps the dtype in which the weights are stored.
        unused: prefixes of weights that may be missing, since their results aren't used.
        what: messages call it.

    Raises:
        ValueError: the folder is refused by `check_model_folder`, it doesn't load, or weights are
            missing.
    """
    check_model_folder(str(folder), f"{what.removeprefix('text ')} {uri}")
    try:
        model, info = model_class.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
    except LIBRARY_ERRORS as error:
        raise ValueError(f"cannot load the {what} {uri}: {reason(error)}") from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(unused))
    if missing:
        raise ValueError(
            f"the {what} {uri} lacks {len(missing)} of the model's weights, e.g. "
            f"{', '.join(missing[:3])}; use a complete {type(model).__name__}"
        )
    return place(model.eval().requires_grad_(False), torch.device(device), f"{what} {uri}")


def load_tokenizer(
    tokenizer_class: Any, folder: Path, uri: str, padding_side: str | None = "right"
) -> Any:
    """A transformers tokenizer.

    Args:
        padding_side: "right": valid tokens come first in a row; None: as its files say.

    Raises:
        ValueError: the folder is refused by `check_model_folder`, or it doesn't load.
    """
    check_model_folder(str(folder), f"tokenizer {uri}")
    try:
        tokenizer = tokenizer_class.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except LIBRARY_ERRORS as error:
        raise ValueError(f"cannot load the tokenizer {uri}: {reason(error)}") from error
    if padding_side is not None:
        tokenizer.padding_side = padding_side
    return tokenizer


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt without truncation, special tokens included."""
    ids = tokenizer(list(prompts), truncation=False, padding=False, verbose=False)
    return [len(row) for row in ids["input_ids"]]


class Parts:
    """The subfolders of a pipeline's folder that hold its text models and tokenizers.

    Raises:
        FileNotFoundError: one is missing.
    """

    def __init__(self, path: str, models: Sequence[str], tokenizers: Sequence[str]) -> None:
        self._models, self._tokenizers = models, tokenizers
        self.uris = {part: storage.join(path, part) for part in (*models, *tokenizers)}
        self.folders = {part: storage.local_folder(uri) for part, uri in self.uris.items()}

    def config(self, part: str, model_type: str) -> dict[str, Any]:
        """A model's config.json.

        Raises:
            ValueError: it is missing, or another type's.
        """
        config = read_config(self.folders[part], self.uris[part])
        require_model_type(config, model_type, self.uris[part])
        return config

    def sha256(self) -> str:
        """One hash of all models' and tokenizers' files."""
        return files_sha256(
            {self.uris[part]: self.folders[part] for part in self._models},
            {self.uris[part]: self.folders[part] for part in self._tokenizers},
        )

    def load_model(self, model_class: type, part: str, device: str) -> Any:
        """The part's model, frozen, on the device."""
        return load_model(model_class, self.folders[part], self.uris[part], device=device)

    def load_tokenizer(
        self, tokenizer_class: type, part: str, padding_side: str | None = "right"
    ) -> Any:
        """The part's tokenizer."""
        return load_tokenizer(tokenizer_class, self.folders[part], self.uris[part], padding_side)


def pad(tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
    """Token ids and attention mask ``(B, length)``: every prompt padded or truncated."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )


def require_clip_fits(tokenizer: Any, clip: Any, uri: str) -> None:
    """Check that a CLIP tokenizer pads to no more tokens than its model takes.

    Raises:
        ValueError: it does.
    """
    limit = clip.config.max_position_embeddings
    if tokenizer.model_max_length > limit:
        raise ValueError(
            f"the CLIP tokenizer of {uri} pads to {tokenizer.model_max_length} tokens, the CLIP "
            f"model takes {limit}; set model_max_length in its tokenizer_config.json"
        )


class EncodedPrompt(NamedTuple):
    """One encoded prompt: tokens ``(n, D)``, pooled ``(P,)`` or None, float32 on the CPU.

    Its picture's latents are ``(C, h, w)`` on the CPU, in float32 or as they will be stored; so are
    those of the picture that it edits. `negative` and `shared` are those of an `Embedding`.
    """

    tokens: Tensor
    pooled: Tensor | None
    truncated: bool
    latent: Tensor | None = None
    condition: Tensor | None = None
    negative: Tensor | None = None
    shared: int = 0

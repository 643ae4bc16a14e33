"""A teacher in one file -> its diffusers folder."""

from __future__ import annotations

from piflow.progress import PlainConsole


def main(file: str, folder: str, family: str, *, config: str | None, dtype: str) -> None:
    """Convert, and say what was written.

    Args:
        file, folder: URIs.
        family: as a recipe's `model.family`; its module is imported.
        config: URI of a folder with the config.json of a model of the same size; None: of the
            family's best known model.
        dtype: of the weights.

    Raises:
        ValueError: as `piflow.backbones.single_file.convert`.
    """
    from piflow.backbones.single_file import convert

    made = convert(file, folder, family, config=config, dtype=dtype)
    scaled = f", {made.scaled} of them from 8 bits with a scale" if made.scaled else ""
    PlainConsole().print(
        f"{folder}: {made.tensors} tensors{scaled}, {made.bytes / 1e9:.1f} GB in "
        f"{len(made.files)} file{'s' if len(made.files) > 1 else ''}"
    )

"""A student that stays loaded and draws one picture a prompt, as MLflow serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from piflow.backbones import build_codec
from piflow.backbones.encoders import build_encoder
from piflow.backbones.offload import place
from piflow.backbones.text import TextEncoder
from piflow.config import DXPolicyConfig, find_family
from piflow.inference.drawing import choose_device, draw_pictures
from piflow.inference.pixels import png_bytes, to_image
from piflow.inference.settings import encode_prompts, read_adapter, student_of
from piflow.roles.trio import Trio
from piflow.sampling import check_nfe

MAX_PROMPTS = 64
"""Of one call."""

TRAINED_NFE = 0
"""In place of a number of network evaluations: as many as the student was trained for."""


class ServedStudent:
    """An adapter with its base and encoder, which are loaded at the first call.

    Args:
        adapter: the adapter's folder.
        base, encoder, allowed: as of `piflow.inference.settings.load_student`.
        device: "cpu", "cuda", or "auto": a GPU if there is one.

    Raises:
        ValueError: not an adapter, one that names places that nobody allowed, or one of a family
            that edits pictures or makes videos.
    """

    def __init__(
        self,
        adapter: str,
        *,
        base: str | None = None,
        encoder: str | None = None,
        allowed: Sequence[str] = (),
        device: str = "auto",
    ) -> None:
        self._device = choose_device(device)
        self._adapter, self._settings = read_adapter(
            adapter, base, encoder=encoder, allowed=allowed
        )
        if self._settings.edits is not None:
            raise ValueError(
                f"a student of the family {self._settings.model.family} edits pictures, and this "
                "model takes prompts alone: load its pipeline with piflow.inference.load, or use "
                "`piflow sample`"
            )
        if find_family(self._settings.model.family).video is not None:
            raise ValueError(
                f"a student of the family {self._settings.model.family} makes videos, and this "
                "model gives pictures: load its pipeline with piflow.inference.load, or use "
                "`piflow sample`"
            )
        self._loaded: tuple[Trio, TextEncoder] | None = None

    @torch.no_grad()
    def pictures(
        self, prompts: Sequence[str], *, seed: int = 0, nfe: int = TRAINED_NFE
    ) -> list[bytes]:
        """A PNG file's bytes for each prompt, all from the noise of one seed.

        A picture depends on its prompt and the seed alone, as `piflow sample` draws it.

        Args:
            nfe: network evaluations; 0: as trained.

        Raises:
            ValueError: no prompts, too many or blank ones, a seed outside of [0, 2^63), or a number
                of evaluations that the student doesn't run at.
        """
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise ValueError(f"expected 1 to {MAX_PROMPTS} prompts a call, got {len(prompts)}")
        if any(not isinstance(prompt, str) or not prompt.strip() for prompt in prompts):
            raise ValueError("expected prompts that say something, got a blank one")
        if not 0 <= seed < 2**63:
            raise ValueError(f"expected a seed from 0 to 2^63 - 1, got {seed}")
        settings = self._settings
        trained = settings.few_step.nfe
        elastic = not isinstance(self._adapter.config.policy(), DXPolicyConfig)
        nfe = trained if nfe == TRAINED_NFE else nfe
        check_nfe(nfe, trained, elastic=elastic)
        trio, encoder = self._load()
        cond = encode_prompts(settings, list(prompts), self._device.type, encoder)
        if find_family(settings.model.family).masks_text:
            cond = cond.cut()
        drawn = draw_pictures(
            trio,
            build_codec(settings.model),
            replace(settings.few_step, nfe=nfe),
            cond.to(self._device),
            [seed] * len(prompts),
            (settings.height, settings.width),
        )
        return [png_bytes(to_image(picture)) for picture in drawn]

    def _load(self) -> tuple[Trio, TextEncoder]:
        if self._loaded is None:
            encoder = build_encoder(self._settings.encoder, self._device.type)
            trio = student_of(self._adapter, self._settings)
            for module in trio.modules:
                place(module, self._device, f"base {self._settings.model.path}")
            self._loaded = trio.train(False), encoder
        return self._loaded

"""A student's model card: what it is, how good, and how it is used; Markdown with the hub's header.

Nothing that says where it was made goes into it: of places only names are left, and what looks like
a secret is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from piflow import storage
from piflow.config import find_family
from piflow.evaluation.figures import Figures, alone
from piflow.inference.places import portable
from piflow.inference.settings import BASE_KEY, SamplingSettings
from piflow.roles.adapter import Adapter
from piflow.storage.foreign import redacted

MARK = "library_name: piflow"  # in the header of every card of ours
GRID = "grid.jpg"  # beside the card
_HUB = "hf://"
_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|"
    r"[a-z0-9+]+://[^\s/:@\"]+:[^\s/@\"]+@"
)
_MACHINE_PATH = re.compile(
    r"(?<![\w.:/-])/(?:home|root|Users|tmp|mnt|data|opt|var|srv|workspace|scratch|efs|fsx|work)"
    r"/[\w.-]+"
)
_RELATIONS = {"merged": "finetune", "fp8": "quantized", "gguf": "quantized"}
_PUBLISHED = {  # family -> pipeline of the published implementation, and its module
    "flux": ("PiFluxPipeline", "pipeline_piflux"),
    "flux2": ("PiFlux2Pipeline", "pipeline_piflux2"),
    "qwen_image": ("PiQwenImagePipeline", "pipeline_piqwen"),
}


@dataclass(frozen=True)
class Card:
    """What a card tells.

    Attributes:
        name: of the student.
        place: where it will lie: owner/name[/folder] on the hub, or an s3:// URI.
        kind: adapter, merged, fp8 or gguf.
        student: as read; its metadata hold base, run and hashes.
        settings: to sample with.
        licence: SPDX or hub identifier of the base's licence; None: not known.
        identity: the recipe's keys that decide its results; None: there is no run.
        figures: of this very checkpoint; None: it wasn't evaluated.
        has_grid: whether its evaluation's pictures lie beside the card.
        error: how far its velocities are from the adapter's; None: not measured.
    """

    name: str
    place: str
    kind: str
    student: Adapter
    settings: SamplingSettings
    licence: str | None
    identity: Mapping[str, Any] | None
    figures: Figures | None
    has_grid: bool
    error: float | None

    def text(self) -> str:
        """The whole card."""
        parts = [
            self._header(),
            f"# {self.name}",
            self._what(),
            *([f"![pictures of teacher and student]({GRID})"] if self.has_grid else []),
            self._use(),
            self._figures(),
            self._recipe(),
            self._licence(),
            self._lineage(),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _header(self) -> str:
        head: dict[str, Any] = {
            "license": self.licence or "other",
            "library_name": "piflow",
            "pipeline_tag": self._task(),
            "tags": ["piflow", "few-step", "distillation", self.kind],
        }
        base = self._hub_base()
        if base is not None:
            head["base_model"] = base
            head["base_model_relation"] = _RELATIONS.get(self.kind, "adapter")
        return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"

    def _task(self) -> str:
        """The hub's name for what the student does."""
        if find_family(self.settings.model.family).video is not None:
            return "text-to-video"
        return "text-to-image" if self.settings.edits is None else "image-to-image"

    def _hub_base(self) -> str | None:
        """owner/name of the base, if it is on the hub."""
        path = self.settings.model.path
        named = path if path.startswith(_HUB) else self.student.metadata.get("base_model", "")
        if named.startswith(_HUB):
            return "/".join(named.removeprefix(_HUB).split("/")[:2]).partition("@")[0]
        return None

    def _what(self) -> str:
        few, model = self.settings.few_step, self.settings.model
        base = self._hub_base() or self.student.metadata.get("base_model", "its base")
        kinds = {
            "adapter": "an adapter that goes onto the base",
            "merged": "a whole model, base and all LoRA merged",
            "fp8": "a whole model, linear layers in scaled float8_e4m3fn",
            "gguf": "a whole model, linear layers packed as GGUF",
        }
        drawn = "a picture"
        if find_family(model.family).video is not None:
            drawn = f"a video of {model.num_frames} frames"
        policy = self.student.config.policy_fields
        head = policy["type"] if policy["type"] == "GMFlow" else f"DX ({policy['mode']})"
        return (
            f"A student of **{base}** (family {model.family}) that draws {drawn} in "
            f"**{few.nfe} network evaluations**, distilled with piflow by π-Flow's imitation "
            f"distillation (arXiv 2510.14974). Policy {head}, shift {few.shift:g}, last step "
            f"{few.final_step_size_scale:g}, {self.settings.width}x{self.settings.height} pixels. "
            f"This is {kinds[self.kind]}." + ("" if self.error is None else f" {_told(self.error)}")
        )

    def _use(self) -> str:
        model = self.settings.model
        edit = "" if self.settings.edits is None else " --edit PICTURE"
        command = f'piflow sample {self.place} --prompt "a red heart"{edit}'
        lines = ["## Use", "```bash", command, "```"]
        pipeline = find_family(model.family).pipeline
        name = None if pipeline is None else pipeline.rpartition(":")[2]
        base = self._hub_base() or "BASE"
        if name is not None and self.kind == "adapter":
            lines += _python(
                f"from piflow.inference import {name}",
                f'pipe = {name}.from_pretrained("{base}", adapter="{self._uri()}")',
            )
        elif name is not None:
            lines += _python(
                f"from piflow.inference import {name}",
                f'pipe = {name}.from_pretrained("{self._uri()}")',
            )
        if self.kind == "adapter" and model.family in _PUBLISHED:
            lines += ["", "With the published implementation (lakonlab):", *self._published(base)]
        return "\n".join(lines)

    def _published(self, base: str) -> list[str]:
        name, module = _PUBLISHED[self.settings.model.family]
        few = self.settings.few_step
        repository = "/".join(self.place.split("/")[:2])
        folder = "/".join(self.place.split("/")[2:])
        where = f'"{repository}", subfolder="{folder}"' if folder else f'"{repository}"'
        return _python(
            "from lakonlab.models.diffusions.schedulers import FlowMapSDEScheduler",
            f"from lakonlab.pipelines.{module} import {name}",
            f'pipe = {name}.from_pretrained("{base}", torch_dtype=torch.bfloat16)',
            f'pipe.load_piflow_adapter({where}, target_module_name="transformer")',
            f"pipe.scheduler = FlowMapSDEScheduler.from_config(pipe.scheduler.config, "
            f"shift={few.shift:g},",
            f"    use_dynamic_shifting=False, final_step_size_scale={few.final_step_size_scale:g})",
            f'image = pipe("a red heart", num_inference_steps={few.nfe}).images[0]',
        )

    def _uri(self) -> str:
        return self.place if "://" in self.place else f"{_HUB}{self.place}"

    def _figures(self) -> str:
        if self.figures is None:
            return "## Figures\n\nThis checkpoint wasn't evaluated."
        found = self.figures
        rows = [
            f"| {name} | {value.value:.4g} | {value.low:.4g} to {value.high:.4g} |"
            for name, value in sorted(alone(found).items())
        ]
        head = "| figure | value | bootstrap interval |\n|---|---|---|\n"
        told = f"Measured on {len(found.prompts)} prompts with {found.seeds} pictures each."
        return f"## Figures\n\n{head}" + "\n".join(rows) + f"\n\n{told}"

    def _recipe(self) -> str:
        if self.identity is None:
            return ""
        text = yaml.safe_dump(without_places(self.identity), sort_keys=True, allow_unicode=True)
        return f"## Recipe\n\nThe keys that decide the result:\n\n```yaml\n{text}```"

    def _licence(self) -> str:
        base = self._hub_base() or self.student.metadata.get("base_model", "the base")
        known = "isn't known to the exporter" if self.licence is None else f"is `{self.licence}`"
        return (
            f"## Licence\n\nThe student is made from {base} and stands under that model's licence, "
            f"which {known}."
        )

    def _lineage(self) -> str:
        own = {
            key: value
            for key, value in sorted(self.student.metadata.items())
            if key.startswith("piflow.") or key == BASE_KEY
        }
        rows = "\n".join(f"| {key} | `{value}` |" for key, value in own.items())
        return f"## Lineage\n\n| | |\n|---|---|\n{rows}" if own else ""


def _told(error: float) -> str:
    return f"Relative RMS error of its velocities against the bfloat16 adapter: {error:.2e}."


def _python(*lines: str) -> list[str]:
    return ["```python", *lines, "```"]


def without_places(tree: Any) -> Any:
    """A recipe's values with names in the place of paths and stores; the hub's stay."""
    if isinstance(tree, Mapping):
        return {str(key): without_places(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_places(value) for value in tree]
    if not isinstance(tree, str) or "/" not in tree or tree.startswith((_HUB, "package://")):
        return tree
    return portable(tree) if storage.scheme(tree) == "file" else storage.base_name(tree)


def refuse_secrets(texts: Mapping[str, str]) -> None:
    """Refuses texts that hold what looks like a secret, or a path of somebody's machine.

    Args:
        texts: what each is, for the message -> its content.

    Raises:
        ValueError: names the text, and what was found; of secrets the beginning.
    """
    for name, text in texts.items():
        if found := _SECRETS.search(text):
            raise ValueError(
                f"{name} holds what looks like a secret ({redacted(found[0][:6])}…): it isn't "
                "pushed; take it out and export again"
            )
        if found := _MACHINE_PATH.search(text):
            raise ValueError(
                f"{name} holds a path of a machine ({found[0]}): it isn't pushed; export again, or "
                "take it out"
            )


def metadata_text(metadata: Mapping[str, str]) -> str:
    """A weights file's texts as one, to be looked through."""
    return json.dumps(dict(metadata), ensure_ascii=False)

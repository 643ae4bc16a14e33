"""What a submitted job takes along: its recipe, the user's own modules, and nothing else.

The folder is built anew for every submission, from what was named, so that no file goes to a
cluster because it happened to lie there. Weights, runs and secrets are left out and told; what
looks like a secret inside of a file, and what is too large, is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from piflow.config import Recipe
from piflow.jobs import arrival
from piflow.storage.foreign import shown

RECIPE = "recipe.yaml"
ARRIVAL = "piflow_arrival.py"
MAX_BYTES = 20 * 2**20
"""Of all files: code and prompts; Ray keeps a package in the memory of the cluster's head."""

_NAMED = 5  # files that a message names
_SCANNED_BYTES = 2**20

_EXCLUDED = {
    "a secret": (
        ".env*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.ppk", "*.kdbx", "id_rsa*",
        "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", ".pypirc", ".pgpass", ".my.cnf", ".aws",
        ".ssh", ".ray", ".gnupg", ".docker", ".kube", "kubeconfig*", ".git-credentials",
        ".htpasswd", "credentials", "credentials.*", "*credentials*.json", "*service-account*.json",
        "*service_account*.json", "secrets", "secrets.*", "auth_token", "token", "token.txt",
        "*.token",
    ),
    "weights": (
        "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.h5",
        "*.msgpack", "*.distcp", "*.npy", "*.npz", "*.pkl", "*.pickle",
    ),
    "a run's": (
        "runs", "mlruns", "mlartifacts", "wandb", "checkpoints", "*.db", "*.sqlite*", "*.log",
    ),
    "no source": (
        "__pycache__", "*.py[cod]", "*.so", "*.egg-info", "node_modules", "venv", "env", "build",
        "dist", ".*",
    ),
}  # fmt: skip
"""Why -> patterns of names of files and folders that stay here; the first that fits counts."""

_SECRETS = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"
    rb"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    rb"|\bhf_[A-Za-z0-9]{30,}"
    rb"|\bgh[pousr]_[A-Za-z0-9]{36,}"
    rb"|\bsk-[A-Za-z0-9_-]{32,}"
)
"""Private keys, and tokens of AWS, Hugging Face, GitHub and OpenAI."""


class PackageError(ValueError):
    """What was named can't go along; the message names the files."""


@dataclass(frozen=True)
class Package:
    """A folder that is ready to go.

    Attributes:
        files: relative paths, in order.
        left_out: relative path and why it stays.
        sha256: of all names and contents.
    """

    folder: Path
    files: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    sha256: str


def build(folder: Path, recipe: Recipe, named: Sequence[Path] = ()) -> Package:
    """Fill an empty folder.

    Args:
        recipe: goes along as it is resolved here, with its prompts if they are a file beside it.
        named: modules, packages and other files; each arrives under its own name.

    Raises:
        PackageError: a name is missing, taken or a secret's, a file holds a secret, or all of them
            are too large.
    """
    sources = {ARRIVAL: Path(arrival.__file__)}
    left_out: list[tuple[str, str]] = []
    for path in named:
        for name, source in _sources(path, left_out):
            if name == RECIPE or sources.setdefault(name, source) != source:
                raise PackageError(f"{path}: {name} is in the package already; rename it")
    sources |= {place: _prompts(key, place) for key, place in _beside(recipe)}
    _require_small({name: source.stat().st_size for name, source in sources.items()})
    files = {name: source.read_bytes() for name, source in sources.items()}
    files[RECIPE] = recipe.to_yaml().encode()
    _require_no_secrets(files)
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return Package(folder, tuple(sorted(files)), tuple(left_out), digest.hexdigest())


def _beside(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys and relative paths of prompts, which may go along."""
    places = {
        "embed.prompts": recipe.embed.prompts,
        "evaluation.prompt_list": recipe.evaluation.prompt_list,
        "evaluation.prompt_set.path": getattr(recipe.evaluation.prompt_set, "path", None),
    }
    for key, place in places.items():
        if place and "://" not in place and not os.path.isabs(place):
            yield key, os.path.normpath(place)


def _prompts(key: str, place: str) -> Path:
    path = Path(place)
    if place.startswith("..") or not path.is_file() or _why_not(path.name) is not None:
        raise PackageError(
            f"{key} = {place} goes along with the job, so it must be a file below this folder "
            f"({Path.cwd()}); run the command beside it, or name an absolute path that all "
            "machines share, or s3://…"
        )
    return path


def _sources(path: Path, left_out: list[tuple[str, str]]) -> Iterator[tuple[str, Path]]:
    """Names in the package and files of something that was named."""
    name = path.resolve().name
    why = _why_not(name)
    if why is not None:
        raise PackageError(f"{path} looks like {why}, which never goes along with a job")
    if path.is_file():
        _require_own_name(path, path.resolve())
        yield name, path
        return
    if not path.is_dir():
        raise PackageError(f"{path} is missing; expected a file or a folder")
    _require_own_name(path, path.resolve())
    for parent, folders, files in os.walk(path):
        inside = Path(name, os.path.relpath(parent, path))
        for entry in sorted([*folders, *files]):
            why = "a link" if Path(parent, entry).is_symlink() else _why_not(entry)
            if why is not None:
                left_out.append((str(inside / entry), why))
        folders[:] = sorted(f for f in folders if _why_not(f) is None)
        for file in sorted(files):
            whole = Path(parent, file)
            if _why_not(file) is None and not whole.is_symlink():
                yield str(inside / file), whole


def _why_not(name: str) -> str | None:
    lower = name.lower()
    return next(
        (
            why
            for why, patterns in _EXCLUDED.items()
            if any(fnmatchcase(lower, pattern) for pattern in patterns)
        ),
        None,
    )


def _require_own_name(path: Path, place: Path) -> None:
    """The job's folder comes first on Python's path: nothing in it may hide an installed module."""
    module = place.stem if place.suffix == ".py" else place.name
    if not module.isidentifier() or (place.is_file() and place.suffix != ".py"):
        return
    found = None
    if module not in sys.builtin_module_names:
        try:
            found = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            found = None
    origin = None if found is None or found.origin is None else Path(found.origin).resolve()
    own = origin is not None and (origin == place or origin.is_relative_to(place))
    hides = module in sys.stdlib_module_names or (origin is not None and not own)
    if hides:
        raise PackageError(
            f"{path} would hide the installed module {module} from everything in the job; rename it"
        )


def _require_small(sizes: dict[str, int]) -> None:
    total = sum(sizes.values())
    if total <= MAX_BYTES:
        return
    largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:_NAMED]
    told = ", ".join(f"{shown(name)} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
    raise PackageError(
        f"the package has {total / 2**20:.1f} MiB, at most {MAX_BYTES / 2**20:.0f} go along; the "
        f"largest: {told}. Put data on s3:// or a shared disk, code that large into the image"
    )


def _require_no_secrets(files: dict[str, bytes]) -> None:
    found = [name for name in sorted(files) if _SECRETS.search(files[name][:_SCANNED_BYTES])]
    if found:
        raise PackageError(
            "these files hold what looks like a private key or a token: "
            + ", ".join(shown(name) for name in found[:_NAMED])
            + ". Take it out: the cluster's own environment or role gives a job its rights"
        )

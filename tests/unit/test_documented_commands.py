"""Every shell command of README, CONTRIBUTING and docs/ is run as it stands, and is right.

bash runs each block in a copy of the repository's files. Programs are stand-ins that note their
words, which are then parsed by the real command lines of piflow and Ray, or held against the
Makefile, the packages' extras and the files that they name. What `piflow render` writes is there.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import typer

from piflow.cli import app
from piflow.commands import render
from piflow.config import load_recipe
from piflow.jobs.render import TARGETS

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{p.name}" for p in (REPOSITORY / "docs").glob("*.md")),
]
BLOCK = re.compile(r"^( *)```bash\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(piflow [a-z][^`]*)`")
PROGRAMS = (
    "piflow ray make pip pytest pre-commit kubectl helm docker terraform aws sky sbatch openssl"
).split()
USAGE_ERRORS: Any = (click.UsageError, typer.BadParameter.__base__)  # typer has a click of its own
FILE = re.compile(r"[\w./-]+\.(yaml|json|env|sbatch|md)")
STAND_IN = f"""#!{sys.executable}
import json, os, shutil, sys
from pathlib import Path
name = Path(sys.argv[0]).name
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([os.getcwd(), name, *sys.argv[1:]]) + "\\n")
if name == "openssl":
    print("0123abcd")
elif name == "ray" and sys.argv[1] == "get-auth-token":
    Path(os.environ["HOME"], ".ray").mkdir()
    Path(os.environ["HOME"], ".ray", "auth_token").touch()
elif name == "piflow" and sys.argv[1] == "render":
    target, out = (sys.argv[sys.argv.index(option) + 1] for option in ("--target", "--out"))
    shutil.copytree(Path(os.environ["RENDERED"], target), out, dirs_exist_ok=True)
"""


class Call(NamedTuple):
    """A command as bash ran it."""

    folder: Path
    program: str
    words: list[str]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages speak of: the repository's, and a reader's own."""
    root = tmp_path_factory.mktemp("sandbox")
    shutil.copytree(REPOSITORY / "infra", root / "infra")
    for name in ("pipelines", "tests", "docs", "Makefile", "pyproject.toml"):
        (root / name).symlink_to(REPOSITORY / name)
    for own, shipped in (("my-recipe", "recipe"), ("my-values", "values")):
        (root / f"{own}.yaml").symlink_to(REPOSITORY / "cluster" / f"{shipped}.yaml")
    for name in ("secrets.env", "infra/terraform/aws/mlflow.json", "prompts.parquet"):
        (root / name).touch()
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    (root / "home").mkdir()
    recipe, values = root / "my-recipe.yaml", root / "my-values.yaml"
    for target in TARGETS:
        out = root / "targets" / target
        render.main(load_recipe(recipe), recipe.read_text(), target, values=values, out=out)
    return root


def run(block: str, root: Path) -> list[Call]:
    """Run a block of commands; what was called.

    Raises:
        AssertionError: bash or a real program failed.
    """
    calls = root / "calls.jsonl"
    calls.write_text("")
    block = block.replace("/shared/", f"{root}/shared/")  # the one place outside that a page names
    environment = {
        "PATH": f"{root / '.venv/bin'}:/usr/bin:/bin", "HOME": str(root / "home"),
        "CALLS": str(calls), "RENDERED": str(root / "targets"), "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    script = f"set -euo pipefail\n{block}\nwait\n"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{done.stderr}\n{block}"
    lines = [json.loads(line) for line in calls.read_text().splitlines()]
    return [Call(Path(folder), program, words) for folder, program, *words in lines]


def check(call: Call) -> None:
    """Fails on a word that the program doesn't know, or a file that isn't there."""
    if call.program == "piflow":
        check_piflow(call)
    elif call.program == "ray":
        check_ray(call)
    elif call.program == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert set(call.words) <= set(targets)
    elif call.program == "pip":
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        named = re.findall(r"\[([\w,-]+)\]", " ".join(call.words))
        assert set(",".join(named).split(",")) <= set(extras["optional-dependencies"])
    elif call.program == "terraform" and call.words[0] == "output":
        assert f'output "{call.words[1]}"' in (call.folder / "outputs.tf").read_text()
    for word in call.words:
        if call.words[0] == "apply" and Path(word).parts[0] == "rendered":
            assert (call.folder / word / "kustomization.yaml").is_file(), word
        file = word.removeprefix("file://").partition("=")[2] or word.removeprefix("file://")
        if FILE.fullmatch(file):
            assert (call.folder / file).is_file(), f"{file}, which isn't there"


def parse(group: Any, words: Sequence[str], program: str) -> click.Context:
    """The command's own context, as the command line makes it.

    Raises:
        USAGE_ERRORS: there is no such command or option, or a word is missing.
    """
    outer = group.make_context(program, list(words), ignore_unknown_options=False)
    name, command, rest = group.resolve_command(outer, [*outer._protected_args, *outer.args])
    inner: click.Context = command.make_context(name, rest, parent=outer)
    return inner


def check_piflow(call: Call) -> None:
    """The words are the command line's, and overrides are keys of the recipe."""
    parameters = parse(typer.main.get_command(app), call.words, "piflow").params
    recipe = call.folder / str(parameters.get("recipe"))
    if recipe.is_file() and recipe.suffix == ".yaml" and "plugins" not in recipe.parts:
        load_recipe(recipe, [*(parameters.get("overrides") or ())])


def check_ray(call: Call) -> None:
    """The same of Ray's, and of the command that it runs on a cluster's head."""
    from ray.scripts.scripts import cli

    parameters = parse(cli, call.words, "ray").params
    if call.words[0] == "exec":
        words = shlex.split(parameters["cmd"])
        while "=" in words[0]:
            words.pop(0)
        check(Call(call.folder, words[0], words[1:]))


def blocks(page: str) -> Iterator[str]:
    text = (REPOSITORY / page).read_text()
    for found in BLOCK.finditer(text):
        yield found[2]


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))])
def test_the_commands_of_a_page_work(page: str, sandbox: Path) -> None:
    for block in blocks(page):
        for call in run(block, sandbox):
            try:
                check(call)
            except USAGE_ERRORS as error:
                told = error.format_message()
                pytest.fail(f"{page}: {call.program} {shlex.join(call.words)}: {told}")


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ("piflow distil my-recipe.yaml", "No such command"),
        ("piflow distill my-recipe.yaml --ste a=1", "No such option"),
        ("piflow distill my-recipe.yaml --set training.stepps=7", "stepps"),
        ("piflow render my-recipe.yaml --target aws --values other.yaml", "other.yaml"),
        ("make quickly", "quickly"),
        ("pip install 'piflow[clusters]'", "clusters"),
        ("ray up", "Missing argument"),
        ("piflow render my-recipe.yaml --target aws --values my-values.yaml --out rendered\n"
         "ray exec rendered/cluster.yaml 'A=b piflow preflights recipe.yaml'", "preflights"),
        ("kubectl apply -k rendered/nothing", "nothing"),
        ("cd infra/terraform/aws\nterraform output nothing", "nothing"),
        ("helm upgrade x -f infra/helm/other.yaml", "other.yaml"),
    ],
)  # fmt: skip
def test_a_mistake_would_be_found(block: str, told: str, sandbox: Path) -> None:
    with pytest.raises((*USAGE_ERRORS, AssertionError, ValueError)) as raised:
        for call in run(block, sandbox):
            check(call)
    error: Any = raised.value
    assert told in (error.format_message() if isinstance(error, USAGE_ERRORS) else str(error))


def test_commands_in_running_text_have_such_options() -> None:
    group: Any = typer.main.get_command(app)
    unknown = []
    for page in PAGES:
        for words in map(str.split, INLINE.findall((REPOSITORY / page).read_text())):
            command = group.commands.get(words[1])
            options = [] if command is None else [name for p in command.params for name in p.opts]
            asked = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
            if command is None or not set(asked) <= {*options, "--help"}:
                unknown.append((page, " ".join(words)))
    assert not unknown

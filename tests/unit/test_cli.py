"""The command line: help with examples, one-line errors, nothing heavy before a recipe is valid."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from piflow import cli
from piflow.config import load_recipe, parse_recipe

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / cli.DEFAULT_RECIPE
COMMANDS = sorted(
    command.name or getattr(command.callback, "__name__", "")
    for command in cli.app.registered_commands
)


def run_main(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """`piflow ARGUMENTS` in this process; the exit code."""
    monkeypatch.setattr(sys, "argv", ["piflow", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_all_pipelines_have_a_command() -> None:
    assert {"embed", "distill", "evaluate", "export", "sample", "pretrain", "demo", "smoke"} <= set(
        COMMANDS
    )


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"piflow {command}" in result.output.partition("Example:")[2].replace("\n", " ")


def test_recipe_prints_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(cli.app, ["recipe", str(RECIPE), "--set", "training.steps=7"])
    assert result.exit_code == 0
    assert parse_recipe(yaml.safe_load(result.output)) == load_recipe(RECIPE, ["training.steps=7"])


@pytest.mark.parametrize(
    "command", ["embed", "distill", "evaluate", "export", "demo", "smoke", "recipe"]
)
def test_a_wrong_key_is_one_message_and_exit_code_1(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_main(command, str(RECIPE), "--set", "training.lr=1e-4", monkeypatch=monkeypatch)
    captured = capsys.readouterr()
    assert code == 1
    assert "unknown key 'training.lr'" in captured.err and "optimizer" in captured.err
    assert "Traceback" not in captured.err + captured.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["distill", "none.yaml"], "recipe not found: none.yaml"),
        (["distill", str(RECIPE), "--set", "model"], "--set expects key=value"),
        (["sample", "nowhere", "--prompt", " "], "expected a prompt that says something"),
        (["sample", "nowhere", "--prompt", "cat"], "nowhere is not an adapter folder"),
        (["distill", str(REPOSITORY / "pipelines/recipes/emoji-teacher.yaml")], "piflow pretrain"),
        (["pretrain", str(RECIPE)], "use `piflow distill`"),
        (["evaluate", str(RECIPE), "--set", "run_dir=nowhere"], "no run in nowhere; start it"),
        (["export", str(RECIPE), "--set", "run_dir=nowhere"], "no run in nowhere; start it"),
        (["distill", str(RECIPE), "--set", "embed.store=nowhere"], "no embedding store at"),
        (["embed", str(RECIPE), "--set", "embed.prompts=none.txt"], "none.txt"),
    ],
)
def test_expected_mistakes(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(*arguments, monkeypatch=monkeypatch) == 1
    captured = capsys.readouterr()
    message = re.search(r"^piflow: .*", captured.err, re.M | re.S)  # after warnings of libraries
    assert message is not None and expected in message[0]
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "load_recipe", fail)
    return run_main("recipe", str(RECIPE), monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    "error", [RuntimeError("the library \x1b[2Jsays"), KeyError("x"), AssertionError(), TypeError()]
)
def test_the_unexpected_names_the_file_with_its_traceback(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    error.add_note("at postgresql://user:hunter2@host/db")
    assert failing(error, monkeypatch) == 70
    told = capsys.readouterr().err
    (file,) = (tmp_path / "piflow").iterdir()
    assert str(file) in told and type(error).__name__ in told
    assert "Traceback" not in told and "\x1b" not in told.replace("\x1b[31m", "").replace(
        "\x1b[0m", ""
    )
    kept = file.read_text()
    assert "Traceback" in kept and "postgresql://…@host/db" in kept and "hunter2" not in kept
    assert file.stat().st_mode & 0o077 == 0


def test_a_value_error_of_a_library_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def fail(*_: object) -> None:
        int("x")  # raised in this file, so not by piflow

    monkeypatch.setattr(cli, "load_recipe", fail)
    assert run_main("recipe", str(RECIPE), monkeypatch=monkeypatch) == 1
    (file,) = (tmp_path / "piflow").iterdir()
    told = capsys.readouterr().err
    assert "invalid literal for int" in told and str(file) in told


def test_where_no_file_can_be_written_the_traceback_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert failing(RuntimeError("lost?"), monkeypatch) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("ray", "pip install 'piflow[ray]'"),
        ("mlflow.tracking", "pip install 'piflow[mlflow]'"),
        ("boto3", "pip install 'piflow[s3]'"),
        ("deepspeed", "pip install 'piflow[deepspeed]'"),
        ("psycopg", "pip install 'psycopg[binary]'"),
        ("aiohttp", "pip install 'ray[default]'"),
    ],
)
def test_a_missing_package_says_what_to_install(
    module: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = ModuleNotFoundError(f"No module named {module!r}", name=module)
    wrapped = RuntimeError("could not start")
    wrapped.__cause__ = missing
    for error in (missing, wrapped):
        assert failing(error, monkeypatch) == 1
        assert expected in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_errors_behind_one_another_in_a_circle_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As urllib3's are, where a server doesn't answer."""
    first, second = ConnectionError("no server answers"), TimeoutError("too late")
    first.__cause__, second.__context__ = second, first
    assert failing(first, monkeypatch) == 75
    assert capsys.readouterr().err == "piflow: no server answers\n"


def test_extras_are_those_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for package, extra in cli._EXTRAS.items():
        name = extra.removeprefix("piflow[").removesuffix("]")
        wanted = " ".join(project["optional-dependencies"][name])
        assert package in wanted or package == "botocore", "boto3 brings it"


def test_wrong_usage_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main("distil", monkeypatch=monkeypatch) == 2
    assert "distil" in capsys.readouterr().err


def test_recipes_are_checked_before_anything_heavy_is_imported() -> None:
    """In a fresh interpreter: this one has torch already."""
    program = (
        "import sys\n"
        "from piflow import cli\n"
        f"sys.argv = ['piflow', 'distill', {str(RECIPE)!r}, '--set', 'training.lr=1']\n"
        "try:\n    cli.main()\nexcept SystemExit as error:\n    assert error.code == 1\n"
        "print([m for m in ('torch', 'ray', 'diffusers', 'mlflow', 'numpy', 'pyarrow')\n"
        "       if m in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True
    )
    assert result.stdout.strip() == "[]"


def test_smoke_of_a_recipe_that_distils_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    teacher = RECIPE.with_name("emoji-teacher.yaml")
    keep = tmp_path / "new"
    assert run_main("smoke", str(teacher), "--keep", str(keep), monkeypatch=monkeypatch) == 1
    assert "piflow pretrain" in capsys.readouterr().err
    assert not keep.exists()


def test_smoke_keeps_no_files_among_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("")
    assert run_main("smoke", str(RECIPE), "--keep", str(tmp_path), monkeypatch=monkeypatch) == 1
    assert f"{tmp_path} holds something" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("script", sorted((REPOSITORY / "pipelines").glob("*.py")), ids=str)
def test_a_pipeline_is_its_command(script: Path) -> None:
    """What schedulers start: the same options, the same errors, the same exit code."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    arguments = ["no-such.yaml", *(["--prompt", "x"] if script.stem == "sample" else [])]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1 and "piflow: " in done.stderr and "no-such.yaml" in done.stderr
    assert "Traceback" not in done.stderr

"""What goes along with a submitted job, and what never does."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from piflow.config import Recipe, load_recipe, parse_recipe
from piflow.jobs import arrival, package

RECIPE = Path(__file__).parents[3] / "pipelines/recipes/emoji-flux.yaml"


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(RECIPE)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def written(path: Path, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_the_recipe_alone_goes_along(recipe: Recipe, target: Path) -> None:
    packed = package.build(target, recipe)
    assert packed.files == ("piflow_arrival.py", "recipe.yaml")
    assert load_recipe(target / "recipe.yaml") == recipe
    assert load_recipe(target / "recipe.yaml").hash() == recipe.hash()


def test_modules_go_along_without_what_lies_among_them(
    recipe: Recipe, target: Path, tmp_path: Path
) -> None:
    own = tmp_path / "my_family"
    kept = ("__init__.py", "deep/backbone.py", "table.json")
    left = (
        ".env", ".env.local", ".git/config", "deep/id_ed25519", "deep/server.pem", "auth_token",
        "student.safetensors", "deep/model.bin", "runs/emoji/run.json", "mlruns/0/meta.yaml",
        "__pycache__/x.cpython-311.pyc", "mlflow.db", "my-service-account-1.json", "prod.ENV",
    )  # fmt: skip
    for name in (*kept, *left):
        written(own / name, name)
    (own / "link.py").symlink_to("/etc/passwd")
    packed = package.build(target, recipe, [own])
    assert packed.files == (
        "my_family/__init__.py", "my_family/deep/backbone.py", "my_family/table.json",
        "piflow_arrival.py", "recipe.yaml",
    )  # fmt: skip
    told = dict(packed.left_out)
    assert told["my_family/.env"] == "a secret" and told["my_family/link.py"] == "a link"
    assert told["my_family/student.safetensors"] == "weights"
    assert told["my_family/runs"] == "a run's"
    on_disk = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert on_disk == set(packed.files)


@pytest.mark.parametrize(
    "secret",
    [
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----",
        "key = 'AKIAIOSFODNN7EXAMPLE'",
        "token = 'hf_" + "a" * 34 + "'",
        "ghp_" + "a" * 36,
    ],
)
def test_a_file_that_holds_a_secret_is_refused(
    secret: str, recipe: Recipe, target: Path, tmp_path: Path
) -> None:
    module = written(tmp_path / "my_module.py", f"x = 1\n{secret}\n")
    with pytest.raises(package.PackageError, match=r"my_module\.py\. Take it out") as caught:
        package.build(target, recipe, [module])
    assert secret not in str(caught.value)
    assert list(target.iterdir()) == []


def test_what_is_too_large_is_refused_by_name(recipe: Recipe, target: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    with table.open("wb") as file:
        file.truncate(package.MAX_BYTES + 1)
    with pytest.raises(package.PackageError, match=r"table\.json \(20\.0 MiB\)"):
        package.build(target, recipe, [table])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch/__init__.py", "would hide the installed module torch"),
        ("random.py", "would hide the installed module random"),
        ("piflow/__init__.py", "would hide the installed module piflow"),
        ("server.pem", "looks like a secret"),
        ("student.safetensors", "looks like weights"),
    ],
)
def test_a_name_that_does_harm_is_refused(
    name: str, expected: str, recipe: Recipe, target: Path, tmp_path: Path
) -> None:
    path = written(tmp_path / "own" / name)
    named = path.parent if path.name == "__init__.py" else path
    with pytest.raises(package.PackageError, match=expected):
        package.build(target, recipe, [named])


def test_a_module_that_is_imported_from_there_goes_along(
    recipe: Recipe, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "own_family" / "__init__.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    packed = package.build(target, recipe, [tmp_path / "own_family"])
    assert "own_family/__init__.py" in packed.files


def test_what_is_missing_or_twice_there_is_refused(
    recipe: Recipe, target: Path, tmp_path: Path
) -> None:
    with pytest.raises(package.PackageError, match="is missing"):
        package.build(target, recipe, [tmp_path / "none.py"])
    twice = [written(tmp_path / folder / "same.py", folder) for folder in "ab"]
    with pytest.raises(package.PackageError, match="in the package already"):
        package.build(target, recipe, twice)


def test_prompts_beside_the_recipe_go_along(
    recipe: Recipe, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = recipe.model_dump(mode="json")
    tree["embed"]["prompts"] = "data/prompts.txt"
    beside = parse_recipe(tree)
    with pytest.raises(package.PackageError, match=r"embed\.prompts = data/prompts\.txt"):
        package.build(target, beside)
    written(tmp_path / "data/prompts.txt", "a cat\n")
    assert "data/prompts.txt" in package.build(target, beside).files
    assert (target / "data/prompts.txt").read_text() == "a cat\n"


def test_the_same_content_has_the_same_hash(recipe: Recipe, tmp_path: Path) -> None:
    hashes = set()
    for number, content in enumerate(["x = 1", "x = 1", "x = 2"]):
        module = written(tmp_path / str(number) / "own_module.py", content)
        folder = tmp_path / f"target-{number}"
        folder.mkdir()
        hashes.add(package.build(folder, recipe, [module]).sha256)
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--piflow", "0.0.1"], f"the cluster has piflow {version('piflow')}"),
        (
            ["--piflow", version("piflow"), "--module", "not_there=piflow[s3]"],
            "lacks not_there: pip install 'piflow[s3]' in it",
        ),
        (["--piflow", version("piflow"), "--module", "own="], "send it along: --with own"),
    ],
)
def test_an_image_that_cannot_run_the_job_says_so(arguments: list[str], expected: str) -> None:
    command = [sys.executable, str(Path(arrival.__file__)), *arguments]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 1 and expected in told.stderr
    assert arrival.ARRIVED not in told.stdout


def test_an_image_that_can_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(arrival.__file__)), "--piflow", version("piflow")]
    told = subprocess.run([*command, "--module", "json="], capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.startswith(arrival.ARRIVED)

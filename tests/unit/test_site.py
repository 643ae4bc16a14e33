"""The documentation builds into a site without a broken link, and needs no other server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import make_concept_pictures

REPOSITORY = Path(__file__).parents[2]
NUMBER = re.compile(r"-?\d+\.\d+")


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(site)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        command, cwd=source, env=quiet, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the site is made of, as a copy."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / "docs", folder / "docs")
    return folder


def test_the_site_builds_and_asks_no_other_server(source: Path, tmp_path: Path) -> None:
    built = build(source, tmp_path)
    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in (REPOSITORY / "docs").glob("*.md")} | {"changelog"}
    for name in pages - {"index"}:
        text = (tmp_path / name / "index.html").read_text()
        asked = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', text)
        assert asked == [], name
    assert (
        'href="../operations/#before-a-long-run"'
        in (tmp_path / "changelog" / "index.html").read_text()
    )


def test_planted_broken_links_are_refused(source: Path, tmp_path: Path) -> None:
    page = source / "docs" / "costs.md"
    whole = page.read_text()
    page.write_text(f"{whole}\n[a](no-such-page.md), [b](operations.md#no-such-heading)\n")
    try:
        built = build(source, tmp_path)
    finally:
        page.write_text(whole)
    assert built.returncode != 0
    assert "no-such-page.md" in built.stderr and "#no-such-heading" in built.stderr


def test_the_concepts_pictures_are_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change: python -m tests.golden.make_concept_pictures."""
    monkeypatch.setattr(make_concept_pictures, "FOLDER", tmp_path)
    make_concept_pictures.main()
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 3
    for path in drawn:
        fresh, kept = path.read_text(), (REPOSITORY / "docs" / path.name).read_text()
        assert NUMBER.sub("", fresh) == NUMBER.sub("", kept), path.name
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (fresh, kept)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.02)

"""Hooks of the documentation's site: pages from the repository's root, and links that leave docs/.

The Markdown files are written for whoever reads them in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie in the repository's root."""
    for page, name in FROM_ROOT.items():
        content = (ROOT / name).read_text().replace("](docs/", "](")
        for other, source in FROM_ROOT.items():
            content = content.replace(f"]({source}", f"]({other}")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, **named: Any) -> str:
    """Links to files of the repository become their bare names: the site doesn't hold them."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)

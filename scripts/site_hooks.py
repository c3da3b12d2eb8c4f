"""Hooks of `mkdocs build`: pages at the root of the repository, and files outside of docs/ that pages link to."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and below `source/` what any page links to outside of docs/."""
    for source, page in FROM_ROOT.items():
        text = (ROOT / source).read_text()
        text = LINK.sub(lambda link: link[1] + link[2].removeprefix("docs/") + link[3], text)
        files.append(File.generated(config, page, content=text, inclusion=_inclusion(page, config)))
    for file in files.documentation_pages():
        for _, target, _ in LINK.findall(file.content_string):
            place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(file.src_uri), target))
            outside = "://" not in target and not place.startswith("docs/") and (ROOT / place).is_file()
            if outside and files.get_file_from_path(_copy(place)) is None:
                files.append(File.generated(config, _copy(place), content=(ROOT / place).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of docs/ lead to the copies; what has none stays as it is, and fails a strict build."""

    def rewritten(link: re.Match[str]) -> str:
        folder = posixpath.dirname(page.file.src_uri)
        place = posixpath.normpath(posixpath.join("docs", folder, link[2]))
        if "://" in link[2] or files.get_file_from_path(_copy(place)) is None:
            return link[0]
        return link[1] + posixpath.relpath(_copy(place), folder or ".") + link[3]

    return LINK.sub(rewritten, markdown)


def _copy(place: str) -> str:
    """Where a file of the repository lies in the site; Markdown and Python keep their text as `.txt`."""
    return f"source/{place}.txt" if place.endswith((".py", ".md")) else f"source/{place}"


def _inclusion(page: str, config: Any) -> Any:
    from mkdocs.structure.files import InclusionLevel

    return InclusionLevel.INCLUDED if page == "changelog.md" else InclusionLevel.NOT_IN_NAV

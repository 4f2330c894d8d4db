"""mkdocs hooks that make the repository's pages and source files part of the site.

Pages are written to be read on a code host, so they link to each other and to source files by relative path. The hooks
add the pages that live outside docs/ (README.md is the home page), add one page per source file that is linked, and
rewrite the links accordingly. A link to a missing file stops the build.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *(f"{room}/README.md" for room in ("vjepa", "data", "launch", "benchmarks")),
)
OUTSIDE = {"index.md": "README.md", **{page: page for page in PAGES}}
"""Pages from outside docs/: their place in the site, and their path in the repository."""

LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".ipynb": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/ and the source files that any page links to."""
    for place, path in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text()))
    for file in list(files.documentation_pages()):
        for _, target, _, _ in LINK.findall(file.content_string):
            place = _place_of(file.src_uri, target)
            if place and place.startswith("source/") and place not in files.src_uris:
                files.append(
                    File.generated(config, place, content=_source_page(_repository_path(file.src_uri, target)))
                )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point relative links at the site's own pages."""

    def rewrite(match: re.Match[str]) -> str:
        head, target, anchor, tail = match.groups()
        place = _place_of(page.file.src_uri, target)
        if place is None:
            return match.group()
        return f"{head}{os.path.relpath(place, os.path.dirname(page.file.src_uri) or '.')}{anchor or ''}{tail}"

    return LINK.sub(rewrite, markdown)


def _repository_path(page: str, target: str) -> str:
    source = OUTSIDE.get(page, f"docs/{page}")
    return os.path.normpath(os.path.join(os.path.dirname(source), target))


def _place_of(page: str, target: str) -> str | None:
    """Return where the site keeps the target of a link, or None if the link does not point into the repository."""
    if "://" in target or target.startswith(("mailto:", "/")) or page.startswith("source/"):
        return None
    path = _repository_path(page, target)
    if not (ROOT / path).is_file():
        raise PluginError(f"{OUTSIDE.get(page, page)}: the link to {target} leads to {path}, which is not a file")
    for place, outside in OUTSIDE.items():
        if path == outside:
            return place
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def _source_page(path: str) -> str:
    language = LANGUAGES.get(PurePosixPath(path).suffix, "text")
    text = (ROOT / path).read_text()
    return f'---\nsearch: {{exclude: true}}\n---\n# `{path}`\n\n``````{language} linenums="1"\n{text}\n``````\n'

"""A hook of mkdocs (see mkdocs.yml): adds the generated reference and the pages that stand at the root of the
repository, where GitHub looks for them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # mkdocs loads this file by its path
    sys.path.insert(0, str(ROOT))

AT_THE_ROOT = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "LICENSE": "license.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from tools import reference

    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    for source, path in AT_THE_ROOT.items():
        text = (ROOT / source).read_text()
        text = moved(text) if source.endswith(".md") else f"# License\n\n```text\n{text}```\n"
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return without_source_links(linked_to_root(markdown, page.file.src_uri.count("/")))


def linked_to_root(text: str, depth: int) -> str:
    """Links of a page in ``docs/`` to pages at the root of the repository, as the site has them."""
    for source, path in AT_THE_ROOT.items():
        text = re.sub(rf"\]\({'../' * (depth + 1)}{source}(?=[)#])", f"]({'../' * depth}{path}", text)
    return text


def without_source_links(text: str) -> str:
    """Links to source files lead somewhere on GitHub alone; the site shows the path."""
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)+(?!docs/)[\w./-]+\.py\)", r"\1", text)


def moved(text: str) -> str:
    """A page of the root with its links as they are from ``docs/``."""
    for source, path in AT_THE_ROOT.items():
        text = re.sub(rf"\]\({source}(?=[)#])", f"]({path}", text)
    return re.sub(r"\]\(docs/", "](", text)

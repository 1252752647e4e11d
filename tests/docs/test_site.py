"""The site builds offline and strictly, and loads nothing from another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from tools import site as hook


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text()):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), (page, tag)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", sheet.read_text()), sheet


def test_each_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        path = page.relative_to(ROOT / "docs").with_suffix("")
        file = site / path.parent / "index.html" if path.name == "index" else site / path / "index.html"
        assert file.is_file(), page
    assert (site / "reference/service-config/index.html").is_file()
    assert (site / "contributing/index.html").is_file()


def test_lists_and_tables_are_rendered(site: Path) -> None:
    """Python-Markdown wants an empty line in front of them where GitHub does not."""
    for page in site.rglob("*.html"):
        for text in re.findall(r"<p>(.*?)</p>", page.read_text(), re.DOTALL):
            assert not re.search(r"\n\s*(?:-|\d+\.|\|) |\| --- ", text), (page, text)


def test_links_of_pages_of_the_root_are_moved() -> None:
    text = "[a](docs/cli.md#x) [b](CHANGELOG.md) [c](https://x/docs/) [d](SECURITY.md#y) [e](LICENSE)"
    wanted = "[a](cli.md#x) [b](changelog.md) [c](https://x/docs/) [d](security.md#y) [e](license.md)"
    assert hook.moved(text) == wanted


def test_links_to_source_files_become_text() -> None:
    text = "[`a/b.py`](../a/b.py) [c](../cli.md) [d](how-to/spot.md#x)"
    assert hook.without_source_links(text) == "`a/b.py` [c](../cli.md) [d](how-to/spot.md#x)"


def test_links_to_pages_of_the_root_lead_into_the_site() -> None:
    assert hook.linked_to_root("[a](../SECURITY.md#x)", 0) == "[a](security.md#x)"
    assert hook.linked_to_root("[a](../../LICENSE) [b](../LICENSE)", 1) == "[a](../license.md) [b](../LICENSE)"

"""The word check finds what it should, with file and line."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tools import words
from tools.words import LIST, Words, check, main

SOURCE = '''"""What was
asked for."""
# it honours
# nothing
raise InvalidRequest(f"The {x} is no "
                     f"mapping.", remedy="There is no other.")
raise RuntimeError("its story")


class Full(CloudError):
    pass


raise contract.Full("its timetable")
KEPT = "its story"  # words: ok
CODE = "the column ``story`` of a `timetable`"
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(words, "ROOT", tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "code.py").write_text(SOURCE)
    (tmp_path / "page.md").write_text("Fine.\n\n```sh\necho story\n```\nA `story` and a\nstory.\n")
    return tmp_path


def found(**scope: list[str]) -> list[tuple[str, int, str]]:
    listed = Words(tomllib.loads(LIST.read_text())["words"])
    given = {"everything": [], "only_errors": [], "pages": []} | scope
    return [(f.file, f.line, f.word) for f in check(listed, **given)]  # type: ignore[arg-type]


def test_strings_docstrings_and_comments_of_a_folder(folder: Path) -> None:
    assert found(everything=["some"]) == [
        ("some/code.py", 2, "asked for"),
        ("some/code.py", 3, "honours"),
        ("some/code.py", 5, "is no"),
        ("some/code.py", 7, "story"),
        ("some/code.py", 14, "timetable"),
    ]


def test_a_file_whose_bytes_must_stay_is_left_out(folder: Path) -> None:
    assert found(everything=["some"], frozen=["some/code.py"]) == []


def test_only_the_texts_of_errors(folder: Path) -> None:
    assert found(only_errors=["some"]) == [("some/code.py", 5, "is no"), ("some/code.py", 14, "timetable")]


def test_prose_without_its_code(folder: Path) -> None:
    assert found(pages=["*.md"]) == [("page.md", 7, "story")]


def test_a_finding_says_what_to_write(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prose", "*.md"]) == 1
    assert capsys.readouterr().out == 'page.md:7: "story": write events\n'


def test_the_tree_is_clean() -> None:
    assert main([]) == 0

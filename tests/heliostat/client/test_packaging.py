"""Directories to zips: the same content gives the same bytes, and what can't be packed is named."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliostat.client.packaging import DEFAULT_EXCLUDES, pack_module, pack_working_dir, walk
from heliostat.errors import InvalidRequest, TooLarge

NAMES = st.text(st.sampled_from("abcXYZ019._- é"), min_size=1, max_size=6).filter(
    lambda n: n.strip(". ") and n != "venv"
)
TREES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=3).map(tuple),
    st.tuples(st.binary(max_size=300), st.booleans()),
    min_size=1,
    max_size=8,
)


def build(root: Path, tree: dict[tuple[str, ...], tuple[bytes, bool]]) -> dict[str, tuple[bytes, bool]]:
    """Writes what fits together (a name can't be file and directory); returns what was written."""
    written = {}
    for parts, (content, executable) in tree.items():
        path = root.joinpath(*parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except (FileExistsError, IsADirectoryError, NotADirectoryError):
            continue
        path.chmod(0o755 if executable else 0o644)
        written["/".join(parts)] = (content, executable)
    return written


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(TREES, st.randoms(use_true_random=False))
def test_the_same_content_gives_the_same_bytes(tree, random) -> None:  # type: ignore[no-untyped-def]
    with tempfile.TemporaryDirectory() as scratch:
        one, other = Path(scratch, "one"), Path(scratch, "elsewhere")
        one.mkdir()
        other.mkdir()
        items = list(tree.items())
        written = build(one, dict(items))
        again = [(parts, tree[parts]) for parts in (tuple(name.split("/")) for name in written)]
        random.shuffle(again)
        build(other, dict(again))
        for path in other.rglob("*"):
            if path.is_file():
                os.utime(path, (random.randrange(2**31), random.randrange(2**31)))
                path.chmod(path.stat().st_mode | 0o060)  # group's rights are not ours to tell
        for root in (one, other):  # empty directories that failed writes left behind
            for path in sorted(root.rglob("*"), reverse=True):
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
        first, second = pack_working_dir(one), pack_working_dir(other)
        try:
            assert first.sha256 == second.sha256 == hashlib.sha256(first.path.read_bytes()).hexdigest()
            assert first.path.read_bytes() == second.path.read_bytes()
            assert first.size == first.path.stat().st_size
            with zipfile.ZipFile(first.path) as packed:
                assert {n.removeprefix("pkg/"): packed.read(n) for n in packed.namelist()} == {
                    k: v[0] for k, v in written.items()
                }
                for info in packed.infolist():
                    assert (info.external_attr >> 16) & 0o777 == (
                        0o755 if written[info.filename.removeprefix("pkg/")][1] else 0o644
                    )
        finally:
            first.discard()
            second.discard()


def names(package) -> list[str]:  # type: ignore[no-untyped-def]
    with zipfile.ZipFile(package.path) as packed:
        found = packed.namelist()
    package.discard()
    return found


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        full = root / path
        if path.endswith("/"):
            full.mkdir(parents=True)
        else:
            full.parent.mkdir(parents=True, exist_ok=True)
            full.write_text(path)
    return root


def test_defaults_are_left_out_and_empty_directories_kept(tmp_path: Path) -> None:
    make(
        tmp_path,
        ".git/config",
        ".venv/x",
        "venv/y",
        "a/__pycache__/z.pyc",
        "a/b.py",
        "out/",
        "main.py",
        ".env",
        ".gitignore",
    )
    assert names(pack_working_dir(tmp_path)) == ["pkg/.env", "pkg/.gitignore", "pkg/a/b.py", "pkg/main.py", "pkg/out/"]


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["*.log"], ["a/deep/x.csv", "a/x.csv", "data/in/x.csv", "data/x.csv", "main.py"]),
        (["data/"], ["a/deep/x.csv", "a/run.log", "a/x.csv", "main.py", "run.log"]),
        (["/data"], ["a/deep/x.csv", "a/run.log", "a/x.csv", "main.py", "run.log"]),
        (["x.csv"], ["a/run.log", "main.py", "run.log"]),
        (["a/*.csv"], ["a/deep/x.csv", "a/run.log", "data/in/x.csv", "data/x.csv", "main.py", "run.log"]),
        (["a/**/x.csv"], ["a/run.log", "data/in/x.csv", "data/x.csv", "main.py", "run.log"]),
        (["**/deep"], ["a/run.log", "a/x.csv", "data/in/x.csv", "data/x.csv", "main.py", "run.log"]),
        (["main.py/"], ["a/deep/x.csv", "a/run.log", "a/x.csv", "data/in/x.csv", "data/x.csv", "main.py", "run.log"]),
        (["[!m]*"], ["main.py"]),
        (["?.csv", "./a/run.log"], ["main.py", "run.log"]),
        (["*.csv", "!a/x.csv"], ["a/run.log", "a/x.csv", "main.py", "run.log"]),
        (["*.csv", "!a/x.csv", "*.csv"], ["a/run.log", "main.py", "run.log"]),
        (["*.csv", "!./a/x.csv"], ["a/run.log", "a/x.csv", "main.py", "run.log"]),
        (["a/", "!a/x.csv"], ["data/in/x.csv", "data/x.csv", "main.py", "run.log"]),
        (["a/*", "!a/x.csv"], ["a/x.csv", "data/in/x.csv", "data/x.csv", "main.py", "run.log"]),
    ],
)
def test_excludes_read_like_gitignore(tmp_path: Path, patterns: list[str], left: list[str]) -> None:
    make(tmp_path, "main.py", "run.log", "a/run.log", "a/x.csv", "a/deep/x.csv", "data/x.csv", "data/in/x.csv")
    assert sorted(e.name for e in walk(tmp_path, patterns) if not e.name.endswith("/")) == left


TREE = (
    "main.py", "run.log", "src/app.py", "src/secrets/k.pem", "src/venv/w.py", "src/sub/x.csv", "secrets/a.pem",
    "data/keep.csv", "data/sub/x.csv", "data/sub/keep.csv", "a/b/c/x.csv", "venv/lib.py",
)  # fmt: skip
PIECES = (
    "src/", "/src", "src/**", "src/*", "secrets/", "secrets", "**/secrets", "src/secrets", "data", "data/", "data/**",
    "data/sub/", "data/*/x.csv", "*.csv", "keep.csv", "data/keep.csv", "/*", "*", "*/", "**/", "**", "a/**/c", "a/b/",
    "x.csv", "**/sub/**", "venv/", "/venv", "*.p?", "src/venv/w.py",
)  # fmt: skip


def lists_of_patterns() -> Iterator[list[str]]:
    yield from (["!src/**", "secrets/"], ["!src/**", "src/secrets"], ["secrets/", "/*", "!/src/"], ["!src/"])
    yield from (["data/sub/", "!data"], ["data/**", "!data/keep.csv"], ["data/**"], ["a/**/", "!a/b/c/"])
    chance = random.Random(20261201)
    for _ in range(300):
        yield [chance.choice(["", "", "!"]) + chance.choice(PIECES) for _ in range(chance.randint(1, 4))]


def test_excludes_mean_what_they_mean_to_git(tmp_path: Path) -> None:
    """An exclude that is read in another way uploads what was meant to stay, a key for example."""
    tree, excludes = tmp_path / "tree", tmp_path / "excludes"
    make(tree, *TREE)
    subprocess.run(["git", "init", "--quiet", str(tree)], check=True)
    for patterns in lists_of_patterns():
        excludes.write_text("".join(f"{line}\n" for line in [*DEFAULT_EXCLUDES, *patterns]))
        command = ["git", "-C", str(tree), "ls-files", "--others", "--exclude-from", str(excludes)]
        by_git = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        ours = sorted(
            e.name for e in walk(tree, patterns) if not e.name.endswith("/") and not e.name.startswith(".git/")
        )
        assert ours == sorted(by_git), patterns


def test_a_default_can_be_brought_back(tmp_path: Path) -> None:
    make(tmp_path, "venv/x", "sub/venv/y", "main.py", ".git/config")
    assert names(pack_working_dir(tmp_path, ["!/venv/"])) == ["pkg/main.py", "pkg/sub/", "pkg/venv/x"]


@pytest.mark.parametrize("pattern", ["!", "", " ", "/", "[z-a]", "# data"])
def test_a_pattern_that_says_nothing_is_refused(tmp_path: Path, pattern: str) -> None:
    make(tmp_path, "main.py")
    with pytest.raises(InvalidRequest) as caught:
        pack_working_dir(tmp_path, [pattern])
    assert caught.value.field == "excludes"
    assert repr(pattern) in caught.value.message


def test_links_are_packed_as_what_they_lead_to(tmp_path: Path) -> None:
    root = make(tmp_path / "root", "main.py")
    make(tmp_path / "shared", "lib.py")
    (root / "shared").symlink_to(tmp_path / "shared")
    (root / "alias.py").symlink_to("main.py")
    package = pack_working_dir(root)
    with zipfile.ZipFile(package.path) as packed:
        assert packed.read("pkg/shared/lib.py") == b"lib.py"
        assert packed.read("pkg/alias.py") == b"main.py"
    package.discard()


def test_what_is_no_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    root = make(tmp_path / "root", "a/main.py")
    for trouble, prepare in {
        "a/loop": lambda p: p.symlink_to(root),
        "a/nowhere": lambda p: p.symlink_to("gone"),
        "a/pipe": os.mkfifo,
    }.items():
        path = root / trouble
        prepare(path)
        with pytest.raises(InvalidRequest) as caught:
            pack_working_dir(root)
        assert path.name in caught.value.message
        pattern = caught.value.remedy.split("'")[1]
        assert names(pack_working_dir(root, [pattern])) == ["pkg/a/main.py"], "the remedy works"
        path.unlink()


@pytest.mark.parametrize("what", ["missing", "file", "empty", "all_excluded"])
def test_a_directory_that_is_none_is_refused_by_name(tmp_path: Path, what: str) -> None:
    make(tmp_path, "file", "empty/", "all_excluded/.git/config")
    with pytest.raises(InvalidRequest, match=what) as caught:
        pack_working_dir(tmp_path / what)
    assert caught.value.field == "working_dir"


def test_too_much_is_refused_before_it_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    root = make(tmp_path / "root", "main.py")
    for i in range(6):
        with (root / f"weights{i}.bin").open("wb") as sparse:
            sparse.truncate((i + 1) * 2**28)  # 5.25 GiB, and no byte of it on disk
    with pytest.raises(TooLarge) as caught:
        pack_working_dir(root)
    assert "5.3 GiB" in caught.value.message
    assert "2.0 GiB" in caught.value.message
    assert [e["name"] for e in caught.value.details["largest"]] == [f"weights{i}.bin" for i in (5, 4, 3, 2, 1)]
    assert "-e" in caught.value.remedy
    assert list(scratch.iterdir()) == []
    package = pack_working_dir(root, ["*.bin"])
    assert names(package) == ["pkg/main.py"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "open", full)
    with pytest.raises(InvalidRequest, match="No space left") as caught:
        pack_working_dir(make(tmp_path / "root", "main.py"))
    assert "TMPDIR" in caught.value.remedy
    assert list(scratch.iterdir()) == []


def test_modules_can_be_imported_by_their_own_name(tmp_path: Path) -> None:
    make(
        tmp_path,
        "helpers/__init__.py",
        "helpers/sub/x.py",
        "helpers/__pycache__/x.pyc",
        "single.py",
        "bad-name/x.py",
        "a.whl",
    )
    assert names(pack_module(tmp_path / "helpers")) == ["pkg/helpers/__init__.py", "pkg/helpers/sub/x.py"]
    assert names(pack_module(tmp_path / "single.py")) == ["pkg/single.py"]
    with pytest.raises(InvalidRequest, match="identifier"):
        pack_module(tmp_path / "bad-name")
    with pytest.raises(InvalidRequest, match="neither") as caught:
        pack_module(tmp_path / "a.whl")
    assert "requirements" in caught.value.remedy
    with pytest.raises(InvalidRequest, match="no directory"):
        pack_module(tmp_path / "none")


@pytest.mark.long
def test_a_large_directory_is_never_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    root = tmp_path / "root"
    root.mkdir()
    with (root / "big").open("wb") as big:
        big.truncate(200 * 2**20)
    tracemalloc.start()
    package = pack_working_dir(root)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    package.discard()
    assert peak < 16 * 2**20
    shutil.rmtree(root)

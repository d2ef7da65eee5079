"""Folders: whole writes, round trips under odd names, plain errors, digests."""

import contextlib
import hashlib
import os
import pickle
import resource
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ask_ray.config import UserError
from ask_ray.storage import Folder, StorageError, digest_bytes, digest_file


def walk_files(root: Path) -> list[Path]:
    """Every file below a folder, sorted."""
    return sorted(path for path in root.rglob("*") if path.is_file())


NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=20).filter(
    lambda name: name.strip(".") and len(name.encode()) < 100
)


@contextlib.contextmanager
def files_no_larger_than(size: int):
    """A disk that is full, as far as one file is concerned."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failing_write_leaves_the_old_file_and_no_litter(tmp_path):
    folder = Folder.at(str(tmp_path))
    folder.write("a.bin", b"old")
    with files_no_larger_than(1 << 16), pytest.raises(OSError):
        folder.write("a.bin", bytes(1 << 20))
    assert folder.read("a.bin") == b"old"
    assert folder.names() == ["a.bin"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    folder = Folder.at(str(tmp_path))
    contents = [bytes([n]) * (1 << 20) for n in range(2)]
    folder.write("a.bin", contents[0])
    done = threading.Event()

    def rewrite():
        for n in range(60):
            folder.write("a.bin", contents[n % 2])
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    reads = 0
    while not done.is_set() or reads == 0:
        assert folder.read("a.bin") in contents
        reads += 1
    writer.join()
    assert folder.names() == ["a.bin"]


def test_a_relative_path_means_the_same_after_changing_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder.at("runs/../kept")
    monkeypatch.chdir("/")
    folder.write("a", b"1")
    assert (tmp_path / "kept" / "a").read_bytes() == b"1"
    assert folder.uri == str(tmp_path.resolve() / "kept")
    assert folder.local == tmp_path.resolve() / "kept"


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder.at("~/runs").uri == str(tmp_path.resolve() / "runs")


def test_a_file_uri_is_the_local_folder(tmp_path):
    folder = Folder.at(f"file://{tmp_path}/")
    (folder / "inner").write("a", b"1")
    assert (tmp_path / "inner" / "a").read_bytes() == b"1"
    assert folder.local == tmp_path
    assert str(folder / "inner") == f"file://{tmp_path}/inner"


@given(name=NAMES, file=NAMES, content=st.binary(max_size=64))
@budget(max_examples=60, deadline=None)
def test_any_name_and_content_come_back(name, file, content, tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    folder = Folder.at(str(root)) / name
    assert not folder.exists()
    folder.write(file, content)
    assert (root / name / file).read_bytes() == folder.read(file) == content
    assert folder.names() == [file]
    assert folder.exists()
    assert folder.exists(file)
    assert folder.name == name
    folder.delete()
    assert not folder.exists()
    assert list(root.iterdir()) == []


def test_what_is_not_there(tmp_path):
    folder = Folder.at(str(tmp_path / "no"))
    assert (folder.exists(), folder.exists("a"), folder.names()) == (False, False, [])
    folder.delete()
    with pytest.raises(FileNotFoundError):
        folder.read("a")


def test_names_are_sorted_and_of_this_folder_only(tmp_path):
    folder = Folder.at(str(tmp_path))
    for name in ("b", "a", "c"):
        folder.write(name, b"")
    (folder / "inner").write("deep", b"")
    assert folder.names() == ["a", "b", "c", "inner"]


def test_changed_is_the_time_of_the_last_write(tmp_path):
    folder = Folder.at(str(tmp_path))
    folder.write("a", b"")
    os.utime(tmp_path / "a", (0, 1234.5))
    assert folder.changed("a") == 1234.5
    assert folder.changed("no") == 0


def test_json_comes_back_and_can_be_read(tmp_path):
    folder = Folder.at(str(tmp_path))
    value = {"ä": [1, 2.5, None, True], "b": {"c": "→"}}
    folder.write_json("a.json", value)
    assert folder.read_json("a.json") == value
    assert "ä" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_upload_and_download_keep_the_whole_tree(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "a").write_bytes(b"1")
    (source / "deep" / "er" / "b c").write_bytes(b"2")
    folder = Folder.at(str(tmp_path / "kept" / "x"))
    folder.upload(source)
    folder.download(target)
    found = {str(path.relative_to(target)): path.read_bytes() for path in walk_files(target)}
    assert found == {"a": b"1", "deep/er/b c": b"2"}


def test_a_folder_can_be_handed_to_another_process(tmp_path):
    folder = Folder.at(str(tmp_path)) / "x"
    assert pickle.loads(pickle.dumps(folder)) == folder


@pytest.mark.parametrize("place", ["nosuch://bucket/x", "ftp://host/x"])
def test_an_unknown_scheme_is_a_storage_error(place):
    with pytest.raises(StorageError) as refusal:
        Folder.at(place).exists()
    assert place in str(refusal.value)
    assert isinstance(refusal.value, UserError)
    with pytest.raises(StorageError, match=r"run\.storage"):
        Folder.at(place).check_writable("run.storage")


def test_a_place_that_cannot_be_written_is_named_with_its_setting(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    place = tmp_path / "file" / "below"
    with pytest.raises(StorageError) as refusal:
        Folder.at(str(place)).check_writable("data.prepared")
    assert str(refusal.value).startswith("data.prepared: ")
    assert str(place) in str(refusal.value)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_check_leaves_nothing_behind(tmp_path):
    folder = Folder.at(str(tmp_path / "new"))
    folder.check_writable("run.storage")
    assert folder.names() == []


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, (1 << 22) + 1])
def test_a_file_and_its_bytes_have_one_digest(size, tmp_path):
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    assert digest_file(tmp_path / "a") == digest_bytes(content) == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_a_digest_sees_every_byte():
    assert len({digest_bytes(b"abc"), digest_bytes(b"abd"), digest_bytes(b"abc\0")}) == 3
    assert digest_bytes(b"") == "cae66941d9efbd404e4d88758ea67670"

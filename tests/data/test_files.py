"""Files: which are there, and whether what cannot be used is their fault or the storage's."""

import errno
from pathlib import Path

import pytest

from ask_ray.data import files
from ask_ray.data.schema import UnusableClip
from ask_ray.storage import StorageError


def test_a_file_is_there_and_nothing_else_is(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    names = ("a", "link", "broken", "gone", ".", "a/b", "x" * 300, "null\0byte")
    assert [name for name in names if files.is_there(tmp_path / name)] == ["a", "link"]


def test_an_empty_file_is_set_aside_and_one_that_is_not_there(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"x")
    with pytest.raises(UnusableClip, match="holds no bytes"):
        files.present(tmp_path / "a")
    with pytest.raises(UnusableClip, match="is not there"):
        files.present(tmp_path / "gone")
    files.present(tmp_path / "b")


def test_a_file_of_which_nothing_can_be_told_is_not_a_missing_one(tmp_path, monkeypatch):
    def fails(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "stat", fails)
    with pytest.raises(StorageError, match=rf"^whether {tmp_path / 'a'} is there cannot be told on .*: .*Stale file handle"):
        files.is_there(tmp_path / "a")


def test_storage_that_fails_is_told_from_a_file_that_can_be_read(tmp_path):
    """Linux gives the error of a failing disk (EIO) for the first bytes of a process's memory."""
    (tmp_path / "a").write_bytes(bytes(3 << 20))
    files.read_through(tmp_path / "a")
    for path, problem in ((tmp_path / "gone", "No such file"), (Path("/proc/self/mem"), "Input/output error")):
        with pytest.raises(StorageError, match=rf"^{path} was there .*{problem}.* the same path: mount them there, or mend"):
            files.read_through(path)

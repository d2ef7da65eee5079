"""Folders that go with their process: also where nodes share a temporary folder, and where its filesystem has no locks."""

import errno
import fcntl
import os
import socket
import tempfile
from pathlib import Path

import pytest

from ask_ray import scratch

KIND = "things"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's temporary folder is the test's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def left(kind: str = KIND) -> Path:
    """A folder whose process is gone."""
    made, lease = scratch.make(kind)
    os.close(lease)
    return made


def no_locks(descriptor: int, how: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_folder_stays_while_it_is_held_and_goes_with_the_next_of_its_kind():
    held, lease = scratch.make(KIND)
    left()
    assert held.is_dir()
    os.close(lease)
    left("others")
    assert held.is_dir()
    left()
    assert not held.exists()


def test_a_node_removes_nothing_of_another_one_with_the_same_temporary_folder(monkeypatch):
    """Its locks tell nothing of the other's processes."""
    theirs = left()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another-node")
        scratch.tidy(KIND)
        left()
        assert theirs.is_dir()
    scratch.tidy(KIND)
    assert not theirs.exists()


def test_without_locks_folders_are_made_and_none_is_removed(monkeypatch):
    before = left()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    made = [left(), left()]
    scratch.tidy(KIND)
    assert all(folder.is_dir() for folder in (before, *made))
    assert len({before, *made}) == 3

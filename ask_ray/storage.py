"""Folders at a local path or a URI, through pyarrow's filesystems, and the digests that guard what is kept there."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from ask_ray.config import UserError


class StorageError(UserError, OSError):
    """Storage that cannot be reached, read or written. The message names the place and what to do."""


@dataclass(frozen=True)
class Folder:
    """A folder on any storage that :mod:`pyarrow.fs` knows: a local path, ``file://``, ``s3://``, ``gs://``.

    Picklable, so that actors and workers can be handed one.
    """

    uri: str

    @classmethod
    def at(cls, place: str) -> Folder:
        """The folder at a path or URI; a relative local path is made absolute, so that it means the same everywhere."""
        if "://" in place:
            return cls(place.rstrip("/"))
        return cls(str(Path(place).expanduser().resolve()))

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.uri.rpartition("/")[2]

    @property
    def local(self) -> Path | None:
        """The path, if this is on a local filesystem."""
        filesystem, path = self.resolve()
        return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None

    def resolve(self) -> tuple[fs.FileSystem, str]:
        """The filesystem and the path in it.

        Raises:
            StorageError: if the URI's scheme or host is unknown.
        """
        try:
            filesystem, path = fs.FileSystem.from_uri(self.uri)
        except (ValueError, OSError) as error:
            raise StorageError(f"{self.uri}: not a place that can be opened ({error}); give a path or a URI") from error
        return filesystem, path

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        filesystem, path = self.resolve()
        return bool(filesystem.get_file_info(f"{path}/{name}" if name else path).type != fs.FileType.NotFound)

    def changed(self, name: str) -> float:
        """When a file was last changed, in seconds (Unix); 0 if the storage does not say."""
        filesystem, path = self.resolve()
        return (filesystem.get_file_info(f"{path}/{name}").mtime_ns or 0) / 1e9

    def names(self) -> list[str]:
        """Names of the files and folders in it, sorted; empty if the folder does not exist."""
        filesystem, path = self.resolve()
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: if it is not there.
        """
        filesystem, path = self.resolve()
        with filesystem.open_input_stream(f"{path}/{name}") as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole: on a local filesystem under a temporary name first, so that no reader sees half of it."""
        filesystem, path = self.resolve()
        filesystem.create_dir(path, recursive=True)
        local = isinstance(filesystem, fs.LocalFileSystem)
        target = f"{path}/{name}"
        written = f"{path}/.{name}.{uuid.uuid4().hex}" if local else target
        try:
            with filesystem.open_output_stream(written) as stream:
                stream.write(content)
        except BaseException:
            if local:
                Path(written).unlink(missing_ok=True)
            raise
        if local:
            Path(written).replace(target)

    def read_json(self, name: str) -> Any:
        """A JSON file's value."""
        return json.loads(self.read(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as indented JSON."""
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def upload(self, source: Path) -> None:
        """Copy a local folder's files here."""
        filesystem, path = self.resolve()
        filesystem.create_dir(path, recursive=True)
        fs.copy_files(str(source), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)

    def download(self, target: Path) -> None:
        """Copy this folder's files to a local folder."""
        filesystem, path = self.resolve()
        target.mkdir(parents=True, exist_ok=True)
        fs.copy_files(path, str(target), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())

    def delete(self) -> None:
        """Remove the folder and all in it; nothing happens if it is not there."""
        local = self.local
        if local is not None:
            shutil.rmtree(local, ignore_errors=True)
        elif self.exists():
            filesystem, path = self.resolve()
            filesystem.delete_dir(path)

    def check_writable(self, setting: str) -> None:
        """Write and remove a small file.

        Raises:
            StorageError: naming `setting`, the place and the cause.
        """
        probe = f".write-test-{uuid.uuid4().hex}"
        try:
            self.write(probe, b"")
            filesystem, path = self.resolve()
            filesystem.delete_file(f"{path}/{probe}")
        except OSError as error:
            raise StorageError(f"{setting}: cannot write to {self.uri} ({error}); choose a folder you can write") from error


def digest_bytes(content: bytes) -> str:
    """A 128-bit BLAKE2b digest as 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """:func:`digest_bytes` of a local file, read in pieces."""
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            state.update(piece)
    return state.hexdigest()

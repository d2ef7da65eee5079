"""Folders at a local path or a URI, through pyarrow's filesystems, and the digests that guard what is kept there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

from pyarrow import NativeFile, fs

from ask_ray.config import UserError

#: What may stand in the query of an ``s3://`` URI.
S3_OPTIONS = ("region", "scheme", "endpoint_override")

#: Seconds for which storage that is away is tried again, and the longest pause between two tries. Ray Train itself tries an
#: upload up to three times, and a process group waits for a rank half an hour.
PATIENCE, LONGEST_PAUSE = 300.0, 15.0


class StorageError(UserError, OSError):
    """Storage that cannot be reached, read or written. The message names the place and what to do."""


Made = TypeVar("Made")
Tell = Callable[[StorageError], None]


def patiently(act: Callable[[], Made], tell: Tell, stopped: threading.Event | None = None) -> Made:
    """What `act` returns. Storage that is away is tried again for :data:`PATIENCE` from its first failure on, or until `stopped`
    is set; `tell` hears of every failure.

    Raises:
        StorageError: the last one.
    """
    end, pause = math.inf, 0.5
    stopped = stopped or threading.Event()
    while True:
        try:
            return act()
        except StorageError as error:
            tell(error)
            end = min(end, time.monotonic() + PATIENCE)
            if time.monotonic() + pause > end or stopped.wait(pause):
                raise
        pause = min(2 * pause, LONGEST_PAUSE)


def expanded(given: str | Path) -> Path:
    """A path on this machine, with the home that `~` or `~name` stands for.

    Raises:
        StorageError: if nobody of that name has one.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise StorageError(f"{given} is no path on this machine ({error}); give another") from error


def local_path(given: str | Path) -> Path:
    """:func:`expanded`, absolute and without links, so that it means the same everywhere.

    Raises:
        StorageError: if it is none, or its links lead round in a circle.
    """
    try:
        return expanded(given).resolve()
    except RuntimeError as error:
        raise StorageError(f"{given} is no path on this machine ({error}); give another") from error


def is_folder(path: Path) -> bool:
    """Whether a folder is there and can be looked at: ``Path.is_dir`` raises for one that cannot."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Whether a file is there and can be looked at: ``Path.is_file`` raises for one that cannot."""
    try:
        return path.is_file()
    except OSError:
        return False


def masked(text: str) -> str:
    """A text whose URIs show no credentials."""
    return re.sub(r"://[^@?\s]*:[^@?\s]*@", "://***@", text)


@dataclass(frozen=True, repr=False)
class Folder:
    """A folder on any storage that :mod:`pyarrow.fs` knows: a local path, ``file://``, ``s3://``, ``gs://``.

    ``s3://[KEY:SECRET@]bucket/path[?region=…&endpoint_override=host:port&scheme=http]``: what the URI leaves out comes from the
    places that AWS's tools read (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``~/.aws``, …). Picklable, so that actors and
    workers can be handed one; `uri` is what opens it again, :class:`str` what may be shown.

    Methods that reach for the storage raise :class:`StorageError` if it fails them.
    """

    uri: str

    @classmethod
    def at(cls, place: str) -> Folder:
        """The folder at a path or URI; a relative local path is made absolute, so that it means the same everywhere."""
        if "://" in place:
            scheme, _, path = place.partition("://")
            path, mark, query = path.partition("?")
            return cls(f"{scheme}://{path.rstrip('/')}{mark}{query}")
        return cls(str(local_path(place)))

    @property
    def _parts(self) -> tuple[str, str]:
        """The URI up to its query, and the query with its question mark, if there is one."""
        path, mark, query = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return path, mark + query

    def __truediv__(self, name: str) -> Folder:
        path, query = self._parts
        return Folder(f"{path}/{name}{query}")

    def __str__(self) -> str:
        return masked(self.uri)

    def __repr__(self) -> str:
        return f"Folder({str(self)!r})"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._parts[0].rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        """The folder that holds this one."""
        path, query = self._parts
        return Folder(path.rpartition("/")[0] + query)

    @property
    def local(self) -> Path | None:
        """The path, if this is on a local filesystem."""
        filesystem, path = self.resolve()
        return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None

    def resolve(self) -> tuple[fs.FileSystem, str]:
        """The filesystem and the path in it.

        Raises:
            StorageError: if the URI cannot be understood, or nothing is known of its scheme, host or region.
        """
        path, query = self._parts
        try:
            if path.startswith("s3://"):
                host, _, key = path.removeprefix("s3://").partition("/")
                endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
                filesystem, bucket = _s3(host, query, endpoint)
                return filesystem, f"{bucket}/{key}".rstrip("/")
            filesystem, path = fs.FileSystem.from_uri(self.uri)
        except (ValueError, OSError) as error:
            raise StorageError(f"{self}: not a place that can be opened ({masked(str(error))}); give a path or a URI") from error
        return filesystem, path

    @contextlib.contextmanager
    def _reached(self) -> Iterator[tuple[fs.FileSystem, str]]:
        """:meth:`resolve`, and what goes wrong with it as a StorageError; what is not there stays FileNotFoundError."""
        found = self.resolve()
        try:
            yield found
        except (FileNotFoundError, StorageError):
            raise
        except OSError as error:
            raise StorageError(f"{self}: {error}") from error

    def patiently(self, act: Callable[[], Made], tell: Tell) -> Made:
        """What `act` returns that reads or writes here: on remote storage :func:`patiently`. A disk that fails is not away."""
        return act() if self.local is not None else patiently(act, tell)

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        with self._reached() as (filesystem, path):
            return bool(filesystem.get_file_info(f"{path}/{name}" if name else path).type != fs.FileType.NotFound)

    def changed(self, name: str) -> float:
        """When a file was last changed, in seconds (Unix); 0 if the storage does not say."""
        with self._reached() as (filesystem, path):
            return (filesystem.get_file_info(f"{path}/{name}").mtime_ns or 0) / 1e9

    def names(self) -> list[str]:
        """Names of the files and folders in it, sorted; empty if the folder does not exist."""
        with self._reached() as (filesystem, path):
            try:
                found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
            except FileNotFoundError:  # it came or went while it was listed
                return []
        return sorted(info.base_name for info in found)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[NativeFile]:
        """A file to read from at any place.

        Raises:
            FileNotFoundError: if it is not there.
        """
        with self._reached() as (filesystem, path), filesystem.open_input_file(f"{path}/{name}") as stream:
            yield stream

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: if it is not there.
        """
        with self.open(name) as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole, as :meth:`writing` does."""
        with self.writing(name) as stream:
            stream.write(content)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[NativeFile]:
        """A file to write piece by piece, which no reader sees before it is whole: object stores show an object when it is
        complete, and on a local filesystem it has a temporary name until then. Left by an error, a local file is removed."""
        with self._reached() as (filesystem, path):
            filesystem.create_dir(path, recursive=True)
            local = isinstance(filesystem, fs.LocalFileSystem)
            target = f"{path}/{name}"
            written = f"{path}/.{name}.{uuid.uuid4().hex}" if local else target
            try:
                with filesystem.open_output_stream(written) as stream:
                    yield stream
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
        with self._reached() as (filesystem, path):
            filesystem.create_dir(path, recursive=True)
            fs.copy_files(str(source), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)

    def download(self, target: Path) -> None:
        """Copy this folder's files to a local folder.

        Raises:
            FileNotFoundError: if it is not there.
        """
        with self._reached() as (filesystem, path):
            target.mkdir(parents=True, exist_ok=True)
            fs.copy_files(path, str(target), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if it is not there."""
        with contextlib.suppress(FileNotFoundError), self._reached() as (filesystem, path):
            filesystem.delete_file(f"{path}/{name}")

    def delete(self) -> None:
        """Remove the folder and all in it; nothing happens if it is not there."""
        local = self.local
        if local is not None:
            shutil.rmtree(local, ignore_errors=True)
            return
        with contextlib.suppress(FileNotFoundError), self._reached() as (filesystem, path):
            filesystem.delete_dir(path)

    def check_writable(self, setting: str) -> None:
        """Write and remove a small file.

        Raises:
            StorageError: naming `setting`, the place and the cause.
        """
        probe = f".write-test-{uuid.uuid4().hex}"
        try:
            self.write(probe, b"")
            self.remove(probe)
        except OSError as error:
            raise StorageError(f"{setting}: cannot write to {_cause(self, error)}; choose a folder you can write") from error

    def check_readable(self, setting: str) -> None:
        """Ask whether the folder is there; that it is not is no error.

        Raises:
            StorageError: naming `setting`, the place and the cause.
        """
        try:
            self.exists()
        except OSError as error:
            raise StorageError(f"{setting}: cannot read from {_cause(self, error)}; choose a folder you can read") from error


def _cause(folder: Folder, error: OSError) -> str:
    """A place and why it failed, naming the place once."""
    return f"{folder} ({str(error).removeprefix(f'{folder}: ')})"


@lru_cache(maxsize=16)
def _s3(host: str, query: str, endpoint: str) -> tuple[fs.S3FileSystem, str]:
    """The filesystem and the bucket of an ``s3://`` URI. `endpoint` is the server's URL if the query names none, empty for AWS's.

    Made here rather than by :meth:`pyarrow.fs.FileSystem.from_uri`, whose clients go on trying a dead server for many times as
    long, and which asks AWS for the region even where an endpoint is given.
    """
    credentials, _, bucket = host.rpartition("@")
    key, _, secret = (unquote(part) for part in credentials.partition(":"))
    options = dict(parse_qsl(query.removeprefix("?")))
    if not bucket or ":" in bucket:
        raise ValueError("no bucket is named, or special characters of the credentials are not percent-encoded")
    if unknown := options.keys() - S3_OPTIONS:
        raise ValueError(f"its query may hold {', '.join(S3_OPTIONS)}, not {', '.join(sorted(unknown))}")
    if endpoint and "endpoint_override" not in options:
        options["scheme"], _, options["endpoint_override"] = endpoint.rstrip("/").partition("://")
    if "region" not in options:
        options["region"] = "us-east-1" if "endpoint_override" in options else fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(access_key=key or None, secret_key=secret or None, **options), bucket


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

"""Folders: whole writes, round trips under odd names, plain errors, digests."""

import contextlib
import hashlib
import math
import os
import pickle
import resource
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ask_ray import storage
from ask_ray.config import UserError
from ask_ray.storage import Folder, StorageError, digest_bytes, digest_file, is_file, is_folder, patiently


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
    done, written = threading.Event(), []

    def rewrite():
        try:
            for n in range(60):
                folder.write("a.bin", contents[n % 2])
                written.append(n)
        finally:
            done.set()  # also when a write fails: nobody would end the loop below

    writer = threading.Thread(target=rewrite)
    writer.start()
    reads = 0
    while not done.is_set() or reads == 0:
        assert folder.read("a.bin") in contents
        reads += 1
    writer.join()
    assert len(written) == 60, "a write failed"
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


def test_a_path_that_is_none_is_refused_and_what_cannot_be_looked_at_is_not_there(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in ("~nobody-of-this-name/x", str(tmp_path / "loop")):
        with pytest.raises(StorageError, match=rf"^{place} is no path on this machine .*; give another$"):
            Folder.at(place)
    for name in ("loop", "x" * 300, "gone"):
        assert not is_file(tmp_path / name)
        assert not is_folder(tmp_path / name)
    assert is_folder(tmp_path)


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


def test_a_file_that_is_written_piece_by_piece_shows_when_it_is_whole(tmp_path):
    folder = Folder.at(str(tmp_path / "new"))
    with folder.writing("a.bin") as stream:
        stream.write(b"one")
        assert not folder.exists("a.bin")
        stream.write(b"two")
    assert folder.read("a.bin") == b"onetwo"
    with pytest.raises(ZeroDivisionError), folder.writing("a.bin") as stream:
        stream.write(b"other" * (1 // stream.tell()))
    assert folder.read("a.bin") == b"onetwo"
    assert folder.names() == ["a.bin"]


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


# --- storage that is away ---


class Away:
    """Storage that fails its first tries, each after `seconds` of a clock on which nothing else takes time but pauses."""

    def __init__(self, seconds: float, failures: float) -> None:
        self.now, self.tries, self.heard = 0.0, 0, 0
        self._seconds, self._failures = seconds, failures

    def act(self) -> str:
        self.tries += 1
        self.now += self._seconds
        if self.tries <= self._failures:
            raise StorageError("away")
        return "there"

    def tell(self, error: StorageError) -> None:
        self.heard += 1

    def monotonic(self) -> float:
        return self.now

    def wait(self, pause: float) -> bool:
        self.now += pause
        return False


def wait_for(away: Away, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(storage, "time", away)
    return patiently(away.act, away.tell, away)


def test_a_first_try_that_takes_longer_than_the_patience_is_tried_again(monkeypatch):
    away = Away(2 * storage.PATIENCE, failures=1)
    assert wait_for(away, monkeypatch) == "there"
    assert (away.tries, away.heard) == (2, 1)


def test_storage_is_tried_for_the_patience_from_its_first_failure_on(monkeypatch):
    away = Away(1, failures=math.inf)
    with pytest.raises(StorageError, match="away"):
        wait_for(away, monkeypatch)
    assert away.tries == away.heard > 10
    assert storage.PATIENCE - storage.LONGEST_PAUSE - 1 <= away.now - 1 <= storage.PATIENCE + 1


# --- object storage ---


def s3_folder(s3, name: str) -> Folder:
    return Folder.at(s3.uri(f"bucket/{name}"))


def test_the_query_of_a_uri_stays_at_its_end_and_its_secret_unseen():
    folder = Folder.at("s3://key:a%2Fb@bucket/runs/?region=eu-west-1&endpoint_override=host:1") / "one"
    assert folder.uri == "s3://key:a%2Fb@bucket/runs/one?region=eu-west-1&endpoint_override=host:1"
    assert folder.name == "one"
    assert folder.parent == Folder.at("s3://key:a%2Fb@bucket/runs?region=eu-west-1&endpoint_override=host:1")
    assert str(folder) == "s3://***@bucket/runs/one?region=eu-west-1&endpoint_override=host:1"
    assert "a%2Fb" not in repr(folder)
    assert folder.resolve()[1] == "bucket/runs/one"
    assert folder.resolve()[0].region == "eu-west-1"


@pytest.mark.parametrize("uri", ["s3://bucket/a@b:c", "/tmp/a?b://c", "gs://bucket/x", "s3://bucket/x?region=r"])
def test_what_holds_no_secret_is_shown_as_it_is(uri):
    assert str(Folder(uri)) == uri


@given(secret=st.text(st.characters(codec="utf-8", exclude_characters="@? \t\n", exclude_categories=("C", "Z")), min_size=5))
def test_no_secret_is_ever_shown(secret):
    folder = Folder.at(f"s3://the-key:{secret}@bucket/x?nonsense=1")
    with pytest.raises(StorageError) as refusal:
        folder.resolve()
    assert f"{secret}@" not in f"{folder} {folder!r} {refusal.value}"


def test_a_tree_on_s3_comes_back(s3, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    (source / "a").write_bytes(b"1")
    (source / "deep" / "b c").write_bytes(os.urandom(6 << 20))
    folder = s3_folder(s3, "tree") / "x"
    assert (folder.exists(), folder.names(), folder.changed("a")) == (False, [], 0)
    folder.upload(source)
    folder.write("late", b"2")
    assert folder.names() == ["a", "deep", "late"]
    assert folder.exists("a")
    assert abs(folder.changed("late") - time.time()) < 60
    pickle.loads(pickle.dumps(folder)).download(target)
    assert {path.name: path.read_bytes() for path in walk_files(target)} == {
        "a": b"1", "b c": (source / "deep" / "b c").read_bytes(), "late": b"2",
    }  # fmt: skip
    with folder.open("deep/b c") as stream:
        stream.seek(6 << 20 >> 1)
        assert stream.read(4) == (source / "deep" / "b c").read_bytes()[6 << 20 >> 1 :][:4]


def test_deleting_on_s3_takes_the_folder_and_nothing_beside_it(s3):
    home = s3_folder(s3, "deleting")
    for name in ("v1", "v10"):
        (home / name).write("a", b"")
    (home / "v1").remove("a")
    (home / "v1").remove("a")
    assert not (home / "v1").exists("a")
    (home / "v1").delete()
    (home / "v1").delete()
    assert home.names() == ["v10"]
    assert (home / "v10").names() == ["a"]


def test_what_the_uri_leaves_out_comes_from_the_environment(s3, monkeypatch):
    for name, value in (("ACCESS_KEY_ID", s3.key), ("SECRET_ACCESS_KEY", s3.secret), ("ENDPOINT_URL", s3.endpoint)):
        monkeypatch.setenv(f"AWS_{name}", value)
    Folder.at("s3://bucket/environment").write("a", b"1")
    assert s3_folder(s3, "environment").read("a") == b"1"


def test_a_check_on_s3_leaves_nothing_behind(s3):
    folder = s3_folder(s3, "checked")
    folder.check_readable("run.storage")
    folder.check_writable("run.storage")
    assert folder.names() == []


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://bucket/x?regoin=eu-west-1", "regoin"),
        ("s3://key:a/b@bucket/x?region=r", "percent-encoded"),
        ("s3://", "no bucket"),
    ],
)
def test_a_uri_that_cannot_be_understood_is_refused(uri, told):
    with pytest.raises(StorageError, match=rf"^run\.storage: .*{told}"):
        Folder.at(uri).check_writable("run.storage")


def test_a_bucket_that_does_not_exist_is_refused(s3):
    with pytest.raises(StorageError, match=r"^run\.storage: .*no-bucket.*not found"):
        Folder.at(s3.uri("no-bucket/x")).check_writable("run.storage")


def test_wrong_credentials_are_refused(strict_s3):
    folder = Folder.at(strict_s3.uri("bucket/x", secret="not-this-one"))
    for check in (folder.check_writable, folder.check_readable):
        with pytest.raises(StorageError, match=r"^data\.prepared: .*ACCESS_DENIED") as refusal:
            check("data.prepared")
        assert "not-this-one" not in str(refusal.value)


def test_storage_that_goes_away_is_an_error_with_its_place_within_seconds(start_s3, tmp_path):
    server = start_s3()
    folder = s3_folder(server, "gone")
    folder.write("a", b"1")
    (tmp_path / "a").write_bytes(b"1")
    server.stop()
    started = time.monotonic()
    for act in (
        folder.names, folder.delete, lambda: folder.read("a"), lambda: folder.write("a", b"2"),
        lambda: folder.upload(tmp_path), lambda: folder.download(tmp_path / "b"),
    ):  # fmt: skip
        with pytest.raises(StorageError, match=r"s3://\*\*\*@bucket/gone.*connect"):
            act()
    for check in (folder.check_writable, folder.check_readable):
        with pytest.raises(StorageError, match=r"run\.storage: .*connect"):
            check("run.storage")
    assert time.monotonic() - started < 60

"""The node's copies: fetched once, whole, bounded, and never taken from who uses them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ask_ray.config import KnowledgeSettings
from ask_ray.knowledge.cache import Cache, Copy
from ask_ray.storage import StorageError

MIB = 2**20


def fetch_of(size: int, fetched: list[int] | None = None) -> Callable[[Path], None]:
    def fetch(target: Path) -> None:
        if fetched is not None:
            fetched.append(size)
        (target / "a").write_bytes(b"\1" * size)

    return fetch


def intact(copy: Path) -> bool:
    return set((copy / "a").read_bytes()) <= {1}


def hold(cache: Cache, key: str, size: int = MIB, fetched: list[int] | None = None) -> Copy:
    return cache.hold(key, {"a": size}, fetch_of(size, fetched), intact)


def kept(cache: Cache) -> set[str]:
    return {path.name for path in cache.root.iterdir() if path.is_dir()}


def cache_of(folder: Path, mib: float = 1024) -> Cache:
    return Cache(str(folder / "cache"), mib / 1024)


#: Another process that holds (or fetches slowly and holds) a copy of 1 MiB until it is killed.
OTHER = """
import sys, time
from pathlib import Path
from ask_ray.knowledge.cache import Cache
folder, key, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
def fetch(target):
    with Path(folder, "fetched").open("a") as told:
        told.write("x")
    time.sleep(seconds)
    (target / "a").write_bytes(bytes(2**20))
copy = Cache(folder + "/cache", 2 / 1024).hold(key, {"a": 2**20}, fetch, lambda copy: True)
print("held", flush=True)
time.sleep(600)
"""


def other(folder: Path, key: str, seconds: float = 0) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", OTHER, str(folder), key, str(seconds)], stdout=subprocess.PIPE, text=True)


def wait_until_held(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


def test_a_copy_is_fetched_once(tmp_path):
    fetched: list[int] = []
    paths = [hold(cache_of(tmp_path), "one", fetched=fetched).path for _ in range(3)]
    assert fetched == [MIB]
    assert {(path / "a").read_bytes() for path in paths} == {b"\1" * MIB}


def test_processes_and_threads_that_ask_at_once_share_one_fetch(tmp_path):
    processes = [other(tmp_path, "one", seconds=0.5) for _ in range(3)]
    try:
        for process in processes:
            wait_until_held(process)
    finally:
        end(*processes)
    assert (tmp_path / "fetched").read_text() == "x"
    fetched: list[int] = []
    held: list[Copy] = []
    threads = [threading.Thread(target=lambda: held.append(hold(cache_of(tmp_path), "two", MIB, fetched))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [MIB]
    assert len(held) == 4
    assert all(copy.stands() and intact(copy.path) for copy in held)


def test_the_least_recently_used_goes_first(tmp_path):
    cache = cache_of(tmp_path, 2)
    for key in ("one", "two", "one", "three"):
        hold(cache, key)
    assert kept(cache) == {"one", "three"}


@given(uses=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12), limit=st.integers(1, 400))
@budget(max_examples=40)
def test_the_bound_holds_and_what_is_held_stays(uses, limit, tmp_path_factory):
    """Copies of 0, 50, … 250 KiB, of which some stay held, against a list in the order of use."""
    cache, held, order = Cache(str(tmp_path_factory.mktemp("cache")), limit / 2**20), {}, []
    for number, holding in uses:
        key = str(number)
        copy = hold(cache, key, 50 * number * 1024)
        if key not in order:
            for oldest in list(order):
                if sum(50 * int(one) for one in (*order, key)) > limit and oldest not in held:
                    order.remove(oldest)
        order = [one for one in order if one != key] + [key]
        if holding:
            held[key] = copy
        del copy
        assert kept(cache) == set(order)


def test_a_copy_larger_than_the_bound_is_kept_until_the_next(tmp_path):
    cache = cache_of(tmp_path, 1)
    hold(cache, "small")
    large = hold(cache, "large", 3 * MIB)
    assert kept(cache) == {"large"}
    assert hold(cache, "large", 3 * MIB).path == large.path
    del large
    hold(cache, "next")
    assert kept(cache) == {"next"}


def test_what_another_process_holds_stays_until_it_ends_however_it_ends(tmp_path):
    cache, process = cache_of(tmp_path, 2), other(tmp_path, "theirs")
    try:
        wait_until_held(process)
        for key in ("one", "two", "three"):
            hold(cache, key)
        assert kept(cache) == {"theirs", "three"}
    finally:
        end(process)  # by SIGKILL: it cannot tidy up
    hold(cache, "four")
    assert kept(cache) == {"three", "four"}


def test_a_fetch_that_fails_leaves_nothing_and_can_be_tried_again(tmp_path):
    cache = cache_of(tmp_path)

    def fail(target: Path) -> None:
        (target / "a").write_bytes(b"half")
        raise StorageError("gone")

    with pytest.raises(StorageError, match="gone"):
        cache.hold("one", {"a": MIB}, fail, intact)
    assert kept(cache) == set()
    assert (hold(cache, "one").path / "a").stat().st_size == MIB


def test_a_process_that_died_while_fetching_is_in_nobody_s_way(tmp_path):
    process = other(tmp_path, "one", seconds=600)
    deadline = time.monotonic() + 300
    try:
        while not (tmp_path / "fetched").exists():
            assert process.poll() is None, "it died before it fetched"
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)
    finally:
        end(process)
    hold(cache_of(tmp_path), "one")
    assert kept(cache_of(tmp_path)) == {"one"}


@pytest.mark.parametrize("harm", ["truncated", "missing", "longer", "one bit", "zeroed", "all gone"])
def test_a_copy_damaged_on_disk_is_fetched_again(harm, tmp_path):
    fetched: list[int] = []
    cache = cache_of(tmp_path)
    copy = hold(cache, "one", fetched=fetched)
    file = copy.path / "a"
    if harm == "truncated":
        os.truncate(file, 9)
    elif harm == "longer":
        file.write_bytes(bytes(MIB + 1))
    elif harm == "one bit":
        file.write_bytes(b"\1" * (MIB - 1) + b"\3")
    elif harm == "zeroed":
        file.write_bytes(bytes(MIB))
    else:
        file.unlink()
    if harm == "all gone":
        for left in copy.path.iterdir():
            left.unlink()
        copy.path.rmdir()
    again = hold(cache, "one", fetched=fetched)
    assert fetched == [MIB, MIB]
    assert (again.path / "a").read_bytes() == b"\1" * MIB


def test_a_damaged_copy_that_many_ask_for_is_fetched_again_once(tmp_path):
    fetched: list[int] = []
    cache = cache_of(tmp_path)
    (hold(cache, "one", fetched=fetched).path / "a").write_bytes(bytes(MIB))
    held: list[Copy] = []
    threads = [threading.Thread(target=lambda: held.append(hold(cache, "one", MIB, fetched))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [MIB, MIB]
    assert len(held) == 4
    assert all(copy.stands() and intact(copy.path) for copy in held)


def test_a_copy_is_looked_through_once_in_each_opening_and_while_others_may_fetch(tmp_path):
    cache, looked = cache_of(tmp_path), []

    def look(copy: Path) -> bool:
        looked.append(copy.name)
        if copy.name == "one":
            with pytest.raises(StorageError, match="fetched meanwhile"):  # by another opening, which would wait for a lock
                cache.hold("two", {"a": MIB}, fail, look)
        return True

    def fail(_: Path) -> None:
        raise StorageError("fetched meanwhile")

    for _ in range(3):
        cache.hold("one", {"a": MIB}, fetch_of(MIB), look)
    assert looked == ["one", "one"], "the first time, fetching verifies"


def test_a_copy_is_on_the_disk_before_it_is_at_its_place(tmp_path, monkeypatch):
    cache, synced, sync = cache_of(tmp_path), [], os.fsync

    def fsync(descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((place.name, (cache.root / "one").exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    hold(cache, "one")
    assert {("a", False), (".fetching", False), ("cache", True)} <= set(synced)


def test_a_folder_that_cannot_be_made_is_refused_by_its_setting(tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(StorageError, match=r"^knowledge\.cache: "):
        hold(cache_of(tmp_path), "one")


def test_the_settings_say_where_and_how_much(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache.of(KnowledgeSettings(cache="~/copies", cache_gib=2.5)).root == tmp_path / "copies"
    assert Cache.of(KnowledgeSettings(cache_gib=2.5)).gib == 2.5
    assert Cache.of(KnowledgeSettings()) == Cache()
    assert str(os.getuid()) in Cache().root.name

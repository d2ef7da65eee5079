"""Drivers of one run or sweep are kept apart: real processes that live, are killed, or were on another machine."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ask_ray import lease
from ask_ray.config import SettingsError
from ask_ray.storage import Folder

#: Seconds between the beats of real processes: one that a busy machine gives no time for three of them is still alive.
BEAT = 0.5

DRIVER = f"""
import sys, time
from ask_ray import lease
from ask_ray.storage import Folder
lease.BEAT = {BEAT}
with lease.held(Folder.at(sys.argv[1]), "run.name"):
    print("driving", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", BEAT)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for another driver's end."""

    def sleep(seconds: float) -> None:
        pytest.fail("it was waited for")

    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))


class Clock:
    """The time of who waits for another driver's end: none passes but what is slept, and then `tick` is called."""

    def __init__(self) -> None:
        self.now, self.tick = 0.0, lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 100 * BEAT, "waited in vain"
        self.tick()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(lease, "time", made)
    return made


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that drives `tmp_path`, until it reads a line."""
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "driving\n"
        yield process
        process.kill()


def left(folder: Path, **other: object) -> None:
    """What a driver of another machine left, whose process no one here can look for."""
    there = {"token": "t", "host": "elsewhere.invalid", "process": os.getpid(), "started": 0.0, "beat": 7}
    (folder / lease.FILE).write_text(json.dumps(there | other))


def test_a_driver_leaves_nothing_behind(tmp_path):
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        assert json.loads((tmp_path / lease.FILE).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), lease.held(Folder.at(str(tmp_path)), "run.name"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_second_driver_is_refused_while_the_first_lives(driver, tmp_path):
    with (
        pytest.raises(SettingsError, match=rf"^run\.name: {tmp_path} is under way, driven by process {driver.pid} on "),
        lease.held(Folder.at(str(tmp_path)), "run.name"),
    ):
        raise AssertionError("two drivers")
    assert driver.poll() is None
    assert json.loads((tmp_path / lease.FILE).read_text())["process"] == driver.pid


def test_a_driver_that_was_killed_is_followed_at_once(driver, tmp_path, at_once):
    driver.kill()  # not waited for: a process that nobody has asked for its end is dead all the same
    wait_for(lambda: lease.Driver(**json.loads((tmp_path / lease.FILE).read_text())).gone)
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        assert json.loads((tmp_path / lease.FILE).read_text())["process"] == os.getpid()


def test_one_that_ends_while_another_waits_makes_room(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "ALIVE", 10**6)
    assert driver.stdin is not None
    ended = threading.Timer(BEAT, driver.stdin.close)
    ended.start()
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        assert driver.stdin.closed, "it was told to end before"
        assert driver.wait() == 0


def test_a_number_that_another_process_bears_now_is_no_driver(tmp_path, at_once):
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        own = json.loads((tmp_path / lease.FILE).read_text())
    left(tmp_path, host=own["host"], started=own["started"] - 3600)
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        pass


def test_a_driver_of_another_machine_is_dead_when_its_beats_stay_away(tmp_path, clock):
    left(tmp_path)
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        assert lease.MISSING * BEAT <= clock.now < (lease.MISSING + 1) * BEAT


def test_a_driver_of_another_machine_that_beat_once_more_is_dead_too(tmp_path, clock):
    left(tmp_path)

    def beat_once() -> None:
        if clock.now >= BEAT:
            left(tmp_path, beat=8)

    clock.tick = beat_once
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        assert clock.now >= (1 + lease.MISSING) * BEAT


@pytest.mark.parametrize("pause", [1, lease.MISSING - 0.5], ids=["on time", "late"])
def test_a_driver_of_another_machine_lives_while_it_beats(tmp_path, clock, pause):
    left(tmp_path)
    clock.tick = lambda: left(tmp_path, beat=7 + int(clock.now / (pause * BEAT)))
    with pytest.raises(SettingsError, match=r"on elsewhere\.invalid"), lease.held(Folder.at(str(tmp_path)), "run.name"):
        raise AssertionError("two drivers")


def test_a_driver_that_was_taken_for_dead_beats_no_more(tmp_path, caplog):
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        left(tmp_path)
        wait_for(lambda: "was taken up by another driver" in caplog.text)
        assert json.loads((tmp_path / lease.FILE).read_text())["beat"] == 7
    assert (tmp_path / lease.FILE).exists(), "it is the other's"


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"token": "t"}'])
def test_what_is_no_drivers_word_is_overwritten(tmp_path, content):
    (tmp_path / lease.FILE).write_text(content)
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        assert json.loads((tmp_path / lease.FILE).read_text())["process"] == os.getpid()

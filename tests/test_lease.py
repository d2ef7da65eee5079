"""Drivers of one run or sweep are kept apart: real processes that live, are killed, or were on another machine."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ask_ray import lease
from ask_ray.config import SettingsError
from ask_ray.storage import Folder

BEAT = 0.1

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


def test_a_driver_that_was_killed_is_followed_at_once(driver, tmp_path):
    driver.kill()  # not waited for: a process that nobody has asked for its end is dead all the same
    while not lease.Driver(**json.loads((tmp_path / lease.FILE).read_text())).gone:
        time.sleep(0.01)
    started = time.monotonic()
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        assert time.monotonic() - started < BEAT


def test_one_that_ends_while_another_waits_makes_room(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "ALIVE", 10**6)
    assert driver.stdin is not None
    ended = threading.Timer(3 * BEAT, driver.stdin.close)
    ended.start()
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        assert driver.wait() == 0


def test_a_number_that_another_process_bears_now_is_no_driver(tmp_path):
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        own = json.loads((tmp_path / lease.FILE).read_text())
    left(tmp_path, host=own["host"], started=own["started"] - 3600)
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        pass


def test_a_driver_of_another_machine_is_dead_when_its_beats_stay_away(tmp_path):
    left(tmp_path)
    started = time.monotonic()
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        assert time.monotonic() - started >= lease.MISSING * BEAT


def test_a_driver_of_another_machine_lives_while_it_beats(tmp_path):
    left(tmp_path)
    over = threading.Event()

    def beat() -> None:
        count = 7
        while not over.wait(BEAT):
            count += 1
            Folder.at(str(tmp_path)).write_json(lease.FILE, {**json.loads((tmp_path / lease.FILE).read_text()), "beat": count})

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(SettingsError, match=r"on elsewhere\.invalid"), lease.held(Folder.at(str(tmp_path)), "run.name"):
            raise AssertionError("two drivers")
    finally:
        over.set()
        beating.join()


def test_a_driver_that_was_taken_for_dead_beats_no_more(tmp_path, caplog):
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        left(tmp_path)
        time.sleep(3 * BEAT)
        assert json.loads((tmp_path / lease.FILE).read_text())["beat"] == 7
    assert "was taken up by another driver" in caplog.text
    assert (tmp_path / lease.FILE).exists(), "it is the other's"


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"token": "t"}'])
def test_what_is_no_drivers_word_is_overwritten(tmp_path, content):
    (tmp_path / lease.FILE).write_text(content)
    with lease.held(Folder.at(str(tmp_path)), "run.name"):
        assert json.loads((tmp_path / lease.FILE).read_text())["process"] == os.getpid()

"""The fault suite's session, its rows, and the table that `make faults` writes."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import misbehave
import pytest
import ray.cloudpickle

ROWS, BEGAN = pytest.StashKey[list[tuple[str, ...]]](), pytest.StashKey[float]()

HEAD = """# What a run does when something breaks

Written by `make faults`: every row is a run during which a real process was ended, stopped or starved, a node was lost, or a file
was damaged; most are 512 steps on two workers with a refresh every other epoch. Every run then finished with the right number of
steps, epochs and entries. *Stood still* is the longest gap between told steps beyond the usual one, on 2 cores. *Repeated* are
the steps known to have been taken again: as workers tell every tenth step, each restart may have cost up to 9 more.

| fault | what the run did | stood still | repeated steps |
|---|---|---|---|
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="write the fault suite's table to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[BEGAN] = [], time.monotonic()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the table: a row for each test, with the time of a whole suite, else the rows that are there of those that were not
    run. Nothing if one failed: a row of its last success would be read as of this code."""
    target, new = session.config.getoption("--table"), session.config.stash[ROWS]
    if target is None or not new or exitstatus:
        return
    rows = {row[0]: f"| {' | '.join(row)} |" for row in new}
    there = target.read_text().splitlines()[len(HEAD.splitlines()) :] if target.exists() else []
    old = {line.split(" | ")[0].removeprefix("| "): line for line in there if line.startswith("| ")}
    whole = len(rows) >= len(old)
    took = f"{len(rows)} runs took {(time.monotonic() - session.config.stash[BEGAN]) / 60:.0f} minutes on {os.cpu_count()} cores."
    last = took if whole else next((line for line in there if line and not line.startswith("| ")), "")
    target.write_text(HEAD + "".join(f"{line}\n" for line in (rows if whole else old | rows).values()) + f"\n{last}\n")


@pytest.fixture
def tell(request: pytest.FixtureRequest):
    """Adds a row to the table: the fault, what the run did, the run's outcome, and why its repeated steps are not known."""

    def add(fault: str, did: str, outcome, repeated: str | None = None) -> None:
        named = re.sub(r"/\S*/prepared/", "prepared/", did)  # the table tells nothing of where the tests ran
        request.config.stash[ROWS].append((fault, named, f"{outcome.still:.1f} s", repeated or f"{outcome.repeated}"))

    return add


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The suite's own session: 4 logical CPUs, and processes that heed orders to misbehave."""
    os.environ[misbehave.ORDERS] = str(tmp_path_factory.mktemp("orders"))
    ray.cloudpickle.register_pickle_by_value(misbehave)
    setup = {"worker_process_setup_hook": misbehave.install}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=setup)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def home(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")

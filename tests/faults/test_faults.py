"""Whole runs during which a real process is ended, stopped or starved, or what it wrote is damaged."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import misbehave
import pytest
from sabotage import (
    EPOCHS,
    PATIENCE,
    POOL,
    REFINER,
    REFRESH,
    STEPS,
    WORKER,
    Watch,
    check_restart,
    check_whole,
    checkpoints,
    run_under,
    settings_of,
    stopped,
    until,
)

from ask_ray.storage import Folder
from ask_ray.training.checkpoint import pinned_versions

pytestmark = pytest.mark.faults

#: Epochs of runs that outlive a wait for something to time out, and the seconds after which the pool's is over.
LONG, STALL = 24, 15

ROOT = Path(__file__).parents[2]


# --- the pool and the refiner ---


@pytest.mark.parametrize("actors", [1, 2])
def test_the_pool_is_killed_while_it_encodes(home, tell, actors):
    """One actor of two, or all there is."""
    settings = settings_of(home, f"pool-{actors}")
    pool = settings.knowledge.pool.model_copy(update={"min_actors": actors, "max_actors": actors, "cpus": 0.5})
    settings = settings.model_copy(update={"knowledge": settings.knowledge.model_copy(update={"pool": pool})})

    def harm(watch: Watch) -> None:
        watch.wait("encoding", version=1)
        watch.processes(POOL)[0].kill()

    outcome = run_under(settings, harm)
    check_whole(outcome)
    assert len(outcome.of("began")) == 1, "training was not touched"
    did = f"Ray Data replaced it; {len(outcome.of('failed'))} refreshes failed, {len(outcome.of('published'))} published"
    tell(f"kill −9 of {'the only' if actors == 1 else 'one of two'} pool actor{'s' * (actors > 1)} while encoding", did, outcome)


def test_the_task_of_a_refresh_is_killed_with_its_whole_pool(home, tell):
    def harm(watch: Watch) -> None:
        watch.wait("encoding", version=1)
        for process in [*watch.processes(REFRESH), *watch.processes(POOL)]:
            process.kill()

    outcome = run_under(settings_of(home, "whole-pool"), harm)
    check_whole(outcome)
    assert len(outcome.of("began")) == 1
    assert [event["version"] for event in outcome.of("failed")][:1] == [1]
    assert outcome.of("published")[0]["encoder_step"] == outcome.of("requested")[0]["step"], "the same weights, tried again"
    tell(
        "kill −9 of the refresh's task and all of its pool", "the refresh failed, was tried again with the same weights", outcome
    )


def test_the_refiner_is_killed(home, tell):
    def harm(watch: Watch) -> None:
        watch.wait("encoding", version=1)
        watch.processes(REFINER)[0].kill()

    outcome = run_under(settings_of(home, "refiner", policy="static"), harm)
    check_whole(outcome)
    assert len(outcome.of("began")) == 1
    first, again, _ = [event["step"] for event in outcome.of("requested")]
    assert first == again == outcome.of("published")[0]["encoder_step"], "what died with it was asked again"
    tell("kill −9 of the refiner during a refresh", "it restarted; rank 0 asked again for the refresh that was lost", outcome)


def test_the_pool_hangs(home, tell):
    def harm(watch: Watch) -> None:
        watch.wait("encoding", version=1)
        with stopped(watch.processes(POOL)[0]):
            watch.wait("failed", version=1)

    outcome = run_under(settings_of(home, "hang", epochs=LONG, stall_seconds=STALL), harm)
    check_whole(outcome, LONG)
    assert "stall_seconds" in outcome.of("failed")[0]["problem"]
    assert outcome.still < STALL, "training waited for the pool"
    tell("a pool actor hangs (stopped)", "the refresh made no progress, was ended and tried again", outcome)


@pytest.mark.parametrize(("what", "told"), [("raise", "raises"), ("few", "returns too few rows"), ("exit", "exits cleanly")])
def test_an_encoder_goes_wrong_on_one_batch(home, tell, what, told):
    def harm(watch: Watch) -> None:
        until(lambda: misbehave.carried_out(what), PATIENCE, f"{what} to be carried out")

    misbehave.order(what)
    outcome = run_under(settings_of(home, what, stall_seconds=15), harm)
    check_whole(outcome)
    assert len(outcome.of("began")) == 1
    failed = [event["problem"] for event in outcome.of("failed")]
    if what != "exit":
        assert {"raise": "told to raise", "few": "clips came back"}[what] in failed[0]
    tell(
        f"a pool actor {told} on one batch",
        f"{len(failed)} tries failed{f': {failed[0]}' if failed else ', Ray Data replaced it'}",
        outcome,
    )


def test_weights_that_are_sent_for_encoding_are_not_finite(home, tell):
    def harm(watch: Watch) -> None:
        watch.wait("swapped", version=1)
        misbehave.order("corrupt")
        watch.wait("failed")

    outcome = run_under(settings_of(home, "corrupt"), harm)
    check_whole(outcome)
    assert len(outcome.of("began")) == 1
    (failed,) = outcome.of("failed")
    assert "not finite" in failed["problem"]
    assert failed["step"] not in {event["encoder_step"] for event in outcome.of("published")}
    tell(
        "weights that are sent for encoding hold a NaN", "they were refused, once; the old version stayed until the next", outcome
    )


def test_training_diverges(home, tell):
    before: dict[int, int] = {}
    there: dict[int, int] = {}

    def harm(watch: Watch) -> None:
        watch.wait("epoch", epoch=2)
        before.update(until(lambda: checkpoints(watch.folder), PATIENCE, "a checkpoint"))
        misbehave.order("diverge")
        watch.wait("diverged")
        there.update(watch.restarted())

    outcome = run_under(settings_of(home, "diverged"), harm)
    check_whole(outcome)
    assert len(outcome.of("began")) == 2
    assert "not finite" in outcome.of("diverged")[0]["problem"]
    check_restart(outcome, before, there)
    did = "the step was refused, no such checkpoint was saved, and the workers restarted from the last one"
    tell("a weight becomes NaN while training", did, outcome)


def test_a_refresh_outlasts_training(home, tell):
    def harm(watch: Watch) -> None:
        watch.wait("swapped")
        watch.wait("encoding", version=2)  # the youngest process of the pool is then this refresh's
        with stopped(watch.processes(POOL)[0]):
            watch.wait("epoch", epoch=EPOCHS)

    outcome = run_under(settings_of(home, "outlasts", interval=2), harm)
    check_whole(outcome)
    assert "given up" in {event["outcome"] for event in outcome.of("settled")}
    tell("a refresh outlasts training", "it was given up for one by the final weights", outcome)


def test_refreshes_are_asked_for_faster_than_they_can_be_made(home, tell):
    outcome = run_under(settings_of(home, "eager", interval=0.1), lambda watch: None)
    check_whole(outcome)
    told = [event["outcome"] for event in outcome.of("settled")]
    assert "superseded by newer weights" in told
    steps = [row["encoder_step"] for row in outcome.result["refreshes"]]
    assert steps == sorted(set(steps)), "newest weights win"
    tell(
        "a refresh every 6 steps",
        f"{told.count('superseded by newer weights')} of {len(told)} requests gave way to newer ones",
        outcome,
    )


# --- training ---


def kept(watch: Watch, version: int) -> None:
    """Wait until Ray Train knows of a checkpoint that names a version."""
    until(lambda: version in checkpoints(watch.folder).values(), PATIENCE, "a checkpoint with the version")


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_worker_is_killed_around_a_swap(home, tell, when):
    """During it, when all have agreed on the version and one of two has not taken it."""
    warmup = 0.5 if when == "after" else 2.5  # by then, there is a checkpoint to go on from
    before: dict[int, int] = {}
    there: dict[int, int] = {}

    def harm(watch: Watch) -> None:
        if when == "before":
            watch.wait("encoding", version=1)
        elif when == "after":
            watch.wait("swapped", version=1)
            kept(watch, 1)
        before.update(until(lambda: checkpoints(watch.folder), PATIENCE, "a checkpoint"))
        if when == "during":
            misbehave.order("die")
            until(lambda: misbehave.carried_out("die"), PATIENCE, "a worker that dies")
        else:
            watch.processes(WORKER)[0].kill()
        there.update(watch.restarted())

    outcome = run_under(settings_of(home, f"worker-{when}", warmup_epochs=warmup), harm)
    check_whole(outcome)
    first, again = outcome.of("began")
    assert first["step"] == 0
    assert again["step"] % STEPS == 0
    check_restart(outcome, before, there)
    assert outcome.opened(again) in {"before": [0], "during": [0], "after": [1]}[when]
    assert not outcome.of("refused")
    did = f"all workers restarted from step {again['step']} with v{again['version']}, the version its checkpoint names"
    tell(f"kill −9 of a training worker {when} a swap", did, outcome)


# --- storage ---


def test_storage_fills_up_while_a_version_is_published(home, tell):
    """The first file of the version is there; of the others the kernel refuses what is over 16 KiB."""

    def harm(watch: Watch) -> None:
        until(lambda: misbehave.carried_out("fill"), PATIENCE, "the storage to fill up")

    misbehave.order("fill")
    outcome = run_under(settings_of(home, "full"), harm)
    check_whole(outcome)
    (failed,) = outcome.of("failed")
    assert failed["version"] == 1
    assert "/v000001: " in failed["problem"], "where the version is published, not where it is put together"
    assert "too large" in failed["problem"]
    assert not (Path(outcome.result["folder"]) / "knowledge" / "v000001" / "manifest.json").exists()
    seen = [event["version"] for kind in ("published", "loaded", "refused", "swapped", "step") for event in outcome.of(kind)]
    assert 1 not in seen
    again = outcome.of("published")[0]
    assert (again["version"], again["encoder_step"]) == (2, failed["step"]), "the same weights, tried again"
    assert 2 in seen
    tell("storage refuses writes in the middle of publishing", "no half version was seen; the refresh was tried again", outcome)


def test_object_storage_goes_away_and_comes_back(home, tell, start_s3):
    """The server stops answering while a version is published, and again while the next one is read."""
    server = start_s3()

    @contextlib.contextmanager
    def away() -> Iterator[None]:
        server.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            server.process.send_signal(signal.SIGCONT)

    def harm(watch: Watch) -> None:
        watch.wait("started", version=1)
        with away():
            watch.wait("not published", version=1)
        version = watch.wait("published")["version"]
        watch.wait("swapped", version=version)
        later = watch.wait("published", version=version + 1)["version"]
        with away():
            watch.wait("unreadable", version=later)

    outcome = run_under(settings_of(home, "away", server.uri("bucket/runs"), LONG), harm)
    check_whole(outcome, LONG)
    assert outcome.of("failed") == [], "what is encoded waits to be published"
    assert outcome.of("published")[0]["version"] == 1
    did = f"{len(outcome.of('not published'))} writes of versions and {len(outcome.of('unreadable'))} reads were tried again; "
    did += f"the workers restarted {len(outcome.of('began')) - 1} times"
    tell("object storage stops answering, twice, and comes back", did, outcome)


def damage(folder: Path, how: str) -> None:
    array, manifest = folder / "audio.npy", folder / "manifest.json"
    if how == "truncated":
        array.write_bytes(array.read_bytes()[:-100])
    elif how == "bit-flipped":
        content = bytearray(array.read_bytes())
        content[-9] ^= 1
        array.write_bytes(bytes(content))
    elif how == "without its manifest":
        manifest.unlink()
    else:
        told = json.loads(manifest.read_text())
        told.update({"run": "another"} if how == "of another run" else {"dim": 31})
        manifest.write_text(json.dumps(told))


@pytest.mark.parametrize("how", ["truncated", "bit-flipped", "without its manifest", "of another run", "of another dimension"])
def test_a_snapshot_that_a_checkpoint_names_is_damaged(home, tell, how):
    """It is damaged under a running job, whose worker is then killed: the restart finds it so."""
    before: dict[int, int] = {}

    def harm(watch: Watch) -> None:
        version = watch.wait("swapped")["version"]
        kept(watch, version)
        before.update(checkpoints(watch.folder))
        for pinned in pinned_versions(watch.folder):
            damage(Path(str(watch.folder)) / "knowledge" / f"v{pinned:06d}", how)
        watch.processes(WORKER)[0].kill()

    outcome = run_under(settings_of(home, f"damaged-{how.replace(' ', '-')}", interval=3), harm)
    check_whole(outcome)
    refused = outcome.of("refused")
    assert refused
    assert all(f"v{event['version']:06d}" in event["problem"] for event in refused)
    remade = [event for event in outcome.of("published") if "refused" in event["reason"]]
    again = outcome.of("began")[1]
    assert remade[0]["encoder_step"] == again["step"] >= max(before)
    assert outcome.opened(again) == remade[0]["version"]
    tell(
        f"the checkpoint's snapshot is {how}, and a worker dies",
        "it was refused by name and made anew before training went on",
        outcome,
    )


# --- the driver ---


def test_the_driver_is_killed_and_the_run_continued_by_name(home, tell):
    settings = settings_of(home, "driver")
    file = home / "driver.yaml"
    file.write_text(settings.to_yaml())
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs/train.py"), "--config", str(file)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    run = Folder(str(home / "runs" / "driver"))
    before = until(lambda: known if any((known := checkpoints(run)).values()) else None, PATIENCE, "a checkpoint with a version")
    driver.kill()
    driver.wait()
    time.sleep(1)
    there: dict[int, int] = {}

    def look(watch: Watch) -> None:
        watch.wait("began")
        there.update(checkpoints(run))

    outcome = run_under(settings, look)
    check_whole(outcome, untold=outcome.of("began")[-1]["epoch"])
    check_restart(outcome, before, there)
    assert outcome.opened(outcome.of("began")[-1]) > 0
    shutil.rmtree(home / "runs" / "driver" / "pictures")
    did = "the run went on from its checkpoint with its version"
    unknown = "not known: what was told after the last epoch died with the driver"
    tell("kill −9 of the driver, and the same command again", did, outcome, repeated=unknown)

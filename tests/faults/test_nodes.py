"""Whole runs on a cluster of several nodes on this machine, which lose nodes and gain them: a head without CPUs, training
nodes of one CPU that offer the resource `train`, and an encoder node with a label."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from sabotage import POOL, Found, Outcome, checkpoints, running, until

from ask_ray.config import Settings, load
from ask_ray.storage import Folder

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CLIPS, BATCH = 1536, 8

Event = dict[str, Any]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """The head and the encoder node. Nodes, driver and commands share this process's way of authentication, token or none."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    add_encoder_node(made)
    yield made
    made.shutdown()


def add_encoder_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, labels={"role": "encoder"})


def add_training_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, resources={"train": 1})


def settings_of(home: Path, **training: object) -> Settings:
    return load(
        {
            "run": {"storage": str(home / "runs"), "name": "run"},
            "data": {
                "prepared": str(home / "prepared"),
                "soundscapes": {"train": CLIPS, "validation": 16, "test": 48, "seconds": 1.0, "captions": 2},
            },
            "model": {"dim": 32, "width": 0.25},
            "ask": {"prototypes": 16},
            "knowledge": {
                "drift_probe": 0,
                "refresh": {"interval": 2, "warmup_epochs": 0.25},
                "pool": {"cpus": 0.5, "node_labels": {"role": "encoder"}},
            },
            "training": {
                "batch_size": BATCH, "workers": 2, "cpus_per_worker": 1, "node_resource": "train", "evaluation": "beside",
                "evaluation_cpus": 0.5, **training,
            },
            "tracking": {"enabled": False},
        }
    )  # fmt: skip


@dataclass
class Driver:
    """`jobs/train.py` in a process of its own, joined to a cluster."""

    process: subprocess.Popen
    folder: Path
    output: Path

    @classmethod
    def start(cls, settings: Settings, cluster: Cluster, home: Path) -> Driver:
        file, output = home / "settings.yaml", home / "output.txt"
        file.write_text(settings.to_yaml())
        with output.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs/train.py"), "--config", str(file)],
                env={**os.environ, "RAY_ADDRESS": cluster.address}, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return cls(process, home / "runs" / "run", output)

    def history(self) -> list[Event]:
        """The run's events up to its last epoch or version."""
        file = self.folder / "history.json"
        return json.loads(file.read_text()) if file.exists() else []

    def events(self, kind: str) -> list[Event]:
        """Those of a kind."""
        return [event for event in self.history() if event["kind"] == kind]

    def wait(self, look: Callable[[], Found | None], seconds: float, what: str) -> Found:
        """What `look` finds while the run goes on."""

        def alive() -> Found | None:
            assert self.process.poll() is None, self.output.read_text()
            return look()

        return until(alive, seconds, what)

    def result(self, seconds: float) -> dict[str, Any]:
        """The run's result, when it is over."""
        try:
            assert self.process.wait(seconds) == 0, self.output.read_text()
        finally:
            self.process.kill()
        return json.loads((self.folder / "result.json").read_text())


def world_sizes(driver: Driver) -> list[int]:
    return [event["world_size"] for event in driver.events("began")]


def check_whole(driver: Driver, result: dict[str, Any], epochs: int) -> None:
    """The run came to its end: every epoch and evaluation is there, and a whole knowledge base by the final weights."""
    assert result["epochs"] == epochs
    assert {event["epoch"] for event in driver.events("epoch")} == set(range(1, epochs + 1))
    assert {event["epoch"] for event in driver.events("validated")} == {epoch for epoch in range(1, epochs + 1) if epoch % 3 == 0}
    assert {row["entries"] for row in result["refreshes"]} == {CLIPS}
    assert result["refreshes"][-1]["encoder_step"] == result["steps"]
    assert all(of["n"] == 48 for of in result["final"].values())


def test_the_encoder_node_is_lost_while_it_encodes(cluster, tmp_path, tell):
    (lost,) = cluster.worker_nodes
    for _ in range(2):
        add_training_node(cluster)
    driver = Driver.start(settings_of(tmp_path, epochs=4), cluster, tmp_path)
    driver.wait(lambda: running(POOL), 240, "a pool")
    cluster.remove_node(lost, allow_graceful=False)
    driver.wait(lambda: driver.events("epoch"), 240, "an epoch without an encoder node")
    add_encoder_node(cluster)
    result = driver.result(400)
    check_whole(driver, result, 4)
    assert world_sizes(driver) == [2], "training was not touched"
    assert result["steps"] == 4 * CLIPS // (2 * BATCH)
    did = f"{len(driver.events('failed'))} tries failed; a new encoder node took over"
    tell("a node is lost on which the pool encodes", did, Outcome(result, driver.history()))


def test_an_elastic_run_loses_a_node_goes_on_with_one_worker_and_grows_again(cluster, tmp_path, tell):
    epochs = 12
    lost = add_training_node(cluster)
    add_training_node(cluster)
    settings = settings_of(tmp_path, epochs=epochs, min_workers=1, resize_seconds=5)
    driver = Driver.start(settings, cluster, tmp_path)
    driver.wait(lambda: len(driver.events("epoch")) >= 2, 240, "two epochs")
    assert world_sizes(driver) == [2]
    saved = Folder(str(driver.folder))
    before_loss = driver.wait(lambda: checkpoints(saved), 240, "a checkpoint")
    cluster.remove_node(lost, allow_graceful=False)
    driver.wait(lambda: world_sizes(driver) == [2, 1], 240, "a restart with one worker")
    before_growth = checkpoints(saved)
    add_training_node(cluster)
    driver.wait(lambda: world_sizes(driver) == [2, 1, 2], 240, "a restart with two workers")
    result = driver.result(400)
    check_whole(driver, result, epochs)
    assert result["world_size"] == 2
    _, alone, again = driver.events("began")
    for begun, known in ((alone, before_loss), (again, before_growth)):  # each went on from the checkpoint of a whole epoch
        done = [event for event in driver.events("epoch") if event["time"] < begun["time"]]
        assert (begun["step"], begun["epoch"]) in {(event["step"], event["epoch"]) for event in done}
        assert begun["step"] >= max(known), "a checkpoint that was there was lost"
    steps = {event["epoch"]: event["step"] for event in driver.events("epoch") if alone["time"] < event["time"] < again["time"]}
    assert steps[alone["epoch"] + 1] - alone["step"] == CLIPS // BATCH, "one worker takes the whole epoch"
    assert result["steps"] - again["step"] == (epochs - again["epoch"]) * CLIPS // (2 * BATCH)
    did = f"it went on with one worker from step {alone['step']}, with two from step {again['step']} when there was a node again"
    tell("a training node of an elastic run is lost", did, Outcome(result, driver.history()))


def test_a_notice_of_preemption_makes_a_checkpoint_from_which_the_run_goes_on(cluster, tmp_path, tell):
    epochs, per_epoch = 3, CLIPS // (2 * BATCH)
    going = add_training_node(cluster)
    add_training_node(cluster)
    driver = Driver.start(settings_of(tmp_path, epochs=epochs, preemption_steps=5), cluster, tmp_path)
    driver.wait(lambda: driver.events("epoch"), 240, "the first epoch")
    add_training_node(cluster)  # as an autoscaler would
    drain(cluster, going, seconds=120)
    driver.wait(lambda: mid_epoch(driver.folder), 60, "a checkpoint in the middle of an epoch that Ray Train knows")
    cluster.remove_node(going, allow_graceful=False)
    result = driver.result(400)
    check_whole(driver, result, epochs)
    assert result["steps"] == epochs * per_epoch
    (noticed,) = driver.events("preempted")
    assert noticed["step"] % per_epoch, "in the middle of an epoch"
    assert noticed["deadline_ms"] > 1000 * noticed["time"]
    _, again = driver.events("began")
    assert again["step"] == noticed["step"]
    assert again["world_size"] == 2
    assert again["time"] < noticed["deadline_ms"] / 1000, "without waiting for the deadline of a node that is gone"
    did = f"a checkpoint was saved in mid-epoch at step {noticed['step']}, from which two workers went on"
    tell("a training node is lost after a notice of preemption", did, Outcome(result, driver.history()))


def drain(cluster: Cluster, node: Any, seconds: int) -> None:
    """What a cloud's preemption notice comes to: Ray is told that the node will be gone."""
    command = [
        str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address, "--node-id", node.node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", str(seconds),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def mid_epoch(run: Path) -> str | None:
    """The checkpoint in the middle of an epoch that Ray Train has registered, if there is one."""
    known = (run / "checkpoint_manager_snapshot.json").read_text()
    for folder in run.glob("checkpoint_*/state.json"):
        if json.loads(folder.read_text())["place"]["batch"] and folder.parent.name in known:
            return folder.parent.name
    return None

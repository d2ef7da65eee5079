"""The Ray session: joining or starting one, and refusing what it could never schedule."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass

import ray

from ask_ray.config import Settings, SettingsError


@dataclass(frozen=True)
class Needs:
    """The CPUs and GPUs that must be free at once, and how they add up."""

    cpus: float
    gpus: float
    sum: str


def needs_of_training(settings: Settings, gpus_per_worker: float) -> Needs:
    """What training and the refresh beside it reserve together."""
    training, pool = settings.training, settings.knowledge.pool
    cpus = training.workers * training.cpus_per_worker
    gpus = training.workers * gpus_per_worker
    text = f"{training.workers} workers x {training.cpus_per_worker:g} CPU + {gpus_per_worker:g} GPU"
    if settings.ask.enabled:
        cpus += pool.min_actors * pool.cpus
        gpus += pool.min_actors * pool.gpus
        text += f", {pool.min_actors} encoder actors x {pool.cpus:g} CPU + {pool.gpus:g} GPU"
    return Needs(cpus, gpus, text)


def connect(settings: Settings) -> None:
    """Join the cluster that RAY_ADDRESS or a submitted job names, else start Ray on this machine.

    A local session offers at least as many logical CPUs as the run reserves, so that a laptop runs what it can.
    """
    if ray.is_initialized():
        return
    join = bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))
    least = max(needs_of_training(settings, 0).cpus, settings.data.prepare_tasks)
    ray.init(
        address=os.environ.get("RAY_ADDRESS", "auto") if join else "local",
        num_cpus=None if join else max(os.cpu_count() or 1, math.ceil(least)),
        include_dashboard=None if join else False,
        logging_level=logging.ERROR,
        log_to_driver=settings.run.worker_logs,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def gpus_per_worker(settings: Settings) -> int:
    """1 if training is to run on GPUs, by `training.device` and what the cluster has."""
    wanted = settings.training.device
    has = ray.cluster_resources().get("GPU", 0) >= settings.training.workers
    return int(wanted == "cuda" or (wanted == "auto" and has))


def check_schedulable(settings: Settings) -> None:
    """Refuse, before anything starts, a run that this cluster can never hold.

    Raises:
        SettingsError: with the sum of what is asked for and what there is.
    """
    needs = needs_of_training(settings, gpus_per_worker(settings))
    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    if needs.cpus > cpus or needs.gpus > gpus:
        raise SettingsError(
            f"training.workers: the run reserves {needs.cpus:g} CPU and {needs.gpus:g} GPU at once ({needs.sum}), the "
            f"cluster has {cpus:g} CPU and {gpus:g} GPU: lower training.workers, training.cpus_per_worker or "
            "knowledge.pool.cpus, or add nodes"
        )
    largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    for field, asked in (
        ("training.cpus_per_worker", settings.training.cpus_per_worker),
        ("knowledge.pool.cpus", settings.knowledge.pool.cpus),
        ("data.prepare_tasks", 1.0),
    ):
        if asked > largest:
            raise SettingsError(f"{field}: {asked:g} CPU are asked of one node, the largest node has {largest:g}")
    labels = settings.knowledge.pool.node_labels
    if settings.ask.enabled and labels and not any(_has_labels(node, labels) for node in ray.nodes()):
        raise SettingsError(f"knowledge.pool.node_labels: no live node of the cluster carries {labels}")


def _has_labels(node: dict[str, object], labels: dict[str, str]) -> bool:
    carried = node.get("Labels") or {}
    return bool(node["Alive"]) and isinstance(carried, dict) and labels.items() <= carried.items()

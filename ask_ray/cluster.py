"""The Ray session: joining or starting one, and refusing what it could never schedule."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import ray
from ray.exceptions import UserCodeException
from ray.util.state import list_nodes

from ask_ray.config import Settings, SettingsError

#: Workers on a machine without GPUs, where the settings name no number.
CPU_WORKERS = 2
#: What the pool takes of a GPU that it must share with a worker.
SHARED_GPU = 0.25

#: What the process of a trial reserves beside its run.
TRIAL_CPUS = 0.05

#: Whole seconds that a cluster's state API may take to answer.
STATE_SECONDS = 30

#: Shares are summed as floats: less than this is a rounding error, for Ray counts in ten thousandths.
SLACK = 1e-6


def connect(settings: Settings) -> None:
    """Join the cluster that RAY_ADDRESS or a submitted job names, else start Ray on this machine.

    A local session offers at least as many logical CPUs as the run reserves, so that a laptop runs what it can.
    """
    _start(settings, _cpus(settings, settings.training.workers or CPU_WORKERS), dashboard=False)


def connect_for_sweep(settings: Settings, tried: Sequence[Settings], at_once: int | None, stops: bool) -> None:
    """As :func:`connect`, with room for so many trials at once of the largest that are `tried`, by default for as many as this
    machine's cores hold.

    The dashboard is there: without it, Ray 2.60 keeps the resources of trials that were stopped.

    Raises:
        SettingsError: if the sweep `stops` trials, and the cluster that was joined has no dashboard.
    """
    cpus = max((at_once or _on_cores(one)) * (_cpus(one, workers_of_trial(one)) + TRIAL_CPUS) for one in tried)
    if _start(settings, cpus, dashboard=True) and stops:
        _check_state()


def _check_state() -> None:
    """Refuse a cluster whose state API, a part of the dashboard, does not answer: what gives back the resources of a trial that
    was stopped asks it, and the next would wait for them for ever."""
    try:
        list_nodes(address=ray.get_runtime_context().gcs_address, limit=1, timeout=STATE_SECONDS)
    except Exception as error:  # what Ray raises where there is none at all has no one name
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SettingsError(
            f"sweep: it stops trials (sweep.early_stopping, or sweep.algorithm pbt), and the cluster has no dashboard, without "
            f"which Ray never gives back what they held ({cause}): start the cluster with it (ray start --head "
            "--include-dashboard=true), set sweep.early_stopping to false, or choose another sweep.algorithm"
        ) from error


def _on_cores(settings: Settings) -> int:
    """How many trials the cores of this machine hold, whatever Ray was told of them."""
    return max(1, int((os.cpu_count() or 1) / _cpus(settings, workers_of_trial(settings))))


def workers_of_trial(settings: Settings) -> int:
    """The workers of each trial of a sweep: one, unless the settings say more. Several trials are the better use of a cluster."""
    return settings.training.workers or 1


def _start(settings: Settings, cpus: float, dashboard: bool) -> bool:
    """Join a cluster or start one, unless this process has a session; whether one was joined.

    Raises:
        SettingsError: if no cluster answers where one was to be joined.
    """
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean the same for workers and trials
    if ray.is_initialized():
        return False
    join = bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))
    address = os.environ.get("RAY_ADDRESS", "auto") if join else "local"
    least = max(cpus, settings.data.prepare_tasks)
    try:
        ray.init(
            address=address,
            num_cpus=None if join else max(os.cpu_count() or 1, math.ceil(least)),
            include_dashboard=None if join else dashboard,
            logging_level=logging.ERROR,
            log_to_driver=settings.run.worker_logs,
        )
    except ConnectionError as error:
        raise SettingsError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({error}): start it (ray start --head), correct the address, or "
            "unset it to run on this machine alone"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return join


def _cpus(settings: Settings, workers: int) -> float:
    """CPUs that training and what runs beside it, the pool and an evaluation, reserve at once."""
    training, pool = settings.training, settings.knowledge.pool
    beside = pool.min_actors * pool.cpus if settings.ask.enabled else 0.0
    return round(workers * training.cpus_per_worker + beside + _evaluation_cpus(settings), 4)  # as fine as Ray counts


def _evaluation_cpus(settings: Settings) -> float:
    return settings.training.evaluation_cpus if settings.training.evaluates_beside else 0.0


def fitted(settings: Settings) -> Settings:
    """The settings with every share that was left open filled in by what the cluster has, and proven to fit.

    Raises:
        SettingsError: for a run that this cluster can never hold, with the sum of what is asked for and what there is.
    """
    there, nodes = ray.cluster_resources(), _alive()
    made = share(settings, nodes)
    _check_sum(made, there.get("CPU", 0.0), there.get("GPU", 0.0))
    _check_nodes(made, nodes)
    _check_places(made, nodes)
    return made


def trials_at_once(settings: Settings, wanted: int | None) -> int:
    """How many trials with :func:`fitted` settings the cluster holds at once, each whole, so that none waits for another; on a
    single machine no more than its cores hold, unless so many are `wanted`.

    Raises:
        SettingsError: if not one fits beside its own process, with the sum.
    """
    nodes = [{**node, "Resources": dict(node["Resources"]), "GPUs": _whole_gpus(node)} for node in _alive()]
    count = 0
    while _placed(settings, nodes):
        count += 1
    if count == 0:
        there = ray.cluster_resources()
        training, pool = settings.training, settings.knowledge.pool
        raise SettingsError(
            f"sweep: a trial reserves {TRIAL_CPUS:g} CPU for itself, {training.workers} workers x ({training.cpus_per_worker:g} "
            f"CPU + {training.gpus_per_worker or 0:g} GPU), {pool.min_actors} encoder actors x ({pool.cpus:g} CPU + "
            f"{pool.gpus or 0:g} GPU) and {_evaluation_cpus(settings):g} CPU for evaluation; the cluster's nodes hold "
            f"{there.get('CPU', 0):g} CPU and {there.get('GPU', 0):g} GPU: lower these, or add nodes"
        )
    return count if wanted or len(nodes) > 1 else min(count, _on_cores(settings))


def _placed(settings: Settings, nodes: list[dict[str, Any]]) -> bool:
    """Take one trial's shares from the nodes, each where it may run and first fits; false if one does not. Those come first that
    the fewest nodes may hold, else they would find these taken; of the others the largest."""
    training, pool = settings.training, settings.knowledge.pool
    worker = {"CPU": training.cpus_per_worker, "GPU": training.gpus_per_worker or 0.0}
    actor = {"CPU": pool.cpus, "GPU": pool.gpus or 0.0}
    parts = [(worker, [node for node in nodes if _trains(settings, node)])] * (training.workers or 0)
    parts += [(actor, [node for node in nodes if _encodes(settings, node)])] * (pool.min_actors if settings.ask.enabled else 0)
    parts += [({"CPU": share}, nodes) for share in (_evaluation_cpus(settings), TRIAL_CPUS)]
    parts.sort(key=lambda one: (len(one[1]), -one[0].get("GPU", 0.0), -one[0]["CPU"]))
    return all(any(_taken(part, node) for node in on) for part, on in parts)


def _whole_gpus(node: dict[str, Any]) -> list[float]:
    """What is left of each GPU of a node of which nothing is taken."""
    return [1.0] * int(node["Resources"].get("GPU", 0.0))


def _taken(part: dict[str, float], node: dict[str, Any]) -> bool:
    """Take shares from a node, if they fit. Less than a GPU is of one, which as in Ray is that with the least left."""
    has, left, share = node["Resources"], node["GPUs"], part.get("GPU", 0.0)
    each, count = min(share, 1.0), math.ceil(share)
    fitting = sorted((gpu for gpu, of_one in enumerate(left) if of_one + SLACK >= each), key=left.__getitem__)
    if has.get("CPU", 0.0) + SLACK < part["CPU"] or len(fitting) < count:
        return False
    has["CPU"] = has.get("CPU", 0.0) - part["CPU"]
    for gpu in fitting[:count]:
        left[gpu] -= each
    return True


def check_whole_cpu(what: str) -> None:
    """Refuse what takes a whole CPU for each task where no node has one: such tasks would wait for ever.

    Raises:
        SettingsError: beginning with `what`.
    """
    largest = max((node["Resources"].get("CPU", 0.0) for node in _alive()), default=0.0)
    if largest < 1:
        raise SettingsError(
            f"{what} takes a whole CPU for each task, and no live node of the cluster has one (the largest has {largest:g}): add "
            "a node with CPUs, or start Ray with more (--num-cpus)"
        )


def _alive() -> list[dict[str, Any]]:
    """The live nodes, as Ray tells of them."""
    return [node for node in ray.nodes() if node["Alive"]]


def raised_by(error: BaseException) -> str | None:
    """What a function raised that Ray Data called in a task, in a line: it keeps that as text alone. None for any other error."""
    if not isinstance(getattr(error, "cause", None) or error, UserCodeException):
        return None
    before = str(error).rsplit("\nThe above exception", 1)[0]
    raised: list[str] = re.findall(r"^(?:\w+\.)*(\w+(?:Error|Exception|Exit)\b.*)$", before, re.MULTILINE)
    return raised[-1] if raised else None


def several_nodes() -> bool:
    """Whether there is more than one."""
    return len(_alive()) > 1


def memories(settings: Settings) -> list[float]:
    """Bytes of memory of each live node that workers may run on, as Ray counts it."""
    return [node["Resources"].get("memory", 0.0) for node in _alive() if _trains(settings, node)]


def share(settings: Settings, nodes: list[dict[str, Any]]) -> Settings:
    """Deal the nodes' GPUs to the workers and encoder actors that may run there, where the settings leave it open."""
    training, pool = settings.training, settings.knowledge.pool
    trained_on = [node for node in nodes if _trains(settings, node)]
    gpus = _gpus(trained_on)
    device = training.device if training.device != "auto" else ("cuda" if gpus >= 1 else "cpu")
    if device == "cpu":
        shares: dict[str, object] = {"workers": training.workers or CPU_WORKERS, "gpus_per_worker": None, "device": device}
        return _filled(settings, shares, pool.gpus or 0.0)
    workers = training.workers or max(1, int(gpus))
    both = _gpus([node for node in trained_on if _encodes(settings, node)])  # workers may be put on these first
    encoding = _gpus([node for node in nodes if _encodes(settings, node)])
    spare = encoding - min(workers, both) >= pool.min_actors or not settings.ask.enabled
    whole = spare or not both or training.min_workers is not None  # elastic workers reserve no fractions
    per_worker = training.gpus_per_worker or (1.0 if whole else 1.0 - SHARED_GPU)
    of_pool = pool.gpus if pool.gpus is not None else (1.0 if spare else _shared(encoding, pool.min_actors))
    return _filled(settings, {"workers": workers, "gpus_per_worker": per_worker, "device": device}, of_pool)


def _gpus(nodes: list[dict[str, Any]]) -> float:
    return sum(node["Resources"].get("GPU", 0.0) for node in nodes)


def _shared(gpus: float, actors: int) -> float:
    """What each actor takes of a GPU where they have not one each; nothing where the pool's nodes have none."""
    return SHARED_GPU / math.ceil(actors / gpus) if gpus else 0.0


def _filled(settings: Settings, training: dict[str, object], pool_gpus: float) -> Settings:
    knowledge = settings.knowledge
    pool = knowledge.pool.model_copy(update={"gpus": pool_gpus})
    return settings.model_copy(
        update={
            "training": settings.training.model_copy(update=training),
            "knowledge": knowledge.model_copy(update={"pool": pool}),
        }
    )


def _at_once(settings: Settings) -> tuple[int, int]:
    """The workers, of an elastic run the least, and the encoder actors that a run cannot do without."""
    training = settings.training
    return training.min_workers or training.workers or 0, settings.knowledge.pool.min_actors if settings.ask.enabled else 0


def _check_sum(settings: Settings, cpus: float, gpus: float) -> None:
    training, pool = settings.training, settings.knowledge.pool
    (workers, actors), each = _at_once(settings), training.gpus_per_worker or 0.0
    asked_cpus, asked_gpus = _cpus(settings, workers), round(workers * each + actors * (pool.gpus or 0.0), 4)
    if asked_cpus > cpus or asked_gpus > gpus:
        raise SettingsError(
            f"training.workers: the run reserves {asked_cpus:g} CPU and {asked_gpus:g} GPU at once ({workers} workers x "
            f"{training.cpus_per_worker:g} CPU + {each:g} GPU, {actors} encoder actors x {pool.cpus:g} CPU + "
            f"{pool.gpus or 0.0:g} GPU, {_evaluation_cpus(settings):g} CPU for evaluation beside training), the cluster has "
            f"{cpus:g} CPU and {gpus:g} GPU: lower training.workers, training.cpus_per_worker, training.evaluation_cpus or "
            "knowledge.pool.cpus, set training.device to cpu, or add nodes"
        )


def _check_nodes(settings: Settings, nodes: list[dict[str, Any]]) -> None:
    """What one worker, actor or task reserves must fit on one node that it may run on."""
    training, pool = settings.training, settings.knowledge.pool
    trained_on = [node for node in nodes if _trains(settings, node)]
    if not trained_on:
        raise SettingsError(f"training.node_resource: no live node of the cluster offers {training.node_resource!r}")
    encoded_on = [node for node in nodes if _encodes(settings, node)]
    if settings.ask.enabled and not encoded_on:
        raise SettingsError(f"knowledge.pool.node_labels: no live node of the cluster carries {pool.node_labels}")
    for field, kind, asked, on in (
        ("training.cpus_per_worker", "CPU", training.cpus_per_worker, trained_on),
        ("training.gpus_per_worker", "GPU", training.gpus_per_worker or 0.0, trained_on),
        ("knowledge.pool.cpus", "CPU", pool.cpus if settings.ask.enabled else 0.0, encoded_on),
        ("knowledge.pool.gpus", "GPU", (pool.gpus or 0.0) if settings.ask.enabled else 0.0, encoded_on),
        ("training.evaluation_cpus", "CPU", _evaluation_cpus(settings), nodes),
    ):
        largest = max((node["Resources"].get(kind, 0.0) for node in on), default=0.0)
        if asked > largest:
            raise SettingsError(
                f"{field}: {asked:g} {kind} are asked of one node, the largest node that may be used for it has {largest:g}"
            )
    if training.min_workers is not None and settings.ask.enabled:
        _check_room(settings, encoded_on)


def _check_places(settings: Settings, nodes: list[dict[str, Any]]) -> None:
    """All that a run reserves at once must find its places, each worker, actor or task whole on a node: Ray would go on trying.

    Raises:
        SettingsError: with what is asked for and what each node has.
    """
    if _fits(settings, nodes):
        return
    training, pool, (workers, actors) = settings.training, settings.knowledge.pool, _at_once(settings)
    raise SettingsError(
        f"training.workers: the run reserves at once {workers} workers x ({training.cpus_per_worker:g} CPU + "
        f"{training.gpus_per_worker or 0.0:g} GPU), {actors} encoder actors x ({pool.cpus:g} CPU + {pool.gpus or 0.0:g} GPU) and "
        f"{_evaluation_cpus(settings):g} CPU for evaluation beside training, each whole on one node, less than a GPU on one GPU, "
        f"and the nodes cannot hold them: {_told(settings, nodes)}. Lower training.workers, training.cpus_per_worker or "
        "knowledge.pool.cpus, or add nodes"
    )


def _told(settings: Settings, nodes: list[dict[str, Any]]) -> str:
    """What nodes have, and what may not run on them."""
    told: Counter[str] = Counter()
    for node in nodes:
        has = node["Resources"]
        barred = ["not for workers"] * (not _trains(settings, node)) + ["not for the pool"] * (not _encodes(settings, node))
        told[", ".join([f"{has.get('CPU', 0.0):g} CPU + {has.get('GPU', 0.0):g} GPU", *barred])] += 1
    return "; ".join(f"{count} x ({one})" for one, count in told.items())


def _fits(settings: Settings, nodes: list[dict[str, Any]]) -> bool:
    """Whether the nodes can hold all that a run reserves at once.

    `most` holds, node after node, by how many workers are placed and whether the evaluation is, how many actors can be beside
    them: unlike with first fit, no way to place them is missed, and what fits is never refused.
    """
    workers, actors = _at_once(settings)
    most = {(0, _evaluation_cpus(settings) == 0): 0}
    for node in nodes:
        reached: dict[tuple[int, bool], int] = {}
        room = int((node["Resources"].get("CPU", 0.0) + SLACK) // settings.training.cpus_per_worker)
        for (placed, evaluated), held in most.items():
            for more, evaluates in product(range(min(workers - placed, room) + 1), {False, not evaluated}):
                beside = _actors_beside(settings, node, more, evaluates)
                if beside is not None:
                    key = (placed + more, evaluated or evaluates)
                    reached[key] = max(reached.get(key, 0), held + beside)
        most = reached
    return most.get((workers, True), -1) >= actors


def _actors_beside(settings: Settings, node: dict[str, Any], workers: int, evaluates: bool) -> int | None:
    """How many actors fit on a node beside so many workers and, if it `evaluates`, the evaluation; None if those do not fit."""
    training, pool, has = settings.training, settings.knowledge.pool, node["Resources"]
    taken = workers * training.cpus_per_worker + (_evaluation_cpus(settings) if evaluates else 0.0)
    cpus = has.get("CPU", 0.0) - taken
    gpus = _left_of_gpus(int(has.get("GPU", 0.0)), workers, training.gpus_per_worker or 0.0)
    if cpus < -SLACK or not gpus or (workers and not _trains(settings, node)):
        return None
    if not _encodes(settings, node):
        return 0
    on_gpus = max(_actors_on(left, pool.gpus) for left in gpus) if pool.gpus else math.inf
    return int(min((cpus + SLACK) // pool.cpus, on_gpus))


def _left_of_gpus(gpus: int, workers: int, share: float) -> list[list[float]]:
    """What workers leave of each GPU of a node, for every number of them on one; none if they do not fit. A part of a GPU is of
    one GPU."""
    if workers == 0 or share == 0:
        return [[1.0] * gpus]
    made = []
    for each in range(1, int((1 + SLACK) // share) + 1):
        used = [min(each, workers - first) for first in range(0, workers, each)]
        if len(used) <= gpus:
            made.append([1.0 - of * share for of in used] + [1.0] * (gpus - len(used)))
    return made


def _actors_on(left: list[float], share: float) -> int:
    """How many actors fit where so much is left of each GPU."""
    if share >= 1:
        return int((sum(one == 1 for one in left) + SLACK) // share)
    return sum(int((one + SLACK) // share) for one in left)


def _trains(settings: Settings, node: dict[str, Any]) -> bool:
    """Whether workers may run on a node."""
    resource = settings.training.node_resource
    return resource is None or node["Resources"].get(resource, 0.0) > 0


def _encodes(settings: Settings, node: dict[str, Any]) -> bool:
    """Whether the pool may run on a node."""
    return settings.knowledge.pool.node_labels.items() <= (node.get("Labels") or {}).items()


def _check_room(settings: Settings, nodes: list[dict[str, Any]]) -> None:
    """An elastic run grows into every CPU and GPU that Ray Train counts, and it counts those that the pool uses too: what
    `training.workers` cannot take of the pool's nodes must hold the pool."""
    training, pool = settings.training, settings.knowledge.pool
    wanted = {"CPU": (training.cpus_per_worker, pool.cpus), "GPU": (training.gpus_per_worker or 0.0, pool.gpus or 0.0)}
    room = 0
    for node in nodes:
        has = {name: node["Resources"].get(name, 0.0) for name in wanted}
        most = training.workers or 0 if _trains(settings, node) else 0
        workers = min([most, *(int(has[name] // worker) for name, (worker, _) in wanted.items() if worker)])
        left = {name: round(has[name] - workers * worker, 4) for name, (worker, _) in wanted.items()}
        room += min(int(left[name] // actor) for name, (_, actor) in wanted.items() if actor)
    if room < pool.min_actors:
        raise SettingsError(
            f"training.min_workers: elastic workers could take all but the room of {room} encoder actors, where "
            f"knowledge.pool.min_actors asks for {pool.min_actors}: name a custom resource of the training nodes as "
            "training.node_resource, and leave nodes without it to the pool"
        )

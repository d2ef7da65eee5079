"""How GPUs are dealt out, and which runs a cluster can never hold."""

import contextlib
from itertools import product
from types import SimpleNamespace

import pytest
import ray
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from ray.util.state.exception import ServerUnavailable

from ask_ray import cluster
from ask_ray.config import Settings, SettingsError, load


def of(training: dict | None = None, pool: dict | None = None, **ask: object) -> Settings:
    pool = {"max_actors": 64} | (pool or {})
    return load({"training": training or {}, "knowledge": {"pool": pool}, "ask": ask})


def node(cpus: float, gpus: float = 0.0, train: bool = False, **labels: str) -> dict:
    """A live node as Ray tells of it, with the resource `train` if asked for."""
    resources = {"CPU": float(cpus), "GPU": float(gpus)} | ({"train": 1.0} if train else {})
    return {"Alive": True, "Resources": resources, "Labels": labels}


def dealt(settings: Settings, gpus: float) -> tuple:
    made = cluster.share(settings, [node(64, gpus)])
    training = made.training
    return training.device, training.workers, training.gpus_per_worker, made.knowledge.pool.gpus


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        (of(), 0, ("cpu", 2, None, 0.0)),
        (of({"workers": 3}), 0, ("cpu", 3, None, 0.0)),
        (of({"device": "cpu"}), 4, ("cpu", 2, None, 0.0)),
        (of(), 1, ("cuda", 1, 0.75, 0.25)),
        (of(), 4, ("cuda", 4, 0.75, 0.25)),
        (of({"workers": 3}), 4, ("cuda", 3, 1.0, 1.0)),
        (of({"workers": 4, "min_workers": 2, "cpus_per_worker": 1}), 4, ("cuda", 4, 1.0, 0.25)),
        (of({"workers": 3}, {"min_actors": 2}), 4, ("cuda", 3, 0.75, 0.25)),
        (of(enabled=False), 2, ("cuda", 2, 1.0, 1.0)),
        (of({"gpus_per_worker": 0.5}, {"gpus": 0.5}), 1, ("cuda", 1, 0.5, 0.5)),
        (of({"workers": 1}, {"gpus": 0.0}), 1, ("cuda", 1, 0.75, 0.0)),
    ],
)
def test_gpus_are_dealt_to_workers_and_pool(settings, gpus, expected):
    assert dealt(settings, gpus) == expected


@given(gpus=st.integers(0, 64), enabled=st.booleans())
@budget(deadline=None)
def test_what_is_dealt_fits_where_nothing_was_asked_for(gpus, enabled):
    made = cluster.share(of(enabled=enabled), [node(64, gpus)])
    pool = (made.knowledge.pool.gpus or 0.0) if enabled else 0.0
    assert (made.training.workers or 0) * (made.training.gpus_per_worker or 0.0) + pool <= gpus
    assert made.training.workers == (gpus or 2)


TRAIN, APART = {"node_resource": "train"}, {"node_labels": {"role": "encoder"}}
TRAINING = [node(4, 1, True)] * 2


@pytest.mark.parametrize(
    ("settings", "nodes", "expected"),
    [
        # GPUs that one side alone may use are dealt to that side alone
        (of(TRAIN, APART), [*TRAINING, node(8, role="encoder")], ("cuda", 2, 1.0, 0.0)),
        (of(TRAIN, APART), [*TRAINING, node(8, 1, role="encoder")], ("cuda", 2, 1.0, 1.0)),
        (of(TRAIN, APART | {"min_actors": 3}), [*TRAINING, node(8, 2, role="encoder")], ("cuda", 2, 1.0, 0.125)),
        (of(TRAIN, APART), [node(4, 0, True), node(8, 1, role="encoder")], ("cpu", 2, None, 0.0)),
        (of(TRAIN), [*TRAINING, node(8, 1)], ("cuda", 2, 1.0, 1.0)),
        (of(pool=APART), [*TRAINING, node(8, role="encoder")], ("cuda", 2, 1.0, 0.0)),
        # workers may be put on any GPU that they may use
        (of({"workers": 2}, APART), [*TRAINING, node(8, 1, role="encoder")], ("cuda", 2, 0.75, 0.25)),
        (of({"workers": 1}, APART), [*TRAINING, node(8, 2, role="encoder")], ("cuda", 1, 1.0, 1.0)),
    ],
)
def test_gpus_count_only_where_who_gets_them_may_run(settings, nodes, expected, monkeypatch):
    made = fitted(settings, nodes, monkeypatch)
    assert (made.training.device, made.training.workers, made.training.gpus_per_worker, made.knowledge.pool.gpus) == expected


def fitted(settings: Settings, nodes: list[dict], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings fitted to a cluster of such nodes."""
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(
        ray, "cluster_resources", lambda: {kind: sum(one["Resources"][kind] for one in nodes) for kind in ("CPU", "GPU")}
    )
    return cluster.fitted(settings)


CPUS = {"device": "cpu", "cpus_per_worker": 2.0}
BESIDE = {"evaluation": "beside", "evaluation_cpus": 2.0}
THREE = {"workers": 3, "gpus_per_worker": 0.75}


@pytest.mark.parametrize(
    ("settings", "nodes", "told"),
    [
        (of({**CPUS, "workers": 3}, enabled=False), [node(3)] * 2, r"3 workers x \(2 CPU .*: 2 x \(3 CPU"),
        (
            of(THREE | TRAIN, APART | {"gpus": 0.25}),
            [*TRAINING, node(8, 1, role="encoder")],
            r"3 workers x .*0\.75 GPU.*: 2 x \(4 CPU \+ 1 GPU, not for the pool\); 1 x \(8 CPU \+ 1 GPU, not for workers\)",
        ),
        (of({**THREE, "workers": 5}, {"gpus": 0.25}), [node(64, 4)], r"5 workers x .*1 x \(64 CPU \+ 4 GPU\)"),
        (of({**CPUS, "workers": 2}, {"cpus": 2.0, "min_actors": 2}), [node(5), node(3)], r"2 encoder actors x \(2 CPU"),
        (of({**CPUS, **BESIDE, "workers": 2}, enabled=False), [node(3)] * 2, "and 2 CPU for evaluation beside training, each"),
        (of({**CPUS, "workers": 9, "min_workers": 2}, enabled=False), [node(3), node(1)], r"2 workers x \(2 CPU"),
    ],
)
def test_a_run_whose_parts_find_no_places_is_refused_though_its_sum_fits(settings, nodes, told, monkeypatch):
    with pytest.raises(SettingsError, match=told):
        fitted(settings, nodes, monkeypatch)


@pytest.mark.parametrize(
    ("settings", "nodes"),
    [
        (of({**CPUS, "workers": 2}, {"cpus": 1.5, "min_actors": 2}), [node(3), node(4)]),  # not as they first fit
        (of({**CPUS, "workers": 2}, APART | {"cpus": 1.0, "min_actors": 2}), [node(4, role="encoder"), node(2)]),
        (of({"workers": 4, "gpus_per_worker": 0.75}, {"gpus": 0.25, "min_actors": 4}), [node(64, 4)]),
        (of({"workers": 2, "gpus_per_worker": 0.4}, {"gpus": 0.6, "min_actors": 2}), [node(64, 2)]),
        (of({"workers": 4, "gpus_per_worker": 0.5}, {"gpus": 1.0}), [node(64, 3)]),
        (of({"workers": 1, "gpus_per_worker": 1.0}, {"gpus": 2.0}), [node(64, 3)]),
        (of({**CPUS, "workers": 31, "cpus_per_worker": 3.85}, {"cpus": 2.55, "min_actors": 3}), [node(127)]),
    ],
)
def test_a_run_whose_parts_fit_on_the_nodes_in_some_way_is_not_refused(settings, nodes, monkeypatch):
    fitted(settings, nodes, monkeypatch)


@given(
    nodes=st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.booleans()), min_size=1, max_size=3),
    shares=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    counts=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_places_are_found_where_there_are_any(nodes, shares, counts):
    (worker, actor, evaluation), (workers, actors) = shares, counts
    training = {"workers": workers, "cpus_per_worker": float(worker), "node_resource": "train", "evaluation": "beside"}
    settings = of({**training, "evaluation_cpus": float(evaluation)}, APART | {"cpus": float(actor), "min_actors": actors})
    there = [node(cpus, 0, train, **({"role": "encoder"} if encode else {})) for cpus, train, encode in nodes]
    parts = [(worker, 1)] * workers + [(actor, 2)] * actors + [(evaluation, None)]
    fits = any(
        all(may is None or nodes[at][may] for (_, may), at in zip(parts, places, strict=True))
        and all(
            sum(share for (share, _), at in zip(parts, places, strict=True) if at == one) <= nodes[one][0]
            for one in range(len(nodes))
        )
        for places in product(range(len(nodes)), repeat=len(parts))
    )
    assert cluster._fits(settings, there) == fits


def test_memory_counts_where_workers_may_run(monkeypatch):
    nodes = [node(4, train=True), node(4)]
    for one, memory in zip(nodes, (8.0, 64.0), strict=True):
        one["Resources"]["memory"] = memory
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert cluster.memories(of({"node_resource": "train"})) == [8.0]
    assert cluster.memories(of()) == [8.0, 64.0]


def test_what_the_settings_say_is_kept():
    asked = of({"workers": 5, "gpus_per_worker": 0.3, "device": "cuda"}, {"gpus": 0.1, "min_actors": 4}, rho=0.3)
    assert cluster.share(asked, [node(64, 8)]) == asked


def test_the_sum_of_training_and_pool_is_refused_with_its_parts():
    made = cluster.share(of({"workers": 6, "cpus_per_worker": 2.0}, {"min_actors": 3, "cpus": 1.5}), [])
    cluster._check_sum(made, 16.5, 0)
    with pytest.raises(SettingsError) as refusal:
        cluster._check_sum(made, 16.0, 0)
    message = str(refusal.value)
    assert message.startswith("training.workers: ")
    for part in ("16.5 CPU", "6 workers x 2 CPU", "3 encoder actors x 1.5 CPU", "16 CPU and 0 GPU"):
        assert part in message


def test_gpus_are_summed_like_cpus():
    made = cluster.share(
        of({"workers": 2, "gpus_per_worker": 1.0, "device": "cuda"}, {"gpus": 0.5, "min_actors": 2}), [node(0, 3)]
    )
    cluster._check_sum(made, 100, 3)
    with pytest.raises(SettingsError, match="2 GPU"):
        cluster._check_sum(made, 100, 2)


def test_evaluation_beside_training_is_counted_where_there_will_be_any():
    training = {"workers": 2, "cpus_per_worker": 1.0, "evaluation": "beside", "evaluation_cpus": 0.75}
    made = cluster.share(of(training), [])
    cluster._check_sum(made, 3.25, 0)
    with pytest.raises(SettingsError, match=r"3\.25 CPU .* 0\.75 CPU for evaluation beside training"):
        cluster._check_sum(made, 3.0, 0)
    with pytest.raises(SettingsError, match=r"^training\.evaluation_cpus: 3 CPU .* has 2"):
        cluster._check_nodes(of(training | {"evaluation_cpus": 3.0}), [{"Resources": {"CPU": 2.0}}])
    for never in ({"evaluation": "workers"}, {"evaluate_every": 0}, {"evaluate_every": 15}):
        cluster._check_sum(cluster.share(of(training | never), []), 2.5, 0)


def test_an_elastic_run_fits_by_its_least_number_of_workers():
    made = cluster.share(of({"workers": 8, "min_workers": 2, "cpus_per_worker": 1.0}, {"cpus": 0.5}), [])
    cluster._check_sum(made, 2.5, 0)
    with pytest.raises(SettingsError, match="2 workers x 1 CPU"):
        cluster._check_sum(made, 2.0, 0)


def test_without_the_method_no_pool_is_counted():
    pool = {"min_actors": 50, "cpus": 9.0, "node_labels": {"zone": "a"}}
    plain = cluster.share(of({"workers": 2, "cpus_per_worker": 2.0}, pool, enabled=False), [])
    cluster._check_sum(plain, 4, 0)
    cluster._check_nodes(plain, [{"Resources": {"CPU": 4.0}}])


def test_shares_that_add_up_to_the_cluster_are_not_refused_for_a_rounding_error():
    made = cluster.share(of({"workers": 31, "cpus_per_worker": 3.85}, {"min_actors": 3, "cpus": 2.55}), [])
    assert 31 * 3.85 + 3 * 2.55 > 127
    cluster._check_sum(made, 127, 0)


def test_what_one_worker_or_actor_reserves_must_fit_on_one_node():
    nodes = [{"Resources": {"CPU": 2.0}}, {"Resources": {"CPU": 4.0}}, {"Resources": {}}]
    cluster._check_nodes(of({"cpus_per_worker": 4.0}, {"cpus": 4.0}), nodes)
    with pytest.raises(SettingsError, match=r"^training\.cpus_per_worker: 5 CPU .* has 4"):
        cluster._check_nodes(of({"cpus_per_worker": 5.0}), nodes)
    with pytest.raises(SettingsError, match=r"^knowledge\.pool\.cpus: 4\.5 CPU .* has 4"):
        cluster._check_nodes(of(pool={"cpus": 4.5}), nodes)
    with pytest.raises(SettingsError, match=r"^knowledge\.pool\.gpus: 0\.5 GPU .* has 0"):
        cluster._check_nodes(of(pool={"gpus": 0.5}), nodes)
    with pytest.raises(SettingsError, match=r"^training\.gpus_per_worker: 0\.5 GPU .* has 0"):
        cluster._check_nodes(of({"gpus_per_worker": 0.5, "node_resource": "train"}), [node(4, 0, True), node(4, 2)])


ELASTIC = {"workers": 4, "min_workers": 1, "cpus_per_worker": 2.0, "device": "cpu"}


@pytest.mark.parametrize(
    ("cpus", "pool", "room"),
    [
        ((8.0,), {}, 0),  # four workers take all of it
        ((9.0,), {}, 2),
        ((16.0,), {"min_actors": 16}, 16),
        ((5.0, 5.0), {"min_actors": 4}, 4),  # any node may be the one that is left
        ((8.0, 0.5), {}, 1),
        ((8.0, 0.5), {"cpus": 0.6}, 0),
    ],
)
def test_an_elastic_run_may_not_grow_into_the_room_of_the_pool(cpus, pool, room):
    made = cluster.share(of(ELASTIC, {"cpus": 0.5} | pool), [])
    nodes = [{"Resources": {"CPU": of_node}} for of_node in cpus]
    if room >= made.knowledge.pool.min_actors:
        cluster._check_nodes(made, nodes)
    else:
        with pytest.raises(SettingsError, match=rf"^training\.min_workers: .* room of {room} encoder actors"):
            cluster._check_nodes(made, nodes)
    cluster._check_nodes(made.model_copy(update={"ask": of(enabled=False).ask}), nodes)


def test_a_resource_keeps_training_off_the_nodes_of_the_pool():
    training, encoding = {"Resources": {"CPU": 4.0, "train": 1.0}}, {"Resources": {"CPU": 8.0}, "Labels": {"role": "encoder"}}
    pool = {"cpus": 4.0, "min_actors": 2, "node_labels": {"role": "encoder"}}
    made = cluster.share(of(ELASTIC | {"node_resource": "train"}, pool), [])
    cluster._check_nodes(made, [training, encoding])
    with pytest.raises(SettingsError, match=r"^training\.node_resource: no live node .* offers 'train'"):
        cluster._check_nodes(made, [encoding])
    with pytest.raises(SettingsError, match=r"^training\.cpus_per_worker: 5 CPU .* has 4"):
        cluster._check_nodes(of({"cpus_per_worker": 5.0, "node_resource": "train"}, pool), [training, encoding])
    with pytest.raises(SettingsError, match=r"^knowledge\.pool\.cpus: 9 CPU .* has 8"):
        cluster._check_nodes(of({"node_resource": "train"}, pool | {"cpus": 9.0}), [training, encoding])


def test_trials_are_counted_by_the_nodes_on_which_their_parts_may_run(monkeypatch):
    node = {"Alive": True, "Labels": {}}
    trains = [{**node, "Resources": {"CPU": 4.0, "train": 1.0}} for _ in range(2)]
    encodes = {**node, "Resources": {"CPU": 64.0}, "Labels": {"ask_ray": "encoder"}}
    monkeypatch.setattr(ray, "nodes", lambda: [*trains, encodes])
    training = {"workers": 1, "cpus_per_worker": 2.0, "device": "cpu"}
    free, bound = of(training), of({**training, "node_resource": "train"}, {"node_labels": {"ask_ray": "encoder"}})
    assert (
        cluster.trials_at_once(bound, None) == 3
    )  # a fourth would need all of the 8 CPUs that the trials themselves take some of
    assert cluster.trials_at_once(free, None) > 20
    monkeypatch.setattr(ray, "nodes", lambda: [*trains, {**encodes, "Resources": {"CPU": 0.0}}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(SettingsError, match=r"^sweep: a trial reserves"):
        cluster.trials_at_once(bound, None)


@pytest.mark.parametrize(
    ("settings", "gpus", "count"),
    [
        (of({"workers": 1, "gpus_per_worker": 0.6}, enabled=False), 3, 3),  # 1.8 of 3, but a part is of one GPU
        (of({"workers": 2, "gpus_per_worker": 0.6}, enabled=False), 3, 1),
        (of({"workers": 1, "gpus_per_worker": 0.75}, {"gpus": 0.25}), 4, 4),
        (of({"workers": 1, "gpus_per_worker": 0.3}, enabled=False), 2, 6),
        (of({"workers": 1, "gpus_per_worker": 1.0}, {"gpus": 2.0}), 7, 2),
    ],
)
def test_trials_are_counted_with_each_gpu_apart(settings, gpus, count, monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [node(64, gpus), node(1)])
    assert cluster.trials_at_once(settings, None) == count


@pytest.mark.parametrize(
    ("training", "pool", "nodes"),
    [
        ({"cpus_per_worker": 2.0}, APART | {"cpus": 1.0}, [node(2, role="encoder"), node(3)]),
        ({"cpus_per_worker": 1.0, **TRAIN}, {"cpus": 2.0}, [node(2, train=True), node(3)]),
    ],
    ids=["pool-bound", "workers-bound"],
)
def test_what_few_nodes_may_hold_finds_its_place_before_what_fits_on_others(training, pool, nodes, monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert cluster.trials_at_once(of({"workers": 1, "device": "cpu", **training}, pool), None) == 1


def test_labels_must_be_carried_by_one_node_all_at_once():
    nodes = [{"Resources": {"CPU": 4.0}, "Labels": labels} for labels in ({"zone": "a"}, {"kind": "x"}, None)]
    cluster._check_nodes(of(pool={"node_labels": {"zone": "a"}}), nodes)
    with pytest.raises(SettingsError, match=r"^knowledge\.pool\.node_labels: "):
        cluster._check_nodes(of(pool={"node_labels": {"zone": "a", "kind": "x"}}), nodes)


def test_a_real_session_holds_what_fits_and_refuses_what_does_not(ray_session):
    made = cluster.fitted(of({"workers": 3, "cpus_per_worker": 1.0, "device": "cpu"}, {"cpus": 1.0}))
    assert (made.training.workers, made.training.device, made.knowledge.pool.gpus) == (3, "cpu", 0.0)
    with pytest.raises(SettingsError, match=r"^training\.workers: .* the cluster has 4 CPU"):
        cluster.fitted(of({"workers": 4, "cpus_per_worker": 1.0, "device": "cpu"}, {"cpus": 1.0}))
    with pytest.raises(SettingsError, match=r"^knowledge\.pool\.node_labels: "):
        cluster.fitted(of({"workers": 1, "device": "cpu"}, {"node_labels": {"no": "such"}}))
    if not ray.cluster_resources().get("GPU"):
        with pytest.raises(SettingsError, match=r"set training\.device to cpu"):
            cluster.fitted(of({"device": "cuda"}))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ("local", 9, False)),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, ("10.0.0.1:6379", None, None)),
        ({"RAY_JOB_ID": "01"}, ("auto", None, None)),
    ],
)
def test_a_named_cluster_is_joined_else_one_large_enough_is_started(variables, expected, monkeypatch):
    asked: dict = {}
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 2)
    cluster.connect(of({"workers": 8, "cpus_per_worker": 1.0}, {"cpus": 0.5}))
    assert (asked["address"], asked["num_cpus"], asked["include_dashboard"]) == expected


@pytest.mark.parametrize(("at_once", "cpus"), [(2, 13), (None, 7)])
def test_a_session_for_a_sweep_has_room_for_the_largest_trials(at_once, cpus, monkeypatch):
    asked: dict = {}
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 2)
    tried = [of({"workers": workers, "cpus_per_worker": 1.5}, enabled=False) for workers in (1, 4, 2)]
    cluster.connect_for_sweep(tried[0], tried, at_once, False)
    assert asked["num_cpus"] == cpus


@pytest.mark.parametrize(
    ("address", "stops", "told"),
    [("10.0.0.1:6379", True, "10.0.0.1:6379"), ("10.0.0.1:6379", False, None), (None, True, None)],
    ids=["joined", "stops-none", "own-session"],
)
def test_a_sweep_that_stops_trials_asks_a_cluster_that_it_joins_for_its_dashboard(address, stops, told, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    asked = []

    def unanswered(address: str, **options: int) -> None:
        asked.append(address)
        raise ServerUnavailable("Failed to connect to the API server\nwhile it was asked")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
    monkeypatch.setattr(cluster, "list_nodes", unanswered)
    refused = r"^sweep: .* no dashboard, .*\(Failed to connect to the API server\): start the cluster with it"
    with pytest.raises(SettingsError, match=refused) if told else contextlib.nullcontext():
        cluster.connect_for_sweep(of(), [of()], 1, stops)
    assert asked == ([told] if told else [])


def test_a_session_that_runs_is_used_as_it_is(ray_session, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("a second session"))
    cluster.connect(Settings())


def test_a_cluster_that_does_not_answer_is_told_with_its_address(monkeypatch):
    def init(**how: object) -> None:
        raise ConnectionError(f"Failed to connect to Ray cluster at {how['address']}")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(SettingsError, match=r"^RAY_ADDRESS: no Ray cluster answers at 127\.0\.0\.1:1 .*start it .* or unset it"):
        cluster.connect(of())

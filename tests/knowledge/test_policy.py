"""The steps at which refreshes are asked for, by driving each policy through a run."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ask_ray.config import RefreshSettings
from ask_ray.knowledge.policy import Adaptive, Clock, Continuous, Fixed, Moment, Policy, Static, policy_of

Drift = Callable[[int], float | None]


def asked(
    policy: Policy,
    steps: int,
    per_epoch: int = 10,
    takes: int = 0,
    fails: bool = False,
    drift: Drift = lambda since: None,
    poll: int = 1,
    start: tuple[int, int | None] = (0, None),
) -> list[int]:
    """The steps of the requests of a run: a refresh takes so many steps, and may fail; drift follows from a version's age."""
    (first, last), known, ready, made = start, start[1] is not None and not fails, None, []
    for step in range(first, steps):
        if ready is not None and step >= ready:
            known, ready = known or not fails, None
        if step % poll and step % per_epoch:
            continue
        since = step - (last if last is not None else step)
        if policy.reason(Moment(step, step % per_epoch == 0, last, known, ready is not None, drift(since))):
            made.append(step)
            last, ready = step, step + takes
            if takes == 0:
                known, ready = known or not fails, None
    return made


@pytest.mark.parametrize(
    ("policy", "warmup", "interval", "expected"),
    [
        ("static", 0, 1, [0]),
        ("static", 2, 1, [20]),
        ("static", 1.5, 1, [15]),
        ("fixed", 0, 1, [0, 10, 20, 30, 40]),
        ("fixed", 1, 2, [10, 30]),
        ("fixed", 0.5, 1.5, [5, 20, 35]),
        ("fixed", 4.8, 0.1, [48, 49]),
        ("fixed", 0, 0.34, list(range(0, 50, 3))),
        ("fixed", 9, 1, []),
    ],
)
def test_the_plan_of_static_and_fixed_in_steps(policy, warmup, interval, expected):
    settings = RefreshSettings(policy=policy, warmup_epochs=warmup, interval=interval)
    assert asked(policy_of(settings, 10), 50) == expected


@pytest.mark.parametrize("policy", [{"policy": "static", "warmup_epochs": 4}, {"warmup_epochs": 1, "interval": 2}], ids=str)
@pytest.mark.parametrize(("before", "now"), [(10, 10), (10, 20), (20, 10), (9, 30)])
def test_a_run_whose_epochs_have_another_number_of_steps_keeps_its_plan_in_epochs(policy, before, now):
    """Three epochs of `before` steps, then, with other workers, five of `now`."""
    settings = RefreshSettings(**policy)
    plan = [epoch for epoch in range(8) if epoch * now in asked(policy_of(settings, now), 8 * now, now)]
    old = asked(policy_of(settings, before), 3 * before, before)
    clock, last = Clock(3 * before, 3 * now, now / before), old[-1] if old else None
    epochs = [step // before for step in old]
    for step in range(3 * before, 3 * before + 5 * now):
        at, was = clock.at(step), None if last is None else clock.at(last)
        if policy_of(settings, now).reason(Moment(at, at % now == 0, was, last is not None, False)):
            epochs.append(at // now)
            last = step
    assert epochs == plan


def test_an_interval_may_be_given_in_steps():
    settings = RefreshSettings(unit="steps", warmup_epochs=1, interval=7)
    assert asked(policy_of(settings, 10), 50) == [10, 17, 24, 31, 38, 45]


def test_an_interval_shorter_than_a_step_is_every_step():
    assert asked(policy_of(RefreshSettings(warmup_epochs=0, interval=1e-6), 10), 6) == list(range(6))


def test_asking_late_does_not_shift_the_plan():
    """Moments come every 4 steps: requests are at most that late, and never later and later."""
    late = asked(Fixed(first=10, interval=5), 200, per_epoch=200, poll=4)
    assert late == [due + -due % 4 for due in range(10, 197, 5)]


@pytest.mark.parametrize("policy", ["static", "fixed", "adaptive"])
def test_without_knowledge_every_epoch_asks_again_once_warm(policy):
    settings = RefreshSettings(policy=policy, warmup_epochs=1.5, interval=50, max_interval=50)
    assert asked(policy_of(settings, 10), 50, fails=True) == [15, 20, 30, 40]


def test_a_first_refresh_under_way_is_not_asked_for_again():
    assert asked(Static(5), 50, takes=30) == [5]


def test_adaptive_follows_drift_between_floor_and_ceiling():
    def linear(since: int) -> float:
        return 0.01 * since

    assert asked(Adaptive(0, 0.095, 2, 50), 40, drift=linear) == [0, 10, 20, 30]
    assert asked(Adaptive(0, 0.095, 15, 50), 50, drift=linear) == [0, 15, 30, 45]
    assert asked(Adaptive(0, 9.0, 2, 12), 40, drift=linear) == [0, 12, 24, 36]
    assert asked(Adaptive(0, 0.095, 2, 12), 40) == [0, 12, 24, 36], "no reading: the ceiling holds"


def test_adaptive_waits_for_a_refresh_under_way():
    assert asked(Adaptive(0, 0.01, 1, 50), 50, takes=20, drift=float) == [0, 20, 40]


def test_continuous_asks_when_the_last_is_in():
    assert asked(Continuous(10, 1), 50, takes=8) == [10, 18, 26, 34, 42]
    assert asked(Continuous(10, 15), 50, takes=8) == [10, 25, 40]
    assert asked(Continuous(10, 1), 40, takes=8, fails=True) == [10, 18, 26, 34], "a failed one is over, too"


def test_reasons_say_why():
    def told(policy: Policy, **now: object) -> str:
        values = {"step": 30, "epoch_starts": False, "asked": 10, "has_knowledge": True, "busy": False, "drift": None, **now}
        return str(policy.reason(Moment(**values)))  # type: ignore[arg-type]

    assert told(Fixed(10, 20), step=10, asked=None) == "warm-up is over"
    assert told(Fixed(10, 20)) == "20 steps since the last"
    assert told(Fixed(10, 20), step=29) == "None"
    assert told(Static(10), epoch_starts=True, has_knowledge=False) == "no knowledge base yet"
    assert told(Adaptive(10, 0.5, 5, 100), drift=0.61) == "RDM 0.610 passed 0.5, 20 steps since the last"
    assert "still under 0.5" in told(Adaptive(10, 0.5, 5, 20), drift=0.4)
    assert "no reading of RDM" in told(Adaptive(10, 0.5, 5, 20), drift=None)
    assert "20 steps after" in told(Continuous(10, 5))


@given(
    st.sampled_from([Static(7), Fixed(7, 13), Adaptive(7, 0.3, 4, 40), Continuous(7, 9)]),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 150),
    st.floats(0.001, 0.2),
)
def test_a_resumed_run_keeps_the_plan(policy, per_epoch, poll, cut, slope):
    """From any step, with the step of the last request, the rest of the run asks as the unbroken one does."""

    def drift(since: int) -> float:
        return slope * since

    whole = asked(policy, 200, per_epoch, drift=drift, poll=poll)
    before = [step for step in whole if step < cut]
    after = asked(policy, 200, per_epoch, drift=drift, poll=poll, start=(cut, before[-1] if before else None))
    assert before + after == whole

"""The steps at which refreshes are asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ask_ray.config import RefreshSettings
from ask_ray.knowledge.policy import Schedule, schedule_of


def asked(schedule: Schedule, steps: int, per_epoch: int, has: bool = True) -> list[int]:
    return [step for step in range(steps) if schedule.reason(step, has and step > schedule.first, step % per_epoch == 0)]


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
def test_the_schedule_in_steps(policy, warmup, interval, expected):
    settings = RefreshSettings(policy=policy, warmup_epochs=warmup, interval=interval)
    assert asked(schedule_of(settings, 10), 50, 10) == expected


def test_an_interval_shorter_than_a_step_is_every_step():
    schedule = schedule_of(RefreshSettings(warmup_epochs=0, interval=1e-6), 10)
    assert asked(schedule, 6, 10) == list(range(6))


@pytest.mark.parametrize("policy", ["static", "fixed"])
def test_without_knowledge_every_epoch_asks_again_once_warm(policy):
    schedule = schedule_of(RefreshSettings(policy=policy, warmup_epochs=1.5, interval=50), 10)
    assert asked(schedule, 50, 10, has=False) == [15, 20, 30, 40]
    assert schedule.reason(5, False, True) is None


def test_reasons_say_why():
    schedule = Schedule(first=10, interval=20)
    assert schedule.reason(10, False, True) == "warm-up is over"
    assert "20 steps" in str(schedule.reason(30, True, False))
    assert "no knowledge base" in str(schedule.reason(20, False, True))
    assert schedule.reason(31, True, True) is None


@given(st.integers(1, 40), st.floats(0, 3), st.floats(0.01, 5), st.lists(st.integers(0, 200)))
def test_asking_changes_nothing(per_epoch, warmup, interval, steps):
    """A resumed run, which asks at other steps only, keeps the plan."""
    schedule = schedule_of(RefreshSettings(warmup_epochs=warmup, interval=interval), per_epoch)
    fresh = schedule_of(RefreshSettings(warmup_epochs=warmup, interval=interval), per_epoch)
    for step in steps:
        schedule.reason(step, True, True)
    assert [schedule.reason(step, True, False) for step in range(200)] == [fresh.reason(step, True, False) for step in range(200)]

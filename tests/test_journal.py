"""The journal: what is told arrives in order, whoever tells it, and a lost journal stops no one."""

import pickle
import time

import pytest
import ray

from ask_ray.journal import Journal


@pytest.fixture
def journal(ray_session):
    made, keeper = Journal.start()
    yield made
    ray.kill(keeper)


def wait_for(condition, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def test_events_arrive_in_order_with_kind_time_and_fields(journal):
    assert journal.since(0) == []
    before = time.time()
    for step in range(5):
        journal.tell("step", step=step, loss=0.5)
    events = wait_for(lambda: len(journal.since(0)) == 5 and journal.since(0))
    assert [(event["kind"], event["step"], event["loss"]) for event in events] == [("step", n, 0.5) for n in range(5)]
    times = [event["time"] for event in events]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= time.time()
    assert journal.since(3) == events[3:]
    assert journal.since(5) == journal.since(99) == []


def test_any_process_of_the_job_can_tell(journal):
    @ray.remote(num_cpus=0)
    def elsewhere(told: Journal) -> int:
        told.tell("from a task", answer=42)
        return len(told.since(0))

    ray.get(elsewhere.remote(pickle.loads(pickle.dumps(journal))))
    (event,) = wait_for(lambda: journal.since(0))
    assert (event["kind"], event["answer"]) == ("from a task", 42)


def test_journals_are_apart(journal):
    other, keeper = Journal.start()
    other.tell("other")
    wait_for(lambda: other.since(0))
    assert journal.since(0) == []
    ray.kill(keeper)


def test_a_lost_journal_stops_no_one(ray_session):
    journal, keeper = Journal.start()
    journal.tell("heard")
    wait_for(lambda: journal.since(0))
    ray.kill(keeper)
    wait_for(lambda: not journal.since(0))  # a killed actor may answer once more
    for _ in range(3):
        journal.tell("unheard")
        assert journal.since(0) == []
    never = Journal("there is none of this name")
    never.tell("unheard")
    assert never.since(0) == []

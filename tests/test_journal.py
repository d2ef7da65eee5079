"""The journal: what is told arrives in order, whoever tells it, and a lost journal stops no one."""

import pickle
import time
from types import SimpleNamespace

import pytest
import ray

from ask_ray import journal as journals
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
    assert journal.events() == []
    before = time.time()
    for step in range(5):
        journal.tell("step", step=step, loss=0.5)
    events = wait_for(lambda: len(journal.events()) == 5 and journal.events())
    assert [(event["kind"], event["step"], event["loss"]) for event in events] == [("step", n, 0.5) for n in range(5)]
    times = [event["time"] for event in events]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= time.time()
    read, mark = journal.read()
    assert read == events
    assert journal.read(mark) == ([], mark)
    journal.tell("one more")
    (event,), later = wait_for(lambda: (found := journal.read(mark))[0] and found)
    assert event["kind"] == "one more"
    assert journal.read(later)[0] == []


def test_any_process_of_the_job_can_tell(journal):
    @ray.remote(num_cpus=0)
    def elsewhere(told: Journal) -> int:
        told.tell("from a task", answer=42)
        return len(told.events())

    ray.get(elsewhere.remote(pickle.loads(pickle.dumps(journal))))
    (event,) = wait_for(lambda: journal.events())
    assert (event["kind"], event["answer"]) == ("from a task", 42)


def test_what_is_told_first_is_there_before_anything_that_is_told_because_of_it(journal):
    @ray.remote(num_cpus=0)
    def fail(told: Journal) -> None:
        told.tell_first("reason", why="it had to")
        raise ValueError("for a reason")

    for number in range(1, 6):
        with pytest.raises(ValueError, match="for a reason"):
            ray.get(fail.remote(journal))
        assert len(journal.events()) == number
    Journal("there is none of this name").tell_first("unheard")


def test_journals_are_apart(journal):
    other, keeper = Journal.start()
    other.tell("other")
    wait_for(lambda: other.events())
    assert journal.events() == []
    ray.kill(keeper)


def test_a_lost_journal_stops_no_one(ray_session):
    journal, keeper = Journal.start()
    journal.tell("heard")
    wait_for(lambda: journal.events())
    ray.kill(keeper)
    wait_for(lambda: not journal.events())  # a killed actor may answer once more
    for _ in range(3):
        journal.tell("unheard")
        assert journal.events() == []
    never = Journal("there is none of this name")
    never.tell("unheard")
    assert never.events() == []


def test_a_journal_that_was_restarted_is_read_on_from_its_new_beginning(ray_session):
    journal, keeper = Journal.start()
    for step in range(3):
        journal.tell("step", step=step)
    wait_for(lambda: len(journal.events()) == 3)
    read, mark = journal.read()
    ray.kill(keeper, no_restart=False)
    wait_for(lambda: journal.read(mark)[1][0] != mark[0])  # the new life answers: what is told while there is none is lost
    for step in range(3, 7):
        journal.tell("step", step=step)
    wait_for(lambda: len(journal.events()) == 4)
    assert [event["step"] for event in read + journal.read(mark)[0]] == list(range(7))
    ray.kill(keeper)


@pytest.fixture
def named(monkeypatch) -> dict[str, SimpleNamespace]:
    """In place of Ray: the actors by their names, each with the list of what it `heard`."""
    there: dict[str, SimpleNamespace] = {}

    def start(name: str, **options: object) -> SimpleNamespace:
        heard: list[str] = []
        there[name] = SimpleNamespace(heard=heard, record=SimpleNamespace(remote=lambda event: heard.append(event["kind"])))
        return SimpleNamespace(remote=lambda: there[name])

    def find(name: str) -> SimpleNamespace:
        if name not in there:
            raise ValueError(name)
        return there[name]

    monkeypatch.setattr(journals, "_Keeper", SimpleNamespace(options=start))
    monkeypatch.setattr(ray, "get_actor", find)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: 56 * "0"))
    return there


def test_a_name_that_is_used_again_is_heard_by_the_new_journal(named):
    (first, _), told = Journal.start("again"), named["again"].heard
    first.tell("first")
    del named["again"]
    second, _ = Journal.start("again")
    second.tell("second")
    first.tell("third")
    assert (told, named["again"].heard) == (["first"], ["second", "third"])


def test_who_tells_before_there_is_a_journal_is_heard_when_there_is_one(named):
    early = Journal("to come")
    early.tell("unheard")
    assert early.events() == []
    journals._Keeper.options(name="to come")  # by another process
    early.tell("heard")
    assert named["to come"].heard == ["heard"]

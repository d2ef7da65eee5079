"""How Ray Tune is told to search."""

from ask_ray.tuning.search import within
from ask_ray.tuning.space import Dimension, Space


def test_what_a_population_changes_stays_within_its_range():
    space = Space("space.yaml", (Dimension("ask.rho", "uniform", (0.2, 0.9), 2), Dimension("ask.beta", "choice", (0.0, 0.3), 3)))
    assert within(space, {"ask.rho": 1.08, "ask.beta": 0.3}) == {"ask.rho": 0.9, "ask.beta": 0.3}
    assert within(space, {"ask.rho": 0.16, "ask.beta": 0.0}) == {"ask.rho": 0.2, "ask.beta": 0.0}
    assert within(space, {"ask.rho": 0.5, "ask.beta": 0.0}) == {"ask.rho": 0.5, "ask.beta": 0.0}

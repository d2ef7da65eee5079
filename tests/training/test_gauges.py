"""Live figures at a real node's metrics endpoint."""

import time

from ask_ray.training.gauges import FIGURES, Gauges


def test_figures_reach_the_metrics_endpoint_under_the_name_of_the_run(scraped):
    gauges = Gauges("a-run")
    figures = {name: float(place) + 0.5 for place, name in enumerate(FIGURES)}
    end = time.monotonic() + 60
    while scraped("a-run") != figures and time.monotonic() < end:
        gauges.set(**figures, learning_rate=7.0)  # what is no gauge is passed over
        time.sleep(0.5)
    assert scraped("a-run") == figures

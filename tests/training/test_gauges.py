"""Live figures at a real node's metrics endpoint."""

import re
import time
import urllib.request

import ray

from ask_ray.training.gauges import FIGURES, Gauges


def scraped() -> dict[str, float]:
    """The run's figures as Prometheus would read them."""
    (node,) = (node for node in ray.nodes() if node["Alive"])
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
        told = answer.read().decode()
    found = re.findall(r'^ray_ask_ray_(\w+)\{.*?run="a-run".*?\} (\S+)$', told, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_figures_reach_the_metrics_endpoint_under_the_name_of_the_run(ray_session):
    gauges = Gauges("a-run")
    figures = {name: float(place) + 0.5 for place, name in enumerate(FIGURES)}
    end = time.monotonic() + 60
    while scraped() != figures and time.monotonic() < end:
        gauges.set(**figures, learning_rate=7.0)  # what is no gauge is passed over
        time.sleep(0.5)
    assert scraped() == figures

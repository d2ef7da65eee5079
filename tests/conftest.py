"""What tests share: one Ray session, small recordings on disk, a prepared corpus."""

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import soundfile

# Every run tries the same examples, so that a failure is one for everybody; `--hypothesis-profile=explore` looks for more.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("repeatable")


def tone(seconds: float, rate: int, hz: float = 440.0, channels: int = 1, level: float = 0.3) -> np.ndarray:
    """A sine as (samples, channels) float64; every channel holds the same."""
    one = level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(one[:, None], channels, axis=1)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """The one Ray session of the tests: 4 logical CPUs on this machine."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def write_audio():
    """A function that writes a real recording, its format by the file's ending: a sine, or the samples given."""

    def write(path: Path, seconds=0.5, rate=16000, hz=440.0, channels=1, samples=None, **options) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(seconds, rate, hz, channels) if samples is None else samples, rate, **options)
        return path

    return write


@pytest.fixture(scope="session")
def small_corpus(ray_session, tmp_path_factory):
    """Prepared soundscapes: 150 clips to train on in three row groups, 7 and 20 held out, 1 s at 8 kHz, 3 captions."""
    from ask_ray.config import load
    from ask_ray.data.prepare import prepare

    soundscapes = {"train": 150, "validation": 7, "test": 20, "seconds": 1.0, "captions": 3}
    home = str(tmp_path_factory.mktemp("prepared"))
    data = {"prepared": home, "sample_rate": 8000, "shard_clips": 100, "soundscapes": soundscapes}
    return prepare(load({"data": data}).data)

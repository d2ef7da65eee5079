"""What tests share: one Ray session, small recordings on disk, a prepared corpus, object storage on this machine."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import soundfile

# Every run tries the same examples, so that a failure is one for everybody; `--hypothesis-profile=explore` looks for more.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("repeatable")


os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # nothing is asked for credentials but what a test sets


@dataclass
class S3:
    """An S3 server of its own on a free port of this machine, with an empty bucket named `bucket`."""

    process: subprocess.Popen
    port: int
    key: str = "a-key"
    secret: str = "a-s3cr3t"

    @classmethod
    def start(cls, **environment: str) -> "S3":
        """A server that answers."""
        import boto3

        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        made = cls(subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.DEVNULL), port)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        boto3.client(
            "s3",
            endpoint_url=made.endpoint,
            aws_access_key_id=made.key,
            aws_secret_access_key=made.secret,
            region_name="us-east-1",
        ).create_bucket(Bucket="bucket")
        return made

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def uri(self, path: str, secret: str | None = None) -> str:
        """`bucket/path` as a URI that every process can open, whatever its environment."""
        return f"s3://{self.key}:{secret or self.secret}@{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """The object storage that tests share: each takes a folder of its own."""
    server = S3.start()
    yield server
    server.stop()


@pytest.fixture
def start_s3() -> Iterator[Callable[..., S3]]:
    """A function that starts a server to break, with environment variables of its own."""
    started = []

    def start(**environment: str) -> S3:
        started.append(S3.start(**environment))
        return started[-1]

    yield start
    for server in started:
        server.stop()


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
def trees(tmp_path_factory, write_audio):
    """Small corpora in every public layout, by the layout's name."""
    from corpus_trees import Trees

    made = Trees(tmp_path_factory.mktemp("trees"), write_audio)
    return {name: getattr(made, name)() for name in ("audiocaps", "retrieval", "clotho", "wavcaps", "parquet")}


@pytest.fixture(scope="session")
def small_corpus(ray_session, tmp_path_factory):
    """Prepared soundscapes: 150 clips to train on in three row groups, 7 and 20 held out, 1 s at 8 kHz, 3 captions."""
    from ask_ray.config import load
    from ask_ray.data.prepare import prepare

    soundscapes = {"train": 150, "validation": 7, "test": 20, "seconds": 1.0, "captions": 3}
    home = str(tmp_path_factory.mktemp("prepared"))
    data = {"prepared": home, "sample_rate": 8000, "shard_clips": 100, "soundscapes": soundscapes}
    return prepare(load({"data": data}).data)

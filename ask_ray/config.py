"""The one settings tree of ask_ray: typed, bounded, read from YAML and dotted command-line overrides.

Every entry point parses the same tree with :func:`parse`, so a settings file works for all of them. Bounds live beside
the fields; what spans several fields is checked in :meth:`Settings.check`. Presets are YAML files in
``ask_ray/presets`` and are named like a file: ``--config paper``.
"""

from __future__ import annotations

import math
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ask_ray.modality import THINGS, Form, Modality

PRESETS = Path(__file__).parent / "presets"

#: Resources that every node of a Ray cluster may have.
OWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")

#: Towers by name; any other of the transformers library is `HF` and its folder or hub id.
AUDIO_TOWERS = ("tiny", "resnet38", "ced-tiny", "ced-mini", "ced-small", "ced-base")
IMAGE_TOWERS = ("tiny",)
TEXT_TOWERS = ("tiny", "bert", "roberta", "sonar")
HF = "hf:"

#: The learnt temperature τ stays between these.
COLDEST, WARMEST = 0.01, 10.0

#: Of runs and sweeps, which name folders.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

#: Corpora of pictures; all others are of sounds.
IMAGE_CORPORA = ("coco", "flickr30k")

Pooling = Literal["mean", "max", "first", "pooler"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Span = Annotated[float, Field(gt=0, le=1e9)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class UserError(Exception):
    """A problem that whoever runs a job can solve: jobs print the message alone and exit with `status`."""

    status = 1


class SettingsError(UserError, ValueError):
    """A setting, or a combination of settings, that cannot work. The message names the field and what to do."""

    status = 2


class Section(BaseModel):
    """A frozen section that refuses unknown keys, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSettings(Section):
    """Which run this is and where everything it makes is kept."""

    name: str | None = Field(
        None,
        pattern=NAME,
        description="name of the run; the same name continues an interrupted run. Unset: made from the time",
    )
    storage: str = Field("runs", description="folder or URI under which the run's folder <storage>/<name> is kept")
    fork: str | None = Field(
        None,
        description="folder or URI of another run: begin from its newest checkpoint that leaves epochs to do, with its weights, "
        "optimiser and place in the schedule, under these settings. The knowledge base is made anew",
    )
    dry_run: bool = Field(
        False,
        description="prepare the corpus if it is not there yet, check data, weights, memory and resources, tell what the run "
        "takes; train nothing",
    )
    worker_logs: bool = Field(False, description="show what workers and actors print; it is always kept in Ray's logs")
    seed: Natural = Field(0, description="seed of weights, shuffling, caption choice, augmentation and k-means")


class SoundscapeSettings(Section):
    """The corpus that needs no download: procedural clips with captions."""

    train: Count = Field(4000, description="training clips")
    validation: Natural = Field(200, description="validation clips")
    test: Count = Field(1000, description="test clips")
    seconds: float = Field(4.0, ge=1, le=60, description="length of a clip in seconds")
    captions: int = Field(5, ge=1, le=10, description="captions per clip, each phrased differently where possible")
    max_events: int = Field(3, ge=1, le=3, description="a clip holds 1 to this many sound events")
    zipf: float = Field(0.5, ge=0, le=4, description="exponent of the long tail of event kinds; 0 makes all equally likely")
    noise_db: float = Field(-45.0, ge=-90, le=0, description="mean level of the background noise in dB of full scale")
    seed: Natural = Field(0, description="same seed, same bytes")
    bank: str | None = Field(
        None,
        description="folder of recordings with a caption manifest to compose clips from, each for clips of its own split (dealt "
        "as those of a folder where the manifest tells none), all in memory while preparing; unset: synthesised events",
    )


class SplitShares(Section):
    """How clips are dealt to splits where the corpus names none."""

    validation: Share = Field(0.1, description="share of clips held out for validation, of those without a `split`")
    test: Share = Field(0.2, description="share of clips held out for testing, of those without a `split`")


class FolderSettings(SplitShares):
    """Recordings in a folder, with a manifest of captions."""

    path: str | None = Field(None, description="folder that holds the recordings, relative names in the manifest start here")
    manifest: str | None = Field(
        None,
        description="CSV, JSONL or Parquet with `file_name` and `caption` or `caption_1..n`, optionally `id`, `split` and "
        "`source_id`. Unset: the only captions.csv, manifest.csv, .jsonl or .parquet in the folder",
    )


class LayoutSettings(Section):
    """A corpus of the field as it was published."""

    path: str | None = Field(None, description="folder that holds the corpus's lists and audio, at any depth")


class ClothoSettings(LayoutSettings):
    """Clotho as it was published."""

    metadata: bool = Field(
        True,
        description="refuse a split without its clotho_metadata_*.csv, which tell the Freesound sound of each clip: some sounds "
        "are in several splits. false: go without those that are missing",
    )


class WavCapsSettings(SplitShares):
    """WavCaps: a JSON file and a folder of audio per source, all of it to train on unless a share is held out."""

    path: str | None = Field(None, description="folder that holds the JSON files and the audio, at any depth")
    blacklists: list[str] | None = Field(
        None,
        description="JSON files that list AudioSet and FreeSound ids to leave out, because other corpora evaluate on them. "
        "Unset: every blacklist*.json below `path`; []: none",
    )
    validation: Share = Field(0.0, description="share of clips held out for validation")
    test: Share = Field(0.0, description="share of clips held out for testing")


class CocoSettings(Section):
    """COCO's captions and pictures."""

    path: str | None = Field(
        None,
        description="folder that holds the pictures and dataset_coco.json, or captions_train2017.json and captions_val2017.json, "
        "at any depth",
    )
    validation: float = Field(
        0.04,
        ge=0,
        lt=1,
        description="share of train2017 held out for validation; dataset_coco.json tells its own",
    )


class FlickrSettings(Section):
    """Flickr30k's captions and pictures."""

    path: str | None = Field(None, description="folder that holds the pictures and dataset_flickr30k.json, at any depth")


class ParquetSettings(SplitShares):
    """Parquet files with the audio in them, as data sets are kept on the Hugging Face hub."""

    path: str | None = Field(
        None,
        description="folder of Parquet files, or one file: `audio` (its `bytes` and `path`), captions in `text`, `caption`, "
        "`captions` or `caption_1..n`; optionally `id`, `split` (else as the files are named) and `source_id`",
    )


class DataSettings(Section):
    """The corpus: what it is made from, what a usable clip is, how it is read."""

    corpus: Literal["soundscapes", "folder", "audiocaps", "clotho", "wavcaps", "parquet", "coco", "flickr30k"] = Field(
        "soundscapes",
        description="where recordings, or of coco and flickr30k pictures, and captions come from: the section of that name says "
        "more",
    )
    prepared: str = Field("prepared", description="folder or URI that keeps prepared corpora, one sub-folder for each")
    sample_rate: int = Field(16000, ge=4000, le=48000, description="Hz of the prepared mono waveforms")
    image_size: int = Field(
        256,
        ge=16,
        le=1024,
        description="pixels of the shorter side of prepared pictures, twice as many of the longer, at most: larger ones are "
        "shrunk, none is enlarged",
    )
    min_seconds: float = Field(0.1, gt=0, description="shorter clips are set aside")
    max_seconds: float = Field(
        10.0,
        gt=0,
        description="longer clips are cropped when read: at random in training, from the start elsewhere",
    )
    keep_seconds: float = Field(
        300.0, gt=0, le=600, description="longer recordings are cut to their first so many seconds when prepared; bounds memory"
    )
    max_rejected: Share = Field(0.1, description="refuse a corpus, new or prepared, of which a larger share could not be used")
    held_out: list[str] = Field(
        [],
        description="prepared corpora, by folder or URI, whose validation and test clips are kept out of this one's training "
        "split, by id, by source id and by digest of the samples; its own always are",
    )
    shard_clips: Count = Field(256, description="clips a prepared Parquet file holds: the unit of preparing and resuming")
    prepare_tasks: Count = Field(2, description="preparing tasks at once; each takes one CPU")
    shuffle_clips: Count = Field(8192, description="a worker shuffles its clips in windows of this many")
    cache_mib: Natural = Field(1024, description="MiB of waveforms or pictures that a worker and its loaders keep")
    loader_processes: Natural = Field(
        0, description="processes beside each worker that read batches, each all that the worker sees; 0: the worker reads"
    )
    soundscapes: SoundscapeSettings = SoundscapeSettings()
    folder: FolderSettings = FolderSettings()
    audiocaps: LayoutSettings = LayoutSettings()
    clotho: ClothoSettings = ClothoSettings()
    wavcaps: WavCapsSettings = WavCapsSettings()
    parquet: ParquetSettings = ParquetSettings()
    coco: CocoSettings = CocoSettings()
    flickr30k: FlickrSettings = FlickrSettings()

    @property
    def modality(self) -> Modality:
        """What the corpus' captions describe."""
        return "image" if self.corpus in IMAGE_CORPORA else "audio"

    @property
    def form(self) -> Form:
        """How the corpus is kept when it is prepared."""
        if self.modality == "image":
            return Form(self.modality, self.image_size)
        composed = self.corpus == "soundscapes"
        return Form(self.modality, self.sample_rate, math.inf if composed else self.keep_seconds)


def _tower(names: Sequence[str]) -> str:
    """The pattern of what names a tower."""
    return rf"^({'|'.join(names)}|{HF}\S.*)$"


class ModelSettings(Section):
    """The two towers and the space they share."""

    audio: str = Field(
        "tiny",
        pattern=_tower(AUDIO_TOWERS),
        description=f"audio tower: {', '.join(AUDIO_TOWERS)}, or {HF}PATH-OR-ID, any audio model of the transformers library",
    )
    image: str = Field(
        "tiny",
        pattern=_tower(IMAGE_TOWERS),
        description=f"image tower, instead of the audio tower where the corpus is one of pictures: {', '.join(IMAGE_TOWERS)}, or "
        f"{HF}PATH-OR-ID, any vision model of the transformers library",
    )
    text: str = Field(
        "tiny",
        pattern=_tower(TEXT_TOWERS),
        description=f"text tower: {', '.join(TEXT_TOWERS)}, or {HF}PATH-OR-ID, any text model of the transformers library",
    )
    audio_weights: str | None = Field(
        None,
        description="published weights of the audio tower: a file, for the CEDs also a folder or hub id. Unset: from scratch",
    )
    text_weights: str | None = Field(
        None, description="published weights of the text tower: a folder or hub id. Unset: from scratch"
    )
    audio_pooling: Pooling = Field(
        "mean", description=f"how an {HF} audio tower's frames become one vector; pooler: the model's own pooled output"
    )
    image_pooling: Pooling = Field("mean", description=f"how an {HF} image tower's patches become one vector")
    text_pooling: Pooling = Field("mean", description=f"how an {HF} text tower's tokens become one vector")
    language: str = Field("eng_Latn", min_length=1, description="sonar: the captions' language, as its tokeniser calls it")
    dim: int = Field(128, ge=2, le=4096, description="d, the width of the shared embedding space")
    interaction: Literal["cosine", "late"] = Field(
        "cosine",
        description="how a clip and a caption meet, cosine: their embeddings; late: also each word its best audio frame, of a "
        "picture its best patch, and each of these its best word, weighted",
    )
    width: float = Field(1.0, gt=0, le=4, description="scales the hidden widths of towers trained from scratch")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of the tiny towers and the projection heads")
    max_words: int = Field(48, ge=4, le=512, description="longer captions are cut to this many tokens")
    temperature: float = Field(0.07, gt=0, le=WARMEST, description=f"τ at the start; it is learnt, in [{COLDEST:g}, {WARMEST:g}]")
    freq_mask: Natural = Field(8, description="SpecAugment: widest band masked, in mel bins; 0 switches it off")
    time_mask: Natural = Field(16, description="SpecAugment: longest stretch masked, in frames; 0 switches it off")
    image_crop: float = Field(
        0.9,
        gt=0,
        le=1,
        description="in training, a window of at least this share of each side of a picture is seen; 1 switches it off",
    )

    def tower(self, modality: Modality) -> str:
        """What names the tower of a modality."""
        return self.audio if modality == "audio" else self.image


class AskSettings(Section):
    """The method (ASK): what is read from the knowledge base and how it enters the loss."""

    enabled: bool = Field(True, description="false trains plain NT-Xent with the same code and keeps no knowledge base")
    rho: Share = Field(
        0.8,
        description="ρ, the weight of a pair's OWN embedding when knowledge is mixed in; 1 injects nothing. The paper's "
        "formula uses 0.2; read as an injection ratio, 0.2 would be 0.8 here",
    )
    neighbours: Count = Field(10, description="K, entries and prototypes retrieved per embedding")
    prototypes: Natural = Field(128, description="Nc, k-means prototypes of the knowledge base; 0 keeps none")
    fine: bool = Field(True, description="read single entries (the fine-grained knowledge base)")
    coarse: bool = Field(True, description="read prototypes (the coarse-grained knowledge base)")
    exclude: Literal["self", "batch", "none"] = Field(
        "self", description="which ids a pair may not retrieve: its own, all of the global batch's, or none"
    )
    tau_knowledge: Positive = Field(0.07, description="τ_kb, temperature of the neighbours' weights")
    reliability: Literal["pair", "neighbour", "both", "off"] = Field(
        "pair", description="weigh pairs by Ψ, neighbours by cross-modal agreement, both, or neither"
    )
    tau_reliability: Positive = Field(0.5, description="τ_Ψ, temperature of the reliability potential Ψ")
    beta: Share = Field(0.2, description="β, weight of the optimal-transport plan in the targets; 0 switches it off")
    epsilon: Positive = Field(0.05, description="ε, entropy of the transport plan")
    transport: Literal["targets", "logits"] = Field("targets", description="where the transport plan enters")
    negatives: Literal["none", "knowledge", "queue"] = Field(
        "knowledge", description="out-of-batch negatives: the retrieved neighbours, a cross-batch memory queue, or none"
    )
    queue: Count = Field(1024, description="pairs the cross-batch memory queue holds")
    influence: bool = Field(False, description="measure the out-of-batch influence once an epoch (a diagnostic)")


class RefreshSettings(Section):
    """When the knowledge base is re-encoded, and whether training waits for it."""

    policy: Literal["static", "fixed", "adaptive", "continuous"] = Field(
        "fixed",
        description="static: build once (and, as after every run, once more by the final weights); fixed: every `interval`; "
        "adaptive: when drift passes `threshold`; continuous: the next starts when the last is in",
    )
    unit: Literal["epochs", "steps"] = Field("epochs", description="unit of `interval`, `min_interval` and `max_interval`")
    interval: Span = Field(3.0, description="T, between the refreshes of policy fixed; fractions of an epoch are allowed")
    threshold: Positive = Field(0.3, description="RDM in nats, the mean of both modalities, that makes policy adaptive refresh")
    signal: Literal["batch", "probe"] = Field(
        "batch",
        description="what policy adaptive reads: the batch's own entries (free, needs the training split as a source), or a "
        "probe of `knowledge.drift_probe` stored entries of all sources, encoded anew",
    )
    probe_steps: Count = Field(50, description="steps between the readings of signal probe")
    min_interval: Span = Field(0.5, description="policies adaptive and continuous never refresh sooner than this")
    max_interval: Span = Field(6.0, description="policy adaptive refreshes after this, whatever the drift")
    mode: Literal["async", "sync"] = Field("async", description="train on while a refresh runs, or wait for it")
    warmup_epochs: float = Field(4.0, ge=0, description="epochs before the first knowledge base is built and used")
    poll_steps: Count = Field(4, description="every this many steps workers agree on the version, and the policy decides")
    attempts: Count = Field(3, description="a refresh that fails is tried this often in all")
    backoff_seconds: float = Field(1.0, ge=0, description="pause before the second try; doubled for each one after")
    stall_seconds: Positive = Field(600.0, description="a refresh that makes no progress for so long counts as failed")


class CorrectionSettings(Section):
    """Cheap corrections of stored entries between refreshes. With either, each worker keeps a copy of its own in memory."""

    write_back: bool = Field(False, description="the step's own embeddings, from all workers, overwrite their entries")
    drift_map: bool = Field(False, description="a linear map from stored to fresh rows is applied to all entries")
    map_interval: Span = Field(0.5, description="epochs between drift maps; each is fitted to the pairs seen since the last")
    ridge: Positive = Field(0.1, description="pull of the drift map toward a rotation")


class PoolSettings(Section):
    """The Ray Data actor pool that re-encodes the knowledge source."""

    min_actors: Count = Field(1, description="encoder actors at least")
    max_actors: Count = Field(1, description="encoder actors at most")
    cpus: Positive = Field(0.5, description="CPUs reserved by an encoder actor")
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs reserved by an encoder actor. Unset: one that training leaves over, else a part of one; none on nodes "
        "without",
    )
    batch_size: Count = Field(64, description="clips encoded at once")
    node_labels: dict[str, str] = Field({}, description="encode only on nodes with these labels")


class KnowledgeSettings(Section):
    """The knowledge base: its entries, its index, its life."""

    sources: list[str] = Field(
        ["train"],
        description="what it is made from: `train`, the run's own training split, and prepared corpora by folder or URI, of "
        "which the training split is taken (out-of-domain ones, or the same recordings with more captions)",
    )
    captions_per_clip: Count = Field(1, description="entries made of a clip, in each source: one for each of its first captions")
    exact_below: Natural = Field(50_000, description="search exactly below this many entries, with inverted lists above")
    probes: Count = Field(32, description="inverted lists searched per query")
    drift_probe: Natural = Field(128, description="entries re-encoded once an epoch to measure drift; 0 switches it off")
    keep: Count = Field(3, description="newest versions kept; versions that a kept checkpoint names are never removed")
    cache: str | None = Field(
        None,
        description="folder of each node's own disk for copies of versions on remote storage, shared by the node's processes. "
        "Unset: one under the system's temporary folder",
    )
    cache_gib: Positive = Field(16.0, description="GiB of copies kept there; the least recently used that nobody uses go first")
    refresh: RefreshSettings = RefreshSettings()
    corrections: CorrectionSettings = CorrectionSettings()
    pool: PoolSettings = PoolSettings()


class TrainingSettings(Section):
    """The optimisation, its workers and its checkpoints."""

    epochs: Count = Field(14, description="passes over the training split")
    batch_size: Count = Field(32, description="pairs per worker and step")
    workers: Count | None = Field(
        None, description="data-parallel workers. Unset: one for each GPU, or two without GPUs; one in a sweep's trial"
    )
    min_workers: Count | None = Field(
        None,
        description="go on with as few as this when nodes are lost, and grow to `workers` when they return (elastic); needs "
        "whole CPUs and GPUs per worker. Unset: always `workers`",
    )
    resize_seconds: Positive = Field(
        60.0, description="an elastic run looks this often for room to grow; it grows from its newest checkpoint"
    )
    node_resource: str | None = Field(
        None,
        pattern=r"^[A-Za-z][A-Za-z0-9_-]*$",
        description="train only on nodes that offer this custom resource of Ray's, so that an elastic run never grows into the "
        "encoder pool's nodes. Unset: on any node",
    )
    cpus_per_worker: Positive = Field(0.5, description="CPUs reserved by a worker")
    gpus_per_worker: float | None = Field(
        None, gt=0, le=1, description="GPUs reserved by a worker. Unset: one, or three quarters where the pool must share it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs if the cluster has any")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPUs that have it")
    learning_rate: Positive = Field(7e-4, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay of matrices")
    warmup_share: Share = Field(0.1, description="share of all steps over which the learning rate rises; then cosine")
    clip_norm: Positive = Field(1.0, description="largest gradient norm")
    evaluate_every: Natural = Field(3, description="epochs between evaluations on the validation split; 0: never")
    evaluation: Literal["workers", "beside"] = Field(
        "workers",
        description="who evaluates on the validation split: the workers, which stop training for it, or a task beside training "
        "that opens the epoch's checkpoint (saved then even if `checkpoint_every` asks for none)",
    )
    evaluation_cpus: Positive = Field(0.5, description="CPUs reserved by the task of evaluation beside training")
    evaluation_timeout_seconds: Positive = Field(
        1800.0, description="evaluation beside training that takes longer, its wait for CPUs included, is given up"
    )
    checkpoint_every: Count = Field(1, description="epochs between checkpoints")
    keep_checkpoints: Count = Field(2, description="newest checkpoints kept")
    upload: Literal["async", "sync"] = Field("async", description="train on while a checkpoint is copied to storage, or wait")
    preemption_steps: Natural = Field(
        50,
        description="steps between looks for a notice that a node will be taken away, on which a checkpoint is saved; 0: never",
    )
    max_failures: Natural = Field(2, description="times a failed worker group is restarted from its checkpoint")

    def evaluates(self, epoch: int) -> bool:
        """Whether the validation split is evaluated after so many whole epochs."""
        return self.evaluate_every > 0 and epoch % self.evaluate_every == 0

    @property
    def evaluates_beside(self) -> bool:
        """Whether a task beside training ever evaluates."""
        return self.evaluation == "beside" and 0 < self.evaluate_every <= self.epochs


class TrackingSettings(Section):
    """Where MLflow records runs."""

    enabled: bool = Field(True, description="record with MLflow")
    uri: str | None = Field(
        None,
        description="MLflow tracking URI. Unset: SQLite beside the runs, or in the current folder if they are kept elsewhere",
    )
    experiment: str = Field("ask_ray", min_length=1, description="MLflow experiment")


class SweepSettings(Section):
    """How a sweep searches its space. Not part of a run's settings: `jobs/tune.py` alone takes it."""

    name: str | None = Field(
        None, pattern=NAME, description="name of the sweep; the same name continues an interrupted one. Unset: made from the time"
    )
    algorithm: Literal["grid", "random", "optuna", "pbt"] = Field(
        "random",
        description="grid: every combination; random: `trials` of them; optuna: TPE proposes each from those before; pbt: "
        "`trials` runs at once, of which the worse take over the better one's weights and a changed setting",
    )
    trials: Count = Field(16, description="trials of random, optuna and pbt; grid makes all that there are")
    seeds: list[Natural] = Field([0], min_length=1, description="a trial trains once with each run.seed; its mean is its value")
    metric: str = Field("mean_r1", description="what is compared, of the validation split: mean_r1 is the mean of both R@1")
    concurrent: Count | None = Field(None, description="trials at once at most. Unset: as many as the cluster holds")
    early_stopping: bool = Field(False, description="stop trials that are behind others of the same age (ASHA)")
    grace_epochs: Count = Field(4, description="early stopping: no trial is stopped sooner")
    reduction: float = Field(3.0, gt=1, description="early stopping: of so many trials one goes on at each rung")
    perturb_epochs: Count = Field(2, description="pbt: epochs between a trial's chances to take over a better one's weights")
    keep: Natural = Field(1, description="best trials that keep weights and knowledge base; of the others only figures are kept")
    seed: Natural = Field(0, description="seed of what random and optuna draw, and of pbt's first points")

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether more of `metric` is better, or, of ranks, less."""
        return "min" if self.metric.endswith("_rank") else "max"

    @model_validator(mode="after")
    def check(self) -> SweepSettings:
        """Refuse combinations that cannot work; each message names the fields."""
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds names one twice ({self.seeds}): name each once")
        if self.algorithm == "pbt" and (self.early_stopping or len(self.seeds) > 1 or self.trials < 2):
            raise ValueError("algorithm pbt replaces bad trials itself: set early_stopping false, one seed, and trials above 1")
        return self


class Settings(Section):
    """All settings of a run."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    ask: AskSettings = AskSettings()
    knowledge: KnowledgeSettings = KnowledgeSettings()
    training: TrainingSettings = TrainingSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def check(self) -> Settings:
        """Refuse combinations that cannot work; each message names the fields."""
        ask, data = self.ask, self.data
        if ask.enabled and not (ask.fine or ask.coarse):
            raise ValueError("ask.fine and ask.coarse are both off: switch one on, or set ask.enabled to false")
        if ask.enabled and ask.coarse and ask.prototypes == 0:
            raise ValueError("ask.coarse reads prototypes but ask.prototypes is 0: set it above 0 or ask.coarse to false")
        if ask.enabled and ask.negatives == "knowledge" and not ask.fine:
            raise ValueError("ask.negatives=knowledge reads single entries: set ask.fine to true or choose another source")
        training = self.training
        if training.min_workers is not None:
            if training.workers is None or training.min_workers > training.workers:
                raise ValueError("training.min_workers needs training.workers, set to as many or more")
            if any(share is not None and share % 1 for share in (training.cpus_per_worker, training.gpus_per_worker)):
                raise ValueError(
                    "training.min_workers: elastic workers reserve whole CPUs and GPUs; make training.cpus_per_worker whole"
                )
        if training.node_resource in OWN_RESOURCES:
            raise ValueError(f"training.node_resource: {training.node_resource} is one of Ray's own; name a custom resource")
        if data.min_seconds > data.max_seconds:
            raise ValueError("data.min_seconds is above data.max_seconds: no clip could be used")
        if data.min_seconds > data.keep_seconds:
            raise ValueError("data.min_seconds is above data.keep_seconds: no clip could be used")
        if data.corpus != "soundscapes" and getattr(data, data.corpus).path is None:
            held = "recordings" if data.modality == "audio" else "pictures"
            raise ValueError(f"data.corpus={data.corpus} needs data.{data.corpus}.path: the folder that holds the {held}")
        self._check_modality()
        for name, shares in (("folder", data.folder), ("wavcaps", data.wavcaps), ("parquet", data.parquet)):
            if shares.validation + shares.test >= 1:
                raise ValueError(f"data.{name}.validation and data.{name}.test leave nothing to train on: lower them")
        self._check_refresh()
        refresh = self.knowledge.refresh
        sources = self.knowledge.sources
        if not sources:
            raise ValueError("knowledge.sources is empty: name at least one, such as train")
        if len(set(sources)) < len(sources):
            raise ValueError(f"knowledge.sources names a source twice ({', '.join(sources)}): name each once")
        if ask.enabled and refresh.policy == "adaptive" and refresh.signal == "batch" and "train" not in sources:
            raise ValueError(
                "knowledge.refresh.signal=batch reads the run's own entries: put train among knowledge.sources, or use "
                "signal probe"
            )
        corrections = self.knowledge.corrections
        if ask.enabled and (corrections.write_back or corrections.drift_map) and "train" not in sources:
            raise ValueError(
                "knowledge.corrections come from the run's own pairs: put train among knowledge.sources, or switch write_back "
                "and drift_map off"
            )
        cache = self.knowledge.cache
        if cache is not None and not cache.startswith(("/", "~")):
            raise ValueError(f"knowledge.cache is {cache}, but means a folder on every node: give an absolute path")
        if self.knowledge.pool.min_actors > self.knowledge.pool.max_actors:
            raise ValueError("knowledge.pool.min_actors is above knowledge.pool.max_actors")
        return self

    def _check_refresh(self) -> None:
        """Refuse refreshes that would never come, or come too late to be used."""
        refresh = self.knowledge.refresh
        if refresh.policy == "adaptive":
            self._check_threshold()
        if not self.ask.enabled:
            return
        warmup, epochs = refresh.warmup_epochs, self.training.epochs
        if warmup >= epochs:
            raise ValueError(
                f"knowledge.refresh.warmup_epochs ({warmup:g}) is not below training.epochs ({epochs}): training would be over "
                "before there is a knowledge base; lower the first, raise the second, or set ask.enabled to false"
            )
        floored = refresh.policy in ("adaptive", "continuous") and refresh.unit == "epochs"
        if floored and warmup + refresh.min_interval >= epochs:
            raise ValueError(
                f"knowledge.refresh.min_interval ({refresh.min_interval:g}) after knowledge.refresh.warmup_epochs ({warmup:g}) "
                f"is not below training.epochs ({epochs}): policy {refresh.policy} would never refresh; lower one of the first "
                "two, or use policy static"
            )

    def _check_threshold(self) -> None:
        """Refuse drift that policy adaptive could never see pass its threshold."""
        refresh = self.knowledge.refresh
        if refresh.min_interval >= refresh.max_interval:
            raise ValueError(
                f"knowledge.refresh.threshold can never fire: min_interval {refresh.min_interval:g} is not below max_interval "
                f"{refresh.max_interval:g}; widen them, or use policy fixed"
            )
        most = 4 / COLDEST  # logits move by 2/τ at most, and so does the logarithm of their exponentials' sum
        if refresh.threshold >= most:
            raise ValueError(
                f"knowledge.refresh.threshold can never fire: it is {refresh.threshold:g} nats, but RDM stays below 4/τ, with "
                f"the lowest τ 4/{COLDEST:g} = {most:g}; lower it, or use policy fixed"
            )
        if refresh.signal == "probe" and self.knowledge.drift_probe == 0:
            raise ValueError("knowledge.refresh.signal=probe needs entries to probe: set knowledge.drift_probe above 0")

    def _check_modality(self) -> None:
        """Refuse towers that would not be used: of the modality that the corpus is not of."""
        data, other = self.data, "image" if self.data.modality == "audio" else "audio"
        for name in ("", "_pooling", "_weights"):
            field = ModelSettings.model_fields.get(f"{other}{name}")
            given = getattr(self.model, f"{other}{name}", None)
            if field is not None and given != field.default:
                raise ValueError(
                    f"model.{other}{name} is {given}, but data.corpus={data.corpus} is a corpus of {THINGS[data.modality]}: set "
                    f"model.{data.modality} instead, or choose another data.corpus"
                )

    def to_yaml(self) -> str:
        """The settings as a YAML document that ``--config`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted names; an empty mapping is a value."""
    made: dict[str, Any] = {}
    for key, value in tree.items():
        made |= flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return made


def with_values(settings: Settings, values: dict[str, Any]) -> Settings:
    """The settings with others by their dotted names.

    Raises:
        SettingsError: as :func:`load`, and for a name that is no setting.
    """
    tree = settings.model_dump(mode="json")
    for name, value in values.items():
        *sections, last = name.split(".")
        part: Any = tree
        for section in sections:
            part = part.get(section) if isinstance(part, dict) else None
        if not isinstance(part, dict) or last not in part:
            raise SettingsError(f"{name} is no setting; python jobs/train.py --help lists them")
        part[last] = value
    return load(tree)


def load(document: str | dict[str, Any], origin: str = "settings") -> Settings:
    """Validate a YAML document or a nested mapping.

    Raises:
        SettingsError: with one line for each field that is wrong; `origin`, if there is one, names the document.
    """
    try:
        values = yaml.safe_load(document) if isinstance(document, str) else document
        return Settings.model_validate({} if values is None else values)
    except (ValidationError, yaml.YAMLError) as error:
        raise SettingsError(f"{origin}: {describe(error)}" if origin else describe(error)) from error


def describe(error: Exception) -> str:
    """A validation error as `field: what is wrong`, a line each."""
    if not isinstance(error, ValidationError):
        return str(error)
    rows = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        rows.append(f"{field}: {message}" if field else message)
    return "\n".join(rows)


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help whose description keeps its lines: it shows commands."""


class _Parser(ArgumentParser):
    """An argument parser whose errors are one message, not the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [line for line in message.splitlines() if "For further information visit" not in line]
        lines += [line.split(". Got value")[-1] for line in message.splitlines() if ". Got value" in line]
        sys.stderr.write(f"error: {' '.join(line.strip() for line in lines)}\nSee {self.prog} --help for every setting.\n")
        raise SystemExit(2)


def parser(description: str) -> ArgumentParser:
    """A parser with the whole settings tree; jobs add their own arguments to it.

    ``--config`` takes a YAML file or a preset's name and may be repeated; later ones win, and dotted arguments such as
    ``--ask.rho 0.5`` win over all of them, wherever they stand. ``--print_config`` prints the tree that results.
    """
    made = _Parser(description=description, default_meta=False, formatter_class=_Help)
    presets = ", ".join(sorted(_presets()))
    made.add_argument("--config", action="config", help=f"a YAML file of settings, or a preset: {presets}")
    for name, field in Settings.model_fields.items():
        made.add_argument(f"--{name}", type=field.annotation, default=field.default)
    return made


def parse(made: ArgumentParser, arguments: Sequence[str] | None = None) -> tuple[Settings, Namespace]:
    """Parse `arguments` (default: the command line) into the settings and whatever else the job asked for.

    Exits with status 2 and a message that names the field when something is wrong.
    """
    try:
        return parsed(made, sys.argv[1:] if arguments is None else arguments)
    except SettingsError as error:
        made.error(str(error))


def parsed(made: ArgumentParser, arguments: Sequence[str]) -> tuple[Settings, Namespace]:
    """As :func:`parse`, which exits for words that the parser does not take.

    Raises:
        SettingsError: for settings that cannot stand together, naming them.
    """
    found = made.parse_args(_ordered(arguments))
    given = {name: found[name] for name in Settings.model_fields}
    return load({name: plain(part) for name, part in given.items()}, ""), found


def plain(part: Any) -> Any:
    """A section that was parsed, as a mapping."""
    return part.as_dict() if isinstance(part, Namespace) else part


def _presets() -> dict[str, Path]:
    """Presets by name."""
    return {path.stem: path for path in PRESETS.glob("*.yaml")}


def _ordered(words: Sequence[str]) -> list[str]:
    """The words with every ``--config`` first, so that dotted arguments win, and presets as their files."""
    configs, others, presets = [], [], _presets()
    rest = iter(words)
    for word in rest:
        flag, separator, value = word.partition("=")
        if flag == "--config" and (separator or (value := next(rest, ""))):
            configs.append(f"--config={presets.get(value, value)}")
        else:
            others.append(word)
    return configs + others

"""The settings tree: bounds, cross-field checks, presets, precedence, round trips, and messages that name the field."""

import functools
from typing import get_args

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import settings as budget
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from pydantic import BaseModel, ValidationError

from ask_ray.config import (
    AUDIO_TOWERS,
    IMAGE_TOWERS,
    PRESETS,
    TEXT_TOWERS,
    Settings,
    SettingsError,
    SweepSettings,
    flat,
    load,
    parse,
    parser,
)

# Values just outside what each numeric field allows.
OUTSIDE = {
    "run.seed": [-1],
    "data.sample_rate": [3999, 48001],
    "data.min_seconds": [0],
    "data.max_seconds": [0],
    "data.max_rejected": [-0.01, 1.01],
    "data.shard_clips": [0],
    "data.prepare_tasks": [0],
    "data.shuffle_clips": [0],
    "data.cache_mib": [-1],
    "data.loader_processes": [-1],
    "data.soundscapes.train": [0],
    "data.soundscapes.validation": [-1],
    "data.soundscapes.test": [0],
    "data.soundscapes.seconds": [0.99, 60.1],
    "data.soundscapes.captions": [0, 11],
    "data.soundscapes.max_events": [0, 4],
    "data.soundscapes.zipf": [-0.1, 4.1],
    "data.soundscapes.noise_db": [-90.1, 0.1],
    "data.soundscapes.seed": [-1],
    "data.folder.validation": [-0.01, 1.01],
    "data.folder.test": [-0.01, 1.01],
    "data.wavcaps.validation": [-0.01, 1.01],
    "data.wavcaps.test": [-0.01, 1.01],
    "data.parquet.validation": [-0.01, 1.01],
    "data.parquet.test": [-0.01, 1.01],
    "data.keep_seconds": [0, 600.1],
    "data.image_size": [15, 1025],
    "data.coco.validation": [-0.01, 1.0],
    "model.dim": [1, 4097],
    "model.width": [0, 4.1],
    "model.dropout": [-0.1, 1],
    "model.max_words": [3, 513],
    "model.temperature": [0, 10.1],
    "model.freq_mask": [-1],
    "model.time_mask": [-1],
    "model.image_crop": [0, 1.01],
    "ask.rho": [-0.01, 1.01],
    "ask.neighbours": [0],
    "ask.prototypes": [-1],
    "ask.tau_knowledge": [0],
    "ask.tau_reliability": [0],
    "ask.beta": [-0.01, 1.01],
    "ask.epsilon": [0],
    "ask.queue": [0],
    "knowledge.captions_per_clip": [0],
    "knowledge.exact_below": [-1],
    "knowledge.probes": [0],
    "knowledge.drift_probe": [-1],
    "knowledge.keep": [0],
    "knowledge.cache_gib": [0],
    "knowledge.refresh.interval": [0, 1.1e9],
    "knowledge.refresh.threshold": [0],
    "knowledge.refresh.probe_steps": [0],
    "knowledge.refresh.min_interval": [0, 1.1e9],
    "knowledge.refresh.max_interval": [0, 1.1e9],
    "training.min_workers": [0],
    "training.preemption_steps": [-1],
    "knowledge.corrections.map_interval": [0, 1.1e9],
    "knowledge.corrections.ridge": [0],
    "knowledge.refresh.warmup_epochs": [-0.1],
    "knowledge.refresh.poll_steps": [0],
    "knowledge.refresh.attempts": [0],
    "knowledge.refresh.backoff_seconds": [-0.1],
    "knowledge.refresh.stall_seconds": [0],
    "knowledge.pool.min_actors": [0],
    "knowledge.pool.max_actors": [0],
    "knowledge.pool.cpus": [0],
    "knowledge.pool.gpus": [-0.1],
    "knowledge.pool.batch_size": [0],
    "training.epochs": [0],
    "training.batch_size": [0],
    "training.workers": [0],
    "training.cpus_per_worker": [0],
    "training.gpus_per_worker": [0, 1.1],
    "training.learning_rate": [0],
    "training.weight_decay": [-0.1],
    "training.warmup_share": [-0.01, 1.01],
    "training.clip_norm": [0],
    "training.evaluate_every": [-1],
    "training.evaluation_cpus": [0],
    "training.resize_seconds": [0],
    "training.evaluation_timeout_seconds": [0],
    "training.checkpoint_every": [0],
    "training.keep_checkpoints": [0],
    "training.max_failures": [-1],
}

TOWERS = {"model.audio": AUDIO_TOWERS, "model.image": IMAGE_TOWERS, "model.text": TEXT_TOWERS}

# Combinations that cannot work, and the fields that the message has to name.
IMPOSSIBLE = [
    ({"ask.fine": False, "ask.coarse": False}, ("ask.fine", "ask.coarse")),
    ({"ask.prototypes": 0}, ("ask.coarse", "ask.prototypes")),
    ({"ask.fine": False}, ("ask.negatives", "ask.fine")),
    ({"data.min_seconds": 3.0, "data.max_seconds": 2.0}, ("data.min_seconds", "data.max_seconds")),
    ({"data.min_seconds": 3.0, "data.keep_seconds": 2.0}, ("data.min_seconds", "data.keep_seconds")),
    *(
        ({"data.corpus": name}, (f"data.{name}.path",))
        for name in ("folder", "audiocaps", "clotho", "wavcaps", "parquet", "coco", "flickr30k")
    ),
    *(
        ({"data.corpus": "coco", "data.coco.path": "/coco", field: value}, (field, "model.image", "data.corpus=coco"))
        for field, value in (("model.audio", "resnet38"), ("model.audio_weights", "x"), ("model.audio_pooling", "max"))
    ),
    ({"model.image": "hf:some/vit"}, ("model.image", "model.audio", "data.corpus=soundscapes")),
    ({"model.image_pooling": "pooler"}, ("model.image_pooling", "model.audio")),
    ({"data.wavcaps.validation": 0.5, "data.wavcaps.test": 0.5}, ("data.wavcaps.validation", "data.wavcaps.test")),
    ({"data.parquet.validation": 0.9}, ("data.parquet.validation", "data.parquet.test")),
    ({"data.folder.validation": 0.5, "data.folder.test": 0.5}, ("data.folder.validation", "data.folder.test")),
    ({"knowledge.sources": []}, ("knowledge.sources",)),
    ({"knowledge.sources": ["/other", "train", "/other"]}, ("knowledge.sources", "/other")),
    (
        {"knowledge.sources": ["/other"], "knowledge.refresh.policy": "adaptive"},
        ("knowledge.refresh.signal", "knowledge.sources"),
    ),
    (
        {"knowledge.sources": ["/other"], "knowledge.corrections.write_back": True},
        ("knowledge.corrections", "knowledge.sources"),
    ),
    ({"knowledge.cache": "copies"}, ("knowledge.cache",)),
    ({"training.node_resource": "memory"}, ("training.node_resource", "memory")),
    (
        {"knowledge.refresh.policy": "adaptive", "knowledge.refresh.min_interval": 3, "knowledge.refresh.max_interval": 3},
        ("knowledge.refresh.threshold", "min_interval", "max_interval"),
    ),
    (
        {"knowledge.refresh.policy": "adaptive", "knowledge.refresh.threshold": 400},
        ("knowledge.refresh.threshold", "4/0.01 = 400"),
    ),
    (
        {"knowledge.refresh.policy": "adaptive", "knowledge.refresh.signal": "probe", "knowledge.drift_probe": 0},
        ("knowledge.refresh.signal", "knowledge.drift_probe"),
    ),
    ({"training.epochs": 4}, ("knowledge.refresh.warmup_epochs (4)", "training.epochs (4)")),
    ({"knowledge.refresh.warmup_epochs": 1e300}, ("knowledge.refresh.warmup_epochs", "training.epochs (14)")),
    *(
        (
            {"knowledge.refresh.policy": policy, "knowledge.refresh.min_interval": 10, "knowledge.refresh.max_interval": 11},
            ("knowledge.refresh.min_interval (10)", "knowledge.refresh.warmup_epochs (4)", "training.epochs (14)"),
        )
        for policy in ("adaptive", "continuous")
    ),
    ({"knowledge.pool.min_actors": 2}, ("knowledge.pool.min_actors", "knowledge.pool.max_actors")),
]

WRONG_TYPES = [
    ("training.workers", "two"),
    ("training.workers", 1.5),
    ("ask.rho", [0.5]),
    ("ask.enabled", "perhaps"),
    ("data.corpus", "musiccaps"),
    ("knowledge.refresh.policy", "sometimes"),
    ("model.audio", 3),
    ("model.audio", "ced"),
    ("model.audio", "ced-huge"),
    ("model.audio", "bert"),
    ("model.audio", "hf:"),
    ("model.audio", "xhf:a"),
    ("model.image", "resnet38"),
    ("model.text", "hf: a"),
    ("model.text", "resnet38"),
    ("model.audio_pooling", "median"),
    ("model.language", ""),
    ("run.name", "a b"),
    ("run.name", ".hidden"),
    ("run.name", "../up"),
    ("training.node_resource", "a b"),
    ("tracking.experiment", ""),
    ("ask", 3),
]


def leaves(model: type[BaseModel], above: str = ""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{above}{name}.")
        else:
            yield f"{above}{name}", field


LEAVES = dict(leaves(Settings))


def tree(values: dict) -> dict:
    made: dict = {}
    for name, value in values.items():
        *above, last = name.split(".")
        place = made
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return made


def values_of(name: str) -> st.SearchStrategy:
    """Values that the field's own bounds allow."""
    field = LEAVES[name]
    kind = field.annotation
    if "Annotated" in str(kind):
        return st.none() | st.integers(1, 64)
    if kind in (int | None, float | None):
        kind = (set(get_args(kind)) - {type(None)}).pop()
    bounds = {type(part).__name__.lower(): getattr(part, type(part).__name__.lower(), None) for part in field.metadata}
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(bounds.get("ge", 0), bounds.get("le", 10**6))
    if kind is float:
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt", 1e6))
        return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds)
    if getattr(kind, "__args__", None) and all(isinstance(word, str) for word in kind.__args__):
        return st.sampled_from(kind.__args__)
    if name == "knowledge.pool.node_labels":
        return st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.text("xyz-1é", max_size=4), max_size=2)
    if name == "knowledge.sources":
        return st.lists(st.sampled_from(["train", "s3://bucket/clotho", "a folder/ünïcode"]), min_size=1, unique=True)
    if name in ("data.held_out", "data.wavcaps.blacklists"):
        places = st.lists(st.sampled_from(["s3://bucket/clotho", "a folder/ünïcode.json"]), unique=True)
        return places if name == "data.held_out" else st.none() | places
    if name in TOWERS:
        return st.sampled_from([*TOWERS[name], "hf:org/a model", "hf:/ünïcode/folder"])
    if name == "run.name":
        return st.none() | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True)
    words = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).map(lambda text: f"/a {text}")
    return words if kind is str else st.none() | words


@st.composite
def trees(draw: st.DrawFn) -> Settings:
    chosen = draw(st.lists(st.sampled_from(sorted(LEAVES)), unique=True, max_size=8))
    try:
        return load(tree({name: draw(values_of(name)) for name in chosen}))
    except SettingsError as error:
        assert ": Input" not in str(error), "a value inside a field's own bounds was refused"  # noqa: PT017
        assume(False)
        raise


@functools.cache
def one_parser() -> ArgumentParser:
    """One parser for every command line: what one says must not reach the next (tested below), and making one takes long."""
    return parser("a job")


def read(*words: str) -> Settings:
    return parse(one_parser(), list(words))[0]


def refused(capsys, *words: str) -> str:
    """The message of a command line that has to be refused."""
    with pytest.raises(SystemExit) as stop:
        read(*words)
    told = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in told.err
    assert told.err.startswith("error: ")
    assert "usage:" not in told.err + told.out
    return told.err


def test_every_numeric_field_has_a_row_of_values_it_must_refuse():
    kinds = (int, float, int | None, float | None)
    numeric = {name for name, field in LEAVES.items() if field.annotation in kinds or "Annotated" in str(field.annotation)}
    assert numeric == set(OUTSIDE)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OUTSIDE.items() for value in values])
def test_a_value_outside_its_bounds_is_refused_by_name(name, value):
    with pytest.raises(SettingsError) as refusal:
        load(tree({name: value}))
    assert f"{name}: " in str(refusal.value)


@pytest.mark.parametrize("name", [name for name, field in LEAVES.items() if field.annotation in (float, float | None)])
def test_a_number_that_is_not_finite_is_refused_by_name(name, capsys):
    for value in (float("inf"), float("-inf"), float("nan")):
        with pytest.raises(SettingsError, match=f"{name}: Input should be"):
            load(tree({name: value}))
    for word in (".inf", "inf", "nan"):
        assert name in refused(capsys, f"--{name}={word}")


def test_a_number_of_a_sweep_that_is_not_finite_is_refused():
    with pytest.raises(ValidationError, match=r"reduction\n.* finite number"):
        SweepSettings(reduction=float("inf"))


def test_bounds_hold_on_the_command_line_too(capsys, tmp_path):
    for name in ("ask.rho", "data.sample_rate", "data.soundscapes.seconds", "training.workers", "knowledge.refresh.interval"):
        for value in OUTSIDE[name]:
            assert name in refused(capsys, f"--{name}={value}")
            (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree({name: value})))
            assert name in refused(capsys, "--config", str(tmp_path / "x.yaml"))


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_a_wrong_type_or_word_is_refused_by_name(name, value, capsys, tmp_path):
    with pytest.raises(SettingsError, match=name):
        load(tree({name: value}))
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree({name: value})))
    assert name in refused(capsys, "--config", str(tmp_path / "x.yaml"))
    assert name in refused(capsys, f"--{name}={value}")


@pytest.mark.parametrize("name", ["nonsense", "ask.rhoo", "data.folder.paht", "knowledge.refresh.every"])
def test_an_unknown_key_is_refused_by_name(name, capsys, tmp_path):
    with pytest.raises(SettingsError, match=name):
        load(tree({name: 1}))
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree({name: 1})))
    assert name.rpartition(".")[2] in refused(capsys, "--config", str(tmp_path / "x.yaml"))
    assert name in refused(capsys, f"--{name}", "1")


@pytest.mark.parametrize(("values", "named"), IMPOSSIBLE)
def test_an_impossible_combination_is_refused_and_names_its_fields(values, named, capsys):
    with pytest.raises(SettingsError) as refusal:
        load(tree(values))
    told = refused(capsys, *(f"--{name}={str(value).lower()}" for name, value in values.items()))
    for name in named:
        assert name in str(refusal.value)
        assert name in told


def test_what_ask_needs_is_not_asked_of_plain_ntxent():
    ask = {"enabled": False, "fine": False, "coarse": False, "prototypes": 0}
    made = load({"ask": ask, "training": {"epochs": 1}, "knowledge": {"refresh": {"policy": "continuous"}}})
    assert not made.ask.enabled


def test_refreshes_that_come_just_in_time_are_allowed():
    adaptive = {"policy": "adaptive", "warmup_epochs": 1.5, "min_interval": 1.4, "threshold": 399.9}
    continuous = {"policy": "continuous", "unit": "steps", "warmup_epochs": 2.9, "min_interval": 50}
    for refresh in (adaptive, continuous, {"warmup_epochs": 2.9}, {"policy": "static", "warmup_epochs": 0}):
        assert load({"training": {"epochs": 3}, "knowledge": {"refresh": refresh}}).training.epochs == 3


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(SettingsError) as refusal:
        load({"ask": {"rho": 2}, "training": {"workers": 0}}, "here.yaml")
    assert str(refusal.value).startswith("here.yaml: ")
    assert "ask.rho: " in str(refusal.value)
    assert "training.workers: " in str(refusal.value)


@pytest.mark.parametrize("document", ["a: [", "- a", "false", "0", "word"])
def test_what_is_no_mapping_of_settings_is_refused(document, capsys, tmp_path):
    with pytest.raises(SettingsError, match=r"here\.yaml"):
        load(document, "here.yaml")
    (tmp_path / "x.yaml").write_text(document)
    refused(capsys, "--config", str(tmp_path / "x.yaml"))


def test_sources_are_a_list_on_the_command_line_and_in_yaml(tmp_path):
    assert Settings().knowledge.sources == ["train"]
    assert read("--knowledge.sources", "[train, s3://bucket/clotho]").knowledge.sources == ["train", "s3://bucket/clotho"]
    assert read("--knowledge.sources+", "/other").knowledge.sources == ["train", "/other"]
    (tmp_path / "x.yaml").write_text("knowledge: {sources: [/other]}")
    assert read("--config", str(tmp_path / "x.yaml")).knowledge.sources == ["/other"]


def test_what_a_command_line_says_does_not_reach_the_next(capsys, tmp_path):
    """A parser keeps nothing: neither what is appended or merged, nor what was refused half-way."""
    (tmp_path / "x.yaml").write_text("{knowledge: {sources: [/other], pool: {node_labels: {zone: a}}}, ask: {rho: 0.3}}")
    config = f"--config={tmp_path / 'x.yaml'}"
    assert read("--knowledge.sources+", "/other", "--data.held_out+", "/kept").knowledge.sources == ["train", "/other"]
    assert read("--knowledge.sources+", "/third").knowledge.sources == ["train", "/third"]
    assert read(config, "--knowledge.sources+", "/third").knowledge.sources == ["/other", "/third"]
    assert read(config, "--knowledge.pool.node_labels", "{kind: x}").ask.rho == 0.3
    refused(capsys, config, "--ask.rho", "2", "--training.workers", "3")
    with pytest.raises(SystemExit):
        read(config, "--print_config")
    assert read() == Settings() == parse(parser("a job"), [])[0]


def test_an_empty_document_means_the_defaults():
    assert load("") == load({}) == Settings()


def test_settings_cannot_be_changed_after_the_checks():
    with pytest.raises(ValidationError):
        Settings().ask.rho = 0.3  # type: ignore[misc]


@given(trees())
@budget(max_examples=60, deadline=None)
def test_the_yaml_of_any_settings_loads_as_the_same_settings(made):
    assert load(made.to_yaml()) == made


@given(made=trees())
@budget(max_examples=10, deadline=None)
def test_the_yaml_of_any_settings_can_be_given_as_config(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "settings.yaml"
    path.write_text(made.to_yaml(), encoding="utf-8")
    assert read("--config", str(path)) == made


def test_printed_config_is_a_config(capsys, tmp_path):
    words = ["--config", "paper", "--run.name", "a-name", "--knowledge.pool.node_labels", "{zone: a}", "--ask.epsilon", "1e-3"]
    with pytest.raises(SystemExit) as stop:
        read(*words, "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert read("--config", str(path)) == load(printed) == read(*words)
    assert read("--config", str(path)).knowledge.pool.node_labels == {"zone": "a"}


def test_the_paper_preset_holds_what_the_paper_reports():
    made = read("--config", "paper")
    ask, refresh = made.ask, made.knowledge.refresh
    assert (ask.rho, ask.beta, ask.neighbours, ask.prototypes, ask.negatives) == (0.2, 0.2, 10, 512, "none")
    assert (ask.enabled, ask.fine, ask.coarse) == (True, True, True)
    assert (refresh.policy, refresh.interval, refresh.mode, refresh.warmup_epochs) == ("fixed", 15, "sync", 0)


@pytest.mark.parametrize("corpus", ["clotho", "audiocaps"])
@pytest.mark.parametrize("towers", ["resnet38-bert", "ced-sonar"])
def test_the_presets_of_the_papers_systems(corpus, towers):
    made = read("--config", f"{corpus}-{towers}", f"--data.{corpus}.path", "/some/folder")
    assert made.data.corpus == corpus
    with pytest.raises(SystemExit):
        read("--config", f"{corpus}-{towers}")
    ask, refresh, model = made.ask, made.knowledge.refresh, made.model
    assert (ask.rho, ask.beta, ask.neighbours, ask.prototypes, ask.negatives) == (0.2, 0.2, 10, 512, "none")
    assert (refresh.policy, refresh.unit, refresh.interval, refresh.mode) == ("fixed", "epochs", 15, "sync")
    assert made.training.epochs > 15
    assert made.data.max_seconds == {"clotho": 30, "audiocaps": 10}[corpus]
    assert made.knowledge.captions_per_clip == {"clotho": 5, "audiocaps": 1}[corpus]
    assert (model.audio, model.text) == {"resnet38-bert": ("resnet38", "bert"), "ced-sonar": ("ced-base", "sonar")}[towers]
    assert made.data.sample_rate == {"resnet38-bert": 32000, "ced-sonar": 16000}[towers]
    assert None not in (model.audio_weights, model.text_weights)
    assert (model.dim, model.temperature) == (1024, 0.07)
    training = (made.training.batch_size, made.training.workers, made.training.learning_rate, made.training.weight_decay)
    assert training == {"resnet38-bert": (64, 1, 1e-4, 0), "ced-sonar": (128, 1, 5e-5, 0)}[towers]


def test_the_ntxent_preset_changes_nothing_but_the_method():
    given = flat(read("--config=ntxent").model_dump())
    default = flat(Settings().model_dump())
    assert {name for name in given if given[name] != default[name]} == {"ask.enabled"}


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_loads_and_is_named_by_help(preset, capsys):
    corpus = preset.split("-")[0]
    given = ["--config", preset, *([f"--data.{corpus}.path", "/some/folder"] if "-" in preset else [])]
    document = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
    if "-" in preset:
        document["data"][corpus] = {"path": "/some/folder"}
    assert read(*given) == load(document)
    for words in (["--help"], [*given, "--print_config"]):
        with pytest.raises(SystemExit) as stop:
            read(*words)
        assert stop.value.code == 0
        told = capsys.readouterr().out
        if words == ["--help"]:  # which wraps its lines at hyphens too
            assert preset in "".join(told.split())
        else:
            assert load(told) == read(*given)


def test_a_preset_that_does_not_exist_is_refused(capsys):
    assert "papre" in refused(capsys, "--config", "papre")
    refused(capsys, "--config")


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "paper", "--ask.rho", "0.5"],
        ["--ask.rho", "0.5", "--config", "paper"],
        ["--ask.rho=0.5", "--config=paper"],
    ],
)
def test_dotted_arguments_win_over_config_wherever_they_stand(words):
    made = read(*words)
    assert (made.ask.rho, made.ask.prototypes) == (0.5, 512)


def test_of_two_configs_the_later_wins(tmp_path):
    (tmp_path / "mine.yaml").write_text("ask: {rho: 0.6, beta: 0.1}")
    mine = str(tmp_path / "mine.yaml")
    assert (read("--config", "paper", "--config", mine).ask.rho, read("--config", mine, "--config", "paper").ask.rho) == (
        0.6,
        0.2,
    )
    made = read("--config", "ntxent", "--config", mine)
    assert (made.ask.enabled, made.ask.beta) == (False, 0.1)


def test_the_name_of_a_preset_is_just_a_word_elsewhere():
    made = read("--config", "ntxent", "--run.name", "ntxent", "--tracking.experiment", "paper", "--run.storage=paper")
    assert (made.run.name, made.tracking.experiment, made.run.storage) == ("ntxent", "paper", "paper")


def test_a_job_may_add_arguments_of_its_own():
    made = parser("a job")
    made.add_argument("--trials", type=int, default=3)
    settings, found = parse(made, ["--trials", "7", "--ask.rho", "0.5"])
    assert (found.trials, settings.ask.rho) == (7, 0.5)


def test_flat_names_every_leaf_and_keeps_empty_mappings():
    assert flat({"a": {"b": 1, "c": {}}, "d": None}) == {"a.b": 1, "a.c": {}, "d": None}
    assert set(flat(Settings().model_dump())) == set(LEAVES)

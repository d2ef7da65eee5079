"""Checkpoints: training goes on to the same bits, files are plain data, and damage is named."""

import itertools
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ask_ray.config import DataSettings, Settings, UserError, load, with_values
from ask_ray.data.batches import Batch, TrainingBatches
from ask_ray.data.schema import FORMAT, SPLITS
from ask_ray.models import registry
from ask_ray.models.weights import WeightsError
from ask_ray.storage import Folder, digest_file
from ask_ray.training import checkpoint
from ask_ray.training.checkpoint import CheckpointError, Place
from ask_ray.training.step import Stepper
from ask_ray.training.trainer import RunPlace

RATE, PER_EPOCH = 8000, 6
SETTINGS = load(
    {
        "data": {"sample_rate": RATE},
        "model": {"width": 0.1, "dim": 8, "dropout": 0.3},
        "ask": {"enabled": False},
        "training": {"epochs": 2, "learning_rate": 0.01, "warmup_share": 0.25},
    }
)


def fresh(seed: int, settings: Settings = SETTINGS) -> Stepper:
    checkpoint.seed_everything(seed, 0)
    model = registry.build(settings.model, RATE)
    stepper = Stepper(model, model, settings, PER_EPOCH, torch.device("cpu"))
    stepper.model = model
    return stepper


def steps(stepper: Stepper, first: int, count: int) -> list[float]:
    """Losses of steps with dropout and masking: they follow from the random state too."""
    made = []
    for step in range(first, first + count):
        noise = 0.1 * torch.randn(4, RATE // 2, generator=torch.Generator().manual_seed(step))
        words, mask = stepper.model.tokenise([f"sound {step} {n}" for n in range(4)])
        ids = torch.arange(4)
        batch = Batch(noise, torch.full((4,), RATE // 2), words, mask, ids, torch.zeros_like(ids))
        figures = stepper.take(batch, None).figures
        made += [float(figures["loss"]), float(figures["gradient_norm"]), stepper.optimizer.param_groups[0]["lr"]]
    return made


def save(
    folder: Path, stepper: Stepper, place: Place, states: list[dict[str, torch.Tensor]] | None = None, **memory: torch.Tensor
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    states = [checkpoint.random_state()] if states is None else states
    checkpoint.save(folder, place, SETTINGS, stepper.model, stepper.optimizer, stepper.scheduler, states, memory)


def restore(folder: Path, stepper: Stepper, rank: int = 0) -> Place:
    return checkpoint.restore(folder, stepper.model, stepper.optimizer, stepper.scheduler, rank)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As much of a prepared corpus as opening a model asks for."""
    folder = Folder.at(str(tmp_path_factory.mktemp("corpus")))
    folder.write_json(
        "manifest.json", {"format": FORMAT, "modality": "audio", "sample_rate": RATE, "splits": {split: {} for split in SPLITS}}
    )
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> tuple[Path, Stepper, list[float]]:
    """A checkpoint after four steps, and the steps that followed."""
    folder, stepper = tmp_path_factory.mktemp("runs") / "checkpoint_a", fresh(0)
    steps(stepper, 0, 4)
    save(folder, stepper, Place(0, 4, 3, corpus))
    return folder, stepper, steps(stepper, 4, 3)


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


# --- going on ---


def test_training_continues_to_the_same_bits(trained, corpus):
    folder, stepper, expected = trained
    other = fresh(99)
    assert restore(folder, other) == Place(0, 4, 3, corpus)
    assert steps(other, 4, 3) == expected
    for name, value in stepper.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_training_taken_up_in_the_middle_of_an_epoch_goes_on_to_the_same_bits(small_corpus, tmp_path):
    stepper, other = fresh(0), fresh(99)
    batches = TrainingBatches(small_corpus, DataSettings(), stepper.model.tokenise, 8, 0, 0, 1)
    checkpoint.seed_everything(0, 1)
    for number, batch in enumerate(itertools.islice(batches.epoch(1), 5)):
        if number == 2:
            save(tmp_path / "checkpoint_a", stepper, Place(1, 8, 0, "corpus", batch=2))
        stepper.take(batch, None)
    place = restore(tmp_path / "checkpoint_a", other)
    for batch in itertools.islice(batches.epoch(place.epoch, place.batch), 3):
        other.take(batch, None)
    for name, value in stepper.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_a_rank_that_saved_no_random_state_keeps_its_own(trained):
    other = fresh(99)
    before = torch.get_rng_state()
    restore(trained[0], other, rank=1)
    assert torch.equal(torch.get_rng_state(), before)
    restore(trained[0], other, rank=0)
    assert not torch.equal(torch.get_rng_state(), before)


def test_every_rank_gets_its_own_random_state(tmp_path, corpus):
    torch.manual_seed(1)
    first = checkpoint.random_state()
    torch.manual_seed(2)
    second = checkpoint.random_state()
    stepper = fresh(0)
    save(tmp_path, stepper, Place(1, 6, 0, corpus), [first, second])
    for rank, state in enumerate((first, second)):
        restore(tmp_path, stepper, rank)
        assert torch.equal(checkpoint.random_state()["cpu"], state["cpu"])


def test_what_later_steps_remember_is_kept(tmp_path, corpus):
    stepper, place = fresh(0), Place(1, 7, 2, corpus, batch=3, asked=5)
    save(tmp_path / "with", stepper, place, **{"queue.ids": torch.arange(4), "overlay.audio": torch.randn(3, 2)})
    held = checkpoint.memory(tmp_path / "with")
    assert held["queue.ids"].tolist() == [0, 1, 2, 3]
    assert held["overlay.audio"].shape == (3, 2)
    assert restore(tmp_path / "with", stepper) == place
    save(tmp_path / "without", stepper, place)
    assert checkpoint.memory(tmp_path / "without") == {}
    (tmp_path / "with" / checkpoint.MEMORY).write_bytes(b"half")
    with pytest.raises(checkpoint.CheckpointError, match="with"):
        checkpoint.memory(tmp_path / "with")


def test_the_schedule_can_be_set_to_any_step():
    """After a change of the number of workers an epoch has another number of steps."""
    walked, set_there = fresh(0), fresh(0)
    steps(walked, 0, 4)
    set_there.stand_at(4)
    assert set_there.optimizer.param_groups[0]["lr"] == walked.optimizer.param_groups[0]["lr"]
    assert steps(set_there, 4, 1)[2] == steps(walked, 4, 1)[2]


def test_a_fork_takes_up_moments_and_has_rates_of_its_own(trained):
    own = with_values(SETTINGS, {"training.learning_rate": 0.002, "training.weight_decay": 0.5})
    forked, never = fresh(99, own), fresh(99, own)
    checkpoint.restore(trained[0], forked.model, forked.optimizer, forked.scheduler, 0, fork=True)
    for stepper in (forked, never):
        stepper.stand_at(4)
        steps(stepper, 4, 2)
    rates = [[(group["lr"], group["weight_decay"]) for group in stepper.optimizer.param_groups] for stepper in (forked, never)]
    assert rates[0] == rates[1]
    assert {int(state["step"]) for state in forked.optimizer.state.values()} == {6}, "its moments are of four steps more"


@pytest.mark.parametrize(
    ("batch", "steps", "now", "expected"), [(60, 100, 50, 30), (40, 50, 100, 80), (7, 8, 8, 7), (0, 5, 9, 0), (99, 100, 3, 2)]
)
def test_another_number_of_workers_goes_on_at_the_same_share_of_the_epoch(batch, steps, now, expected):
    place = Place(2, 200, 0, "corpus", batch=batch, steps=steps)
    assert place.among(now) == Place(2, 200, 0, "corpus", batch=expected, steps=now)


def test_a_checkpoint_before_the_first_step_can_be_restored(tmp_path, corpus):
    stepper = fresh(0)
    save(tmp_path, stepper, Place(0, 0, 0, corpus))
    expected, other = steps(stepper, 0, 2), fresh(5)
    restore(tmp_path, other)
    assert steps(other, 0, 2) == expected


def test_seeds_make_ranks_different_and_runs_equal():
    def drawn(seed: int, rank: int) -> list[float]:
        checkpoint.seed_everything(seed, rank)
        return torch.rand(3).tolist()

    assert drawn(1, 0) == drawn(1, 0)
    assert len({tuple(drawn(seed, rank)) for seed in (0, 1) for rank in (0, 1)}) == 4


# --- files ---


def test_files_are_plain_data(trained):
    folder = trained[0]
    names = {"model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "settings.yaml"}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            load_file(path)
        else:
            path.read_text("utf-8")
        assert not path.read_bytes().startswith((b"\x80", b"PK"))  # what pickle and torch.save begin with
    assert load((folder / "settings.yaml").read_text("utf-8")) == SETTINGS
    assert json.loads((folder / "state.json").read_text("utf-8"))["place"]["knowledge_version"] == 3


def test_the_model_of_a_checkpoint_is_the_one_that_was_saved(trained, corpus, tmp_path):
    model, settings, place = checkpoint.open_model(trained[0])
    assert (settings, place) == (SETTINGS, Place(0, 4, 3, corpus))
    assert not model.training
    saved = load_file(trained[0] / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert isinstance(settings, Settings)


def test_a_checkpoint_is_opened_though_the_published_weights_that_it_began_with_are_gone(trained, tmp_path):
    folder = copied(trained[0], tmp_path / "checkpoint_b")
    told = with_values(SETTINGS, {"data.sample_rate": 16000, "model.audio": "ced-tiny", "model.audio_weights": "gone.pt"})
    torch.manual_seed(3)
    with pytest.raises(WeightsError, match=r"gone\.pt"):
        registry.build(told.model, 16000)
    made = registry.build(told.model, 16000, read=False)
    (folder / "settings.yaml").write_text(told.to_yaml())
    save_file(made.state_dict(), folder / "model.safetensors")
    state = json.loads((folder / "state.json").read_text())
    state["digests"]["model.safetensors"] = digest_file(folder / "model.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    opened, settings, _ = checkpoint.open_model(folder)
    assert settings.model.audio_weights == "gone.pt"
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in opened.state_dict().items())


# --- damage ---

NAMES = ("model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")


def harm(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
        harmed = {"truncated": content[: len(content) // 2], "emptied": b"", "garbled": b"\xff" * 64, "bit-flipped": flipped}
        path.write_bytes(harmed[how])


@pytest.mark.parametrize("how", ["missing", "truncated", "emptied", "garbled"])
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_an_error_that_names_the_folder(trained, tmp_path, name, how):
    folder = copied(trained[0], tmp_path / "checkpoint_b")
    harm(folder / name, how)
    with pytest.raises(CheckpointError, match="checkpoint_b"):
        restore(folder, fresh(1))


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".safetensors")])
def test_a_flipped_bit_is_told(trained, tmp_path, name):
    folder = copied(trained[0], tmp_path / "checkpoint_b")
    harm(folder / name, "bit-flipped")
    with pytest.raises(CheckpointError, match=rf"checkpoint_b: cannot be loaded \({name} is not what was saved"):
        restore(folder, fresh(1))
    if name == "model.safetensors":
        with pytest.raises(CheckpointError, match="is not what was saved"):
            checkpoint.open_model(folder)


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in ("model.safetensors", "state.json") for how in ("missing", "truncated", "emptied", "garbled")]
    + [("settings.yaml", "missing"), ("settings.yaml", "garbled")],
)
def test_a_model_that_cannot_be_opened_is_an_error_that_names_the_folder(trained, tmp_path, name, how):
    folder = copied(trained[0], tmp_path / "checkpoint_b")
    harm(folder / name, how)
    with pytest.raises(UserError, match="checkpoint_b"):
        checkpoint.open_model(folder)


@pytest.mark.parametrize("state", ["[]", "{}", '{"place": {}}', '{"place": {"epoch": 1}}', '{"place": 3}', "null"])
def test_a_state_that_is_none_is_an_error(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        checkpoint.place_of(tmp_path)


def test_a_checkpoint_of_another_model_is_an_error(trained, tmp_path):
    folder = copied(trained[0], tmp_path / "checkpoint_b")
    other = registry.build(SETTINGS.model.model_copy(update={"dim": 16}), RATE)
    stepper = Stepper(other, other, SETTINGS, PER_EPOCH, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="checkpoint_b"):
        checkpoint.restore(folder, other, stepper.optimizer, stepper.scheduler, 0)


# --- runs ---


@pytest.mark.parametrize("snapshot", [None, "", "{", "[]"])
def test_a_folder_that_is_no_run_is_an_error_that_names_it(tmp_path, snapshot):
    folder = tmp_path / "some-run"
    if snapshot is not None:
        folder.mkdir()
        (folder / "checkpoint_manager_snapshot.json").write_text(snapshot)
    with pytest.raises(CheckpointError, match="some-run"), checkpoint.newest(Folder.at(str(folder))):
        pass


def test_the_settings_of_a_run_are_read_without_its_weights_and_what_is_damaged_is_named(left_run, recorded):
    corpus = recorded("own", dog=1)
    run = Folder.at(left_run("run", SETTINGS, corpus))
    settings, place = checkpoint.read_settings(run)
    assert settings == SETTINGS
    assert place.corpus == corpus.folder.uri
    for name, content in (("state.json", b"{}"), ("settings.yaml", b"\xff")):
        damaged = Folder.at(left_run("damaged", SETTINGS, corpus))
        (damaged / "checkpoint_a").write(name, content)
        with pytest.raises(CheckpointError, match=r"damaged/checkpoint_a: no whole checkpoint"):
            checkpoint.read_settings(damaged)


def test_the_versions_that_checkpoints_name_are_pinned(tmp_path):
    run = Folder.at(str(tmp_path / "run"))
    assert checkpoint.pinned_versions(run) == []
    for name, version in (("checkpoint_a", 4), ("checkpoint_b", 2), ("checkpoint_c", 0), ("checkpoint_d", 4), ("other", 9)):
        (run / name).write_json("state.json", {"place": {"knowledge_version": version}})
    (run / "checkpoint_e").write("model.safetensors", b"")  # being written
    (run / "checkpoint_f").write("state.json", b"")  # likewise
    run.write_json("checkpoint_manager_snapshot.json", {})
    assert checkpoint.pinned_versions(run) == [2, 4]


def test_a_checkpoint_that_is_removed_meanwhile_pins_nothing(tmp_path, monkeypatch):
    run = Folder.at(str(tmp_path / "run"))
    for name, version in (("checkpoint_a", 4), ("checkpoint_b", 2)):
        (run / name).write_json("state.json", {"place": {"knowledge_version": version}})
    read = Folder.read_json

    def raced(folder: Folder, name: str) -> Any:
        if folder.name == "checkpoint_a":
            folder.delete()
        return read(folder, name)

    monkeypatch.setattr(Folder, "read_json", raced)
    assert checkpoint.pinned_versions(run) == [2]


#: The folder of the checkpoints on their way, in the temporary one.
STAGED = f"ask_ray-checkpoints-{os.getuid()}-{socket.gethostname()}"


def stage() -> tuple[int, Path]:
    """Another process with a checkpoint on its way: its id, and where the checkpoint is."""
    there, told = os.pipe()
    process = os.fork()
    if process == 0:
        checkpoint._staging.cache_clear()
        made = Path(tempfile.mkdtemp(dir=checkpoint.staging()))
        (made / "model.safetensors").write_bytes(b"weights")
        os.write(told, str(made).encode())
        signal.pause()
    return process, Path(os.read(there, 4096).decode())


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Iterator[Path]:
    """The system's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    checkpoint._staging.cache_clear()
    yield tmp_path
    checkpoint._staging.cache_clear()


def test_a_checkpoint_on_its_way_is_removed_when_its_process_is_gone_and_not_before(temporary):
    mine = Path(tempfile.mkdtemp(dir=checkpoint.staging()))
    process, made = stage()
    try:
        checkpoint.tidy()
        assert (made / "model.safetensors").exists()
    finally:
        end(process)
    checkpoint.tidy()
    assert not made.parent.exists()
    assert mine.exists()
    assert [path.name for path in temporary.iterdir()] == [STAGED]


def test_a_run_that_is_forgotten_leaves_no_checkpoint_that_was_on_its_way(temporary):
    process, made = stage()
    end(process)
    RunPlace(Folder.at(str(temporary / "runs")), "a").forget()
    assert not made.parent.exists()


def test_a_temporary_folder_that_was_cleared_is_made_anew(temporary):
    before = checkpoint.staging()
    shutil.rmtree(before)
    assert checkpoint.staging().is_dir()
    checkpoint.tidy()
    assert checkpoint.staging().is_dir()


def test_a_temporary_folder_that_cannot_be_tidied_stops_nothing(temporary):
    (temporary / STAGED).write_text("no folder")
    checkpoint.tidy()

"""Jobs end in a plain message and an exit status; only a bug shows a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from ask_ray import command
from ask_ray.config import Settings, SettingsError, SweepSettings, UserError
from ask_ray.storage import StorageError

JOBS = Path(command.__file__).parent.parent / "jobs"


def fail(error: BaseException):
    raise error


@pytest.mark.parametrize(
    ("error", "status"), [(SettingsError("ask.rho: no"), 2), (UserError("the run failed"), 1), (StorageError("no disk"), 1)]
)
def test_a_known_problem_is_one_message_and_a_status(error, status, capsys):
    with pytest.raises(SystemExit) as stop:
        command.guarded(lambda: fail(error))
    told = capsys.readouterr()
    assert (stop.value.code, told.err, told.out) == (status, f"error: {error}\n", "")
    assert stop.value.__suppress_context__


def test_an_interrupt_has_its_own_status(capsys):
    with pytest.raises(SystemExit) as stop:
        command.guarded(lambda: fail(KeyboardInterrupt()))
    assert (stop.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        command.guarded(lambda: 1 / 0)


def test_a_job_that_ends_well_does_not_exit():
    seen = []
    command.guarded(lambda: seen.append(1))
    assert seen == [1]


def test_a_job_gets_the_settings_of_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["job", "--config", "paper", "--ask.beta", "0.4"])
    seen: list[Settings] = []
    command.with_settings("a job", seen.append)
    assert (seen[0].ask.rho, seen[0].ask.beta) == (0.2, 0.4)


def test_wrong_settings_end_before_the_job_starts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["job", "--ask.rho", "2"])
    seen: list[Settings] = []
    with pytest.raises(SystemExit) as stop:
        command.with_settings("a job", seen.append)
    assert stop.value.code == 2
    assert "ask.rho" in capsys.readouterr().err
    assert seen == []


SWEPT = "space:\n  ask.rho: {grid: [0.2, 0.5]}\n"


def with_space(monkeypatch: pytest.MonkeyPatch, file: Path, text: str, *words: str) -> list[tuple[Settings, SweepSettings]]:
    """What a job gets of a space file and more words of the command line."""
    file.write_text(text + SWEPT)
    monkeypatch.setattr(sys, "argv", ["tune", "--space", str(file), *words])
    seen: list[tuple[Settings, SweepSettings]] = []
    command.with_space("a sweep", lambda settings, sweep, file: seen.append((settings, sweep)))
    return seen


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        ("settings:\n  training: {epochz: 3}\n", (), ["2: training.epochz: Extra inputs"]),
        ("settings:\n  ask:\n    beta: 0.1\n    rho: 2\n", (), ["4: ask.rho: Input should be less than or equal to 1"]),
        ("settings:\n  ask: {beta: 2}\n  ask_: 3\n", (), ["2: ask.beta: Input", "3: ask_: Extra"]),
        ("settings:\n  ask: 3\n", (), ["2: ask: Input should be"]),
        ("sweep:\n  trails: 8\n", (), ["2: sweep.trails: Extra inputs"]),
        ("sweep:\n  seeds: [0, x]\n", (), ["2: sweep.seeds.1: Input should be a valid integer"]),
        ("sweep:\n  algorithm: pbt\n  trials: 1\n", (), ["2: sweep.algorithm pbt replaces bad trials"]),
        ("settings:\n  ask:\n    coarse: false\n    fine: false\n", (), ["4: ask.fine and ask.coarse are both off"]),
        ("settings:\n  ask:\n    coarse: false\n", ("--ask.fine", "false"), ["3: ask.fine and ask.coarse are both off"]),
        ("settings:\n  data: {corpus: clotho}\n", (), ["2: data.corpus=clotho needs data.clotho.path"]),
    ],
)
def test_what_is_wrong_in_a_space_file_is_told_with_its_line(text, words, told, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        with_space(monkeypatch, tmp_path / "space.yaml", text, *words)
    lines = capsys.readouterr().err.removeprefix("error: ").splitlines()
    assert stop.value.code == 2
    assert len(lines) == len(told)
    assert all(line.startswith(f"{tmp_path / 'space.yaml'}:{start}") for line, start in zip(lines, told, strict=True))


@pytest.mark.parametrize(("name", "value", "line"), [("metric", "loss", 2), ("name", "mine", 3)])
def test_an_error_of_the_job_itself_is_told_with_the_line_of_the_space_file(name, value, line, tmp_path, monkeypatch, capsys):
    file = tmp_path / "space.yaml"
    file.write_text("sweep:\n  metric: loss\n  name: mine\n" + SWEPT)
    monkeypatch.setattr(sys, "argv", ["tune", "--space", str(file)])
    with pytest.raises(SystemExit) as stop:
        command.with_space("a sweep", lambda settings, sweep, _: fail(SettingsError(f"sweep.{name}: no {value}")))
    assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {file}:{line}: sweep.{name}: no {value}\n")


def test_the_command_line_wins_over_a_space_file_and_makes_whole_what_it_leaves_open(tmp_path, monkeypatch):
    text = "settings:\n  data: {corpus: clotho}\n  ask: {rho: 0.3, beta: 0.2}\nsweep: {trials: 3, keep: 2}\n"
    words = ("--data.clotho.path", "/clotho", "--ask.rho=0.4", "--sweep.trials", "5")
    ((settings, sweep),) = with_space(monkeypatch, tmp_path / "space.yaml", text, *words)
    assert (settings.data.corpus, settings.ask.rho, settings.ask.beta) == ("clotho", 0.4, 0.2)
    assert (sweep.trials, sweep.keep) == (5, 2)


def test_a_line_is_not_blamed_for_what_the_command_line_sets(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        with_space(
            monkeypatch, tmp_path / "space.yaml", "settings:\n  ask: {fine: true}\n", "--ask.fine=false", "--ask.coarse=false"
        )
    assert capsys.readouterr().err.startswith("error: ask.fine and ask.coarse are both off")


def test_a_job_gets_its_own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["job", "some/run", "--top", "3"])
    seen = {}
    command.with_arguments(
        "a job",
        lambda run, top, split: seen.update(run=run, top=top, split=split),
        run={"positional": True},
        top={"type": int},
        split={"default": "test"},
    )
    assert seen == {"run": "some/run", "top": 3, "split": "test"}


def test_a_job_with_its_own_arguments_fails_as_plainly(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["job", "some/run"])
    with pytest.raises(SystemExit) as stop:
        command.with_arguments("a job", lambda run: fail(UserError(f"{run}: not there")), run={"positional": True})
    assert (stop.value.code, capsys.readouterr().err) == (1, "error: some/run: not there\n")


def test_a_real_job_refuses_wrong_settings_without_a_traceback(tmp_path):
    words = ["--data.corpus", "folder", "--run.storage", str(tmp_path / "runs")]
    done = subprocess.run([sys.executable, JOBS / "train.py", *words], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "data.folder.path" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_reading_the_settings_does_not_wait_for_ray_and_torch():
    code = "import sys, ask_ray.command; print(sorted({'ray', 'torch', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "full"),
    [
        (["--corpus", "clotho", "--path", "/c", "--out", "s3://b/p"], {"corpus": "clotho", "path": "/c", "out": "s3://b/p"}),
        (["--out=/o", "--path=/a=b c", "--corpus=parquet"], {"corpus": "parquet", "path": "/a=b c", "out": "/o"}),
        (["--corpus", "folder", "--data.folder.path", "/f"], {"corpus": "folder", "path": "/f", "out": "prepared"}),
        (["--data.corpus", "wavcaps", "--data.wavcaps.path=/w"], {"corpus": "wavcaps", "path": "/w", "out": "prepared"}),
    ],
)
def test_a_corpus_may_be_named_in_short(words, full, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["job", *words, "--data.sample_rate", "32000"])
    seen: list[Settings] = []
    command.with_settings("a job", seen.append, command.corpus_in_full)
    data = seen[0].data
    assert (data.corpus, getattr(data, data.corpus).path, data.prepared, data.sample_rate) == (*full.values(), 32000)


@pytest.mark.parametrize("words", [["--path", "/x"], ["--corpus", "soundscapes", "--path", "/x"]])
def test_a_path_without_a_corpus_that_reads_it_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        command.corpus_in_full(words)
    assert stop.value.code == 2
    assert "--corpus" in capsys.readouterr().err


def test_the_preparing_job_tells_its_short_forms_and_refuses_an_unknown_corpus():
    told = subprocess.run([sys.executable, JOBS / "prepare.py", "--help"], capture_output=True, text=True, check=True).stdout
    assert "python jobs/prepare.py" in told
    assert "--data.NAME.path PLACE" in told
    words = ["--corpus", "musiccaps", "--path", "/x"]
    done = subprocess.run([sys.executable, JOBS / "prepare.py", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr

"""Tables as the field prints them, and the files that hold them."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ask_ray import tables
from ask_ray.config import SettingsError
from ask_ray.tables import Report, Sheet

FIGURES = {"r1": 0.364, "r5": 0.5, "r10": 0.75, "map10": 0.333, "median_rank": 4.0, "mean_rank": 12345.678, "n": 1000, "m": 5000}
BOUNDS = {
    "r1": (0.341, 0.389),
    "r5": (0.4, 0.6),
    "r10": (0.7, 0.8),
    "map10": (0.3, 0.4),
    "median_rank": (3.5, 5.0),
    "mean_rank": (9.0, 2e4),
}
TOLD = {**FIGURES, "queries": 5000, "intervals": BOUNDS}


def printed(sheet: Sheet) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(sheet.rich())
    return console.file.getvalue()


def test_the_table_prints_what_the_field_prints():
    figures = {"": {"t2a": FIGURES, "a2t": {**FIGURES, "r1": 0.375}}, ", injected": {"t2a": {**FIGURES, "r1": 0.111}}}
    text = printed(tables.retrieval("title", figures))
    assert "title" in text
    rows = [line for line in text.splitlines() if "→" in line]
    assert [cell.strip() for cell in rows[0].strip("│").split("│")] == [
        "text → audio", "36.4", "50.0", "75.0", "33.3", "4", "12345.7", "1000", "5000"
    ]  # fmt: skip
    assert rows[1].split()[1:5] == ["audio", "→", "text", "│"]
    assert "37.5" in rows[1]
    assert "text → audio, injected" in rows[2]
    assert "11.1" in rows[2]


def test_the_table_of_no_figures_has_no_rows():
    assert tables.retrieval("title", {"": {}, ", injected": {}}).rows == []


def test_figures_of_images_are_told_as_such():
    sheet = tables.retrieval("title", {"": {"t2a": TOLD, "a2t": TOLD}}, "image")
    assert [row[0] for row in sheet.rows] == ["text → image", "image → text"]
    assert "N images" in sheet.headings
    rare = tables.rare("title", [{"bucket": "0", "clips": 7, "t2a": TOLD, "a2t": TOLD}], "image")
    assert rare.headings == ("training images", "images", "R@1 % text → image", "R@1 % image → text")


def test_intervals_stand_behind_their_figures():
    (row,) = tables.retrieval("title", {"": {"t2a": TOLD}}).rows
    assert row[1:] == (
        "36.4 [34.1, 38.9]", "50.0 [40.0, 60.0]", "75.0 [70.0, 80.0]", "33.3 [30.0, 40.0]", "4 [3.5, 5]",
        "12345.7 [9, 20000]", "1000", "5000",
    )  # fmt: skip
    assert "36.4 [34.1, 38.9]" in printed(tables.retrieval("a [bold]title", {"": {"t2a": TOLD}}))


def test_rare_sounds_have_a_row_for_each_bucket():
    sheet = tables.rare("title", [{"bucket": "1–9", "clips": 7, "t2a": TOLD, "a2t": {**TOLD, "r1": 0.1}}])
    assert sheet.rows == [("1–9", "7", "36.4 [34.1, 38.9]", "10.0 [34.1, 38.9]")]


CLASSES: dict[str, Any] = {
    "n": 4, "clips": 4, "accuracy": 0.5, "top5": 1.0, "intervals": {"accuracy": (0.25, 0.75), "top5": (1.0, 1.0)},
    "classes": [
        {"category": "a|b", "clips": 4, "accuracy": 0.5, "top5": 1.0, "taken_for": "[red]",
         "intervals": {"accuracy": (0.25, 0.75), "top5": (1.0, 1.0)}},
        {"category": "[red]", "clips": 0, "accuracy": None, "top5": None, "taken_for": None, "intervals": None},
    ],
}  # fmt: skip


def test_classes_have_rows_also_without_clips_and_whatever_they_are_called(tmp_path: Path):
    sheet = tables.classes("title", CLASSES)
    assert sheet.rows == [
        ("all", "4", "50.0 [25.0, 75.0]", "100.0 [100.0, 100.0]", ""),
        ("a|b", "4", "50.0 [25.0, 75.0]", "100.0 [100.0, 100.0]", "[red]"),
        ("[red]", "0", "", "", ""),
    ]
    assert printed(sheet).count("[red]") == 2
    assert "| a\\|b | 4 |" in sheet.markdown()
    Report(CLASSES, [sheet], tables.class_records(CLASSES)).write(tmp_path / "of.csv")
    with (tmp_path / "of.csv").open(encoding="utf-8") as stream:
        whole, first, last = csv.DictReader(stream)
    assert (whole["category"], whole["accuracy_low"], first["taken_for"]) == ("", "0.25", "[red]")
    assert (last["category"], last["clips"], last["accuracy"]) == ("[red]", "0", "")


def test_a_report_is_written_by_the_files_ending(tmp_path: Path):
    sheet = tables.retrieval("title", {"": {"t2a": TOLD}})
    report = Report(
        {"final": {"t2a": TOLD}}, [sheet, sheet], [tables.record(TOLD, ranking="cosine", direction="t2a", bucket="all")]
    )
    for path in tables.places([str(tmp_path / name) for name in ("a.json", "b.MD", "c.csv")]):
        report.write(path)
    assert json.loads((tmp_path / "a.json").read_text())["final"]["t2a"]["intervals"]["r1"] == [0.341, 0.389]
    told = (tmp_path / "b.MD").read_text(encoding="utf-8")
    assert told.count("## title") == 2
    assert "| text → audio | 36.4 [34.1, 38.9] |" in told
    (row,) = csv.DictReader(io.StringIO((tmp_path / "c.csv").read_text()))
    assert (row["ranking"], row["r1"], row["r1_low"], row["r1_high"], row["queries"]) == (
        "cosine",
        "0.364",
        "0.341",
        "0.389",
        "5000",
    )


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("figures.txt", "must end with one of .json, .md, .csv"),
        ("nowhere/a.json", "make its folder"),
        ("", "must end"),
        (f"{'x' * 300}.md", "too long"),
    ],
)
def test_what_cannot_be_written_is_refused_first(tmp_path: Path, file: str, told: str):
    with pytest.raises(SettingsError, match=f"--write: .*{told}"):
        tables.places([str(tmp_path / file)])


def test_looking_whether_a_file_can_be_written_leaves_everything_as_it_was(tmp_path: Path):
    (tmp_path / "old.md").write_text("figures")
    (tmp_path / "folder.csv").mkdir()
    tables.places([str(tmp_path / name) for name in ("old.md", "new.json")])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["folder.csv", "old.md"]
    assert (tmp_path / "old.md").read_text() == "figures"
    for path in (tmp_path / "folder.csv", Path("/proc/a.json")):  # nobody may make a file in /proc, which is there
        with pytest.raises(SettingsError, match=rf"^--write: {path} cannot be written"):
            tables.places([str(path)])

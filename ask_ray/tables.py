"""Tables of figures, as the field prints them: on a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ask_ray.config import SettingsError
from ask_ray.data import card
from ask_ray.modality import THINGS, Modality, headings
from ask_ray.storage import expanded

ENDINGS = (".json", ".md", ".csv")
SHARES = {"r1": "R@1 %", "r5": "R@5 %", "r10": "R@10 %", "map10": "mAP@10 %"}
RANKS = {"median_rank": "median rank", "mean_rank": "mean rank"}

#: Never beside figures of plain ranking in one table.
TRANSDUCTIVE = "transductive (Sinkhorn over the whole test set)"


@dataclass(frozen=True)
class Sheet:
    """A table. The first column is text, the others hold numbers, but for those in `words`."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: tuple[str, ...] = ()

    def rich(self) -> Table:
        """For a terminal."""
        made = Table(title=Text(self.title))
        for number, heading in enumerate(self.headings):
            made.add_column(heading, justify="left" if number == 0 or heading in self.words else "right", overflow="fold")
        for row in self.rows:
            made.add_row(*map(Text, row))
        return made

    def markdown(self) -> str:
        """The title as a heading, and the table."""
        return "\n".join([f"## {self.title}", "", *card.table(self.headings, self.rows), ""])


@dataclass(frozen=True)
class Report:
    """What a job found: all of it, its tables, and one flat record for each row, with the same names."""

    found: dict[str, Any]
    sheets: list[Sheet]
    records: list[dict[str, Any]]

    def write(self, file: Path) -> None:
        """Write by the file's ending: .json holds `found`, .md the tables, .csv the records."""
        text = {".json": self._json, ".md": self._markdown, ".csv": self._csv}[file.suffix.lower()]()
        file.write_text(text, encoding="utf-8", newline="")

    def _json(self) -> str:
        return json.dumps(self.found, indent=2, ensure_ascii=False) + "\n"

    def _markdown(self) -> str:
        return "\n".join(sheet.markdown() for sheet in self.sheets)

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        return text.getvalue()


def places(files: Sequence[str]) -> list[Path]:
    """The files of `--write`.

    Raises:
        SettingsError: if one has another ending, or cannot be written.
    """
    found = [expanded(file) for file in files]
    for path in found:
        if path.suffix.lower() not in ENDINGS:
            raise SettingsError(f"--write: {path} must end with one of {', '.join(ENDINGS)}, which says what to write")
        _check_writable(path)
    return found


def _check_writable(path: Path) -> None:
    """Refuse, before anything is computed, a file that could not be written then. Leaves none behind."""
    try:
        there = path.exists() or path.is_symlink()
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise SettingsError(f"--write: {path} cannot be written ({error}): make its folder, or give another") from error


def retrieval(title: str, figures: Mapping[str, Mapping[str, Any]], modality: Modality = "audio") -> Sheet:
    """A row for each direction of each named result, with intervals where it has them."""
    rows = []
    for name, ways in figures.items():
        for way, heading in headings(modality).items():
            of = ways.get(way)
            if of:
                cells = [*(share(of, key) for key in SHARES), *(rank(of, key) for key in RANKS)]
                rows.append((f"{heading}{name}", *cells, f"{of['n']}", f"{of['m']}"))
    return Sheet(title, ("", *SHARES.values(), *RANKS.values(), f"N {THINGS[modality]}", "M captions"), rows)


def rare(title: str, buckets: Sequence[Mapping[str, Any]], modality: Modality = "audio") -> Sheet:
    """A row for each bucket of :func:`ask_ray.training.evaluation.by_rarity`."""
    rows: list[tuple[str, ...]] = [
        (of["bucket"], f"{of['clips']}", share(of["t2a"], "r1"), share(of["a2t"], "r1")) for of in buckets
    ]
    things = THINGS[modality]
    return Sheet(title, (f"training {things}", things, *(f"R@1 % {way}" for way in headings(modality).values())), rows)


def classes(title: str, found: Mapping[str, Any]) -> Sheet:
    """A row for all clips and one for each class of :func:`ask_ray.training.classification.classified`."""
    rows = [_class_row("all", found, "")]
    rows += [_class_row(of["category"], of, of["taken_for"] or "") for of in found["classes"]]
    return Sheet(title, ("class", "N clips", "accuracy %", "top-5 %", "most taken for"), rows, words=("most taken for",))


def _class_row(name: str, of: Mapping[str, Any], taken_for: str) -> tuple[str, ...]:
    shares = [share(of, key) if of["clips"] else "" for key in ("accuracy", "top5")]
    return (name, f"{of['clips']}", *shares, taken_for)


def class_records(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of :func:`classes`, its rows as flat records; the first, of all clips, has an empty category."""
    records = []
    for of in ({"category": "", "taken_for": None, **found}, *found["classes"]):
        flat: dict[str, Any] = {"category": of["category"], "clips": of["clips"]}
        for key in ("accuracy", "top5"):
            low, high = of["intervals"][key] if of["clips"] else (None, None)
            flat |= {key: of[key], f"{key}_low": low, f"{key}_high": high}
        records.append(flat | {"taken_for": of["taken_for"]})
    return records


def record(of: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """A direction's figures as a flat record: each with the bounds of its interval."""
    flat: dict[str, Any] = dict(names)
    for key in (*SHARES, *RANKS):
        low, high = of["intervals"][key]
        flat |= {key: of[key], f"{key}_low": low, f"{key}_high": high}
    return flat | {"queries": of["queries"], "n": of["n"], "m": of["m"]}


def share(of: Mapping[str, Any], key: str) -> str:
    """A share in per cent, with its interval if it has one: `36.4 [34.1, 38.9]`."""
    bounds = (of.get("intervals") or {}).get(key)
    told, *within = (f"{100 * value:.1f}" for value in (of[key], *(bounds or ())))
    return f"{told} [{', '.join(within)}]" if within else told


def rank(of: Mapping[str, Any], key: str) -> str:
    """A rank, with its interval if it has one."""
    bounds = (of.get("intervals") or {}).get(key)
    told, *within = (f"{round(value, 1):g}" for value in (of[key], *(bounds or ())))
    return f"{told} [{', '.join(within)}]" if within else told

"""The data card of a prepared corpus: what is in it, where it came from and what was left out, told from its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from ask_ray.data.schema import BLACKLISTED, KEPT, LEAKS
from ask_ray.modality import THINGS

#: Clips that the card names where it cannot name all.
EXAMPLES = 20


def render(manifest: dict[str, Any]) -> str:
    """A manifest as Markdown. Depends on the clips alone, not on when, where or by how many tasks they were prepared."""
    told = (_recordings, _rates) if manifest["modality"] == "audio" else (_pictures,)
    parts = [part(manifest) for part in (_head, *told, _aside, _kept_out, _settings)]
    return "\n".join(line for part in parts for line in [*part, ""])


def _head(manifest: dict[str, Any]) -> Iterator[str]:
    origin = manifest["origin"]
    audio = manifest["modality"] == "audio"
    kept = f"at {manifest['sample_rate']} Hz" if audio else f"in pictures of at most {manifest['image_size']} pixels"
    yield f"# {manifest['corpus']} {kept}"
    yield ""
    yield f"Source: {origin['layout']}" + (f", {origin['folder']}" if origin["folder"] else "")
    if origin["lists"]:
        yield ""
        yield from table(("list", "BLAKE2b digest"), [(f"`{name}`", f"`{digest}`") for name, digest in origin["lists"].items()])


def _recordings(manifest: dict[str, Any]) -> Iterator[str]:
    cells = {
        "hours": lambda of: f"{of['seconds'] / 3600:.2f}",
        "seconds": lambda of: _spread(of["lengths"]),
        "words": lambda of: _spread(of["words"]),
        "with source id": lambda of: of["source_ids"],
        "cut": lambda of: of["cut"],
    }
    yield from _splits(manifest, cells)
    yield (
        "Seconds a clip (whole seconds) and words a caption: least / median / most. Cut: the recording is longer than "
        f"{manifest['settings']['keep_seconds']:g} s and goes on. The digest is of what the split's files say and of their "
        "samples; the manifest has each file's."
    )


def _pictures(manifest: dict[str, Any]) -> Iterator[str]:
    cells = {
        "shorter side": lambda of: _spread(of["shorter"]),
        "longer side": lambda of: _spread(of["longer"]),
        "words": lambda of: _spread(of["words"]),
        "with source id": lambda of: of["source_ids"],
        "shrunk": lambda of: of["shrunk"],
    }
    yield from _splits(manifest, cells)
    yield (
        "Pixels a side as they are kept and words a caption: least / median / most. Shrunk: the file holds more pixels. The "
        "digest is of what the split's files say and of their pixels; the manifest has each file's."
    )


def _splits(manifest: dict[str, Any], cells: Mapping[str, Callable[[dict[str, Any]], object]]) -> Iterator[str]:
    """A row a split, with the cells of its modality by their headings."""
    yield "## Splits"
    yield ""
    rows = [
        (split, of["clips"], of["captions"], *(cell(of) for cell in cells.values()), f"`{of['digest']}`")
        for split, of in manifest["splits"].items()
    ]
    yield from table(("split", THINGS[manifest["modality"]], "captions", *cells, "digest"), rows)
    yield ""


def _rates(manifest: dict[str, Any]) -> Iterator[str]:
    yield "## Sampling rates of the recordings"
    yield ""
    rates: dict[int, int] = {}
    for of in manifest["splits"].values():
        for rate, count in of["rates"].items():
            rates[int(rate)] = rates.get(int(rate), 0) + count
    yield from table(("Hz", "clips"), sorted(rates.items()))


def _aside(manifest: dict[str, Any]) -> Iterator[str]:
    yield "## Set aside"
    yield ""
    if manifest["rejected"]:
        yield from table(("reason", "rows"), list(manifest["rejected"].items()))
        yield ""
        yield "Each is listed with its file and details in `rejected/`."
    else:
        yield "Nothing."


def _kept_out(manifest: dict[str, Any]) -> Iterator[str]:
    yield "## Kept out of training because something is evaluated on it"
    yield ""
    counts = {reason: count for reason, count in manifest["rejected"].items() if reason in (*LEAKS, BLACKLISTED)}
    against = ", ".join(manifest["settings"]["held_out"])
    yield "Compared with the corpus's own validation and test splits" + (f", and with those of {against}." if against else ".")
    yield ""
    if not counts:
        yield "No clip."
        return
    yield ", ".join(f"{count} {reason}" for reason, count in counts.items()) + "."
    if manifest["leaks"]:
        yield ""
        yield from table(("clip", "reason", "detail"), [(one["id"], one["reason"], one["detail"]) for one in manifest["leaks"]])
        if sum(counts.get(reason, 0) for reason in LEAKS) > len(manifest["leaks"]):
            yield ""
            yield "… and more, see `rejected/`."


def _settings(manifest: dict[str, Any]) -> Iterator[str]:
    settings = manifest["settings"]
    yield "## Settings"
    yield ""
    own = settings[manifest["corpus"]]
    told = {name: settings[name] for name in (*KEPT[manifest["modality"]].settings, "shard_clips")}
    told |= {f"{manifest['corpus']}.{name}": value for name, value in own.items()}
    yield from table(("setting", "value"), [(f"`data.{name}`", value) for name, value in told.items()])


def _spread(counts: dict[str, int]) -> str:
    """Least, median and most of numbers that are counted in ascending order."""
    if not counts:
        return ""
    numbers, upto = list(counts), list(accumulate(counts.values()))
    median = next(number for number, reached in zip(numbers, upto, strict=True) if 2 * reached >= upto[-1])
    return f"{numbers[0]} / {median} / {numbers[-1]}"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """A Markdown table, line by line."""
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |"

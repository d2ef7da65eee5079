"""The data card tells what the manifest counts."""

import pytest

from ask_ray.data.card import EXAMPLES, _spread, render

SPLIT = {
    "clips": 3, "captions": 6, "samples": 9, "source_ids": 2, "cut": 1, "most_captions": 2, "seconds": 5400.0,
    "rates": {"8000": 1, "44100": 2}, "lengths": {"0": 1, "9": 1, "10": 1}, "words": {"2": 3, "11": 3},
    "digest": "d1", "files": [],
}  # fmt: skip
EMPTY = {**SPLIT, "clips": 0, "captions": 0, "seconds": 0.0, "rates": {}, "lengths": {}, "words": {}, "digest": "d2"}


def manifest(**changes: object) -> dict:
    settings = {"keep_seconds": 300.0, "sample_rate": 16000, "min_seconds": 0.1, "shard_clips": 256}
    return {
        "corpus": "clotho",
        "modality": "audio",
        "sample_rate": 16000,
        "origin": {"layout": "Clotho", "folder": "/data/clotho", "lists": {"a|b.csv": "f00"}},
        "splits": {"train": SPLIT, "validation": EMPTY, "test": {**SPLIT, "rates": {"16000": 1, "44100": 1}}},
        "rejected": {},
        "leaks": [],
        "settings": {**settings, "held_out": [], "clotho": {"path": "/data/clotho"}},
        **changes,
    }


def test_counts_hours_rates_lengths_digests_and_the_source_are_told():
    told = render(manifest())
    for line in (
        "# clotho at 16000 Hz",
        "Source: Clotho, /data/clotho",
        "| `a\\|b.csv` | `f00` |",
        "| train | 3 | 6 | 1.50 | 0 / 9 / 10 | 2 / 2 / 11 | 2 | 1 | `d1` |",
        "| validation | 0 | 0 | 0.00 |  |  | 2 | 1 | `d2` |",
        "| 8000 | 1 |",
        "| 16000 | 1 |",
        "| 44100 | 3 |",
        "| `data.clotho.path` | /data/clotho |",
        "Nothing.",
        "No clip.",
    ):
        assert line in told.splitlines(), line
    assert told.index("| 8000 |") < told.index("| 16000 |") < told.index("| 44100 |")


def test_rejections_and_leaks_are_told_with_their_reasons():
    leaks = [
        {"id": f"c{n}", "source": "s", "reason": "held out by digest", "detail": "it sounds\nas test clip 't' does"}
        for n in range(EXAMPLES)
    ]
    rejected = {"blacklisted": 4, "held out by digest": EXAMPLES + 1, "unreadable": 2}
    told = render(manifest(rejected=rejected, leaks=leaks, settings={**manifest()["settings"], "held_out": ["s3://***@b/c"]}))
    lines = told.splitlines()
    assert "| unreadable | 2 |" in lines
    assert f"4 blacklisted, {EXAMPLES + 1} held out by digest." in lines
    assert "| c0 | held out by digest | it sounds as test clip 't' does |" in lines
    assert "… and more, see `rejected/`." in lines
    assert "s3://***@b/c" in told


@pytest.mark.parametrize(
    ("counts", "told"),
    [({}, ""), ({"5": 1}, "5 / 5 / 5"), ({"1": 1, "2": 1}, "1 / 1 / 2"), ({"1": 1, "9": 8, "30": 1}, "1 / 9 / 30")],
)
def test_numbers_are_told_by_least_median_and_most(counts, told):
    assert _spread(counts) == told

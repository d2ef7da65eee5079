"""Small corpora in every public layout, with real recordings of several kinds and a few things wrong in each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Write = Callable[..., Path]

RATES, ENDINGS = (16000, 44100, 8000, 32000, 48000), ("wav", "flac", "ogg", "mp3")


def video(split: str, number: int) -> str:
    """A video's id: eleven characters, as YouTube's, some beginning with Y or a dash."""
    return f"{'Y-_'[number % 3]}{split}-{number}".ljust(11, "-")


class Trees:
    """Makes trees below `home`. Every recording differs from all others unless it is a copy on purpose."""

    def __init__(self, home: Path, write_audio: Write) -> None:
        self.home, self._write, self._made = home, write_audio, 0

    def sound(self, path: Path, **options: Any) -> Path:
        """A recording at `path`: the next pitch, rate, and number of channels."""
        self._made += 1
        n = self._made
        return self._write(path, **{"seconds": 0.4, "rate": RATES[n % 5], "hz": 200 + 7 * n, "channels": 1 + n % 2} | options)

    def audiocaps(self, name: str = "audiocaps") -> Path:
        """The original form: 12 training clips, 2 and 4 held out with five captions. Wrong in training: one clip of a test clip's
        video, one with a test clip's sound, one truncated, one empty, one missing; one recording that no list names."""
        root = self.home / name
        rows: dict[str, list[list[object]]] = {}
        for split, clips, captions in (("train", 12, 1), ("val", 2, 5), ("test", 4, 5)):
            rows[split] = []
            for n in range(clips):
                found, start = video(split, n), 30 + n
                form = (
                    f"Y{found}.wav",
                    f"{found}_{start}.flac",
                    f"{found}.ogg",
                    f"{found}_{start * 1000}_{start * 1000 + 10000}.mp3",
                )
                self.sound(root / "audio" / split / form[n % 4])
                rows[split] += [[100 * n + k, found, start, f"a {split} sound number {n}, told {k}"] for k in range(captions)]
        training = root / "audio" / "train"
        rows["train"].append([900, video("test", 1), 5, "of a test clip's video"])
        self.sound(training / f"{video('test', 1)}_5.wav")
        copied = (root / "audio" / "test" / f"Y{video('test', 0)}.wav").read_bytes()
        for number, (what, content) in enumerate({"copy": copied, "cut": self._cut(), "void": b"", "gone": None}.items(), 950):
            found = f"{what}-------"[:11]
            rows["train"].append([number, found, 10, f"{what} it is"])
            if content is not None:
                (training / f"Y{found}.{'flac' if what == 'cut' else 'wav'}").write_bytes(content)
        self.sound(training / "nobody_tells_of_it.wav")
        for split, told in rows.items():
            write_csv(root / "dataset" / f"{split}.csv", ["audiocap_id", "youtube_id", "start_time", "caption"], told)
        return root

    def retrieval(self) -> Path:
        """AudioCaps in the retrieval repository's form: 8 training clips, 2 and 3 held out; most recordings are converted."""
        root = self.home / "retrieval"
        for split, clips in (("train", 8), ("val", 2), ("test", 3)):
            names = [f"Y{video(split, n)}.wav" for n in range(clips)]
            for n, name in enumerate(names):
                self.sound((root / "waveforms" / split / name).with_suffix(f".{ENDINGS[n % 4]}"))
            captions = ["caption"] if split == "train" else [f"caption_{n}" for n in range(1, 6)]
            told = [[name, *(f"{name} as {column}" for column in captions)] for name in names]
            write_csv(root / "csv_files" / f"{split}.csv", ["file_name", *captions], told)
        return root

    def clotho(self) -> Path:
        """8 clips of development, 2 of validation and 3 of evaluation; names with accents, metadata in ISO-8859-1. Wrong in
        development: one sound that evaluation has too, one without a number, one truncated."""
        root = self.home / "clotho"
        for split, clips in (("development", 8), ("validation", 2), ("evaluation", 3)):
            names = [f"Möwe, n° {n} {split}.wav" for n in range(clips)]
            for name in names:
                self.sound(root / split / name, rate=44100)
            captions = [f"caption_{n}" for n in range(1, 6)]
            told = [[name, *(f"{name} as {column}" for column in captions)] for name in names]
            write_csv(root / f"clotho_captions_{split}.csv", ["file_name", *captions], told)
            sounds = {name: str(1000 * clips + n) for n, name in enumerate(names)}
            if split == "development":
                sounds[names[0]], sounds[names[1]] = "3002", "Not found"
                whole = (root / split / names[2]).read_bytes()
                (root / split / names[2]).write_bytes(whole[:30])
            rows = [[name, "a;b", sounds[name], "https://…"[:8], "[0, 9]", "é", "CC"] for name in names]
            columns = ["file_name", "keywords", "sound_id", "sound_link", "start_end_samples", "manufacturer", "license"]
            write_csv(root / f"clotho_metadata_{split}.csv", columns, rows, "iso-8859-1")
        return root

    def wavcaps(self) -> Path:
        """Two clips or more of each source. FreeSound and SoundBible share a number; a blacklist names a clip of AudioSet and
        one of FreeSound; one recording is missing; one clip has no caption; some recordings are converted."""
        root = self.home / "wavcaps"
        sources = {
            "AudioSet_SL": ("as", [f"Y{video('wavs', n)}.wav" for n in range(3)]),
            "BBC_Sound_Effects": ("bbc", ["NHU05093031", "07057090"]),
            "FreeSound": ("fsd", ["123", "124", "80399", "3002"]),
            "SoundBible": ("sb", ["123", "2219"]),
        }
        for source, (short, ids) in sources.items():
            data = [{"id": one, "caption": f"{source} {one}", "duration": 0.4, "tags": ["x"], "author": "y"} for one in ids]
            if source == "SoundBible":
                data += [{"id": "404", "caption": "missing", "duration": 1.0}, {"id": "7", "caption": " ", "duration": 1.0}]
                self.sound(root / "Audio" / source / "7.flac")
            for n, one in enumerate(ids, 1):
                self.sound(root / "Audio" / source / f"{one.removesuffix('.wav')}.{ENDINGS[n % 4]}")
            write_json(root / "json_files" / source / f"{short}_final.json", {"num_captions_per_audio": 1, "data": data})
        write_json(root / "json_files/FreeSound/fsd_final_2s.json", {"data": []})
        banned = {"AudioSet": [f"Y{video('wavs', 1)}.wav"], "FreeSound": ["80399", "999"]}
        write_json(root / "json_files" / "blacklist" / "blacklist_exclude_test_ac.json", banned)
        return root

    def parquet(self) -> Path:
        """Two files to train on and one to test; captions as a list. Wrong in training: one row of no bytes, one truncated, one
        with a test row's sound."""
        root = self.home / "parquet"
        for file, clips in (("train-00000-of-00002", 5), ("train-00001-of-00002", 4), ("test-00000-of-00001", 3)):
            rows = []
            for n in range(clips):
                name = f"{file[:11]} {n}é.{ENDINGS[n % 4]}"
                rows.append((name, self.sound(self.home / "parts" / name).read_bytes(), [f"{name} sounds", f"it is {name}"]))
            if file.startswith("train-00001"):
                rows += [("void.wav", b"", ["void"]), ("cut.flac", self._cut(), ["cut"])]
            if file.startswith("test"):
                copied = ("copy.wav", rows[0][1], ["a copy"])
                write_parquet(root / "data" / "train-extra.parquet", [copied])
            write_parquet(root / "data" / f"{file}.parquet", rows)
        return root

    def _cut(self) -> bytes:
        whole = self.sound(self.home / "parts" / f"cut-{self._made}.flac").read_bytes()
        return whole[: len(whole) // 2]


def write_csv(path: Path, columns: list[str], rows: Sequence[Sequence[object]], encoding: str = "utf-8") -> None:
    """A CSV with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])


def write_json(path: Path, value: object) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_parquet(path: Path, rows: list[tuple[str, bytes, list[str]]], row_group_size: int = 2) -> None:
    """A file as the hub's data sets have: `audio` with bytes and path, `captions`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = [{"bytes": content, "path": name} for name, content, _ in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"audio": pa.array(audio, kind), "captions": [captions for *_, captions in rows]})
    pq.write_table(table, path, row_group_size=row_group_size)

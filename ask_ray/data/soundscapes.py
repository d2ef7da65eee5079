"""Procedural clips with captions: one to three sound events over background noise, and sentences that tell them.

A clip depends on nothing but the settings, the bank, the split, its index and the rate, so any process can make any
clip in any order. Everything a caption says is decided before it is worded, hence all captions of a clip are true:
which events, in which order, overlapping or not, soft or loud, and what the bank tells about each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np
from scipy.fft import irfft, next_fast_len

from ask_ray.config import SoundscapeSettings
from ask_ray.data.events import PLAIN, SynthesisedBank, Variation, pick

Choice = TypeVar("Choice")

__all__ = ["SPLITS", "EventBank", "RecordedBank", "Scene", "SynthesisedBank", "Variation", "compose"]

SPLITS = {"train": 0, "validation": 1, "test": 2}  # part of a clip's seed, so these numbers must never change

# How many events a clip holds, and in how many simultaneous groups they come. Both lists hold odds, not probabilities.
EVENTS = (0.15, 0.40, 0.45)
GROUPS: dict[int, dict[tuple[int, ...], float]] = {
    1: {(1,): 1.0},
    2: {(1, 1): 0.6, (2,): 0.4},
    3: {(1, 1, 1): 0.4, (2, 1): 0.25, (1, 2): 0.25, (3,): 0.1},
}
SECONDS_PER_EVENT = 0.6  # shorter clips hold fewer events: less is not enough to tell what sounds

# Level in dB of full scale of the event's loudest 50 ms, what captions say of it, and the odds.
LOUDNESS: tuple[tuple[float, tuple[str, ...], float], ...] = (
    (-32.0, ("in the distance", "far away", "at low volume", "quietly in the background"), 0.25),
    (-24.0, (), 0.5),
    (-16.0, ("up close", "at full volume", "loud and clear", "loudly in the foreground"), 0.25),
)
TOLD = re.compile(r"\b(loud|quiet|soft|faint|distan|far|near|background|foreground|volume)", re.IGNORECASE)
NOISES = (0.0, -0.5, -1.0)  # white, pink and brown: amplitude goes with frequency to this power

# All templates name the events in the order of their onsets, and read well with clauses as with nouns.
ALONE = (
    "{}",
    "{} and nothing else",
    "just one sound: {}",
    "only this: {}",
    "nothing but this: {}",
    "{}, and that is all",
    "a single sound: {}",
)
TOGETHER = {
    1: ("{}",),
    2: (
        "{} while {}",
        "{} as {}",
        "{} and at the same time {}",
        "{} and {} at once",
        "{} and {} together",
        "{} and meanwhile {}",
        "{} and simultaneously {}",
    ),
    3: (
        "{} while {} and {}",
        "{} as {} and {}",
        "{}, {} and {} all at once",
        "{}, {} and {} together",
        "{}, {} and simultaneously {}",
        "{} and meanwhile {} and {}",
    ),
}
SEQUENCE = {
    2: (
        "{}, and then {}",
        "first {}, then {}",
        "after {}, {}",
        "{} before {}",
        "{}, and afterwards {}",
        "{}, and later {}",
        "at the start {}, at the end {}",
        "{}, next {}",
        "to begin with {}, and finally {}",
    ),
    3: (
        "{}, then {}, and then {}",
        "first {}, then {}, and finally {}",
        "{}, next {}, and lastly {}",
        "after {}, {}, and at the end {}",
        "{} before {}, and afterwards {}",
        "at the start {}, later {}, at the end {}",
        "to begin with {}, after that {}, and in the end {}",
        "{}, afterwards {}, and at last {}",
    ),
}


@dataclass(frozen=True)
class Scene:
    """A clip: `waveform` is (samples,) int16 mono, `events` names its kinds in the order of their onsets."""

    id: str
    captions: tuple[str, ...]
    waveform: np.ndarray
    events: tuple[str, ...]


class EventBank(Protocol):
    """Where sound events come from. A kind is an index into `names`; every draw is made from the given generator."""

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds, most common first."""

    def draw(self, kind: int, rng: np.random.Generator, seconds: float) -> Variation:
        """Draw what sound and words of one event of at most `seconds` share."""

    def render(self, kind: int, rng: np.random.Generator, rate: int, seconds: float, variation: Variation = PLAIN) -> np.ndarray:
        """Render one event as (samples,) float32 mono with a peak of at most 1, at most `seconds` long at `rate` Hz."""

    def phrase(self, kind: int, rng: np.random.Generator, variation: Variation = PLAIN) -> str:
        """Word the event as a clause in the present tense, without capital and final period."""


class RecordedBank:
    """Events from recordings; recordings with the same caption are one kind, and the most recorded come first.

    `recordings` holds (samples,) float arrays, mono and already at the rate of the clips, each with its caption.

    Raises:
        ValueError: when there are none, or one is empty, silent, not finite, not mono, or has no caption.
    """

    def __init__(self, recordings: Sequence[tuple[np.ndarray, str]]) -> None:
        if not recordings:
            raise ValueError("no recordings to compose clips from")
        takes: dict[str, list[np.ndarray]] = {}
        for index, (sound, caption) in enumerate(recordings):
            if sound.ndim != 1 or not np.isfinite(sound).all() or not np.any(sound):
                raise ValueError(f"recording {index} ({caption!r}) must be mono, finite and not silent: {sound.shape}")
            if not (clause := _clause(caption)):
                raise ValueError(f"recording {index} has no caption")
            takes.setdefault(clause, []).append(np.asarray(sound, np.float32))
        self.names = tuple(sorted(takes, key=lambda clause: -len(takes[clause])))
        self._takes = tuple(tuple(takes[clause]) for clause in self.names)

    def draw(self, kind: int, rng: np.random.Generator, seconds: float) -> Variation:
        """Recordings come as they are."""
        return PLAIN

    def render(self, kind: int, rng: np.random.Generator, rate: int, seconds: float, variation: Variation = PLAIN) -> np.ndarray:
        """One of the kind's recordings as (samples,) float32, turned down by up to 3 dB.

        Longer ones are cropped at random to `seconds`, shorter ones start up to 20 ms late where there is room.
        """
        room = max(1, int(seconds * rate))
        sound = pick(rng, self._takes[kind])
        if len(sound) > room:
            sound = _crop(sound, room, rng)
        else:
            sound = np.pad(sound, (int(rng.integers(min(room - len(sound), rate // 50) + 1)), 0))
        gain = rng.uniform(0.7, 1) / max(1.0, float(np.abs(sound).max()))
        return sound * np.float32(gain)

    def phrase(self, kind: int, rng: np.random.Generator, variation: Variation = PLAIN) -> str:
        """The caption as a clause: no final period, no capital unless the first word looks like a name or acronym."""
        return self.names[kind]


def compose(settings: SoundscapeSettings, bank: EventBank, split: str, index: int, rate: int) -> Scene:
    """Make clip `index` of a split at `rate` Hz; the same arguments give the same bytes, in every process and order.

    A clip shorter than 1.2 seconds holds one event, one shorter than 1.8 seconds at most two. (Other releases of NumPy,
    or CPUs with other vector units, may round a few samples differently.)

    Raises:
        ValueError: when there is no such split, or `index` is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([settings.seed, SPLITS[split], index])
    clip = _background(rng, round(settings.seconds * rate), rate, settings.noise_db + rng.uniform(-5, 5))
    kinds = _kinds(settings, bank, rng)
    groups = _choose(rng, GROUPS[len(kinds)])
    events = [_Event(bank, kind, _loudness(bank.names[kind], rng)) for kind in kinds]
    for slot, group in zip(_slots(groups, len(clip), rng), _split(events, groups), strict=True):
        _place(clip, group, slot, rng, rate)
    captions = _captions(_split(events, groups), settings.captions, rng)
    return Scene(f"{split}-{index:07d}", captions, _quantise(clip), tuple(bank.names[kind] for kind in kinds))


class _Event:
    """One event of a clip on its way: what it is, how loud, and how it varies once it was rendered."""

    def __init__(self, bank: EventBank, kind: int, loudness: int) -> None:
        self.bank = bank
        self.kind = kind
        self.level, self.words, _ = LOUDNESS[loudness]
        self.variation = PLAIN

    def render(self, rng: np.random.Generator, rate: int, seconds: float) -> np.ndarray:
        """Render the event at its level, its variation drawn for the room it has."""
        self.variation = self.bank.draw(self.kind, rng, seconds)
        sound = self.bank.render(self.kind, rng, rate, seconds, self.variation)
        gain = 10 ** ((self.level + rng.uniform(-1, 1)) / 20) / max(_loudest(sound, rate), 1e-6)
        return sound * np.float32(gain)

    def word(self, rng: np.random.Generator) -> str:
        """Word the event, and its loudness if that is out of the ordinary."""
        clause = self.bank.phrase(self.kind, rng, self.variation)
        return f"{clause} {pick(rng, self.words)}" if self.words else clause


def _kinds(settings: SoundscapeSettings, bank: EventBank, rng: np.random.Generator) -> list[int]:
    """Distinct kinds of a clip in the order of their onsets: common ones more often, as the exponent says."""
    most = min(settings.max_events, len(bank.names), max(1, int(settings.seconds / SECONDS_PER_EVENT)))
    count = 1 + _choose(rng, dict(enumerate(EVENTS[:most])))
    odds = np.arange(1, len(bank.names) + 1) ** -float(settings.zipf)
    # Shuffled, as draws without replacement tend to begin with the common ones.
    return rng.permutation(rng.choice(len(odds), count, replace=False, p=odds / odds.sum())).tolist()


def _loudness(name: str, rng: np.random.Generator) -> int:
    """Which row of the loudness table; ordinary for a recording whose caption tells a loudness itself."""
    drawn = _choose(rng, {row: odds for row, (_, _, odds) in enumerate(LOUDNESS)})
    return 1 if TOLD.search(name) else drawn


def _slots(groups: tuple[int, ...], n: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Part `n` samples into one slot for each group, longer ones for several events at once."""
    shares = np.array([1 + 0.4 * (size - 1) for size in groups]) * rng.uniform(0.85, 1.15, len(groups))
    edges = np.rint(np.cumsum([0.0, *shares]) / shares.sum() * n).astype(int).tolist()
    return list(pairwise(edges))


def _place(clip: np.ndarray, group: list[_Event], slot: tuple[int, int], rng: np.random.Generator, rate: int) -> None:
    """Add the events of a group to its slot of the clip: in the order of their onsets, all sounding at some moment."""
    start, stop = slot
    alone = len(group) == 1
    room = 0.95 * (stop - start) / rate
    sounds = [event.render(rng, rate, room if alone else 0.75 * room) for event in group]
    # No onset comes after the end of an earlier event, nor pushes the last one out of the slot.
    reach = min(0.9 * min(map(len, sounds)), 0.25 * room * rate)
    steps = rng.uniform(0.4, 1, len(group) - 1) * reach / max(1, len(group) - 1)
    onsets = np.cumsum([0.0, *steps]).astype(int)
    length = max(onset + len(sound) for onset, sound in zip(onsets.tolist(), sounds, strict=True))
    start += int(rng.integers(max(1, stop - start - length + 1)))
    for onset, sound in zip(onsets.tolist(), sounds, strict=True):
        clip[start + onset : start + onset + len(sound)] += sound


def _background(rng: np.random.Generator, n: int, rate: int, level: float) -> np.ndarray:
    """(n,) float32 white, pink or brown noise with an RMS of `level` dB of full scale."""
    size = next_fast_len(n, real=True)
    spectrum = rng.standard_normal(2 * (size // 2 + 1), np.float32).view(np.complex64)
    # Flat below 50 Hz: brown noise would otherwise be all drift and no sound.
    hz = np.maximum(np.arange(len(spectrum), dtype=np.float32) * np.float32(rate / size), 50)
    spectrum *= hz ** np.float32(NOISES[int(rng.integers(len(NOISES)))])
    spectrum[0] = 0
    noise = irfft(spectrum, size)[:n]
    return noise * np.float32(10 ** (level / 20) / np.sqrt(np.mean(np.square(noise))))


def _loudest(sound: np.ndarray, rate: int) -> float:
    """The RMS of the loudest 50 ms, a better measure of loudness than the peak or the mean of a patchy sound."""
    frame = min(len(sound), max(1, rate // 20))
    frames = sound[: len(sound) // frame * frame].reshape(-1, frame)
    return float(np.sqrt(np.mean(np.square(frames), axis=1).max()))


def _quantise(clip: np.ndarray) -> np.ndarray:
    """`clip` as int16; too loud a clip is turned down as a whole, which keeps its events' relative loudness."""
    peak = float(np.abs(clip).max())
    return np.rint(clip * np.float32(32767 * min(1.0, 0.98 / max(peak, 1e-9)))).astype(np.int16)


def _captions(groups: list[list[_Event]], count: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Word the clip `count` times, with the next template each; a wording recurs only where many tries gave no other."""
    templates = SEQUENCE.get(len(groups)) or (TOGETHER | {1: ALONE})[len(groups[0])]
    order = rng.permutation(len(templates)).tolist()
    found: list[str] = []
    attempt = 0
    while len(found) < count:
        caption = _caption(groups, templates[order[attempt % len(order)]], rng)
        if caption not in found or attempt >= 3 * count:
            found.append(caption)
        attempt += 1
    return tuple(found)


def _caption(groups: list[list[_Event]], template: str, rng: np.random.Generator) -> str:
    """Fill in a template for groups in sequence, or for the events of the only group."""
    words = [[event.word(rng) for event in group] for group in groups]
    joined = [pick(rng, TOGETHER[len(group)]).format(*group) for group in words] if len(words) > 1 else words[0]
    text = template.format(*joined)
    return text[0].upper() + text[1:]


def _clause(caption: str) -> str:
    """A caption as a clause that fits into a sentence."""
    text = " ".join(caption.split()).rstrip(" .!;,")
    first, _, rest = text.partition(" ")
    # "FM radio", "I sing" and "Big Ben strikes" keep their capital, "Dogs bark" and "A frog" do not.
    acronym = any(letter.isupper() for letter in first[1:]) or re.match(r"I\b", first)
    name = first not in ("A", "An", "The") and rest[:1].isupper()
    return text if acronym or name else text[:1].lower() + text[1:]


def _crop(sound: np.ndarray, room: int, rng: np.random.Generator) -> np.ndarray:
    """A random stretch of `room` samples, or the one around the peak where the random one would be silent."""
    start = int(rng.integers(len(sound) - room + 1))
    stretch = sound[start : start + room]
    if np.abs(stretch).max() > 0.05 * np.abs(sound).max():
        return stretch
    start = int(np.clip(np.abs(sound).argmax() - room // 2, 0, len(sound) - room))
    return sound[start : start + room]


def _split(events: list[_Event], groups: tuple[int, ...]) -> list[list[_Event]]:
    """The events in consecutive groups of these sizes."""
    ends = np.cumsum(groups).tolist()
    return [events[end - size : end] for end, size in zip(ends, groups, strict=True)]


def _choose(rng: np.random.Generator, odds: dict[Choice, float]) -> Choice:
    """One of the keys, as likely as its odds say."""
    edges = np.cumsum(list(odds.values()))
    drawn = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
    return list(odds)[min(drawn, len(edges) - 1)]

"""A bank of synthesised sound events: short sounds made from a few primitives, and clauses that say what they are.

A kind of event is a row of :data:`KINDS`: a function that renders it, two or three phrases, and what may vary. Each
event is drawn once as a :class:`Variation`, which decides both how it sounds and what may be said about it, so that
words such as "three times" or "at a high pitch" are always true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from scipy.fft import irfft, next_fast_len

Item = TypeVar("Item")
Signal: TypeAlias = np.ndarray  # (samples,) float32
Contour: TypeAlias = float | np.ndarray  # Hz, steady or for every sample

TABLE = 4096  # samples of a wavetable: reading it without interpolation errs by about -65 dB
COUNTS = ("once", "twice", "three times", "four times", "five times")
PITCHES = (("at a low pitch", "in a low tone"), ("at a high pitch", "in a high tone"))
PACES = (("slowly", "at a slow pace"), ("quickly", "at a fast pace"))


@dataclass(frozen=True)
class Variation:
    """What was drawn for one event: factors of its frequencies and of its pace, and how often it sounds.

    `pitch` and `pace` are 1 or clearly away from it, so that naming them is never a matter of taste.
    """

    pitch: float = 1.0
    pace: float = 1.0
    count: int = 1


PLAIN = Variation()


@dataclass(frozen=True)
class Voice:
    """The primitives an event is made of. Tones and noises have an RMS of 1, envelopes run from 0 to 1.

    Frequencies are in Hz, durations in seconds, `n` in samples. Tones and modes follow the event's pitch; what follows
    its pace says so where it is called.
    """

    rng: np.random.Generator
    rate: int
    pitch: float = 1.0
    pace: float = 1.0

    def samples(self, seconds: float) -> int:
        """The whole number of samples in `seconds`, at least one."""
        return max(1, round(seconds * self.rate))

    def vary(self, value: float, share: float = 0.08) -> float:
        """`value` moved at random by at most that share of it."""
        return value * self.rng.uniform(1 - share, 1 + share)

    def line(self, n: int, *points: float) -> Signal:
        """Straight lines through evenly spaced points."""
        return np.interp(np.linspace(0, len(points) - 1, n), np.arange(len(points)), points).astype(np.float32)

    def wander(self, n: int, hz: float) -> Signal:
        """A random curve in [-1, 1] that turns about `hz` times a second."""
        return self.line(n, *self.rng.uniform(-1, 1, 2 + int(n / self.rate * hz)))

    def sway(self, n: int, hz: Contour, sharp: float = 0.5) -> Signal:
        """A wave in [0, 1]: a sine at `sharp` 0.5, closer to on and off the sharper."""
        turns = np.cumsum(np.broadcast_to(np.asarray(hz, np.float64), n)) / self.rate
        wave = np.sin(2 * np.pi * (turns % 1).astype(np.float32))
        return np.clip(0.5 + np.float32(sharp) * wave, 0, 1)

    def decay(self, n: int, seconds: float) -> Signal:
        """An exponential that falls to 1/e in `seconds`."""
        return np.exp(np.arange(n, dtype=np.float32) * np.float32(-1 / (seconds * self.rate)))

    def swell(self, n: int, attack: float, release: float) -> Signal:
        """Rise over `attack` and fall over `release`; both shrink where `n` is too short for them."""
        shape = np.ones(n, np.float32)
        rise, fall = (min(self.samples(seconds), n // 2) for seconds in (attack, release))
        shape[:rise] = np.linspace(0, 1, rise, dtype=np.float32)
        shape[n - fall :] = np.linspace(1, 0, fall, dtype=np.float32)
        return shape

    def tone(self, n: int, hz: Contour, partials: tuple[float, ...] = (1.0,)) -> Signal:
        """A harmonic tone with these amplitudes of its partials; those above the Nyquist frequency are left out."""
        # Clamped so that a rate too low for the tone still gives a sound.
        course = np.minimum(np.broadcast_to(np.asarray(hz, np.float64) * self.pitch, n), 0.45 * self.rate)
        fits = max(1, int(0.48 * self.rate / course.max()))
        spectrum = np.zeros(TABLE // 2 + 1, np.complex64)
        spectrum[1 : 1 + min(fits, len(partials))] = -1j * np.asarray(partials[:fits])
        table = _level(irfft(spectrum, TABLE))
        turns = np.cumsum(course) / self.rate + self.rng.random()
        return table[(turns * TABLE).astype(np.int64) % TABLE]

    def noise(self, n: int, low: float, high: float, tilt: float = 0.0) -> Signal:
        """Gaussian noise between two frequencies; amplitude falls or rises as frequency to the power `tilt`."""
        size = next_fast_len(max(n, 64), real=True)
        high = min(high, 0.49 * self.rate)
        first = max(1, int(min(low, high / 2) * size / self.rate))
        last = max(first + 1, int(high * size / self.rate))
        band = self.rng.standard_normal(2 * (last - first), np.float32).view(np.complex64)
        if tilt:
            band = band * (np.arange(first, last, dtype=np.float32) / first) ** np.float32(tilt)
        spectrum = np.zeros(size // 2 + 1, np.complex64)
        spectrum[first:last] = band
        return _level(irfft(spectrum, size)[:n])

    def modes(self, n: int, *modes: tuple[float, float, float]) -> Signal:
        """A struck body: the sum of decaying sines, each a frequency, a decay and a gain."""
        time = np.arange(n, dtype=np.float32) / np.float32(self.rate)
        sound = np.zeros(n, np.float32)
        for hz, seconds, gain in modes:
            angle = np.float32(2 * np.pi * min(self.vary(hz, 0.02) * self.pitch, 0.45 * self.rate))
            sound += np.float32(gain) * np.sin(angle * time) * np.exp(time * np.float32(-1 / seconds))
        return sound

    def pluck(self, n: int, hz: float, seconds: float, bright: float = 1.0) -> Signal:
        """A plucked or struck string: harmonics that fade the faster the higher they are."""
        return self.modes(n, *((hz * k, seconds / k**0.7, bright ** (k - 1) / k) for k in range(1, 9)))

    def vowel(self, n: int, hz: Contour, *formants: tuple[float, float]) -> Signal:
        """A harmonic tone through resonances, each a centre and a width. They stay put when the pitch moves."""
        middle = float(np.mean(hz)) * self.pitch
        order = np.arange(1, 1 + min(60, max(1, int(0.48 * self.rate / middle))))
        gains = sum(1 / (1 + ((order * middle - centre) / width) ** 2) for centre, width in formants) / np.sqrt(order)
        return self.tone(n, hz, tuple(gains))

    def click(self, seconds: float, low: float, high: float) -> Signal:
        """A burst of noise that falls to 1/e in `seconds`."""
        n = self.samples(4 * seconds)
        return self.noise(n, low, high) * self.decay(n, seconds)

    def place(self, n: int, at: np.ndarray, grain: Signal, spread: float = 0.3) -> Signal:
        """A grain at each of these samples, its gain drawn from [1 - spread, 1]."""
        sound = np.zeros(n, np.float32)
        for start, gain in zip(at.tolist(), self.rng.uniform(1 - spread, 1, len(at)), strict=True):
            sound[start : start + len(grain)] += np.float32(gain) * grain[: n - start]
        return sound

    def often(self, n: int, hz: float) -> np.ndarray:
        """Random samples, `hz` a second on average, at least one."""
        return self.rng.integers(0, n, max(1, self.rng.poisson(hz * n / self.rate)))

    def beats(self, n: int, hz: float, loose: float = 0.0) -> np.ndarray:
        """Samples of a steady beat from the start on; each comes late by at most that share of a beat."""
        step = self.rate / hz
        count = max(1, int(np.ceil(n / step - loose)))
        return ((np.arange(count) + self.rng.uniform(0, loose, count)) * step).astype(np.int64).clip(0, n - 1)


def _level(sound: Signal) -> Signal:
    """`sound` at an RMS of 1."""
    return sound / np.float32(np.sqrt(np.mean(np.square(sound))) + 1e-9)


def _saw(count: int, slope: float = 1.0) -> tuple[float, ...]:
    """Amplitudes of `count` partials that fall as their order to the power `slope`."""
    return tuple(order**-slope for order in range(1, count + 1))


def _odd(count: int) -> tuple[float, ...]:
    """Amplitudes of the odd partials only: a hollow tone."""
    return tuple(order % 2 / order for order in range(1, count + 1))


# Each function below renders one kind: `n` samples at most, any level. The kinds that are counted render one unit.


def rain(v: Voice, n: int) -> Signal:
    return v.noise(n, 900, 7500, -0.2) + 0.4 * v.place(n, v.often(n, 60), v.click(0.004, 1500, 6000), 0.9)


def wind(v: Voice, n: int) -> Signal:
    gust = 0.6 + 0.4 * v.wander(n, 2)
    return v.noise(n, 120, 500) * gust + 0.5 * v.noise(n, 500, 1100) * gust**3


def waves(v: Voice, n: int) -> Signal:
    surge = v.sway(n, v.vary(0.7) * v.pace)
    return v.noise(n, 150, 4500, -0.5) * (0.1 + surge**2) + 0.3 * v.noise(n, 3000, 7000) * surge**4


def thunder(v: Voice, n: int) -> Signal:
    rumble = v.noise(n, 40, 170, -0.3) * (0.6 + 0.4 * v.wander(n, 6)) * v.decay(n, 1.0)
    return rumble + 0.8 * v.noise(n, 100, 2500, -0.5) * v.decay(n, 0.09)


def brook(v: Voice, n: int) -> Signal:
    sound = 0.06 * v.noise(n, 300, 2500)
    for hz in v.rng.uniform(450, 1500, 6):
        size = v.samples(0.06)
        bubble = v.tone(size, v.line(size, hz, 1.4 * hz)) * v.decay(size, 0.02)
        sound += v.place(n, v.often(n, 5), bubble, 0.8)
    return sound


def drip(v: Voice, n: int) -> Signal:
    n = min(n, v.samples(0.25))
    return v.tone(n, v.line(n, 850, 1000, 1900, 2000)) * v.decay(n, 0.035) * v.swell(n, 0.003, 0.02)


def fire(v: Voice, n: int) -> Signal:
    crackle = v.place(n, v.often(n, 11), v.click(0.003, 1200, 6500), 0.9)
    return crackle + 0.5 * v.place(n, v.often(n, 5), v.click(0.008, 500, 3000), 0.8) + 0.12 * v.noise(n, 60, 350)


def steam(v: Voice, n: int) -> Signal:
    return v.noise(n, 4200, 7600) * v.line(n, 1, 0.9, 0.6, 0.4) * v.swell(n, 0.05, 0.2)


def pour(v: Voice, n: int) -> Signal:
    # A vessel that fills: narrow noise around a resonance that rises.
    carried = v.noise(n, 5, 150) * v.tone(n, v.line(n, v.vary(550), v.vary(1500)))
    return carried + 0.2 * v.noise(n, 1500, 5000) * (0.7 + 0.3 * v.wander(n, 20))


def dog(v: Voice, n: int) -> Signal:
    voice = v.vowel(n, v.line(n, 380, 560, 420, 260), (750, 250), (1600, 400)) + 0.5 * v.noise(n, 500, 2500)
    return voice * v.swell(n, 0.015, 0.05) * v.decay(n, 0.09)


def cat(v: Voice, n: int) -> Signal:
    course = v.line(n, 480, 720, 760, 700, 500) * (1 + 0.01 * v.wander(n, 12))
    return v.vowel(n, course, (1000, 250), (2600, 500)) * v.swell(n, 0.15, 0.3)


def bird(v: Voice, n: int) -> Signal:
    low, high = v.vary(3000), v.vary(4300)
    return v.tone(n, v.line(n, low, high, low)) * v.swell(n, 0.03, 0.08)


def crow(v: Voice, n: int) -> Signal:
    rough = 1 + 0.06 * v.wander(n, 150)
    voice = v.vowel(n, v.line(n, 480, 560, 430) * rough, (1300, 300), (1900, 300)) + 0.5 * v.noise(n, 1000, 3000)
    return voice * v.swell(n, 0.04, 0.12)


def rooster(v: Voice, n: int) -> Signal:
    n = min(n, v.samples(v.vary(1.5)))
    course = v.line(n, 520, 640, 620, 900, 940, 920, 880, 640)
    return v.vowel(n, course, (1800, 400), (3200, 600)) * np.sqrt(v.line(n, 0.6, 0, 0.7, 1, 1, 1, 0.6, 0))


def cow(v: Voice, n: int) -> Signal:
    n = min(n, v.samples(v.vary(1.7)))
    return v.vowel(n, v.line(n, 115, 150, 155, 150, 110), (300, 90), (750, 150)) * v.swell(n, 0.2, 0.4)


def sheep(v: Voice, n: int) -> Signal:
    shake = v.sway(n, v.vary(9))
    return v.vowel(n, 330 + 50 * shake, (800, 200), (1900, 300)) * (0.15 + 0.85 * shake) * v.swell(n, 0.05, 0.15)


def owl(v: Voice, n: int) -> Signal:
    return v.tone(n, v.line(n, 330, 360, 340, 310), (1, 0.06, 0.03)) * v.swell(n, 0.08, 0.15)


def frog(v: Voice, n: int) -> Signal:
    return v.vowel(n, 62 * v.line(n, 0.9, 1.1), (620, 120), (1500, 200)) * v.swell(n, 0.03, 0.06)


def duck(v: Voice, n: int) -> Signal:
    return v.vowel(n, v.line(n, 270, 240, 190), (1250, 180), (2900, 350)) * v.swell(n, 0.02, 0.06)


def crickets(v: Voice, n: int) -> Signal:
    chirp = v.sway(n, v.vary(2.3) * v.pace, 3) * v.sway(n, v.vary(28), 2)
    return v.tone(n, v.vary(4900)) * chirp


def bee(v: Voice, n: int) -> Signal:
    course = 205 * (1 + 0.1 * v.wander(n, 5))
    return v.tone(n, course, _saw(16, 0.7)) * (0.7 + 0.3 * v.wander(n, 4)) * v.swell(n, 0.2, 0.2)


def horse(v: Voice, n: int) -> Signal:
    grain = v.click(0.018, 250, 900)
    grain += 0.8 * v.modes(len(grain), (480, 0.02, 1), (910, 0.015, 0.7))
    stride = v.beats(n, v.vary(1.9) * v.pace)
    at = (stride[:, None] + v.samples(0.15 / v.pace) * np.arange(3)).ravel()
    return v.place(n, at[at < n], grain)


def woodpecker(v: Voice, n: int) -> Signal:
    n = min(n, v.samples(0.75 / v.pace))
    grain = v.modes(v.samples(0.05), (1150, 0.008, 1), (1900, 0.006, 0.6), (2700, 0.004, 0.3))
    return v.place(n, v.beats(n, v.vary(17) * v.pace), grain)


def engine(v: Voice, n: int) -> Signal:
    course = v.vary(47) * (1 + 0.05 * v.wander(n, 3))
    return v.tone(n, course, _saw(14, 0.5)) * (0.8 + 0.2 * v.wander(n, 20)) + 0.3 * v.noise(n, 60, 500)


def motorcycle(v: Voice, n: int) -> Signal:
    course = v.line(n, 65, 85, 150, 190, 120, 170, 230)
    return v.tone(n, course, _saw(30, 0.4)) * (0.6 + 0.4 * v.wander(n, 60)) + 0.4 * v.noise(n, 200, 3000)


def siren(v: Voice, n: int) -> Signal:
    return v.tone(n, 620 + 750 * v.sway(n, v.vary(0.9) * v.pace, 0.5), (1, 0.4, 0.25, 0.1))


def car_horn(v: Voice, n: int) -> Signal:
    tones = v.tone(n, 415, _saw(14, 0.3)) + v.tone(n, 522, _saw(12, 0.3))
    return tones * v.swell(n, 0.02, 0.04)


def train_horn(v: Voice, n: int) -> Signal:
    chord = np.sum([v.tone(n, hz, (1, 0.5, 0.25, 0.1)) for hz in (277, 329, 392, 493)], axis=0)
    return (chord + 0.5 * v.noise(n, 1500, 5000)) * v.swell(n, 0.1, 0.25)


def train(v: Voice, n: int) -> Signal:
    joints = v.beats(n, v.vary(1.5) * v.pace)
    at = np.concatenate([joints, joints + v.samples(0.13 / v.pace)])
    clack = v.click(0.03, 90, 450)
    clack += 0.5 * v.modes(len(clack), (1700, 0.03, 1), (2900, 0.02, 0.5))
    return v.place(n, at[at < n], clack) + 0.12 * v.noise(n, 100, 700)


def helicopter(v: Voice, n: int) -> Signal:
    chop = v.sway(n, v.vary(12) * v.pace, 0.5) ** 3
    return (v.noise(n, 50, 350) + 0.3 * v.noise(n, 350, 2000)) * (0.08 + chop)


def jet(v: Voice, n: int) -> Signal:
    roar = v.noise(n, 200, 5000, -0.7) + 0.25 * v.tone(n, v.line(n, 3300, 3100, 2500, 2300))
    return roar * v.line(n, 0.1, 0.4, 1, 0.6, 0.2)


def hammer(v: Voice, n: int) -> Signal:
    return v.modes(n, (1180, 0.12, 0.7), (2370, 0.1, 1), (3920, 0.07, 0.8), (5480, 0.05, 0.6)) * v.swell(n, 0.001, 0.05)


def hand_saw(v: Voice, n: int) -> Signal:
    stroke = v.sway(n, v.vary(2.6) * v.pace, 0.5)
    return v.noise(n, 1200, 3200) * stroke**2 + 0.9 * v.noise(n, 2500, 5500) * (1 - stroke) ** 3


def drill(v: Voice, n: int) -> Signal:
    course = v.line(n, 0.6, 1, 1, 0.92, 1, 0.97) * v.vary(310)
    return v.tone(n, course, _saw(22, 0.15)) + 0.5 * v.noise(n, 2500, 7000)


def vacuum(v: Voice, n: int) -> Signal:
    whirr = v.tone(n, v.vary(225), (0.3, 0.6, 0.2, 0.5, 0.2, 0.1)) + 0.2 * v.tone(n, v.vary(2900))
    return (whirr + 1.2 * v.noise(n, 300, 6000, -0.3)) * v.swell(n, 0.25, 0.1)


def clock(v: Voice, n: int) -> Signal:
    tick, tock = (v.modes(v.samples(0.03), (hz, 0.004, 1), (1.7 * hz, 0.003, 0.7)) for hz in (3400, 2500))
    at = v.beats(n, v.vary(2.4, 0.04) * v.pace)
    return v.place(n, at[::2], tick, 0.1) + v.place(n, at[1::2], tock, 0.1)


def keyboard(v: Voice, n: int) -> Signal:
    at = v.beats(n, v.vary(8) * v.pace, 0.7)
    sound = v.place(n, at[::2], v.click(0.006, 1800, 5500), 0.6) + v.place(n, at[1::2], v.click(0.005, 2600, 7000), 0.6)
    return sound + 0.7 * v.place(n, at, v.click(0.01, 250, 700), 0.6)


def knock(v: Voice, n: int) -> Signal:
    return v.modes(n, (170, 0.035, 1), (330, 0.03, 0.8), (540, 0.02, 0.5), (1100, 0.006, 0.3)) * v.swell(n, 0.001, 0.02)


def footstep(v: Voice, n: int) -> Signal:
    heel = v.noise(n, 60, 220) * v.decay(n, 0.03)
    scrape = v.noise(n, 1500, 6000) * v.decay(n, 0.025)
    return heel + 0.5 * np.roll(scrape, min(n // 3, v.samples(0.06))) + 0.3 * scrape


def glass(v: Voice, n: int) -> Signal:
    n = min(n, v.samples(v.vary(1.0)))
    sound = 0.8 * v.noise(n, 2500, 7500) * v.decay(n, 0.04)
    for hz in v.rng.uniform(2800, 7200, 7):
        shard = v.modes(v.samples(0.15), (hz, 0.025, 0.7))
        sound += v.place(n, (np.sort(v.often(n, 6)) ** 2 // n), shard, 0.8)
    return sound * v.decay(n, 0.4)


def creak(v: Voice, n: int) -> Signal:
    n = min(n, v.samples(v.vary(1.3)))
    slips = v.line(n, *v.rng.permutation([70, 150, 110, 200])) * (1 + 0.08 * v.wander(n, 30))
    return v.vowel(n, slips, (950, 100), (2350, 150), (3600, 200)) * (0.6 + 0.4 * v.wander(n, 8)) * v.swell(n, 0.1, 0.1)


def zipper(v: Voice, n: int) -> Signal:
    n = min(n, v.samples(v.vary(0.6)))
    teeth = v.sway(n, v.line(n, 55, 130), 1)
    return v.noise(n, 2500, 7000) * teeth * v.line(n, 0.4, 0.8, 1, 0.2)


def keys(v: Voice, n: int) -> Signal:
    sound = np.zeros(n, np.float32)
    for hz in v.rng.uniform(4300, 7200, 4):
        sound += v.place(n, v.often(n, 5), v.modes(v.samples(0.12), (hz, 0.03, 1), (0.83 * hz, 0.02, 0.6)), 0.7)
    return sound


def kettle(v: Voice, n: int) -> Signal:
    course = v.line(n, 1750, 2350, 2500, 2520)
    return (v.tone(n, course, (1, 0.15)) + 0.25 * v.noise(n, 1500, 6000)) * v.line(n, 0.2, 0.8, 1, 1, 0.9)


def telephone(v: Voice, n: int) -> Signal:
    return (v.tone(n, 1150, (1, 0.3)) + v.tone(n, 1480, (1, 0.3))) * v.sway(n, 21, 1) * v.swell(n, 0.01, 0.05)


def alarm_clock(v: Voice, n: int) -> Signal:
    return v.tone(n, v.vary(1950, 0.04), _odd(3)) * v.sway(n, v.vary(4.2, 0.04) * v.pace, 8)


def morse(v: Voice, n: int) -> Signal:
    unit = v.samples(0.07 / v.pace)
    keyed = np.concatenate([np.r_[np.ones(length), 0] for length in v.rng.choice([1, 3], 2 + n // (2 * unit))])
    return v.tone(n, v.vary(720, 0.04)) * np.repeat(keyed, unit)[:n].astype(np.float32)


def church_bell(v: Voice, n: int) -> Signal:
    hum = ((145, 0.9, 0.5), (290, 0.7, 0.8), (345, 0.6, 0.7), (435, 0.5, 0.5), (580, 0.4, 0.7), (870, 0.25, 0.4))
    return v.modes(n, *hum, (1290, 0.15, 0.3))


def bicycle_bell(v: Voice, n: int) -> Signal:
    return v.modes(n, (2650, 0.16, 1), (2690, 0.16, 0.8), (5900, 0.1, 0.5)) * (0.25 + 0.75 * v.sway(n, 19))


def piano(v: Voice, n: int) -> Signal:
    root = v.rng.choice([262, 294, 330])
    return sum(v.pluck(n, root * step, 0.5, 0.75) for step in (1, 1.26, 1.5)) * v.swell(n, 0.004, 0.08)


def guitar(v: Voice, n: int) -> Signal:
    sound = np.zeros(n, np.float32)
    for late, hz in enumerate((98, 147, 196, 247, 294)):
        start = min(v.samples(0.02 * late), n - 1)
        sound[start:] += v.pluck(n - start, hz, 0.35, 1.0)
    return sound * v.swell(n, 0.002, 0.05)


def flute(v: Voice, n: int) -> Signal:
    steps = v.rng.choice([587, 659, 784, 880], 2 + int(3 * v.pace * n / v.rate))
    course = np.repeat(steps, -(-n // len(steps)))[:n] * (1 + 0.008 * v.sway(n, 5.5))
    return (v.tone(n, course, (1, 0.25, 0.06)) + 0.07 * v.noise(n, 1000, 6000)) * v.swell(n, 0.08, 0.12)


def violin(v: Voice, n: int) -> Signal:
    course = v.rng.choice([392, 440, 494]) * (1 + 0.02 * v.sway(n, 6))
    return v.vowel(n, course, (500, 300), (1100, 400), (2700, 900), (3800, 900)) * v.swell(n, 0.2, 0.2)


def trumpet(v: Voice, n: int) -> Signal:
    hz = v.rng.choice([349, 392, 466])
    return v.tone(n, hz, (0.6, 0.9, 1, 1, 0.9, 0.7, 0.5, 0.35, 0.2, 0.1)) * v.swell(n, 0.04, 0.08)


def drum(v: Voice, n: int) -> Signal:
    skin = v.tone(n, v.line(n, 130, 85, 75, 70)) * v.decay(n, 0.09)
    return skin + 0.25 * v.noise(n, 200, 2500) * v.decay(n, 0.012)


def cymbal(v: Voice, n: int) -> Signal:
    return v.noise(n, 3500, 7800) * v.decay(n, 0.28) + 0.6 * v.modes(n, (3170, 0.3, 0.5), (4730, 0.3, 0.5))


def xylophone(v: Voice, n: int) -> Signal:
    hz = v.rng.choice([784, 880, 1047])
    return v.modes(n, (hz, 0.09, 1), (3 * hz, 0.03, 0.5), (6.2 * hz, 0.012, 0.2)) * v.swell(n, 0.001, 0.02)


def applause(v: Voice, n: int) -> Signal:
    return np.sum([v.place(n, v.often(n, 25), v.click(0.008, low, 3.2 * low), 0.8) for low in (650, 900, 1300)], axis=0)


def cough(v: Voice, n: int) -> Signal:
    burst = v.noise(n, 350, 1300) + 0.6 * v.noise(n, 1300, 3800)
    return burst * v.swell(n, 0.01, 0.08) * v.decay(n, 0.08) + 0.4 * v.vowel(n, 150, (600, 150)) * v.decay(n, 0.12)


def snore(v: Voice, n: int) -> Signal:
    breath = v.sway(n, v.vary(0.85) * v.pace, 0.5) ** 2
    return (v.vowel(n, 38 * (1 + 0.1 * v.wander(n, 9)), (230, 90), (520, 120)) + 0.4 * v.noise(n, 150, 900)) * breath


def laugh(v: Voice, n: int) -> Signal:
    ha = v.sway(n, v.vary(4.6) * v.pace, 1)
    course = v.line(n, 250, 280, 240, 210) * (0.9 + 0.15 * ha)
    return (v.vowel(n, course, (760, 150), (1250, 180), (2600, 300)) + 0.25 * v.noise(n, 800, 4000)) * ha


def baby(v: Voice, n: int) -> Signal:
    course = v.line(n, 380, 510, 540, 500, 400) * (1 + 0.015 * v.wander(n, 25))
    return v.vowel(n, course, (1150, 250), (3300, 700)) * v.swell(n, 0.1, 0.2) + 0.1 * v.noise(n, 2000, 6000)


def whistle(v: Voice, n: int) -> Signal:
    course = v.line(n, *v.rng.uniform(1300, 2200, 3 + int(2 * n / v.rate)))
    return (v.tone(n, course) + 0.06 * v.noise(n, 1500, 4000)) * v.swell(n, 0.06, 0.1)


def heart(v: Voice, n: int) -> Signal:
    size = v.samples(0.12)
    lub, dub = (v.tone(size, hz) * v.decay(size, 0.03) * v.swell(size, 0.01, 0.02) for hz in (58, 75))
    at = v.beats(n, v.vary(1.5) * v.pace)
    late = at + v.samples(0.22 / v.pace)
    return v.place(n, at, lub, 0.1) + 0.7 * v.place(n, late[late < n], dub, 0.1)


Synth: TypeAlias = Callable[[Voice, int], Signal]


@dataclass(frozen=True)
class Kind:
    """A kind of event: what renders it, what it is called in captions, and what may vary.

    `period` is set for the kinds that are counted: seconds from one unit to the next. `ring` is how long a unit lasts.
    """

    name: str
    synth: Synth
    phrases: tuple[str, ...]
    period: float = 0.0
    ring: float = 0.0
    pitch: bool = False
    pace: bool = False


# Most common first: under a long tail the first kinds are drawn most.
KINDS: tuple[Kind, ...] = (
    Kind("dog", dog, ("a dog barks", "a hound barks", "a dog yaps"), 0.42, 0.3, pitch=True),
    Kind("rain", rain, ("rain falls", "rain pours down", "rain patters on the ground")),
    Kind("bird", bird, ("a bird chirps", "a small bird tweets", "a sparrow chirps"), 0.28, 0.17, pace=True),
    Kind("engine", engine, ("a car engine idles", "the engine of a car runs", "a car motor rumbles"), pitch=True),
    Kind(
        "footsteps",
        footstep,
        ("someone steps on gravel", "gravel crunches", "a shoe treads"),
        0.45,
        0.22,
        pace=True,
    ),
    Kind("wind", wind, ("wind blows", "the wind gusts", "a breeze howls")),
    Kind("cat", cat, ("a cat meows", "a kitten mews", "a cat cries out"), 0.85, 0.75, pitch=True),
    Kind("knock", knock, ("someone knocks on a door", "a knuckle raps on wood", "a door is knocked on"), 0.25, 0.16),
    Kind("piano", piano, ("a piano chord sounds", "a chord is played on the piano"), 0.6, 0.8, pitch=True),
    Kind("clock", clock, ("a clock ticks", "a wristwatch ticks", "a clock goes tick-tock"), pace=True),
    Kind("telephone", telephone, ("a telephone rings", "a phone rings"), 0.75, 0.55),
    Kind("waves", waves, ("waves wash ashore", "the sea surges", "surf rolls onto a beach"), pace=True),
    Kind("baby", baby, ("a baby cries", "an infant wails", "a baby sobs"), 0.9, 0.8, pitch=True),
    Kind("siren", siren, ("a siren wails", "an ambulance siren sounds", "a police siren howls"), pitch=True, pace=True),
    Kind("keyboard", keyboard, ("someone types on a keyboard", "a typist types", "a keyboard clatters"), pace=True),
    Kind("thunder", thunder, ("thunder rolls", "thunder rumbles", "a thunderclap booms")),
    Kind("guitar", guitar, ("a guitar is strummed", "a guitarist strums", "guitar strings are strummed"), 0.55, 0.7),
    Kind("car horn", car_horn, ("a car honks", "a car horn blares", "a driver honks"), 0.6, 0.4, pitch=True),
    Kind("laugh", laugh, ("a person laughs", "someone laughs", "someone chuckles"), pitch=True, pace=True),
    Kind("church bell", church_bell, ("a church bell tolls", "a big bell strikes"), 0.8, 1.2, pitch=True),
    Kind("crickets", crickets, ("crickets chirp", "crickets sing in the grass", "a cricket stridulates"), pace=True),
    Kind("applause", applause, ("people applaud", "an audience claps", "a crowd applauds")),
    Kind("cow", cow, ("a cow moos", "a bull bellows"), pitch=True),
    Kind("drum", drum, ("a drum is struck", "a drummer hits a drum", "a bass drum thuds"), 0.35, 0.35, pace=True),
    Kind("brook", brook, ("a brook babbles", "a stream gurgles", "water trickles over stones")),
    Kind("train", train, ("a train clatters along the rails", "railway wheels clack", "a train rolls by"), pace=True),
    Kind("rooster", rooster, ("a rooster crows", "a cockerel crows"), pitch=True),
    Kind("fire", fire, ("a fire crackles", "burning wood pops", "a campfire crackles")),
    Kind("vacuum cleaner", vacuum, ("a vacuum cleaner runs", "someone vacuums the floor", "a hoover whirrs")),
    Kind("hammer", hammer, ("a hammer hits metal", "an anvil is struck", "metal is hammered"), 0.45, 0.4, pace=True),
    Kind("crow", crow, ("a crow caws", "a raven croaks", "a crow squawks"), 0.55, 0.4),
    Kind("violin", violin, ("a violin plays a long note", "a violinist bows a note"), pitch=True),
    Kind("cough", cough, ("a person coughs", "someone coughs", "a man coughs"), 0.5, 0.32, pitch=True),
    Kind("helicopter", helicopter, ("a helicopter hovers", "a chopper flies by", "rotor blades beat"), pace=True),
    Kind("alarm clock", alarm_clock, ("an alarm clock beeps", "an electronic alarm goes off"), pace=True),
    Kind("sheep", sheep, ("a sheep bleats", "a lamb bleats", "a sheep baas"), 0.85, 0.7, pitch=True),
    Kind("flute", flute, ("a flute plays a melody", "someone plays the flute"), pitch=True, pace=True),
    Kind("drip", drip, ("a drop of water falls", "a tap drips", "water drips"), 0.4, 0.25, pitch=True, pace=True),
    Kind("frog", frog, ("a frog croaks", "a toad croaks", "a frog ribbits"), 0.45, 0.32, pitch=True),
    Kind("bee", bee, ("a bee buzzes", "a bumblebee hums", "an insect buzzes around"), pitch=True),
    Kind("drill", drill, ("an electric drill whines", "someone drills a hole", "a power drill runs"), pitch=True),
    Kind("owl", owl, ("an owl hoots", "an owl calls"), 0.7, 0.5, pitch=True),
    Kind("glass", glass, ("glass shatters", "a window breaks", "a glass smashes")),
    Kind("saw", hand_saw, ("someone saws wood", "a hand saw cuts a plank", "a carpenter saws"), pace=True),
    Kind("trumpet", trumpet, ("a trumpet sounds", "a trumpeter plays a note"), 0.5, 0.42, pitch=True),
    Kind("snore", snore, ("someone snores", "a sleeper snores", "a man snores"), pace=True),
    Kind("horse", horse, ("a horse gallops", "hooves clatter", "a horse runs past"), pace=True),
    Kind("train horn", train_horn, ("a train blows its horn", "a locomotive horn sounds"), pitch=True),
    Kind("kettle", kettle, ("a kettle whistles", "a teapot comes to the boil")),
    Kind("jet", jet, ("a jet flies overhead", "an aeroplane roars past", "a plane passes by")),
    Kind("duck", duck, ("a duck quacks", "a mallard quacks"), 0.32, 0.22, pitch=True),
    Kind("pouring", pour, ("water is poured into a glass", "someone fills a bottle", "a drink is poured")),
    Kind("creak", creak, ("a door creaks", "a hinge squeaks", "a floorboard groans"), pitch=True),
    Kind("whistling", whistle, ("a person whistles a tune", "someone whistles"), pitch=True),
    Kind("xylophone", xylophone, ("a xylophone note sounds", "a mallet hits a xylophone"), 0.28, 0.25, pace=True),
    Kind("woodpecker", woodpecker, ("a woodpecker drums on a tree", "a woodpecker pecks"), pitch=True, pace=True),
    Kind("motorcycle", motorcycle, ("a motorcycle accelerates", "a motorbike revs up"), pitch=True),
    Kind("cymbal", cymbal, ("a cymbal crashes", "a drummer strikes a cymbal"), 0.7, 0.8),
    Kind("bicycle bell", bicycle_bell, ("a bicycle bell rings", "a cyclist rings a bell"), 0.55, 0.45),
    Kind("steam", steam, ("steam hisses", "air escapes from a valve", "a leak hisses")),
    Kind("heartbeat", heart, ("a heart beats", "a heartbeat thumps"), pace=True),
    Kind("keys", keys, ("a bunch of keys jingles", "coins jingle")),
    Kind("zipper", zipper, ("a zipper is pulled", "someone zips up a jacket")),
    Kind("morse code", morse, ("a telegraph beeps", "someone sends Morse code"), pitch=True, pace=True),
)


class SynthesisedBank:
    """The built-in events, all of :data:`KINDS`."""

    def __init__(self) -> None:
        self.names = tuple(kind.name for kind in KINDS)

    def draw(self, kind: int, rng: np.random.Generator, seconds: float) -> Variation:
        """Draw how the event varies. As many units are counted as can be heard within `seconds`."""
        row = KINDS[kind]
        pitch = _factor(rng, (0.64, 0.74), (1.35, 1.55)) if row.pitch else 1.0
        pace = _factor(rng, (0.55, 0.68), (1.5, 1.8)) if row.pace else 1.0
        fits = 1 + int(max(0.0, seconds - 0.7 * row.ring) * pace / (1.05 * row.period)) if row.period else 1
        return Variation(pitch, pace, int(rng.integers(1, min(fits, len(COUNTS)) + 1)))

    def render(self, kind: int, rng: np.random.Generator, rate: int, seconds: float, variation: Variation = PLAIN) -> np.ndarray:
        """Render the event as (samples,) float32 mono with a peak of 1, at most `seconds` long at `rate` Hz."""
        row, room = KINDS[kind], max(1, int(seconds * rate))
        voice = Voice(rng, rate, variation.pitch, variation.pace)
        if row.period:
            sound = _repeat(row, voice, variation.count, room)
        else:
            sound = row.synth(voice, max(1, int(room * rng.uniform(0.75, 1))))
        sound = sound * voice.swell(len(sound), 0.001, 0.01)
        sound = sound.astype(np.float32)
        return sound / max(float(np.abs(sound).max()), 1e-9)

    def phrase(self, kind: int, rng: np.random.Generator, variation: Variation = PLAIN) -> str:
        """A clause such as "a dog barks twice", without capital and period. It tells at most one detail, or none."""
        row = KINDS[kind]
        told: list[str] = []
        if row.period:
            told.append(COUNTS[variation.count - 1])
        if variation.pace != 1 and (not row.period or variation.count > 1):
            told.append(pick(rng, PACES[variation.pace > 1]))
        if variation.pitch != 1:
            told.append(pick(rng, PITCHES[variation.pitch > 1]))
        clause = pick(rng, row.phrases)
        return f"{clause} {pick(rng, told)}" if told and rng.random() < 0.75 else clause


def _repeat(row: Kind, voice: Voice, count: int, room: int) -> Signal:
    """Render a unit `count` times, each a little different, cut to `room` samples."""
    step, ring = row.period / voice.pace, voice.samples(row.ring)
    starts = [voice.samples(index * step + voice.rng.uniform(0, 0.05 * step)) for index in range(count)]
    starts = [start - starts[0] for start in starts]
    sound = np.zeros(starts[-1] + ring, np.float32)
    for start in starts:
        unit = row.synth(voice, ring)
        sound[start : start + len(unit)] += np.float32(voice.rng.uniform(0.8, 1)) * unit
    return sound[:room]


def _factor(rng: np.random.Generator, low: tuple[float, float], high: tuple[float, float]) -> float:
    """1 half of the time, else a factor from one of the two ranges."""
    chance = rng.random()
    return 1.0 if chance < 0.5 else float(rng.uniform(*(low if chance < 0.75 else high)))


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """One of the items. Far cheaper than the generator's own `choice`."""
    return items[int(rng.integers(len(items)))]

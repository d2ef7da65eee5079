"""The synthesised bank: every kind is a usable sound, is told apart by ear, and is what its words say."""

import itertools

import numpy as np
import pytest
from scipy.signal import find_peaks
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ask_ray.data.events import COUNTS, KINDS, PACES, PITCHES, SynthesisedBank, Variation

BANK = SynthesisedBank()
NAMES = [kind.name for kind in KINDS]


def render(kind: int, seed: int, rate: int = 16000, seconds: float = 1.2, variation: Variation | None = None):
    rng = np.random.default_rng([kind, seed])
    drawn = BANK.draw(kind, rng, seconds)
    return BANK.render(kind, rng, rate, seconds, variation or drawn)


def features(sound: np.ndarray) -> np.ndarray:
    """Mean, deviation and mean step of a log spectrum of 40 bands over the frames that are not silent."""
    sound = np.pad(sound, (0, max(0, 8000 - len(sound))))
    frames = np.lib.stride_tricks.sliding_window_view(sound, 512)[::160] * np.hanning(512)
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = np.unique(np.geomspace(2, 256, 41).round().astype(int))
    bands = np.log(np.add.reduceat(power, edges, axis=1) + 1e-6)[power.sum(axis=1) > 1e-6]
    return np.concatenate([bands.mean(0), bands.std(0), np.abs(np.diff(bands, axis=0)).mean(0)])


def test_there_are_many_kinds_with_names_and_phrases_of_their_own():
    assert len(KINDS) >= 40
    assert BANK.names == tuple(NAMES)
    assert len(set(NAMES)) == len(NAMES)
    for one, other in itertools.permutations(KINDS, 2):
        for phrase, elsewhere in itertools.product(one.phrases, other.phrases):
            assert phrase not in elsewhere, f"{phrase!r} of {one.name} could be read as {other.name}"


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=NAMES)
def test_phrases_are_clauses(kind):
    assert len(set(KINDS[kind].phrases)) >= 2
    for phrase in KINDS[kind].phrases:
        assert phrase == phrase.strip()
        assert phrase[0].islower()
        assert phrase[-1].isalpha()
        assert " while " not in phrase
        assert " as " not in phrase


@pytest.mark.parametrize("rate", [4000, 16000, 32000])
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=NAMES)
def test_every_kind_renders_within_its_bounds(kind, rate):
    for seed, seconds in enumerate((0.1, 0.4, 1.3, 3.0)):
        sound = render(kind, seed, rate, seconds)
        assert sound.dtype == np.float32
        assert sound.ndim == 1
        assert 0 < len(sound) <= seconds * rate
        assert np.isfinite(sound).all()
        assert 0.99 < np.abs(sound).max() <= 1
        assert np.sqrt(np.mean(sound**2)) > 0.005


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=NAMES)
def test_a_draw_is_repeatable_and_no_two_are_alike(kind):
    assert render(kind, 1).tobytes() == render(kind, 1).tobytes()
    assert render(kind, 1).tobytes() != render(kind, 2).tobytes()


def test_kinds_are_told_apart():
    train = np.array([features(render(kind, seed)) for kind in range(len(KINDS)) for seed in range(12)])
    test = np.array([features(render(kind, seed)) for kind in range(len(KINDS)) for seed in range(12, 16)])
    labels = np.arange(len(KINDS))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    model.fit(train, np.repeat(labels, 12))
    right = (model.predict(test) == np.repeat(labels, 4)).reshape(-1, 4).mean(axis=1)
    assert right.mean() > 0.9
    assert [NAMES[kind] for kind in np.flatnonzero(right == 0)] == []


def test_kinds_cover_the_spectrum():
    centres = []
    for kind in range(len(KINDS)):
        power = np.abs(np.fft.rfft(render(kind, 0), 16000)) ** 2
        centres.append((power * np.arange(len(power))).sum() / power.sum())
    counts, _ = np.histogram(centres, [0, 250, 500, 1000, 2000, 4000, 8000])
    assert (counts >= 3).all(), counts


@pytest.mark.parametrize("kind", [k for k, row in enumerate(KINDS) if row.period], ids=lambda k: NAMES[k])
def test_a_longer_count_is_a_longer_sound(kind):
    row = KINDS[kind]
    lengths = [len(render(kind, 0, 16000, 10, Variation(count=count))) / 16000 for count in range(1, 6)]
    np.testing.assert_allclose(np.diff(lengths), row.period, atol=0.051 * row.period + 1e-3)


@pytest.mark.parametrize("name", ["dog", "bird", "knock", "hammer", "xylophone"])
def test_counts_can_be_heard(name):
    for count in range(1, 6):
        sound = render(NAMES.index(name), count, 16000, 5, Variation(count=count))
        loudness = np.convolve(sound**2, np.hanning(1600), "same")
        peaks, _ = find_peaks(np.pad(loudness, 1), height=0.3 * loudness.max(), distance=1600)
        assert len(peaks) == count


@pytest.mark.parametrize("name", ["siren", "violin", "owl", "church bell", "train horn"])
def test_pitch_moves_the_spectrum_of_the_kinds_that_have_one(name):
    low, plain, high = (
        np.argmax(np.abs(np.fft.rfft(render(NAMES.index(name), 3, variation=Variation(pitch=pitch)), 32000)))
        for pitch in (0.7, 1.0, 1.4)
    )
    assert low < plain < high


def test_draws_only_vary_what_the_kind_allows_and_fit_the_room():
    rng = np.random.default_rng(0)
    for kind, row in enumerate(KINDS):
        draws = [BANK.draw(kind, rng, 1.2) for _ in range(60)]
        assert {draw.pitch == 1 for draw in draws} == ({True, False} if row.pitch else {True})
        assert {draw.pace == 1 for draw in draws} == ({True, False} if row.pace else {True})
        for draw in draws:
            assert draw.count == 1 or (draw.count - 1) * row.period / draw.pace + 0.7 * row.ring <= 1.2
            assert all(factor == 1 or abs(np.log(factor)) > 0.29 for factor in (draw.pitch, draw.pace))


def test_words_tell_the_variation():
    rng = np.random.default_rng(0)
    for kind, row in enumerate(KINDS):
        for variation in (Variation(), Variation(0.7, 0.6, 3), Variation(1.4, 1.6, 2), Variation(1.4, 0.6, 1)):
            said = {BANK.phrase(kind, rng, variation) for _ in range(80)}
            extras = {text.removeprefix(phrase) for text in said for phrase in row.phrases if text.startswith(phrase)}
            true = {""}
            if row.period:
                true.add(COUNTS[variation.count - 1])
            if variation.pitch != 1:
                true.update(PITCHES[variation.pitch > 1])
            if variation.pace != 1 and not (row.period and variation.count == 1):
                true.update(PACES[variation.pace > 1])
            assert {extra.strip() for extra in extras} == true

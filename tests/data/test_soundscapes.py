"""Composed clips: repeatable, split-proof, of the asked shape, and as their captions say."""

import hashlib
import itertools
import os
import re
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ask_ray.config import SoundscapeSettings
from ask_ray.data.events import KINDS, PLAIN
from ask_ray.data.soundscapes import LOUDNESS, SPLITS, RecordedBank, SynthesisedBank, compose

RATE = 16000
BANK = SynthesisedBank()
DEFAULT = SoundscapeSettings()
OVERLAP = re.compile(r"\b(while|as|at the same time|at once|together|meanwhile|simultaneously)\b")
ORDER = re.compile(r"\b(then|after|before|afterwards|later|next|finally|lastly|at the end|at last)\b", re.IGNORECASE)


class ToneBank:
    """Steady tones far from each other, so that each can be found again in a mixture."""

    names = tuple(f"tone {kind}" for kind in range(8))

    def draw(self, kind, rng, seconds):
        return PLAIN

    def render(self, kind, rng, rate, seconds, variation=PLAIN):
        n = int(seconds * rate * rng.uniform(0.6, 1))
        return np.sin(2 * np.pi * self.hz(kind) * np.arange(n) / rate).astype(np.float32)

    def phrase(self, kind, rng, variation=PLAIN):
        return f"tone {kind} sounds"

    @staticmethod
    def hz(kind):
        return 500 + 800 * kind

    def found(self, scene, rate):
        """Onset, end (seconds) and level (dB of full scale, of the tone's RMS) of each event."""
        frames = np.lib.stride_tricks.sliding_window_view(scene.waveform / 32768, 800)[::160]
        spans = []
        for kind in map(self.names.index, scene.events):
            wave = np.exp(-2j * np.pi * self.hz(kind) * np.arange(800) / rate) * np.hanning(800)
            rms = np.abs(frames @ wave) / np.abs(wave).sum() * np.sqrt(2)
            sounding = np.flatnonzero(rms > 0.5 * rms.max())
            spans.append((sounding[0] * 160 / rate, sounding[-1] * 160 / rate, 20 * np.log10(rms.max())))
        return spans


def digest(scene):
    content = repr((scene.id, scene.captions, scene.events)).encode() + scene.waveform.tobytes()
    return hashlib.sha256(content).hexdigest()


def kinds_told(caption):
    """Kinds of the synthesised bank in the order in which a caption names them."""
    text = caption.lower()
    places = {}
    for kind in KINDS:
        at = [text.find(phrase.lower()) for phrase in kind.phrases if phrase.lower() in text]
        if at:
            places[min(at)] = kind.name
    return tuple(places[at] for at in sorted(places))


def overlaps(spans):
    return [a[0] < b[1] - 0.02 and b[0] < a[1] - 0.02 for a, b in itertools.combinations(spans, 2)]


# --- repeatable ------------------------------------------------------------------------------------------------------


def test_same_arguments_same_bytes_in_any_order():
    forward = [digest(compose(DEFAULT, BANK, "train", index, RATE)) for index in range(20)]
    backward = [digest(compose(DEFAULT, SynthesisedBank(), "train", index, RATE)) for index in reversed(range(20))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 20


@pytest.mark.parametrize("hash_seed", ["1", "77"])
def test_same_bytes_in_another_process(hash_seed):
    code = (
        "import hashlib\n"
        "from ask_ray.config import SoundscapeSettings\n"
        "from ask_ray.data.soundscapes import SynthesisedBank, compose\n"
        "for index in range(8):\n"
        "    s = compose(SoundscapeSettings(), SynthesisedBank(), 'test', index, 16000)\n"
        "    print(hashlib.sha256(repr((s.id, s.captions, s.events)).encode() + s.waveform.tobytes()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert made.stdout.split() == [digest(compose(DEFAULT, BANK, "test", index, RATE)) for index in range(8)]


def test_seed_split_and_index_each_make_another_clip():
    base = compose(DEFAULT, BANK, "train", 3, RATE)
    others = [
        compose(SoundscapeSettings(seed=1), BANK, "train", 3, RATE),
        compose(DEFAULT, BANK, "validation", 3, RATE),
        compose(DEFAULT, BANK, "train", 4, RATE),
    ]
    assert all(other.waveform.tobytes() != base.waveform.tobytes() for other in others)


def test_splits_share_no_clip():
    sounds = {
        hashlib.sha256(compose(DEFAULT, BANK, split, index, RATE).waveform.tobytes()).digest()
        for split in SPLITS
        for index in range(150)
    }
    assert len(sounds) == 3 * 150


def test_more_captions_leave_the_sound_as_it_is():
    one, ten = (compose(SoundscapeSettings(captions=count), BANK, "train", 5, RATE) for count in (1, 10))
    assert one.waveform.tobytes() == ten.waveform.tobytes()


def test_unknown_split_names_the_known_ones():
    with pytest.raises(ValueError, match="train, validation, test"):
        compose(DEFAULT, BANK, "dev", 0, RATE)


def test_negative_index_is_refused():
    with pytest.raises(ValueError):
        compose(DEFAULT, BANK, "train", -1, RATE)


# --- shape -----------------------------------------------------------------------------------------------------------


@budget(max_examples=60, deadline=None)
@given(
    seconds=st.floats(1, 12),
    captions=st.integers(1, 10),
    max_events=st.integers(1, 3),
    zipf=st.floats(0, 4),
    noise_db=st.floats(-90, 0),
    seed=st.integers(0, 2**40),
    rate=st.sampled_from([4000, 8000, 16000, 22050]),
    split=st.sampled_from(sorted(SPLITS)),
    index=st.integers(0, 10**6),
)
def test_any_settings_give_a_usable_clip(seconds, captions, max_events, zipf, noise_db, seed, rate, split, index):
    settings = SoundscapeSettings(
        seconds=seconds, captions=captions, max_events=max_events, zipf=zipf, noise_db=noise_db, seed=seed
    )
    scene = compose(settings, BANK, split, index, rate)
    assert scene.id == f"{split}-{index:07d}"
    assert scene.waveform.dtype == np.int16
    assert scene.waveform.shape == (round(seconds * rate),)
    peak = np.abs(scene.waveform.astype(int)).max()
    assert 300 < peak <= 0.99 * 32767
    assert 1 <= len(scene.events) <= max_events
    assert len(set(scene.events)) == len(scene.events)
    assert len(scene.captions) == captions
    for caption in scene.captions:
        assert caption[0].isupper()
        assert caption[-1].isalnum()
        assert "  " not in caption
        assert kinds_told(caption) == scene.events


def test_noise_sits_near_its_level():
    levels = []
    for index in range(200):
        settings = SoundscapeSettings(noise_db=-40, seconds=2, max_events=1, captions=1)
        waveform = compose(settings, SilentBank(), "train", index, 8000).waveform / 32768
        levels.append(20 * np.log10(np.sqrt(np.mean(waveform**2))))
    assert abs(np.mean(levels) + 40) < 1
    assert -45.1 < min(levels) < max(levels) < -34.9


class SilentBank(ToneBank):
    def render(self, kind, rng, rate, seconds, variation=PLAIN):
        return np.zeros(int(seconds * rate), np.float32)


def test_clips_are_made_fast_enough():
    """Measured in transforms of noise of 10 s, made in turn with the clips: a busy or slow machine is one for both."""
    rng = np.random.default_rng(0)

    def seconds_of(act):
        start = time.process_time()
        act()
        return time.process_time() - start

    took = [
        (
            seconds_of(lambda index=index: compose(DEFAULT, BANK, "train", index, RATE)),
            seconds_of(lambda: np.fft.irfft(np.fft.rfft(rng.standard_normal(10 * RATE)))),
        )
        for index in range(105)
    ]
    clip, transform = np.median(took[5:], axis=0)  # the first ones fill caches
    assert clip < 1.5 * transform  # 0.55 when this was written


# --- captions --------------------------------------------------------------------------------------------------------


def test_captions_name_the_events_in_their_order_and_differ():
    told, distinct, total = Counter(), 0, 0
    for index in range(300):
        scene = compose(DEFAULT, BANK, "train", index, RATE)
        assert all(kinds_told(caption) == scene.events for caption in scene.captions), scene.captions
        told[len(scene.events)] += 1
        distinct += len(set(scene.captions))
        total += len(scene.captions)
    assert distinct / total > 0.97
    assert told[1] < told[2] < 1.6 * told[3]
    assert set(told) == {1, 2, 3}


def test_captions_tell_clips_apart():
    captions = [compose(DEFAULT, BANK, "test", index, RATE) for index in range(300)]
    events = Counter(scene.events for scene in captions)
    assert max(events.values()) < 12
    assert len({scene.captions[0] for scene in captions}) > 285


@pytest.fixture(scope="module")
def mixtures():
    """Clips of tones, and where each of their tones is."""
    bank, settings = ToneBank(), SoundscapeSettings(noise_db=-80, zipf=0)
    scenes = [compose(settings, bank, "train", index, RATE) for index in range(250)]
    return [(scene, bank.found(scene, RATE)) for scene in scenes]


def test_order_overlap_and_loudness_are_true_of_the_sound(mixtures):
    seen: Counter[object] = Counter()
    for scene, spans in mixtures:
        onsets = [onset for onset, _, _ in spans]
        assert onsets == sorted(onsets)
        together = overlaps(spans)
        for caption in scene.captions:
            assert bool(OVERLAP.search(caption)) == any(together), (caption, spans)
            assert bool(ORDER.search(caption)) == (not all(together)), (caption, spans)
            assert re.findall(r"tone \d", caption.lower()) == list(scene.events)
            clauses = re.split(r"(?i)tone \d sounds", caption)[1:]
            for clause, (_, _, level) in zip(clauses, spans, strict=True):
                words = [row for row, (_, said, _) in enumerate(LOUDNESS) if any(word in clause for word in said)] or [1]
                # A clip that was too loud is turned down as a whole, but tones at these levels never are.
                assert abs(level - LOUDNESS[words[0]][0]) < 2
                seen[words[0]] += 1
        seen["".join("01"[int(both)] for both in together) or "alone"] += 1
    assert all(seen[row] > 50 for row in range(3))
    # One event, two apart or at once, three apart, the first or the last two at once, all at once.
    assert {"alone", "0", "1", "000", "100", "001", "111"} <= set(seen)


def test_captions_pair_the_events_that_overlap(mixtures):
    checked = 0
    for scene, spans in mixtures:
        together = overlaps(spans)
        if len(together) < 3 or together[0] == together[2]:
            continue
        for caption in scene.captions:
            _, left, right, last = re.split(r"(?i)tone \d sounds", caption)
            # "X and Y at once" tells the overlap behind Y, all other templates between X and Y.
            pair, behind = (left, right) if together[0] else (right, last)
            assert OVERLAP.search(pair) or re.search(r"^[a-z ]* (at once|together)\b", behind), caption
            assert ORDER.search(caption)
            checked += 1
    assert checked > 100


def counts_of_kinds(zipf, clips):
    settings = SoundscapeSettings(zipf=zipf, seconds=1, max_events=1, captions=1)
    drawn = Counter(compose(settings, ToneBank(), "train", index, 4000).events[0] for index in range(clips))
    return np.array([drawn[name] for name in ToneBank.names])


@pytest.mark.parametrize("zipf", [0.0, 0.5, 1.0])
def test_kinds_are_drawn_as_the_exponent_says(zipf):
    counts = counts_of_kinds(zipf, 2000)
    odds = np.arange(1, 9) ** -zipf
    expected = 2000 * odds / odds.sum()
    # 24.3 is exceeded once in a thousand draws with 7 degrees of freedom.
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


def test_the_synthesised_bank_has_a_long_tail():
    settings = SoundscapeSettings(zipf=1, seconds=2, captions=1)
    drawn = Counter(itertools.chain(*(compose(settings, BANK, "train", index, 8000).events for index in range(600))))
    head = sum(drawn[name] for name in BANK.names[:5])
    tail = sum(drawn[name] for name in BANK.names[-5:])
    assert head > 8 * tail


# --- recordings ------------------------------------------------------------------------------------------------------


def recording(hz, seconds=0.8, rate=8000, gain=0.5):
    return (gain * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


RECORDED = RecordedBank(
    [
        (recording(300), "A dog barks twice."),
        (recording(500), "  A frog "),
        (recording(700, 9.0), "a rooster crows"),
        (recording(900), "A  frog."),
        (recording(1100, gain=3.0), "FM radio plays."),
    ]
)


def test_recordings_with_one_caption_are_one_kind():
    assert RECORDED.names == ("a frog", "a dog barks twice", "a rooster crows", "FM radio plays")
    rng = np.random.default_rng(0)
    pitches = {np.argmax(np.abs(np.fft.rfft(RECORDED.render(0, rng, 8000, 2.0), 8000))) for _ in range(30)}
    assert pitches == {500, 900}


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("seconds", [0.1, 0.8, 3.0])
def test_recordings_are_cropped_and_bounded(kind, seconds):
    rng = np.random.default_rng(0)
    for _ in range(10):
        sound = RECORDED.render(kind, rng, 8000, seconds)
        assert sound.dtype == np.float32
        assert 0 < len(sound) <= 8000 * seconds
        assert 0.3 < np.abs(sound).max() <= 1


def test_a_crop_is_never_silent():
    bank = RecordedBank([(np.concatenate([np.zeros(40000), recording(440), np.zeros(40000)]), "a beep")])
    rng = np.random.default_rng(0)
    assert all(np.abs(bank.render(0, rng, 8000, 0.5)).max() > 0.1 for _ in range(30))


@pytest.mark.parametrize(
    ("caption", "clause"),
    [
        ("A frog", "a frog"),
        (" Rain falls on a roof. ", "rain falls on a roof"),
        ("The BBC news is read aloud.", "the BBC news is read aloud"),
        ("A Chevrolet idles", "a Chevrolet idles"),
        ("FM radio plays", "FM radio plays"),
        ("I whistle", "I whistle"),
        ("Big Ben strikes", "Big Ben strikes"),
        ("McDonald sings", "McDonald sings"),
        ("dogs bark", "dogs bark"),
    ],
)
def test_captions_become_clauses(caption, clause):
    bank = RecordedBank([(recording(300), caption)])
    assert bank.phrase(0, np.random.default_rng(0)) == clause


def test_clips_from_recordings_read_well_and_repeat():
    settings = SoundscapeSettings(seconds=4, captions=4)
    scenes = [compose(settings, RECORDED, "validation", index, 8000) for index in range(40)]
    assert digest(scenes[7]) == digest(compose(settings, RECORDED, "validation", 7, 8000))
    for scene in scenes:
        for caption in scene.captions:
            places = [caption.lower().find(name.lower()) for name in scene.events]
            assert min(places) >= 0
            assert places == sorted(places)


def test_a_caption_that_tells_a_loudness_is_not_contradicted():
    bank = RecordedBank([(recording(300), "A dog barks loudly"), (recording(500), "Music in the distance")])
    words = [word for _, said, _ in LOUDNESS for word in said]
    for index in range(30):
        for caption in compose(DEFAULT, bank, "train", index, 8000).captions:
            for word in words:
                assert word not in caption.replace("music in the distance", "", 1).replace("Music in the distance", "", 1)


def test_fewer_kinds_than_events_is_fine():
    bank = RecordedBank([(recording(300), "a beep")])
    assert compose(DEFAULT, bank, "train", 0, 8000).events == ("a beep",)


@pytest.mark.parametrize(
    ("recordings", "message"),
    [
        ([], "no recordings"),
        ([(np.zeros(0, np.float32), "a")], "recording 0"),
        ([(np.zeros(9, np.float32), "a")], "silent"),
        ([(np.full(9, np.nan, np.float32), "a")], "finite"),
        ([(np.ones((9, 2), np.float32), "a")], "mono"),
        ([(np.ones(9, np.float32), "a"), (np.ones(9, np.float32), " . ")], "recording 1 has no caption"),
    ],
)
def test_unusable_recordings_are_refused(recordings, message):
    with pytest.raises(ValueError, match=message):
        RecordedBank(recordings)

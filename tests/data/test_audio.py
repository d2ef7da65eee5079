"""Every format decodes to mono at the asked rate; whatever cannot be decoded says why."""

import io
import math

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ask_ray.data import audio
from ask_ray.data.schema import UnusableClip

FORMATS = ("wav", "flac", "ogg", "mp3")


def loudest_hz(samples: np.ndarray, rate: int) -> float:
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 18))
    return float(np.argmax(power) * rate / (1 << 18))


def reason(path, rate: int = 16000) -> str:
    with pytest.raises(UnusableClip) as found:
        audio.load(path, rate)
    assert path.name in found.value.detail
    return found.value.reason


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("ending", FORMATS)
def test_a_sine_keeps_its_pitch_length_and_level(ending, rate, channels, tmp_path, write_audio):
    path = write_audio(tmp_path / f"a.{ending}", seconds=0.8, rate=rate, hz=1234.0, channels=channels)
    for asked in (16000, 11025):
        samples = audio.load(path, asked).samples
        assert (samples.dtype, samples.ndim) == (np.dtype(np.float32), 1)
        assert len(samples) / asked == pytest.approx(0.8, abs=0.06 if ending == "mp3" else 1.5 / asked)
        middle = samples[asked // 5 : asked // 2]
        assert loudest_hz(middle, asked) == pytest.approx(1234.0, abs=2)
        assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize(("subtype", "error"), [("PCM_U8", 0.01), ("PCM_24", 1e-6), ("FLOAT", 1e-7), ("DOUBLE", 1e-7)])
def test_every_width_of_samples_is_full_scale_one(subtype, error, tmp_path, write_audio):
    path = write_audio(tmp_path / "a.wav", hz=100.0, subtype=subtype)
    expected = 0.3 * np.sin(2 * np.pi * 100 * np.arange(8000) / 16000)
    np.testing.assert_allclose(audio.load(path, 16000).samples, expected, atol=error)


def test_channels_are_averaged(tmp_path, write_audio):
    left = np.random.default_rng(0).uniform(-0.5, 0.5, 4000)
    path = write_audio(tmp_path / "a.wav", samples=np.stack([left, -left], 1), subtype="FLOAT")
    assert np.abs(audio.load(path, 16000).samples).max() < 1e-7
    path = write_audio(tmp_path / "b.wav", samples=np.stack([left, 0 * left, 0.5 * left], 1), subtype="FLOAT")
    np.testing.assert_allclose(audio.load(path, 16000).samples, left / 2, atol=1e-6)


def test_what_is_above_the_new_nyquist_is_removed_not_folded_down(tmp_path, write_audio):
    path = write_audio(tmp_path / "a.wav", rate=44100, hz=11000.0)
    assert np.abs(audio.load(path, 16000).samples[2000:6000]).max() < 1e-3


@pytest.mark.parametrize("rate", [16000, 44100])
def test_samples_that_are_not_finite_reach_the_check_that_counts_them(rate, tmp_path, write_audio):
    samples = np.full(4000, 0.1)
    samples[1000] = np.nan
    path = write_audio(tmp_path / "a.wav", samples=samples, rate=rate, subtype="FLOAT")
    assert np.isnan(audio.load(path, 16000).samples).sum() == 1


def test_a_missing_file_a_folder_and_an_impossible_name(tmp_path):
    assert reason(tmp_path / "no.wav") == "missing file"
    assert reason(tmp_path) == "missing file"
    assert reason(tmp_path / f"{'x' * 300}.wav") == "missing file"


def test_a_file_without_bytes_or_without_samples(tmp_path, write_audio):
    (tmp_path / "a.wav").write_bytes(b"")
    assert reason(tmp_path / "a.wav") == "empty"
    assert audio.load(write_audio(tmp_path / "b.wav", samples=np.zeros(0)), 8000).samples.size == 0


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.txt", "a.raw", "a"])
def test_what_is_no_recording_is_unreadable(name, tmp_path):
    (tmp_path / name).write_bytes(b"file_name,caption\n" * 40)
    assert reason(tmp_path / name) == "unreadable"


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_cut_in_its_header_is_unreadable(ending, tmp_path, write_audio):
    path = write_audio(tmp_path / f"a.{ending}")
    path.write_bytes(path.read_bytes()[:20])
    assert reason(path) == "unreadable"


def test_a_header_that_promises_more_than_memory_holds_is_unreadable(tmp_path, write_audio, monkeypatch):
    path = write_audio(tmp_path / "a.mp3")
    monkeypatch.setattr(soundfile.SoundFile, "frames", 1 << 50)
    monkeypatch.setattr(soundfile.SoundFile, "seekable", lambda _: False)  # so that the promise is believed
    assert reason(path) == "unreadable"
    assert len(audio.load(path, 16000, 0.25).samples) == 4000


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("rate", [16000, 44100])
def test_no_more_than_the_asked_seconds_are_decoded(ending, rate, tmp_path, write_audio):
    path = write_audio(tmp_path / f"a.{ending}", seconds=1.0, rate=rate, channels=2)
    whole, half, more = (audio.load(path, 16000, seconds) for seconds in (math.inf, 0.5, 2.0))
    assert (len(half.samples), half.cut, half.rate) == (8000, True, rate)
    assert not whole.cut
    assert not more.cut
    np.testing.assert_array_equal(whole.samples, more.samples)
    np.testing.assert_allclose(half.samples[:7000], whole.samples[:7000], atol=1e-3)


@pytest.mark.parametrize("ending", FORMATS)
def test_bytes_decode_as_their_file_does(ending, tmp_path, write_audio):
    path = write_audio(tmp_path / f"a.{ending}", rate=44100, channels=2)
    read = audio.decode(io.BytesIO(path.read_bytes()), "row 3", 16000)
    np.testing.assert_array_equal(read.samples, audio.load(path, 16000).samples)
    with pytest.raises(UnusableClip, match="row 3: ") as found:
        audio.decode(io.BytesIO(path.read_bytes()[:20]), "row 3", 16000)
    assert found.value.reason == "unreadable"


@given(data=st.data())
@budget(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_decodes_or_is_unusable_but_never_ends_the_job(data, tmp_path, write_audio):
    ending = data.draw(st.sampled_from(FORMATS))
    whole = tmp_path / f"whole.{ending}"
    content = bytearray((whole if whole.exists() else write_audio(whole, seconds=0.2)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 200) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / f"damaged.{ending}"
    damaged.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
    try:
        assert audio.load(damaged, 16000).samples.ndim == 1
    except UnusableClip as found:
        assert found.reason == "unreadable"  # noqa: PT017

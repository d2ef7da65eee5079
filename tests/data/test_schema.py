"""What makes a clip usable, and the exactness of 16-bit samples."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ask_ray.config import UserError
from ask_ray.data.schema import CLIPS, SILENCE, Clip, UnusableClip, id_number, usable_captions, usable_waveform
from ask_ray.storage import digest_bytes

RATE = 8000


def reason(samples, min_seconds: float = 0.1) -> str:
    with pytest.raises(UnusableClip) as found:
        usable_waveform(np.asarray(samples, np.float32), RATE, min_seconds)
    assert found.value.detail
    assert isinstance(found.value, UserError)
    return found.value.reason


def spoilt(value: float) -> np.ndarray:
    samples = np.full(RATE, 0.5)
    samples[RATE // 2] = value
    return samples


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([], "empty"),
        (np.zeros(RATE), "silent"),
        (np.full(RATE, 0.9 * SILENCE), "silent"),
        (np.full(799, 0.5), "too short"),
        (spoilt(np.nan), "not finite"),
        (spoilt(np.inf), "not finite"),
        (spoilt(-np.inf), "not finite"),
    ],
)
def test_what_cannot_be_used_says_why(samples, expected):
    assert reason(samples) == expected


def test_the_limits_themselves_are_usable():
    assert len(usable_waveform(np.full(800, 0.5, np.float32), RATE, 0.1)) == 800
    quiet = np.zeros(RATE, np.float32)
    quiet[7] = -1.01 * SILENCE
    assert usable_waveform(quiet, RATE, 0.1)[7] == -3


@given(arrays.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1, 1, width=32)))
@budget(deadline=None)
def test_16_bit_samples_are_within_half_a_step(samples):
    samples[0] = 0.5
    made = usable_waveform(samples, RATE, 1e-6)
    assert (made.dtype, made.shape) == (np.dtype(np.int16), samples.shape)
    assert np.abs(made / 32767.0 - samples).max() <= 0.505 / 32767  # half a step, and float32's rounding of the product
    assert (np.diff(made[np.argsort(samples, kind="stable")].astype(int)) >= 0).all()


@given(arrays.arrays(np.int16, st.integers(1, 50), elements=st.integers(-32767, 32767)))
@budget(deadline=None)
def test_16_bit_samples_survive_a_round_trip(stored):
    stored[0] = 1000
    np.testing.assert_array_equal(usable_waveform((stored / 32767.0).astype(np.float32), RATE, 1e-6), stored)


@pytest.mark.parametrize("level", [1.0, 1.7, 1e6])
def test_too_loud_samples_are_clipped_and_never_wrap(level):
    made = usable_waveform(np.array([level, -level], np.float32), RATE, 1e-6)
    assert made[0] == 32767
    assert made[1] in (-32767, -32768)


def test_captions_are_trimmed_and_empty_ones_left_out():
    assert usable_captions(["  A dog. ", "", None, " \n\t", float("nan"), "12"]) == ("A dog.", "12")


@pytest.mark.parametrize("captions", [[], [""], [None, " \n"], [float("nan")]])
def test_a_clip_without_captions_says_so(captions):
    with pytest.raises(UnusableClip) as found:
        usable_captions(captions)
    assert found.value.reason == "empty caption"


def test_an_id_number_is_stable_and_fits_63_bits():
    numbers = {id_number(f"clip-{n}") for n in range(5000)}
    assert len(numbers) == 5000
    assert all(0 <= number < 2**63 for number in numbers)
    assert max(numbers) > 2**62
    # Snapshots of the knowledge base keep these numbers: they must be the same in every process and release.
    assert (id_number("train-0000000"), id_number("ä")) == (6214979613667106013, 8657851361613172764)


def test_a_clip_is_a_row_of_the_schema():
    row = Clip("a", "train", ("x", "y"), np.arange(4000, dtype=np.int16), "a.wav", RATE, 44100, "freesound:1").row()
    table = pa.Table.from_pylist([row | {"waveform": row["waveform"].tolist()}], schema=CLIPS)
    assert table.to_pylist()[0]["captions"] == ["x", "y"]
    assert table.to_pylist()[0]["duration"] == 0.5
    assert table.to_pylist()[0]["source_id"] == "freesound:1"
    assert table.to_pylist()[0]["digest"] == digest_bytes(np.arange(4000, dtype=np.int16).tobytes())

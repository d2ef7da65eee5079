"""A file that ends before its recording does is unreadable, whatever its format; a stream of unknown length is not."""

import io
from pathlib import Path

import numpy as np
import pytest

from ask_ray.data import audio
from ask_ray.data.schema import UnusableClip


def noise(seconds: float, rate: int = 16000) -> np.ndarray:
    """What hardly compresses, so that a file has many packets."""
    return np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * rate))


def samples(path: Path) -> int:
    return len(audio.load(path, 16000).samples)


def refused(path: Path) -> str:
    with pytest.raises(UnusableClip) as found:
        audio.load(path, 16000)
    assert found.value.reason == "unreadable"
    assert path.name in found.value.detail
    return found.value.detail


@pytest.mark.parametrize("kept", [0.4, 0.75, 0.9])
@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("wav", {}),
        ("wav", {"subtype": "FLOAT"}),
        ("wav", {"format": "WAVEX", "subtype": "PCM_24"}),
        ("wav", {"format": "WAV", "endian": "BIG"}),
        ("wav", {"format": "RF64"}),
        ("wav", {"subtype": "IMA_ADPCM"}),
        ("aiff", {}),
        ("flac", {}),
        ("ogg", {}),
        ("opus", {"format": "OGG", "subtype": "OPUS"}),
        ("mp3", {}),
    ],
)
def test_a_truncated_file_is_unreadable_and_the_whole_one_is_not(ending, options, kept, tmp_path, write_audio):
    path = write_audio(tmp_path / f"a.{ending}", samples=noise(4.0), **options)
    content = path.read_bytes()
    assert samples(path) == pytest.approx(64000, abs=1100)  # blocks of ADPCM
    path.write_bytes(content[: int(len(content) * kept)])
    refused(path)
    with pytest.raises(UnusableClip, match=r"^row 3: ") as found:
        audio.decode(io.BytesIO(path.read_bytes()), "row 3", 16000)
    assert found.value.reason == "unreadable"


def test_a_truncated_file_tells_what_is_lacking(tmp_path, write_audio):
    path = write_audio(tmp_path / "a.wav", samples=noise(1.0))
    path.write_bytes(path.read_bytes()[:20044])
    assert "announces 32000 bytes of samples, 20000 are there" in refused(path)


@pytest.mark.parametrize("kept", [1.0, 0.5])
@pytest.mark.parametrize(
    ("ending", "whole", "length"),
    [
        ("wav", 0xFFFFFFFF, 0xFFFFFFFF),
        ("wav", 0x7FFFF024, 0x7FFFF000),
        ("wav", 8, 0),
        ("aiff", 0, 0),
        ("aiff", 0x7F00002E, 0x7F000008),
    ],
)
def test_a_stream_that_could_not_tell_its_length_is_as_long_as_it_is(ending, whole, length, kept, tmp_path, write_audio):
    """As ffmpeg and sox write to a pipe: both lengths of the header stay as they were before there was anything to tell."""
    path = write_audio(tmp_path / f"a.{ending}", samples=noise(1.0))
    order, name = ("little", b"data") if ending == "wav" else ("big", b"SSND")
    content = bytearray(path.read_bytes())
    place = content.index(name)
    content[4:8], content[place + 4 : place + 8] = (number.to_bytes(4, order) for number in (whole, length))
    if ending == "wav":
        content[place:place] = b"LIST\x0e\0\0\0INFOISFT\x02\0\0\0a\0"
    path.write_bytes(content[: int(len(content) * kept)])
    assert samples(path) == pytest.approx(16000 * kept, abs=30)


def test_a_header_that_counts_itself_among_the_samples_is_believed(tmp_path, write_audio):
    path = write_audio(tmp_path / "a.wav", samples=noise(1.0))
    content = bytearray(path.read_bytes())
    content[40:44] = len(content).to_bytes(4, "little")
    path.write_bytes(content)
    assert samples(path) == 16000


def test_what_follows_the_samples_may_be_lacking(tmp_path, write_audio):
    path = write_audio(tmp_path / "a.wav", samples=noise(1.0))
    path.write_bytes(path.read_bytes() + b"LIST\xff\0\0\0INFO")
    assert samples(path) == 16000


def test_an_mp3_that_does_not_count_its_frames_is_as_long_as_it_seems(tmp_path, write_audio):
    path = write_audio(tmp_path / "a.mp3", samples=noise(4.0))
    content = path.read_bytes()
    second = content.index(content[:2], 4)
    assert b"Xing" in content[:second]
    for kept in (len(content), len(content) // 2):
        path.write_bytes(content[second:kept])
        assert samples(path) > 0


def test_an_mp3_may_begin_with_a_tag(tmp_path, write_audio):
    path = write_audio(tmp_path / "a.mp3", samples=noise(4.0))
    tag = b"ID3\x04\0\0\0\0\x40\0" + bytes(64 << 7)
    path.write_bytes(tag + path.read_bytes())
    assert samples(path) == 64000
    path.write_bytes(path.read_bytes()[: (len(tag) + path.stat().st_size) // 2])
    refused(path)


def test_a_recording_that_lacks_its_middle_is_unreadable(tmp_path, write_audio):
    path = write_audio(tmp_path / "a.ogg", samples=noise(8.0))
    pages = path.read_bytes().split(b"OggS")
    assert len(pages) > 7
    path.write_bytes(b"OggS".join(pages[:4] + pages[6:]))
    refused(path)

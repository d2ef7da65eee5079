"""What the file of a recording tells of its own end, so that half a download is not taken for a shorter recording.

libsndfile lowers what a header announces to what the file holds, and a stream of packets ends wherever its bytes end. The
layouts are RIFF's, RF64's (EBU Tech 3306) and AIFF's chunks, Ogg's pages (RFC 3533), and the header of Xing and LAME in the
first frame of an MP3.
"""

from __future__ import annotations

import os
import re
import struct
from typing import BinaryIO

#: What a file of chunks begins with: the order of its bytes, and the chunk of its samples.
_CHUNKED = {b"RIFF": ("<", b"data"), b"RIFX": (">", b"data"), b"RF64": ("<", b"data"), b"FORM": (">", b"SSND")}
#: So many bytes announced, or more, or none, mean that who wrote could not go back to tell: ffmpeg's 0xFFFFFFFF, sox's 0x7FFFF000
#: in WAV and about 0x7F000000 in AIFF.
_STREAMED = 0x7F000000
#: Bytes that may be lacking: some writers count the header among the samples.
_SPARE_BYTES = 64
#: Chunks looked at before that of the samples.
_CHUNKS = 1000

#: The most bytes of an Ogg page, and those before its table of segments.
_PAGE, _PAGE_HEAD = 65307, 27
_END_OF_STREAM = 4

#: Samples of an MP3 that may be lacking: two frames, because encoders differ in whether the one with the header counts.
_SPARE_SAMPLES = 2 * 1152
#: A frame's header, its side information, which depends on version and channels, and a header that has flags.
_COUNTED = re.compile(rb"\xff[\xe0-\xff]..(?:..)?(?:.{9}|.{17}|.{32})(?:Xing|Info)(.{4})", re.DOTALL)


def refuse_broken(stream: BinaryIO, form: str, announced: int, came: int) -> None:
    """Refuse a file that ends before its recording does.

    The bytes of samples that a WAV, RF64 or AIFF header announces must be there; the page that ends the stream of an Ogg file;
    and of any format as many samples as libsndfile announces: of an MP3 if its first frame tells how many frames there are, and
    but for two of them. Without such a frame nothing is known of an MP3, nor of a WAV or AIFF file that was streamed, whose
    writer could not tell its length.

    Args:
        stream: the file, at any place.
        form: what libsndfile calls its format.
        announced: how many samples libsndfile was to decode.
        came: how many it did.

    Raises:
        ValueError: with what is lacking.
    """
    spare = 0
    if form in ("WAV", "WAVEX", "RF64", "AIFF"):
        _refuse_fewer_bytes(stream)
    elif form == "OGG":
        _refuse_unended(stream)
    elif form == "MP3":
        if not _counts_frames(stream):
            return
        spare = _SPARE_SAMPLES
    if came < announced - spare:
        raise ValueError(f"{announced} samples are announced, {came} come")


def _refuse_fewer_bytes(stream: BinaryIO) -> None:
    announced, held = _bytes_of_samples(stream)
    if announced > held + _SPARE_BYTES:
        raise ValueError(f"broken off: its header announces {announced} bytes of samples, {held} are there")


def _bytes_of_samples(stream: BinaryIO) -> tuple[int, int]:
    """Bytes of the chunk of samples as announced, none if that is not known, and as they are there."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    kind = stream.read(12)[:4]
    order, wanted = _CHUNKED.get(kind, ("<", b""))
    long = 0
    for _ in range(_CHUNKS):
        head = stream.read(8)
        if len(head) < 8:
            break
        name, length = struct.unpack(f"{order}4sI", head)
        begin = stream.tell()
        if name == wanted:
            if kind == b"RF64" and length == 0xFFFFFFFF:
                return long, end - begin
            return (length if length < _STREAMED else 0), end - begin
        if name == b"ds64":
            long = int.from_bytes(stream.read(16)[8:], "little")
        stream.seek(begin + length + length % 2)
    return 0, 0


def _refuse_unended(stream: BinaryIO) -> None:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _PAGE))
    rest = stream.read()
    page = rest[max(0, rest.rfind(b"OggS\0")) :]
    segments = page[_PAGE_HEAD : _PAGE_HEAD + page[_PAGE_HEAD - 1]] if len(page) >= _PAGE_HEAD else b""
    if len(page) < _PAGE_HEAD + len(segments) + sum(segments) or not page[5] & _END_OF_STREAM:
        raise ValueError("broken off: the page that ends its stream is not there")


def _counts_frames(stream: BinaryIO) -> bool:
    """Whether an MP3 tells how many frames it has; what stands before the first of them may be an ID3 tag."""
    stream.seek(0)
    head = stream.read(10)
    tag = 0
    if head[:3] == b"ID3" and len(head) == 10:
        for byte in head[6:]:
            tag = tag << 7 | byte & 0x7F
        tag += 10
    stream.seek(tag)
    found = _COUNTED.search(stream.read(4096))
    return found is not None and bool(found[1][3] & 1)

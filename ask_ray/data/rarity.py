"""How rare in training a clip's sound is, told from captions: prepared clips carry no labels of their events.

A word is a run of letters, whatever their case. Its frequency is the number of training clips that have it in any caption. A
caption is as frequent as its rarest word: words that tell no sound ("the", "then") are common wherever a corpus is large enough
to evaluate on, so no list of them is needed. A clip is as frequent as the median of its captions (of two in the middle the lower
one), so that one caption's odd word does not decide. A caption without letters, and a word that training never had, count as 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[^\W\d_]+")

#: The least frequency of each bucket, in training clips.
EDGES = (0, 1, 10, 100, 1000)
BUCKETS = ("0", "1–9", "10–99", "100–999", "1000 and more")


@dataclass(frozen=True)
class Frequencies:
    """In how many of `clips` training clips each word is."""

    counts: Counter[str]
    clips: int

    @classmethod
    def of(cls, captions: Iterable[Sequence[str]]) -> Frequencies:
        """Count, given each training clip's captions."""
        counts: Counter[str] = Counter()
        clips = 0
        for of_clip in captions:
            clips += 1
            counts.update({word for caption in of_clip for word in words(caption)})
        return cls(counts, clips)

    def clip(self, captions: Sequence[str]) -> int:
        """A clip's frequency, by its captions."""
        found = sorted(min((self.counts[word] for word in words(caption)), default=0) for caption in captions)
        return found[(len(found) - 1) // 2]


def words(caption: str) -> set[str]:
    """The different words of a caption."""
    return set(_WORD.findall(caption.casefold()))


def bucket(frequency: int) -> int:
    """Which of :data:`BUCKETS` a frequency falls in."""
    return sum(frequency >= edge for edge in EDGES) - 1

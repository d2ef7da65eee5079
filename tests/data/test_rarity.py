"""How rare a clip is, against a count by hand and a slow reference."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ask_ray.data.rarity import BUCKETS, EDGES, Frequencies, bucket, words

TRAINED = [
    ["A dog barks, then a dog barks again", "Dog barking"],
    ["A dog barks while rain falls", "the rain and a dog"],
    ["Rain falls"],
]


def test_a_word_counts_once_a_clip_in_whatever_case_and_however_often_it_is_said():
    made = Frequencies.of(TRAINED)
    assert made.clips == 3
    assert (made.counts["dog"], made.counts["rain"], made.counts["barking"], made.counts["a"]) == (2, 2, 1, 2)


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["A dog"], 2),
        (["a dog barking"], 1),
        (["a dog barking", "A DOG", "a dog, rain"], 2),  # one caption's odd word does not decide
        (["a theremin", "a dog"], 0),  # of two in the middle the lower
        (["123 !"], 0),
    ],
)
def test_a_clip_is_as_frequent_as_the_median_of_its_captions_rarest_words(captions, expected):
    assert Frequencies.of(TRAINED).clip(captions) == expected


def test_words_are_runs_of_letters_of_any_alphabet():
    assert words("Vögel zwitschern; a_dog's 2 barks") == {"vögel", "zwitschern", "a", "dog", "s", "barks"}


CAPTIONS = st.lists(st.lists(st.text("abc A.", max_size=6), min_size=1, max_size=4), max_size=8)


@given(CAPTIONS, st.lists(st.text("abcd ", max_size=5), min_size=1, max_size=5))
def test_frequencies_are_those_of_the_slow_reference(trained, clip):
    def split(caption):
        return [word for word in re.split(r"[^a-z]+", caption.lower()) if word]

    def frequency(word):
        return sum(any(word in split(caption) for caption in captions) for captions in trained)

    found = sorted(min(map(frequency, split(caption))) if split(caption) else 0 for caption in clip)
    below = [value for place, value in enumerate(found) if place <= (len(found) - 1) / 2]
    assert Frequencies.of(trained).clip(clip) == below[-1]


@given(st.integers(0, 10**6))
def test_every_frequency_is_in_one_bucket(frequency):
    assert [n for n, edge in enumerate(EDGES) if frequency >= edge][-1] == bucket(frequency)


def test_buckets_are_called_after_their_bounds():
    assert [BUCKETS[bucket(n)] for n in (0, 1, 9, 10, 99, 100, 999, 1000)] == [
        "0", "1–9", "1–9", "10–99", "10–99", "100–999", "100–999", "1000 and more"
    ]  # fmt: skip

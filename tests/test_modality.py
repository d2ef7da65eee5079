"""Names of what captions describe, wherever a run speaks of it."""

import math

from ask_ray.config import DataSettings
from ask_ray.modality import Form, headings


def test_directions_are_called_after_the_modality():
    assert headings("audio") == {"t2a": "text → audio", "a2t": "audio → text"}
    assert headings("image") == {"t2a": "text → image", "a2t": "image → text"}


def test_a_form_tells_what_makes_it():
    sounds, pictures = Form("audio", 8000), Form("image", 224)
    assert (str(sounds), sounds.setting, sounds.sample_rate) == ("8000 Hz", "data.sample_rate 8000", 8000)
    assert (str(pictures), pictures.setting, pictures.sample_rate) == ("images of 224 pixels", "data.image_size 224", None)


def test_how_much_is_kept_of_a_recording_makes_no_other_form():
    assert Form("audio", 8000, 2.0) == Form("audio", 8000, 3.0) != Form("audio", 16000, 2.0)
    assert DataSettings(corpus="clotho", keep_seconds=20).form.seconds == 20
    assert DataSettings(keep_seconds=20).form.seconds == DataSettings(corpus="coco").form.seconds == math.inf  # nothing is cut


def test_the_corpus_says_which_it_is():
    assert DataSettings(sample_rate=8000, image_size=99).form == Form("audio", 8000)
    assert DataSettings(corpus="flickr30k", sample_rate=8000, image_size=99).form == Form("image", 99)

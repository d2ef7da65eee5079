"""Small corpora of pictures in every public layout, with files of several kinds and a few things wrong in each.

Every picture shows two coloured shapes beside each other, and its captions tell which, and which is left.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 160, 60), "yellow": (240, 220, 30)}
SHAPES = ("circle", "square", "triangle")


def scene(number: int, sides: tuple[int, int] = (80, 60)) -> tuple[Image.Image, list[str]]:
    """A picture of (width, height) `sides` and its two captions; the same number, the same picture."""
    draw = random.Random(number)
    width, height = sides
    # The ground's shade and the shapes' places and sizes make each picture another one.
    image = Image.new("RGB", sides, tuple(draw.randint(200, 255) for _ in range(3)))
    pen, things = ImageDraw.Draw(image), []
    for x in (width // 4, 3 * width // 4):
        colour, shape = draw.choice(list(COLOURS)), draw.choice(SHAPES)
        y, half = height // 2 + draw.randint(-height // 8, height // 8), draw.randint(height // 8, height // 4)
        box = (x - half, y - half, x + half, y + half)
        if shape == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        else:
            pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=COLOURS[colour])
        things.append(f"{colour} {shape}")
    left, right = things
    return image, [f"a {left} left of a {right}", f"a {right} right of a {left}"]


def save(image: Image.Image, path: Path) -> Path:
    """Write a picture in the format of the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def coco_2017(root: Path, train: int = 12, test: int = 4, sides: tuple[int, int] = (80, 60)) -> Path:
    """COCO's lists of 2017 with two captions a picture, of jpg, png, grey and palette files, without anything wrong."""
    number = 0
    for part, count in (("train", train), ("val", test)):
        images, annotations = [], []
        for _ in range(count):
            number += 1
            image, captions = scene(number, sides)
            kind = ("RGB", "RGB", "L", "P")[number % 4]
            name = f"{number:012d}.{'jpg' if kind != 'P' else 'png'}"
            save(image.convert(kind), root / f"{part}2017" / name)
            images.append({"id": number, "file_name": name, "license": 1, "height": sides[1], "width": sides[0]})
            annotations += [{"image_id": number, "id": 10 * number + n, "caption": one} for n, one in enumerate(captions)]
        write_captions(root / "annotations" / f"captions_{part}2017.json", images, annotations)
    return root


def write_captions(path: Path, images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]]) -> None:
    """A list of COCO's."""
    write(path, {"info": {"year": 2017}, "licenses": [], "images": list(images), "annotations": list(annotations)})


def spoilt_coco(root: Path) -> Path:
    """:func:`coco_2017` with, in training: one picture truncated, one empty, one missing, one without caption, one whose id is
    there twice, one with a test picture's pixels, captions of a picture that is not listed; and a picture that no list names."""
    coco_2017(root)
    path = root / "annotations" / "captions_train2017.json"
    told = json.loads(path.read_text())
    whole = save(scene(99, (200, 150))[0], root / "train2017" / "cut.jpg").read_bytes()
    (root / "train2017" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train2017" / "void.png").write_bytes(b"")
    save(scene(98)[0], root / "train2017" / "silent.jpg")
    (root / "train2017" / "copy.jpg").write_bytes(min((root / "val2017").glob("*.jpg")).read_bytes())
    save(scene(97)[0], root / "train2017" / "nobody tells of it é.jpg")
    names = {101: "cut.jpg", 102: "void.png", 103: "gone.jpg", 104: "silent.jpg", 105: "copy.jpg", 1: "copy.jpg"}
    told["images"] += [{"id": number, "file_name": name} for number, name in names.items()]
    told["annotations"] += [{"image_id": n, "caption": f"picture {n}"} for n in (101, 102, 103, 105, 777)]
    told["annotations"].append({"image_id": 104, "caption": "  "})
    path.write_text(json.dumps(told))
    return root


def karpathy(root: Path, dataset: str) -> Path:
    """Karpathy's list: 8 pictures to train on, one of them in restval, 2 and 3 held out, one missing, one of an unknown split.

    Pictures of COCO are called as of 2014 in one half and as of 2017 in the other."""
    images = []
    splits = ["train"] * 7 + ["restval"] + ["val"] * 2 + ["test"] * 3 + ["train", "holdout"]
    for number, split in enumerate(splits, 1):
        image, captions = scene(200 + number)
        name = f"COCO_val2014_{number:012d}.jpg" if dataset == "coco" else f"10{number}é.jpg"
        own = {"filepath": "val2014", "cocoid": number} if dataset == "coco" else {}
        sentences = [{"raw": one, "tokens": one.split(), "imgid": number, "sentid": 5 * number} for one in captions]
        images.append({"filename": name, "imgid": number, "split": split, "sentences": sentences, "sentids": [1, 2], **own})
        if number != len(splits) - 1:
            later = dataset == "coco" and number % 2
            save(image, root / "images" / (f"{number:012d}.jpg" if later else name))
    write(root / f"dataset_{dataset}.json", {"images": images, "dataset": dataset})
    return root


def write(path: Path, value: object) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")

"""labelme: a JSON beside every image, with polygons, rectangles, circles, masks, lines and points.

Shapes of one label with one group_id are one instance. What has no area, is of an unknown kind, or
is labelled __ignore__, is void where nothing else is. Axes: H W pixels, N points.
"""

import base64
import contextlib
import io
import json
import math
import posixpath
import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Iterator

import numpy as np
from PIL import Image, ImageDraw

from ground import identity
from ground.errors import UserError
from readers.annotations import shapes
from readers.annotations.files import division, list_files
from readers.annotations.others import hint
from readers.annotations.records import UNNAMED, VOID, Classes, Instance, Record, Source
from readers.annotations.shapes import Patch, Size
from readers.pictures import FORMATS, brief, name_fault

SHAPELESS = "point points line linestrip".split()  # have no area
# Kinds that have corners, of labelme and of its descendants, and the others that have an area.
CORNERED = "polygon rectangle oriented_rectangle rotation quadrilateral".split()
AREAL = [*CORNERED, "circle", "mask"]
EMPTY = re.compile(rb'"shapes"\s*:\s*\[\s*\]')
STROKE = 10  # pixels, width of a line as labelme's own converters draw it
DOT = 5  # pixels, radius of a point, likewise


def read_labelme(folder: Path, classes: Classes) -> Source:
    """A JSON beside every image, or elsewhere below the folder; images that no JSON names are
    unlabelled. The classes are known when the records are read."""
    files, images = list_files(folder, ".json"), dict.fromkeys(list_files(folder))
    if not files:
        raise UserError(
            f"{folder}: no *.json in this folder; expected labelme's, one for every annotated "
            f"image{hint(folder, 'labelme')}"
        )
    source = Source(count=len(images))
    source.records = _records(folder, files, images, source, classes)
    return source


def _records(
    folder: Path, files: list[str], images: dict[str, None], source: Source, classes: Classes
) -> Iterator[Record]:
    used, untouched = set(), 0
    drawn = [file for file in files if classes.background or not _is_empty(folder / file)]
    part = division(drawn, source.notes if classes.inherited is None else [])
    for file in files:
        path = folder / file
        content = _load(folder, file)
        untouched += is_untouched(content)
        name, image = _image(folder, file, content, images)
        if name in used:
            raise UserError(
                f"{path}: its image {brief(name)} has another JSON already; expected one JSON for "
                "an image"
            )
        used.add(name)
        yield Record(name, image, partial(_instances, path, content, source, classes), part(name))
    if untouched:
        source.notes.append(
            f"{untouched} of {len(files)} files are as --stage predict wrote them, and are taken "
            "for right; of a picture that nobody has looked at delete the JSON: it is unlabelled "
            "then"
        )
    for name in images:
        if name not in used:
            yield Record(name, folder / name, part=part(name))


def digest(shapes: list[dict]) -> str:
    """Of what people correct. labelme keeps keys that it does not know, and writes 3 as 3.0."""
    drawn = [
        [s["label"], s["group_id"], [[float(v) for v in point] for point in s["points"]]]
        for s in shapes
    ]
    return identity.of_text(json.dumps(drawn))


def is_untouched(content: dict) -> bool:
    """Whether a file is as `tools.exchange` wrote it, which left its `digest` in it."""
    try:
        return content["predicted"] == digest(content["shapes"])
    except (KeyError, TypeError, ValueError):
        return False


def _is_empty(path: Path) -> bool:
    """Whether a file has no shape; what cannot be read is for `_load` to say."""
    with contextlib.suppress(OSError):
        return EMPTY.search(path.read_bytes()) is not None
    return False


def _load(folder: Path, file: str) -> dict:
    path = folder / file
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a readable JSON file ({brief(str(error))}); save it again in labelme"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise UserError(
            f"{path}: has no list `shapes`, so labelme did not write it; take it out of the "
            f"folder{hint(folder, 'labelme', [file])}"
        )
    return content


def _image(folder: Path, file: str, content: dict, images: dict) -> tuple[str, Path | bytes]:
    """Name and image of a JSON: the one that it names, or of its own stem, or of the name's last
    part beside it, or the one that it holds."""
    stated, name = content.get("imagePath"), ""
    fault = name_fault(stated)
    if isinstance(stated, str):  # written on Windows, perhaps; ../ may stay below the source
        name = posixpath.join(posixpath.dirname(file), stated.replace("\\", "/"))
        name = posixpath.normpath(name)
        fault = name_fault(name)
    if name in images:
        return name, folder / name
    missing = f"{folder / file}: imagePath {brief(stated)} {fault or 'is not there'}"
    stem = posixpath.splitext(file)[0]
    beside = [other for other in images if posixpath.splitext(other)[0] == stem]
    last = posixpath.join(posixpath.dirname(file), posixpath.basename(name))
    if len(beside) > 1 and last not in beside:
        two = " and ".join(posixpath.basename(other) for other in beside[:2])
        raise UserError(
            f"{missing}, and {two} have the stem of this JSON; put the right name into imagePath"
        )
    likely = [other for other in (last, *beside) if other in (beside or images)]
    if likely:
        return likely[0], folder / likely[0]
    if not content.get("imageData"):
        raise UserError(
            f"{missing}, no image is called {posixpath.basename(stem)} and imageData is empty; put "
            "the image beside the JSON"
        )
    try:
        held = base64.b64decode(content["imageData"], validate=True)
        with Image.open(io.BytesIO(held), formats=FORMATS) as image:
            return f"{stem}.{image.format.lower()}", held
    except Exception:  # Pillow raises a dozen types for what is one thing to the user
        raise UserError(
            f"{folder / file}: there is no image file, and its imageData is no image; put the "
            "image beside the JSON"
        ) from None


def _instances(
    path: Path, content: dict, source: Source, classes: Classes, size: Size
) -> list[Instance]:
    stated = content.get("imageHeight"), content.get("imageWidth")
    claim = f"{path}: states an image of {brief(stated)}"
    shapes.require_size(stated, size, claim, "save the annotation again with this image")
    groups, instances = defaultdict(list), []
    for place, shape in enumerate(content["shapes"]):
        where = f"{path}: shapes[{place}]"
        label, kind, group = _fields(shape, where)
        points = shapes.read_points(shape.get("points") or np.zeros((0, 2)), size, where)
        passed = _passed(label, kind)
        if passed:
            source.passed[passed] += 1
        if kind not in AREAL:
            slight = kind in SHAPELESS
            around = partial(partial(_stroke, kind) if slight else shapes.filled, points, size)
            instances.append(Instance(VOID, shapes.nothing, around=around, slight=slight))
            continue
        if label not in UNNAMED and label not in classes:
            classes.add(label, label, where)
        one = ("alone", place) if group is None else ("group", group)
        draw = _drawing(kind, shape, points, size, where)
        groups[UNNAMED.get(label, label), one].append((draw, partial(shapes.filled, points, size)))
    for (category, _), drawn in groups.items():
        draws, arounds = zip(*drawn)
        draw, around = partial(shapes.join, draws, size), partial(shapes.join, arounds, size)
        instances.append(Instance(category, draw, around=around))
    return instances


def _fields(shape, where: str) -> tuple[str, str, int | str | None]:
    """Label, kind and group_id of a shape. Raises: UserError if it is none."""
    try:
        label, kind, group = shape["label"], shape.get("shape_type"), shape.get("group_id")
        sound = isinstance(label, str) and type(group) in (type(None), int, str)
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(
            f"{where} is {brief(shape)}, expected an object with label and points, and a number as "
            "group_id"
        )
    if not isinstance(kind, str | None):
        raise UserError(f"{where} has shape_type {brief(kind)}, expected text, such as polygon")
    return label, "polygon" if kind is None else kind, group  # older versions knew nothing else


def _passed(label: str, kind: str) -> str:
    """Why a shape is no instance; empty if it is one."""
    if label in UNNAMED:
        return f"shapes labelled {label}"
    if kind in SHAPELESS:
        return "points and lines"
    return "" if kind in AREAL else f"shapes of the unknown type {brief(kind)}"


def _drawing(kind: str, shape: dict, points: np.ndarray, size: Size, where: str) -> partial:
    if kind in ("circle", "mask") and len(points) != 2:
        raise UserError(f"{where}: a {kind} of {len(points)} points, expected 2")
    if kind == "circle":
        return partial(_circle, points, size)
    if kind == "mask":
        return partial(_mask, shape.get("mask"), points, size, where)
    if kind == "rectangle" and len(points) == 2:
        (x, y), (x2, y2) = points
        points = np.array([(x, y), (x, y2), (x2, y2), (x2, y)])
    return partial(shapes.polygon, points, size)


def _circle(points: np.ndarray, size: Size) -> Patch:
    """points: the centre, and one on the rim."""
    (x, y), radius = points[0], math.dist(*points)
    top, left, height, width = shapes.box(np.stack([points[0] - radius, points[0] + radius]), size)
    ys, xs = np.ogrid[top : top + height, left : left + width]
    return top, left, (xs + 0.5 - x) ** 2 + (ys + 0.5 - y) ** 2 <= radius**2


def _mask(held, points: np.ndarray, size: Size, where: str) -> Patch:
    """A PNG of the pixels from the first to the last point, both included."""
    (left, top), (right, bottom) = points.astype(int).tolist()
    inside = 0 <= left and 0 <= top and right < size[1] and bottom < size[0]
    try:
        image = Image.open(io.BytesIO(base64.b64decode(held, validate=True)), formats=("PNG",))
        fits = inside and image.size == (right - left + 1, bottom - top + 1)
        mask = np.asarray(image.convert("L")) > 0 if fits else None
    except Exception:  # Pillow raises a dozen types for what is one thing to the user
        raise UserError(
            f"{where}: its mask {brief(held)} is no PNG in base64; save the annotation again in "
            "labelme"
        ) from None
    if mask is None:
        raise UserError(
            f"{where}: a mask of {image.width} x {image.height} from {brief([left, top])} to "
            f"{brief([right, bottom])}, expected one that fills this box, in an image of "
            f"{size[1]} x {size[0]}"
        )
    return top, left, mask


def _stroke(kind: str, points: np.ndarray, size: Size) -> Patch:
    """A line through the points, or a dot at each, as thick as labelme's own converters draw
    them."""
    image = Image.new("L", size[::-1])
    draw = ImageDraw.Draw(image)
    if kind.startswith("line") and len(points) > 1:
        draw.line([*map(tuple, points.tolist())], fill=1, width=STROKE)
    for x, y in points.tolist():
        draw.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), fill=1)
    return 0, 0, np.asarray(image) > 0

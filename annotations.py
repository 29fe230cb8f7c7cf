"""Annotations of labelme, COCO instances, Cityscapes and folders of masks, read into records of instances that can be drawn (for `importer.py`).

    labelme         a JSON beside every image: polygons, rectangles, circles, masks
    coco-instances  a JSON with images, annotations and categories: polygons or run lengths
    cityscapes      leftImg8bit/ and gtFine/: maps of instance ids, with stuff
    masks           images/NAME.* and masks/CLASS/NAME.png: integer maps, every value but 0 an instance

A reader takes the folder and the class names that are taken; it raises UserError for whatever is not what its format says, when an image's turn comes at the latest.
A pixel belongs to a shape if its centre does. Coordinates count from the corner of the image, so that a square from 2 to 5 has three pixels a side; vertices are
rounded to whole corners. (Pillow's `polygon` counts from centres and draws the outline, too: the same square would have four.)
Axes: H W pixels, N points.
"""

import base64
import io
import json
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from config import UserError
from data import FORMATS, MAX_ID, brief, name_fault, open_image, read_json
from dewa import decode_rle

CITYSCAPES = {                         # the 19 classes of the evaluation: label id -> name, colour; from 24 on they are things
    7: ("road", (128, 64, 128)), 8: ("sidewalk", (244, 35, 232)), 11: ("building", (70, 70, 70)), 12: ("wall", (102, 102, 156)), 13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)), 19: ("traffic light", (250, 170, 30)), 20: ("traffic sign", (220, 220, 0)), 21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)), 23: ("sky", (70, 130, 180)), 24: ("person", (220, 20, 60)), 25: ("rider", (255, 0, 0)), 26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)), 28: ("bus", (0, 60, 100)), 31: ("train", (0, 80, 100)), 32: ("motorcycle", (0, 0, 230)), 33: ("bicycle", (119, 11, 32))}
FIRST_THING = 24
SHAPELESS = ("point", "points", "line", "linestrip")       # of labelme: have no area
UNNAMED = ("__ignore__", "_background_")                           # what labelme's own converters take for no class
Patch = tuple[int, int, np.ndarray]    # top, left, (h, w) bool: pixels of an instance, inside of the image


@dataclass
class Instance:
    """category: a key of Source.classes.   draw: its pixels, made anew at every call, so that one mask at a time is in memory."""
    category: str | int
    draw: Callable[[], Patch]
    crowd: bool = False


@dataclass
class Record:
    """An image.   name: path below the source, with slashes.   image: a file, or its content.   read: its (H, W) -> instances; None: nobody annotated it.
    part: `train`, `val`, or empty where the source does not say."""
    name: str
    image: Path | bytes
    read: Callable[[tuple[int, int]], list[Instance]] | None = None
    part: str = ""


@dataclass
class Source:
    """classes: name, thing flag and colour (or None) by key; keys are ids where they are numbers, and labelme's come as its files are read.   count: of records, or so.
    passed: what was passed over."""
    records: Iterable[Record]
    count: int
    classes: dict[str | int, tuple[str, bool, tuple[int, int, int] | None]]
    passed: Counter


# -------------------------------------------------------------------------------------------------------------- labelme

def labelme(source: Path, taken: dict) -> Source:
    """A JSON beside every image, or elsewhere below the folder; images that no JSON names are unlabelled."""
    files, images = _files(source, ("json",)), _files(source)
    if not files:
        raise UserError(f"{source}: no *.json in this folder; expected labelme's, one for every annotated image")
    found = Source((), len(images), {}, Counter())

    def records() -> Iterator[Record]:
        used = set()
        for file in files:
            content, path = _labelme_json(source / file), source / file
            name, image = _labelme_image(source, file, content)
            if name in used:
                raise UserError(f"{path}: its image {brief(name)} has another JSON already; expected one JSON for an image")
            used.add(name)
            yield Record(name, image, partial(_labelme_instances, path, content, found, taken))
        yield from (Record(name, source / name) for name in images if name not in used)
    found.records = records()
    return found


def _labelme_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({brief(str(error))}); save it again in labelme") from None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise UserError(f"{path}: has no list `shapes`, so labelme did not write it; take it out of the folder")
    return content


def _labelme_image(source: Path, file: str, content: dict) -> tuple[str, Path | bytes]:
    """Name and file of the image that a JSON is about: the one that it names, or the one of its own stem, or the one that it holds."""
    path, said = source / file, content.get("imagePath")
    fault = name_fault(said)
    if isinstance(said, str):          # written on Windows, perhaps; ../images/a.jpg is sound where it stays below the source
        name = os.path.normpath(os.path.join(os.path.dirname(file), said.replace("\\", "/")))
        fault = name_fault(name)
        if not fault and (source / name).is_file():
            return Path(name).as_posix(), source / name
    beside = [name for name in sorted(os.listdir(path.parent)) if Path(name).stem == path.stem and Path(name).suffix.lower() in _endings()]
    if beside:
        name = os.path.normpath(os.path.join(os.path.dirname(file), beside[0]))
        return name, source / name
    if not content.get("imageData"):
        raise UserError(f"{path}: imagePath {brief(said)} {fault or 'is not there'}, no image is called {path.stem} and imageData is empty; "
                        f"put the image beside the JSON")
    try:
        held = base64.b64decode(content["imageData"], validate=True)
        with Image.open(io.BytesIO(held), formats=FORMATS) as image:
            return str(Path(file).with_suffix(f".{image.format.lower()}")), held
    except Exception:                  # Pillow raises a dozen types for what is one thing to the user
        raise UserError(f"{path}: there is no image file, and its imageData is no image; put the image beside the JSON") from None


def _labelme_instances(path: Path, content: dict, found: Source, taken: dict, size: tuple[int, int]) -> list[Instance]:
    """Shapes of one label with one group_id are one instance."""
    stated = content.get("imageHeight"), content.get("imageWidth")
    if stated != (None, None) and stated != size:
        raise UserError(f"{path}: states an image of {brief(stated)}, but it is {size} (height, width, turned as EXIF says); save the annotation again with this image")
    groups: dict = defaultdict(list)
    for place, shape in enumerate(content["shapes"]):
        where = f"{path}: shapes[{place}]"
        try:
            label, kind, group = shape["label"], shape.get("shape_type"), shape.get("group_id")
            known = isinstance(label, str) and group.__class__ in (type(None), int, str)
        except (KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise UserError(f"{where} is {brief(shape)}, expected an object with label and points, and a number as group_id")
        kind = "polygon" if kind is None else kind                # older versions knew nothing else
        if kind in SHAPELESS:
            found.passed["points and lines"] += 1
            continue
        if label in UNNAMED:
            found.passed[f"shapes labelled {label}"] += 1
            continue
        if kind not in ("polygon", "rectangle", "circle", "mask"):
            raise UserError(f"{where} has shape_type {brief(kind)}; available: polygon, rectangle, circle, mask, and {', '.join(SHAPELESS)}, which are passed over")
        if label not in found.classes:
            claim_name(taken, label, where)
            found.classes[label] = (label, True, None)
        points = _points(shape.get("points"), size, where)
        if kind in ("circle", "mask") and len(points) != 2:
            raise UserError(f"{where}: a {kind} of {len(points)} points, expected 2")
        draw = {"circle": partial(_circle, points, size), "mask": partial(_box_mask, shape.get("mask"), points, size, where)}.get(kind)
        if kind == "rectangle" and len(points) == 2:
            points = points[[0, 0, 1, 1]] * [1, 0] + points[[0, 1, 1, 0]] * [0, 1]
        groups[(label, place) if group is None else (label, "group", group)].append(draw or partial(_polygon, points, size))
    return [Instance(key[0], partial(_join, draws)) for key, draws in groups.items()]


# ------------------------------------------------------------------------------------------------------- coco-instances

def coco_instances(source: Path, taken: dict) -> Source:
    """One JSON, or instances_train*.json and instances_val*.json, in the folder or its `annotations`."""
    folders = [folder for folder in (source, source / "annotations") if folder.is_dir()]
    pair = [[path for folder in folders for path in sorted(folder.glob(f"instances_{part}*.json"))] for part in ("train", "val")]
    every = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    chosen = dict(zip(("train", "val"), pair[0] + pair[1])) if all(len(paths) == 1 for paths in pair) else {"": every[0]} if len(every) == 1 else {}
    if not chosen:
        raise UserError(f"{source}: {brief([path.name for path in every])} in it and its `annotations`; expected instances_train*.json and instances_val*.json, "
                        f"or one JSON alone")
    contents, classes = {part: (path, read_json(path)) for part, path in chosen.items()}, {}
    for part, (path, content) in contents.items():
        for c in content["categories"]:
            sound = isinstance(c, dict) and type(c.get("id")) is int and 0 < c["id"] < MAX_ID - 1
            if not sound or part != "val" and c["id"] in classes or classes.get(c["id"], (c.get("name"),))[0] != c.get("name"):
                raise UserError(f"{path}: category {brief(c)}: expected a whole number from 1 on as id, of one category and the same in all files, and a name")
            if c["id"] not in classes:
                claim_name(taken, c.get("name"), f"{path}: category {c['id']}")
                classes[c["id"]] = (c["name"], True, None)
    records = [record for part, (path, content) in contents.items() for record in _coco_records(source, part, path, content, classes)]
    return Source(records, len(records), classes, Counter())


def _coco_records(source: Path, part: str, path: Path, content: dict, classes: dict) -> Iterator[Record]:
    of, seen = defaultdict(list), set()
    try:
        for place, a in enumerate(content["annotations"]):
            of[a["image_id"]].append((place, a))
            if a["category_id"] not in classes:
                raise UserError(f"{path}: annotations[{place}] has category {brief(a['category_id'])}, which is not among the categories")
    except (KeyError, TypeError):
        raise UserError(f"{path}: annotations[{place}] is {brief(a)}, expected an object with image_id, category_id and segmentation") from None
    own = [*(f"{p}2017" for p in (part,) if p), *(p for p in (part,) if p), "images", *([] if part else ["train2017", "val2017"]), "."]
    for place, entry in enumerate(content["images"]):
        try:
            key, said = entry["id"], entry["file_name"]
            twice = key in seen
            seen.add(key)
            found = of.pop(key, None)
            stated = entry.get("height"), entry.get("width")
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: images[{place}] is {brief(entry)}, expected an object with id and file_name") from None
        name = said.replace("\\", "/") if isinstance(said, str) else said
        if twice or name_fault(name):
            raise UserError(f"{path}: image {brief(key)}: file_name {brief(said)} {name_fault(name) or 'has the id of another image'}; mend images[{place}]")
        image = next((source / folder / name for folder in own if (source / folder / name).is_file()), None)
        if image is None:
            raise UserError(f"{source / own[0] / name}: no such file, nor in {', '.join(str(source / folder) for folder in own[1:])}; "
                            f"put the images there, or take {brief(name)} from {path.name}")
        yield Record(name, image, partial(_coco_instances, path, name, stated, found) if found else None, part)
    if of:
        raise UserError(f"{path}: annotations[{next(iter(of.values()))[0][0]}] is of image {brief(next(iter(of)))}, which is not among the images, or twice")


def _coco_instances(path: Path, name: str, stated: tuple, annotations: list[tuple[int, dict]], size: tuple[int, int]) -> list[Instance]:
    if stated != (None, None) and stated != size:
        raise UserError(f"{path}: states {brief(stated)} for image {name}, but it is {size} (height, width, turned as EXIF says); mend what wrote the JSON")
    instances = []
    for place, a in annotations:
        where, form, crowd = f"{path}: annotations[{place}]", a.get("segmentation"), a.get("iscrowd") or 0
        if crowd not in (0, 1) or form is not None and not isinstance(form, (list, dict)):
            raise UserError(f"{where}: segmentation {brief(form)}, iscrowd {brief(crowd)}; expected polygons or run lengths, and 0 or 1")
        if isinstance(form, dict):
            draw = partial(_rle, form, size, where)
        else:
            draw = partial(_join, [partial(_polygon, _points(p, size, where, flat=True), size) for p in form or []])
        instances.append(Instance(a["category_id"], draw, bool(crowd)))
    return instances


# ------------------------------------------------------------------------------------------- maps: cityscapes and masks

def cityscapes(source: Path, taken: dict) -> Source:
    """leftImg8bit/PART/CITY/*_leftImg8bit.png with gtFine/PART/CITY/*_gtFine_instanceIds.png; images of train_extra are unlabelled."""
    records = []
    for part in ("train", "train_extra", "val"):
        for image in sorted((source / "leftImg8bit" / part).glob("*/*_leftImg8bit.png")):
            ids = source / "gtFine" / part / image.parent.name / image.name.replace("_leftImg8bit.png", "_gtFine_instanceIds.png")
            records.append(Record(image.name, image, partial(_cityscapes_instances, ids) if ids.is_file() else None, part.removesuffix("_extra")))
    if not records:
        raise UserError(f"{source / 'leftImg8bit'}: no PART/CITY/*_leftImg8bit.png with PART train or val; expected the layout of the Cityscapes downloads")
    return Source(records, len(records), {k: (name, k >= FIRST_THING, colour) for k, (name, colour) in CITYSCAPES.items()}, Counter())


def _cityscapes_instances(path: Path, size: tuple[int, int]) -> list[Instance]:
    """Values from 1000 on are class * 1000 + k, an instance; below, a class: stuff, or a group of things that nobody told apart, which is crowd."""
    instances = []
    for value, draw in _values(path, size):
        k = value // 1000 if value >= 1000 * FIRST_THING else value
        if k in CITYSCAPES:
            instances.append(Instance(k, draw, value == k >= FIRST_THING))
    return instances


def mask_maps(source: Path, taken: dict) -> Source:
    """images/NAME.* with masks/CLASS/NAME.png, or masks/NAME.png, whose class is `object`."""
    every = _files(source / "images")
    images = [name for name in every if "/" not in name]
    if not images:
        raise UserError(f"{source / 'images'}: no images in this folder; expected images/NAME.* and masks/CLASS/NAME.png")
    stems, maps = {Path(name).stem for name in images}, defaultdict(list)
    for file in _files(source / "masks"):
        folder, _, name = file.rpartition("/")
        if not name.lower().endswith(".png") or "/" in folder or name[:-4] not in stems:
            raise UserError(f"{source / 'masks' / file}: expected masks/CLASS/NAME.png, and an image images/NAME.*; rename it, or take it out of the folder")
        maps[name[:-4]].append((folder or "object", source / "masks" / file))
    classes = {name: (name, True, None) for name in sorted({name for rows in maps.values() for name, _ in rows})}
    for name in classes:
        claim_name(taken, name, str(source / "masks"))
    read = lambda rows, size: [Instance(name, draw) for name, path in rows for _, draw in _values(path, size)]
    records = [Record(name, source / "images" / name, partial(read, maps[Path(name).stem]) if Path(name).stem in maps else None) for name in images]
    return Source(records, len(records), classes, Counter({"images in folders of images/": len(every) - len(images)}))


def _values(path: Path, size: tuple[int, int]) -> list[tuple[int, Callable[[], Patch]]]:
    """Values of an integer map (8 or 16 bits; of a palette its indices) but 0, and how to draw each. Raises: UserError if it is no such map of this (H, W)."""
    stored = np.asarray(open_image(path, None))
    if stored.ndim != 2 or stored.dtype.kind not in "biu":
        raise UserError(f"{path}: {stored.dtype} of shape {stored.shape}, expected a map of whole numbers with one channel")
    if stored.shape != size:
        raise UserError(f"{path}: {stored.shape[1]} x {stored.shape[0]} pixels, but its image has {size[1]} x {size[0]} (turned as EXIF says); expected one size")
    values, places = np.unique(stored, return_inverse=True)
    numbers = places.reshape(size).astype(np.int32) + 1
    draw = lambda n, where: (where[0].start, where[1].start, numbers[where] == n)
    return [(int(value), partial(draw, n, where)) for n, (value, where) in enumerate(zip(values, ndimage.find_objects(numbers)), 1) if value]


READERS = {"labelme": labelme, "coco-instances": coco_instances, "cityscapes": cityscapes, "masks": mask_maps}


# --------------------------------------------------------------------------------------------------------------- shapes

def _points(value, size: tuple[int, int], where: str, flat: bool = False) -> np.ndarray:
    """(N, 2) x, y in pixels, from pairs or, if flat, from x, y, x, y, ...; they may lie outside of the image, but not by more than its size."""
    try:
        points = np.array(value, np.float64).reshape(-1, 2) if flat else np.array(value or np.zeros((0, 2)), np.float64)
        sound = points.ndim == 2 and points.shape[1] == 2 and (np.abs(points - np.array(size[::-1]) / 2) <= 1.5 * np.array(size[::-1])).all()           # false for NaN
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise UserError(f"{where}: points {brief(value)}, expected pairs of numbers, x and y in pixels of an image of {size[1]} x {size[0]}")
    return points


def _box(low: np.ndarray, high: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """left, top, right, bottom of the pixels of an image between two points."""
    left, top = (max(0, math.floor(v)) for v in low)
    right, bottom = (min(end, math.ceil(v)) for v, end in zip(high, size[::-1]))
    return left, top, max(left, right), max(top, bottom)


def _polygon(points: np.ndarray, size: tuple[int, int]) -> Patch:
    """Drawn twice as large, where corners of pixels are even and centres odd: an outline through corners takes no centre along."""
    if len(points) < 3:
        return 0, 0, np.zeros((0, 0), bool)
    corners = np.floor(points + 0.5).astype(int)
    left, top, right, bottom = _box(corners.min(0), corners.max(0), size)
    canvas = Image.new("L", (2 * (right - left) + 1, 2 * (bottom - top) + 1))
    ImageDraw.Draw(canvas).polygon([*map(tuple, (2 * (corners - [left, top])).tolist())], fill=1)
    return top, left, np.asarray(canvas)[1::2, 1::2] > 0


def _circle(points: np.ndarray, size: tuple[int, int]) -> Patch:
    """points: the centre, and one on the rim."""
    (x, y), radius = points[0], math.dist(*points)
    left, top, right, bottom = _box(points[0] - radius, points[0] + radius, size)
    ys, xs = np.ogrid[top:bottom, left:right]
    return top, left, (xs + 0.5 - x) ** 2 + (ys + 0.5 - y) ** 2 <= radius ** 2


def _box_mask(held, points: np.ndarray, size: tuple[int, int], where: str) -> Patch:
    """labelme's mask: a PNG of the pixels from the first to the last point, both included."""
    (left, top), (right, bottom) = points.astype(int).tolist()
    expected = (right - left + 1, bottom - top + 1)
    try:
        with Image.open(io.BytesIO(base64.b64decode(held, validate=True)), formats=("PNG",)) as image:
            if image.size != expected or not (0 <= left and 0 <= top and right < size[1] and bottom < size[0]):
                raise UserError(f"{where}: a mask of {image.width} x {image.height} from {brief([left, top])} to {brief([right, bottom])}, expected one that fills this box, "
                                f"in an image of {size[1]} x {size[0]}")
            return top, left, np.asarray(image.convert("L")) > 0
    except UserError:
        raise
    except Exception:                  # Pillow raises a dozen types for what is one thing to the user
        raise UserError(f"{where}: its mask {brief(held)} is no PNG in base64; save the annotation again in labelme") from None


def _rle(form: dict, size: tuple[int, int], where: str) -> Patch:
    """COCO's run lengths, as a list or as compressed text."""
    try:
        counts = form["counts"]
        if list(form["size"]) != list(size):
            raise ValueError(f"size {brief(form['size'])}")
        if isinstance(counts, str):
            return 0, 0, decode_rle(form)
        counts = np.array(counts)
        if counts.dtype.kind != "i" or counts.ndim != 1 or (counts < 0).any() or (counts > size[0] * size[1]).any() or counts.sum() != size[0] * size[1]:
            raise ValueError("the run lengths do not fill it")
        return 0, 0, np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[::-1]).T
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: run lengths {brief(form)}, expected those of {list(size)}, the height and width of its image ({brief(str(error))})") from None


def _join(draws: list[Callable[[], Patch]]) -> Patch:
    """The union of several patches."""
    patches = [patch for patch in (draw() for draw in draws) if patch[2].size]
    if len(patches) < 2:
        return patches[0] if patches else (0, 0, np.zeros((0, 0), bool))
    top, left = (min(patch[axis] for patch in patches) for axis in (0, 1))
    whole = np.zeros([max(patch[axis] + patch[2].shape[axis] for patch in patches) - first for axis, first in enumerate((top, left))], bool)
    for y, x, mask in patches:
        whole[y - top:y - top + mask.shape[0], x - left:x - left + mask.shape[1]] |= mask
    return top, left, whole


# ---------------------------------------------------------------------------------------------------------------- names

def _endings() -> set[str]:
    return {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}


def _files(folder: Path, endings: tuple[str, ...] = ()) -> list[str]:
    """Paths below the folder, sorted, with slashes, of images or of files with these endings; links to folders and hidden folders are passed over."""
    wanted = {f".{ending}" for ending in endings} or _endings()
    found = (Path(os.path.relpath(os.path.join(at, name), folder)) for at, _, names in os.walk(folder) for name in names)
    return sorted(path.as_posix() for path in found if path.suffix.lower() in wanted and not any(part.startswith(".") for part in path.parts))


def claim_name(taken: dict[str, str], name, where: str) -> None:
    """Raise UserError if a class name is none, or its first synonym is that of another class or of the background."""
    first = name.split(",")[0].strip() if isinstance(name, str) else ""
    if not first or name_fault(first.replace("/", "_").replace(".", "_")):
        raise UserError(f"{where}: {brief(name)} cannot be the name of a class; expected text without control characters")
    if first in taken:
        raise UserError(f"{where}: the class {brief(name)} is called like {taken[first]}; rename one of them")
    taken[first] = f"the background, {brief(name)}" if where == "--background" else f"the class {brief(name)}"

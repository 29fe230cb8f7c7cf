"""Annotations of labelme, COCO instances, Cityscapes and folders of masks, read into records of instances that can be drawn (for `importer.py`).

    labelme         a JSON beside every image: polygons, rectangles, circles, masks
    coco-instances  JSON files with images, annotations and categories: polygons or run lengths
    cityscapes      leftImg8bit/ and gtFine/: maps of instance ids, with stuff
    masks           images/NAME.* and masks/CLASS/NAME.*: maps of instances, of classes, or binary

A reader takes the folder and the class names that are taken; it raises UserError for whatever is not what its format says, when an image's turn comes at the latest.
Polygons are filled by pycocotools: a pixel belongs to a shape if its centre does, as nearly as
COCO's own tools say. Coordinates count from the corner of the image,
so that a square from 2 to 5 has three pixels a side. What is marked as to be ignored, or was
annotated without a mask, is void.
Links to folders are followed; a linked file may not lead out of the source, or of the linked folder
that it is in.
Axes: H W pixels, N points.
"""

import base64
import io
import json
import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Callable, Iterable, Iterator
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from ground.errors import UserError
from readers.mask_files import decode_rle
from readers.panoptic_json import MAX_ID, read_json
from readers.pictures import FORMATS, brief, name_fault, open_image

CITYSCAPES = {  # the 19 classes of the evaluation: label id -> name, colour; from 24 on they are things
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}
FIRST_THING = 24
SHAPELESS = ("point", "points", "line", "linestrip")  # of labelme: have no area
# Kinds that have corners: of labelme, and of its descendants.
CORNERED = ("polygon", "rectangle", "oriented_rectangle", "rotation", "quadrilateral")
STROKE = 10  # pixels, width of a line as labelme's own converters draw it
DOT = 5  # pixels, radius of a point, likewise
VOID = None  # category of pixels that are not looked at
REST = ""  # category of pixels that belong to the background
UNNAMED = {"__ignore__": VOID, "_background_": REST}  # for labelme's own converters no classes
# What the value 0 of a map of classes is often called, and what it is.
NO_CLASS = {
    **dict.fromkeys(("_background_", "background"), "_background_"),
    **dict.fromkeys(("void", "unlabeled", "unlabelled", "ignore"), "__ignore__"),
}
PARTS = {
    word: part
    for part, words in (
        ("train", "train training"),
        ("val", "val valid validation"),
        ("test", "test testing"),
    )
    for word in words.split()
}
# Folders among images that hold other pictures.
NO_PHOTOS = {
    "masks",
    "mask",
    "maps",
    "labels",
    "annotations",
    "panoptic",
    "segmentationclass",
    "segmentationobject",
    "visualization",
    "visualizations",
    "overlay",
    "overlays",
    "depth",
}
# Paths of a server, as Label Studio writes them, or of another machine's disk: only their last part
# is the name of a file.
UPLOADED = re.compile(r"^(/|\w+:/)|(^|/)(upload|local-files)(/|$)")
FORMS = ("instances", "classes", "binary")  # what the values of a map may mean
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")  # endings of files that keep no exact values
# What a mask's name may have behind that of its image: a word, or the number of an instance.
SUFFIX = re.compile(
    r"[_\-. ]+((masks?|labels?|seg|segmentation|gt|instances?|annotation)|"
    r"((mask|instance|inst|object|obj|cell)[_\-. ]*)?(?P<number>\d+))"
)
VOC_VOID = (224, 224, 192)  # colour of 255, void, in the palette of Pascal VOC
Patch = tuple[
    int, int, np.ndarray
]  # top, left, (h, w) bool: pixels of an instance, inside of the image


@dataclass
class Instance:
    """category: a key of Source.classes, VOID or REST.   draw: its pixels, made anew at every call,
    so that one mask at a time is in memory.
    around: what it covers at most; void, below all instances, if it has no pixel of its own (a box
    without a mask, a line)."""

    category: str | int | None
    draw: Callable[[], Patch]
    crowd: bool = False
    around: Callable[[], Patch] | None = None


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
    passed: what was passed over.   notes: lines that say what was guessed, joined or followed."""

    records: Iterable[Record]
    count: int
    classes: dict[str | int, tuple[str, bool, tuple[int, int, int] | None]]
    passed: Counter
    notes: list[str] = field(default_factory=list)


# -------------------------------------------------------------------------------------------------------------- labelme


def labelme(source: Path, taken: dict) -> Source:
    """A JSON beside every image, or elsewhere below the folder; images that no JSON names are unlabelled."""
    files, images = _files(source, ("json",)), _files(source)
    if not files:
        raise UserError(
            f"{source}: no *.json in this folder; expected labelme's, one for every annotated image"
        )
    found = Source((), len(images), {}, Counter())

    def records() -> Iterator[Record]:
        used = set()
        for file in files:
            content, path = _labelme_json(source / file), source / file
            name, image = _labelme_image(source, file, content)
            if name in used:
                raise UserError(
                    f"{path}: its image {brief(name)} has another JSON already; expected one JSON for an image"
                )
            used.add(name)
            yield Record(name, image, partial(_labelme_instances, path, content, found, taken))
        yield from (Record(name, source / name) for name in images if name not in used)

    found.records = records()
    return found


def _labelme_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a readable JSON file ({brief(str(error))}); save it again in labelme"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise UserError(
            f"{path}: has no list `shapes`, so labelme did not write it; take it out of the folder"
        )
    return content


def _labelme_image(source: Path, file: str, content: dict) -> tuple[str, Path | bytes]:
    """Name and image of a JSON: the one that it names, or of its own stem, or of the name's last
    part beside it, or the one that it holds."""
    path, folder, said = source / file, os.path.dirname(file), content.get("imagePath")
    fault, last = name_fault(said), ""
    if isinstance(
        said, str
    ):  # written on Windows, perhaps; ../images/a.jpg is sound where it stays below the source
        name = os.path.normpath(os.path.join(folder, said.replace("\\", "/")))
        fault, last = name_fault(name), os.path.basename(name)
        if not fault and _is_picture(
            source / name
        ):  # a tutorial of labelme's own names the JSON itself
            return Path(name).as_posix(), source / name
    here = sorted(name for name in os.listdir(path.parent) if _is_picture(path.parent / name))
    beside = [name for name in here if Path(name).stem == path.stem]
    if len(beside) > 1 and last not in beside:
        raise UserError(
            f"{path}: imagePath {brief(said)} {fault or 'is not there'}, and {beside[0]} and "
            f"{beside[1]} have the stem of this JSON; "
            "put the right name into imagePath"
        )
    chosen = last if last in beside or not beside and last in here else next(iter(beside), None)
    if chosen:
        name = os.path.normpath(os.path.join(folder, chosen))
        return Path(name).as_posix(), source / name
    if not content.get("imageData"):
        raise UserError(
            f"{path}: imagePath {brief(said)} {fault or 'is not there'}, no image is called {path.stem} and imageData is empty; "
            f"put the image beside the JSON"
        )
    try:
        held = base64.b64decode(content["imageData"], validate=True)
        with Image.open(io.BytesIO(held), formats=FORMATS) as image:
            return Path(file).with_suffix(f".{image.format.lower()}").as_posix(), held
    except Exception:  # Pillow raises a dozen types for what is one thing to the user
        raise UserError(
            f"{path}: there is no image file, and its imageData is no image; put the image beside the JSON"
        ) from None


def _labelme_instances(
    path: Path, content: dict, found: Source, taken: dict, size: tuple[int, int]
) -> list[Instance]:
    """Shapes of one label with one group_id are one instance. What has no area, or is of an unknown
    kind, is void where nothing else is."""
    stated = content.get("imageHeight"), content.get("imageWidth")
    if stated != (None, None) and stated != size:
        raise UserError(
            f"{path}: states an image of {brief(stated)}, but it is {size} (height, width, turned as EXIF says); save the annotation again with this image"
        )
    groups, instances = defaultdict(list), []
    for place, shape in enumerate(content["shapes"]):
        where = f"{path}: shapes[{place}]"
        try:
            label, kind, group = shape["label"], shape.get("shape_type"), shape.get("group_id")
            known = isinstance(label, str) and group.__class__ in (type(None), int, str)
        except (KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise UserError(
                f"{where} is {brief(shape)}, expected an object with label and points, and a number as group_id"
            )
        kind = "polygon" if kind is None else kind  # older versions knew nothing else
        if not isinstance(kind, str):
            raise UserError(f"{where} has shape_type {brief(kind)}, expected text, such as polygon")
        points = _points(shape.get("points"), size, where)
        around = (
            partial(_stroke, points, size, kind)
            if kind in SHAPELESS
            else partial(_filled, points, size)
        )
        if label in UNNAMED:
            found.passed[f"shapes labelled {label}"] += 1
        elif kind in SHAPELESS:
            found.passed["points and lines"] += 1
        elif kind not in (*CORNERED, "circle", "mask"):
            found.passed[f"shapes of the unknown type {brief(kind)}"] += 1
        if kind not in (*CORNERED, "circle", "mask"):
            instances.append(Instance(VOID, _nothing, around=around))
            continue
        if label not in UNNAMED and label not in found.classes:
            claim_name(taken, label, where)
            found.classes[label] = (label, True, None)
        if kind in ("circle", "mask") and len(points) != 2:
            raise UserError(f"{where}: a {kind} of {len(points)} points, expected 2")
        draw = {
            "circle": partial(_circle, points, size),
            "mask": partial(_box_mask, shape.get("mask"), points, size, where),
        }.get(kind)
        if kind == "rectangle" and len(points) == 2:
            points = points[[0, 0, 1, 1]] * [1, 0] + points[[0, 1, 1, 0]] * [0, 1]
        key = (
            (UNNAMED.get(label, label), place)
            if group is None
            else (UNNAMED.get(label, label), "group", group)
        )
        groups[key].append((draw or partial(_polygon, points, size), around))
    for (category, *_), shapes in groups.items():
        draws, arounds = zip(*shapes)
        instances.append(Instance(category, partial(_join, draws), around=partial(_join, arounds)))
    return instances


# ------------------------------------------------------------------------------------------------------- coco-instances


def coco_instances(source: Path, taken: dict) -> Source:
    """JSON files as COCO, Roboflow, CVAT, FiftyOne, Label Studio and labelme2coco lay them out:
    one, or one for each of train, val and test.

    Pictures that no JSON lists are unlabelled images if they lie where listed ones do, or in a
    folder called unlabeled; others are left out and counted.
    """
    found, pictures = Source((), 0, {}, Counter()), _files(source)
    chosen = _coco_files(source, found.notes)
    contents = {part: (path, read_json(path)) for part, path in chosen.items()}
    keys = _coco_classes(contents, found, taken)
    files: dict[str, Record] = {}  # by real path
    roots: dict[str, str] = {}  # folders of listed images, and of which part they are
    # What is listed for validation is not trained on, too; where both parts share a folder, its
    # other pictures are for training.
    for part in sorted(contents, key=["", "val", "train", "test"].index):
        path, content = contents[part]
        for record, root in _coco_records(source, part, path, content, keys[part], found, pictures):
            roots[root] = part if part == "train" else roots.get(root, part)
            real = os.path.realpath(record.image)
            other = files.setdefault(real, record)
            if other is record:
                continue
            if other.part != part:
                found.passed[f"entries of {path.name} whose image {other.part} has, too"] += 1
            else:  # one file under two ids: all of its annotations
                found.passed["entries of images that are listed twice (joined)"] += 1
                parts = [r.read for r in (other, record) if r.read]
                other.read = partial(_together, parts) if parts else None
    records = [record for record in files.values() if record.part != "test"]
    found.passed["images of a test set"] += len(files) - len(records)
    records += _coco_unlisted(source, pictures, files, roots, found)
    _tell_apart(source, records, found.notes)
    found.records, found.count = records, len(records)
    return found


def _part(path: str) -> str:
    """train, val, test, or nothing: what the name of a file says, or else those of its folders,
    from the inside out."""
    for name in reversed(PurePosixPath(path).with_suffix("").parts):
        parts = {PARTS[word] for word in re.split("[^a-z]+", name.lower()) if word in PARTS}
        if len(parts) == 1:
            return parts.pop()
    return ""


def _coco_files(source: Path, notes: list[str]) -> dict[str, Path]:
    """The JSON of each part: the nearest to the top; where some are called instances*, only
    those."""
    every = _files(source, ("json",))
    depth = {name: len(PurePosixPath(name.replace("annotations/", "")).parts) for name in every}
    near = [name for name in every if depth[name] == 1] or [
        name for name in every if depth[name] == 2
    ]
    near = [name for name in near if PurePosixPath(name).name.startswith("instances")] or near
    parts = defaultdict(list)
    for name in near:
        parts[_part(name) if len(near) > 1 else ""].append(source / name)
    if (
        not near
        or any(len(paths) > 1 for paths in parts.values())
        or len(parts) > 1
        and ("" in parts or "train" not in parts)
    ):
        listed = [PurePosixPath(name).name if depth[name] == 1 else name for name in near]
        raise UserError(
            f"{source}: {brief(listed)} in it and its `annotations`; expected "
            "instances_train*.json and instances_val*.json, "
            f"or one JSON alone, or a pair in train/ and valid/"
        )
    if set(parts) == {"train", "test"}:
        parts["val"] = parts.pop("test")
        notes.append(
            f"{parts['val'][0].relative_to(source)} is taken for validation: there is a training "
            "and a test set, and no other"
        )
    return {part: parts[part][0] for part in ("", "train", "val", "test") if part in parts}


def _coco_classes(
    contents: dict[str, tuple[Path, dict]], found: Source, taken: dict
) -> dict[str, dict]:
    """Keys of classes by category id, for each file; files are joined by name. Of two categories of
    one name one that nothing uses is left out, and so is one
    that only groups others (Roboflow's category 0)."""
    used = set()
    for path, content in contents.values():
        names = {}
        for c in content["categories"]:
            sound = isinstance(c, dict) and type(c.get("id")) is int and 0 <= c["id"] < MAX_ID - 1
            if not sound or c["id"] in names:
                raise UserError(
                    f"{path}: category {brief(c)}: expected a whole number from 0 on as id, of one "
                    "category, and a name"
                )
            names[c["id"]] = c.get("name")
            if not isinstance(c.get("name"), str):
                claim_name({}, c.get("name"), f"{path}: category {c['id']}")
        numbers = [a.get("category_id") for a in content["annotations"] if isinstance(a, dict)]
        used |= {(number, names.get(number)) for number in numbers if isinstance(number, int)}
    keys, joined = {part: {} for part in contents}, {}
    for part, (path, content) in contents.items():
        mine = {}
        for c in content["categories"]:
            number, name = c["id"], c["name"]
            others = [other for other in content["categories"] if other is not c]
            same = any(other["name"] == name for other in others)
            group = c.get("supercategory") in (None, "", "none", name) and any(
                other.get("supercategory") == name for other in others
            )
            if name in UNNAMED:
                keys[part][number] = UNNAMED[name]
            elif (number, name) not in used and (same or group):
                why = "another has its name" if same else "it groups others"
                line = f"category {number}, {brief(name)}, is left out: nothing uses it, and {why}"
                found.notes += [line] if line not in found.notes else []
            elif name in joined:
                keys[part][number] = joined[name]
            else:
                claim_name(taken, name, f"{path}: category {number}")
                key = number if number not in found.classes else max(found.classes) + 1
                if key != number:
                    found.notes.append(
                        f"{path.name}: category {number}, {brief(name)}, has the id of a class of "
                        f"another file; it is number {key} here"
                    )
                found.classes[key] = (name, True, None)
                keys[part][number] = mine[name] = key
        joined |= mine
    return keys


def _coco_folders(source: Path, path: Path, part: str) -> list[str]:
    """Where the images of a JSON may be, the likeliest first, relative to the source."""
    own = path.parent.relative_to(source).as_posix()
    home = own.removesuffix("annotations").strip("/")
    spellings = [word for word, meaning in PARTS.items() if meaning == part]
    if part:
        names = [
            f"{part}2017",
            *spellings,
            *(f"images/{name}" for name in (f"{part}2017", *spellings)),
            "images",
            "data",
        ]
    else:
        names = [
            "images",
            "train2017",
            "val2017",
            "data",
            "JPEGImages",
            "images/default",
            *(f"{at}{p}" for at in ("", "images/") for p in PARTS),
        ]
    homes = [own, home, f"{home}/images"] if home not in ("", ".") else []
    return [*dict.fromkeys([*homes, *names, "."])]


def _coco_image(
    source: Path,
    path: Path,
    name: str,
    part: str,
    folders: list[str],
    pictures: list[str],
    uploaded: bool,
) -> tuple[Path, str]:
    """The file of an image, and its folder. Raises: UserError if there is none, or if two could be
    meant."""
    first = name.split("/")[0]
    short = name.partition("/")[2] if first in (*PARTS, "images", "data") else ""
    there = [
        (source / at / name, at)
        for at in folders
        if not uploaded and (source / at / name).is_file()
    ]
    there = there or [
        (source / at / short, at)
        for at in folders
        if short and not uploaded and (source / at / short).is_file()
    ]
    clear = {os.path.realpath(file): (file, at) for file, at in there if _part(f"{at}/x")}
    if not part and len(clear) > 1:
        two = [str(file) for file, _ in clear.values()][:2]
        raise UserError(
            f"{path}: {brief(name)} is {two[0]} as well as {two[1]}; put the folder into its "
            "file_name, or take one of them out"
        )
    if there:
        return there[0]
    ending = f"/{PurePosixPath(name).name if uploaded else name}"
    meant = [file for file in pictures if f"/{file}".endswith(ending)]
    meant = [
        file for file in meant if part and _part(os.path.dirname(file) + "/x") == part
    ] or meant
    if len(meant) > 1:
        raise UserError(
            f"{path}: {brief(name)} may be {source / meant[0]} or {source / meant[1]}; put the "
            "folder into its file_name, or take one of them out"
        )
    if not meant:
        raise UserError(
            f"{source / folders[0] / name}: no such file, nor in "
            f"{', '.join(str(source / folder) for folder in folders[1:])}; "
            f"put the images there, or take {brief(name)} from {path.name}"
        )
    return source / meant[0], f"/{meant[0]}".removesuffix(ending).strip("/") or "."


def _coco_records(
    source: Path,
    part: str,
    path: Path,
    content: dict,
    keys: dict,
    found: Source,
    pictures: list[str],
) -> Iterator[tuple[Record, str]]:
    """Records of a JSON, and the folder that each was found in."""
    of, ids = defaultdict(list), {}
    try:
        for place, a in enumerate(content["annotations"]):
            of[a["image_id"]].append((place, a))
            if a["category_id"] not in keys:
                raise UserError(
                    f"{path}: annotations[{place}] has category {brief(a['category_id'])}, which is not among the categories"
                )
    except (KeyError, TypeError):
        raise UserError(
            f"{path}: annotations[{place}] is {brief(a)}, expected an object with image_id, category_id and segmentation"
        ) from None
    _require_pixels(path, content["annotations"])
    folders = _coco_folders(source, path, part)
    for place, entry in enumerate(content["images"]):
        try:
            key, said = entry["id"], entry["file_name"]
            twice = key in ids
            again = twice and ids[key] == said
            ids[key] = said
            annotations = of.pop(key, None)
            stated = entry.get("height"), entry.get("width")
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: images[{place}] is {brief(entry)}, expected an object with id and file_name"
            ) from None
        name = said.replace("\\", "/") if isinstance(said, str) else said
        if isinstance(name, str) and name.startswith(f"{os.path.abspath(source)}/"):
            name = os.path.relpath(name, os.path.abspath(source))
        uploaded = isinstance(name, str) and bool(UPLOADED.search(name))
        if uploaded:
            name = PurePosixPath(unquote(re.split("[?&]d=", name)[-1])).name
        elif isinstance(name, str) and ".." in name.split(
            "/"
        ):  # sound where it stays below the source
            name = os.path.normpath(os.path.join(path.parent.relative_to(source), name))
        if twice and not again or name_fault(name):
            raise UserError(
                f"{path}: image {brief(key)}: file_name {brief(said)} {name_fault(name) or 'has the id of another image'}; mend images[{place}]"
            )
        if again:
            continue
        name = os.path.normpath(name)
        image, root = _coco_image(source, path, name, part, folders, pictures, uploaded)
        read = (
            partial(_coco_instances, path, name, stated, annotations, keys, found)
            if annotations
            else None
        )
        yield Record(name, image, read, part), root
    if of:
        raise UserError(
            f"{path}: annotations[{next(iter(of.values()))[0][0]}] is of image {brief(next(iter(of)))}, which is not among the images, or twice"
        )


def _require_pixels(path: Path, annotations: list[dict]) -> None:
    """Raise UserError if all polygons lie between 0 and 1: shares of the image, as Azure ML
    exports them, of which nothing but single pixels would be left."""
    forms = [a.get("segmentation") for a in annotations]
    parts = [part for form in forms if isinstance(form, list) for part in form]
    values = [v for part in parts if isinstance(part, list) for v in part]
    numbers = [v for v in values if isinstance(v, (int, float))]
    if numbers and max(numbers) <= 1:
        raise UserError(
            f"{path}: no point of a polygon is above 1, so they are shares of the image; expected "
            "pixels: multiply x by the width and y by the height of its image"
        )


def _together(reads: list[Callable], size: tuple[int, int]) -> list[Instance]:
    return [instance for read in reads for instance in read(size)]


def _coco_unlisted(
    source: Path, pictures: list[str], files: dict, roots: dict[str, str], found: Source
) -> Iterator[Record]:
    """Records of the pictures that no JSON lists."""
    parted = "train" in roots.values()
    train = "train" if parted else ""
    listed, passed = (
        {os.path.dirname(os.path.relpath(record.image, source)) for record in files.values()},
        Counter(),
    )
    for file in pictures:
        if os.path.realpath(source / file) in files:
            continue
        folder = PurePosixPath(file).parent.as_posix()
        at = max(
            (root for root in roots if root != "." and f"{folder}/".startswith(f"{root}/")),
            key=len,
            default=None,
        )
        inner = folder if at is None else folder.removeprefix(at)
        part = None if at is None else roots[at]
        if at is None and ("" if folder == "." else folder) in listed:
            part = roots.get(".", train)
        if part is not None and parted:  # images/ may be the root of images/train and images/val
            part = _part(f"{folder}/x") or part
        if any(word.startswith(("unlabeled", "unlabelled")) for word in folder.lower().split("/")):
            part = train
        if part is None or NO_PHOTOS & {*inner.lower().split("/")}:
            passed[folder] += 1
        elif part == "test":
            found.passed["images of a test set"] += 1
        else:
            yield Record(file.removeprefix(f"{at}/"), source / file, None, part)
    if passed:
        found.passed["pictures that no JSON lists"] += passed.total()
        found.notes.append(
            f"left out are the pictures in {', '.join(sorted(passed)[:5])}: no JSON lists one "
            "there; to use them, put them beside the others, or into unlabeled/"
        )


def _tell_apart(source: Path, records: list[Record], notes: list[str]) -> None:
    """Files of one name get the names of their folders, too."""
    count = Counter(record.name.casefold() for record in records)
    several = [record for record in records if count[record.name.casefold()] > 1]
    for record in several:
        record.name = PurePosixPath(os.path.relpath(record.image, source)).as_posix()
    if several:
        notes.append(
            f"{len(several)} images share their names, so the folders are part of these: "
            f"{', '.join(record.name for record in several[:2])}, ..."
        )


def _coco_instances(
    path: Path,
    name: str,
    stated: tuple,
    annotations: list[tuple[int, dict]],
    keys: dict,
    found: Source,
    size: tuple[int, int],
) -> list[Instance]:
    if stated != (None, None) and stated != size:
        raise UserError(
            f"{path}: states {brief(stated)} for image {name}, but it is {size} (height, width, turned as EXIF says); mend what wrote the JSON"
        )
    instances = []
    for place, a in annotations:
        where, form, crowd = (
            f"{path}: annotations[{place}]",
            a.get("segmentation"),
            a.get("iscrowd") or 0,
        )
        if crowd not in (0, 1) or form is not None and not isinstance(form, (list, dict)):
            raise UserError(
                f"{where}: segmentation {brief(form)}, iscrowd {brief(crowd)}; expected polygons or run lengths, and 0 or 1"
            )
        if (
            form and isinstance(form, list) and all(isinstance(v, (int, float)) for v in form)
        ):  # one polygon, not a list of them
            form = [form]
        if isinstance(form, dict):
            draw = partial(_rle, form, size, where)
        else:
            draw = partial(
                _join,
                [partial(_polygon, _points(p, size, where, flat=True), size) for p in form or []],
            )
        category = keys[a["category_id"]]
        if a.get("ignore") in (1, True):
            category = VOID
            found.passed["objects marked as to be ignored"] += 1
        instances.append(
            Instance(category, draw, bool(crowd), partial(_coco_around, a, size, where))
        )
    return instances


def _coco_around(a: dict, size: tuple[int, int], where: str) -> Patch:
    """The box of an annotation, or else that of its polygons."""
    if a.get("bbox"):
        corner, extent = _points(a["bbox"], size, where, flat=True, number=2)
        return _filled(np.stack([corner, corner + extent]), size)
    form = a.get("segmentation")
    parts = (
        [_points(p, size, where, flat=True) for p in form]
        if isinstance(form, list) and form and isinstance(form[0], list)
        else []
    )
    return _filled(np.concatenate(parts), size) if parts else _nothing()


# ------------------------------------------------------------------------------------------- maps: cityscapes and masks


def cityscapes(source: Path, taken: dict) -> Source:
    """leftImg8bit/PART/CITY/*_leftImg8bit.png with gtFine/PART/CITY/*_gtFine_instanceIds.png; images of train_extra are unlabelled."""
    records, passed = [], Counter()
    for part in ("train", "train_extra", "val"):
        maps = {*(source / "gtFine" / part).glob("*/*_gtFine_instanceIds.png")}
        for image in sorted((source / "leftImg8bit" / part).glob("*/*_leftImg8bit.png")):
            ids = (
                source
                / "gtFine"
                / part
                / image.parent.name
                / image.name.replace("_leftImg8bit.png", "_gtFine_instanceIds.png")
            )
            others = (
                []
                if ids.is_file()
                else sorted(ids.parent.glob(ids.name.replace("instanceIds.png", "*")))
            )
            if others:
                raise UserError(
                    f"{ids}: missing, though {others[0].name} is there; unpack the whole "
                    "gtFine_trainvaltest.zip"
                )
            maps.discard(ids)
            records.append(
                Record(
                    image.name,
                    image,
                    partial(_cityscapes_instances, ids) if ids.is_file() else None,
                    part.removesuffix("_extra"),
                )
            )
        passed["maps without an image"] += len(maps)
    if not records:
        raise UserError(
            f"{source / 'leftImg8bit'}: no PART/CITY/*_leftImg8bit.png with PART train or val; expected the layout of the Cityscapes downloads"
        )
    passed["images of a test set"] = len(
        [*(source / "leftImg8bit" / "test").glob("*/*_leftImg8bit.png")]
    )
    return Source(
        records,
        len(records),
        {k: (name, k >= FIRST_THING, colour) for k, (name, colour) in CITYSCAPES.items()},
        passed,
    )


def _cityscapes_instances(path: Path, size: tuple[int, int]) -> list[Instance]:
    """Values from 1000 on are class * 1000 + k, an instance; below, a class: stuff, or a group of things that nobody told apart, which is crowd."""
    instances = []
    for value, draw in _values(path, size):
        k = value // 1000 if value >= 1000 * FIRST_THING else value
        if k in CITYSCAPES:
            instances.append(Instance(k, draw, value == k >= FIRST_THING))
    return instances


def mask_maps(
    source: Path, taken: dict, form: str = "", names: str = "", stuff: frozenset = frozenset()
) -> Source:
    """images/NAME.* with masks/CLASS/NAME.* or masks/NAME.*, whose class is `object`, or one file
    an instance: masks/CLASS/NAME_3.*, masks/CLASS/NAME/*.*,
    masks/NAME/*.*; or both folders divided into train/ and val/.

    form: one of FORMS, or empty: guessed from the values, and said.    names: of the values of a
    map of classes, see `_value_names`; or masks/classes.txt.
    stuff: names of classes; of a map of classes the others are things, each connected region one;
    if none is named, all of them are stuff.
    """
    found = Source([], 0, {}, Counter())
    every = _files(source / "images")
    tops = {name.split("/")[0] for name in every}
    divided = bool(tops) and all("/" in name for name in every) and tops <= {*PARTS}
    places = (
        [(source / "images" / top, source / "masks" / top, PARTS[top]) for top in sorted(tops)]
        if divided
        else [(source / "images", source / "masks", "")]
    )
    files = []  # (image, its name, part, [(class, file, whether it is one instance)])
    if not divided and all("/" in name for name in every):
        raise UserError(
            f"{source / 'images'}: no images in this folder; expected images/NAME.* and masks/CLASS/NAME.png"
        )
    for images, masks, part in places:
        files += _mask_files(images, masks, part, found)
    rows = [row for *_, rows in files for row in rows]
    flat = [path for label, path, single in rows if not label and not single]
    values = _value_names(source, names) if flat or names else {}
    if names and (not flat or form in ("instances", "binary")):
        raise UserError(
            "--classes: names the values of maps of classes, masks/NAME.png, and there are none; "
            f"the folders of {source / 'masks'} name the classes of others"
        )
    forms = _mask_forms(rows, form, values, found.notes)
    if "classes" in forms.values():
        if len(flat) < len(rows):
            odd = next(path for _, path, _ in rows if path not in flat)
            raise UserError(
                f"{odd}: is of one class, or one instance, already, and maps of classes "
                "(masks/NAME.png) hold all; take one kind out, or change --masks-are"
            )
        if not values:
            raise UserError(
                f"{source / 'masks'}: maps of classes, and nothing says what the values mean; "
                "expected --classes NAME,NAME,... for the values from 1 on "
                f"(or 7:NAME,11:NAME,...), or masks/classes.txt with a name a line"
            )
        classes = {value: name for value, name in values.items() if name not in UNNAMED}
        found.notes.append(
            "classes without --stuff: each is stuff, one segment an image"
            if not stuff
            else "classes that --stuff does not name are things, each connected region an instance"
        )
    else:
        labels = {label or "object" for label, *_ in rows} - UNNAMED.keys()
        classes = {label: label for label in sorted(labels)}
    for key, name in classes.items():
        claim_name(taken, name, str(source / "masks"))
        found.classes[key] = (
            name,
            forms.get("") != "classes" or bool(stuff) and first_name(name) not in stuff,
            None,
        )
    read = partial(_read_masks, forms, values, found)
    found.records = [
        Record(name, image, partial(read, rows) if rows else None, part)
        for image, name, part, rows in files
        if part != "test"
    ]
    found.passed["images of a test set"] += len(files) - len(found.records)
    found.count = len(found.records)
    _tell_apart(source, found.records, found.notes)
    return found


def _mask_files(images: Path, masks: Path, part: str, found: Source) -> list[tuple]:
    """(image, name, part, [(class or "", file, whether it is one instance)]) of all images of a
    folder."""
    every = _files(images)
    names = [name for name in every if "/" not in name]
    found.passed["images in folders of images/"] += len(every) - len(names)
    stems = defaultdict(list)
    for name in names:
        stems[Path(name).stem].append(name)
    files = [PurePosixPath(file) for file in sorted({*_files(masks), *_files(masks, ("npy",))})]
    tops = {file.parts[0] for file in files if len(file.parts) == 2}
    by_image = (
        bool(tops)
        and tops <= stems.keys()
        and not all(file.stem in stems for file in files if len(file.parts) == 2)
    )
    exact = {file.parent for file in files if file.stem in stems and len(file.parts) <= 2}
    maps = defaultdict(list)
    for file in files:
        label, stem, single = "" if len(file.parts) == 1 else file.parts[0], file.stem, False
        if len(file.parts) == 3 or len(file.parts) == 2 and by_image:
            label, stem, single = "" if by_image else label, file.parts[-2], True
        elif stem not in stems and stem in {
            name for several in stems.values() for name in several
        }:  # a.jpg.png
            maps[stem].append((label, masks / file, False))
            continue
        elif stem not in stems and file.parent not in exact:
            before = max(
                (
                    known
                    for known in stems
                    if SUFFIX.fullmatch(stem.removeprefix(known)) and stem.startswith(known)
                ),
                key=len,
                default="",
            )
            stem, single = (
                before,
                bool(before) and bool(SUFFIX.fullmatch(stem.removeprefix(before))["number"]),
            )
        if len(file.parts) > 3 or stem not in stems:
            raise UserError(
                f"{masks / file}: expected masks/CLASS/NAME.png, and an image images/NAME.*; "
                "rename it, or take it out of the folder"
            )
        if len(stems[stem]) > 1:
            raise UserError(
                f"{masks / file}: is of {stems[stem][0]} or of {stems[stem][1]}; call it "
                f"{stems[stem][0]}.png, or rename one of the images"
            )
        if not single and (
            twice := next(
                (path for other, path, one in maps[stems[stem][0]] if other == label and not one),
                None,
            )
        ):
            raise UserError(
                f"{masks / file}: {twice} is the map of this class and image already; take one of "
                "them out"
            )
        maps[stems[stem][0]].append((label, masks / file, single))
    return [(images / name, name, part, maps.get(name, [])) for name in names]


def _value_names(source: Path, names: str) -> dict[int, str]:
    """Names of the values of a map of classes: from 1 on, or from 0 if the first is a background,
    or called as NO_CLASS says, or from -1 if it is __ignore__; or `7:road,11:building`.

    names: separated by commas; empty: the lines of classes.txt or labels.txt in masks/ or beside
    it, if there is one. 0 and 255 are void where nothing names them
    (0 is the background, if there is one).
    """
    file = next(
        (
            path
            for folder in (source / "masks", source)
            for path in (folder / "classes.txt", folder / "labels.txt")
            if path.is_file()
        ),
        None,
    )
    if not names and file is None:
        return {}
    where = "--classes" if names else str(file)
    try:
        rows = names.split(",") if names else file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: not a readable list of class names ({brief(str(error))})"
        ) from None
    rows = [row.strip() for row in rows if row.strip()]
    # A list of numbers and names may have a space or a comma between them. Some classes are called
    # "2 wheeler": only if every line begins with a number, it is one.
    stated = [re.fullmatch(r"(\d+)\s*[:=]\s*(.+)", row) for row in rows]
    if not any(stated):
        loose = [re.fullmatch(r"(\d+)\s*[\s,;]\s*(\D.*)", row) for row in rows]
        stated = loose if all(loose) else stated
    if any(stated) and not all(stated) or not rows:
        raise UserError(
            f"{where}: {brief(rows)}, expected a name for each value from 1 on, or value:name for "
            "all of them"
        )
    first = rows[0].lower()
    start = -1 if first == "__ignore__" else 0 if first in NO_CLASS else 1
    pairs = (
        [(int(m[1]), m[2].strip()) for m in stated] if any(stated) else [*enumerate(rows, start)]
    )
    if (
        len({value for value, _ in pairs}) < len(pairs)
        or max(value for value, _ in pairs) >= MAX_ID - 1
    ):
        raise UserError(f"{where}: a value is named twice, or is none; expected distinct ones")
    known = {
        value: NO_CLASS.get(name.lower(), name) if value == 0 else name for value, name in pairs
    }
    return {0: "_background_", 255: "__ignore__"} | {
        value: name for value, name in known.items() if value >= 0
    }


def _mask_forms(rows: list[tuple], form: str, values: dict, notes: list[str]) -> dict[str, str]:
    """What the values mean, by class. A guess is a note; where the values could be classes as well
    as instances, it is an error."""
    forms = {}
    for label in sorted({label for label, *_ in rows}):
        paths = [path for other, path, single in rows if other == label and not single]
        singles = sum(other == label and single for other, _, single in rows)
        where = f"masks/{label}" if label else "masks"
        if singles:
            notes.append(
                f"{where}: {singles} files are taken for one instance each, all that is not black"
            )
        if not paths:
            forms[label] = "binary"
        elif form:
            forms[label] = form
        elif not label and values:
            forms[label] = "classes"
            notes.append(
                f"{where}: taken as maps of classes, since their values have names; else say "
                "--masks-are instances"
            )
        else:
            forms[label] = _guess(where, paths, notes)
            if forms[label] == "instances":
                other = "classes, with --classes" if not label else "binary"
                notes.append(
                    f"{where}: every value is taken for an instance; else say --masks-are {other}"
                )
    if forms.get("", "classes") != "classes":
        notes.append(
            "masks: what is in no folder of a class is of the class `object`; to name it, put it "
            "into masks/NAME/"
        )
    return forms


def _guess(where: str, paths: list[Path], notes: list[str]) -> str:
    """instances or binary, from all maps of a class. Raises: UserError if they look like maps of
    classes."""
    grey, several, wide, voc, odd, seen = 0, False, False, False, [], Counter()
    for path in paths:
        stored, colour = _stored(path)
        found = {int(value) for value in np.unique(stored)} - {0}
        grey += path.suffix.lower() in LOSSY or _is_soft(stored)
        seen.update(found)
        voc |= colour == VOC_VOID
        wide |= stored.dtype.itemsize > 1
        several |= len(found) == 1 and ndimage.label(stored, np.ones((3, 3)))[1] > 1
        found.discard(255)
        if found and (voc or found != {*range(1, len(found) + 1)}):
            odd.append(path)
    if grey:
        notes.append(
            f"{where}: {grey} of {len(paths)} masks have grey levels between black and white, so "
            "all are taken as binary ones: from half of white on it is the "
            f"class, each connected region an instance; else say --masks-are instances"
        )
        return "binary"
    every = {*seen}
    # Of one class a single value is white, whatever its number (65535 of 16 bits; 128, 200, ...).
    if len(every) < 2 and (where != "masks" or every <= {1, 255, 65535}):
        if several:
            notes.append(
                f"{where}: taken as binary masks, each connected region an instance; else say "
                "--masks-are instances (one an image), or name the class with --stuff"
            )
        return "binary"
    recurring = any(count > 1 for value, count in seen.items() if value != 255)
    if where == "masks" and odd and not wide and (voc or recurring):
        raise UserError(
            f"{odd[0]}: its values may be classes or instances (of these maps they are "
            f"{brief(sorted(every)[:12])}); "
            f"say --masks-are classes, with --classes NAME,NAME,..., or --masks-are instances"
        )
    return "instances"


def _is_soft(stored: np.ndarray) -> bool:
    """Whether a map is a binary one with soft edges: white, and levels between in a thin rim, or in
    very many steps."""
    levels = np.unique(stored)
    between = (stored > 0) & (stored < 255)
    if (
        stored.dtype != np.uint8
        or levels[-1] != 255
        or np.count_nonzero((levels > 0) & (levels < 255)) < 2
    ):
        return False
    white, middle = (stored >= 240).sum(), ((stored >= 16) & (stored < 240)).sum()
    thin = (
        ndimage.binary_erosion(between, np.ones((3, 3))).sum() <= 0.05 * between.sum()
        and (np.diff(levels) > 1).any()
    )
    return bool(thin or len(levels) > 16 and white >= middle)


def _read_masks(
    forms: dict, values: dict, found: Source, rows: list[tuple], size: tuple[int, int]
) -> list[Instance]:
    """Instances of the masks of one image."""
    instances = []
    for label, path, single in rows:
        form, key = forms[label], UNNAMED.get(label, label or "object")
        stored, colour = _stored(path, size)
        if form != "binary" and not single and path.suffix.lower() in LOSSY:
            raise UserError(
                f"{path}: JPEG keeps no exact values; save maps of {form} as PNG, or say "
                "--masks-are binary"
            )
        if single or form == "binary":
            white = _white(stored, path.suffix.lower() in LOSSY)
            regions = white.astype(np.int32) if single else ndimage.label(white, np.ones((3, 3)))[0]
            instances += [Instance(key, draw) for number, draw in _parts(regions + 1) if number]
            continue
        for value, draw in _parts_of(stored):
            name = values.get(value) if form == "classes" else None
            if form == "classes" and name is None:
                raise UserError(
                    f"{path}: has the value {value}, which has no name; named are "
                    f"{brief(sorted(values))}; name it with --classes, or in classes.txt"
                )
            if name in UNNAMED or value == 255 and colour == VOC_VOID:
                instances.append(Instance(UNNAMED.get(name, VOID), draw))
            elif form == "classes":
                things = found.classes[value][1]
                regions = (
                    ndimage.label(stored == value, np.ones((3, 3)))[0]
                    if things
                    else (stored == value).astype(np.int32)
                )
                instances += [
                    Instance(value, part) for number, part in _parts(regions + 1) if number
                ]
            elif value:
                instances.append(Instance(key, draw))
    return instances


def _white(stored: np.ndarray, lossy: bool) -> np.ndarray:
    """(H, W) bool: what a binary mask covers: all that is not 0; or, where there are levels up to
    white, or JPEG's noise, from half of white on."""
    levels = np.unique(stored)
    white = 255 if levels[-1] < 256 else 65535
    soft = lossy or np.count_nonzero(levels) > 1 and levels[-1] > 0.9 * white
    return stored > white / 2 if soft else stored > 0


def _stored(path: Path, size: tuple[int, int] | None = None) -> tuple[np.ndarray, tuple | None]:
    """(H, W) whole numbers of a map (of a palette its indices; of three equal channels one), and
    the palette's colour of 255. Raises: UserError if it is no such
    map, or not of this (H, W)."""
    colour = None
    if path.suffix.lower() == ".npy":
        try:
            stored = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: not a readable array ({brief(str(error))})") from None
    else:
        image = open_image(path, None)
        frames = 1
        if path.suffix.lower() in (".tif", ".tiff", ".gif", ".webp"):
            with Image.open(path, formats=FORMATS) as whole:
                frames = getattr(whole, "n_frames", 1)
        if frames > 1:
            raise UserError(
                f"{path}: has {frames} frames, expected one map; save them as files of their own"
            )
        if image.mode == "P" and len(image.getpalette() or ()) == 768:
            colour = tuple(image.getpalette()[-3:])
        stored = _black_and_white(image) if image.mode == "P" else np.asarray(image)
    if stored.ndim == 3 and stored.shape[2] in (2, 4) and (stored[..., -1] == 255).all():
        stored = stored[..., :-1] if stored.shape[2] == 4 else stored[..., 0]  # no pixel is clear
    if stored.ndim == 3 and stored.shape[2] == 3 and (stored == stored[..., :1]).all():
        stored = stored[..., 0]
    if (
        stored.dtype.kind == "f"
        and stored.ndim == 2
        and (stored == np.floor(stored)).all()
        and (np.abs(stored) < 2**31).all()
    ):
        stored = stored.astype(np.int64)
    if stored.ndim != 2 or stored.dtype.kind not in "biu":
        raise UserError(
            f"{path}: {stored.dtype} of shape {stored.shape}, expected a map of whole numbers with one channel"
        )
    if size is not None and stored.shape != size:
        raise UserError(
            f"{path}: {stored.shape[1]} x {stored.shape[0]} pixels, but its image has {size[1]} x {size[0]} (turned as EXIF says); expected one size"
        )
    return stored, colour


def _black_and_white(image: Image.Image) -> np.ndarray:
    """(H, W) indices of a map with a palette; of one of black and white alone 0 and 255, since
    some tools make white the first of the two."""
    stored, colours = np.asarray(image), np.array(image.getpalette("RGB")).reshape(-1, 3)
    used = np.unique(stored)
    white = (colours == 255).all(1)
    plain = (white | (colours == 0).all(1)).all() and white.any() and not white.all()
    if not plain or used[-1] >= len(colours) or np.bincount(white[used]).max() > 1:
        return stored
    return np.where(white[stored], 255, 0).astype(np.uint8)


def _values(path: Path, size: tuple[int, int]) -> list[tuple[int, Callable[[], Patch]]]:
    """Values of an integer map but 0, and how to draw each."""
    return [(value, draw) for value, draw in _parts_of(_stored(path, size)[0]) if value]


def _parts_of(stored: np.ndarray) -> list[tuple[int, Callable[[], Patch]]]:
    """Values of a map, and how to draw each."""
    values, places = np.unique(stored, return_inverse=True)
    return [
        (int(values[n]), draw)
        for n, draw in _parts(places.reshape(stored.shape).astype(np.int32) + 1)
    ]


def _parts(numbers: np.ndarray) -> list[tuple[int, Callable[[], Patch]]]:
    """Of a map with values from 1 on: each value that is there, less 1, and how to draw it."""
    draw = lambda n, where: (where[0].start, where[1].start, numbers[where] == n)
    return [
        (n - 1, partial(draw, n, where))
        for n, where in enumerate(ndimage.find_objects(numbers), 1)
        if where
    ]


READERS = {
    "labelme": labelme,
    "coco-instances": coco_instances,
    "cityscapes": cityscapes,
    "masks": mask_maps,
}


# --------------------------------------------------------------------------------------------------------------- shapes


def _points(
    value, size: tuple[int, int], where: str, flat: bool = False, number: int | None = None
) -> np.ndarray:
    """(N, 2) x, y in pixels, from pairs or, if flat, from x, y, x, y, ...; they may lie outside of
    the image, but not by more than its size.   number: expected N."""
    try:
        points = (
            np.array(value, np.float64).reshape(-1, 2)
            if flat
            else np.array(value or np.zeros((0, 2)), np.float64)
        )
        sound = (
            number in (None, len(points))
            and points.ndim == 2
            and points.shape[1] == 2
            and (np.abs(points - np.array(size[::-1]) / 2) <= 1.5 * np.array(size[::-1])).all()
        )  # false for NaN
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise UserError(
            f"{where}: points {brief(value)}, expected pairs of numbers, x and y in pixels of an image of {size[1]} x {size[0]}"
        )
    return points


def _box(low: np.ndarray, high: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """left, top, right, bottom of the pixels of an image between two points."""
    left, top = (max(0, math.floor(v)) for v in low)
    right, bottom = (min(end, math.ceil(v)) for v, end in zip(high, size[::-1]))
    return left, top, max(left, right), max(top, bottom)


def _polygon(points: np.ndarray, size: tuple[int, int]) -> Patch:
    """Filled by pycocotools, in its box alone: bit for bit what it fills in the whole image."""
    if len(points) < 3:
        return _nothing()
    left, top, right, bottom = _box(points.min(0), points.max(0), size)
    if left == right or top == bottom:
        return _nothing()
    shift = np.array([left, top])
    # It rounds to fifths of a pixel. Done before the shift, so that the shift moves no vertex to
    # another fifth.
    moved = np.where(shift > 0, np.trunc(5 * points + 0.5) / 5 - shift, points)
    (filled,) = _pycocotools().frPyObjects([moved.ravel().tolist()], bottom - top, right - left)
    return (
        top,
        left,
        decode_rle({**filled, "counts": filled["counts"].decode()}),
    )  # its own decode() is deprecated by numpy


def _pycocotools():
    """Imported when the first polygon is filled: nothing else needs it."""
    from pycocotools import mask

    return mask


def _filled(points: np.ndarray, size: tuple[int, int]) -> Patch:
    """All pixels that the box around these points touches."""
    if not len(points):
        return _nothing()
    left, top, right, bottom = _box(points.min(0), points.max(0), size)
    return top, left, np.ones((bottom - top, right - left), bool)


def _stroke(points: np.ndarray, size: tuple[int, int], kind: str) -> Patch:
    """A line through the points, or a dot at each, as thick as labelme's own converters draw
    them."""
    image = Image.new("L", size[::-1])
    draw = ImageDraw.Draw(image)
    if kind.startswith("line") and len(points) > 1:
        draw.line([*map(tuple, points.tolist())], fill=1, width=STROKE)
    for x, y in points.tolist():
        draw.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), fill=1)
    return 0, 0, np.asarray(image) > 0


def _nothing() -> Patch:
    return 0, 0, np.zeros((0, 0), bool)


def _circle(points: np.ndarray, size: tuple[int, int]) -> Patch:
    """points: the centre, and one on the rim."""
    (x, y), radius = points[0], math.dist(*points)
    left, top, right, bottom = _box(points[0] - radius, points[0] + radius, size)
    ys, xs = np.ogrid[top:bottom, left:right]
    return top, left, (xs + 0.5 - x) ** 2 + (ys + 0.5 - y) ** 2 <= radius**2


def _box_mask(held, points: np.ndarray, size: tuple[int, int], where: str) -> Patch:
    """labelme's mask: a PNG of the pixels from the first to the last point, both included."""
    (left, top), (right, bottom) = points.astype(int).tolist()
    expected = (right - left + 1, bottom - top + 1)
    try:
        with Image.open(
            io.BytesIO(base64.b64decode(held, validate=True)), formats=("PNG",)
        ) as image:
            if image.size != expected or not (
                0 <= left and 0 <= top and right < size[1] and bottom < size[0]
            ):
                raise UserError(
                    f"{where}: a mask of {image.width} x {image.height} from {brief([left, top])} to {brief([right, bottom])}, expected one that fills this box, "
                    f"in an image of {size[1]} x {size[0]}"
                )
            return top, left, np.asarray(image.convert("L")) > 0
    except UserError:
        raise
    except Exception:  # Pillow raises a dozen types for what is one thing to the user
        raise UserError(
            f"{where}: its mask {brief(held)} is no PNG in base64; save the annotation again in labelme"
        ) from None


def _rle(form: dict, size: tuple[int, int], where: str) -> Patch:
    """COCO's run lengths, as a list or as compressed text."""
    try:
        counts = form["counts"]
        if list(form["size"]) != list(size):
            raise ValueError(f"size {brief(form['size'])}")
        if isinstance(counts, str):
            return 0, 0, decode_rle(form)
        counts = np.array(counts)
        if (
            counts.dtype.kind != "i"
            or counts.ndim != 1
            or (counts < 0).any()
            or (counts > size[0] * size[1]).any()
            or counts.sum() != size[0] * size[1]
        ):
            raise ValueError("the run lengths do not fill it")
        return 0, 0, np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[::-1]).T
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{where}: run lengths {brief(form)}, expected those of {list(size)}, the height and width of its image ({brief(str(error))})"
        ) from None


def _join(draws: list[Callable[[], Patch]]) -> Patch:
    """The union of several patches."""
    patches = [patch for patch in (draw() for draw in draws) if patch[2].size]
    if len(patches) < 2:
        return patches[0] if patches else _nothing()
    top, left = (min(patch[axis] for patch in patches) for axis in (0, 1))
    whole = np.zeros(
        [
            max(patch[axis] + patch[2].shape[axis] for patch in patches) - first
            for axis, first in enumerate((top, left))
        ],
        bool,
    )
    for y, x, mask in patches:
        whole[y - top : y - top + mask.shape[0], x - left : x - left + mask.shape[1]] |= mask
    return top, left, whole


# ---------------------------------------------------------------------------------------------------------------- names


def _endings() -> set[str]:
    return {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _endings() and path.is_file()


def _files(folder: Path, endings: tuple[str, ...] = ()) -> list[str]:
    """Paths below the folder, sorted, with slashes, of images or of files with these endings; links
    to folders are followed, and what is hidden is passed over."""
    wanted = {f".{ending}" for ending in endings} or _endings()
    paths = [
        PurePosixPath(os.path.relpath(os.path.join(at, name), folder))
        for at, _, names in _walk(folder)
        for name in names
    ]
    return sorted(path.as_posix() for path in paths if path.suffix.lower() in wanted)


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, into linked folders, too, but not into one that it is inside of; without hidden
    files and folders and those that macOS adds."""
    chain = {str(folder): (os.path.realpath(folder),)}
    for at, folders, names in os.walk(folder, followlinks=True):
        inner = {
            name: os.path.realpath(os.path.join(at, name))
            for name in sorted(folders)
            if not name.startswith(".") and name != "__MACOSX"
        }
        folders[:] = [name for name, real in inner.items() if real not in chain[at]]
        chain |= {os.path.join(at, name): (*chain[at], inner[name]) for name in folders}
        yield at, folders, sorted(name for name in names if not name.startswith("."))


def follow_links(source: Path) -> list[str]:
    """Lines that say which links to folders are followed. Raises: UserError if a linked file leads
    out of the source and of every linked folder."""
    folders, files = {str(source): os.path.realpath(source)}, []
    for at, inner, names in _walk(source):
        links = [os.path.join(at, name) for name in inner]
        folders |= {path: os.path.realpath(path) for path in links if os.path.islink(path)}
        files += [
            path for path in (os.path.join(at, name) for name in names) if os.path.islink(path)
        ]
    inside = tuple(os.path.join(real, "") for real in folders.values())
    for path in files:
        if not os.path.realpath(path).startswith(inside):
            raise UserError(
                f"{path}: is a link that leads out of the source, to {os.path.realpath(path)}; "
                "expected a file (a whole folder may be a link): copy it there"
            )
    links = [
        f"{os.path.relpath(path, source)} -> {real}"
        for path, real in folders.items()
        if path != str(source)
    ]
    return (
        [
            f"{len(links)} linked folders are followed: "
            f"{', '.join(links[:3])}{', ...' * (len(links) > 3)}"
        ]
        if links
        else []
    )


def first_name(name: str) -> str:
    """The first of the names of a class."""
    return name.split(",")[0].strip()


def claim_name(taken: dict[str, str], name, where: str) -> None:
    """Raise UserError if a class name is none, or its first synonym is that of another class or of the background."""
    first = name.split(",")[0].strip() if isinstance(name, str) else ""
    if not first or name_fault(first.replace("/", "_").replace(".", "_")):
        raise UserError(
            f"{where}: {brief(name)} cannot be the name of a class; expected text without control characters"
        )
    if first in taken:
        raise UserError(
            f"{where}: the class {brief(name)} is called like {taken[first]}; rename one of them"
        )
    taken[first] = (
        f"the background, {brief(name)}" if where == "--background" else f"the class {brief(name)}"
    )

"""YOLO segmentation: data.yaml or classes.txt, images, and a text file of polygons for each, as
Ultralytics, Roboflow, CVAT and Label Studio lay them out.

A line is `class x1 y1 x2 y2 ...` in shares of the width and height. Five numbers are a box, which
has no mask and is void. An empty file says that nothing is in its image; an image without a file is
unlabelled (Ultralytics takes both for images without objects). A rotated box of four corners looks
like a polygon, and is read as one.    Axes: H W pixels, N points.
"""

import posixpath
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Container

import numpy as np
import yaml

from ground.errors import UserError
from readers.annotations import shapes
from readers.annotations.files import PARTS, list_files, part_of
from readers.annotations.others import hint
from readers.annotations.records import UNNAMED, VOID, Classes, Instance, Record, Source
from readers.annotations.shapes import Size
from readers.pictures import brief

OUTSIDE = 0.1  # of the width or height: how far a point may lie outside of its image
SEGMENTS = (
    "export polygons: from Roboflow YOLOv8 of an instance segmentation project, from CVAT "
    "Ultralytics YOLO Segmentation 1.0"
)
Keys = dict[int, int | str | None]  # number of a class -> key of Classes, VOID or REST


def read_yolo(folder: Path, classes: Classes) -> Source:
    """Images of data.yaml in its division, or all of the folder's; what is in the training and the
    validation part is for validation, where one part is not the other."""
    source, pictures = Source(), list_files(folder)
    file, content = _description(folder)
    keys = _name_classes(folder / file, content, classes)
    _require_one_list(folder, file, content["names"])
    texts = {*list_files(folder, ".txt")}
    if content.keys() & {"train", "val", "test"}:
        parts, gone = _stated_parts(folder, file, content, pictures, source.notes)
        left = [name for name in pictures if name not in parts and _label_of(name) in texts]
        _require_listed(folder / file, gone, left)
    else:
        parts = {name: part_of(name) for name in pictures}
    parts = _division(file, parts, source.notes)
    _count_unlisted(pictures, parts, source)
    labels = _labels(folder, parts, texts)
    _survey(folder, file, labels, len(parts), source)
    owned = {_label_of(name) for name in pictures}
    orphans = [text for text in texts - owned if "labels" in text.split("/")[:-1]]
    lost = [text for text in orphans if posixpath.basename(text) != "classes.txt"]
    source.passed["label files without an image"] += len(lost)
    if lost:
        source.notes.append(f"label files without an image: {brief(sorted(lost)[:3])}")
    records = []
    for name, part in parts.items():
        path = folder / labels[name] if name in labels else None
        read = partial(_instances, path, keys, source) if path else None
        records.append(Record(_short(name), folder / name, read, part))
    return source.settle(folder, records)


# ----------------------------------------------------------------------------------- data.yaml


def _description(folder: Path) -> tuple[str, dict]:
    """Path below the folder and content of the YAML that has `names`, or else of classes.txt."""
    found = {}
    for name in _nearest(list_files(folder, (".yaml", ".yml"))):
        try:
            content = yaml.safe_load((folder / name).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(
                f"{folder / name}: not a readable YAML file ({brief(str(error))})"
            ) from None
        if isinstance(content, dict) and "names" in content:
            found[name] = content
    if len(found) > 1:
        raise UserError(
            f"{folder}: {brief([*found])} have `names`; expected one data.yaml, so take the others "
            "out"
        )
    if found:
        return next(iter(found.items()))
    for name in _nearest(list_files(folder, "classes.txt")):
        lines = _lines(folder / name, "list of classes")
        return name, {"names": [line.strip() for _, line in lines]}
    raise UserError(
        f"{folder}: no data.yaml with `names` and no classes.txt in this folder; expected an "
        f"export in YOLO's format, with images/ and labels/"
        f"{hint(folder, 'yolo', too_deep=True)}"
    )


def _nearest(names: list[str]) -> list[str]:
    depth = min((name.count("/") for name in names), default=0)
    return [name for name in names if name.count("/") == depth <= 1]


def _name_classes(path: Path, content: dict, classes: Classes) -> Keys:
    """Fill `classes`, from `names`: a list, or an object with a name for each number."""
    names, keys = content["names"], {}
    rows = [*enumerate(names)] if isinstance(names, list) else []
    if isinstance(names, dict):
        rows = [(int(k) if str(k).isdecimal() else k, name) for k, name in names.items()]
    if not rows or not all(type(k) is int and isinstance(name, str) for k, name in rows):
        raise UserError(
            f"{path}: names {brief(names)}, expected a list of texts, or a text for each number; "
            "put quotes around what YAML takes for something else (no, on, 1)"
        )
    if content.get("nc", len(rows)) != len(rows):
        raise UserError(f"{path}: nc {brief(content['nc'])}, but {len(rows)} names; mend one")
    if content.get("kpt_shape"):
        raise UserError(f"{path}: has kpt_shape, so its labels are poses, not masks; {SEGMENTS}")
    for number, name in rows:
        if name in UNNAMED:
            keys[number] = UNNAMED[name]
        else:
            classes.add(number, name, f"{path}: names[{number}]")
            keys[number] = number
    return keys


def _require_one_list(folder: Path, file: str, names: list[str] | dict) -> None:
    """Raise UserError if a classes.txt, in the folder of this file or below, calls a number
    otherwise than `names`: nobody but its owner knows by which of them the labels were made."""
    stated = dict(enumerate(names) if isinstance(names, list) else names.items())
    stated = {int(number): name.strip() for number, name in stated.items()}
    home = posixpath.dirname(file)
    for other in list_files(folder, "classes.txt"):
        apart = other == file or not f"/{other}".startswith(f"/{home}".rstrip("/") + "/")
        lines = [] if apart else _lines(folder / other, "list of classes")
        for number, (_, line) in enumerate(lines):
            if stated.get(number, line.strip()) != line.strip():
                raise UserError(
                    f"{folder / other}: class {number} is {brief(line.strip())}, but "
                    f"{brief(stated[number])} in {file}; take out the one that is wrong"
                )


# ----------------------------------------------------------------------------------- images


def _stated_parts(
    folder: Path, file: str, content: dict, pictures: list[str], notes: list[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Part of each picture that the YAML lists, the first of val, train, test that has it; and what
    is not where it says, by key."""
    home = posixpath.dirname(file)
    places = {posixpath.dirname(name) for name in (*pictures, *list_files(folder, ".txt"))}
    above = [place.split("/") for place in places]
    places |= {"/".join(words[:k]) for words in above for k in range(len(words))}
    known = places | {*list_files(folder, ".txt")}
    root = _found(content.get("path") or ".", [home, ""], places, whole=True)
    bases = [*dict.fromkeys([home if root is None else root, home, ""])]
    listed, gone = defaultdict(dict), {}
    for key in ("val", "valid", "validation", "train", "test"):
        stated = content.get(key) or []
        for value in stated if isinstance(stated, list) else [stated]:
            place = _found(value, bases, known)
            if place is None:
                notes.append(f"{file}: {key} is {brief(value)}, which is not there")
                gone[key] = brief(value)
                continue
            if not f"/{place}".endswith(f"/{value.strip('./')}"):
                notes.append(f"{file}: {key} is {brief(value)}; taken is {brief(place or '.')}")
            if place.endswith(".txt"):
                listed[PARTS[key]] |= _listed(folder, place, bases, pictures)
            else:
                inside = f"{place}/" if place else ""
                own = [name for name in pictures if name.startswith(inside)]
                listed[PARTS[key]] |= dict.fromkeys(own)
    if not listed["train"] and not listed["val"]:
        raise UserError(
            f"{folder / file}: no picture where its train and val say "
            f"({brief([content.get('train'), content.get('val')])}); expected folders of images, "
            "or lists of them, below it (export with the images, and unpack all of it)"
        )
    if listed["train"] and {*listed["train"]} <= {*listed["val"]}:
        notes.append(
            f"{file}: all images of train are in val, too, so there is no division; those for "
            "validation are drawn (--val-share)"
        )
        return dict.fromkeys(sorted(listed["val"]), ""), gone
    parts = {}
    for part in ("val", "train", "test"):
        twice = [name for name in listed[part] if parts.setdefault(name, part) != part]
        if twice:
            notes.append(
                f"{file}: {len(twice)} images of {part} are in another part, too, and are left to "
                f"that: {brief(twice[0])}"
            )
    return dict(sorted(parts.items())), gone


def _require_listed(path: Path, gone: dict[str, str], left: list[str]) -> None:
    """Raise UserError if a part is not where the YAML says, and pictures with labels are where it
    says nothing of: then the part is called otherwise, and would be lost.

    gone: what it says, by key.   left: pictures with labels that no part has.
    """
    for key, value in gone.items():
        if left and PARTS[key] != "test":
            raise UserError(
                f"{path}: {key} is {value}, which is not there, but {posixpath.dirname(left[0])} "
                f"has pictures with labels that no part lists, {len(left)} in all; mend {key}, or "
                "take them out"
            )


def _found(stated, bases: list[str], known: Container[str], whole: bool = False) -> str | None:
    """The path below the source of what a file states, or else of the longest tail that is there:
    Roboflow says ../train/images of what lies beside, and others name another machine's disk. No
    tail is without the folder of its part.

    known: paths below the source.   whole: no tails.
    """
    if not isinstance(stated, str):
        return None
    words = [word for word in stated.replace("\\", "/").split("/") if word not in ("", ".")]
    for start in range(1 if whole else max(1, len(words))):
        if start and words[start - 1].lower() in PARTS:
            break
        for base in bases:
            path = posixpath.normpath(posixpath.join(base, *words[start:]))
            path = "" if path == "." else path
            if path in known:
                return path
    return None


def _listed(folder: Path, file: str, bases: list[str], pictures: list[str]) -> dict[str, None]:
    """Pictures that the lines of a text file name."""
    known, names = {*pictures}, {}
    for number, line in _lines(folder / file, "list of images"):
        name = _found(line.strip(), [posixpath.dirname(file), *bases], known)
        if name is None:
            raise UserError(
                f"{folder / file}: line {number}: {brief(line.strip())} is not there; put the "
                "images below this folder (CVAT: export with Save images), or take the line out"
            )
        names[name] = None
    return names


def _division(file: str, parts: dict[str, str], notes: list[str]) -> dict[str, str]:
    """The parts as a Record has them: none where there is no validation set, and a test set where
    there is no other."""
    used = {*parts.values()}
    if used == {"train", "test"}:
        notes.append(
            f"{file}: the test set is taken for validation: there is a training set, and no other"
        )
        return {name: "val" if part == "test" else part for name, part in parts.items()}
    if not used <= {"train", ""}:
        return parts
    if "train" in used:
        notes.append("there is no validation set; its images are drawn (--val-share)")
    return dict.fromkeys(parts, "")


def _count_unlisted(pictures: list[str], parts: dict[str, str], source: Source) -> None:
    """Add pictures in a folder called unlabeled to the parts; count the others that no part has."""
    passed = Counter()
    for name in pictures:
        place = posixpath.dirname(name)
        if name in parts:
            continue
        if any(word.startswith(("unlabeled", "unlabelled")) for word in place.lower().split("/")):
            parts[name] = "train" if any(parts.values()) else ""
        else:
            passed[place or "."] += 1
    if passed:
        source.passed["pictures that no part lists"] += passed.total()
        source.notes.append(
            f"left out are the pictures in {', '.join(sorted(passed)[:5])}: neither train nor val "
            "has them; to use them, put them into unlabeled/"
        )


def _short(name: str) -> str:
    """The name of an image without the folders of its part: what is behind images/ and train/."""
    words = name.split("/")
    inner = [k for k, word in enumerate(words[:-1], 1) if word.lower() in {"images", *PARTS}]
    return "/".join(words[max(inner, default=0) :])


# ----------------------------------------------------------------------------------- label files


def _label_of(name: str) -> str:
    """The label file of an image: its last folder `images` is `labels` there; or beside it."""
    words = posixpath.splitext(name)[0].split("/")
    for k in range(len(words) - 2, -1, -1):
        if words[k] == "images":
            words[k] = "labels"
            break
    return f"{'/'.join(words)}.txt"


def _labels(folder: Path, parts: dict[str, str], texts: set[str]) -> dict[str, str]:
    """Label file of each picture that has one. Raises: UserError if two share one."""
    labels, owners = {}, {}
    for name in parts:
        label = _label_of(name)
        if label in texts:
            other = owners.setdefault(label, name)
            if other != name:
                raise UserError(
                    f"{folder / label}: is of {other} or of {name}; rename one of them, or take it "
                    "out"
                )
            labels[name] = label
    return labels


def _survey(folder: Path, file: str, labels: dict[str, str], images: int, source: Source) -> None:
    """Say what is empty or missing. Raises: UserError if there is no label, or boxes alone."""
    if not labels:
        raise UserError(
            f"{folder}: {file}, but no label file for any of {images} images; expected "
            f"labels/NAME.txt for images/NAME.*{hint(folder, 'yolo')}"
        )
    empty, lines, polygons = 0, 0, 0
    for label in labels.values():
        own = _lines(folder / label)
        empty += not own
        lines += len(own)
        polygons += any(len(line.split()) != 5 for _, line in own)
    if lines and not polygons:
        raise UserError(
            f"{folder}: all {lines} lines of its label files are boxes (5 numbers), which have no "
            f"masks; {SEGMENTS}"
        )
    if empty:
        source.notes.append(
            f"{empty} images have an empty label file: annotated, and without an object; all of it "
            "is background if --background names one; take out the files of those that nobody "
            "looked at (Label Studio writes empty ones for them, too)"
        )
    if len(labels) < images:
        source.notes.append(
            f"{images - len(labels)} images have no label file and are taken as unlabelled; for an "
            "image without objects make an empty one"
        )


def _lines(path: Path, what: str = "text file") -> list[tuple[int, str]]:
    """Lines of a file that are not blank, with their numbers. what: it is, for the error."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable {what} ({brief(str(error))})") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _instances(path: Path, keys: Keys, source: Source, size: Size) -> list[Instance]:
    instances = []
    for number, line in _lines(path):
        where = f"{path}: line {number}"
        category, shares = _shape(line, keys, where)
        points = shares * size[::-1]
        draw, around = partial(shapes.polygon, points, size), partial(shapes.filled, points, size)
        if len(points) == 2:
            source.passed["boxes without a mask"] += 1
            category, draw = VOID, shapes.nothing
        instances.append(Instance(category, draw, around=around))
    return instances


def _shape(line: str, keys: Keys, where: str) -> tuple[int | str | None, np.ndarray]:
    """Category and points (N, 2) of a line, in shares of width and height; of a box two corners."""
    try:
        number, *values = (float(word) for word in line.split())
    except ValueError:
        raise UserError(
            f"{where}: {brief(line)}, expected numbers: class x1 y1 x2 y2 ..."
        ) from None
    if number not in keys:
        raise UserError(
            f"{where}: class {number:g}, which has no name; expected one of {brief(sorted(keys))}"
        )
    if len(values) < 4 or len(values) % 2:
        raise UserError(
            f"{where}: {len(values)} numbers behind the class, expected pairs, x and y of at least "
            "3 points, or 4, a box (an odd number may be a confidence or a pose: export without)"
        )
    points = np.array(values).reshape(-1, 2)
    if len(points) == 2:
        centre, extent = points
        points = np.stack([centre - extent / 2, centre + extent / 2])
    if not (np.abs(points - 0.5) <= 0.5 + OUTSIDE).all():  # not so is NaN
        raise UserError(
            f"{where}: points {brief(points.round(4).tolist())}, expected shares of width and "
            "height between 0 and 1; divide pixels by the size of the image"
        )
    return keys[number], points

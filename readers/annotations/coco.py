"""COCO instances: JSON files with images, annotations and categories, as COCO, Roboflow, CVAT,
FiftyOne, Label Studio and labelme2coco lay them out: one, or one for each of train, val and test.

Pictures that no JSON lists are unlabelled images if they lie where listed ones do, or in a folder
called unlabeled; others are left out and counted. What is marked as to be ignored, or was annotated
without a mask, is void. Axes: H W pixels.
"""

import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Callable, Iterator
from urllib.parse import unquote

import numpy as np

from ground.errors import UserError
from readers.annotations import shapes
from readers.annotations.files import PARTS, list_files
from readers.annotations.others import hint
from readers.annotations.records import UNNAMED, VOID, Classes, Instance, Record, Source
from readers.annotations.shapes import Patch, Size
from readers.panoptic_json import MAX_ID, read_json
from readers.pictures import brief, name_fault
from readers.runs import from_runs

# Folders among images that hold other pictures.
NO_PHOTOS = {
    *"masks mask maps labels annotations panoptic segmentationclass segmentationobject".split(),
    *"visualization visualizations overlay overlays depth".split(),
}
# Paths of a server, as Label Studio writes them, or of another machine's disk: only their last part
# is the name of a file.
UPLOADED = re.compile(r"^(/|\w+:/)|(^|/)(upload|local-files)(/|$)")


@dataclass
class _File:
    """A JSON.   folder: of the source.   part: as Record.part.   keys: of its classes, by id."""

    folder: Path
    path: Path
    part: str
    content: dict
    keys: dict[int, str | int | None] = field(default_factory=dict)


def read_coco(folder: Path, classes: Classes) -> Source:
    """What is listed for validation is not trained on, too; where both parts share a folder, its
    other pictures are for training. Classes are joined by name."""
    source, pictures = Source(), list_files(folder)
    files = _load(folder, source.notes)
    _name_classes(files, classes, source.notes)
    source.notes += _missing_classes(folder, files)
    records: dict[str, Record] = {}  # by real path
    roots: dict[str, str] = {}  # folders of listed images, and of which part they are
    for file in sorted(files, key=lambda file: ["", "val", "train", "test"].index(file.part)):
        for record, root in _records(file, pictures, source):
            roots[root] = file.part if file.part == "train" else roots.get(root, file.part)
            other = records.setdefault(os.path.realpath(record.image), record)
            if other is record:
                continue
            if other.part != record.part:
                what = f"entries of {file.path.name} whose image {other.part} has, too"
                source.passed[what] += 1
            else:  # one file under two ids: all of its annotations
                source.passed["entries of images that are listed twice (joined)"] += 1
                reads = [r.read for r in (other, record) if r.read]
                other.read = partial(_together, reads) if reads else None
    unlisted = _unlisted(folder, pictures, records, roots, source)
    return source.settle(folder, [*records.values(), *unlisted])


def _together(reads: list[Callable], size: Size) -> list[Instance]:
    return [instance for read in reads for instance in read(size)]


def _part(path: str) -> str:
    """train, val, test, or nothing: what the name of a file says, or else those of its folders,
    from the inside out."""
    for name in reversed(PurePosixPath(path).parts):
        parts = {PARTS[word] for word in re.split("[^a-z]+", name.lower()) if word in PARTS}
        if len(parts) == 1:
            return parts.pop()
    return ""


# ----------------------------------------------------------------------------------- JSON files


def _load(folder: Path, notes: list[str]) -> list[_File]:
    """The JSON of each part: the nearest to the top; where some are called instances*, only
    those."""
    names = list_files(folder, ".json")
    depth = {name: name.replace("annotations/", "").count("/") for name in names}
    near = [name for name in names if depth[name] == 0]
    near = near or [name for name in names if depth[name] == 1]
    near = [name for name in near if posixpath.basename(name).startswith("instances")] or near
    parts = {_part(name) if len(near) > 1 else "": folder / name for name in near}
    whole = "train" in parts and "" not in parts
    if not near or len(parts) < len(near) or len(parts) > 1 and not whole:
        listed = [name if depth[name] else posixpath.basename(name) for name in near]
        raise UserError(
            f"{folder}: {brief(listed) if listed else 'no JSON'} in it and its `annotations`; "
            "expected instances_train*.json and instances_val*.json, or one JSON alone, or a pair "
            f"in train/ and valid/{hint(folder, 'coco-instances', too_deep=not near)}"
        )
    if set(parts) == {"train", "test"}:
        parts["val"] = parts.pop("test")
        notes.append(
            f"{parts['val'].relative_to(folder)} is taken for validation: there is a training and "
            "a test set, and no other"
        )
    order = [part for part in ("", "train", "val", "test") if part in parts]
    return [_File(folder, parts[part], part, _content(folder, parts[part])) for part in order]


def _content(folder: Path, path: Path) -> dict:
    try:
        return read_json(path)
    except UserError as error:
        name = path.relative_to(folder).as_posix()
        raise UserError(f"{error}{hint(folder, 'coco-instances', [name])}") from None


def _name_classes(files: list[_File], classes: Classes, notes: list[str]) -> None:
    """Fill `classes`, and the keys of each file; files are joined by name."""
    used = {pair for file in files for pair in _used(file)}
    joined = {}
    for file in files:
        own = {}
        for category in file.content["categories"]:
            number, name = category["id"], category["name"]
            idle = "" if (number, name) in used else _idle(category, file.content["categories"])
            if name in UNNAMED:
                file.keys[number] = UNNAMED[name]
            elif idle:
                note = f"category {number}, {brief(name)}, is left out: nothing uses it, and {idle}"
                if note not in notes:
                    notes.append(note)
            elif name in joined:
                file.keys[number] = joined[name]
            else:
                key = number if number not in classes else max(classes) + 1
                classes.add(key, name, f"{file.path}: category {number}")
                file.keys[number] = own[name] = key
                if key != number:
                    notes.append(
                        f"{file.path.name}: category {number}, {brief(name)}, has the id of a "
                        f"class of another file; it is number {key} here"
                    )
        joined |= own


def _missing_classes(folder: Path, files: list[_File]) -> list[str]:
    """Lines that say which categories a file does not have and others use: none of their objects is
    annotated there, so what is seen of them counts as something else."""
    used = {name for file in files for _, name in _used(file)} - UNNAMED.keys()
    lines = []
    for file in files:
        missing = sorted(used - {category["name"] for category in file.content["categories"]})
        if missing:
            lines.append(
                f"{file.path.relative_to(folder).as_posix()}: has no category {brief(missing)}, "
                "which others use; if such objects are in its images, they are not annotated, and "
                "its figures are wrong"
            )
    return lines


def _used(file: _File) -> set[tuple[int, str]]:
    """(id, name) of the categories that annotations name. Raises: UserError if one is no
    category."""
    names = {}
    for c in file.content["categories"]:
        sound = isinstance(c, dict) and type(c.get("id")) is int and 0 <= c["id"] < MAX_ID - 1
        if not sound or c["id"] in names:
            raise UserError(
                f"{file.path}: category {brief(c)}: expected a whole number from 0 on as id, of "
                "one category, and a name"
            )
        names[c["id"]] = c.get("name")
        if not isinstance(c.get("name"), str):
            Classes.first_name(c.get("name"), f"{file.path}: category {c['id']}")
    numbers = [a.get("category_id") for a in file.content["annotations"] if isinstance(a, dict)]
    return {(number, names.get(number)) for number in numbers if isinstance(number, int)}


def _idle(category: dict, categories: list[dict]) -> str:
    """Why a category that nothing uses is not to be a class (as Roboflow's category 0); empty if
    it may be one."""
    name = category["name"]
    others = [other for other in categories if other is not category]
    if any(other["name"] == name for other in others):
        return "another has its name"
    top = category.get("supercategory") in (None, "", "none", name)
    groups = top and any(other.get("supercategory") == name for other in others)
    return "it groups others" if groups else ""


# ----------------------------------------------------------------------------------- images


def _records(file: _File, pictures: list[str], source: Source) -> Iterator[tuple[Record, str]]:
    """Records of a JSON, and the folder that each was found in."""
    path, annotations = file.path, _by_image(file)
    _join_ids(annotations, file.content["images"])
    _require_pixels(path, file.content["annotations"])
    places, names, respelled = _folders(file), {}, []
    for place, entry in enumerate(file.content["images"]):
        try:
            key, stated = entry["id"], entry["file_name"]
            known = key in names
            size = entry.get("height"), entry.get("width")
            size = (None, None) if size == (-1, -1) else size  # VIA 3 does not look at the pictures
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: images[{place}] is {brief(entry)}, expected an object with id and "
                "file_name"
            ) from None
        if known and names[key] == stated:
            continue
        names[key] = stated
        name, uploaded = _clean(file, stated)
        fault = name_fault(name) or ("has the id of another image" if known else "")
        if fault:
            raise UserError(
                f"{path}: image {brief(key)}: file_name {brief(stated)} {fault}; mend "
                f"images[{place}]"
            )
        image, root = _find(file, name, uploaded, places, pictures)
        if image.name != posixpath.basename(name):
            respelled.append(f"{brief(stated)} is {image.name}")
        own = annotations.pop(key, None)
        read = partial(_instances, file, name, size, own, source) if own else None
        yield Record(name, image, read, file.part), root
    if respelled:
        source.notes.append(
            f"{path.name}: {len(respelled)} images have names that differ from those of the files "
            f"in case or Unicode form alone: {', '.join(respelled[:2])}"
        )
    if annotations:
        key, left = next(iter(annotations.items()))
        raise UserError(
            f"{path}: annotations[{left[0][0]}] is of image {brief(key)}, which is not among the "
            "images, or twice"
        )


def _by_image(file: _File) -> dict[object, list[tuple[int, dict]]]:
    """Place and content of the annotations, by image id. Raises: UserError if one is none."""
    annotations = defaultdict(list)
    for place, a in enumerate(file.content["annotations"]):
        where = f"{file.path}: annotations[{place}]"
        try:
            annotations[a["image_id"]].append((place, a))
            known = a["category_id"] in file.keys
        except (KeyError, TypeError):
            raise UserError(
                f"{where} is {brief(a)}, expected an object with image_id, category_id and "
                "segmentation"
            ) from None
        if not known:
            raise UserError(
                f"{where} has category {brief(a['category_id'])}, which is not among the categories"
            )
    return annotations


def _join_ids(annotations: dict[object, list], images: list) -> None:
    """VIA 2 has whole numbers as ids of its images, and their text as image_id."""
    numbers = {image.get("id") for image in images if isinstance(image, dict)}
    for key in [key for key in annotations if isinstance(key, str) and key not in numbers]:
        if key.isdecimal() and int(key) in numbers and int(key) not in annotations:
            annotations[int(key)] = annotations.pop(key)


def _require_pixels(path: Path, annotations: list[dict]) -> None:
    """Raise UserError if all polygons lie between 0 and 1: shares of the image, as Azure ML
    exports them, of which nothing but single pixels would be left."""
    parts = (part for a in annotations for part in _polygons(a.get("segmentation")))
    numbers = (v for part in parts if isinstance(part, list) for v in part)
    if max((v for v in numbers if isinstance(v, (int, float))), default=2) <= 1:
        raise UserError(
            f"{path}: no point of a polygon is above 1, so they are shares of the image; expected "
            "pixels: multiply x by the width and y by the height of its image"
        )


def _clean(file: _File, stated) -> tuple[object, bool]:
    """A file_name as a path below the folder, and whether it is of a server or another disk, so
    that its last part alone is left."""
    if not isinstance(stated, str):
        return stated, False
    name, here = stated.replace("\\", "/"), os.path.abspath(file.folder)
    if name.startswith(f"{here}/"):
        name = os.path.relpath(name, here)
    if UPLOADED.search(name):
        return PurePosixPath(unquote(re.split("[?&]d=", name)[-1])).name, True
    if ".." in name.split("/"):  # sound where it stays below the folder
        name = os.path.join(file.path.parent.relative_to(file.folder), name)
    return os.path.normpath(name), False


def _folders(file: _File) -> list[str]:
    """Where the images of a JSON may be, the likeliest first, relative to the source."""
    own = file.path.parent.relative_to(file.folder).as_posix()
    home = own.removesuffix("annotations").strip("/")
    homes = [own, home, f"{home}/images"] if home not in ("", ".") else []
    if file.part:
        words = [f"{file.part}2017", *(word for word in PARTS if PARTS[word] == file.part)]
        names = [*words, *(f"images/{word}" for word in words), "images", "data"]
    else:
        names = "images train2017 val2017 data JPEGImages images/default labelme".split()
        names += [*PARTS, *(f"images/{word}" for word in PARTS)]
    return [*dict.fromkeys([*homes, *names, "."])]


def _find(
    file: _File, name: str, uploaded: bool, places: list[str], pictures: list[str]
) -> tuple[Path, str]:
    """The file of an image, and the folder that its name is relative to. Raises: UserError if
    there is none, or if two could be meant."""
    folder, (first, _, rest) = file.folder, name.partition("/")
    spellings = [name, rest] if rest and first in (*PARTS, "images", "data") else [name]
    for spelling in [] if uploaded else spellings:
        there = [at for at in places if (folder / at / spelling).is_file()]
        parted = [folder / at / spelling for at in there if not file.part and _part(at)]
        _require_one(file, name, [*{os.path.realpath(path): path for path in parted}.values()])
        if there:
            return folder / there[0] / spelling, there[0]
    alike = [picture for picture in pictures if f"/{picture}".endswith(f"/{name}")]
    if not alike:  # as on a disk that does not tell a from A, and takes one way to write ä for all
        end = _folded(name)
        alike = [picture for picture in pictures if _folded(picture).endswith(end)]
    if file.part:
        own = [picture for picture in alike if _part(posixpath.dirname(picture)) == file.part]
        alike = own or alike
    _require_one(file, name, [folder / picture for picture in alike])
    if not alike:
        above = any((folder.parent / at / name).is_file() for at in places)
        raise UserError(
            f"{folder / places[0] / name}: no such file, nor in "
            f"{', '.join(str(folder / place) for place in places[1:])}; "
            + (f"did you mean --input {folder.parent}? Else " if above else "")
            + f"put the images there, or take {brief(name)} from {file.path.name}"
        )
    root = alike[0].split("/")[: -1 - name.count("/")]
    return folder / alike[0], "/".join(root) or "."


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", f"/{name}").casefold()


def _require_one(file: _File, name: str, images: list[Path]) -> None:
    if len(images) > 1:
        raise UserError(
            f"{file.path}: {brief(name)} is {images[0]} as well as {images[1]}; put the folder "
            "into its file_name, or take one of them out"
        )


def _unlisted(
    folder: Path, pictures: list[str], records: dict[str, Record], roots: dict, source: Source
) -> Iterator[Record]:
    """Records of the pictures that no JSON lists."""
    listed = {os.path.dirname(os.path.relpath(record.image, folder)) for record in records.values()}
    passed = Counter()
    for picture in pictures:
        if os.path.realpath(folder / picture) in records:
            continue
        at, part = _place(posixpath.dirname(picture), roots, listed)
        if part is None:
            passed[posixpath.dirname(picture) or "."] += 1
        else:
            yield Record(picture.removeprefix(at), folder / picture, None, part)
    parts = {record.part for record in records.values()}
    lost = [place for place in sorted(passed) if _part(place) == "val" and "val" not in parts]
    if lost:
        source.notes.append(
            f"{lost[0]} holds pictures for validation, but no JSON lists them: get it, or those "
            "for validation are drawn from the others (--val-share)"
        )
    if passed:
        source.passed["pictures that no JSON lists"] += passed.total()
        source.notes.append(
            f"left out are the pictures in {', '.join(sorted(passed)[:5])}: no JSON lists one "
            "there; to use them, put them beside the others, or into unlabeled/"
        )


def _place(place: str, roots: dict[str, str], listed: set[str]) -> tuple[str, str | None]:
    """What the names of the unlisted pictures of a folder leave out, and the part that they are of;
    None if they are of none.

    roots: part by folder that names are relative to.   listed: folders of listed pictures.
    """
    above = [root for root in roots if root != "." and f"{place}/".startswith(f"{root}/")]
    root = max(above, key=len, default=None)
    train = "train" if "train" in roots.values() else ""
    part = roots.get(root)
    if root is None and place in listed:
        part = roots.get(".", train)
    if part is not None and train:  # images/ may be the root of images/train and images/val
        part = _part(place) or part
    if any(word.startswith(("unlabeled", "unlabelled")) for word in place.lower().split("/")):
        part = train
    inner = place if root is None else place.removeprefix(root)
    if NO_PHOTOS & {*inner.lower().split("/")}:
        part = None
    return "" if root is None else f"{root}/", part


# ----------------------------------------------------------------------------------- instances


def _instances(
    file: _File, name: str, stated: tuple, own: list[tuple[int, dict]], source: Source, size: Size
) -> list[Instance]:
    claim = f"{file.path}: states {brief(stated)} for image {name}"
    shapes.require_size(stated, size, claim, "mend what wrote the JSON")
    instances = []
    for place, a in own:
        where = f"{file.path}: annotations[{place}]"
        form, crowd = a.get("segmentation"), a.get("iscrowd") or 0
        if crowd not in (0, 1) or not isinstance(form, list | dict | None):
            raise UserError(
                f"{where}: segmentation {brief(form)}, iscrowd {brief(crowd)}; expected polygons "
                "or run lengths, and 0 or 1"
            )
        category, polygons = file.keys[a["category_id"]], []
        for part in _polygons(form):
            polygons.append(shapes.read_points(part, size, where, flat=True))
        draws = [partial(shapes.polygon, points, size) for points in polygons]
        draw = partial(shapes.join, draws, size)
        if isinstance(form, dict):
            draw = partial(_runs, form, size, where)
        if a.get("ignore") in (1, True):
            category = VOID
            source.passed["objects marked as to be ignored"] += 1
        elif not polygons and not isinstance(form, dict):
            category = VOID
            source.passed["boxes without a mask"] += 1
        around = partial(_around, a.get("bbox"), polygons, size, where)
        instances.append(Instance(category, draw, bool(crowd), around))
    return instances


def _polygons(form) -> list:
    """The polygons of a segmentation, which may be one, and no list of them."""
    if not form or not isinstance(form, list):
        return []
    return [form] if all(isinstance(v, (int, float)) for v in form) else form


def _around(bbox, polygons: list[np.ndarray], size: Size, where: str) -> Patch:
    """The box of an annotation, or else that of its polygons."""
    if bbox:
        corners = shapes.read_points(bbox, size, where, flat=True, number=2)
        return shapes.filled(np.cumsum(corners, 0), size)  # the second is the extent
    return shapes.filled(np.concatenate(polygons), size) if polygons else shapes.nothing()


def _runs(form: dict, size: Size, where: str) -> Patch:
    """COCO's run lengths, as a list or as compressed text: down the columns, zeros first."""
    try:
        return 0, 0, from_runs(form, size)
    except ValueError as error:
        raise UserError(
            f"{where}: run lengths {brief(form)}, expected those of {list(size)}, the height and "
            f"width of its image ({brief(str(error))})"
        ) from None

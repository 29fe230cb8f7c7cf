"""The JSON of COCO panoptic format: its classes, and which segments each image has.

No image and no map is opened. Whatever is wrong is said with the name of the file; what allows to
read on is left out and told to `complain` (which refuses, or collects for `tools.validate`).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator

import numpy as np

from ground.errors import UserError, refuse
from readers.ground_truth import Taxonomy
from readers.pictures import UNPRINTABLE, brief, name_fault

MAX_ID = 1 << 24  # segment ids have 24 bits: R + 256 G + 65536 B
MAX_AREA = 1 << 31  # pixels
Complain = Callable[[UserError], None]
Wrong = Callable[[str, str], None]  # kind of a fault, and what is wrong


def read_json(path: Path) -> dict:
    """A JSON in COCO panoptic format: an object with the lists images, annotations and categories.
    Raises: UserError if it is not."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"{path}: key '{key}' is missing or not a list; expected COCO panoptic format "
                "(images, annotations, categories)"
            )
    return content


# ----------------------------------------------------------------------------------------- classes


def read_taxonomy(annotations: Path) -> Taxonomy:
    """Classes of a COCO panoptic JSON (`classes_in`)."""
    return classes_in(read_json(annotations)["categories"], annotations)


def classes_in(categories: list, annotations: Path) -> Taxonomy:
    """The classes of a JSON, in its order, and their colours if each has a `color`.

    Raises: UserError if ids or first names are not distinct, or something is missing.
    """
    rows, used = [], set()

    def fault(text: str) -> UserError:
        return UserError(f"{annotations}: {text}")

    for c in categories:
        for key in ("id", "name", "isthing"):
            if not isinstance(c, dict) or key not in c:
                raise fault(f"a category lacks '{key}' ({brief(c)}); expected id, name and isthing")
        name = c["name"] if isinstance(c["name"], str) else ""
        first = name.split(",")[0].strip()
        sound = first and not UNPRINTABLE.search(name) and c["isthing"] in (0, 1)
        if not sound or not _whole(c["id"], 0, MAX_ID):
            raise fault(
                f"category {brief(c)}: expected a whole number as id, a name, and isthing 0 or 1"
            )
        if c["id"] in used or first in used:
            raise fault(
                f"category {brief(c['id'])} ({brief(name)}) shares its id or its first name with "
                "another; expected distinct ones"
            )
        used |= {c["id"], first}
        rows.append((name, bool(c["isthing"]), int(c["id"])))
    if not rows:
        raise fault("categories is empty; expected at least one class with id, name and isthing")
    colours, groups = ([c.get(key) for c in categories] for key in ("color", "supercategory"))
    grouped = all(isinstance(group, str) and group for group in groups)
    return Taxonomy(
        *zip(*rows),
        palette=tuple(map(tuple, colours)) if all(map(_rgb, colours)) else None,
        groups=tuple(groups) if grouped and len({*groups}) < len(groups) else None,
    )


def by_name(taxonomy: Taxonomy, train: Path, val: Path, complain: Complain) -> Taxonomy:
    """The training JSON's classes with the ids that the validation JSON gives to these names; a
    class that it lacks has an id that nothing has."""
    return joined(taxonomy, read_taxonomy(val), train, val, complain)


def joined(
    taxonomy: Taxonomy, other: Taxonomy, train: Path, val: Path, complain: Complain
) -> Taxonomy:
    """The same of classes that are read already. other: of the validation JSON."""
    names = taxonomy.short_names
    theirs = dict(zip(other.short_names, zip(other.ids, other.things)))
    known = dict(zip(taxonomy.ids, names))
    ids = [theirs[name][0] if name in theirs else -1 - k for k, name in enumerate(names)]

    def wrong(text: str) -> None:
        complain(UserError(f"{val}: {text} in {train.name}", "category"))

    for category, name in zip(other.ids, other.short_names):
        if name not in names and category in known:
            wrong(f"category {category} is {brief(name)}, but {brief(known[category])}")
            k = taxonomy.ids.index(category)
            ids[k] = category if ids[k] < 0 else ids[k]
    kinds = ("stuff", "a thing")
    for name, thing in zip(names, taxonomy.things):
        if name in theirs and theirs[name][1] != thing:
            wrong(f"{brief(name)} is {kinds[not thing]}, but {kinds[thing]}")
    return replace(taxonomy, ids=tuple(ids))


def _rgb(value) -> bool:
    """A colour as a list of three bytes."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(v) is int and 0 <= v < 256 for v in value)
    )


def _whole(value, low: int, high: int) -> bool:
    """A whole number in [low, high): 3 and 3.0, but not True, "3", NaN and 1e999."""
    whole = type(value) is int or type(value) is float and value.is_integer()
    return whole and low <= value < high


# ---------------------------------------------------------------------------- images and segments


class PanopticIndex:
    """What a JSON lists, in a few flat arrays: loader processes share them, and reading never makes
    them grow.

    names: (M,) str, file names of images; the `annotated` first ones have a map and segments, the
        others serve as unlabelled images.    files: (annotated,) str, file names of their maps.
    segments: (S, 4) int64: id, class, area, crowd; of image i from starts[i] to starts[i + 1].
    unused: images that a validation set lists without annotation.
    refused: images of which a segment was left out.
    without_crowd: how many segments do not say whether they are crowd, and are taken as 0.
    """

    def __init__(
        self, annotations: Path, taxonomy: Taxonomy, validation: bool, complain: Complain = refuse
    ):
        def wrong(kind: str, text: str) -> None:
            complain(UserError(f"{annotations}: {text}", kind))

        self.annotations, self.taxonomy = annotations, taxonomy
        self.order, self.refused, self.without_crowd = None, set(), 0
        content = read_json(annotations)
        classes = {category: k for k, category in enumerate(taxonomy.ids) if category >= 0}
        images = _image_names(content["images"], wrong)
        listed = {name for name in images.values() if name is not None}
        names, files, counts, rows = [], [], [], []
        for name, file, segments in _annotated(content["annotations"], images, wrong):
            sound = _sound_segments(segments, classes, name, wrong)
            if len(sound) < len(segments):
                self.refused.add(len(names))
            self.without_crowd += sum(crowd is None for *_, crowd in sound)
            rows += [(*row, crowd or 0) for *row, crowd in sound]
            names.append(name)
            files.append(file)
            counts.append(len(sound))
        self.annotated = len(names)
        if not validation:
            names += [name for name in images.values() if name is not None]
        self.unused = sorted(listed.difference(names))  # few or none
        self.names, self.files = np.array(names, str), np.array(files, str)
        self.segments = np.array(rows, np.int64).reshape(-1, 4)
        self.starts = np.cumsum([0, *counts])

    def segments_of(self, i: int) -> np.ndarray:
        """(N, 4) int64: id, class, area, crowd of the segments of image i."""
        return self.segments[self.starts[i] : self.starts[i + 1]]

    def segments_text(self, i: int, names: list[str]) -> str:
        """The segments of an image, as a line: id, class, crowd."""
        rows = sorted(self.segments_of(i).tolist())
        return " ".join(f"{number} {names[k]} {crowd}" for number, k, _, crowd in rows)

    def follow(self, order: np.ndarray) -> None:
        """Class k becomes class order[k]."""
        self.segments[:, 1] = order[self.segments[:, 1]]
        self.order, self.taxonomy = order, self.taxonomy.select(np.argsort(order))


def _image_names(entries: list, wrong: Wrong) -> dict:
    """File names by image id, None where a fault was found (then that is one fault, and its
    annotation is no second one)."""
    files, taken = {}, set()
    for place, entry in enumerate(entries):
        try:
            key, name = entry["id"], entry["file_name"]
            twice = key in files or name in taken
        except (KeyError, TypeError):
            text = f"images[{place}] is {brief(entry)}, expected an object with id and file_name"
            wrong("malformed", text)
            continue
        fault = "is listed twice" if twice else name_fault(name)
        if fault:
            kind = "image twice" if twice else "name"
            wrong(kind, f"image {brief(key)}: file_name {brief(name)} {fault}")
            files.setdefault(key, None)
        else:
            files[key] = name
            taken.add(name)
    return files


def _annotated(entries: list, images: dict, wrong: Wrong) -> Iterator[tuple[str, str, list]]:
    """(name of the image, name of its map, segments_info) of each annotation, which takes its image
    out of `images`."""
    for place, entry in enumerate(entries):
        try:
            key = entry["image_id"]
            if key not in images:
                wrong(
                    "malformed",
                    f"no entry for {brief(key)}, or two annotations: annotations[{place}] names it "
                    "as its image_id, expected an image of images that no other annotation names",
                )
                continue
            file, segments = entry["file_name"], list(entry["segments_info"])
            fault = name_fault(file)
        except (KeyError, TypeError):
            wrong(
                "malformed",
                f"annotations[{place}] is {brief(entry)}, expected an object with image_id, "
                "file_name and segments_info",
            )
            continue
        name = images.pop(key)
        if fault:
            wrong("name", f"map of image {brief(key)}: file_name {brief(file)} {fault}")
        elif name is not None:
            yield name, file, segments


def _sound_segments(
    segments: list, classes: dict[int, int], name: str, wrong: Wrong
) -> list[tuple]:
    """(id, class, area, crowd or None) of the segments of an image that have no fault."""
    rows, used = [], set()
    for s in segments:
        try:
            number, area, crowd = s["id"], s["area"], s.get("iscrowd")
            category, k = s["category_id"], classes.get(s["category_id"])
            sound = _whole(number, 1, MAX_ID) and _whole(area, 0, MAX_AREA)
            sound = sound and crowd in (None, 0, 1)
        except (KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            wrong(
                "malformed",
                f"segment {brief(s)} of image {name}: expected id (1 to {MAX_ID - 1}), "
                "category_id, area (pixels) and iscrowd (0 or 1)",
            )
        elif k is None:
            unknown = f"category {brief(category)}, which is not among the categories"
            wrong("category", f"segment {number} of image {name} has {unknown}")
        elif number in used:
            wrong("segment twice", f"segment {number} of image {name} is listed twice")
        else:
            used.add(number)
            rows.append((number, k, area, crowd))
    return rows

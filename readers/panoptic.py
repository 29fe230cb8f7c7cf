"""."""

import json
import os
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

from ground.errors import UserError, refuse
from readers.ground_truth import IGNORE, DataSet, Taxonomy, Truth
from readers.pictures import (
    _UNPRINTABLE,
    _fingerprint,
    brief,
    file_digest,
    image_digest,
    image_header,
    name_fault,
    open_image,
)
from readers.sixteen_bit import WHITE
from readers.splits import read_split

MAX_ID = 1 << 24  # segment ids have 24 bits: R + 256 G + 65536 B
MAX_AREA = 1 << 31  # pixels


class PanopticFolder:
    """Images and ground truth in COCO panoptic format: a JSON, a folder of images, a folder of RGB-coded PNG maps.

    The index is a few flat arrays: loader processes share them, and reading never makes them grow.
    semantic: folder of class maps that mIoU is measured against, where the data set has its own: uint8, class `semantic_first` + k
        for class k, anything else is no class (ADE20K counts from 1, COCO-Objects from 0).
    hidden: segments may lie wholly below others, and stated areas count what is hidden (ADE20K's rule); else a segment without a pixel is a fault.
    complain: called with every fault that allows to read on; what is at fault is left out.
    Images without annotation come after the `annotated` first ones; they serve as unlabelled
    images. A validation set has none of them (`unused`).
    An image is turned as its EXIF block says, as detectron2 does; maps have none, and `_upright` turns them along where it must.
    white: of the images, as in `open_image`; `see` settles it.
    Raises: UserError where a file or a key is missing, a file is a link out of the data root, or map, JSON and image disagree.
    """

    white = WHITE

    def __init__(
        self,
        annotations: Path,
        images: Path,
        maps: Path,
        taxonomy: Taxonomy,
        semantic: Path | None = None,
        semantic_first: int = 1,
        validation: bool = False,
        hidden: bool = False,
        complain: Callable[[UserError], None] = refuse,
    ):
        self.annotations, self.images, self.maps, self.taxonomy = (
            annotations,
            images,
            maps,
            taxonomy,
        )
        self.semantic, self.semantic_first, self.hidden, self.order = (
            semantic,
            semantic_first,
            hidden,
            None,
        )
        inside = (
            os.path.commonpath([annotations, images, maps]),
            images,
            maps,
            *([semantic] if semantic else []),
        )  # a folder itself may be a link
        self.inside = tuple(os.path.join(os.path.realpath(folder), "") for folder in inside)
        content = read_json(annotations)
        index = {category: k for k, category in enumerate(taxonomy.ids) if category >= 0}

        def wrong(kind, text):
            complain(UserError(f"{annotations}: {text}", kind))

        files = _image_names(content["images"], wrong)
        listed = {name for name in files.values() if name is not None}
        names, maps_of, counts, rows, self.refused, self.without_crowd = [], [], [], [], set(), 0
        for place, a in enumerate(content["annotations"]):
            try:
                key = a["image_id"]
                if key not in files:
                    wrong(
                        "malformed",
                        f"no entry for {brief(key)}, or two annotations: annotations[{place}] names it as its image_id, expected an image of "
                        f"images that no other annotation names",
                    )
                    continue
                file, segments = a["file_name"], list(a["segments_info"])
                fault = name_fault(file)
            except (KeyError, TypeError):
                wrong(
                    "malformed",
                    f"annotations[{place}] is {brief(a)}, expected an object with image_id, file_name and segments_info",
                )
                continue
            name = files.pop(key)
            if fault:
                wrong("name", f"map of image {brief(key)}: file_name {brief(file)} {fault}")
            if fault or name is None:
                continue
            sound, without = _sound_segments(segments, index, name, wrong)
            if len(sound) < len(segments):
                self.refused.add(len(names))
            self.without_crowd += without
            rows += sound
            names.append(name)
            maps_of.append(file)
            counts.append(len(sound))
        self.annotated = len(names)
        names += [] if validation else [name for name in files.values() if name is not None]
        self.unused = sorted(listed.difference(names))  # few or none
        self.names, self.files = np.array(names, str), np.array(maps_of, str)
        self.segments = np.array(rows, np.int64).reshape(-1, 4)  # id, class, area, crowd
        self.starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return str(self.names[i])

    def path(self, i: int) -> Path:
        return self.file(self.images, self.name(i))

    def image(self, i: int) -> Image.Image:
        return open_image(self.path(i), white=self.white)

    def follow(self, order: np.ndarray) -> None:
        """Class k becomes class order[k]."""
        self.segments[:, 1] = order[self.segments[:, 1]]
        self.order, mine, place = order, self.taxonomy, np.argsort(order)
        columns = (mine.names, mine.things, mine.ids, mine.palette)
        self.taxonomy = Taxonomy(*(c and tuple(c[k] for k in place) for c in columns))

    def digest(self, i: int) -> str:
        """As `image_digest`."""
        return image_digest(self.path(i), self.white)

    def fingerprint(self, indices=None) -> str:
        """Of all training images, or of some (`identity.of_files`); the folder that they are in
        does not matter."""
        return _fingerprint(self, self.images, range(len(self)) if indices is None else indices)

    def segments_text(self, i: int, names: list[str]) -> str:
        """The segments of an image, as a line: id, class, crowd."""
        rows = sorted(self.segments[self.starts[i] : self.starts[i + 1]].tolist())
        return " ".join(f"{number} {names[k]} {crowd}" for number, k, _, crowd in rows)

    def truth_digest(self, i: int) -> str:
        """SHA-256 of the file of its panoptic map."""
        return file_digest(self.file(self.maps, str(self.files[i])))

    def file(self, folder: Path, name: str) -> Path:
        """folder/name, which may be a link to another place in the data root, but not out of it."""
        path = folder / name
        real = os.path.realpath(path)
        if not real.startswith(self.inside):
            raise UserError(
                f"{path}: is a link that leads out of the data root, to {real}; expected a file (a whole folder may be a link)",
                "name",
            )
        return path

    def truth(self, i: int, complain: Callable[[UserError], None] = refuse) -> Truth:
        path, segments = (
            self.file(self.maps, str(self.files[i])),
            self.segments[self.starts[i] : self.starts[i + 1]],
        )
        coded = self._upright(segment_ids(path), i, path)
        # Pixels come in runs of one id, so only the first of each run is looked up.
        flat = coded.ravel()
        first = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
        runs, lengths, order = (
            flat[first],
            np.diff(first, append=flat.size),
            np.argsort(segments[:, 0]),
        )
        known = np.append(segments[order, 0], MAX_ID)  # no id is so large
        place = np.searchsorted(known, runs)
        found = known[place] == runs
        for unknown in np.unique(runs[~found & (runs > 0)]):
            complain(
                UserError(
                    f"{path}: segment {unknown} has pixels but is not in segments_info",
                    "not in json",
                )
            )
        number = np.where(found, np.append(order + 1, 0)[place], 0).astype(np.int32)
        if not self.hidden:
            for empty in segments[np.bincount(number, minlength=len(segments) + 1)[1:] == 0, 0]:
                complain(
                    UserError(
                        f"{path}: segment {empty} is in segments_info but has no pixel", "no pixel"
                    )
                )
        return Truth(
            np.repeat(number, lengths).reshape(coded.shape),
            segments[:, 1],
            segments[:, 2],
            segments[:, 3].astype(bool),
            self.semantic and (lambda: self.class_map(i)),
        )

    def class_file(self, i: int) -> Path:
        return self.semantic / f"{Path(self.name(i)).stem}.png"

    def class_map(self, i: int) -> np.ndarray:
        """(H, W) class index of image i by the data set's own semantic ground truth, IGNORE where there is none."""
        path = self.file(self.semantic, self.class_file(i).name)
        stored = np.asarray(open_image(path, None))
        if stored.ndim != 2:
            raise UserError(
                f"{path}: expected a map of class numbers with one channel, got {stored.shape}",
                "unreadable",
            )
        classes = self._upright(stored, i, path).astype(np.int32) - self.semantic_first
        classes[(classes < 0) | (classes >= len(self.taxonomy))] = IGNORE
        return (
            classes
            if self.order is None
            else np.append(self.order, IGNORE)[classes].astype(np.int32)
        )

    def _upright(self, stored: np.ndarray, i: int, path: Path) -> np.ndarray:
        """A map (H, W) as image i is shown. Raises UserError if it has another size.

        Annotators see an image turned by its EXIF block, so a map of that size is taken as it is (of a square image, too). Only a map that has
        the size of the pixels as stored, and not of the image as shown, was drawn without looking at EXIF, and is turned along.
        """
        shown, turn = image_header(self.file(self.images, self.name(i)))
        if stored.shape == shown[::-1]:
            return stored
        if turn is not None and stored.shape == shown:
            return np.asarray(Image.fromarray(stored).transpose(turn))
        raise UserError(
            f"{path}: {stored.shape[1]} x {stored.shape[0]} pixels, but its image {self.name(i)} has {shown[0]} x {shown[1]}; "
            f"expected one size",
            "size",
        )


def _image_names(entries: list, wrong: Callable[[str, str], None]) -> dict:
    """File names by image id, None where a fault was found (then that is one fault, and its annotation is no second one)."""
    files, taken = {}, set()
    for place, entry in enumerate(entries):
        try:
            key, name = entry["id"], entry["file_name"]
            twice = key in files or name in taken
        except (KeyError, TypeError):
            wrong(
                "malformed",
                f"images[{place}] is {brief(entry)}, expected an object with id and file_name",
            )
            continue
        fault = "is listed twice" if twice else name_fault(name)
        if fault:
            wrong(
                "image twice" if twice else "name",
                f"image {brief(key)}: file_name {brief(name)} {fault}",
            )
            files.setdefault(key, None)
        else:
            files[key] = name
            taken.add(name)
    return files


def _sound_segments(
    segments: list, index: dict[int, int], name: str, wrong: Callable[[str, str], None]
) -> tuple[list[tuple], int]:
    """(id, class, area, crowd) of the segments of an image without a fault, and how many of them do not say whether they are crowd."""
    rows, used, without_crowd = [], set(), 0
    for s in segments:
        try:
            number, category, area, crowd = s["id"], s["category_id"], s["area"], s.get("iscrowd")
            k, twice = index.get(category), number in used
            sound = (
                _whole(number)
                and 0 < number < MAX_ID
                and _whole(area)
                and 0 <= area < MAX_AREA
                and crowd in (None, 0, 1)
            )
        except (KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            wrong(
                "malformed",
                f"segment {brief(s)} of image {name}: expected id (1 to {MAX_ID - 1}), category_id, area (pixels) and iscrowd (0 or 1)",
            )
        elif k is None:
            wrong(
                "category",
                f"segment {number} of image {name} has category {brief(category)}, which is not among the categories",
            )
        elif twice:
            wrong("segment twice", f"segment {number} of image {name} is listed twice")
        else:
            used.add(number)
            rows.append((number, k, area, crowd or 0))
            without_crowd += crowd is None
    return rows, without_crowd


def segment_ids(path: Path) -> np.ndarray:
    """(H, W) int32 ids of a panoptic PNG: R + 256 G + 65536 B."""
    image = open_image(path)
    coded = np.frombuffer(
        image.tobytes("raw", "RGBX"), "<i4"
    )  # four bytes a pixel, as Pillow keeps them: an integer, but for the fourth
    return (coded & 0xFFFFFF).reshape(image.height, image.width)


def read_json(path: Path) -> dict:
    """A JSON in COCO panoptic format: an object with the lists images, annotations and categories. Raises: UserError if it is not."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    missing = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if missing:
        raise UserError(
            f"{path}: key '{missing[0]}' is missing or not a list; expected COCO panoptic format (images, annotations, categories)"
        )
    return content


def _whole(value) -> bool:
    """True for 3 and 3.0; False for True, "3", NaN and 1e999."""
    return type(value) is int or type(value) is float and value.is_integer()


def load_folder(
    root: Path,
    split: str,
    seed: int = 0,
    variant: str = "",
    complain: Callable[[UserError], None] = refuse,
) -> DataSet:
    """Any folder in COCO panoptic format.

    Args:
        root: holds panoptic_train.json and panoptic_val.json (or annotations/panoptic_*.json), the images and the maps.
        split: which images are labelled, see `read_split`.
        variant: ending of the JSON names, as in panoptic_train_4class.json.
        complain: called with every fault that allows to read on (`PanopticFolder`).
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; --data-root names a folder in COCO panoptic format"
        )
    annotations = {
        part: _first(
            root,
            [
                f"panoptic_{part}{variant}.json",
                f"annotations/panoptic_{part}{variant}.json",
                f"annotations/panoptic_{part}2017{variant}.json",
            ],
            "the panoptic JSON",
        )
        for part in ("train", "val")
    }
    taxonomy = read_taxonomy(annotations["train"])
    by_part = {
        "train": taxonomy,
        "val": _by_name(taxonomy, annotations["train"], annotations["val"], complain),
    }
    parts = {}
    for part, path in annotations.items():
        base, stem = path.parent.relative_to(root), path.stem.removesuffix(variant)
        images = _first(
            root, [f"images/{part}", f"{part}2017", f"{part}", "images"], "the image folder"
        )
        candidates, missing = (
            [(base / stem).as_posix(), f"panoptic/{part}", f"panoptic_{part}", "panoptic"],
            None,
        )
        try:
            maps = _first(root, candidates, "the folder of panoptic PNG files")
        except UserError as error:
            maps, missing = root / candidates[0], error
        parts[part] = PanopticFolder(
            path, images, maps, by_part[part], validation=part == "val", complain=complain
        )
        if missing and parts[part].annotated:  # images without annotation need no maps
            raise missing
    labeled, unlabeled = read_split(root, split, parts["train"], seed, complain)
    return DataSet(root.name, taxonomy, parts["train"], parts["val"], labeled, unlabeled)


def _by_name(
    taxonomy: Taxonomy, train: Path, val: Path, complain: Callable[[UserError], None]
) -> Taxonomy:
    """The training JSON's classes with the ids that the validation JSON gives to these names; a
    class that it lacks has an id that nothing has."""
    other = read_taxonomy(val)
    names, theirs = taxonomy.short_names, dict(zip(other.short_names, zip(other.ids, other.things)))
    known = dict(zip(taxonomy.ids, names))
    ids = [theirs[name][0] if name in theirs else -1 - k for k, name in enumerate(names)]
    for category, name in zip(other.ids, other.short_names):
        if name not in names and category in known:
            complain(
                UserError(
                    f"{val}: category {category} is {brief(name)}, but {brief(known[category])} "
                    f"in {train.name}",
                    "category",
                )
            )
            k = taxonomy.ids.index(category)
            ids[k] = category if ids[k] < 0 else ids[k]
    for name, thing in zip(names, taxonomy.things):
        if name in theirs and theirs[name][1] != thing:
            complain(
                UserError(
                    f"{val}: {brief(name)} is {'stuff' if thing else 'a thing'}, but "
                    f"{'a thing' if thing else 'stuff'} in {train.name}",
                    "category",
                )
            )
    return Taxonomy(taxonomy.names, taxonomy.things, tuple(ids), taxonomy.palette)


def _first(root: Path, candidates, what: str) -> Path:
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise UserError(
        f"{root}: {what} is missing; looked for {', '.join(str(c) for c in candidates)}"
    )


def read_taxonomy(annotations: Path) -> Taxonomy:
    """Classes of a COCO panoptic JSON, in its order, and their colours if each has a `color`.

    Raises: UserError if ids or first names are not distinct, or something is missing.
    """
    rows, used, categories = [], set(), read_json(annotations)["categories"]
    for c in categories:
        missing = [
            key for key in ("id", "name", "isthing") if not isinstance(c, dict) or key not in c
        ]
        if missing:
            raise UserError(
                f"{annotations}: a category lacks '{missing[0]}' ({brief(c)}); expected id, name and isthing"
            )
        first = c["name"].split(",")[0].strip() if isinstance(c["name"], str) else ""
        if not (
            _whole(c["id"]) and 0 <= c["id"] < MAX_ID and first and c["isthing"] in (0, 1)
        ) or _UNPRINTABLE.search(c["name"]):
            raise UserError(
                f"{annotations}: category {brief(c)}: expected a whole number as id, a name, and isthing 0 or 1"
            )
        if c["id"] in used or first in used:
            raise UserError(
                f"{annotations}: category {brief(c['id'])} ({brief(c['name'])}) shares its id or its first name with another; expected distinct ones"
            )
        used |= {c["id"], first}
        rows.append((c["name"], bool(c["isthing"]), int(c["id"])))
    if not rows:
        raise UserError(
            f"{annotations}: categories is empty; expected at least one class with id, name and isthing"
        )
    colours = [c.get("color") for c in categories]
    sound = all(
        isinstance(c, list) and len(c) == 3 and all(type(v) is int and 0 <= v < 256 for v in c)
        for c in colours
    )
    return Taxonomy(*zip(*rows), palette=tuple(map(tuple, colours)) if sound else None)

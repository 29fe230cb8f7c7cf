"""Images, taxonomies and splits; weak and strong views; batches.

Every random choice is drawn from (seed, step, slot), so a batch does not depend on workers, on what came before it or on
where a run was resumed.
Differs from the paper: short sides are 0.5 to 2.0 of the crop (official code; the paper says 0.1 to 2.0), and labelled
images also get the SSD colour augmentation (official code only).
Axes: H W pixels, N segments, B images.    Sources: Mask2Former (arXiv:2112.01527); SSD (arXiv:1512.02325); CutMix (arXiv:1905.04899).
Try: `python dearli.py --stage sup --steps 250 --scale-min 1 --scale-max 1 --out runs/try-scale`: training images of one size only.
"""

import contextlib
import functools
import json
import os
import random
import re
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

import ranks
from colours import palette
from config import Config, UserError, refuse
from matcher import Target

PAD_VALUE = 128                        # grey levels; images are padded right and bottom to the crop
IGNORE = -1                            # semantic ground truth: no class
CUTMIX_AREA, CUTMIX_ASPECT = (0.02, 0.4), (0.3, 1 / 0.3)               # share of the crop; height / width, uniform
GRACE = 10                             # seconds that a loader process outlives a SIGTERM
MAX_LONG_SIDE = 4                      # long side of a training view, in crops (2560 of 640)
MAX_PIXELS = 89_000_000                # of an image or a map; Pillow warns from here on and refuses only twice as much
# What Pillow may decode: among its other formats are some that run programs (EPS) or follow links.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000")
MAX_NAME = 255                         # bytes of a file name, characters of a path are at most 4 times as many
MAX_ID = 1 << 24                       # segment ids have 24 bits: R + 256 G + 65536 B
MAX_AREA = 1 << 31                     # pixels
TURN = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
                       Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90), 2))   # by EXIF orientation, 1 = none
warnings.simplefilter("ignore", Image.DecompressionBombWarning)                # MAX_PIXELS refuses what it warns of


# ------------------------------------------------------------------------------------- taxonomies and data sets

@dataclass(frozen=True)
class Taxonomy:
    """K classes. names: each with its synonyms, separated by commas.   things: flags.   ids: category ids of the data set.

    palette: RGB, 0 to 255, where the data set has colours of its own.
    """
    names: tuple[str, ...]
    things: tuple[bool, ...]
    ids: tuple[int, ...]
    palette: tuple[tuple[int, int, int], ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_config(cls, stored, source) -> "Taxonomy":
        """The inverse of `to_config`, for what a file holds. Raises: UserError if that is no taxonomy."""
        try:
            columns = [tuple(stored[key]) for key in ("names", "things", "ids")]
            palette = stored["palette"] and tuple((*bytes([r, g, b]),) for r, g, b in stored["palette"])
            if any(type(value) is not kind for column, kind in zip(columns, (str, bool, int)) for value in column) or (
                    len({len(column) for column in (*columns, palette or columns[0])}) > 1 or not columns[0]):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{source}: its taxonomy is {brief(stored)}, expected names, things, ids and palette, one of each for every class") from None
        return cls(*columns, palette)

    def to_config(self) -> dict:
        """As plain lists: a run stores its classes, so that it can be used where the data set is not."""
        return {"names": [*self.names], "things": [*self.things], "ids": [*self.ids], "palette": self.palette and [[*c] for c in self.palette]}

    def categories(self) -> list[dict]:
        """As in COCO panoptic format, the inverse of `read_taxonomy`."""
        return [{"id": i, "name": name, "isthing": int(thing), "color": [*colour]}
                for i, name, thing, colour in zip(self.ids, self.names, self.things, self.colours)]

    @property
    def synonyms(self) -> list[list[str]]:
        return [[name.strip() for name in names.split(",")] for names in self.names]

    @property
    def short_names(self) -> list[str]:
        return [names[0] for names in self.synonyms]

    @property
    def colours(self) -> list[tuple[int, int, int]]:
        """One RGB colour a class: the data set's own, if it has one for each, or else those of `colours.palette`."""
        return list(self.palette or palette(len(self)))


@dataclass
class Truth:
    """Ground truth of one image: segment_map (H, W) int32, 0 = void, k = k-th segment; labels, areas, crowd (N,)."""
    segment_map: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    classes: Callable[[], np.ndarray] | None = None    # reads the (H, W) semantic ground truth, where the data set has one of its own

    def semantic(self) -> np.ndarray:
        """(H, W) class index, IGNORE where void."""
        return np.append(IGNORE, self.labels)[self.segment_map] if self.classes is None else self.classes()

    def by_class(self) -> "Truth":
        """The semantic ground truth as a partition: one segment a class."""
        classes = self.semantic() - IGNORE                         # 0 = void, class + 1
        areas = np.bincount(classes.ravel())
        areas[0] = 0
        labels, lut = np.flatnonzero(areas), np.zeros(len(areas), np.int32)
        lut[labels] = np.arange(1, len(labels) + 1)
        return Truth(lut[classes], labels + IGNORE, areas[labels], np.zeros(len(labels), bool))


@dataclass
class DataSet:
    """What a stage sees: training images with labelled and unlabelled indices, and validation images."""
    name: str
    taxonomy: Taxonomy
    train: "MiniImages | PanopticFolder"
    val: "MiniImages | PanopticFolder"
    labeled: list[int]
    unlabeled: list[int]


class MiniImages:
    """Scenes of one collection of the miniature world, each drawn when it is first asked for and kept in memory for all stages of a process."""

    def __init__(self, collection: str, count: int):
        self.collection, self.count = collection, count

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"{self.collection}_{i:05d}.png"

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(_scene(self.collection, i).image)

    def truth(self, i: int) -> Truth:
        s = _scene(self.collection, i)
        areas = np.bincount(s.segment_map.ravel(), minlength=len(s.labels) + 1)[1:]
        return Truth(s.segment_map, s.labels, areas, np.zeros(len(s.labels), bool))


@functools.lru_cache(maxsize=None)
def _scene(collection: str, i: int):
    import microcosm
    return microcosm.scene(collection, i)


class PanopticFolder:
    """Images and ground truth in COCO panoptic format: a JSON, a folder of images, a folder of RGB-coded PNG maps.

    The index is a few flat arrays: loader processes share them, and reading never makes them grow.
    semantic: folder of class maps that mIoU is measured against, where the data set has its own: uint8, class `semantic_first` + k
        for class k, anything else is no class (ADE20K counts from 1, COCO-Objects from 0).
    hidden: segments may lie wholly below others, and stated areas count what is hidden (ADE20K's rule); else a segment without a pixel is a fault.
    complain: called with every fault that allows to read on; what is at fault is left out.
    Images without annotation come after the `annotated` first ones; they serve as unlabelled images. A validation set has none of them.
    An image is turned as its EXIF block says, as detectron2 does; maps have none, and `_upright` turns them along where it must.
    Raises: UserError where a file or a key is missing, a file is a link out of the data root, or map, JSON and image disagree.
    """

    def __init__(self, annotations: Path, images: Path, maps: Path, taxonomy: Taxonomy, semantic: Path | None = None, semantic_first: int = 1,
                 validation: bool = False, hidden: bool = False, complain: Callable[[UserError], None] = refuse):
        self.annotations, self.images, self.maps, self.taxonomy = annotations, images, maps, taxonomy
        self.semantic, self.semantic_first, self.hidden = semantic, semantic_first, hidden
        inside = (os.path.commonpath([annotations, images, maps]), images, maps, *([semantic] if semantic else []))      # a folder itself may be a link
        self.inside = tuple(os.path.join(os.path.realpath(folder), "") for folder in inside)
        content = read_json(annotations)
        index = {category: k for k, category in enumerate(taxonomy.ids)}
        def wrong(kind, text):
            complain(UserError(f"{annotations}: {text}", kind))
        files = _image_names(content["images"], wrong)
        names, maps_of, counts, rows, self.refused, self.without_crowd = [], [], [], [], set(), 0
        for place, a in enumerate(content["annotations"]):
            try:
                key = a["image_id"]
                if key not in files:
                    wrong("malformed", f"no entry for {brief(key)}, or two annotations: annotations[{place}] names it as its image_id, expected an image of "
                                       f"images that no other annotation names")
                    continue
                file, segments = a["file_name"], list(a["segments_info"])
                fault = name_fault(file)
            except (KeyError, TypeError):
                wrong("malformed", f"annotations[{place}] is {brief(a)}, expected an object with image_id, file_name and segments_info")
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
        self.names, self.files = np.array(names, str), np.array(maps_of, str)
        self.segments = np.array(rows, np.int64).reshape(-1, 4)    # id, class, area, crowd
        self.starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return str(self.names[i])

    def image(self, i: int) -> Image.Image:
        return open_image(self.file(self.images, self.name(i)))

    def file(self, folder: Path, name: str) -> Path:
        """folder/name, which may be a link to another place in the data root, but not out of it."""
        path = folder / name
        real = os.path.realpath(path)
        if not real.startswith(self.inside):
            raise UserError(f"{path}: is a link that leads out of the data root, to {real}; expected a file (a whole folder may be a link)", "name")
        return path

    def truth(self, i: int, complain: Callable[[UserError], None] = refuse) -> Truth:
        path, segments = self.file(self.maps, str(self.files[i])), self.segments[self.starts[i]:self.starts[i + 1]]
        coded = self._upright(segment_ids(path), i, path)
        # Pixels come in runs of one id, so only the first of each run is looked up.
        flat = coded.ravel()
        first = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
        runs, lengths, order = flat[first], np.diff(first, append=flat.size), np.argsort(segments[:, 0])
        known = np.append(segments[order, 0], MAX_ID)                               # no id is so large
        place = np.searchsorted(known, runs)
        found = known[place] == runs
        for unknown in np.unique(runs[~found & (runs > 0)]):
            complain(UserError(f"{path}: segment {unknown} has pixels but is not in segments_info", "not in json"))
        number = np.where(found, np.append(order + 1, 0)[place], 0).astype(np.int32)
        if not self.hidden:
            for empty in segments[np.bincount(number, minlength=len(segments) + 1)[1:] == 0, 0]:
                complain(UserError(f"{path}: segment {empty} is in segments_info but has no pixel", "no pixel"))
        return Truth(np.repeat(number, lengths).reshape(coded.shape), segments[:, 1], segments[:, 2], segments[:, 3].astype(bool),
                     self.semantic and (lambda: self.class_map(i)))

    def class_file(self, i: int) -> Path:
        return self.semantic / f"{Path(self.name(i)).stem}.png"

    def class_map(self, i: int) -> np.ndarray:
        """(H, W) class index of image i by the data set's own semantic ground truth, IGNORE where there is none."""
        path = self.file(self.semantic, self.class_file(i).name)
        stored = np.asarray(open_image(path, None))
        if stored.ndim != 2:
            raise UserError(f"{path}: expected a map of class numbers with one channel, got {stored.shape}", "unreadable")
        classes = self._upright(stored, i, path).astype(np.int32) - self.semantic_first
        classes[(classes < 0) | (classes >= len(self.taxonomy))] = IGNORE
        return classes

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
        raise UserError(f"{path}: {stored.shape[1]} x {stored.shape[0]} pixels, but its image {self.name(i)} has {shown[0]} x {shown[1]}; "
                        f"expected one size", "size")


def _image_names(entries: list, wrong: Callable[[str, str], None]) -> dict:
    """File names by image id, None where a fault was found (then that is one fault, and its annotation is no second one)."""
    files, taken = {}, set()
    for place, entry in enumerate(entries):
        try:
            key, name = entry["id"], entry["file_name"]
            twice = key in files or name in taken
        except (KeyError, TypeError):
            wrong("malformed", f"images[{place}] is {brief(entry)}, expected an object with id and file_name")
            continue
        fault = "is listed twice" if twice else name_fault(name)
        if fault:
            wrong("image twice" if twice else "name", f"image {brief(key)}: file_name {brief(name)} {fault}")
            files.setdefault(key, None)
        else:
            files[key] = name
            taken.add(name)
    return files


def _sound_segments(segments: list, index: dict[int, int], name: str, wrong: Callable[[str, str], None]) -> tuple[list[tuple], int]:
    """(id, class, area, crowd) of the segments of an image without a fault, and how many of them do not say whether they are crowd."""
    rows, used, without_crowd = [], set(), 0
    for s in segments:
        try:
            number, category, area, crowd = s["id"], s["category_id"], s["area"], s.get("iscrowd")
            k, twice = index.get(category), number in used
            sound = _whole(number) and 0 < number < MAX_ID and _whole(area) and 0 <= area < MAX_AREA and crowd in (None, 0, 1)
        except (KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            wrong("malformed", f"segment {brief(s)} of image {name}: expected id (1 to {MAX_ID - 1}), category_id, area (pixels) and iscrowd (0 or 1)")
        elif k is None:
            wrong("category", f"segment {number} of image {name} has category {brief(category)}, which is not among the categories")
        elif twice:
            wrong("segment twice", f"segment {number} of image {name} is listed twice")
        else:
            used.add(number)
            rows.append((number, k, area, crowd or 0))
            without_crowd += crowd is None
    return rows, without_crowd


class ImageFolder:
    """All images of a folder and of those in it, without ground truth: for SAM and the warm-up (SA-1B, where masks lie beside them)."""

    def __init__(self, folder: Path):
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder of images")
        self.folder = Path(folder)
        self.names = np.array(sorted(str(p.relative_to(folder)) for p in self.folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")), str)
        if not len(self.names):
            raise UserError(f"{folder}: no images (*.jpg, *.png) in this folder")
        bare = [n.rsplit(".", 1)[0] for n in self.names.tolist()]
        twice = next((a for a, b in zip(sorted(bare), sorted(bare)[1:]) if a == b), None)
        if twice:
            raise UserError(f"{folder}: two images are called {twice}, but for the ending; their masks would share a file: rename one")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return str(self.names[i])

    def image(self, i: int) -> Image.Image:
        return open_image(self.folder / self.name(i))


def segment_ids(path: Path) -> np.ndarray:
    """(H, W) int32 ids of a panoptic PNG: R + 256 G + 65536 B."""
    image = open_image(path)
    coded = np.frombuffer(image.tobytes("raw", "RGBX"), "<i4")     # four bytes a pixel, as Pillow keeps them: an integer, but for the fourth
    return (coded & 0xFFFFFF).reshape(image.height, image.width)


def open_image(path: Path, mode: str | None = "RGB") -> Image.Image:
    """An image as 8-bit RGB, turned as EXIF says; with another mode a map, not turned; None: as it is stored (no palette is applied).

    Of several frames the first; an alpha channel is dropped; 16 bits are divided by 256, whatever the image shows, so that two images stay
    comparable (Pillow's own conversion would clip them). Raises: UserError with the path if it cannot be read, or is larger than MAX_PIXELS.
    """
    with _opened(path) as image:
        if mode != "RGB":
            return image.convert(mode) if mode else image.copy()
        turn = _turn(image)
        image = as_rgb(image)
        return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB, as `open_image` says; it is not turned. Raises: ValueError if it has 32 bits a channel."""
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("32 bits a channel, whose range only you know; expected 8 or 16")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()        # before its file is closed; convert() would copy every pixel
    return image


def image_header(path: Path) -> tuple[tuple[int, int], Image.Transpose | None]:
    """(width, height) of an image as `open_image` returns it, and how it will be turned; no pixel is read."""
    with _opened(path) as image:
        turn = _turn(image)
        swapped = turn in (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)
        return image.size[::-1] if swapped else image.size, turn


@contextlib.contextmanager
def _opened(path: Path):
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "absent") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: its header states more than {MAX_PIXELS // 1_000_000} million pixels, which no stage reads; cut it into tiles", "large") from None
    except Exception as error:         # Pillow raises a dozen types for what is one thing to the user
        reason = "of no known format, or no image at all" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split()) or type(error).__name__
        reason = "empty file" if os.path.isfile(path) and not os.path.getsize(path) else reason
        raise UserError(f"{path}: not a readable image ({reason})", "unreadable") from None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How EXIF wants an image turned that was opened but not read. A broken EXIF block wants nothing (as officially)."""
    if image.format == "TIFF" or image.format == "PNG" and "exif" not in image.info:       # Pillow turns a TIFF itself; asking a PNG would read it
        return None
    try:
        return TURN.get(image.getexif().get(0x0112))
    except Exception:                  # struct.error, SyntaxError, ... from inside
        return None


def read_json(path: Path) -> dict:
    """A JSON in COCO panoptic format: an object with the lists images, annotations and categories. Raises: UserError if it is not."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise UserError(f"{path}: key '{missing[0]}' is missing or not a list; expected COCO panoptic format (images, annotations, categories)")
    return content


def name_fault(name) -> str | None:
    """What is wrong with a file_name of a JSON; None if it is a path that stays in its folder."""
    if not isinstance(name, str) or not name.strip("./ "):
        return "is not a file name"
    if os.path.isabs(name) or ".." in name and ".." in Path(name).parts:
        return "leads out of its folder; expected a path below it"
    if _UNPRINTABLE.search(name) or len(name) > 4 * MAX_NAME or max(len(part.encode()) for part in name.split("/")) > MAX_NAME:
        return f"cannot be the name of a file; expected at most {MAX_NAME} bytes between slashes, without control characters"
    return None


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")             # would also break the one line of an error


def brief(value) -> str:
    """A value from a file, as a message can show it."""
    text = ascii(value) if not isinstance(value, str) else f"'{value}'"
    text = _UNPRINTABLE.sub("?", text)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _whole(value) -> bool:
    """True for 3 and 3.0; False for True, "3", NaN and 1e999."""
    return type(value) is int or type(value) is float and value.is_integer()


MINI_TRAIN, MINI_DEV, MINI_VAL = 288, 64, 200    # images


def load_mini(split: str, evaluate_on: str = "val") -> DataSet:
    """The miniature world: 288 training images of which the first N are labelled (split 16, 32: nested), dev 64, val 200."""
    if not split.isdecimal() or not 0 < int(split) < MINI_TRAIN:
        raise UserError(f"unknown split '{split}' of data set mini; available: 16, 32, or any number below {MINI_TRAIN}")
    if evaluate_on not in ("dev", "val"):
        raise UserError(f"unknown evaluation set '{evaluate_on}' of data set mini; available: dev, val")
    n, val = int(split), MiniImages(evaluate_on, MINI_VAL if evaluate_on == "val" else MINI_DEV)
    return DataSet("mini", mini_taxonomy(), MiniImages("train", MINI_TRAIN), val, list(range(n)), list(range(n, MINI_TRAIN)))


def mini_taxonomy() -> Taxonomy:
    import microcosm
    k = len(microcosm.CLASSES)
    return Taxonomy(microcosm.CLASSES, tuple(i < len(microcosm.THINGS) for i in range(k)), tuple(range(1, k + 1)))


def load_folder(root: Path, split: str, seed: int = 0, variant: str = "", complain: Callable[[UserError], None] = refuse) -> DataSet:
    """Any folder in COCO panoptic format.

    Args:
        root: holds panoptic_train.json and panoptic_val.json (or annotations/panoptic_*.json), the images and the maps.
        split: a number of labelled images, a name below root/splits (with labeled.txt, and unlabeled.txt if not all the
            rest), or a file that lists image names, one a line; empty, or `all` unless a list is called so: all images with annotation.
        variant: ending of the JSON names, as in panoptic_train_4class.json.
        complain: called with every fault that allows to read on (`PanopticFolder`).
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --data-root names a folder in COCO panoptic format")
    annotations = {part: _first(root, [f"panoptic_{part}{variant}.json", f"annotations/panoptic_{part}{variant}.json",
                                       f"annotations/panoptic_{part}2017{variant}.json"], "the panoptic JSON")
                   for part in ("train", "val")}
    taxonomy = read_taxonomy(annotations["train"])
    names = dict(zip(taxonomy.ids, taxonomy.names))
    other = read_taxonomy(annotations["val"])
    for category, name in zip(other.ids, other.names):
        if names.get(category, name) != name:
            complain(UserError(f"{annotations['val']}: category {category} is {brief(name)}, but {brief(names[category])} in {annotations['train'].name}", "category"))
    parts = {}
    for part, path in annotations.items():
        base, stem = path.parent, path.stem.removesuffix(variant)
        images = _first(root, [f"images/{part}", f"{part}2017", f"{part}", "images"], "the image folder")
        maps = _first(root, [base / stem, f"panoptic/{part}", f"panoptic_{part}", "panoptic"], "the folder of panoptic PNG files")
        parts[part] = PanopticFolder(path, images, maps, taxonomy, validation=part == "val", complain=complain)
    labeled, unlabeled = read_split(root, split, parts["train"], seed, complain)
    return DataSet(root.name, taxonomy, parts["train"], parts["val"], labeled, unlabeled)


def _first(root: Path, candidates, what: str) -> Path:
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise UserError(f"{root}: {what} is missing; looked for {', '.join(str(c) for c in candidates)}")


def read_taxonomy(annotations: Path) -> Taxonomy:
    """Classes of a COCO panoptic JSON, in its order, and their colours if each has a `color`.

    Raises: UserError if ids or first names are not distinct, or something is missing.
    """
    rows, used, categories = [], set(), read_json(annotations)["categories"]
    for c in categories:
        missing = [key for key in ("id", "name", "isthing") if not isinstance(c, dict) or key not in c]
        if missing:
            raise UserError(f"{annotations}: a category lacks '{missing[0]}' ({brief(c)}); expected id, name and isthing")
        first = c["name"].split(",")[0].strip() if isinstance(c["name"], str) else ""
        if not (_whole(c["id"]) and 0 <= c["id"] < MAX_ID and first and c["isthing"] in (0, 1)) or _UNPRINTABLE.search(c["name"]):
            raise UserError(f"{annotations}: category {brief(c)}: expected a whole number as id, a name, and isthing 0 or 1")
        if c["id"] in used or first in used:
            raise UserError(f"{annotations}: category {brief(c['id'])} ({brief(c['name'])}) shares its id or its first name with another; expected distinct ones")
        used |= {c["id"], first}
        rows.append((c["name"], bool(c["isthing"]), int(c["id"])))
    if not rows:
        raise UserError(f"{annotations}: categories is empty; expected at least one class with id, name and isthing")
    colours = [c.get("color") for c in categories]
    sound = all(isinstance(c, list) and len(c) == 3 and all(type(v) is int and 0 <= v < 256 for v in c) for c in colours)
    return Taxonomy(*zip(*rows), palette=tuple(map(tuple, colours)) if sound else None)


def read_split(root: Path, split: str, images: PanopticFolder, seed: int, complain: Callable[[UserError], None] = refuse) -> tuple[list[int], list[int]]:
    """Labelled and unlabelled indices; see `load_folder`. Raises: UserError if a list is empty, names an image twice or one that is not
    there, if a labelled image has no annotation, or is unlabelled, too."""
    everything = {images.name(i): i for i in range(len(images))}
    if not split:
        return list(range(images.annotated)), list(range(images.annotated, len(images)))
    if split.isdecimal():
        if not 0 < int(split) <= images.annotated:
            complain(UserError(f"--split {split}: expected 1 to {images.annotated} labelled images", "split"))
        order = np.random.default_rng(seed).permutation(images.annotated).tolist()
        return sorted(order[:int(split)]), sorted(order[int(split):]) + list(range(images.annotated, len(images)))
    path = root / "splits" / split / "labeled.txt"
    if split == "all" and not path.exists():
        return read_split(root, "", images, seed, complain)
    path = path if path.exists() else Path(split)
    if not path.is_file():
        known = sorted(p.parent.name for p in root.glob("splits/*/labeled.txt"))
        raise UserError(f"unknown split '{split}' of {root}; available: {', '.join(known) or 'none'}, a number, or a file of image names")
    def read(file):
        found: dict[int, None] = {}    # in the order of the list
        for line in _lines(file):
            # Official lists have two columns and name files by their path; names of one's own may have spaces in them.
            names = [n for text in (line, line.split()[0]) for n in (text, text.split("/")[-1])]
            i = next((everything[n] for n in names if n in everything), None)
            if i is None:
                complain(UserError(f"{file}: {brief(names[2])} is not an image of the training set", "split"))
            elif i in found:
                complain(UserError(f"{file}: {brief(images.name(i))} is listed twice", "split"))
            else:
                found[i] = None
        if not found:
            complain(UserError(f"{file}: the list is empty", "split"))
        return list(found)
    labeled, other = read(path), path.with_name("unlabeled.txt")
    for i in labeled:
        if i >= images.annotated:
            complain(UserError(f"{path}: {brief(images.name(i))} has no annotation; a labelled image needs one", "split"))
    known = set(labeled)
    unlabeled = read(other) if other.exists() else [i for i in range(len(images)) if i not in known]
    for i in unlabeled:
        if i in known:
            complain(UserError(f"{other}: {brief(images.name(i))} is in {path.name}, too; expected no image in both", "split"))
    return [i for i in labeled if i < images.annotated], unlabeled


def _lines(path: Path) -> list[str]:
    """Lines of a text file that are not blank."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable text file ({error})") from None


def require_files(images, indices, what: str, maps: bool = True, classes: bool = False) -> None:
    """Raise UserError before a run begins if images that it will need are not there, or their panoptic maps, or (if the data set has
    its own) their class maps. Folders are listed, no file is opened."""
    if not isinstance(images, PanopticFolder):
        return
    listed: dict[Path, set[str]] = {}
    def there(path: Path) -> bool:
        if path.parent not in listed:
            listed[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        return path.name in listed[path.parent]
    kinds = [("image", lambda i: images.images / images.name(i))]
    kinds += [("panoptic map", lambda i: images.maps / str(images.files[i]))] if maps else []
    kinds += [("class map", images.class_file)] if classes and images.semantic is not None else []
    for kind, path_of in kinds:
        absent = [path for path in map(path_of, indices) if not there(path)]
        if absent:
            raise UserError(f"{absent[0]}: no such file; {len(absent)} of {len(indices)} {what} {kind}s are listed but absent: complete the download, "
                            f"or take them from the list")


# ---------------------------------------------------------------------------------------------- views of an image

@dataclass
class Sample:
    """An image on its way to a batch. image: PIL, RGB.   layers: maps that move along, each (H, W), nearest neighbour."""
    image: Image.Image
    layers: list[np.ndarray]


def weak_view(sample: Sample, cfg: Config, rng: random.Random, colour: bool = False) -> tuple[Tensor, list[np.ndarray]]:
    """Random scale and crop, the SSD colour augmentation for labelled images, and a flip: (3, h, w) uint8, not padded, and its layers."""
    sizes = [int(0.1 * k * cfg.crop) for k in range(round(10 * cfg.scale_min), round(10 * cfg.scale_max) + 1)]
    w, h = size = output_size(*sample.image.size, rng.choice(sizes), MAX_LONG_SIDE * cfg.crop)
    cw, ch = min(w, cfg.crop), min(h, cfg.crop)
    x, y = rng.randint(0, w - cw), rng.randint(0, h - ch)
    sample = resize_part(sample, size, (x, y, x + cw, y + ch))
    image = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1).contiguous()
    layers = sample.layers
    if colour:
        image = ssd_colour(image, rng)
    if rng.random() < 0.5:
        image, layers = image.flip(-1), [a[:, ::-1] for a in layers]
    return image, layers


def resize(sample: Sample, short_side: int, long_side: int) -> Sample:
    """To a short side, unless the long side then exceeds its limit."""
    size = output_size(*sample.image.size, short_side, long_side)
    return resize_part(sample, size, (0, 0, *size))


def resize_part(sample: Sample, size: tuple[int, int], part: tuple[int, int, int, int]) -> Sample:
    """Resize to size (w, h) and crop to part (left, top, right, bottom) of the result; what lies outside of it is never computed.

    Values differ by at most two grey levels from the whole, cropped: Pillow may take columns before rows for the one and not for the other.
    """
    (w, h), (nw, nh), (left, top, right, bottom) = sample.image.size, size, part
    source = left * w / nw, top * h / nh, right * w / nw, bottom * h / nh
    image = sample.image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, source)
    xs, ys = (((np.arange(*ends) + 0.5) * old / new).astype(int) for ends, old, new in (((left, right), w, nw), ((top, bottom), h, nh)))
    return Sample(image, [a.take(ys, 0).take(xs, 1) for a in sample.layers])


def output_size(w: int, h: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(w, h) after scaling the short side to short_side, or less if the long side would exceed long_side."""
    scale = short_side / min(w, h)
    scale = min(scale, long_side / max(w, h))
    return max(1, int(w * scale + 0.5)), max(1, int(h * scale + 0.5))


def ssd_colour(image: Tensor, rng: random.Random) -> Tensor:
    """Brightness +-32 grey levels, contrast and saturation 0.5 to 1.5, hue +-36 degrees, each with probability 0.5. (3, h, w) uint8."""
    x = image.float() / 255
    if rng.random() < 0.5:
        x = (x + rng.uniform(-32, 32) / 255).clamp(0, 1)
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    contrast_first = rng.random() < 0.5
    if contrast_first:
        x = (x * contrast).clamp(0, 1)
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = rng.randint(-18, 18) if rng.random() < 0.5 else 0                        # in OpenCV's units of 2 degrees
    if saturation != 1.0 or hue:
        x = shift_hsv(x, hue / 180, saturation)
    if not contrast_first:
        x = (x * contrast).clamp(0, 1)
    return to_bytes(x)


def strong_view(image: Tensor, cfg: Config, rng: random.Random) -> Tensor:
    """Colour jitter (always, in random order), sometimes grayscale, sometimes Gaussian blur. (3, h, w) uint8."""
    # takes two seconds to import: only who needs it waits
    from torchvision.transforms.v2 import functional as TF

    factor, hue = (1 - cfg.jitter, 1 + cfg.jitter), (-cfg.jitter_hue, cfg.jitter_hue)
    steps = [(TF.adjust_brightness, factor), (TF.adjust_contrast, factor), (TF.adjust_saturation, factor), (shift_hsv, hue)]
    rng.shuffle(steps)
    x = image.float() / 255
    for adjust, interval in steps:
        x = adjust(x, rng.uniform(*interval))
    if rng.random() < cfg.grayscale_prob:
        x = TF.rgb_to_grayscale(x, num_output_channels=3)
    if rng.random() < cfg.blur_prob:
        x = gaussian_blur(x, rng.uniform(0.1, cfg.blur_radius))
    return to_bytes(x)


def shift_hsv(x: Tensor, turn: float, saturation: float = 1.0) -> Tensor:
    """Turn the hue by a share of the circle and multiply the saturation, as in HSV. (3, h, w) RGB in [0, 1].

    Torchvision's goes through six cases a pixel, Pillow's through 8 bits of hue; on the circle one rule serves the three channels: full up to
    one sixth of a turn from its own hue, none from two sixths on, linear between.
    """
    r, g, b = x
    top, low = x.amax(0), x.amin(0)
    hue = torch.copysign(1 + (g + b - r - low) / (top - low).clamp(min=1e-6), g - b) + 6 * turn        # sixths of a turn, red = 0
    chroma = ((top - low) * saturation).minimum(top)
    low = top - chroma
    shifted = torch.empty_like(x)
    for channel, own in zip(shifted, (0, 2, 4)):
        distance = hue - own
        distance -= 6 * torch.round(distance / 6)                  # the short way round: -3 to 3
        torch.addcmul(low, chroma, (2 - distance.abs()).clamp_(0, 1), out=channel)
    return shifted


def gaussian_blur(x: Tensor, radius: float) -> Tensor:
    """As Pillow's: three equal box blurs whose variances add up to radius ** 2, here as one kernel. (3, h, w); pixels of the edge repeat."""
    variance = radius ** 2 / 3
    n = int(((12 * variance + 1) ** 0.5 - 1) / 2)                  # a box has weight 1 at -n to n and less at either end
    end = (2 * n + 1) * (variance - n * (n + 1) / 3) / 2 / ((n + 1) ** 2 - variance)
    box = np.array([end, *[1] * (2 * n + 1), end]) / (2 * n + 1 + 2 * end)
    kernel = np.convolve(box, np.convolve(box, box)).tolist()
    reach = len(kernel) // 2
    x = F.pad(x[None], (reach, reach, reach, reach), mode="replicate")[0]
    for axis in (1, 2):
        moved = [x.narrow(axis, k, x.shape[axis] - 2 * reach) for k in range(len(kernel))]
        x = torch.zeros_like(moved[0])
        for weight, image in zip(kernel, moved):
            x.add_(image, alpha=weight)
    return x


def to_bytes(x: Tensor) -> Tensor:
    """[0, 1] -> uint8."""
    return torch.from_numpy((x * 255).round_().numpy().astype(np.uint8))            # torch's own conversion takes twice as long


def cutmix_box(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a CutMix box, in pixels of the view that it is cut from."""
    area = rng.uniform(*CUTMIX_AREA) * height * width
    while True:
        aspect = rng.uniform(*CUTMIX_ASPECT)
        w, h = int((area / aspect) ** 0.5), int((area * aspect) ** 0.5)
        x, y = rng.randrange(width), rng.randrange(height)
        if x + w <= width and y + h <= height:
            return y, y + h, x, x + w


def to_target(segment_map: np.ndarray, labels: np.ndarray, crowd: np.ndarray) -> Target:
    """Training target: crowd regions become void, segments without a pixel are dropped, ids are made consecutive."""
    areas = np.bincount(segment_map.ravel(), minlength=len(labels) + 1)[1:]
    keep = (areas > 0) & ~crowd
    lut = np.zeros(len(labels) + 1, np.int32)
    lut[1:][keep] = np.arange(1, keep.sum() + 1)
    return Target(torch.as_tensor(labels[keep], dtype=torch.int64), torch.from_numpy(lut[segment_map]))


# ----------------------------------------------------------------------------------------------------- batches

@dataclass
class Labeled:
    """images (B, 3, S, S) uint8; B targets; names of the files."""
    images: Tensor
    targets: list[Target]
    names: list[str]

    def to(self, device) -> "Labeled":
        return Labeled(self.images.to(device, non_blocking=True), [t.to(device) for t in self.targets], self.names)


@dataclass
class Unlabeled:
    """Two views of B images, and for images with a CutMix box the two views of the partner.

    weak, strong: (B, 3, S, S) uint8.   boxes: B boxes (top, bottom, left, right) or None.
    partner_weak, partner_strong: (M, 3, S, S) uint8, M = boxes that are not None, in their order.
    """
    weak: Tensor
    strong: Tensor
    boxes: list[tuple[int, int, int, int] | None]
    partner_weak: Tensor
    partner_strong: Tensor
    names: list[str]

    def to(self, device) -> "Unlabeled":
        move = lambda t: t.to(device, non_blocking=True)
        return Unlabeled(move(self.weak), move(self.strong), self.boxes, move(self.partner_weak), move(self.partner_strong), self.names)


class Batches(torch.utils.data.Dataset):
    """Batch number `step` of a run: a map from step to batch, so that order and workers do not matter.

    Subclasses say what a batch is; `rng` is the only source of chance they may use.
    """

    def __init__(self, cfg: Config, steps: int):
        self.cfg, self.steps = cfg, steps
        self.rank, self.ranks = ranks.rank(), ranks.count()                        # a loader process could not ask any more
        self._order = (None, [])       # the pass that was shuffled last

    def __len__(self) -> int:
        return self.steps

    @property
    def parts(self) -> list[int]:
        """The first steps of parts of the run whose batches differ in kind."""
        return [0]

    def slots(self, batch: int) -> range:
        """The images of a batch that this rank takes. Raises UserError if some rank would have none."""
        if batch < self.ranks:
            raise UserError(f"{self.ranks} processes cannot share a batch of {batch}: start fewer with torchrun --nproc_per_node, or choose a larger batch")
        return ranks.share(batch, self.rank, self.ranks)

    def rng(self, *key) -> random.Random:
        return random.Random(repr((self.cfg.seed, type(self).__name__, *key)))

    def pick(self, indices: list[int], step: int, slot: int, batch: int) -> int:
        """Endless shuffled passes over the indices."""
        epoch, position = divmod(step * batch + slot, len(indices))
        if self._order[0] != epoch:
            order = list(indices)
            self.rng("epoch", epoch).shuffle(order)
            self._order = epoch, order
        return self._order[1][position]


class LabeledBatches(Batches):
    """Labelled images with ground truth, for stages sup and ssl."""

    def __init__(self, dataset: DataSet, cfg: Config, steps: int):
        super().__init__(cfg, steps)
        self.dataset = dataset

    def __getitem__(self, step: int) -> Labeled:
        images, targets, names = [], [], []
        for slot in self.slots(self.cfg.labeled_batch):
            i = self.pick(self.dataset.labeled, step, slot, self.cfg.labeled_batch)
            truth = self.dataset.train.truth(i)
            truth = truth.by_class() if self.cfg.labels == "semantic" else truth
            image, (segment_map,) = weak_view(Sample(self.dataset.train.image(i), [truth.segment_map]), self.cfg, self.rng(step, slot), colour=True)
            images.append(pad_image(image, self.cfg.crop))
            targets.append(to_target(pad(segment_map, self.cfg.crop, 0), truth.labels, truth.crowd))
            names.append(self.dataset.train.name(i))
        return Labeled(torch.stack(images), targets, names)


class SemiSupervisedBatches(Batches):
    """A labelled batch and an unlabelled one, drawn independently and with replacement. No unlabelled one during burn-in."""

    def __init__(self, dataset: DataSet, cfg: Config, steps: int, warm: bool = False):
        super().__init__(cfg, steps)
        self.dataset, self.labeled = dataset, LabeledBatches(dataset, cfg, steps)
        self.burn_in = cfg.burn_in_warm if warm else cfg.burn_in
        # of `strong_view`: here once, not in every loader process
        import torchvision.transforms.v2.functional  # noqa: F401

    @property
    def parts(self) -> list[int]:
        return [0, self.burn_in] if 0 < self.burn_in < self.steps else [0]

    def __getitem__(self, step: int) -> tuple[Labeled, Unlabeled | None]:
        if step < self.burn_in:
            return self.labeled[step], None
        views, partners, boxes, names = [], [], [], []
        for slot in self.slots(self.cfg.unlabeled_batch):
            rng = self.rng(step, slot)
            name, *pair = self._two_views(rng)
            views.append(pair)
            names.append(name)
            box = None
            if rng.random() < self.cfg.cutmix_prob:                # drawn first: an image without a box needs no partner
                _, *partner = self._two_views(rng)
                partners.append(partner)
                box = cutmix_box(*partner[0].shape[1:], rng)
            boxes.append(box)
        def stack(pairs, k):
            return torch.stack([pad_image(p[k], self.cfg.crop) for p in pairs]) if pairs else torch.empty(
                0, 3, self.cfg.crop, self.cfg.crop, dtype=torch.uint8)
        return self.labeled[step], Unlabeled(stack(views, 0), stack(views, 1), boxes, stack(partners, 0), stack(partners, 1), names)

    def _two_views(self, rng: random.Random) -> tuple[str, Tensor, Tensor]:
        i = rng.choice(self.dataset.unlabeled)
        weak, _ = weak_view(Sample(self.dataset.train.image(i), []), self.cfg, rng)
        return self.dataset.train.name(i), weak, strong_view(weak, self.cfg, rng)


def pad_image(image: Tensor, side: int) -> Tensor:
    """(3, h, w) -> (3, side, side), grey at the right and at the bottom."""
    return F.pad(image, (0, side - image.shape[2], 0, side - image.shape[1]), value=PAD_VALUE)


def pad(a: np.ndarray, side: int, value: int) -> np.ndarray:
    """(h, w, ...) -> (side, side, ...)."""
    out = np.full((side, side, *a.shape[2:]), value, a.dtype)
    out[:a.shape[0], :a.shape[1]] = a
    return out


def loader(batches: Batches, start: int, workers: int):
    """Iterate over batches start, start + 1, ... with loader processes, which end when the generator is closed."""
    try:
        yield from torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(start, len(batches)), collate_fn=as_it_is,
                                               num_workers=workers, prefetch_factor=2 if workers else None, worker_init_fn=_await_the_parent)
        return
    except UserError as error:         # a worker's error arrives with its traceback as text
        words = str(error).strip().splitlines()[-1].split("UserError: ")[-1]
    raise UserError(words)             # not from within: the first error would keep the loader processes alive


def _await_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group: a loader process ends a little later, when the parent knows as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def as_it_is(batch):
    """A collate function: torch's own would turn tuples into lists, and arrays into tensors."""
    return batch

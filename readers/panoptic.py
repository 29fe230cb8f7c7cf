"""Images and ground truth in COCO panoptic format: a JSON, a folder of images, a folder of maps.

`readers.panoptic_json` reads the JSON; here files are found, opened and held against it.
Differs from detectron2: nothing is taken on trust, an image and its map must agree in size and ids.
"""

import functools
import os
from pathlib import Path

import numpy as np
from PIL import Image

from ground.errors import UserError, refuse
from readers.ground_truth import IGNORE, DataSet, Taxonomy, Truth
from readers.panoptic_json import MAX_ID, Complain, PanopticIndex, by_name, read_taxonomy
from readers.pictures import Images, file_digest, image_header, open_image
from readers.splits import read_split

# The JSON of a part (train, val) and a variant, below the root of a data set.
PLACES = ("panoptic_{}{}", "annotations/panoptic_{}{}", "annotations/panoptic_{}2017{}")
MAPS = "; for class maps in labels/, classes.txt is missing, a name a line"
IMPORT = "; of annotations of other tools --stage import makes such a folder"


class PanopticFolder(PanopticIndex, Images):
    """Images and ground truth in COCO panoptic format.

    An image is turned as its EXIF block says, as detectron2 does; maps have none, and `_upright`
    turns them along where it must.

    Args:
        annotations: the JSON.   folder: of the images.   maps: folder of RGB-coded PNG maps.
        semantic: folder of class maps that mIoU is measured against, where the data set has its
            own: uint8, class `semantic_first` + k for class k, anything else is no class (ADE20K
            counts from 1, COCO-Objects from 0).
        validation: images without annotation are not used (`unused`).
        hidden: segments may lie wholly below others, and stated areas count what is hidden
            (ADE20K's rule); else a segment without a pixel is a fault.
        complain: called with every fault that allows to read on; what is at fault is left out.
    Raises: UserError where a file or a key is missing, a file is a link out of the data root, or
        map, JSON and image disagree.
    """

    def __init__(
        self,
        annotations: Path,
        folder: Path,
        maps: Path,
        taxonomy: Taxonomy,
        semantic: Path | None = None,
        semantic_first: int = 1,
        validation: bool = False,
        hidden: bool = False,
        complain: Complain = refuse,
    ):
        super().__init__(annotations, taxonomy, validation, complain)
        self.folder, self.maps, self.semantic = folder, maps, semantic
        self.semantic_first, self.hidden = semantic_first, hidden
        # A folder itself may be a link.
        root = os.path.commonpath([annotations, folder, maps])
        homes = [root, folder, maps, *([semantic] if semantic else [])]
        self.homes = tuple(os.path.join(os.path.realpath(home), "") for home in homes)

    def path(self, i: int) -> Path:
        return self.file(self.folder, self.name(i))

    def map_file(self, i: int) -> Path:
        return self.file(self.maps, str(self.files[i]))

    def file(self, folder: Path, name: str) -> Path:
        """folder/name, which may be a link to another place in the data root, but not out of it."""
        path = folder / name
        real = os.path.realpath(path)
        if not real.startswith(self.homes):
            raise UserError(
                f"{path}: is a link that leads out of the data root, to {real}; expected a file "
                "(a whole folder may be a link)",
                "name",
            )
        return path

    def truth_digest(self, i: int) -> str:
        """SHA-256 of the file of its panoptic map."""
        return file_digest(self.map_file(i))

    def truth(self, i: int, complain: Complain = refuse) -> Truth:
        """Ground truth of image i, one of the `annotated` ones, as it is shown."""
        path, segments = self.map_file(i), self.segments_of(i)
        coded = self._upright(segment_ids(path), i, path)
        # Pixels come in runs of one id, so only the first of each run is looked up.
        flat = coded.ravel()
        first = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
        ids, lengths = flat[first], np.diff(first, append=flat.size)
        order = np.argsort(segments[:, 0])
        known = np.append(segments[order, 0], MAX_ID)  # no id is so large
        place = np.searchsorted(known, ids)
        listed = known[place] == ids
        for number in np.unique(ids[~listed & (ids > 0)]):
            text = f"{path}: segment {number} has pixels but is not in segments_info"
            complain(UserError(text, "not in json"))
        index = np.where(listed, np.append(order + 1, 0)[place], 0).astype(np.int32)
        if not self.hidden:
            empty = np.bincount(index, minlength=len(segments) + 1)[1:] == 0
            for number in segments[empty, 0]:
                text = f"{path}: segment {number} is in segments_info but has no pixel"
                complain(UserError(text, "no pixel"))
        return Truth(
            np.repeat(index, lengths).reshape(coded.shape),
            segments[:, 1],
            segments[:, 2],
            segments[:, 3].astype(bool),
            functools.partial(self.class_map, i) if self.semantic else None,
        )

    def class_file(self, i: int) -> Path:
        return self.semantic / f"{Path(self.name(i)).stem}.png"

    def class_map(self, i: int) -> np.ndarray:
        """(H, W) class index of image i by the data set's own semantic ground truth, IGNORE where
        there is none."""
        path = self.file(self.semantic, self.class_file(i).name)
        stored = np.asarray(open_image(path, None))
        if stored.ndim != 2:
            text = f"expected a map of class numbers with one channel, got {stored.shape}"
            raise UserError(f"{path}: {text}", "unreadable")
        classes = self._upright(stored, i, path).astype(np.int32) - self.semantic_first
        classes[(classes < 0) | (classes >= len(self.taxonomy))] = IGNORE
        if self.order is None:
            return classes
        return np.append(self.order, IGNORE)[classes].astype(np.int32)

    def _upright(self, stored: np.ndarray, i: int, path: Path) -> np.ndarray:
        """A map (H, W) as image i is shown. Raises UserError if it has another size.

        Annotators see an image turned by its EXIF block, so a map of that size is taken as it is
        (of a square image, too). Only a map that has the size of the pixels as stored, and not of
        the image as shown, was drawn without looking at EXIF, and is turned along.
        """
        shown, turn = image_header(self.path(i))
        if stored.shape == shown[::-1]:
            return stored
        if turn is not None and stored.shape == shown:
            return np.asarray(Image.fromarray(stored).transpose(turn))
        raise UserError(
            f"{path}: {stored.shape[1]} x {stored.shape[0]} pixels, but its image {self.name(i)} "
            f"has {shown[0]} x {shown[1]}; expected one size",
            "size",
        )


def segment_ids(path: Path) -> np.ndarray:
    """(H, W) int32 ids of a panoptic PNG: R + 256 G + 65536 B."""
    image = open_image(path)
    # Four bytes a pixel, as Pillow keeps them: an integer, but for the fourth.
    coded = np.frombuffer(image.tobytes("raw", "RGBX"), "<i4")
    return (coded & 0xFFFFFF).reshape(image.height, image.width)


def encode(ids: np.ndarray) -> Image.Image:
    """Segment ids (H, W) -> the RGB image of a panoptic PNG, the inverse of `segment_ids`."""
    coded = ids.astype("<i4", "C").view(np.uint8).reshape(*ids.shape, 4)
    return Image.fromarray(np.ascontiguousarray(coded[..., :3]))


# ------------------------------------------------------------------------------------ whole folders


def load_folder(
    root: Path, split: str, seed: int = 0, variant: str = "", complain: Complain = refuse
) -> DataSet:
    """Any folder in COCO panoptic format.

    Args:
        root: holds panoptic_train.json and panoptic_val.json (or annotations/panoptic_*.json), the
            images and the maps.
        split: which images are labelled, see `read_split`.
        variant: ending of the JSON names, as in panoptic_train_4class.json.
        complain: called with every fault that allows to read on (`PanopticFolder`).
    """
    root = Path(root).expanduser()
    require_root(root)
    advice = (MAPS if (root / "labels").is_dir() else "") + IMPORT
    train_json, val_json = (
        _first(
            root, [f"{p.format(part, variant)}.json" for p in PLACES], "the panoptic JSON", advice
        )
        for part in ("train", "val")
    )
    taxonomy = read_taxonomy(train_json)
    theirs = by_name(taxonomy, train_json, val_json, complain)
    train = _part(root, "train", train_json, variant, taxonomy, complain)
    val = _part(root, "val", val_json, variant, theirs, complain)
    labeled, unlabeled = read_split(root, split, train, seed, complain)
    return DataSet(root.name, taxonomy, train, val, labeled, unlabeled)


def image_folder(root: Path, part: str) -> Path:
    return _first(root, [f"images/{part}", f"{part}2017", part, "images"], "the image folder")


def _part(
    root: Path, part: str, annotations: Path, variant: str, taxonomy: Taxonomy, complain: Complain
) -> PanopticFolder:
    folder = image_folder(root, part)
    beside = annotations.with_name(annotations.stem.removesuffix(variant)).relative_to(root)
    candidates = [beside.as_posix(), f"panoptic/{part}", f"panoptic_{part}", "panoptic"]
    try:
        maps, missing = _first(root, candidates, "the folder of panoptic PNG files"), None
    except UserError as error:
        maps, missing = root / candidates[0], error
    validation = part == "val"
    images = PanopticFolder(
        annotations, folder, maps, taxonomy, validation=validation, complain=complain
    )
    if missing and images.annotated:  # images without annotation need no maps
        raise missing
    return images


def require_root(root: Path) -> None:
    """Raise UserError unless there is such a folder."""
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; --data-root names a folder in COCO panoptic format"
        )


def has_maps(root: Path, variant: str = "") -> bool:
    """Whether a folder has a panoptic JSON of its training images."""
    paths = (Path(root) / f"{place.format('train', variant)}.json" for place in PLACES)
    return any(path.is_file() for path in paths)


def _first(root: Path, candidates: list[str], what: str, advice: str = "") -> Path:
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise UserError(f"{root}: {what} is missing; looked for {', '.join(candidates)}{advice}")

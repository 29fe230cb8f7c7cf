"""Where the paper's data sets come from, and where they lie. Imports no library, so a refusal is
quick.

A data set is in --data-root, by default in datasets/NAME, or $DEARLI_DATASETS/NAME
(`default_root`).
"""

import os
from pathlib import Path

from config import INSTANCE_DATASETS, PAPERS_SPLITS
from ground.errors import UserError

DOWNLOAD = {  # what each is made from
    **{"ade20k": "ade20k", "coco": "coco", "coco-objects": "coco"},
    **{name: name for name in (*INSTANCE_DATASETS, "voc", "cityscapes")},
}
CLASS_MAPS = ("voc", "cityscapes")  # data sets without segments
PROMPTS = {
    "ade20k": "ade20k_150_prompts.txt",
    "coco": "coco_panoptic_prompts.txt",
    "coco-objects": "coco_objects_prompts.txt",
    "coco-instances": "coco_panoptic_prompts.txt",  # Cityscapes' names have no synonyms
}
ADE_ZIP = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
ADE_INSTANCES = "http://sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar"
COCO_ZIPS = "http://images.cocodataset.org/zips"
COCO_PANOPTIC = "http://images.cocodataset.org/annotations/panoptic_annotations_trainval2017.zip"
COCO_INSTANCES = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
VOC_TAR = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
VOC_AUG = "https://www.dropbox.com/s/oeu149j8qtbs1x0/SegmentationClassAug.zip"
CITYSCAPES = "https://www.cityscapes-dataset.com/downloads"
# What has to be downloaded: path below the folder of the data set, and where it comes from.
ORIGINALS = {
    "ade20k": {
        f"{folder}/{part}": ADE_INSTANCES if folder.endswith("instance") else ADE_ZIP
        for folder in ("images", "annotations", "annotations_instance")
        for part in ("training", "validation")
    },
    "coco": {
        "train2017": f"{COCO_ZIPS}/train2017.zip",
        "val2017": f"{COCO_ZIPS}/val2017.zip",
        "annotations/panoptic_train2017.json": COCO_PANOPTIC,
        "annotations/panoptic_val2017.json": COCO_PANOPTIC,
        "panoptic_train2017": f"{COCO_PANOPTIC}, the zip in it",
        "panoptic_val2017": f"{COCO_PANOPTIC}, the zip in it",
    },
    "coco-instances": {
        "train2017": f"{COCO_ZIPS}/train2017.zip",
        "val2017": f"{COCO_ZIPS}/val2017.zip",
        "annotations/instances_train2017.json": COCO_INSTANCES,
        "annotations/instances_val2017.json": COCO_INSTANCES,
    },
    "cityscapes-instances": {
        f"{folder}/{part}": f"{CITYSCAPES}, {folder}_trainvaltest.zip"
        for folder in ("leftImg8bit", "gtFine")
        for part in ("train", "val")
    },
}
ORIGINALS |= {
    "voc": {"JPEGImages": VOC_TAR, "SegmentationClassAug": VOC_AUG},
    "cityscapes": {
        f"{folder}/{part}": CITYSCAPES
        for folder in ("leftImg8bit", "gtFine")
        for part in ("train", "val")
    },
}
# The usual name of the folder; DATA_ROOT may be it, or hold it.
FOLDERS = {
    **{"ade20k": "ADEChallengeData2016", "coco": "coco"},
    **{"coco-instances": "coco", "cityscapes-instances": "cityscapes"},
    **{"voc": "VOCdevkit/VOC2012", "cityscapes": "cityscapes"},
}


def default_root(name: str) -> Path:
    """--data-root where nobody names one. COCO-Objects and COCO's instances lie in the folder of
    COCO."""
    folder = "ade20k" if name == "ade20k" else FOLDERS[DOWNLOAD[name]]
    return Path(os.environ.get("DEARLI_DATASETS") or "datasets") / folder


def locate(name: str, root: Path) -> Path:
    """The folder of a data set: DATA_ROOT itself, or a folder of the usual name in it.

    Raises: UserError with all that has to be downloaded, if there is no such folder.
    """
    root, kind = Path(root), DOWNLOAD[name]
    if not root.is_dir():
        what = "a file, not a folder" if root.exists() else "no such folder"
        raise UserError(
            f"{root}: {what}; it should hold the downloads of {name}: {_listed(ORIGINALS[kind])}; "
            f"then `{_prepare(name, root)}`; or name another folder with --data-root, or the one "
            "above it with $DEARLI_DATASETS"
        )
    folder = root / FOLDERS[kind]
    return folder if folder.is_dir() else root


def parts(name: str, base: Path) -> dict[str, tuple[Path, Path, Path, Path | None]]:
    """Of `train` and `val`: panoptic JSON, images, panoptic maps, class maps (or None)."""
    if name == "ade20k":
        paths = "ade20k_panoptic_{0}.json images/{1} ade20k_panoptic_{0} annotations/{1}"
        words = {"train": ("train", "training"), "val": ("val", "validation")}
    else:
        paths = "annotations/panoptic_{0}2017{1}.json {0}2017 panoptic_{0}2017{1} masks"
        end = "_objects" if name == "coco-objects" else ""
        words = {"train": ("train", end), "val": ("val", end)}
    places = {
        part: tuple(base / path.format(*words[part]) for path in paths.split()) for part in words
    }
    # COCO's classes are in its panoptic maps; COCO-Objects may have the 81-class maps of UniMatch.
    if name == "coco" or name == "coco-objects" and not (base / "masks").is_dir():
        places = {part: (*paths[:3], None) for part, paths in places.items()}
    return places


def instance_parts(name: str, base: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The same of a data set of instances: the JSON and the image folder, by part. What COCO has as
    a download, Cityscapes gets from `--stage prepare`."""
    parts_of = ("train", "val")
    if name == "coco-instances":
        paths = {part: base / f"annotations/instances_{part}2017.json" for part in parts_of}
        return paths, {part: base / f"{part}2017" for part in parts_of}
    paths = {part: base / f"dearli/{name}/instances_{part}.json" for part in parts_of}
    return paths, {part: base / "leftImg8bit" / part for part in parts_of}


def _read_by_stages(name: str, base: Path) -> list[Path]:
    """The files and folders that the stages read."""
    if name in CLASS_MAPS:
        read = [base / path for path in ORIGINALS[name] if path != "SegmentationClassAug"]
        return [*read, base / "dearli" / name / "val.txt", *[voc_maps(base)] * (name == "voc")]
    own = [base / "dearli" / PROMPTS[name]] if name in PROMPTS else []
    if name not in INSTANCE_DATASETS:
        return own + [path for part in parts(name, base).values() for path in part[:3]]
    lists = [base / "dearli" / name / split / "labeled.txt" for split in PAPERS_SPLITS[name]]
    paths, folders = instance_parts(name, base)
    return [*own, *paths.values(), *folders.values(), *lists]


def require(name: str, root: Path, prepared: bool = True) -> Path:
    """The folder of a data set that holds what the stages read, or (prepared=False) what
    `--stage prepare` reads.

    Raises: UserError naming what is missing, and its address or the command that makes it.
    """
    base, kind = locate(name, root), DOWNLOAD[name]
    unmade = [path for path in _read_by_stages(name, base) if not path.exists()]
    if prepared and not unmade:
        return base
    originals = ORIGINALS[kind]
    missing = {path: source for path, source in originals.items() if not (base / path).exists()}
    if name == "voc" and voc_maps(base).is_dir():
        missing.pop("SegmentationClassAug", None)
    if missing:
        after = f"; then `{_prepare(name, root)}`" if prepared else ""
        raise UserError(
            f"{base}: {len(missing)} of {len(originals)} parts of {kind} are missing: "
            f"{_listed(missing)}{after}"
        )
    if prepared:
        raise UserError(f"{unmade[0]}: missing; make it with `{_prepare(name, root)}`")
    return base


def voc_maps(base: Path) -> Path:
    """The class maps of all training images, or where these are not of VOC's own 1464."""
    own, every = base / "SegmentationClass", base / "SegmentationClassAug"
    return own if own.is_dir() and not every.is_dir() else every


def _listed(originals: dict[str, str]) -> str:
    paths: dict[str, list[str]] = {}
    for path, source in originals.items():
        paths.setdefault(source, []).append(path)
    return ", ".join(f"{' and '.join(of)} (from {source})" for source, of in paths.items())


def _prepare(name: str, root: Path) -> str:
    place = "" if root == default_root(name) else f" --data-root {root}"
    return f"python dearli.py --stage prepare --dataset {name}{place}"

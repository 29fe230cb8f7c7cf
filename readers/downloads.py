"""Where the paper's data sets come from, and where they lie. Imports no library, so a refusal is quick.

A data set is in --data-root, by default in datasets/NAME, or $DEARLI_DATASETS/NAME (`default_root`).
"""

import os
from pathlib import Path

from ground.errors import UserError

DOWNLOAD = {"ade20k": "ade20k", "coco": "coco", "coco-objects": "coco"}  # what each is made from
PROMPTS = {
    "ade20k": "ade20k_150_prompts.txt",
    "coco": "coco_panoptic_prompts.txt",
    "coco-objects": "coco_objects_prompts.txt",
}
ADE_ZIP = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
ADE_INSTANCES = "http://sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar"
COCO_ZIPS = "http://images.cocodataset.org/zips"
COCO_PANOPTIC = "http://images.cocodataset.org/annotations/panoptic_annotations_trainval2017.zip"
# What has to be downloaded: path below the folder of the data set, and where it comes from.
ORIGINALS = {
    "ade20k": {
        f"{kind}/{part}": source
        for kind, source in (
            ("images", ADE_ZIP),
            ("annotations", ADE_ZIP),
            ("annotations_instance", ADE_INSTANCES),
        )
        for part in ("training", "validation")
    },
    "coco": {
        "train2017": f"{COCO_ZIPS}/train2017.zip",
        "val2017": f"{COCO_ZIPS}/val2017.zip",
        **{f"annotations/panoptic_{part}2017.json": COCO_PANOPTIC for part in ("train", "val")},
        **{f"panoptic_{part}2017": f"{COCO_PANOPTIC}, the zip in it" for part in ("train", "val")},
    },
}
# The usual name of the folder; DATA_ROOT may be it, or hold it.
FOLDERS = {"ade20k": "ADEChallengeData2016", "coco": "coco"}


def default_root(name: str) -> Path:
    """--data-root where nobody names one. COCO-Objects lies in the folder of COCO, of which it is made."""
    return Path(os.environ.get("DEARLI_DATASETS") or "datasets") / DOWNLOAD[name]


def locate(name: str, root: Path) -> Path:
    """The folder of a data set: DATA_ROOT itself, or a folder of the usual name in it.

    Raises: UserError with all that has to be downloaded, if there is no such folder.
    """
    root, folder = Path(root), FOLDERS[DOWNLOAD[name]]
    if not root.is_dir():
        what = "a file, not a folder" if root.exists() else "no such folder"
        raise UserError(
            f"{root}: {what}; it should hold the downloads of {name}: "
            f"{_listed(ORIGINALS[DOWNLOAD[name]])}; then `{_prepare(name, root)}`; or name another "
            "folder with --data-root, or the one above it with $DEARLI_DATASETS"
        )
    return root / folder if (root / folder).is_dir() else root


def parts(name: str, base: Path) -> dict[str, tuple[Path, Path, Path, Path | None]]:
    """Of `train` and `val`: panoptic JSON, images, panoptic maps, class maps (or None)."""
    if name == "ade20k":
        return {
            part: (
                base / f"ade20k_panoptic_{part}.json",
                base / "images" / long,
                base / f"ade20k_panoptic_{part}",
                base / "annotations" / long,
            )
            for part, long in (("train", "training"), ("val", "validation"))
        }
    end = "_objects" if name == "coco-objects" else ""
    masks = base / "masks"  # the 81-class maps of UniMatch
    if name != "coco-objects" or not masks.is_dir():
        masks = None
    return {
        part: (
            base / "annotations" / f"panoptic_{part}2017{end}.json",
            base / f"{part}2017",
            base / f"panoptic_{part}2017{end}",
            masks,
        )
        for part in ("train", "val")
    }


def require(name: str, root: Path, prepared: bool = True) -> Path:
    """The folder of a data set that holds what the stages read, or (prepared=False) what `--stage prepare` reads.

    Raises: UserError naming what is missing, and its address or the command that makes it.
    """
    base, kind = locate(name, root), DOWNLOAD[name]
    read = (
        base / "dearli" / PROMPTS[name],
        *(path for part in parts(name, base).values() for path in part[:3]),
    )
    wanted = [path for path in read if not path.exists()]
    if prepared and not wanted:
        return base
    missing = {
        path: source for path, source in ORIGINALS[kind].items() if not (base / path).exists()
    }
    if missing:
        after = f"; then `{_prepare(name, root)}`" if prepared else ""
        raise UserError(
            f"{base}: {len(missing)} of {len(ORIGINALS[kind])} parts of {kind} are missing: "
            f"{_listed(missing)}{after}"
        )
    if prepared:
        raise UserError(f"{wanted[0]}: missing; make it with `{_prepare(name, root)}`")
    return base


def _listed(originals: dict[str, str]) -> str:
    paths: dict[str, list[str]] = {}
    for path, source in originals.items():
        paths.setdefault(source, []).append(path)
    return ", ".join(f"{' and '.join(of)} (from {source})" for source, of in paths.items())


def _prepare(name: str, root: Path) -> str:
    place = "" if root == default_root(name) else f" --data-root {root}"
    return f"python dearli.py --stage prepare --dataset {name}{place}"

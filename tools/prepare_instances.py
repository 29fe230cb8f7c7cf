"""The data sets of instances (`--stage prepare`): their partitions as lists of names, and
Cityscapes' maps as COCO instances.

COCO's partitions are the indices of Unbiased Teacher (arXiv:2102.09480, run 1, which PL-DC takes)
into the images with an instance that is no crowd, sorted by id; those of Cityscapes are the lists
of Guided Distillation. Neither is a part of ours: they are fetched, and checked by SHA-256.
Axes: H W pixels.
"""

import json
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import PAPERS_SPLITS
from ground.errors import UserError
from ground.files import write_atomic
from readers.annotations.cityscapes import CITYSCAPES, FIRST_THING, IMAGE, MAP
from readers.downloads import instance_parts
from readers.instances import InstanceFolder, read_pair
from readers.pictures import open_image
from readers.runs import to_runs

UNBIASED_TEACHER = (
    "https://raw.githubusercontent.com/facebookresearch/unbiased-teacher/"
    "d13947a4c5d5d218c85b8f3a960cf598b564df39/dataseed/COCO_supervision.txt"
)
GUIDED_DISTILLATION = (
    "https://raw.githubusercontent.com/facebookresearch/GuidedDistillation/"
    "f775b48028eedc5501f66dee2f49d9896027a59e/data_splits/cityscapes"
)
RUN = "1"  # of Unbiased Teacher's ten
INSTANCES = """
3dc88c1fee5676d3da717a4a2a357e5e590d9bd7c94e2feadc60d43d70c4401d coco-instances/COCO_supervision.txt
da09a92a74030679fe00288dcbd0f471963cb2330ae07db8338dc91c2a00f7ef cityscapes-instances/perc_5.txt
53fa4fda61e82362715a1f546a5832b0a7d9bfdeb1398298f402c25e696e2bd6 cityscapes-instances/perc_10.txt
19d9af1a1156dbc2ecdf014d415f806cdcaa3a2f6615362a2bb48d7c1c470420 cityscapes-instances/perc_20.txt
94a4ad58a511d0071fcfbe2ad81764fdb388289a94971a356a9eee592256381f cityscapes-instances/perc_30.txt
"""
SHA256 = {f"splits/{path}": digest for digest, path in map(str.split, INSTANCES.split("\n")[1:-1])}


def lists(name: str) -> dict[str, tuple[str, str, str]]:
    """As `tools.prepare.lists`: files below base/dearli, without class names."""
    files = {}
    for given, digest in SHA256.items():
        folder, file = given.split("/")[1:]
        if folder == name:
            coco = name == "coco-instances"
            address = UNBIASED_TEACHER if coco else f"{GUIDED_DISTILLATION}/{file}"
            files[f"{name}/{file}"] = given, address, digest
    return files


def prepare(name: str, base: Path, workers: int) -> None:
    """Write what is missing of base/dearli/NAME: lists of names, and of Cityscapes the JSON."""
    paths, folders = instance_parts(name, base)
    if name == "cityscapes-instances":
        for part, path in paths.items():
            if not path.exists():
                _convert(base, part, path, folders[part], workers)
    wanted = {
        split: base / "dearli" / name / split / "labeled.txt" for split in PAPERS_SPLITS[name]
    }
    if all(path.exists() for path in wanted.values()):
        return
    _, train, _ = read_pair(paths, folders)
    for split, path in wanted.items():
        if name == "coco-instances":
            names = coco_names(base / "dearli" / name / "COCO_supervision.txt", split, train)
        else:
            names = cityscapes_names(base / "dearli" / name / f"perc_{split}.txt", train)
        write_atomic(path, "".join(f"{line}\n" for line in names).encode())


def coco_names(path: Path, percent: str, train: InstanceFolder) -> list[str]:
    """The labelled images of a percentage, as train2017/NAME; 100: all that have an instance that
    is no crowd.
    """
    order = sorted(range(train.annotated), key=lambda i: train.ids[i])
    if percent != "100":
        indices = json.loads(path.read_text())[f"{percent}.0"][RUN]
        if max(indices) >= len(order):
            raise UserError(
                f"{train.annotations}: {len(order):,} images with an instance that is no crowd, "
                f"and the partition names number {max(indices):,}; expected the "
                "instances_train2017.json of COCO, with 117,266"
            )
        order = [order[k] for k in indices]
    return [f"train2017/{train.name(i)}" for i in order]


def cityscapes_names(path: Path, train: InstanceFolder) -> list[str]:
    """The labelled images of a list of maps, as CITY/NAME_leftImg8bit.png."""
    known = {train.name(i) for i in range(train.annotated)}
    files = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    names = [f"{file.split('_')[0]}/{file.replace(MAP, IMAGE)}" for file in files]
    absent = [name for name in names if name not in known]
    if absent:
        raise UserError(
            f"{train.folder / absent[0]}: not there, or without an instance, though {path.name} "
            f"names it ({len(absent)} of {len(names)}); unpack leftImg8bit_trainvaltest.zip and "
            "gtFine_trainvaltest.zip whole"
        )
    return names


def _convert(base: Path, part: str, target: Path, folder: Path, workers: int) -> None:
    """All maps of a part as one JSON."""
    images = sorted(folder.glob(f"*/*{IMAGE}"))
    if not images:
        raise UserError(f"{folder}: no CITY/*{IMAGE} files; the download is incomplete")
    maps = [base / "gtFine" / part / p.parent.name / p.name.replace(IMAGE, MAP) for p in images]
    content = {"images": [], "annotations": []}
    with ThreadPool(max(1, workers)) as pool:
        rows = pool.imap(_read, zip(images, maps))
        bar = tqdm(rows, total=len(images), desc=part, unit="image", dynamic_ncols=True)
        for number, (image, (size, found)) in enumerate(zip(images, bar), 1):
            name = f"{image.parent.name}/{image.name}"
            sides = {"height": size[0], "width": size[1]}
            content["images"].append({"id": number, "file_name": name, **sides})
            for one in found:
                about = {"id": len(content["annotations"]) + 1, "image_id": number}
                content["annotations"].append({**about, **one})
    content["categories"] = [
        {"id": key, "name": name, "color": [*colour]}
        for key, (name, colour) in CITYSCAPES.items()
        if key >= FIRST_THING
    ]
    write_atomic(target, json.dumps(content).encode())


def _read(pair: tuple[Path, Path]) -> tuple[tuple[int, int], list[dict]]:
    image, path = pair
    if not path.exists():
        raise UserError(
            f"{path}: missing, though {image.name} is there; unpack the whole "
            "gtFine_trainvaltest.zip"
        )
    ids = np.asarray(open_image(path, None))
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise UserError(f"{path}: expected a map of ids with one channel, got {ids.shape}")
    return ids.shape, instances_in(ids)


def instances_in(ids: np.ndarray) -> list[dict]:
    """The things of a map as COCO annotations without ids: from 1000 on class * 1000 + k is an
    instance; a class alone is a group that nobody told apart, a crowd. ids: (H, W) integers.
    """
    found = []
    for value in np.unique(ids).tolist():
        key = value // 1000 if value >= 1000 else value
        if key >= FIRST_THING and key in CITYSCAPES:
            mask = ids == value
            ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            corner = [int(xs[0]), int(ys[0])]
            found.append(
                {
                    "category_id": key,
                    "iscrowd": int(value < 1000),
                    "area": int(mask.sum()),
                    "bbox": [*corner, int(xs[-1]) - corner[0] + 1, int(ys[-1]) - corner[1] + 1],
                    "segmentation": to_runs(mask),
                }
            )
    return found

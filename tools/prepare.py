"""The paper's data sets from their downloads to COCO panoptic format (`--stage prepare`).

ADE20K gets panoptic ground truth from its semantic and its instance maps, COCO-Objects from
COCO-Panoptic; the official partitions and class names come from the official repository, at a
pinned commit and checked by SHA-256. A call that was interrupted goes on.
Source: the rules of Mask2Former's preparation script and of the official `prepare_coco_objects.py`.
Differs from them: segment ids count from 1 (theirs are colours), which no metric sees.
Axes: H W pixels.
"""

import hashlib
import io
import json
import urllib.request
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable

import numpy as np
from tqdm import tqdm

from config import INSTANCE_DATASETS, PAPERS_SPLITS
from ground.errors import UserError
from ground.files import write_atomic
from readers.downloads import CLASS_MAPS, DOWNLOAD, PROMPTS, require
from readers.panoptic import PanopticFolder, encode, segment_ids
from readers.panoptic_json import read_json, read_taxonomy
from readers.papers import read_names
from readers.pictures import image_header, open_image
from tools import prepare_instances

REPOSITORY = (
    "https://raw.githubusercontent.com/helen1c/DEARLi/1de0dc82509c2c9a137241c4c857cb09e64ea178"
)
# Partitions of VOC and Cityscapes (Apache-2.0)
U2PL = (
    "https://raw.githubusercontent.com/Haochen-Wang409/U2PL/"
    "ab3d2be313d4d6b2885e7a0213d4fce82a803b79"
)
# Semantic class (0 to 149) of instance class 1 to 100: the things of ADE20K; the rest is stuff.
ADE_THINGS = [
    int(number)
    for number in """
7 8 10 12 14 15 18 19 20 22 23 24 27 30 31 32 33 35 36 37 38 39 41 42 43 44 45 47 49 50 53 55 56
57 58 62 64 65 66 67 69 70 71 72 73 74 75 76 78 80 81 82 83 85 86 87 88 89 90 92 93 95 97 98 102
103 104 107 108 110 111 112 115 116 118 119 120 121 123 124 125 126 127 129 130 132 133 134 135
136 137 138 139 142 143 144 146 147 148 149
""".split()
]
COCO_LAST_THING = 90  # category ids above are stuff
# COCO-Objects: all stuff and all unlabelled pixels.
BACKGROUND = {"id": 0, "name": "background", "isthing": 0}
OFFICIAL = """
3204c154e2c524ce2575f873838893fc25d68c5c4f7973f2d4ee76d7e24bb781 prompts/ade20k_150_prompts.txt
6b2c2528a1db62b2a0b979d823847ed5eb5b902982dd2af1c35c1df118a882cb prompts/coco_objects_prompts.txt
560169ea22202460c3b9427df387f8d1778e94dadecd38554da683e2097cda9f prompts/coco_panoptic_prompts.txt
5b28d705e511a35f89b19b997eb68febea76253a6bd88429b62cf4e8446f0d05 splits/ade20k/1_128/labeled.txt
5db039df7c0d03677ebefdf81589003fedd9be84327ff02a5e152c21894a0633 splits/ade20k/1_128/unlabeled.txt
85cb4de0a7896e90511e0ad5581f7b60a44d0896cfbdede01e11d1a55cb7b6f8 splits/ade20k/1_16/labeled.txt
16cb9662ec8d7ecf909c770b2c26cef2c57715ead4620bbf1baa93cfe8126910 splits/ade20k/1_16/unlabeled.txt
0a2f3b29515a07ea912f256d49b650a8436b846f838f10b122799ef3b2395f93 splits/ade20k/1_32/labeled.txt
fcc7ff003aeab664b1d93d2cc19c040e6248eed70c82ee41b0cdd52385942199 splits/ade20k/1_32/unlabeled.txt
78f423b10adcb3670e048c02bf43707430ede157036c195b61912dc4bf25602a splits/ade20k/1_64/labeled.txt
0c913d1ff072c7ecddefa209302ff581f7b1686ab553f8d1e4052a7e1fd1a28c splits/ade20k/1_64/unlabeled.txt
73d45bc89e256a85419ae72cf88fd86ffbadab0ed86b0a186cae77192815582e splits/ade20k/1_8/labeled.txt
b44cb3d141a3179ce6a5f32399cff56b5def6df9ba98f4b069da23a6959ddb60 splits/ade20k/1_8/unlabeled.txt
06067c0fb879b8e6ab8f4bdab3dfa641e8e4da2990200fa156daa33670329d79 splits/coco/1_128/labeled.txt
4cdf41b9d3b3afc3734057a605015860501199ed3680370ccb2c677fc159b127 splits/coco/1_256/labeled.txt
781b5990914f7422ee9e1f6325a914f289e077621b77b9cd066c2d01d33a939e splits/coco/1_32/labeled.txt
bd0ff85bf2d35b4641d08c2201257ad5b5f02f85ea0da457f44f0b97c4caeb37 splits/coco/1_512/labeled.txt
622b84ccbb5dcba32f4f5bb4ffaf1a9cf3e3f1f460b55dc02605fd099ebf1337 splits/coco/1_64/labeled.txt
1c345bd7ed630b201bc3c3cde2604dce0d65df35c142bbf35ffea8a699485488 cityscapes/1488/labeled.txt
be9e936decc74da8575cd57974e3b0ed4a669317873a5748125330b7d10409dc cityscapes/1488/unlabeled.txt
b325a363ec870628cbf3265bf48f9d9bf3e6e87a6e5c004ca989cda6279a0fd4 cityscapes/186/labeled.txt
0adcdcf9cf5db4276dfcdba1c207b2e5439ee465102d923eff3eec61573c5393 cityscapes/186/unlabeled.txt
a7fa9c926a15c3983a6b2b884dc455bcfaf59ddc2cbe63f895e1d067d5a7f9b4 cityscapes/372/labeled.txt
de6eeec7ec6d43403138d840e91e671af0033dc09a09cbcd14a7b872963b034f cityscapes/372/unlabeled.txt
489d49d7dde31150a862dbd0aabfa8e787b9278ee51978d7d3d2c8e67d666c66 cityscapes/744/labeled.txt
e7b30bf5cee9103f546818e61fd8e26eb63c3a763fdd2a45343744bb6d96618a cityscapes/744/unlabeled.txt
8115b5b627fe0b24001c541804788b8c2bb16076b78ad036a9905d471abd11fd cityscapes/val.txt
112dcea11e1a1d211e03db87c743989ffb29c16f90ce30da7c118b3c28f8d697 voc/1323/labeled.txt
669ca8dc16acaf33a9db723d40e914f93d8d4ab5edab121148fbf30861128694 voc/1323/unlabeled.txt
129f1fe991729b1862115b77738c938c149c1f167baa02b4b3186aea9f0d6a84 voc/1464/labeled.txt
ba34ae09804b56761fbb46667ed6eb962a498205c068521b1105a0944f08ac40 voc/1464/unlabeled.txt
5dac0b72efebf63344c90c3700537e6d667c80bfa4c17205d96d459e655ec976 voc/183/labeled.txt
4a3f4c77c01bae73b342439dbb3eb9f09b102e5ca5680fcfd941785bafd0cc98 voc/183/unlabeled.txt
4cc769f75d69c74e4eabdb1dff7cb93ac22a4c30a9b759a7cedec3e3c6b7ed28 voc/2646/labeled.txt
4fd8e0bc7304c99ac884c6876a8f5d23ce6d9468fa55601334982ad4fa631f4f voc/2646/unlabeled.txt
97abd8fe7d52346b2663e6faed73e89560a171788ea0a12c012bff26c74a25d4 voc/366/labeled.txt
2cb6fe3645fa20e66653209b003e9d8b059e18bc664341515ea352eac2ef273c voc/366/unlabeled.txt
989051b20c885ee09c37b5e5d005c067a6cd1bbcf40b06df6eb4af9e41992296 voc/5291/labeled.txt
7594c243192ee8decac87d733eb977fea16ede88f9b0cf7759c73251e7f0a82c voc/5291/unlabeled.txt
e9bb5d18af8041799389ad0c2274f043161a912837416c2c6403d9d901dee4c1 voc/662/labeled.txt
a9a7e39271779ccaacced31633d32d55a0dc27f61a451ac5e3a7a1403cdfb5af voc/662/unlabeled.txt
b2973f8d47b780e0bc53f598a51fb651c21c7485f4d02111296452abb931ce44 voc/732/labeled.txt
077f8aab596629403bb38177c3c678a17a30eb7132a38f4952237763b311a170 voc/732/unlabeled.txt
7feeb5314d99485739e79c385d3b70145d44dc60190acb4d5df63165c630ef6a voc/92/labeled.txt
9ae9c7726c7e06f8ef40cddfea55911128157c5a21c3c5195074e4e45e48031f voc/92/unlabeled.txt
6f8edc37993764f6e212237d39546fb595246244147e8a050813c520aac0ade1 voc/val.txt
"""
SHA256 = {path: digest for digest, path in map(str.split, OFFICIAL.strip().splitlines())}


# ------------------------------------------------------------------------------ segments by rule


def ade_panoptic(semantic: np.ndarray, instances: np.ndarray) -> tuple[np.ndarray, list[dict]]:
    """One ADE20K image: (H, W) int32 segment ids, 0 = void, and its segments_info.

    Stuff comes from the semantic map; instances lie on top and hide it, but the area of stuff is
    counted before (as officially). Things of the semantic map that no instance covers stay void.

    Args:
        semantic: (H, W) uint8, 0 = none, else class + 1.
        instances: (H, W, 3) uint8, R = instance class 1 to 100, G = number, 0 = none.
    Raises: ValueError if an instance has several classes or an unknown one.
    """
    ids, segments = np.zeros(semantic.shape, np.int32), []

    def add(mask, category):
        number = len(segments) + 1
        info = {"id": number, "category_id": int(category), "area": int(mask.sum())}
        segments.append({**info, "bbox": box(mask), "iscrowd": 0})
        ids[mask] = number

    for value in np.unique(semantic):
        if value and value - 1 not in ADE_THINGS:
            add(semantic == value, value - 1)
    for number in np.unique(instances[..., 1]):
        if number:
            mask = instances[..., 1] == number
            classes = np.unique(instances[mask][:, 0])
            if len(classes) != 1 or not 1 <= classes[0] <= len(ADE_THINGS):
                raise ValueError(
                    f"instance {number} has classes {classes.tolist()}, "
                    f"expected one of 1 to {len(ADE_THINGS)}"
                )
            add(mask, ADE_THINGS[classes[0] - 1])
    return ids, segments


def objects_panoptic(ids: np.ndarray, segments: list[dict]) -> tuple[np.ndarray, list[dict]]:
    """COCO-Objects from one COCO-Panoptic image: all stuff and all unlabelled pixels become one
    background segment.

    The background keeps the id and the box of the first stuff segment; without stuff it takes the
    least unused id; without stuff and unlabelled pixels there is none.    ids: (H, W) int32.
    """
    things = [s for s in segments if s["category_id"] <= COCO_LAST_THING]
    stuff = [s for s in segments if s["category_id"] > COCO_LAST_THING]
    unlabelled = ids == 0
    if not stuff and not unlabelled.any():
        return ids, things
    background = dict(stuff[0]) if stuff else {"iscrowd": 0}
    used = {s["id"] for s in segments}
    number = stuff[0]["id"] if stuff else next(n for n in range(1, len(used) + 2) if n not in used)
    area = sum(s["area"] for s in stuff) + int(unlabelled.sum())
    background.update(id=number, category_id=0, area=area)
    covered = unlabelled | np.isin(ids, [s["id"] for s in stuff])
    return np.where(covered, number, ids).astype(np.int32), [*things, background]


def box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height] of the true pixels."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)]


# ----------------------------------------------------------------------------------- preparation


def prepare(name: str, root: Path, assets: Path | None = None, workers: int = 4) -> Path:
    """Check the downloads, fetch partitions and class names, convert; safe to call again.

    Returns: the folder of the data set.
    Raises: UserError listing every download that is missing and its address, or a list that cannot
    be had or is not the official one.
    """
    base = require(name, root, prepared=False)
    fetch_lists(name, base, assets)
    if name == "ade20k":
        _prepare_ade(base, workers)
    elif name == "coco-objects":
        _prepare_objects(base, workers)
    elif name in INSTANCE_DATASETS:
        prepare_instances.prepare(name, base, workers)
    return base


def _prepare_ade(base: Path, workers: int) -> None:
    names = read_names(base / "dearli" / PROMPTS["ade20k"])
    categories = [
        {"id": k, "name": names[k + 1], "isthing": int(k in ADE_THINGS)} for k in range(150)
    ]
    kinds = ("annotations", "annotations_instance")
    for part, long in (("train", "training"), ("val", "validation")):
        maps, folder = base / f"ade20k_panoptic_{part}", base / "images" / long
        images = sorted(path for path in folder.glob("*.jpg") if not path.name.startswith("."))
        if not images:
            raise UserError(f"{folder}: no *.jpg files; the download is incomplete")
        tasks = {}
        for image in images:
            png = f"{image.stem}.png"
            semantic, instances = (base / kind / long / png for kind in kinds)
            tasks[image.stem] = (image, semantic, instances, maps / png)
        convert(tasks, _ade_image, maps, base / f"{maps.name}.json", categories, workers)


def _prepare_objects(base: Path, workers: int) -> None:
    for part in ("train", "val"):
        stem = f"panoptic_{part}2017"
        path, source = base / "annotations" / f"{stem}.json", base / stem
        maps = base / f"{stem}_objects"
        # Refuses what is malformed, or written elsewhere.
        PanopticFolder(path, base / f"{part}2017", source, read_taxonomy(path))
        content = read_json(path)
        images = {entry["id"]: entry for entry in content["images"]}
        things = [c for c in content["categories"] if c["id"] <= COCO_LAST_THING]
        tasks = {
            str(a["image_id"]): (
                images[a["image_id"]],
                a,
                source / a["file_name"],
                maps / a["file_name"],
            )
            for a in content["annotations"]
        }
        target = base / "annotations" / f"{maps.name}.json"
        convert(tasks, _objects_image, maps, target, [BACKGROUND, *things], workers)
    if not (base / "masks").is_dir():
        print(
            f"{base / 'masks'}: not there, so mIoU will be measured on the converted panoptic "
            "maps; officially it is on UniMatch's 81-class maps"
        )


def fetch_lists(name: str, base: Path, assets: Path | None) -> None:
    """Put the official partitions and class names under base/dearli, from `assets` or from the
    official repository."""
    for local, (given, remote, digest) in lists(name).items():
        target = base / "dearli" / local
        if target.exists() and _sha256(target.read_bytes()) == digest:
            continue
        if assets is None:
            usual = U2PL if name in CLASS_MAPS else REPOSITORY
            source = remote if "://" in remote else f"{usual}/{remote}"
            content = _fetched(source)
        else:
            copies = [Path(assets) / path for path in (given, remote)]
            source = next((path for path in copies if path.is_file()), None)
            if source is None:
                raise UserError(
                    f"{assets}: neither {given} nor {remote} is there; --assets names a copy of "
                    "the official repository"
                )
            content = source.read_bytes()
        if _sha256(content) != digest:
            raise UserError(
                f"{source}: SHA-256 is {_sha256(content)}, expected {digest}; it is not the "
                f"official list of commit {REPOSITORY[-40:-33]}"
            )
        write_atomic(target, content)


def _fetched(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.read()
    except OSError as error:  # URLError is one
        raise UserError(
            f"{address}: cannot be fetched ({error}); clone the official repository elsewhere and "
            "name it with --assets DIR"
        ) from None


def lists(name: str) -> dict[str, tuple[str, str, str]]:
    """Files below base/dearli: (path in --assets, path in the official repository, SHA-256)."""
    if name in CLASS_MAPS:
        there = {"voc": "pascal"}.get(name, name)
        files = [
            f"{split}/{part}labeled.txt" for split in PAPERS_SPLITS[name] for part in ("", "un")
        ]
        return {
            f"{name}/{file}": (
                f"splits/{name}/{file}",
                f"data/splits/{there}/{file}",
                SHA256[f"{name}/{file}"],
            )
            for file in [*files, "val.txt"]
        }
    kind, files = DOWNLOAD[name], {}
    ade, own = kind == "ade20k", prepare_instances.lists(name)
    if prompts := PROMPTS.get(name):
        remote = f"mask2former/data/vlm_datasets/eng_prompts/{prompts}"
        files[prompts] = f"prompts/{prompts}", remote
    for split in PAPERS_SPLITS[name] if not own else ():
        for part in ("labeled", "unlabeled") if ade else ("labeled",):  # COCO: all others
            path = f"{split}/{part}.txt"
            remote = f"datasets/{'ade' if ade else 'coco'}_splits/{path}"
            files[f"{kind}/{path}"] = (f"splits/{kind}/{path}", remote)
    return {local: (*paths, SHA256[paths[0]]) for local, paths in files.items()} | own


def convert(
    tasks: dict[str, tuple],
    worker: Callable[[tuple], dict],
    maps: Path,
    target: Path,
    categories: list[dict],
    workers: int,
) -> None:
    """Run worker(task) -> {"image", "annotation"} on all tasks, then write the JSON `target`.

    Finished images are noted in TARGET.part, line by line, so that an interrupted call goes on
    where it was.
    """
    if target.exists():
        return
    part = target.with_name(f"{target.name}.part")
    maps.mkdir(parents=True, exist_ok=True)
    done = {}
    for line in part.read_text().splitlines() if part.exists() else []:
        try:
            row = json.loads(line)
            done[row["key"]] = row
        except (ValueError, KeyError):  # the line at which the last call was cut
            continue
    todo = [key for key in tasks if key not in done]

    def run(key):
        return {"key": key, **worker(tasks[key])}

    # Threads: Pillow and numpy work outside Python's lock.
    with open(part, "a") as log, ThreadPool(max(1, workers)) as pool:
        log.write("\n" if log.tell() else "")  # the last line may have been cut
        rows = pool.imap_unordered(run, todo)
        for row in tqdm(rows, total=len(todo), desc=maps.name, unit="image", dynamic_ncols=True):
            log.write(json.dumps(row) + "\n")
            log.flush()
            done[row["key"]] = row
    content = {
        "images": [done[key]["image"] for key in tasks],
        "annotations": [done[key]["annotation"] for key in tasks],
        "categories": categories,
    }
    write_atomic(target, json.dumps(content).encode())
    part.unlink()


def _ade_image(task: tuple) -> dict:
    image, semantic, instances, out = task
    width, height = image_header(image)[0]
    classes, numbers = (np.asarray(open_image(path, None)) for path in (semantic, instances))
    if classes.shape != (height, width) or numbers.shape != (height, width, 3):
        raise UserError(
            f"{semantic}, {instances}: expected maps of {height} x {width}, the instances with 3 "
            f"channels, got {classes.shape}, {numbers.shape}"
        )
    try:
        ids, segments = ade_panoptic(classes, numbers)
    except ValueError as error:
        raise UserError(f"{instances}: {error}") from None
    _write_png(out, ids)
    return {
        "image": {"id": image.stem, "file_name": image.name, "width": width, "height": height},
        "annotation": {"image_id": image.stem, "file_name": out.name, "segments_info": segments},
    }


def _objects_image(task: tuple) -> dict:
    image, annotation, source, out = task
    ids, segments = objects_panoptic(segment_ids(source), annotation["segments_info"])
    _write_png(out, ids)
    return {"image": image, "annotation": {**annotation, "segments_info": segments}}


def _write_png(path: Path, ids: np.ndarray) -> None:
    buffer = io.BytesIO()
    encode(ids).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

"""The paper's data sets: from their downloads to panoptic format (`--stage prepare`), and from there to what the stages read.

ADE20K gets panoptic ground truth from its semantic and its instance maps, COCO-Objects from COCO-Panoptic; the official partitions and
class names come from the official repository, at a pinned commit and checked by SHA-256. A call that was interrupted goes on.
Source: the rules of Mask2Former's preparation script and of the official `prepare_coco_objects.py` (commit below).
Differs from them: segment ids count from 1 (theirs are colours), which no metric sees.    Axes: H W pixels.
"""

import hashlib
import io
import json
import urllib.request
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import PAPERS_SPLITS
from ground.errors import UserError, refuse
from ground.files import write_atomic
from readers.downloads import DOWNLOAD, PROMPTS, parts, require
from readers.ground_truth import DataSet, Taxonomy
from readers.panoptic import PanopticFolder, read_json, read_taxonomy, segment_ids
from readers.pictures import image_header, open_image
from readers.splits import read_split, split_list

REPOSITORY = (
    "https://raw.githubusercontent.com/helen1c/DEARLi/1de0dc82509c2c9a137241c4c857cb09e64ea178"
)
# Semantic class (0 to 149) of instance class 1 to 100; these are the things of ADE20K, the other 50 classes are stuff.
ADE_THINGS = (
    7,
    8,
    10,
    12,
    14,
    15,
    18,
    19,
    20,
    22,
    23,
    24,
    27,
    30,
    31,
    32,
    33,
    35,
    36,
    37,
    38,
    39,
    41,
    42,
    43,
    44,
    45,
    47,
    49,
    50,
    53,
    55,
    56,
    57,
    58,
    62,
    64,
    65,
    66,
    67,
    69,
    70,
    71,
    72,
    73,
    74,
    75,
    76,
    78,
    80,
    81,
    82,
    83,
    85,
    86,
    87,
    88,
    89,
    90,
    92,
    93,
    95,
    97,
    98,
    102,
    103,
    104,
    107,
    108,
    110,
    111,
    112,
    115,
    116,
    118,
    119,
    120,
    121,
    123,
    124,
    125,
    126,
    127,
    129,
    130,
    132,
    133,
    134,
    135,
    136,
    137,
    138,
    139,
    142,
    143,
    144,
    146,
    147,
    148,
    149,
)
COCO_LAST_THING = 90  # category ids above are stuff
SHA256 = {  # of the official lists
    "prompts/ade20k_150_prompts.txt": "3204c154e2c524ce2575f873838893fc25d68c5c4f7973f2d4ee76d7e24bb781",
    "prompts/coco_objects_prompts.txt": "6b2c2528a1db62b2a0b979d823847ed5eb5b902982dd2af1c35c1df118a882cb",
    "prompts/coco_panoptic_prompts.txt": "560169ea22202460c3b9427df387f8d1778e94dadecd38554da683e2097cda9f",
    "splits/ade20k/1_128/labeled.txt": "5b28d705e511a35f89b19b997eb68febea76253a6bd88429b62cf4e8446f0d05",
    "splits/ade20k/1_128/unlabeled.txt": "5db039df7c0d03677ebefdf81589003fedd9be84327ff02a5e152c21894a0633",
    "splits/ade20k/1_16/labeled.txt": "85cb4de0a7896e90511e0ad5581f7b60a44d0896cfbdede01e11d1a55cb7b6f8",
    "splits/ade20k/1_16/unlabeled.txt": "16cb9662ec8d7ecf909c770b2c26cef2c57715ead4620bbf1baa93cfe8126910",
    "splits/ade20k/1_32/labeled.txt": "0a2f3b29515a07ea912f256d49b650a8436b846f838f10b122799ef3b2395f93",
    "splits/ade20k/1_32/unlabeled.txt": "fcc7ff003aeab664b1d93d2cc19c040e6248eed70c82ee41b0cdd52385942199",
    "splits/ade20k/1_64/labeled.txt": "78f423b10adcb3670e048c02bf43707430ede157036c195b61912dc4bf25602a",
    "splits/ade20k/1_64/unlabeled.txt": "0c913d1ff072c7ecddefa209302ff581f7b1686ab553f8d1e4052a7e1fd1a28c",
    "splits/ade20k/1_8/labeled.txt": "73d45bc89e256a85419ae72cf88fd86ffbadab0ed86b0a186cae77192815582e",
    "splits/ade20k/1_8/unlabeled.txt": "b44cb3d141a3179ce6a5f32399cff56b5def6df9ba98f4b069da23a6959ddb60",
    "splits/coco/1_128/labeled.txt": "06067c0fb879b8e6ab8f4bdab3dfa641e8e4da2990200fa156daa33670329d79",
    "splits/coco/1_256/labeled.txt": "4cdf41b9d3b3afc3734057a605015860501199ed3680370ccb2c677fc159b127",
    "splits/coco/1_32/labeled.txt": "781b5990914f7422ee9e1f6325a914f289e077621b77b9cd066c2d01d33a939e",
    "splits/coco/1_512/labeled.txt": "bd0ff85bf2d35b4641d08c2201257ad5b5f02f85ea0da457f44f0b97c4caeb37",
    "splits/coco/1_64/labeled.txt": "622b84ccbb5dcba32f4f5bb4ffaf1a9cf3e3f1f460b55dc02605fd099ebf1337",
}
BACKGROUND = {
    "id": 0,
    "name": "background",
    "isthing": 0,
}  # COCO-Objects: all stuff and all unlabelled pixels


# ---------------------------------------------------------------------------------------------------------- loading


def load(
    name: str, root: Path, split: str, seed: int = 0, complain: Callable[[UserError], None] = refuse
) -> DataSet:
    """A prepared data set. split: as in `data.read_split`.

    complain: as in `data.load_folder`.    Raises: UserError naming what is missing and the command that makes it.
    """
    base = require(name, root)
    official, prompts, places = (
        base / "dearli" / DOWNLOAD[name],
        base / "dearli" / PROMPTS[name],
        parts(name, base),
    )
    if split not in splits(name):  # official lists may still have to be fetched
        split_list(base, split or "all", official)
    shift = (
        1 if name == "ade20k" else 0
    )  # prompts and class maps count ADE's classes from 1, the panoptic JSON from 0
    names, stored = read_names(prompts), read_taxonomy(places["train"][0])
    unnamed = [category for category in stored.ids if category + shift not in names]
    if unnamed:
        raise UserError(f"{prompts}: no names for category {unnamed[0]}")
    taxonomy = Taxonomy(
        tuple(names[category + shift] for category in stored.ids),
        stored.things,
        stored.ids,
        stored.palette,
    )
    images = {
        part: PanopticFolder(
            *place[:3],
            taxonomy,
            place[3],
            semantic_first=shift,
            validation=part == "val",
            hidden=name == "ade20k",
            complain=complain,
        )
        for part, place in places.items()
    }
    labeled, unlabeled = read_split(base, split, images["train"], seed, complain, official)
    return DataSet(name, taxonomy, images["train"], images["val"], labeled, unlabeled)


def default_split(name: str) -> str:
    """What --split is where it is not given: all of one's own images, of the paper's data sets the smallest partition."""
    return {"mini": "16", "custom": "all"}.get(name) or splits(name)[0]


def splits(name: str) -> tuple[str, ...]:
    """The official partitions of a data set, smallest first."""
    return PAPERS_SPLITS[name]


def read_names(path: Path) -> dict[int, str]:
    """Category id -> names of a class, separated by commas, from a list of `id:name,synonym,...` lines."""
    try:
        rows = [line.split(":", 1) for line in Path(path).read_text().splitlines() if line.strip()]
        return {int(number): names for number, names in rows if names != "invalid_class_id"}
    except ValueError as error:
        raise UserError(f"{path}: expected lines `id:name,synonym` ({error})") from None


# ------------------------------------------------------------------------------------------------- segment by rule


def ade_panoptic(semantic: np.ndarray, instances: np.ndarray) -> tuple[np.ndarray, list[dict]]:
    """One ADE20K image: (H, W) int32 segment ids, 0 = void, and its segments_info.

    Args: semantic (H, W) uint8, 0 = none, else class + 1;  instances (H, W, 3) uint8, R = instance class 1 to 100, G = number, 0 = none.
    Stuff comes from the semantic map; instances lie on top and hide it, but the area of stuff is counted before (as officially).
    Things of the semantic map that no instance covers stay void.
    Raises: ValueError if an instance has several classes or an unknown one.
    """
    ids, segments = np.zeros(semantic.shape, np.int32), []

    def add(mask, category):
        segments.append(
            {
                "id": len(segments) + 1,
                "category_id": int(category),
                "area": int(mask.sum()),
                "bbox": box(mask),
                "iscrowd": 0,
            }
        )
        ids[mask] = len(segments)

    for value in np.unique(semantic):
        if value and value - 1 not in ADE_THINGS:
            add(semantic == value, value - 1)
    for number in np.unique(instances[..., 1]):
        if number:
            mask = instances[..., 1] == number
            classes = np.unique(instances[mask][:, 0])
            if len(classes) != 1 or not 1 <= classes[0] <= len(ADE_THINGS):
                raise ValueError(
                    f"instance {number} has classes {classes.tolist()}, expected one of 1 to {len(ADE_THINGS)}"
                )
            add(mask, ADE_THINGS[classes[0] - 1])
    return ids, segments


def objects_panoptic(ids: np.ndarray, segments: list[dict]) -> tuple[np.ndarray, list[dict]]:
    """COCO-Objects from one COCO-Panoptic image: all stuff and all unlabelled pixels become one background segment.

    The background keeps the id and the box of the first stuff segment; without stuff it takes the least unused id; without stuff
    and unlabelled pixels there is none.    ids: (H, W) int32.
    """
    things = [s for s in segments if s["category_id"] <= COCO_LAST_THING]
    stuff = [s for s in segments if s["category_id"] > COCO_LAST_THING]
    unlabelled = ids == 0
    if not stuff and not unlabelled.any():
        return ids, things
    used = {s["id"] for s in segments}
    number = stuff[0]["id"] if stuff else next(n for n in range(1, len(used) + 2) if n not in used)
    area = sum(s["area"] for s in stuff) + int(unlabelled.sum())
    background = {
        **(stuff[0] if stuff else {"iscrowd": 0}),
        "id": number,
        "category_id": 0,
        "area": area,
    }
    return np.where(unlabelled | np.isin(ids, [s["id"] for s in stuff]), number, ids).astype(
        np.int32
    ), [*things, background]


def box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height] of the true pixels."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)]


def encode(ids: np.ndarray) -> Image.Image:
    """Segment ids (H, W) -> the RGB image of COCO panoptic format, id = R + 256 G + 65536 B."""
    return Image.fromarray(
        np.ascontiguousarray(ids.astype("<i4", "C").view(np.uint8).reshape(*ids.shape, 4)[..., :3])
    )


# ------------------------------------------------------------------------------------------------------ preparation


def prepare(name: str, root: Path, assets: Path | None = None, workers: int = 4) -> Path:
    """Check the downloads, fetch partitions and class names, convert. Returns the folder of the data set; safe to call again.

    Raises: UserError listing every download that is missing and its address, or a list that cannot be had or is not the official one.
    """
    base = require(name, root, prepared=False)
    fetch_lists(name, base, assets)
    if name == "ade20k":
        names = read_names(base / "dearli" / PROMPTS[name])
        categories = [
            {"id": k, "name": names[k + 1], "isthing": int(k in ADE_THINGS)} for k in range(150)
        ]
        for part, out in (("training", "train"), ("validation", "val")):
            maps = base / f"ade20k_panoptic_{out}"
            images = sorted(
                path
                for path in (base / "images" / part).glob("*.jpg")
                if not path.name.startswith(".")
            )
            if not images:
                raise UserError(
                    f"{base / 'images' / part}: no *.jpg files; the download is incomplete"
                )
            tasks = [
                (
                    str(p),
                    str(base / "annotations" / part / f"{p.stem}.png"),
                    str(base / "annotations_instance" / part / f"{p.stem}.png"),
                    str(maps / f"{p.stem}.png"),
                )
                for p in images
            ]
            convert(
                tasks,
                [p.stem for p in images],
                _ade_image,
                maps,
                base / f"{maps.name}.json",
                categories,
                workers,
            )
    elif name == "coco-objects":
        for part in ("train", "val"):
            path = base / "annotations" / f"panoptic_{part}2017.json"
            PanopticFolder(
                path, base / f"{part}2017", base / f"panoptic_{part}2017", read_taxonomy(path)
            )  # refuses what is malformed, or written elsewhere
            content = read_json(path)
            maps, images = (
                base / f"panoptic_{part}2017_objects",
                {entry["id"]: entry for entry in content["images"]},
            )
            tasks = [
                (
                    images[a["image_id"]],
                    a,
                    str(base / f"panoptic_{part}2017" / a["file_name"]),
                    str(maps / a["file_name"]),
                )
                for a in content["annotations"]
            ]
            things = [c for c in content["categories"] if c["id"] <= COCO_LAST_THING]
            keys = [str(a["image_id"]) for a in content["annotations"]]
            convert(
                tasks,
                keys,
                _objects_image,
                maps,
                base / "annotations" / f"{maps.name}.json",
                [BACKGROUND, *things],
                workers,
            )
        if not (base / "masks").is_dir():
            print(
                f"{base / 'masks'}: not there, so mIoU will be measured on the converted panoptic maps; officially it is on UniMatch's 81-class maps"
            )
    return base


def fetch_lists(name: str, base: Path, assets: Path | None) -> None:
    """Put the official partitions and class names under base/dearli, from `assets` or from the official repository."""
    for local, (given, remote, digest) in lists(name).items():
        target = base / "dearli" / local
        if target.exists() and _sha256(target.read_bytes()) == digest:
            continue
        if assets is not None:
            source = next(
                (Path(assets) / p for p in (given, remote) if (Path(assets) / p).is_file()), None
            )
            if source is None:
                raise UserError(
                    f"{assets}: neither {given} nor {remote} is there; --assets names a copy of the official repository"
                )
            content = source.read_bytes()
        else:
            source = f"{REPOSITORY}/{remote}"
            try:
                with urllib.request.urlopen(source, timeout=30) as answer:
                    content = answer.read()
            except (OSError, urllib.error.URLError) as error:
                raise UserError(
                    f"{source}: cannot be fetched ({error}); clone the official repository elsewhere and name it with --assets DIR"
                ) from None
        if _sha256(content) != digest:
            raise UserError(
                f"{source}: SHA-256 is {_sha256(content)}, expected {digest}; it is not the official list of commit {REPOSITORY[-40:-33]}"
            )
        write_atomic(target, content)


def lists(name: str) -> dict[str, tuple[str, str, str]]:
    """Files below base/dearli: (path in --assets, path in the official repository, SHA-256)."""
    kind, prompts = DOWNLOAD[name], PROMPTS[name]
    files = {
        prompts: (f"prompts/{prompts}", f"mask2former/data/vlm_datasets/eng_prompts/{prompts}")
    }
    for split in splits(name):
        for part in (
            ("labeled", "unlabeled") if kind == "ade20k" else ("labeled",)
        ):  # COCO: unlabelled = all others
            path = f"{split}/{part}.txt"
            files[f"{kind}/{path}"] = (
                f"splits/{kind}/{path}",
                f"datasets/{'ade' if kind == 'ade20k' else 'coco'}_splits/{path}",
            )
    return {local: (*paths, SHA256[paths[0]]) for local, paths in files.items()}


def convert(
    tasks: list[tuple],
    keys: list[str],
    worker: Callable,
    maps: Path,
    target: Path,
    categories: list[dict],
    workers: int,
) -> int:
    """Run worker(task) -> {"image", "annotation"} on all tasks, then write the JSON `target`. Returns the number of images converted now.

    Finished images are noted in TARGET.part, line by line, so that an interrupted call goes on where it was.
    """
    part = target.with_name(f"{target.name}.part")
    if target.exists():
        return 0
    maps.mkdir(parents=True, exist_ok=True)
    done = {}
    for line in part.read_text().splitlines() if part.exists() else []:
        try:
            row = json.loads(line)
            done[row["key"]] = row
        except (ValueError, KeyError):  # the line at which the last call was cut
            continue
    todo = [(key, task) for key, task in zip(keys, tasks) if key not in done]
    run = lambda pair: {"key": pair[0], **worker(pair[1])}
    with (
        open(part, "a") as log,
        ThreadPool(max(1, workers)) as pool,
    ):  # Pillow and numpy work outside Python's lock
        log.write("\n" if log.tell() else "")  # the last line may have been cut
        for row in tqdm(
            pool.imap_unordered(run, todo),
            total=len(todo),
            desc=maps.name,
            unit="image",
            dynamic_ncols=True,
        ):
            log.write(json.dumps(row) + "\n")
            log.flush()
            done[row["key"]] = row
    rows = [done[key] for key in keys]
    content = {
        "images": [r["image"] for r in rows],
        "annotations": [r["annotation"] for r in rows],
        "categories": categories,
    }
    write_atomic(target, json.dumps(content).encode())
    part.unlink()
    return len(todo)


def _ade_image(task: tuple) -> dict:
    image, semantic, instances, out = map(Path, task)
    width, height = image_header(image)[0]
    classes, numbers = (np.asarray(open_image(path, None)) for path in (semantic, instances))
    if classes.shape != (height, width) or numbers.shape != (height, width, 3):
        raise UserError(
            f"{semantic}, {instances}: expected maps of {height} x {width}, the instances with 3 channels, got {classes.shape}, {numbers.shape}"
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
    ids, segments = objects_panoptic(segment_ids(Path(source)), annotation["segments_info"])
    _write_png(Path(out), ids)
    return {"image": image, "annotation": {**annotation, "segments_info": segments}}


def _write_png(path: Path, ids: np.ndarray) -> None:
    buffer = io.BytesIO()
    encode(ids).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

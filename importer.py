"""Annotations of other tools -> a data-set folder in COCO panoptic format that every stage reads (`--stage import`).

Written: OUTPUT/images, OUTPUT/panoptic, splits/all/labeled.txt, and, last, panoptic_val.json and panoptic_train.json; until then import.part says that the
folder is not whole, and the same call begins again. Sub-folders become part of an image's name: PATH/a.jpg is PATH_a.jpg.
An instance is a thing; other pixels are void, or one segment of the named background. Images without a segment serve as unlabelled images; of validation images
such ones are left out. Where the source has no division into training and validation, a share of the labelled images is drawn (`divide`).
Segments do not overlap, so of two the smaller one is drawn on top: what lies before another object is mostly smaller than it, and a small one below would be gone.
The formats are in `annotations.py`.    Axes: H W pixels, N instances.
"""

import contextlib
import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from annotations import READERS, Instance, Record, Source, claim_name
from checkpoint import claim, release, write_atomic
from config import UserError
from data import Taxonomy, brief, image_header, name_fault
from datasets import encode

SHOWN_CLASSES = 12                     # in the summary


def import_folder(kind: str, source: Path, output: Path, background: str = "", val_share: float = 0.2, seed: int = 0) -> dict:
    """Convert a folder of annotated images.

    Args:
        kind: a key of READERS.    source: is only read.    output: a new folder, or one of an interrupted import.
        background: name of a class, stuff, for all pixels without instance; empty: they are void.
        val_share: of the labelled images for validation, between 0 and 1, where the source has no division.    seed: of their choice.
    Returns: {"labeled", "unlabeled", "val": images, "instances": {class: number}, "dropped": {reason: number}}.
    Raises: UserError in one line for whatever cannot be read or is no annotation of this kind, for two images of one name, or if `output` holds something else.
    """
    source, output = Path(source), Path(output)
    if kind not in READERS:
        raise UserError(f"unknown kind of annotations '{kind}'; available: {', '.join(READERS)}")
    if not source.is_dir():
        raise UserError(f"{source}: no such folder of annotated images")
    if not 0 < val_share < 1:
        raise UserError(f"--val-share {val_share}: expected a share of the labelled images between 0 and 1")
    here, there = source.resolve(), output.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"{output}: one of it and {source} is inside the other; expected a folder of its own, name it with --out")
    taken: dict[str, str] = {}
    if background:
        claim_name(taken, background, "--background")
    if background and kind == "cityscapes":
        raise UserError("--background: Cityscapes has stuff of its own, and its other pixels are void; leave the flag out")
    found = READERS[kind](source, taken)
    begin(output, {"from": kind, "input": str(here), "background": background})
    try:
        images, dropped, stems = [], Counter(), {}
        for record in tqdm(found.records, desc="import", total=found.count, unit="image", dynamic_ncols=True):
            row = convert(record, _flat(record.name, stems), output, background, dropped)
            if record.part == "val" and not row["segments"]:
                dropped["validation images without annotation"] += 1
            else:
                images.append(row)
        why = "".join(f", {count} {what}" for what, count in (found.passed + dropped).items())
        if not any(segment["category_id"] != background for row in images for segment in row["segments"]):
            raise UserError(f"{source}: not one instance with a pixel{why}; nothing to learn from")
        val = divide({row["name"]: row["part"] for row in images if row["segments"]}, val_share, seed, source, why)
        return finish(output, images, val, found, background, dropped)
    finally:
        release(output)


def summary(result: dict, output: Path) -> str:
    """What `import_folder` returns, in three lines; the last one is the next command."""
    rows = sorted(result["instances"].items(), key=lambda row: -row[1])
    listed = ", ".join([*(f"{name} {count}" for name, count in rows[:SHOWN_CLASSES]), *[f"{len(rows) - SHOWN_CLASSES} more classes"] * (len(rows) > SHOWN_CLASSES)])
    dropped = ", ".join(f"{count} {what}" for what, count in result["dropped"].items())
    return (f"{output}: {result['labeled']} labelled, {result['unlabeled']} unlabelled and {result['val']} validation images; left out: {dropped or 'nothing'}\n"
            f"segments: {listed}\nnext: python dearli.py --stage validate --dataset custom --data-root {output}")


# ------------------------------------------------------------------------------------------------------ what is written

def begin(output: Path, identity: dict) -> None:
    """Make the folder and its mark. Raises: UserError if something is there that no interrupted import of the same source has written."""
    part = output / "import.part"
    claim(output)
    try:
        there = next((output / name for name in ("panoptic_train.json", "panoptic_val.json", "images", "panoptic", "splits") if (output / name).exists()), None)
        begun = None
        with contextlib.suppress(OSError, ValueError):
            begun = json.loads(part.read_text())
        if there is not None and (begun != identity or there.name == "panoptic_train.json"):
            of = "; an interrupted import of another source or kind began it" if begun not in (None, identity) else ""
            raise UserError(f"{there}: exists already{of}; choose another folder with --out")
        write_atomic(part, json.dumps(identity).encode())
    except UserError:
        release(output)
        raise


def convert(record: Record, name: str, output: Path, background: str, dropped: Counter) -> dict:
    """Write the image and the map of one record. Returns its name, map, size, part, and segments_info with categories by key of Source.classes."""
    path, segments, ids = output / "images" / name, [], None
    if isinstance(record.image, bytes):
        write_atomic(path, record.image)
    width, height = image_header(path if isinstance(record.image, bytes) else record.image)[0]
    if record.read is not None:
        ids, segments = paint(record.read((height, width)), (height, width), background, dropped)
    if segments:
        buffer = io.BytesIO()
        encode(ids).save(buffer, "PNG")
        write_atomic(output / "panoptic" / f"{path.stem}.png", buffer.getbuffer())
    if isinstance(record.image, Path) and (segments or record.part != "val"):
        place(record.image, path)
    return {"name": name, "map": f"{path.stem}.png", "width": width, "height": height, "part": record.part, "segments": segments}


def paint(instances: list[Instance], size: tuple[int, int], background: str, dropped: Counter) -> tuple[np.ndarray, list[dict]]:
    """Instances -> segment ids (H, W) int32, 1 to the number of those that can be seen, in their order, the background last; and segments_info."""
    areas = [int(instance.draw()[2].sum()) for instance in instances]
    ids = np.zeros(size, np.int32)
    for k in sorted(range(len(instances)), key=lambda k: -areas[k]):
        top, left, mask = instances[k].draw()
        ids[top:top + mask.shape[0], left:left + mask.shape[1]][mask] = k + 1
    kept = [(k, instances[k].category, int(instances[k].crowd)) for k in np.unique(ids[ids > 0]) - 1]
    dropped["instances without a pixel"] += areas.count(0)
    dropped["instances hidden below others"] += len(areas) - areas.count(0) - len(kept)
    order = np.zeros(len(instances) + 1, np.int32)
    order[[k + 1 for k, *_ in kept]] = np.arange(1, len(kept) + 1)
    ids = order[ids]
    if background and not ids.all():
        ids[ids == 0] = len(kept) + 1
        kept.append((None, background, 0))
    pixels = np.bincount(ids.ravel(), minlength=len(kept) + 1)
    return ids, [{"id": n, "category_id": category, "area": int(pixels[n]), "bbox": [xs.start, ys.start, xs.stop - xs.start, ys.stop - ys.start], "iscrowd": crowd}
                 for n, ((_, category, crowd), (ys, xs)) in enumerate(zip(kept, ndimage.find_objects(ids)), 1)]


def place(image: Path, target: Path) -> None:
    """The image as a hard link, or as a copy where there can be none (another disk); of a link, what it leads to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)     # of an interrupted import, see `begin`
    try:
        os.link(os.path.realpath(image), target)
    except OSError:
        write_atomic(target, image.read_bytes())


def divide(parts: dict[str, str], share: float, seed: int, source: Path, why: str) -> set[str]:
    """Names of the validation images among the labelled ones (name -> part): the source's own, or else the first round(share * number), at least 1 and not all,
    of numpy's permutation by `seed` of the names in alphabetical order."""
    names, val = sorted(parts), {name for name, part in parts.items() if part == "val"}
    if any(parts.values()):
        if not val or len(val) == len(names):
            raise UserError(f"{source}: {len(names) - len(val)} labelled training and {len(val)} labelled validation images{why}; expected at least one of each")
        return val
    if len(names) < 2:
        raise UserError(f"{source}: {len(names)} images with a segment{why}; expected at least 2, one to train on and one to validate on")
    count = min(len(names) - 1, max(1, round(share * len(names))))
    return {names[k] for k in np.random.default_rng(seed).permutation(len(names))[:count]}


def finish(output: Path, images: list[dict], val: set[str], found: Source, background: str, dropped: Counter) -> dict:
    """Write the list and the two JSON files, the training one last. Returns what `import_folder` returns."""
    classes = dict(found.classes) if all(isinstance(key, int) for key in found.classes) else {key: found.classes[key] for key in sorted(found.classes)}
    ids = {key: key if isinstance(key, int) else k for k, key in enumerate(classes, 1)}
    if background:
        ids[background] = max(ids.values(), default=0) + 1
        classes[background] = (background, False, None)
    names, things, colours = zip(*classes.values())
    categories = Taxonomy(names, things, tuple(ids.values()), colours if all(colours) else None).categories()
    count, content = Counter(), {part: {"images": [], "annotations": [], "categories": categories} for part in ("val", "train")}
    for number, row in enumerate(sorted(images, key=lambda row: row["name"]), 1):
        into = content["val" if row["name"] in val else "train"]
        into["images"].append({"id": number, "file_name": row["name"], "width": row["width"], "height": row["height"]})
        if row["segments"]:
            count.update(segment["category_id"] for segment in row["segments"])
            segments = [{**segment, "category_id": ids[segment["category_id"]]} for segment in row["segments"]]
            into["annotations"].append({"image_id": number, "file_name": row["map"], "segments_info": segments})
    labeled = [row["name"] for row in images if row["segments"] and row["name"] not in val]
    write_atomic(output / "splits" / "all" / "labeled.txt", "".join(f"{name}\n" for name in sorted(labeled)).encode())
    for part, value in content.items():
        write_atomic(output / f"panoptic_{part}.json", json.dumps(value).encode())
    (output / "import.part").unlink()
    return {"labeled": len(labeled), "unlabeled": len(images) - len(labeled) - len(val), "val": len(val),
            "instances": {classes[key][0]: count[key] for key in classes}, "dropped": dict(+(found.passed + dropped))}


def _flat(name: str, stems: dict[str, str]) -> str:
    """The name of an image in the new folder. stems: those that are taken, on disks that do not tell a from A, too."""
    flat = Path(name).as_posix().replace("/", "_")
    fault = name_fault(f".{flat}.png.{os.getpid():07}.tmp")                # `write_atomic` needs room for it
    if fault or flat != flat.strip() or len(flat.splitlines()) != 1:
        raise UserError(f"image {brief(name)}: {brief(flat)} {fault or 'begins or ends with a space, or has a line break'}; rename the image")
    stem = Path(flat).stem.casefold()
    if stem in stems:
        raise UserError(f"image {brief(name)} and image {brief(stems[stem])} would have one name, {brief(Path(flat).stem)}; rename one of them")
    stems[stem] = name
    return flat

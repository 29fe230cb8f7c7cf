"""Annotations of other tools -> a data-set folder in COCO panoptic format that every stage reads
(`--stage import`). The formats are in `readers/annotations/`.

Written: OUTPUT/images, OUTPUT/panoptic, splits/all/labeled.txt, and, last, panoptic_val.json and
panoptic_train.json; until then import.part says that the folder is not whole, and the same call
begins again. Sub-folders become part of an image's name: PATH/a.jpg is PATH_a.jpg.
An instance is a thing, or, of a class that is named as stuff, part of the one segment of its class;
other pixels are void, or one segment of the named background. Regions to be ignored, and boxes
without a mask, are void all the same. Images without a segment serve as unlabelled images; of
validation images such ones are left out.
Segments do not overlap, so of two the smaller one is on top: what lies before another object is
mostly smaller than it, and a small one below would be gone.    Axes: H W pixels.
With --join DIR the new folder also has what the data set DIR has (`tools.joined`).
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

from ground.errors import UserError, choose
from ground.files import claim, place, release, write_atomic
from readers import annotations
from readers.annotations import REST, VOID, Classes, Instance, Record, Source, lay
from readers.ground_truth import Taxonomy
from readers.pictures import brief, image_header, name_fault
from tools import exchange
from tools.import_notes import (
    copies_of,
    require_objects,
    say_division,
    say_doubtful,
    say_left_out,
)
from tools.joined import Base
from tools.prepare import encode

SHOWN_CLASSES = 12  # in the summary
VAL_SHARE = 0.2  # of the labelled images, unless somebody says otherwise
VOIDED = "void"  # in a count of what is left out: regions, until they become a note
EMPTY = "empty"  # the same of images whose annotation has no object


def import_folder(
    kind: str,
    source: Path,
    output: Path,
    background: str = "",
    val_share: float = VAL_SHARE,
    seed: int = 0,
    stuff: str = "",
    masks_are: str = "",
    classes: str = "",
    join: Path | None = None,
) -> dict:
    """Convert a folder of annotated images.

    Args:
        kind: a key of READERS.    source: is only read.
        output: a new folder, or one of an interrupted import.
        background: name of a class, stuff, for all pixels without instance; empty: they are void.
        val_share: from 0 to 1, of the labelled images for validation, drawn by `seed`, where the
            source has no division.    stuff: names of classes, separated by commas.
        masks_are: of kind `masks`, what values mean, one of FORMS; empty: guessed.
        classes: of kind `masks`, names of the values of maps of classes.
        join: a data set that they are for (`tools.joined`), which has validation images already.
    Returns: images labeled, unlabeled, val; instances by class, dropped by reason; notes.
    Raises: UserError for what cannot be read, or if `output` holds something else.
    """
    source, output = Path(source), Path(output)
    _require_flags(kind, source, background, val_share, masks_are, classes)
    _require_apart(source, output)
    known, base = Classes(stuff, background), None
    if join is not None:
        _require_apart(join, output)
        base = Base(join)
        base.decide(known)
    notes = annotations.survey(source)
    forms = (masks_are, classes) if kind == "masks" else ()
    read = annotations.READERS[kind](source, known, *forms)
    if kind != "labelme":  # which knows its classes when everything is read
        known.require_stuff()
    identity = {"from": kind, "input": str(source.resolve()), "background": background}
    begin(output, {**identity, **({"join": str(join.resolve())} if base else {})})
    try:
        rows, dropped, renamed = convert_all(read, known, output, background, base)
        known.require_stuff()
        voided, empty = dropped.pop(VOIDED, 0), dropped.pop(EMPTY, 0)
        notes += read.notes + say_left_out(voided, empty, renamed)
        dropped = read.passed + dropped
        why = "".join(f", {count} {what}" for what, count in dropped.items())
        notes += require_objects(rows, known, background, source, why, voided)
        notes += say_doubtful(rows, known, background, kind)
        if base:
            rows, joined = base.join(rows, known, background, output)
            notes.append(joined)
        taxonomy, numbers = numbered(known, background) if base is None else base.classes
        val = divide(rows, val_share, seed, source, why)
        notes += say_division(rows, val, taxonomy, numbers, (val_share, seed) != (VAL_SHARE, 0))
        said = {"dropped": dict(dropped), "notes": notes}
        return finish(output, rows, val, taxonomy, numbers) | said
    finally:
        release(output)


def summary(result: dict, output: Path) -> str:
    """What `import_folder` returns, in three lines and one for each note; the last one is the next
    command."""
    counts = sorted(result["instances"].items(), key=lambda row: -row[1])
    listed = [f"{name} {count}" for name, count in counts[:SHOWN_CLASSES]]
    if len(counts) > SHOWN_CLASSES:
        listed.append(f"{len(counts) - SHOWN_CLASSES} more classes")
    dropped = ", ".join(f"{count} {what}" for what, count in result["dropped"].items())
    notes = "".join(f"note: {note}\n" for note in result.get("notes", []))
    return (
        f"{output}: {result['labeled']} labelled, {result['unlabeled']} unlabelled and "
        f"{result['val']} validation images; left out: {dropped or 'nothing'}\n"
        f"segments: {', '.join(listed)}\n{notes}next: python dearli.py --stage validate --dataset "
        f"custom --data-root {output}"
    )


# ----------------------------------------------------------------------------- what is asked for


def _require_flags(
    kind: str, source: Path, background: str, share: float, masks_are: str, classes: str
) -> None:
    """Raise UserError for a value that cannot be, or that this kind of annotations has no use
    for."""
    choose("kind of annotations", kind, annotations.READERS)
    exchange.require_corrections(kind, source)
    if masks_are and masks_are not in annotations.FORMS:
        raise UserError(f"--masks-are {masks_are}: expected one of {', '.join(annotations.FORMS)}")
    if kind != "masks" and (masks_are or classes):
        raise UserError(
            f"--{'masks-are' if masks_are else 'classes'}: is for --from masks, not for {kind}; "
            "leave it out"
        )
    if not 0 < share < 1:
        raise UserError(
            f"--val-share {share}: expected a share of the labelled images between 0 and 1"
        )
    if background and kind == "cityscapes":
        raise UserError(
            "--background: Cityscapes has stuff of its own, and its other pixels are void; leave "
            "the flag out"
        )


def _require_apart(source: Path, output: Path) -> None:
    if source.is_file():
        raise UserError(f"{source}: is a file; --input names its folder, {source.parent}")
    if not source.is_dir():
        raise UserError(f"{source}: no such folder of annotated images")
    here, there = source.resolve(), output.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(
            f"{output}: one of it and {source} is inside the other; expected a folder of its own, "
            "name it with --out"
        )


def begin(output: Path, identity: dict) -> None:
    """Make the folder and its mark. Raises: UserError if something is there that no interrupted
    import of the same source has written."""
    part = output / "import.part"
    claim(output)
    try:
        names = "panoptic_train.json panoptic_val.json images panoptic splits".split()
        there = [output / name for name in names if (output / name).exists()]
        begun = None
        with contextlib.suppress(OSError, ValueError):
            begun = json.loads(part.read_text())
        if there and (begun != identity or there[0].name == names[0]):
            other = "; an interrupted import of another source or kind began it"
            other = "" if begun in (None, identity) else other
            raise UserError(f"{there[0]}: exists already{other}; choose another folder with --out")
        write_atomic(part, json.dumps(identity).encode())
    except UserError:
        release(output)
        raise


# ------------------------------------------------------------------------------------ images


def convert_all(
    read: Source, classes: Classes, output: Path, background: str, base: Base | None = None
) -> tuple[list[dict], Counter, list[str]]:
    """A row for each image (`convert`), what was left out, and which images were renamed."""
    rows, dropped, stems, renamed = [], Counter(), {}, []
    bar = {"desc": "import", "unit": "image", "dynamic_ncols": True}
    for record in tqdm(read.records, total=read.count, **bar):
        if record.part == "test":
            dropped["images of a test set"] += 1
            continue
        record.part = "" if base else record.part  # which has a division of its own
        # an image of the data set that is joined keeps its name, and no other gets one of its stems
        name = base.name_of(record) if base else None
        name = name or _flat(record.name, stems, renamed, base)
        row = convert(record, name, output, background, dropped, classes, base)
        if record.part == "val" and not row["segments"]:
            dropped["validation images without annotation"] += 1
        else:
            rows.append(row)
    return rows, dropped, renamed


def convert(
    record: Record,
    name: str,
    output: Path,
    background: str,
    dropped: Counter,
    classes: Classes,
    base: Base | None = None,
) -> dict:
    """Write the image and the map of one record. Returns its name, map, size, part, and segments
    with categories by key of `classes`."""
    path, image, segments = output / "images" / name, record.image, []
    file = base.map_name(name) if base else f"{path.stem}.png"
    if isinstance(image, bytes):
        write_atomic(path, image)
        image = path
    width, height = image_header(image)[0]
    if record.read is not None:
        instances = record.read((height, width))
        stuff = {key for key, (_, thing, _) in classes.items() if not thing}
        ids, segments = paint(instances, (height, width), background, dropped, stuff)
        dropped[EMPTY] += not instances and not background and record.part != "val"
    if segments:
        buffer = io.BytesIO()
        encode(ids).save(buffer, "PNG")
        write_atomic(output / "panoptic" / file, buffer.getbuffer())
    if image is not path and (segments or record.part != "val"):
        place(image, path)
    header = {"file_name": name, "width": width, "height": height}
    return {"image": header, "part": record.part, "segments": segments, "map": file}


def paint(
    instances: list[Instance],
    size: tuple[int, int],
    background: str,
    dropped: Counter,
    stuff: set = frozenset(),
) -> tuple[np.ndarray, list[dict]]:
    """Instances -> segment ids (H, W) int32, 1 to the number of those that can be seen, in their
    order, the background last; and segments_info.

    Of a class of stuff all are one segment, and none is crowd. What is around an instance without a
    pixel is void, and lies on what is larger, as masks do; of one area masks are on top.
    """
    layers, order, void = np.zeros(size, np.int32), [], set()
    for k, instance in enumerate(instances, 1):
        area, draw = int(instance.draw()[2].sum()), instance.draw
        if not area and instance.around is not None and instance.category != REST:
            void.add(k)
            draw, area = instance.around, int(instance.around()[2].sum())
        order.append((instance.slight, area, k in void, draw, k))
    for *_, draw, k in sorted(order, key=lambda row: (not row[0], -row[1], not row[2])):
        lay(layers, draw(), k)
    seen = np.bincount(layers.ravel(), minlength=len(instances) + 1) > 0
    areas = [0 if k in void else area for _, area, _, _, k in order]
    _count(instances, areas, void, seen, dropped)
    numbers = np.zeros(len(instances) + 1, np.int32)  # of segments, by layer; -1: void
    segments, merged = [], {}
    for k, instance in enumerate(instances, 1):
        category = instance.category
        if category is VOID or k in void:
            numbers[k] = -1
        elif category != REST and seen[k]:
            if category not in merged:
                segments.append((category, int(instance.crowd and category not in stuff)))
            numbers[k] = merged.get(category, len(segments))
            if category in stuff:
                merged[category] = numbers[k]
    ids = numbers[layers]
    if background and not ids.all():
        segments.append((background, 0))
        ids[ids == 0] = len(segments)
    ids[ids < 0] = 0
    return ids, _segments_info(ids, segments)


def _count(
    instances: list[Instance], areas: list[int], void: set[int], seen: np.ndarray, dropped: Counter
) -> None:
    """Count the instances that become no segment. void: those without a mask of their own."""
    for k, (instance, area, visible) in enumerate(zip(instances, areas, seen[1:]), 1):
        if k in void:
            dropped[VOIDED] += int(visible)
            dropped["instances without a pixel"] += instance.category is not VOID
        elif instance.category is VOID:
            dropped[VOIDED] += area > 0
        elif instance.category != REST:
            dropped["instances without a pixel"] += not area
            dropped["instances hidden below others"] += area > 0 and not visible


def _segments_info(ids: np.ndarray, segments: list[tuple]) -> list[dict]:
    """segments: category and crowd flag of the ids from 1 on."""
    areas = np.bincount(ids.ravel(), minlength=len(segments) + 1).tolist()
    rows = []
    for n, (ys, xs) in enumerate(ndimage.find_objects(ids), 1):
        category, crowd = segments[n - 1]
        box = [xs.start, ys.start, xs.stop - xs.start, ys.stop - ys.start]
        row = {"id": n, "category_id": category, "area": areas[n], "bbox": box, "iscrowd": crowd}
        rows.append(row)
    return rows


def _flat(name: str, stems: dict[str, str], renamed: list[str], base: Base | None = None) -> str:
    """The name of an image in the new folder. stems: those that are taken, on disks that do not
    tell a from A, too; the second of two gets its ending into its name. base: its images of these
    names are the same."""
    flat = Path(name).as_posix().replace("/", "_")
    stem, ending = os.path.splitext(flat)
    taken = stems.keys() | (base.stems if base and flat not in base.rows else set())
    if stem.casefold() in taken:
        words = (ending[1:], *range(2, len(taken) + 3))
        stem = next(f"{stem}_{word}" for word in words if f"{stem}_{word}".casefold() not in taken)
        flat = f"{stem}{ending}"
        renamed.append(f"{name} is {flat}")
    fault = name_fault(f".{flat}.png.{os.getpid():07}.tmp")  # `write_atomic` needs room for it
    if fault or flat != flat.strip() or len(flat.splitlines()) != 1:
        raise UserError(
            f"image {brief(name)}: {brief(flat)} "
            f"{fault or 'begins or ends with a space, or has a line break'}; rename the image"
        )
    stems[stem.casefold()] = name
    return flat


# ------------------------------------------------------------------------------------ data set


def divide(rows: list[dict], share: float, seed: int, source: Path, why: str) -> set[str]:
    """Names of the validation images among the labelled ones: the source's own, or else the first
    round(share * number), at least 1 and not all, of numpy's permutation by `seed` of the names in
    alphabetical order; copies of one picture stay together."""
    parts = {row["image"]["file_name"]: row["part"] for row in rows if row["segments"]}
    names = sorted(parts)
    copies = [*copies_of(names).values()]
    val = {name for name in names if parts[name] == "val"}
    if any(parts.values()):
        if not val or len(val) == len(names):
            raise UserError(
                f"{source}: {len(names) - len(val)} labelled training and {len(val)} labelled "
                f"validation images{why}; expected at least one of each"
            )
        return val
    if len(copies) < 2:
        several = f", in {len(names)} copies" if len(names) > len(copies) else ""
        raise UserError(
            f"{source}: {len(copies)} images with a segment{several}{why}; expected at least 2, "
            "one to train on and one to validate on"
        )
    count = min(len(copies) - 1, max(1, round(share * len(copies))))
    chosen = np.random.default_rng(seed).permutation(len(copies))[:count]
    return {name for k in chosen for name in copies[k]}


def numbered(classes: Classes, background: str) -> tuple[Taxonomy, dict]:
    """The classes as the data set has them, and their category ids by key: ids of the source, or
    numbers from 1 on in the order of the names; the background comes last."""
    with_ids = all(isinstance(key, int) for key in classes)
    rows = dict(classes.items() if with_ids else sorted(classes.items()))
    ids = {key: key if with_ids else k for k, key in enumerate(rows, 1)}
    if background:
        ids[background] = max(ids.values(), default=0) + 1
        rows[background] = (background, False, None)
    names, things, colours = zip(*rows.values())
    return Taxonomy(names, things, tuple(ids.values()), colours if all(colours) else None), ids


def finish(
    output: Path, rows: list[dict], val: set[str], taxonomy: Taxonomy, numbers: dict
) -> dict:
    """Write the list and the two JSON files, the training one last. numbers: category ids, by what
    the segments have. Returns what `import_folder` returns, but for what is left out and the
    notes."""
    names = dict(zip(taxonomy.ids, taxonomy.names))
    count, content = Counter(), {}
    for part in ("val", "train"):
        categories = taxonomy.categories()
        content[part] = {"images": [], "annotations": [], "categories": categories}
    rows = sorted(rows, key=lambda row: row["image"]["file_name"])
    labeled = []
    for number, row in enumerate(rows, 1):
        name, segments = row["image"]["file_name"], row["segments"]
        measures = name in val or row["part"] == "val" and not segments  # of a set that is joined
        part = content["val" if measures else "train"]
        part["images"].append({"id": number, **row["image"]})
        if not segments:
            continue
        if name not in val and row.get("listed", True):
            labeled.append(name)
        segments = [
            {**segment, "category_id": numbers[segment["category_id"]]} for segment in segments
        ]
        count.update(segment["category_id"] for segment in segments)
        part["annotations"].append(
            {"image_id": number, "file_name": row["map"], "segments_info": segments}
        )
    listed = "".join(f"{name}\n" for name in labeled)
    write_atomic(output / "splits" / "all" / "labeled.txt", listed.encode())
    for part, value in content.items():
        write_atomic(output / f"panoptic_{part}.json", json.dumps(value).encode())
    (output / "import.part").unlink()
    return {
        "labeled": len(labeled),
        "unlabeled": len(content["train"]["images"]) - len(labeled),
        "val": len(val),
        "instances": {names[number]: count[number] for number in taxonomy.ids},
    }

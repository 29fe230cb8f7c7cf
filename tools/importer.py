"""Annotations of other tools -> a data-set folder in COCO panoptic format that every stage reads (`--stage import`).

Written: OUTPUT/images, OUTPUT/panoptic, splits/all/labeled.txt, and, last, panoptic_val.json and panoptic_train.json; until then import.part says that the
folder is not whole, and the same call begins again. Sub-folders become part of an image's name: PATH/a.jpg is PATH_a.jpg.
An instance is a thing, or, of a class that is named as stuff, part of the one segment of its class;
other pixels are void, or one segment of the named background.
Regions to be ignored, and boxes without a mask, are void all the same. Images without a segment
serve as unlabelled images; of validation images
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

from ground.errors import UserError
from ground.files import claim, release, write_atomic
from readers.annotations import (
    FORMS,
    READERS,
    REST,
    VOID,
    Instance,
    Record,
    Source,
    claim_name,
    first_name,
    follow_links,
)
from readers.ground_truth import Taxonomy
from readers.pictures import brief, image_header, name_fault
from tools.prepare import encode

SHOWN_CLASSES = 12  # in the summary
VOIDED = "void"  # in a count of what is left out: regions, until they become a note


def import_folder(
    kind: str,
    source: Path,
    output: Path,
    background: str = "",
    val_share: float = 0.2,
    seed: int = 0,
    stuff: str = "",
    masks_are: str = "",
    classes: str = "",
) -> dict:
    """Convert a folder of annotated images.

    Args:
        kind: a key of READERS.    source: is only read.    output: a new folder, or one of an interrupted import.
        background: name of a class, stuff, for all pixels without instance; empty: they are void.
        val_share: of the labelled images for validation, between 0 and 1, where the source has no division.    seed: of their choice.
        stuff: names of classes, separated by commas, of which an image has one segment each.
        masks_are: of kind `masks`, what values mean, one of FORMS; empty: guessed.    classes:
        names of the values of maps of classes.
    Returns: {"labeled", "unlabeled", "val": images, "instances": {class: number}, "dropped":
    {reason: number}, "notes": [what was guessed, joined, followed]}.
    Raises: UserError in one line for whatever cannot be read or is no annotation of this kind, or
    if `output` holds something else.
    """
    source, output = Path(source), Path(output)
    if kind not in READERS:
        raise UserError(f"unknown kind of annotations '{kind}'; available: {', '.join(READERS)}")
    if not source.is_dir():
        raise UserError(f"{source}: no such folder of annotated images")
    if masks_are and masks_are not in FORMS:
        raise UserError(f"--masks-are {masks_are}: expected one of {', '.join(FORMS)}")
    if kind != "masks" and (masks_are or classes):
        raise UserError(
            f"--{'masks-are' if masks_are else 'classes'}: is for --from masks, not for {kind}; "
            "leave it out"
        )
    if not 0 < val_share < 1:
        raise UserError(
            f"--val-share {val_share}: expected a share of the labelled images between 0 and 1"
        )
    here, there = source.resolve(), output.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(
            f"{output}: one of it and {source} is inside the other; expected a folder of its own, name it with --out"
        )
    taken: dict[str, str] = {}
    if background:
        claim_name(taken, background, "--background")
    if background and kind == "cityscapes":
        raise UserError(
            "--background: Cityscapes has stuff of its own, and its other pixels are void; leave the flag out"
        )
    notes, wanted = (
        follow_links(source),
        {name.strip() for name in stuff.split(",")} - {"", background},
    )
    forms = (masks_are, classes, frozenset(wanted)) if kind == "masks" else ()
    found = READERS[kind](source, taken, *forms)
    if kind != "labelme":  # which knows its classes when everything is read
        require_classes(wanted, found)
    begin(output, {"from": kind, "input": str(here), "background": background})
    try:
        images, dropped, stems, renamed = [], Counter(), {}, []
        for record in tqdm(
            found.records, desc="import", total=found.count, unit="image", dynamic_ncols=True
        ):
            row = convert(
                record,
                _flat(record.name, stems, renamed),
                output,
                background,
                dropped,
                found,
                wanted,
            )
            if record.part == "val" and not row["segments"]:
                dropped["validation images without annotation"] += 1
            else:
                images.append(row)
        require_classes(wanted, found)
        found.classes = {
            key: (name, thing and first_name(name) not in wanted, colour)
            for key, (name, thing, colour) in found.classes.items()
        }
        voided = dropped.pop(VOIDED, 0)
        why = "".join(f", {count} {what}" for what, count in (found.passed + dropped).items())
        if not any(
            segment["category_id"] != background for row in images for segment in row["segments"]
        ):
            raise UserError(f"{source}: not one instance with a pixel{why}; nothing to learn from")
        notes += found.notes + require_objects(images, found, background, source)
        if voided:
            notes.append(
                f"{voided} regions are void, neither learnt nor measured: what is to be ignored, "
                "or was annotated without a mask"
            )
        if renamed:
            notes.append(
                f"{len(renamed)} images are renamed, as another has their name but for the ending "
                f"or the folder: {', '.join(renamed[:2])}"
            )
        val = divide(
            {row["name"]: row["part"] for row in images if row["segments"]},
            val_share,
            seed,
            source,
            why,
        )
        return {**finish(output, images, val, found, background, dropped), "notes": notes}
    finally:
        release(output)


def summary(result: dict, output: Path) -> str:
    """What `import_folder` returns, in three lines and one for each note; the last one is the next
    command."""
    rows = sorted(result["instances"].items(), key=lambda row: -row[1])
    listed = ", ".join(
        [
            *(f"{name} {count}" for name, count in rows[:SHOWN_CLASSES]),
            *[f"{len(rows) - SHOWN_CLASSES} more classes"] * (len(rows) > SHOWN_CLASSES),
        ]
    )
    dropped = ", ".join(f"{count} {what}" for what, count in result["dropped"].items())
    notes = "".join(f"note: {note}\n" for note in result.get("notes", []))
    return (
        f"{output}: {result['labeled']} labelled, {result['unlabeled']} unlabelled and "
        f"{result['val']} validation images; left out: {dropped or 'nothing'}\n"
        f"segments: {listed}\n{notes}next: python dearli.py --stage validate --dataset custom "
        f"--data-root {output}"
    )


# ------------------------------------------------------------------------------------------------------ what is written


def begin(output: Path, identity: dict) -> None:
    """Make the folder and its mark. Raises: UserError if something is there that no interrupted import of the same source has written."""
    part = output / "import.part"
    claim(output)
    try:
        there = next(
            (
                output / name
                for name in (
                    "panoptic_train.json",
                    "panoptic_val.json",
                    "images",
                    "panoptic",
                    "splits",
                )
                if (output / name).exists()
            ),
            None,
        )
        begun = None
        with contextlib.suppress(OSError, ValueError):
            begun = json.loads(part.read_text())
        if there is not None and (begun != identity or there.name == "panoptic_train.json"):
            of = (
                "; an interrupted import of another source or kind began it"
                if begun not in (None, identity)
                else ""
            )
            raise UserError(f"{there}: exists already{of}; choose another folder with --out")
        write_atomic(part, json.dumps(identity).encode())
    except UserError:
        release(output)
        raise


def require_classes(wanted: set[str], found: Source) -> None:
    """Raise UserError if --stuff names a class that is none."""
    names = sorted(first_name(name) for name, *_ in found.classes.values())
    if unknown := sorted(wanted - {*names}):
        raise UserError(f"--stuff {unknown[0]}: no such class; available: {', '.join(names)}")


def require_objects(images: list[dict], found: Source, background: str, source: Path) -> list[str]:
    """What is crowd, as notes. Raises: UserError if everything is, so that there is nothing to
    learn."""
    crowd, count = Counter(), Counter()
    for segment in (
        segment
        for row in images
        for segment in row["segments"]
        if segment["category_id"] != background
    ):
        count[segment["category_id"]] += 1
        crowd[segment["category_id"]] += segment["iscrowd"]
    if not crowd.total():
        return []
    if crowd == count:
        raise UserError(
            f"{source}: all {count.total()} instances are crowd (iscrowd 1), of which nothing is "
            "learnt or measured; if they are single objects, set it to 0: "
            'sed -i \'s/"iscrowd": *1/"iscrowd": 0/g\' FILE.json; if they are stuff, name their '
            "classes with --stuff"
        )
    only = [found.classes[key][0] for key in count if crowd[key] == count[key]]
    return [
        f"{crowd.total()} of {count.total()} instances are crowd, neither learnt nor "
        f"measured{f'; nothing else is there of {brief(only)}' if only else ''}"
    ]


def convert(
    record: Record,
    name: str,
    output: Path,
    background: str,
    dropped: Counter,
    found: Source,
    wanted: set[str],
) -> dict:
    """Write the image and the map of one record. Returns its name, map, size, part, and segments_info with categories by key of Source.classes."""
    path, segments, ids = output / "images" / name, [], None
    if isinstance(record.image, bytes):
        write_atomic(path, record.image)
    width, height = image_header(path if isinstance(record.image, bytes) else record.image)[0]
    if record.read is not None:
        instances = record.read((height, width))
        stuff = {
            key
            for key, (name, thing, _) in found.classes.items()
            if not thing or first_name(name) in wanted
        }
        ids, segments = paint(instances, (height, width), background, dropped, stuff)
    if segments:
        buffer = io.BytesIO()
        encode(ids).save(buffer, "PNG")
        write_atomic(output / "panoptic" / f"{path.stem}.png", buffer.getbuffer())
    if isinstance(record.image, Path) and (segments or record.part != "val"):
        place(record.image, path)
    return {
        "name": name,
        "map": f"{path.stem}.png",
        "width": width,
        "height": height,
        "part": record.part,
        "segments": segments,
    }


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
    pixel is void where there is nothing else.
    """
    areas = [int(instance.draw()[2].sum()) for instance in instances]
    ids, unknown = np.zeros(size, np.int32), len(instances) + 1
    for instance, area in zip(instances, areas):
        if not area and instance.around is not None and instance.category != REST:
            _lay(ids, instance.around(), unknown)
            dropped[VOIDED] += 1
    for k in sorted(range(len(instances)), key=lambda k: -areas[k]):
        _lay(ids, instances[k].draw(), k + 1)
    seen = np.bincount(ids.ravel(), minlength=unknown + 1)
    order, kept, merged = np.zeros(unknown + 1, np.int32), [], {}  # -1: void
    order[unknown] = -1
    for k, (instance, area) in enumerate(zip(instances, areas), 1):
        category = instance.category
        if category in (VOID, REST):
            order[k] = -1 if category is VOID else 0
            dropped[VOIDED] += category is VOID and area > 0
            continue
        dropped["instances without a pixel"] += not area
        dropped["instances hidden below others"] += area > 0 and not seen[k]
        if seen[k] and category not in merged:
            kept.append((category, int(instance.crowd and category not in stuff)))
        if seen[k]:
            order[k] = merged.get(category, len(kept))
        if category in stuff and seen[k]:
            merged[category] = order[k]
    ids = order[ids]
    if background and not ids.all():
        ids[ids == 0] = len(kept) + 1
        kept.append((background, 0))
    ids[ids < 0] = 0
    pixels = np.bincount(ids.ravel(), minlength=len(kept) + 1)
    return ids, [
        {
            "id": n,
            "category_id": category,
            "area": int(pixels[n]),
            "bbox": [xs.start, ys.start, xs.stop - xs.start, ys.stop - ys.start],
            "iscrowd": crowd,
        }
        for n, ((category, crowd), (ys, xs)) in enumerate(zip(kept, ndimage.find_objects(ids)), 1)
    ]


def _lay(ids: np.ndarray, patch, number: int) -> None:
    top, left, mask = patch
    ids[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = number


def place(image: Path, target: Path) -> None:
    """The image as a hard link, or as a copy where there can be none (another disk); of a link, what it leads to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # of an interrupted import, see `begin`
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
            raise UserError(
                f"{source}: {len(names) - len(val)} labelled training and {len(val)} labelled validation images{why}; expected at least one of each"
            )
        return val
    if len(names) < 2:
        raise UserError(
            f"{source}: {len(names)} images with a segment{why}; expected at least 2, one to train on and one to validate on"
        )
    count = min(len(names) - 1, max(1, round(share * len(names))))
    return {names[k] for k in np.random.default_rng(seed).permutation(len(names))[:count]}


def finish(
    output: Path,
    images: list[dict],
    val: set[str],
    found: Source,
    background: str,
    dropped: Counter,
) -> dict:
    """Write the list and the two JSON files, the training one last. Returns what `import_folder` returns."""
    classes = (
        dict(found.classes)
        if all(isinstance(key, int) for key in found.classes)
        else {key: found.classes[key] for key in sorted(found.classes)}
    )
    ids = {key: key if isinstance(key, int) else k for k, key in enumerate(classes, 1)}
    if background:
        ids[background] = max(ids.values(), default=0) + 1
        classes[background] = (background, False, None)
    names, things, colours = zip(*classes.values())
    categories = Taxonomy(
        names, things, tuple(ids.values()), colours if all(colours) else None
    ).categories()
    count, content = (
        Counter(),
        {
            part: {"images": [], "annotations": [], "categories": categories}
            for part in ("val", "train")
        },
    )
    for number, row in enumerate(sorted(images, key=lambda row: row["name"]), 1):
        into = content["val" if row["name"] in val else "train"]
        into["images"].append(
            {"id": number, "file_name": row["name"], "width": row["width"], "height": row["height"]}
        )
        if row["segments"]:
            count.update(segment["category_id"] for segment in row["segments"])
            segments = [
                {**segment, "category_id": ids[segment["category_id"]]}
                for segment in row["segments"]
            ]
            into["annotations"].append(
                {"image_id": number, "file_name": row["map"], "segments_info": segments}
            )
    labeled = [row["name"] for row in images if row["segments"] and row["name"] not in val]
    write_atomic(
        output / "splits" / "all" / "labeled.txt",
        "".join(f"{name}\n" for name in sorted(labeled)).encode(),
    )
    for part, value in content.items():
        write_atomic(output / f"panoptic_{part}.json", json.dumps(value).encode())
    (output / "import.part").unlink()
    return {
        "labeled": len(labeled),
        "unlabeled": len(images) - len(labeled) - len(val),
        "val": len(val),
        "instances": {classes[key][0]: count[key] for key in classes},
        "dropped": dict(+(found.passed + dropped)),
    }


def _flat(name: str, stems: dict[str, str], renamed: list[str]) -> str:
    """The name of an image in the new folder. stems: those that are taken, on disks that do not
    tell a from A, too; the second of two gets its ending into its name."""
    flat = Path(name).as_posix().replace("/", "_")
    stem, ending = Path(flat).stem, Path(flat).suffix
    if stem.casefold() in stems:
        more = (ending[1:], *range(2, len(stems) + 3))
        flat = next(
            f"{stem}_{word}{ending}" for word in more if f"{stem}_{word}".casefold() not in stems
        )
        renamed.append(f"{name} is {flat}")
    fault = name_fault(f".{flat}.png.{os.getpid():07}.tmp")  # `write_atomic` needs room for it
    if fault or flat != flat.strip() or len(flat.splitlines()) != 1:
        raise UserError(
            f"image {brief(name)}: {brief(flat)} {fault or 'begins or ends with a space, or has a line break'}; rename the image"
        )
    stems[Path(flat).stem.casefold()] = name
    return flat

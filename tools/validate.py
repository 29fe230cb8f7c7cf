"""All that is wrong with a data set, listed before a run stumbles over the first of it, and what it holds.

Every file is read as training reads it (`data.PanopticFolder`, `data.read_split`, `dewa.read_masks`). Training raises the first
fault; here the faults are collected and grouped by kind. Nothing is changed.
Axes: H W pixels, N segments, K classes.
"""

import json
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from tqdm import tqdm

from config import Config
from data import as_it_is
from ground.errors import UserError
from ground.files import write_atomic
from mini.scenes import MiniImages
from readers import mask_files
from readers.checks import out_of_reach, repeated_stuff, require_truth
from readers.exposure import above_white, uses_little
from readers.ground_truth import DataSet
from readers.panoptic import PanopticFolder
from readers.pictures import pictures

SHOWN, SHOWN_CLASSES = 5, 25  # faults of a kind and classes in the printed report; the JSON has all
CUT_OFF = 0.01  # share of the values of a 16-bit image above the white point from which it is said
# Kind of fault: what a report calls it, and what to do about it
KINDS = {
    "absent": ("files are listed but absent", "complete the download, or take them from the JSON"),
    "unreadable": ("files cannot be read", "copy or make them again, or take them from the JSON"),
    "large": ("images are too large", "cut them into tiles, or take them from the JSON"),
    "name": (
        "file names or links lead out of the data root or name no file",
        "put the files below it, and their relative paths into the JSON",
    ),
    "malformed": (
        "entries of the JSON are not in COCO panoptic format",
        "mend what wrote the JSON",
    ),
    "image twice": ("images are listed twice", "keep one entry an image"),
    "category": (
        "categories are unknown or differ",
        "add them to the categories of the training JSON, or mend the segments",
    ),
    "segment twice": ("segments are listed twice in one image", "keep one entry a segment"),
    "size": (
        "maps have another size than their image",
        "make the maps again, pixel by pixel as large as the image",
    ),
    "not in json": (
        "segments have pixels but are not in segments_info",
        "add them to the JSON, or make their pixels 0 (void)",
    ),
    "no pixel": (
        "segments are in segments_info but have no pixel",
        "take them from the JSON, or make the map again",
    ),
    "area": (
        "areas of the JSON are not the number of pixels in the map",
        "count them again; PQ uses the stated ones",
    ),
    "stuff twice": (
        "stuff classes have several segments in one image",
        "join them into one segment each, or call the class a thing: full PQ is out of reach",
    ),
    "nothing": (
        "parts of the data set have nothing to learn from or to measure",
        "annotate some of their images",
    ),
    "split": (
        "names of the split lists are wrong",
        "mend the lists: names of training images, once each, in one list only",
    ),
    "masks": (
        "files of SAM masks are absent, damaged or of another image",
        "delete what is damaged and run --stage masks again",
    ),
}


def validate(source, cfg: Config, masks, json_file) -> dict:
    """Read the whole data set, print what it holds and all that is wrong with it. Raises UserError if anything is.

    source: `engine.request.Source`.   masks: a folder to read, too.   json_file: gets the whole report.
    """
    faults: list[UserError] = []
    dataset = None
    try:
        dataset = source.load(cfg, faults.append)
        result = check(dataset, faults, cfg.workers, masks, cfg)
    except UserError as error:  # so broken that it cannot be opened
        result = {"refused": str(error)}
    if json_file:
        about = {key: getattr(source, key) for key in ("dataset", "data_root", "split")}
        write_atomic(json_file, json.dumps({**about, **result}, indent=1).encode())
    if dataset is None:
        raise UserError(result["refused"])
    print(report(result, f"{source.name}, split {source.split}", source.data_root))
    if summary(result):
        also = f" and in {json_file}" if json_file else ""
        raise UserError(f"{source.data_root or source.name}: {summary(result)}, listed above{also}")
    return result


class _Reading(torch.utils.data.Dataset):
    """Item k: what one image holds, and its faults."""

    def __init__(self, dataset: DataSet, masks: Path | None):
        self.parts, self.masks = (dataset.train, dataset.val), masks
        self.labeled = set(dataset.labeled)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(
        self, k: int
    ) -> tuple[np.ndarray, int, list[tuple[str, str]], list[tuple[str, str]]]:
        """Labels and pixels of its segments (N, 2) int64; pixels of its map; faults: (kind, text);
        what is odd about its brightness: likewise.
        """
        train = k < len(self.parts[0])
        images, i = (self.parts[0], k) if train else (self.parts[1], k - len(self.parts[0]))
        found: list[UserError] = []

        def attempt(read: Callable):
            try:
                return read()
            except UserError as error:
                found.append(error)

        image, truth, odd = attempt(lambda: images.image(i)), None, []
        if image is not None and uses_little(image):
            lows, highs = zip(*image.getextrema())
            odd.append(("little", f"{images.name(i)} ({min(lows)} to {max(highs)})"))
        cut_off = (
            attempt(lambda: above_white(images.path(i), images.white))
            if image is not None and not isinstance(images, MiniImages)
            else 0
        )
        if cut_off and cut_off > CUT_OFF:
            odd.append(("cut off", f"{images.name(i)} ({100 * cut_off:.0f}%)"))
        if not isinstance(images, PanopticFolder):
            truth = images.truth(i)
        elif i < images.annotated:
            truth = attempt(lambda: images.truth(i, found.append))
            if images.semantic is not None and (not train or i in self.labeled):
                attempt(lambda: images.class_map(i))
        if train and self.masks is not None and image is not None:
            attempt(
                lambda: mask_files.read_masks(
                    self.masks, images.name(i), image.size[::-1], images.digest(i)
                )
            )
        segments, size = np.zeros((0, 2), np.int64), 0
        if truth is not None:
            pixels = np.bincount(truth.segment_map.ravel(), minlength=len(truth.labels) + 1)[1:]
            segments, size = (
                np.stack([truth.labels, pixels], -1).astype(np.int64),
                truth.segment_map.size,
            )
            # By ADE20K's rule the stated area counts what is hidden below other segments, too.
            for n in np.flatnonzero(
                truth.areas < pixels
                if getattr(images, "hidden", False)
                else (truth.areas != pixels) & (pixels > 0)
            ):
                found.append(
                    UserError(
                        f"{images.name(i)}: segment {images.segments[images.starts[i] + n, 0]} has {pixels[n]} pixels, the JSON states "
                        f"{truth.areas[n]}",
                        "area",
                    )
                )
        # A segment that the JSON describes wrongly was left out on reading: that is one fault, not two.
        faults = {
            str(e): e.kind for e in found if not (e.kind == "not in json" and i in images.refused)
        }
        return segments, size, [(kind, text) for text, kind in faults.items()], odd


def check(
    dataset: DataSet,
    faults: list[UserError],
    workers: int = 0,
    masks: Path | None = None,
    cfg: Config = Config(),
) -> dict:
    """Read a whole data set.

    Args:
        faults: what was collected while it was loaded (`data.load_folder`, complain).
        workers: loader processes, 0 = none.    masks: folder of SAM masks of the training images, which are then read, too.
        cfg: of the runs to come, for their number of queries.
    Returns: plain values for JSON: counts (by part: images, segments, void: share of the pixels), classes (name, thing, share: of the pixels of
        the annotated training images, images, segments, labeled_images, val_images), notices (lines), problems ({kind: {what, do, faults}}).
    Raises: UserError if a reading process ends.
    """
    reading, train, taxonomy = _Reading(dataset, masks), len(dataset.train), dataset.taxonomy
    labeled, unlabeled = set(dataset.labeled), set(dataset.unlabeled)
    require_truth(dataset, complain=faults.append)
    listed, odd = [(e.kind, str(e)) for e in faults], {"little": [], "cut off": []}
    for images in (i for i in (dataset.train, dataset.val) if isinstance(i, PanopticFolder)):
        listed += [
            ("stuff twice", f"{images.name(i)}: {count} segments of {taxonomy.short_names[c]}")
            for i, c, count in repeated_stuff(images)
        ]
    tables = {
        part: np.zeros((len(taxonomy), 3), np.int64)
        for part in ("training", "labelled", "unlabelled", "validation")
    }  # pixels, segments, images
    sizes, images = (
        dict.fromkeys(tables, 0),
        dict(zip(tables, (train, len(labeled), len(unlabeled), len(dataset.val)))),
    )
    loader = torch.utils.data.DataLoader(
        reading, batch_size=None, num_workers=workers, collate_fn=as_it_is
    )
    try:
        for k, (segments, size, found, brightness) in enumerate(
            tqdm(loader, desc="reading", unit="image", dynamic_ncols=True, leave=False)
        ):
            listed += found
            for kind, text in brightness:
                odd[kind].append(text)
            for part in (
                ["validation"]
                if k >= train
                else [
                    "training",
                    *["labelled"] * (k in labeled),
                    *["unlabelled"] * (k in unlabeled),
                ]
            ):
                table = tables[part]
                np.add.at(
                    table,
                    segments[:, 0],
                    np.stack(
                        [
                            segments[:, 1],
                            np.ones(len(segments), np.int64),
                            np.zeros(len(segments), np.int64),
                        ],
                        -1,
                    ),
                )
                table[np.unique(segments[segments[:, 1] > 0, 0]), 2] += 1
                sizes[part] += size
    except RuntimeError as error:
        raise UserError(
            f"a reading process ended ({str(error).splitlines()[0]}); --workers 0 reads in this process"
        ) from None
    total = max(1, tables["training"][:, 0].sum())
    classes = [
        {
            "name": name,
            "thing": thing,
            "share": float(row[0] / total),
            "images": int(row[2]),
            "segments": int(row[1]),
            "labeled_images": int(tables["labelled"][k, 2]),
            "val_images": int(tables["validation"][k, 2]),
        }
        for k, (name, thing, row) in enumerate(
            zip(taxonomy.short_names, taxonomy.things, tables["training"])
        )
    ]
    counts = {
        part: {
            "images": images[part],
            "segments": int(table[:, 1].sum()),
            "void": float(1 - table[:, 0].sum() / sizes[part]) if sizes[part] else None,
        }
        for part, table in tables.items()
    }
    problems = {
        kind: {"what": what, "do": do, "faults": rows}
        for kind, (what, do) in KINDS.items()
        if (rows := [text for k, text in listed if k == kind])
    }
    return {
        "classes": classes,
        "counts": counts,
        "notices": [*out_of_reach(dataset, cfg), *_notices(dataset, classes, odd)],
        "problems": problems,
    }


def _notices(dataset: DataSet, classes: list[dict], odd: dict[str, list[str]]) -> list[str]:
    """What is no fault, but good to know."""
    lines, count = [], len(dataset.train) + len(dataset.val)
    for part, key in (("labelled", "labeled_images"), ("validation", "val_images")):
        unseen = [c["name"] for c in classes if not c[key]]
        if unseen:
            lines.append(
                f"{_number(len(unseen), 'class')} of {len(classes)} that no {part} image shows: "
                f"{', '.join(unseen)}"
            )
    if odd["little"]:
        lines.append(
            f"{len(odd['little'])} of {_number(count, 'image')} that use less than 1/16 of their "
            f"range, 0 to 255, and show next to nothing: {_some(odd['little'])}"
            f"; 16-bit images become 0 to 255 by --white (here {dataset.train.white})"
        )
    if odd["cut off"]:
        lines.append(
            f"{len(odd['cut off'])} of {_number(count, 'image')} of 16 bits that lose what is "
            f"brighter than --white {dataset.train.white}: {_some(odd['cut off'])}"
        )
    lines += _unlisted(dataset)
    for images in (
        i for i in (dataset.train, dataset.val) if isinstance(i, PanopticFolder) and i.without_crowd
    ):
        lines.append(
            f"{images.annotations}: {_number(images.without_crowd, 'segment')} without iscrowd, taken as 0"
        )
    if isinstance(dataset.train, PanopticFolder) and dataset.train.images == dataset.val.images:
        both = sorted(set(dataset.train.names.tolist()) & set(dataset.val.names.tolist()))
        if both:
            lines.append(
                f"{_number(len(both), 'image')} in both the training and the validation set: "
                f"{_some(both)}"
            )
    return lines


def _unlisted(dataset: DataSet) -> list[str]:
    """Pictures that lie there and are not used: in no JSON, or in that of the validation set
    without annotation.
    """
    sets = [images for images in (dataset.train, dataset.val) if isinstance(images, PanopticFolder)]
    known = {
        images.images / name for images in sets for name in (*images.names.tolist(), *images.unused)
    }
    lines = []
    for folder in dict.fromkeys(images.images for images in sets if images.images.is_dir()):
        found = [name for name in pictures(folder) if folder / name not in known]
        known |= {folder / name for name in found}
        if found:
            lines.append(
                f"{_number(len(found), 'picture')} in {folder} that no JSON lists, which are not "
                f"used: {_some(found)}; list them as images without "
                f"annotation to use them as unlabelled ones"
            )
    if sets and sets[-1].unused:
        lines.append(
            f"{_number(len(sets[-1].unused), 'image')} of {sets[-1].annotations} without "
            f"annotation, which are not used: {_some(sets[-1].unused)}"
        )
    return lines


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''}"


def report(result: dict, title: str, root: str = "") -> str:
    """The text of a report.   root: leading path that is left out of the file names."""
    lines = [title, "", f"{'':14}{'images':>10}{'segments':>10}{'void':>8}"]
    for part, row in result["counts"].items():
        void = "" if row["void"] is None else f"{100 * row['void']:.1f}%"
        lines.append(
            f"{'  ' * (part in ('labelled', 'unlabelled')) + part:14}{row['images']:10}{row['segments']:10}{void:>8}"
        )
    rows = sorted(result["classes"], key=lambda c: -c["share"])
    width = max(len("class"), *(min(len(c["name"]), 32) for c in rows[:SHOWN_CLASSES]))
    lines += [
        "",
        f"{'':{width}}         of the training set     images that show the class",
        f"{'class':{width}}  kind    pixels  segments  training  labelled  validation",
    ]
    lines += [
        f"{c['name'][:32]:{width}}  {'thing' if c['thing'] else 'stuff'}{100 * c['share']:7.2f}%{c['segments']:10}{c['images']:10}{c['labeled_images']:10}"
        f"{c['val_images']:12}"
        for c in rows[:SHOWN_CLASSES]
    ]
    lines += [f"... and {len(rows) - SHOWN_CLASSES} more, with fewer pixels"] * (
        len(rows) > SHOWN_CLASSES
    )
    lines += ["", *(f"note: {line}" for line in result["notices"]), *[""] * bool(result["notices"])]
    for problem in result["problems"].values():
        lines.append(f"{len(problem['faults'])} x {problem['what']}: {problem['do']}")
        lines += [f"    {text}" for text in problem["faults"][:SHOWN]]
        lines += [f"    ... and {len(problem['faults']) - SHOWN} more"] * (
            len(problem["faults"]) > SHOWN
        )
    text = "\n".join([*lines, *["no problem found"] * (not result["problems"])])
    return text.replace(f"{root.rstrip('/')}/", "") if root.strip("/") else text


def summary(result: dict) -> str:
    """One line, e.g. `3 problems of 2 kinds`; empty if there is none."""
    count = sum(len(p["faults"]) for p in result["problems"].values())
    return (
        f"{_number(count, 'problem')} of {_number(len(result['problems']), 'kind')}"
        if count
        else ""
    )


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 'es' if what.endswith('s') else 's'}"

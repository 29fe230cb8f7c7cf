"""All that is wrong with a data set, listed before a run stumbles over the first of it, and what it
holds.

Every file is read as training reads it (`readers.panoptic.PanopticFolder`, `readers.splits`,
`readers.mask_files`). Training raises the first fault; here the faults are collected and grouped by
kind. Nothing is changed.
Axes: H W pixels, N segments, K classes.
"""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Callable, Collection, Iterator

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from config import Config
from data import as_it_is
from ground.errors import UserError
from ground.files import write_atomic
from mini.scenes import MiniImages
from readers import mask_files
from readers.checks import out_of_reach, repeated_stuff, require_truth
from readers.exposure import doubts, little, meaning
from readers.ground_truth import DataSet, Taxonomy, Truth
from readers.panoptic import PanopticFolder
from readers.pictures import image_header, pictures
from readers.scale import object_width, scale_text

SHOWN, SHOWN_CLASSES = 5, 25  # faults of a kind and classes in the printed report; the JSON has all
# Kind of fault: what a report calls it, and what to do about it.
_KINDS = """
absent: files are listed but absent
    complete the download, or take them from the JSON
unreadable: files cannot be read
    copy or make them again, or take them from the JSON
large: images are too large
    cut them into tiles, or take them from the JSON
name: file names or links lead out of the data root or name no file
    put the files below it, and their relative paths into the JSON
malformed: entries of the JSON are not in COCO's format
    mend what wrote the JSON
image twice: images are listed twice
    keep one entry an image
category: categories are unknown or differ
    add them to the categories of the training JSON, or mend the segments
segment twice: segments are listed twice in one image
    keep one entry a segment
size: maps have another size than their image
    make the maps again, pixel by pixel as large as the image
not in json: segments have pixels but are not in segments_info
    add them to the JSON, or make their pixels 0 (void)
no pixel: segments are in segments_info but have no pixel
    take them from the JSON, or make the map again
value: maps have values that are no class
    name them in classes.txt, or make them 255 (no class)
palette: class maps show one number in different colours
    save them with one palette, or by --stage import --from masks, which knows the colours
astray: class maps belong to no image
    give them the names of their images, or take them away
area: areas of the JSON are not the number of pixels in the map
    count them again; PQ uses the stated ones
stuff twice: stuff classes have several segments in one image
    join them into one segment each, or call the class a thing: full PQ is out of reach
nothing: parts of the data set have nothing to learn from or to measure
    annotate some of their images
split: names of the split lists are wrong
    mend the lists: names of training images, once each, in one list only
masks: files of SAM masks are absent, damaged or of another image
    delete what is damaged and run --stage masks again
other: something else is wrong
    see each line
"""
_LINES = _KINDS.strip().splitlines()
KINDS = {
    kind: (what, remedy.strip())
    for (kind, what), remedy in zip((line.split(": ") for line in _LINES[::2]), _LINES[1::2])
}


def validate(source, cfg: Config, masks, json_file) -> dict:
    """Read the whole data set, print what it holds and all that is wrong with it. Raises UserError
    if anything is.

    source: `engine.request.Source`.   masks: a folder to read, too.   json_file: gets the whole
    report.
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


# ----------------------------------------------------------------------------------------- reading


class _Reading(torch.utils.data.Dataset):
    """Item k: what one image holds, and its faults."""

    def __init__(self, dataset: DataSet, masks: Path | None):
        self.train, self.val, self.masks = dataset.train, dataset.val, masks
        self.labeled = set(dataset.labeled)

    def __len__(self) -> int:
        return len(self.train) + len(self.val)

    def __getitem__(self, k: int) -> tuple[np.ndarray, int, list[tuple], list[tuple]]:
        """Labels and pixels of its segments (N, 2) int64; pixels of its map; faults: (kind, text);
        what is odd about its picture: likewise."""
        train = k < len(self.train)
        images, i = (self.train, k) if train else (self.val, k - len(self.train))
        errors: list[UserError] = []

        def attempt(read: Callable):
            try:
                return read()
            except UserError as error:
                errors.append(error)

        image, odd = attempt(lambda: images.image(i)), []
        if image is not None:
            odd = _odd(images, i, image, attempt)
        truth = None
        if isinstance(images, MiniImages):
            truth = images.truth(i)
        elif i < images.annotated:
            truth = attempt(lambda: images.truth(i, errors.append))
            if getattr(images, "semantic", None) is not None and (not train or i in self.labeled):
                attempt(lambda: images.class_map(i))
        if train and self.masks is not None and image is not None:
            name, shape = images.name(i), image.size[::-1]
            attempt(lambda: mask_files.read_masks(self.masks, name, shape, images.digest(i)))
        segments, size = np.zeros((0, 2), np.int64), 0
        if truth is not None:
            segments, size = _segments(images, i, truth, errors), truth.segment_map.size
        # A segment that the JSON describes wrongly was left out on reading: one fault, not two.
        if isinstance(images, PanopticFolder) and i in images.refused:
            errors = [error for error in errors if error.kind != "not in json"]
        faults = {str(error): error.kind for error in errors}
        return segments, size, [(kind, text) for text, kind in faults.items()], odd


def _odd(images, i: int, image: Image.Image, attempt: Callable) -> list[tuple[str, str]]:
    """(kind, text) where image i shows next to nothing, loses what is bright, or is turned."""
    if isinstance(images, MiniImages):
        found = little(image)
    else:
        exposure = images.white, images.stretch
        found = attempt(lambda: doubts(images.path(i), image, *exposure)) or {}
    odd = [(kind, f"{images.name(i)} ({text})") for kind, text in found.items()]
    if not isinstance(images, MiniImages):
        header = attempt(lambda: image_header(images.path(i))) if i < images.annotated else None
        if header is not None and header[1] is not None:
            odd.append(("turned", images.name(i)))
    return odd


def _segments(images, i: int, truth: Truth, errors: list[UserError]) -> np.ndarray:
    """(N, 2) int64 labels and pixels of the segments of image i; stated areas that are not the
    pixels are added to the errors."""
    if truth.masks is not None:  # areas of polygons are not those of pixels
        return np.stack([truth.labels, truth.masks.sum((1, 2))], -1).astype(np.int64)
    pixels = np.bincount(truth.segment_map.ravel(), minlength=len(truth.labels) + 1)[1:]
    wrong = (truth.areas != pixels) & (pixels > 0)
    if getattr(images, "hidden", False):  # ADE20K's areas count what lies below others, too
        wrong = truth.areas < pixels
    for n in np.flatnonzero(wrong):
        number = images.segments_of(i)[n, 0]
        text = f"has {pixels[n]} pixels, the JSON states {truth.areas[n]}"
        errors.append(UserError(f"{images.name(i)}: segment {number} {text}", "area"))
    return np.stack([truth.labels, pixels], -1).astype(np.int64)


def check(
    dataset: DataSet,
    faults: list[UserError],
    workers: int = 0,
    masks: Path | None = None,
    cfg: Config | None = None,
) -> dict:
    """Read a whole data set.

    Args:
        faults: what was collected while it was loaded (`readers.panoptic.load_folder`, complain).
        workers: loader processes, 0 = none.    masks: folder of SAM masks of the training images,
            which are then read, too.
        cfg: of the runs to come, for their number of queries; None: the defaults.
    Returns: plain values for JSON: counts (by part: images, segments, void: share of the pixels),
        classes (name, thing, share: of the pixels of the annotated training images, images,
        segments, labeled_images, val_images), notices (lines), problems ({kind: {what, do,
        faults}}).
    Raises: UserError if a reading process ends.
    """
    taxonomy, train = dataset.taxonomy, len(dataset.train)
    parts = {
        "training": _Part(range(train), len(taxonomy)),
        "labelled": _Part(set(dataset.labeled), len(taxonomy)),
        "unlabelled": _Part(set(dataset.unlabeled), len(taxonomy)),
        "validation": _Part(range(train, train + len(dataset.val)), len(taxonomy)),
    }
    require_truth(dataset, complain=faults.append)
    listed, odd = [(e.kind, str(e)) for e in faults], {"little": [], "cut off": [], "turned": []}
    for images in _folders(dataset):
        for i, k, count in repeated_stuff(images):
            text = f"{images.name(i)}: {count} segments of {taxonomy.short_names[k]}"
            listed.append(("stuff twice", text))
    for n, (segments, size, found, brightness) in enumerate(_read(dataset, masks, workers)):
        listed += found
        for kind, text in brightness:
            odd[kind].append(text)
        for part in parts.values():
            if n in part.items:
                part.add(segments, size)
    classes = _class_rows(taxonomy, parts)
    problems = {
        kind: {"what": what, "do": remedy, "faults": texts}
        for kind, (what, remedy) in KINDS.items()
        if (texts := [text for k, text in listed if (k if k in KINDS else "other") == kind])
    }
    return {
        "classes": classes,
        "counts": {name: part.counts() for name, part in parts.items()},
        "notices": [*_scale(dataset, cfg), *_notices(dataset, classes, odd)],
        "problems": problems,
    }


def _scale(dataset: DataSet, cfg: Config | None) -> list[str]:
    """How the objects will be seen, and how many of them cannot be."""
    cfg, lines = cfg or Config(), []
    if cfg.seen_width and dataset.labeled:
        with contextlib.suppress(UserError):  # of an image that cannot be read: listed already
            cfg = replace(cfg, object_width=cfg.object_width or object_width(dataset, cfg))
            lines.append(scale_text(dataset, cfg))
    return lines + out_of_reach(dataset, cfg)


class _Part:
    """What the images of a part hold. items: of `_Reading`.   table: (K, 3) pixels, segments and
    images of each class."""

    def __init__(self, items: Collection[int], num_classes: int):
        self.items, self.size = items, 0  # pixels of all maps
        self.table = np.zeros((num_classes, 3), np.int64)

    def add(self, segments: np.ndarray, size: int) -> None:
        labels, pixels = segments.T
        np.add.at(self.table, (labels, 0), pixels)
        np.add.at(self.table, (labels, 1), 1)
        self.table[np.unique(labels[pixels > 0]), 2] += 1
        self.size += size

    def counts(self) -> dict:
        pixels, segments, _ = self.table.sum(0)
        void = float(1 - pixels / self.size) if self.size else None
        return {"images": len(self.items), "segments": int(segments), "void": void}


def _read(dataset: DataSet, masks: Path | None, workers: int) -> Iterator[tuple]:
    """The items of `_Reading`, in order."""
    loader = torch.utils.data.DataLoader(
        _Reading(dataset, masks), batch_size=None, num_workers=workers, collate_fn=as_it_is
    )
    try:
        yield from tqdm(loader, desc="reading", unit="image", dynamic_ncols=True, leave=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"a reading process ended ({reason}); --workers 0 reads in this process"
        ) from None


def _class_rows(taxonomy: Taxonomy, parts: dict[str, _Part]) -> list[dict]:
    training = parts["training"].table
    total = max(1, training[:, 0].sum())
    return [
        {
            "name": name,
            "thing": taxonomy.things[k],
            "share": float(training[k, 0] / total),
            "images": int(training[k, 2]),
            "segments": int(training[k, 1]),
            "labeled_images": int(parts["labelled"].table[k, 2]),
            "val_images": int(parts["validation"].table[k, 2]),
        }
        for k, name in enumerate(taxonomy.short_names)
    ]


def _folders(dataset: DataSet) -> list[PanopticFolder]:
    return [images for images in (dataset.train, dataset.val) if isinstance(images, PanopticFolder)]


# --------------------------------------------------------------------------------- notices, report


def _notices(dataset: DataSet, classes: list[dict], odd: dict[str, list[str]]) -> list[str]:
    """What is no fault, but good to know."""
    train, val, lines = dataset.train, dataset.val, []
    for part, key in (("labelled", "labeled_images"), ("validation", "val_images")):
        unseen = [c["name"] for c in classes if not c[key]]
        if unseen:
            what = f"{_number(len(unseen), 'class')} of {len(classes)} that no {part} image shows"
            lines.append(f"{what}: {', '.join(unseen)}")
    count = _number(len(train) + len(val), "image")
    for doubt, what in meaning(train.white, train.stretch).items():
        if odd[doubt]:
            lines.append(f"{len(odd[doubt])} of {count} {what}: {_some(odd[doubt])}")
    if odd["turned"]:
        lines.append(
            f"{len(odd['turned'])} annotated images are turned as their EXIF says, and what was "
            f"annotated is taken to be of the turned picture: {_some(odd['turned'])}"
        )
    lines += _unlisted(dataset)
    for images in _folders(dataset):
        if images.without_crowd:
            segments = _number(images.without_crowd, "segment")
            lines.append(f"{images.annotations}: {segments} without iscrowd, taken as 0")
    if isinstance(train, PanopticFolder) and train.folder == val.folder:
        both = sorted(set(train.names.tolist()) & set(val.names.tolist()))
        if both:
            what = f"{_number(len(both), 'image')} in both the training and the validation set"
            lines.append(f"{what}: {_some(both)}")
    return lines


def _unlisted(dataset: DataSet) -> list[str]:
    """Pictures that lie there and are not used: in no JSON, or in that of the validation set
    without annotation."""
    lines, sets = [], _folders(dataset)
    known = {s.folder / name for s in sets for name in (*s.names.tolist(), *s.unused)}
    for folder in dict.fromkeys(s.folder for s in sets if s.folder.is_dir()):
        others = [name for name in pictures(folder) if folder / name not in known]
        known |= {folder / name for name in others}
        if others:
            lines.append(
                f"{_number(len(others), 'picture')} in {folder} that no JSON lists, which are not "
                f"used: {_some(others)}; list them as images without annotation to use them as "
                "unlabelled ones"
            )
    if sets and sets[-1].unused:
        unused, where = _number(len(sets[-1].unused), "image"), sets[-1].annotations
        what = f"{unused} of {where} without annotation, which are not used"
        lines.append(f"{what}: {_some(sets[-1].unused)}")
    return lines


def report(result: dict, title: str, root: str = "") -> str:
    """The text of a report.   root: leading path that is left out of the file names."""
    lines = [title, "", f"{'':14}{'images':>10}{'segments':>10}{'void':>8}"]
    for part, row in result["counts"].items():
        void = "" if row["void"] is None else f"{100 * row['void']:.1f}%"
        name = f"  {part}" if part in ("labelled", "unlabelled") else part
        lines.append(f"{name:14}{row['images']:10}{row['segments']:10}{void:>8}")
    rows = sorted(result["classes"], key=lambda c: -c["share"])
    width = max(len("class"), *(min(len(c["name"]), 32) for c in rows[:SHOWN_CLASSES]))
    lines += [
        "",
        f"{'':{width}}         of the training set     images that show the class",
        f"{'class':{width}}  kind    pixels  segments  training  labelled  validation",
    ]
    for c in rows[:SHOWN_CLASSES]:
        kind = "thing" if c["thing"] else "stuff"
        line = f"{c['name'][:32]:{width}}  {kind}{100 * c['share']:7.2f}%{c['segments']:10}"
        lines.append(line + f"{c['images']:10}{c['labeled_images']:10}{c['val_images']:12}")
    if len(rows) > SHOWN_CLASSES:
        lines.append(f"... and {len(rows) - SHOWN_CLASSES} more, with fewer pixels")
    lines.append("")
    if result["notices"]:
        lines += [*(f"note: {line}" for line in result["notices"]), ""]
    for problem in result["problems"].values():
        texts = problem["faults"]
        lines.append(f"{len(texts)} x {problem['what']}: {problem['do']}")
        lines += [f"    {text}" for text in texts[:SHOWN]]
        if len(texts) > SHOWN:
            lines.append(f"    ... and {len(texts) - SHOWN} more")
    if not result["problems"]:
        lines.append("no problem found")
    text = "\n".join(lines)
    return text.replace(f"{root.rstrip('/')}/", "") if root.strip("/") else text


def summary(result: dict) -> str:
    """One line, e.g. `3 problems of 2 kinds`; empty if there is none."""
    count = sum(len(problem["faults"]) for problem in result["problems"].values())
    kinds = _number(len(result["problems"]), "kind")
    return f"{_number(count, 'problem')} of {kinds}" if count else ""


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''}"


def _number(count: int, what: str) -> str:
    ending = "es" if what.endswith("s") else "s"
    return f"{count} {what}{'' if count == 1 else ending}"

"""What an import says about what it found: notes, and the error that there is nothing to learn."""

import re
from collections import Counter
from pathlib import Path
from typing import Iterable

from ground.errors import UserError
from readers.annotations import Classes
from readers.ground_truth import Taxonomy
from readers.pictures import brief

# What makes single objects of crowd.
SINGLE = (
    "so if these are single objects, set it to 0: "
    'sed -i \'s/"iscrowd": *1/"iscrowd": 0/g\' FILE.json'
)


def require_objects(
    rows: list[dict], classes: Classes, background: str, source: Path, why: str, voided: int
) -> list[str]:
    """What is crowd, as notes. Raises: UserError if everything is, or nothing is there, so that
    there is nothing to learn."""
    crowd, count = Counter(), Counter()
    for segment in (segment for row in rows for segment in row["segments"]):
        if segment["category_id"] != background:
            count[segment["category_id"]] += 1
            crowd[segment["category_id"]] += segment["iscrowd"]
    if not count:
        lost = f", {voided} regions that are void, as boxes without a mask are" if voided else ""
        raise UserError(
            f"{source}: not one instance with a pixel{why}{lost}; nothing to learn from"
            f"{'; draw masks, or export polygons' if voided else ''}"
        )
    if crowd == count:
        raise UserError(
            f"{source}: all {count.total()} instances are crowd (iscrowd 1), of which nothing is "
            f"learnt or measured, {SINGLE}; if they are stuff, name their classes with --stuff"
        )
    if not crowd.total():
        return []
    only = [classes[key][0] for key in count if crowd[key] == count[key]]
    return [
        f"{crowd.total()} of {count.total()} instances are crowd, not measured, no object "
        f"in training{f'; nothing else is there of {brief(only)}, {SINGLE}' if only else ''}"
    ]


def say_left_out(voided: int, empty: int, renamed: list[str]) -> list[str]:
    """Regions without a class, annotations without any, and images that have other names."""
    notes = []
    if empty:
        notes.append(
            f"{empty} images whose annotation has no object are unlabelled; --background NAME "
            "makes them labelled ones, of background alone"
        )
    if voided:
        notes.append(
            f"{voided} regions are void, not measured, no object in training: what is to be "
            "ignored, or has no mask with a pixel"
        )
    if renamed:
        notes.append(
            f"{len(renamed)} images are renamed, as another has their name but for the ending or "
            f"the folder: {', '.join(renamed[:2])}"
        )
    return notes


def say_void(rows: list[dict], background: str) -> list[str]:
    """Where most of what was annotated is void, and nothing says that it is background."""
    if background:
        return []
    annotated = [row for row in rows if row["segments"]]
    pixels = sum(row["image"]["width"] * row["image"]["height"] for row in annotated)
    drawn = sum(segment["area"] for row in annotated for segment in row["segments"])
    if 2 * drawn > pixels:
        return []
    return [
        f"{100 * (1 - drawn / pixels):.0f} % of the pixels of annotated images are in no segment, "
        "and so void: not measured, no object in training; --background NAME makes a class of them"
    ]


def say_doubtful(rows: list[dict], classes: Classes, background: str, kind: str) -> list[str]:
    """What may not be meant so: names that are alike, and what covers most of the pixels."""
    where = rows, classes, background
    names = [name for name, _, _ in classes.values()]
    alike = say_alike(names + [background] * (background != ""))
    inverted = say_inverted(*where) if kind == "masks" else []
    void = say_void(rows, background) if kind != "cityscapes" else []  # it takes no --background
    return alike + void + say_unused(rows, background) + say_stuff(*where) + inverted


def say_unused(rows: list[dict], background: str) -> list[str]:
    """A background of which there is no pixel, as all have another class or are void."""
    used = {segment["category_id"] for row in rows for segment in row["segments"]}
    if not background or background in used:
        return []
    return [
        f"--background {background}: no pixel is left for it, so the class is empty; leave the "
        "flag out unless other images have it"
    ]


def say_alike(names: list[str]) -> list[str]:
    """Names that differ in nothing that somebody would mean by it."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"[\s_-]+", "", name).lower(), []).append(name)
    same = [group for group in groups.values() if len(group) > 1]
    return [
        f"{', '.join(map(brief, group))}: classes whose names differ in case, spaces or hyphens "
        "alone; if they are one, rename them in the annotations"
        for group in same
    ]


def say_stuff(rows: list[dict], classes: Classes, background: str) -> list[str]:
    """Things that look like stuff: a large part of all pixels, and hardly ever two in an image."""
    area, count = Counter(), Counter()
    for segment in (segment for row in rows for segment in row["segments"]):
        area[segment["category_id"]] += segment["area"]
        count[segment["category_id"]] += 1
    annotated = [row for row in rows if row["segments"]]
    pixels = sum(row["image"]["width"] * row["image"]["height"] for row in annotated)
    few = 1.2 * len(annotated)
    large = [
        classes[key][0]
        for key in area
        if key != background and classes[key][1] and area[key] > pixels / 5 and count[key] <= few
    ]
    if not large or len(classes) < 2 or classes.inherited is not None:
        return []
    return [
        f"{brief(large)}: things that cover more than a fifth of all pixels, about one an image; "
        f"if they are stuff, as a wall or the sky is, say --stuff {','.join(large)}"
    ]


def say_inverted(rows: list[dict], classes: Classes, background: str) -> list[str]:
    """One class of things that fills most of most images as a single region, as a background does
    whose masks are white where nothing is."""
    things = [key for key, (_, thing, _) in classes.items() if thing and key != background]
    annotated = [row for row in rows if row["segments"]]
    if len(things) != 1:
        return []
    full = 0
    for row in annotated:
        areas = [s["area"] for s in row["segments"] if s["category_id"] == things[0]]
        full += 2 * max(areas, default=0) > row["image"]["width"] * row["image"]["height"]
    if 2 * full <= len(annotated):
        return []
    name = classes[things[0]][0]
    return [
        f"{brief(name)}: one region of it fills more than half of the image in {full} of "
        f"{len(annotated)}; if its masks are white where nothing is, invert them"
    ]


def say_division(
    rows: list[dict], val: set[str], taxonomy: Taxonomy, numbers: dict, asked: bool
) -> list[str]:
    """What the validation images have that others have not, or have as well. asked: somebody said
    how they are to be drawn."""
    idle = "--val-share and --seed draw nothing: the division is there already"
    notes = [idle] if asked and any(row["part"] for row in rows) else []
    return notes + say_unlearnt(rows, val, taxonomy, numbers) + say_copies(rows, val)


def say_unlearnt(rows: list[dict], val: set[str], taxonomy: Taxonomy, numbers: dict) -> list[str]:
    """Classes of the validation images that no training image shows. numbers: category ids, by key
    of the rows."""
    seen: dict[bool, set] = {True: set(), False: set()}
    for row in rows:
        of_row = {segment["category_id"] for segment in row["segments"]}
        seen[row["image"]["file_name"] in val] |= of_row
    names = dict(zip(taxonomy.ids, taxonomy.short_names))
    lost = sorted(names[numbers[key]] for key in seen[True] - seen[False])
    return [f"{brief(lost)}: in validation images alone, so nothing is learnt of it"] * bool(lost)


def say_copies(rows: list[dict], val: set[str]) -> list[str]:
    """Pictures of which there are several copies, and those that are on both sides."""
    groups = copies_of(row["image"]["file_name"] for row in rows)
    several = [names for names in groups.values() if len(names) > 1]
    if not several:
        return []
    both = [names for names in several if 0 < len(val.intersection(names)) < len(names)]
    text = f"{len(several)} pictures have several copies (NAME.rf.HASH, made by Roboflow)"
    if both:
        text += (
            f", and of {len(both)} the validation images have some and the training images others, "
            f"so figures are too good: {brief(both[0])}"
        )
    return [f"{text}; export without augmentation for honest numbers of images"]


def copies_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of pictures by what they are copies of: Roboflow calls augmented copies of one
    NAME.rf.HASH."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.rf\.[0-9A-Za-z]+(\.\w+)$", r"\1", name), []).append(name)
    return groups

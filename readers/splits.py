"""Which images of a training set are labelled: what --split means."""

from pathlib import Path
from typing import Callable

import numpy as np

from ground.errors import UserError, refuse
from readers.pictures import brief


def read_split(
    root: Path,
    split: str,
    images,
    seed: int,
    complain: Callable[[UserError], None] = refuse,
    official: Path | None = None,
) -> tuple[list[int], list[int]]:
    """Labelled and unlabelled indices, for every data set in COCO panoptic format.

    split: in this order, whatever else has the same name: an official partition (a folder of
        `official`) or one of the data set's own (of root/splits), with labeled.txt, and
        unlabeled.txt if that is not all the rest; `all` (or empty), all images with annotation; a
        number of them, sampled by `seed`; a file of image names, one a line (./3 is the file 3).
    Raises: UserError if a list is empty, names an image twice or one that is not there, if a
    labelled image has no annotation, or is unlabelled, too.
    """

    def wrong(text: str) -> None:
        complain(UserError(text, "split"))

    annotated, everything = range(images.annotated), range(len(images))
    path = split_list(root, split or "all", official)
    if path is None and split.isdecimal():
        if not 0 < int(split) <= len(annotated):
            wrong(f"--split {split}: expected 1 to {len(annotated)} labelled images")
        order = np.random.default_rng(seed).permutation(len(annotated)).tolist()
        labeled = sorted(order[: int(split)])
    elif path is None:
        labeled = list(annotated)
    else:
        return _listed(path, images, wrong)
    return labeled, sorted(set(everything).difference(labeled))


def _listed(path: Path, images, wrong: Callable[[str], None]) -> tuple[list[int], list[int]]:
    """The images of labeled.txt, and of unlabeled.txt beside it or all others."""
    names = [images.name(i) for i in range(len(images))]
    numbers: dict[str, int | None] = {}
    for i, name in enumerate(names):  # lists may leave endings out (VOC's do)
        stem = str(Path(name).with_suffix(""))
        numbers[stem] = None if stem in numbers else i
    numbers |= {name: i for i, name in enumerate(names)}
    labeled = _read_list(path, images, numbers, wrong)
    for i in labeled:
        if i >= images.annotated:
            name = brief(images.name(i))
            wrong(f"{path}: {name} has no annotation; a labelled image needs one")
    known, other = set(labeled), path.with_name("unlabeled.txt")
    if other.exists():
        unlabeled = _read_list(other, images, numbers, wrong)
    else:
        unlabeled = [i for i in range(len(images)) if i not in known]
    for i in unlabeled:
        if i in known:
            name = brief(images.name(i))
            wrong(f"{other}: {name} is in {path.name}, too; expected no image in both")
    return [i for i in labeled if i < images.annotated], unlabeled


def _read_list(path: Path, images, numbers: dict[str, int | None], wrong: Callable) -> list[int]:
    """Indices of the images that a list names, in its order."""
    indices: dict[int, None] = {}
    for line in lines(path):
        # Official lists have two columns and name files by their path; names of one's own may have
        # spaces in them.
        names = [name for text in (line, line.split()[0]) for name in (text, text.split("/")[-1])]
        found = next((name for name in names if name in numbers), None)
        i = numbers.get(found)
        if found and i is None:
            wrong(
                f"{path}: {brief(found)} is the name of several images but for the ending; add it"
            )
        elif i is None:
            wrong(f"{path}: {brief(names[2])} is not an image of the training set")
        elif i in indices:
            wrong(f"{path}: {brief(images.name(i))} is listed twice")
        else:
            indices[i] = None
    if not indices:
        wrong(f"{path}: the list is empty")
    return list(indices)


def split_list(root: Path, split: str, official: Path | None = None) -> Path | None:
    """The list of labelled images that --split names, in the order of `read_split`; None for a
    number, and for all.

    Raises: UserError if there is no such split, or its folder has no list.
    """
    folders = [*([official] if official else []), root / "splits"]
    for folder in folders:
        path = folder / split / "labeled.txt"
        if path.is_file():
            return path
        if path.parent.is_dir():
            raise UserError(
                f"{path}: no such file, though --split {split} names its folder; expected a list "
                "of image names"
            )
    if split == "all" or split.isdecimal():
        return None
    if not Path(split).is_file():
        lists = [path for folder in folders for path in sorted(folder.glob("*/labeled.txt"))]
        known = ", ".join(path.parent.name for path in lists) or "none"
        raise UserError(
            f"unknown split '{split}' of {root}; available: {known}, a number, or a file of image "
            "names"
        )
    return Path(split)


def lines(path: Path) -> list[str]:
    """Lines of a text file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable text file ({error})") from None
    return [line.strip() for line in lines if line.strip()]

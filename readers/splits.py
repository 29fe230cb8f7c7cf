"""."""

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
    """Labelled and unlabelled indices: what --split means, for every data set in COCO panoptic
    format.

    split: in this order, whatever else has the same name: an official partition (a folder of
        `official`) or one of the data set's own (of root/splits), with labeled.txt, and
        unlabeled.txt if that is not all the rest; `all` (or empty), all images with annotation; a
        number of them, drawn by `seed`; a file of image names, one a line (./3 is the file 3).
    Raises: UserError if a list is empty, names an image twice or one that is not there, if a
    labelled image has no annotation, or is unlabelled, too.
    """
    path = split_list(root, split or "all", official)
    if path is None and split.isdecimal():
        if not 0 < int(split) <= images.annotated:
            complain(
                UserError(
                    f"--split {split}: expected 1 to {images.annotated} labelled images", "split"
                )
            )
        order = np.random.default_rng(seed).permutation(images.annotated).tolist()
        return sorted(order[: int(split)]), sorted(order[int(split) :]) + list(
            range(images.annotated, len(images))
        )
    if path is None:
        return list(range(images.annotated)), list(range(images.annotated, len(images)))
    everything = {images.name(i): i for i in range(len(images))}

    def read(file):
        found: dict[int, None] = {}  # in the order of the list
        for line in _lines(file):
            # Official lists have two columns and name files by their path; names of one's own may have spaces in them.
            names = [n for text in (line, line.split()[0]) for n in (text, text.split("/")[-1])]
            i = next((everything[n] for n in names if n in everything), None)
            if i is None:
                complain(
                    UserError(
                        f"{file}: {brief(names[2])} is not an image of the training set", "split"
                    )
                )
            elif i in found:
                complain(UserError(f"{file}: {brief(images.name(i))} is listed twice", "split"))
            else:
                found[i] = None
        if not found:
            complain(UserError(f"{file}: the list is empty", "split"))
        return list(found)

    labeled, other = read(path), path.with_name("unlabeled.txt")
    for i in labeled:
        if i >= images.annotated:
            complain(
                UserError(
                    f"{path}: {brief(images.name(i))} has no annotation; a labelled image needs one",
                    "split",
                )
            )
    known = set(labeled)
    unlabeled = read(other) if other.exists() else [i for i in range(len(images)) if i not in known]
    for i in unlabeled:
        if i in known:
            complain(
                UserError(
                    f"{other}: {brief(images.name(i))} is in {path.name}, too; expected no image in both",
                    "split",
                )
            )
    return [i for i in labeled if i < images.annotated], unlabeled


def split_list(root: Path, split: str, official: Path | None = None) -> Path | None:
    """The list of labelled images that --split names, in the order of `read_split`; None for a
    number, and for all.

    Raises: UserError if there is no such split, or its folder has no list.
    """
    for folder in (*([official] if official else []), root / "splits"):
        path = folder / split / "labeled.txt"
        if path.is_file():
            return path
        if path.parent.is_dir():
            raise UserError(
                f"{path}: no such file, though --split {split} names its folder; expected a list "
                f"of image names"
            )
    if split == "all" or split.isdecimal():
        return None
    if not Path(split).is_file():
        folders = [*([official] if official else []), root / "splits"]
        known = [
            path.parent.name for folder in folders for path in sorted(folder.glob("*/labeled.txt"))
        ]
        raise UserError(
            f"unknown split '{split}' of {root}; available: {', '.join(known) or 'none'}, a "
            f"number, or a file of image names"
        )
    return Path(split)


def _lines(path: Path) -> list[str]:
    """Lines of a text file that are not blank."""
    try:
        return [
            line.strip()
            for line in path.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable text file ({error})") from None

"""The paper's data sets, once `--stage prepare` has made them: what every run reads of them.

The official partitions (.../dearli/NAME/SPLIT) and class names (.../dearli/*_prompts.txt) are those
of the official repository; `tools.prepare` fetches them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Callable

from config import INSTANCE_DATASETS, PAPERS_SPLITS
from ground.errors import UserError, refuse
from readers import semantic_sets
from readers.downloads import (
    CLASS_MAPS,
    COCO_ZIPS,
    DOWNLOAD,
    PROMPTS,
    instance_parts,
    parts,
    require,
)
from readers.ground_truth import DataSet
from readers.instances import read_pair
from readers.panoptic import PanopticFolder
from readers.panoptic_json import read_taxonomy
from readers.pictures import pictures
from readers.splits import read_split, split_list


def load(
    name: str, root: Path, split: str, seed: int = 0, complain: Callable[[UserError], None] = refuse
) -> DataSet:
    """A prepared data set.

    split: as in `readers.splits.read_split`.   complain: as in `readers.panoptic.load_folder`.
    Raises: UserError naming what is missing and the command that makes it.
    """
    if name in CLASS_MAPS:
        return semantic_sets.load(name, root, split, seed, complain)
    base = require(name, root)
    if name in INSTANCE_DATASETS:
        return _instances(name, base, split, seed, complain)
    official, prompts = base / "dearli" / DOWNLOAD[name], base / "dearli" / PROMPTS[name]
    if split not in PAPERS_SPLITS[name]:  # official lists may still have to be fetched
        split_list(base, split or "all", official)
    places = parts(name, base)
    # Prompts and class maps count ADE's classes from 1, the panoptic JSON from 0.
    first = 1 if name == "ade20k" else 0
    names, stored = read_names(prompts), read_taxonomy(places["train"][0])
    unnamed = [category for category in stored.ids if category + first not in names]
    if unnamed:
        raise UserError(f"{prompts}: no names for category {unnamed[0]}")
    taxonomy = replace(stored, names=tuple(names[category + first] for category in stored.ids))
    train, val = (
        PanopticFolder(
            *places[part][:3],
            taxonomy,
            semantic=places[part][3],
            semantic_first=first,
            validation=part == "val",
            hidden=name == "ade20k",
            complain=complain,
        )
        for part in ("train", "val")
    )
    return DataSet(
        name, taxonomy, train, val, *read_split(base, split, train, seed, complain, official)
    )


def _instances(name: str, base: Path, split: str, seed: int, complain: Callable) -> DataSet:
    """A prepared data set of instances. COCO's images are train2017/NAME, so that at 100 % those of
    unlabeled2017 can stand beside them.
    """
    official, prompts = base / "dearli" / name, base / "dearli" / PROMPTS.get(name, "")
    taxonomy, train, val = read_pair(*instance_parts(name, base), complain)
    if name in PROMPTS:
        names = read_names(prompts)
        unnamed = [category for category in taxonomy.ids if category not in names]
        if unnamed:
            raise UserError(f"{prompts}: no names for category {unnamed[0]}")
        taxonomy = replace(taxonomy, names=tuple(names[category] for category in taxonomy.ids))
        train.rooted(base)
        if split == "100":
            folder = base / "unlabeled2017"
            if not folder.is_dir():
                raise UserError(
                    f"{folder}: missing; --split 100 takes its images as unlabelled ones; download "
                    f"{COCO_ZIPS}/unlabeled2017.zip, or choose another split"
                )
            names = [f"{folder.name}/{picture}" for picture in pictures(folder)]
            train.add_unlabeled(names, folder)
    labeled, unlabeled = read_split(base, split or "all", train, seed, complain, official)
    return DataSet(name, taxonomy, train, val, labeled, unlabeled)


def default_split(name: str) -> str:
    """What --split is where it is not given: all of one's own images, of the paper's data sets the
    smallest partition."""
    return {"mini": "16", "custom": "all"}.get(name) or PAPERS_SPLITS[name][0]


def read_names(path: Path) -> dict[int, str]:
    """Category id -> names of a class, separated by commas, from lines `id:name,synonym,...`."""
    try:
        rows = [line.split(":", 1) for line in Path(path).read_text().splitlines() if line.strip()]
        return {int(number): names for number, names in rows if names != "invalid_class_id"}
    except ValueError as error:
        raise UserError(f"{path}: expected lines `id:name,synonym` ({error})") from None

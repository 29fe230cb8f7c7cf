"""Folders of masks: images/NAME.* with masks/CLASS/NAME.* or masks/NAME.*, whose class is `object`,
or one file an instance: masks/CLASS/NAME_3.*, masks/CLASS/NAME/*.*, masks/NAME/*.*; or both folders
divided into train/ and val/, or val.txt names what is for validation; or masks beside their images.

The values of a map are instances, classes, or nothing but black and white; what is not said is
guessed from all maps of a class, and noted. Axes: H W pixels.
"""

import os
import re
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from ground.errors import UserError
from readers.annotations.files import PARTS, list_files
from readers.annotations.maps import draw_regions, draw_values, read_map
from readers.annotations.others import hint
from readers.annotations.records import UNNAMED, VOID, Classes, Instance, Record, Source
from readers.annotations.shapes import Size
from readers.annotations.values import LISTS, Values, read_values
from readers.panoptic_json import MAX_ID
from readers.pictures import brief

FORMS = ("instances", "classes", "binary")  # what the values of a map may mean
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")  # endings of files that keep no exact values
# What a mask's name may have behind that of its image: a word, or the number of an instance.
SUFFIX = re.compile(
    r"[_\-. ]+((masks?|labels?|seg|segmentation|gt|instances?|annotation)|"
    r"((mask|instance|inst|object|obj|cell)[_\-. ]*)?(?P<number>\d+))"
)
VOC_VOID = (224, 224, 192)  # colour of 255, void, in the palette of Pascal VOC


class _Mask(NamedTuple):
    """A file.   label: its class, or empty.   single: whether it is one instance."""

    label: str
    path: Path
    single: bool

    @property
    def lossy(self) -> bool:
        return self.path.suffix.lower() in LOSSY


def read_masks(folder: Path, classes: Classes, form: str = "", names: str = "") -> Source:
    """form: one of FORMS, or empty: guessed.   names: of the values of maps of classes, see
    `values.read_values`. Of a map of classes what `classes.stuff` names is stuff,
    and of others each connected region is a thing; if it names none, all of them are stuff.
    """
    source = Source()
    files = _images(folder, source)
    masks = [mask for _, own in files for mask in own]
    if not masks:
        there = (folder / "masks").is_dir()
        fault = "no mask there is called like an image" if there else "no such folder"
        raise UserError(
            f"{folder / 'masks'}: {fault}; expected masks/CLASS/NAME.png or masks/NAME.png for "
            f"images/NAME.*{_likely(folder)}{hint(folder, 'masks')}"
        )
    flat = any(not mask.label and not mask.single for mask in masks)
    if names and (not flat or form in ("instances", "binary")):
        raise UserError(
            "--classes: names the values of maps of classes, masks/NAME.png, and there are none; "
            f"the folders of {folder / 'masks'} name the classes of others"
        )
    values = read_values(folder, names, MAX_ID - 2) if flat else Values({})
    forms = _forms(masks, form, values, source.notes)
    by_value = "classes" in forms.values()
    if by_value:
        _require_values(folder, masks, values)
        named = values.classes()
        void = sorted(v for v, name in values.names.items() if name == "__ignore__" and v != 255)
        if void:
            shown = [f"#{v:06x}" if values.coloured else v for v in void]
            source.notes.append(f"of these values nothing is learnt or measured: {brief(shown)}")
        source.notes.append(
            "classes that --stuff does not name are things, each connected region an instance"
            if classes.stuff
            else "classes without --stuff: each is stuff, one segment an image"
        )
    else:
        labels = {mask.label or "object" for mask in masks} - UNNAMED.keys()
        named = {label: label for label in sorted(labels)}
    for key, name in named.items():
        classes.add(key, name, str(folder / "masks"), not by_value or bool(classes.stuff))
    for record, own in files:
        record.read = partial(_instances, own, forms, values, classes) if own else None
    return source.settle(folder, [record for record, _ in files])


def _require_values(folder: Path, masks: list[_Mask], values: Values) -> None:
    """Raise UserError if not all masks are maps of classes, or nothing names their values."""
    odd = [mask.path for mask in masks if mask.label or mask.single]
    if odd:
        raise UserError(
            f"{odd[0]}: is of one class, or one instance, already, and maps of classes "
            "(masks/NAME.png) hold all; take one kind out, or change --masks-are"
        )
    if not values.names:
        raise UserError(
            f"{masks[0].path.parent}: maps of classes, and nothing says what the values mean; "
            "expected --classes 0:NAME,1:NAME,... (void for what is none, '#804080:NAME,...' for "
            f"colours), or these, a line each, in {folder / 'masks' / LISTS[0]}; lists of tools "
            f"are read, too: {', '.join(LISTS[2:])}"
        )


# ----------------------------------------------------------------------------------- files


def _images(folder: Path, source: Source) -> list[tuple[Record, list[_Mask]]]:
    """All images with their masks."""
    images, masks = folder / "images", folder / "masks"
    if not images.is_dir() and not masks.is_dir() and (found := _beside(folder, source)):
        return found
    names = list_files(images)
    tops = sorted({name.split("/")[0] for name in names})
    if any("/" not in name for name in names):
        rows = _pairs(images, masks, _flat(images), "", source)
        _divide(folder, rows)
        return rows
    if not names or not {*tops} <= {*PARTS}:
        fault = "no images in this folder" if images.is_dir() else "no such folder"
        raise UserError(
            f"{images}: {fault}; expected images/NAME.* and masks/CLASS/NAME.png (folders that are "
            f"called otherwise may be links){_likely(folder)}{hint(folder, 'masks')}"
        )
    parts = _parts({images / top: PARTS[top] for top in tops})
    return [
        row
        for place, part in parts.items()
        for row in _pairs(place, masks / place.name, _flat(place), part, source)
    ]


def _parts(parts: dict[Path, str]) -> dict[Path, str]:
    """What folders are for, or nothing where none is for validation: a share is drawn then."""
    divided = "val" in parts.values()
    return {path: part if divided or part == "test" else "" for path, part in parts.items()}


def _flat(folder: Path) -> list[str]:
    """Names of the pictures of a folder, without those of folders in it."""
    return [name for name in list_files(folder) if "/" not in name]


def _beside(folder: Path, source: Source) -> list[tuple[Record, list[_Mask]]]:
    """Images with their masks beside them, NAME.jpg with NAME_mask.png or NAME.png, in the folder
    or in train/, valid/ and test/; empty if there is none."""
    parts = {path: PARTS[path.name] for path in sorted(folder.iterdir()) if path.name in PARTS}
    found, count = [], 0
    for place, part in (_parts(parts) or {folder: ""}).items():
        names = _flat(place)
        stems = {PurePosixPath(name).stem for name in names}
        photos = {PurePosixPath(n).stem for n in names if PurePosixPath(n).suffix.lower() in LOSSY}
        masks = []
        for name in names:
            path = PurePosixPath(name)
            owner = _before_suffix(path.stem, dict.fromkeys(stems - {path.stem}))
            if owner[0] and not owner[1] or path.suffix == ".png" and path.stem in photos:
                masks.append(name)
        images = [name for name in names if name not in masks]
        count += len(masks)
        found += _pairs(place, place, images, part, source, masks)
    if not count:
        return []
    source.notes.append(f"{count} pictures are masks by their names, of the images beside them")
    return found


def _divide(folder: Path, rows: list[tuple[Record, list[_Mask]]]) -> None:
    """By val.txt or valid.txt, a name of an image a line, if there is one."""
    file = next((folder / n for n in ("val.txt", "valid.txt") if (folder / n).is_file()), None)
    if file is None:
        return
    lines = [PurePosixPath(line.strip()).name for line in file.read_text("utf-8-sig").splitlines()]
    chosen, known = {*lines} - {""}, set()
    for record, _ in rows:
        names = {record.name, PurePosixPath(record.name).stem}
        known |= names
        record.part = "val" if names & chosen else "train"
    if odd := sorted(chosen - known):
        raise UserError(
            f"{file}: {brief(odd[0])} is no image of {folder / 'images'}; expected a name a line, "
            "of the images for validation"
        )


def _likely(folder: Path) -> str:
    """What was meant, where a folder is a part of the wanted one, or the masks are called
    otherwise."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if (folder.parent / "images").is_dir() and folder.name in ("images", "masks"):
        return f"; did you mean --input {folder.parent}?"
    others = [name for name in names if name not in ("images", "masks") and name not in PARTS]
    if "images" in names and "masks" not in names and len(others) == 1:
        return f"; if {folder / others[0]} holds them, call it masks"
    return ""


def _pairs(
    images: Path,
    masks: Path,
    names: list[str],
    part: str,
    source: Source,
    files: list[str] | None = None,
) -> list[tuple]:
    """The same of one folder of images. names: its images.   files: masks; None: all in `masks`."""
    if files is None:
        source.passed["images in folders of images/"] += len(list_files(images)) - len(names)
        files = sorted(list_files(masks) + list_files(masks, ".npy"))
    files = [PurePosixPath(file) for file in files]
    stems = defaultdict(list)
    for name in names:
        stems[PurePosixPath(name).stem].append(name)
    stems = _without_endings(stems, files, source) or stems
    owners = {name: [name] for name in names} | stems  # masks are called a.png or a.jpg.png
    inner = [file for file in files if len(file.parts) == 2]
    tops = {file.parts[0] for file in inner}
    by_image = tops <= stems.keys() and not all(file.stem in stems for file in inner)
    exact = {file.parent for file in files if file.stem in stems and len(file.parts) <= 2}
    owned = defaultdict(list)
    for file in files:
        depth, path = len(file.parts), masks / file
        label, stem, single = "" if depth == 1 or by_image else file.parts[0], file.stem, False
        if depth == 3 or depth == 2 and by_image:
            stem, single = file.parts[-2], True
        elif stem not in owners and file.parent not in exact:
            stem, single = _before_suffix(stem, stems)
        if depth > 3 or stem not in owners:
            raise UserError(
                f"{path}: expected masks/CLASS/NAME.png, and an image images/NAME.*; rename it, or "
                "take it out of the folder"
            )
        first, *others = owners[stem]
        if others:
            raise UserError(
                f"{path}: is of {first} or of {others[0]}; call it {first}.png, or rename one of "
                "the images"
            )
        twins = [mask.path for mask in owned[first] if mask.label == label and not mask.single]
        if twins and not single:
            raise UserError(
                f"{path}: {twins[0]} is the map of this class and image already; take one of them "
                "out"
            )
        owned[first].append(_Mask(label, path, single))
    return [(Record(name, images / name, part=part), owned[name]) for name in names]


def _without_endings(stems: dict, files: list[PurePosixPath], source: Source) -> dict | None:
    """Images by the stem of their mask, where all masks have one ending more than their images, or
    another: NAME_L.png of NAME.png, NAME_labelIds.png of NAME_leftImg8bit.png; else None."""
    masks = [file.stem for file in files]
    known = any(mask in stems or _before_suffix(mask, stems)[0] for mask in masks)
    if known or len(masks) < 2 or len({*masks}) < len(masks):
        return None
    for ours in ("", *_common_endings(stems)):
        bare = {stem.removesuffix(ours): names for stem, names in stems.items()}
        for theirs in _common_endings(masks):
            if all(mask.removesuffix(theirs) in bare for mask in masks):
                instead = f" in place of {ours}" if ours else ""
                note = f"masks are called as their images, with {theirs}{instead}"
                source.notes += [note] if note not in source.notes else []
                return {f"{stem}{theirs}": names for stem, names in bare.items()}
    return None


def _common_endings(names) -> list[str]:
    """What all names end with, from a sign and with a letter: `_gtFine_labelIds`, `_labelIds`."""
    whole = os.path.commonprefix([name[::-1] for name in names])[::-1]
    signs = [m.start() for m in re.finditer(r"[_\-. ]+(?=.*[A-Za-z])", whole)]
    return [whole[k:] for k in signs]


def _before_suffix(stem: str, stems: dict) -> tuple[str, bool]:
    """The longest stem of an image that a mask's begins with, and whether the rest says that it is
    one instance; empty if there is none with a SUFFIX."""
    for end in range(len(stem) - 1, 0, -1):
        suffix = SUFFIX.fullmatch(stem[end:])
        if suffix and stem[:end] in stems:
            return stem[:end], bool(suffix["number"])
    return "", False


# ----------------------------------------------------------------------------------- values


def _forms(masks: list[_Mask], form: str, values: Values, notes: list[str]) -> dict[str, str]:
    """What the values mean, by class. A guess is a note; where the values could be classes as well
    as instances, it is an error."""
    forms = {}
    for label in sorted({mask.label for mask in masks}):
        own = [mask for mask in masks if mask.label == label]
        maps = [mask for mask in own if not mask.single]
        where = f"masks/{label}" if label else "masks"
        if len(maps) < len(own):
            notes.append(
                f"{where}: {len(own) - len(maps)} files are taken for one instance each, all that "
                "is not black"
            )
        if not maps:
            forms[label] = "binary"
        elif form:
            forms[label] = form
        elif not label and values.names:
            forms[label] = "classes"
            notes.append(
                f"{where}: taken as maps of classes, since their values have names; else say "
                "--masks-are instances"
            )
        else:
            forms[label] = _guess(where, maps, notes)
    if forms.get("", "classes") != "classes":
        notes.append(
            "masks: what is in no folder of a class is of the class `object`; to name it, put it "
            "into masks/NAME/"
        )
    return forms


def _guess(where: str, masks: list[_Mask], notes: list[str]) -> str:
    """instances or binary, from all maps of a class. Raises: UserError if they look like maps of
    classes."""
    grey, several, wide, voc, odd, seen = 0, False, False, False, [], Counter()
    scattered, shown = 0, 0  # values in several places of their map, of all
    for mask in masks:
        stored, colour = read_map(mask.path)
        values = {*np.unique(stored).tolist()} - {0}
        seen.update(values)
        grey += mask.lossy or _is_soft(stored)
        voc |= colour == VOC_VOID
        wide |= stored.dtype.itemsize > 1
        several |= len(values) == 1 and len(draw_regions(stored)) > 1
        numbers = values - {255}
        parts = _scattered(stored) if where == "masks" else 0
        scattered, shown = scattered + parts, shown + len(values)
        if numbers and (voc or numbers != {*range(1, len(numbers) + 1)} or 2 * parts > len(values)):
            odd.append(mask.path)
    if grey:
        notes.append(
            f"{where}: {grey} of {len(masks)} masks have grey levels between black and white, so "
            "all are taken as binary ones: from half of white on it is the class, each connected "
            "region an instance; else say --masks-are instances"
        )
        return "binary"
    # Of one class a single value is white, whatever its number (65535 of 16 bits; 128, 200, ...).
    if len(seen) < 2 and (where != "masks" or seen.keys() <= {1, 255, 65535}):
        if several:
            notes.append(
                f"{where}: taken as binary masks, each connected region an instance; else say "
                "--masks-are instances (one an image), or name the class with --stuff"
            )
        return "binary"
    recurring = any(count > 1 for value, count in seen.items() if value != 255)
    wide &= 3 * scattered < shown  # 16 bits are for many instances, which are in one piece
    if where == "masks" and odd and not wide and (voc or recurring):
        raise UserError(
            f"{odd[0]}: its values may be classes or instances (of these maps they are "
            f"{brief(sorted(seen)[:12])}); say --masks-are classes, with --classes NAME,NAME,..., "
            "or --masks-are instances"
        )
    other = "classes, with --classes" if where == "masks" else "binary"
    notes.append(f"{where}: every value is taken for an instance; else say --masks-are {other}")
    return "instances"


def _scattered(stored: np.ndarray) -> int:
    """How many values of a map, 0 and 255 apart, are in several places."""
    draws = [draw for value, draw in draw_values(stored) if value not in (0, 255)]
    return sum(len(draw_regions(draw()[2])) > 1 for draw in draws)


def _is_soft(stored: np.ndarray) -> bool:
    """Whether a map is a binary one with soft edges: white, and levels between in a thin rim, or in
    very many steps."""
    levels = np.unique(stored)
    between = (stored > 0) & (stored < 255)
    count = np.count_nonzero((levels > 0) & (levels < 255))
    if stored.dtype != np.uint8 or levels[-1] != 255 or count < 2:
        return False
    core = ndimage.binary_erosion(between, np.ones((3, 3)))
    thin = core.sum() <= 0.05 * between.sum() and (np.diff(levels) > 1).any()
    white, middle = (stored >= 240).sum(), ((stored >= 16) & (stored < 240)).sum()
    return bool(thin or len(levels) > 16 and white >= middle)


# ----------------------------------------------------------------------------------- instances


def _instances(
    masks: list[_Mask], forms: dict, values: Values, classes: Classes, size: Size
) -> list[Instance]:
    """Instances of the masks of one image."""
    instances = []
    for mask in masks:
        category = UNNAMED.get(mask.label, mask.label or "object")
        form = "instances" if mask.single else forms[mask.label]
        by_class = form == "classes"
        colours = "all" if by_class and values.coloured else "any" if form == "instances" else ""
        stored, colour = read_map(mask.path, size, colours)
        void = {255: "__ignore__"} if colour == VOC_VOID else {}
        if mask.single:
            _require_one(mask, stored)
        if mask.single or form == "binary":
            stored = _white(stored, mask.lossy)
        elif mask.lossy:
            raise UserError(
                f"{mask.path}: JPEG keeps no exact values; save maps of {form} as PNG, or say "
                "--masks-are binary"
            )
        if form == "binary":
            instances += [Instance(category, draw) for draw in draw_regions(stored)]
        elif by_class:
            names = values.names if values.coloured else values.names | void
            instances += _classes_of(mask.path, stored, values._replace(names=names), classes)
        else:
            draws = [(value, draw) for value, draw in draw_values(stored) if value]
            instances += [Instance(VOID if v in void else category, draw) for v, draw in draws]
    return instances


def _require_one(mask: _Mask, stored: np.ndarray) -> None:
    """Raise UserError if a file that is named as one instance holds several: all of them would
    become one."""
    values = np.unique(stored)
    values = values[values > 0]
    if len(values) > 1 and not mask.lossy and not _is_soft(stored):
        raise UserError(
            f"{mask.path}: is one instance by its name, which ends in a number or is in a folder "
            f"of its image, and holds {len(values)} values ({brief(values[:4].tolist())}) as a map "
            "of several does; call such maps as their images, masks/NAME.png or NAME_mask.png, or "
            "give an instance one value"
        )


def _classes_of(path: Path, stored: np.ndarray, values: Values, classes: Classes) -> list[Instance]:
    """Instances of a map of classes."""
    instances = []
    if values.doubtful and not stored.all():
        names = [*values.classes().values()]
        raise UserError(
            f"{path}: {np.mean(stored == 0):.0%} of its pixels are 0, and the first name, "
            f"{names[0]}, may be of 0 or of 1; write 0:{names[0]},1:{names[1]},..., or, where 0 is "
            f"no class, background,{names[0]},... (void instead: nothing is learnt there)"
        )
    for value, draw in draw_values(stored):
        if value not in values.names:
            shown = f"colour #{value:06x}" if values.coloured else f"value {value}"
            named = [f"#{v:06x}" if values.coloured else v for v in sorted(values.names)]
            raise UserError(
                f"{path}: has the {shown}, which has no name; named are {brief(named)}; name it "
                "with --classes, or in its list, as void if it is no class"
            )
        category = UNNAMED.get(values.names[value], values.keys.get(value, value))
        thing = category in classes and classes[category][1]
        draws = draw_regions(stored == value) if thing else [draw]
        instances += [Instance(category, draw) for draw in draws]
    return instances


def _white(stored: np.ndarray, lossy: bool) -> np.ndarray:
    """(H, W) bool: what a binary mask covers: all that is not 0; or, where there are levels up to
    white, or JPEG's noise, from half of white on."""
    levels = np.unique(stored)
    white = 255 if levels[-1] < 256 else 65535
    soft = lossy or np.count_nonzero(levels) > 1 and levels[-1] > 0.9 * white
    return stored > white / 2 if soft else stored > 0

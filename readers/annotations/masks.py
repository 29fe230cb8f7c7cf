"""Folders of images and masks (`pairs.py`). The class of a mask is that of its folder, or `object`,
or the map says it.

The values of a map are instances, classes (`values.py`), or nothing but black and white; what is
not said is guessed from all maps of a class, and noted. Axes: H W pixels.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Iterable

import numpy as np
from scipy import ndimage

from ground.errors import UserError
from readers.annotations.maps import draw_regions, draw_values, read_map
from readers.annotations.others import hint
from readers.annotations.pairs import Mask, find_pairs, likely
from readers.annotations.records import UNNAMED, VOID, Classes, Instance, Record, Source
from readers.annotations.shapes import Size
from readers.annotations.values import (
    COLOUR_LISTS,
    NUMBER_LISTS,
    OWN,
    Values,
    read_values,
    unread_lists,
    unused_lists,
)
from readers.palettes import require_one_palette
from readers.panoptic_json import MAX_ID
from readers.pictures import brief, image_header

PLAIN = "object"  # the class of a mask without a word of one
FORMS = ("instances", "classes", "both", "binary")  # what the values of a map may mean
INSTANCES = 256  # `both`: a value is 256 * class + instance
CODED = (
    f"its values look like {INSTANCES} * class + instance, as those of Mapillary and KITTI (of "
    "these maps they are {}); say --masks-are both, with --classes 7:NAME,8:NAME,... (stuff by "
    "--stuff), or --masks-are instances"
)
LOOKED_AT, SIDE, MOST = 20, 512, 255  # maps, their side in pixels, and values of one: `_scattered`
MIXED = 40  # colours without a name: nobody forgot so many


def read_masks(folder: Path, classes: Classes, form: str = "", names: str = "") -> Source:
    """form: one of FORMS, or empty: guessed.   names: of the values of maps of classes, see
    `values.read_values`. Of a map of classes what `classes.stuff` names is stuff,
    and of others each connected region is a thing; if it names none, all of them are stuff. What
    they are joined to decides it for them.
    """
    source = Source()
    files = find_pairs(folder, source)
    masks = [mask for _, own in files for mask in own]
    if not masks:
        there = (folder / "masks").is_dir()
        fault = "no mask there is called like an image" if there else "no such folder"
        raise UserError(
            f"{folder / 'masks'}: {fault}; expected masks/CLASS/NAME.png or masks/NAME.png for "
            f"images/NAME.*{likely(folder)}{hint(folder, 'masks')}"
        )
    flat = any(not mask.label and not mask.single for mask in masks)
    if names and (not flat or form in ("instances", "binary")):
        raise UserError(
            "--classes: names the values of maps of classes, masks/NAME.png, and there are none; "
            f"the folders of {folder / 'masks'} name the classes of others"
        )
    listed = flat and form not in ("instances", "binary")
    largest = INSTANCES - 1 if form == "both" else MAX_ID - 2
    values = read_values(folder, names, largest) if listed else Values({})
    source.notes += unused_lists(folder) if flat and not listed else []
    forms = _forms(masks, form, values, source.notes)
    by_value = not {"classes", "both"}.isdisjoint(forms.values())
    if by_value:
        _require_values(folder, masks, values)
        named = values.classes()
        source.notes += _say_classes(values, classes, form == "both")
        if form != "both" and not values.coloured:
            mend = (
                "name the colours, --classes '#804080:NAME,...' or a list of them, or, if the "
                "numbers count, save the maps without palettes"
            )
            require_one_palette([mask.path for mask in masks], mend)
    else:
        labels = {mask.label or PLAIN for mask in masks} - UNNAMED.keys()
        named = {label: label for label in sorted(labels)}
    things = not by_value or form == "both" or classes.says_stuff
    for key, name in named.items():
        classes.add(key, name, values.where or str(folder / "masks"), things)
    source.notes += _say_turned(record for record, own in files if own)
    for record, own in files:
        record.read = partial(_instances, own, forms, values, classes) if own else None
    return source.settle(folder, [record for record, _ in files])


def _say_turned(records: Iterable[Record]) -> list[str]:
    """Where masks may lie otherwise than their pictures, whose sizes need not tell it."""
    turned = [record.name for record in records if image_header(record.image)[1] is not None]
    if not turned:
        return []
    return [
        f"{len(turned)} annotated images are turned as their EXIF says ({brief(turned[0])}), and "
        "their masks are taken to be of the turned picture; of masks of the picture as it is "
        "stored, take the EXIF out of the images"
    ]


def _say_classes(values: Values, classes: Classes, both: bool) -> list[str]:
    """What is void, and what are things."""
    void = sorted(v for v, name in values.names.items() if name == "__ignore__" and v != 255)
    notes = []
    if void:
        shown = [values.shown(v) for v in void]
        notes.append(f"of these values nothing is learnt or measured: {brief(shown)}")
    if values.rest and not classes.background:
        notes.append(
            f"the background of {values.where} is void, not measured, no object in training; "
            "--background NAME makes a class of it"
        )
    each = "each number an instance" if both else "each connected region an instance"
    if classes.inherited is not None:
        said = f"things and stuff are as in the data set that is joined; of a thing {each}"
    elif both or classes.says_stuff:
        said = f"classes that --stuff does not name are things, {each}"
    else:
        said = "classes without --stuff: each is stuff, one segment an image"
    return [*notes, said]


def _require_values(folder: Path, masks: list[Mask], values: Values) -> None:
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
            f"colours), or these, a line each, in {folder / OWN[0]}; lists of tools are read, too: "
            f"{', '.join(COLOUR_LISTS + NUMBER_LISTS)}{unread_lists(folder)}"
        )


# ----------------------------------------------------------------------------------- values


def _forms(masks: list[Mask], form: str, values: Values, notes: list[str]) -> dict[str, str]:
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
                f"{where}: taken as maps of classes, since {values.where} names their values; else "
                "say --masks-are instances"
            )
        else:
            forms[label] = _guess(where, maps, notes)
    if forms.get("", "classes") not in ("classes", "both"):
        notes.append(
            "masks: what is in no folder of a class is of the class `object`; to name it, put it "
            "into masks/NAME/"
        )
    return forms


def _guess(where: str, masks: list[Mask], notes: list[str]) -> str:
    """instances or binary, from all maps of a class. Raises: UserError if they look like maps of
    classes."""
    grey, several, wide, voc, odd, seen = 0, False, False, False, [], Counter()
    sets: Counter[frozenset] = Counter()
    scattered, shown, coded = 0, 0, 0  # values in several places of their map, of all; maps
    for k, mask in enumerate(masks):
        stored, void = read_map(mask.path)
        values = {*np.unique(stored).tolist()} - {0}
        coded += where == "masks" and _is_coded(values)
        seen.update(values)
        grey += mask.lossy or _is_soft(stored)
        voc |= bool(void)
        wide |= stored.dtype.itemsize > 1
        several |= len(values) == 1 and len(draw_regions(stored)) > 1
        numbers = values - {255}
        parts = 0
        sets[frozenset(numbers)] += 1
        if where == "masks" and k < LOOKED_AT and len(values) <= MOST:
            parts = _scattered(stored)
            scattered, shown = scattered + parts, shown + len(values)
        if numbers and (voc or numbers != {*range(1, len(numbers) + 1)} or 2 * parts > len(values)):
            odd.append(mask.path)
    if 2 * coded > len(masks):
        raise UserError(f"{masks[0].path}: {CODED.format(brief(sorted(seen)[:12]))}")
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
    # 16 bits are for many instances, which are in one piece
    wide &= shown == 0 or 3 * scattered < shown
    # images rarely have equally many instances; most show the same classes
    usual, count = sets.most_common(1)[0] if len(masks) > 2 else ((), 0)
    if len(usual) > 1 and 2 * count > len(masks):
        odd.append(masks[0].path)
    if where == "masks" and odd and not wide and (voc or recurring):
        raise UserError(
            f"{odd[0]}: its values may be classes or instances (of these maps they are "
            f"{brief(sorted(seen)[:12])}); say --masks-are classes, with --classes NAME,NAME,..., "
            "or --masks-are instances"
        )
    other = "classes, with --classes" if where == "masks" else "binary"
    notes.append(f"{where}: every value is taken for an instance; else say --masks-are {other}")
    return "instances"


def _is_coded(values: set[int]) -> bool:
    """Whether the values of a map, without 0, are 256 * class + instance: of several classes, most
    with a first instance, 0 or 1, none with very many, and not simply counted all."""
    numbers: dict[int, list[int]] = {}
    for value in sorted(values):
        numbers.setdefault(value // INSTANCES, []).append(value % INSTANCES)
    if len(numbers) < 3 or values == {*range(1, len(values) + 1)}:
        return False
    first = sum(own[0] < 2 for own in numbers.values())
    return 2 * first > len(numbers) and all(own[-1] < INSTANCES / 2 for own in numbers.values())


def _scattered(stored: np.ndarray) -> int:
    """How many values of a map, 0 and 255 apart, are in several places; every n-th pixel of a large
    one is enough to see it."""
    step = -(-max(stored.shape) // SIDE)
    small = stored[::step, ::step]
    draws = [draw for value, draw in draw_values(small) if value not in (0, 255)]
    return sum(ndimage.label(draw()[2], np.ones((3, 3)))[1] > 1 for draw in draws)


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
    masks: list[Mask], forms: dict, values: Values, classes: Classes, size: Size
) -> list[Instance]:
    """Instances of the masks of one image."""
    instances = []
    for mask in masks:
        category = UNNAMED.get(mask.label, mask.label or PLAIN)
        form = "instances" if mask.single else forms[mask.label]
        by_class = form in ("classes", "both")
        colours = "all" if by_class and values.coloured else "any" if form == "instances" else ""
        indices = by_class and not values.coloured and values.names[255] == "__ignore__"
        stored, void = read_map(mask.path, size, colours, indices)
        if mask.single:
            _require_one(mask, stored)
        if mask.single or form == "binary":
            stored = _white(stored, mask.lossy)
        elif mask.lossy:
            binary = "" if by_class else ", or say --masks-are binary"
            raise UserError(
                f"{mask.path}: JPEG keeps no exact values; save maps of {form} as PNG{binary}"
            )
        if form == "binary":
            instances += [Instance(category, draw) for draw in draw_regions(stored)]
        elif by_class:
            own = {} if values.coloured else dict.fromkeys(void, "__ignore__")
            own = values._replace(names=values.names | own)
            instances += _classes_of(mask.path, stored, own, classes, form == "both")
        else:
            draws = [(value, draw) for value, draw in draw_values(stored) if value]
            instances += [Instance(VOID if v in void else category, draw) for v, draw in draws]
    return instances


def _require_one(mask: Mask, stored: np.ndarray) -> None:
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


def _classes_of(
    path: Path, stored: np.ndarray, values: Values, classes: Classes, both: bool
) -> list[Instance]:
    """Instances of a map of classes. both: they are numbered in it, too."""
    instances = []
    named = stored // INSTANCES if both else stored
    _require_named(path, named, values)
    if values.doubtful and not classes.background and not named.all():
        first, second = values.doubtful[:2]
        share = np.mean(named == 0)
        each = "" if values.where == "--classes" else " (in a file a line each)"
        raise UserError(
            f"{path}: {f'{share:.0%}' if share >= 0.01 else '< 1%'} of its pixels are 0, and the "
            f"first name of {values.where}, {first}, may be of 0 or of 1; write "
            f"0:{first},1:{second},..., or, where 0 is no class, "
            f"background,{first},{second},...{each}"
        )
    for number, draw in draw_values(stored):
        value = number // INSTANCES if both else number
        category = UNNAMED.get(values.names[value], values.keys.get(value, value))
        thing = category in classes and classes[category][1]
        draws = draw_regions(stored == value) if thing and not both else [draw]
        instances += [Instance(category, draw) for draw in draws]
    return instances


def _require_named(path: Path, stored: np.ndarray, values: Values) -> None:
    """Raise UserError for values, or colours, without a name."""
    unnamed = [value for value in np.unique(stored).tolist() if value not in values.names]
    if not unnamed:
        return
    what, known = "colour" if values.coloured else "value", sorted(values.names)
    grey = values.coloured and all(value % 65793 == 0 for value in unnamed)  # r = g = b
    shown = ", ".join(map(values.shown, unnamed[:12])) + ", ..." * (len(unnamed) > 12)
    several = f"{len(unnamed)} {what}s without a name, {shown}"
    text = f"{path}: has " + (
        several if len(unnamed) > 1 else f"the {what} {shown}, which has no name"
    )
    raise UserError(
        f"{text}; {values.where} names {brief([values.shown(v) for v in known])}; name "
        f"{'them' if len(unnamed) > 1 else 'it'} there, as void if it is no class"
        + ("; if the maps hold numbers, say --classes 0:NAME,1:NAME,..." if grey else "")
        + (
            "; so many come of smoothed edges: make the maps without interpolation"
            * (len(unnamed) > MIXED)
        )
        + ", or say --masks-are instances"
    )


def _white(stored: np.ndarray, lossy: bool) -> np.ndarray:
    """(H, W) bool: what a binary mask covers: all that is not 0; or, where there are levels up to
    white, or JPEG's noise, from half of white on."""
    levels = np.unique(stored)
    white = 255 if levels[-1] < 256 else 65535
    soft = lossy or np.count_nonzero(levels) > 1 and levels[-1] > 0.9 * white
    return stored > white / 2 if soft else stored > 0

"""Cityscapes: leftImg8bit/ and gtFine/ as they are downloaded, maps of instance ids, with stuff.

leftImg8bit/PART/CITY/*_leftImg8bit.png goes with gtFine/PART/CITY/*_gtFine_instanceIds.png; images
of train_extra are unlabelled. Values from 1000 on are class * 1000 + k, an instance; below, a
class: stuff, or a group of things that nobody told apart, which is crowd. Axes: H W pixels.
"""

from functools import partial
from pathlib import Path

from ground.errors import UserError
from readers.annotations.maps import draw_values, read_map
from readers.annotations.others import hint
from readers.annotations.records import Classes, Instance, Record, Source
from readers.annotations.shapes import Size

CITYSCAPES = {  # the 19 classes of the evaluation: label id -> name, colour
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}
FIRST_THING = 24  # label id; from here on they are things
IMAGE, MAP = "_leftImg8bit.png", "_gtFine_instanceIds.png"  # endings


def read_cityscapes(folder: Path, classes: Classes) -> Source:
    """Records of all images but those of the test set, in the division of the data set."""
    source, records = Source(), []
    for part in ("train", "train_extra", "val"):
        maps = {*(folder / "gtFine" / part).glob(f"*/*{MAP}")}
        for image in sorted((folder / "leftImg8bit" / part).glob(f"*/*{IMAGE}")):
            path = folder / "gtFine" / part / image.parent.name / image.name.replace(IMAGE, MAP)
            read = partial(_instances, path) if path in maps else None
            if read is None:
                _require_no_other(path)
            maps.discard(path)
            records.append(Record(image.name, image, read, part.removesuffix("_extra")))
        source.passed["maps without an image"] += len(maps)
    if not records:
        raise UserError(
            f"{folder / 'leftImg8bit'}: no PART/CITY/*{IMAGE} with PART train or val; expected the "
            f"layout of the Cityscapes downloads{hint(folder, 'cityscapes')}"
        )
    for key, (name, colour) in CITYSCAPES.items():
        classes.add(key, name, "Cityscapes", key >= FIRST_THING, colour)
    tests = (folder / "leftImg8bit" / "test").glob(f"*/*{IMAGE}")
    records += [Record(image.name, image, None, "test") for image in tests]
    return source.settle(folder, records)


def _require_no_other(path: Path) -> None:
    """Raise UserError if other files of the image of a missing map are there."""
    others = sorted(path.parent.glob(path.name.replace("instanceIds.png", "*")))
    if others:
        raise UserError(
            f"{path}: missing, though {others[0].name} is there; unpack the whole "
            "gtFine_trainvaltest.zip, or, where there are label ids alone, put images/ and masks/ "
            "together and say --from masks --masks-are classes"
        )


def _instances(path: Path, size: Size) -> list[Instance]:
    instances = []
    for value, draw in draw_values(read_map(path, size)[0]):
        key = value // 1000 if value >= 1000 * FIRST_THING else value
        if key in CITYSCAPES:
            instances.append(Instance(key, draw, crowd=value == key >= FIRST_THING))
    return instances

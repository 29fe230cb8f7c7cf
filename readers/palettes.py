"""Palettes of maps: which colour a number has, and whether all maps agree about it."""

from pathlib import Path
from typing import Callable

import numpy as np

from ground.errors import UserError
from readers.pictures import open_image

LOOKED_AT = 20  # maps, evenly spread


def palette_of(path: Path) -> dict[int, int]:
    """The colours, 65536 r + 256 g + b, of the indices that a map with a palette uses; of others
    none."""
    if path.suffix.lower() == ".npy":
        return {}
    image = open_image(path, None)
    if image.mode != "P":
        return {}
    table = np.array(image.getpalette("RGB")).reshape(-1, 3) @ (65536, 256, 1)
    return {int(v): int(table[v]) for v in np.unique(np.asarray(image)) if v < len(table)}


def require_one_palette(
    paths: list[Path], mend: str, counts: Callable[[int], bool] = lambda value: True
) -> None:
    """Raise UserError where one number has different colours in two maps, as palettes have that a
    program has made for each of them: it need not mean one class. Looks at some of the maps.

    counts: whether a value is that of a class.
    """
    colours: dict[int, tuple] = {}
    for path in paths[:: -(-len(paths) // LOOKED_AT) or 1]:
        for value, colour in palette_of(path).items():
            if not counts(value):
                continue
            before = colours.setdefault(value, (colour, path))
            if before[0] != colour:
                raise UserError(
                    f"{path}: its palette shows {value} as #{colour:06x}, that of {before[1]} as "
                    f"#{before[0]:06x}, so the numbers may mean other classes in each; {mend}"
                )

"""The colours of classes and of their instances, which people with colour blindness can tell apart.

The first seven are those of Okabe and Ito (Color Universal Design, 2008; without black, which
stands for void). No palette of more than about ten colours is safe, so the next ones are found, one
after the other: of many colours the one that is farthest from all before it, for an eye with three
kinds of cones or without the red or the green ones, whichever eye is worst off. The k-th colour
never depends on how many follow.
Sources: distances in Oklab (Ottosson, 2020); simulation of protanopia and deuteranopia by Machado,
Oliveira and Fernandes (2009).
"""

import functools

import numpy as np

OKABE_ITO = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


def _matrices(text: str) -> np.ndarray:
    return np.array(text.split(), float).reshape(-1, 3, 3)


# Linear RGB -> linear RGB, of eyes with all cones, without the red and without the green ones.
EYES = _matrices("""
    1 0 0
    0 1 0
    0 0 1
    0.152286 1.052583 -0.204868
    0.114503 0.786281 0.099216
    -0.003882 -0.048116 1.051998
    0.367322 0.860646 -0.227968
    0.280085 0.672501 0.047413
    -0.011820 0.042940 0.968881""")
# Linear RGB -> cones -> Oklab, with a cube root between.
TO_LMS, TO_LAB = _matrices("""
    0.4122214708 0.5363325363 0.0514459929
    0.2119034982 0.6806995451 0.1073969566
    0.0883024619 0.2817188376 0.6299787005
    0.2104542553 0.7936177850 -0.0040720468
    1.9779984951 -2.4285922050 0.4505937099
    0.0259040371 0.7827717662 -0.8086757660""")
# Oklab: neither black nor white nor grey, which are void and borders; nothing garish.
LIGHTNESS, CHROMA = (0.4, 0.9), (0.07, 0.17)
SHADE = 0.45  # largest share of white or black in the colour of an instance


def palette(count: int) -> list[tuple[int, int, int]]:
    """RGB colours, 0 to 255, of the classes 0 ... count - 1."""
    return [tuple(c) for c in _palette(max(count, len(OKABE_ITO)))[:count].tolist()]


@functools.lru_cache
def _palette(count: int) -> np.ndarray:
    steps = np.arange(15, 256, 24)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    lab = seen(grid)[0]
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    grid = grid[_between(lightness, LIGHTNESS) & _between(chroma, CHROMA)]
    colours, views = list(np.array(OKABE_ITO)), seen(grid)  # (3, N, 3)
    nearest = np.full(views.shape[:2], np.inf)  # of each candidate to the colours, by eye
    for k in range(count):
        if k == len(colours):
            colours.append(grid[nearest.min(0).argmax()])
        nearest = np.minimum(nearest, np.linalg.norm(views - seen(colours[k][None]), axis=-1))
    return np.array(colours)


def _between(values: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    return (ends[0] < values) & (values < ends[1])


def seen(colours: np.ndarray) -> np.ndarray:
    """RGB (N, 3), 0 to 255 -> Oklab (3, N, 3), as the three kinds of eyes see them: see EYES."""
    x = np.asarray(colours) / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return np.cbrt((linear @ EYES.transpose(0, 2, 1)).clip(0, 1) @ TO_LMS.T) @ TO_LAB.T


def shade(colour: tuple[int, int, int], n: int) -> tuple[int, int, int]:
    """The colour of the n-th instance of a class, n = 0, 1, ...: lighter and darker by turns, and
    no two alike.

    The shares of white and black are those of van der Corput's sequence (0, 1/2, 1/4, 3/4, 1/8,
    ...): whatever their number, instances are spread evenly.
    """
    share = sum((n >> bit & 1) / 2 ** (bit + 1) for bit in range(n.bit_length()))
    share = SHADE * (2 * ((share + 0.5) % 1) - 1)  # the first instance is in the middle
    return tuple(round(c + abs(share) * ((255 if share > 0 else 0) - c)) for c in colour)

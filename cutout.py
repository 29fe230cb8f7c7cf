"""CutOut: rectangles of an image become noise, so that what is learned does not hang on one part.

Differs from the paper of PL-DC, whose Table III prints the aspects of the second and third pattern
as (0.1, 0.6) and (0.05, 0.8): nothing, with `--cutout paper`. Its public code, and Unbiased Teacher
that the patterns are from, have (0.1, 6) and (0.05, 8), rectangles that lie as well as stand:
`--cutout code`. Noise is uniform; theirs is normal, and wraps around 8 bits, which comes close.
Axes: H W pixels.
Sources: CutOut (arXiv:1708.04552); Unbiased Teacher (arXiv:2102.09480); PL-DC (arXiv:2505.11075).
"""

import math
import random

import numpy as np
import torch
from torch import Tensor

# One after the other: chance, share of the area, height / width (uniform in its logarithm)
_AREAS = ((0.7, (0.05, 0.2)), (0.5, (0.02, 0.2)), (0.3, (0.02, 0.2)))
_ASPECTS = {
    "paper": ((0.3, 3.3), (0.1, 0.6), (0.05, 0.8)),
    "code": ((0.3, 3.3), (0.1, 6.0), (0.05, 8.0)),
}
PATTERNS = {
    "none": (),
    **{
        name: tuple((*area, aspect) for area, aspect in zip(_AREAS, aspects))
        for name, aspects in _ASPECTS.items()
    },
}
TRIES = 10  # for a rectangle that fits, then there is none


def cut_out(image: Tensor, patterns, rng: random.Random) -> Tensor:
    """A rectangle of noise of each pattern (a value of PATTERNS), with its chance. (3, H, W) uint8;
    the image itself stays as it is.
    """
    height, width = image.shape[1:]
    for chance, area, (least, most) in patterns:
        if rng.random() >= chance:
            continue
        for _ in range(TRIES):
            pixels = rng.uniform(*area) * height * width
            aspect = math.exp(rng.uniform(math.log(least), math.log(most)))
            h, w = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if 0 < h < height and 0 < w < width:
                y, x = rng.randint(0, height - h), rng.randint(0, width - w)
                noise = np.random.default_rng(rng.getrandbits(64)).integers(0, 256, (3, h, w))
                image = image.clone()
                image[:, y : y + h, x : x + w] = torch.from_numpy(noise.astype(np.uint8))
                break
    return image

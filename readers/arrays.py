"""Arrays and tensors as images, by their values and not by a guess."""

import numpy as np
from PIL import Image


def from_array(values) -> Image.Image:
    """An array or a tensor as PIL, by its values and not by a guess.

    values: uint8, (H, W), (H, W, 1), RGB (H, W, 3) or RGBA (H, W, 4), 0 to 255; or uint16 (H, W).
    Raises: TypeError saying what was expected: of floats nobody knows whether they end at 1 or at
        255.
    """
    expected = (
        "expected one image: a path, a PIL image, or an array (H, W) or (H, W, 3), RGB, "
        "uint8, 0 to 255"
    )
    if isinstance(values, (list, tuple)):
        raise TypeError(
            f"a {type(values).__name__}: {expected}; of several images, call it for each"
        )
    try:
        x = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except (TypeError, ValueError):
        x = np.asarray(None)
    if x.dtype.kind not in "buif":
        raise TypeError(f"{type(values).__name__}: {expected}")
    found = f"an array {x.shape} of {x.dtype}"
    if x.ndim == 4:
        raise TypeError(f"{found}: {expected}; of a batch, call it for each image")
    if x.ndim == 3 and x.shape[0] in (1, 3, 4) and x.shape[2] not in (1, 3, 4):
        raise TypeError(
            f"{found}: {expected}; channels come last: x.transpose(1, 2, 0), of a tensor "
            "x.permute(1, 2, 0)"
        )
    if x.ndim not in (2, 3) or not x.size or x.ndim == 3 and x.shape[2] not in (1, 3, 4):
        raise TypeError(f"{found}: {expected}")
    if x.dtype.kind == "f":
        raise TypeError(
            f"{found}: {expected}; of values from 0 to 1: (255 * x).round().astype(np.uint8), "
            "from 0 to 255: x.round().astype(np.uint8)"
        )
    if x.ndim == 3 and x.shape[2] == 1:
        x = x[..., 0]
    x = x.astype(x.dtype.newbyteorder("="), copy=False)
    if x.dtype != np.uint8 and not (x.ndim == 2 and x.dtype in (np.uint16, bool)):
        raise TypeError(f"{found}: {expected}; of values from 0 to 255: x.astype(np.uint8)")
    return Image.fromarray(np.ascontiguousarray(x))

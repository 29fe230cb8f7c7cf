"""A picture of more pixels than fit in memory (`--stage predict`): read, seen in windows and
written by parts.

Its files are TIFF, in tiles: the ids of segments as they are, 32 bits, and the classes; `overlay/`
has a smaller picture. Beside two rows of windows nothing of it is in memory; on disk, two files
without compression stand beside the result until it is there.
"""

import contextlib
import glob
import io
import os
from pathlib import Path
from typing import Callable, Iterator, TypeVar

import numpy as np
import tifffile
from PIL import Image
from tqdm import tqdm

from engine.windows import in_windows, predict_in_windows
from ground.errors import UserError
from ground.files import write_atomic
from inference import Prediction
from readers.large import ENDINGS, LargeImage
from report import drawing

T = TypeVar("T")
TILE = 512  # pixels, side of a tile of the files
PREVIEW = 2560  # pixels, longest side of the overlay
BAND = 256  # rows of the overlay that are made at once


def is_large(error: UserError, path: Path) -> bool:
    """Whether a picture that `open_image` refuses may be read by parts."""
    return error.kind == "large" and path.suffix.lower() in ENDINGS


def predict_large(
    model, path: Path, targets: list[Path], then: Callable[[Prediction], T]
) -> tuple[T, tuple[int, int]]:
    """Predict the picture and write its files: panoptic, semantic, overlay.

    model: `tools.predict.Predictor`.   then: called with the answer, whose maps are in files that
    go afterwards.   Returns: what that gives, and (W, H).
    Raises: UserError if it cannot be read by parts, or the run sees whole images only.
    """
    picture = LargeImage(path, model.white, model.cfg.stretch)
    width, height = picture.size
    if not in_windows(picture.size, model.cfg):
        raise UserError(
            f"{path}: {width} x {height} pixels are too many to be seen at once, as this run sees "
            "its images; let it see windows with --window PIXELS",
            "large",
        )
    kinds = np.int32, np.uint8 if len(model.taxonomy) < 256 else np.uint16
    with contextlib.ExitStack() as stack:
        maps = [
            stack.enter_context(_scratch(target, (height, width), kind))
            for target, kind in zip(targets, kinds)
        ]
        instances = model.cfg.labels == "instances"
        answers = predict_in_windows(
            model.method,
            picture,
            [model.reading],
            arrays=lambda _: maps,
            least=model.cfg.least_score if instances else 0.0,
            progress=_bar(path),
        )
        answer = answers[model.reading]
        for target, values in zip(targets, maps):
            _write_tiff(target, values)
        _write_overlay(targets[2], picture, answer, model.taxonomy)
        return then(answer), picture.size


def _bar(path: Path):
    return lambda rows: tqdm(rows, desc=path.name, unit="row", dynamic_ncols=True, leave=False)


@contextlib.contextmanager
def _scratch(target: Path, shape: tuple[int, int], kind) -> Iterator[np.memmap]:
    """An array of zeros in a file beside the target, which goes at the end; so do those of calls
    that were killed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        left.unlink()
    path = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield np.memmap(path, kind, "w+", shape=shape)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        path.unlink(missing_ok=True)


def _write_tiff(target: Path, array: np.ndarray) -> None:
    """A tiled TIFF, compressed, whole or not at all."""

    def tiles():
        for top in range(0, array.shape[0], TILE):
            for left in range(0, array.shape[1], TILE):
                yield np.ascontiguousarray(array[top : top + TILE, left : left + TILE])

    path = target.with_name(f".{target.name}.{os.getpid()}.out.tmp")
    try:
        options = {"tile": (TILE, TILE), "compression": "zlib", "metadata": None}
        kind = array.dtype.newbyteorder("=")
        unsigned = np.uint32 if kind == np.int32 else kind
        tifffile.imwrite(
            path,
            (tile.astype(unsigned) for tile in tiles()),
            shape=array.shape,
            dtype=unsigned,
            photometric="minisblack",
            bigtiff=array.nbytes > 2**31,
            **options,
        )
        os.replace(path, target)
    finally:
        path.unlink(missing_ok=True)


def _write_overlay(target: Path, picture: LargeImage, answer, taxonomy) -> None:
    width, height = picture.size
    step = -(-max(picture.size) // PREVIEW)
    small = Image.new("RGB", (-(-width // step), -(-height // step)))
    for top in range(0, height, BAND * step):
        band = picture.crop((0, top, width, min(height, top + BAND * step)))
        small.paste(band.reduce(step) if step > 1 else band, (0, top // step))
    segment_map = np.ascontiguousarray(answer.segment_map[::step, ::step])
    buffer = io.BytesIO()
    drawing.overlay(small, segment_map, answer.labels, taxonomy, names=False).save(buffer, "PNG")
    write_atomic(target, buffer.getbuffer())

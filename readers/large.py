"""Pictures of more pixels than fit in memory: a TIFF that is read by parts.

Tiles or strips are decoded by tifffile when they are asked for, and the latest of them are kept.
"""

import collections
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from ground.errors import UserError
from readers.pictures import require_single
from readers.sixteen_bit import WHITE, scaled
from readers.stretch import counts, ramp

KEPT = 2**28  # bytes of decoded tiles or strips that stay in memory
PIECE = 2**27  # bytes of a tile or strip, at most
BAND = 256  # rows whose values are counted at once
ENDINGS = (".tif", ".tiff")


class LargeImage:
    """The first page of a TIFF as 8-bit RGB, by parts; as `readers.pictures.open_image` has smaller
    ones: alpha is dropped, of 16 bits 0 to `white` become 0 to 255, or all is stretched by values
    that are counted first, band by band.

    size: (W, H).
    Raises: UserError if it is no TIFF of 8 or 16 bits, grey or RGB; is stored in pieces that are
        too large to be decoded one by one; or has to be turned.
    """

    def __init__(self, path: Path, white: int = WHITE, stretch: bool = False):
        self.path, self.shade = Path(path), None
        try:
            self.file = tifffile.TiffFile(path)
            self.page = self.file.pages[0]
        except (OSError, tifffile.TiffFileError, IndexError) as error:
            raise UserError(
                f"{path}: not a readable TIFF ({_words(error)})", "unreadable"
            ) from None
        self.size = self.page.imagewidth, self.page.imagelength
        pages = self.file.pages[: 2 if len(self.file.pages) > 1 else 1]
        require_single(self.path, [(page.imagewidth, page.imagelength) for page in pages])
        self._require_known()
        self.kept: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self.bytes = 0
        page = self.page
        self.tile = page.tilelength, page.tilewidth
        if not page.is_tiled:
            self.tile = min(page.rowsperstrip, page.imagelength), page.imagewidth
        # One strip of the whole image without compression is how many programs write.
        self.whole = page.asarray(out="memmap") if page.is_memmappable else None
        if self.whole is None and self.tile[0] * self.tile[1] * self._bytes() > PIECE:
            raise UserError(
                f"{path}: stored in pieces of {self.tile[1]} x {self.tile[0]} pixels, too large to "
                "be read one by one; save it in tiles of 256 or 512 pixels",
                "large",
            )
        if stretch:
            self.shade = ramp(self._counts())
        elif self.page.dtype == np.uint16:
            self.shade = scaled(white)

    def _counts(self) -> np.ndarray:
        width, height = self.size
        bands = range(0, height, BAND)
        return sum(counts(self._values((0, top, width, min(height, top + BAND)))) for top in bands)

    def _bytes(self) -> int:
        return self.page.samplesperpixel * self.page.dtype.itemsize

    def _require_known(self) -> None:
        page, photometric = self.page, tifffile.PHOTOMETRIC
        orientation = page.tags.get("Orientation")
        kinds = photometric.MINISBLACK, photometric.RGB, photometric.YCBCR
        faults = {
            f"values of {page.dtype}, expected 8 or 16 bits": page.dtype not in ("u1", "u2"),
            f"{page.samplesperpixel} channels, expected 1, 3 or 4": page.samplesperpixel
            not in (1, 3, 4),
            f"colours of kind {page.photometric!s}, expected grey or RGB": page.photometric
            not in kinds,
            "channels one after the other, expected pixel by pixel": page.samplesperpixel > 1
            and page.planarconfig != tifffile.PLANARCONFIG.CONTIG,
            "it is to be turned (its orientation is not 1); save it upright": orientation
            is not None
            and orientation.value != 1,
        }
        for words, holds in faults.items():
            if holds:
                raise UserError(f"{self.path}: too large to be read whole, and {words}", "large")

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        """The part (left, top, right, bottom), RGB."""
        values = self._values(box)
        values = values if self.shade is None else self.shade[values]
        return Image.fromarray(np.ascontiguousarray(values)).convert("RGB")

    def _values(self, box: tuple[int, int, int, int]) -> np.ndarray:
        """(h, w) or (h, w, 3), as they are stored."""
        left, top, right, bottom = box
        if self.whole is not None:
            return _without_alpha(self.whole[top:bottom, left:right])
        height, width = self.tile
        across = -(-self.size[0] // width)
        samples = self.page.samplesperpixel
        part = np.zeros((bottom - top, right - left, samples), self.page.dtype)
        for row in range(top // height, -(-bottom // height)):
            for column in range(left // width, -(-right // width)):
                tile = self._tile(row * across + column)
                y, x = row * height, column * width
                end, last = min(bottom, y + tile.shape[0]), min(right, x + tile.shape[1])
                first, begin = max(top, y), max(left, x)
                part[first - top : end - top, begin - left : last - left] = tile[
                    first - y : end - y, begin - x : last - x
                ]
        return _without_alpha(part)

    def _tile(self, index: int) -> np.ndarray:
        """(h, w, channels), decoded."""
        if index in self.kept:
            self.kept.move_to_end(index)
            return self.kept[index]
        page = self.page
        try:
            self.file.filehandle.seek(page.dataoffsets[index])
            stored = self.file.filehandle.read(page.databytecounts[index])
            tables = {}
            if page.jpegtables is not None:
                tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
            tile, _, shape = page.decode(stored, index, **tables)
        except Exception as error:  # whatever a codec raises
            raise UserError(
                f"{self.path}: piece {index} of the image cannot be decoded ({_words(error)})",
                "unreadable",
            ) from None
        _, height, width, _ = shape
        if tile is None:  # a piece that is not stored is empty
            tile = np.zeros((1, *shape[1:]), page.dtype)
        tile = tile[0, :height, :width]
        self.kept[index] = tile
        self.bytes += tile.nbytes
        while self.bytes > KEPT and len(self.kept) > 1:
            self.bytes -= self.kept.popitem(last=False)[1].nbytes
        return tile


def _without_alpha(values: np.ndarray) -> np.ndarray:
    if values.ndim == 2:
        return values
    return values[..., 0] if values.shape[2] == 1 else values[..., :3]


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Image files: what counts as one, how it is opened, and which names a file may have.

Decoded by Pillow. Everything that reads an image, a map or a folder of them goes through here, so
that sizes, formats, EXIF and 16 bits are treated alike by every stage.
"""

import collections
import contextlib
import os
import re
import warnings
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from ground import identity
from ground.errors import UserError
from readers.sixteen_bit import WHITE, scaled, sixteen_bits
from readers.stretch import counts, ramp

# Pixels of an image or a map; Pillow warns from here on and refuses only twice as much.
MAX_PIXELS = 89_000_000
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# What Pillow may decode: among its other formats are some that run programs (EPS) or follow links.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000")
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")  # endings of files that keep no exact values
MAX_NAME = 255  # bytes of a file name; a path has at most 4 times as many characters
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURN = {k: Image.Transpose[name] for k, name in enumerate(TURNS.split(), 2)}  # by EXIF; 1 = none
SIDEWAYS = [TURN[k] for k in (5, 6, 7, 8)]  # width becomes height
# Control characters and half surrogates, which would also break the one line of an error.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


class Images:
    """Image files of one folder. folder: Path.   names: (M,) str, paths below it with slashes.

    white, stretch: as in `open_image`; `readers.exposure.see` settles them.
    """

    white, stretch = WHITE, False
    folder: Path
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return str(self.names[i])

    def path(self, i: int) -> Path:
        return self.folder / self.name(i)

    def image(self, i: int) -> Image.Image:
        return open_image(self.path(i), white=self.white, stretch=self.stretch)

    def digest(self, i: int) -> str:
        """SHA-256 of the file, and of what it is exposed by, a white point or its own values: with
        another one it is another image."""
        digest = file_digest(self.path(i))
        if self.stretch:
            return identity.of_text(digest, "stretch")
        return digest if self.white == WHITE else identity.of_text(digest, f"white {self.white}")

    def fingerprint(self, indices=None) -> str:
        """Of all images, or of some (`identity.of_files`); where the folder is does not matter.
        What is not there counts as such: whoever needs it will say so."""
        indices = range(len(self)) if indices is None else indices
        names = [self.name(i) for i in indices]

        def size(k: int) -> int:
            return identity.bytes_of(self.folder / names[k])

        def digest(k: int) -> str:
            return self.digest(indices[k]) if size(k) >= 0 else "absent"

        return identity.of_files(names, size, digest)


class ImageFolder(Images):
    """All pictures of a folder, without ground truth: for SAM and the warm-up (SA-1B, where masks
    lie beside them)."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder of images")
        passed = collections.Counter()

        def count(name):
            passed[os.path.splitext(name)[1].lower() or name] += 1

        self.names = np.array(pictures(self.folder, count), str)
        passed.pop(".json", 0)  # masks beside the images
        if passed:
            kinds = ", ".join(f"{n} x {brief(kind)}" for kind, n in passed.most_common(5))
            print(
                f"{folder}: {passed.total()} files passed over, by their names no images: {kinds}"
            )
        if not len(self.names):
            raise UserError(
                f"{folder}: no images in this folder; expected files that end in "
                f"{', '.join(endings())}"
            )


def pictures(
    folder: Path, others: Callable[[str], object] | None = None, without: set[str] = frozenset()
) -> list[str]:
    """The pictures of a folder and of the folders in it: paths below it, with slashes, sorted.

    This is what a picture is, for every stage: a file that ends as one of FORMATS does. Hidden
    files and folders (their names begin with a dot) and `__MACOSX`, which holds macOS's shadows of
    the pictures beside it, are passed over. Links to folders are followed, but not to one that
    they lie in.

    Args:
        others: called with the files that are no pictures, and with the folders that are passed
            over, with a slash.
        without: real paths of folders that are left out.
    Raises: UserError if a folder cannot be listed.
    """
    names, known = [], set(endings())

    def walk(place: str, below: str, above: tuple[str, ...]) -> None:
        with os.scandir(place) as entries:
            for entry in entries:
                name = below + entry.name
                shown = not entry.name.startswith(".") and entry.name != "__MACOSX"
                real = os.path.realpath(entry.path) if entry.is_dir() else ""
                if real and shown and real not in above and real not in without:
                    walk(entry.path, f"{name}/", (*above, real))
                elif not real and shown and os.path.splitext(entry.name)[1].lower() in known:
                    names.append(name)
                elif others is not None and real not in without:
                    others(f"{name}/" if real else name)

    try:
        walk(str(folder), "", (os.path.realpath(folder),))
    except OSError as error:
        place = error.filename or folder
        raise UserError(f"{place}: cannot be listed ({error.strerror})") from None
    return sorted(names)


def endings(formats: tuple[str, ...] = FORMATS) -> list[str]:
    """The endings of pictures, in small letters, with their dots."""
    return sorted(e for e, kind in Image.registered_extensions().items() if kind in formats)


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises: UserError if it cannot be read."""
    try:
        return identity.of_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "absent") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "unreadable") from None


# ---------------------------------------------------------------------------------- opening images


def open_image(
    path: Path, mode: str | None = "RGB", white: int = WHITE, stretch: bool = False
) -> Image.Image:
    """An image as 8-bit RGB, turned as EXIF says; with another mode a map, not turned; None: as it
    is stored (no palette is applied).

    Of an animation the first frame; an alpha channel is dropped. Of 16 bits a channel, 0 to `white`
    become 0 to 255, the same in every image of a data set, so that images stay comparable
    (`readers.exposure.white_point`); what is above is 255, too. Or the image is stretched, whatever
    its bits (`readers.stretch`).
    Raises: UserError with the path if it cannot be read, is larger than MAX_PIXELS, or is a TIFF of
        several images.
    """
    with opened(path) as image:
        if mode != "RGB":
            return image.convert(mode) if mode else image.copy()
        turn = _turn(image)
        image = as_rgb(image, white, stretch)
        return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image, white: int = WHITE, stretch: bool = False) -> Image.Image:
    """Any image as 8-bit RGB, as `open_image` says; it is not turned. Raises: ValueError if it has
    32 bits a channel, or a sign."""
    if stretch:
        values = values_of(image)
        image = Image.fromarray(ramp(counts(values))[values])
    elif white != WHITE or image.mode.startswith(("I", "F")):
        values = sixteen_bits(image)
        image = image if values is None else Image.fromarray(scaled(white)[values])
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # before its file is closed; convert() would copy every pixel
    return image


def values_of(image: Image.Image) -> np.ndarray:
    """(H, W) or (H, W, 3), uint8 or uint16: what is stored, without alpha, of 8 bits as RGB."""
    values = sixteen_bits(image)
    if values is None:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return values


def image_header(path: Path) -> tuple[tuple[int, int], Image.Transpose | None]:
    """(width, height) of an image as `open_image` returns it, and how it will be turned; no pixel
    is read."""
    with opened(path) as image:
        turn = _turn(image)
        return image.size[::-1] if turn in SIDEWAYS else image.size, turn


@contextlib.contextmanager
def opened(path: Path):
    """A Pillow image, not yet decoded. What goes wrong while it is open is a UserError, too."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            require_single(path, _page_sizes(image))
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "absent") from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{path}: its header states more than {MAX_PIXELS // 1_000_000} million pixels, too "
            "many to be read at once; cut it into tiles (--stage predict reads a TIFF by parts)",
            "large",
        ) from None
    except Exception as error:  # Pillow raises a dozen types for what is one thing to the user
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "of no known format, or no image at all"
        if os.path.isfile(path) and not os.path.getsize(path):
            reason = "empty file"
        raise UserError(f"{path}: not a readable image ({reason})", "unreadable") from None


def _page_sizes(image: Image.Image) -> list[tuple[int, int]]:
    """Of the first two pages of a TIFF; of others the image's alone."""
    sizes = [image.size]
    if image.format == "TIFF" and image.n_frames > 1:
        image.seek(1)
        sizes.append(image.size)
        image.seek(0)
    return sizes


def require_single(path: Path, sizes: list[tuple[int, int]]) -> None:
    """Raise UserError if a TIFF is a stack: its second page is as large as the first. Smaller ones
    are the same image again, as a pyramid has them."""
    if sizes[1:2] == sizes[:1]:
        raise UserError(
            f"{path}: holds several images of one size, as a stack, a film or channels that were "
            "saved apart; expected one image: save each as a file of its own",
            "unreadable",
        )


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How EXIF wants an image turned that was opened but not read. A broken EXIF block wants
    nothing (as officially)."""
    # Pillow turns a TIFF itself; asking a PNG would read it.
    if image.format == "TIFF" or image.format == "PNG" and "exif" not in image.info:
        return None
    try:
        return TURN.get(image.getexif().get(0x0112))
    except Exception:  # struct.error, SyntaxError, ... from inside
        return None


# ------------------------------------------------------------------------------ names and messages


def name_fault(name) -> str | None:
    """What is wrong with a file_name of a JSON; None if it is a path that stays in its folder."""
    if not isinstance(name, str) or not name.strip("./ "):
        return "is not a file name"
    if os.path.isabs(name) or ".." in name and ".." in Path(name).parts:
        return "leads out of its folder; expected a path below it"
    if (
        UNPRINTABLE.search(name)
        or len(name) > 4 * MAX_NAME
        or max(len(part.encode()) for part in name.split("/")) > MAX_NAME
    ):
        return (
            f"cannot be the name of a file; expected at most {MAX_NAME} bytes between slashes, "
            "without control characters"
        )
    return None


def brief(value) -> str:
    """A value from a file, as a message can show it."""
    text = f"'{value}'" if isinstance(value, str) else repr(value)
    text = UNPRINTABLE.sub("?", text)
    return text if len(text) <= 100 else f"{text[:100]}..."

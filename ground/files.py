"""Files that are written whole or not at all, and folders with one writer at a time.

Who writes into a folder holds its file `lock`, which names process and host; the lock itself is the
kernel's, so it ends with the process however that ends, and a process number that is used again
means nothing.
"""

import contextlib
import errno
import os
import socket
import tempfile
from pathlib import Path

from ground.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows: no locks there
    fcntl = None

# Open lock files by process and folder: to close one of two would release both.
_held: dict[tuple[int, Path], object] = {}


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part, whenever the
    power goes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); what was there before is intact"
        ) from None
    with contextlib.suppress(
        OSError
    ):  # the new name is on the disk too, where folders can be synchronised
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def place(source: Path, target: Path) -> None:
    """A file as a hard link, or as a copy where there can be none (another disk); of a link, what
    it leads to. What is at the target goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(source):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        write_atomic(target, source.read_bytes())


def require_writable(folder: Path) -> None:
    """Make a folder, and raise UserError if no file can be written there: asked before hours of
    work, not after them.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}), expected a folder for results; "
            "choose another with --out or --runs"
        ) from None


def claim(folder: Path) -> None:
    """Be the one writer of a folder until `release` or the end of the process; remove what a killed
    writer left half-written.

    Raises: UserError if the folder cannot be written, or another process holds it (on a network
        disk: of any machine).
    """
    require_writable(folder)
    folder = Path(folder).resolve()
    if fcntl and (os.getpid(), folder) not in _held:
        file = open(folder / "lock", "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(
                    f"{folder}: {file.read().strip() or 'another process'} is writing there; wait "
                    "for it, or choose another folder with --out"
                ) from None
            print(
                f"warning: {folder}: cannot be locked ({error.strerror}); make sure that no other "
                "process writes there"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _held[os.getpid(), folder] = file
    for stray in folder.rglob(".*.[0-9]*.tmp"):
        stray.unlink(missing_ok=True)


def release(folder: Path) -> None:
    """Let others write into a folder. The lock file stays, empty: to remove it would let two
    processes lock two files of one name.
    """
    file = _held.pop((os.getpid(), Path(folder).resolve()), None)
    if file:
        file.truncate(0)
        file.close()

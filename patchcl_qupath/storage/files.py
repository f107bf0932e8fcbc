"""Files: atomic writes and locks; JSON, JPEG and digests; names and paths that any system takes."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image

from patchcl_qupath.errors import StorageError

logger = logging.getLogger(__name__)

ZARR_METADATA = ("zarr.json", ".zattrs", ".zgroup")  # of version 3, and of version 2

_PARQUET_END = b"PAR1"

WINDOWS = os.name == "nt"
# For other programs to close a file, or all in a folder: a virus scanner opens each new one, and
# what keeps a copy in a cloud reads it.
_BUSY_S = 2.0
_BUSY_FOLDER_S = 30.0
_LONGEST = 259  # characters of a path on Windows, unless long paths are turned on

_MAKE_ROOM = "make room and run again, finished tiles are kept"
_COPY = "copy the project to a folder that you can write to"
_IN_THE_WAY = "a file is where a folder of it should be: move that file away"
_ADVICE = {
    errno.ENOSPC: f"the disk is full: {_MAKE_ROOM}",
    errno.EDQUOT: f"your disk quota is used up: {_MAKE_ROOM}",
    errno.EROFS: f"it is read-only: {_COPY}",
    errno.EACCES: f"no permission to write there: {_COPY}",
    errno.EPERM: f"no permission to write there: {_COPY}",
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.ENAMETOOLONG: "its name is too long: choose a shorter one",
}
_ON_WINDOWS = {
    errno.EACCES: f"another program has it open: close it there; or no permission: {_COPY}",
}
# Of a file system without locks, as Lustre may be mounted: it is used without.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_LOCKS_ON_WINDOWS = {1, 50}  # ERROR_INVALID_FUNCTION, ERROR_NOT_SUPPORTED
_NO_FLUSH = {errno.EINVAL, *_NO_LOCKS}  # of one that cannot wait for its disk, as of some clouds

_REPLACED = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial\.old")  # a folder, until the new one is there
_OF_SCRIPTS = re.compile(r"\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.partial$")  # a UUID of Java
_WITHOUT_LOCK = {"exports", "errors"}  # folders that commands write to beside a run
_OLD_S = 86400.0

_locked: set[Path] = set()  # folders of which this process holds the lock


@contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Raise StorageError, with advice, for an OSError in the block.

    It may write to a ``temporary`` path first, which is longer.
    """
    try:
        yield
    except OSError as error:
        advice = _advice([path, temporary or path], error)
        raise StorageError(f"cannot write {path}: {advice}") from error


def _advice(paths: Sequence[Path], error: OSError) -> str:
    """What to do about an error of the operating system."""
    named = [PurePath(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
    if isinstance(error, FileNotFoundError) and any(map(is_too_long, [*paths, *named])):
        return f"its path is longer than {_LONGEST} characters: move the project to a shorter one"
    advice = _ADVICE | _ON_WINDOWS if WINDOWS else _ADVICE
    return advice.get(error.errno or 0, f"{error}: mend that, or {_COPY}")


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path to write to; it is renamed to ``path`` if the block ends without an error.

    For a file or a folder. A reader sees the old or the new one, never a part of it; for a folder
    there is an instant in which it sees none. After a power failure that holds, too, for a file or
    a folder with all that is in it; what is not ``durable``, where waiting for the disk would take
    long, may then be cut, empty or zeros. Raises StorageError, also for an OSError of the block:
    one that has another cause than this write, as a file that is read, is caught within.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with writing(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if durable:
                _flush(temporary)
            if temporary.is_dir():
                _replace_folder(temporary, path)
            else:
                replace_file(temporary, path)
            logger.debug("wrote %s", path)
        finally:
            discard(temporary)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    if path.is_dir():
        for inside in path.iterdir():
            _flush(inside)
        with suppress(OSError):  # Windows opens no folder, and not every file system flushes one
            _fsync(path, os.O_RDONLY)
    else:
        _fsync(path, os.O_RDWR)  # Windows flushes no file that is open for reading alone


def _fsync(path: Path, flags: int) -> None:
    file = os.open(path, flags)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(file)


def remove_unfinished() -> None:
    """Remove what is being written, before this process ends without waiting for it."""
    for folder in [*_locked]:
        remove_partial_files(folder)


def copy_once(path: Path, other: Path) -> None:
    """Copy a file with its time, unless the copy exists. Raises StorageError.

    The copy of a file that is read-only is not: it could not be flushed.
    """
    if not other.exists():
        with atomic_write(other) as temporary:
            shutil.copyfile(path, temporary)
            found = path.stat()
            os.utime(temporary, ns=(found.st_atime_ns, found.st_mtime_ns))


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of killed writers from a folder and its subfolders.

    A folder that one of them was replacing gets its name back, unless the new one has it. A Groovy
    script in QuPath takes no lock and may be writing, as ``export`` and ``score``: their files are
    removed once old. ``report`` writes what a run does, too, and may have to be repeated.
    """
    for leftover in [*folder.rglob("*.partial*")]:
        under_lock = _WITHOUT_LOCK.isdisjoint(leftover.relative_to(folder).parts)
        is_ours = leftover.name.startswith(".")
        if not is_ours and not _OF_SCRIPTS.search(leftover.name):
            continue
        if (is_ours and under_lock) or _is_old(leftover):
            with suppress(OSError):  # else it stays: it may be the only one
                _restore(leftover)
                discard(leftover)


def restore_replaced(root: Path, folders: Sequence[Path]) -> None:
    """Give what a killed process was replacing in some folders its name back, as one that has the
    lock of ``root`` does; nothing where another process has it, or where it cannot be had."""
    left = [item for folder in folders for item in folder.glob(".*.partial.old")]
    if left:
        with suppress(OSError), FileLock(root / ".lock", timeout=0, fallback_to_soft=False):
            for item in left:
                with suppress(OSError):
                    _restore(item)


def _restore(leftover: Path) -> None:
    """Rename a folder that was being replaced back, where the new one did not come.

    Raises OSError.
    """
    replaced = _REPLACED.fullmatch(leftover.name)
    if replaced and not (path := leftover.with_name(replaced[1])).exists():
        replace_file(leftover, path)


def _is_old(partial: Path) -> bool:
    try:
        return time.time() - partial.stat().st_mtime > _OLD_S
    except OSError:  # it was just renamed
        return False


def check_writable(folder: Path) -> None:
    """Raise StorageError if a folder cannot be written to, before there are results to lose."""
    with atomic_write(folder / "writable") as temporary:
        temporary.touch()
    discard(folder / "writable")


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; raises StorageError if another process holds the lock.

    The operating system releases the lock when the process ends, also if it is killed. Partial
    files of earlier processes are removed.
    """
    # A lock file that a dead process leaves, as filelock makes it elsewhere, would lock for ever.
    lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise StorageError(
                f"another patchcl-qp is at work in {folder}: wait until it is done, or stop it"
            ) from None
        except OSError as error:
            on_windows = getattr(error, "winerror", None) in _NO_LOCKS_ON_WINDOWS
            if not on_windows and error.errno not in _NO_LOCKS:
                raise
    _locked.add(folder)
    try:
        remove_partial_files(folder)
        yield
    finally:
        _locked.discard(folder)
        lock.release()


def replace_file(path: Path, other: Path) -> None:
    """Rename a file or folder to ``other``, in place of a file that is there.

    Windows refuses that while another program has one of them open, or a file in them: then it is
    tried for some time.
    """
    _patiently(partial(path.replace, other), _BUSY_FOLDER_S if path.is_dir() else _BUSY_S)


def _patiently(change: Callable[[], object], seconds: float) -> None:
    """Make a change of files, on Windows again while another program has one of them open."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            change()
            return
        except PermissionError:
            if not WINDOWS or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _replace_folder(new: Path, path: Path) -> None:
    old = path.with_name(new.name + ".old")
    if path.exists():
        replace_file(path, old)
    try:
        replace_file(new, path)
    except BaseException:  # Ctrl-C, too
        if old.exists():
            replace_file(old, path)
        raise
    discard(old)


def remove_folder(folder: Path) -> None:
    """Remove a folder and all that is in it, if it is there. Raises StorageError."""
    with writing(folder):
        if folder.exists():
            _patiently(partial(shutil.rmtree, folder), _BUSY_FOLDER_S)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there. Raises StorageError."""
    with writing(path):
        _patiently(partial(path.unlink, missing_ok=True), _BUSY_S)


def discard(path: Path) -> None:
    """Remove a file or folder if that is possible: what is left is removed by a later run.

    Another thread may have it open, on Windows; another person's may not be removed.
    """
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_json(path: Path, content: Any, compact: bool = False) -> None:
    """Write a JSON file atomically, keys in their order; ``compact`` is without indentation."""
    with atomic_write(path) as temporary:
        text = json.dumps(content, indent=None if compact else 2, ensure_ascii=False)
        # An unpaired surrogate, of a path that is not UTF-8, becomes ?.
        temporary.write_bytes((text + "\n").encode("utf-8", "replace"))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing, damaged, or holds another value."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def readable(text: str) -> str:
    """Text as one line that can be printed, written and compared: other characters become ? or a
    space, and letters with marks one character each.

    Names of files may hold bytes that are not UTF-8, which Python has as surrogates, and newlines;
    macOS writes é as e and a mark.
    """
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", unicodedata.normalize("NFC", text))
    return line.encode("utf-8", "replace").decode("utf-8")


def digest(content: Any) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a JSON-like value."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    # Names may hold unpaired surrogates, of an argument that is not UTF-8.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def content_file(path: Path) -> Path:
    """The file that is read for an image: its own, or of an OME-Zarr, a folder, its metadata."""
    if path.is_dir():
        for name in ZARR_METADATA:
            if (path / name).is_file():
                return path / name
    return path


def is_file(path: Path) -> bool:
    """Whether there is a file, or an OME-Zarr, that may be looked at, whatever the path."""
    try:
        return content_file(path).is_file()
    except (OSError, ValueError):  # no permission, too long, or no path at all
        return False


def is_too_long(path: PurePath) -> bool:
    """Whether Windows may say of a path that nothing is there, whatever is."""
    return WINDOWS and len(str(path)) > _LONGEST


def too_long(name: str, path: PurePath) -> str:
    """What to tell a person of a file that may be at such a path, but is not found."""
    return (
        f"{name} is not found at {readable(str(path))}, which is longer than {_LONGEST} "
        "characters: move the file and the project to a shorter path, and fix the path in QuPath"
    )


def absolute(path: Path) -> Path:
    """An absolute path, without following links: what they lead to may have a name without a
    suffix, or that of a patient."""
    return Path(os.path.abspath(path))  # noqa: PTH100 Path.resolve follows them


def is_whole_parquet(path: Path) -> bool:
    """Whether a parquet file was written to its end. Raises OSError."""
    if path.stat().st_size < len(_PARQUET_END):
        return False
    with path.open("rb") as file:
        file.seek(-len(_PARQUET_END), os.SEEK_END)
        return file.read() == _PARQUET_END


def write_bytes(path: Path, content: bytes | memoryview, durable: bool = True) -> None:
    """Write a file; see ``atomic_write``. Raises StorageError."""
    with atomic_write(path, durable) as temporary:
        temporary.write_bytes(content)


def to_jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Pixels (H, W, 3), or grey (H, W), as the content of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality, optimize=True)
    return file.getvalue()

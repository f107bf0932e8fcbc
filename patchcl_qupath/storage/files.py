"""Files that are there whole or not at all, and nuclei as parquet."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image

from patchcl_qupath.errors import StorageError

logger = logging.getLogger(__name__)

_FULL = "make room and run again, finished tiles are kept"
_CLOSED = "copy the project to a folder that you can write to"
_ADVICE = {
    errno.ENOSPC: f"the disk is full: {_FULL}",
    errno.EDQUOT: f"your disk quota is used up: {_FULL}",
    errno.EROFS: f"it is read-only: {_CLOSED}",
    errno.EACCES: f"no permission to write there: {_CLOSED}",
    errno.EPERM: f"no permission to write there: {_CLOSED}",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a failed write into a StorageError with advice."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, str(error))
        raise StorageError(f"cannot write {path}: {advice}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes ``path`` when the block ends without an error.

    Works for a file and for a folder. A reader sees the old one or the new one, never a half; for
    a folder there is an instant in which it sees none.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if temporary.is_dir():
                _replace_folder(temporary, path)
            else:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                temporary.replace(path)
            logger.debug("wrote %s", path)
        finally:
            _remove(temporary)


def copy_once(path: Path, other: Path) -> None:
    """Copy a file, unless there is a copy already."""
    if not other.exists():
        with atomic_write(other) as temporary:
            shutil.copy2(path, temporary)


def remove_partial_files(folder: Path) -> None:
    """Remove what writers that were killed left in a folder and those in it."""
    for leftover in [*folder.rglob(".*.partial*")]:
        _remove(leftover)


def check_writable(folder: Path) -> None:
    """Raise StorageError now rather than when there are results to lose."""
    with atomic_write(folder / "writable") as temporary:
        temporary.touch()
    (folder / "writable").unlink()


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold a folder; raise StorageError where another process holds it.

    The operating system lets go of it when the process ends, however that is. What those before
    left half-written is swept.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise StorageError(
                f"another patchcl-qp is at work in {folder}: wait until it is done, or stop it"
            ) from None
        except NotImplementedError:
            pass  # a file system without locks
    try:
        remove_partial_files(folder)
        yield
    finally:
        lock.release()


def _replace_folder(new: Path, path: Path) -> None:
    old = path.with_name(new.name + ".old")
    if path.exists():
        path.replace(old)
    new.replace(path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any, compact: bool = False) -> None:
    """Write JSON in one go, keys in the order given; ``compact`` is for programs only."""
    with atomic_write(path) as temporary:
        text = json.dumps(content, indent=None if compact else 2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is no such file, or none that holds one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def digest(content: Any) -> str:
    """12 hexadecimal digits that stand for a JSON-like value."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one go."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def to_jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Pixels (H, W, 3), or grey (H, W), as the content of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality, optimize=True)
    return file.getvalue()

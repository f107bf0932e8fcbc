"""Which other files hold pixels of an OME-TIFF: those that its OME-XML names.

Apart from the readers of TIFF, whose import takes longer than ``status`` has.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from html import unescape
from pathlib import Path

SUFFIXES = {".tif", ".tiff", ".tf2", ".tf8", ".btf"}

_DESCRIPTION = 270  # TIFF's tag
_MAX_TAGS = 4096  # of a page, which has some 20
_MAX_TEXT_BYTES = 1 << 26
_OWN_UUID = re.compile(rb"<(?:\w+:)?OME\s[^>]*?\bUUID\s*=\s*[\"']([^\"']*)[\"']")
_NAMED = re.compile(
    rb"<(?:\w+:)?UUID\s[^>]*?\bFileName\s*=\s*[\"']([^\"']+)[\"'][^>]*>\s*([^<]*?)\s*<"
)


def named_files(path: Path) -> list[Path]:
    """The other files of an OME-TIFF, wherever these are; none of another file. Raises OSError."""
    stat = path.stat()
    return [path.parent / name for name in _names(path, stat.st_mtime_ns, stat.st_size)]


@lru_cache(maxsize=256)  # each read of pixels asks for them
def _names(path: Path, modified_ns: int, size: int) -> tuple[str, ...]:
    """The names of the other files, which are told from a file's own by their UUID.

    A file of one's own that was renamed has its old name in it, and its own UUID.
    """
    text = _description(path, size)
    own = _OWN_UUID.search(text)
    names: dict[str, None] = {}
    for name, uuid in _NAMED.findall(text):
        named = unescape(name.decode("utf-8", "replace"))
        is_own = uuid == own[1] if own else named.lower() == path.name.lower()
        if not is_own and "\0" not in named:
            names[named] = None
    return tuple(names)


def _description(path: Path, size: int) -> bytes:
    """The ImageDescription of the first page of a TIFF of ``size`` bytes; b"" without one."""
    with path.open("rb") as file:

        def read(offset: int, count: int) -> bytes:
            file.seek(min(offset, size))
            return file.read(count)

        try:
            head = read(0, 16)
            order = {b"II": "<", b"MM": ">"}[head[:2]]
            (version,) = struct.unpack(order + "H", head[2:4])
            # Of BigTIFF and TIFF: the first page, the number of its tags, and one of these.
            first, count, tag = ("8xQ", "Q", "HHQQ") if version == 43 else ("4xI", "H", "HHII")
            (start,) = struct.unpack_from(order + first, head)
            counted, one = struct.Struct(order + count), struct.Struct(order + tag)
            (n,) = counted.unpack(read(start, counted.size))
            tags = read(start + counted.size, min(n, _MAX_TAGS) * one.size)
            for number, _, length, offset in one.iter_unpack(tags):
                if number == _DESCRIPTION:
                    return read(offset, min(length, _MAX_TEXT_BYTES))
        except (LookupError, struct.error):  # it is damaged, or no TIFF
            pass
    return b""

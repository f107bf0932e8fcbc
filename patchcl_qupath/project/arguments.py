"""The arguments with which QuPath opens an image, in all spellings that QuPath takes.

Read in QuPath's source: BioFormatsArgs and ServerArgs, which picocli parses, and OpenSlide's
``--no-crop`` and, since QuPath 0.7, ``--icc-profile``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_SHORT = {"-s": "--series", "-n": "--name"}
_FLAGS = {"--no-crop", "--icc-profile"}
_VALUES = {"--series", "--name", "--rotate", "--order", "--classname", "--background-color"}
_UNCHANGED = {"--rotate": {"ROTATE_NONE", "NONE", "0"}, "--order": {"RGB", ""}}


@dataclass(frozen=True, kw_only=True)
class ServerArguments:
    """What the arguments of an image ask for.

    ``series`` is the number of the image in its file, ``series_name`` its name, None where the
    arguments do not name it. ``crop`` is whether OpenSlide's bounds are applied, ``icc_profile``
    whether QuPath applies the colour profile of the scanner. ``problems`` are
    arguments that change the pixels, or whose meaning cannot be known, as they are written.
    """

    series: int | None = None
    series_name: str | None = None
    crop: bool = True
    icc_profile: bool = False
    problems: tuple[str, ...] = field(default=())


def parse_arguments(args: Sequence[str]) -> ServerArguments:
    """The meaning of QuPath's ``args``: ``--series 1``, ``--series=1``, ``-s 1``, ``-s1``."""
    found: dict[str, str] = {}
    problems = []
    for name, value, text in _options(args):
        changes = name in _UNCHANGED and str(value).strip().upper() not in _UNCHANGED[name]
        known = name in _FLAGS or (name in _VALUES and value is not None)
        if not known or changes or (name in found and found[name] != value):
            problems.append(text)
        else:
            found[name] = value or ""
    series = found.get("--series", "-1").strip()
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", series):
        problems.append(f"--series {series}")
        series = "-1"
    number = int(series) if int(series) >= 0 else None  # -1 is QuPath's default
    name = found.get("--name", "").strip() and found["--name"]
    return ServerArguments(
        series=number,
        series_name=(name or None) if number is None else None,  # the number wins, as in QuPath
        crop="--no-crop" not in found,
        icc_profile="--icc-profile" in found,
        problems=tuple(problems),
    )


def _options(args: Sequence[str]) -> Iterator[tuple[str, str | None, str]]:
    """Name, value if there is one, and text of each option."""
    rest = [*args]
    while rest:
        text = rest.pop(0)
        if not text.strip():
            continue
        name, equals, value = text.partition("=")
        attached = re.fullmatch(r"(-[sn])=?(.+)", text, re.DOTALL)
        if attached:
            name, equals, value = attached[1], "=", attached[2]
        name = _SHORT.get(name, name)
        if equals or name not in _VALUES or not rest:
            yield name, value if equals else None, text
        else:
            value = rest.pop(0)
            yield name, value, f"{text} {value}"

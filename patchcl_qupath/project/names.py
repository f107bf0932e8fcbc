"""Names of measurements, which differ between versions of QuPath.

On disk they are those of QuPath 0.6; in QuPath those of its version, so that its classifiers and
measurement maps find them.
"""

from __future__ import annotations

import re

_OF_COMPARTMENT = re.compile(r"(Nucleus|Cytoplasm|Membrane|Cell): (.+): (Mean|Std\.Dev\.|Min|Max)")
# The first QuPath with `Nucleus: DAB: Mean`; before, it was `DAB: Nucleus: Mean`.
COMPARTMENT_FIRST = (0, 6)


def in_qupath(name: str, version: str | None) -> str:
    """The name of a measurement in a version of QuPath, such as ``0.5.1``; of a new one if None."""
    return name if is_compartment_first(version) else _OF_COMPARTMENT.sub(r"\2: \1: \3", name)


def is_compartment_first(version: str | None) -> bool:
    """Whether a version of QuPath has the names that are on disk."""
    numbers = re.match(r"v?(\d+)\.(\d+)", version or "")
    return numbers is None or (int(numbers[1]), int(numbers[2])) >= COMPARTMENT_FIRST

"""Stain vectors: QuPath's defaults, those that are measured, and what is wrong with others.

Apart from ``slides.stains``, which compiles loops: commands that read no pixel start without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchcl_qupath.config import StainChoice
from patchcl_qupath.datatypes import StainKind, StainVectors

_LEAST_APART = 0.02  # smallest singular value of unit vectors: 1.6 degrees between two

# QuPath's defaults, which are measured where an image has no stain vectors of its own.
_HEMATOXYLIN, _EOSIN, _DAB = (
    (0.65111, 0.70119, 0.29049),
    (0.2159, 0.8012, 0.5581),
    (0.26917, 0.56824, 0.77759),
)
H_E = StainVectors(
    kind=StainKind.H_E,
    names=("Hematoxylin", "Eosin"),
    vectors=(_HEMATOXYLIN, _EOSIN),
)
H_DAB = StainVectors(
    kind=StainKind.H_DAB,
    names=("Hematoxylin", "DAB"),
    vectors=(_HEMATOXYLIN, _DAB),
)


def stains_to_measure(own: StainVectors | None, choice: StainChoice) -> StainVectors:
    """The stains to measure: an image's own, unless the settings choose others.

    Those of the kind of the image's own are its own, too; else they are QuPath's defaults.
    """
    if own is not None and (choice is StainChoice.AUTO or StainKind(choice) is own.kind):
        return own
    return H_DAB if choice is StainChoice.H_DAB else H_E


def hematoxylin_of(stains: StainVectors) -> str:
    """The name of the stain that is hematoxylin: that with the nearest vector.

    A person may name stains at will, and give them in any order.
    """
    return _nearest(stains, _HEMATOXYLIN, stains.names)


def dab_of(stains: StainVectors) -> str | None:
    """The name of the stain that is DAB, by its name, else as hematoxylin; None without one."""
    named = [name for name in stains.names if "dab" in name.lower()]
    if named:
        return named[0]
    if stains.kind is not StainKind.H_DAB:
        return None
    hematoxylin = hematoxylin_of(stains)
    return _nearest(stains, _DAB, [name for name in stains.names if name != hematoxylin])


def _nearest(stains: StainVectors, vector: tuple[float, float, float], names: Sequence[str]) -> str:
    """Which of some of the stains has the smallest angle to a vector."""
    cosines = {
        name: np.dot(own, vector) / np.linalg.norm(own)
        for name, own in zip(stains.names, stains.vectors, strict=True)
    }
    return max(names, key=lambda name: float(cosines[name]))


def without_rounding(stains: StainVectors) -> StainVectors:
    """Stains; QuPath's defaults, which it rounds when it saves them, become ours to the last bit.

    So an image keeps its measurements and its finished tiles when its type is set in QuPath.
    """
    for default in (H_E, H_DAB):
        if (stains.names, stains.background) == (default.names, default.background) and (
            np.allclose(stains.vectors, default.vectors, rtol=0, atol=1e-4)
        ):
            return default
    return stains


def flaw(stains: StainVectors) -> str | None:
    """Why colour deconvolution with these stain vectors is impossible; None if it is not."""
    vectors, length = np.array(stains.vectors), np.linalg.norm(stains.vectors, axis=1)
    if len(stains.names) not in (2, 3):
        return "it has not two or three stains"
    if len(set(stains.names)) < len(stains.names) or not all(map(str.strip, stains.names)):
        return "two of its stains have one name, or one has none"
    if not np.isfinite(vectors).all() or not (length > 0).all():
        return "a stain vector is zero, or not a number"
    if np.linalg.svd(vectors / length[:, None], compute_uv=False)[-1] < _LEAST_APART:
        return "its stain vectors are parallel, or nearly"
    if not all(1 <= level < np.inf for level in stains.background):
        return "its background is black, or not a number"
    return None

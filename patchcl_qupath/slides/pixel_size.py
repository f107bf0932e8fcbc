"""The pixel size of an image: where it is given, and which of several is used."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

MPP_RANGE = (0.05, 4.0)  # µm/px; others are the dpi of an export, not of a microscope

Pair = tuple[float, float]  # (x, y)


class PixelSizeSource(StrEnum):
    """Where a pixel size is given, in the order of trust."""

    QUPATH = "QuPath"
    OME_XML = "OME-XML"
    OME_ZARR = "OME-Zarr"
    VENDOR = "vendor"
    TIFF = "TIFF resolution"
    IMAGEJ = "ImageJ"
    FALLBACK = "--mpp"


@dataclass(frozen=True)
class PixelSize:
    """A pixel size (x, y) in µm, and where it is given."""

    source: PixelSizeSource
    mpp: Pair

    @property
    def is_usable(self) -> bool:
        """Whether a microscope can have it."""
        return all(MPP_RANGE[0] <= side <= MPP_RANGE[1] for side in self.mpp)

    def __str__(self) -> str:
        """The sides in µm, both where they differ."""
        return " x ".join(dict.fromkeys(f"{side:.4g}" for side in self.mpp))


_UM = {  # of units in OME-XML, OME-Zarr, ImageJ and QuPath
    "pm": 1e-6,
    "picometer": 1e-6,
    "å": 1e-4,
    "angstrom": 1e-4,
    "nm": 1e-3,
    "nanometer": 1e-3,
    "µm": 1.0,  # the micro sign
    "μm": 1.0,  # the Greek letter
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "mm": 1e3,
    "millimeter": 1e3,
    "cm": 1e4,
    "centimeter": 1e4,
    "dm": 1e5,
    "decimeter": 1e5,
    "m": 1e6,
    "meter": 1e6,
    "thou": 25.4,
    "li": 25.4e3 / 12,
    "in": 25.4e3,
    "inch": 25.4e3,
    "inches": 25.4e3,
    "ft": 25.4e3 * 12,
    "pt": 25.4e3 / 72,
}
_LARGER = {"Mm", "Pm"}  # units of OME-XML that differ from smaller ones in case alone
_UM_OF_TIFF = {2: 25.4e3, 3: 1e4, 4: 1e3, 5: 1.0}  # ResolutionUnit: inch, cm, mm, µm


def tiff_pixel_sizes(tiff: TiffFile, page: TiffPage, series: int) -> tuple[PixelSize, ...]:
    """All pixel sizes in a TIFF of its image ``series``, whose level 0 is ``page``.

    Text and numbers that cannot be understood are no pixel size.
    """
    size = int(page.imagewidth), int(page.imagelength)
    texts = [description(page), description(tiff.pages.first)]
    found = (
        (PixelSizeSource.OME_XML, _of_ome(texts[1], size, series)),
        (PixelSizeSource.VENDOR, _first(map(_of_aperio, texts)) or _of_philips(texts[1])),
        (PixelSizeSource.TIFF, _of_resolution(page)),
        (PixelSizeSource.IMAGEJ, _first(_of_imagej(text, page) for text in texts)),
    )
    return tuple(PixelSize(source, mpp) for source, mpp in found if mpp is not None)


def description(page: TiffPage) -> str:
    """The ImageDescription of a page, also where it is not ASCII, as it should be."""
    value = page.tags.valueof(270, default="")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.decode("latin-1")
    return value if isinstance(value, str) else ""


def positive(text: object) -> float | None:
    """A number in text, with a decimal point or comma; None for anything but a positive one."""
    try:
        number = float(str(text).strip().replace(",", "."))
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def in_um(value: object, unit: str) -> float | None:
    """A length in µm; None for one that is not a positive number of a known unit."""
    number, um = positive(value), _um(unit)
    return None if number is None or um is None else number * um


def _um(unit: str) -> float | None:
    """How many µm a unit has, in capitals or not; None for one that is not known."""
    name = unit.strip()
    return None if name in _LARGER else _UM.get(name.lower())


def _first(pairs: Iterator[Pair | None]) -> Pair | None:
    return next((pair for pair in pairs if pair is not None), None)


def _both(x: float | None, y: float | None) -> Pair | None:
    """A pair of sides, of which one may be missing."""
    x, y = x or y, y or x
    return None if x is None or y is None else (x, y)


def _of_ome(text: str, size: tuple[int, int], series: int) -> Pair | None:
    """PhysicalSizeX and Y of the image of that size; of several, that of number ``series``."""
    if "<OME" not in text and ":OME" not in text:
        return None
    try:
        pixels = [  # of text, not bytes: it is decoded, whatever encoding its first line names
            element.attrib
            for element in ElementTree.fromstring(text).iter()
            if element.tag.rpartition("}")[2] == "Pixels"
        ]
    except (ElementTree.ParseError, ValueError, LookupError):
        return None
    if series < len(pixels):
        pixels.insert(0, pixels[series])
    for attributes in pixels:
        if (attributes.get("SizeX"), attributes.get("SizeY")) == tuple(map(str, size)):
            sides = (
                in_um(
                    attributes.get(f"PhysicalSize{axis}"),
                    attributes.get(f"PhysicalSize{axis}Unit", "µm"),
                )
                for axis in "XY"
            )
            return _both(*sides)
    return None


def _of_aperio(text: str) -> Pair | None:
    """MPP of an Aperio SVS."""
    if not text.startswith("Aperio"):
        return None
    for item in text.split("|")[1:]:
        key, _, value = item.partition("=")
        if key.strip().upper() == "MPP":
            side = positive(value)
            return _both(side, side)
    return None


def _of_philips(text: str) -> Pair | None:
    """DICOM_PIXEL_SPACING of a Philips TIFF: (y, x) in mm, in quotes, of level 0 first."""
    if "DICOM_PIXEL_SPACING" not in text:
        return None
    found = re.search(r"DICOM_PIXEL_SPACING[^>]*>([^<]*)<", text)
    sides = re.sub(r'"|&quot;', " ", found[1]).split()[:2] if found else []
    return _both(*(in_um(side, "mm") for side in sides[::-1])) if len(sides) == 2 else None


def _of_resolution(page: TiffPage) -> Pair | None:
    """XResolution and YResolution, in px per inch or cm."""
    um = _UM_OF_TIFF.get(_whole(page.tags.valueof(296)))
    return None if um is None else _both(*(_length(page, tag, um) for tag in (282, 283)))


def _of_imagej(text: str, page: TiffPage) -> Pair | None:
    """XResolution and YResolution, in px per unit that ImageJ gives in its description."""
    if not text.startswith("ImageJ="):
        return None
    unit = re.search(r"^unit=(.*)$", text, re.MULTILINE)
    name = unit[1].strip().replace("\\u00B5", "µ").replace("\\u00b5", "µ") if unit else ""
    um = _um(name)
    return None if um is None else _both(*(_length(page, tag, um) for tag in (282, 283)))


def _whole(value: object) -> int:
    return int(value) if isinstance(value, int) else 0


def _length(page: TiffPage, tag: int, um: float) -> float | None:
    """The side of a px in µm, from a resolution in px per ``um`` µm.

    It is a fraction; some programs write a plain number.
    """
    value = page.tags.valueof(tag)
    if not isinstance(value, tuple) or len(value) not in (1, 2) or not all(value):
        return None
    px, per = (*value, 1)[:2]
    return positive(um * per / px) if isinstance(px, int | float) else None

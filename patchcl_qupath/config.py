"""Every setting, with its unit, in frozen dataclasses: read from TOML, saved with every result.

A TOML file has one table for each of the dataclasses below, named as the fields of ``Config``:

    [slide]
    mpp = 0.5

    [segment]
    min_area_um2 = 8
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchcl_qupath.errors import ConfigError


@dataclass(frozen=True)
class SlideConfig:
    """How slides are read."""

    mpp: float = 0.5  # um per working pixel
    tile_px: int = 1024  # side of a tile's write box
    tissue_mpp: float = 8.0  # um per pixel of the tissue mask
    min_tissue_um2: float = 20_000.0  # smaller specks are dust


@dataclass(frozen=True)
class PatchCLConfig:
    """The label-free training. Where a value differs from Boserup & Selvan 2023, theirs is said."""

    channels: int = 4
    width: int = 8
    dilations: tuple[int, ...] = (1, 2, 3, 5, 10, 20)
    similarity: str = "prototypes"  # paper: mse, cross_entropy, cosine or mutual_information
    temperature: float = 0.1  # paper: 1
    inter_weight: float = 1.0  # of the contrast between channels
    patch_px: int = 24  # paper: 50
    stride_px: int = 8  # paper: 20
    patches: int = 10  # drawn per crop and channel
    crop_px: int = 128  # paper: 300
    batch: int = 10  # crops per step
    blur_um: float = 0.4  # prototypes: detail below this size is no part of the comparison
    around_um: float = 6.0  # prototypes: what counts as the surroundings of a pixel
    excess_weight: float = 12.0  # prototypes: excess over the surroundings against hematoxylin
    learning_rate: float = 2e-3  # paper: 2e-4
    weight_decay: float = 1e-4
    max_steps: int = 400
    patience: int = 50  # steps; training ends when two such spans in a row look alike
    cooldown_steps: int = 120  # ... after these, at a falling learning rate
    slides: int = 32  # at most so many are learnt from
    crops: int = 96  # read from them together
    source_px: int = 384  # side of each crop that is read
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dilations", tuple(self.dilations))
        known = ("prototypes", "mse", "cross_entropy", "cosine", "mutual_information")
        if self.similarity not in known:
            raise ConfigError(f"patchcl.similarity must be one of {', '.join(known)}")
        if not 16 <= self.patch_px <= self.crop_px:
            raise ConfigError("patchcl.patch_px must be at least 16 and at most patchcl.crop_px")

    @classmethod
    def paper(cls, similarity: str = "mse", seed: int = 0) -> PatchCLConfig:
        """The settings of the paper, which learn slowly: 25 epochs of its data are 75 steps."""
        return cls(
            similarity=similarity,
            temperature=1.0,
            patch_px=50,
            stride_px=20,
            crop_px=300,
            learning_rate=2e-4,
            seed=seed,
        )


@dataclass(frozen=True)
class SegmentConfig:
    """From confidence to nuclei."""

    min_area_um2: float = 8.0
    max_area_um2: float = 400.0
    max_diameter_um: float = 30.0  # larger blobs are no nuclei; also sets the halo
    min_solidity: float = 0.75  # area over that of the convex hull; below it are strands and rims
    max_hole_um2: float = 15.0  # larger gaps inside a nucleus stay gaps
    open_radius_um: float = 0.5  # thinner hairs are cut
    smooth_um: float = 0.6  # of the landscape that parts touching nuclei
    max_depth_um: float = 8.0  # depth inside the mask counts up to here
    marker_radius_um: float = 1.5  # two nuclei have their centres at least this far apart
    min_saddle_depth_um: float = 0.05  # shallower saddles part no nuclei


@dataclass(frozen=True)
class ResultConfig:
    """How nuclei appear in QuPath."""

    class_name: str = "Nucleus"
    color: tuple[int, ...] = (38, 70, 214)  # red, green, blue; a person's colour stays
    object_type: str = "auto"  # annotation, detection, or by their number:
    # QuPath becomes slow with more annotations than this in an image: above, detections
    max_annotations: int = 20_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "color", tuple(self.color))
        if self.object_type not in ("auto", "annotation", "detection"):
            raise ConfigError("result.object_type must be auto, annotation or detection")
        if len(self.color) != 3 or max(self.color) > 255:
            raise ConfigError("result.color must be red, green and blue from 0 to 255")
        if not self.class_name.strip() or not self.class_name.isprintable():
            raise ConfigError("result.class_name must be a name such as Nucleus")

    def kind(self, count: int) -> str:
        """What ``count`` nuclei of one image become: annotation or detection."""
        if self.object_type != "auto":
            return self.object_type
        return "annotation" if count <= self.max_annotations else "detection"


@dataclass(frozen=True)
class Config:
    """All settings of one run."""

    slide: SlideConfig = field(default_factory=SlideConfig)
    patchcl: PatchCLConfig = field(default_factory=PatchCLConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    result: ResultConfig = field(default_factory=ResultConfig)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries, for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of ``to_dict``; what is left out keeps its default.

    Raises ConfigError for an unknown table or key, and for a value of the wrong type or sign.
    """
    tables = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    made: dict[str, Any] = {}
    for table, settings in values.items():
        if table not in tables:
            raise ConfigError(f"unknown table [{table}]: the tables are {', '.join(tables)}")
        made[table] = _table(table, tables[table], settings)
    return Config(**made)


def load_config(path: Path | None) -> Config:
    """The settings of a TOML file, or the defaults where there is none."""
    if path is None:
        return Config()
    try:
        return from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _table(name: str, factory: Any, settings: Any) -> Any:
    defaults = factory()
    if not isinstance(settings, Mapping):
        raise ConfigError(f"[{name}] must be a table")
    known = {f.name for f in dataclasses.fields(defaults)}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"unknown setting {name}.{key}: it has {', '.join(sorted(known))}")
        _check(f"{name}.{key}", value, getattr(defaults, key))
    return dataclasses.replace(defaults, **settings)


def _check(key: str, value: Any, default: Any) -> None:
    """A value has its default's kind; numbers are not negative."""
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or not value:
            raise ConfigError(f"{key} must be a list such as {list(default)}")
        for item in value:
            _check(key, item, default[0])
        return
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
        raise ConfigError(f"{key} = {value!r} must be of type {type(default).__name__}")
    if isinstance(value, int | float) and value < 0:
        raise ConfigError(f"{key} = {value!r} must not be negative")

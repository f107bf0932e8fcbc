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
    patch_px: int = 24  # paper: 50
    stride_px: int = 8  # paper: 20
    patches: int = 10  # drawn per crop and channel
    crop_px: int = 128  # paper: 300
    batch: int = 10
    blur_um: float = 0.5  # hematoxylin is compared at this scale
    around_um: float = 10.0  # ... and against its surroundings at this one
    learning_rate: float = 5e-3  # paper: 2e-4
    weight_decay: float = 1e-4
    max_steps: int = 220
    inter: float = 1.0
    slides: int = 32  # at most so many are learnt from
    crops: int = 96  # read from them together
    source_px: int = 384  # side of each crop that is read
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dilations", tuple(self.dilations))


@dataclass(frozen=True)
class SegmentConfig:
    """From confidence to nuclei."""

    min_area_um2: float = 8.0
    max_area_um2: float = 400.0
    max_diameter_um: float = 30.0  # larger blobs are no nuclei; also sets the halo
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
    color: tuple[int, ...] = (38, 70, 214)  # red, green, blue
    # QuPath becomes slow with more annotations than this in an image: above, detections
    max_annotations: int = 20_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "color", tuple(self.color))


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

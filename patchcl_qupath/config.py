"""Every setting, with its unit, in frozen dataclasses: read from TOML, saved with every result.

A TOML file has one table for each of the dataclasses below, named as the fields of ``Config``:

    recipe = "selftrain"
    engine = "torch"

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

STAINS = ("auto", "h-e", "h-dab")
CLUSTERS = {"slurm": "sbatch", "pbs": "qsub", "lsf": "bsub", "sge": "qsub"}  # what takes jobs
RECIPES = ("selftrain", "patchcl", "paper")
INPUTS = ("stains", "rgb")
ENGINES = ("auto", "torch", "openvino")
# Classes of fields in QuPath; groovy/import_nuclei.groovy has them, too.
TO_CORRECT = "PatchCL: correct here"  # suggested
CORRECTED = "PatchCL: corrected"  # a person says that it is done


@dataclass(frozen=True)
class SlideConfig:
    """How slides are read."""

    mpp: float = 0.5  # um per working pixel
    tile_px: int = 1024  # side of a tile's write box
    tissue_mpp: float = 8.0  # um per pixel of the tissue mask
    min_tissue_um2: float = 20_000.0  # smaller specks are dust
    stain: str = "auto"  # what is measured: QuPath's stains of the image, else h-e; or h-e, h-dab

    def __post_init__(self) -> None:
        if self.stain not in STAINS:
            raise ConfigError(f"slide.stain must be one of {', '.join(STAINS)}")


@dataclass(frozen=True)
class PatchCLConfig:
    """The label-free training. Where a value differs from Boserup & Selvan 2023, theirs is said."""

    input: str = "stains"  # what the network sees; paper: rgb
    channels: int = 4  # classes that the network tells apart
    width: int = 8  # feature maps of each layer
    dilations: tuple[int, ...] = (1, 2, 3, 5, 10, 20)  # of its pairs of convolutions, in px
    similarity: str = "prototypes"  # paper: mse, cross_entropy, cosine, mutual_information
    temperature: float = 0.1  # of the contrast; paper: 1
    inter_weight: float = 1.0  # of the contrast between channels
    patch_px: int = 24  # side of a patch; paper: 50
    stride_px: int = 8  # from patch to patch; paper: 20
    patches: int = 10  # drawn per crop and channel
    crop_px: int = 128  # side of a crop; paper: 300
    batch: int = 10  # crops per step
    blur_um: float = 0.4  # prototypes: detail below this size is no part of the comparison
    background_radius_um: float = 6.0  # prototypes: what counts as the surroundings of a pixel
    local_contrast_weight: float = (
        12.0  # prototypes: excess over the surroundings against hematoxylin
    )
    learning_rate: float = 2e-3  # of Adam; paper: 2e-4
    weight_decay: float = 1e-4  # of Adam
    max_steps: int = 400  # training ends then at the latest
    patience: int = 50  # steps; training ends when two such spans in a row look alike
    cooldown_steps: int = 120  # steps after that, at a falling learning rate
    slides: int = 32  # at most so many are learnt from
    crops: int = 96  # read from them, together
    source_px: int = 384  # side of each crop that is read
    seed: int = 0  # of all that is random, self-training included

    def __post_init__(self) -> None:
        object.__setattr__(self, "dilations", tuple(self.dilations))
        known = ("prototypes", "mse", "cross_entropy", "cosine", "mutual_information")
        if self.similarity not in known:
            raise ConfigError(f"patchcl.similarity must be one of {', '.join(known)}")
        if self.input not in INPUTS:
            raise ConfigError(f"patchcl.input must be one of {', '.join(INPUTS)}")
        if (self.similarity, self.input) == ("prototypes", "rgb"):
            raise ConfigError('patchcl.similarity = "prototypes" needs patchcl.input = "stains"')
        if not 16 <= self.patch_px <= self.crop_px:
            raise ConfigError("patchcl.patch_px must be at least 16 and at most patchcl.crop_px")

    @classmethod
    def paper(cls, similarity: str = "mse", seed: int = 0) -> PatchCLConfig:
        """The settings of the paper, which learn slowly: 25 epochs of its data are 75 steps."""
        return cls(
            input="rgb",
            similarity=similarity,
            temperature=1.0,
            patch_px=50,
            stride_px=20,
            crop_px=300,
            learning_rate=2e-4,
            seed=seed,
        )


@dataclass(frozen=True)
class SelfTrainConfig:
    """PatchCL's confident nuclei teach the network that parts nuclei: no labels either."""

    widths: tuple[int, ...] = (16, 24, 40)  # channels at 1, 2 and 4 px
    steps: int = 1000  # of training
    batch: int = 8  # crops per step
    crop_px: int = 128  # side of a crop
    learning_rate: float = 3e-3  # of AdamW: up to this in 20 steps, then down to 0
    weight_decay: float = 1e-3  # of AdamW
    scale_jitter: float = 1.35  # crops are shown up to so much larger or smaller
    # What is beyond doubt:
    residual: float = 0.2  # share of the residual stain that is taken off hematoxylin
    blur_um: float = 0.5  # detail below this size is smoothed away
    background_radius_um: float = 10.0  # what counts as the surroundings of a pixel
    local_contrast: float = 0.15  # of a nucleus over their mean, in their standard deviations
    mask_threshold: float = 0.85  # how dark nuclei are at least, of the slide's threshold
    levels: int = 18  # at which the map is cut to find nuclei that stand out
    tree_threshold: float = 0.8  # of these levels, of the slide's threshold
    min_confidence: float = 0.3  # PatchCL's, on average
    min_area_um2: float = 5.0  # smaller ones are specks
    max_area_um2: float = 220.0  # larger ones are clumps
    min_fragment: float = 0.2  # smaller ones, beside the slide's typical nucleus, are in doubt
    min_solidity: float = 0.75  # worth nothing below that, and its full area at .2 more
    min_clump_um2: float = 500.0  # a larger dark clump should fall into nuclei
    min_covered: float = 0.2  # so much of it at least, or it is something else
    max_circularity: float = 0.33  # a dark clump below that is a strand, ...
    min_glass: float = 0.25  # ... one that lies on glass if so much of what is around it is, ...
    min_covered_strand: float = 0.3  # ... and keratin, say, unless so much of it falls into nuclei
    min_edge: float = 0.35  # slope along the rim, of the 95th percentile of the slope

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if len(self.widths) != 3 or min(self.widths) < 1:
            raise ConfigError("selftrain.widths must be three numbers, such as [16, 24, 40]")


@dataclass(frozen=True)
class CDCLConfig:
    """How corrected fields refine a model. Where a value is not the paper's, theirs is said."""

    steps: int = 300  # of training
    labelled: int = 6  # crops per step from corrected fields
    unlabelled: int = 6  # crops per step from all other tissue
    crop_px: int = 128  # side of a crop
    scale_jitter: float = 1.35  # crops are shown up to so much larger or smaller
    learning_rate: float = 1e-3  # of AdamW, falling to 0
    weight_decay: float = 1e-3  # of AdamW
    pseudo_weight: float = 1.0  # of the pseudo-labels; paper: none
    teacher_warmup: float = 0.2  # share of the steps before the teacher is listened to
    confidence_threshold: float = 0.9  # where the teacher is above this or below 1 - this, it is
    entropy_weight: float = 0.05  # of the student's own doubt
    contrast_weight: float = 0.1  # of the contrast between patches
    temperature: float = 0.1  # of that contrast
    dimensions: int = 16  # of the space in which patches are compared
    patch_px: int = 8  # side of a patch, a multiple of 4
    purity: float = 0.05  # a patch with no more than this of the other kind is of one kind
    bank_steps: int = 8  # of which patches are kept to contrast with
    bank_patches: int = 512  # of each kind and step

    def __post_init__(self) -> None:
        if self.patch_px % 4 or not self.patch_px:
            raise ConfigError("cdcl.patch_px must be a multiple of 4")


@dataclass(frozen=True)
class SegmentConfig:
    """From confidence to nuclei."""

    min_area_um2: float = 5.0  # smaller pieces are no nuclei
    max_area_um2: float = 400.0  # nor are larger blobs
    max_diameter_um: float = 30.0  # larger blobs are no nuclei; also sets the halo
    min_solidity: float = 0.7  # area over that of the convex hull; below it are strands and rims
    min_hematoxylin: float = 0.05  # its mean optical density; gaps between red cells have less
    max_hole_um2: float = 40.0  # larger gaps inside a nucleus stay gaps
    open_radius_um: float = 0.0  # thinner hairs are cut
    smooth_um: float = 0.6  # of the landscape that parts touching nuclei
    max_depth_um: float = 8.0  # depth inside the mask counts up to here
    marker_radius_um: float = 1.5  # two nuclei have their centres at least this far apart
    min_prominence_um: float = 0.1  # shallower saddles part no nuclei
    core_um: float = 3.0  # how much higher the landscape is where the network is sure of a core
    min_core: float = 0.6  # a nucleus without a core as sure as this is none


@dataclass(frozen=True)
class ResultConfig:
    """How nuclei appear in QuPath."""

    class_name: str = "Nucleus"  # class of the nuclei
    color: tuple[int, ...] = (38, 70, 214)  # red, green, blue; a person's colour stays
    object_type: str = "auto"  # annotation, detection, or by their number
    max_annotations: int = 20_000  # in an image; QuPath becomes slow above: detections

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
    """All settings of one run.

    ``recipe`` is how a model is made: "selftrain", PatchCL and then a network that its confident
    nuclei teach; "patchcl", PatchCL alone; "paper", PatchCL alone with the settings of the paper.
    ``engine`` runs it: "torch", "openvino", or "auto", the faster one of those that are there.
    """

    recipe: str = "selftrain"  # how a model is made: selftrain, patchcl or paper
    engine: str = "auto"  # what runs it: torch, openvino, or auto, the faster of those there
    slide: SlideConfig = field(default_factory=SlideConfig)
    patchcl: PatchCLConfig = field(default_factory=PatchCLConfig)
    selftrain: SelfTrainConfig = field(default_factory=SelfTrainConfig)
    cdcl: CDCLConfig = field(default_factory=CDCLConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    result: ResultConfig = field(default_factory=ResultConfig)

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ConfigError(f"recipe must be one of {', '.join(RECIPES)}")
        if self.engine not in ENGINES:
            raise ConfigError(f"engine must be one of {', '.join(ENGINES)}")


_WORDS = ("recipe", "engine")  # what is no table


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries, for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of ``to_dict``; what is left out keeps its default.

    Raises ConfigError for an unknown table or key, and for a value of the wrong type or sign.
    """
    tables = {f.name: f.default_factory for f in dataclasses.fields(Config) if f.name not in _WORDS}
    made: dict[str, Any] = {}
    recipe = values.get("recipe", Config.recipe)
    if recipe == "paper":
        tables["patchcl"] = PatchCLConfig.paper
        made["patchcl"] = PatchCLConfig.paper()
    for table, settings in values.items():
        if table in _WORDS:
            made[table] = settings
            continue
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

"""Every setting, with its unit, range and description: read from TOML, saved with every result.

A TOML file has one table for each of the classes below, named as the attributes of ``Config``:

    recipe = "selftrain"
    engine = "torch"

    [slide]
    mpp = 0.5

    [segment]
    min_area_um2 = 8

The guide's page of settings is made of the descriptions here (docs/reference.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import msgspec

from patchcl_qupath.errors import ConfigError

logger = logging.getLogger(__name__)

CLUSTERS = {"slurm": "sbatch", "pbs": "qsub", "lsf": "bsub", "sge": "qsub"}  # what takes jobs
TMA_CORES = "(TMA core)"  # instead of a class of annotations: the cores of an image's TMA grid
MAX_EXPAND_UM = 25.0  # of a nucleus into a cell: QuPath's own limit
_MAX_LENGTH_UM = 100.0  # in a setting: larger ones fill the memory, or overflow
_DIAMETER_UM = 7.0  # the typical diameter that lengths of separation are given for
_SCALES = 0.5, 2.5  # smallest and largest, of these lengths
CELL = "cell"  # QuPath's type of objects with a nucleus within
# QuPath classes of correction ROIs; groovy/import_nuclei.groovy has them, too.
TO_CORRECT = "PatchCL: correct here"  # suggested
CORRECTED = "PatchCL: corrected"  # a person says that it is done
DEFAULT_MODEL = "patchcl"  # the one model that `run` trains by itself
REFINED_MODEL = "refined"  # how `refine` names its model

AUTO_POSITIVE = "auto"  # --positive: the threshold is found on the slide
NEGATIVE, POSITIVE = "Negative", "Positive"  # last names of QuPath's intensity classes
GRADES = ("1+", "2+", "3+")
INTENSITY_COLOURS = {  # QuPath's own (PathClass), red, green, blue
    NEGATIVE: (90, 90, 180),
    POSITIVE: (200, 50, 50),
    GRADES[0]: (255, 215, 0),
    GRADES[1]: (225, 150, 50),
    GRADES[2]: (200, 50, 50),
}


class Recipe(StrEnum):
    """How a model is trained."""

    SELFTRAIN = "selftrain"  # PatchCL, then self-training of a U-Net on its pseudo-labels
    PATCHCL = "patchcl"  # PatchCL alone
    PAPER = "paper"  # PatchCL alone, with the settings of the paper


class EngineChoice(StrEnum):
    """What runs the network, as a person asks for it."""

    AUTO = "auto"  # the fastest that is installed
    TORCH = "torch"
    OPENVINO = "openvino"


class BackendKind(StrEnum):
    """How nuclei are written into a project."""

    AUTO = "auto"  # paquo if a QuPath is found, else files
    PAQUO = "paquo"  # by an installed QuPath
    FILES = "files"  # as files, which a person imports in QuPath


class ExportFormat(StrEnum):
    """What nuclei are exported to."""

    CSV = "csv"
    PARQUET = "parquet"
    GEOJSON = "geojson"  # for QuPath
    VISIUM_HD = "visium-hd"  # GeoJSON for Space Ranger
    SPATIALDATA = "spatialdata"
    ANNDATA = "anndata"


class ExportRows(StrEnum):
    """What a row of an exported table is."""

    NUCLEUS = "nucleus"
    IMAGE = "image"
    REGION = "region"
    CORE = "core"


class StainChoice(StrEnum):
    """Which stains are measured, as a person asks for it."""

    AUTO = "auto"  # those of the image in QuPath, else H&E
    H_E = "h-e"
    H_DAB = "h-dab"


class NetworkInput(StrEnum):
    """What a network sees of a pixel."""

    STAINS = "stains"  # normalised hematoxylin, eosin, residual
    RGB = "rgb"


class Similarity(StrEnum):
    """What PatchCL compares patches by."""

    PROTOTYPES = "prototypes"
    MSE = "mse"
    CROSS_ENTROPY = "cross_entropy"
    COSINE = "cosine"
    MUTUAL_INFORMATION = "mutual_information"


class ObjectType(StrEnum):
    """What nuclei become in QuPath."""

    AUTO = "auto"  # by their number
    ANNOTATION = "annotation"
    DETECTION = "detection"


class Overlapping(StrEnum):
    """What to do with nuclei that overlap objects of other programs in QuPath, and with these."""

    BOTH = "both"  # both are there
    KEEP = "keep"  # nuclei in the place of such objects are left out
    REPLACE = "replace"  # such objects in the place of nuclei are removed


def setting(description: str, unit: str = "", **limits: Any) -> msgspec.Meta:
    """What a setting is: its description, for the guide; its unit; the limits of its value."""
    if unit == "µm":
        limits = {"le": _MAX_LENGTH_UM} | limits
    return msgspec.Meta(description=description, extra={"unit": unit}, **limits)


def fraction(description: str) -> msgspec.Meta:
    """What a setting between 0 and 1 is."""
    return setting(description, ge=0, le=1)


_types: dict[type, dict[str, Any]] = {}  # of tables: evaluating annotations takes milliseconds


def setting_types(table: type) -> dict[str, Any]:
    """Setting -> its type, with its description, unit and limits (``setting``)."""
    if table not in _types:
        _types[table] = get_type_hints(table, include_extras=True)
    return _types[table]


@dataclass(frozen=True)
class Settings:
    """A table of settings: each value is checked against its type and limits (ConfigError)."""

    table: ClassVar[str]

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Settings):
                continue
            if isinstance(value, float) and not math.isfinite(value):  # TOML has inf and nan
                raise ConfigError(f"{self.table}.{entry.name} = {value!r}: it must be finite")
            kind = setting_types(type(self))[entry.name]
            try:
                checked = msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                name = f"{self.table}.{entry.name}".lstrip(".")
                raise ConfigError(f"{name} = {value!r}: {_expected(kind, error)}") from None
            object.__setattr__(self, entry.name, checked)


@dataclass(frozen=True)
class SlideConfig(Settings):
    """How slides are read."""

    table: ClassVar[str] = "slide"

    mpp: Annotated[
        float,
        setting(
            "Working resolution, at which networks are trained and run", "µm/px", ge=0.05, le=4
        ),
    ] = 0.5
    tile_px: Annotated[
        int,
        setting("Largest side of the part of a tile that owns nuclei (without halo)", "px", ge=16),
    ] = 1536
    tissue_mpp: Annotated[
        float, setting("Resolution of the tissue mask", "µm/px", ge=0.5, le=64)
    ] = 8.0
    min_tissue_um2: Annotated[
        float, setting("Smallest piece of tissue; smaller specks are taken for dust", "µm²", ge=0)
    ] = 20_000.0
    stain: Annotated[
        StainChoice,
        setting(
            "Stains that are measured: `auto` takes those of the image in QuPath, else H&E; "
            "`h-e`; `h-dab`"
        ),
    ] = StainChoice.AUTO


@dataclass(frozen=True)
class PatchCLConfig(Settings):
    """Label-free training by patch-based contrast. Where a default differs from the paper
    (Boserup & Selvan 2023), the paper's value is given."""

    table: ClassVar[str] = "patchcl"

    input: Annotated[
        NetworkInput,
        setting("What the network sees: normalised `stains`, or `rgb` (paper)"),
    ] = NetworkInput.STAINS
    channels: Annotated[int, setting("Confidence channels of the network", ge=1, le=64)] = 4
    width: Annotated[int, setting("Feature maps of each layer", ge=1, le=512)] = 8
    dilations: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=1)], ...],
        setting("Dilations of the pairs of convolutions", "px", min_length=1),
    ] = (1, 2, 3, 5, 10, 20)
    similarity: Annotated[
        Similarity,
        setting(
            "What patches are compared by: `prototypes`, or a measure of the paper (`mse`, "
            "`cross_entropy`, `cosine`, `mutual_information`)"
        ),
    ] = Similarity.PROTOTYPES
    temperature: Annotated[float, setting("Temperature of the contrast (paper: 1)", gt=0)] = 0.1
    inter_weight: Annotated[
        float, setting("Weight of the contrast between channels in the loss", ge=0)
    ] = 1.0
    patch_px: Annotated[int, setting("Side of a patch (paper: 50)", "px", ge=1)] = 24
    stride_px: Annotated[int, setting("Stride between patches (paper: 20)", "px", ge=1)] = 8
    patches: Annotated[int, setting("Patches sampled per crop and channel", ge=1)] = 10
    crop_px: Annotated[int, setting("Side of a training crop (paper: 300)", "px", ge=1)] = 128
    batch: Annotated[int, setting("Crops per step (paper: 10)", ge=1)] = 6
    blur_um: Annotated[
        float, setting("`prototypes`: Gaussian sigma that suppresses finer detail", "µm", ge=0)
    ] = 0.4
    background_radius_um: Annotated[
        float, setting("`prototypes`: Gaussian sigma of the local background", "µm", gt=0)
    ] = 6.0
    local_contrast_weight: Annotated[
        float,
        setting(
            "`prototypes`: weight of the local contrast of hematoxylin beside its amount", ge=0
        ),
    ] = 12.0
    learning_rate: Annotated[float, setting("Learning rate of Adam (paper: 2e-4)", gt=0)] = 2e-3
    weight_decay: Annotated[float, setting("Weight decay of Adam", ge=0)] = 1e-4
    max_steps: Annotated[int, setting("Largest number of training steps", ge=1)] = 400
    patience: Annotated[
        int,
        setting(
            "Training has converged when two successive spans of so many steps are alike", ge=1
        ),
    ] = 30
    cooldown_steps: Annotated[
        int, setting("Steps after convergence, at a falling learning rate", ge=0)
    ] = 60
    slides: Annotated[int, setting("Largest number of slides that crops are read from", ge=1)] = 32
    crops: Annotated[int, setting("Crops that are read, from all slides together", ge=1)] = 96
    source_px: Annotated[int, setting("Side of a crop that is read from a slide", "px", ge=1)] = 384
    seed: Annotated[
        int,
        setting(
            "Seed of all random numbers of the training, self-training included",
            ge=0,
            le=10**18,  # torch takes 64 bits
        ),
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.similarity, self.input) == (Similarity.PROTOTYPES, NetworkInput.RGB):
            raise ConfigError('patchcl.similarity = "prototypes" needs patchcl.input = "stains"')
        if not 16 <= self.patch_px <= self.crop_px:
            raise ConfigError("patchcl.patch_px must be at least 16 and at most patchcl.crop_px")

    @classmethod
    def paper(cls, similarity: str = "mse", seed: int = 0) -> PatchCLConfig:
        """The settings of the paper; 25 epochs of its data are 75 steps.

        Longer trainings are worse: confidences then shrink to the darkest spots, or to nothing.
        """
        return cls(
            input=NetworkInput.RGB,
            similarity=Similarity(similarity),
            temperature=1.0,
            patch_px=50,
            stride_px=20,
            crop_px=300,
            batch=10,
            learning_rate=2e-4,
            max_steps=150,
            patience=150,
            cooldown_steps=0,
            seed=seed,
        )


@dataclass(frozen=True)
class SelfTrainConfig(Settings):
    """Self-training: PatchCL's pseudo-labels train the network that separates nuclei, without
    labels. Up to `cdcl_steps` the settings are those of the training; the others are those of
    the pseudo-labels."""

    table: ClassVar[str] = "selftrain"

    widths: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=1)], ...],
        setting(
            "Channels of the U-Net at strides of 1, 2 and 4 px",
            min_length=3,
            max_length=3,
        ),
    ] = (16, 24, 40)
    first_steps: Annotated[
        int,
        setting(
            "Training steps of a first network, which finds the pseudo-labels of the next", ge=1
        ),
    ] = 600
    steps: Annotated[int, setting("Training steps of the network that is kept", ge=1)] = 600
    touching: Annotated[
        float,
        setting(
            "Copies that are pasted beside nuclei of every other crop, as a fraction of its nuclei",
            ge=0,
        ),
    ] = 0.5
    first_batch: Annotated[
        int,
        setting(
            "Crops per step of the first network, and of the one that is kept in its first steps; "
            "at most `batch`",
            ge=1,
        ),
    ] = 4
    batch: Annotated[
        int, setting("Crops per step of the network that is kept, in its last steps", ge=1)
    ] = 8
    small_batches: Annotated[
        float,
        setting(
            "First steps of the network that is kept, with `first_batch` crops, as a fraction",
            ge=0,
            le=1,
        ),
    ] = 0.6
    crop_px: Annotated[
        int, setting("Side of a training crop, a multiple of 4", "px", ge=4, multiple_of=4)
    ] = 128
    learning_rate: Annotated[
        float, setting("Peak learning rate of AdamW, after 20 steps; then a cosine to 0", gt=0)
    ] = 3e-3
    weight_decay: Annotated[float, setting("Weight decay of AdamW", ge=0)] = 1e-3
    scale_jitter: Annotated[
        float, setting("Training crops are scaled by a random factor of up to this, or down", ge=1)
    ] = 1.35
    cdcl_steps: Annotated[
        int,
        setting(
            "Training steps of each round of CDCL without labels, by the defaults of `[cdcl]`, "
            "from the network that is kept; 0: none",
            ge=0,
        ),
    ] = 300
    residual: Annotated[
        float, setting("Fraction of the residual stain that is subtracted from hematoxylin", ge=0)
    ] = 0.1
    brown: Annotated[
        float,
        setting(
            "Weight of a brown chromogen, relative to that of hematoxylin, on slides that have one",
            ge=0,
        ),
    ] = 0.7
    blur_um: Annotated[
        float, setting("Gaussian sigma that smooths the hematoxylin map", "µm", ge=0)
    ] = 0.35
    background_radius_um: Annotated[
        float, setting("Gaussian sigma of the local background", "µm", gt=0)
    ] = 6.0
    local_contrast: Annotated[
        float,
        setting(
            "Minimum contrast of a nucleus against its surroundings, in standard deviations", ge=0
        ),
    ] = 0.15
    mask_threshold: Annotated[
        float,
        setting(
            "Minimum hematoxylin of the nucleus mask, as a fraction of the slide's Otsu threshold",
            ge=0,
        ),
    ] = 0.85
    levels: Annotated[int, setting("Thresholds of the component tree", ge=1, le=256)] = 24
    tree_threshold: Annotated[
        float,
        setting(
            "Lowest threshold of the component tree, as a fraction of the slide's Otsu threshold",
            ge=0,
        ),
    ] = 0.8
    min_confidence: Annotated[
        float, fraction("Minimum mean PatchCL confidence of a pseudo-labelled nucleus")
    ] = 0.3
    min_area_um2: Annotated[
        float, setting("Minimum area of a pseudo-labelled nucleus", "µm²", ge=0)
    ] = 5.0
    max_area_um2: Annotated[
        float, setting("Maximum area of a pseudo-labelled nucleus", "µm²", gt=0)
    ] = 220.0
    min_fragment: Annotated[
        float,
        fraction(
            "Components below this fraction of the slide's typical nucleus area are ignored as "
            "fragments"
        ),
    ] = 0.2
    min_solidity: Annotated[
        float,
        fraction("Solidity at which a component scores 0; it scores its full area at 0.2 more"),
    ] = 0.75
    contour_threshold: Annotated[
        float,
        setting(
            "Minimum mean hematoxylin within a star-convex contour, as a fraction of the slide's "
            "Otsu threshold",
            ge=0,
        ),
    ] = 0.85
    min_contour_um2: Annotated[
        float, setting("Minimum area of a star-convex contour", "µm²", gt=0)
    ] = 12.0
    min_clump_um2: Annotated[
        float,
        setting(
            "Area above which a dark clump must split into nuclei, or is an artefact", "µm²", ge=0
        ),
    ] = 500.0
    min_covered: Annotated[
        float, fraction("Fraction of a large clump that must lie in nuclei, or it is an artefact")
    ] = 0.2
    max_circularity: Annotated[
        float, fraction("Circularity below which a dark clump is a strand or flake")
    ] = 0.33
    min_glass: Annotated[
        float, fraction("Fraction of a strand's surroundings that must be glass (keratin on glass)")
    ] = 0.25
    min_covered_strand: Annotated[
        float,
        fraction("Fraction of a strand on glass that must lie in nuclei, or it is an artefact"),
    ] = 0.3
    min_edge: Annotated[
        float,
        setting(
            "Minimum mean gradient along the contour, as a fraction of the slide's 95th percentile",
            ge=0,
        ),
    ] = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_areas(self)


@dataclass(frozen=True)
class CDCLConfig(Settings):
    """Semi-supervised refinement with corrected ROIs. Its defaults, but for steps and distillation,
    also end the label-free training. Where a default is not that of the paper (Wu et al. 2022), the
    paper's value is given."""

    table: ClassVar[str] = "cdcl"

    rounds: Annotated[
        int, setting("Rounds; each begins with what the model so far finds (paper: one)", ge=1)
    ] = 2
    steps: Annotated[int, setting("Training steps of each round", ge=1)] = 300
    labelled: Annotated[int, setting("Crops per step from corrected ROIs", ge=1)] = 6
    unlabelled: Annotated[int, setting("Crops per step from all other tissue", ge=1)] = 6
    crop_px: Annotated[
        int, setting("Side of a training crop, a multiple of 4", "px", ge=4, multiple_of=4)
    ] = 128
    scale_jitter: Annotated[
        float, setting("Training crops are scaled by a random factor of up to this, or down", ge=1)
    ] = 1.35
    learning_rate: Annotated[
        float, setting("Initial learning rate of AdamW, which falls to 0 as a cosine", gt=0)
    ] = 3e-3
    weight_decay: Annotated[float, setting("Weight decay of AdamW", ge=0)] = 1e-3
    pseudo_weight: Annotated[
        float, setting("Weight of the loss on pseudo-labels (paper: none)", ge=0)
    ] = 1.0
    min_probability: Annotated[
        float,
        fraction(
            "Minimum probability of a nucleus of the label-free model to be a pseudo-label of the "
            "first round; others, and background nearest to them, are unlabelled (paper: none)"
        ),
    ] = 0.6
    min_probability_of_several: Annotated[
        float,
        fraction(
            "Minimum probability of what is large and not convex, as several nuclei in one are, to "
            "be a pseudo-label; from `min_probability` to this it is unlabelled, and the "
            "background around it is not (paper: none)"
        ),
    ] = 0.8
    min_solidity: Annotated[
        float, fraction("Solidity, area over that of the convex hull, of what is convex")
    ] = 0.94
    large_area: Annotated[
        float, setting("Area of what is large, relative to the median of its crop", ge=0)
    ] = 1.5
    teacher_warmup: Annotated[
        float, fraction("Fraction of the steps before the teacher's predictions are used")
    ] = 0.2
    confidence_threshold: Annotated[
        float,
        setting(
            "The teacher is used where its probability is above this, or below 1 minus this",
            ge=0.5,
            le=1,
        ),
    ] = 0.9
    entropy_weight: Annotated[
        float, setting("Weight of the entropy of the student's predictions", ge=0)
    ] = 0.05
    contrast_weight: Annotated[float, setting("Weight of the cross-patch dense contrast", ge=0)] = (
        0.1
    )
    temperature: Annotated[float, setting("Temperature of the patch contrast", gt=0)] = 0.1
    dimensions: Annotated[
        int, setting("Dimensions of the projection in which patches are compared", ge=1)
    ] = 16
    patch_px: Annotated[
        int, setting("Side of a patch, a multiple of 4", "px", ge=4, multiple_of=4)
    ] = 8
    purity: Annotated[
        float,
        setting(
            "Maximum fraction of the other class in a patch that is contrasted as nucleus or "
            "background",
            ge=0,
            le=0.5,
        ),
    ] = 0.05
    bank_steps: Annotated[int, setting("Steps of which the memory bank keeps patches", ge=1)] = 8
    bank_patches: Annotated[
        int, setting("Patches of each class that the memory bank keeps of a step", ge=1)
    ] = 512
    distillation_steps: Annotated[
        int,
        setting(
            "Training steps after the rounds, in which the network is fitted to the corrected ROIs "
            "and held to what it is elsewhere; 0: none (paper: none)",
            ge=0,
        ),
    ] = 1200
    distillation_weight: Annotated[
        float, setting("Weight of the distillation loss outside of corrected ROIs", ge=0)
    ] = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_px > self.crop_px:
            raise ConfigError("cdcl.patch_px must be at most cdcl.crop_px")


@dataclass(frozen=True)
class SegmentConfig(Settings):
    """Post-processing: from probability maps to nuclei."""

    table: ClassVar[str] = "segment"

    min_area_um2: Annotated[float, setting("Minimum area of a nucleus", "µm²", ge=0)] = 3.0
    max_area_um2: Annotated[float, setting("Maximum area of a nucleus", "µm²", gt=0)] = 400.0
    max_diameter_um: Annotated[
        float,
        setting(
            "Maximum height and width of a nucleus; it also sets the halo of tiles", "µm", gt=0
        ),
    ] = 30.0
    min_solidity: Annotated[
        float,
        fraction(
            "Minimum solidity (area over that of the convex hull); strands and rims have less"
        ),
    ] = 0.7
    min_hematoxylin: Annotated[
        float,
        setting(
            "Minimum mean optical density of hematoxylin; gaps between red cells have less", ge=0
        ),
    ] = 0.05
    min_hematoxylin_on_glass: Annotated[
        float,
        setting(
            "Minimum mean optical density of hematoxylin where more than `max_glass` of the "
            "surroundings is glass; membranes of fat cells have less",
            ge=0,
        ),
    ] = 0.3
    max_glass: Annotated[
        float, fraction("Fraction of the square of 8 µm around pixels of a nucleus that is glass")
    ] = 0.3
    min_probability: Annotated[
        float,
        fraction("Minimum probability of a nucleus, `Detection probability`, by calibrated models"),
    ] = 0.35
    min_probability_of_pale: Annotated[
        float,
        fraction(
            "Minimum probability of what is a little paler and redder than the surest nuclei of "
            "its image; fibres and gaps have less"
        ),
    ] = 0.45
    min_probability_of_palest: Annotated[
        float,
        fraction(
            "Minimum probability of what absorbs half as much red light as the palest of the "
            "surest nuclei of its image, or has two thirds of their share of red in all light that "
            "is absorbed"
        ),
    ] = 0.9
    max_hole_um2: Annotated[
        float,
        setting(
            "Holes in a nucleus below this area are filled, unless they are longer than 0.4 of "
            "`max_diameter_um`",
            "µm²",
            ge=0,
        ),
    ] = 40.0
    open_radius_um: Annotated[
        float,
        setting("Radius of the morphological opening of the mask; 0 is none", "µm", ge=0, le=10),
    ] = 0.0
    nucleus_diameter_um: Annotated[
        float,
        setting(
            "Typical diameter of nuclei, by which they are separated: half of the nuclear area is "
            "in nuclei that are larger; 0 measures it in each image; no less than 3.5 µm is used, "
            "and no more than 17.5 µm",
            "µm",
            ge=0,
        ),
    ] = 0.0
    smooth_um: Annotated[
        float,
        setting(
            "Gaussian sigma of the elevation map of the watershed, where the typical diameter is "
            "7 µm; more where it is more, as are the minimum distance and prominence of markers",
            "µm",
            ge=0,
        ),
    ] = 0.6
    max_depth_um: Annotated[
        float,
        setting("Distance to the background at which the elevation map is capped", "µm", gt=0),
    ] = 8.0
    marker_radius_um: Annotated[
        float, setting("Minimum distance between the markers of two nuclei", "µm", ge=0)
    ] = 1.5
    min_prominence_um: Annotated[
        float,
        setting("Minimum prominence of a marker: its height above the highest saddle", "µm", ge=0),
    ] = 0.1
    join_diameter: Annotated[
        float,
        setting(
            "Neighbours are joined if the diameter of their union, relative to the typical one, is "
            "below this",
            ge=0,
        ),
    ] = 0.75
    join_ellipse: Annotated[
        float,
        setting(
            "Added to `join_diameter`, times how much more the union of the neighbours is an "
            "ellipse than they are",
            ge=0,
        ),
    ] = 3.0
    join_core: Annotated[
        float,
        setting(
            "Added to `join_diameter`, times the core probability on the border of the "
            "neighbours; with all three 0, none are joined",
            ge=0,
        ),
    ] = 0.6
    core_um: Annotated[
        float, setting("Elevation that a core probability of 1 adds", "µm", ge=0)
    ] = 3.0
    min_core: Annotated[float, fraction("Minimum core probability within a nucleus")] = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_areas(self)

    @property
    def scale(self) -> float:
        """How large nuclei are, relative to those that lengths of separation are given for."""
        scale = (self.nucleus_diameter_um or _DIAMETER_UM) / _DIAMETER_UM
        return min(max(scale, _SCALES[0]), _SCALES[1])

    @property
    def typical_um(self) -> float:
        """The typical diameter that nuclei are separated by, in µm."""
        return self.scale * _DIAMETER_UM


def _check_areas(table: SelfTrainConfig | SegmentConfig) -> None:
    """Raise ConfigError where no nucleus could be large and small enough."""
    if table.min_area_um2 >= table.max_area_um2:
        name = table.table
        raise ConfigError(f"{name}.min_area_um2 must be less than {name}.max_area_um2")


@dataclass(frozen=True)
class CellConfig(Settings):
    """Whole cells, grown from nuclei. With other settings here, the same tiles are used again."""

    table: ClassVar[str] = "cells"

    expand_um: Annotated[
        float,
        setting(
            "How far nuclei are grown into cells, at most, and not into other cells; 0 is not at "
            "all",
            "µm",
            ge=0,
            le=MAX_EXPAND_UM,
        ),
    ] = 0.0
    constrain_scale: Annotated[
        float,
        setting(
            "Largest size of a cell relative to its nucleus, as `cellConstrainScale` of QuPath's "
            "StarDist: a cell lies within the convex hull of its nucleus, scaled by this about its "
            "centroid; 1 or less is no limit",
            ge=0,
            le=100,
        ),
    ] = 1.5

    @property
    def are_grown(self) -> bool:
        """Whether there are cells."""
        return self.expand_um > 0


@dataclass(frozen=True)
class ResultConfig(Settings):
    """How nuclei appear in QuPath."""

    table: ClassVar[str] = "result"

    class_name: Annotated[str, setting("QuPath class of the nuclei")] = "Nucleus"
    color: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=255)], ...],
        setting(
            "Colour of that class (red, green, blue), unless it has one in QuPath",
            min_length=3,
            max_length=3,
        ),
    ] = (38, 70, 214)
    object_type: Annotated[
        ObjectType,
        setting("QuPath objects: `annotation`, `detection`, or `auto`, which is by their number"),
    ] = ObjectType.AUTO
    max_annotations: Annotated[
        int,
        setting(
            "`auto`: an image with more nuclei gets detections, since QuPath slows down with more "
            "annotations",
            ge=0,
        ),
    ] = 20_000
    overlapping: Annotated[
        Overlapping,
        setting(
            "Where nuclei overlap detections of other programs (IoU above 0.5): `both` adds nuclei "
            "beside them, `keep` leaves out these nuclei, `replace` removes these detections"
        ),
    ] = Overlapping.BOTH
    keep: Annotated[
        bool,
        setting(
            "Keep every earlier nucleus that carries a class, measurements or notes of a person "
            "and that no new nucleus replaces; otherwise only where these were put on it by hand"
        ),
    ] = False

    positive: Annotated[
        str,
        setting(
            "Classes of positive and negative nuclei: a measurement and a threshold, such as "
            "`nucleus-dab-mean=0.2`, or three for 1+, 2+ and 3+ (`0.2,0.4,0.6`); `auto` finds one "
            "on each slide with DAB; empty: none"
        ),
    ] = ""
    summarise: Annotated[
        tuple[str, ...],
        setting("QuPath classes of annotations that nuclei are counted in, one by one"),
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        # Two spellings are one class, and would be counted twice.
        classes = dict.fromkeys(": ".join(class_parts(name)) for name in self.summarise)
        object.__setattr__(self, "summarise", tuple(classes))
        object.__setattr__(self, "class_name", ": ".join(class_parts(self.class_name)))
        if not self.class_name or not self.class_name.isprintable():
            raise ConfigError("result.class_name must be a name such as Nucleus")
        if self.class_name in (TO_CORRECT, CORRECTED) or self.class_name.endswith("*"):
            raise ConfigError(
                f"{self.class_name} cannot be the class of nuclei: it is that of ROIs to correct, "
                "or one that QuPath ignores, with * at its end: pass another with --class-name"
            )
        if not self.positive:
            return
        parse_positive(self.positive)
        last = self.class_name.rpartition(":")[2].strip()
        if last in INTENSITY_COLOURS:
            raise ConfigError(
                f"{self.class_name} cannot be the class of nuclei with --positive, which makes "
                f"classes of that name itself: pass another name than {last} with --class-name"
            )

    def kind(self, count: int) -> ObjectType:
        """What ``count`` nuclei of one image become: annotation or detection.

        QuPath's own percentages and scores are of detections alone.
        """
        if self.object_type != ObjectType.AUTO:
            return self.object_type
        if self.positive:
            return ObjectType.DETECTION
        return ObjectType.ANNOTATION if count <= self.max_annotations else ObjectType.DETECTION


def class_colour(name: str, other: tuple[int, ...]) -> tuple[int, ...]:
    """The colour of a class of nuclei: QuPath's own if it is one of an intensity, else another."""
    return INTENSITY_COLOURS.get(name.rpartition(":")[2].strip(), other)


def class_parts(name: str) -> list[str]:
    """The names that make a class of QuPath, the outermost first, however a person wrote it."""
    return [part.strip() for part in name.split(":") if part.strip()]


def parse_positive(text: str) -> tuple[str, tuple[float, ...]] | None:
    """The measurement and the thresholds of ``result.positive``; None for `auto`, or without any.

    Raises ConfigError.
    """
    if not text or text == AUTO_POSITIVE:
        return None
    name, _, numbers = text.rpartition("=")
    try:
        thresholds = tuple(float(number) for number in numbers.split(","))
    except ValueError:
        thresholds = ()
    rising = all(a < b for a, b in itertools.pairwise(thresholds))
    is_good = rising and len(thresholds) in (1, 3) and all(map(math.isfinite, thresholds))
    if not name.strip() or not is_good:
        raise ConfigError(
            f"--positive {text}: give a measurement with one threshold, nucleus-dab-mean=0.2, or "
            "with three that rise, for 1+, 2+ and 3+, nucleus-dab-mean=0.2,0.4,0.6; or auto"
        )
    return name.strip(), thresholds


_BY_RECIPE = PatchCLConfig()  # where nobody chose settings of PatchCL, they are the recipe's


@dataclass(frozen=True)
class Config(Settings):
    """All settings of one run."""

    table: ClassVar[str] = ""

    recipe: Annotated[
        Recipe,
        setting(
            "How a model is trained: `selftrain`, PatchCL and then self-training on its "
            "pseudo-labels; `patchcl`, PatchCL alone; `paper`, PatchCL with the paper's settings"
        ),
    ] = Recipe.SELFTRAIN
    engine: Annotated[
        EngineChoice,
        setting(
            "What runs the network: `torch`; `openvino`, in bfloat16 or float32; or `auto`, the "
            "fastest installed, in 8 bits where the CPU is fast in these"
        ),
    ] = EngineChoice.AUTO
    slide: SlideConfig = field(default_factory=SlideConfig)
    patchcl: PatchCLConfig = _BY_RECIPE
    selftrain: SelfTrainConfig = field(default_factory=SelfTrainConfig)
    cdcl: CDCLConfig = field(default_factory=CDCLConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    cells: CellConfig = field(default_factory=CellConfig)
    result: ResultConfig = field(default_factory=ResultConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe is Recipe.PAPER and self.patchcl is _BY_RECIPE:
            object.__setattr__(self, "patchcl", PatchCLConfig.paper())

    def kind(self, count: int) -> str:
        """What ``count`` nuclei of one image become in QuPath: annotation, detection or cell.

        A cell is a detection in QuPath. Annotations, which a person can reshape, are of nuclei.
        """
        if self.cells.are_grown and self.result.object_type != ObjectType.ANNOTATION:
            return CELL
        return self.result.kind(count)


TABLES: dict[str, type[Settings]] = {
    table.table: table
    for table in (
        SlideConfig,
        PatchCLConfig,
        SelfTrainConfig,
        CDCLConfig,
        SegmentConfig,
        CellConfig,
        ResultConfig,
    )
}

# Names of version 0.1, which models of that version and people's files still have.
RENAMED: dict[str, dict[str, str]] = {
    "patchcl": {
        "around_um": "background_radius_um",
        "excess_weight": "local_contrast_weight",
    },
    "selftrain": {
        "varied_size": "scale_jitter",
        "around_um": "background_radius_um",
        "excess": "local_contrast",
        "floor": "mask_threshold",
        "lowest": "tree_threshold",
    },
    "cdcl": {
        "varied_size": "scale_jitter",
        "patience": "teacher_warmup",
        "confident": "confidence_threshold",
        "pure": "purity",
    },
    "segment": {"min_saddle_depth_um": "min_prominence_um"},
}


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries, for JSON."""
    plain: dict[str, Any] = msgspec.to_builtins(config)
    return plain


def from_dict(values: Mapping[str, Any], start: Config | None = None) -> Config:
    """The inverse of ``to_dict``; what is left out is as in ``start``, by default the defaults.

    Names of version 0.1 are understood. Raises ConfigError for an unknown table or setting, and
    for a value of the wrong type or out of its range.
    """
    general: dict[str, Any] = {name: values[name] for name in values if name not in TABLES}
    for name in general:
        if name not in ("recipe", "engine"):
            raise ConfigError(_unknown(name, values[name]))
    start = dataclasses.replace(start or Config(), **general)
    tables: dict[str, Any] = {
        name: _with_values(getattr(start, name), values[name]) for name in TABLES if name in values
    }
    return dataclasses.replace(start, **tables)


def _names_of(kind: type[Settings] | Settings) -> list[str]:
    """The names of the settings of a table."""
    return [entry.name for entry in dataclasses.fields(kind)]


def _unknown(name: str, value: Any) -> str:
    """What to tell a person of an unknown name outside of all tables."""
    if not isinstance(value, Mapping):
        homes = [table for table, kind in TABLES.items() if name in _names_of(kind)]
        if homes:
            return f"{name} is in no table: put it under [{'] or ['.join(homes)}]"
        return f"unknown setting {name}: the settings outside of tables are recipe and engine"
    return f"unknown table [{name}]: the tables are {', '.join(TABLES)}"


def unlike_training(asked: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    """What is asked for of a training that a model's was not made with, in words; "" where nothing.

    Both are as for ``from_dict``, and raise as it does: what they leave out is not compared.
    """
    wanted, used = _of_training(asked), _of_training(trained)
    unlike = [name for name, value in wanted.items() if used.get(name, value) != value]
    return ", ".join(f"{name} {used[name]}, not {wanted[name]}" for name in unlike)


def _of_training(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among ``values`` by which a model is trained without labels, by name."""
    config = from_dict(values)
    found: dict[str, Any] = {"recipe": config.recipe} if "recipe" in values else {}
    for table in (config.patchcl, config.selftrain):
        renamed = RENAMED[table.table]
        for name in values.get(table.table, {}):
            name = renamed.get(name, name)
            found[f"{table.table}.{name}"] = getattr(table, name)
    return found


def read_settings(path: Path | None) -> dict[str, Any]:
    """The tables of a TOML file, as for ``from_dict``; none without a file. Raises ConfigError."""
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}: name one of settings, as TOML") from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}; name a file of settings, as TOML"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not in UTF-8: save it in that encoding") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}: correct it") from error


def load_config(path: Path | None) -> Config:
    """The settings of a TOML file, or the defaults where there is none."""
    values = read_settings(path)
    try:
        config = from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    for table, names in RENAMED.items():
        for old in names.keys() & values.get(table, {}).keys():
            logger.warning("%s: %s.%s is now called %s", path, table, old, names[old])
    return config


def _expected(kind: Any, error: msgspec.ValidationError) -> str:
    """What a setting of some type must be."""
    choices = get_args(kind)[0]
    if isinstance(choices, type) and issubclass(choices, StrEnum):
        return f"it must be one of {', '.join(choices)}"
    reason = str(error).partition(" - at ")[0].replace("`", "")
    return f"{reason[0].lower()}{reason[1:]}"


def _with_values(table: Settings, values: Any) -> Settings:
    """A table with some other values."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"[{table.table}] must be a table")
    renamed = RENAMED.get(table.table, {})
    known = _names_of(table)
    new = {renamed.get(name, str(name)): value for name, value in values.items()}
    for name in new:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"do you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            raise ConfigError(f"unknown setting {table.table}.{name}: {hint}")
    return dataclasses.replace(table, **new)

"""A trained model: stored, loaded, and run on pixels."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from patchcl_qupath.config import Config, NetworkInput, from_dict, to_dict
from patchcl_qupath.datatypes import Box
from patchcl_qupath.errors import ModelError
from patchcl_qupath.models import engines
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.network import ConfidenceNetwork, NucleusNetwork, SegmentationNetwork
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.storage.files import atomic_write
from patchcl_qupath.storage.records import (
    ModelRecord,
    TrainingLog,
    to_plain,
    training_log,
    write_record,
)

_FORMAT = "patchcl-qupath model 2"
_PROBABILITIES = (0.5, 0.999)  # of what is nucleus; nearer to 1, log-odds mean nothing
_ELLIPSE = 0.02  # what even an ellipse of pixels lacks of one
_LEAST_DIAMETER = 0.1  # relative to the typical one
_BAND_PX = 3 * 2**19  # of an image that a network is run on at once: half a tile, with its halo

# How a network of a model file is made, by its name there.
_NETWORKS: dict[str, Callable[[Config], SegmentationNetwork]] = {
    "ConfidenceNetwork": lambda config: ConfidenceNetwork.of(config.patchcl),
    "NucleusNetwork": lambda config: NucleusNetwork(config.selftrain.widths),
}


class Confidence(NamedTuple):
    """The probability of a nucleus at each pixel, (H, W) in [0, 1]; and, where the network has
    cores, that of the core of a nucleus."""

    nucleus: NDArray[np.float32]
    core: NDArray[np.float32] | None


class Calibration(NamedTuple):
    """How often a nucleus is right: a logistic regression on what the network makes of it.

    The weights are those of the log-odds of its mean probability and of the largest core
    probability in it; of the logarithm of what it lacks of an ellipse; and of the logarithm of its
    diameter, relative to the typical one of its image, and of the square of that, since what is far
    smaller and what is far larger may both be wrong.
    """

    intercept: float
    probability: float
    core: float
    ellipticity: float
    diameter: float
    diameter_squared: float

    def __call__(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """The probability (N,) that nuclei are right; ``features`` (N, 5) of ``features_of``."""
        logits = self.intercept + features @ np.array(self[1:])
        return np.asarray(1 / (1 + np.exp(-logits)))


def features_of(
    mean_probability: NDArray[np.float64],
    largest_core: NDArray[np.float64],
    ellipticity: NDArray[np.float64],
    diameter: NDArray[np.float64],
) -> NDArray[np.float64]:
    """What a calibration sees of nuclei, (N, 5), of (N,) each: the diameter is relative to the
    typical one of the image."""

    def log_odds(p: NDArray[np.float64]) -> NDArray[np.float64]:
        p = np.clip(p, *_PROBABILITIES)
        return np.asarray(np.log(p / (1 - p)))

    size = np.log(np.maximum(diameter, _LEAST_DIAMETER))
    lacks = np.log(1 + _ELLIPSE - np.minimum(ellipticity, 1))
    odds = [log_odds(mean_probability), log_odds(largest_core)]
    return np.stack([*odds, lacks, size, size**2], axis=-1)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Model:
    """A trained network, with all that is needed to use it, and the settings that made it.

    ``channel`` is the map of the network that shows nuclei; where it is ``inverted``, it is low on
    them. A pixel with more confidence than ``threshold`` is nucleus. ``calibration``, where there
    is one, makes the probability of a nucleus from those of its pixels. ``training`` is the log,
    for people and reports. All but what a refinement learns was chosen without labels.
    """

    network: SegmentationNetwork
    config: Config
    channel: int = 0
    inverted: bool = False
    threshold: float = 0.5
    calibration: Calibration | None = None
    training: TrainingLog | None = None

    def __repr__(self) -> str:
        """The network and the beginning of the digest: those of its layers fill pages."""
        return f"<Model {type(self.network).__name__} {self.digest[:12]}>"

    @property
    def mpp(self) -> float:
        """µm per pixel that the network was trained at, and must be run at."""
        return self.config.slide.mpp

    @property
    def receptive_radius_px(self) -> int:
        """How far a confidence depends on pixels around it, in working pixels."""
        return self.network.receptive_radius_px

    @property
    def divisor(self) -> int:
        """Tiles must begin at multiples of this on the working grid."""
        return self.network.divisor

    @property
    def input(self) -> NetworkInput:
        """What the network sees of a pixel: normalised stains, or RGB."""
        return self.network.input

    @cached_property
    def digest(self) -> str:
        """Hexadecimal digest of all that nuclei depend on."""
        depends = [
            self.config.patchcl.dilations,
            self.input,
            self.mpp,
            self.channel,
            self.inverted,
            self.threshold,
            *([] if self.calibration is None else [self.calibration]),
        ]
        digest = hashlib.sha256(json.dumps(depends).encode())
        for name, values in self.network.state_dict().items():
            digest.update(name.encode() + values.cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def record(self) -> ModelRecord:
        """The model without its weights."""
        return ModelRecord(
            digest=self.digest,
            network=type(self.network).__name__,
            channel=self.channel,
            inverted=self.inverted,
            threshold=self.threshold,
            calibration=self.calibration,
            config=to_dict(self.config),
            training={} if self.training is None else to_plain(self.training),
        )

    def save(self, folder: Path, name: str) -> Path:
        """Write NAME.pt, and NAME.json for people to read; returns the path of NAME.pt.

        Each file appears whole or not at all. Raises StorageError where they cannot be written.
        """
        path = folder / f"{name}.pt"
        record = self.record
        weights = {key: values.cpu() for key, values in self.network.state_dict().items()}
        content = io.BytesIO()
        torch.save({"format": _FORMAT, **to_plain(record), "weights": weights}, content)
        write_record(path.with_suffix(".json"), record)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content.getvalue())
        return path

    @classmethod
    def load(cls, path: Path) -> Model:
        """Read NAME.pt back. Nothing in the file is executed.

        Raises ModelError for a file that is missing, damaged, of another kind, unsafe, or that may
        not be read.
        """
        advice = "train a new one with `patchcl-qp train PROJECT.qpproj`"
        if not path.is_file():
            raise ModelError(f"{path} does not exist: {advice}")
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            if stored["format"] != _FORMAT:
                raise ValueError(f"its format is {stored['format']}")
            config = from_dict(stored["config"])
            with torch.device("meta"):  # no memory yet: the settings are only a claim so far
                network = _NETWORKS[stored["network"]](config)
            network.load_state_dict(stored["weights"], assign=True)
            model = cls(
                network=network.eval(),
                config=config,
                channel=stored["channel"],
                inverted=stored["inverted"],
                threshold=stored["threshold"],
                calibration=_calibration(stored.get("calibration")),
                training=training_log(stored["training"]),
            )
            if model.digest != stored["digest"]:
                raise ValueError("it was changed after it was written")
        except PermissionError as error:
            raise ModelError(f"{path} may not be read from here: ask for the permission") from error
        except Exception as error:  # a damaged or hostile file can raise anything
            reason = "it is damaged, no model at all, or of another version"
            raise ModelError(f"{path} cannot be used: {reason}; {advice}") from error
        return model


def _calibration(stored: list[float] | None) -> Calibration | None:
    """That of a model file; models of version 0.1 have none."""
    return None if stored is None else Calibration(*stored)


def confidence(
    model: Model,
    rgb: NDArray[np.uint8],
    normaliser: StainNormaliser,
    engine: EngineKind = EngineKind.TORCH,
) -> Confidence:
    """The model's confidence in nuclei in an image (H, W, 3).

    ``rgb`` is at ``model.mpp`` and begins at multiples of ``model.divisor``; ``normaliser`` is that
    of its slide. Pixels that lie at least ``model.receptive_radius_px`` from the border of ``rgb``
    have the value they have in the whole slide.

    Values are multiples of 1/255: how a convolution sums depends on the size of the tile, and two
    tiles would differ in the last bits of a pixel, which a threshold may turn into another nucleus.
    """
    run = engines.of(engine, model.network, model.digest)
    shape = rgb.shape[:2]
    whole = Box(0, 0, *shape)
    channels = [model.channel, model.network.core_channel]
    found = [None if channel is None else np.empty(shape, np.float32) for channel in channels]
    for box in _bands(shape, model.divisor):
        read = box.grow(model.receptive_radius_px, shape).aligned(model.divisor, shape)
        maps = run(_network_input(model, rgb[read.within(whole)], normaliser))
        maps = maps[:, *box.within(read)]
        for channel, values in zip(channels, found, strict=True):
            if values is not None:
                values[box.within(whole)] = np.rint(maps[channel] * 255) / 255
    nucleus, core = found
    assert nucleus is not None
    if model.inverted:
        np.subtract(1, nucleus, out=nucleus)
    return Confidence(nucleus=nucleus, core=core)


def _network_input(
    model: Model, rgb: NDArray[np.uint8], normaliser: StainNormaliser
) -> NDArray[np.float32]:
    """What a network sees of pixels (H, W, 3), as many as it must be given."""
    rows, cols = (-side % model.divisor for side in rgb.shape[:2])
    if rows or cols:
        rgb = np.pad(rgb, ((0, rows), (0, cols), (0, 0)), mode="edge")
    return normaliser.network_input(rgb, model.input)


def _bands(shape: tuple[int, int], divisor: int) -> Iterator[Box]:
    """An image of ``shape`` in bands of rows, which begin at multiples of ``divisor``.

    Same values, in a fraction of the memory: a network needs some 150 bytes for each pixel.
    """
    height, width = shape
    bands = max(1, -(-height * width // _BAND_PX))
    step = divisor * -(-height // (divisor * bands))
    for row in range(0, height, step):
        yield Box(row, 0, min(height, row + step), width)

"""A trained model: stored, loaded, and run on pixels."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from patchcl_qupath.config import Config, NetworkInput, from_dict, to_dict
from patchcl_qupath.errors import ModelError
from patchcl_qupath.models import engines
from patchcl_qupath.models.network import ConfidenceNetwork, NucleusNetwork
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.storage.files import atomic_write, write_json

_FORMAT = "patchcl-qupath model 2"
_BAND_PX = 2**20  # of an image, about, that a network is run on at once


class Confidence(NamedTuple):
    """How sure a model is of a nucleus at each pixel, (H, W) in [0, 1]; and, if it says so, of the
    core of one."""

    nucleus: NDArray[np.float32]
    core: NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network, with all that is needed to use it, and the settings that made it.

    Of a PatchCL network, ``channel`` is the one of its channels that shows nuclei; ``inverted``
    says that it is low on them. A nucleus has confidence above ``threshold``. ``training`` is the
    log, for people and reports. All was chosen without labels (see ``patchcl``).
    """

    network: ConfidenceNetwork | NucleusNetwork
    config: Config
    channel: int
    inverted: bool
    threshold: float
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def mpp(self) -> float:
        """um per pixel that the network was trained at, and must be run at."""
        return self.config.slide.mpp

    @property
    def receptive_radius_px(self) -> int:
        """How far beyond a pixel the confidence there looks, in working pixels."""
        return self.network.receptive_radius_px

    @property
    def divisor(self) -> int:
        """Tiles must begin at multiples of this on the working grid."""
        return self.network.divisor

    @property
    def input(self) -> NetworkInput:
        """What the network sees of a pixel."""
        if isinstance(self.network, NucleusNetwork):
            return NetworkInput.STAINS
        return self.config.patchcl.input

    @cached_property
    def digest(self) -> str:
        """Hexadecimal digest of all that a confidence depends on."""
        facts = [self.config.patchcl.dilations, self.input, self.mpp, *self._choices().values()]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for name, values in self.network.state_dict().items():
            digest.update(name.encode() + values.cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path, name: str) -> Path:
        """Write NAME.pt, and NAME.json for people to read; returns the path of NAME.pt.

        Each file appears whole or not at all. Raises StorageError where they cannot be written.
        """
        path = folder / f"{name}.pt"
        facts: dict[str, Any] = {"digest": self.digest, "network": type(self.network).__name__}
        facts |= self._choices()
        facts |= {"config": to_dict(self.config), "training": self.training}
        weights = {key: values.cpu() for key, values in self.network.state_dict().items()}
        content = io.BytesIO()
        torch.save({"format": _FORMAT, **facts, "weights": weights}, content)
        write_json(path.with_suffix(".json"), facts)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content.getvalue())
        return path

    @classmethod
    def load(cls, path: Path) -> Model:
        """Read NAME.pt back. Nothing in the file is executed.

        Raises ModelError for a file that is missing, damaged, of another kind or unsafe.
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
                network = _untrained(stored["network"], config)
            network.load_state_dict(stored["weights"], assign=True)
            choices = (stored[key] for key in ("channel", "inverted", "threshold", "training"))
            model = cls(network.eval(), config, *choices)
            if model.digest != stored["digest"]:
                raise ValueError("it was changed after it was written")
        except Exception as error:  # a damaged or hostile file can raise anything
            reason = "it is damaged, no model at all, or of another version"
            raise ModelError(f"{path} cannot be used: {reason}; {advice}") from error
        return model

    def _choices(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("channel", "inverted", "threshold")}


def _untrained(kind: str, config: Config) -> ConfidenceNetwork | NucleusNetwork:
    if kind == "ConfidenceNetwork":
        return ConfidenceNetwork.of(config.patchcl)
    if kind == "NucleusNetwork":
        return NucleusNetwork(config.selftrain.widths)
    raise ValueError(f"its network is {kind}")


def confidence(
    model: Model, rgb: NDArray[np.uint8], normaliser: StainNormaliser, engine: str = "torch"
) -> Confidence:
    """How sure the model is of nuclei in an image (H, W, 3).

    ``rgb`` is at ``model.mpp`` and begins at multiples of ``model.divisor``; ``normaliser`` is the
    stain range of its slide; ``engine`` one of those that ``engines.choose`` names. Pixels that lie
    at least ``model.receptive_radius_px`` from the border of ``rgb`` have the value they have in
    the whole slide.

    Values are multiples of 1/255: how a convolution sums depends on the size of the tile, and two
    tiles would differ in the last bits of a pixel, which a threshold may turn into another nucleus.
    """
    height, width = rgb.shape[:2]
    divisor = model.divisor
    rgb = np.pad(rgb, ((0, -height % divisor), (0, -width % divisor), (0, 0)), mode="edge")
    run = engines.of(engine, model.network, model.digest)
    seen = normaliser.network_input(rgb, model.input)
    maps = _in_bands(run, seen, model.receptive_radius_px, divisor)[:, :height, :width]  # (C, H, W)
    maps = np.asarray(np.rint(maps * 255) / 255, np.float32)
    if isinstance(model.network, NucleusNetwork):
        return Confidence(maps[0], maps[1])
    nucleus = maps[model.channel]
    return Confidence(1 - nucleus if model.inverted else nucleus, None)


def _in_bands(
    run: engines.Engine, seen: NDArray[np.float32], receptive_radius_px: int, divisor: int
) -> NDArray[np.float32]:
    """What ``run`` makes of (H, W, 3): (C, H, W), band by band, each with the reach around it.

    Same values, in a part of the memory: a network needs some 200 bytes for each pixel it sees.
    """
    height, width = seen.shape[:2]
    bands = -(-height * width // _BAND_PX)
    step = divisor * -(-height // (divisor * max(1, bands)))
    halo = divisor * -(-receptive_radius_px // divisor)
    parts = []
    for row in range(0, height, step):
        first = max(0, row - halo)
        part = run(seen[first : row + step + halo])
        parts.append(part[:, row - first : row - first + step])
    return np.concatenate(parts, axis=1)

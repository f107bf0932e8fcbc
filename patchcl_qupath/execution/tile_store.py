"""What a run keeps: the finished tiles of each image, and records of the run and of its images."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Nuclei, Polygons, Tile, UncertaintyGrid
from patchcl_qupath.errors import StorageError
from patchcl_qupath.storage.files import digest, read_json, write_bytes, write_json, writing
from patchcl_qupath.storage.parquet import (
    count_nuclei,
    read_measurements,
    read_nuclei,
    read_polygons,
    read_tile_uncertainty,
)

Measured = dict[str, NDArray[np.float32]]  # by name: (N,)


@dataclass(frozen=True)
class TileStore:
    """The finished tiles of one image in one run: a folder of parquet files and its plan."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, plan: dict[str, Any]) -> TileStore:
        """Open for ``plan``, whatever decides what is in a tile's file; drop tiles of another."""
        plan_file = folder / "plan.json"
        if digest(read_json(plan_file)) != digest(plan):
            with writing(folder):
                shutil.rmtree(folder, ignore_errors=True)
                (folder / "tiles").mkdir(parents=True, exist_ok=True)
            write_json(plan_file, plan)
        return cls(folder)

    def path(self, tile: Tile) -> Path:
        """Where a finished tile's nuclei are."""
        return self.folder / "tiles" / f"{tile.name}.parquet"

    def write(self, tile: Tile, content: bytes) -> None:
        """Keep what ``to_parquet`` made of a tile; from now on it is finished."""
        write_bytes(self.path(tile), content)

    def missing(self, tiles: Sequence[Tile]) -> list[Tile]:
        """The tiles that are still to do."""
        finished = {path.name for path in (self.folder / "tiles").glob("*.parquet")}
        return [tile for tile in tiles if self.path(tile).name not in finished]

    def count(self, tiles: Sequence[Tile]) -> int:
        """How many nuclei finished tiles hold together."""
        return sum(count_nuclei(self.path(tile)) for tile in tiles)

    def nuclei(self, tiles: Sequence[Tile]) -> Iterator[Nuclei]:
        """The nuclei of finished tiles, one tile after the other, in the tiles' order."""
        return (read_nuclei(self.path(tile)) for tile in tiles)

    def polygons(self, tiles: Sequence[Tile]) -> Iterator[Polygons]:
        """Their outlines alone."""
        return (read_polygons(self.path(tile)) for tile in tiles)

    def measurements(self, tiles: Sequence[Tile], names: Sequence[str]) -> Iterator[Measured]:
        """Some of their measurements alone."""
        return (read_measurements(self.path(tile), names) for tile in tiles)

    def uncertainty_grids(self, tiles: Sequence[Tile]) -> Iterator[UncertaintyGrid]:
        """What was seen where, of each."""
        return (read_tile_uncertainty(self.path(tile)) for tile in tiles)


def write_run(
    folder: Path, about: dict[str, Any], training: dict[str, Any], images: list[dict[str, Any]]
) -> None:
    """``run.json``: what was run, with what, and what became of each image so far."""
    packages = (
        "torch",
        "numpy",
        "numba",
        "scipy",
        "shapely",
        "tiffslide",
        "tifffile",
        "zarr",
        "dask",
    )
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    with suppress(StorageError):  # whoever finds the disk full is the image, and says so
        write_json(
            folder / "run.json",
            {**about, "versions": versions, "training": training, "images": images},
        )


def write_outcome(output: Path, image: str, result: dict[str, Any]) -> None:
    """What became of one image, the last time that it was in a run."""
    with suppress(StorageError):
        write_json(output / "report" / "outcomes" / f"{image}.json", result)

"""The finished tiles of an image: what lets a run that was stopped resume.

A tile is a parquet file of its nuclei, with its uncertainty grid in the header.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from patchcl_qupath.datatypes import (
    Nuclei,
    Polygons,
    Tile,
    UncertaintyGrid,
    name_of_nucleus,
)
from patchcl_qupath.errors import StorageError, is_damage
from patchcl_qupath.storage.files import (
    digest,
    is_whole_parquet,
    readable,
    remove_folder,
    write_bytes,
    write_json,
    writing,
)
from patchcl_qupath.storage.parquet import (
    CELL,
    NUCLEUS,
    Table,
    encoding,
    from_table,
    grid_columns,
    grid_of_columns,
    outer_points_of,
    parquet_source,
    polygons_of,
    read_table,
    to_table,
)

Measurements = dict[str, NDArray[np.float32]]  # by name: (N,)
_GRID = "survey"  # of a file's header
_PLAN = "plan.json"
_LEFT_OUT = "left-out"  # a folder, with an empty file for each tile
_CODEC = "lz4"  # takes .7 of the time of zstd, .65 to read again; files have 1.3 of the size


@dataclass(frozen=True)
class TileStore:
    """The finished tiles of one image in one run: a folder of parquet files and its plan.

    Cells of a tile depend on nuclei of the tiles near it: those that failed are ``left_out``.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path, plan: dict[str, Any]) -> TileStore:
        """Open for ``plan``, all that the content of a tile depends on; drop tiles of another."""
        plan_file = folder / _PLAN
        if not _is_same_plan(plan_file, plan):
            remove_folder(folder)  # all of it: a tile that stays would count as finished
            with writing(folder):
                (folder / "tiles").mkdir(parents=True, exist_ok=True)
            write_json(plan_file, plan)
        return cls(folder)

    def remove(self, tiles: Iterable[Tile]) -> None:
        """Remove tiles, as if they had never been finished. Raises StorageError."""
        for tile in tiles:
            with writing(self.folder):
                self.path(tile).unlink(missing_ok=True)

    def leave_out(self, tile: Tile) -> None:
        """Note that tiles near this one are finished without it. Raises StorageError."""
        write_bytes(self.folder / _LEFT_OUT / tile.name, b"")

    def left_out(self, tiles: Sequence[Tile]) -> list[Tile]:
        """The tiles that were left out, in their order. Raises StorageError."""
        with self._reading():
            names = {path.name for path in (self.folder / _LEFT_OUT).glob("*")}
        return [tile for tile in tiles if tile.name in names]

    def leave_none_out(self) -> None:
        """Note that no tile is finished without another. Raises StorageError."""
        remove_folder(self.folder / _LEFT_OUT)

    @staticmethod
    def encode(nuclei: Nuclei | Table, uncertainty: UncertaintyGrid) -> bytes:
        """A tile, or its table, as the content of its file."""
        table = to_table(nuclei) if isinstance(nuclei, Nuclei) else nuclei
        columns = {name: values.tolist() for name, values in grid_columns(uncertainty).items()}
        grid = json.dumps([uncertainty.bin_size, columns]).encode()
        header = table.schema.metadata | {_GRID.encode(): grid}
        sink = pa.BufferOutputStream()
        table = table.replace_schema_metadata(header)
        pq.write_table(table, sink, **encoding(table.column_names, _CODEC))
        return bytes(sink.getvalue())

    @staticmethod
    def decode(content: bytes) -> tuple[Table, UncertaintyGrid]:
        """The inverse of ``encode``, of tables."""
        table = read_table(pa.BufferReader(content))
        return table, _grid_of(table.schema.metadata)

    def content(self, tile: Tile) -> bytes:
        """A finished tile, encoded; one that is damaged as it is. Raises StorageError."""
        with self._reading(tile):
            return self.path(tile).read_bytes()

    def check(self, tile: Tile) -> None:
        """Raise StorageError for a finished tile that is damaged."""
        self._table(tile)

    def path(self, tile: Tile) -> Path:
        """The file of a finished tile."""
        return self.folder / "tiles" / f"{tile.name}.parquet"

    def write(self, tile: Tile, content: bytes) -> None:
        """Keep an encoded tile; from now on it is finished."""
        # Waiting for the disk, tile by tile, took half of the time of 16 cores.
        write_bytes(self.path(tile), content, durable=False)

    def finished(self, tiles: Sequence[Tile]) -> tuple[Tile, ...]:
        """The tiles that are finished, in their order. Raises StorageError."""
        with self._reading():
            files = (self.folder / "tiles").glob("*.parquet")
            names = {path.name for path in files if is_whole_parquet(path)}
        return tuple(tile for tile in tiles if self.path(tile).name in names)

    def missing(self, tiles: Sequence[Tile]) -> list[Tile]:
        """The tiles that are not."""
        finished = set(self.finished(tiles))
        return [tile for tile in tiles if tile not in finished]

    def count(self, tiles: Sequence[Tile]) -> int:
        """How many nuclei finished tiles hold together, without reading them."""
        return sum(map(self._count, tiles))

    def nuclei(self, tiles: Sequence[Tile]) -> Iterator[Nuclei]:
        """The nuclei of finished tiles, one tile after the other, in the tiles' order."""
        return map(from_table, self.tables(tiles))

    def tables(self, tiles: Sequence[Tile]) -> Iterator[Table]:
        """The same as tables."""
        return map(self._table, tiles)

    def points(self, tile: Tile) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The points of a tile's nuclei, in flat arrays as of ``outer_points_of``.

        Raises StorageError.
        """
        return outer_points_of(self._table(tile, [NUCLEUS])[NUCLEUS])

    def contours(self, tiles: Sequence[Tile], of_cells: bool = False) -> Iterator[Polygons]:
        """Their contours alone, several times as fast; with ``of_cells`` those of their cells.

        There is none of a tile without cells.
        """
        column = CELL if of_cells else NUCLEUS
        for tile in tiles:
            if of_cells and column not in self._schema(tile).names:
                yield np.empty(0, dtype=object)
            else:
                yield polygons_of(self._table(tile, [column]), column)

    def measurements(self, tiles: Sequence[Tile], names: Sequence[str]) -> Iterator[Measurements]:
        """Some of their measurements alone, those of nuclei also where these have cells."""
        for tile in tiles:
            there = self._schema(tile).names
            columns = {name: name_of_nucleus(name, there) for name in names}
            table = self._table(tile, [*columns.values()])
            yield {name: table[column].to_numpy() for name, column in columns.items()}

    def uncertainty_grids(self, tiles: Sequence[Tile]) -> Iterator[UncertaintyGrid]:
        """Their uncertainty grids, without reading the nuclei."""
        for tile in tiles:
            yield _grid_of(self._schema(tile).metadata)

    def _count(self, tile: Tile) -> int:
        with self._reading(tile):
            return int(pq.read_metadata(self._source(tile)).num_rows)

    def _schema(self, tile: Tile) -> pa.Schema:
        with self._reading(tile):
            return pq.read_schema(self._source(tile))

    def _table(self, tile: Tile, columns: list[str] | None = None) -> Table:
        with self._reading(tile):
            return read_table(self._source(tile), columns)

    @contextmanager
    def _reading(self, tile: Tile | None = None) -> Iterator[None]:
        """Raise StorageError where finished tiles cannot be read.

        A ``tile`` that is damaged is removed: it would be so in each run.
        """
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            if tile and is_damage(error) and not isinstance(error, pa.ArrowCancelled):
                with suppress(OSError):
                    self.path(tile).unlink()
            reason = readable(str(error))
            raise StorageError(
                f"finished tiles in {self.folder} cannot be read ({reason}): run again"
            ) from error

    def _source(self, tile: Tile) -> Path | io.BytesIO:
        return parquet_source(self.path(tile))


def _is_same_plan(path: Path, plan: dict[str, Any]) -> bool:
    """Whether the plan in a file is this one. Raises StorageError for a file that cannot be read.

    Another program may have it open, or a network folder be gone for a moment: that is no reason
    to begin again.
    """
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # missing, or damaged
        return False
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read ({readable(str(error))}): run again when it can be; "
            "finished tiles are kept"
        ) from error
    if isinstance(found, dict) and "sample" not in found:  # of an earlier version
        plan = {name: value for name, value in plan.items() if name != "sample"}
    return digest(found) == digest(plan)


def _grid_of(header: dict[bytes, bytes]) -> UncertaintyGrid:
    """The uncertainty grid in the header of a file."""
    bin_size, columns = json.loads(header[_GRID.encode()])
    return grid_of_columns(bin_size, columns)

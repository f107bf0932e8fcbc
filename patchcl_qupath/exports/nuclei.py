"""The table of nuclei: one row each, columns named as in QuPath's measurement tables.

QuPath 0.5 and 0.6 name the columns so (``ObservableMeasurementTableData``); the centroid in px is
added. Nuclei are read a batch at a time, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from patchcl_qupath.datatypes import centroids_of
from patchcl_qupath.exports.images import ExportedImage, damaged
from patchcl_qupath.storage import parquet
from patchcl_qupath.storage.parquet import (
    CELL,
    CLASSIFICATION,
    NOT_MEASURED,
    NUCLEUS,
    geo_metadata,
    polygons_of,
)

TEXTS = ("Image", "Object ID", "Object type", "Name", "Classification", "Parent", "ROI")
CORE = "TMA core"  # beside Parent, where an image has a TMA grid
CENTROIDS = ("Centroid X µm", "Centroid Y µm", "Centroid X px", "Centroid Y px")
_DECIMALS = 3  # of centroids


@dataclass(frozen=True, kw_only=True)
class NucleiTable:
    """The table of the nuclei of images; measurements that an image does not have are empty.

    ``measurements`` are those of all images, in the order in which they come. ``geometry``: with
    the contour of each nucleus, or of its cell, as WKB in px at level 0 of its image.
    """

    images: tuple[ExportedImage, ...]
    measurements: tuple[str, ...]
    has_cores: bool
    geometry: bool = False

    @classmethod
    def of(cls, images: Iterable[ExportedImage], *, geometry: bool = False) -> NucleiTable:
        """The table of some images."""
        images = tuple(images)
        names = dict.fromkeys(
            image.shown(name) for image in images for name in measurement_names(image)
        )
        return cls(
            images=images,
            measurements=tuple(names),
            has_cores=any(image.has_cores for image in images),
            geometry=geometry,
        )

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        texts = list(TEXTS)
        if self.has_cores:
            texts.insert(texts.index("Parent"), CORE)
        fields = [(name, pa.string()) for name in texts]
        fields += [(name, pa.float64()) for name in CENTROIDS]
        fields += [(name, pa.float32()) for name in self.measurements]
        if not self.geometry:
            return pa.schema(fields)
        return pa.schema([*fields, (NUCLEUS, pa.binary())], metadata=geo_metadata([NUCLEUS]))

    def batches(self) -> Iterator[pa.Table]:
        """The rows, some at a time, image by image."""
        schema = self.schema
        for image in self.images:
            for batch in read_batches(image):
                named = batch.rename_columns([*map(image.shown, batch.column_names)])
                yield _rows(image, named, schema)


def measurement_names(image: ExportedImage) -> list[str]:
    """The names of the measurements of an image's nuclei, as on disk."""
    return [name for name in image.columns if name not in NOT_MEASURED]


def read_batches(image: ExportedImage, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The nuclei of an image as they are on disk, some at a time: all columns, or some.

    Raises ImageError, too, where they were replaced meanwhile.
    """
    with _reading(image):
        yield from parquet.read_batches(image.nuclei, columns)
    image.check_current()


@contextmanager
def _reading(image: ExportedImage) -> Iterator[None]:
    """Raise ImageError, with advice, where a file of nuclei cannot be read."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise damaged(image, image.nuclei, error) from error


def classes(image: ExportedImage, batch: pa.Table) -> pa.Array:
    """The QuPath class (N,) of each nucleus."""
    if CLASSIFICATION in batch.column_names:
        return batch[CLASSIFICATION].cast(pa.string()).combine_chunks()
    return _constant(image.class_name, len(batch))


def _rows(image: ExportedImage, batch: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows of nuclei, as in a file, in the columns of a table."""
    count = len(batch)
    nuclei = polygons_of(batch)
    drawn = CELL if image.has_cells else NUCLEUS  # the ROI of the object in QuPath
    shown = nuclei if drawn == NUCLEUS else polygons_of(batch, drawn)
    px = centroids_of(shown)
    values = dict(zip(CENTROIDS, np.round(_in_um_and_px(px, image.mpp), _DECIMALS), strict=True))
    places = image.places(px if drawn == NUCLEUS else centroids_of(nuclei))
    columns: dict[str, pa.Array | NDArray[np.float64]] = {
        "Image": _constant(image.name_in_tables, count),
        "Object ID": batch["id"],
        "Object type": _constant(image.object_type, count),
        "Classification": classes(image, batch),
        CORE: places.cores,
        "Parent": places.parents,
        "ROI": _constant("Polygon", count),
        **values,
        NUCLEUS: batch[drawn],
    }
    found = [columns.get(field.name, _measured(batch, field)) for field in schema]
    return pa.table(found, schema=schema)


def _measured(batch: pa.Table, field: pa.Field) -> pa.Array:
    """A measurement (N,), empty where it is no number, as in tables of QuPath."""
    if field.name in batch.column_names and field.name not in NOT_MEASURED:
        values = batch[field.name].combine_chunks()
        return pc.if_else(pc.is_finite(values), values, pa.scalar(None, values.type))
    return pa.nulls(len(batch), field.type)


def _in_um_and_px(px: NDArray[np.float64], mpp: Sequence[float]) -> NDArray[np.float64]:
    """Points (N, 2) in px as the columns (4, N) x and y in µm, x and y in px."""
    return np.concatenate([px.T * np.reshape(mpp, (2, 1)), px.T])


def _constant(text: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(text), count)

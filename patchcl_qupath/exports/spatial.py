"""Nuclei in SpatialData and AnnData, which the extra ``spatial`` installs.

Of all images together, in memory: one row each for a nucleus, with its measurements as variables.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale, Translation

from patchcl_qupath import __version__
from patchcl_qupath.exports.images import ExportedImage
from patchcl_qupath.exports.nuclei import (
    CENTROIDS,
    NucleiTable,
    read_batches,
)
from patchcl_qupath.storage.files import atomic_write
from patchcl_qupath.storage.parquet import CELL, NUCLEUS, polygons_of

_REGION, _INSTANCE = "region", "object_id"  # columns by which SpatialData finds a row's shape


def write_anndata(path: Path, images: Sequence[ExportedImage]) -> int:
    """Write an AnnData of images; returns the number of nuclei. Raises StorageError.

    ``X`` are the measurements; ``obs`` the texts of the table of nuclei, as ``object_id``;
    ``obsm["spatial"]`` the centroids in px at level 0 of each image, ``obsm["spatial_um"]`` in µm.
    ``uns["patchcl"]["origin"]`` is where an image begins in its file, in px: its bounds there.
    """
    data = _anndata(images)
    with atomic_write(path) as temporary:
        data.write_h5ad(temporary)
    return int(data.n_obs)


def write_spatialdata(path: Path, images: Sequence[ExportedImage]) -> int:
    """Write a SpatialData of images; returns the number of nuclei. Raises StorageError.

    Each image has shapes of its nuclei, ``NAME_nuclei``, and of its cells, ``NAME_cells``, if it
    has some. They are in px at level 0, which is the coordinate system ``NAME``; ``NAME_um`` is in
    µm. The table ``nuclei`` annotates the shapes of the nuclei.
    """
    shapes: dict[str, Any] = {}
    regions = []
    for image in images:
        name = image.element_name
        drawn = {"nuclei": NUCLEUS} | ({"cells": CELL} if CELL in image.columns else {})
        for kind, column in drawn.items():
            frame = _shapes(image, column)
            if len(frame):
                shapes[f"{name}_{kind}"] = _with_transformations(frame, name, image)
        regions.append(f"{name}_nuclei")
    tables = _tables(images, regions)
    data = SpatialData(shapes=shapes, tables=tables)
    with atomic_write(path) as temporary:
        data.write(temporary)
    return sum(len(table) for table in tables.values())


def _anndata(images: Sequence[ExportedImage]) -> anndata.AnnData:
    """The table of the nuclei of images."""
    table = NucleiTable.of(images)
    rows = pa.concat_tables([table.schema.empty_table(), *table.batches()])
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    observed = rows.select([name for name in texts if name != "Name"]).to_pandas()
    observed.columns = [name.lower().replace(" ", "_") for name in observed]
    observed.index = pd.Index(observed[_INSTANCE].to_numpy(dtype=str))
    for name in observed.columns.drop(_INSTANCE):
        observed[name] = observed[name].astype("category")
    x_um, y_um, x, y = (rows[name].to_numpy() for name in CENTROIDS)
    measured = [rows[name].to_numpy() for name in table.measurements]
    values = np.stack(measured, axis=1) if measured else np.empty((len(rows), 0), np.float32)
    return anndata.AnnData(
        X=values.astype(np.float32),
        obs=observed,
        var=pd.DataFrame(index=pd.Index(list(table.measurements), dtype=str)),
        obsm={"spatial": np.stack([x, y], axis=1), "spatial_um": np.stack([x_um, y_um], axis=1)},
        uns={
            "patchcl": {
                "version": __version__,
                "mpp": {image.id: np.asarray(image.mpp) for image in images},
                "origin": {
                    image.id: np.asarray(image.result.slide.origin)
                    for image in images
                    if image.result.slide.origin is not None
                },
            }
        },
    )


def _shapes(image: ExportedImage, column: str) -> geopandas.GeoDataFrame:
    """The contours of one kind, by the ids of their nuclei."""
    batches = list(read_batches(image))
    drawn = [polygons_of(batch, column) for batch in batches]
    ids = [name for batch in batches for name in batch["id"].to_pylist()]
    frame = geopandas.GeoDataFrame(
        geometry=np.concatenate([np.empty(0, object), *drawn]), index=pd.Index(ids, dtype=str)
    )
    return frame[~frame.geometry.isna()]


def _with_transformations(
    frame: geopandas.GeoDataFrame, name: str, image: ExportedImage
) -> geopandas.GeoDataFrame:
    """Shapes in px, with transformations to the image, to µm and, if it differs, to the file."""
    to = {name: Identity(), f"{name}_um": Scale(list(image.mpp), axes=("x", "y"))}
    origin = image.result.slide.origin or (0, 0)
    if origin != (0, 0):
        to[f"{name}_file"] = Translation(list(origin), axes=("x", "y"))
    return ShapesModel.parse(frame, transformations=to)


def _tables(images: Sequence[ExportedImage], regions: Sequence[str]) -> dict[str, Any]:
    """The table of nuclei, with the shapes that its rows annotate; none without a nucleus."""
    data = _anndata(images)
    if not data.n_obs:
        return {}
    counts = [image.result.nuclei for image in images]
    data.obs[_REGION] = pd.Categorical(np.repeat(regions, counts))
    present = list(data.obs[_REGION].unique())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = TableModel.parse(data, region=present, region_key=_REGION, instance_key=_INSTANCE)
    return {"nuclei": table}

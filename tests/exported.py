"""A project of made-up nuclei, regions and TMA cores whose tables are worked out by hand.

Nuclei are squares of 10 px, in slides of (0.5, 0.25) µm/px; regions are squares that hold them.
"""

from __future__ import annotations

import csv
import json
import uuid
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from results import result_of

from patchcl_qupath.answers.positivity import Positivity
from patchcl_qupath.answers.regions import Regions
from patchcl_qupath.answers.summary import Extent, summarise
from patchcl_qupath.config import Config, ResultConfig, to_dict
from patchcl_qupath.datatypes import DrawnRegion, Nuclei
from patchcl_qupath.project import NewImage, Project, init_project, open_project
from patchcl_qupath.storage.records import (
    PositivityRecord,
    ResultRecord,
    SlideProvenance,
    read_record,
    write_record,
)

MPP = (0.5, 0.25)
PLACES = [(100, 100), (140, 100), (300, 100), (310, 900), (700, 700)]  # centroids, px
AREAS = [10.0, 20.0, 30.0, 40.0, 50.0]
DAB = [0.1, 0.3, 0.5, 0.7, 0.0]  # with thresholds 0.2, 0.4, 0.6: Negative, 1+, 2+, 3+, Negative
DRAWN = (
    DrawnRegion(
        geometry=shapely.box(0, 0, 400, 1000), id=str(uuid.UUID(int=1)), name="left, 1",
        class_name="Tumor",
    ),
    DrawnRegion(
        geometry=shapely.box(80, 80, 200, 200), id=str(uuid.UUID(int=2)), class_name="Stroma"
    ),
    DrawnRegion(
        geometry=shapely.box(50, 50, 320, 320), id=str(uuid.UUID(int=3)), name="A-1",
        is_core=True, case_id="0012",
    ),
)  # fmt: skip


def make_project(folder: Path, names: list[str], size: tuple[int, int] = (1000, 1000)) -> Project:
    """A project of images whose files do not matter."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [NewImage(folder / f"{number}.png", [size], MPP) for number in range(len(names))]
    path = init_project(folder / "project", images)
    content = json.loads(path.read_text("utf-8"))
    for image, name in zip(content["images"], names, strict=True):
        image["imageName"] = name
    path.write_text(json.dumps(content), "utf-8")
    return open_project(path, "files")


def nuclei(image: str, count: int = 5, **more: list[float]) -> Nuclei:
    """The first nuclei of an image; ``more`` are further measurements, by name."""
    columns = {"Area µm^2": AREAS, "DAB: Mean": DAB, **more}
    return Nuclei(
        np.array([shapely.box(x - 5, y - 5, x + 5, y + 5) for x, y in PLACES[:count]], object),
        {name: np.array(values[:count], np.float32) for name, values in columns.items()},
        np.array([id_of(image, k) for k in range(count)], dtype="U36"),
    )


def id_of(image: str, number: int) -> str:
    """The id of a nucleus."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{image} {number}"))


def write(
    project: Project,
    number: int,
    found: Nuclei,
    *,
    thresholds: tuple[float, ...] = (),
    drawn: tuple[DrawnRegion, ...] = (),
    **changes: Any,
) -> None:
    """Write the nuclei of an image, as a run with ``--positive`` and ``--summarise`` does."""
    entry = project.images()[number]
    result = msgspec.structs.replace(
        result_of(len(found)),
        image=entry.name,
        slide=SlideProvenance(file=result_of(0).slide.file, mpp=MPP),
        **changes,
    )
    if thresholds:
        record = PositivityRecord(measurement="DAB: Mean", thresholds=thresholds)
        positivity = Positivity(record=record, base_class="Nucleus")
        (found,) = positivity.apply([found])
        result = msgspec.structs.replace(result, positivity=record)
    if thresholds or drawn:
        regions = Regions(drawn)
        extents = [
            Extent(
                area_mm2=g.area * MPP[0] * MPP[1] / 2e6,  # half of it was segmented
                tissue_mm2=0.002,
                x=g.centroid.x,
                y=g.centroid.y,
                area_px=g.area,
                bounds=g.bounds,
            )
            for g in regions.geometries
        ]
        summaries = summarise(
            [found],
            image=entry.name,
            extents=[Extent(area_mm2=0.125, tissue_mm2=0.01), *extents],
            regions=regions,
            class_names=positivity.class_names if thresholds else (),
        )
        result = msgspec.structs.replace(
            result, summaries=summaries, config=to_dict(Config(result=ResultConfig()))
        )
        export_drawn(project.layout.regions(entry.id), drawn)
    project.write(entry, [found], ResultConfig(), result)


def export_drawn(path: Path, drawn: tuple[DrawnRegion, ...]) -> None:
    """Write annotations and cores as groovy/export_regions.groovy exports them."""
    features = []
    for region in drawn:
        kind = "tmaCore" if region.is_core else "annotation"
        properties: dict[str, Any] = {"objectType": kind, "name": region.name or None}
        if region.class_name:
            properties["classification"] = {"name": region.class_name}
        if region.is_core:
            properties |= {"isMissing": False, "metadata": {"Case ID": region.case_id}}
        geometry = json.loads(shapely.to_geojson(region.geometry))
        features.append(
            {"type": "Feature", "id": region.id, "geometry": geometry, "properties": properties}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), "utf-8")


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, by the names of its columns."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def grow(project: Project, number: int, um: float, down: float = 0) -> None:
    """Give the nuclei of an image cells, as ``--expand`` does: boxes that reach ``um`` further.

    They are moved ``down`` by so many px, which real ones are not.
    """
    layout, entry = project.layout, project.images()[number]
    table = pq.read_table(layout.nuclei(entry.id))
    x, y = um / MPP[0], um / MPP[1]
    cells = [
        shapely.box(left - x, top - y + down, right + x, bottom + y + down)
        for left, top, right, bottom in shapely.bounds(
            shapely.from_wkb(table["geometry"].to_pylist())
        )
    ]
    column = pa.array(shapely.to_wkb(cells).tolist(), pa.binary())
    pq.write_table(table.append_column("cell", column), layout.nuclei(entry.id))
    result = read_record(layout.result(entry.id), ResultRecord)
    assert result is not None
    write_record(layout.result(entry.id), msgspec.structs.replace(result, object_type="cell"))

"""Properties of project files and GeoJSON, for random examples: an answer, or one line."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import numpy as np
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.errors import PatchCLError
from patchcl_qupath.evaluation.ground_truth import read_ground_truth
from patchcl_qupath.project import open_project
from patchcl_qupath.project.arguments import parse_arguments
from patchcl_qupath.project.create import to_uri
from patchcl_qupath.project.drawn import read_regions
from patchcl_qupath.project.locate import Locator
from patchcl_qupath.project.qpproj import path_of_uri
from patchcl_qupath.storage.files import readable
from patchcl_qupath.storage.geojson import read_objects

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=8),
    st.sampled_from(
        ["uri", "pyramidize", "rotated", "file:/E:/a.svs", "µm", "--series", "Feature"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
names = st.text("ab#%ü é&;+~", min_size=1, max_size=6).filter(lambda name: name.strip(" .") == name)


def records(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """JSON objects with some of these fields, now and then with any value in their place."""
    return st.fixed_dictionaries({}, optional={k: v | values for k, v in fields.items()}) | values


sides = records(value=st.floats() | st.integers(), unit=st.sampled_from(["µm", "px"]))
metadata = records(
    width=st.integers(-9, 9999),
    height=st.integers(-9, 9999),
    isRGB=st.booleans(),
    pixelCalibration=records(pixelWidth=sides, pixelHeight=sides),
)
inner_builders = records(
    builderType=st.sampled_from(["uri", "pyramidize", "rotated"]),
    uri=st.sampled_from(["file:/E:/a/x.svs", "file:/E:/b/x.svs", "http://[", "omero:iid=1", ""]),
    args=st.lists(st.sampled_from(["--series", "-s", "1", "-n=x", "--no-crop", "--rotate", ""])),
    metadata=metadata,
)
builders = records(builderType=st.just("pyramidize"), builder=inner_builders) | inner_builders
entries = records(
    entryID=st.integers(-1, 4), imageName=st.text(st.characters()), serverBuilder=builders
)
projects = records(
    uri=st.sampled_from(["file:/E:/p/q.qpproj", "", "x:["]), images=st.lists(entries)
)


def answer_of(call: Callable[[], Any]) -> Any:
    """What a call returns; None if it raises an error for people, which is one line."""
    message = ""
    try:
        return call()
    except PatchCLError as error:
        message = str(error)
    assert is_line(message)
    return None


def is_line(text: str) -> bool:
    return len(text.splitlines()) == 1 and text == readable(text)


@given(content=projects)
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
def test_any_project_is_read_or_refused(content: Any) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "a").mkdir()
        (folder / "a" / "x.svs").touch()
        (folder / "project.qpproj").write_text(json.dumps(content))
        images = answer_of(lambda: open_project(folder, backend="files").images())
        if images is None:
            return
        assert len({image.id for image in images}) == len(images) == len(content["images"])
        for image in images:
            assert Path(image.id).name == image.id
            assert image.name == readable(image.name)
            assert image.problem is None or is_line(image.problem)
            if image.problem is None:
                assert image.path == folder / "a" / "x.svs"
                assert image.series in (None, 1)
                assert image.mpp is None or all(0 < side < np.inf for side in image.mpp)


@given(
    args=st.lists(st.sampled_from(["--series", "--series=2", "-s", "-s3", "1", "--no-crop", "x"]))
)
def test_arguments_are_understood_or_named(args: list[str]) -> None:
    parsed = parse_arguments(args)
    assert parsed.series is None or str(parsed.series) in "".join(args)
    assert parsed.crop == ("--no-crop" not in args) or parsed.problems
    assert parsed.problems or "x" not in args
    assert all(any(arg in problem for arg in args) for problem in parsed.problems)


@given(parts=st.lists(names, min_size=1, max_size=4))
def test_uris_are_read_as_they_are_written(parts: list[str]) -> None:
    path = Path("/", *parts)
    assert path_of_uri(to_uri(path)) == PurePath(os.path.abspath(path))  # noqa: PTH100


@given(
    files=st.sets(st.tuples(st.sampled_from("pq"), st.sampled_from("ab")), max_size=4),
    stored=st.sets(st.tuples(st.sampled_from("pq"), st.sampled_from("ab")), min_size=1, max_size=4),
    near=st.booleans(),
)
def test_no_file_is_two_images(
    files: set[tuple[str, str]], stored: set[tuple[str, str]], near: bool
) -> None:
    """Whatever is left of a folder, each file is one image's at most, and the right one's."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in files:
            folder.joinpath(*file).mkdir(parents=True)
            folder.joinpath(*file, "x.svs").touch()
        if near:
            (folder / "x.svs").touch()
        paths = [PureWindowsPath("E:/", *each, "x.svs") for each in sorted(stored)]
        locator = Locator(folder=folder, saved=None, stored=paths)
        found = [locator.locate(path).path for path in paths]
        there = [path for path in found if path is not None]
        assert len(set(there)) == len(there)
        for each, path in zip(sorted(stored), found, strict=True):
            if each in files:
                assert path == folder.joinpath(*each, "x.svs")


# ---------------------------------------------------------------- GeoJSON

corners = st.integers(0, 40).map(float)
boxes = st.builds(
    lambda x, y, w, h: shapely.box(x, y, x + w, y + h),
    corners,
    corners,
    st.integers(1, 9),
    st.integers(1, 9),
)


def geometry(area: shapely.Geometry) -> Any:
    return json.loads(shapely.to_geojson(area))


@st.composite
def documents(draw: st.DrawFn, areas: list[shapely.Geometry]) -> Any:
    """A document of these areas, in their order, nested and wrapped at random."""
    if len(areas) == 1 and draw(st.booleans()):
        feature = {"type": "Feature", "geometry": geometry(areas[0]), "properties": {}}
        return draw(st.sampled_from([feature, geometry(areas[0])]))
    kind = draw(st.sampled_from(["list", "features", "geometries", "children", "root"]))
    if kind == "geometries":
        return {"type": "GeometryCollection", "geometries": [*map(geometry, areas)]}
    cut = draw(st.integers(0, len(areas)))
    parts = [part for part in (areas[:cut], areas[cut:]) if part]
    if len(parts) < 2:
        parts = [[area] for area in areas]
    items = (
        [draw(documents(part)) for part in parts]
        if len(parts) > 1
        else [{"type": "Feature", "geometry": geometry(area)} for area in areas]
    )
    if kind == "list":
        return items
    if kind == "features":
        return {"type": "FeatureCollection", "features": items}
    feature = {"type": "Feature", "geometry": None, "properties": {"childObjects": items}}
    return feature if kind == "children" else {"root": feature}


@given(data=st.data(), areas=st.lists(boxes, min_size=1, max_size=6))
def test_areas_are_found_wherever_they_are(data: st.DataObject, areas: list[Any]) -> None:
    document = data.draw(documents(areas))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.geojson"
        file.write_text(json.dumps(document))
        found = read_objects(file).areas
    assert len(found) == len(areas)
    assert all(one.equals(other) for one, other in zip(found, areas, strict=True))


features = records(
    type=st.sampled_from(["Feature", "FeatureCollection", "Polygon", "GeometryCollection"]),
    geometry=boxes.map(geometry),
    properties=records(
        classification=st.text(max_size=3), childObjects=st.lists(values, max_size=2)
    ),
    features=st.lists(values, max_size=2),
)


@given(content=features | st.lists(features, max_size=3))
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
def test_any_geojson_is_read_or_refused(content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.geojson"
        file.write_text(json.dumps(content))
        entry = ImageEntry("1", "a.svs", file, size=(60, 40))
        truth = answer_of(lambda: read_ground_truth([file], entry))
        if truth is not None:
            assert all(area.is_valid and area.area > 0 for area in truth.polygons)
        answer_of(lambda: read_regions(file, "a.svs", ["Tumor"]))

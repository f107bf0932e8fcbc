"""Nuclei in the libraries of spatial omics: in the right place, with the right measurements.

The libraries are in the extra ``spatial``; without them, the tests are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import shapely
from click.testing import CliRunner
from exported import DRAWN, MPP, PLACES, grow, id_of, make_project, nuclei, write
from scipy import sparse

from patchcl_qupath import exports
from patchcl_qupath.cli import main
from patchcl_qupath.datatypes import Nuclei
from patchcl_qupath.exports.images import ExportedImage
from patchcl_qupath.project import Project
from patchcl_qupath.storage.records import ResultRecord, read_record, write_record

pytestmark = pytest.mark.filterwarnings("ignore")  # of other programs


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Two images with nuclei, and one without."""
    found = make_project(tmp_path / "made", ["a, 1.svs", "b.svs", "empty.svs"])
    write(found, 0, nuclei("a"), thresholds=(0.2,), drawn=DRAWN)
    write(found, 1, nuclei("b", 2))
    write(found, 2, Nuclei(np.empty(0, dtype=object)))
    return found


def exported(project: Project, *arguments: Any) -> list[Path]:
    """The files that an export wrote."""
    words = ["export", str(project.path), *map(str, arguments), "--json"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return [Path(file["path"]) for file in json.loads(done.stdout)["files"]]


def test_without_the_libraries_a_line_says_what_to_install(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "anndata", None)
    monkeypatch.delitem(__import__("sys").modules, "patchcl_qupath.exports.spatial", raising=False)
    done = CliRunner().invoke(main, ["export", str(project.path), "--to", "spatialdata"])
    assert done.exit_code == 2
    assert "needs anndata: pip install 'patchcl-qupath[spatial]'" in done.stderr


def test_shapes_of_spatialdata_are_in_px_and_um(project: Project) -> None:
    spatialdata = pytest.importorskip("spatialdata")
    (path,) = exported(project, "--to", "spatialdata")
    assert path.name == "nuclei.zarr"
    data = spatialdata.read_zarr(path)
    assert sorted(data.shapes) == ["a__1_nuclei", "b_nuclei"]
    assert sorted(data.coordinate_systems) == ["a__1", "a__1_um", "b", "b_um"]
    shapes = data["a__1_nuclei"]
    assert list(shapes.index) == [id_of("a", k) for k in range(5)]
    for system, scale in {"a__1": (1, 1), "a__1_um": MPP}.items():
        moved = spatialdata.transform(shapes, to_coordinate_system=system).geometry
        middles = np.stack([moved.centroid.x, moved.centroid.y], axis=1)
        np.testing.assert_allclose(middles, np.array(PLACES) * scale)
    assert moved.area.tolist() == [100 * 0.5 * 0.25] * 5

    table = data["nuclei"]
    assert table.obs["region"].tolist() == ["a__1_nuclei"] * 5 + ["b_nuclei"] * 2
    assert table.obs["classification"].tolist()[:2] == ["Nucleus: Negative", "Nucleus: Positive"]
    areas = spatialdata.get_values(
        "Area µm^2", sdata=data, element_name="b_nuclei", table_name="nuclei"
    )
    assert areas["Area µm^2"].to_dict() == {id_of("b", 0): 10, id_of("b", 1): 20}


def test_each_image_has_shapes_of_its_own_name(tmp_path: Path) -> None:
    """Also where its name is that of another image with its id."""
    spatialdata = pytest.importorskip("spatialdata")
    project = make_project(tmp_path / "made", ["ä.svs", "ö.svs", "image-1.svs"])
    for number in range(3):
        write(project, number, nuclei("abc"[number], 1 + number))
    (path,) = exported(project, "--to", "spatialdata")
    shapes = spatialdata.read_zarr(path).shapes
    assert sorted(map(len, shapes.values())) == [1, 2, 3]


def test_no_image_has_the_frame_of_another_in_um(tmp_path: Path) -> None:
    """a_um is the coordinate system of image a in µm, and was that of image a_um in px, too."""
    spatialdata = pytest.importorskip("spatialdata")
    project = make_project(tmp_path / "made", ["a.svs", "a_um.svs", "a_UM_um.svs", "b_um.svs"])
    for number in range(4):
        write(project, number, nuclei("abcd"[number], 1 + number))
    (path,) = exported(project, "--to", "spatialdata")
    data = spatialdata.read_zarr(path)
    assert len(data.coordinate_systems) == 8
    for system in data.coordinate_systems:
        assert len(data.filter_by_coordinate_system(system).shapes) == 1
    assert {"b_um", "b_um_um"} < set(data.coordinate_systems)


def test_a_slide_that_begins_within_its_file_has_the_frame_of_that_too(project: Project) -> None:
    """As an MRXS, of which QuPath shows what was scanned alone."""
    spatialdata, anndata = pytest.importorskip("spatialdata"), pytest.importorskip("anndata")
    path = project.layout.result(project.images()[1].id)
    record = read_record(path, ResultRecord)
    assert record is not None
    slide = msgspec.structs.replace(record.slide, origin=(300, 40))
    write_record(path, msgspec.structs.replace(record, slide=slide))
    data = spatialdata.read_zarr(*exported(project, "--to", "spatialdata"))
    assert sorted(data.coordinate_systems) == ["a__1", "a__1_um", "b", "b_file", "b_um"]
    middles = spatialdata.transform(data["b_nuclei"], to_coordinate_system="b_file").centroid
    assert [*zip(middles.x, middles.y, strict=True)] == [(400, 140), (440, 140)]
    origins = anndata.read_h5ad(*exported(project, "--to", "anndata")).uns["patchcl"]["origin"]
    assert {image: origin.tolist() for image, origin in origins.items()} == {"2": [300, 40]}


def test_cells_are_shapes_of_their_own(project: Project) -> None:
    spatialdata = pytest.importorskip("spatialdata")
    grow(project, 1, um=2)
    (path,) = exported(project, "--to", "spatialdata", "--image", "b.svs")
    data = spatialdata.read_zarr(path)
    assert sorted(data.shapes) == ["b_cells", "b_nuclei"]
    assert list(data["b_cells"].index) == list(data["b_nuclei"].index)
    in_um = spatialdata.transform(data["b_cells"], to_coordinate_system="b_um")
    assert in_um.area.tolist() == pytest.approx([(5 + 4) * (2.5 + 4)] * 2)
    assert data["nuclei"].obs["object_type"].tolist() == ["Cell"] * 2


def test_squidpy_finds_neighbours_in_anndata(project: Project) -> None:
    squidpy, anndata = pytest.importorskip("squidpy"), pytest.importorskip("anndata")
    (path,) = exported(project, "--to", "anndata")
    cells = anndata.read_h5ad(path)
    assert cells.obs_names.tolist() == [id_of("a", k) for k in range(5)] + [
        id_of("b", k) for k in range(2)
    ]
    assert cells.obs["parent"].tolist()[:4] == [*["Annotation (Stroma)"] * 2, "A-1", "left, 1"]
    assert cells.var_names.tolist() == ["Area µm^2", "DAB: Mean"]
    np.testing.assert_array_equal(cells.obsm["spatial"], [*PLACES, *PLACES[:2]])
    np.testing.assert_array_equal(cells.obsm["spatial_um"], cells.obsm["spatial"] * MPP)
    squidpy.gr.spatial_neighbors(
        cells, coord_type="generic", n_neighs=1, spatial_key="spatial_um", library_key="image"
    )
    distances = cells.obsp["spatial_distances"].toarray()
    assert distances[0, 1] == pytest.approx(20)  # 40 px of 0.5 µm
    assert distances[5, 6] == pytest.approx(20)
    assert not distances[:5, 5:].any()  # not from one slide to another
    squidpy.gr.nhood_enrichment(
        cells, cluster_key="classification", n_perms=5, show_progress_bar=False
    )


@pytest.mark.parametrize(("to", "suffix"), [("anndata", ".h5ad"), ("spatialdata", ".zarr")])
def test_a_folder_has_a_file_for_each_image(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, suffix: str
) -> None:
    """As of tables; the libraries are not needed to know which images go into which file."""
    written: dict[Path, list[str]] = {}

    def record(path: Path, images: Sequence[ExportedImage]) -> int:
        written[path] = [image.name for image in images]
        return 7

    writers = SimpleNamespace(write_anndata=record, write_spatialdata=record)
    monkeypatch.setattr(exports, "spatial", writers, raising=False)
    folder = tmp_path / "for-python"
    paths = exported(project, "--to", to, "--output", folder)
    names = {"a, 1": "a, 1.svs", "b": "b.svs", "empty": "empty.svs"}
    assert paths == [folder / f"{stem}{suffix}" for stem in names]
    assert written == {folder / f"{stem}{suffix}": [name] for stem, name in names.items()}

    paths = exported(project, "--to", to, "--output", folder / f"all{suffix}")
    assert paths == [folder / f"all{suffix}"]
    assert written[paths[0]] == [*names.values()]


@pytest.mark.parametrize("item", ["images/he", "shapes/tumour", "tables/genes", "0/0", "notes.txt"])
def test_a_zarr_that_is_no_export_is_not_replaced(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    """A slide, or what a person added to an export, was gone without a word."""
    written: list[Path] = []

    def record(path: Path, _: object) -> int:
        written.append(path)
        return 7

    writers = SimpleNamespace(write_anndata=record, write_spatialdata=record)
    monkeypatch.setattr(exports, "spatial", writers, raising=False)
    store = tmp_path / "slide.ome.zarr"
    earlier = ["zarr.json", "shapes/zarr.json", "shapes/b_nuclei/x", "tables/nuclei/x", "images/.x"]
    for name in earlier:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).touch()
    asked = ["export", str(project.path), "--to", "spatialdata", "--output", str(store)]
    assert CliRunner().invoke(main, asked).exit_code == 0
    assert written == [store]

    (store / item).parent.mkdir(exist_ok=True)
    (store / item).touch()
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 2
    assert f"export of nuclei ({item.removesuffix('/0')}), and would be replaced" in done.stderr
    assert written == [store]


def bins_of_two_um() -> Any:
    """An image of 2 µm bins, as Visium HD has them: centroids in px of the microscope image."""
    anndata = pytest.importorskip("anndata")
    pandas = pytest.importorskip("pandas")
    row, col = np.mgrid[:125, :250]  # 2 µm are 4 px and 8 px
    bins = anndata.AnnData(
        X=sparse.csr_matrix(np.ones((row.size, 1), np.float32)),
        obs=pandas.DataFrame(
            {"array_row": row.ravel(), "array_col": col.ravel(), "in_tissue": 1},
            index=[f"s_002um_{r:05d}_{c:05d}-1" for r, c in zip(row.flat, col.flat, strict=True)],
        ),
    )
    bins.obsm["spatial"] = np.stack([col.ravel() * 4 + 2, row.ravel() * 8 + 4], axis=1)
    bins.var_names = ["gene"]
    return bins


def test_bins_of_visium_hd_are_assigned_to_nuclei(project: Project) -> None:
    """As on the page on spatial omics: each bin whose centre lies in a nucleus is of it."""
    geopandas = pytest.importorskip("geopandas")
    path = exported(project, "--to", "visium-hd", "--image", "b.svs")[0]
    bins = bins_of_two_um()
    frame = geopandas.read_file(path)
    assert frame["cell_id"].tolist() == [1, 2]
    points = shapely.points(bins.obsm["spatial"])
    bin_number, nucleus = shapely.STRtree(points).query(frame.geometry, predicate="contains")[::-1]
    labels = np.zeros(bins.n_obs, dtype=int)
    labels[bin_number] = frame["cell_id"].to_numpy()[nucleus]
    bins.obs["labels_he"] = labels
    # A square of 10 px around (100, 100): columns 24 and 25, and row 12.
    found = bins.obs[bins.obs["labels_he"] == 1]
    assert sorted(zip(found["array_row"], found["array_col"], strict=True)) == [(12, 24), (12, 25)]

    bin2cell = pytest.importorskip("bin2cell")
    bins.uns["spatial"] = {"slide": {"scalefactors": {"spot_diameter_fullres": 6.0}}}
    cells = bin2cell.bin_to_cell(bins, labels_key="labels_he", spatial_keys=["spatial"])
    assert cells.obs_names.astype(int).tolist() == [1, 2]
    assert cells.obs["bin_count"].tolist() == [2, 2]
    assert cells.X.toarray().ravel().tolist() == [2, 2]
    np.testing.assert_allclose(cells.obsm["spatial"], [(100, 100), (140, 100)])

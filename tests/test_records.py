"""Records of version 0.1 are read, and written with the same keys; other files read as None."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from patchcl_qupath.config import RENAMED, TABLES, Config, from_dict, to_dict
from patchcl_qupath.datatypes import CorrectionRoi, FailedTile
from patchcl_qupath.errors import StorageError
from patchcl_qupath.models.model import Model
from patchcl_qupath.models.network import NucleusNetwork
from patchcl_qupath.storage.records import (
    FiguresRecord,
    ImageOutcome,
    ModelRecord,
    PositivityRecord,
    ReceiptRecord,
    Record,
    RemovedRecord,
    ResultRecord,
    RoisRecord,
    RunRecord,
    read_model_record,
    read_record,
    read_result,
    to_plain,
    write_record,
)

FAILED_TILE = {"x": 1024, "y": 0, "width": 1024, "height": 700, "reason": "SlideError: no"}
REGION = {
    "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 0]]]},
    "tissue_mm2": 0.25,
}
# Settings as version 0.1 wrote them: those with another name since, and some others.
CONFIG = {
    "recipe": "selftrain",
    "engine": "auto",
    "slide": {"mpp": 0.25, "tile_px": 512, "stain": "auto"},
    "patchcl": {"dilations": [1, 2, 3], "around_um": 5.0, "excess_weight": 11.0, "patience": 40},
    "selftrain": {
        "widths": [8, 12, 16],
        "varied_size": 1.3,
        "around_um": 9.0,
        "excess": 0.2,
        "floor": 0.9,
        "lowest": 0.7,
    },
    "cdcl": {"varied_size": 1.4, "patience": 0.3, "confident": 0.8, "pure": 0.1},
    "segment": {"min_saddle_depth_um": 0.2, "max_depth_um": 7.0},
    "result": {"class_name": "Nucleus", "color": [38, 70, 214], "object_type": "auto"},
}
PROVENANCE = {
    "version": "0.1.0",
    "model": "491eb07cb454",
    "engine": "openvino bfloat16",
    "config": CONFIG,
    "within": ["Tumor"],
}
OUTCOME = {
    "id": "1",
    "image": "CMU-1-Small-Region.svs",
    "problem": None,
    "note": None,
    "tissue_mm2": 0.7362461568,
    "nuclei": 3172,
    "tiles": 9,
    "tiles_taken_over": 2,
    "holes": [FAILED_TILE],
    "results": "/project/patchcl/results/1",
    "preview": "/project/patchcl/previews/1.png",
    "seconds": 9.92,
    "main_seconds": {"prepare": 0.17, "tiles": 8.96, "write": 0.26, "pictures": 0.31},
    "worker_seconds": {"read": 0.21, "network": 4.15, "separate": 7.53},
    "network_px": 6789280,
}
RESULT = {
    "run": "38b2eaa8f245",
    "image": "CMU-1-Small-Region.svs",
    "made": "2026-11-26T01:06:26+00:00",
    **PROVENANCE,
    "tissue_mm2": 0.7362461568,
    "slide": {
        "file": {"bytes": 1938955, "modified_ns": 1795654944959668036},
        "mpp": [0.499, 0.499],
    },
    "model_name": "patchcl",
    "stains": {
        "kind": "h-e",
        "names": ["Hematoxylin", "Eosin"],
        "vectors": [[0.65111, 0.70119, 0.29049], [0.2159, 0.8012, 0.5581]],
        "background": [255.0, 255.0, 255.0],
    },
    "regions": [REGION],
    "holes": [FAILED_TILE],
    "nuclei": 3172,
    "object_type": "annotation",
    "files": ["nuclei-000.geojson.gz"],
}
FIGURES = {
    "run": "38b2eaa8f245",
    "nuclei": 3172,
    "mm": [1.10778, 1.480533],
    "area": {"median": 17.675, "highest": 300, "counts": [728, 1072, 762]},
    "stain": {"name": "Hematoxylin", "median": 0.86, "highest": 1.5, "counts": [0, 5, 27]},
    "probability": 0.9287522181887344,
    "highest_density": 11521,
    "fields": [
        {
            "kind": "densest",
            "picture": "field-0.jpg",
            "x": 1024,
            "y": 1024,
            "width": 256,
            "height": 256,
            "um": 128,
            "nuclei": 151,
            "density": 9253,
            "doubt": 0.063,
            "outlines": [[-10, -27, -4, -27, 2, -22], [218, -33, 224, -33, 235, -29]],
        }
    ],
}
MODEL = {
    "digest": "491eb07cb454",
    "network": "NucleusNetwork",
    "channel": 0,
    "inverted": False,
    "threshold": 0.5,
    "config": CONFIG,
    "training": {"sure_nucleus": 0.0752, "known": 0.9521, "loss": [0.7, 0.4], "seconds": 147.0},
}
RUN = {
    **PROVENANCE,
    "versions": {"torch": "2.13.0+cpu", "python": "3.11.7"},
    "training": MODEL["training"],
    "images": [OUTCOME],
}
ROI = {
    "id": "b0b2cd9c-6a6f-4b5b-8b2e-8c9ba1d1d0a5",
    "name": "Field 1 of 3",
    "description": "Doubt 0.31 bits, where 0.22 are usual.",
    "x": 513.03,
    "y": 1026.05,
    "width": 513.03,
    "height": 513.03,
}
ROIS = {"made": "2026-11-26T01:06:26+00:00", "fields": [ROI]}
RECEIPT = {
    "image": "CMU-1-Small-Region.svs",
    "run": "38b2eaa8f245",
    "imported": "2026-11-26T01:07:00+00:00",
    "added": 3172,
    "left_out": 1,
    "removed": 20,
    "kept": 3,
    "fields": 1,
    "fields_kept": 2,
}
REMOVED = {"removed": "2026-11-26T01:08:00+00:00", "nuclei": 0, "files": []}

WHOLE_IMAGE = {key: RESULT[key] for key in RESULT if key not in ("regions", "model_name")}
WITHOUT_MAP = {key: FIGURES[key] for key in FIGURES if key not in ("highest_density", "fields")}

# Each kind of file of version 0.1, shortened.
FILES: dict[str, tuple[type[Record], dict[str, Any]]] = {
    "result": (ResultRecord, RESULT),
    "result of a whole image": (ResultRecord, WHOLE_IMAGE),
    "removed": (RemovedRecord, REMOVED),
    "outcome": (ImageOutcome, OUTCOME),
    "failed outcome": (ImageOutcome, {**OUTCOME, "problem": "no", "results": None, "holes": []}),
    "run": (RunRecord, RUN),
    "model": (ModelRecord, MODEL),
    "figures": (FiguresRecord, FIGURES),
    "figures without a map": (FiguresRecord, {**WITHOUT_MAP, "probability": None}),
    "ROIs": (RoisRecord, ROIS),
    "receipt": (ReceiptRecord, RECEIPT),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "record.json"


@pytest.mark.parametrize("name", FILES)
def test_files_of_version_0_1_are_read_and_written_with_their_keys(file: Path, name: str) -> None:
    kind, content = FILES[name]
    file.write_text(json.dumps(content), "utf-8")
    record = read_record(file, kind)
    assert record is not None
    write_record(file, record)
    written = file.read_text("utf-8")
    assert written == json.dumps(content, indent=2) + "\n"  # the order of keys, too
    assert read_record(file, kind) == record


def test_attributes_have_the_names_of_the_code() -> None:
    failed = FailedTile(**FAILED_TILE)
    assert msgspec.convert(RESULT, ResultRecord).failed_tiles == (failed,)
    outcome = msgspec.convert(OUTCOME, ImageOutcome)
    assert (outcome.failed_tiles, outcome.tiles_resumed) == ((failed,), 2)
    (fov,) = msgspec.convert(FIGURES, FiguresRecord).fields_of_view or ()
    assert (fov.entropy, len(fov.contours)) == (0.063, 2)
    assert msgspec.convert(ROIS, RoisRecord).rois == (CorrectionRoi(**ROI),)
    receipt = msgspec.convert(RECEIPT, ReceiptRecord)
    assert (receipt.rois, receipt.rois_kept) == (1, 2)


def test_optional_keys_are_left_out() -> None:
    """As in version 0.1: QuPath's script asks whether a result has regions."""
    assert "regions" not in to_plain(msgspec.convert(WHOLE_IMAGE, ResultRecord))
    assert "fields" not in to_plain(msgspec.convert(WITHOUT_MAP, FiguresRecord))
    assert to_plain(msgspec.convert({"id": "1", "image": "a"}, ImageOutcome)).keys() == {*OUTCOME}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["", "{", "[]", "7", "null", "{}", '{"run": 1}', "\xff"])
def test_damaged_files_and_those_of_another_form_read_as_none(
    file: Path, name: str, content: str
) -> None:
    file.write_bytes(content.encode("latin-1"))
    assert read_record(file, FILES[name][0]) is None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_key_or_a_wrong_type_reads_as_none(file: Path, name: str) -> None:
    kind, content = FILES[name]
    first, *others = content
    for damaged in ({key: content[key] for key in others}, {**content, first: 1.5}):
        file.write_text(json.dumps(damaged), "utf-8")
        assert read_record(file, kind) is None


@pytest.mark.parametrize("name", FILES)
def test_missing_files_read_as_none_and_unknown_keys_are_ignored(file: Path, name: str) -> None:
    kind, content = FILES[name]
    assert read_record(file, kind) is None
    file.write_text(json.dumps({**content, "of a later version": [1]}), "utf-8")
    record = read_record(file, kind)
    assert record is not None
    assert json.loads(json.dumps(to_plain(record))) == content


def test_result_json_holds_nuclei_or_their_removal(file: Path) -> None:
    assert read_result(file) is None
    write_record(file, msgspec.convert(RESULT, ResultRecord))
    assert isinstance(read_result(file), ResultRecord)
    write_record(file, RemovedRecord(removed="2026-11-26T01:08:00+00:00"))
    assert json.loads(file.read_text("utf-8")) == REMOVED
    assert isinstance(read_result(file), RemovedRecord)


def test_a_result_that_cannot_be_read_is_not_missing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its image would be one without nuclei: in the state of the project, and in its report."""
    write_record(file, msgspec.convert(RESULT, ResultRecord))

    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", deny)
        patched.setattr(Path, "read_text", deny)
        with pytest.raises(
            StorageError, match=r"record\.json cannot be read \(Permission denied\)"
        ):
            read_result(file)
    assert isinstance(read_result(file), ResultRecord)
    assert read_result(file / "in a file") is None


def test_figures_are_drawn_from_all_that_a_run_id_does_not_say(file: Path) -> None:
    result = msgspec.convert(RESULT, ResultRecord)
    write_record(file, result)
    read = read_record(file, ResultRecord)
    assert read is not None
    assert read.drawn_from == result.drawn_from
    same = msgspec.structs.replace(read, made="later", image="renamed", files=())
    assert same.drawn_from == result.drawn_from
    (region,) = read.regions
    changes: list[dict[str, Any]] = [
        {"config": {**CONFIG, "result": {"positive": "auto"}}},
        {"positivity": PositivityRecord(measurement="DAB: Mean", thresholds=(0.2,))},
        {"regions": (region, region)},
        {"slide": msgspec.structs.replace(read.slide, mpp=(0.25, 0.25))},
    ]
    others = {msgspec.structs.replace(read, **change).drawn_from for change in changes}
    assert len(others - {result.drawn_from}) == len(changes)


def test_settings_of_version_0_1_are_read() -> None:
    """By the names that they had; what is left out has its default."""
    config = from_dict(CONFIG)
    for table, names in RENAMED.items():
        for old, new in names.items():
            assert getattr(getattr(config, table), new) == CONFIG[table][old]
    assert config.patchcl.patience == 40  # as before, unlike that of CDCL
    assert config.cdcl.teacher_warmup == 0.3
    assert config.selftrain.widths == (8, 12, 16)
    assert config.segment.min_core == Config().segment.min_core
    assert from_dict(to_dict(config)) == config


def test_renamed_settings_exist_under_their_new_names_only() -> None:
    for table, names in RENAMED.items():
        known = {field.name for field in msgspec.inspect.type_info(TABLES[table]).fields}
        assert known >= set(names.values())
        assert not known & names.keys()


def test_weights_that_were_copied_alone_have_no_record(tmp_path: Path) -> None:
    """That beside them is of the model that was there before."""
    one, other = (Model(network=NucleusNetwork((2, 2, 2)), config=Config()) for _ in range(2))
    assert one.digest != other.digest
    weights = one.save(tmp_path, "patchcl")
    record = read_model_record(weights)
    assert record is not None
    assert record.digest == one.digest
    weights.write_bytes(other.save(tmp_path / "elsewhere", "patchcl").read_bytes())
    assert read_model_record(weights) is None
    weights.unlink()
    assert read_model_record(weights) is None

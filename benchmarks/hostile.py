"""Mutated project files, GeoJSON, ground truth and slides: each has a result, or one line.

    python benchmarks/hostile.py [--count N] [--seed S] [--kinds KIND ...] [--only KIND NUMBER]

A case is a small valid file, changed in one place or in several: a value of another type, a key
that is gone, bytes that are flipped, cut or repeated. It is read as the program reads it, in a
process with limits of time and memory. A result, a note, a problem of one image, or one error of
the program in one line is an answer; any other exception, a crash or a timeout is a finding, which
``--only`` repeats with its traceback. Exit status 1 if there is a finding.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from patchcl_qupath.config import CORRECTED
from patchcl_qupath.datatypes import Box, ImageEntry
from patchcl_qupath.errors import PatchCLError
from patchcl_qupath.evaluation.ground_truth import read_ground_truth
from patchcl_qupath.evaluation.metrics import Overlaps
from patchcl_qupath.project import open_project
from patchcl_qupath.project.drawn import ExportedLabels, read_regions, read_stains
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.status import image_status

TIMEOUT_S = 30  # of a case
MEMORY_BYTES = 6 << 30  # address space of a process
SIZE = (320, 256)  # px of the slides and labels, (width, height)
ODD: list[Any] = [
    *(None, True, False, 0, -1, 7, 2**31, 2**63, 10**300, 0.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", " ", "x", "x" * 5000, "a\nb", "\ud800", "\x00", "\x1b[0m", "../../x"),
    *("file:/x%00y", "file:/a#2", "http://[", "file:///", "0,5", "µm", "-s", "--series=x"),
    *([], {}, [[]], [None], {"": None}, ["--series"], {"type": "Feature"}, {"builderType": "uri"}),
]


# ---------------------------------------------------------------- valid files


def project_content(rng: random.Random) -> Any:
    """A project of images: plain, a generated pyramid, one with arguments, sometimes a view."""
    side = {"value": 0.5, "unit": "µm"}
    metadata = {
        "width": SIZE[0],
        "height": SIZE[1],
        "isRGB": True,
        "pixelCalibration": {"pixelWidth": side, "pixelHeight": side},
    }
    plain = {
        "builderType": "uri",
        "providerClassName": "qupath.lib.images.servers.openslide.OpenslideServerBuilder",
        "uri": "file:/E:/study/caseA/slide.svs",
        "args": ["--no-crop"],
        "metadata": metadata,
    }
    other = plain | {"uri": "file:/E:/study/caseB/slide.svs", "args": ["--series", "1", "-n", "x"]}
    builders = [
        plain,
        {"builderType": "pyramidize", "metadata": metadata, "builder": other},
        other,
        *([{"builderType": "rotated", "builder": plain}] if rng.random() < 0.1 else []),
    ]
    images = [
        {"serverBuilder": b, "entryID": k, "imageName": f"image {k}", "metadata": {"a": "b"}}
        for k, b in enumerate(builders, start=1)
    ]
    uri = "file:/E:/projects/p/project.qpproj"
    return {"version": "0.5.1", "uri": uri, "lastID": 4, "images": images}


def summary_content() -> Any:
    """The summary that QuPath writes beside an image's objects."""
    counts = {"annotationClassificationCounts": {CORRECTED: 1, "Tumor": 2}}
    return {"imageType": "BRIGHTFIELD_H_E", "hierarchy": counts}


def objects_content() -> Any:
    """Objects of all forms that are read: nested, cells, collections, classes of old versions."""

    def box(x: int, y: int, size: int) -> dict[str, Any]:
        corners = [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]
        return {"type": "Polygon", "coordinates": [corners]}

    def feature(geometry: Any, classification: Any, **more: Any) -> dict[str, Any]:
        properties = {"objectType": "annotation", "classification": classification, **more}
        return {"type": "Feature", "geometry": geometry, "properties": properties}

    nuclei = [feature(box(30 + 20 * k, 30, 12), {"name": "Nucleus"}) for k in range(4)]
    cell = feature(box(30, 60, 16), "Nucleus") | {"nucleusGeometry": box(32, 62, 8)}
    both = {"type": "GeometryCollection", "geometries": [box(60, 60, 9), box(80, 60, 9)]}
    old = {"name": "Positive", "parentClass": {"name": "Tumor"}, "colorRGB": -1}
    features = [
        feature(box(20, 20, 100), {"names": CORRECTED.split(": ")}, childObjects=[*nuclei, cell]),
        feature(both, old),
        feature(box(150, 20, 90), {"name": "Tumor", "color": [200, 0, 0]}),
        feature({"type": "Point", "coordinates": [5, 5]}, None),
    ]
    return {"type": "FeatureCollection", "features": features}


def stains_content() -> Any:
    """Stain vectors as groovy/export_regions.groovy exports them."""
    vectors = {"Hematoxylin": [0.65, 0.70, 0.29], "Eosin": [0.07, 0.99, 0.11]}
    stains = [{"name": name, "vector": vector} for name, vector in vectors.items()]
    return {"type": "BRIGHTFIELD_H_E", "stains": stains, "background": [255, 255, 255]}


def labels_of_boxes() -> Any:
    """A label image (rows, columns) of some squares."""
    labels = np.zeros(SIZE[::-1], dtype=np.uint16)
    for k in range(9):
        labels[20 + 20 * k : 32 + 20 * k, 30:42] = k + 1
    return labels


def scene() -> Any:
    """Pixels (rows, columns, 3) of tissue and glass."""
    rng = np.random.default_rng(0)
    pixels = np.full((*SIZE[::-1], 3), 240, dtype=np.uint8)
    pixels[40:, 60:] = rng.integers(90, 220, (SIZE[1] - 40, SIZE[0] - 60, 3))
    return pixels


def tiff_bytes(levels: int, compression: str, subifds: bool, **page: Any) -> bytes:
    """A tiled pyramid: levels as pages, as in SVS, or as subIFDs, as in OME-TIFF."""
    pixels, file = scene(), io.BytesIO()
    with tifffile.TiffWriter(file, ome=False) as tiff:
        for level in range(levels):
            tiff.write(
                pixels[:: 2**level, :: 2**level],
                photometric="rgb",
                tile=(64, 64),
                compression=compression,
                subifds=levels - 1 if subifds and level == 0 else None,
                subfiletype=1 if subifds and level else 0,
                metadata=None,
                **page,
            )
    return file.getvalue()


def slide_files() -> list[tuple[str, bytes]]:
    """Small slides, by suffix: SVS, TIFF of other kinds, PNG, JPEG."""
    aperio = "Aperio Image Library v11.2.1\r\nmade for a test|AppMag = 20|MPP = 0.5"
    resolution: dict[str, Any] = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    plain = io.BytesIO()
    tifffile.imwrite(plain, scene(), photometric="rgb", metadata=None, **resolution)
    imagej = io.BytesIO()
    tifffile.imwrite(imagej, scene(), imagej=True, resolution=(2, 2), metadata={"unit": "um"})
    ome = io.BytesIO()
    sizes: dict[str, Any] = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(ome, scene(), ome=True, photometric="rgb", tile=(64, 64), metadata=sizes)
    pictures = []
    for suffix, kind in ((".png", "PNG"), (".jpg", "JPEG")):
        file = io.BytesIO()
        Image.fromarray(scene()).save(file, format=kind)
        pictures.append((suffix, file.getvalue()))
    return [
        (".svs", tiff_bytes(2, "jpeg", False, description=aperio)),
        (".tif", tiff_bytes(3, "deflate", True, **resolution)),
        (".tif", tiff_bytes(2, "lzw", False, **resolution)),
        (".tif", plain.getvalue()),
        (".tif", imagej.getvalue()),
        (".ome.tif", ome.getvalue()),
        *pictures,
    ]


def label_files() -> list[tuple[str, bytes]]:
    """A label image as NPY, TIFF and PNG."""
    npy, tiff, png = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(npy, labels_of_boxes())
    tifffile.imwrite(tiff, labels_of_boxes())
    Image.fromarray(labels_of_boxes()).save(png, format="PNG")
    return [(".npy", npy.getvalue()), (".tif", tiff.getvalue()), (".png", png.getvalue())]


# ---------------------------------------------------------------- mutations


def mutated_json(content: Any, rng: random.Random) -> bytes:
    """A document with some values changed; one of ten has its bytes changed, too."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        content = _with_one_change(content, rng)
    text = json.dumps(content).encode()
    if rng.random() < 0.05:
        text = b"\xef\xbb\xbf" + text
    return mutated_bytes(text, rng, len(text)) if rng.random() < 0.1 else text


def _with_one_change(content: Any, rng: random.Random) -> Any:
    """The document with one value that is another, is gone, is nested or is there twice."""
    place = _place(content, rng)
    if place is None:
        return _copy(rng.choice(ODD))
    holder, key = place
    kind = rng.choice(["odd", "odd", "odd", "gone", "swap", "nest", "twice"])
    other = _place(content, rng)
    if kind == "gone":
        del holder[key]
    elif kind == "swap" and other is not None:
        holder[key] = _copy(other[0][other[1]])
    elif kind == "nest":
        for _ in range(rng.choice([1, 2, 30])):
            holder[key] = rng.choice([[holder[key]], {"properties": {"childObjects": holder[key]}}])
    elif kind == "twice" and isinstance(holder, list):
        holder.append(_copy(holder[key]))
    else:
        holder[key] = _copy(rng.choice(ODD))
    return content


def _place(content: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """A value of a document, as its holder and its key; one near the root more often."""
    place = None
    while isinstance(content, dict | list) and content and (place is None or rng.random() < 0.8):
        keys = [*content] if isinstance(content, dict) else range(len(content))
        place = (content, rng.choice(keys))
        content = content[place[1]]
    return place


def _copy(content: Any) -> Any:
    return json.loads(json.dumps(content))


def mutated_bytes(content: bytes, rng: random.Random, head: int) -> bytes:
    """Bytes that are flipped, cut, repeated or overwritten, most of them in the first ``head``."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        end = min(len(changed), head) if rng.random() < 0.8 else len(changed)
        if not end:
            return bytes(changed)
        place = rng.randrange(end)
        kind = rng.choice(["flip", "byte", "word", "cut", "insert", "repeat"])
        if kind == "flip":
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            changed[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == "word":
            word = rng.choice([b"\0\0\0\0", b"\xff" * 4, b"\xff\xff\xff\x7f", b"\1\0\0\0"])
            changed[place : place + 4] = word
        elif kind == "cut" and rng.random() < 0.3:
            del changed[place:]
        elif kind == "insert":
            changed[place:place] = rng.randbytes(rng.choice([1, 2, 40]))
        elif kind == "repeat":
            size = rng.choice([1, 8, 60])
            changed[place : place + size] = changed[place : place + size] * 2
    return bytes(changed)


# ---------------------------------------------------------------- how each is read


def read_project_case(folder: Path, rng: random.Random) -> str:
    """List a project's images, and their states."""
    summary = folder / "data" / "1" / "summary.json"
    summary.parent.mkdir(parents=True, exist_ok=True)
    content = summary_content()
    summary.write_bytes(mutated_json(content, rng))
    for name in ("caseA", "caseB", "patchcl"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "slide.svs").touch()
    (folder / "project.qpproj").write_bytes(mutated_json(project_content(rng), rng))
    project = open_project(folder, backend="files")
    entries = project.images()
    ids = [entry.id for entry in entries]
    assert len({*ids}) == len(ids), f"ids that are not distinct: {ids}"
    used: dict[Path, str] = {}
    for entry in entries:
        assert Path(entry.id).name == entry.id, f"an id that is no name of a folder: {entry.id!r}"
        assert _is_line(entry.name), f"a name of several lines: {entry.name!r}"
        assert _is_line(entry.problem or ""), f"a problem of several lines: {entry.problem!r}"
        json.dumps(image_status(project, entry).state).encode()
        if entry.problem is None:
            assert "patchcl" not in entry.path.relative_to(folder).parts, entry.path
            used[entry.path] = entry.id
    return "problem" if any(entry.problem for entry in entries) else "result"


def read_regions_case(folder: Path, rng: random.Random) -> str:
    """Read analysis regions, or stains."""
    file = folder / "1.geojson"
    if rng.random() < 0.2:
        file.write_bytes(mutated_json(stains_content(), rng))
        return "result" if read_stains(file, "a.svs") else "none"
    file.write_bytes(mutated_json(objects_content(), rng))
    found = read_regions(file, "a.svs", ["Tumor", "Tumor: Positive"])
    for areas in found.values():
        assert all(area.is_valid and area.area > 0 for area in areas)
    return "result"


def read_labels_case(folder: Path, rng: random.Random) -> str:
    """Read a person's corrections."""
    file = folder / "1.geojson"
    file.write_bytes(mutated_json(objects_content(), rng))
    labels = ExportedLabels.read(file, "a.svs")
    rois = labels.corrections(CORRECTED).rois
    assert len(labels.corrected_rois) == len(rois)
    return "result" if rois else "none"


def read_truth_case(folder: Path, rng: random.Random) -> str:
    """Read ground truth, GeoJSON or labels, and compare it with itself."""
    suffix, content = rng.choice([(".geojson", b""), *label_files()])
    file = folder / f"a{suffix}"
    if content:
        file.write_bytes(mutated_bytes(content, rng, 400))
    else:
        file.write_bytes(mutated_json(objects_content(), rng))
    truth = read_ground_truth([file], ImageEntry("1", "a.svs", folder / "a.svs", size=SIZE))
    some = truth.polygons[:500]  # noise has as many as pixels
    if len(some):
        assert 0 <= Overlaps.of_polygons(some, some).dice <= 1 + 1e-9
    return "note" if truth.note else "result"


def read_slide_case(folder: Path, rng: random.Random) -> str:
    """Open a slide, and read its thumbnail and a box."""
    suffix, content = rng.choice(slide_files())
    file = folder / f"slide{rng.randrange(1 << 30)}{suffix}"
    file.write_bytes(mutated_bytes(content, rng, rng.choice([64, 600, 2000])))
    try:
        fallback = rng.choice([None, 0.5])
        slide = Slide.open(ImageEntry("1", f"a{suffix}", file, fallback_mpp=fallback))
        slide.thumbnail(8.0)
        rows, cols = slide.shape
        slide.read(Box(0, 0, min(rows, 200), min(cols, 200)))
        slide.read(Box(max(0, rows - 9), max(0, cols - 9), rows, cols))
    finally:
        file.unlink()
    return "result"


CASES: dict[str, tuple[Callable[[Path, random.Random], str], float]] = {  # and its share
    "projects": (read_project_case, 0.35),
    "regions": (read_regions_case, 0.15),
    "labels": (read_labels_case, 0.1),
    "truth": (read_truth_case, 0.15),
    "slides": (read_slide_case, 0.25),
}


def _is_line(text: str) -> bool:
    return len(text.splitlines()) <= 1 and text.isprintable()


def answer(kind: str, number: int, seed: int) -> tuple[str, str]:
    """What the program answers to a case: a word, and the traceback of a finding."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return CASES[kind][0](Path(folder), random.Random(f"{seed} {kind} {number}")), ""
        except PatchCLError as error:
            if _is_line(str(error)) and str(error):
                return "refused", ""
            return "finding", f"an error of several lines: {str(error)!r}"
        except Exception:
            return "finding", traceback.format_exc()


# ---------------------------------------------------------------- processes


def _serve(pipe: Connection, seed: int) -> None:
    """Answer the cases that come through a pipe, with a limit of memory."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):  # Windows; or a lower limit holds
        pass
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # as the command does
    while True:
        try:
            kind, number = pipe.recv()
        except EOFError:
            return
        pipe.send(answer(kind, number, seed))


class Server:
    """A process that answers cases; another takes its place after a crash or a timeout."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.seed), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, kind: str, number: int) -> tuple[str, str]:
        """The answer to a case."""
        self.pipe.send((kind, number))
        try:
            if self.pipe.poll(TIMEOUT_S):
                found: tuple[str, str] = self.pipe.recv()
                return found
            trouble = f"no answer within {TIMEOUT_S} s"
        except (EOFError, OSError):
            trouble = "the process died"
        self.close()
        self._start()
        return "finding", trouble

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def main() -> None:
    """Print a table of answers, and each finding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="cases of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other cases")
    parser.add_argument("--kinds", nargs="+", choices=[*CASES], default=[*CASES], help="kinds")
    parser.add_argument("--only", nargs=2, metavar=("KIND", "NUMBER"), help="repeat one case")
    arguments = parser.parse_args()
    if arguments.only:
        kind, number = arguments.only
        print(*answer(kind, int(number), arguments.seed), sep="\n")
        return
    server, findings = Server(arguments.seed), 0
    total = sum(CASES[kind][1] for kind in arguments.kinds)
    for kind in arguments.kinds:
        answers: Counter[str] = Counter()
        for number in range(round(arguments.count * CASES[kind][1] / total)):
            word, trouble = server.ask(kind, number)
            answers[word] += 1
            if word == "finding":
                print(f"{kind} {number}: {trouble.strip()}\n", flush=True)
        findings += answers["finding"]
        counts = ", ".join(f"{count:,} {word}" for word, count in sorted(answers.items()))
        print(f"{kind}: {answers.total():,} cases: {counts}", flush=True)
    server.close()
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()

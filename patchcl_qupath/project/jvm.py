"""QuPath's Java in a process of its own: started when first needed, asked through a pipe.

A process can start one JVM and never another, must not fork after that, and dies with it. So the
process is spawned, and the frozen dataclasses below are sent through the pipe. Nuclei are not: the
process reads them from the parquet file of the results, and passes them to Java as arrays.

To add a question, write a dataclass, and a method of ``_QuPath`` that answers it.
"""

from __future__ import annotations

import locale
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import CELL, class_colour
from patchcl_qupath.datatypes import Nuclei, Polygons
from patchcl_qupath.errors import ImageError
from patchcl_qupath.memory import memory_limit
from patchcl_qupath.project.compiled_scripts import compiled_script
from patchcl_qupath.project.installed import paquo_settings
from patchcl_qupath.project.names import in_qupath
from patchcl_qupath.storage.files import copy_once, writing
from patchcl_qupath.storage.parquet import read_nuclei
from patchcl_qupath.storage.records import FileSignature, RegionSummary, data_signature

logger = logging.getLogger(__name__)

MAX_OVERLAP = 0.5  # IoU with a kept object above which a new nucleus is left out
MAX_MEMORY = 4 << 30  # bytes of Java's heap: enough for some 500,000 nuclei
_OF_HEAP = ("-Xmx", "-XX:MaxHeapSize=", "-XX:MaxRAMPercentage=")
_OF_PAQUO = "-XX:MaxRAMPercentage=50"  # where a person set nothing
_USUAL_CLASSES = (  # of QuPath's StandardPathClasses
    "TUMOR",
    "STROMA",
    "IMMUNE_CELLS",
    "NECROSIS",
    "OTHER",
    "REGION",
    "IGNORE",
    "POSITIVE",
    "NEGATIVE",
)


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image of a project, and the present path of its slide: the project may have moved.

    ``backups`` is the folder for copies of the image's data, and of nuclei that are removed.
    ``data`` is the signature of data.qpdata when it was last looked at, None where there is none: a
    file that changed since then is not written over.
    """

    project: Path
    entry_id: str
    name: str
    slide: Path
    backups: Path
    data: FileSignature | None


@dataclass(frozen=True, kw_only=True)
class Write:
    """Replace the nuclei of the image by those of a results folder.

    Likewise the ROIs to correct, by those of the file ``rois``, which need not exist. ``color`` is
    (red, green, blue), 0 to 255.
    """

    image: Image
    results: Path
    rois: Path
    class_name: str
    color: tuple[int, ...]


@dataclass(frozen=True)
class Remove:
    """Remove the nuclei that nobody touched from the image, and the marks of earlier imports.

    Those of detections that stay are left: these would pass for another program's.
    """

    image: Image


@dataclass(frozen=True, kw_only=True)
class Summarise:
    """Count the nuclei in the regions of the image anew, as groovy/summarise.groovy does.

    ``results`` is the folder of results, which need not exist.
    """

    image: Image
    results: Path


@dataclass(frozen=True)
class Export:
    """Write annotations to a file, as groovy/export_regions.groovy does.

    With ``roi_class``, write the ROIs of this class and the nuclei in them, as
    groovy/export_labels.groovy does.
    """

    image: Image
    file: Path
    roi_class: str | None = None


@dataclass(frozen=True)
class ExportStains:
    """Write the stain vectors of the image to a file, as groovy/export_regions.groovy does."""

    image: Image
    file: Path


Question = Write | Remove | Summarise | Export | ExportStains


@dataclass(frozen=True)
class Done:
    """The numbers of objects that were found, added, left out and why, removed and kept.

    ``seconds`` are those of each step; ``regions`` those of a ``Summarise``.
    """

    counts: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    regions: tuple[RegionSummary, ...] = ()


@dataclass(frozen=True)
class Notice:
    """Something to tell a person before it is done; the answer follows."""

    text: str


@dataclass(frozen=True)
class Failed:
    """The problem with the image; ``saving`` is whether its data may have been written to."""

    problem: str
    saving: bool = False


class NotWrittenError(ImageError):
    """Something failed before the image's data were written to: they are as whoever left them."""


class Process:
    """The parent's side. ``qupath`` is the folder of QuPath, None for that of paquo's settings.

    ``log`` is the file for the output of QuPath.
    """

    def __init__(self, qupath: Path | None, log: Path) -> None:
        self.log = log
        self.seconds: dict[str, float] = {}  # of each step of the last answer
        self._qupath = qupath
        self._process: Any = None
        self._pipe: Connection | None = None

    def ask(self, question: Question, notify: Callable[[str], None] = logger.warning) -> Done:
        """The answer; ``notify`` gets what is to be told before it is done. Raises ImageError."""
        self.start()
        assert self._pipe is not None
        try:
            self._pipe.send(question)
            answer = self._pipe.recv()
            while isinstance(answer, Notice):
                notify(answer.text)
                answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise ImageError(
                f"{question.image.name}: QuPath's process died; the image is as it was. "
                f"See the end of {self.log}; if memory ran out, set PAQUO_JAVA_OPTS=-Xmx8g "
                "or more, then run again"
            ) from error
        except KeyboardInterrupt:
            self.close(patience=0.5)  # it ends by itself once it saved; the image is given back
            raise
        if isinstance(answer, Failed):
            kind = ImageError if answer.saving else NotWrittenError
            raise kind(f"{question.image.name}: {answer.problem}")
        assert isinstance(answer, Done)
        self.seconds = answer.seconds
        return answer

    def close(self, patience: float = 10) -> None:
        """End the process, if there is one, within some seconds; it is started anew if need be."""
        if self._pipe is not None:
            self._pipe.close()  # which ends it
        if self._process is not None:
            self._process.join(timeout=patience)
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def start(self) -> None:
        """Start the process if there is none, or if it died; returns before it is ready.

        Raises StorageError.
        """
        if self._process is not None and self._process.is_alive():
            return
        self.close()
        with writing(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self._qupath, self.log)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        logger.info("started QuPath in a process of its own: its log is %s", self.log)
        theirs.close()  # so that its death is the end of the pipe


def java_options(given: list[str]) -> list[str]:
    """Options of the JVM: those given, and by default what is quick, and a limit of memory.

    That is half of what this process may use: Python has a share of it, too.
    """
    if not any(option.startswith("-XX:TieredStopAtLevel") for option in given):
        # Java's quick compiler alone: the thorough one costs a short run more than it gives back.
        given = [*given, "-XX:TieredStopAtLevel=1"]
    if not any(option.startswith("-XX:+Use") and option.endswith("GC") for option in given):
        given = [*given, "-XX:+UseParallelGC"]  # nobody waits for a pause of it
    if any(option.startswith(_OF_HEAP) and option != _OF_PAQUO for option in given):
        return given
    return [*given, f"-Xmx{min(memory_limit() // 2, MAX_MEMORY) >> 20}m"]


def _name_files_as_python() -> None:
    """Have Java take names of files for UTF-8 where Python does.

    It goes by the locale: in C, that of many containers and cron jobs, it finds no name with an
    umlaut.
    """
    is_utf8 = locale.getencoding().lower() == "utf-8"
    if os.name == "posix" and sys.getfilesystemencoding() == "utf-8" and not is_utf8:
        os.environ["LC_ALL"] = "C.UTF-8"


def _serve(pipe: Connection, qupath: Path | None, log: Path) -> None:
    """The main loop of the process: answer questions until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C must not stop it while it saves
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    java: _QuPath | None = None
    problem = ""
    try:
        java = _QuPath(qupath)
    except Exception as error:
        traceback.print_exc()
        problem = f"QuPath cannot be started ({error}): see {log}"
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            os._exit(0)  # Java's own end would wait for QuPath's threads
        answer: Done | Failed
        try:
            answer = java.answer(question, pipe) if java else Failed(problem)
        except ImageError as error:
            answer = Failed(str(error))
        except Exception as error:  # of Java, too: its exceptions cannot be pickled
            traceback.print_exc()
            saving = java is not None and java.saving
            answer = Failed(f"QuPath raised {type(error).__name__}: {error}; see {log}", saving)
        try:
            pipe.send(answer)
        except OSError:  # whoever asked was stopped
            os._exit(0)


class _QuPath:
    """The child's side: all that touches Java. Only one can be made in a process."""

    def __init__(self, qupath: Path | None) -> None:
        from paquo.jpype_backend import start_jvm

        self.seconds: dict[str, float] = {}
        self.saving = False  # whether the image of the last question was written to
        self._began = time.perf_counter()
        self._scripts: dict[str, Any] = {}
        kwargs = paquo_settings(qupath)
        given = kwargs["java_opts"]
        kwargs["java_opts"] = java_options(given.split() if isinstance(given, str) else [*given])
        _name_files_as_python()
        start_jvm(finder_kwargs=kwargs)  # otherwise paquo does, when imported, and with its options
        self._lap("start Java")
        from jpype import JClass
        from paquo.java import LogManager
        from paquo.projects import QuPathProject

        LogManager.setInfo()  # paquo's import set it to debug: all properties of each image
        self._project = QuPathProject
        self._class = JClass
        self._lap("load QuPath")

    def answer(self, question: Question, pipe: Connection) -> Done:
        self._began = time.perf_counter()
        self.saving = False
        counts, regions = dict[str, int](), tuple[RegionSummary, ...]()
        if isinstance(question, Write):
            counts = self._write(question, pipe)
        elif isinstance(question, Remove):
            counts = self._remove(question, pipe)
        elif isinstance(question, Summarise):
            regions = self._summarise(question)
        elif isinstance(question, ExportStains):
            self._export_stains(question)
        else:
            self._export(question)
        seconds, self.seconds = self.seconds, {}
        return Done(counts, seconds, regions)

    def _script(self, name: str) -> Any:
        """The compiled class of a Groovy script; only those that are needed are loaded."""
        if name not in self._scripts:
            self._lap("wait")
            self._scripts[name] = compiled_script(name, self._class)
            self._lap("load scripts")
        return self._scripts[name]

    @property
    def _import(self) -> Any:
        return self._script("import_nuclei.groovy")

    @property
    def _regions(self) -> Any:
        return self._script("export_regions.groovy")

    @property
    def _labels(self) -> Any:
        return self._script("export_labels.groovy")

    @property
    def _columns(self) -> Any:
        return self._script("columns.groovy")

    def _write(self, question: Write, pipe: Connection) -> dict[str, int]:
        result = self._json(question.results / "result.json")
        suggested = self._json(question.rois) if question.rois.exists() else None
        nuclei = read_nuclei(question.results / "nuclei.parquet")
        self._lap("read nuclei")
        project, entry, image_data = self._open(question.image)
        if (other_image := self._import.findOtherImage(image_data, result)) is not None:
            raise ImageError(str(other_image))
        if nuclei.classes is None:
            names, codes = np.array([question.class_name]), np.zeros(len(nuclei), np.intp)
        else:
            names, codes = np.unique(nuclei.classes, return_inverse=True)
        colours = {name: class_colour(name, question.color) for name in names.tolist()}
        path_classes = [self._path_class(project, *item) for item in colours.items()]
        object_type = str(result.get("object_type").getAsString())
        objects = self._objects(nuclei, path_classes, codes, object_type)
        self._lap("make objects")
        if suggested is not None:
            self._list(project, *self._import.roiClasses())
        return self._replace(question.image, pipe, entry, image_data, objects, result, suggested)

    def _remove(self, question: Remove, pipe: Connection) -> dict[str, int]:
        _, entry, image_data = self._open(question.image)
        result = self._class("com.google.gson.JsonObject")()
        result.addProperty("removed", "all")
        none = self._class("java.util.ArrayList")()
        return self._replace(question.image, pipe, entry, image_data, none, result, None)

    def _summarise(self, question: Summarise) -> tuple[RegionSummary, ...]:
        _, entry, image_data = self._open(question.image)
        file = question.results / "result.json"
        result = self._json(file) if file.exists() else None
        found = [
            RegionSummary(
                name=str(region["name"]),
                x=float(region["x"]),
                y=float(region["y"]),
                nuclei=int(region["nuclei"]),
                area_mm2=_number(region["area_mm2"]),
                is_tissue=bool(region["is_tissue"]),
                per_mm2=_number(region["per_mm2"]),
                **{
                    name: value
                    for name in ("positive_percent", "h_score")
                    if (value := _number(region[name])) is not None
                },
            )
            for region in self._import.summarise(image_data, entry, result)
        ]
        if found:
            self._save(question.image, entry, image_data)
        image_data.getServer().close()
        self._lap("summarise")
        return tuple(found)

    def _export(self, question: Export) -> None:
        _, _, image_data = self._open(question.image)
        file = self._class("java.io.File")(str(question.file)).toPath()
        if question.roi_class is None:
            none = self._class("java.util.ArrayList")()
            self._regions.exportRegions(image_data, none, file)
        else:
            ours = self._labels.imported(image_data)
            hierarchy = image_data.getHierarchy()
            self._labels.exportLabels(hierarchy, ours, question.roi_class, file)
        image_data.getServer().close()

    def _export_stains(self, question: ExportStains) -> None:
        _, _, image_data = self._open(question.image)
        file = self._class("java.io.File")(str(question.file)).toPath()
        self._regions.exportStains(image_data, file)
        image_data.getServer().close()

    def _open(self, image: Image) -> tuple[Any, Any, Any]:
        """The project, the entry, and the ImageData: Java's objects.

        Slides are opened at their present path. project.qpproj, which may have another one, is
        never written: that is for QuPath's own window, which asks its user.
        """
        project = self._project(image.project, mode="r+")
        entry = next(e for e in project.images if e.entry_id == image.entry_id).java_object
        moved = self._class("java.util.HashMap")()
        for uri in entry.getURIs():
            moved.put(uri, self._class("java.io.File")(str(image.slide)).toURI())
        try:
            entry.updateURIs(moved)
            image_data = entry.readImageData()
            image_data.getServer()  # which QuPath 0.6 and later open when it is first asked for
        except Exception as error:  # Java's
            raise ImageError(
                f"QuPath cannot open {image.slide} ({error}): open the image in QuPath to see why"
            ) from error
        # What cannot be read QuPath replaces by an empty image, and only logs it.
        file = _data_file(image)
        if file.exists() and not _is_same(Path(str(image_data.getLastSavedPath())), file):
            raise ImageError(damaged(file, image.backups))
        self._lap("open image")
        return project, entry, image_data

    def _path_class(self, project: Any, name: str, color: tuple[int, ...]) -> Any:
        """The class, added to the project's list. A colour that a person gave it stays."""
        red, green, blue = color
        PathClass = self._class("qupath.lib.objects.classes.PathClass")
        packed = self._class("java.lang.Integer")(
            (255 << 24 | red << 16 | green << 8 | blue) - (1 << 32)
        )
        path_class = PathClass.fromString(name, packed)
        self._list(project, path_class)
        return path_class

    def _list(self, project: Any, *path_classes: Any) -> None:
        """Add classes to the project's list, for a person to choose from."""
        from paquo.classes import QuPathPathClass

        listed = list(project.path_classes)
        names = {str(path_class.java_object) for path_class in listed}
        new = [QuPathPathClass.from_java(c) for c in path_classes if str(c) not in names]
        if new and not listed:  # QuPath offers its usual classes where a project lists none
            usual = self._class("qupath.lib.objects.classes.PathClass").StandardPathClasses
            listed = [QuPathPathClass.from_java(getattr(usual, name)) for name in _USUAL_CLASSES]
        if new:
            project.path_classes = [*listed, *new]

    def _json(self, file: Path) -> Any:
        text = file.read_text(encoding="utf-8")
        return self._class("com.google.gson.JsonParser").parseString(text).getAsJsonObject()

    def _objects(
        self, nuclei: Nuclei, path_classes: list[Any], codes: NDArray[np.intp], object_type: str
    ) -> Any:
        """QuPath's objects; ``codes`` (N,) tell the class of each nucleus."""
        from jpype import JArray, JString

        values = np.zeros((len(nuclei), len(nuclei.measurements)), dtype=np.float32)
        for column, measured in enumerate(nuclei.measurements.values()):
            values[:, column] = measured
        version = str(self._class("qupath.lib.common.GeneralTools").getVersion())
        about = (
            JArray.of(uuid_halves(nuclei.uuids)),
            JArray(JString)([in_qupath(name, version) for name in nuclei.measurements]),
            JArray.of(values.ravel()),
            JArray(self._class("qupath.lib.objects.classes.PathClass"))(path_classes),
            JArray.of(codes.astype(np.int32)),
        )
        contours = self._rois(nuclei.polygons)
        if object_type == CELL and nuclei.cells is not None:
            return self._columns.toCells(self._rois(nuclei.cells), contours, *about)
        return self._columns.toObjects(contours, *about, object_type == "annotation")

    def _rois(self, polygons: Polygons) -> Any:
        from jpype import JArray

        return self._columns.toRois(*map(JArray.of, contour_vertices(polygons)))

    def _replace(
        self,
        image: Image,
        pipe: Connection,
        entry: Any,
        image_data: Any,
        objects: Any,
        result: Any,
        suggested: Any,
    ) -> dict[str, int]:
        backups = self._class("java.io.File")(str(image.backups)).toPath()
        plan = self._import.planReplacement(
            image_data, entry, objects, result, suggested, MAX_OVERLAP, backups, False
        )
        if (warning := plan.getWarning()) is not None:
            file = plan.getLostFile()
            advice = f"; they are kept in {file}. To keep them in the image, run again with --keep"
            pipe.send(Notice(f"{warning}{advice}"))
        self._lap("plan")
        counts = self._import.replaceNuclei(image_data, plan)
        self._lap("replace")
        self._save(image, entry, image_data)
        image_data.getServer().close()
        self._lap("save")
        return {str(key): int(value) for key, value in counts.items()}

    def _save(self, image: Image, entry: Any, image_data: Any) -> None:
        """Save the image, unless somebody else did so since it was looked at."""
        if data_signature(_data_file(image)) != image.data:
            raise ImageError(
                "QuPath saved the image while this was done, and nothing was written into it: "
                "close it in QuPath and run again"
            )
        self.saving = True
        entry.saveImageData(image_data)

    def _lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._began
        self._began = now


def _data_file(image: Image) -> Path:
    """QuPath's file of an image's objects."""
    return image.project.parent / "data" / image.entry_id / "data.qpdata"


def _number(value: Any) -> float | None:
    """A measurement of QuPath; None where there is none."""
    number = float(value)
    return None if math.isnan(number) else number


def _is_same(path: Path, other: Path) -> bool:
    """Whether two paths lead to one file: Java and Python may write one in several ways."""
    try:
        return path.samefile(other)
    except OSError:
        return False


def damaged(data: Path, backups: Path) -> str:
    """The error message for a data.qpdata that QuPath cannot read; keeps a copy of the file."""
    copy = backups / f"{data.name}.{data.stat().st_mtime_ns}.damaged"
    copy_once(data, copy)  # QuPath's window may write over it
    return (
        f"{data} is damaged and was left as it is: open the image in QuPath, which may restore "
        f"it, or move the file away and run again. A copy is in {copy}"
    )


def contour_vertices(
    polygons: Polygons,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int32]]:
    """x and y (V,) of all vertices, polygon after polygon, and the end (N,) of each polygon."""
    rings = shapely.get_exterior_ring(polygons)
    xy = shapely.get_coordinates(rings)  # each ring's first vertex again at its end
    ends = np.cumsum(shapely.get_num_points(rings))
    keep = np.ones(len(xy), dtype=bool)
    keep[ends - 1] = False
    x, y = np.ascontiguousarray(xy[keep].T)
    return x, y, (ends - np.arange(1, len(ends) + 1)).astype(np.int32)


def uuid_halves(uuids: NDArray[np.str_]) -> NDArray[np.int64]:
    """(2 N,) the most and the least significant 64 bits of each UUID, as Java takes them."""
    digits = "".join(uuids.tolist()).replace("-", "")
    return np.frombuffer(bytes.fromhex(digits), dtype=">i8").astype(np.int64)

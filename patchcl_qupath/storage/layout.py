"""All paths of our files in a project: the folder ``patchcl`` beside the .qpproj file.

models/NAME.pt, NAME.json           weights; their settings and training
runs/<run>/run.json                 provenance of a run, and outcomes of its images
runs/<run>/<image>/                 finished tiles of an image (``execution.tile_store``)
results/<image>/                    nuclei of an image (``project.results``)
surveys/<image>.parquet             uncertainty grid of an image
previews/<image>.png                a picture of an image's nuclei
errors/<name>-<image>.png           a picture of an image's errors, beside ground truth
report/index.html                   the report
report/outcomes/<image>.json        outcome of an image in its last run
report/tables/                      tables, for the report to link to
report/images/<image>/              pictures and figures of an image for the report
exports/                            tables, and files for other programs
regions/, stains/, labels/          exports of the Groovy scripts, by image
fields/<image>.json                 ROIs to correct
changes/<image>/                    its ROIs, suggested and corrected, and what refining changed
review.json                         where groovy/review.groovy was when it was closed
imported/<image>.json               receipt of an import into QuPath
backups/<image>/                    copies of an image's data.qpdata before our first write
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from patchcl_qupath.errors import ConfigError
from patchcl_qupath.storage.files import readable

RESULT, NUCLEI = "result.json", "nuclei.parquet"  # in an image's folder of results
FIGURES = "figures.json"  # in its folder of figures
CHANGES = "changes.json"  # in its folder of changes
TYPICAL = "typical.json"  # in its folder of finished tiles

_PORTS = [f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10)]
_DEVICES = {"CON", "PRN", "AUX", "NUL", *_PORTS}  # what Windows takes such a name for
_NAME_BYTES = 150  # of a file name, of which systems take 255, with what is added to it


@dataclass(frozen=True)
class Layout:
    """The paths below ``root``. Images are named by their ids."""

    root: Path

    @property
    def models(self) -> Path:
        """The folder of models."""
        return self.root / "models"

    def model(self, name: str) -> Path:
        """A model's weights. Raises ConfigError for a name that no file can have on some system."""
        if _is_device(name) or not re.fullmatch(r'(?!\.)[^<>:"/\\|?*\x00-\x1f]+(?<![. ])', name):
            raise ConfigError(
                f"a model cannot be named {name!r}, as not every system can name a file so: use "
                "letters, digits, - and _"
            )
        return self.models / f"{name}.pt"

    def model_records(self) -> list[Path]:
        """The records of all models, sorted by name."""
        return sorted(self.models.glob("[!.]*.json"))

    def run(self, run: str) -> Path:
        """The folder of a run."""
        return self.root / "runs" / run

    def run_record(self, run: str) -> Path:
        """The provenance of a run, and the outcomes of its images."""
        return self.run(run) / "run.json"

    def tiles(self, run: str, image: str) -> Path:
        """The folder of an image's finished tiles."""
        return self.run(run) / image

    def results(self, image: str) -> Path:
        """The folder of an image's nuclei."""
        return self.root / "results" / image

    def replaced(self) -> list[Path]:
        """The folders in which folders of images are replaced that nothing else makes again."""
        return [self.root / "results", self.root / "changes"]

    def result(self, image: str) -> Path:
        """The provenance of an image's nuclei."""
        return self.results(image) / RESULT

    def nuclei(self, image: str) -> Path:
        """An image's nuclei as GeoParquet."""
        return self.results(image) / NUCLEI

    def uncertainty(self, image: str) -> Path:
        """An image's uncertainty grid."""
        return self.root / "surveys" / f"{image}.parquet"

    def tiles_of_runs(self, image: str) -> list[Path]:
        """The folders of an image's finished tiles, of each run that has some."""
        return [run / image for run in (self.root / "runs").glob("*") if (run / image).is_dir()]

    @property
    def previews(self) -> Path:
        """The folder of previews."""
        return self.root / "previews"

    def preview(self, image: str) -> Path:
        """A picture of an image's nuclei."""
        return self.previews / f"{image}.png"

    @property
    def errors(self) -> Path:
        """The folder of pictures of errors."""
        return self.root / "errors"

    @property
    def report(self) -> Path:
        """The report's folder."""
        return self.root / "report"

    @property
    def report_page(self) -> Path:
        """The page of the report."""
        return self.report / "index.html"

    def outcome(self, image: str) -> Path:
        """The outcome of an image in its last run."""
        return self.report / "outcomes" / f"{image}.json"

    def figures(self, image: str) -> Path:
        """The folder of an image's pictures and figures for the report."""
        return self.report / "images" / image

    @property
    def exports(self) -> Path:
        """The folder of exported tables and files, unless another is named."""
        return self.root / "exports"

    def regions(self, image: str) -> Path:
        """An image's annotations, as groovy/export_regions.groovy exports them."""
        return self.root / "regions" / f"{image}.geojson"

    def source(self, export: Path) -> Path:
        """The signature of the file of objects that QuPath's process exported a file from."""
        return export.with_name(f"{export.name}.source.json")

    def stains(self, image: str) -> Path:
        """An image's stains and pixel size, as groovy/export_regions.groovy exports them."""
        return self.root / "stains" / f"{image}.json"

    def labels(self, image: str) -> Path:
        """An image's correction ROIs and nuclei, as groovy/export_labels.groovy exports them."""
        return self.root / "labels" / f"{image}.geojson"

    def rois(self, image: str) -> Path:
        """The correction ROIs of an image that were suggested last."""
        return self.root / "fields" / f"{image}.json"

    def changes(self, image: str) -> Path:
        """The folder of an image's corrected ROIs, and of what a refined model changed there."""
        return self.root / "changes" / image

    def receipt(self, image: str) -> Path:
        """The receipt of an import into QuPath."""
        return self.root / "imported" / f"{image}.json"

    def backups(self, image: str) -> Path:
        """The folder of copies of an image's data.qpdata."""
        return self.root / "backups" / image

    @property
    def qupath_log(self) -> Path:
        """The log of our QuPath process."""
        return self.root / "qupath.log"


def file_name(text: str) -> str:
    """A text as the name of a file, as far as any system takes it; "" where nothing is left."""
    safe = re.sub(r'[<>:"/\\|?*]', "_", readable(text))
    short = safe.encode()[:_NAME_BYTES].decode(errors="ignore").strip(" .")
    return f"_{short}" if _is_device(short) else short


def _is_device(name: str) -> bool:
    """Whether Windows takes a file's name for a device, whatever its suffix is."""
    return name.partition(".")[0].rstrip().upper() in _DEVICES

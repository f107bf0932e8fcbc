"""Where everything that is ours lies in a project: the folder ``patchcl`` beside the .qpproj file.

models/NAME.pt, NAME.json           weights; what made them
runs/<run>/run.json                 what was run, with what
runs/<run>/<image>/                 finished tiles of an image (``execution.tile_store``)
results/<image>/                    nuclei of an image (``project.results``)
surveys/<image>.parquet             its uncertainty grid
previews/<image>.png                a picture of it
report/index.html                   the report
report/outcomes/<image>.json        what became of an image in the last run that it was in
report/images/<image>/              its pictures and figures for the report
regions/, stains/, labels/          what the Groovy scripts export of an image
fields/<image>.json                 ROIs to correct
imported/<image>.json               receipt of an import into QuPath
backups/<image>/                    copies of an image's data.qpdata from before our first write
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RESULT, NUCLEI = "result.json", "nuclei.parquet"  # in an image's folder of results
FIGURES = "figures.json"  # in its folder of figures


@dataclass(frozen=True)
class Layout:
    """The paths below ``root``. Images are named by their ids."""

    root: Path

    @property
    def models(self) -> Path:
        """The folder of models."""
        return self.root / "models"

    def model(self, name: str) -> Path:
        """A model's weights."""
        return self.models / f"{name}.pt"

    def model_records(self) -> list[Path]:
        """What describes the models, by name."""
        return sorted(self.models.glob("*.json"))

    def run(self, run: str) -> Path:
        """The folder of a run."""
        return self.root / "runs" / run

    def run_record(self, run: str) -> Path:
        """What was run, with what."""
        return self.run(run) / "run.json"

    def tiles(self, run: str, image: str) -> Path:
        """The folder of an image's finished tiles."""
        return self.run(run) / image

    def results(self, image: str) -> Path:
        """The folder of an image's nuclei."""
        return self.root / "results" / image

    def result(self, image: str) -> Path:
        """What made an image's nuclei."""
        return self.results(image) / RESULT

    def nuclei(self, image: str) -> Path:
        """An image's nuclei as GeoParquet."""
        return self.results(image) / NUCLEI

    def uncertainty(self, image: str) -> Path:
        """An image's uncertainty grid."""
        return self.root / "surveys" / f"{image}.parquet"

    @property
    def previews(self) -> Path:
        """The folder of previews."""
        return self.root / "previews"

    def preview(self, image: str) -> Path:
        """A picture of an image's nuclei."""
        return self.previews / f"{image}.png"

    @property
    def report(self) -> Path:
        """The report's folder."""
        return self.root / "report"

    @property
    def report_page(self) -> Path:
        """The report."""
        return self.report / "index.html"

    def outcome(self, image: str) -> Path:
        """What became of an image in the last run that it was in."""
        return self.report / "outcomes" / f"{image}.json"

    def figures(self, image: str) -> Path:
        """The folder of an image's pictures and figures for the report."""
        return self.report / "images" / image

    def regions(self, image: str) -> Path:
        """An image's annotations, as QuPath exports them."""
        return self.root / "regions" / f"{image}.geojson"

    def stains(self, image: str) -> Path:
        """An image's stains, as groovy/export_regions.groovy exports them."""
        return self.root / "stains" / f"{image}.json"

    def labels(self, image: str) -> Path:
        """An image's correction ROIs and their nuclei, as QuPath exports them."""
        return self.root / "labels" / f"{image}.geojson"

    def rois(self, image: str) -> Path:
        """The correction ROIs of an image that were suggested last."""
        return self.root / "fields" / f"{image}.json"

    def receipt(self, image: str) -> Path:
        """What an import into QuPath did."""
        return self.root / "imported" / f"{image}.json"

    def backups(self, image: str) -> Path:
        """The folder of copies of an image's data.qpdata."""
        return self.root / "backups" / image

    @property
    def qupath_log(self) -> Path:
        """What QuPath printed while it worked for us."""
        return self.root / "qupath.log"

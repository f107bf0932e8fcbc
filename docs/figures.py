"""Draws the figures of the guide from the sample slide, with the package itself.

    python docs/figures.py

It trains as `make demo` does, about three minutes on two cores, and writes docs/figures/*.jpg,
except three screenshots: qupath.jpg and roi.jpg of QuPath, report.jpg of a browser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from patchcl_qupath.config import Config
from patchcl_qupath.datatypes import Box, level0_to_grid
from patchcl_qupath.models import engines
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.model import Model, confidence
from patchcl_qupath.progress import Progress, Stage, counter
from patchcl_qupath.project import open_project
from patchcl_qupath.report.thumbnails import draw_contours
from patchcl_qupath.segmentation.contours import pixel_polygons
from patchcl_qupath.segmentation.instances import instances
from patchcl_qupath.segmentation.segment_tile import (
    TileContext,
    postprocessing_margin_px,
    segment_tile,
)
from patchcl_qupath.segmentation.tiling import plan
from patchcl_qupath.segmentation.typical_nuclei import typical_nuclei
from patchcl_qupath.slides.prepare import PreparedImage, prepare, training_crops
from patchcl_qupath.training import patchcl, selftrain
from patchcl_qupath.training.pseudo_labels import is_glass, pseudo_labels
from patchcl_qupath.training.supervision import targets

DOCS = Path(__file__).parent
SAMPLE = DOCS.parent / "sample_project"
SHOWN = Box(2180, 1080, 2180 + 224, 1080 + 224)  # working px: touching and pale nuclei, background
ZOOM = 2

Pixels = NDArray[np.uint8]  # (H, W, 3)
NUCLEUS, CORE, BACKGROUND = (30, 170, 70), (10, 90, 40), (60, 110, 220)  # tints
OWN_TILE, NEXT_TILE, HALO = NUCLEUS, BACKGROUND, (235, 150, 30)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The sample slide, its training crops, and the models of both stages."""

    image: PreparedImage
    crops: Sequence[Pixels]
    patchcl: Model  # stage 1
    model: Model  # stage 2: self-training

    @property
    def rgb(self) -> Pixels:
        """The part of the slide that the figures show."""
        return self.image.slide.read(SHOWN)


def main() -> None:
    config = Config()
    entries = open_project(SAMPLE, backend="files").images()
    image = prepare(entries[0], config)
    crops = training_crops(entries, config, counter(_show, Stage.READING_CROPS))
    count = counter(_show, Stage.TRAINING_PATCHCL)
    first = patchcl.train(crops, config, count)
    model = selftrain.train(crops, first, _show)
    draw(Trained(image=image, crops=crops.images, patchcl=first, model=model))


def draw(trained: Trained) -> None:
    """Draw all figures."""
    figures = {
        "stains": stains,
        "channels": channels,
        "pseudo-labels": pseudo_labelled,
        "nuclei": nuclei,
        "tiles": tiles,
        "cdcl": cdcl,
    }
    folder = DOCS / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure(trained).save(folder / f"{name}.jpg", quality=65, optimize=True)


def stains(trained: Trained) -> Image.Image:
    """The input of the networks: three stains, normalised by the percentiles of the slide."""
    normaliser = trained.image.normaliser
    assert normaliser is not None
    normalised = normaliser.apply(trained.rgb)  # (H, W, 3)
    names = ["H&E", "hematoxylin", "eosin", "residual"]
    return _row([trained.rgb, *(_grey(1 - normalised[..., i]) for i in range(3))], names)


def channels(trained: Trained) -> Image.Image:
    """The confidence channels of the PatchCL network; the chosen one is framed."""
    normaliser = trained.image.normaliser
    assert normaliser is not None
    run = engines.of(EngineKind.TORCH, trained.patchcl.network, trained.patchcl.digest)
    maps = run(normaliser.network_input(trained.rgb, trained.patchcl.input))  # (C, H, W)
    shown = [_grey(channel) for channel in maps]
    chosen = shown[trained.patchcl.channel]
    for edge in (chosen[:4], chosen[-4:], chosen[:, :4], chosen[:, -4:]):
        edge[:] = NUCLEUS
    return _row(shown, [f"channel {i}" for i in range(1, 1 + len(shown))])


def pseudo_labelled(trained: Trained) -> Image.Image:
    """PatchCL's confidence, and the pseudo-labels: nuclei, their cores, and background."""
    normaliser, config = trained.image.normaliser, trained.model.config
    assert normaliser is not None
    crops = [*trained.crops, trained.rgb]
    confidences = [confidence(trained.patchcl, crop, normaliser).nucleus for crop in crops]
    mpp, settings = config.slide.mpp, config.selftrain
    glass = [is_glass(crop, mpp, settings) for crop in crops]
    stains = [normaliser.apply(crop) for crop in crops]
    labels = pseudo_labels(stains, glass, confidences, mpp, settings)[-1]
    core = targets(labels.nuclei, labels.background)[..., 1] > 0
    tinted = _tinted(trained.rgb, labels.background, BACKGROUND)
    tinted = _tinted(tinted, (labels.nuclei > 0) & ~core, NUCLEUS)
    tinted = _tinted(tinted, core, CORE)
    names = ["H&E", "PatchCL confidence", "pseudo-labels"]
    return _row([trained.rgb, _grey(confidences[-1]), tinted], names)


def nuclei(trained: Trained) -> Image.Image:
    """From the probability maps to contours."""
    normaliser, config = trained.image.normaliser, trained.model.config
    assert normaliser is not None
    nucleus, core = confidence(trained.model, trained.rgb, normaliser)
    assert core is not None
    settings = (config.segment, EngineKind.TORCH)
    separation = typical_nuclei(trained.image, trained.model, *settings).config
    labels = instances(nucleus, config.slide.mpp, separation, trained.model.threshold, core)
    contours = draw_contours(trained.rgb, pixel_polygons(labels), ZOOM)
    names = ["H&E", "nucleus probability", "core probability", "contours"]
    return _row([trained.rgb, _grey(nucleus), _grey(core), np.asarray(contours)], names)


def tiles(trained: Trained) -> Image.Image:
    """The write and read box of a tile, and the owners of nuclei near its border."""
    image, config = trained.image, trained.model.config
    slide, settings = image.slide, (config.segment, EngineKind.TORCH)
    typical = typical_nuclei(image, trained.model, *settings)
    halo_px = trained.model.receptive_radius_px + postprocessing_margin_px(typical.config, slide)
    planned = plan(
        shape=slide.shape,
        tissue=image.tissue,
        tissue_px=image.tissue_px,
        tile_px=config.slide.tile_px,
        halo_px=halo_px,
        divisor=trained.model.divisor,
    )
    pairs = [(a, b) for a in planned for b in planned if (b.row, b.col) == (a.row, a.col + 1)]
    left, right = pairs[-1]
    px = slide.thumbnail_px(3.0)
    whole = Image.fromarray(slide.thumbnail(3.0))
    pen = ImageDraw.Draw(whole)
    for tile in planned:
        pen.rectangle(_corners(tile.write, px), outline=(90, 90, 90))
    pen.rectangle(_corners(left.read, px), outline=HALO, width=4)
    pen.rectangle(_corners(left.write, px), outline=OWN_TILE, width=4)

    border = left.write.col1  # a strip of the slide along it, as high as the picture of the whole
    row0 = left.write.row0 + 200
    high, wide = whole.height // ZOOM, whole.width * 3 // 2 // ZOOM
    strip = Box(row0, border - wide // 2, row0 + high, border + wide // 2)
    near = Image.fromarray(slide.read(strip)).resize((strip.shape[1] * ZOOM, high * ZOOM))
    pen = ImageDraw.Draw(near)
    context = TileContext(
        image=image, model=trained.model, typical=typical, engine=EngineKind.TORCH
    )
    for tile, colour in ((left, OWN_TILE), (right, NEXT_TILE)):
        found, _, _ = segment_tile(context, tile)
        for polygon in level0_to_grid(found.polygons, slide.downsample):
            xy = (shapely.get_coordinates(polygon) - (strip.col0, strip.row0)) * ZOOM
            pen.line([tuple(corner) for corner in xy.tolist()], fill=colour, width=3)
    x = (border - strip.col0) * ZOOM
    pen.line([(x, 0), (x, near.height)], fill=(0, 0, 0), width=2)
    return _row(
        [np.asarray(whole), np.asarray(near)],
        ["write box, read box", "nuclei of this tile, of the next"],
    )


def cdcl(trained: Trained) -> Image.Image:
    """Where the teacher's prediction is used, and the patches of the contrast."""
    normaliser, settings = trained.image.normaliser, trained.model.config.cdcl
    assert normaliser is not None
    teacher = confidence(trained.model, trained.rgb, normaliser).nucleus
    confident = _tinted(trained.rgb, teacher > settings.confidence_threshold, NUCLEUS)
    confident = _tinted(confident, teacher < 1 - settings.confidence_threshold, BACKGROUND)
    px = settings.patch_px
    h, w = (side // px for side in teacher.shape)
    fraction = (teacher > 0.5)[: h * px, : w * px].reshape(h, px, w, px).mean(axis=(1, 3))
    of_pixel = np.kron(fraction, np.ones((px, px)))
    patches = _tinted(trained.rgb, of_pixel >= 1 - settings.purity, NUCLEUS)
    patches = _tinted(patches, of_pixel <= settings.purity, BACKGROUND)
    patches[::px] = patches[:, ::px] = 255
    names = ["H&E", "teacher above threshold", "contrasted patches"]
    return _row([trained.rgb, confident, patches], names)


def _show(progress: Progress) -> None:
    if progress.done == progress.total:
        print(f"{progress.label}: {progress.done}", flush=True)


def _corners(box: Box, px: int) -> list[float]:
    return [box.col0 / px, box.row0 / px, box.col1 / px - 1, box.row1 / px - 1]


def _grey(values: NDArray[np.float32]) -> Pixels:
    """Values (H, W) in [0, 1] as grey levels; 1 is white."""
    grey = np.clip(values * 255, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def _tinted(rgb: Pixels, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Pixels:
    """The image, mixed with as much of the colour where the mask is set."""
    tinted = rgb.copy()
    tinted[mask] = (rgb[mask] * 0.5 + np.array(colour) * 0.5).astype(np.uint8)
    return tinted


def _row(pictures: Sequence[Pixels], names: Sequence[str]) -> Image.Image:
    """Pictures side by side on white, scaled to the same height, with a name above each."""
    font, gap, head = ImageFont.load_default(24), 10, 38
    high = max(ZOOM * SHOWN.shape[0], *(len(picture) for picture in pictures))
    scaled = []
    for pixels in pictures:
        picture = Image.fromarray(pixels)
        wide = round(picture.width * high / picture.height)
        scaled.append(picture.resize((wide, high), Image.Resampling.BICUBIC))
    width = sum(picture.width for picture in scaled) + gap * (len(scaled) - 1)
    row = Image.new("RGB", (width, high + head), (255, 255, 255))
    pen = ImageDraw.Draw(row)
    x = 0
    for picture, name in zip(scaled, names, strict=True):
        pen.text((x, 2), name, fill=(40, 40, 40), font=font)
        row.paste(picture, (x, head))
        x += picture.width + gap
    return row


if __name__ == "__main__":
    main()

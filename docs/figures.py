"""Draws the figures of the guide from the sample slide, with the package itself.

    python docs/figures.py

It trains as `make demo` does, about three minutes on two cores, and writes docs/figures/*.jpg; but
for qupath.jpg and field.jpg, which are pictures of QuPath's window, and report.jpg, of a browser's.
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
from patchcl_qupath.slides.prepare import PreparedImage, prepare, training_crops
from patchcl_qupath.training import patchcl, selftrain
from patchcl_qupath.training.pseudo_labels import is_glass, pseudo_labels
from patchcl_qupath.training.supervision import targets

DOCS = Path(__file__).parent
SAMPLE = DOCS.parent / "sample_project"
SHOWN = Box(2180, 1080, 2180 + 224, 1080 + 224)  # working px: nuclei that touch, pale ones, none
ZOOM = 2

Pixels = NDArray[np.uint8]  # (H, W, 3)
NUCLEUS, NONE, UNCERTAIN = (30, 170, 70), (60, 110, 220), (235, 150, 30)


@dataclass(frozen=True)
class Learnt:
    """The sample slide, crops of it, and what was learnt from them."""

    image: PreparedImage
    crops: Sequence[Pixels]
    alone: Model  # of PatchCL
    model: Model  # that it taught

    @property
    def rgb(self) -> Pixels:
        """What is shown of the slide."""
        return self.image.slide.read(SHOWN)


def main() -> None:
    config = Config()
    entries = open_project(SAMPLE, backend="files").images()
    image = prepare(entries[0], config)
    crops = training_crops(entries, config, counter(_say, Stage.READING_CROPS))
    count = counter(_say, Stage.TRAINING_PATCHCL)
    alone = patchcl.train(crops, config, count)
    model = selftrain.train(crops, alone, _say)
    draw(Learnt(image, crops.images, alone, model))


def draw(learnt: Learnt) -> None:
    """All figures."""
    for figure in (stains, channels, samples, nuclei, tiles, cdcl):
        path = DOCS / "figures" / f"{figure.__name__}.jpg"
        path.parent.mkdir(exist_ok=True)
        figure(learnt).save(path, quality=80, optimize=True)


def stains(learnt: Learnt) -> Image.Image:
    """What the networks see: three stains, each on the scale of its slide."""
    normaliser = learnt.image.normaliser
    assert normaliser is not None
    parts = normaliser.apply(learnt.rgb)  # (H, W, 3)
    names = ["the slide", "hematoxylin", "eosin", "residual"]
    return _row([learnt.rgb, *(_grey(1 - parts[..., i]) for i in range(3))], names)


def channels(learnt: Learnt) -> Image.Image:
    """The four confidences of PatchCL's network; the frame is around the one that is kept."""
    normaliser = learnt.image.normaliser
    assert normaliser is not None
    run = engines.of(EngineKind.TORCH, learnt.alone.network, learnt.alone.digest)
    maps = run(normaliser.network_input(learnt.rgb, learnt.alone.input))  # (C, H, W)
    shown = [_grey(channel) for channel in maps]
    kept = shown[learnt.alone.channel]
    for edge in (kept[:4], kept[-4:], kept[:, :4], kept[:, -4:]):
        edge[:] = NUCLEUS
    return _row(shown, [f"channel {i}" for i in range(1, 1 + len(shown))])


def samples(learnt: Learnt) -> Image.Image:
    """What PatchCL is sure of, and what it teaches."""
    normaliser, config = learnt.image.normaliser, learnt.model.config
    assert normaliser is not None
    sure = confidence(learnt.alone, learnt.rgb, normaliser).nucleus
    crops = [*learnt.crops, learnt.rgb]
    predictions = [confidence(learnt.alone, crop, normaliser).nucleus for crop in crops]
    mpp, settings = config.slide.mpp, config.selftrain
    glass = [is_glass(crop, mpp, settings) for crop in crops]
    stains = [normaliser.apply(crop) for crop in crops]
    answers = pseudo_labels(stains, glass, predictions, mpp, settings)
    labels, background = answers[-1]
    core = targets(labels, background)[..., 1] > 0
    taught = _tinted(learnt.rgb, background, NONE)
    taught = _tinted(taught, (labels > 0) & ~core, NUCLEUS)
    taught = _tinted(taught, core, (10, 90, 40))
    names = ["the slide", "confidence of PatchCL", "nuclei and cores, none"]
    return _row([learnt.rgb, _grey(sure), taught], names)


def nuclei(learnt: Learnt) -> Image.Image:
    """From what the network says to outlines."""
    normaliser, config = learnt.image.normaliser, learnt.model.config
    assert normaliser is not None
    sure, core = confidence(learnt.model, learnt.rgb, normaliser)
    assert core is not None
    labels = instances(sure, config.slide.mpp, config.segment, learnt.model.threshold, core)
    outlined = draw_contours(learnt.rgb, pixel_polygons(labels), ZOOM)
    names = ["the slide", "confidence", "core", "nuclei"]
    return _row([learnt.rgb, _grey(sure), _grey(core), np.asarray(outlined)], names)


def tiles(learnt: Learnt) -> Image.Image:
    """A tile's write box, its halo, and who owns the nuclei on its border."""
    image, config = learnt.image, learnt.model.config
    slide = image.slide
    halo_px = learnt.model.receptive_radius_px + postprocessing_margin_px(config, slide)
    planned = plan(
        *(slide.shape, image.tissue, image.tissue_px, config.slide.tile_px, halo_px),
        divisor=learnt.model.divisor,
    )
    pairs = [(a, b) for a in planned for b in planned if (b.row, b.col) == (a.row, a.col + 1)]
    left, right = pairs[-1]
    px = slide.thumbnail_px(3.0)
    whole = Image.fromarray(slide.thumbnail(3.0))
    pen = ImageDraw.Draw(whole)
    for tile in planned:
        pen.rectangle(_corners(tile.write, px), outline=(90, 90, 90))
    pen.rectangle(_corners(left.read, px), outline=UNCERTAIN, width=4)
    pen.rectangle(_corners(left.write, px), outline=NUCLEUS, width=4)

    border = left.write.col1  # a strip of the slide along it, as high as the picture of the whole
    row0 = left.write.row0 + 200
    high, wide = whole.height // ZOOM, whole.width * 3 // 2 // ZOOM
    strip = Box(row0, border - wide // 2, row0 + high, border + wide // 2)
    near = Image.fromarray(slide.read(strip)).resize((strip.shape[1] * ZOOM, high * ZOOM))
    pen = ImageDraw.Draw(near)
    context = TileContext(image=image, model=learnt.model, config=config, engine=EngineKind.TORCH)
    for tile, colour in ((left, NUCLEUS), (right, NONE)):
        found, _, _ = segment_tile(context, tile)
        for polygon in level0_to_grid(found.polygons, slide.downsample):
            xy = (shapely.get_coordinates(polygon) - (strip.col0, strip.row0)) * ZOOM
            pen.line([tuple(corner) for corner in xy.tolist()], fill=colour, width=3)
    x = (border - strip.col0) * ZOOM
    pen.line([(x, 0), (x, near.height)], fill=(0, 0, 0), width=2)
    return _row(
        [np.asarray(whole), np.asarray(near)],
        ["a tile, what it reads", "each nucleus belongs to one tile"],
    )


def cdcl(learnt: Learnt) -> Image.Image:
    """Where the teacher is listened to, and which patches are contrasted."""
    normaliser, settings = learnt.image.normaliser, learnt.model.config.cdcl
    assert normaliser is not None
    said = confidence(learnt.model, learnt.rgb, normaliser).nucleus
    sure = _tinted(learnt.rgb, said > settings.confidence_threshold, NUCLEUS)
    sure = _tinted(sure, said < 1 - settings.confidence_threshold, NONE)
    px = settings.patch_px
    h, w = (side // px for side in said.shape)
    share = (said > 0.5)[: h * px, : w * px].reshape(h, px, w, px).mean(axis=(1, 3))
    each = np.kron(share, np.ones((px, px)))
    kinds = _tinted(learnt.rgb, each >= 1 - settings.purity, NUCLEUS)
    kinds = _tinted(kinds, each <= settings.purity, NONE)
    kinds[::px] = kinds[:, ::px] = 255
    names = ["the slide", "the teacher is sure", "patches that are compared"]
    return _row([learnt.rgb, sure, kinds], names)


def _say(progress: Progress) -> None:
    if progress.done == progress.total:
        print(f"{progress.label}: {progress.done}", flush=True)


def _corners(box: Box, px: int) -> list[float]:
    return [box.col0 / px, box.row0 / px, box.col1 / px - 1, box.row1 / px - 1]


def _grey(values: NDArray[np.float32]) -> Pixels:
    """Values (H, W) in [0, 1] as shades, 1 is white."""
    shades = np.clip(values * 255, 0, 255).astype(np.uint8)
    return np.repeat(shades[..., None], 3, axis=-1)


def _tinted(rgb: Pixels, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Pixels:
    """Half the colour where the mask is."""
    tinted = rgb.copy()
    tinted[mask] = (rgb[mask] * 0.5 + np.array(colour) * 0.5).astype(np.uint8)
    return tinted


def _row(pictures: Sequence[Pixels], names: Sequence[str]) -> Image.Image:
    """Pictures side by side on white, all as high as the highest, a name above each."""
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

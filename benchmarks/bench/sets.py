"""The images that the benchmark measures: labelled sets, and pieces without nuclei."""

from __future__ import annotations

import hashlib
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from patchcl_qupath.project import NewImage, Project, init_project, open_project

# The labelled sets, and µm/px of their images.
MPP = {
    "monuseg_train": 0.25,
    "lgg28": 0.25,
    "dsb2018_stained": 0.25,
    "pannuke_uterus": 0.25,
    "monusac_kidney": 0.1945,
    "deepliif_ihc": 0.25,
}
# Kinds of pieces without nuclei, or with hardly any: patterns of their files, and µm/px.
# Fat and collagen have a few small nuclei; ink and glass have none.
EMPTY = {
    "fat": (("collagen_fat/*_adipocyte.png",), 0.49),
    "collagen": (("collagen_fat/*_collagen.png",), 0.49),
    "ink_glass": (("ink_and_edges/no-tissue*.png", "ink_and_edges/almost-white*.png"), 0.5),
}


@dataclass(frozen=True)
class ImageSet:
    """Images of one pixel size, in µm; ``ground_truth`` is the folder of labels named as they."""

    name: str
    images: tuple[Path, ...]
    mpp: float
    ground_truth: Path | None = None

    @cached_property
    def digest(self) -> str:
        """Hexadecimal digest of the images, and of how they are shown."""
        return _digest(self.images, self.name, self.mpp)

    @cached_property
    def labels_digest(self) -> str:
        """Hexadecimal digest of the labels."""
        assert self.ground_truth is not None
        return _digest([self.ground_truth / path.name for path in self.images])

    @cached_property
    def mm2(self) -> float:
        """The area of all images."""
        px = 0
        for path in self.images:
            with Image.open(path) as image:
                px += image.width * image.height
        return px * self.mpp**2 / 1e6


def labelled_sets(data: Path, names: Sequence[str], count: int | None = None) -> list[ImageSet]:
    """The labelled sets of these names, with all images or the first ``count``.

    Ends the program where one is absent.
    """
    found = []
    for name in names:
        folder = data / name
        if not (folder / "labels").is_dir():
            sys.exit(f"needs images and labels in {folder}")
        images = sorted(path.resolve() for path in (folder / "images").iterdir())[:count]
        found.append(ImageSet(name, tuple(images), MPP[name], folder / "labels"))
    return found


def empty_sets(data: Path, count: int | None = None) -> list[ImageSet]:
    """The pieces without nuclei by their kind, all or the first ``count``; none if absent."""
    found = []
    for name, (patterns, mpp) in EMPTY.items():
        every = itertools.chain(*(sorted((data / "no_nuclei").glob(each)) for each in patterns))
        if images := [path.resolve() for path in every][:count]:
            found.append(ImageSet(name, tuple(images), mpp))
    return found


@contextmanager
def project_of(images: ImageSet) -> Iterator[Project]:
    """A project of a set's images, deleted at the end of the block."""
    new = []
    for path in images.images:
        with Image.open(path) as image:
            new.append(NewImage(path, [image.size], (images.mpp, images.mpp)))
    with tempfile.TemporaryDirectory() as folder:
        yield open_project(init_project(Path(folder), new), backend="files")


def _digest(paths: Sequence[Path], *more: object) -> str:
    digest = hashlib.sha256(repr(more).encode())
    for path in paths:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()

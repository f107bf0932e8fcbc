"""How far a run or a training is, as a record that a console, a program or a test can read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """What is under way. The values are for people."""

    READING_CROPS = "reading training crops"
    TRAINING_PATCHCL = "training PatchCL"
    CHOOSING_PSEUDO_LABELS = "choosing pseudo-labels"
    TRAINING_NETWORK = "training the segmentation network"
    CALIBRATING = "calibrating probabilities"
    READING_ROIS = "reading corrected ROIs"
    REFINING = "refining the segmentation network"
    WAITING_FOR_WORKERS = "waiting for workers"
    FINDING_TISSUE = "finding tissue"
    SEGMENTING = "segmenting"
    GROWING_CELLS = "growing cells"
    WRITING = "writing"
    IMAGES = "images"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A stage has ``done`` of ``total`` steps behind it; ``total`` is None where none are counted.

    ``image`` is the name of the image that the stage works on; ``detail`` follows the stage in
    what people read.
    """

    stage: Stage
    done: int = 0
    total: int | None = None
    image: str | None = None
    detail: str = ""

    @property
    def label(self) -> str:
        """The stage for people, without its count."""
        what = f"{self.stage} {self.detail}".rstrip()
        return what if self.image is None else f"{self.image}: {what}"


ShowProgress = Callable[[Progress], None]
ShowCount = Callable[[int, int], None]  # steps done, steps in all


def counter(show: ShowProgress, stage: Stage, image: str | None = None) -> ShowCount:
    """A function that shows how many steps of one stage are done, of how many."""

    def show_count(done: int, total: int) -> None:
        show(Progress(stage=stage, done=done, total=total, image=image))

    return show_count


def part_of(show_count: ShowCount, before: int, total: int) -> ShowCount:
    """A function that shows the steps of one part of a stage as some of ``total``.

    ``before`` are the steps of other parts that are done.
    """

    def show_part(done: int, of: int) -> None:
        show_count(before + done, total)

    return show_part


def hide_progress(progress: Progress) -> None:
    """Shows nothing."""

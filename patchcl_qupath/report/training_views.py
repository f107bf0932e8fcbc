"""What the templates of the report show of models: how each was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from patchcl_qupath.report.charts import Chart, Mark, curves
from patchcl_qupath.report.found import FoundModel
from patchcl_qupath.report.views import Picture, guarded
from patchcl_qupath.storage.records import CDCLLog, PatchCLLog, SelfTrainingLog, training_log

_DIGEST = 12  # characters of a model's digest that are shown


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A confidence channel on a crop, and its correlation with hematoxylin."""

    picture: Picture
    correlation: float


@dataclass(frozen=True, kw_only=True)
class PatchCLView:
    """Training of PatchCL; ``chosen`` is the number, from 1, of the channel that was chosen."""

    steps: int
    converged_at: int | None
    loss: Chart | None
    separation: Chart | None
    crop: Picture
    channels: tuple[Channel, ...]
    chosen: int
    inverted: bool


@dataclass(frozen=True, kw_only=True)
class SelfTrainingView:
    """Self-training; fractions are those of training pixels."""

    steps: int
    labelled_fraction: float
    nucleus_fraction: float
    loss: Chart | None
    cdcl_steps: int
    cdcl_losses: Chart | None


@dataclass(frozen=True, kw_only=True)
class CDCLView:
    """Refinement by CDCL, from the model of a digest."""

    steps: int
    refined_from: str
    losses: Chart | None
    distillation_steps: int
    distillation_losses: Chart | None


class _Training(NamedTuple):
    """The views of a training log: those of the stages that there were."""

    patchcl: PatchCLView | None = None
    selftraining: SelfTrainingView | None = None
    cdcl: CDCLView | None = None


@dataclass(frozen=True, kw_only=True)
class ModelView:
    """How a model was trained, and how many images it segmented; ``damaged`` if its log is."""

    name: str
    images: int
    patchcl: PatchCLView | None
    selftraining: SelfTrainingView | None
    cdcl: CDCLView | None
    damaged: bool

    @classmethod
    def of(cls, model: FoundModel, number: int) -> ModelView:
        """The view of model ``number`` of the page."""
        training = guarded(_training, model, number)
        return cls(
            name=model.name,
            images=len(model.images),
            damaged=training is None,
            **(training or _Training())._asdict(),
        )


def _training(model: FoundModel, number: int) -> _Training:
    log = training_log(model.record.training)
    if log is None:
        return _Training()
    if isinstance(log, PatchCLLog):
        return _Training(patchcl=_patchcl(model.name, log, number))
    return _Training(
        patchcl=_patchcl(model.name, log.patchcl, number),
        selftraining=_selftraining(model.name, log, number),
        cdcl=_cdcl(model.name, log, number) if isinstance(log, CDCLLog) else None,
    )


def _patchcl(name: str, log: PatchCLLog, number: int) -> PatchCLView:
    marks, channels = [], log.channels
    if log.converged_at is not None:
        marks.append(Mark(log.converged_at, f"converged: step {log.converged_at:,}"))
    distances = zip(log.positive_positive, log.positive_negative, strict=True)
    separation = {
        "separation": [negative - positive for positive, negative in distances],
        "positive to negative": log.positive_negative,
        "positive to positive": log.positive_positive,
    }
    shown = zip(channels.confidences, log.hematoxylin_correlation, strict=True)
    return PatchCLView(
        steps=log.steps,
        converged_at=log.converged_at,
        loss=curves(
            f"patchcl-loss-{number}", f"{name}: loss of PatchCL", {"loss": log.loss}, marks
        ),
        separation=curves(
            f"separation-{number}", f"{name}: distances of patches", separation, marks
        ),
        crop=Picture.of_base64(channels.crop, "A training crop"),
        channels=tuple(
            Channel(
                picture=Picture.of_base64(jpeg, _channel_alt(i, chosen=i == channels.chosen)),
                correlation=correlation,
            )
            for i, (jpeg, correlation) in enumerate(shown)
        ),
        chosen=channels.chosen + 1,
        inverted=channels.inverted,
    )


def _channel_alt(channel: int, *, chosen: bool) -> str:
    return f"Confidence of channel {channel + 1}{', which was chosen' if chosen else ''}"


def _selftraining(name: str, log: SelfTrainingLog, number: int) -> SelfTrainingView:
    title = f"{name}: loss of self-training"
    return SelfTrainingView(
        steps=len(log.loss),
        labelled_fraction=log.labelled_fraction,
        nucleus_fraction=log.nucleus_fraction,
        loss=curves(f"selftraining-loss-{number}", title, {"loss": log.loss}),
        cdcl_steps=len(log.unlabelled_cdcl),
        cdcl_losses=curves(
            f"unlabelled-cdcl-losses-{number}",
            f"{name}: losses of CDCL without labels",
            _by_name(log.unlabelled_cdcl),
        ),
    )


def _cdcl(name: str, log: CDCLLog, number: int) -> CDCLView:
    return CDCLView(
        steps=len(log.cdcl),
        refined_from=log.refined_from[:_DIGEST],
        losses=curves(f"cdcl-losses-{number}", f"{name}: losses of CDCL", _by_name(log.cdcl)),
        distillation_steps=len(log.distillation),
        distillation_losses=curves(
            f"distillation-losses-{number}",
            f"{name}: losses of distillation",
            _by_name(log.distillation),
        ),
    )


def _by_name(losses: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The losses of each step, by name, in the order in which they begin."""
    names = dict.fromkeys(name for step in losses for name in step)
    return {name: [step.get(name, 0.0) for step in losses] for name in names}

"""Agreement of predicted nuclei with ground truth: Dice, AJI, PQ, and F1 at IoU 0.5.

Nuclei are label images, (H, W) integers in which 0 is background and each other value one nucleus;
or polygons. Scores are between 0 and 1; they are 1 if neither side has a nucleus.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Labels, Polygons


@dataclass(frozen=True, kw_only=True)
class Overlaps:
    """The overlaps of predicted with true nuclei, from which all scores are computed.

    Of P predicted and T true nuclei, K pairs overlap: ``row`` (K,) and ``col`` (K,) index the
    predicted and the true one, ``shared`` (K,) is the area of their intersection, above 0.
    ``predicted`` (P,) and ``true`` (T,) are areas of nuclei. ``foreground`` has the areas of the
    union of predicted nuclei, of the union of true nuclei, and of the intersection of these unions.
    All areas are in px².
    """

    row: NDArray[np.intp]
    col: NDArray[np.intp]
    shared: NDArray[np.float64]
    predicted: NDArray[np.float64]
    true: NDArray[np.float64]
    foreground: tuple[float, float, float]

    @classmethod
    def of_labels(cls, prediction: Labels, ground_truth: Labels) -> Overlaps:
        """Of label images of equal shape; areas are numbers of pixels. Raises ValueError."""
        if prediction.shape != ground_truth.shape:
            raise ValueError(
                f"label images of different shapes: {prediction.shape}, {ground_truth.shape}"
            )
        predicted_ids, predicted = _counted(prediction[prediction != 0])
        true_ids, true = _counted(ground_truth[ground_truth != 0])
        both = (prediction != 0) & (ground_truth != 0)
        row = np.searchsorted(predicted_ids, prediction[both])
        col = np.searchsorted(true_ids, ground_truth[both])
        pairs, shared = _counted(row * len(true_ids) + col)
        row, col = np.divmod(pairs, max(1, len(true_ids)))
        foreground = float(predicted.sum()), float(true.sum()), float(shared.sum())
        return cls(
            row=row,
            col=col,
            shared=shared,
            predicted=predicted,
            true=true,
            foreground=foreground,
        )

    @classmethod
    def of_polygons(cls, prediction: Polygons, ground_truth: Polygons) -> Overlaps:
        """Of valid polygons or multipolygons, (P,) and (T,), in the same frame; areas are exact."""
        row, col = shapely.STRtree(ground_truth).query(prediction, predicate="intersects")
        common = shapely.intersection(prediction[row], ground_truth[col])
        shared = shapely.area(common)
        overlap = shared > 0  # others only touch
        return cls(
            row=row[overlap],
            col=col[overlap],
            shared=shared[overlap],
            predicted=shapely.area(prediction),
            true=shapely.area(ground_truth),
            foreground=(
                _union_area(prediction),
                _union_area(ground_truth),
                _union_area(common[overlap]),
            ),
        )

    @property
    def dice(self) -> float:
        """Dice coefficient of the foregrounds: 2 |P ∩ T| / (|P| + |T|)."""
        predicted, true, both = self.foreground
        return 2 * both / (predicted + true) if predicted + true else 1.0

    @property
    def aji(self) -> float:
        """Aggregated Jaccard index.

        Each true nucleus is matched to the predicted one with the largest IoU; the score is the sum
        of intersections over the sum of unions. Unmatched nuclei of both sides add their areas to
        the unions. As published, several true nuclei may be matched to the same predicted one.

        N. Kumar et al., A Dataset and a Technique for Generalized Nuclear Segmentation for
        Computational Pathology, IEEE Trans Med Imaging 36 (2017), algorithm 1.
        """
        best = self._best(self.col)
        missed = np.delete(self.true, self.col[best])
        unmatched = np.delete(self.predicted, self.row[best])
        unions = self._union[best].sum() + missed.sum() + unmatched.sum()
        return float(self.shared[best].sum() / unions) if unions else 1.0

    @property
    def f1(self) -> float:
        """Detection F1: a true nucleus is found if a predicted one overlaps it with IoU > 0.5."""
        nuclei = len(self.predicted) + len(self.true)
        return 2 * len(self._matched) / nuclei if nuclei else 1.0

    @property
    def pq(self) -> float:
        """Panoptic quality: detection F1 times the mean IoU of matched pairs.

        A. Kirillov et al., Panoptic Segmentation, CVPR 2019.
        """
        nuclei = len(self.predicted) + len(self.true)
        return float(2 * self._matched.sum() / nuclei) if nuclei else 1.0

    @property
    def _union(self) -> NDArray[np.float64]:
        return self.predicted[self.row] + self.true[self.col] - self.shared

    @cached_property
    def _iou(self) -> NDArray[np.float64]:
        return self.shared / self._union

    @property
    def _matched(self) -> NDArray[np.float64]:
        """(M,) the IoU of matched pairs: above 0.5, and the largest of both nuclei.

        Above 0.5 a nucleus has at most one match, unless nuclei of one side overlap each other.
        """
        mutual = np.intersect1d(self._best(self.row), self._best(self.col))
        iou = self._iou[mutual]
        return iou[iou > 0.5]

    def _best(self, nucleus: NDArray[np.intp]) -> NDArray[np.intp]:
        """The pair with the largest IoU of each nucleus that is in a pair; of equal ones the first.

        ``nucleus`` (K,) is the nucleus of each pair: ``row`` or ``col``.
        """
        order = np.lexsort((-self._iou, nucleus))
        first = np.flatnonzero(np.diff(nucleus[order], prepend=-1))
        return order[first]


def dice(prediction: Labels, ground_truth: Labels) -> float:
    """``Overlaps.dice`` of label images."""
    return Overlaps.of_labels(prediction, ground_truth).dice


def aji(prediction: Labels, ground_truth: Labels) -> float:
    """``Overlaps.aji`` of label images."""
    return Overlaps.of_labels(prediction, ground_truth).aji


def f1(prediction: Labels, ground_truth: Labels) -> float:
    """``Overlaps.f1`` of label images."""
    return Overlaps.of_labels(prediction, ground_truth).f1


def pq(prediction: Labels, ground_truth: Labels) -> float:
    """``Overlaps.pq`` of label images."""
    return Overlaps.of_labels(prediction, ground_truth).pq


def _counted(values: Labels) -> tuple[Labels, NDArray[np.float64]]:
    """The unique values, ascending, and the number of each."""
    unique, count = np.unique(values, return_counts=True)
    return unique, count.astype(np.float64)


def _union_area(polygons: Polygons) -> float:
    """The area of the union of polygons. Disjoint groups are fast: 100,000 take a second."""
    return float(shapely.area(shapely.disjoint_subset_union_all(polygons)))

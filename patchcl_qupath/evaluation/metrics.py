"""How well nuclei agree with the truth: Dice, AJI, PQ, and F1 at IoU 0.5.

Nuclei are label images, (H, W) integers of which 0 is background and each other value is one
nucleus, or polygons. Two sides without a nucleus agree fully (1.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Labels, Polygons


@dataclass(frozen=True)
class Overlaps:
    """Which predicted nuclei overlap which true ones: all that a score needs to know.

    Of P predicted and T true nuclei, K pairs overlap: ``row`` (K,) and ``col`` (K,) index the
    predicted and the true one, ``shared`` (K,) is the area that they have in common, above 0.
    ``predicted`` (P,) and ``true`` (T,) are areas of nuclei. ``foreground`` is the area that lies
    in predicted nuclei, in true ones, and in both; where nuclei of one side overlap each other, it
    counts once. Areas are in px.
    """

    row: NDArray[np.intp]
    col: NDArray[np.intp]
    shared: NDArray[np.float64]
    predicted: NDArray[np.float64]
    true: NDArray[np.float64]
    foreground: tuple[float, float, float]

    @classmethod
    def of_labels(cls, prediction: Labels, ground_truth: Labels) -> Overlaps:
        """Of label images of one shape; areas are numbers of pixels. ValueError for two shapes."""
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
        return cls(row, col, shared, predicted, true, foreground)

    @classmethod
    def of_polygons(cls, prediction: Polygons, ground_truth: Polygons) -> Overlaps:
        """Of valid polygons or multipolygons, (P,) and (T,), in one frame; areas are exact."""
        row, col = shapely.STRtree(ground_truth).query(prediction, predicate="intersects")
        common = shapely.intersection(prediction[row], ground_truth[col])
        shared = shapely.area(common)
        overlap = shared > 0  # others only touch
        foreground = _covered(prediction), _covered(ground_truth), _covered(common[overlap])
        predicted, true = shapely.area(prediction), shapely.area(ground_truth)
        return cls(row[overlap], col[overlap], shared[overlap], predicted, true, foreground)

    @property
    def dice(self) -> float:
        """Overlap of the foregrounds: 2 |P and T| / (|P| + |T|)."""
        predicted, true, both = self.foreground
        return 2 * both / (predicted + true) if predicted + true else 1.0

    @property
    def aji(self) -> float:
        """Aggregated Jaccard index.

        Each true nucleus takes the predicted one with the largest IoU: intersections and unions
        are summed. A true nucleus that nothing overlaps adds its area to the unions, and so does
        each predicted nucleus that none took. As published, several true nuclei may take the same.

        N. Kumar et al., A Dataset and a Technique for Generalized Nuclear Segmentation for
        Computational Pathology, IEEE Trans Med Imaging 36 (2017), algorithm 1.
        """
        best = self._best(self.col)
        missed = np.delete(self.true, self.col[best])
        untaken = np.delete(self.predicted, self.row[best])
        unions = self._union[best].sum() + missed.sum() + untaken.sum()
        return float(self.shared[best].sum() / unions) if unions else 1.0

    @property
    def f1(self) -> float:
        """Detection F1: a true nucleus is found if a predicted one overlaps it with IoU > 0.5."""
        nuclei = len(self.predicted) + len(self.true)
        return 2 * len(self._matched) / nuclei if nuclei else 1.0

    @property
    def pq(self) -> float:
        """Panoptic quality: detection F1 times the mean IoU of the nuclei that were found.

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
        """IoU of the pairs that match: it is above 0.5, and neither nucleus has a better partner.

        Above 0.5 a nucleus has one partner at most, unless nuclei of one side overlap each other.
        """
        mutual = np.intersect1d(self._best(self.row), self._best(self.col))
        iou = self._iou[mutual]
        return iou[iou > 0.5]

    def _best(self, nucleus: NDArray[np.intp]) -> NDArray[np.intp]:
        """The pair of largest IoU of each nucleus that has one; of equal ones the first.

        ``nucleus`` (K,) is the nucleus of each pair, ``row`` or ``col``.
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
    """The different values, ascending, and how often each is there."""
    different, count = np.unique(values, return_counts=True)
    return different, count.astype(np.float64)


def _covered(polygons: Polygons) -> float:
    """The area of a union. Those that touch are united group by group: 100,000 take a second."""
    return float(shapely.area(shapely.disjoint_subset_union_all(polygons)))

"""Agreement of predicted nuclei with ground truth: Dice, AJI, PQ, F1 at IoU 0.5, kinds of error.

Nuclei are label images, (H, W) integers in which 0 is background and each other value one nucleus;
or polygons. Scores are between 0 and 1; they are 1 if neither side has a nucleus.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Labels, Polygons

MIN_IOU = 0.5  # of a match: more
_MOST = 0.5  # fraction of a nucleus that lies in another: more is most of it
_ON_NUCLEI = 0.2  # fraction of a nucleus that is covered: less is as good as nothing


class Kind(StrEnum):
    """What became of a nucleus: each true one is of one of the first five kinds.

    RIGHT: a predicted nucleus has an IoU above 0.5 with it. MERGED: most of it lies in a predicted
    nucleus that holds most of another true one, too. SPLIT: it holds most of several predicted
    nuclei. MISSED: less than a fifth of it is predicted. BADLY_OUTLINED: all others. Of these the
    first that fits. SPURIOUS are predicted nuclei, with less than a fifth of their area in true
    ones. Most is more than half of the area.
    """

    RIGHT = "right"
    BADLY_OUTLINED = "badly_outlined"
    MISSED = "missed"
    MERGED = "merged"
    SPLIT = "split"
    SPURIOUS = "spurious"


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

    @cached_property
    def true_kinds(self) -> NDArray[np.str_]:
        """(T,) the kind of each true nucleus: all but SPURIOUS."""
        most = self._fraction_of_true > _MOST
        merged = np.zeros(len(self.true), dtype=bool)
        merged[self.col[most & (self.held[self.row] > 1)]] = True
        pieces = np.bincount(self.col[self._fraction_of_predicted > _MOST], None, len(self.true))
        covered = np.bincount(self.col, self._fraction_of_true, len(self.true))
        first_that_fits = {
            Kind.RIGHT: self._best_iou(self.col, len(self.true)) > MIN_IOU,
            Kind.MERGED: merged,
            Kind.SPLIT: pieces > 1,
            Kind.MISSED: covered < _ON_NUCLEI,
        }
        return np.select(
            [*first_that_fits.values()], [*map(str, first_that_fits)], str(Kind.BADLY_OUTLINED)
        )

    @cached_property
    def spurious(self) -> NDArray[np.bool_]:
        """(P,) whether a predicted nucleus is of the kind SPURIOUS."""
        covered = np.bincount(self.row, self._fraction_of_predicted, len(self.predicted))
        return np.asarray(covered < _ON_NUCLEI)

    @cached_property
    def held(self) -> NDArray[np.intp]:
        """(P,) the number of true nuclei of which a predicted one holds most."""
        most = self._fraction_of_true > _MOST
        return np.bincount(self.row[most], minlength=len(self.predicted))

    @cached_property
    def predicted_iou(self) -> NDArray[np.float64]:
        """(P,) the largest IoU of each predicted nucleus with a true one."""
        return self._best_iou(self.row, len(self.predicted))

    @property
    def kinds(self) -> dict[str, int]:
        """The number of nuclei of each ``Kind``: true ones, and spurious predicted ones."""
        counts = {str(kind): int(np.count_nonzero(self.true_kinds == kind)) for kind in Kind}
        return counts | {str(Kind.SPURIOUS): int(np.count_nonzero(self.spurious))}

    @property
    def _fraction_of_true(self) -> NDArray[np.float64]:
        """(K,) of each pair, the fraction of the true nucleus that is shared."""
        return self.shared / self.true[self.col]

    @property
    def _fraction_of_predicted(self) -> NDArray[np.float64]:
        """(K,) of each pair, the fraction of the predicted nucleus that is shared."""
        return self.shared / self.predicted[self.row]

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
        return iou[iou > MIN_IOU]

    def _best_iou(self, nucleus: NDArray[np.intp], count: int) -> NDArray[np.float64]:
        """(count,) the largest IoU of each nucleus; ``nucleus`` (K,) is ``row`` or ``col``."""
        best = np.zeros(count)
        np.maximum.at(best, nucleus, self._iou)
        return best

    def _best(self, nucleus: NDArray[np.intp]) -> NDArray[np.intp]:
        """The pair with the largest IoU of each nucleus that is in a pair; of equal ones the first.

        ``nucleus`` (K,) is the nucleus of each pair: ``row`` or ``col``.
        """
        order = np.lexsort((-self._iou, nucleus))
        first = np.flatnonzero(np.diff(nucleus[order], prepend=-1))
        return order[first]


def _counted(values: Labels) -> tuple[Labels, NDArray[np.float64]]:
    """The unique values, ascending, and the number of each."""
    unique, count = np.unique(values, return_counts=True)
    return unique, count.astype(np.float64)


def _union_area(polygons: Polygons) -> float:
    """The area of the union of polygons. Disjoint groups are fast: 100,000 take a second."""
    return float(shapely.area(shapely.disjoint_subset_union_all(polygons)))

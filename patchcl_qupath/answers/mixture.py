"""Two modes of DAB: a mixture of two normal distributions of its logarithm, without labels.

A. P. Dempster, N. M. Laird, D. B. Rubin, Maximum likelihood from incomplete data via the EM
algorithm, J R Stat Soc B 39 (1977). Whether two modes are apart: K. M. Ashman, C. M. Bird,
S. E. Zepf, Detecting bimodality in astronomical datasets, Astron J 108 (1994).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

USUAL_THRESHOLD = 0.2  # QuPath's default for DAB, which is taken where two modes are not found
_OFFSET = 0.05  # optical density that is added before the logarithm: noise around 0 stays small
_BINS = 512
_STEPS = 500
_LEAST_SPREAD = 0.1  # of a mode, in the logarithm: fewer would fit single nuclei
_LEAST_NUCLEI = 5  # of a mode
_LEAST_IN_ALL = 40
_LEAST_APART = 2.0  # Ashman's D
_VALLEY = 0.75  # of the density at the lower mode, which that between the modes must be below
_HARDLY_ANY = 0.01  # of the nuclei above the usual threshold
_DAB = 0.1  # optical density below which no threshold is, as nothing there is brown
_BESIDE = 0.02  # optical density within which values are counted for the density at one


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Two normal distributions: (2,) of means, standard deviations and weights; the lower first."""

    means: NDArray[np.float64]
    spreads: NDArray[np.float64]
    weights: NDArray[np.float64]

    def parts(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The weighted densities (2, N) of both at x (N,)."""
        z = (x - self.means[:, None]) / self.spreads[:, None]
        height = self.weights / (self.spreads * np.sqrt(2 * np.pi))
        return np.asarray(height[:, None] * np.exp(-(z**2) / 2))

    @property
    def apart(self) -> float:
        """Ashman's D: the distance of the means over the spread; above 2 there are two modes."""
        low, high = self.means
        return float(np.sqrt(2) * (high - low) / np.hypot(*self.spreads))

    @property
    def crossing(self) -> float:
        """Where, between the means, a value is as probably of the one as of the other."""
        x = self._between
        low, high = self.parts(x)
        return float(x[np.argmax(high >= low)])

    @property
    def has_valley(self) -> bool:
        """Whether the density between the means falls below that at both."""
        density = self.parts(self._between).sum(axis=0)
        return bool(density.min() < _VALLEY * min(density[0], density[-1]))

    @property
    def _between(self) -> NDArray[np.float64]:
        """Many values (N,) from the one mean to the other."""
        return np.linspace(float(self.means[0]), float(self.means[1]), 2001)


def fit(x: NDArray[np.float64]) -> Mixture:
    """Fit two normal distributions to values (N,) by expectation and maximisation.

    Values are counted in bins first, so a million of them take no longer than a thousand. It starts
    from Otsu's threshold and, since that splits the larger of two very unequal modes, from the
    usual one; the likelier result is taken. It does not depend on chance.
    """
    counts, edges = np.histogram(x, bins=_BINS)
    middle = (edges[1:] + edges[:-1]) / 2
    weight = counts / counts.sum()
    starts = (_otsu(middle, weight), np.log(USUAL_THRESHOLD + _OFFSET))
    fitted = [_fit_from(middle, weight, start) for start in starts if x.min() < start < x.max()]
    if not fitted:  # all values are equal
        return _maximised(middle, weight, np.full((2, _BINS), 0.5))
    likelihoods = [
        weight @ np.log(np.maximum(one.parts(middle).sum(axis=0), 1e-300)) for one in fitted
    ]
    return fitted[int(np.argmax(likelihoods))]


def _fit_from(x: NDArray[np.float64], weight: NDArray[np.float64], split: float) -> Mixture:
    """The mixture of values x (N,), from a start that splits them at a value; the lower first."""
    upper = x > split
    mixture = _maximised(x, weight, np.stack([~upper, upper]).astype(np.float64))
    for _ in range(_STEPS):
        parts = mixture.parts(x)
        share = parts / np.maximum(parts.sum(axis=0), 1e-300)
        before, mixture = mixture, _maximised(x, weight, share)
        if np.allclose(before.means, mixture.means, rtol=0, atol=1e-7):
            break
    order = np.argsort(mixture.means)
    return Mixture(
        means=mixture.means[order], spreads=mixture.spreads[order], weights=mixture.weights[order]
    )


def _maximised(
    x: NDArray[np.float64], weight: NDArray[np.float64], share: NDArray[np.float64]
) -> Mixture:
    """The mixture of values x (N,) that belong by a ``share`` (2, N) to each of the two."""
    mass = share * weight
    weights = np.maximum(mass.sum(axis=1), 1e-12)
    means = (mass @ x) / weights
    variance = (mass * (x - means[:, None]) ** 2).sum(axis=1) / weights
    return Mixture(
        means=means, spreads=np.maximum(np.sqrt(variance), _LEAST_SPREAD), weights=weights
    )


def _otsu(x: NDArray[np.float64], weight: NDArray[np.float64]) -> float:
    """Otsu's threshold of values x (N,) with weights that sum up to 1."""
    below, moment = np.cumsum(weight), np.cumsum(weight * x)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (moment[-1] * below - moment) ** 2 / (below * (1 - below))
    return float(x[np.argmax(np.nan_to_num(between[:-1], posinf=0))])


def threshold_between(densities: NDArray[np.float32]) -> tuple[float, str | None]:
    """The optical density (N,) between negative and positive nuclei, and a note for people.

    The note is None where two modes were found; else it is why the threshold is QuPath's usual one.
    Two modes on one side of that, by most nuclei of either, are not taken: they are pale and dark
    nuclei of a slide without DAB, or weak and strong ones of a slide without negatives.
    """
    known = densities[np.isfinite(densities)].astype(np.float64)
    usual = f"the threshold is {USUAL_THRESHOLD}"
    if len(known) < _LEAST_IN_ALL:
        return USUAL_THRESHOLD, f"too few nuclei ({len(known):,}) to find a threshold: {usual}"
    mixture = fit(np.log(np.maximum(known, 0) + _OFFSET))
    high = float(np.exp(mixture.means[1]) - _OFFSET)
    threshold = float(np.exp(mixture.crossing) - _OFFSET)
    few = mixture.weights.min() * len(known) < _LEAST_NUCLEI
    apart = mixture.apart >= _LEAST_APART and mixture.has_valley
    if threshold < _DAB:
        # Densities below 0 are one value to the mixture, which may pass for a mode of its own.
        apart &= _fewer_at(_DAB, high, known)
        threshold = _DAB
    above, below = known[known >= threshold], known[known < threshold]
    positive_is_brown = np.median(above) >= USUAL_THRESHOLD if len(above) else False
    negative_is_brown = np.median(below) >= USUAL_THRESHOLD if len(below) else False
    two_modes = apart and not few
    if two_modes and positive_is_brown and not negative_is_brown:
        return round(threshold, 4), None
    if np.mean(known >= USUAL_THRESHOLD) < _HARDLY_ANY:
        return USUAL_THRESHOLD, f"hardly any nucleus has DAB: {usual}"
    advice = f"{usual}; look at the classes, and give another threshold where they are wrong"
    if two_modes:
        side = "above" if negative_is_brown else "below"
        return USUAL_THRESHOLD, f"DAB of its nuclei has two modes, both {side} it: {advice}"
    return USUAL_THRESHOLD, f"DAB of its nuclei has one mode, not two: {advice}"


def _fewer_at(valley: float, high: float, values: NDArray[np.float64]) -> bool:
    """Whether fewer values (N,) lie around a valley than around the ``high`` mode."""
    at, at_high = (np.count_nonzero(abs(values - x) < _BESIDE) for x in (valley, high))
    return bool(at < _VALLEY * at_high)

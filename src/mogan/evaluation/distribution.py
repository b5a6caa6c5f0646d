"""Distances between sets of clips, on features or tracks the caller brings: Frechet, JEDi's MMD, FVMD, TAP-Vid.

Frechet distances are biased upwards, more so for fewer clips: never compare values with different numbers of clips,
frames, strides or reference sets.
"""

from dataclasses import dataclass

import numpy as np


class Moments:
    """Mean and covariance gathered batch by batch, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray = np.zeros(0)
        self._scatter: np.ndarray = np.zeros((0, 0))

    def add(self, features_ND: np.ndarray) -> "Moments":
        """Take in features; order and batching change nothing but the last bits (Chan et al. 1983)."""
        batch = np.asarray(features_ND, np.float64)
        if batch.ndim != 2:
            raise ValueError(f"features must be (clips, width), not {batch.shape}")
        if not np.isfinite(batch).all():
            raise ValueError("the features hold numbers that are not finite: look at the network that made them")
        if self.count == 0:
            self._mean, self._scatter = np.zeros(batch.shape[1]), np.zeros((batch.shape[1],) * 2)
        mean = batch.mean(0)
        centred, gap = batch - mean, mean - self._mean
        total = self.count + len(batch)
        self._scatter = self._scatter + centred.T @ centred + np.outer(gap, gap) * self.count * len(batch) / total
        self._mean = self._mean + gap * len(batch) / total
        self.count = total
        return self

    @property
    def mean(self) -> np.ndarray:
        """``(D,)``."""
        return self._mean

    def covariance(self, *, unbiased: bool) -> np.ndarray:
        """``(D, D)``, divided by N - 1 (FVMD) or by N (FVD and CD-FVD)."""
        return self._scatter / (self.count - 1 if unbiased else self.count)


def frechet(one: Moments, two: Moments, *, unbiased: bool = False, ridge: float = 0.0) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``.

    Args:
        one: first set.
        two: second set.
        unbiased: covariance over N - 1 (FVMD) instead of N (FVD, CD-FVD).
        ridge: added to both covariances inside the square root only, as FVMD does with 1e-5; makes the distance of a
            set to itself slightly negative.
    """
    gap = one.mean - two.mean
    s1, s2 = one.covariance(unbiased=unbiased), two.covariance(unbiased=unbiased)
    eye = ridge * np.eye(len(gap))
    return float(gap @ gap + np.trace(s1) + np.trace(s2) - 2 * _trace_of_root(s1 + eye, s2 + eye))


def _trace_of_root(a: np.ndarray, b: np.ndarray) -> float:
    """tr((a b)^(1/2)) for symmetric non-negative a and b, from the singular values of a^(1/2) b^(1/2)."""

    def root(x: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(x)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    return float(np.linalg.svd(root(a) @ root(b), compute_uv=False).sum())


def polynomial_mmd(one_ND: np.ndarray, two_ND: np.ndarray, *, degree: int = 2, offset: float = 0.0) -> float:
    """Biased squared maximum mean discrepancy of two sets ``(N, D)`` with the kernel ``(x.y / D + offset)^degree``, diagonals included."""
    one, two = np.asarray(one_ND, np.float64), np.asarray(two_ND, np.float64)
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise ValueError("the features hold numbers that are not finite: look at the network that made them")

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(((x @ y.T / x.shape[1] + offset) ** degree).mean())

    return kernel(one, one) + kernel(two, two) - 2 * kernel(one, two)


def jedi(one_ND: np.ndarray, two_ND: np.ndarray) -> float:
    """JEDi of two sets ``(N, D)``: 100 times :func:`polynomial_mmd` of degree 2 and offset 0. It cannot tell X from -X."""
    return 100 * polynomial_mmd(one_ND, two_ND)


def fvmd_histograms(tracks_BFN2: np.ndarray) -> np.ndarray:
    """FVMD's motion features: ``(B, 2, 4, 4, 4, 8)``, velocity then acceleration, of 16 frames x 400 points (20 x 20).

    Per cube of 4 frames x 5 x 5 points, every vector adds ``ceil(min(log2(min(|v|, 255) + 1), 8)) / 8`` to the bin of
    its angle ``atan2(component 0, component 1)``. Velocity is 0 in frame 0, acceleration in frames 0 and 1.
    """
    tracks = np.asarray(tracks_BFN2, np.float64)
    b, frames, points, two = tracks.shape
    if (frames, points, two) != (16, 400, 2):
        raise ValueError(f"FVMD takes tracks of 16 frames x 400 points x 2, not {frames} x {points} x {two}")
    velocity = np.zeros_like(tracks)
    velocity[:, 1:] = np.diff(tracks, axis=1)
    acceleration = np.zeros_like(tracks)
    acceleration[:, 2:] = np.diff(velocity[:, 1:], axis=1)
    return np.stack([_angle_histogram(kind.reshape(b, 4, 4, 4, 5, 4, 5, 2)) for kind in (velocity, acceleration)], 1)


def _angle_histogram(vectors: np.ndarray) -> np.ndarray:
    """``(B, cube t, t, cube y, y, cube x, x, 2)`` to ``(B, 4, 4, 4, 8)``."""
    size = np.minimum(np.hypot(vectors[..., 0], vectors[..., 1]), 255)
    weight = np.ceil(np.minimum(np.log2(size + 1), 8)) / 8
    angle = np.arctan2(vectors[..., 0], vectors[..., 1])
    bins = np.floor((angle + np.pi) / (2 * np.pi) * 8).astype(int).clip(0, 7)  # an angle of pi is in the last
    return np.stack([(weight * (bins == k)).sum(axis=(2, 4, 6)) for k in range(8)], -1)


def fvmd(one: np.ndarray, two: np.ndarray, *, reference: bool = False) -> float:
    """Frechet distance of :func:`fvmd_histograms`, covariance over N - 1.

    Args:
        one: histograms of the first set, ``(N, ...)``.
        two: of the second.
        reference: add 1e-5 to the covariances inside the square root as the published code does, which makes equal sets
            -2e-5 D instead of 0.
    """
    first, second = (Moments().add(np.asarray(x).reshape(len(x), -1)) for x in (one, two))
    return frechet(first, second, unbiased=True, ridge=1e-5 if reference else 0.0)


@dataclass(frozen=True)
class TapVid:
    """Average Jaccard, accuracy of positions, accuracy of occlusion (Doersch et al. 2022)."""

    average_jaccard: float
    position_accuracy: float
    occlusion_accuracy: float


def tap_vid(
    true_NF2: np.ndarray,
    true_occluded_NF: np.ndarray,
    tracks_NF2: np.ndarray,
    occluded_NF: np.ndarray,
    *,
    scored_NF: np.ndarray | None = None,
    notebook: tuple[int, int] | None = None,
) -> TapVid:
    """TAP-Vid's scores of tracks (x, y) in pixels of a 256 x 256 picture; thresholds 1, 2, 4, 8, 16, strict.

    Args:
        true_NF2: where the points are.
        true_occluded_NF: where they cannot be seen.
        tracks_NF2: where they are said to be.
        occluded_NF: where they are said to be hidden.
        scored_NF: which frames of a track count; all, if None. TAP-Vid leaves out the frame that the track is asked for in, and of
            its "first" mode those before, too.
        notebook: height and width of the source video: score as TRAJAN's notebook does, for comparison with numbers made
            by it. It takes distances in pixels of the source under the thresholds of 256, which judges a video of 480
            lines two to three times as strictly, and leaves frame 0 out instead of each track's query frame.
    """
    true, tracks = np.asarray(true_NF2, float), np.asarray(tracks_NF2, float)
    visible, shown = ~np.asarray(true_occluded_NF, bool), ~np.asarray(occluded_NF, bool)
    if notebook is not None:
        scale = np.array([notebook[1], notebook[0]]) / 256
        true, tracks, visible, shown = true[:, 1:] * scale, tracks[:, 1:] * scale, visible[:, 1:], shown[:, 1:]
    scored = np.ones_like(visible) if scored_NF is None else np.asarray(scored_NF, bool)[:, -visible.shape[1] :]
    agree = float((visible == shown)[scored].mean())
    visible, shown = visible & scored, shown & scored
    gap = np.linalg.norm(true - tracks, axis=-1)
    jaccards, within = [], []
    for threshold in (1, 2, 4, 8, 16):
        close = gap < threshold
        hit = (close & visible & shown).sum()
        false = (shown & ~(visible & close)).sum()
        jaccards.append(hit / max(visible.sum() + false, 1))
        within.append((close & visible).sum() / max(visible.sum(), 1))
    return TapVid(float(np.mean(jaccards)), float(np.mean(within)), agree)


def trajan_occluded(visible_NF: np.ndarray, certain_NF: np.ndarray, *, notebook: bool = False) -> np.ndarray:
    """Which points TRAJAN calls hidden, bool ``(N, F)``, from its logits of being visible and of being certain.

    The model's own rule is "not (p_visible p_certain > 1/2)". Its notebook scores another, "(1 - p_visible)(1 - p_certain)
    > 1/2", which is not the complement: a point that is surely visible and quite uncertain is hidden by the first alone.
    """
    visible, certain = (1 / (1 + np.exp(-np.asarray(logits, float))) for logits in (visible_NF, certain_NF))
    return (1 - visible) * (1 - certain) > 0.5 if notebook else visible * certain <= 0.5

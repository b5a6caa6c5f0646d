"""What optical flow says beyond a threshold: how much, of what, how consistently, how smoothly.

Fields are float32 ``(2, H, W)`` in pixels per frame, channels (u right, v down).
"""

from dataclasses import dataclass

import cv2
import numpy as np

MOVING = 0.25  # pixels per frame at min(H, W) = 256: a pixel that moves less counts as still


@dataclass(frozen=True)
class FlowSummary:
    """Magnitudes of one field: mean, median, mean of the largest 5 %, share of pixels that move."""

    mean: float
    median: float
    top5: float
    moving: float


def summarise(flow_2HW: np.ndarray) -> FlowSummary:
    """Statistics of the magnitude of a flow field ``(2, H, W)``, in pixels per frame."""
    magnitude = np.hypot(flow_2HW[0], flow_2HW[1]).ravel()
    count = max(1, int(magnitude.size * 0.05))
    limit = MOVING * min(flow_2HW.shape[1:]) / 256
    return FlowSummary(
        float(magnitude.mean()),
        float(np.median(magnitude)),
        float(np.partition(magnitude, -count)[-count:].mean()),
        float((magnitude > limit).mean()),
    )


def per_eighth(pixels_per_frame: float, fps: float | None, min_side: int) -> float:
    """The same distance per 1/8 s at 256 pixels, where VBench's threshold of 6.0 is the line to look at.

    A clip without a tag is taken to have 8 frames a second, as VBench's interval of 1 does.
    """
    return pixels_per_frame * (fps or 8.0) / 8.0 / (min_side / 256.0)


@dataclass(frozen=True)
class CameraSplit:
    """Mean magnitude of the camera's own motion, and of what is left after it (mean and largest 5 %), px/frame."""

    camera: float
    rest: float
    rest_top5: float


def camera_split(flow_2HW: np.ndarray, step: int = 8) -> CameraSplit:
    """Motion of the camera as the homography most of the picture follows (RANSAC), and the motion that is left.

    A subject that fills the picture is taken for the camera. Where less than a third follows, to half of its own motion, or where
    a pixel would move more than twice as far as any does, there is no camera to be seen and its motion is 0.
    """
    _, h, w = flow_2HW.shape
    step = max(1, min(step, min(h, w) // 8))
    y, x = np.mgrid[step // 2 : h : step, step // 2 : w : step]
    here = np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)
    there = here + flow_2HW[:, y, x].reshape(2, -1).T
    cv2.setRNGSeed(0)
    tolerance = max(0.25, min(h, w) / 480)
    matrix, _ = cv2.findHomography(here, there, cv2.RANSAC, tolerance)
    if matrix is None:
        return _no_camera(flow_2HW)
    ys, xs = np.mgrid[:h, :w].astype(np.float32)
    grid = np.stack([xs.ravel(), ys.ravel()], 1)[None]
    moved = cv2.perspectiveTransform(grid, matrix)[0].T.reshape(2, h, w) - np.stack([xs, ys])
    size, gap = np.hypot(*flow_2HW), np.hypot(*(flow_2HW - moved))
    follows = gap <= np.maximum(tolerance, 0.5 * size)  # with errors of flow, and with depth, few follow to a pixel
    if not (np.hypot(*moved).max() <= 2 * size.max() and follows.mean() >= 1 / 3):
        return _no_camera(flow_2HW)
    rest = summarise(flow_2HW - moved)
    return CameraSplit(float(np.hypot(*moved).mean()), rest.mean, rest.top5)


def _no_camera(flow_2HW: np.ndarray) -> CameraSplit:
    whole = summarise(flow_2HW)
    return CameraSplit(0.0, whole.mean, whole.top5)


def pull_back(image_HWC: np.ndarray, flow_2HW: np.ndarray) -> np.ndarray:
    """The image ``(H, W, C)`` at ``p + flow(p)``, flow in pixels; bilinear, border repeated; exact at whole pixels."""
    _, h, w = flow_2HW.shape
    y, x = np.mgrid[:h, :w].astype(np.float32)
    x_to, y_to = np.clip(x + flow_2HW[0], 0, w - 1), np.clip(y + flow_2HW[1], 0, h - 1)
    return cv2.remap(image_HWC, x_to, y_to, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def occluded(forward_2HW: np.ndarray, backward_2HW: np.ndarray) -> np.ndarray:
    """Pixels ``(H, W)`` whose flow there and back does not return, or that lie on a motion boundary.

    Lai et al. 2018 (``utils.py`` of fast_blind_video_consistency), after Ruder et al. 2016: with ``w`` the backward
    flow warped along the forward flow ``b``, ``|w + b|^2 > 0.01 (|w|^2 + |b|^2) + 0.5``, or
    ``|grad u|^2 + |grad v|^2 > 0.01 |b|^2 + 0.002``, one-sided differences.
    """
    warped = pull_back(np.ascontiguousarray(backward_2HW.transpose(1, 2, 0)), forward_2HW).transpose(2, 0, 1)
    size = np.square(forward_2HW).sum(0)
    lost = np.square(warped + forward_2HW).sum(0) > 0.01 * (np.square(warped).sum(0) + size) + 0.5
    slope = np.zeros_like(size)
    slope[:, :-1] += np.square(np.diff(forward_2HW, axis=2)).sum(0)
    slope[:-1] += np.square(np.diff(forward_2HW, axis=1)).sum(0)
    return lost | (slope > 0.01 * size + 0.002)


def warping_error(
    first_HWC: np.ndarray, second_HWC: np.ndarray, forward_2HW: np.ndarray, occluded_HW: np.ndarray
) -> float:
    """Mean squared difference, pixels in [0, 1], between a frame and the next one pulled back, where it can be seen.

    Lai et al. 2018: a mean over pixels *and channels* (EvalCrafter's copy divides by pixels only, three times as
    much). With nothing visible the sum is empty and the error 0.
    """
    gap = np.square(first_HWC / np.float32(255) - pull_back(second_HWC.astype(np.float32) / 255, forward_2HW))
    seen = ~occluded_HW
    return float(gap[seen].mean()) if seen.any() else 0.0


def round_trip(forward_2HW: np.ndarray, backward_2HW: np.ndarray) -> float:
    """Median distance in pixels by which flow there and back misses its start: 0 for consistent motion."""
    warped = pull_back(np.ascontiguousarray(backward_2HW.transpose(1, 2, 0)), forward_2HW).transpose(2, 0, 1)
    return float(np.median(np.hypot(*(warped + forward_2HW))))


class Tracks:
    """Points on a grid carried along by the flow of pair after pair.

    Args:
        shape: height and width.
        side: the grid has ``side * side`` points, inset by an eighth of the picture.
    """

    def __init__(self, shape: tuple[int, int], side: int = 12):
        h, w = shape
        y, x = np.meshgrid(np.linspace(h / 8, h * 7 / 8, side), np.linspace(w / 8, w * 7 / 8, side), indexing="ij")
        self.positions = [np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)]

    def follow(self, flow_2HW: np.ndarray) -> None:
        """Move every point along the flow under it, bilinear; beyond the edge the edge's flow holds."""
        _, h, w = flow_2HW.shape
        now = self.positions[-1]
        x, y = np.clip(now[:, 0], 0, w - 1), np.clip(now[:, 1], 0, h - 1)
        field = np.ascontiguousarray(flow_2HW.transpose(1, 2, 0))
        self.positions.append(now + cv2.remap(field, x[None], y[None], cv2.INTER_LINEAR)[0])

    @property
    def array(self) -> np.ndarray:
        """Positions ``(F, N, 2)``, x then y, pixels."""
        return np.stack(self.positions).astype(np.float64)


@dataclass(frozen=True)
class Smoothness:
    """Of the points that move: acceleration and jerk in picture sizes per s^2 and s^3; log dimensionless jerk."""

    acceleration: float
    jerk: float
    log_jerk: float


def trajectory_smoothness(tracks_FN2: np.ndarray, fps: float | None, min_side: int) -> Smoothness:
    """How smoothly points travel: mean sizes of second and third differences, and jerk free of units.

    The log dimensionless jerk is ``-ln(D^3 / v_peak^2 * integral |d^2 v / dt^2|^2 dt)`` with duration D
    (Balasubramanian et al. 2015); higher is smoother. Points whose whole path is under one pixel are left out; NaN
    where none is left.
    """
    rate = fps or 8.0
    steps = np.diff(tracks_FN2, axis=0)
    moving = np.hypot(*steps.transpose(2, 0, 1)).sum(0) > 1.0
    if tracks_FN2.shape[0] < 4 or not moving.any():
        return Smoothness(float("nan"), float("nan"), float("nan"))
    velocity = steps[:, moving] * rate
    acceleration, jerk = np.diff(velocity, axis=0) * rate, np.diff(velocity, n=2, axis=0) * rate**2
    peak = np.square(velocity).sum(-1).max(0)
    duration = velocity.shape[0] / rate
    integral = np.square(jerk).sum(-1).sum(0) / rate
    free = duration**3 * integral / peak
    return Smoothness(
        float(np.linalg.norm(acceleration, axis=-1).mean()) / min_side,
        float(np.linalg.norm(jerk, axis=-1).mean()) / min_side,
        float(-np.log(np.maximum(free, 1e-12)).mean()),
    )

"""Whether a clip of the lab does what it was shown: where its things are, which is in front, and how everything moves.

Shares are 1 where a clip does exactly what its control shows and near 0 where it has nothing to do with it; what another clip's
control scores is chance. Things are found by the colours of the caption, as everywhere in the lab.
"""

import cv2
import numpy as np

from mogan.world.captions import Caption
from mogan.world.tracking import cover

DEPTHS = 0, 128, 255  # in a picture of depth: of the background, the first sprite and the second, which is nearer
NEAR = 5  # side of the square, in pixels, within which two things touch
TOUCHING = 20  # pixels of a clip: fewer say nothing of which thing is in front

Values = dict[str, float]


def mask_followed(frames_FHW3: np.ndarray, said: Caption, mask_FHW: np.ndarray) -> Values:
    """``mask``: overlap of everything that is not background with the mask, in pixels of the whole clip (Jaccard)."""
    return {"mask": _jaccard(np.any(_things(frames_FHW3, said), 0), mask_FHW)}


def depth_followed(frames_FHW3: np.ndarray, said: Caption, depth_FHW3: np.ndarray) -> Values:
    """``depth``: mean over the caption's things of the overlap with the region of its depth; ``order``: of the pixels that lie near
    both things in the picture of depth and show one of them, the share that shows the one it says.

    NaN where the control shows nothing, and where its things do not touch.
    """
    levels = np.rint(depth_FHW3.mean(-1) * 2 / DEPTHS[-1])
    regions = [levels == 1 + number for number in range(1 + len(said.other_colours))]
    shown = _things(frames_FHW3, said)
    found = [_jaccard(one, two) for one, two in zip(shown, regions, strict=True) if two.any()]
    values = {"depth": float(np.mean(found)) if found else np.nan, "order": np.nan}
    if len(regions) == 2:
        wide = [
            np.stack([cv2.dilate(r.astype(np.uint8), np.ones((NEAR, NEAR), np.uint8)) for r in one]) for one in regions
        ]
        asked = (wide[0] & wide[1]).astype(bool) & (regions[0] | regions[1]) & (shown[0] ^ shown[1])
        if asked.sum() >= TOUCHING:
            values["order"] = float((shown[1] == regions[1])[asked].mean())
    return values


def flow_followed(flow_F2HW: np.ndarray, control_F2HW: np.ndarray) -> Values:
    """``flow``: ``1 - sum |f - c| / sum (|f| + |c|)`` over all pixels, 0 for a still clip; ``flow_error``: end-point error in pixels
    per frame, where the control moves by more than a quarter pixel.

    NaN where nothing in the control does.
    """
    gap, one, two = (np.linalg.norm(field, axis=1) for field in (flow_F2HW - control_F2HW, flow_F2HW, control_F2HW))
    moves = two > 0.25
    if not moves.any():
        return {"flow": np.nan, "flow_error": np.nan}
    return {"flow": float(1 - gap.sum() / (one.sum() + two.sum())), "flow_error": float(gap[moves].mean())}


def _things(frames_FHW3: np.ndarray, said: Caption) -> list[np.ndarray]:
    """Where each thing of the caption is, bool ``(F, H, W)``."""
    return [cover(frames_FHW3, colour) > 0.5 for colour in (said.colour, *said.other_colours)]


def _jaccard(one: np.ndarray, two: np.ndarray) -> float:
    return float((one & two).sum() / max((one | two).sum(), 1))

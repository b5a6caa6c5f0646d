"""Whether the things that a caption of the lab names are there: all the way, once each, and no others.

A generator that has not learned to carry a thing across the picture fades it out in one place and in at another, or draws
it twice: its centroid may then look as if it moved.
"""

import cv2
import numpy as np

from mogan.world.captions import Caption
from mogan.world.scenes import COLOURS
from mogan.world.tracking import FOUND_AREA, Track

COLOURED = 0.3  # of a named colour's chroma: paler pixels belong to the background


def things(frames_FHW3: np.ndarray) -> np.ndarray:
    """Which named colour every pixel has: ``(F, H, W)``, the number of a colour of :data:`COLOURS` or -1, the background.

    Chroma (a pixel minus its own grey) is measured from the background's, whose waves are grey, and goes to the colour in
    whose direction it points most.
    """
    pixels = frames_FHW3.astype(np.float32)
    chroma = pixels - pixels.mean(-1, keepdims=True)
    ground = np.median(chroma.reshape(-1, 3), axis=0)
    named = np.array(list(COLOURS.values()), np.float32)
    axes = named - named.mean(1, keepdims=True) - ground
    sizes = np.linalg.norm(axes, axis=1)
    along = (chroma - ground) @ (axes / sizes[:, None]).T
    nearest = along.argmax(-1)
    share = np.take_along_axis(along / sizes, nearest[..., None], -1)[..., 0]
    return np.where(share > COLOURED, nearest, -1)


def pieces(mask_HW: np.ndarray) -> list[np.ndarray]:
    """Masks, bool ``(H, W)``, of the connected pieces that are large enough for an object, the largest first."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8))
    areas = stats[:, cv2.CC_STAT_AREA]
    large = [n for n in range(1, count) if areas[n] > FOUND_AREA[0] * mask_HW.size]
    return [labels == n for n in sorted(large, key=lambda n: -areas[n])]


def counted(things_FHW: np.ndarray) -> int:
    """How many things a clip shows: the median over its frames."""
    numbers = [sum(len(pieces(one == colour)) for colour in range(len(COLOURS))) for one in things_FHW]
    return int(np.median(numbers))


def there_all_the_way(things_FHW: np.ndarray, subject: Track, said: Caption) -> float:
    """1 if the subject is there in every frame and only once, 0 if not; NaN if it is never seen whole.

    It may shrink below half of its usual area where another thing or the edge of the picture hides it, and another thing
    in front may cut it in two.
    """
    if not subject.free_F.any():
        return float("nan")
    usual = float(np.median(subject.areas_F[subject.free_F]))
    reach = np.sqrt(usual)
    seen = np.flatnonzero(subject.found_F)
    expected = np.stack([np.interp(np.arange(len(things_FHW)), seen, subject.centres_F2[seen, i]) for i in (0, 1)], 1)
    own = list(COLOURS).index(said.colour)
    for one, area, centre in zip(things_FHW, subject.areas_F, expected, strict=True):
        y, x = np.mgrid[: one.shape[0], : one.shape[1]]
        around = np.hypot(x - centre[0], y - centre[1]) < reach
        hidden = bool((around & (one >= 0) & (one != own)).any())
        cut = bool((centre < reach).any() or (centre > np.array(one.shape)[::-1] - 1 - reach).any())
        if area < usual / 2 and not hidden and not cut:
            return 0.0
        copies = [piece for piece in pieces(one == own)[1:] if piece.sum() > usual / 4]
        if copies and not hidden:
            return 0.0
    return 1.0

"""Pixel flux (SHIFT, arXiv 2603.17426): how pixels move from frame to frame, and along tracks.

Nothing here is differentiated towards a generator. Shapes: video ``B 3 F H W`` in [-1, 1], flow ``B 2 F-1 H W``, points
``B F N 2`` as (x, y) pixels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mogan.devices import sent
from mogan.models.autoencoder import decode_video
from mogan.motion.flow import FlowEstimator, warp

POINTS, FASTEST = 16, 0.1  # of net motion: points along each side of the picture; share of them that is averaged
# offsets (x, y) of a 3 x 3 neighbourhood, pixels
AROUND = torch.stack(torch.meshgrid(torch.arange(-1.0, 2), torch.arange(-1.0, 2), indexing="xy"), -1).flatten(0, 1)


@dataclass(frozen=True)
class Tracks:
    """Where query points are in every frame, whether they are seen, and how sure the tracker is (1 is certain)."""

    points_BFN2: Float[Tensor, "b f n 2"]
    visible_BFN: Float[Tensor, "b f n"]
    confidence_BFN: Float[Tensor, "b f n"]


Tracker = Callable[[Tensor, Tensor], Tracks]  # (video B 3 F H W, query points of the first frame B N 2) -> tracks


@dataclass(frozen=True)
class Flux:
    """What the two discriminators see: maps of residual (3) and confidence, one state per tracked point; and the flow."""

    maps_BCFHW: Float[Tensor, "b 4 g h w"]
    states_BND: Float[Tensor, "b n d"]
    flow_BCFHW: Float[Tensor, "b 2 g h w"]


@dataclass(frozen=True)
class PixelFlux:
    """``latents, queries -> Flux``: decode, estimate flow both ways, follow the queries.

    Attributes:
        vae: frozen autoencoder. Real clips pass it too, or its traces would give the answer away.
        flow: frozen flow estimator.
        tracker: point tracker such as CoTracker; ``None`` chains the flow that is estimated anyway.
    """

    vae: nn.Module
    flow: FlowEstimator
    tracker: Tracker | None = None

    @torch.no_grad()
    def __call__(self, latent_BCFHW: Float[Tensor, "b c f h w"], queries_BN2: Float[Tensor, "b n 2"]) -> Flux:
        """Observe whole clips; ``queries`` are places in the first frame, relative to it (0 to 1)."""
        video = decode_video(self.vae, latent_BCFHW)
        flow, back = self.flow(video), self.flow(video.flip(2)).flip(2)
        points = queries_BN2 * (_extent(video, queries_BN2) - 1)
        tracks = chain_flow(flow, back, points) if self.tracker is None else self.tracker(video, points)
        return Flux(flux_maps(video, flow, back), track_states(video, tracks), flow)


def mismatch(flow_BCFHW: Tensor, back_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance ``(B, 1, F-1, H, W)`` by which going with ``flow`` and back misses, and how much is allowed.

    ``|f + b|^2`` against ``0.01 (|f|^2 + |b|^2) + 0.5``, ``b`` pulled back along ``f``: a larger miss means the place is
    hidden in the next frame (Sundaram et al. 2010). ``back`` number t leads from frame t + 1 to t.
    """
    pulled = _per_frame(warp, back_BCFHW, flow_BCFHW)
    size = flow_BCFHW.square().sum(1, keepdim=True) + pulled.square().sum(1, keepdim=True)
    return (flow_BCFHW + pulled).square().sum(1, keepdim=True), 0.01 * size + 0.5


def flux_maps(video_BCFHW: Tensor, flow_BCFHW: Tensor, back_BCFHW: Tensor) -> Float[Tensor, "b 4 g h w"]:
    """Transport residual ``I(t+1, p + f) - I(t, p)`` per colour, and the flow's confidence ``exp(-miss in pixels)``.

    SHIFT takes both from SEA-RAFT, which predicts its own uncertainty; RAFT does not, so the way there and back stands in.
    """
    residual = _per_frame(warp, video_BCFHW[:, :, 1:], flow_BCFHW) - video_BCFHW[:, :, :-1]
    return torch.cat([residual, (-mismatch(flow_BCFHW, back_BCFHW)[0].sqrt()).exp()], 1)


def chain_flow(flow_BCFHW: Tensor, back_BCFHW: Tensor, queries_BN2: Float[Tensor, "b n 2"]) -> Tracks:
    """Tracks by adding up flow: ``p(t+1) = p(t) + f(t, p(t))``.

    A point that leaves the picture or fails the check of :func:`mismatch` stays unseen; confidence is the product of
    those on the way, as errors of a chain add up.
    """
    known = torch.cat([flow_BCFHW, *mismatch(flow_BCFHW, back_BCFHW)], 1)
    edge = _extent(known, queries_BN2) - 1
    points, visible = [queries_BN2], [torch.ones_like(queries_BN2[..., 0])]
    confidence = [visible[0]]
    for frame in known.unbind(2):
        found = sample_at(frame, points[-1])
        points.append(points[-1] + found[..., :2])
        inside = ((points[-1] >= 0) & (points[-1] <= edge)).all(-1)
        visible.append(visible[-1] * (inside & (found[..., 2] <= found[..., 3])))
        confidence.append(confidence[-1] * (-found[..., 2].sqrt()).exp())
    return Tracks(torch.stack(points, 1), torch.stack(visible, 1), torch.stack(confidence, 1))


def track_states(video_BCFHW: Tensor, tracks: Tracks) -> Float[Tensor, "b n d"]:
    """All that is known of each point, in one row: per frame drift, visibility and confidence; correlations; its start.

    Drift is ``p(t) - p(t-1)`` (SHIFT) in hundredths of the frame's diagonal, 0 in the first frame. ``D`` is
    :func:`state_size`.
    """
    height, width = video_BCFHW.shape[-2:]
    points = tracks.points_BFN2
    drift = F.pad(points.diff(dim=1), (0, 0, 0, 0, 1, 0)) * 100 / (height**2 + width**2) ** 0.5
    state = torch.cat([drift, tracks.visible_BFN[..., None], tracks.confidence_BFN[..., None]], -1)
    start = 2 * points[:, 0] / (_extent(video_BCFHW, points) - 1) - 1
    rows = [state.transpose(1, 2).flatten(2), correlation(video_BCFHW, points).transpose(1, 2).flatten(2), start]
    return torch.cat(rows, -1)


def state_size(frames: int) -> int:
    """Numbers in a row of :func:`track_states`."""
    return 4 * frames + 9 * (frames - 1) + 2


def correlation(video_BCFHW: Tensor, points_BFN2: Tensor) -> Float[Tensor, "b g n 9"]:
    """How alike a point's 3 x 3 patch is to nine patches, two pixels apart, around where it is one frame later.

    Cosine of patches less their mean (a patch without texture correlates with nothing). SHIFT's dense correlation maps
    use the tracker's features, which a chain of flow does not have.
    """
    around = sent(AROUND, points_BFN2.device).to(points_BFN2)

    def patches(frames: Tensor, places_BGK2: Tensor) -> Tensor:
        at = (places_BGK2[..., None, :] + around).flatten(0, 1).flatten(1, 2)
        patch = sample_at(frames.transpose(1, 2).flatten(0, 1), at).unflatten(1, (-1, 9)).flatten(2)
        patch = patch - patch.mean(-1, keepdim=True)
        return patch / (patch.norm(dim=-1, keepdim=True) + 0.05)

    here = patches(video_BCFHW[:, :, :-1], points_BFN2[:, :-1])
    there = patches(video_BCFHW[:, :, 1:], (points_BFN2[:, 1:, :, None] + 2 * around).flatten(2, 3))
    alike = (here[:, :, None] * there.unflatten(1, (-1, 9))).sum(-1)
    return alike.unflatten(0, (len(video_BCFHW), -1))


def net_motion(fields_BCFHW: Iterable[Float[Tensor, "b 2 g h w"]]) -> Float[Tensor, " b"]:
    """How far the fastest tenth of the points gets from the first frame to the last, px/frame.

    Points on a grid are carried along by the flow of pair after pair, which comes a few pairs at a time. What shimmers in place moves to and fro and gets
    nowhere, while the mean of the flow itself would count it.
    """
    start, points, pairs = None, torch.empty(0), 0
    for field in (field for fields in fields_BCFHW for field in fields.unbind(2)):
        if start is None:
            start = points = _grid(field)
        points, pairs = points + sample_at(field, points), pairs + 1
    assert start is not None, "a clip of one frame does not move"
    gone = (points - start).norm(dim=-1) / pairs
    return gone.topk(round(FASTEST * POINTS**2), -1).values.mean(-1)


def _grid(field_BCHW: Tensor) -> Float[Tensor, "b n 2"]:
    height, width = field_BCHW.shape[-2:]
    x, y = (torch.linspace(0, size - 1, POINTS, device=field_BCHW.device) for size in (width, height))
    return (
        torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
        .flatten(0, 1)
        .to(field_BCHW)
        .expand(len(field_BCHW), -1, -1)
    )


def _extent(picture: Tensor, points: Tensor) -> Tensor:
    """Width and height of ``(..., H, W)``, in the points' precision."""
    return sent(torch.tensor([picture.shape[-1], picture.shape[-2]], dtype=points.dtype), points.device)


def sample_at(map_BCHW: Tensor, points_BN2: Tensor) -> Float[Tensor, "b n c"]:
    """Values of a map at points in pixels, bilinear, border repeated."""
    size = _extent(map_BCHW, points_BN2)
    grid = 2 * points_BN2 / (size - 1).clamp(min=1) - 1
    sampled = F.grid_sample(map_BCHW, grid[:, None].to(map_BCHW), padding_mode="border", align_corners=True)
    return sampled[:, :, 0].transpose(1, 2)


def _per_frame(function: Callable, *clips_BCFHW: Tensor) -> Tensor:
    frames = len(clips_BCFHW[0])
    out = function(*(c.transpose(1, 2).flatten(0, 1) for c in clips_BCFHW))
    return out.unflatten(0, (frames, -1)).transpose(1, 2)

"""Optical flow: RAFT frozen, chunked and differentiable; the motion picture a discriminator sees; warping.

Shapes: ``video_BCFHW`` in [-1, 1]; flow ``(B, 2, F - 1, H, W)`` in pixels per frame, channels (u right, v down).
A flow estimator is any callable from a video to such a flow.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.optical_flow import RAFT, raft_large
from torchvision.models.optical_flow import raft as tv
from torchvision.models.optical_flow._utils import make_coords_grid, upsample_flow

from mogan.disk.files import read_json
from mogan.errors import UserError

FlowEstimator = Callable[[Tensor], Tensor]
PIXELS_PER_CHUNK = 2 * 480 * 832  # a pair of this size takes about 4 GB of memory in the backward pass


@dataclass(frozen=True)
class RaftConfig:
    """Widths of a small torchvision ``RAFT``; the defaults are the lab's.

    ``stride`` is the size in pixels of a cell that is matched, 8 as published or 4: an object must cover a few cells to be
    seen turning, and the lab's cover 8 to 20 pixels.
    """

    feature_layers: tuple[int, ...] = (16, 16, 40, 40, 64)
    context_layers: tuple[int, ...] = (16, 16, 40, 40, 64)
    hidden: int = 32
    correlation_levels: int = 2
    correlation_radius: int = 3
    motion_channels: int = 32
    motion_layers: tuple[tuple[int, int], tuple[int, int]] = ((64, 32), (16, 16))  # of correlation, of flow
    stride: int = 4

    def build(self) -> RAFT:
        """A RAFT of this size with random weights."""
        correlation = tv.CorrBlock(num_levels=self.correlation_levels, radius=self.correlation_radius)
        motion = tv.MotionEncoder(
            in_channels_corr=correlation.out_channels,
            corr_layers=self.motion_layers[0],
            flow_layers=self.motion_layers[1],
            out_channels=self.motion_channels,
        )
        context = self.context_layers[-1] - self.hidden
        recurrent = tv.RecurrentBlock(
            input_size=motion.out_channels + context,
            hidden_size=self.hidden,
            kernel_size=((1, 5), (5, 1)),
            padding=((0, 2), (2, 0)),
        )
        block, strides = tv.ResidualBlock, (2, 1, 2, self.stride // 4)
        mask = tv.MaskPredictor(in_channels=self.hidden, hidden_size=64, multiplier=0.25)
        mask.conv = nn.Conv2d(64, 9 * self.stride**2, 1)  # torchvision's is for a stride of 8 alone
        return RAFT(
            feature_encoder=tv.FeatureEncoder(
                block=block, layers=self.feature_layers, strides=strides, norm_layer=nn.InstanceNorm2d
            ),
            context_encoder=tv.FeatureEncoder(
                block=block, layers=self.context_layers, strides=strides, norm_layer=nn.BatchNorm2d
            ),
            corr_block=correlation,
            update_block=tv.UpdateBlock(
                motion_encoder=motion,
                recurrent_block=recurrent,
                flow_head=tv.FlowHead(in_channels=self.hidden, hidden_size=64),
            ),
            mask_predictor=mask,
        )


def save_raft(model: RAFT, config: RaftConfig, folder: Path) -> None:
    """Write ``config.json`` and half-precision ``model.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def read_raft_config(path: Path) -> RaftConfig:
    """What :func:`save_raft` wrote.

    Raises:
        UserError: the folder describes no RAFT of this package.
    """
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in read_json(path).items()}
    try:
        return RaftConfig(**fields)
    except TypeError as error:
        raise UserError(f"{path} describes no RAFT of this package ({error}): give a folder that holds one") from error


# names of the original RAFT (Teed and Deng 2020, princeton-vl/RAFT) -> torchvision's, one after the other
ORIGINAL_NAMES = (
    (r"^module\.", ""),
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"_encoder\.conv1\.", "_encoder.convnormrelu.0."),
    (r"_encoder\.norm1\.", "_encoder.convnormrelu.1."),
    (r"_encoder\.conv2\.", "_encoder.conv."),
    (r"(layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"(layer\d\.\d)\.norm([12])\.", r"\1.convnormrelu\2.1."),
    (r"\.encoder\.convc(\d)\.", r".motion_encoder.convcorr\1.0."),
    (r"\.encoder\.convf(\d)\.", r".motion_encoder.convflow\1.0."),
    (r"\.encoder\.conv\.", ".motion_encoder.conv.0."),
    (r"\.gru\.conv([zrq])(\d)\.", r".recurrent_block.convgru\2.conv\1."),
    (r"update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"update_block\.mask\.2\.", "mask_predictor.conv."),
)


def torchvision_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a RAFT in the original's layout under torchvision's names; torchvision's own stay as they are.

    The original lists the norm of a shortcut twice; ``norm3`` is ``downsample.1``.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".norm3." not in name:
            for pattern, new in ORIGINAL_NAMES:
                name = re.sub(pattern, new, name)
            found[name] = value
    return found


# what a file that holds no such weights raises, or one that is not there
UNREADABLE = (
    SafetensorError, UnpicklingError, RuntimeError, TypeError, AttributeError, EOFError, FileNotFoundError,
)  # fmt: skip


def load_raft(path: str | Path) -> RAFT:
    """Load a RAFT: a folder written by :func:`save_raft`, or a file of weights.

    A file holds torchvision's ``raft_large``, or the original's network, such as the ``raft-things.pth`` of VBench.

    Raises:
        UserError: there is nothing at the path, or something else.
    """
    path = Path(path)
    own = (path / "config.json").is_file()
    if not own and not (path.suffix in (".pth", ".pt", ".safetensors") and path.is_file()):
        raise UserError(
            f"no flow network at {path}: give a folder with config.json and model.safetensors, or a .pth file of "
            "torchvision's raft_large or the original RAFT, or a name that `mogan weights list` shows"
        )
    if own:
        model, file = read_raft_config(path / "config.json").build(), path / "model.safetensors"
        what, again = "are not those that its config.json describes", "get them again"
    else:
        model, file = raft_large(), path
        what = "are no large RAFT's, torchvision's or the original's"
        again = "fetch it with `mogan weights fetch raft_large_C_T_V1`"
    try:
        safe = file.suffix == ".safetensors"
        state = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(state if own else torchvision_names(state))
    except UNREADABLE as error:
        raise UserError(f"the weights of {path} {what}, or are damaged or missing: {again}") from error
    return model.float().eval().requires_grad_(False)


def refinements(raft: RAFT, frames_BFCHW: Tensor, iterations: int, *, every: bool = False) -> list[Tensor]:
    """Flow ``(B, F - 1, 2, H, W)`` between neighbours of a few frames: the last refinement, or every one (to train on).

    The encoders see every frame once, and only what is returned is brought to full size: torchvision's own ``forward``
    does both for every pair and every refinement, and knows no stride but 8.
    """
    b, f, c, h, w = frames_BFCHW.shape
    stride = raft.feature_encoder.downsample_factor
    pad_h, pad_w = -h % stride, -w % stride
    pad = (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2)
    flat = frames_BFCHW.reshape(b * f, c, h, w)
    if pad_h or pad_w:
        flat = F.pad(flat, pad, mode="replicate")
    features = raft.feature_encoder(flat).unflatten(0, (b, f))
    raft.corr_block.build_pyramid(features[:, :-1].flatten(0, 1), features[:, 1:].flatten(0, 1))
    read = raft.context_encoder(flat.unflatten(0, (b, f))[:, :-1].flatten(0, 1))
    size = raft.update_block.hidden_state_size
    hidden, context = torch.tanh(read[:, :size]), F.relu(read[:, size:])
    start = make_coords_grid(len(read), *read.shape[-2:], device=read.device).to(read)
    there, flows = start, []
    for iteration in range(iterations):
        there = there.detach()
        with torch.device(read.device):  # where torchvision would make a little grid on the CPU, and wait for the GPU
            seen = raft.corr_block.index_pyramid(centroids_coords=there)
        hidden, step = raft.update_block(hidden, context, seen, there - start)
        there = there + step
        if every or iteration == iterations - 1:
            mask = None if raft.mask_predictor is None else raft.mask_predictor(hidden)
            flow = upsample_flow(there - start, up_mask=mask, factor=stride)
            flow = flow[..., pad[2] : flow.shape[-2] - pad[3], pad[0] : flow.shape[-1] - pad[1]]
            flows.append(flow.unflatten(0, (b, f - 1)))
    raft.corr_block.corr_pyramid = []  # torchvision keeps it in the module: gigabytes that nobody reads again
    return flows


class RaftFlow(nn.Module):
    """RAFT as a function of a whole video, in fp32, over chunks of frame pairs.

    With ``checkpointing`` peak memory depends on ``pairs_per_chunk`` and not on the length of the clip.

    Args:
        raft: a torchvision ``RAFT``; frozen here.
        iterations: refinement steps (12 in training, 20 in VBench's dynamic degree).
        pairs_per_chunk: frame pairs estimated at once; fewer where frames are large (``PIXELS_PER_CHUNK``).
        checkpointing: recompute each chunk in the backward pass.
    """

    def __init__(self, raft: RAFT, iterations: int = 12, pairs_per_chunk: int = 16, checkpointing: bool = True):
        super().__init__()
        self.raft = raft.float().eval().requires_grad_(False)
        self.iterations = iterations
        self.pairs_per_chunk = pairs_per_chunk
        self.checkpointing = checkpointing

    def train(self, mode: bool = True) -> "RaftFlow":
        """Stay in evaluation mode: RAFT's batch statistics are frozen with its weights."""
        return super().train(False)

    def pairs_at_once(self, height: int, width: int) -> int:
        """Frame pairs of this size that are estimated at once."""
        return max(1, min(self.pairs_per_chunk, PIXELS_PER_CHUNK // (height * width)))

    def _estimate(self, frames_BFCHW: Tensor) -> Tensor:
        return refinements(self.raft, frames_BFCHW, self.iterations)[-1]

    def forward(self, video_BCFHW: Float[Tensor, "b 3 f h w"]) -> Float[Tensor, "b 2 f-1 h w"]:
        """Flow ``(B, 2, F - 1, H, W)`` in pixels per frame between neighbouring frames of a video in [-1, 1].

        Raises:
            UserError: frames are too small for this network.
        """
        b, _, f, h, w = video_BCFHW.shape
        if f < 2:
            raise ValueError("optical flow needs at least two frames")
        stride = self.raft.feature_encoder.downsample_factor
        smallest = stride * 2**self.raft.corr_block.num_levels  # the coarsest correlation must keep two cells a side
        if min(h, w) <= smallest - stride:
            raise UserError(
                f"this flow network needs clips of at least {smallest} x {smallest} pixels, not {h} x {w}: use --flow farneback"
            )
        frames = video_BCFHW.float().transpose(1, 2)
        span = max(1, self.pairs_at_once(h, w) // b)  # of each clip
        flows = []
        with torch.autocast(video_BCFHW.device.type, enabled=False):
            for first in range(0, f - 1, span):
                part = frames[:, first : first + span + 1]
                if self.checkpointing and torch.is_grad_enabled() and part.requires_grad:
                    flows.append(checkpoint(self._estimate, part, use_reentrant=False))
                else:
                    flows.append(self._estimate(part))
        return torch.cat(flows, dim=1).transpose(1, 2)


def flow_of_pieces(pieces: Iterable[Tensor], flow: FlowEstimator) -> Iterator[Float[Tensor, "b 2 g h w"]]:
    """Flow of a video that comes a few frames ``(B, 3, g, H, W)`` at a time: as many fields as there are new pairs."""
    last = None
    for piece in pieces:
        video = piece if last is None else torch.cat([last, piece], 2)
        last = piece[:, :, -1:]
        if video.shape[2] > 1:
            yield flow(video)


def motion_picture(flow_BCFHW: Float[Tensor, "b 2 f h w"], max_flow: float) -> Float[Tensor, "b 3 f+1 h w"]:
    """Flow as the three-channel clip a video VAE can encode (MoGAN, appendix A), scaled to about [-1, 1].

    The last field is repeated so that the clip has as many frames as the video it came from; the magnitude is the third
    channel. ``u`` and ``v`` are divided by ``max_flow`` pixels per frame; the magnitude, which has no sign, is mapped so
    that 0 is -1 and ``max_flow`` is 1. Nothing is clipped: clipping would cut the gradient of fast motion.
    """
    flow = torch.cat([flow_BCFHW, flow_BCFHW[:, :, -1:]], dim=2) / max_flow
    # sqrt has no slope at a still pixel; the offset (a millionth of max_flow) keeps its gradient finite
    magnitude = (flow.square().sum(1, keepdim=True) + 1e-12).sqrt()
    return torch.cat([flow, 2 * magnitude - 1], dim=1)


def warp(image_BCHW: Float[Tensor, "b c h w"], flow_BCHW: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b c h w"]:
    """Pull ``image`` back along ``flow``: the result at p is the image at p + flow(p), bilinear, border repeated."""
    h, w = image_BCHW.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(h, device=image_BCHW.device, dtype=flow_BCHW.dtype),
        torch.arange(w, device=image_BCHW.device, dtype=flow_BCHW.dtype),
        indexing="ij",
    )
    grid_x = 2 * (x + flow_BCHW[:, 0]) / max(w - 1, 1) - 1
    grid_y = 2 * (y + flow_BCHW[:, 1]) / max(h - 1, 1) - 1
    grid = torch.stack([grid_x, grid_y], dim=-1).to(image_BCHW.dtype)
    return F.grid_sample(image_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=True)

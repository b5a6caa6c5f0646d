"""CD-FVD (Ge et al. 2024, arXiv 2404.12391): Frechet distance of VideoMAE-v2 features, which see motion more than I3D does.

Source of the rules: songweige/content-debiased-fvd a1e037a. The features are any callable from 16 frames to a vector; the
published numbers are defined with ViT-g fine-tuned on Something-Something v2, which the user brings.
"""

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mogan.errors import UserError
from mogan.evaluation.backbones import Seen, count_blocks, named_block, pretrained, read_state
from mogan.evaluation.distribution import Moments, frechet
from mogan.evaluation.frames import Frames
from mogan.evaluation.preprocess import cd_fvd_indices, cd_fvd_input

FRAMES = 16
GIANT_HEAD = 88  # width of an attention head of ViT-g: 1408 / 16
FILES = ("vit_g_hybrid_pt_1200e_ssv2_ft.pth", "videomae")
FETCH = "https://huggingface.co/OpenGVLab/InternVideoMAE_models, mae-g/vit_g_hybrid_pt_1200e_ssv2_ft.pth"

VideoFeatures = Callable[[np.ndarray], np.ndarray]  # uint8 (16, H, W, 3) -> (D,)


def videomae(path: Path) -> Seen:
    """Features of CD-FVD: VideoMAE tokens averaged and normalised, ``(D,)`` (1408 for ViT-g).

    Args:
        path: ``vit_g_hybrid_pt_1200e_ssv2_ft.pth`` as published, or a transformers folder of a
            VideoMAEForVideoClassification that pools by the mean.

    Raises:
        UserError: the file or folder holds something else.
    """
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    if path.is_dir():
        model = pretrained(VideoMAEForVideoClassification, path)
    else:
        state = read_state(path, "fc_norm.weight")
        width, _, tubelet, patch, _ = state["patch_embed.proj.weight"].shape
        config = VideoMAEConfig(
            hidden_size=width,
            num_hidden_layers=count_blocks(state),
            num_attention_heads=width // GIANT_HEAD,
            intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
            layer_norm_eps=1e-6,
            patch_size=patch,
            tubelet_size=tubelet,
            num_frames=FRAMES,
            num_labels=state["head.weight"].shape[0],
            use_mean_pooling=True,
        )
        model = pretrained(VideoMAEForVideoClassification, path, config=config, state_dict=_named(state))
    if model.fc_norm is None or model.config.num_frames != FRAMES:
        raise UserError(f"{path} is no VideoMAE of {FRAMES} frames that pools by the mean: fetch {FETCH}")
    model.fc_norm.eps = 1e-6  # transformers leaves PyTorch's 1e-5

    def read(net: Any, frames_F3HW: Tensor) -> Tensor:
        return net.fc_norm(net.videomae(frames_F3HW[None]).last_hidden_state.mean(1))[0]

    return Seen(model, cd_fvd_input, read)


def clip_features(frames: Frames, count: int, features: VideoFeatures, *, start: int | None = None) -> np.ndarray:
    """Features of one clip, ``(D,)``: CD-FVD's VideoMAE-v2 network on 16 of its frames.

    Args:
        frames: the clip.
        count: how many frames it has.
        features: of 16 frames.
        start: None: 16 frames spread over the clip. A number: 16 neighbouring frames from there ("reference"); the
            published loader draws it at random, from ``random_start``.
    """
    wanted = cd_fvd_indices(count, FRAMES, start=start)
    source = iter(frames)
    picked, at = [], 0
    for index in wanted:
        picked.append(next(islice(source, index - at, None)))
        at = index + 1
    return features(np.stack(picked))


def random_start(count: int, seed: int) -> int:
    """Where the published loader's window may begin: any of the ``count - 15`` places alike, here by a stated seed."""
    return int(np.random.default_rng(seed).integers(count - FRAMES + 1))


def cd_fvd(one_ND: np.ndarray, two_ND: np.ndarray) -> float:
    """The distance of two sets of :func:`clip_features`, ``(N, D)`` each, covariance over N."""
    return frechet(Moments().add(one_ND), Moments().add(two_ND))


def noise_floor(features_ND: np.ndarray, seed: int = 0) -> float:
    """Distance of one half of a set, ``(N, D)``, to its other half.

    A distance of two sets of half as many clips that is near it says nothing. Of more clips the bias is smaller.
    """
    order = np.random.default_rng(seed).permutation(len(features_ND))
    half = len(order) // 2
    return cd_fvd(features_ND[order[:half]], features_ND[order[half : 2 * half]])


def _named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VideoMAE-v2's names to those of transformers' checkpoints."""
    named = {
        "videomae.embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "videomae.embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "fc_norm.weight": state["fc_norm.weight"],
        "fc_norm.bias": state["fc_norm.bias"],
        "classifier.weight": state["head.weight"],
        "classifier.bias": state["head.bias"],
    }
    for name, tensor in state.items():
        if name.startswith("blocks."):
            named |= {f"videomae.{ours}": part for ours, part in named_block(name, tensor).items()}
    return named

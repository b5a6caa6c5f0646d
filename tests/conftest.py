"""A complete tiny Wan family with random weights, made once per test run: what the code needs, in a second."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)

if (
    importlib.util.find_spec("av") is None
):  # a lent GPU has no PyAV: what needs no video file is tested there all the same
    nothing = MagicMock(__version__="none", missing=True, __path__=[])
    sys.modules |= dict.fromkeys(("av", "av.bitstream", "av.filter", "av.video", "av.video.reformatter"), nothing)

from mogan.data.cache import ensure_text, save_latent
from mogan.exchange.export import save_student
from mogan.lab.teacher import build_text_encoder, build_tokenizer
from mogan.models.autoencoder import encode_video
from mogan.models.causal_cache import Causal
from mogan.models.frame_sparse import Mask, write_mask
from mogan.models.wan import fingerprint, load_text, load_transformer, load_vae
from mogan.motion.flow import RaftConfig, save_raft
from mogan.sampling.trajectories import trajectories

torch.set_num_threads(1)

SIGMAS = (1.0, 6 / 7, 0.6)
CAPTIONS = ["a red circle moving left", "a blue square falling", "a green cross at rest", "a red square spinning"]

VAE = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "latents_mean": [0.1, -0.1, 0.2, 0.0],
    "latents_std": [0.9, 1.1, 1.0, 0.8],
}
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
BOUNDARY = 0.7  # of the family with two experts
VAE21 = {k: v for k, v in VAE.items() if k.startswith("latents")} | {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
VACE = TRANSFORMER | {"vace_layers": [0, 2], "vace_in_channels": 2 * 4 + 64}
SIZE = {"fps": 16, "height": 32, "width": 48, "frames": 13}


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Path:
    """``teacher/`` (a stock pipeline folder), exports ``student/`` and ``causal/``, the teacher frame-sparse as ``sparse/``, and ``raft/``,
    all random; 32 x 32, 13 frames.
    """
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder(),
        vae=AutoencoderKLWan(**VAE),
        transformer=WanTransformer3DModel(**TRANSFORMER),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    pipeline.save_pretrained(folder / "teacher")
    facts = {"fps": 16, "height": 32, "width": 32, "frames": 13}
    (folder / "teacher" / "mogan.json").write_text(json.dumps(facts))
    student = load_transformer(folder / "teacher")
    save_student(student, folder / "teacher", folder / "student", SIGMAS, torch.float32, card="a test")
    shutil.copytree(folder / "teacher", folder / "sparse")
    write_mask(folder / "sparse" / "transformer", Mask(4, (1,) * 4, {"threshold": 0.1}))
    config = RaftConfig((8, 8, 8, 8, 16), (8, 8, 8, 8, 16), 8, 2, 2, 16)
    save_raft(config.build(), config, folder / "raft")
    os.environ["MOGAN_TEST_RAFT"] = str(folder / "raft")  # what tiny_recipes see motion through, in other processes too
    student, how = load_transformer(folder / "teacher"), Causal(1, 1)
    save_student(student, folder / "teacher", folder / "causal", SIGMAS, torch.float32, card="a test", causal=how)
    return folder


@pytest.fixture(scope="session")
def sparse(family, tmp_path_factory) -> Path:
    """The family's ``teacher/`` and ``student/``, every block with one reference frame."""
    folder = tmp_path_factory.mktemp("sparse")
    for name in ("teacher", "student"):
        shutil.copytree(family / name, folder / name)
        write_mask(folder / name / "transformer", Mask(4, (1,) * 4, {"threshold": 0.1}))
    return folder


@pytest.fixture(scope="session")
def two(family, tmp_path_factory):
    """The family's teacher with another transformer for levels below 0.7."""
    folder = tmp_path_factory.mktemp("two") / "teacher"
    shutil.copytree(family / "teacher", folder)
    low = WanTransformer3DModel.from_pretrained(family / "teacher" / "transformer")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    low.save_pretrained(folder / "transformer_2")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": BOUNDARY}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def vace(tmp_path_factory) -> Path:
    """A stock folder of a tiny VACE, random."""
    folder = tmp_path_factory.mktemp("vace") / "teacher"
    torch.manual_seed(0)
    transformer = WanVACETransformer3DModel(**VACE)
    WanVACEPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder(),
        vae=AutoencoderKLWan(**VAE21),
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ).save_pretrained(folder)
    (folder / "mogan.json").write_text(json.dumps(SIZE))
    return folder


@pytest.fixture(scope="session")
def cache(family, tmp_path_factory) -> Path:
    """A cache of eight random clips for the family, as ``mogan prepare`` would have written it."""
    folder = tmp_path_factory.mktemp("cache")
    vae, generator = load_vae(family / "teacher", torch.float32), torch.Generator().manual_seed(1)
    entries = []
    for number in range(8):
        video = torch.rand(1, 3, 13, 32, 32, generator=generator) * 2 - 1
        with torch.no_grad():
            save_latent(folder, f"clip{number}", encode_video(vae, video)[0], {})
        state = {"state": ("idle", "listening", "speaking")[number % 3], "state_from": 0.0625 * (number % 2)}
        entries.append({"id": f"clip{number}", "caption": CAPTIONS[number % 4], "motion": 2.0} | state)
    facts = {
        "format": "mogan-cache",
        "version": 1,
        "contents": "clips",
        "vae": fingerprint(family / "teacher", "vae"),
        "fps": 16,
        "height": 32,
        "width": 32,
        "frames": 13,
    }
    (folder / "cache.json").write_text(json.dumps(facts))
    (folder / "index.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    ensure_text(folder, ["", *CAPTIONS], load_text(family / "teacher"))
    return folder


@pytest.fixture(scope="session")
def paths(family, tmp_path_factory) -> Path:
    """A store of eight of the teacher's paths, which pass ``SIGMAS`` and 0."""
    folder = tmp_path_factory.mktemp("paths")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    trajectories(
        prompts=folder / "prompts.txt", out=folder / "store", model=str(family / "teacher"), keep="0,2,4,6", seeds=2,
        steps=6, guidance=2.0, shift=3.0, negative_prompt="", precision="fp32", device="cpu",
    )  # fmt: skip
    return folder / "store"

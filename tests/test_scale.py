"""Real configuration files at reduced depth, random weights: every command once, ending in a stock ``WanPipeline``."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AnyFlowPipeline, AutoencoderKLWan, WanPipeline

import tiny_recipes
from mogan.cli import main
from mogan.costs.calls import build_transformer, transformer_calls
from mogan.costs.shapes import PUBLISHED, VAE_22, read_shapes, resized
from mogan.costs.trace import fake
from mogan.data.cache import open_cache
from mogan.data.video import write_video
from mogan.estimate.random_wan import random_text_encoder, random_wan
from mogan.models import attention, autoencoder, wan
from mogan.models.causal import CausalDenoiser
from mogan.motion.flow import RaftConfig, save_raft
from mogan.training.assemble import assemble

NARROW = {
    "transformer": {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "text_dim": 64, "freq_dim": 64},
    "vae": {"base_dim": 8},
    "text_encoder": {"d_model": 64, "d_ff": 128, "num_heads": 4, "d_kv": 16},
}
CLIP = (9, 64, 64)
LONG = (45, 64, 64)  # four chunks of three latents


@pytest.fixture
def raft(tmp_path, monkeypatch):
    config = RaftConfig((8, 8, 8, 8, 16), (8, 8, 8, 8, 16), 8, 2, 2, 16)
    save_raft(config.build(), config, tmp_path / "raft")
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(tmp_path / "raft"))
    return tmp_path / "raft"


def videos(folder, count=12):
    """Two clips of so many frames, of a bright square that moves, again and again."""
    folder.mkdir()
    for number in range(2):
        frames = np.full((count, 64, 64, 3), 40, np.uint8)
        for i, frame in enumerate(frames):
            frame[20:36, 4 + 3 * (i % 12) : 20 + 3 * (i % 12), number] = 220
        write_video(folder / f"{number}.mp4", frames, 16)
        (folder / f"{number}.txt").write_text(f"a square moving right, number {number}, 向右")
    return folder


def frames_seen(monkeypatch):
    """Filled while causal students run: which latents of the past each call sees."""
    seen, own = [], CausalDenoiser.chunk

    def chunk(student, x, sigma, text, cache):
        seen.append(cache.frames)
        return own(student, x, sigma, text, cache)

    monkeypatch.setattr(CausalDenoiser, "chunk", chunk)
    return seen


def trained_and_gone_on(recipe, tmp_path, clip=CLIP):
    """Records of a tiny recipe, trained on Wan's shapes in little for one iteration and, begun again, for another."""
    model, cache, run = (tmp_path / name for name in ("model", "cache", "run"))
    random_wan(model, layers=2, text_layers=1, clip=clip, changes=NARROW)
    clips = str(videos(tmp_path / "videos", clip[0] + 3))
    assert main(["prepare", clips, "--model", str(model), "--out", str(cache), "--flow", "dis"]) == 0
    train = ["train", f"tiny_recipes:{recipe}", "--model", str(model), "--data", str(cache), "--out", str(run)]
    assert main([*train, "--iterations", "1"]) == 0
    assert main([*train, "--iterations", "2"]) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "size"), [("narrow", "wan2.1-t2v-1.3b"), ("real", "wan2.1-t2v-1.3b"), ("narrow", "wan2.2-t2v-a14b")]
)
def test_a_random_folder_of_a_published_model_goes_through_every_command(width, size, raft, tmp_path, monkeypatch):
    model, cache, run, out = (tmp_path / name for name in ("model", "cache", "run", "export"))
    random_wan(model, size, layers=2, text_layers=1, clip=CLIP, changes=NARROW if width == "narrow" else None)
    assert (
        main(
            [
                "prepare",
                str(videos(tmp_path / "videos")),
                "--model",
                str(model),
                "--out",
                str(cache),
                "--flow",
                str(raft),
            ]
        )
        == 0
    )
    train = [
        "train",
        "tiny_recipes:wan",
        "--model",
        str(model),
        "--student",
        str(model),
        "--data",
        str(cache),
        "--out",
        str(run),
    ]
    assert main([*train, "--iterations", "1"]) == 0
    assert main([*train, "--iterations", "2"]) == 0  # resumes
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0] * 4 + [1] * 4
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines)
    assert main(["export", str(run), "--out", str(out)]) == 0

    pipeline = WanPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    video = pipeline(
        "a square",
        height=CLIP[1],
        width=CLIP[2],
        num_frames=CLIP[0],
        num_inference_steps=3,
        guidance_scale=1.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda pipe, step, t, kwargs: seen.append(float(t)) or {},
    ).frames[0]
    assert video.shape == (*CLIP, 3)
    assert np.isfinite(video).all()
    assert seen == pytest.approx([1000, 757, 522], abs=0.5)  # CausVid's levels, from the scheduler in the export


@pytest.mark.slow
def test_a_student_for_several_numbers_of_steps_goes_through_every_command(raft, tmp_path):
    model, cache, run, out = (str(tmp_path / name) for name in ("model", "cache", "run", "export"))
    random_wan(tmp_path / "model", layers=2, text_layers=1, clip=CLIP, changes=NARROW)
    clips = str(videos(tmp_path / "videos"))
    assert main(["prepare", clips, "--model", model, "--out", cache, "--flow", str(raft)]) == 0
    train = ["train", "tiny_recipes:tdm_wan", "--model", model, "--data", cache, "--out", run]
    assert main([*train, "--iterations", "1"]) == 0
    assert main([*train, "--iterations", "2"]) == 0  # resumes
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines)
    assert main(["export", run, "--out", out]) == 0
    pipeline = AnyFlowPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    size, seen = {"height": CLIP[1], "width": CLIP[2], "num_frames": CLIP[0]}, []
    for steps in (1, 2, 4):
        pipeline(
            "a square",
            **size,
            num_inference_steps=steps,
            output_type="latent",
            callback_on_step_end=lambda pipe, step, t, kwargs: seen.append(float(t)) or {},
        )
    assert seen == pytest.approx([1000, 1000, 833.3, 1000, 937.5, 833.3, 625], abs=0.1)


@pytest.mark.slow
def test_a_model_of_two_experts_is_distilled_in_phases_at_its_own_shape_in_little(tmp_path):
    """Wan2.2-T2V-A14B, narrow: the recipe's levels and boundaries, trained, gone on with, sampled and exported."""
    model, prompts, cache, run, out = (tmp_path / name for name in ("model", "prompts.txt", "cache", "run", "export"))
    random_wan(model, "wan2.2-t2v-a14b", layers=1, text_layers=1, clip=CLIP, changes=NARROW)
    prompts.write_text("a square moving right\na circle, 向左\n")
    assert main(["prepare", str(prompts), "--model", str(model), "--out", str(cache)]) == 0
    train = ["train", "tiny_recipes:phased_a14b", "--model", str(model), "--data", str(cache), "--out", str(run)]
    assert main([*train, "--iterations", "1"]) == 0
    assert main([*train, "--iterations", "3"]) == 0
    updates = [json.loads(line)["update"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(updates)) == ["student<high", "fake_score<high", "student<low", "fake_score_low<low"]
    assert main(["sample", "--model", str(run), "--prompts", str(prompts), "--out", str(tmp_path / "clips")]) == 0
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 2
    assert main(["export", str(run), "--out", str(out)]) == 0
    pipeline, seen = WanPipeline.from_pretrained(out), []
    for name in ("transformer", "transformer_2"):
        pipeline.components[name].register_forward_hook(lambda *call, name=name: seen.append(name))
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": CLIP[1], "width": CLIP[2], "num_frames": CLIP[0], "num_inference_steps": 4}
    assert pipeline("a square", **size, guidance_scale=1.0, output_type="np").frames.shape[1:] == (*CLIP, 3)
    assert seen == ["transformer", "transformer", "transformer_2", "transformer_2"]


@pytest.mark.slow
def test_the_autoencoder_of_wan_2_2_decodes_in_windows_and_encodes_as_stock():
    torch.manual_seed(0)
    narrow = VAE_22 | {
        "base_dim": 16,
        "decoder_base_dim": 16,
        "z_dim": 8,
        "latents_mean": [0.1] * 8,
        "latents_std": [2.0] * 8,
    }
    vae = AutoencoderKLWan(**narrow).eval().requires_grad_(False)
    z = torch.randn(1, 8, 3, 2, 2)
    stock = vae.decode(z * 2 + 0.1).sample
    assert torch.equal(autoencoder.decode_window(vae, z), stock)
    assert torch.equal(autoencoder.decode_window(vae, z, 1, 2), stock[:, :, 1:])
    expected = (vae.encode(stock).latent_dist.mean - 0.1) / 2
    torch.testing.assert_close(autoencoder.encode_video(vae, stock), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_runs_at_its_own_shape_without_its_weights(name):
    shapes = PUBLISHED[name]
    with fake():
        network = build_transformer(shapes, 1)
        shown = {"control_hidden_states": torch.empty(1, 96, *shapes.latent[1:])} if "vace" in name else {}
        if "2.1-i2v" in name:
            shown = {"encoder_hidden_states_image": torch.empty(1, 257, 1280)}
        channels, text = 36 if "-i2v" in name else shapes.latent[0], torch.empty(1, 512, 4096)
        seen = torch.empty(1, channels, *shapes.latent[1:])
        out = network(seen, torch.empty(1), text, return_dict=False, **shown)[0]
    assert tuple(out.shape) == (1, *shapes.latent)
    forward, train = transformer_calls(resized(shapes, frames=9, height=64, width=64), True, torch.bfloat16)
    assert train.work.flops > 3 * forward.work.flops


@pytest.mark.parametrize(
    ("change", "message"),
    [({"starts": (0, 3)}, "looks at latent frames up to 5 and clips have 4"), ({"blocks": 40}, "takes 40 blocks")],
)
def test_a_recipe_too_large_for_the_model_is_a_sentence(change, message, family, cache, monkeypatch):
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
    config = tiny_recipes.mogan()
    config = config.changed("gan", **change)
    with pytest.raises(wan.UserError, match=message):
        assemble(config, open_cache(cache), model=str(family / "teacher"), student=str(family / "student"), run=None)


def spoil(model, part, **entries):
    path = model / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("vae", {"z_dim": 48}, "the autoencoder has 48 channels and the transformer 4"),
        ("vae", {"latents_std": [1.0, 1.0, 0.0, 1.0]}, "positive ones in latents_std"),
        ("vae", {"latents_mean": [0.0]}, "needs 4 numbers in latents_mean"),
        (
            "text_encoder",
            {"d_model": 4096},
            "the text encoder gives 4096 numbers per token and the transformer reads 64",
        ),
        ("vae", {"latents_std": [1.0, "x", 1.0, 1.0]}, r"has \[1.0, 'x', 1.0, 1.0\] for latents_std"),
        ("vae", {"patch_size": None, "out_channels": 12}, "no pictures of three colours"),
        (
            "transformer",
            {"patch_size": -1},
            r"has -1 for patch_size, where a WanTransformer3DModel has such as \(1, 2, 2\)",
        ),
        ("transformer", {"patch_size": [1, [2], 2]}, "for patch_size"),
        ("transformer", {"rope_max_seq_len": {}}, "has {} for rope_max_seq_len"),
        ("transformer", {"num_layers": -1}, "has -1 for num_layers"),
        ("transformer", {"in_channels": 36}, "reads 32 channels beside the clip's"),
        ("transformer", {"image_dim": 1280}, "there is no image_encoder"),
    ],
)
def test_parts_of_different_models_are_found_before_they_are_loaded(part, entries, message, family, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(family / "teacher", model)
    assert wan.resolve_model(model) == model
    spoil(model, part, **entries)
    with pytest.raises(wan.UserError, match=message):
        wan.resolve_model(model)


def test_the_size_of_wan_2_2_is_known_without_a_note(family, tmp_path):
    assert wan.geometry(tmp_path) == wan.Geometry()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"z_dim": 48}))
    assert wan.geometry(tmp_path) == wan.WAN_22
    (tmp_path / "mogan.json").write_text(json.dumps({"frames": 49}))
    assert wan.geometry(tmp_path) == replace(wan.WAN_22, frames=49)


def test_a_text_encoder_without_some_of_its_tensors_is_refused(family, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(family / "teacher", model)
    path = model / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    gone = next(k for k in tensors if "wi_0" in k)
    save_file({k: v for k, v in tensors.items() if k != gone}, path, metadata={"format": "pt"})
    with pytest.raises(wan.UserError, match="lacks 1 tensors"):
        wan.load_text(model)


def test_estimate_reads_what_random_wan_writes(tmp_path):
    model = random_wan(tmp_path / "m", layers=1, text_layers=1, clip=CLIP, changes=NARROW)
    shapes = read_shapes(str(model))
    assert shapes.latent == (16, 3, 8, 8)
    wan.resolve_model(model)
    assert [len(e) for e in wan.load_text(model)(["ab", "é"])] == [3, 3]  # a token per byte and the end
    with pytest.raises(wan.UserError, match="exists already"):
        random_wan(model)


def test_a_text_encoder_alone_is_written_in_parts_and_encodes_prompts(tmp_path):
    model = random_text_encoder(tmp_path / "m", layers=2, changes=NARROW["text_encoder"])
    assert len(list((model / "text_encoder").glob("*.safetensors"))) == 4  # embedding, two blocks, last norm
    (short, long) = wan.load_text(model)(["ab", "a dog chases a ball. " * 40])
    assert (short.shape, long.shape) == ((3, 64), (attention.TEXT_LENGTH, 64))
    assert short.isfinite().all()
    (tmp_path / "prompts.txt").write_text("a dog runs\na cat sleeps\n")
    assert main(["prepare", str(tmp_path / "prompts.txt"), "--model", str(model), "--out", str(tmp_path / "c")]) == 0
    assert len(open_cache(tmp_path / "c")) == 2
    with pytest.raises(wan.UserError, match="exists already"):
        random_text_encoder(model)

"""Students that are given the first frame at level 0: what networks see, what is learnt, sampled and exported."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from torch import nn

import tiny_recipes
from conftest import CAPTIONS
from mogan import recipes
from mogan.data.cache import open_cache
from mogan.data.controls import read_picture
from mogan.data.video import read_frames, write_video
from mogan.errors import UserError
from mogan.exchange.export import export
from mogan.models.conditions import conditioned
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.runs.generator import open_generator
from mogan.sampling.rollout import Euler, animate, normal
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.sheet import sample_sheet
from mogan.training.steps import Position, draw, rolled_out
from test_vace_runs import sampled

TEXT = torch.zeros(2, 1, 8)


class Seen(nn.Module):
    """A transformer that keeps what it is called with and mixes frames, so that a given one reaches the others."""

    def __init__(self):
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.tensor(0.3)), []
        self.config = type("Config", (), {"patch_size": (1, 2, 2), "get": lambda self, *a: a[-1]})()

    def forward(self, x, timestep, text, return_dict=False):
        self.calls.append((x, timestep))
        return (self.scale * (x + x.mean(2, keepdim=True)),)


def test_a_network_sees_the_given_frames_at_level_zero_and_answers_what_leads_to_them():
    torch.manual_seed(0)
    network, x, given = Seen(), torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 2, 4, 4)
    sigma = torch.tensor([0.8, 0.5])
    clean = Denoiser(network)(x, sigma, conditioned(TEXT, given))
    seen, timestep = network.calls[0]
    assert torch.equal(seen, torch.cat([given, x[:, :, 2:]], 2))
    levels = timestep.view(2, 4, 4)[:, :, 0] / 1000
    torch.testing.assert_close(levels, torch.tensor([[0, 0, 0.8, 0.8], [0, 0, 0.5, 0.5]]))
    torch.testing.assert_close(clean[:, :, :2], given)
    velocity = 0.3 * (seen + seen.mean(2, keepdim=True))
    torch.testing.assert_close(clean[:, :, 2:], (x - sigma.view(2, 1, 1, 1, 1) * velocity)[:, :, 2:])
    per_frame = Denoiser(network)(x, sigma[:, None].expand(2, 4), conditioned(TEXT, given))
    torch.testing.assert_close(per_frame, clean)
    Denoiser(network)(x, torch.tensor([[0.9, 0.8, 0.5, 0.2]]).expand(2, 4), conditioned(TEXT, given))
    torch.testing.assert_close(network.calls[-1][1].view(2, 4, 4)[0, :, 0], torch.tensor([0.0, 0.0, 500.0, 200.0]))
    (found,) = torch.autograd.grad(clean[:, :, :2].sum(), network.scale, allow_unused=True)
    assert found is None or found == 0  # nobody learns from what is given
    other = Denoiser(network)(x, sigma, conditioned(TEXT, given + 1))
    assert (other - clean)[:, :, 2:].abs().min() > 0.05  # negative control: the others see it


def test_both_sides_of_guidance_see_the_given_frames():
    network, x, given = Seen(), torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 1, 4, 4)
    guided_velocity(Denoiser(network), x, torch.full((2,), 0.5), conditioned(TEXT, given), TEXT[:1], 3.0)
    assert torch.equal(network.calls[0][0][:, :, :1], torch.cat([given, given]))


def test_a_roll_out_of_all_steps_is_the_sampler_and_given_frames_stay():
    torch.manual_seed(1)
    noise, given, levels = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 1, 4, 4), (1.0, 0.75, 0.5)
    student, kind = Denoiser(Seen()), Euler(stop=3, since=0)
    drawn = {kind.draw(levels, torch.Generator().manual_seed(i)) for i in range(30)}
    assert drawn == {0, 1, 2}
    made = kind.make(student, noise, conditioned(TEXT, given), levels, torch.Generator(), 2, True)
    torch.testing.assert_close(made.sample_BCFHW, animate(student, noise, given, TEXT, TEXT, levels, 1.0))
    torch.testing.assert_close(made.sample_BCFHW[:, :, :1], given)
    assert made.level == 0.0


def built(config, family, cache, run=None):
    student = tiny_recipes.start(config, family)
    return assemble(config, open_cache(cache), model=str(family / "teacher"), student=student, run=run, device="cpu")


def test_dmd_and_the_fake_score_find_no_error_in_what_is_given(family, cache):
    parts = built(tiny_recipes.dmd_i2v(), family, cache)
    fake = parts.networks["fake_score"]
    with torch.no_grad():  # it starts as the teacher, where there is no error anywhere
        fake.transformer.proj_out.weight += 0.1
    where = Position(0, 0, 0, 0)
    batch = draw(parts, where)
    for row, clip in enumerate(batch.ids):
        torch.testing.assert_close(batch.control_BKFHW[row], parts.cache.latent(clip)[:, :1].float())
    rollout = rolled_out(parts, parts.config.plan[0], batch, where)
    torch.testing.assert_close(rollout.sample_BCFHW[:, :, :1], batch.control_BKFHW, atol=1e-4, rtol=0)
    (gradient,) = torch.autograd.grad(
        parts.objectives["dmd"].losses["student"](rollout, batch, where.generators(2, batch))[0], rollout.sample_BCFHW
    )
    size = gradient.square().mean((0, 1, 3, 4)).sqrt()
    assert size[0] < 1e-3 * size[1:].min()
    noise = normal(rollout.sample_BCFHW.shape, torch.Generator().manual_seed(0), "cpu")
    x_t = 0.4 * rollout.sample_BCFHW.detach() + 0.6 * noise
    with torch.no_grad():
        velocity = fake.velocity(x_t, torch.full((len(x_t),), 0.6), rollout.text_BLD)
    wanted = noise - rollout.sample_BCFHW.detach()
    torch.testing.assert_close(velocity[:, :, :1], wanted[:, :, :1], atol=1e-4, rtol=0)
    assert (velocity - wanted)[:, :, 1:].abs().mean() > 0.1  # negative control


def trained(config, family, cache, run):
    student = tiny_recipes.start(config, family)
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps(config.as_json()))
    told = {"model": str(family / "teacher"), "student": student or str(family / "teacher"), "data": str(cache)}
    (run / "run.json").write_text(json.dumps(told))
    run_training(built(config, family, cache, run), run)


def test_a_run_resumes_and_the_stock_pipeline_animates_its_export_as_we_do(family, cache, tmp_path, monkeypatch):
    config = replace(tiny_recipes.dmd_i2v(), iterations=2, save_every=1, sample_every=2, sample_prompts=1)
    trained(config, family, cache, tmp_path / "whole")
    trained(replace(config, iterations=1), family, cache, tmp_path / "run")
    trained(config, family, cache, tmp_path / "run")
    one, two = (open_generator(str(tmp_path / n)).average() for n in ("whole", "run"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (tmp_path / "run" / "samples" / "000002" / "sheet.png").is_file()
    export(tmp_path / "run", out=tmp_path / "out")
    (tmp_path / "prompts.txt").write_text(CAPTIONS[0] + "\n")
    pipe = WanImageToVideoPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    clip = open_generator(str(tmp_path / "out")).geometry
    size, videos = (clip.height, clip.width), tmp_path / "videos"
    videos.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    write_video(videos / "one.mp4", np.repeat(picture, clip.frames, 0), 16, crf=0)
    (videos / "one.txt").write_text(CAPTIONS[0])
    frame = next(iter(read_frames(videos / "one.mp4", size=size, only={0})))
    torch.manual_seed(3)
    stock = pipe(
        Image.fromarray(frame.image_HWC), CAPTIONS[0], height=clip.height, width=clip.width,
        num_frames=clip.frames, num_inference_steps=3, guidance_scale=1.0, output_type="latent",
    ).frames  # fmt: skip
    how = ["--prompts", tmp_path / "prompts.txt", "--first-frames", videos, "--first-seed", 3]
    for name in ("run", "out"):
        ours = sampled(tmp_path / name, monkeypatch, *how, "--out", tmp_path / f"clips of {name}")
        torch.testing.assert_close(ours, stock, atol=1e-3, rtol=0)


def test_what_does_not_go_together_is_refused_in_a_sentence(family, cache, tmp_path):
    with pytest.raises(ValueError, match="sampled by Euler steps"):
        replace(recipes.dmd_i2v_lab(), rollout=None)
    with pytest.raises(ValueError, match="told where its steps end is given no first frames"):
        replace(recipes.tdm_lab(), given=1)
    weighted = tiny_recipes.redmd()
    weighted = replace(weighted, given=1, rollout=Euler(stop=3, since=0))
    with pytest.raises(UserError, match="asks networks under text alone, and the student is given its first frame"):
        built(weighted, family, cache)
    bare = tmp_path / "bare"
    (bare / "text").mkdir(parents=True)
    facts = json.loads((cache / "cache.json").read_text())
    kept = ("format", "version", "text_encoder", "tokenizer")
    facts = {k: v for k, v in facts.items() if k in kept} | {"contents": "prompts"}
    (bare / "cache.json").write_text(json.dumps(facts))
    (bare / "index.jsonl").write_text(json.dumps({"id": "a", "caption": CAPTIONS[0]}) + "\n")
    with pytest.raises(UserError, match="has prompts alone: prepare captioned videos"):
        built(tiny_recipes.dmd_i2v(), family, bare)


def test_pictures_are_read_upright_at_all_depths_and_over_what_is_under_them(tmp_path):
    quarter = np.zeros((8, 16, 3), np.uint8)
    quarter[:4, :8] = 200
    turned = Image.Exif()
    turned[0x0112] = 6  # shown a quarter turn to the right
    Image.fromarray(quarter).save(tmp_path / "phone.png", exif=turned)
    assert np.array_equal(read_picture(tmp_path / "phone.png"), np.rot90(quarter, -1))
    deep = np.linspace(0, 65535, 128).reshape(8, 16).astype(np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert np.array_equal(read_picture(tmp_path / name)[..., 0], np.round(deep / 257).astype(np.uint8))
    clear = Image.fromarray(np.dstack([quarter, quarter[..., 0]]))
    clear.save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png")[-1, -1].tolist() == [255] * 3
    assert read_picture(tmp_path / "clear.png", "black")[-1, -1].tolist() == [0] * 3
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="floating-point numbers: save it with 8 or 16 bits"):
        read_picture(tmp_path / "float.tif")
    whole = (tmp_path / "deep.png").read_bytes()
    at = whole.index(b"IDAT")
    for broken in (whole[: at - 4] + bytes(8) + whole[at + 4 :], whole[: at + 9]):
        (tmp_path / "broken.png").write_bytes(broken)
        with pytest.raises(UserError, match=r"broken.png is not a picture that can be read"):
            read_picture(tmp_path / "broken.png")


def test_a_sheet_shows_the_prompts_whose_first_frames_are_given(family, cache, tmp_path):
    bare = tmp_path / "bare"  # clips that teach motion alone
    shutil.copytree(cache, bare)
    rows = [json.loads(line) | {"caption": None} for line in (bare / "index.jsonl").read_text().splitlines()]
    (bare / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(tiny_recipes.mogan_i2v(), sample_prompts=2)
    words = open_cache(cache)
    parts = assemble(
        config, open_cache(bare), model=str(family / "teacher"), student=str(family / "student"), prompts=words,
        run=tmp_path / "run", device="cpu",
    )  # fmt: skip
    sample_sheet(parts, tmp_path / "run", 7)
    assert (tmp_path / "run" / "samples" / "000007" / "sheet.png").is_file()

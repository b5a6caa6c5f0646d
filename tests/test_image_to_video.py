"""Image-to-video models: the first frame from the cache to rollout, teacher and student, discriminator, clips, a stock export."""

import json
import shutil
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import tiny_recipes
from conftest import CAPTIONS, SIZE, TRANSFORMER, VAE21
from mogan.cli import main
from mogan.costs.calls import network_parameters
from mogan.costs.shapes import PUBLISHED, read_shapes
from mogan.costs.trace import sizes
from mogan.data.cache import open_cache
from mogan.data.video import read_frames, write_video
from mogan.errors import UserError
from mogan.estimate.random_wan import random_wan
from mogan.exchange.export import export
from mogan.exchange.imports import import_student
from mogan.exchange.layouts import original_module, split_leaf
from mogan.lab.teacher import build_text_encoder, build_tokenizer
from mogan.models import attention, wan
from mogan.models.conditions import conditioned
from mogan.models.defaults import WAN_NEGATIVE_PROMPT, Defaults, Geometry
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.runs.generator import open_generator
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.steps import Position, draw, learn, split
from test_distributed import assert_same_trajectory, train_alone, train_together
from test_scale import CLIP, NARROW, videos
from test_vace_runs import sampled

SHAPE = SIZE["frames"], SIZE["height"], SIZE["width"]
# out channels 4: a latent, and a mask of four frames
ANIMATES = TRANSFORMER | {"in_channels": 12}
SEES = ANIMATES | {"image_dim": 32, "added_kv_proj_dim": 24}
EYE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def folder_of(folder, transformer):
    """A stock folder of a tiny image-to-video model, random; with an image encoder where the transformer reads one."""
    torch.manual_seed(0)
    eye = {}
    if transformer.get("image_dim"):
        eye["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(**EYE, image_size=28, patch_size=14)).eval()
        eye["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    WanImageToVideoPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder(),
        vae=AutoencoderKLWan(**VAE21),
        transformer=WanTransformer3DModel(**transformer),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **eye,
    ).save_pretrained(folder)
    (folder / "mogan.json").write_text(json.dumps(SIZE))
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Captioned videos of noise that moves, each of another picture."""
    folder, draws = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for number, caption in enumerate(CAPTIONS):
        picture = draws.integers(0, 256, (SHAPE[1], SHAPE[2], 3), np.uint8)
        write_video(folder / f"{number}.mp4", np.stack([np.roll(picture, i, 1) for i in range(13)]), 16, crf=0)
        (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module", params=["without CLIP", "with CLIP"])
def model(request, clips, tmp_path_factory):
    """A tiny model as of Wan2.2 or Wan2.1, and the cache prepared for it."""
    at = tmp_path_factory.mktemp("animates")
    folder = folder_of(at / "model", SEES if request.param == "with CLIP" else ANIMATES)
    command = ["prepare", clips, "--model", folder, "--out", at / "cache", "--flow", "farneback", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:  # as the stock pipeline computes, on every processor
        patch.setattr(wan, "fast_dtype", lambda device="cpu": torch.float32)
        assert main([str(a) for a in command]) == 0
    return folder, at / "cache"


@pytest.fixture(autouse=True)
def raft(family, monkeypatch):
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))


@pytest.fixture
def without(tmp_path):
    """A model without an image encoder."""
    return folder_of(tmp_path / "animates", ANIMATES)


def first_picture(clips, number):
    return next(iter(read_frames(clips / f"{number}.mp4", fps=16, size=SHAPE[1:], only={0}))).image_HWC


def test_what_is_prepared_is_what_the_stock_pipeline_makes_of_the_first_frame(model, clips):
    folder, cache = model[0], open_cache(model[1])
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    size = {"height": SHAPE[1], "width": SHAPE[2], "num_frames": SHAPE[0]}
    for entry in cache.entries[:2]:
        number = int(entry["source"].removesuffix(".mp4"))
        picture = PIL.Image.fromarray(first_picture(clips, number))
        image = pipeline.video_processor.preprocess(picture, height=SHAPE[1], width=SHAPE[2])
        _, stock = pipeline.prepare_latents(image, 1, 4, **size, dtype=torch.float32, device=torch.device("cpu"))
        mask, latent = stock[:, :4], stock[:, 4:]
        torch.testing.assert_close(cache.control(entry["id"])[None], torch.cat([latent, mask], 1), rtol=1e-3, atol=1e-4)
        seen = cache.picture(entry["id"])
        if wan.sees_pictures(folder):
            with torch.no_grad():
                torch.testing.assert_close(seen[None], pipeline.encode_image(picture, "cpu"), rtol=1e-4, atol=1e-5)
        else:
            assert seen is None
    one, two = (cache.control(entry["id"]) for entry in cache.entries[:2])
    assert (one - two).abs().max() > 0.01  # of another clip it is another


def test_a_denoiser_with_a_first_frame_is_the_stock_transformer(model):
    folder, sees = model[0], wan.sees_pictures(model[0])
    stock = WanTransformer3DModel.from_pretrained(folder / "transformer").eval()
    denoiser = Denoiser(wan.load_transformer(folder)).eval()
    assert denoiser.controlled
    assert denoiser.animates
    rolls = torch.Generator().manual_seed(1)
    x, control = (torch.randn(2, c, 4, 4, 6, generator=rolls) for c in (4, 8))
    picture = torch.randn(2, 5, 32, generator=rolls) if sees else None
    embeddings = [torch.randn(n, 64, generator=rolls) for n in (3, 5)]
    text = attention.stack_text(embeddings)
    padded = torch.stack([torch.nn.functional.pad(e, (0, 0, 0, 512 - len(e))) for e in embeddings])
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        ours = denoiser.velocity(x, sigma, conditioned(text, control, picture))
        read = torch.cat([x, control[:, 4:], control[:, :4]], 1)
        theirs = stock(read, 1000 * sigma, padded, encoder_hidden_states_image=picture, return_dict=False)[0]
        other = denoiser.velocity(x, sigma, conditioned(text, control.flip(0), picture))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert (other - ours).abs().max() > 1e-3  # it is read
    null = attention.stack_text([torch.randn(2, 64, generator=rolls)])
    with torch.no_grad():  # guidance leads away from other words under the same picture
        guided = guided_velocity(denoiser, x, sigma, conditioned(text, control, picture), null, 3.0)
        blank = denoiser.velocity(x, sigma, conditioned(null.expand(2, -1, -1), control, picture))
        unseen = denoiser.velocity(x, sigma, conditioned(text, control, None if picture is None else picture.flip(0)))
    torch.testing.assert_close(guided, blank + 3 * (ours - blank), rtol=1e-3, atol=1e-4)
    assert ((unseen - ours).abs().max() > 1e-4) == sees


def built(config, folder, cache):
    return assemble(config, open_cache(cache), model=str(folder), student=str(folder), run=None, device="cpu")


def trained(config, folder, cache, run):
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps(config.as_json()))
    (run / "run.json").write_text(json.dumps({"model": str(folder), "student": str(folder), "data": str(cache)}))
    parts = assemble(config, open_cache(cache), model=str(folder), student=str(folder), run=run, device="cpu")
    run_training(parts, run)


def test_a_batch_and_its_parts_hold_the_first_frames_of_their_own_clips(model):
    parts = built(replace(tiny_recipes.dmd(), post_trains=False), *model)
    batch = draw(parts, Position(0, 0, 0, 0))
    for piece in split(batch, 2):
        for row, clip in enumerate(piece.ids):
            assert torch.equal(piece.control_BKFHW[row], parts.cache.control(clip))
            if wan.sees_pictures(model[0]):
                assert torch.equal(piece.picture_BTD[row], parts.cache.picture(clip))


@pytest.mark.parametrize("name", ["dmd", "mogan", "msm", "flow_matching"])
def test_every_network_of_an_update_is_told_and_only_who_learns_moves(name, model):
    parts = built(replace(getattr(tiny_recipes, name)(), post_trains=False, lora=None), *model)
    told = []
    for denoiser in {id(n): n for n in parts.networks.values() if isinstance(n, Denoiser)}.values():
        denoiser.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: told.append(args[0].shape[1]), with_kwargs=True
        )
    for number, update in enumerate(parts.config.plan):
        before = {n: [p.detach().clone() for p in net.parameters()] for n, net in parts.networks.items()}
        where = Position(0, 0, number, 0)
        batch = draw(parts, where)
        batch = parts.observations.complete(batch) if parts.observations and batch.window_start is not None else batch
        numbers = learn(parts, where, batch).numbers
        assert all(torch.isfinite(value).all() for value in numbers.values())
        moved = {
            n
            for n, net in parts.networks.items()
            if any(not torch.equal(a, b) for a, b in zip(before[n], net.parameters(), strict=True))
        }
        assert moved == {update.learns}
    assert set(told) == {12}  # a clip, a mask and a picture, every time


@pytest.mark.parametrize("recipe", [tiny_recipes.dmd, tiny_recipes.mogan], ids=["dmd", "mogan"])
def test_a_run_goes_on_bit_for_bit(recipe, model, tmp_path):
    config = replace(recipe(), post_trains=False, iterations=2, save_every=1, sample_every=2, sample_prompts=1)
    trained(config, *model, tmp_path / "whole")
    trained(replace(config, iterations=1), *model, tmp_path / "parts")
    trained(config, *model, tmp_path / "parts")
    one, two = (open_generator(str(tmp_path / n)).average() for n in ("whole", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (tmp_path / "whole" / "samples" / "000002" / "sheet.png").is_file()


def stock_latents(folder, picture, steps, seed, **more):
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)
    size = {"height": SHAPE[1], "width": SHAPE[2], "num_frames": SHAPE[0]}
    image = PIL.Image.fromarray(picture)
    how = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"} | more
    return pipe(image, CAPTIONS[0], **size, **how).frames


def test_the_stock_pipeline_animates_the_export_as_we_do(model, clips, tmp_path, monkeypatch):
    folder, cache = model
    config = replace(tiny_recipes.dmd(), post_trains=False, iterations=1)
    trained(config, folder, cache, tmp_path / "run")
    export(tmp_path / "run", out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == "WanImageToVideoPipeline"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "WanImageToVideoPipeline.from_pretrained" in card
    assert "pipeline_tag: image-to-video" in card
    assert 'video = pipe(picture, "a prompt"' in card
    (tmp_path / "prompts.txt").write_text(CAPTIONS[0] + "\n")
    how = ["--prompts", tmp_path / "prompts.txt", "--first-frames", clips, "--first-seed", 3]
    stock = stock_latents(tmp_path / "out", first_picture(clips, 0), 3, 3)
    for name in ("run", "out"):
        ours = sampled(tmp_path / name, monkeypatch, *how, "--out", tmp_path / f"clips of {name}")
        torch.testing.assert_close(ours, stock, atol=1e-3, rtol=0)
    other = stock_latents(tmp_path / "out", first_picture(clips, 1), 3, 3)
    assert (other - stock).abs().max() > 0.02  # negative control: of another picture it is another clip
    record = json.loads((tmp_path / "clips of out" / "samples.jsonl").read_text().splitlines()[0])
    assert record["first_frames"] == str(clips)
    assert "guidance" not in record


def test_a_teacher_animates_with_guidance_as_the_stock_pipeline_does(model, clips, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text(CAPTIONS[0] + "\n")
    how = ["--prompts", tmp_path / "prompts.txt", "--first-frames", clips, "--steps", 3, "--guidance", 2, "--shift", 3]
    ours = sampled(model[0], monkeypatch, *how, "--negative-prompt", "", "--out", tmp_path / "clips", "--first-seed", 4)
    stock = stock_latents(
        model[0], first_picture(clips, 0), 3, 4, guidance_scale=2.0, negative_prompt="", generator=torch.manual_seed(4)
    )
    torch.testing.assert_close(ours, stock, atol=1e-3, rtol=0)


def test_it_is_sampled_as_wans_own_code_does_where_its_folder_says_nothing(without):
    size = {k: v for k, v in SIZE.items() if k in ("fps", "height", "width", "frames")}
    assert vars(wan.defaults(without)) == vars(
        Defaults(steps=40, shift=3.0, negative_prompt="镜头晃动，" + WAN_NEGATIVE_PROMPT, size=Geometry(**size))
    )
    (without / "transformer_2").mkdir()  # Wan2.2 A14B
    assert vars(wan.defaults(without)) == vars(Defaults(steps=40, guidance=3.5, size=Geometry(**size)))
    (without / "mogan.json").write_text(json.dumps(size | {"steps": 7, "shift": 2.5}))
    assert (wan.defaults(without).steps, wan.defaults(without).shift) == (7, 2.5)


def test_two_experts_each_see_the_first_frame(without, tmp_path):
    shutil.copytree(without / "transformer", without / "transformer_2")
    index = json.loads((without / "model_index.json").read_text())
    index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.9}
    (without / "model_index.json").write_text(json.dumps(index))
    denoiser = open_generator(str(without)).load()
    x, control = torch.randn(2, 4, 4, 4, 6), torch.randn(2, 8, 4, 4, 6)
    text, sigma = torch.zeros(2, 3, 64), torch.tensor([0.95, 0.5])
    with torch.no_grad():
        both = denoiser.velocity(x, sigma, conditioned(text, control))
        one = Denoiser(denoiser.transformer).velocity(x, sigma, conditioned(text, control))
    torch.testing.assert_close(both, one)  # they are alike, and each sees its own row


def in_diffusers(folder, file):
    """Weights of the base after diffusers' own loader has read a LoRA file."""
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.transformer.state_dict()


def close(a, b, but=()):
    assert a.keys() == b.keys()
    for name in a.keys() - {*but}:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [None, 3], ids=["all weights", "adapters"])
def test_a_lora_file_is_read_alike_by_diffusers_and_by_us(lora, model, tmp_path):
    folder, cache = model
    config = replace(tiny_recipes.flow_matching(), iterations=3, lora=lora, ema=0.5)
    config = replace(config, optimizers={k: replace(o, lr=0.02) for k, o in config.optimizers.items()})
    trained(config, folder, cache, tmp_path / "run")
    file = tmp_path / "x.safetensors"
    export(tmp_path / "run", out=file, to="lora", rank=None if lora else 32)
    assert "WanImageToVideoPipeline.from_pretrained" in file.with_suffix(".md").read_text()
    import_student(file, base=str(folder), out=tmp_path / "back", sigmas=(1.0, 0.5))
    ours, theirs = wan.load_transformer(tmp_path / "back").state_dict(), in_diffusers(folder, file)
    close(ours, theirs)
    student, base = open_generator(str(tmp_path / "run")).load().transformer, wan.load_transformer(folder)
    matrices = [n for n, m in student.named_modules() if isinstance(m, torch.nn.Linear)]
    if lora is None and wan.sees_pictures(folder):  # what sees the picture goes along
        assert {"blocks.0.attn2.add_k_proj", "condition_embedder.image_embedder.ff.net.2"} < {*matrices}
    for name in matrices:
        torch.testing.assert_close(ours[f"{name}.weight"], student.state_dict()[f"{name}.weight"], atol=1e-4, rtol=1e-4)
    before = base.state_dict()
    assert any((ours[f"{n}.weight"] - before[f"{n}.weight"]).abs().max() > 1e-3 for n in matrices)
    assert json.loads((tmp_path / "back" / "model_index.json").read_text())["_class_name"] == "WanImageToVideoPipeline"


def test_weights_named_as_in_the_original_code_arrive_whole(model, tmp_path):
    torch.manual_seed(2)
    state = {k: torch.randn_like(v) for k, v in wan.load_transformer(model[0]).state_dict().items()}
    there = {}
    for name, tensor in state.items():
        module, leaf = split_leaf(name)
        there[".".join(filter(None, (original_module(module), leaf)))] = tensor
    agreed = convert_wan_transformer_to_diffusers(dict(there))
    close(agreed, state)
    save_file(there, tmp_path / "x.safetensors")
    import_student(tmp_path / "x.safetensors", base=str(model[0]), out=tmp_path / "in", sigmas=(1.0, 0.5))
    close(wan.load_transformer(tmp_path / "in").state_dict(), state)
    with pytest.raises(UserError, match="causal students make clips from text"):
        import_student(
            tmp_path / "x.safetensors", base=str(model[0]), out=tmp_path / "no", sigmas=(1.0, 0.5), chunks=(1, 1)
        )


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"in_channels": 16}, "reads 12 channels beside the clip's"),
        ({"pos_embed_seq_len": 514}, "given the first and the last frame"),
        ({"image_dim": 32, "added_kv_proj_dim": 24}, "there is no image_encoder"),
    ],
)
def test_a_model_that_reads_other_pictures_is_refused_in_a_sentence(entries, message, without):
    path = without / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(UserError, match=message):
        wan.resolve_model(without)


def test_commands_say_what_they_lack_of_an_image_to_video_model(without, clips, family, cache, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(CAPTIONS[0] + "\n")

    def refused(*words):
        assert main([str(w) for w in words]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    out = ["--out", tmp_path / "out", "--model", without]
    assert "give a folder of videos" in refused("prepare", prompts, *out)
    assert "leave out --controls" in refused("prepare", clips, *out, "--controls", "flow")
    assert "give --first-frames, captioned clips" in refused("sample", "--prompts", prompts, *out)
    assert "animates a first frame" in refused("trajectories", "--prompts", prompts, *out)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="told different things beside text"):
        assemble(tiny_recipes.dmd(), open_cache(cache), model=str(family / "teacher"), student=str(without), run=None)
    for config in (tiny_recipes.redmd(), tiny_recipes.sft_i2v()):
        with pytest.raises(UserError, match="is an image-to-video model"):
            built(replace(config, post_trains=False), without, without_first_frames(without, tmp_path / config.recipe))
    with pytest.raises(UserError, match="has no first frames: prepare videos"):
        built(replace(tiny_recipes.dmd(), post_trains=False), without, without_first_frames(without, tmp_path / "bare"))


def without_first_frames(model, folder):
    """A cache of another time, which fits the model but for its first frames."""
    text = {part: wan.fingerprint(model, part) for part in ("text_encoder", "tokenizer")}
    facts = {"format": "mogan-cache", "version": 1, "contents": "prompts", "model": str(model), **text}
    folder.mkdir()
    (folder / "text").mkdir()
    (folder / "cache.json").write_text(json.dumps(facts))
    (folder / "index.jsonl").write_text(json.dumps({"id": "a", "caption": CAPTIONS[0]}) + "\n")
    return folder


# ---------------------------------------------------------------------------------------------- at its own shape


@pytest.mark.parametrize("name", ["wan2.1-i2v-14b", "wan2.2-i2v-a14b"])
def test_a_published_model_is_priced_from_its_shape(name):
    shapes = PUBLISHED[name]
    deep = shapes.transformer | {"num_layers": 3}
    with torch.device("meta"):
        assert (
            network_parameters(replace(shapes, transformer=deep))["transformer"]
            == sizes(WanTransformer3DModel(**deep))[0]
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan2.1-i2v-14b", "wan2.2-i2v-a14b"])
def test_a_published_model_goes_through_every_command_at_its_own_shape_in_little(name, tmp_path):
    narrow = {part: dict(changes) for part, changes in NARROW.items()}
    if "2.1" in name:
        narrow["transformer"] |= {"image_dim": 32, "added_kv_proj_dim": 64}
    model, cache, run, out = (tmp_path / n for n in ("model", "cache", "run", "export"))
    random_wan(model, name, layers=2, text_layers=1, clip=CLIP, changes=narrow)
    assert read_shapes(str(model)).transformer["in_channels"] == 36
    clips = videos(tmp_path / "videos")
    assert main(["prepare", str(clips), "--model", str(model), "--out", str(cache), "--flow", "farneback"]) == 0
    train = ["train", "tiny_recipes:wan", "--model", str(model), "--data", str(cache), "--out", str(run)]
    train += ["--student", str(model)]
    assert main([*train, "--iterations", "1"]) == 0
    assert main([*train, "--iterations", "2"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["iteration"] for line in lines} == {0, 1}
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines)
    (tmp_path / "prompts.txt").write_text("a square moving right, number 1, 向右\n")
    how = ["sample", "--model", run, "--prompts", tmp_path / "prompts.txt", "--first-frames", clips]
    assert main([str(a) for a in [*how, "--out", tmp_path / "clips"]]) == 0
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 1
    assert main(["export", str(run), "--out", str(out)]) == 0
    pipeline = WanImageToVideoPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    image = PIL.Image.new("RGB", (64, 64), (200, 40, 40))
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3}
    video = pipeline(image, "a square", **size, guidance_scale=1.0, output_type="np").frames[0]
    assert video.shape == (9, 64, 64, 3)
    assert np.isfinite(video).all()


@pytest.mark.slow
def test_two_processes_train_as_one(model, tmp_path):
    folder, cache = model
    config = replace(tiny_recipes.dmd(), iterations=2)
    (tmp_path / "family").mkdir()
    shutil.copytree(folder, tmp_path / "family" / "teacher")
    before = train_alone(config, tmp_path / "family", cache, tmp_path / "one")
    train_together(2, "dmd", tmp_path / "family", cache, tmp_path / "two", "--iterations", "2")
    assert_same_trajectory(before, tmp_path / "one", tmp_path / "two")

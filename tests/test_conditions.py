"""VACE: controls and references beside a prompt, as the stock transformer and pipeline have them."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import WanVACEPipeline, WanVACETransformer3DModel

from conftest import SIZE, VACE, VAE21
from mogan.cli import main
from mogan.costs.calls import build_transformer, network_parameters, transformer_calls
from mogan.costs.shapes import PUBLISHED, Shapes
from mogan.costs.trace import fake, sizes, trace
from mogan.errors import UserError
from mogan.estimate.random_wan import random_wan
from mogan.models import attention, wan
from mogan.models.conditions import (
    Conditioned,
    conditioned,
    encode_control,
    mask_places,
    parted,
    pictures_of_references,
)
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.models.wan import Geometry


def random_control(seed=0, references=0):
    """Video in [-1, 1], mask of 0 and 1, pictures."""
    draw = torch.Generator().manual_seed(seed)
    video = torch.rand(1, 3, SIZE["frames"], SIZE["height"], SIZE["width"], generator=draw) * 2 - 1
    mask = (torch.rand(1, 1, *video.shape[2:], generator=draw) > 0.5).float()
    sizes = [(32, 48), (64, 32), (16, 40)]
    pictures = [
        torch.randint(0, 256, (*sizes[i], 3), generator=draw, dtype=torch.uint8).numpy() for i in range(references)
    ]
    return video, mask, pictures


def stock_control(pipeline, video, mask, pictures):
    """As the stock pipeline prepares it, from what its own call makes of pictures."""
    given = [PIL.Image.fromarray(p) for p in pictures] or None
    _, _, references = pipeline.preprocess_conditions(
        None, None, given, 1, SIZE["height"], SIZE["width"], SIZE["frames"], torch.float32, torch.device("cpu")
    )
    whole = mask.expand(-1, 3, -1, -1, -1).contiguous()
    latents = pipeline.prepare_video_latents(video, whole, references, None, torch.device("cpu"))
    return torch.cat([latents, pipeline.prepare_masks(whole, references)], 1)


@pytest.mark.parametrize("references", [0, 1, 3])
def test_a_control_is_what_the_stock_pipeline_prepares(references, vace):
    pipeline = WanVACEPipeline.from_pretrained(vace)
    video, mask, pictures = random_control(references=references)
    shown = pictures_of_references(pictures, SIZE["height"], SIZE["width"])[None] if pictures else None
    ours = encode_control(wan.load_vae(vace, torch.float32), video, mask, shown)
    with torch.no_grad():
        stock = stock_control(pipeline, video, mask, pictures)
    assert ours.shape == (1, VACE["vace_in_channels"], 4 + references, 4, 6)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    if references == 3:  # negative control: their order counts
        other = encode_control(wan.load_vae(vace, torch.float32), video, mask, shown.flip(1))
        assert (other - stock).abs().max() > 0.01


def test_a_masks_pixels_lie_under_their_place_and_its_frames_are_the_nearest():
    mask = torch.zeros(1, 1, 13, 16, 16)
    mask[0, 0, 6, 8 + 3, 5] = 1  # of 13 frames for 4 latents 1, 4, 8 and 11 are nearest
    assert mask_places(mask, 8, 4).sum() == 0
    mask[0, 0, 8, 8 + 3, 5] = 1
    places = mask_places(mask, 8, 4)
    assert places.shape == (1, 64, 4, 2, 2)
    assert places.nonzero().tolist() == [[0, 8 * 3 + 5, 2, 1, 0]]


def test_a_denoiser_with_a_control_is_the_stock_transformer(vace):
    stock = WanVACETransformer3DModel.from_pretrained(vace / "transformer").eval()
    denoiser = Denoiser(wan.load_transformer(vace)).eval()
    draw = torch.Generator().manual_seed(1)
    x, control = torch.randn(2, 4, 4, 4, 6, generator=draw), torch.randn(2, 72, 4, 4, 6, generator=draw)
    embeddings = [torch.randn(n, 64, generator=draw) for n in (3, 5)]
    text = attention.stack_text(embeddings)
    padded = torch.stack([torch.nn.functional.pad(e, (0, 0, 0, 512 - len(e))) for e in embeddings])
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        ours = denoiser.velocity(x, sigma, conditioned(text, control))
        theirs = stock(x, 1000 * sigma, padded, control_hidden_states=control, return_dict=False)[0]
        other = denoiser.velocity(x, sigma, conditioned(text, control.flip(0)))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert (other - ours).abs().max() > 1e-3  # it is read
    null = attention.stack_text([torch.randn(2, 64, generator=draw)])
    with torch.no_grad():
        guided = guided_velocity(denoiser, x, sigma, conditioned(text, control), null, 3.0)
        without = denoiser.velocity(x, sigma, conditioned(null.expand(2, -1, -1), control))
    torch.testing.assert_close(guided, without + 3 * (ours - without), rtol=1e-3, atol=1e-4)


def test_rows_of_text_and_control_stay_together():
    told = Conditioned(torch.arange(3.0).view(3, 1, 1), 10 * torch.arange(3.0).view(3, 1, 1, 1, 1))
    some = told[torch.tensor([2, 0])]
    assert len(some) == 2
    text, control, picture = parted(some)
    assert picture is None
    assert text.flatten().tolist() == [2, 0]
    assert control is not None
    assert control.flatten().tolist() == [20, 0]
    assert conditioned(text, None) is text
    assert parted(text) == (text, None, None)


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("transformer", {"vace_in_channels": 96}, "reads controls of 96 channels and those of its autoencoder have 72"),
    ],
)
def test_a_vace_of_parts_that_do_not_belong_together_is_a_sentence(part, entries, message, vace, tmp_path):
    shutil.copytree(vace, tmp_path / "model")
    path = tmp_path / "model" / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(UserError, match=message):
        wan.resolve_model(tmp_path / "model")


def test_commands_that_pass_no_control_refuse_a_vace_in_a_sentence(vace, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n")
    for command in (["attention"], ["trajectories"]):
        arguments = [*command, "--prompts", tmp_path / "prompts.txt", "--model", vace, "--out", tmp_path / "out"]
        assert main([str(a) for a in arguments]) == 2
        assert "is a VACE, which reads control videos" in capsys.readouterr().err


def test_a_random_vace_folder_has_the_published_shape_in_little(tmp_path):
    changes = {"transformer": {"num_attention_heads": 1, "ffn_dim": 32, "text_dim": 64}, "vae": {"base_dim": 8}}
    changes["text_encoder"] = {"d_model": 64, "d_ff": 32, "num_heads": 2, "d_kv": 8}
    folder = random_wan(tmp_path / "model", "wan2.1-vace-1.3b", layers=3, clip=(9, 32, 32), changes=changes)
    assert wan.resolve_model(folder) == folder
    assert wan.has_controls(folder)
    transformer = wan.load_transformer(folder)
    assert (len(transformer.blocks), len(transformer.vace_blocks)) == (3, 2)
    assert WanVACEPipeline.from_pretrained(folder).transformer.config.vace_layers == [0, 2]


def test_what_a_vace_costs_is_what_it_computes():
    deep = VACE | {"num_layers": 5, "vace_layers": [0, 2, 4]}
    shapes = Shapes("tiny", deep, VAE21, PUBLISHED["wan2.1-vace-1.3b"].text_encoder, Geometry(**SIZE))
    with torch.device("meta"):
        assert network_parameters(shapes)["transformer"] == sizes(WanVACETransformer3DModel(**deep))[0]
    with fake():
        network = build_transformer(shapes).train()
        told = conditioned(torch.empty(1, 128, 64), torch.empty(1, 72, *shapes.latent[1:]))
        denoiser = Denoiser(network)
        x = torch.empty(1, *shapes.latent)
        whole = trace(network.parameters(), lambda: denoiser(x, torch.full((1,), 0.5), told), backward=True)
    _, line = transformer_calls(shapes, False, torch.float32)
    assert line.work.flops == pytest.approx(whole.work.flops, rel=1e-6)
    assert line.held == pytest.approx(whole.held, rel=0.05)
    published = network_parameters(PUBLISHED["wan2.1-vace-1.3b"])["transformer"]
    assert published == pytest.approx(2.15e9, rel=0.02)  # 1.3B and fifteen blocks that read controls


def test_pictures_are_fitted_into_a_white_one():
    made = pictures_of_references([np.zeros((10, 40, 3), np.uint8)], 32, 64)
    assert made.shape == (1, 3, 32, 64)
    assert (made[0, :, 8:24] == -1).all()
    assert (made[0, :, :8] == 1).all()
    assert (made[0, :, 24:] == 1).all()

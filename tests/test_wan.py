import copy
import json
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from conftest import VAE, VAE21
from mogan.errors import UserError
from mogan.models import attention, autoencoder, wan

WAN21 = VAE21 | {"dim_mult": [1, 2, 2, 2]}


@pytest.fixture(scope="module", params=["wan2.1", "wan2.2"])
def vae(request):
    torch.manual_seed(0)
    config = WAN21 if request.param == "wan2.1" else VAE
    return AutoencoderKLWan(**config).eval().requires_grad_(False)


def full_decode(vae, z):
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    return vae.decode(z * torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1) + mean).sample


@pytest.mark.parametrize(("start", "length"), [(0, 4), (0, 2), (1, 2), (2, 2), (3, 1)])
def test_window_is_the_full_decode_restricted_to_it_bit_for_bit(vae, start, length):
    z = torch.randn(1, 4, 4, 4, 4)
    first = 0 if start == 0 else 1 + 4 * (start - 1)
    last = 1 + 4 * (start + length - 1)
    assert torch.equal(autoencoder.decode_window(vae, z, start, length), full_decode(vae, z)[:, :, first:last])


@pytest.mark.parametrize(("start", "length"), [(0, 2), (1, 2)])
def test_window_gradients_equal_the_unchecked_ones_and_stop_before_it(vae, start, length):
    z = torch.randn(1, 4, 4, 4, 4, requires_grad=True)
    weight = torch.randn(1, 3, 4 * length - (3 if start == 0 else 0), 32, 32)
    (gradient,) = torch.autograd.grad((autoencoder.decode_window(vae, z, start, length) * weight).sum(), z)
    assert gradient[:, :, start : start + length].abs().sum() > 0
    assert gradient[:, :, :start].abs().sum() == 0
    assert gradient[:, :, start + length :].abs().sum() == 0

    # the same function without checkpoints: plain autograd through the stock recurrence from a detached state
    with torch.no_grad():
        before = autoencoder._empty_cache(vae.decoder)
        x = vae.post_quant_conv(_denormalised(vae, z))
        for i in range(start):
            vae.decoder(x[:, :, i : i + 1], feat_cache=before, feat_idx=[0], first_chunk=i == 0)
    x = vae.post_quant_conv(_denormalised(vae, z))
    frames = [
        vae.decoder(x[:, :, i : i + 1], feat_cache=before, feat_idx=[0], first_chunk=i == 0)
        for i in range(start, start + length)
    ]
    video = torch.cat(frames, 2)
    if vae.config.patch_size:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        video = unpatchify(video, patch_size=vae.config.patch_size)
    (plain,) = torch.autograd.grad((video.clamp(-1, 1) * weight).sum(), z)
    assert torch.equal(gradient, plain)


def _denormalised(vae, z):
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    return z * torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1) + mean


def test_whole_decode_gradient_equals_the_stock_decoders(vae):
    z = torch.randn(1, 4, 3, 4, 4, requires_grad=True)
    weight = torch.randn(1, 3, 9, 32, 32)
    (ours,) = torch.autograd.grad((autoencoder.decode_window(vae, z) * weight).sum(), z)
    (stock,) = torch.autograd.grad((full_decode(vae, z) * weight).sum(), z)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_encode_is_the_stock_mean_normalised(vae):
    video = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    assert torch.equal(autoencoder.encode_video(vae, video), (vae.encode(video).latent_dist.mean - mean) / std)
    with pytest.raises(ValueError, match="4 k \\+ 1"):
        autoencoder.encode_video(vae, video[:, :, :8])


def test_window_outside_the_clip_is_an_error(vae):
    with pytest.raises(ValueError, match="does not lie within"):
        autoencoder.decode_window(vae, torch.zeros(1, 4, 3, 4, 4), 2, 2)


def test_folded_padding_equals_attending_to_512_rows(family):
    torch.manual_seed(0)
    folded = wan.load_transformer(family / "teacher")
    stock = WanTransformer3DModel.from_pretrained(family / "teacher" / "transformer")
    texts = [torch.randn(5, 64), torch.randn(9, 64)]
    x, t = torch.randn(2, 4, 4, 4, 4), torch.tensor([1000.0, 250.0])
    padded = torch.stack([F.pad(e, (0, 0, 0, 512 - len(e))) for e in texts])
    torch.testing.assert_close(
        folded(x, t, attention.stack_text(texts))[0], stock(x, t, padded)[0], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(folded(x, t, padded)[0], stock(x, t, padded)[0], rtol=1e-4, atol=1e-5)


def test_attention_on_a_cpu_is_nearer_to_fp32_than_the_stock_one_under_autocast(family):
    """Outputs and gradients of stock and ours under bf16 autocast, against stock in fp32."""
    torch.manual_seed(0)
    text = torch.zeros(2, 512, 64)
    text[:, :5] = torch.randn(2, 5, 64)
    x, timestep = torch.randn(2, 4, 3, 4, 4), torch.tensor([300.0, 800.0])

    def seen(load, text, dtype):
        transformer = load(family / "teacher")
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = transformer(x, timestep, text, return_dict=False)[0].float()
        out.square().mean().backward()
        return out.detach(), transformer.blocks[0].attn1.to_q.weight.grad

    def stock(folder):
        return WanTransformer3DModel.from_pretrained(folder / "transformer")

    exact, rounded = seen(stock, text, torch.float32), seen(stock, text, torch.bfloat16)
    ours = seen(wan.load_transformer, text[:, :6], torch.bfloat16)
    for right, theirs, own in zip(exact, rounded, ours, strict=True):
        assert (own - right).norm() <= 1.2 * (theirs - right).norm()


def test_norms_share_the_stock_weights_and_give_in_bf16_what_torch_gives_slowly(family):
    torch.manual_seed(0)
    stock = WanTransformer3DModel.from_pretrained(family / "teacher" / "transformer")
    names = [name for name, _ in stock.named_parameters()]
    theirs = stock.blocks[0].attn1.norm_q
    torch.nn.init.normal_(theirs.weight, 1.0, 0.1)
    attention.set_attention(stock)
    ours = stock.blocks[0].attn1.norm_q
    assert [name for name, _ in stock.named_parameters()] == names
    assert ours.weight is theirs.weight
    assert copy.deepcopy(stock).blocks[0].attn1.norm_q.weight is not ours.weight
    x = torch.randn(2, 9, len(ours.weight))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of two dtypes
        out = ours(x.bfloat16())
    assert out.dtype == torch.bfloat16
    exact = theirs(x.bfloat16().float())
    assert (out.float() - exact).norm() < 2**-8 * exact.norm()  # a rounding of the weight and one of the result
    out.float().square().sum().backward()
    assert ours.weight.grad.dtype == torch.float32


def test_text_is_what_the_stock_pipeline_feeds_the_transformer(family):
    pipe = WanPipeline.from_pretrained(family / "teacher")
    prompts = ["A  red circle moving left", "a video with good motion"]
    expected, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    ours = wan.load_text(family / "teacher")(prompts)
    for e, o in zip(expected, ours, strict=True):
        torch.testing.assert_close(
            F.pad(o, (0, 0, 0, 512 - len(o))),
            e.float() if len(e) == 512 else F.pad(e, (0, 0, 0, 512 - len(e))),
            rtol=1e-3,
            atol=1e-4,
        )


def test_wrong_folders_are_told_apart(family, tmp_path):
    with pytest.raises(UserError, match="model_index"):
        wan.resolve_model(str(tmp_path))
    with pytest.raises(UserError, match="no vae"):
        wan.load_vae(tmp_path)
    broken = tmp_path / "m"
    shutil.copytree(family / "teacher", broken)
    config = json.loads((broken / "vae" / "config.json").read_text())
    (broken / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match="only the Wan family"):
        wan.load_vae(broken)
    config = json.loads((broken / "transformer" / "config.json").read_text())
    (broken / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": 5}))
    with pytest.raises(UserError, match="tensors do not fit"):
        wan.load_transformer(broken)


def test_fingerprint_changes_with_weights(family, tmp_path):
    copy = tmp_path / "m"
    shutil.copytree(family / "teacher", copy)
    assert wan.fingerprint(copy, "vae") == wan.fingerprint(family / "teacher", "vae")
    AutoencoderKLWan(**VAE).save_pretrained(copy / "vae")
    assert wan.fingerprint(copy, "vae") != wan.fingerprint(family / "teacher", "vae")


def test_latent_shape_refuses_what_does_not_fit(family):
    assert wan.latent_shape(family / "teacher", wan.Geometry(16, 32, 48, 13)) == (4, 4, 4, 6)
    with pytest.raises(UserError, match="multiples of 16"):
        wan.latent_shape(family / "teacher", wan.Geometry(16, 40, 32, 13))
    with pytest.raises(UserError, match="4 k \\+ 1"):
        wan.latent_shape(family / "teacher", wan.Geometry(16, 32, 32, 12))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_positions_turn_pairs_of_numbers_by_their_angles_also_for_the_compiler(dtype, most, monkeypatch):
    draws = torch.Generator().manual_seed(0)
    angle = torch.rand(1, 7, 1, 4, generator=draws, dtype=torch.float64).repeat_interleave(2, -1) * 6
    x = torch.randn(2, 7, 3, 8, generator=draws, dtype=torch.float64)
    wanted = torch.empty_like(x)
    for pair in range(4):
        a, b, turn = x[..., 2 * pair], x[..., 2 * pair + 1], angle[..., 2 * pair]
        wanted[..., 2 * pair] = a * turn.cos() - b * turn.sin()
        wanted[..., 2 * pair + 1] = a * turn.sin() + b * turn.cos()
    table = tuple(part if dtype == torch.float64 else part.float() for part in (angle.cos(), angle.sin()))
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        own = x.to(dtype, copy=True).requires_grad_()
        out = attention.rotate(own, *table)
        out.square().sum().backward()  # a rotation keeps lengths: the gradient is twice the input
        assert out.dtype == dtype
        assert (out - wanted).abs().max() <= most * wanted.abs().max()
        assert (own.grad - 2 * own).abs().max() <= 4 * most * own.abs().max()
        found.append(out)
    assert (found[0] - found[1]).abs().max() <= most

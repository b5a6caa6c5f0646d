"""A level per latent frame: values and gradients are the stock transformer's at a timestep per token, without its vectors per token."""

from functools import partial

import pytest
import torch
from diffusers import WanTransformer3DModel

from conftest import TRANSFORMER
from mogan.costs.calls import build_transformer
from mogan.costs.shapes import read_shapes
from mogan.costs.trace import fake, trace
from mogan.models.attention import set_attention
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal
from mogan.models.conditions import conditioned
from mogan.models.denoiser import Denoiser, taps
from mogan.models.frame_levels import frames_of
from mogan.models.frame_sparse import set_frame_sparse
from mogan.models.sight import block_causal

X = torch.randn(2, 4, 3, 8, 6, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
LEVELS = torch.tensor([[0.0, 0.9, 0.4], [0.3, 0.3, 1.0]])


def network(seed=0, **more):
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(**TRANSFORMER | more).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return set_attention(transformer)


def per_token(transformer, x, levels, text, **more):
    """As stock Wan is called: a timestep per token."""
    timestep = 1000 * levels.repeat_interleave(x.shape[3] // 2 * (x.shape[4] // 2), 1)
    return transformer(x, timestep, text, return_dict=False, **more)[0]


def loss_and_gradients(transformer, call):
    transformer.zero_grad()
    x, text = X.clone().requires_grad_(), TEXT.clone().requires_grad_()
    out = call(x, LEVELS, text)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out, [x.grad, text.grad, *(p.grad for p in transformer.parameters())]


@pytest.mark.parametrize("kind", ["plain", "recomputed", "sparse"])
def test_values_and_gradients_are_those_of_a_timestep_per_token(kind):
    transformer = network()
    if kind == "recomputed":
        transformer.train().enable_gradient_checkpointing()
    if kind == "sparse":
        set_frame_sparse(transformer, 3, (1,) * 4)
    want, wanted = loss_and_gradients(transformer, partial(per_token, transformer))
    got, found = loss_and_gradients(transformer, Denoiser(transformer).velocity)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    assert frames_of(transformer.blocks) == 1
    assert not transformer.rope._forward_pre_hooks


def test_in_bf16_they_agree_to_its_rounding():
    transformer = network()
    with torch.no_grad():
        exact = per_token(transformer, X, LEVELS, TEXT)
        with torch.autocast("cpu", torch.bfloat16):
            stock = per_token(transformer, X, LEVELS, TEXT).float()
        ours = Denoiser(transformer, torch.bfloat16).velocity(X, LEVELS, TEXT)
    assert (ours - exact).norm() < 1.1 * (stock - exact).norm()


def test_a_picture_and_channels_beside_the_latent_come_along():
    more = {"in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 24}
    transformer, generator = network(**more), torch.Generator().manual_seed(3)
    control = torch.randn(2, 8, 3, 8, 6, generator=generator)
    picture = torch.randn(2, 7, 20, generator=generator)
    text = torch.cat([TEXT, torch.zeros(2, 512 - 5, 64)], 1)
    with torch.no_grad():
        seen = torch.cat([X, control[:, 4:], control[:, :4]], 1)
        want = per_token(transformer, seen, LEVELS, text, encoder_hidden_states_image=picture)
        got = Denoiser(transformer).velocity(X, LEVELS, conditioned(TEXT, control, picture))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_features_are_a_clips():
    transformer, found = network(), []
    with torch.no_grad():
        for call in (partial(per_token, transformer), Denoiser(transformer).velocity):
            with taps(transformer.blocks, (1, 3)) as features:
                call(X, LEVELS, TEXT)
            found.append(features)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_causal_pass_has_a_level_per_chunk():
    transformer = network()
    student = CausalDenoiser(transformer, how=Causal(1, 1))
    with torch.no_grad():
        got = student.masked(X, LEVELS, TEXT, (1, 1, 1))
        with student._seeing(student._masked_view(X, [0, 1, 2], block_causal((1, 1, 1)))):
            want = per_token(transformer, X, LEVELS, TEXT)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_training_holds_hardly_grows_with_levels_per_frame():
    shapes = read_shapes("lab")
    with fake():
        transformer = build_transformer(shapes, 2).train()
        x, text = torch.empty(1, *shapes.latent), torch.empty(1, 16, shapes.transformer["text_dim"])
        one, each = torch.full((1,), 0.5), torch.full((1, shapes.latent[1]), 0.5)
        calls = [
            trace(transformer.parameters(), partial(Denoiser(transformer).velocity, x, level, text), backward=True)
            for level in (one, each)
        ]
        stock = trace(transformer.parameters(), partial(per_token, transformer, x, each, text), backward=True)
    assert calls[1].held < 1.1 * calls[0].held
    assert stock.held > 1.3 * calls[0].held

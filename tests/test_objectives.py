"""Each equation against an independent statement of it: numpy transcriptions, finite differences, double backward."""

import copy
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from mogan.data.batches import Batch
from mogan.errors import UserError
from mogan.models import attention, autoencoder, wan
from mogan.models.denoiser import Denoiser, frozen, guided_velocity, recomputed, taps
from mogan.models.discriminator import Discriminator, approximate_penalty, discriminator_loss, generator_loss
from mogan.motion import estimators
from mogan.motion.flow import motion_picture
from mogan.motion.observation import MotionObservation, Observed, full_scale, motion_amount, saturation
from mogan.objectives.dmd import DMD, DMDConfig, dmd_direction
from mogan.objectives.gan import GAN, GANConfig
from mogan.sampling.rollout import Rollout, roll_out

TEXT = torch.zeros(2, 3, 8)
BATCH = Batch([], [], [])


class Linear(nn.Module):
    """A transformer's stand-in whose velocity is known: ``a x + b sigma + mean(text)``."""

    def __init__(self, a=0.5, b=0.1):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x, timestep, text, return_dict=False):
        s = (timestep / 1000).view(-1, 1, 1, 1, 1)
        return (self.a * x + self.b * s + text.mean((1, 2)).view(-1, 1, 1, 1, 1),)


def latents(seed=0, batch=2):
    return torch.randn(batch, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- denoiser and rollout


def test_denoiser_gives_x0_from_velocity_at_exact_timesteps():
    x, sigma = latents(), torch.tensor([0.757, 0.25])
    seen = []
    model = Linear()
    model.register_forward_pre_hook(lambda m, a: seen.append(a[1]))
    x0 = Denoiser(model)(x, sigma, TEXT)
    assert torch.equal(seen[0], 1000.0 * sigma)
    s = sigma.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(x0, x - s * (0.5 * x + 0.1 * s))


@given(st.floats(0.0, 10.0))
@settings(max_examples=20)
def test_guidance_is_the_diffusers_convention(guidance):
    x, sigma, cond = latents(), torch.tensor([0.5, 0.5]), torch.ones(2, 3, 8)
    d = Denoiser(Linear())
    with torch.no_grad():
        found = guided_velocity(d, x, sigma, cond, TEXT, guidance)
        c, u = d.velocity(x, sigma, cond), d.velocity(x, sigma, TEXT)
    torch.testing.assert_close(found, u + guidance * (c - u), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        found, c + (guidance - 1) * (c - u), atol=1e-5, rtol=1e-5
    )  # DMD papers' w = guidance - 1


def test_taps_deliver_features_with_gradient_and_leave_no_hooks(family):
    transformer = wan.load_transformer(family / "teacher")
    x = torch.randn(1, 4, 2, 4, 4, requires_grad=True)
    with taps(transformer.blocks, (0, 2)) as features:
        transformer(x, torch.tensor([0.0]), torch.randn(1, 3, 64))
    assert len(features) == 2
    assert torch.autograd.grad(features[1].sum(), x)[0].abs().sum() > 0
    assert not any(b._forward_hooks for b in transformer.blocks)


def test_rollout_is_the_students_own_sampling_and_only_its_exit_carries_gradient():
    sigmas, noise = (1.0, 0.8, 0.4), latents(1)
    d = Denoiser(Linear(0.3, 0.2))
    calls = []
    d.transformer.register_forward_hook(lambda m, a, out: calls.append(out[0].requires_grad))
    r = roll_out(d, noise, TEXT, sigmas, torch.Generator().manual_seed(5), grad=True)
    assert calls == [False, False, True]

    g = torch.Generator().manual_seed(5)
    x = noise
    for i, s in enumerate(sigmas):  # an independent statement: x0 = x - s v, then fresh noise at the next level
        x0 = x - s * (0.3 * x + 0.2 * s)
        if i < 2:
            x = (1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * torch.randn(x.shape, generator=g)
    torch.testing.assert_close(r.sample_BCFHW, x0)
    early = roll_out(d, noise, TEXT, sigmas, torch.Generator().manual_seed(5), exit_step=0)
    torch.testing.assert_close(early.sample_BCFHW, noise - (0.3 * noise + 0.2))


def test_a_sample_does_not_depend_on_its_batch():
    d, noise = Denoiser(Linear()), latents(2)
    both = roll_out(d, noise, TEXT, (1.0, 0.5), [torch.Generator().manual_seed(k) for k in (7, 8)])
    alone = roll_out(d, noise[1:], TEXT[1:], (1.0, 0.5), [torch.Generator().manual_seed(8)])
    torch.testing.assert_close(both.sample_BCFHW[1:], alone.sample_BCFHW)


# ------------------------------------------------------------------------------------------- distribution matching


def test_dmd_loss_is_the_papers_arithmetic_and_its_gradient_is_g_over_numel():
    x0 = latents(3).requires_grad_()
    dmd = DMD(
        Denoiser(Linear(0.9, -0.1)), Denoiser(Linear(0.2, 0.3)), torch.ones(1, 2, 8), DMDConfig(guidance=4.0, shift=3.0)
    )
    rollout = Rollout(x0, 2, torch.full((2, 3, 8), 0.5))
    loss, _ = dmd.student_loss(rollout, BATCH, torch.Generator().manual_seed(9))
    (gradient,) = torch.autograd.grad(loss, x0)

    g = torch.Generator().manual_seed(9)  # numpy transcription
    u = torch.rand(2, generator=g).double().numpy()
    s = np.clip(3 * u / (1 + 2 * u), 0.02, 0.98).reshape(2, 1, 1, 1, 1)
    x = x0.detach().double().numpy()
    x_t = (1 - s) * x + s * torch.randn(x0.shape, generator=g).double().numpy()
    cond, uncond = 0.9 * x_t - 0.1 * s + 0.5, 0.9 * x_t - 0.1 * s + np.array([1, 1, 0]).mean()
    real = x_t - s * (uncond + 4.0 * (cond - uncond))
    fake = x_t - s * (0.2 * x_t + 0.3 * s + 0.5)
    direction = (fake - real) / np.abs(x - real).mean(axis=(1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(loss.item(), 0.5 * (direction**2).mean(), rtol=1e-4)
    np.testing.assert_allclose(gradient, direction / x.size, rtol=1e-3, atol=1e-7)


def test_a_teacher_that_gives_no_numbers_leaves_no_loss_rather_than_no_direction():
    x0 = latents(3).requires_grad_()
    dmd = DMD(Denoiser(Linear(torch.nan)), Denoiser(Linear()), torch.zeros(1, 2, 8), DMDConfig(guidance=3.0, shift=1.0))
    loss, logs = dmd.student_loss(Rollout(x0, 0, TEXT), BATCH, torch.Generator())
    assert loss.isnan()
    assert logs["direction"].isnan()


def test_dmd_moves_samples_from_the_fake_mean_to_the_real_one():
    x0, real, fake = latents(4), torch.full((2, 2, 3, 4, 4), 2.0), torch.full((2, 2, 3, 4, 4), -1.0)
    assert (-dmd_direction(x0, real, fake, torch.full((2,), 0.5)) > 0).all()


def test_dmd_student_gradient_reaches_neither_teacher_nor_fake_score():
    teacher, fake = Denoiser(Linear()), Denoiser(Linear())
    dmd = DMD(teacher, fake, torch.zeros(1, 2, 8), DMDConfig(guidance=3.0, shift=1.0))
    x0 = latents(5).requires_grad_()
    dmd.student_loss(Rollout(x0, 0, TEXT), BATCH, torch.Generator())[0].backward()
    assert x0.grad is not None
    assert all(p.grad is None for n in (teacher, fake) for p in n.parameters())


def test_fake_score_loss_is_flow_matching_on_detached_samples():
    x0 = latents(6).requires_grad_()
    fake = Denoiser(Linear(0.2, 0.3))
    dmd = DMD(Denoiser(Linear()), fake, torch.zeros(1, 2, 8), DMDConfig(guidance=3.0, shift=2.0))
    loss, _ = dmd.fake_score_loss(Rollout(x0, 0, TEXT), BATCH, torch.Generator().manual_seed(1))
    loss.backward()
    assert x0.grad is None
    assert fake.transformer.a.grad is not None
    g = torch.Generator().manual_seed(1)
    u = torch.rand(2, generator=g).numpy()
    s = np.clip(2 * u / (1 + u), 0.02, 0.98).reshape(2, 1, 1, 1, 1)
    noise, x = torch.randn(x0.shape, generator=g).numpy(), x0.detach().numpy()
    x_t = (1 - s) * x + s * noise
    np.testing.assert_allclose(loss.item(), ((0.2 * x_t + 0.3 * s - (noise - x)) ** 2).mean(), rtol=1e-4)


# ------------------------------------------------------------------------------------------- adversarial


def test_logistic_losses_are_the_papers():
    real, fake = torch.randn(5), torch.randn(5)
    g = lambda x: np.log1p(np.exp(x))  # noqa: E731  MoGAN writes it so
    np.testing.assert_allclose(generator_loss(fake), g(-fake.numpy()).mean(), rtol=1e-6)
    np.testing.assert_allclose(
        discriminator_loss(real, fake), g(-real.numpy()).mean() + g(fake.numpy()).mean(), rtol=1e-6
    )


@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_approximate_penalty_tends_to_the_squared_gradient_of_double_backward(sigma):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    point = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(net(point).sum(), point, create_graph=True)
    exact = slope.square().sum().item()
    o = point.detach().expand(40000, 6)
    noise = torch.randn(o.shape, dtype=torch.float64)
    d = lambda x: net(x)[:, 0]  # noqa: E731
    with torch.no_grad():
        normalised = approximate_penalty(d(o), d(o + sigma * noise), sigma, normalise=True).item()
        printed = approximate_penalty(d(o), d(o + sigma * noise), sigma, normalise=False).item()
    assert normalised == pytest.approx(exact, rel=0.05)
    assert printed == pytest.approx(normalised * sigma**2, rel=1e-9)


@pytest.fixture(scope="module")
def discriminator(family):
    torch.manual_seed(1)
    return Discriminator(wan.load_transformer(family / "teacher"), torch.randn(1, 4, 64), blocks=3, tap_at=(0, 1, 2))


def test_discriminator_is_the_first_blocks_with_one_logit_per_clip(discriminator, family):
    whole = wan.load_transformer(family / "teacher")
    assert len(discriminator.transformer.blocks) == 3
    for a, b in zip(discriminator.transformer.blocks.parameters(), whole.blocks[:3].parameters(), strict=True):
        assert torch.equal(a, b)
    seen = []
    hook = discriminator.transformer.register_forward_pre_hook(lambda m, a: seen.append(a))
    logits = discriminator(torch.randn(5, 4, 2, 4, 4))
    hook.remove()
    assert logits.shape == (5,)
    assert torch.equal(seen[0][1], torch.zeros(5))  # the fixed level 0
    assert torch.equal(seen[0][2][3], discriminator.text_1LD[0])  # the fixed prompt


def test_every_learnable_parameter_of_the_discriminator_is_used(discriminator):
    discriminator.zero_grad()
    discriminator(torch.randn(2, 4, 2, 4, 4)).square().sum().backward()
    unused = [n for n, p in discriminator.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


def test_taps_must_lie_inside_the_trunk(family):
    with pytest.raises(ValueError, match="below 2 of 4"):
        Discriminator(wan.load_transformer(family / "teacher"), torch.zeros(1, 2, 64), blocks=2, tap_at=(1, 2))


def gan_with(discriminator, observe=None, **changes):
    settings = GANConfig(space="motion", blocks=3, taps=(0, 1, 2), normalise=True, window=2, flow="lab")
    return GAN(discriminator, observe, replace(settings, **changes))


def test_what_stops_above_level_0_is_no_clip_to_judge_motion_by(discriminator):
    half_way = Rollout(torch.randn(1, 4, 2, 4, 4), 0, TEXT, level=0.5, interval=(0.5, 1.0))
    gan, batch = gan_with(discriminator), Batch([], [], [], latent_BCFHW=torch.randn(1, 4, 2, 4, 4))
    for loss in (gan.student_loss, gan.judge_loss):
        with pytest.raises(
            UserError, match=r"a discriminator of motion judges clean clips, .* stops at level 0\.5: leave"
        ):
            loss(half_way, batch, torch.Generator())


def test_gan_losses_weigh_their_parts_as_equation_8(discriminator):
    x, real = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 4, 2, 4, 4)
    gan = gan_with(discriminator, r1=0.7, r2=0.2)
    batch = Batch([], [], [], latent_BCFHW=real)
    with torch.no_grad():
        loss, logs = gan.judge_loss(Rollout(x, 0, TEXT), batch, torch.Generator().manual_seed(2))
        g = torch.Generator().manual_seed(2)
        r, f = discriminator(real), discriminator(x)
        n1, n2 = (torch.randn(x.shape, generator=g) for _ in range(2))
        r1 = (((r - discriminator(real + 0.01 * n1)) / 0.01) ** 2).mean()
        r2 = (((f - discriminator(x + 0.01 * n2)) / 0.01) ** 2).mean()
    softplus = torch.nn.functional.softplus
    expected = 0.5 * (softplus(-r).mean() + softplus(f).mean()) + 0.7 * r1 + 0.2 * r2
    torch.testing.assert_close(loss, expected)
    assert set(logs) == {"real_logit", "fake_logit", "gap", "r1", "r2"}
    with torch.no_grad():
        loss, _ = gan.student_loss(Rollout(x, 0, TEXT), batch, torch.Generator())
    torch.testing.assert_close(loss, 0.5 * softplus(-f).mean())


def test_gan_gradients_reach_the_student_through_the_discriminator_but_not_into_it(discriminator):
    x = torch.randn(2, 4, 2, 4, 4, requires_grad=True)
    discriminator.zero_grad()
    gan_with(discriminator).student_loss(Rollout(x, 0, TEXT), BATCH, torch.Generator())[0].backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in discriminator.parameters())
    x.grad = None
    batch = Batch([], [], [], latent_BCFHW=torch.randn(2, 4, 2, 4, 4))
    gan_with(discriminator).judge_loss(Rollout(x.detach(), 0, TEXT), batch, torch.Generator())[0].backward()
    assert all(p.grad is not None for p in discriminator.parameters() if p.requires_grad)


@pytest.mark.parametrize(("r1", "r2", "inputs"), [(0.0, 0.0, 4), (0.3, 0.0, 6), (0.0, 0.3, 6), (0.3, 0.3, 8)])
def test_the_discriminator_is_called_once_and_without_penalties_their_inputs_are_left_out(
    discriminator, r1, r2, inputs
):
    calls = []
    hook = discriminator.register_forward_hook(lambda m, a, out: calls.append(len(out)))
    batch = Batch([], [], [], latent_BCFHW=torch.randn(2, 4, 2, 4, 4))
    with torch.no_grad():
        gan_with(discriminator, r1=r1, r2=r2).judge_loss(
            Rollout(torch.randn(2, 4, 2, 4, 4), 0, TEXT), batch, torch.Generator()
        )
    hook.remove()
    assert calls == [inputs]


def penalty_of(discriminator, network, real):
    """R1 alone at the paper's sigma, and its gradient with respect to the discriminator's weights in one fp64 vector."""
    discriminator.zero_grad()
    gan = gan_with(network, judge_weight=0.0, r1=1.0, r2=0.0)
    loss, logs = gan.tell_apart(real, real, torch.Generator().manual_seed(4))
    loss.backward()
    assert loss.item() == pytest.approx(logs["r1"].item(), rel=1e-6)
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in discriminator.parameters()]
    return loss.item(), torch.cat([g.flatten().double() for g in gradients])


@pytest.fixture(scope="module")
def penalty_in_fp64(discriminator):
    real = torch.randn(4, 4, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    narrow, exact = torch.Tensor.float, copy.deepcopy(discriminator).double()
    with pytest.MonkeyPatch.context() as patch:  # the network takes some things to fp32
        patch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else narrow(t))
        return real, *penalty_of(exact, exact, real.double())


@pytest.mark.parametrize("attention_in_fp32", [True, False])  # as on a CPU, and as on a GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalties_and_their_gradients_are_those_of_fp64_in_every_precision(
    discriminator, penalty_in_fp64, dtype, attention_in_fp32
):
    real, value, gradient = penalty_in_fp64
    network = copy.deepcopy(discriminator)
    attention.set_attention(network.transformer, fp32_on_cpu=attention_in_fp32)
    network.dtype = dtype
    found, its_gradient = penalty_of(network, network, real)
    assert found == pytest.approx(value, rel=0.01)
    assert torch.nn.functional.cosine_similarity(its_gradient, gradient, dim=0) > 0.99
    assert its_gradient.norm().item() == pytest.approx(gradient.norm().item(), rel=0.01)
    if dtype == torch.bfloat16:  # the bar is one that rounded logits do not reach
        rounded, its_gradient = penalty_of(network, lambda shown, sigma, dtype: network(shown, sigma), real)
        assert rounded != pytest.approx(value, rel=0.01)
        assert torch.nn.functional.cosine_similarity(its_gradient, gradient, dim=0) < 0.99


def test_without_penalties_the_discriminator_computes_in_its_own_precision(discriminator):
    network = copy.deepcopy(discriminator)
    network.dtype = torch.bfloat16
    features = []
    network.transformer.blocks[0].ffn.register_forward_hook(lambda m, a, out: features.append(out.dtype))
    real = torch.randn(2, 4, 2, 4, 4)
    gan_with(network, r1=0.0, r2=0.0).tell_apart(real, real, torch.Generator())
    gan_with(network).tell_apart(real, real, torch.Generator(), penalise=False)
    gan_with(network).persuade(real, torch.Generator())
    gan_with(network).tell_apart(real, real, torch.Generator())
    assert features == 3 * [torch.bfloat16] + [torch.float32]


def test_drawn_levels_noise_the_observation_to_the_level_the_trunk_is_told(discriminator):
    x, real = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 4, 2, 4, 4)
    gan = gan_with(discriminator, r1=0.0, r2=0.0, drawn_levels=True)
    seen = []
    hook = discriminator.transformer.register_forward_pre_hook(lambda m, a: seen.append(a[:2]))
    with torch.no_grad():
        gan.judge_loss(Rollout(x, 0, TEXT), Batch([], [], [], latent_BCFHW=real), torch.Generator().manual_seed(2))
    hook.remove()
    g = torch.Generator().manual_seed(2)
    ((both, timesteps),) = seen
    for clean, shown, timestep in zip((real, x), both.chunk(2), timesteps.chunk(2), strict=True):
        sigma = torch.rand(2, generator=g)
        noise = torch.randn(x.shape, generator=g)
        level = sigma.view(2, 1, 1, 1, 1)
        torch.testing.assert_close(shown, (1 - level) * clean + level * noise)
        torch.testing.assert_close(timestep, 1000 * sigma)


def test_what_is_penalised_is_told_the_level_of_the_observation_it_is_beside(discriminator):
    x, real = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 4, 2, 4, 4)
    gan, seen = gan_with(discriminator, r1=0.3, r2=0.3, drawn_levels=True), []
    hook = discriminator.transformer.register_forward_pre_hook(lambda m, a: seen.append(a[:2]))
    with torch.no_grad():
        gan.judge_loss(Rollout(x, 0, TEXT), Batch([], [], [], latent_BCFHW=real), torch.Generator().manual_seed(2))
    hook.remove()
    clips, timesteps = (torch.cat(found) for found in zip(*seen, strict=True))
    (of_real, of_fake, by_real, by_fake), levels = clips.chunk(4), timesteps.chunk(4)
    for clean, noisy, level, same in ((of_real, by_real, 0, 2), (of_fake, by_fake, 1, 3)):
        assert (noisy - clean).std() == pytest.approx(gan.settings.noise, rel=0.2)
        assert torch.equal(levels[level], levels[same])
    assert len(timesteps.unique()) == 4


def test_recomputed_activations_leave_the_gan_gradients_as_they_are(family):
    base, text = family / "teacher", torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    gradients = {}
    for again in (False, True):
        torch.manual_seed(0)
        discriminator = Discriminator(wan.load_transformer(base), text, blocks=3, tap_at=(0, 1, 2)).train()
        if again:
            discriminator.transformer.enable_gradient_checkpointing(recomputed)
        x0 = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        gan = gan_with(discriminator)
        loss, _ = gan.student_loss(Rollout(x0, 0, text), BATCH, torch.Generator().manual_seed(2))
        loss.backward()  # outside of the freezing the loss was computed in
        assert all(p.grad is None for p in discriminator.parameters())
        discriminator(x0.detach()).sum().backward()
        learned = [p.grad.clone() for p in discriminator.parameters() if p.grad is not None]
        gradients[again] = [x0.grad, *learned]
    for plain, repeated in zip(gradients[False], gradients[True], strict=True):
        assert torch.equal(plain, repeated)


def test_frozen_restores_what_was_trainable(discriminator):
    before = [p.requires_grad for p in discriminator.parameters()]
    with frozen(discriminator):
        assert not any(p.requires_grad for p in discriminator.parameters())
    assert [p.requires_grad for p in discriminator.parameters()] == before


# ------------------------------------------------------------------------------------------- observation


def test_observation_is_the_chain_it_says_and_gradient_stays_in_the_window(family):
    vae, flow = wan.load_vae(family / "teacher", torch.float32), estimators.load_flow(str(family / "raft"), 2)
    observe = MotionObservation(vae, flow, window=2, max_flow=4.0)
    z = torch.randn(1, 4, 4, 4, 4, requires_grad=True)
    for start in (0, 1, 2):
        seen = observe(z, start)
        assert seen.latent_BCFHW.shape == (1, 4, 2, 4, 4)
        assert seen.flow_BCFHW.shape == (1, 2, 4, 32, 32)
        assert seen.video_BCFHW.shape == (1, 3, 5, 32, 32)
        whole = autoencoder.decode_video(vae, z)
        last = 1 + 4 * (start + 1)
        torch.testing.assert_close(seen.video_BCFHW, whole[:, :, last - 5 : last])
        (gradient,) = torch.autograd.grad(seen.latent_BCFHW.square().sum(), z)
        assert torch.isfinite(gradient).all()
        inside = gradient[:, :, start : start + 2].abs().sum()
        assert inside > 0
        assert gradient[:, :, :start].abs().sum() + gradient[:, :, start + 2 :].abs().sum() == 0


def test_slow_motion_survives_the_picture_of_a_bf16_run(family):
    """A twentieth of a pixel where 40 px/frame are drawn as 1: the magnitude's step from -1 is smaller than bf16's there."""
    exact, rounded = (wan.load_vae(family / "teacher", dtype) for dtype in (torch.float32, torch.bfloat16))
    exact.decoder = None  # what only encodes needs none

    def seen(pixels, encoder):
        flow = lambda video: torch.full_like(video[:, :2, 1:], pixels)  # noqa: E731
        return MotionObservation(rounded, flow, window=2, max_flow=40.0, encoder=encoder)

    z = torch.zeros(1, 4, 2, 4, 4)
    want = autoencoder.encode_video(exact, motion_picture(torch.full((1, 2, 4, 32, 32), 0.05), 40.0))
    still = autoencoder.encode_video(exact, motion_picture(torch.zeros(1, 2, 4, 32, 32), 40.0))
    assert torch.equal(seen(0.05, exact)(z, 0).latent_BCFHW, want)
    in_bf16 = seen(0.05, None)(z, 0).latent_BCFHW - seen(0.0, None)(z, 0).latent_BCFHW
    assert (in_bf16 - (want - still)).norm() > 0.5 * (want - still).norm()  # what it is there for


def test_full_scale_is_a_multiple_of_what_three_of_four_clips_stay_below():
    moving = [0.31, 0.5, 1.0, 2.0, 9.0]
    assert full_scale(moving) == 3.8
    assert full_scale([13.7 * m for m in moving]) == 52.0  # larger clips, the same picture; two digits
    assert full_scale([0.0, 0.0, 0.0, 0.0, 3.0]) == 0.0


def test_observation_gradient_matches_finite_differences(family):
    vae = copy.deepcopy(wan.load_vae(family / "teacher", torch.float32)).double()
    smooth = lambda video: torch.tanh(video[:, :2, 1:] - video[:, :2, :-1])  # noqa: E731  a flow with a simple slope
    chain = MotionObservation(vae, smooth, window=2, max_flow=1.0)
    z = torch.randn(1, 4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(point):
        return chain(point, 0).latent_BCFHW.double().square().sum()

    point = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(point), point)
    direction = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = 2e-2
    with torch.no_grad():
        slope = (value(z + h * direction) - value(z - h * direction)).item() / (2 * h)
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=0.05)


def test_motion_amount_is_the_mean_of_the_largest_five_percent():
    flow = torch.zeros(1, 2, 2, 10, 10)
    flow[0, 0, 0, 0, :5] = 3.0
    flow[0, 1, 0, 0, :5] = 4.0
    assert motion_amount(flow).item() == pytest.approx(2.5)  # 5 in one pair, 0 in the other


def test_saturation_is_hsv():
    grey, red = torch.zeros(1, 3, 1, 2, 2), -torch.ones(1, 3, 1, 2, 2)
    red[:, 0] = 1.0
    assert saturation(grey).item() == 0
    assert saturation(red).item() == pytest.approx(1.0)
    assert saturation((red + 1) * 0.02 - 1).item() == pytest.approx(1.0)  # dark red is red


def test_the_log_of_motion_and_saturation_is_the_mean_of_the_clips(discriminator):
    flow, video = torch.zeros(2, 2, 4, 8, 8), -torch.ones(2, 3, 5, 8, 8)
    flow[0, 0], flow[1, 1] = 1.0, 4.0
    video[1, 0] = 1.0

    def observe(latent, start):
        return Observed(latent, flow, video)

    x = torch.randn(2, 4, 2, 4, 4)
    with torch.no_grad():
        logs = gan_with(discriminator, observe).student_loss(Rollout(x, 0, TEXT), BATCH, torch.Generator())[1]
    assert (logs["motion"].item(), logs["saturation"].item()) == (2.5, 0.5)

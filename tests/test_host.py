"""What waits in the host's memory: gradients stay what they were, and memory falls as predicted."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import mogan.models.host as host
import tiny_recipes
from conftest import TRANSFORMER, VAE, VAE21
from mogan.costs.calls import Tracer, build_transformer
from mogan.costs.codec import Codec
from mogan.costs.trace import Tape
from mogan.data.cache import open_cache
from mogan.estimate.check import allocated_peak
from mogan.models.autoencoder import decode_window, encode_video
from mogan.models.denoiser import Denoiser
from mogan.models.host import in_pieces, kept_on_host, powers_of_two
from mogan.models.wan import Geometry
from mogan.training.assemble import assemble
from mogan.training.steps import Position, step
from test_estimate import TINY

SMALL = replace(TINY, size=Geometry(16, 64, 64, 29))


@pytest.fixture(autouse=True)
def _everything(monkeypatch, family):
    monkeypatch.setattr(host, "LEAST", 0)
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))


def autoencoder(config):
    torch.manual_seed(0)
    vae = Codec(replace(SMALL, vae=config), torch.float32).vae.to_empty(device="cpu")
    for parameter in vae.parameters():
        parameter.data.normal_(0, 0.1)
    return vae


def seen(vae, z, start, offload):
    """Frames of a window, what the encoder makes of them, and the gradient with respect to the latents."""
    z = z.clone().requires_grad_(True)
    with kept_on_host(offload):
        video = decode_window(vae, z, start, 3)
        latent = encode_video(vae, video[:, :, -9:])
        loss = (latent * latent.detach().roll(1)).sum() + video.square().mean()
    return video.detach(), latent.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize(
    ("config", "start"), [(VAE, 0), (VAE21, 2), (VAE | {"is_residual": True, "decoder_base_dim": 4}, 2)]
)
def test_in_pieces_and_on_the_host_an_observation_has_the_same_gradient_bit_for_bit(config, start):
    vae = autoencoder(config)
    z = torch.randn(1, 4, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    plain = seen(vae, z, start, offload=False)
    assert plain[2].abs().max() > 0
    for found, expected in zip(seen(in_pieces(vae), z, start, offload=True), plain, strict=True):
        assert torch.equal(found, expected)


def test_moments_that_wait_are_those_that_were(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(3))
    plain = torch.nn.Parameter(torch.ones(3))
    waits, other = host.resting(torch.optim.AdamW([weight], lr=0.1)), torch.optim.AdamW([plain], lr=0.1)
    for _ in range(3):
        weight.grad, plain.grad = torch.arange(3.0), torch.arange(3.0)
        waits.step()
        other.step()
    assert torch.equal(weight, plain)
    assert all(torch.equal(waits.state[weight][k], v) for k, v in other.state[plain].items())


def test_weights_and_little_things_stay(monkeypatch):
    monkeypatch.setattr(host, "LEAST", 100)
    weight, x = torch.nn.Parameter(torch.ones(8, 8)), torch.ones(8, 8, requires_grad=True)
    tape = Tape()
    with tape, kept_on_host():
        y = (x @ weight) * torch.ones(8, 8)
        z = y[:1, :2].exp()
    assert len(tape.on_host) == 2  # x, for the weight's gradient, and the factor
    (y.sum() + z.sum()).backward()
    assert torch.equal(x.grad[1], torch.full((8,), 8.0))


@given(count=st.integers(1, 10**9))
@example(count=2**20 - 1)
@example(count=2**20 + 1)
def test_pieces_are_powers_of_two_and_hold_little_more_than_there_is(count):
    pieces = powers_of_two(count)
    assert len(pieces) <= 4
    assert all(piece.bit_count() == 1 for piece in pieces)
    assert count <= sum(pieces) <= 15 / 14 * count
    assert sum(pieces[:-1]) < count  # none for nothing


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(7 * 5 * 3.0).view(7, 5, 3),
        torch.arange(2 * 3 * 4 * 5 * 6.0).view(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        torch.arange(7 * 9.0).view(7, 9)[2:, :].t(),  # dense, and begins later in its memory
        torch.arange(7 * 9.0).view(7, 9)[:, :8],  # spread out
        torch.arange(77).bfloat16(),
    ],
)
def test_what_was_on_the_host_comes_back_as_it_lay(x, monkeypatch):
    monkeypatch.setattr(host, "LEAST", 4)
    packed = host._pack(x)
    back = host._unpack(packed)
    assert torch.equal(back, x)
    assert back.dtype == x.dtype
    assert back.stride() == torch.empty_like(x).stride()
    assert back.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert sum(len(piece) for piece in packed.pieces) <= 15 / 14 * x.numel()


@pytest.mark.parametrize("recipe", [tiny_recipes.dmd, pytest.param(tiny_recipes.mogan, marks=pytest.mark.slow)])
def test_updates_are_those_of_the_plain_path(recipe, family, cache):
    """Bit for bit where the arithmetic is the same; flow, pair by pair, and the discriminator, clip by clip, differ by rounding."""
    found = []
    for offload in (None, True):
        config = replace(recipe(), checkpointing=True, offload=offload)
        start = tiny_recipes.start(config, family)
        parts = assemble(
            config, open_cache(cache), model=str(family / "teacher"), student=start, run=None, device="cpu"
        )
        numbers = [step(parts, Position(0, 0, index, 0)) for index in range(len(config.plan))]
        found.append([(n["loss"], n["grad_norm"]) for n in numbers])
    plain, other = found
    assert other[:2] == plain[:2]  # by DMD
    for a, b in zip(other[2:], plain[2:], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_a_transformer_allocates_what_is_predicted(monkeypatch):
    """Measured by PyTorch's profiler; the host's memory is one that it does not count, as beside a GPU."""
    monkeypatch.setattr(host, "LEAST", 4000)
    shapes = replace(TINY, transformer=TRANSFORMER | {"num_layers": 8})
    text, z, sigma = torch.randn(1, 128, 64), torch.randn(1, *shapes.latent), torch.full((1,), 0.5)
    keeps = lambda x: isinstance(x, torch.nn.Parameter) or x.numel() < 1000  # noqa: E731
    measured = []
    for offload in (False, True):
        network = build_transformer(shapes).train()
        network.enable_gradient_checkpointing()
        denoiser = Denoiser(network)
        predicted = Tracer(shapes, True, torch.float32, offload=offload).train
        if offload:
            monkeypatch.setattr(host, "_pack", lambda x: x.detach() if keeps(x) else x.detach().numpy().copy())
            monkeypatch.setattr(
                host, "_unpack", lambda x: x if isinstance(x, torch.Tensor) else torch.from_numpy(x).clone()
            )

        def call(denoiser=denoiser, offload=offload):
            with kept_on_host(offload):
                out = denoiser(z, sigma, text).sum()
            out.backward()

        measured.append(allocated_peak(call))
        assert predicted.peak == pytest.approx(measured[-1], rel=0.1)
    assert measured[1] < 0.85 * measured[0]


@pytest.mark.slow
def test_an_observations_tensors_take_what_is_predicted():
    """Every tensor of a real pass is counted as it comes and goes; scratch of a CPU's convolutions, which unfold, is not."""
    shapes, z = replace(SMALL, vae=VAE21), torch.randn(1, 4, 8, 8, 8)
    vae, pieces = autoencoder(VAE21), in_pieces(autoencoder(VAE21))
    found = []
    for offload, network in ((False, vae), (True, pieces)):
        latents, tape = z.clone().requires_grad_(True), Tape(network.parameters())
        with tape:
            with kept_on_host(offload):
                video = decode_window(network, latents, 2, 5)
            video.sum().backward()
        decoded = tape.alive(None, tape.on_host)[1]
        video, tape = video[:, :, -17:].detach().requires_grad_(True), Tape(network.parameters())
        with tape:
            with kept_on_host(offload):
                latent = encode_video(network, video)
            latent.sum().backward()
        found.append((decoded, tape.alive(None, tape.on_host)[1]))
        with kept_on_host(offload):
            codec = Codec(shapes, torch.float32, offload)
            predicted = codec.decode(5, 2, True, True).peak, codec.encode(17, True, True).peak
        assert predicted == pytest.approx(found[-1], rel=0.1)
    assert found[1][0] < 0.7 * found[0][0]
    assert found[1][1] < 0.7 * found[0][1]

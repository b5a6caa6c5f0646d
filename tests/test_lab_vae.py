"""How the lab's autoencoder loses the channels that a generator need not learn."""

import pytest
import torch

from mogan.lab.clips import rendered_clips, to_video
from mogan.lab.vae import build_vae, narrow, principal_axes


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return build_vae(6)


@pytest.fixture(scope="module")
def clips():
    return rendered_clips(2, seed=3)[:, :, :5]


def latents(vae, clips):
    with torch.no_grad():
        return vae.encode(to_video(clips)).latent_dist.mean


def test_principal_axes_are_those_of_a_singular_value_decomposition(wide, clips):
    mean, variances, axes = principal_axes(wide.float(), clips)
    flat = latents(wide, clips).movedim(1, -1).flatten(0, -2).double()
    _, singular, right = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    torch.testing.assert_close(mean.double(), flat.mean(0), rtol=0, atol=2e-2 * flat.abs().max().item())
    torch.testing.assert_close(variances.double(), singular**2 / (len(flat) - 1), rtol=0.05, atol=1e-3 * variances[0])
    assert ((right[0] @ axes[:, 0].double()).abs() - 1).abs() < 1e-2


def test_a_narrowed_encoder_gives_the_coordinates_along_the_kept_axes(wide, clips):
    mean, variances, axes = principal_axes(wide, clips)
    z = latents(wide, clips)
    expected = torch.einsum("bcfhw,ck->bkfhw", z - mean.view(1, -1, 1, 1, 1), axes[:, :3])
    torch.testing.assert_close(latents(narrow(wide, mean, variances, axes, 3), clips), expected, rtol=0, atol=1e-5)


def test_a_decoder_narrowed_by_nothing_is_the_same_but_for_the_borders(wide, clips):
    """All axes kept. A convolution pads with zeros what it is given: the mean, folded into its bias, has no border."""
    mean, variances, axes = principal_axes(wide, clips)
    mean = mean + 0.5
    same = narrow(wide, mean, variances, axes, 6)
    z = torch.randn(1, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    turned = torch.einsum("bcfhw,ck->bkfhw", z - mean.view(1, -1, 1, 1, 1), axes)
    inside = (..., slice(2, None), slice(1, -1), slice(1, -1))  # in time the convolution is causal: two frames before
    with torch.no_grad():
        old, new = (v.decoder.conv_in(v.post_quant_conv(x)) for v, x in ((wide, z), (same, turned)))
    torch.testing.assert_close(new[inside], old[inside], rtol=0, atol=1e-4)
    old, new = (dict(v.decoder.named_parameters()) for v in (wide, same))
    assert all(torch.equal(new[name], value) for name, value in old.items() if not name.startswith("conv_in."))


def test_one_scale_for_all_channels(wide, clips):
    vae = narrow(wide, *principal_axes(wide, clips), 3)
    assert len(set(vae.config.latents_std)) == 1
    z = latents(vae, clips) / vae.config.latents_std[0]
    assert z.square().mean() == pytest.approx(1, abs=0.05)

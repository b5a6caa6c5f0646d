"""The numbers of docs/methods/causal.md: how far apart a causal student's ways of computing the same are, on the lab's teacher.

python benchmarks/causal_equalities.py
"""

from dataclasses import replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from diffusers import SkyReelsV2Transformer3DModel

from mogan.models import wan
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import FULL, Cache, Policy
from mogan.models.denoiser import Denoiser
from mogan.models.step_condition import arguments_of
from mogan.sampling.causal_rollout import roll_out_causal

LEVELS, CHUNKS = (1.0, 6 / 7, 0.6), (2, 2, 2)
SIGMA_BF = torch.tensor(LEVELS).repeat_interleave(2).expand(2, -1)
TEXT = F.pad(torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(5)), (0, 0, 0, 1))


class PerToken(CausalDenoiser):
    """Tells the network a level per token where it would tell one per sample."""

    def velocity(self, x_BCFHW, sigma, text_BLD, to=None):
        """As of ``Denoiser``."""
        sigma = sigma if sigma.ndim == 2 else sigma[:, None].expand(-1, x_BCFHW.shape[2])
        return super().velocity(x_BCFHW, sigma, text_BLD, to)


def far(a, b):
    """Largest difference."""
    return float((a - b).abs().max())


@torch.no_grad()
def cached(student, clean, noisy, levels=LEVELS, chunks=CHUNKS, policy=FULL, noisy_past=False):
    """Velocities of noisy chunks call by call, each given what came before, and the last cache."""
    cache, found = student.begin(TEXT, policy), []
    for level, frames, stop in zip(levels, chunks, accumulate(chunks), strict=True):
        own = slice(stop - frames, stop)
        found.append(student.chunk_velocity(noisy[:, :, own], torch.full((2,), level), TEXT, cache))
        past, told = (noisy, level) if noisy_past else (clean, 0.0)
        cache = student.remember(past[:, :, own], TEXT, cache, told)
    return torch.cat(found, 2), cache


def latents(size, frames, seed):
    """Of a batch of two."""
    return torch.randn(2, size[0], frames, *size[2:], generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def same_function(folder, size):
    """One chunk, masked passes, prefixes, the stock class of a causal Wan."""
    stock, student = Denoiser(wan.load_transformer(folder).eval()), CausalDenoiser(wan.load_transformer(folder).eval())
    clean, noisy, sigma = latents(size, 6, 1), latents(size, 6, 2), torch.full((2,), 0.7)
    per_token = sigma[:, None].expand(-1, 6)
    own = stock.velocity(noisy, sigma, TEXT)
    whole = student.masked(noisy, per_token, TEXT, (6,))
    print(f"one chunk, per sample: {far(student.chunk_velocity(noisy, sigma, TEXT, student.begin(TEXT)), own):.2g}")
    print(f"one chunk, per token: {far(whole, stock.velocity(noisy, per_token, TEXT)):.2g}")
    print(f"stock, per token and per sample: {far(whole, own):.2g}")
    prefix, prefix_sigma = torch.cat([clean[:, :, :4], noisy[:, :, 4:]], 2), SIGMA_BF.clone()
    prefix_sigma[:, :4] = 0.0
    for kind in (PerToken, CausalDenoiser):
        network = kind(student.transformer)
        found, of_noisy = cached(network, clean, noisy)[0], cached(network, clean, noisy, noisy_past=True)[0]
        forced = network.teacher_forced(clean, noisy, SIGMA_BF, TEXT, CHUNKS)
        again = network.masked(prefix, prefix_sigma, TEXT, CHUNKS)
        print(
            f"{kind.__name__}: cache and teacher forcing {far(found, forced):.2g}, cache and block-causal "
            f"{far(of_noisy, network.masked(noisy, SIGMA_BF, TEXT, CHUNKS)):.2g}, cache and prefix run again "
            f"{far(found[:, :, 4:], again[:, :, 4:]):.2g}; noisy past {far(of_noisy, forced):.2g} of {forced.abs().max():.2g}"
        )
    config = arguments_of(SkyReelsV2Transformer3DModel, student.transformer.config)
    other = SkyReelsV2Transformer3DModel(**config | {"num_frame_per_block": 2}).eval()
    other.load_state_dict(student.transformer.state_dict(), strict=True)
    full = F.pad(TEXT, (0, 0, 0, 512 - TEXT.shape[1]))
    for number, level in enumerate(LEVELS):
        start = 2 * number
        x = torch.cat([clean[:, :, :start], noisy[:, :, start : start + 2]], 2)
        told = 1000 * torch.tensor([0.0] * start + [level] * 2).expand(2, -1)
        want = other(x, told, full, enable_diffusion_forcing=True, return_dict=False)[0][:, :, start:]
        print(f"SkyReelsV2Transformer3DModel, chunk {number + 1}: {far(found[:, :, start : start + 2], want):.2g}")
    positions = Cache.positions
    Cache.positions = lambda cache, new: tuple([p + 20 for p in some] for some in positions(cache, new))
    print(f"positions + 20: {far(cached(student, clean, noisy)[0], found):.2g}")
    Cache.positions = positions
    return student


def policies(student, size):
    """Positions, sinks, memory."""

    def last(policy, frames=12):
        return cached(
            student, latents(size, frames, 1), latents(size, frames, 2), (0.7,) * frames, (1,) * frames, policy
        )

    static = Policy(window=5, sink=1, relative=True)
    relative, absolute = last(static)[0], last(replace(static, relative=False))[0]
    print(f"relative and absolute: {far(relative[:, :, :5], absolute[:, :, :5]):.2g}, {far(relative, absolute):.2g}")
    for decay in (1.0, 0.999, 0.99, 0.9):
        ema = last(replace(static, decay=decay))[0][:, :, -1]
        print(f"EMA sink, decay {decay}: {(ema - relative[:, :, -1]).norm() / relative[:, :, -1].norm():.2%}")
    for policy in (replace(static, decay=0.9), Policy()):
        sizes = []
        for frames in (6, 12, 40):
            held = {t.untyped_storage() for piece in last(policy, frames)[1].pieces for kv in piece.kv for t in kv}
            sizes.append({storage.data_ptr(): storage.nbytes() for storage in held})
        print(policy, ", ".join(f"{sum(s.values()) / 1e6:.2f} MB" for s in sizes))


def gradient(student, size):
    """Of chunk 3 in its own noise and in earlier noise."""
    noise = latents(size, 6, 2).requires_grad_(True)
    made = roll_out_causal(
        student, noise, TEXT, LEVELS, torch.Generator().manual_seed(0), chunks=CHUNKS, exit_step=0, grad=True
    )
    made.sample_BCFHW[:, :, 4:].sum().backward()
    assert noise.grad is not None
    print(f"gradient: own {noise.grad[:, :, 4:].abs().max():.2g}, earlier {noise.grad[:, :, :4].abs().max():.2g}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = wan.lab_folder() / "teacher"
    size = wan.latent_shape(folder, wan.geometry(folder))
    student = same_function(folder, size)
    policies(student, size)
    gradient(student, size)

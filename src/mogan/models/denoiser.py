"""A stock Wan transformer, or two experts, seen as ``x0 = denoiser(x, sigma, text)``; guidance; feature taps.

Every sampler and every objective talks to a network through this one contract. Shape letters: B C F H W latents,
L text tokens, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mogan.errors import UserError
from mogan.models.attention import TEXT_LENGTH
from mogan.models.conditions import animates, conditioned, parted
from mogan.models.frame_levels import by_frame, frames_of, takes_frames, whole
from mogan.models.step_condition import is_told
from mogan.schedule import broadcast, velocity_to_x0


class Denoiser(nn.Module):
    """Wraps a ``WanTransformer3DModel``; weights stay in their dtype, the network computes in ``dtype``.

    Or two, as in Wan2.2 A14B: an expert for levels from ``boundary`` on, and ``transformer_2`` for those below.

    Args:
        transformer: called as ``transformer(x, timestep, text, return_dict=False)[0]``, predicts velocity; of a VACE
            ``control_hidden_states`` come with it, of an image-to-video model more channels (:mod:`mogan.models.conditions`).
        dtype: dtype of the matrix products (autocast); the prediction is always returned in fp32.
        transformer_2: the expert for low levels; ``None``: there is one transformer for all.
        boundary: the level, stock ``WanPipeline``'s ``boundary_ratio``.
        anywhere: whether a flag is set in any of the processes that share these weights: all of them must call an expert
            that one of them needs.

    Attributes:
        told: the transformer has the end of its step as input (see :mod:`mogan.models.step_condition`).
        controlled: it has inputs for a control beside the text (see :mod:`mogan.models.conditions`).
    """

    transformer: Any
    transformer_2: Any

    def __init__(
        self,
        transformer: Any,
        dtype: torch.dtype = torch.float32,
        transformer_2: Any = None,
        boundary: float | None = None,
        anywhere: Callable[[bool], bool] = lambda flag: flag,
    ):
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary
        self.dtype, self.anywhere, self.told = dtype, anywhere, is_told(transformer)
        self.animates = animates(getattr(transformer, "config", None))
        self.controlled = self.animates or hasattr(transformer, "vace_blocks")

    @property
    def experts(self) -> list[Any]:
        """The transformers, of high levels first."""
        return [self.transformer] if self.transformer_2 is None else [self.transformer, self.transformer_2]

    @property
    def learner(self) -> nn.Module:
        """Whose tensors a checkpoint's average names: the transformer, or this module where there are two."""
        return self.transformer if self.transformer_2 is None else self

    def velocity(
        self,
        x_BCFHW: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, "b *f"],
        text_BLD: Float[Tensor, "b l d"],
        to: float | None = None,
    ) -> Float[Tensor, "b c f h w"]:
        """Predict ``noise - x0`` at noise level ``sigma``, one per sample or one per sample and latent frame.

        ``to`` is the level at which the step ends, for a network with that input; ``None``: it ends where it begins, which is
        the velocity of a network without. Text is :class:`mogan.models.conditions.Conditioned` where clips are made under
        more than words. Of two experts each sees the samples of its levels (of a sample with several
        the highest counts).

        Of a network that reads no control, control frames are latents that are given: it sees them in the place of the first
        ones, at level 0, and theirs is the velocity that leads to them (diffusers: ``expand_timesteps``).
        """
        words, given, _ = parted(text_BLD)
        if given is not None and not self.controlled:
            count, level = given.shape[2], broadcast(sigma, x_BCFHW)
            levels = sigma.new_zeros(x_BCFHW.shape[0], x_BCFHW.shape[2])
            levels[:, count:] = sigma[:, None] if sigma.ndim == 1 else sigma[:, count:]
            seen = torch.cat([given, x_BCFHW[:, :, count:]], 2)
            toward = (x_BCFHW[:, :, :count] - given) / level[:, :, :count]
            return torch.cat([toward, self.velocity(seen, levels, words, to)[:, :, count:]], 2)
        if self.transformer_2 is None or self.boundary is None:
            return self._call(self.transformer, x_BCFHW, sigma, text_BLD, to)
        high_B = (sigma if sigma.ndim == 1 else sigma.amax(1)) >= self.boundary
        out = torch.zeros(x_BCFHW.shape, device=x_BCFHW.device)
        for expert, mine_B in ((self.transformer, high_B), (self.transformer_2, ~high_B)):
            rows = mine_B.nonzero()[:, 0]  # the host waits here, as long as it takes to draw a level
            if not self.anywhere(len(rows) > 0):
                continue
            called = rows if len(rows) else rows.new_zeros(1)  # nothing is kept of a call that others need
            found = self._call(expert, x_BCFHW[called], sigma[called], text_BLD[called], to)
            out = out.index_add(0, called, found if len(rows) else 0 * found)
        return out

    def _call(self, transformer: Any, x_BCFHW: Tensor, sigma: Tensor, text_BLD: Tensor, to: float | None) -> Tensor:
        if self.told:
            sigma = torch.cat([sigma, sigma if to is None else torch.full_like(sigma, to)])
        timestep = 1000.0 * sigma  # exact: no table look-up
        call: Any = partial(transformer, return_dict=False)
        if timestep.ndim == 2 and not self.told and takes_frames(transformer):
            call = partial(by_frame, transformer)
        elif timestep.ndim == 2:
            patch_f, patch_h, patch_w = transformer.config.patch_size
            tokens = (x_BCFHW.shape[-2] // patch_h) * (x_BCFHW.shape[-1] // patch_w)
            timestep = timestep[:, ::patch_f].repeat_interleave(tokens, dim=1)
        text, control, picture = parted(text_BLD)
        more = {} if control is None or self.animates else {"control_hidden_states": control}
        if control is not None and self.animates:
            latent, mask = control[:, : x_BCFHW.shape[1]], control[:, x_BCFHW.shape[1] :]
            x_BCFHW = torch.cat([x_BCFHW, mask, latent], 1)
        if picture is not None:  # what comes before 512 rows of text
            text, more = F.pad(text, (0, 0, 0, TEXT_LENGTH - text.shape[1])), {"encoder_hidden_states_image": picture}
        with torch.autocast(x_BCFHW.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = call(x_BCFHW, timestep, text, **more)[0]
        return out.float()

    def forward(self, x_BCFHW: Tensor, sigma: Tensor, text_BLD: Tensor, to: float | None = None) -> Tensor:
        """Predict the clean latent ``(B, C, F, H, W)``; arguments as of :meth:`velocity`."""
        return velocity_to_x0(x_BCFHW, self.velocity(x_BCFHW, sigma, text_BLD, to), sigma)


def guided_velocity(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, text_BLD: Tensor, null_BLD: Tensor, guidance: float
) -> Tensor:
    """Classifier-free guidance in the diffusers convention, ``uncond + guidance (cond - uncond)``.

    ``x``: ``(B, C, F, H, W)``; ``sigma``: ``(B,)``; returns the velocity, of the shape of ``x``.

    DMD code often writes ``cond + w (cond - uncond)``; that is ``guidance = w + 1``. Both halves run as one batch:
    ``null_BLD`` may hold one row for all, and the shorter text is padded (rows past the last token are padding anyway). Controls
    are the same on both sides.
    """
    if guidance == 1.0:
        return denoiser.velocity(x, sigma, text_BLD)
    words, control, picture = parted(text_BLD)
    length = max(words.shape[1], null_BLD.shape[1])
    text, null = (F.pad(t, (0, 0, 0, length - t.shape[1])) for t in (words, null_BLD.to(words)))
    both_texts = torch.cat([text, null.expand(len(text), -1, -1)])
    twice = [None if condition is None else torch.cat([condition, condition]) for condition in (control, picture)]
    both_texts = conditioned(both_texts, *twice)
    both = denoiser.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both_texts)
    cond, uncond = both.chunk(2)
    return uncond + guidance * (cond - uncond)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Within the block these modules' parameters receive no gradient, though gradients may pass through them."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def recomputed(module: nn.Module, *inputs: Any) -> Any:
    """Call a module and recompute it in the backward pass as it was called: with its weights frozen if they were.

    A loss that borrows a network computes with it inside :func:`frozen`; the backward pass comes after that.
    """
    learns = any(p.requires_grad for p in module.parameters())
    return checkpoint(
        module,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), nullcontext() if learns else frozen(module)),
    )


VARIANTS = 64  # graphs per block and class: with and without gradient, frozen or not, sizes of batch


def compile_blocks(transformers: Iterable[Any], device: torch.device) -> None:
    """Compile every block of Wan transformers in place; call it last, after adapters, checkpointing and sharding.

    Only a block's ``forward`` is compiled. Names of tensors stay, and what hangs on the block stays outside and eager:
    taps, FSDP2's gathering and freeing, recomputation. Blocks of one network share their graphs.

    Raises:
        UserError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # whatever a compiler may say
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--compile: torch.compile does not work here ({why}): install a C++ compiler "
            "(g++) and Python's headers, or leave --compile out"
        ) from error
    # by default the graph used last is tried first, and a recomputed block could meet another one than its forward pass
    # did, which the checkpoint refuses; torch's own message names this remedy
    torch._C._dynamo.eval_frame._set_lru_cache(False)
    limits: Any = torch._dynamo.config  # torch.compile takes the limit as an argument only in later versions than 2.11
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    for transformer in transformers:
        for block in transformer.blocks:
            block.forward = torch.compile(block.forward)


@contextmanager
def taps(blocks: nn.ModuleList, at: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collect the outputs ``(B, L, D)`` of ``blocks[i]`` for ``i`` in ``at`` (ascending), of calls inside the ``with`` block."""
    features: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, out: Tensor) -> None:
        features.append(whole(out, frames_of(blocks)))

    handles = [blocks[i].register_forward_hook(keep) for i in at]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()

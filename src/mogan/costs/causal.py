"""What a causal student's rollouts and teacher-forced passes cost, traced as :mod:`mogan.costs.calls` traces the others, batch 1."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mogan.costs.calls import TEXT_TOKENS, Tracer, build_transformer
from mogan.costs.shapes import Shapes
from mogan.costs.trace import Call, Work, fake, trace
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal


def chunks(tracer: Tracer, causal: Causal) -> tuple[Call, Call, Call]:
    """Over all chunks of a clip: one step more; the judged step and the passes that keep what was made, without gradient; the
    same with. Of chunks of several sizes each is as likely.
    """
    rest = (tracer.checkpointing, tracer.dtype)
    found = [tracer.once(("chunks", one), partial(chunk_calls, tracer.shapes, one, *rest)) for one in causal.variants]
    more, made, trained = (one_of(calls) for calls in zip(*found, strict=True))
    return more, made, trained


def roll_out_calls(
    tracer: Tracer, causal: Causal, before: float, *, learns: bool, whole: bool = False
) -> tuple[tuple[Call, Call], float]:
    """A rollout: its steps ``before`` the judged one, a mean, then that one and the passes that keep what was made; passes over
    weights. A first chunk with levels of its own takes half of its other steps before, or all for a ``whole`` clip.
    """
    more, made, trained = chunks(tracer, causal)
    pieces = sum(len(one.chunks(tracer.shapes.latent[1])) for one in causal.variants) / len(causal.variants)
    if causal.first_sigmas is not None:
        before += ((len(causal.first_sigmas) - 1) / (1 if whole else 2) - before) / pieces
    calls = replace(more, work=more.work * before, held=0.0), trained if learns else made
    return calls, pieces * (before + 1 + learns) + pieces - 1


def forced(tracer: Tracer, causal: Causal) -> tuple[Call, Call]:
    """A clip all of whose chunks see the clean ones before them, in one pass; without gradient and with."""
    return _in_one_pass(tracer, causal, clean=True)


def diffusion_forced(tracer: Tracer, causal: Causal) -> tuple[Call, Call]:
    """A clip all of whose chunks see earlier ones as noisy as those are, in one pass; without gradient and with."""
    return _in_one_pass(tracer, causal, clean=False)


def _in_one_pass(tracer: Tracer, causal: Causal, *, clean: bool) -> tuple[Call, Call]:
    rest = (clean, tracer.checkpointing, tracer.dtype)
    found = [
        tracer.once(("forced", one, clean), partial(forced_calls, tracer.shapes, one, *rest)) for one in causal.variants
    ]
    forward, train = (one_of(calls) for calls in zip(*found, strict=True))
    return forward, train


def one_of(calls: Sequence[Call]) -> Call:
    """One of them, each as likely: the mean of what they compute, the most memory that any takes."""
    work = sum((call.work for call in calls), Work()) * (1 / len(calls))
    most = {name: max(getattr(call, name) for call in calls) for name in ("held", "peak", "copies", "host")}
    return calls[0] if len(calls) == 1 else Call(work, **most)


def chunk_calls(shapes: Shapes, causal: Causal, checkpointing: bool, dtype: torch.dtype) -> tuple[Call, Call, Call]:
    """Of :func:`chunks`, at full depth: whole rollouts of one step and of two, by networks of one layer and of two."""
    found = []
    with fake():
        sigma, text = torch.full((1,), 0.5), torch.empty(1, TEXT_TOKENS, shapes.transformer["text_dim"])
        parts = torch.empty(1, *shapes.latent).split(causal.chunks(shapes.latent[1]), 2)
        for layers in (1, 2):
            network = build_transformer(shapes, layers).train()
            if checkpointing:
                network.enable_gradient_checkpointing()
            roll_out = partial(_roll_out, CausalDenoiser(network, dtype, causal), parts, sigma, text)
            kinds = ((1, False), (2, False), (1, True))
            found.append([trace(network.parameters(), partial(roll_out, n, g), backward=g) for n, g in kinds])
    layers = shapes.transformer["num_layers"]
    made, twice, learns = (one.along(two, layers - 1) for one, two in zip(*found, strict=True))
    return replace(made, work=twice.work - made.work, held=0.0), made.freed(), learns


def _roll_out(student: CausalDenoiser, parts: Iterable[Tensor], sigma: Tensor, text: Tensor, steps: int, grad: bool):
    """A rollout in so many steps, but for what it draws."""
    cache, made, clip = student.begin(text, student.how.policy), [], list(parts)
    for number, x in enumerate(clip):
        for step in range(steps):
            with torch.set_grad_enabled(grad and step == steps - 1):
                x0 = student.chunk(x, sigma, text, cache)
        made.append(x0)
        if number < len(clip) - 1:
            cache = student.remember(x0.detach(), text, cache)
    return torch.cat(made, 2)


def forced_calls(
    shapes: Shapes, causal: Causal, clean: bool, checkpointing: bool, dtype: torch.dtype
) -> tuple[Call, Call]:
    """Of :func:`forced`, or :func:`diffusion_forced` if not ``clean``, at full depth."""
    frames, found = shapes.latent[1], []
    with fake():
        x, sigma = torch.empty(1, *shapes.latent), torch.full((1, frames), 0.5)
        text = torch.empty(1, TEXT_TOKENS, shapes.transformer["text_dim"])
        for layers in (1, 2):
            network = build_transformer(shapes, layers).train()
            if checkpointing:
                network.enable_gradient_checkpointing()
            student = CausalDenoiser(network, dtype, causal)
            how = (x, sigma, text, causal.chunks(frames), causal.policy)
            call = partial(student.teacher_forced, x, *how) if clean else partial(student.masked, *how)
            found.append([trace(network.parameters(), call, backward=backward) for backward in (False, True)])
    more = shapes.transformer["num_layers"] - 1
    forward, train = (one.along(two, more) for one, two in zip(*found, strict=True))
    return forward, train

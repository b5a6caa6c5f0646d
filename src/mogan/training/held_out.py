"""When the gain ends: motion on prompts that no update sees, and the checkpoint at which there was most of it.

Longer is not better: a discriminator that has won teaches nothing more, and distribution matching pulls the student back to
its stiller teacher. The losses do not show it; the student's clips do.
"""

import math
from pathlib import Path

import torch

from mogan.data.cache import open_cache
from mogan.data.prompts import fingerprint
from mogan.errors import UserError
from mogan.models.attention import stack_text
from mogan.models.autoencoder import stream_video
from mogan.motion.flow import flow_of_pieces
from mogan.motion.pixel_flux import net_motion
from mogan.runs.checkpoint import held_out_motions, held_out_prompts, write_held_out_motions
from mogan.sampling.samplers import HELD_OUT, HELD_OUT_AT_ONCE, clips_at_once, sample_student
from mogan.training.assemble import Assembly


class Gain:
    """Measures the averaged student on held-out prompts, always with the same noise; knows when motion no longer rises.

    Args:
        run: folder of the run; what was measured is kept there in ``held_out.json``.
        cache: cache whose prompts are used, those that are also trained on left out.
        parts: the run.
        patience: checks without a new highest motion after which training stops.

    Raises:
        UserError: the cache has no prompt of its own, texts of another encoder, or other prompts than those on which the run was
            measured before; or the run has no flow network.
    """

    def __init__(self, run: Path, cache: Path, parts: Assembly, patience: int):
        if patience < 1:
            raise UserError(f"--patience takes a number of checks, at least 1, not {patience}")
        if parts.flow is None or parts.config.given or parts.student.controlled:
            raise UserError(
                f"--held-out is for recipes with a flow network and a student that makes clips from text alone, which "
                f"{parts.config.recipe} is not: leave it out"
            )
        self.run, self.patience, self.cache = run, patience, open_cache(cache)
        self.cache.require(**{k: parts.cache.facts[k] for k in ("text_encoder", "tokenizer") if k in parts.cache.facts})
        trained = {entry["caption"] for entry in parts.texts.entries}
        captions = dict.fromkeys(entry["caption"] for entry in self.cache.entries)
        self.prompts = [caption for caption in captions if caption and caption not in trained][:HELD_OUT]
        if not self.prompts:
            raise UserError(f"{cache} has no prompt that {parts.texts.path} lacks: hold some back from training")
        self.of = {"cache": str(cache), "fingerprint": fingerprint(self.prompts)}
        before = held_out_prompts(run)
        if before.get("fingerprint", self.of["fingerprint"]) != self.of["fingerprint"]:  # motions would not compare
            raise UserError(
                f"{run} was measured on other held-out prompts (those of {before.get('cache')} then, of {cache} now): give the "
                f"same as --held-out, or remove {run / 'held_out.json'} to measure anew"
            )

    def measure(self, parts: Assembly) -> float:
        """Mean of :func:`net_motion` over the held-out prompts, px/frame; all processes call it."""
        count, world = len(self.prompts), parts.world
        # each share as many as the others, since a forward pass takes all processes; what is then made twice counts once
        places = range(world.share, math.ceil(count / world.shares) * world.shares, world.shares)
        numbers = [place % count for place in places]
        found, together = [], clips_at_once(parts.geometry, HELD_OUT_AT_ONCE)
        with torch.no_grad(), parts.average.in_place():
            for first in range(0, len(numbers), together):
                part = numbers[first : first + together]
                text = stack_text([self.cache.text(self.prompts[number]) for number in part], parts.device)
                latents = sample_student(
                    parts.student, text, parts.latent_shape, parts.config.sigmas, part, parts.config.solver
                )
                assert parts.flow is not None
                for latent in latents.split(1):
                    found.append(net_motion(flow_of_pieces(stream_video(parts.vae, latent), parts.flow)))
        counts = torch.tensor([place < count for place in places], device=parts.device)
        total, judged = world.mean([(torch.cat(found) * counts).sum(), counts.sum()])
        return total / judged

    def check(self, parts: Assembly, iteration: int) -> float:
        """Measure after so many iterations, and note it. Raises UserError if the student has diverged."""
        motion = self.measure(parts)
        if not math.isfinite(motion):  # on all processes alike
            raise UserError(
                f"the motion of clips of held-out prompts is {motion} after iteration {iteration}: the student has diverged, try a "
                "lower learning rate in another --out"
            )
        if parts.world.main:
            write_held_out_motions(self.run, held_out_motions(self.run) | {iteration: motion}, self.of)
        return motion

    def forget_after(self, iteration: int) -> None:
        """What was measured of iterations that will be done again. Nothing is written of a run that has measured nothing."""
        measured = held_out_motions(self.run)
        kept = {k: v for k, v in measured.items() if k <= iteration}
        if kept != measured:
            write_held_out_motions(self.run, kept, self.of)

    @property
    def over(self) -> bool:
        """Whether the last ``patience`` checks brought no new highest motion."""
        motions = list(held_out_motions(self.run).values())
        return bool(motions) and len(motions) - 1 - motions.index(max(motions)) >= self.patience

    def said(self) -> str:
        """Where motion was highest, for the user."""
        motions = held_out_motions(self.run)
        peak = max(motions, key=lambda k: motions[k])
        last = max(motions)
        now = f", after {last} {motions[last]:.3f}" if last != peak else ""
        return (
            f"motion on {len(self.prompts)} held-out prompts was highest after iteration {peak}: {motions[peak]:.3f} "
            f"px/frame{now}; `mogan export` and `mogan sample` take that checkpoint"
        )

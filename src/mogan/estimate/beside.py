"""What a run does besides its updates, and sampling afterwards: memory and time of each on one GPU."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mogan.config import Config
from mogan.costs.calls import Tracer
from mogan.costs.causal import roll_out_calls
from mogan.costs.machines import Machine
from mogan.costs.trace import Call, Work
from mogan.data.observations import drawn
from mogan.models.defaults import Defaults
from mogan.objectives import Price
from mogan.sampling.samplers import HELD_OUT, HELD_OUT_AT_ONCE, clips_at_once

FP32, BF16 = 4, 2  # bytes


@dataclass(frozen=True)
class Beside:
    """One thing that a run does besides its updates.

    Attributes:
        name: what.
        times: in the whole run, on the GPU that has most of it; 0 for what the run itself does not do.
        peak: most bytes, with everything that stays.
        seconds: of one time.
        asked: only where an option asks for it; not part of the run's hours.
    """

    name: str
    times: float
    peak: float
    seconds: float
    asked: bool = False

    @property
    def hours(self) -> float:
        """Of a run that nobody asked for more."""
        return 0.0 if self.asked else self.times * self.seconds / 3600


def beside(
    config: Config,
    tracer: Tracer,
    prices: Sequence[Price],
    machine: Machine,
    gpus: int,
    clips: int,
    stays: float,
    more: float,
) -> tuple[Beside, ...]:
    """What a run observes, shows and checks. It keeps ``stays`` bytes between updates, and ``more`` while averaged weights are
    sampled: the live ones beside them, and what is gathered for a forward pass. The rest is as in
    :func:`mogan.estimate.predict.predict`.
    """
    shapes, (few, forward) = tracer.shapes, _few_steps(config, tracer)
    observe = next((p.observe for p in prices if p.observe), None)
    check = next((p.check for p in prices if p.check), None)
    found = []
    if observe is not None:
        share = math.ceil(len(drawn(config, clips)) / gpus) if clips else 0
        found.append(Beside("observe a real clip", share, stays + observe.peak, observe.work.seconds(machine)))
    for name, (count, call) in ((n, once) for p in prices for n, once in p.once.items()):
        found.append(Beside(name, math.ceil(count / gpus), stays + call.peak, call.work.seconds(machine)))
    if config.sample_prompts:
        shown = check if check is not None and any(p.pictured for p in prices) else tracer.stream
        together = min(clips_at_once(shapes.size), config.sample_prompts)
        peak = stays + more + max(together * forward.peak, shown.peak)
        times = math.ceil(config.iterations / config.sample_every)
        seconds = ((few + shown.work) * config.sample_prompts).seconds(machine)
        found.append(Beside(f"sheet of {config.sample_prompts} samples", times, peak, seconds))
    if check is not None and not config.given:
        share = math.ceil(HELD_OUT / gpus)
        together = min(clips_at_once(shapes.size, HELD_OUT_AT_ONCE), share)
        peak = stays + more + max(together * forward.peak, check.peak)
        times = math.ceil(config.iterations / config.save_every)
        seconds = ((few + check.work) * share).seconds(machine)
        found.append(Beside(f"--held-out, {HELD_OUT} clips", times, peak, seconds, asked=True))
    return tuple(found)


def _few_steps(config: Config, tracer: Tracer) -> tuple[Work, Call]:
    """What the student's steps compute per clip, and a call whose peak is theirs."""
    if config.causal is None:
        return tracer.student[0].work * len(config.sigmas), tracer.student[0]
    (steps, made), _ = roll_out_calls(tracer, config.causal, len(config.sigmas) - 1, learns=False, whole=True)
    return steps.work + made.work, made


def sampling(config: Config, tracer: Tracer, machine: Machine) -> tuple[Beside, ...]:
    """``mogan sample`` on one GPU, per clip: the student's steps and, where a model is guided, the teacher's."""
    parameters, forward = tracer.parameters, tracer.student[0]
    experts = 1 if config.boundary is None and tracer.shapes.boundary is None else 2
    weights = FP32 * experts * parameters["transformer"] + forward.copies + BF16 * parameters["vae"]
    text = text_encoder_bytes(tracer)  # has gone when the others come
    together = clips_at_once(tracer.shapes.size)

    def row(name: str, calls: int, work: Work, held: float) -> Beside:
        peak = weights + max(calls * together * held, tracer.stream.peak)
        seconds = (work + tracer.stream.work).seconds(machine)
        return Beside(name, 0, max(text, peak), seconds, asked=True)

    steps, (few, call) = len(config.sigmas), _few_steps(config, tracer)
    found = [row(f"mogan sample, {steps} steps", 1, few, call.peak)] if steps > 1 else []
    usual = Defaults().steps
    return (*found, row(f"mogan sample, {usual} guided steps", 2, forward.work * (2 * usual), forward.peak))


def text_encoder_bytes(tracer: Tracer) -> float:
    """What :func:`mogan.models.wan.load_text` holds: Wan's large encoder in bf16."""
    return (BF16 if tracer.shapes.text_encoder["d_model"] >= 4096 else FP32) * tracer.parameters["text_encoder"]

"""What MoGAN's discriminator sees, put together for a run: of the student's clips, of real ones, and what it costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mogan.config import Config
from mogan.costs.calls import Tracer, observe_calls, one_after_the_other
from mogan.costs.trace import Call
from mogan.data.observations import Observations
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.host import in_pieces
from mogan.motion import estimators
from mogan.motion.observation import MotionObservation
from mogan.objectives import Kept
from mogan.objectives.base import Base

if TYPE_CHECKING:
    from mogan.objectives.gan import GANConfig


def observation_of(gan: "GANConfig", base: Base) -> MotionObservation:
    """The chain from latents to the discriminator's input; the picture is encoded in fp32."""
    encoder = None
    if base.vae.dtype != torch.float32:
        encoder = wan.load_vae(base.folder, torch.float32)
        encoder.decoder = None
        encoder.to(base.device)
        encoder = in_pieces(encoder) if base.config.offload else encoder
    flow = base.flow(gan.flow, gan.flow_iterations)
    assert gan.max_flow is not None
    checkpointing = base.config.checkpointing
    return MotionObservation(base.vae, flow, gan.window, gan.max_flow, checkpointing, gan.flow_resolution, encoder)


def of_real_clips(gan: "GANConfig", base: Base, observe: MotionObservation) -> Observations:
    """Observations of real clips, which go through the same chain as generated ones, codec included: the discriminator
    must not tell them apart by the codec's traces.
    """
    key = {
        "vae": wan.fingerprint(base.folder, "vae"),
        "dtype": str(base.dtype).removeprefix("torch."),
        "flow": estimators.flow_fingerprint(gan.flow),
        "flow_iterations": gan.flow_iterations,
        "window": gan.window,
        "max_flow": gan.max_flow,
        "encoded": "fp32",
    } | ({} if gan.flow_resolution is None else {"flow_resolution": gan.flow_resolution})
    cache, device = base.cache, base.device  # `base` itself would stay, and with it whatever it has loaded
    return Observations(cache, key, lambda latent, start: observe(latent.float().to(device), start).latent_BCFHW)


@dataclass(frozen=True)
class View:
    """Traced: one observation without gradient and with, in stages; a clip checked; what has to be kept for it."""

    observe: Call
    with_gradient: Call
    stages: Mapping[str, Call]
    check: Call
    kept: tuple[Kept, ...]


def price_observation(gan: "GANConfig", config: Config, tracer: Tracer) -> View:
    """What observing costs, where the window starts at its mean start. Raises UserError if that is longer than a clip."""
    if gan.window > tracer.shapes.latent[1]:
        raise UserError(
            f"the recipe's window of {gan.window} is longer than the clip's {tracer.shapes.latent[1]} latent frames"
        )
    flow, parameters = tracer.flow(gan.flow, gan.flow_iterations)
    start = round(sum(gan.starts) / len(gan.starts))

    def traced(grad: bool) -> dict[str, Call]:
        key = ("observe", gan.window, start, gan.flow, gan.flow_iterations, gan.flow_resolution, grad)
        return tracer.once(
            key, lambda: observe_calls(tracer, flow, gan.window, start, grad=grad, part=gan.flow_resolution)
        )

    stages = traced(True)
    kept = [Kept("flow network", parameters, learns=False, sharded=False)] if parameters else []
    if tracer.dtype != torch.float32:
        encoder = tracer.encoder_parameters()
        kept.insert(0, Kept("fp32 encoder", encoder, learns=False, sharded=False))
    return View(
        one_after_the_other(traced(False).values()),
        one_after_the_other(stages.values()),
        stages,
        tracer.check(gan.flow, gan.flow_iterations),
        tuple(kept),
    )

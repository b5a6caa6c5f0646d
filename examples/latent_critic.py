from dataclasses import dataclass, replace

import torch
from torch import nn

from mogan.config import Optimizer, Update
from mogan.costs.trace import fake, sizes, trace
from mogan.models.denoiser import frozen
from mogan.models.discriminator import discriminator_loss, generator_loss
from mogan.objectives import Bill, Kept, Objective, Price
from mogan.recipes import dmd_lab
from mogan.sampling.rollout import Euler
from mogan.sharding import shard
from mogan.terms import Alarm, Lesson, Terms

WINS = Alarm(
    "critic_gap",
    lambda first, now: now > 8.0,
    "the critic wins outright: its logits are {now:.1f} apart; lower its learning rate",
)


class Critic(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        wide = nn.Conv3d(channels, width, 3, padding=1)
        self.layers = nn.Sequential(wide, nn.SiLU(), nn.Conv3d(width, 1, 3, padding=1))

    def forward(self, latent_BCFHW):
        return self.layers(latent_BCFHW.diff(dim=2)).mean((1, 2, 3, 4))


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    width: int = 32
    weight: float = 0.1

    def terms(self, config):
        lessons = {"student": Lesson(), "critic": Lesson(clips=("latent",))}
        return Terms(lessons=lessons, alarms=(WINS,))

    def build(self, base, others):
        torch.manual_seed(base.config.seed)
        critic = Critic(base.latent_shape[0], self.width)
        critic = shard(critic, nn.ModuleList([critic.layers]), base.world, torch.float32).to(base.device)

        def student_loss(rollout, batch, generator):
            with frozen(critic):
                return self.weight * generator_loss(critic(rollout.sample_BCFHW)), {}

        def critic_loss(rollout, batch, generator):
            made = rollout.sample_BCFHW
            real, fake = critic(torch.cat([batch.latent_BCFHW.to(made), made])).chunk(2)
            return discriminator_loss(real, fake), {"critic_gap": (real - fake).detach().mean()}

        return Objective(critic, {"student": student_loss, "critic": critic_loss}, {"critic": critic})

    def price(self, config, tracer):
        with fake():
            critic, clip = Critic(tracer.shapes.latent[0], self.width), torch.empty(1, *tracer.shapes.latent)
            looks = trace(critic.parameters(), lambda: critic(clip), backward=True)
        bills = {"student": Bill((looks,)), "critic": Bill((looks.times(2).freed(),))}
        return Price(bills, (Kept("critic", sizes(critic)[0]),))


def critic_lab():
    dmd = dmd_lab()
    plan = (
        Update(learns="student", by="dmd+critic", batch=16),
        Update(learns="fake_score", by="dmd", times=4, batch=16),
        Update(learns="critic", by="critic", batch=16),
    )
    optimizers = dmd.optimizers | {"critic": Optimizer(lr=2e-4)}
    objectives = dmd.objectives | {"critic": CriticConfig()}
    return replace(
        dmd, recipe="critic_lab", plan=plan, optimizers=optimizers, objectives=objectives, rollout=Euler(stop=3)
    )

"""What SHIFT's rewards do where everything is known: clips of one pixel whose motion is one number.

Real clips are half slow, half fast, from a first frame that is given. The student has collapsed: 95 of 100 of its clips are slow.
It goes on with fine-tuning on real clips, with SHIFT, or with SHIFT whose rewards are frozen after their warm-up; each
update of the student is the package's own ``Shift.student_loss`` (fine-tuning is the same with weights 0 and 1), the
rewards are its ``MotionRewards``. What is measured needs no network: the share of fast clips and the distance of speeds.

    python benchmarks/shift_speeds.py --out docs/images/shift_speeds.png   # three minutes on one core
"""

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mogan.data.batches import Batch
from mogan.disk.files import replacing
from mogan.models.denoiser import Denoiser
from mogan.motion.pixel_flux import Flux, state_size
from mogan.objectives.flow_matching import velocity_error
from mogan.objectives.rewards import MotionRewards
from mogan.objectives.shift import Shift
from mogan.recipes import shift_lab
from mogan.sampling.rollout import animate
from mogan.schedule import draw_sigma, shifted_levels

FRAMES, BATCH, SHARE = 5, 128, 0.5  # share of real clips that are fast
SLOW, FAST, MIDDLE = (0.2, 0.05), (1.0, 0.1), 0.55  # mean and deviation of speeds; what lies above the middle is fast
TEXT = torch.zeros(1, 1, 1)
WARM, TIMES = 200, 4  # updates of the rewards before; updates of student and rewards on the same clips
METHODS = {  # fine-tuning: generated clips weigh nothing, real ones 1
    "fine-tuning": {"weight": "linear", "refresh": False, "fixed": True},
    **{
        f"SHIFT, {weight}{said}": {"weight": weight, "refresh": refresh, "fixed": False}
        for weight in ("linear", "exp")
        for refresh, said in ((True, ""), (False, ", frozen"))
    },
}
COLOURS = ("#5C5C5C", "#0072B2", "#D55E00", "#56B4E9", "#E69F00")


def clips(count: int, fast: float, generator: torch.Generator) -> Tensor:
    """``(B, 1, F, 1, 1)``: from a normal start, at a constant speed."""
    start, which, spread = torch.randn(3, count, generator=generator)
    is_fast = which < torch.distributions.Normal(0, 1).icdf(torch.tensor(fast))
    speed = torch.where(is_fast, FAST[0] + FAST[1] * spread, SLOW[0] + SLOW[1] * spread)
    return (start[:, None] + speed[:, None] * torch.arange(FRAMES))[:, None, :, None, None]


def speeds(clips_BCFHW: Tensor) -> Tensor:
    """Frame per frame, the mean over a clip."""
    return (clips_BCFHW[:, 0, -1] - clips_BCFHW[:, 0, 0])[:, 0, 0] / (FRAMES - 1)


class Line(nn.Module):
    """A transformer's stand-in for such clips."""

    config = SimpleNamespace(patch_size=(1, 1, 1))

    def __init__(self, width: int = 128):
        super().__init__()
        sizes = [FRAMES + 9, width, width, width, FRAMES]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """As a Wan transformer is called, a level per frame; those not given share theirs."""
        level = timestep[:, -1:] / 1000
        waves = level * torch.pi * 2.0 ** torch.arange(4)
        known = torch.cat([x[:, 0, :, 0, 0], level, waves.sin(), waves.cos()], 1)
        return (self.net(known)[:, None, :, None, None],)


def see(clips_BCFHW: Tensor, queries_BN2: Tensor = TEXT) -> Flux:
    """What the rewards are shown: differences of frames, as maps and as the drift of one point."""
    drift = clips_BCFHW.diff(dim=2)
    states = F.pad(drift.flatten(1), (0, state_size(FRAMES) - drift.shape[2]))[:, None]
    return Flux(F.pad(drift, (0, 0, 0, 0, 0, 0, 0, 3)), states, F.pad(drift, (0, 0, 0, 0, 0, 0, 0, 1)))


def batch_of(real: Tensor) -> Batch:
    """Of clips without prompts."""
    texts = [torch.zeros(1, 1)] * len(real)
    return Batch([str(i) for i in range(len(real))], [""] * len(real), texts, latent_BCFHW=real)


def optimise(optimizer: torch.optim.Optimizer, loss: Tensor, network: nn.Module) -> None:
    """One step, gradients clipped as in training."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


def collapsed(seed: int, updates: int = 3000) -> Denoiser:
    """A student of clips that are nearly all slow."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student = Denoiser(Line())
    optimizer = torch.optim.AdamW(student.parameters(), 2e-3)
    for i in range(updates):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - i / updates)
        x0 = clips(4 * BATCH, 0.05, generator)
        sigma, noise = draw_sigma(len(x0), generator, k=3.0), torch.randn(x0.shape, generator=generator)
        optimise(optimizer, velocity_error(student, x0, noise, sigma, TEXT, given=1).mean(), student)
    return student


def measure(student: Denoiser, sigmas: tuple[float, ...], rewards: MotionRewards) -> dict[str, float]:
    """On 2000 clips of its own: the share that is fast, Wasserstein-1 distance of their speeds to real ones, and how much
    more reward they get than real ones.
    """
    generator = torch.Generator().manual_seed(1)
    real = clips(2000, SHARE, generator)
    made = animate(student, torch.randn(real.shape, generator=generator), real[:, :, :1], TEXT, TEXT, sigmas, 1.0)
    with torch.no_grad():
        reward, best = (float(rewards.reward(f.maps_BCFHW, f.states_BND).mean()) for f in (see(made), see(real)))
    gap = (speeds(made).sort().values - speeds(real).sort().values).abs().mean()
    return {
        "fast": float((speeds(made) > MIDDLE).float().mean()),
        "distance": float(gap),
        "reward above real clips'": reward - best,
    }


def run(method: str, start: Denoiser, updates: int, seed: int) -> list[dict[str, float]]:
    """Train a copy of ``start``: what is measured of it, then after every fifth iteration of ``TIMES`` updates."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student, sigmas, options = Denoiser(Line()), shifted_levels(10, 3.0), METHODS[method]
    student.load_state_dict(start.state_dict())
    rewards = MotionRewards((FRAMES, 1, 1), patch=(FRAMES - 1, 1, 1), width=32, depth=1, heads=2, clip=(-4.0, 4.0))
    lab = shift_lab().objectives["shift"]
    settings = replace(lab, guidance=1.0, points=1, level_shift=3.0, beta=1.0, weight=options["weight"])
    shift = Shift(student, rewards, see, TEXT, settings, sigmas=sigmas, given=1)
    learner = torch.optim.AdamW(student.parameters(), 3e-4)
    judge = torch.optim.AdamW(rewards.parameters(), 1e-3, weight_decay=0.01)

    def pairs() -> Batch:
        return shift.sample(batch_of(clips(BATCH, SHARE, generator)), generator, BATCH)

    for _ in range(WARM):
        optimise(judge, shift.judge_loss(None, pairs(), generator)[0], rewards)
    found = [measure(student, sigmas, rewards)]
    for iteration in range(updates // TIMES):
        batch = pairs()
        if options["fixed"]:
            pair = replace(batch.more["pairs"], advantage_B2=torch.tensor([[0.0, 1.0]] * BATCH))
            batch = replace(batch, more={"pairs": pair})
        for _ in range(TIMES):
            optimise(learner, shift.student_loss(None, batch, generator)[0], student)
            if options["refresh"]:
                optimise(judge, shift.judge_loss(None, batch, generator)[0], rewards)
        if (iteration + 1) % 5 == 0:
            found.append(measure(student, sigmas, rewards))
    return found


def main() -> None:
    """Print the table, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=400, help="of the student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="figure to write")
    a = parser.parse_args()
    curves: dict[str, list] = {method: [] for method in METHODS}
    for seed in tqdm(range(a.seeds), unit="seed"):
        start = collapsed(seed)
        for method in METHODS:
            curves[method].append(run(method, start, a.updates, seed))
    shown = [i for i in (0, 1, 2, 4, 10, 20) if i * 5 * TIMES <= a.updates]
    for name in ("fast", "distance", "reward above real clips'"):
        print(f"\n| {name}, after updates | " + " | ".join(str(i * 5 * TIMES) for i in shown) + " |")
        print("|---" * (len(shown) + 1) + "|")
        for method, runs in curves.items():
            cells = [[one[i][name] for one in runs] for i in shown]
            print(f"| {method} | " + " | ".join(f"{min(c):.3g} to {max(c):.3g}" for c in cells) + " |")
    if a.out:
        draw(curves, a.out)


def draw(curves: dict[str, list], out: Path) -> None:
    """A panel per measure, a line per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.1), layout="constrained")
    labels = {
        "fast": "share of fast clips",
        "distance": "distance of speeds to real ones",
        "reward above real clips'": "reward above that of real clips",
    }
    for axis, (name, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for (method, runs), colour in zip(curves.items(), COLOURS, strict=True):
            for seed, one in enumerate(runs):
                steps = [i * 5 * TIMES for i in range(len(one))]
                label_once = method if seed == 0 else None
                axis.plot(steps, [m[name] for m in one], color=colour, lw=1, label=label_once)
        axis.set(title=label, xlabel="updates of the student")
        axis.grid(alpha=0.3)
        if name == "distance":
            axis.set(yscale="log")
    figure.axes[0].axhline(SHARE, color="black", lw=0.8, ls=":")
    figure.axes[2].axhline(0, color="black", lw=0.8, ls=":")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    with replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:], dpi=150)


if __name__ == "__main__":
    main()

"""How fast each temporal frequency is learnt with and without motion score matching, where everything is known.

A linear generator ``x = W z`` of one-pixel clips learns a Gaussian whose deviation falls with the temporal frequency, as
real motion does. Teacher and fake score are exact. Two measurements:

- gradient flow of the expected DMD gradient, fake score exact: the docs' algebra, factor ``1 + lambda (2 - 2 cos w)``;
- the package's own ``DMD`` objective on random batches (its per-sample normalisation included), with SGD and with Adam.

    python benchmarks/msm_convergence.py --out docs/images/msm_convergence.png   # about a minute on one core
"""

import argparse
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from mogan.data.batches import Batch
from mogan.models.denoiser import Denoiser
from mogan.objectives.dmd import DMD, DMDConfig, dmd_direction
from mogan.objectives.msm import motion_direction
from mogan.sampling.motion_score import differences, differences_adjoint
from mogan.sampling.rollout import Rollout

LEVELS = torch.linspace(0.02, 0.98, 25).tolist()


def cosines(frames: int) -> Tensor:
    """The temporal frequencies of a clip, ``w = pi k / frames``: rows of the orthonormal DCT-II."""
    k, f = torch.arange(frames).double()[:, None], torch.arange(frames).double()
    basis = torch.cos(math.pi * k * (f + 0.5) / frames)
    return basis / basis.norm(dim=1, keepdim=True)


def denoise(covariance: Tensor, s: float) -> Tensor:
    """Matrix of the exact denoiser of a Gaussian: ``x0 = (1 - s) C ((1 - s)^2 C + s^2 I)^-1 x_t``."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    return (1 - s) * covariance @ torch.linalg.inv((1 - s) ** 2 * covariance + s**2 * eye)


def flow_gradient(w: Tensor, target: Tensor, weight: float) -> Tensor:
    """Expected, unnormalised DMD gradient with respect to ``W``, mean over the levels, times ``I + weight D^T D``."""
    mean = sum((1 - s) * (denoise(w @ w.T, s) - denoise(target, s)) for s in LEVELS) / len(LEVELS)
    columns = (mean @ w).T[:, None, :, None, None]
    return (columns + weight * differences_adjoint(differences(columns)))[:, 0, :, 0, 0].T


class Exact(nn.Module):
    """A transformer's stand-in: the exact velocity of Gaussian clips ``(B, 1, F, 1, 1)`` of a covariance."""

    config = SimpleNamespace(patch_size=(1, 1, 1))

    def __init__(self, covariance: Tensor):
        super().__init__()
        self.values, self.basis = torch.linalg.eigh(covariance)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """As a Wan transformer is called."""
        s = (timestep / 1000).view(-1, 1)
        rows = x[:, 0, :, 0, 0]
        shrink = (1 - s) * self.values / ((1 - s) ** 2 * self.values + s**2)
        x0 = ((rows @ self.basis) * shrink) @ self.basis.T
        return (((rows - x0) / s)[:, None, :, None, None],)


def batch_gradient(w: Tensor, target: Tensor, weight: float, generator: torch.Generator) -> Tensor:
    """Gradient of the package's DMD objective with respect to ``W`` on 256 random clips, unguided."""
    objective = DMD(
        Denoiser(Exact(target)),
        Denoiser(Exact(w @ w.T)),
        torch.zeros(1, 1, 1),
        DMDConfig(guidance=1.0, shift=1.0),
        direction=motion_direction(weight) if weight else dmd_direction,
    )
    w = w.clone().requires_grad_()
    x0 = (torch.randn(256, len(w), generator=generator) @ w.T)[:, None, :, None, None]
    loss, _ = objective.student_loss(Rollout(x0, 0, torch.zeros(256, 1, 1)), Batch([], [], []), generator)
    return torch.autograd.grad(loss, w)[0]


def half_times(gradient, w: Tensor, target_f: Tensor, step, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps until each frequency's deviation is half way to the target; the curves; the final deviations over target."""
    basis = cosines(len(w)).to(w)
    start = (basis @ w @ w.T @ basis.T).diagonal().sqrt()
    times, curves = torch.full((len(w),), math.nan), []
    for i in range(limit):
        w = step(w, gradient(w))
        now = (basis @ w @ w.T @ basis.T).diagonal().sqrt()
        share = (now - start) / (target_f - start)
        curves.append(share)
        times = torch.where((share >= 0.5) & times.isnan(), float(i + 1), times)
    return times, torch.stack(curves), now / target_f


def adam(lr: float):
    """Adam as the recipes use it (betas 0, 0.999) as a step on one tensor."""
    square, count = 0.0, 0

    def step(w: Tensor, g: Tensor) -> Tensor:
        nonlocal square, count
        square, count = 0.999 * square + 0.001 * g.square(), count + 1
        return w - lr * g / ((square / (1 - 0.999**count)).sqrt() + 1e-8)

    return step


def main() -> None:
    """Print the table, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--weight", type=float, default=1.0, help="lambda")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the numbers of steps")
    parser.add_argument("--out", type=Path, help="figure to write")
    a = parser.parse_args()
    torch.manual_seed(0)
    basis = cosines(a.frames)
    target_f = 1.0 / (1 + 0.5 * torch.arange(a.frames).double())  # slow motion is large, fast motion small
    target, start = basis.T @ (target_f**2).diag() @ basis, basis.T @ (target_f / 2).diag() @ basis
    factor = 1 + a.weight * (2 - 2 * torch.cos(math.pi * torch.arange(a.frames) / a.frames))
    runs, curves = {}, {}
    for name, dtype, limit, make in (
        ("gradient flow", torch.float64, 2000, lambda: lambda w, g: w - 0.02 * g),
        ("DMD, SGD", torch.float32, 3000, lambda: lambda w, g: w - 0.02 * g),
        ("DMD, Adam", torch.float32, 1000, lambda: adam(1e-3)),
    ):
        both = []
        for weight in (0.0, a.weight):
            generator = torch.Generator().manual_seed(1)
            if dtype == torch.float64:
                gradient = lambda w, k=weight: flow_gradient(w, target, k)  # noqa: E731
            else:
                gradient = lambda w, k=weight, g=generator: batch_gradient(w, target.float(), k, g)  # noqa: E731
            times, path, final = half_times(gradient, start.to(dtype), target_f.to(dtype), make(), int(limit * a.scale))
            both.append((times, final))
            curves[name, weight] = path
        runs[name] = both
    print(f"{a.frames} latent frames, lambda {a.weight:g}: steps of plain DMD / steps with motion scores to half way")
    print(f"{'w / pi':>8}{'1 + lambda (2 - 2 cos w)':>26}" + "".join(f"{name:>24}" for name in runs))
    for k in range(a.frames):
        cells = (f"{b[0][0][k]:.0f} / {b[1][0][k]:.0f} = {b[0][0][k] / b[1][0][k]:.2f}" for b in runs.values())
        print(f"{k / a.frames:>8.3f}{factor[k]:>26.2f}" + "".join(f"{c:>24}" for c in cells))
    print("\ndeviation over target at the end, least and largest over frequencies (1 is the fixed point of all)")
    for name, both in runs.items():
        for weight, (_, final) in zip((0.0, a.weight), both, strict=True):
            print(f"{name:<14} lambda {weight:g}: {final.min():.3f} to {final.max():.3f}")
    if a.out:
        draw(curves, a.frames, a.weight, a.out)


def draw(curves: dict[tuple[str, float], Tensor], frames: int, weight: float, out: Path) -> None:
    """Progress of three frequencies, plain dashed and with motion scores solid, one panel per optimiser."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "mogan", "font.size": 9}
    names = list(dict.fromkeys(name for name, _ in curves))
    figure, axes = plt.subplots(1, len(names), figsize=(9, 2.8), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        steps = torch.logspace(0, math.log10(len(curves[name, weight])), 150).long().unique()
        for k, colour in ((0, "#5C5C5C"), (frames // 2, "#0072B2"), (frames - 1, "#D55E00")):
            axis.plot(steps, curves[name, 0.0][steps - 1, k], "--", color=colour, lw=1)
            axis.plot(steps, curves[name, weight][steps - 1, k], color=colour, lw=1.4, label=f"w = {k}/{frames} pi")
        axis.set(title=name, xlabel="steps", xscale="log", ylim=(-0.05, 1.15))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("way to the target")
    axes[0].legend(frameon=False, loc="upper left", title=f"solid: lambda {weight:g}, dashed: 0")
    temporary = out.with_name(f".{out.name}.new")
    figure.savefig(temporary, format=out.suffix[1:], metadata={"Date": None} if out.suffix == ".svg" else None)
    temporary.replace(out)


if __name__ == "__main__":
    main()

"""What the start of a causal student keeps of its teacher's variance, beside what is known of two Gaussian frames.

    python benchmarks/causal_variance.py STORE NAME=MODEL ... [--figure docs/images/causal_variance.png]

STORE holds a teacher's paths of a few prompts, each from several seeds (``mogan trajectories --seeds 8``). A share is the variance over
seeds of a model's clips of one prompt, divided by that of the teacher's, mean over prompts and numbers of a latent frame. Predicted is
what regression of jointly Gaussian frames on the noise up to their own keeps, ``sum_{k <= j} R_jk^2 / S_jj`` with ``S`` the covariance
of the teacher's frames over seeds, and ``R`` its root, which is the flow from noise to clip; of two frames with correlation ``r`` the
first keeps ``((sqrt(1 + r) + sqrt(1 - r)) / 2)^2``.

Models of one name are training seeds of one recipe: a share is their mean, with the least and the most in brackets.
"""

import argparse
from pathlib import Path

import torch

from mogan.data.cache import open_cache
from mogan.models.attention import stack_text
from mogan.runs.generator import open_generator
from mogan.sampling.samplers import sample_student
from mogan.schedule import shifted_levels, velocity_to_x0

CORRELATIONS = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.99, 0.999)


def known(r):
    """Of two frames, what the first keeps."""
    return (((1 + r) ** 0.5 + (1 - r) ** 0.5) / 2) ** 2


def regressed(r, count=100_000):
    """The same by least squares: the end of the first frame's path on its noise."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = noise @ root(torch.tensor([[1.0, r], [r, 1.0]], dtype=torch.float64))[0]
    return float((noise[:, 0] @ end / noise[:, 0].square().sum()) ** 2)


def root(covariance):
    """Symmetric."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


def over_seeds(clips_PSCFHW):
    """Covariance ``(F, F)`` between latent frames over seeds, of one prompt, mean over prompts and numbers of a frame."""
    away = (clips_PSCFHW - clips_PSCFHW.mean(1, keepdim=True)).movedim(3, 0).flatten(1).double()
    seeds = clips_PSCFHW.shape[1]
    return away @ away.T / away.shape[1] * seeds / (seeds - 1)


@torch.no_grad()
def made(source, student, text, noise):
    """Clips by the student's steps, and whether it is told by regression: those of one pass over all chunks of noise."""
    shape, how = tuple(noise.shape[1:]), source.causal
    few = source.sigmas if len(source.sigmas) < 8 else shifted_levels(3, 3.0)
    pieces = [range(at, min(at + 32, len(text))) for at in range(0, len(text), 32)]
    clips = torch.cat([sample_student(student, text[list(p)], shape, few, list(p)) for p in pieces])
    level = torch.ones(len(noise), shape[1])
    velocity = student.masked(noise, level, text, how.chunks(shape[1]), how.policy)
    return clips, velocity_to_x0(noise, velocity, level)


def draw(predicted, found, path):
    """Left the exact case, right the lab."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, (exact, lab) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=(1, 1.1))
    line = torch.linspace(0, 1, 400)
    exact.plot(line, known(line), color="black", lw=1, label="known")
    exact.plot(CORRELATIONS, [regressed(r) for r in CORRELATIONS], "o", color="tab:blue", label="regression, simulated")
    exact.set(xlabel="correlation of two Gaussian frames", ylabel="variance kept in the first", ylim=(0, 1.1))
    lab.plot(predicted, color="black", lw=1, ls="--", label="predicted of a Gaussian")
    for name, shares in found.items():
        lab.plot(shares, marker="o", ms=3, label=name)
    lab.axhline(1, color="grey", lw=0.6)
    lab.set(
        xlabel="latent frame", ylabel="variance over seeds / teacher's", xticks=range(len(predicted)), ylim=(0, 1.1)
    )
    exact.legend(frameon=False, fontsize=7, loc="lower left")
    lab.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    picture.tight_layout()
    picture.savefig(path, dpi=110)


def main():
    """The table, and the figure if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    cache = open_cache(given.store)
    entries = sorted(cache.entries, key=lambda e: (e["caption"], e["seed"]))
    prompts, found = len({e["caption"] for e in entries}), {}
    passed = torch.stack([cache.path_to(e["id"], (1.0, 0.0)).float() for e in entries])
    text = stack_text([cache.text(e["caption"]) for e in entries], "cpu")
    covariance = over_seeds(passed[:, 1].unflatten(0, (prompts, -1)))
    predicted = root(covariance).tril().square().sum(1) / covariance.diag()
    spread = covariance.diag().sqrt()
    print("correlation with the next frame:", *(f"{x:.2f}" for x in (covariance / spread / spread[:, None]).diag(1)))
    print("| predicted |", " | ".join(f"{x:.2f}" for x in predicted), "|")
    for name, model in (pair.split("=", 1) for pair in given.models):
        source = open_generator(model)
        for way, clips in zip(
            ("in steps", "from noise at once"), made(source, source.load().eval(), text, passed[:, 0]), strict=True
        ):
            shares = over_seeds(clips.unflatten(0, (prompts, -1))).diag() / covariance.diag()
            found.setdefault((name, way), []).append(shares)
    means = {key: torch.stack(each).mean(0) for key, each in found.items()}
    for (name, way), each in found.items():
        ends = (torch.stack(each).min(0).values, torch.stack(each).max(0).values)
        cells = [
            f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in zip(means[name, way], *ends, strict=True)
        ]
        print(f"| {name}, {way} |", " | ".join(cells), "|")
    if given.figure:
        shown = {", ".join(key): mean for key, mean in means.items() if key[1] == "in steps" or "regression" in key[0]}
        draw(predicted, shown, given.figure)


if __name__ == "__main__":
    main()

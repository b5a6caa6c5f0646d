"""A velocity model of latent differences: what it is trained on, how it steers and continues clips, how likely it finds them."""

import json
import math
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import tiny_recipes
from conftest import CAPTIONS
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.disk.files import write_atomically
from mogan.errors import UserError
from mogan.evaluation.likelihood import log_likelihood, motion_log_likelihood, noise_log_density
from mogan.models.denoiser import Denoiser
from mogan.objectives.motion_score import MotionScore, MotionScoreConfig
from mogan.runs.generator import open_generator, open_motion
from mogan.sampling.motion_score import centred_path, continue_clip, differences, euler, fuse, motion_velocity, steer
from mogan.sampling.rollout import normal
from mogan.sampling.sample import sample
from mogan.sampling.samplers import sample_teacher, seeded
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from tiny_recipes import dmd, motion_score

TEXT = torch.zeros(2, 3, 8)
NULL = torch.zeros(1, 3, 8)


def clips(seed=0, frames=5, batch=2):
    return torch.randn(batch, 2, frames, 2, 2, generator=torch.Generator().manual_seed(seed))


class Stub(nn.Module):
    """A transformer's stand-in, ``a x + b level + c mean of the first frame``; remembers what it saw."""

    config = SimpleNamespace(patch_size=(1, 2, 2))

    def __init__(self, a=0.5, b=0.1, c=0.0):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(v)) for v in (a, b, c))
        self.seen = []

    def forward(self, x, timestep, text, return_dict=False):
        self.seen.append((x.detach(), timestep))
        level = timestep / 1000  # one per token, and here one token per frame; or one per clip
        level = level.view(len(x), 1, -1, 1, 1)
        return (self.a * x + self.b * level + self.c * x[:, :, :1].mean((1, 2, 3, 4), keepdim=True),)


def test_the_motion_model_is_guided_away_from_what_it_says_of_no_text():
    class OfText(Stub):
        def forward(self, x, timestep, text, return_dict=False):
            return (0 * x + text.mean((1, 2)).view(-1, 1, 1, 1, 1),)

    x, none = torch.zeros(1, 2, 2, 4, 4), torch.zeros(1, 3, 8)
    model = OfText(0.4, 0.3, 0.2)
    found = motion_velocity(Denoiser(model), x[:, :, :1], x, torch.tensor([0.5]), none + 1, none, 3.0)
    torch.testing.assert_close(found, torch.full_like(found, 3.0))


# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("window", [(0, 4), (1, 4), (3, 2), (2, 1)])
def test_loss_is_flow_matching_of_differences_given_clean_frames(window):
    given, ahead = window
    model, x0 = Stub(0.4, 0.3, 0.2), clips(1)
    objective = MotionScore(
        Denoiser(model), torch.zeros(2, 8), MotionScoreConfig(windows=(window,), shift=3.0, drop_text=0.0), 0
    )
    batch = Batch(["a", "b"], [], [torch.ones(2, 8)] * 2, latent_BCFHW=x0)
    batch = objective.prepare(batch, iteration=1, generator=torch.Generator(), most=2)
    loss, _ = objective.student_loss(None, batch, torch.Generator().manual_seed(7))

    g = torch.Generator().manual_seed(7)  # numpy transcription
    span = max(given, 1) + ahead
    starts = (torch.rand(2, generator=g) * (5 - span + 1)).long().numpy()
    x = np.stack([row[:, s : s + span] for row, s in zip(x0.numpy(), starts, strict=True)])
    u = torch.rand(2, generator=g).numpy()
    sigma = (3 * u / (1 + 2 * u)).reshape(2, 1, 1, 1, 1)
    torch.rand(2, generator=g)
    noise = torch.randn(x.shape, generator=g).numpy()
    noisy = (1 - sigma) * x + sigma * noise
    read = list(x[:, :, :given].swapaxes(0, 2)) + [
        (noisy[:, :, i] - noisy[:, :, i - 1]).swapaxes(0, 1) for i in range(span - ahead, span)
    ]
    read = np.stack(read).swapaxes(0, 2)
    first = read[:, :, :1].mean((1, 2, 3, 4), keepdims=True)
    predicted = (0.4 * read + 0.3 * sigma + 0.2 * first)[:, :, given:]
    target = np.stack([(noise - x)[:, :, i] - (noise - x)[:, :, i - 1] for i in range(span - ahead, span)], 2)
    np.testing.assert_allclose(loss.item(), ((predicted - target) ** 2).mean(), rtol=1e-5)
    seen, timestep = model.seen[0]
    np.testing.assert_allclose(seen, read, atol=1e-6)
    assert (timestep[:, :given] == 0).all()
    np.testing.assert_allclose(timestep[:, given:], np.broadcast_to(1000 * sigma[..., 0, 0, 0], (2, ahead)), rtol=1e-5)


def test_windows_that_do_not_fit_are_refused():
    objective = MotionScore(
        Denoiser(Stub()), torch.zeros(2, 8), MotionScoreConfig(windows=((2, 4),), shift=3.0, drop_text=0.0), 0
    )
    with pytest.raises(UserError, match="needs 6 latent frames, the clips have 5"):
        objective.student_loss(None, Batch([], [], [], latent_BCFHW=clips(), more={"window": [0]}), torch.Generator())


def test_the_window_of_an_update_is_that_of_all_its_parts_and_processes():
    windows = ((0, 4), (1, 4), (3, 2))
    settings = MotionScoreConfig(windows=windows, shift=3.0)
    drawn = {}
    for of, size in ((0, 4), (0, 1), (1, 4)):  # the seed of another process's clips is in its generator
        objective = MotionScore(Denoiser(Stub()), torch.zeros(2, 8), settings, 0)
        batch = Batch([str(k) for k in range(size)], [], [])
        found = [
            objective.prepare(batch, iteration=i, generator=torch.Generator().manual_seed(of), most=1).more["window"]
            for i in range(30)
        ]
        assert all(len(one) == size and len(set(one)) == 1 for one in found)
        drawn[of, size] = [one[0] for one in found]
    assert drawn[0, 4] == drawn[0, 1] == drawn[1, 4]
    assert set(drawn[0, 4]) == {0, 1, 2}


# ------------------------------------------------------------------------------------------- steering


def teacher_like(seed):
    """A velocity that mixes frames, so that nothing below holds by accident."""
    mix = 0.3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))
    module = Stub()
    module.forward = lambda x, t, text, return_dict=False: (torch.einsum("gf,bcfhw->bcghw", mix, x) + 0.2 * x**2,)
    return Denoiser(module)


def mixer(model, given, ratio):
    return partial(steer, motion=model, given=given, text_BLD=TEXT, null_1LD=NULL, guidance=1.0, ratio=ratio)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_steering_mixes_motion_and_keeps_the_mean_over_time(ratio):
    v, x, sigma, model = clips(2), clips(3), torch.tensor([0.4, 0.9]), Denoiser(Stub(0.7, 0.1, 0.5))
    found = mixer(model, 1, ratio)(v, x, sigma)
    first = x[:, :, :1] - sigma.view(-1, 1, 1, 1, 1) * v[:, :, :1]
    u = motion_velocity(model, first, differences(x), sigma, TEXT)
    torch.testing.assert_close(differences(found), (1 - ratio) * differences(v) + ratio * u)
    torch.testing.assert_close(found.mean(2), v.mean(2))


def test_steering_is_the_score_mixture_it_says():
    v, x, sigma, model = clips(2), clips(3), torch.tensor([0.4, 0.9]), Denoiser(Stub(0.7, 0.1))
    s, ratio = sigma.view(-1, 1, 1, 1, 1), 0.6
    d = torch.from_numpy(np.eye(5)[1:] - np.eye(5)[:-1]).float()
    u, m = motion_velocity(model, x[:, :, :0], differences(x), sigma, TEXT), differences(x)
    time = lambda a, y: torch.einsum("gf,bcfhw->bcghw", a, y)  # noqa: E731
    score = lambda velocity: -(x + (1 - s) * velocity) / s  # noqa: E731
    motion = -time(torch.linalg.inv(d @ d.T), m + (1 - s) * u) / s  # of a Gaussian of covariance s^2 D D^T
    expected = score(v) + ratio * (time(d.T, motion) - time(torch.linalg.pinv(d) @ d, score(v)))
    torch.testing.assert_close(score(mixer(model, 0, ratio)(v, x, sigma)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_at_ratio_one_a_clip_moves_exactly_as_the_motion_model_alone_would(solver):
    """Whatever the teacher says: its velocity then decides the mean over time only."""
    model = Denoiser(Stub(0.6, 0.3))
    settings = {"steps": 6, "guidance": 1.0, "shift": 3.0, "solver": solver}
    made = [
        sample_teacher(teacher_like(i), TEXT, NULL, (2, 5, 2, 2), [3, 4], change=mixer(model, 0, 1.0), **settings)
        for i in (0, 1)
    ]
    torch.testing.assert_close(differences(made[0]), differences(made[1]), rtol=1e-4, atol=1e-5)
    assert (made[0].mean(2) - made[1].mean(2)).abs().max() > 0.01
    plain = sample_teacher(teacher_like(0), TEXT, NULL, (2, 5, 2, 2), [3, 4], **settings)
    none = sample_teacher(teacher_like(0), TEXT, NULL, (2, 5, 2, 2), [3, 4], change=mixer(model, 0, 0.0), **settings)
    torch.testing.assert_close(plain, none)
    assert (differences(plain) - differences(made[0])).abs().max() > 0.01


# ------------------------------------------------------------------------------------------- windows and fusion


def test_fusion_is_the_weighted_mean_of_what_is_there():
    estimates = [clips(i, 1) for i in range(2)]
    np.testing.assert_allclose(fuse(estimates, (3.0, 1.0, 9.0)), 0.75 * estimates[0] + 0.25 * estimates[1], rtol=1e-6)
    assert torch.equal(fuse(estimates[:1], (3.0, 1.0)), estimates[0])
    for weights in ((0.0, 1.0), (-1.0, 2.0), (1.0,)):
        with pytest.raises(UserError, match="weights"):
            fuse(estimates[: 1 if weights[0] == 0 else 2], weights)


def test_continued_clip_is_the_papers_loop_over_windows():
    weights, sigmas, known, added = (0.5, 0.3, 0.2), (1.0, 0.6, 0.2), clips(5, 2), 5
    model = Denoiser(Stub(0.4, 0.2, 0.3))
    found = continue_clip(
        model, known, TEXT, NULL, frames=added, weights=weights, sigmas=sigmas, guidance=1.0, generators=seeded([1, 2])
    ).numpy()

    noise = normal(torch.Size((2, 2, added + 3, 2, 2)), seeded([1, 2]), "cpu").numpy()
    clip, predictions = list(known.numpy().swapaxes(0, 2).swapaxes(1, 2)), {}
    for n in range(added):  # an independent statement, frame by frame
        m = [noise[:, :, n + j + 1] - noise[:, :, n + j] for j in range(3)]
        mean = clip[-2].mean((1, 2, 3)).reshape(-1, 1, 1, 1)
        for now, then in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
            m = [d + (then - now) * (0.4 * d + 0.2 * now + 0.3 * mean) for d in m]
        for j in range(3):
            predictions[n, n + j] = m[j]
        total, step = 0.0, 0.0
        for j in range(3):
            if (n - j, n) in predictions:
                total, step = total + weights[j], step + weights[j] * predictions[n - j, n]
        clip.append(clip[-1] + step / total)
    np.testing.assert_allclose(found, np.stack(clip, 2), rtol=1e-4, atol=1e-5)


def test_windows_that_agree_are_fused_to_what_each_says():
    """A model that ignores what it is given predicts each difference alike in every window: noise belongs to frames."""
    model, known = Denoiser(Stub(0.4, 0.2)), clips(5, 2)
    common = {"frames": 4, "sigmas": (1.0, 0.5), "guidance": 1.0}
    fused = continue_clip(model, known, TEXT, NULL, weights=(1.0, 1.0, 1.0), generators=seeded([1, 2]), **common)
    noise = normal(torch.Size((2, 2, 4 + 3, 2, 2)), seeded([1, 2]), "cpu")
    whole = euler(lambda m, s: 0.4 * m + 0.2 * s.view(-1, 1, 1, 1, 1), differences(noise[:, :, :5]), (1.0, 0.5))
    torch.testing.assert_close(differences(fused)[:, :, 1:], whole)


# ------------------------------------------------------------------------------------------- likelihood


def gaussian_velocity(mean, covariance, noise_covariance):
    """The exact velocity field between N(0, noise_covariance) and N(mean, covariance), for rows ``(B, n)``."""

    def velocity(x, sigma):
        s = sigma[0]
        both = (1 - s) ** 2 * covariance + s**2 * noise_covariance
        gain = torch.linalg.solve(both, s * noise_covariance - (1 - s) * covariance).T  # E[noise - x0 | x_t]
        return (x - (1 - s) * mean) @ gain.T - mean

    return velocity


def spd(n, seed):
    root = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / n + 0.3 * torch.eye(n, dtype=torch.float64)


def test_likelihood_of_a_gaussian_is_its_log_density():
    n, eye = 6, torch.eye(6, dtype=torch.float64)
    mean, covariance = torch.linspace(-1, 1, n).double(), spd(n, 0)
    exact = torch.distributions.MultivariateNormal(mean, covariance)
    x0 = mean + torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) @ covariance
    base = torch.distributions.MultivariateNormal(torch.zeros(n).double(), eye)
    found = log_likelihood(
        gaussian_velocity(mean, covariance, eye), x0, base.log_prob, generator=torch.Generator().manual_seed(1),
        steps=12, probes=60,
    )  # fmt: skip
    assert found.numbers == n
    assert (found.error_B > 0).all()
    assert ((found.nats_B - exact.log_prob(x0)).abs() < 4 * found.error_B).all()
    assert found.error_B.max() < 0.4
    diagonal = torch.diag(torch.linspace(0.3, 2.0, n).double())  # a diagonal Jacobian leaves Hutchinson no variance
    exact = torch.distributions.MultivariateNormal(mean, diagonal)
    found = log_likelihood(
        gaussian_velocity(mean, diagonal, eye), x0, base.log_prob, generator=torch.Generator(), steps=60, probes=2
    )
    torch.testing.assert_close(found.nats_B, exact.log_prob(x0), rtol=1e-6, atol=1e-6)
    assert found.error_B.max() < 1e-6


def test_hutchinson_is_unbiased_and_its_stated_error_is_true():
    """Linear field ``A x``: the integral is tr A. 400 estimates of 4 probes: their mean, and their spread beside error_B."""
    a = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x0, zero = torch.zeros(400, 5, dtype=torch.float64), lambda x: torch.zeros(len(x), dtype=torch.float64)
    found = log_likelihood(
        lambda x, s: x @ a.T, x0, zero, generator=torch.Generator().manual_seed(3), steps=1, probes=4
    )
    spread = found.nats_B.std().item()
    assert found.nats_B.mean().item() == pytest.approx(a.trace().item(), abs=4 * spread / 20)
    off = a - a.diag().diag()
    variance = (off + off.T).square().sum().item() / 2  # of one probe with random signs
    assert spread == pytest.approx(math.sqrt(variance / 4), rel=0.15)
    assert found.error_B.square().mean().sqrt().item() == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("frames", [1, 4])
def test_density_of_the_noise_is_that_of_differenced_normals(frames):
    d = torch.from_numpy(np.eye(frames + 1)[1:] - np.eye(frames + 1)[:-1])
    exact = torch.distributions.MultivariateNormal(torch.zeros(frames).double(), d @ d.T)
    m = clips(1, frames).double()
    expected = exact.log_prob(m.movedim(2, -1)).flatten(1).sum(1)
    torch.testing.assert_close(noise_log_density(m), expected)


class MotionOfAGaussian(nn.Module):
    """The exact motion model of clips whose pixels are independent in space, N(0, covariance) along time."""

    config = SimpleNamespace(patch_size=(1, 2, 2))

    def __init__(self, covariance):
        super().__init__()
        d = torch.from_numpy(np.eye(len(covariance))[1:] - np.eye(len(covariance))[:-1])
        self.velocity = gaussian_velocity(torch.zeros(len(d)).double(), d @ covariance @ d.T, d @ d.T)

    def forward(self, x, timestep, text, return_dict=False):
        rows = x.double().movedim(2, -1)
        out = self.velocity(rows.flatten(0, -2), timestep[:1, -1].double() / 1000)
        return (out.view(rows.shape).movedim(-1, 2),)


def test_motion_likelihood_is_the_density_of_the_differences_and_stillness_scores_highest():
    covariance = spd(4, 5)
    d = torch.from_numpy(np.eye(4)[1:] - np.eye(4)[:-1])
    exact = torch.distributions.MultivariateNormal(torch.zeros(3).double(), d @ covariance @ d.T)
    latents = torch.cat([clips(3, 4, batch=3), torch.ones(1, 2, 4, 2, 2)])
    found = motion_log_likelihood(
        Denoiser(MotionOfAGaussian(covariance)), latents, TEXT[:1].expand(4, -1, -1), given=0,
        generator=torch.Generator().manual_seed(0), steps=12, probes=20,
    )  # fmt: skip
    expected = exact.log_prob(differences(latents.double()).movedim(2, -1)).flatten(1).sum(1)
    assert ((found.nats_B - expected).abs() < 4 * found.error_B + 1e-3).all()
    assert found.numbers == 2 * 3 * 2 * 2
    assert found.nats_B.argmax() == 3  # the caution of the docs: the clip that stands still


# ------------------------------------------------------------------------------------------- from run to clips


@pytest.fixture(scope="module")
def runs(family, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, config in (("motion", motion_score()), ("dmd", dmd())):
        run = folder / name
        run.mkdir()
        parts = assemble(
            replace(config, iterations=1), open_cache(cache), model=str(family / "teacher"), run=run, device="cpu"
        )
        write_atomically(run / "config.json", json.dumps(asdict(config)))
        write_atomically(run / "run.json", tiny_recipes.places(config, family, cache))
        run_training(parts, run)
    (folder / "prompts.txt").write_text(CAPTIONS[0] + "\n")
    return folder


def test_a_trained_motion_model_steers_mogan_sample(runs, family, tmp_path, monkeypatch):
    written = {}

    def write(path, frames, fps):
        written[path.parent.name] = np.stack(list(frames))

    monkeypatch.setattr("mogan.sampling.folder.write_video", write)
    common = {"prompts": runs / "prompts.txt", "model": str(family / "teacher"), "steps": 2, "precision": "fp32"}
    sample(out=tmp_path / "plain", **common)
    sample(out=tmp_path / "none", motion=runs / "motion", motion_ratio=0.0, **common)
    sample(out=tmp_path / "mixed", motion=runs / "motion", motion_ratio=1.0, **common)
    assert np.abs(written["plain"].astype(int) - written["none"]).max() <= 1
    assert np.abs(written["plain"].astype(int) - written["mixed"]).max() > 1
    record = json.loads((tmp_path / "mixed" / "samples.jsonl").read_text())
    assert (record["motion"], record["motion_ratio"]) == (str(runs / "motion"), 1.0)


def test_motion_models_and_generators_are_not_taken_for_each_other(runs, family):
    with pytest.raises(UserError, match="is a motion model, not a generator"):
        open_generator(str(runs / "motion"))
    with pytest.raises(UserError, match="trained dmd_lab, no motion model"):
        open_motion(runs / "dmd", family / "teacher", 4)
    with pytest.raises(UserError, match="is not a training run"):
        open_motion(runs, family / "teacher", 4)
    with pytest.raises(UserError, match=r"never saw a whole clip of 9 latents .* add \(1, 8\)"):
        open_motion(runs / "motion", family / "teacher", 9)
    assert open_motion(runs / "motion", family / "teacher", 4)[1] == 1
    with pytest.raises(UserError, match="teacher's steps"):
        sample(prompts=runs / "prompts.txt", out=runs / "x", model=str(family / "student"), motion=runs / "motion")


def test_paths_of_a_clip_come_back_from_its_differences():
    x = clips(1)
    torch.testing.assert_close(centred_path(differences(x)), x - x.mean(2, keepdim=True))

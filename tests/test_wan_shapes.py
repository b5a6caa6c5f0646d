"""Every full-size recipe once at Wan's own clips, 16 x 21 x 60 x 104, on a device that has shapes and no memory.

Networks are narrow and two blocks deep; chunks, windows, levels, plans and losses are the recipe's.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.fx.experimental._config as fx_config

from mogan.costs.shapes import PUBLISHED
from mogan.data.cache import Cache
from mogan.data.observations import Observations
from mogan.distributed import World
from mogan.estimate.random_wan import random_wan
from mogan.models import wan
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Policy
from mogan.models.frame_sparse import Mask, write_mask
from mogan.motion import estimators
from mogan.objectives.redmd import Weights
from mogan.objectives.relativistic import RelativisticConfig
from mogan.recipes import RECIPES
from mogan.sampling.causal_rollout import Chunked
from mogan.terms import PATH
from mogan.training.assemble import assemble
from mogan.training.steps import Position, draw, learn
from test_scale import NARROW, frames_seen

META = torch.device("meta")
SHAPE = PUBLISHED["wan2.1-t2v-1.3b"].latent
LENGTHY = ("asd", "mogan", "msm_causal", "phased", "redmd", "reward_forcing", "shift", "vdot")


class Blank(Cache):
    """Clips, captions and trajectories of zeros."""

    def latent(self, clip):
        return torch.zeros(SHAPE)

    def text(self, prompt):
        return torch.zeros(20, 64)

    def path_to(self, clip, levels):
        return torch.zeros(len(levels), *SHAPE)

    def require(self, **facts):
        pass

    def require_paths(self, levels, teacher):
        pass


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One stock folder of each kind that recipes start from."""
    folder = tmp_path_factory.mktemp("models")
    random_wan(folder / "wan", layers=2, text_layers=1, changes=NARROW)
    random_wan(folder / "a14b", "wan2.2-t2v-a14b", layers=2, text_layers=1, changes=NARROW)
    shutil.copytree(folder / "wan", folder / "sparse")
    write_mask(folder / "sparse" / "transformer", Mask(SHAPE[1], (1, 2), {"threshold": 0.1}))
    return folder


@pytest.fixture
def on_meta(monkeypatch):
    """Autocast knows no such device."""
    begin, enabled = torch.autocast.__init__, torch.is_autocast_enabled

    def autocast(self, device_type, *more, **options):
        begin(self, "cpu" if device_type == "meta" else device_type, *more, **options)

    monkeypatch.setattr(torch.autocast, "__init__", autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and enabled(kind))
    monkeypatch.setattr(estimators, "load_flow", lambda *of: lambda video: video[:, :2, 1:] - video[:, :2, :-1])
    monkeypatch.setattr(estimators, "flow_fingerprint", lambda name: name)
    monkeypatch.setattr(Weights, "_measure", lambda weights: None)  # it reads whether the recipe has said the unit
    with fx_config.patch(meta_nonzero_assume_all_nonzero=True):  # both experts are asked
        yield


def shallow(config):
    """Two blocks and a clip at a time; everything else is the recipe's."""
    smaller = {
        "gan": {"blocks": 2, "taps": (0, 1), "max_flow": 1.0},
        "key_levels": {"block": 1, "clean_block": 0},
        "relativistic": {"taps": (0, 1)},
        "asd": {"critic": RelativisticConfig(taps=(0, 1), shift=5.0)},
    }
    if (weights := getattr(config.objectives.get("dmd"), "weights", None)) is not None:
        smaller["dmd"] = {"weights": replace(weights, standard=(0.0, 1.0))}
    objectives = {name: replace(block, **smaller.get(name, {})) for name, block in config.objectives.items()}
    plan = tuple(replace(u, batch=(least := config.lesson(u).least or 1), accumulate=least) for u in config.plan)
    return replace(config, plan=plan, objectives=objectives, precision="fp32")


def start(config, base, folder):
    """Where the recipe's student starts, if not from the base model."""
    if "kd" in config.objectives:
        return str(base.with_name("sparse"))
    if not config.post_trains:
        return None
    folder.mkdir()
    for part in base.iterdir():
        (folder / part.name).symlink_to(part)
    facts = json.loads((base / "mogan.json").read_text()) | {"sigmas": list(config.sigmas)}
    facts |= {} if config.causal is None else {"causal": replace(config.causal, policy=Policy()).facts()}
    (folder / "mogan.json").unlink()
    (folder / "mogan.json").write_text(json.dumps(facts))
    return str(folder)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith(LENGTHY) else ())
        for name in RECIPES
        if "_wan_" in name
    ],
)
def test_a_full_size_recipe_learns_at_wans_own_clips(name, models, on_meta, tmp_path, monkeypatch):
    config = shallow(RECIPES[name]())
    base = models / ("a14b" if "a14b" in name else "wan")
    paths = any(PATH in config.lesson(update).clips for update in config.plan)
    entries = [{"id": str(number), "caption": "a square", "state": "idle", "state_from": 0.0} for number in range(2)]
    facts = {"contents": "paths" if paths else "clips", "fps": 16, "height": 480, "width": 832, "frames": 81}
    cache = Blank(tmp_path, facts, entries)
    student = start(config, base, tmp_path / "student")
    parts = assemble(config, cache, model=str(base), student=student, run=None, world=World(META))
    assert parts.latent_shape == SHAPE
    if "gan" in config.objectives:
        seen = torch.zeros(SHAPE[0], config.objectives["gan"].window, *SHAPE[2:])
        monkeypatch.setattr(Observations, "read", lambda *of: seen)
    made = []
    for index, update in enumerate(config.plan):
        iteration = next(i for i in range(config.iterations) if update.happens(i))
        where = Position(config.seed, iteration, index, 0)
        found = learn(parts, where, draw(parts, where), made)
        made = found.rollouts if update.learns == "student" else made
        assert all(clip.sample_BCFHW.shape[1:] == SHAPE for clip in found.rollouts)


def test_what_a_chunk_of_a_full_size_roll_out_sees_is_what_its_window_says(models, on_meta, monkeypatch):
    """Window 9, sink 3, chunks of 3: in 21 latents four chunks are dropped."""
    config, seen = RECIPES["reward_forcing_wan_1_3b"](), frames_seen(monkeypatch)
    student = CausalDenoiser(wan.load_transformer(models / "wan").to(META), how=config.causal)
    noise, text = torch.empty(1, *SHAPE, device=META), torch.empty(1, 20, 64, device=META)
    made = Chunked(config.causal).make(student, noise, text, config.sigmas, torch.Generator(), 0, False)
    assert made.sample_BCFHW.shape == noise.shape
    assert seen == config.causal.policy.seen((3,) * 7)
    assert seen[3:] == [(0, 1, 2, *range(last - 3, last)) for last in (9, 12, 15, 18)]

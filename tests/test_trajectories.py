"""Losses and gradient norms of every lab recipe, recorded: a change of the code that means to leave training alone leaves them.

``MOGAN_RECORD=1 pytest tests/test_trajectories.py`` records them anew, for a change that means to alter some and says so.
Models are the random test family's, everything else is the recipe's: fp32, one thread, three iterations.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny_recipes
from mogan.config import Config
from mogan.data.cache import open_cache
from mogan.recipes import ABLATIONS, ablate
from mogan.training.assemble import assemble
from mogan.training.loop import run_training

RECORDED = Path(__file__).parent / "trajectories.json"
# vector widths alone change these numbers by up to 4e-3: the second step divides by the first gradient. With adapters, one of whose
# factors starts at zero, by up to 2e-2
TOLERANCE, OF_ADAPTERS = 1e-2, 4e-2


def together() -> Config:
    """MoGAN with both judges on one rollout."""
    config = tiny_recipes.mogan()
    first = replace(config.plan[0], by="dmd+gan")
    return replace(config, plan=(first, *(u for u in config.plan[1:] if u.learns != "student")))


RECIPES = {
    "accvideo_lab": tiny_recipes.accvideo,
    "dmd_lab": tiny_recipes.dmd,
    "flow_matching_lab": tiny_recipes.flow_matching,
    "mogan_lab": tiny_recipes.mogan,
    "mogan_msm_lab": tiny_recipes.mogan_msm,
    "mogan_surrogate_lab": tiny_recipes.surrogate,
    "motion_score_lab": tiny_recipes.motion_score,
    "msm_lab": tiny_recipes.msm,
    "phased_lab": tiny_recipes.phased,
    "phased_alternating_lab": tiny_recipes.phased_alternating,
    "redmd_lab": tiny_recipes.redmd,
    "sft_i2v_lab": tiny_recipes.sft_i2v,
    "vace_lab": tiny_recipes.vace,
    "shift_lab": tiny_recipes.shift,
    "tdm_lab": tiny_recipes.tdm,
    "causal_teacher_lab": tiny_recipes.causal_teacher,
    "causal_cd_lab": tiny_recipes.causal_cd,
    "causal_ode_lab": tiny_recipes.causal_ode,
    "llia_lab": tiny_recipes.llia,
    "efficient_vdit_mcd_lab": tiny_recipes.efficient_vdit_mcd,
    "efficient_vdit_kd_lab": tiny_recipes.efficient_vdit_kd,
    "efficient_vdit_kd_teacher_lab": tiny_recipes.efficient_vdit_kd_teacher,
    "self_forcing_lab": tiny_recipes.self_forcing,
    "asd_lab": tiny_recipes.asd,
    "reward_forcing_lab": tiny_recipes.reward_forcing,
    "mogan_causal_lab": tiny_recipes.mogan_causal,
    "msm_causal_lab": tiny_recipes.msm_causal,
    "vdot_lab": tiny_recipes.vdot,
    "dmd_i2v_lab": tiny_recipes.dmd_i2v,
    "mogan_i2v_lab": tiny_recipes.mogan_i2v,
    **{f"mogan_lab {name}": (lambda name=name: ablate(tiny_recipes.mogan, name)) for name in ABLATIONS},
    "mogan_lab dmd+gan": together,
    "mogan_lab lora": lambda: replace(tiny_recipes.mogan(), lora=3),
    "phased_lab lora": lambda: replace(tiny_recipes.phased(), lora=3),
    "dmd_lab lora": lambda: replace(tiny_recipes.dmd(), lora=3),
}


def trajectory(config: Config, family: Path, cache: Path, run: Path) -> list[list]:
    """``[update, loss, gradient norm]`` of every step."""
    student = tiny_recipes.start(config, family)
    parts = assemble(config, open_cache(cache), model=str(family / "teacher"), student=student, run=run, device="cpu")
    run_training(parts, run)
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [[r["update"], r["loss"], r["grad_norm"]] for r in records]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_as_it_did_when_it_was_recorded(recipe, family, cache, paths, tmp_path):
    assert torch.get_num_threads() == 1
    config = RECIPES[recipe]()
    steps = trajectory(config, family, tiny_recipes.data(config, cache, paths), tmp_path)
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if os.environ.get("MOGAN_RECORD"):
        recorded[recipe] = [[label, *(float(f"{x:.7g}") for x in numbers)] for label, *numbers in steps]
        lines = [f"  {json.dumps(name)}: {json.dumps(recorded[name])}" for name in RECIPES if name in recorded]
        RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    recorded = recorded[recipe]
    assert [s[0] for s in steps] == [s[0] for s in recorded]
    allowed = OF_ADAPTERS if config.lora else TOLERANCE
    for number, (step, was) in enumerate(zip(steps, recorded, strict=True)):
        assert step[1:] == pytest.approx(was[1:], rel=allowed, abs=1e-7), f"step {number}, {step[0]}"


def test_every_lab_recipe_is_recorded():
    from mogan import recipes

    assert {name.split()[0] for name in RECIPES} == {name for name in recipes.RECIPES if name.endswith("_lab")}

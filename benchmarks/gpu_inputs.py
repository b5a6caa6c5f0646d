"""What `make gpu` measures on: random weights, random clips, random paths of a teacher; where there is no GPU, narrow ones.

Made once in --work and shared by all parts. Time and memory do not depend on the weights.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mogan.config import Config
from mogan.costs.calls import TEXT_TOKENS
from mogan.data.cache import Cache, ensure_text, open_cache, save_latent, save_tensors, text_path
from mogan.data.paths import path_file
from mogan.disk.files import write_atomically
from mogan.estimate.random_wan import random_wan
from mogan.models.defaults import WAN_NEGATIVE_PROMPT
from mogan.models.discriminator import PROMPT
from mogan.models.wan import fingerprint, geometry, latent_shape
from mogan.motion.flow import RaftConfig, save_raft
from mogan.recipes import find_recipe
from mogan.runs.identity import TEACHER, of_model
from mogan.schedule import shifted_levels
from mogan.terms import OBSERVATION, PATH
from mogan.training.assemble import Assembly

Clip = tuple[int, int, int]  # frames, height, width

FULL: Clip = (81, 480, 832)
SMALLER: tuple[Clip, ...] = ((81, 320, 576), (49, 256, 448))  # the next one where the last did not fit
DRY: Clip = (49, 64, 64)
NARROW = {
    "transformer": {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "text_dim": 64, "freq_dim": 64},
    "vae": {"base_dim": 8},
    "text_encoder": {"d_model": 64, "d_ff": 128, "num_heads": 4, "d_kv": 16},
}
CAPTIONS = [f"a random clip that is number {n} of two and moves well from left to right" for n in range(2)]
# recipes ..._wan_1_3b beside DMD2's and MoGAN's, in the order of what they are worth
OFFLOAD = " offload"  # after the name of a recipe that is run so
NEIGHBOURS = ("tdm", "vdot", "redmd", "msm", "accvideo", "shift", "phased", "motion_score", "flow_matching")
STANDARD = (10.0, 5.0)  # of Re-DMD's reward, which a run measures on clips of its teacher


@dataclass(frozen=True)
class Inputs:
    """A folder of inputs; ``narrow``: those of a dry run."""

    work: Path
    narrow: bool

    @property
    def model(self) -> Path:
        """The random Wan, the real configuration files and full depth; on disk in bf16."""
        return self.work / ("narrow" if self.narrow else "wan")

    @property
    def raft(self) -> Path:
        """A random raft_large of torchvision, which needs 128 pixels; a small one reads 64."""
        return self.work / ("raft" if self.narrow else "raft.pth")

    @property
    def clip(self) -> Clip:
        """The size to measure at."""
        return DRY if self.narrow else FULL

    def make(self) -> None:
        """Model and flow network, unless they are there."""
        self.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        if self.narrow:
            save_raft(RaftConfig().build(), RaftConfig(), self.raft)
        else:
            from torchvision.models.optical_flow import raft_large

            torch.save(raft_large().state_dict(), self.raft)
        if not self.model.exists():
            changes, dtype = (NARROW, torch.float32) if self.narrow else (None, torch.bfloat16)
            random_wan(self.model, text_layers=1, clip=self.clip, changes=changes, dtype=dtype)

    def cache(self, clip: Clip, levels: tuple[float, ...] = ()) -> Cache:
        """Two clips of random latents, as `mogan prepare` would lay them out; with ``levels`` two paths past them."""
        size = replace(geometry(self.model), frames=clip[0], height=clip[1], width=clip[2])
        kind = "paths" if levels else "clips"
        folder = self.work / f"{self.model.name}-{kind}-{'x'.join(map(str, clip))}"
        shape, file = latent_shape(self.model, size), "trajectories.json" if levels else "cache.json"
        if not (folder / file).exists():
            facts = {"format": "mogan-cache", "version": 1, "contents": kind, "fps": size.fps}
            facts |= {"frames": size.frames, "height": size.height, "width": size.width}
            facts |= {"vae": fingerprint(self.model, "vae")}
            if levels:
                facts |= {"levels": levels, "latent_shape": shape, "teacher": of_model(self.model, TEACHER)}
            for number in range(2):
                if levels:
                    path = torch.randn(len(levels), *shape).half()
                    save_tensors(path_file(folder, f"clip{number}"), {"latents": path}, {})
                else:
                    save_latent(folder, f"clip{number}", torch.randn(shape), {})
            texts = ["", PROMPT, WAN_NEGATIVE_PROMPT, *CAPTIONS]
            width = json.loads((self.model / "text_encoder" / "config.json").read_text())["d_model"]
            ensure_text(folder, texts, lambda prompts: [torch.randn(TEXT_TOKENS - 1, width) for _ in prompts])
            assert all(text_path(folder, text).exists() for text in texts)
            entries = [{"id": f"clip{n}", "caption": caption, "motion": 15.0} for n, caption in enumerate(CAPTIONS)]
            write_atomically(folder / "index.jsonl", "".join(json.dumps(e) + "\n" for e in entries))
            write_atomically(folder / file, json.dumps(facts))
        return open_cache(folder)

    def data(self, config: Config, clip: Clip) -> Cache:
        """What a recipe trains on."""
        of_paths = any(PATH in config.lesson(update).clips for update in config.plan)
        return self.cache(clip, (*config.sigmas, 0.0) if of_paths else ())


def config_of(recipe: str, inputs: Inputs, clip: Clip, lora: int | None = None, compiled: bool = False) -> Config:
    """The recipe with as few clips per update as it takes, one at a time, each update once; motion through a random RAFT.

    Windows lie in the middle of the clip. SHIFT, whose sampler takes 30 guided steps, is left two.
    """
    config = find_recipe(recipe.removesuffix(OFFLOAD))
    config = replace(config, offload=recipe.endswith(OFFLOAD) or None)
    own = {"flow": str(inputs.raft), "standard": STANDARD} | ({"flow_iterations": 2} if inputs.narrow else {})
    blocks = {name: _with(block, own, clip[0]) for name, block in config.objectives.items()}
    config = replace(config, objectives=blocks, sample_prompts=0, lora=lora, compile=compiled)
    if config.given and not config.lesson(config.plan[0]).rollout and "shift" in config.objectives:
        config = replace(config, sigmas=shifted_levels(2, 3.0))
    least = max(config.lesson(update).least for update in config.plan)
    return replace(
        config, plan=tuple(replace(u, batch=least, accumulate=least, times=1) for u in config.plan), lora=lora
    )


def recipe_key(name: str, clip: Sequence[int], lora: int | None) -> str:
    """Of a recipe's prediction."""
    return f"{name} {'x'.join(map(str, clip))} lora {lora or 0}"


def _with(block: Any, own: dict[str, Any], frames: int) -> Any:
    """A block of settings and those within it, told what this machine has."""
    told: dict[str, Any] = {}
    for field in fields(block):
        value = getattr(block, field.name)
        if field.name in own:
            told[field.name] = own[field.name]
        elif field.name == "starts":
            told["starts"] = ((1 + (frames - 1) // 4 - block.window) // 2,)
        elif field.name == "windows":  # of given frames and those to predict: as many as the clip has
            told["windows"] = tuple((g, min(ahead, 1 + (frames - 1) // 4 - max(g, 1))) for g, ahead in value)
        elif is_dataclass(value):
            told[field.name] = _with(value, own, frames)
    return replace(block, **told)


def observe(parts: Assembly, config: Config) -> None:
    """Random observations of the real clips: what computing them costs is measured elsewhere."""
    starts = {s for u in config.plan if OBSERVATION in config.lesson(u).clips for s in config.lesson(u).starts}
    kept = parts.observations
    if kept is None:
        return
    channels, _, height, width = parts.latent_shape
    window = next(block.window for block in config.objectives.values() if hasattr(block, "window"))
    for start in starts:
        for entry in parts.cache.entries:
            if not kept.path(entry["id"], start).exists():
                seen = torch.randn(channels, window, height, width).bfloat16()
                save_tensors(kept.path(entry["id"], start), {"observation": seen}, {})

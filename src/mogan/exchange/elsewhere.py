"""A causal student for programs that make clips chunk by chunk: LightX2V and Self-Forcing's code, FastVideo, ComfyUI.

Each of them samples some kinds of causal students. One that it would sample otherwise than it was trained is refused: clips would
look plausible and be wrong. What their loaders ask for was read in their code, and is transcribed in ``tests/test_elsewhere.py``.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save

from mogan.config import LCM
from mogan.disk.files import read_json, replacing, write_atomically
from mogan.errors import UserError
from mogan.exchange.layouts import original_module, split_leaf
from mogan.exchange.lora_file import check_range
from mogan.exchange.schedulers import grid_shift
from mogan.models import wan
from mogan.models.parts import config_of
from mogan.runs.generator import Generator
from mogan.schedule import shift

PROGRAMS = {"self-forcing": "LightX2V", "fastvideo": "FastVideo", "comfyui": "ComfyUI"}
FOR_COMFYUI = {"config": json.dumps({"transformer": {"causal_ar": True}})}  # by which it knows such a file
UNTRIED = """Tensors and settings are what the program's loader asks for; the program itself was not run here. Programs round differently in
bf16, and the difference grows from chunk to chunk: compare in fp32."""
CLOSE = 0.002  # largest error of a level in a grid of 1000 steps that is only told


def require_sampled_alike(source: Generator, to: str, run: Path) -> None:
    """Refuse a student that a program would sample otherwise than it was trained. Raises UserError."""
    if source.causal is None:
        raise UserError(
            f"{run} trained a student that sees whole clips, and --to {to} is for causal ones: leave it out"
        )
    if (why := next(_misfits(source, to), None)) is not None:
        raise UserError(
            f"{run} trained a student that {why}, and {PROGRAMS[to]} samples none such: leave out --to {to}"
        )


def _misfits(source: Generator, to: str) -> Iterator[str]:
    """What a program cannot be told of a student, in words."""
    how, network = source.causal, config_of(source.folder, "transformer")
    assert how is not None
    assert source.sigmas is not None
    assert network is not None
    policy = how.policy
    latents = wan.latent_shape(source.folder, source.geometry)[1]
    alone = 0 if policy.window is None or policy.sink else policy.window  # whole chunks leave such a window
    common = {
        "is told where its steps end": source.told,
        "takes Euler's steps": source.solver != LCM,
        "goes on from a first frame": source.animates or wan.is_image_to_video(source.folder),
        "is told states": bool(source.states),
        f"makes a first chunk of {how.first} latents, and then {how.rest} at a time": how.first != how.rest,
        "has levels of its own for the first chunk": how.first_sigmas is not None,
        "sees a noised past": bool(how.context_sigma),
        "averages its sink": policy.decay is not None,
        f"sees a window of {policy.window} latents in chunks of {how.rest}": bool(alone % how.rest),
    }
    over = {f"makes {latents} latents in chunks of {how.rest}, the last shorter": bool(latents % how.rest)}
    own = {
        "self-forcing": over | {"numbers what it sees anew": bool(policy.sink) and policy.relative},
        "fastvideo": over
        | {
            "makes chunks of more than 3 latents": how.rest > 3,
            f"has levels far from a grid of 1000 steps, {list(source.sigmas)}": thousandths(source.sigmas)[2] > CLOSE,
        },
        "comfyui": {
            "sees a window of the past": policy.window is not None,
            f"has heads of width {network['attention_head_dim']}": network["attention_head_dim"] != 128,
        },
    }
    yield from (why for why, is_so in (common | own[to]).items() if is_so)


def thousandths(sigmas: tuple[float, ...]) -> tuple[float, list[int], float]:
    """A shift ``k`` and whole numbers ``t`` whose levels ``shift(t / 1000, k)`` come nearest to these, and the largest error.

    That is how training codes name levels: 1000, 750, 500, 250 at shift 5. Of a list that is no shifted uniform grid ``k`` is 1.
    """
    shifts = {grid_shift(sigmas) or 1.0, 1.0}

    def named(k: float) -> tuple[float, list[int], float]:
        steps = [round(1000 * shift(s, 1 / k)) for s in sigmas]  # the inverse of a shift is a shift
        return k, steps, max(abs(shift(t / 1000, k) - s) for t, s in zip(steps, sigmas, strict=True))

    return min((named(k) for k in sorted(shifts, reverse=True)), key=lambda found: round(found[2], 6))


# ---------------------------------------------------------------------------------------------- one file of weights


def save_original(network: Any, out: Path, to: str, dtype: torch.dtype) -> None:
    """Write a transformer under the original Wan code's names: Self-Forcing's ``.pt``, or ``.safetensors`` for ComfyUI."""
    state = network.state_dict()
    check_range(state, dtype)
    front = "model." if to == "self-forcing" else ""  # LightX2V cuts so many letters off
    named = {f"{front}{_original(name)}": tensor.to(dtype).contiguous() for name, tensor in state.items()}
    with replacing(out) as temporary:
        if to == "self-forcing":
            torch.save({"generator_ema": named}, temporary)
        else:
            temporary.write_bytes(save(named, {"format": "pt"} | FOR_COMFYUI))


def _original(name: str) -> str:
    module, leaf = split_leaf(name)
    return ".".join(filter(None, (original_module(module), leaf)))


# ---------------------------------------------------------------------------------------------- FastVideo's folder


def for_fastvideo(folder: Path, source: Generator) -> None:
    """Change what a student's new folder says of itself so that FastVideo opens it; weights stay as they are."""
    how, (k, steps, _) = source.causal, thousandths(source.sigmas or ())
    assert how is not None
    policy = how.policy
    told = {
        "_class_name": "CausalWanTransformer3DModel",
        "num_frames_per_block": how.rest,
        "local_attn_size": -1 if policy.window is None else policy.window,
        "sink_size": policy.sink,
        "rope_cache_policy": "relativistic" if policy.sink and policy.relative else "absolute",
    }
    index = {
        "_class_name": "WanCausalDMDPipeline",
        "transformer": ["diffusers", "CausalWanTransformer3DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    for file, more in ((folder / "transformer" / "config.json", told), (folder / "model_index.json", index)):
        write_atomically(file, json.dumps(read_json(file) | more, indent=2) + "\n")
    FlowMatchEulerDiscreteScheduler(shift=k).save_pretrained(folder / "scheduler")
    levels = {"flow_shift": k, "dmd_denoising_steps": steps, "warp_denoising_step": True}
    write_atomically(folder / "fastvideo.json", json.dumps(levels, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------- how to call them


def usage(source: Generator, to: str, name: str) -> str:
    """For the card: how a program takes what was written as ``name``, as Markdown."""
    return {"self-forcing": _lightx2v, "fastvideo": _fastvideo, "comfyui": _comfyui}[to](source, name)


def _lightx2v(source: Generator, name: str) -> str:
    how, size, sigmas = source.causal, source.geometry, source.sigmas or ()
    assert how is not None
    policy = how.policy
    config = {
        "infer_steps": len(sigmas),
        "target_video_length": size.frames,
        "target_height": size.height,
        "target_width": size.width,
        "text_len": 512,
        "self_attn_1_type": "torch_sdpa",
        "cross_attn_1_type": "torch_sdpa",
        "cross_attn_2_type": "torch_sdpa",
        "sample_guide_scale": 1,
        "sample_shift": thousandths(sigmas)[0],
        "enable_cfg": False,
        "cpu_offload": False,
        "causal_rope_type": "wan_causal_rope",
        "dit_original_ckpt": name,
        "ar_config": {
            "num_frame_per_chunk": how.rest,
            "local_attn_size": -1 if policy.window is None else policy.window,
            "sink_size": policy.sink,
            "denoising_step_list": [round(1000 * s, 3) for s in sigmas],
        },
    }
    return f"""In LightX2V: `python -m lightx2v.infer --model_cls wan2.1_sf --task t2v --model_path WAN --config_json student.json ...`,
with `WAN` the base model in the original code's layout and `student.json`:

```json
{json.dumps(config, indent=2)}
```

Self-Forcing's own code takes the file as `--checkpoint_path {name} --use_ema`."""


def _fastvideo(source: Generator, name: str) -> str:
    size = source.geometry
    return f"""```python
from fastvideo import VideoGenerator

generator = VideoGenerator.from_pretrained("{name}", num_gpus=1, pipeline_config="{name}/fastvideo.json")
generator.generate_video("a prompt", output_path="clips", save_video=True,
                         height={size.height}, width={size.width}, num_frames={size.frames})
```

`fastvideo.json` holds the levels: without it FastVideo takes 1000, 750, 500, 250 at shift 5. Largest error of a level in
FastVideo's grid of 1000 steps: {thousandths(source.sigmas or ())[2]:.1g}. Without a window it makes up to 21 latents."""


def _comfyui(source: Generator, name: str) -> str:
    assert source.causal is not None
    levels = ", ".join(f"{s:.6g}" for s in (*(source.sigmas or ()), 0.0))
    return f"""In ComfyUI: put `{name}` into `models/diffusion_models`, load it as a diffusion model, and sample an
`EmptyARVideoLatent` with `SamplerCustomAdvanced`: sampler `SamplerARVideo` with `num_frame_per_block` {source.causal.rest}, levels by
`ManualSigmas` `{levels}`, guidance 1."""

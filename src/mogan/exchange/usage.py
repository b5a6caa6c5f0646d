"""The lines that open an exported folder, or the command that samples it where no stock pipeline does rightly."""

from mogan.models import wan
from mogan.models.parts import config_of
from mogan.runs.generator import Generator

FOLDER_USAGE = ["from diffusers import WanPipeline\n", 'pipe = WanPipeline.from_pretrained("PATH")']
CONTROLLED_USAGE = [line.replace("WanPipeline", "WanVACEPipeline") for line in FOLDER_USAGE]
CODEC_USAGE = [
    "\npipe.vae_scale_factor_spatial = pipe.vae.config.scale_factor_spatial  # which this pipeline reckons as Wan 2.1's"
]
ANIMATING_USAGE = [line.replace("WanPipeline", "WanImageToVideoPipeline") for line in FOLDER_USAGE]
CAUSAL_USAGE = [
    "# chunk by chunk, which WanPipeline does not: it would sample whole clips, and wrongly\n",
    "mogan sample --model PATH --prompts prompts.txt --out clips",
]
CONTINUING_USAGE = [
    "# from the first frames of captioned clips, which WanPipeline does not give\n",
    "mogan sample --model PATH --first-frames CLIPS --prompts captions.txt --out clips",
]
CONTINUING = f"""```bash
{CONTINUING_USAGE[0]}{CONTINUING_USAGE[1]}
```

It goes on from a first frame that it is given at level 0, in guided steps of Euler. `WanPipeline` gives it none: its clips would look
plausible and be wrong."""
TOLD_USAGE = [line.replace("WanPipeline", "AnyFlowPipeline") for line in FOLDER_USAGE]


def usage_of(source: Generator) -> list[str]:
    """The lines that open the folder of a student."""
    if source.causal:
        return CAUSAL_USAGE
    if source.told:
        return TOLD_USAGE
    if source.continues and source.sigmas:
        return CONTINUING_USAGE
    if source.animates or wan.is_image_to_video(source.folder):
        return ANIMATING_USAGE
    if not wan.has_controls(source.folder):
        return FOLDER_USAGE
    return CONTROLLED_USAGE + (CODEC_USAGE if (config_of(source.folder, "vae") or {}).get("patch_size") else [])

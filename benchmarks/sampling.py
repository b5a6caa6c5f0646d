"""A clip of the lab's student beside one of its teacher: steps alone, and with decoding; seconds of a processor.

python benchmarks/sampling.py
"""

import time

import torch

from mogan.models import attention, wan
from mogan.sampling.sample import encode_each, open_generator
from mogan.sampling.samplers import clips_of, sample_student, sample_teacher

CLIPS = 8
PROMPT = "a red circle moving left"
CPU = torch.device("cpu")


@torch.no_grad()
def seconds(name: str, rounds: int = 3) -> tuple[float, float]:
    """Of the steps and of decoding, a clip, as ``mogan sample`` makes them: the least of some rounds."""
    source = open_generator(name)
    usual = wan.defaults(source.folder)
    dtype = wan.dtype_of("auto", CPU, few_steps=source.sigmas is not None)
    vae, denoiser = wan.load_vae(source.folder, dtype), source.load(dtype).eval()
    texts = encode_each([PROMPT, usual.negative_prompt], source.folder, CPU)
    text, null = (attention.stack_text([texts[p]] * n) for p, n in ((PROMPT, CLIPS), (usual.negative_prompt, 1)))
    shape, seeds = wan.latent_shape(source.folder, source.geometry), list(range(CLIPS))
    found = []
    for _ in range(rounds):
        began = time.process_time()
        if source.sigmas is not None:
            latents = sample_student(denoiser, text, shape, source.sigmas, seeds, source.solver)
        else:
            own = {"steps": usual.steps, "guidance": usual.guidance, "shift": usual.shift, "solver": "unipc"}
            latents = sample_teacher(denoiser, text, null, shape, seeds, **own)
        between = time.process_time()
        for clip in clips_of(vae, latents):
            list(clip)
        found.append(((between - began) / CLIPS, (time.process_time() - between) / CLIPS))
    return min(steps for steps, _ in found), min(decode for _, decode in found)


def main() -> None:
    """Print a row each, and the ratios."""
    torch.set_num_threads(1)
    student, teacher = seconds("lab"), seconds("lab-teacher")
    print("| | steps, s a clip | decoding, s a clip |\n|---|---|---|")
    for name, (steps, decode) in (("student", student), ("teacher", teacher)):
        print(f"| {name} | {steps:.3f} | {decode:.3f} |")
    print(f"\nsteps 1 : {teacher[0] / student[0]:.1f}, with decoding 1 : {sum(teacher) / sum(student):.1f}")


if __name__ == "__main__":
    main()

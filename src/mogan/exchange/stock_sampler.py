"""How a causal student is sampled with diffusers alone: for its model card."""

from mogan.models import wan
from mogan.runs.generator import Generator

# Chunks before are run again with each call, at level 0: what a cache holds, at the price of longer and longer passes.
SAMPLER = """
import torch
from diffusers import AutoencoderKLWan, SkyReelsV2Transformer3DModel, WanPipeline, WanTransformer3DModel
from diffusers.utils import export_to_video
from transformers import AutoTokenizer, UMT5EncoderModel

path, prompt, seed = "PATH", "PROMPT", 0
chunk, sigmas, shape = CHUNK, SIGMAS, SHAPE  # shape: of the clip's latent
with torch.no_grad():
    wan = WanTransformer3DModel.from_pretrained(path, subfolder="transformer")
    names = "patch_size num_attention_heads attention_head_dim in_channels out_channels text_dim freq_dim ffn_dim"
    own = {name: wan.config[name] for name in [*names.split(), "num_layers", "rope_max_seq_len", "eps"]}
    student = SkyReelsV2Transformer3DModel(**own, num_frame_per_block=chunk, inject_sample_info=False).eval()
    student.load_state_dict(wan.state_dict())
    vae = AutoencoderKLWan.from_pretrained(path, subfolder="vae")
    words = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
    reads = UMT5EncoderModel.from_pretrained(path, subfolder="text_encoder")
    pipe = WanPipeline(tokenizer=words, text_encoder=reads, vae=vae, transformer=None, scheduler=None)
    text = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, *shape, generator=generator)
    made = noise[:, :, :0]
    for start in range(0, shape[1], chunk):
        x = noise[:, :, start : start + chunk]
        for sigma, after in zip(sigmas, [*sigmas[1:], 0.0]):
            level = 1000 * torch.tensor([[0.0] * start + [sigma] * chunk])
            seen = torch.cat([made, x], 2)
            velocity = student(seen, level, text, enable_diffusion_forcing=True, return_dict=False)[0][:, :, start:]
            clean = x - sigma * velocity
            x = (1 - after) * clean + after * torch.randn(x.shape, generator=generator) if after else clean
        made = torch.cat([made, x], 2)
    mean, std = (torch.tensor(vae.config[f"latents_{what}"]).view(1, -1, 1, 1, 1) for what in ("mean", "std"))
    video = pipe.video_processor.postprocess_video(vae.decode(made * std + mean).sample)[0]
export_to_video(video, "clip.mp4", fps=FPS)
""".strip()


def stock_sampler(source: Generator) -> list[str]:
    """An entry of a card: ``SkyReelsV2Transformer3DModel``, whose mask sees whole chunks of the past, makes the same clips.

    Nothing for a student that the class is none of: chunks of one latent or of unequal size, frames that leave, a noisy past.
    """
    how, size = source.causal, source.geometry
    if how is None or source.sigmas is None:
        return []
    shape = wan.latent_shape(source.folder, size)
    chunks = how.chunks(shape[1])
    kept = how.policy.window is None or how.policy.window >= shape[1]
    alike = len({*chunks}) == 1 and chunks[0] > 1
    if not (kept and alike) or how.context_sigma or how.first_sigmas or source.states:
        return []
    facts = {"CHUNK": chunks[0], "SIGMAS": [round(s, 6) for s in source.sigmas], "SHAPE": tuple(shape), "FPS": size.fps}
    code = SAMPLER
    for name, value in facts.items():
        code = code.replace(name, str(value))
    said = (
        "The stock class of a causal Wan makes the same clips, slower: chunks of the past are run again with each call."
    )
    return [f"\n## With diffusers alone\n\n{said}\n\n```python\n{code}\n```"]

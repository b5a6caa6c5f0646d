"""Stage 3 of the lab's family: text encoder and transformer, the teacher."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from mogan.disk.files import replacing
from mogan.lab.clips import TRAIN_SEED, rendered_elsewhere, to_video
from mogan.lab.stage import run_stage
from mogan.lab.vae import CHANNELS
from mogan.models.attention import set_attention
from mogan.models.autoencoder import encode_video
from mogan.models.denoiser import Denoiser, compile_blocks
from mogan.models.wan import fast_dtype
from mogan.schedule import add_noise, shift
from mogan.world.scenes import COLOURS, DIRECTIONS, SHAPES, make_scene

TRANSFORMER_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": 64,
    "freq_dim": 128,
    "ffn_dim": 512,
    "num_layers": 6,
    "rope_max_seq_len": 64,
}


def caption_words() -> list[str]:
    """Every word the world can say, and those of the discriminator's fixed prompt."""
    text = "a and the camera pans over at rest moving bouncing falling spinning video with good motion"
    return sorted({*text.split(), *COLOURS, *SHAPES, *DIRECTIONS})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world, ``</s>`` at the end as T5 has it."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *caption_words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder() -> UMT5EncoderModel:
    """A small random UMT5 encoder for :func:`build_tokenizer`."""
    config = UMT5Config(
        vocab_size=3 + len(caption_words()), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return UMT5EncoderModel(config)


def world_latents(vae: AutoencoderKLWan, work: Path, count: int, part: int = 1000) -> Tensor:
    """Latents ``(N, C, F, H, W)`` of the teacher's world, half precision, encoded once and kept in ``work`` in files of ``part`` clips.

    Other processes render while this one encodes. Clip ``i`` is the world's ``i``-th.
    """
    folder, device = work / "latents", next(vae.parameters()).device
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{first:07d}.safetensors" for first in range(0, count, part)]
    missing = [first for first, path in zip(range(0, count, part), paths, strict=True) if not path.is_file()]
    chunks = [range(at, at + 50) for first in missing for at in range(first, first + part, 50)]
    bar = tqdm(total=count, initial=part * (len(paths) - len(missing)), desc="lab latents", mininterval=5)
    vae, found = vae.to(fast_dtype(device)), []
    for chunk, clips in zip(chunks, rendered_elsewhere(chunks, TRAIN_SEED), strict=True):
        with torch.no_grad():
            found.append(encode_video(vae, to_video(clips.to(device))).half().cpu())
        bar.update(len(chunk))
        if chunk.stop % part == 0:
            with replacing(folder / f"{chunk.stop - part:07d}.safetensors") as new:
                save_file({"latents": torch.cat(found)}, new)
            found = []
    return torch.cat([load_file(path)["latents"] for path in paths])[:count]


class _TextToVideo(nn.Module):
    """Transformer and text encoder trained together; afterwards the text encoder is frozen for good."""

    def __init__(self):
        super().__init__()
        self.transformer = set_attention(WanTransformer3DModel(**TRANSFORMER_CONFIG))
        self.text_encoder = build_text_encoder()

    def forward(self, x: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.text_encoder(tokens, mask).last_hidden_state * mask[..., None]
        text = F.pad(hidden, (0, 0, 0, 1))  # the last row is padding, as FoldedPadding expects
        return Denoiser(self.transformer, fast_dtype(x.device)).velocity(x, sigma, text)


def train_teacher(out: Path, work: Path, steps: int, clips: int, batch: int, device: torch.device) -> None:
    """Stage 3: text encoder and transformer by flow matching on the world's latents, prompt dropped one time in ten.

    Half of the levels are shifted as the samplers' are, half uniform: stillness is decided at low noise, where an
    outline that differs from frame to frame is all that is left to see.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_pretrained(out / "teacher" / "vae").to(device)
    latents = world_latents(vae, work, clips).to(device)
    tokenizer = build_tokenizer()
    captions = [make_scene(TRAIN_SEED, i).caption for i in range(clips)]
    tokens = tokenizer([*captions, ""], padding="longest", return_tensors="pt").to(device)
    model = _TextToVideo().to(device)
    if device.type == "cuda":
        compile_blocks([model.transformer], device)

    def loss_of(step: int, share: float) -> Tensor:
        index = torch.randint(len(latents), (batch,), device=device)
        x0 = latents[index].float()
        level = torch.rand(batch, device=device)
        sigma = torch.where(torch.rand(batch, device=device) < 0.5, shift(level, 3.0), level)
        noise = torch.randn_like(x0)
        index = torch.where(torch.rand(batch, device=device) < 0.1, clips, index)  # the last row is the empty prompt
        ids, mask = tokens.input_ids[index], tokens.attention_mask[index]
        velocity = model(add_noise(x0, noise, sigma), sigma, ids, mask)
        return F.mse_loss(velocity, noise - x0)

    run_stage(
        "teacher",
        model,
        loss_of,
        work,
        steps=steps,
        lr=2e-3,
        is_matrix=_hidden_matrix,
        ema_decay=0.998,
        same_each_step=True,
    )
    model.transformer.half().save_pretrained(out / "teacher" / "transformer")
    model.text_encoder.save_pretrained(out / "teacher" / "text_encoder")
    tokenizer.save_pretrained(out / "teacher" / "tokenizer")


def _hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return ".block" in name and parameter.ndim == 2 and "table" not in name and "embed" not in name

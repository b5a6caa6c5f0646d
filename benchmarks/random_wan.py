"""Write a random-weights Wan folder of real configuration files: for checks of memory, time and formats without a download.

python benchmarks/random_wan.py runs/random-1.3b                                   # full depth, 5.7 GB
python benchmarks/random_wan.py runs/random-small --layers 2 --clip 9 64 64 --tiny # narrow too: seconds on a CPU
python benchmarks/random_wan.py runs/random-umt5 --text-encoder-only               # its 24 layers, bf16, 11.4 GB
"""

import argparse
from pathlib import Path

import torch

from mogan.estimate.random_wan import random_text_encoder, random_wan

# Narrow everything but the text's width, which the transformer's config fixes.
TINY = {
    "transformer": {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "text_dim": 64, "freq_dim": 64},
    "vae": {"base_dim": 16},
    "text_encoder": {"d_model": 64, "d_ff": 128, "num_heads": 4, "d_kv": 16},
}


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="wan2.1-t2v-1.3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--text-layers", type=int, default=2)
    parser.add_argument("--clip", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--tiny", action="store_true", help="narrow the networks too")
    parser.add_argument("--bf16", action="store_true", help="half the disk")
    parser.add_argument("--text-encoder-only", action="store_true", help="all of the text encoder in bf16, no more")
    arguments = parser.parse_args()
    if arguments.text_encoder_only:
        random_text_encoder(arguments.folder, arguments.size, changes=TINY["text_encoder"] if arguments.tiny else None)
        print(f"random weights in {arguments.folder}")
        return
    random_wan(
        arguments.folder,
        arguments.size,
        layers=arguments.layers,
        text_layers=arguments.text_layers,
        clip=tuple(arguments.clip) if arguments.clip else None,
        dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
        changes=TINY if arguments.tiny else None,
    )
    print(f"random weights in {arguments.folder}")


if __name__ == "__main__":
    main()

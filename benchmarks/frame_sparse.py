"""What frame-sparse attention costs beside dense and beside dense with a mask, by the number of reference frames.

python benchmarks/frame_sparse.py                                # 21 frames of 256 tokens, a minute or two on one core
python benchmarks/frame_sparse.py --frames 5 --tokens 16         # the lab's size
python benchmarks/frame_sparse.py --tokens 1560 --heads 12       # Wan 1.3B at 480 x 832; on a GPU if there is one, in bf16
"""

import argparse
import time

import torch
import torch.nn.functional as F

from mogan.models.frame_sparse import attend, kept_share, sees


def seconds(call, repeats: int, device: torch.device) -> float:
    """The median of a few calls: processor time, on a GPU the card's own."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            began = time.process_time()
            call()
            times.append(time.process_time() - began)
    return sorted(times[1:])[repeats // 2]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--tokens", type=int, default=256, help="of a frame")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=32, help="of a head; 128 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    dtype, width = (torch.bfloat16, 128) if device.type == "cuda" else (torch.float32, arguments.width)
    shape = (1, arguments.heads, arguments.frames * arguments.tokens, width)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    dense = seconds(lambda: F.scaled_dot_product_attention(query, key, value), arguments.repeats, device)
    print(f"{arguments.frames} frames of {arguments.tokens} tokens, {device.type}, dense {1e3 * dense:.1f} ms\n")
    print("| references | pairs kept | of dense: sparse | with a mask | least |\n|---|---|---|---|---|")
    for count in sorted({1, 2, 3, 5, 7, arguments.frames // 2, arguments.frames - 1} & set(range(1, arguments.frames))):
        mask = sees(arguments.frames, count).to(device)
        mask = mask.repeat_interleave(arguments.tokens, 0).repeat_interleave(arguments.tokens, 1)
        masked = seconds(
            lambda m=mask: F.scaled_dot_product_attention(query, key, value, attn_mask=m), arguments.repeats, device
        )
        ours = seconds(lambda c=count: attend(query, key, value, arguments.frames, c), arguments.repeats, device)
        share = kept_share(arguments.frames, count)
        print(f"| {count} | {share:.0%} | {ours / dense:.2f} | {masked / dense:.2f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()

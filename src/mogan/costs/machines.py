"""What a GPU offers, from its maker's data sheet; what of it training reaches is an assumption, stated here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One GPU and its links.

    Attributes:
        memory: bytes.
        bf16, tf32, fp32: dense floating-point operations per second (never the "with sparsity" figure).
        bandwidth: bytes per second of its memory.
        link: bytes per second to the GPUs of the same node, one direction; ``network``: to other nodes, per GPU.
    """

    name: str
    memory: float
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    link: float
    network: float


T, G = 1e12, 1e9
# Memory is the data sheet's number, as GB of 1e9 bytes. Most cards hold 5 to 6 % more, for that number is of 2^30 bytes; since no
# prediction has been compared with a GPU yet, that stays in reserve. NVLink is quoted as the sum of both directions: half of it here.
# Network: one 400 Gb/s (H100, H200) or 200 Gb/s (A100) adapter per GPU, as in NVIDIA's DGX; 100 Gb/s for the others (assumed).
MACHINES = {
    # NVIDIA H200 data sheet, SXM: 141 GB, 989 TFLOPS BF16 and 495 TF32 dense, 67 FP32, 4.8 TB/s, NVLink 900 GB/s
    "h200": Machine("H200", 141 * G, 989 * T, 495 * T, 67 * T, 4800 * G, 450 * G, 50 * G),
    # NVIDIA H100 data sheet, SXM5: 80 GB, the same cores, 3.35 TB/s, NVLink 900 GB/s
    "h100": Machine("H100", 80 * G, 989 * T, 495 * T, 67 * T, 3350 * G, 450 * G, 50 * G),
    # NVIDIA A100 data sheet, SXM4: 312 TFLOPS BF16, 156 TF32, 19.5 FP32, NVLink 600 GB/s; 2.039 and 1.555 TB/s
    "a100-80": Machine("A100-80", 80 * G, 312 * T, 156 * T, 19.5 * T, 2039 * G, 300 * G, 25 * G),
    "a100-40": Machine("A100-40", 40 * G, 312 * T, 156 * T, 19.5 * T, 1555 * G, 300 * G, 25 * G),
    # NVIDIA L40S data sheet: 48 GB, 362 TFLOPS BF16, 183 TF32, 91.6 FP32, 864 GB/s, PCIe 4.0 x16
    "l40s": Machine("L40S", 48 * G, 362 * T, 183 * T, 91.6 * T, 864 * G, 32 * G, 12.5 * G),
    # NVIDIA Ada GPU architecture white paper, RTX 4090: 24 GB, 165.2 TFLOPS BF16 with FP32 accumulation, 82.6 TF32 and FP32
    "4090": Machine("RTX 4090", 24 * G, 165.2 * T, 82.6 * T, 82.6 * T, 1008 * G, 32 * G, 12.5 * G),
}
GPUS_PER_NODE = 8

# Assumptions, not measurements: what eager PyTorch reaches of the two limits, and what memory it cannot give to tensors.
REACHED_COMPUTE = 0.5  # of the dense peak, in matrix products, convolutions and attention
REACHED_BANDWIDTH = 0.7  # of the memory's bandwidth, in everything else
REACHED_LINK = 0.7  # of a link's bandwidth, in collectives
# bytes per second between a GPU and pinned memory of its host: PCIe 4.0 x16, which all have at least
HOST_LINK = 20 * G
CONTEXT = 1.5 * G  # CUDA context, cuBLAS and cuDNN workspaces
FRAGMENTS = 0.06  # of the memory: blocks the allocator holds and cannot use


def usable(memory: float) -> float:
    """Bytes a GPU of this size has for tensors."""
    return memory * (1 - FRAGMENTS) - CONTEXT

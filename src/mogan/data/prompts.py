"""A checksum that says which list of prompts it is.

The benchmarks' prompts are not part of this package: bring their files, and the checksum tells whether they are the ones
that papers mean.
"""

import hashlib
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# fingerprint -> name. VBench: VBench_full_info.json of Vchitect/VBench 45e79ec, all of it and by dimension.
# VideoJAM-Bench: the list of 128 that goes round as videojam_prompts.txt (its bytes: sha256 0e3c5043f9c09e8f...).
KNOWN = {
    "289b13fd11972b8d2b5b0bbca75aa38ec6f859adedcaff30e4a106588026ea3e": "VBench (944 prompts)",
    "fae9614ddff9ffd7694ce67ef9a6cc018ac19c5ae6f6557a9267ad9b412ed5cb": "VBench motion (72 prompts)",
    "7ab82a14f1a0c9b7e011ac255b3bcc1338e2e034a7e4d9aa9cedfcc79875111a": "VBench temporal flickering (75 prompts)",
    "9e338857dd7323d642270576ad95b1d3ada5f11bc85c6f09bd819d3821f85b28": "VBench overall (93 prompts)",
    "c66adeb092aa506d26e3501a4056206df3f3f8e97e046f51c12fa086f18f2fef": "VBench scene (86 prompts)",
    "3379e0dc6334240920b45e48f805c184617b0c432805ec5f0a32c4bff4e18065": "VideoJAM-Bench (128 prompts)",
}
ASKED_FOR = {"videojam": "VideoJAM-Bench", "vbench_full_info": "VBench"}  # what the name of a file promises


def fingerprint(prompts: Iterable[str]) -> str:
    """SHA-256 of the sorted, different prompts, one per line: equal for equal lists in any order.

    Texts are brought to Unicode's NFC and every run of white space to one space, so that neither an editor nor a file
    system changes it.
    """
    lines = {" ".join(unicodedata.normalize("NFC", prompt).split()) for prompt in prompts}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def about(prompts: Iterable[str]) -> dict[str, Any]:
    """What results say of their prompts: how many different ones, the fingerprint, the benchmark's name if it is one."""
    different = set(prompts)
    found = fingerprint(different)
    return {"count": len(different), "sha256": found, "set": KNOWN.get(found)}


def warn_if_changed(path: Path, prompts: Iterable[str]) -> str | None:
    """A sentence if a file is called like a benchmark and holds other prompts."""
    promised = next((name for word, name in ASKED_FOR.items() if word in path.name.lower()), None)
    told = about(prompts)
    if promised is None or (told["set"] or "").startswith(promised):
        return None
    return (
        f"{path} holds {told['count']} prompts that are not {promised}'s (fingerprint {told['sha256'][:16]}...): do not "
        f"compare with published numbers of {promised}"
    )

"""The second pass over videos: encode the clips that are kept and not there yet."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mogan.data import cache as data
from mogan.data.clips import clips_at, to_video
from mogan.data.listing import Source
from mogan.data.measure import Done, file_sha, in_threads
from mogan.errors import UserError
from mogan.models.defaults import Geometry


def encode(
    sources: list[Source], kept: list[dict], out: Path, geometry: Geometry, encode_video: Callable, workers: int
) -> int:
    """Store the latents of kept clips that are not there yet; returns how many.

    Raises:
        UserError: a video changed while it was read.
    """
    missing: dict[str, list[dict]] = {}
    for entry in kept:
        path = data.clip_path(out, entry["id"])
        if not path.is_file() or path.stat().st_size == 0:  # a disk that lost power leaves names without contents
            missing.setdefault(entry["source"], []).append(entry)
    jobs = [s for s in sources if s.name in missing]
    total = sum(map(len, missing.values()))

    def read(source: Source) -> Iterator[tuple[dict, np.ndarray]]:
        entries = {e["start"]: e for e in missing[source.name]}
        if missing[source.name][0]["sha"] != file_sha(source.path):
            raise UserError("its contents are others")
        for start, frames_FHWC in clips_at(source.path, entries, geometry):
            yield entries.pop(start), frames_FHWC
        if entries:
            raise UserError("it has fewer frames")

    with tqdm(total=total, desc="encode", unit="clip", disable=not total) as bar:
        for source, item in in_threads(jobs, read, workers):
            if isinstance(item, Done):
                if item.error:
                    raise UserError(
                        f"{source.path} changed while it was read ({item.error}): run the same command again"
                    )
                continue
            entry, frames_FHWC = item
            latent = encode_video(to_video(frames_FHWC))[0]
            data.save_latent(out, entry["id"], latent, {"source": source.name, "sha": entry["sha"]})
            bar.update()
    return total

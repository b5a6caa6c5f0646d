"""What would mislead a reader of the numbers, in words."""

from typing import Any

from mogan.data.lists import printable
from mogan.evaluation.clips import System
from mogan.evaluation.motion import interval


def warnings_about(system: System, clips: list[dict[str, Any]], how: dict[str, Any]) -> list[str]:
    """One sentence for each thing about these clips that bends the numbers."""
    good = [clip for clip in clips if "error" not in clip]
    found = []
    failed = len(clips) - len(good)
    if failed:
        found.append(f"{failed} of {len(clips)} clips could not be read and are left out: see failed")
    if system.missing:
        found.append(f"{len(system.missing)} files are listed but not there, such as {printable(system.missing[0])}")
    if system.unlisted:
        found.append(
            f"{len(system.unlisted)} videos are in no list, or in folders below, and were not measured, such as "
            f"{printable(system.unlisted[0])}"
        )
    if system.outside:
        found.append(f"{len(system.outside)} clips lie outside the folder, such as {printable(system.outside[0])}")
    if system.uncaptioned:
        found.append(
            f"{len(system.uncaptioned)} clips have no caption in {system.naming}, such as "
            f"{printable(system.uncaptioned[0])}: their names stand for it"
        )
    if count := how.get("unshared_prompts"):
        found.append(f"{count} prompts are not in every folder: compare clip by clip (mogan report), not these means")
    found += how.get("vbench", {}).get("notes", [])
    found += [how["flow_choice"]] if "flow_choice" in how else []
    found += _about_files(system, clips)
    found += _about_tags(how["fps"]) + _about_lengths(how["frames"]) + _too_short(good)
    if len(how["resolution"]) > 1:
        found.append("clips differ in size: thresholds scale with the shorter side, pixels per frame do not")
    return found + _about_numbers(clips, good)


def about_reference(clips: list[dict[str, Any]], real: list[dict[str, Any]]) -> list[str]:
    """What sets clips and the reference's apart before anything moves: speeds are pixels per frame."""
    unlike = [
        words
        for words, names in (("frame rates", ["fps"]), ("sizes", ["height", "width"]))
        if _of(clips, names) != _of(real, names)
    ]
    what = " and ".join(unlike)
    return [f"the reference's clips have other {what}: distances to it tell of these, too"] if unlike else []


def _of(clips: list[dict[str, Any]], names: list[str]) -> set[tuple[Any, ...]]:
    return {tuple(clip[name] for name in names) for clip in clips if "error" not in clip}


def _about_files(system: System, clips: list[dict[str, Any]]) -> list[str]:
    """What had to be done to files, or is odd about them: each kind once, with the first that has it."""
    seen: dict[str, list[str]] = {}
    for entry, clip in zip(system.clips, clips, strict=True):
        for remark in clip.get("remarks", ()):
            seen.setdefault(remark, []).append(printable(entry.path.name))
    return [f"{len(names)} clips (first {names[0]}) {remark}" for remark, names in seen.items()]


def _about_tags(tags: list[float | None]) -> list[str]:
    found = []
    if None in tags:
        found.append(
            "clips without a frame rate: dynamic degree then compares neighbouring frames, as for 8 frames a second"
        )
    if 10.0 in tags:
        found.append(
            "clips are tagged 10 frames a second, the default of diffusers' export_to_video: if the model made 16, tag "
            "them 16, for dynamic degree depends on it"
        )
    if len(tags) > 1:
        found.append(
            f"frame rates differ ({', '.join(str(t) for t in tags)}): dynamic degree has another rule for each"
        )
    return found


def _about_lengths(lengths: list[int]) -> list[str]:
    return [f"clips differ in length ({lengths[0]} to {lengths[-1]} frames)"] if len(lengths) > 1 else []


def _too_short(good: list[dict[str, Any]]) -> list[str]:
    short = sum(clip["frames"] <= 2 * interval(clip["fps"]) for clip in good)
    told = "dynamic degree keeps one or two frames: of one no clip is dynamic, of two every clip is, as VBench counts"
    return [f"{short} clips are so short that {told}"] if short else []


def _about_numbers(clips: list[dict[str, Any]], good: list[dict[str, Any]]) -> list[str]:
    found = []
    prompts = len({clip["prompt"] for clip in clips})
    if prompts < 2:
        found.append("one prompt only: no interval can be given")
    elif prompts < 20:
        found.append(f"only {prompts} prompts: the intervals are rough and too narrow")
    if len(good) >= 20:
        dynamic = [clip["values"]["dynamic_degree"] for clip in good]
        if sum(dynamic) in (0, len(dynamic)):
            found.append(
                "dynamic degree is the same for every clip and tells nothing more: look at the flow statistics"
            )
    close = [
        clip
        for clip in good
        if clip["pair_scores"] and abs(_deciding(clip) - clip["threshold"]) < 0.1 * clip["threshold"]
    ]
    if len(close) > 0.2 * len(good):
        found.append(
            f"{len(close)} of {len(good)} clips lie within a tenth of dynamic degree's threshold: little flips many"
        )
    seen = [clip["video_features"] for clip in good if "video_features" in clip]
    if seen and len(seen) < 2 * len(seen[0]):
        found.append(
            f"CD-FVD of {len(seen)} clips on {len(seen[0])} features is mostly bias: compare it only with values of as many clips"
        )
    lengths = {clip["frames"] for clip in good}
    if len(lengths) > 1 and any("subject_consistency" in clip["values"] for clip in good):
        found.append(
            "consistency is averaged clip by clip; VBench averages frame by frame, so long clips count more there"
        )
    if sum(bool(clip["values"].get("cuts")) for clip in good):
        found.append("some clips hold a cut, which dominates every number of motion")
    return found


def _deciding(clip: dict[str, Any]) -> float:
    """The pair score that decides: the one ranked at the needed count."""
    scores = sorted(clip["pair_scores"], reverse=True)
    needed = round(4 * (len(scores) + 1) / 16)
    return float(scores[max(needed, 1) - 1])

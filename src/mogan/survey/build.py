"""``mogan survey build``: folders of clips -> a survey folder whose clips bear no trace of who made them."""

import re
import secrets
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random
from shlex import quote
from typing import Annotated

import av
import tyro
from av.bitstream import BitStreamFilterContext

from mogan.data.lists import whole
from mogan.data.stream import open_file, plays_everywhere
from mogan.data.video import Probe, probe, read_video, write_video
from mogan.disk.files import new_folder, refusal, writable_folder
from mogan.errors import UserError
from mogan.evaluation.clips import Entry
from mogan.ranges import at_least
from mogan.survey import checks
from mogan.survey.folder import Clip, Item, Survey, write_survey
from mogan.survey.pairing import Key, named_folders, read_samples, shared_keys
from mogan.survey.statistics import detectable

INTRO = (
    "You will see pairs of short clips, each made by a computer from a text. For each pair say which moves better, "
    "which looks better and which shows the text better, or that there is no difference. It takes about {minutes} "
    "minutes. Your answers are kept under a random number together with the size of your screen; nothing else about "
    "you is kept, except the participant number if a platform sent you here. Taking part is voluntary: you may close "
    "the page at any time, and come back with the same link."
)
SECONDS_PER_PAIR = 25


def build(
    systems: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    out: Path,
    a: str = "",
    b: str = "",
    raters: int = 5,
    per_rater: int = 20,
    common: bool = False,
    title: str = "Which clip is better?",
    completion_code: str = "",
) -> Survey:
    """Pair the clips of two or more systems for a human survey.

    Clips are paired when they have the same prompt and the same number k: from `samples.jsonl` (as `mogan sample`
    writes it), `metadata.jsonl`, `.json`, `.csv` or `.tsv` where there is one, `a.txt` beside `a.mp4`, otherwise from
    names like `a cat runs-0.mp4`. With three systems or more, every two of them are compared. The new folder holds the
    clips under random names, without audio or metadata, practice pairs, attention checks made of your own clips, and
    `survey.json`, which is private.

    Example: mogan survey build --a mogan=out/mogan --b dmd=out/dmd --out survey

    Args:
        systems: Folders of clips, as NAME=FOLDER or FOLDER. The first named is the one that "wins" in the tables.
        out: The survey folder to make; it must not exist.
        a: The first of two systems, instead of a positional folder.
        b: The second of two systems.
        raters: How many people should judge each pair. More prompts beat more raters.
        per_rater: How many pairs one person judges; 20 take about ten minutes.
        common: Use only the pairs that all systems have and that can be shown, instead of stopping when some are missing.
        title: The heading raters see.
        completion_code: What raters get at the end (Prolific's code). Without it every rater gets a code of their own.
    """
    at_least(1, raters=raters, per_rater=per_rater)
    whole(title, "--title")
    if completion_code and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", completion_code):
        raise UserError("--completion-code may hold only letters, digits, - and _ (at most 64).")
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out or remove it.")
    folders = named_folders([*filter(None, (a, b)), *systems])
    samples = {name: read_samples(folder) for name, folder in folders.items()}
    keys = shared_keys(samples, common)
    writable_folder(out.parent)
    with new_folder(out) as work:
        (work / "clips").mkdir()
        survey = _assemble(samples, keys, work / "clips", common)
        survey = replace(
            survey,
            title=title,
            intro=INTRO.format(minutes=_minutes(survey, per_rater)),
            raters=raters,
            per_rater=min(per_rater, len(survey.of_kind("pair"))),
            checks_per_rater=_checks_per_rater(survey, per_rater),
            repeats_per_rater=round(min(per_rater, len(survey.of_kind("pair"))) / 20),
            completion_code=completion_code,
        )
        write_survey(survey, work)
    print(summary(survey, out))
    return survey


class Unplayable(UserError):
    """A clip that raters cannot be shown."""


def _assemble(samples: dict[str, dict[Key, Entry]], keys: list[Key], folder: Path, common: bool) -> Survey:
    clips: dict[tuple[str, Key], Clip] = {}
    broken: dict[Key, str] = {}
    for key in keys:
        for name in samples:
            try:
                clips[name, key] = copy_clip(samples[name][key].path, folder)
            except Unplayable as error:
                broken[key] = str(error)
                break
    if broken and not common:
        more = f" So are {len(broken) - 1} more." if len(broken) > 1 else ""
        raise UserError(f"{next(iter(broken.values()))}{more} Or pass --common to leave such pairs out.")
    for place in [place for place in clips if place[1] in broken]:
        (folder / clips.pop(place).file).unlink()
    keys = [key for key in keys if key not in broken]
    if not keys:
        raise UserError(f"No pair is left. {next(iter(broken.values()))}")
    items = []
    for key in keys:
        seed = next((samples[name][key].seed for name in samples if samples[name][key].seed is not None), None)
        for first, second in combinations(samples, 2):
            items.append(
                Item(
                    secrets.token_hex(6),
                    "pair",
                    key[0],
                    clips[first, key].file,
                    clips[second, key].file,
                    key[1],
                    seed,
                    (first, second),
                )
            )
    made, known = known_pairs({clip.file: key[0] for (_, key), clip in clips.items()}, folder)
    return Survey(
        title="",
        intro="",
        secret=secrets.token_hex(32),
        systems=tuple(samples),
        raters=0,
        per_rater=0,
        checks_per_rater=0,
        repeats_per_rater=0,
        completion_code="",
        clips=tuple(clips.values()) + tuple(made),
        items=tuple(items + known),
        warnings=(*(f"A pair is left out: {why}" for why in broken.values()), *unlike_sets(clips)),
    )


def known_pairs(prompts: dict[str, str], folder: Path) -> tuple[list[Clip], list[Item]]:
    """Write the clips of practice pairs and checks; ``prompts`` maps the opaque names already in ``folder``."""
    generator = Random(secrets.randbits(64))
    names = generator.sample(sorted(prompts), min(len(prompts), 24))
    sources = [checks.Source(name, prompts[name], checks.motion_of(read_video(folder / name)[0])) for name in names]
    clips, items = [], []
    for kind, manner, first, second in checks.choose(sources, generator):
        file = second.file
        if manner != "swapped":
            frames, fps = read_video(folder / first.file)
            assert fps, "copy_clip takes no clip without a rate"
            path = folder / f"{secrets.token_hex(16)}.mp4"
            if manner == "identical":
                clip = copy_clip(folder / first.file, folder)
            else:
                height, width = (side // 2 * 2 for side in frames.shape[1:3])  # of oblong pixels they may be odd
                write_video(path, checks.spoil(frames[:, :height, :width], manner, fps), fps)
                clip = copy_clip(path, folder)
                path.unlink()
            clips.append(clip)
            file = clip.file
        items.append(
            Item(
                secrets.token_hex(6),
                kind,
                first.prompt,
                first.file,
                file,
                manner=manner,
                expect=checks.EXPECT[manner],
                lesson=checks.LESSON[manner],
            )
        )
    return clips, items


def _probed(source: Path) -> Probe:
    try:
        return probe(source)
    except UserError as error:
        raise Unplayable(str(error)) from error


def copy_clip(source: Path, folder: Path) -> Clip:
    """Copy the video stream bit by bit under a random name: no audio, no metadata, no encoder's remarks (SEI).

    Phones play H.264 with 8-bit 4:2:0 and little else, so anything else is ``Unplayable``.

    Raises:
        UserError: the disk is full.
    """
    name = f"{secrets.token_hex(16)}.mp4"
    try:
        with open_file(source) as given:
            if not given.streams.video:
                raise Unplayable(f"{source} holds no video: remove it or write it again.")
            stream = given.streams.video[0]
            codec = stream.codec_context
            if codec is None:
                raise Unplayable(f"{source} is in a codec that FFmpeg here does not know: write it as H.264 yuv420p.")
            if not plays_everywhere(codec):
                raise Unplayable(
                    f"{source} is {codec.name} {codec.pix_fmt}, which phones cannot play: write it as H.264 yuv420p, "
                    "as mogan.data.video.write_video does."
                )
            about = _probed(source)
            if not about.fps:
                raise Unplayable(f"{source} does not say its frame rate: write it again with one.")
            frames = 0
            with av.open(f"file:{folder / name}", "w", options={"movflags": "+faststart"}) as taken:
                out = taken.add_stream_from_template(stream)
                out.metadata.clear()
                strip = BitStreamFilterContext("filter_units=remove_types=6", stream, out)
                for packet in given.demux(stream):
                    for kept in strip.filter(packet if packet.dts is not None else None):
                        kept.stream = out
                        taken.mux(kept)
                        frames += 1
            if frames < 2:
                raise Unplayable(f"{source} has fewer than two frames: sample it again.")
            return Clip(name, about.fps, frames, about.width, about.height)
    except Unplayable:
        (folder / name).unlink(missing_ok=True)
        raise
    except (av.error.FFmpegError, ValueError) as error:
        if full := refusal(error, folder / name):
            raise UserError(full) from error
        (folder / name).unlink(missing_ok=True)
        raise Unplayable(f"{source} cannot be read as a video ({error}): remove it or write it again.") from error


def unlike_sets(clips: dict[tuple[str, Key], Clip]) -> Iterable[str]:
    """What would let a rater tell the systems apart without looking at quality: size, rate or length that differs."""
    for what, measure in {
        "size": lambda clip: f"{clip.width}x{clip.height}",
        "frame rate": lambda clip: f"{clip.fps:g}",
        "number of frames": lambda clip: str(clip.frames),
    }.items():
        seen: dict[str, set[str]] = {}
        for (system, _), clip in clips.items():
            seen.setdefault(system, set()).add(measure(clip))
        if len({frozenset(values) for values in seen.values()}) > 1:
            told = "; ".join(f"{system}: {', '.join(sorted(values))}" for system, values in seen.items())
            yield f"The {what} of the clips differs between systems ({told}); raters may answer that instead."


def _power(points: float) -> str:
    if points > 100:  # all votes one way are a hundred
        return "Such a study is too small to detect any preference: give it more prompts or raters."
    return (
        f"Such a study detects a net preference of about {points:.0f} points (80 % power, 15 % ties, correlation 0.3 within a "
        "prompt)."
    )


def summary(survey: Survey, out: Path) -> str:
    """What was built and what it can find out, in a few lines."""
    pairs = survey.of_kind("pair")
    prompts = len({item.prompt for item in pairs})
    people = -(-len(pairs) * survey.raters // survey.per_rater)
    lines = [
        f"{len(pairs)} pairs of {len(survey.systems)} systems over {prompts} prompts, "
        f"{len(survey.of_kind('practice'))} practice pairs, {len(survey.of_kind('check'))} attention checks -> {out}",
        f"{survey.raters} raters per pair need about {people} people, "
        f"{_minutes(survey, survey.per_rater)} minutes each.",
        _power(100 * detectable(prompts, survey.raters)),
        *(f"Warning: {warning}" for warning in survey.warnings),
    ]
    if not survey.of_kind("check"):
        lines.append("Warning: no attention check could be made of these clips.")
    return "\n".join([*lines, f"Next: mogan survey serve {quote(str(out))}"])


def _checks_per_rater(survey: Survey, per_rater: int) -> int:
    pairs = min(per_rater, len(survey.of_kind("pair")))
    return min(len(survey.of_kind("check")), max(2, round(pairs / 12)))


def _minutes(survey: Survey, per_rater: int) -> int:
    screens = min(per_rater, len(survey.of_kind("pair"))) + _checks_per_rater(survey, per_rater) + 3
    return max(2, round(screens * SECONDS_PER_PAIR / 60))

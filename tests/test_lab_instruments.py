"""The trackers against the world's own truth, on clean and on degraded clips."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from mogan.world.captions import Caption, parse_caption
from mogan.world.instruments import read_instruments
from mogan.world.laws import _broken_bases, chord_speed, lawful_path, physics_residual
from mogan.world.scenes import COLOURS, KINDS, make_scene, render
from mogan.world.tracking import cover, track

CLIPS = 60


def degraded(clip: np.ndarray) -> np.ndarray:
    """Blurred, noisy and paler, as an autoencoder gives it back."""
    rng = np.random.default_rng(0)
    grey = clip.mean(-1, keepdims=True)
    pale = grey + 0.75 * (clip - grey)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.2) for frame in pale])
    return np.clip(np.rint(blurred + rng.normal(0, 3, clip.shape)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module", params=["clean", "degraded"])
def measured(request):
    """Scenes of the motion-rich world with what the instruments read from them."""
    found = []
    for index in range(CLIPS):
        scene = make_scene(7, index, motion="rich")
        clip = render(scene)
        found.append((scene, read_instruments(clip if request.param == "clean" else degraded(clip), scene.caption)))
    return found


def true_centres(scene):
    return scene.sprites[0].centres_F2


def errors(measured, kinds, truth, name):
    return [abs(values[name] - truth(scene)) for scene, values in measured if scene.kind in kinds]


def test_captions_say_what_the_world_meant():
    kinds = set()
    for index in range(80):
        scene = make_scene(3, index)
        said = parse_caption(scene.caption)
        first = scene.sprites[0]
        assert (said.colour, said.shape, said.kind) == (first.colour, first.shape, scene.kind)
        assert said.other_colours == tuple(s.colour for s in scene.sprites[1:])
        kinds.add(said.kind)
    assert kinds == set(KINDS)
    for other in ("a red fox running", "a red circle", "a cat and a blue square falling", ""):
        assert parse_caption(other) is None or other == "a red circle"


def test_net_displacement_is_known_to_a_twentieth_of_a_pixel_per_frame(measured):
    def net(scene):
        path = true_centres(scene)
        return np.linalg.norm(path[-1] - path[0]) / (len(path) - 1)

    gaps = errors(measured, ("linear", "falling", "bouncing"), net, "net")
    assert np.nanmedian(gaps) < 0.01
    assert np.nanmedian(errors(measured, ("rotating",), net, "net")) < 0.05
    assert np.mean(np.isnan(gaps)) < 0.1


def test_path_length_and_wobble_of_true_motion(measured):
    def path(scene):
        return np.linalg.norm(np.diff(true_centres(scene), axis=0), axis=1).mean()

    assert np.nanmedian(errors(measured, ("linear", "falling", "bouncing"), path, "path")) < 0.02
    assert np.nanmedian(errors(measured, ("linear", "falling", "bouncing"), lambda s: 0, "wobble")) < 0.02


def test_a_jump_or_a_stop_is_no_credit_against_wobble():
    """The line nearest to a path that jumps is longer than the path."""
    scene = next(s for s in (make_scene(7, index, motion="rich") for index in range(40)) if s.kind == "linear")
    clip = render(scene)
    jumping = np.concatenate(
        [np.repeat(clip[:1], len(clip) // 2, 0), np.repeat(clip[-1:], len(clip) - len(clip) // 2, 0)]
    )
    assert read_instruments(jumping, scene.caption)["wobble"] == 0


def test_spin_and_pan_are_found(measured):
    def spin(scene):
        angles = scene.sprites[0].angles_F
        return abs(angles[-1] - angles[0]) / (len(angles) - 1)

    assert np.nanmedian(errors(measured, ("rotating",), spin, "spin")) < 0.02
    assert np.nanmedian(errors(measured, ("pan",), lambda s: s.speed, "pan")) < 0.02


def test_speed_tells_moving_from_still_and_matches_the_world(measured):
    assert np.nanmedian(errors(measured, ("linear", "falling", "pan"), lambda s: s.speed, "speed")) < 0.02
    assert np.nanmean([values["still"] for _, values in measured]) == 0
    for index in range(12):
        scene = make_scene(11, index)
        if scene.kind == "still":
            assert read_instruments(degraded(render(scene)), scene.caption)["still"] == 1


def test_colour_shape_direction_and_identity_agree_with_the_caption(measured):
    for name, least in (("colour", 0.93), ("shape", 0.93), ("direction", 0.93), ("identity", 0.85)):
        assert np.nanmean([values[name] for _, values in measured]) > least, name


def test_true_motion_keeps_the_laws_and_shaken_motion_does_not(measured):
    kept = np.nanmedian([values["physics"] for scene, values in measured if scene.kind != "rotating"])
    assert kept < 0.12
    scene = next(scene for scene, _ in measured if scene.kind == "linear" and len(scene.sprites) == 1)
    clip = render(scene)
    steps = np.random.default_rng(0).integers(-2, 3, (len(clip), 2))
    shaken = np.stack([np.roll(frame, tuple(step), (0, 1)) for frame, step in zip(clip, steps, strict=True)])
    calm, wild = read_instruments(clip, scene.caption), read_instruments(shaken, scene.caption)
    assert wild["physics"] > 1 > calm["physics"]
    assert wild["wobble"] > 0.5 > calm["wobble"]


def test_a_pulsing_outline_is_seen_though_nothing_moves():
    scene = next(s for i in range(99) if (s := make_scene(2, i)).kind == "still" and len(s.sprites) == 1)
    clip = render(scene)
    fat = np.stack([cv2.dilate(frame, np.ones((3, 3))) if t % 2 else frame for t, frame in enumerate(clip)])
    calm, pulsing = read_instruments(clip, scene.caption), read_instruments(fat, scene.caption)
    assert pulsing["pulsing"] > 0.1 > calm["pulsing"]
    assert pulsing["net"] < 0.1


def test_another_colour_is_not_taken_for_the_named_one():
    scene = next(s for i in range(99) if (s := make_scene(2, i)).kind == "linear" and len(s.sprites) == 1)
    clip = render(scene)
    for colour in COLOURS:
        share = float((cover(clip, colour) > 0.5).mean())
        assert (share > 0.02) is (colour == scene.sprites[0].colour), colour
    wrong = next(c for c in COLOURS if c != scene.sprites[0].colour)
    values = read_instruments(clip, scene.caption.replace(scene.sprites[0].colour, wrong))
    assert values["colour"] == values["identity"] == 0
    assert np.isnan(values["net"])
    assert np.isnan(values["shape"])


def test_an_empty_picture_measures_nothing_and_breaks_nothing():
    values = read_instruments(np.full((17, 64, 64, 3), 80, np.uint8), "a red circle moving left")
    assert values["colour"] == 0
    assert np.isnan(values["speed"])
    flat = read_instruments(np.full((17, 64, 64, 3), 80, np.uint8), "the camera pans left over a red circle")
    assert flat["pan"] == 0
    assert flat["still"] == 1


def test_a_subject_under_another_is_not_free():
    scene = next(
        s for i in range(300) if len((s := make_scene(4, i, motion="rich")).sprites) == 2 and s.kind == "falling"
    )
    found = track(render(scene), parse_caption(scene.caption))
    gap = np.linalg.norm(scene.sprites[0].centres_F2 - scene.sprites[1].centres_F2, axis=1)
    reach = scene.sprites[0].radius + scene.sprites[1].radius
    assert not found.free_F[gap < 0.5 * reach].any()


@pytest.mark.parametrize("frames", [5, 6, 9, 17])
def test_every_way_to_turn_twice_is_a_way_of_its_own(frames):
    time = np.arange(frames)
    for basis in _broken_bases(frames):
        # continuous lines with turns at half frames: what they span has no column made of rounding errors, which
        # the lawful path of noise would be fitted by
        assert np.allclose(basis.T @ basis, np.eye(4))
        bends = np.abs(np.diff(basis, 2, axis=0)).sum(1) > 1e-9
        assert bends.sum() <= 4  # of 3 and 4 that there are in clips of 5 and 6 frames, of 7 and 15 in longer ones
        line = np.stack([np.ones(frames), time], 1)
        assert np.allclose(basis @ (basis.T @ line), line)


def test_laws_are_fitted_exactly_by_paths_that_obey_them():
    time = np.arange(17.0)
    line = np.stack([3 + 0.7 * time, 40 - 0.2 * time], 1)
    fall = np.stack([np.full(17, 20.0), 5 + 0.1 * time**2], 1)
    bounce = np.stack([30 - np.abs(8.5 - time) * 1.5, 10 + np.abs(time - 5) * 2], 1)
    for path, kind in ((line, "linear"), (line, "pan"), (fall, "falling"), (bounce, "bouncing"), (line, "bouncing")):
        assert physics_residual(path, kind) < 1e-9
        assert np.allclose(lawful_path(path, kind), path)
    assert physics_residual(fall, "linear") > 0.5
    assert physics_residual(bounce, "linear") > 0.5
    assert physics_residual(line, "still") > 1
    assert physics_residual(bounce[:4], "bouncing") < 1e-9


def test_chords_measure_travel_and_not_shimmer():
    time = np.arange(17.0)
    line = np.stack([0.5 * time, np.zeros(17)], 1)
    shimmer = line + np.stack([np.where(time % 2, 0.4, -0.4), np.zeros(17)], 1)
    assert chord_speed(line) == pytest.approx(0.5)
    assert chord_speed(shimmer) == pytest.approx(0.5)
    assert np.isnan(chord_speed(line[:1]))


def test_a_caption_of_another_world_is_refused():
    with pytest.raises(ValueError, match="not a caption"):
        read_instruments(np.zeros((5, 64, 64, 3), np.uint8), "a red fox running")
    assert Caption("red", "circle", "still", None, ()) == parse_caption("a red circle at rest")


def test_things_of_the_world_are_there_all_the_way_and_as_many_as_said(measured):
    travels = [values["travels"] for scene, values in measured if scene.kind != "rotating"]
    assert np.nanmin(travels) == 1
    assert np.mean(np.isnan(travels)) < 0.25  # two things that overlap in every frame
    assert all(np.isnan(values["travels"]) for scene, values in measured if scene.kind == "rotating")
    assert np.mean([values["count"] for _, values in measured]) > 0.95


@pytest.fixture(scope="module")
def crossing():
    """One thing alone that crosses the picture: the scene and its clip."""
    found = (make_scene(2, i, motion="rich") for i in range(300))
    scene = next(s for s in found if s.kind == "linear" and len(s.sprites) == 1 and s.speed > 1.2)
    return scene, render(scene)


def without_subject(scene):
    return render(replace(scene, sprites=()))


def test_a_subject_that_fades_out_and_in_again_does_not_travel(crossing):
    scene, clip = crossing
    empty = without_subject(scene)
    for presence, travels in ((1.0, 1), (0.75, 1), (0.1, 0), (0.0, 0)):
        faded = clip.copy()
        faded[7:10] = np.rint(presence * clip[7:10] + (1 - presence) * empty[7:10]).astype(np.uint8)
        assert read_instruments(faded, scene.caption)["travels"] == travels, presence


def test_a_subject_that_appears_twice_does_not_travel_and_is_counted_twice(crossing):
    scene, clip = crossing
    twice = clip.copy()
    moved = np.roll(clip, 28, axis=1 + int(scene.sprites[0].phrase.endswith(("up", "down"))))
    only = np.abs(moved.astype(int) - np.roll(without_subject(scene), 28, 1)).max(-1) > 40
    twice[only] = moved[only]
    alone, both = read_instruments(clip, scene.caption), read_instruments(twice, scene.caption)
    assert (alone["travels"], alone["count"]) == (1, 1)
    assert (both["travels"], both["count"]) == (0, 0)
    short = clip.copy()
    short[5:7][only[5:7]] = moved[5:7][only[5:7]]
    ghost = read_instruments(short, scene.caption)
    assert (ghost["travels"], ghost["count"]) == (0, 1)


def test_a_subject_behind_another_thing_is_hidden_and_not_gone(crossing):
    scene, clip = crossing
    subject = scene.sprites[0]
    other = next(c for c in COLOURS if c != subject.colour)
    place = np.repeat(subject.centres_F2[12:13], len(clip), 0)
    front = replace(subject, colour=other, shape="square", phrase=" at rest", centres_F2=place, radius=9.0)
    covered = render(replace(scene, sprites=(subject, front)))
    values = read_instruments(covered, f"{scene.caption} and a {other} square at rest")
    assert (values["travels"], values["count"]) == (1, 1)
    assert read_instruments(covered, scene.caption)["count"] == 0

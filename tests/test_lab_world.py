import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mogan.errors import UserError
from mogan.motion.flow import warp
from mogan.world.scenes import COLOURS, KINDS, SHAPES, captions, exact_flow, make_scene, render

scenes = st.builds(make_scene, st.integers(0, 3), st.integers(0, 500), motion=st.sampled_from(["all", "rich"]))
few = settings(max_examples=15, deadline=None)
NOUN = {"still": "at rest", "linear": "moving", "bouncing": "bouncing", "falling": "falling", "rotating": "spinning"}


def of_kind(kind: str, count: int = 4, **how):
    found = (s for i in range(2000) if (s := make_scene(5, i, **how)).kind == kind)
    return [next(found) for _ in range(count)]


def photometric_error(scene, flow):
    """Mean and 99th percentile of |next frame pulled back along flow - this frame| where visible, levels of 255."""
    clip = torch.tensor(render(scene)).permute(0, 3, 1, 2).float()
    _, visible = exact_flow(scene)
    error = (warp(clip[1:], torch.tensor(flow)) - clip[:-1]).abs().mean(1)[torch.tensor(visible)].numpy()
    return error.mean(), np.quantile(error, 0.99)


@given(scenes)
@few
def test_exact_flow_carries_the_next_frame_back_onto_this_one(scene):
    mean, worst = photometric_error(scene, exact_flow(scene)[0])
    assert mean < 2.0
    assert worst < 30.0  # the soft outline of a sprite belongs half to the background


@pytest.mark.parametrize("kind", KINDS[1:])
def test_exact_flow_explains_the_pictures_better_than_no_flow(kind):
    for scene in of_kind(kind, motion="rich"):
        flow, _ = exact_flow(scene)
        assert photometric_error(scene, flow)[0] < 0.5 * photometric_error(scene, np.zeros_like(flow))[0]


@given(st.integers(0, 99), st.integers(0, 99))
@few
def test_a_clip_is_a_function_of_seed_and_index(seed, index):
    one, other = make_scene(seed, index), make_scene(seed, index)
    assert one.caption == other.caption
    np.testing.assert_array_equal(render(one), render(other))
    assert not np.array_equal(render(one), render(make_scene(seed, index + 1)))


@pytest.mark.parametrize("scene", of_kind("still"))
def test_a_still_scene_has_no_flow_and_one_picture(scene):
    flow, visible = exact_flow(scene)
    assert np.abs(flow).max() < 1e-6  # float32 keeps the rounding of x - x
    assert visible.all()
    clip = render(scene)
    assert (clip == clip[:1]).all()


@pytest.mark.parametrize("scene", of_kind("pan"))
def test_a_pan_moves_everything_by_the_camera(scene):
    flow, _ = exact_flow(scene)
    camera = np.diff(scene.camera_F2, axis=0)
    np.testing.assert_allclose(flow, np.broadcast_to(camera[:, :, None, None], flow.shape), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(camera, axis=1), scene.speed, rtol=1e-6)


@given(scenes)
@few
def test_the_caption_names_shape_colour_and_kind_but_not_speed(scene):
    for sprite in scene.sprites:
        assert f"{sprite.colour} {sprite.shape}" in scene.caption
        assert sprite.shape in SHAPES
        assert sprite.colour in COLOURS
    assert NOUN.get(scene.kind, "the camera pans") in scene.caption
    assert not any(c.isdigit() for c in scene.caption)
    assert not {"slowly", "fast", "quickly"} & set(scene.caption.split())


@given(scenes)
@few
def test_sprites_stay_inside_the_picture(scene):
    if scene.kind == "pan":
        return  # there the picture leaves the sprite
    for sprite in scene.sprites:
        assert (sprite.centres_F2 >= sprite.radius).all()
        assert (sprite.centres_F2 <= scene.size - 1 - sprite.radius).all()


@pytest.mark.parametrize("scene", of_kind("falling", motion="rich"))
def test_falling_accelerates_uniformly_from_rest(scene):
    path = scene.sprites[0].centres_F2
    acceleration = np.diff(path, n=2, axis=0)
    np.testing.assert_allclose(acceleration, np.broadcast_to(acceleration[:1], acceleration.shape), atol=1e-9)
    assert acceleration[0, 1] > 0
    assert acceleration[0, 0] == 0
    assert path[1, 1] - path[0, 1] == pytest.approx(acceleration[0, 1] / 2)  # s = a t^2 / 2


@pytest.mark.parametrize("scene", of_kind("linear", motion="rich"))
def test_linear_motion_has_one_velocity(scene):
    step = np.diff(scene.sprites[0].centres_F2, axis=0)
    np.testing.assert_allclose(step, np.broadcast_to(step[:1], step.shape), atol=1e-9)


@pytest.mark.parametrize("scene", of_kind("rotating", motion="rich"))
def test_spinning_turns_evenly_about_a_fixed_centre(scene):
    sprite = scene.sprites[0]
    turn = np.diff(sprite.angles_F)
    np.testing.assert_allclose(turn, turn[0], atol=1e-9)
    assert (sprite.centres_F2 == sprite.centres_F2[0]).all()


@pytest.mark.parametrize("scene", of_kind("bouncing", motion="rich"))
def test_bouncing_keeps_its_speed_between_walls(scene):
    step = np.abs(np.diff(scene.sprites[0].centres_F2, axis=0))
    usual = np.median(step, axis=0)
    assert (np.isclose(step, usual, atol=1e-6).mean(0) > 0.6).all()
    assert (step <= usual + 1e-6).all()  # a reflection can only shorten a step


def test_rich_clips_all_move_and_many_clips_do_not():
    rich = [make_scene(1, i, motion="rich").speed for i in range(200)]
    everything = [make_scene(1, i).speed for i in range(200)]
    assert min(rich) >= 0.7
    assert np.mean(np.array(everything) < 0.7) > 0.5


def test_a_larger_picture_shows_the_same_kind_of_scene():
    scene = make_scene(0, 3, motion="rich", frames=33, size=96)
    assert render(scene).shape == (33, 96, 96, 3)
    assert exact_flow(scene)[0].shape == (32, 2, 96, 96)


def test_unknown_motion_is_refused():
    with pytest.raises(ValueError, match="all, rich"):
        make_scene(0, 0, motion="wild")


def test_captions_are_different_and_in_the_scenes_order():
    found, scenes = captions(12, 40, motion="rich")
    said = [make_scene(12, i, motion="rich").caption for i in range(scenes)]
    assert found == list(dict.fromkeys(said))
    assert len(found) == 40
    assert said[-1] not in said[:-1]  # no scene more than is needed


def test_more_captions_than_there_are_is_one_sentence(monkeypatch):
    monkeypatch.setattr("mogan.world.scenes.make_scene", lambda *_, **__: make_scene(0, 0))
    assert captions(0, 1) == ([make_scene(0, 0).caption], 1)
    with pytest.raises(UserError, match="fewer than 2 captions"):
        captions(0, 2)

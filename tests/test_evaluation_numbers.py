"""Warping error, consistency, totals, distributions, TAP-Vid, intervals: known answers."""

import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mogan.errors import UserError
from mogan.evaluation.aggregate import QUALITY, SEMANTIC, vbench_totals
from mogan.evaluation.appearance import (
    aesthetic_score,
    consistency,
    consistency_score,
    contrast,
    frame_features,
    musiq_size,
    saturation,
)
from mogan.evaluation.distribution import (
    Moments,
    frechet,
    fvmd,
    fvmd_histograms,
    jedi,
    polynomial_mmd,
    tap_vid,
    trajan_occluded,
)
from mogan.evaluation.flow_statistics import (
    Tracks,
    camera_split,
    occluded,
    per_eighth,
    round_trip,
    summarise,
    trajectory_smoothness,
    warping_error,
)
from mogan.evaluation.statistics import (
    RESAMPLES,
    cluster_draws,
    joint_draws,
    mean_interval,
    wasserstein,
    wasserstein_interval,
)
from mogan.world.scenes import exact_flow, make_scene

# ---------------------------------------------------------------- warping error, W1 to W4


def constant(u, v, h=48, w=128):
    return np.stack([np.full((h, w), u, np.float32), np.full((h, w), v, np.float32)])


def test_a_still_clip_warps_onto_itself():
    frame = np.random.default_rng(0).integers(0, 256, (48, 128, 3), dtype=np.uint8)
    still = constant(0, 0)
    assert warping_error(frame, frame, still, occluded(still, still)) == 0.0


def test_an_exact_flow_leaves_no_error_inside():
    wide = np.random.default_rng(0).integers(0, 256, (48, 160, 3), dtype=np.uint8)
    first, second = wide[:, 5:133], wide[:, :128]  # moves five pixels to the right
    there, back = constant(5, 0), constant(-5, 0)
    hidden = occluded(there, back)
    assert not hidden.any()
    hidden[:, -5:] = True  # left the picture
    assert warping_error(first, second, there, hidden) < 1e-12


@pytest.mark.parametrize("k", [1, 4, 8])
def test_no_flow_on_a_moving_cosine_leaves_its_closed_form(k):
    x = np.arange(128)
    rows = [127.5 + 100 * np.cos(2 * np.pi * (x - k * t) / 64) for t in (0, 1)]
    first, second = (np.repeat(np.repeat(row[None, :, None], 48, 0), 3, 2).astype(np.float32) for row in rows)
    still = constant(0, 0)
    hidden = occluded(still, still)
    assert not hidden.any()
    expected = 2 * 100**2 * np.sin(np.pi * k / 64) ** 2 / 255**2
    assert warping_error(first, second, still, hidden) == pytest.approx(expected, rel=1e-4)


def test_with_nothing_visible_the_warping_error_is_zero():
    frame = np.zeros((48, 128, 3), np.uint8)
    assert warping_error(frame, frame + 255, constant(0, 0), np.ones((48, 128), bool)) == 0.0


def test_motion_that_does_not_return_and_motion_boundaries_are_occluded():
    assert occluded(constant(3, 0), constant(3, 0)).all()
    half = constant(0, 0)
    half[0, :, 64:] = 4
    hidden = occluded(half, -half)
    assert hidden[:, 63].all()
    assert not hidden[:, :60].any()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("component", [0, 1])
def test_a_motion_boundary_is_the_last_pixel_before_either_component_jumps(axis, component):
    half = constant(0, 0, 64, 64)
    after = (component, slice(32, None)) if axis == 0 else (component, slice(None), slice(32, None))
    half[after] = 4
    hidden = occluded(half, -half)
    assert hidden.all(1 - axis).nonzero()[0].tolist() == [31]
    assert hidden.sum() == 64


def test_round_trip_is_zero_for_flow_that_returns():
    assert round_trip(constant(3, 1), constant(-3, -1)) == pytest.approx(0, abs=1e-6)
    assert round_trip(constant(3, 4), constant(0, 0)) == pytest.approx(5)


# ---------------------------------------------------------------- flow statistics


def test_summary_of_a_field_and_its_unit():
    field = constant(0, 0, 64, 64)
    field[0, :8] = 3.0
    found = summarise(field)
    assert (found.mean, found.median, found.moving) == (pytest.approx(0.375), 0.0, 0.125)
    assert found.top5 == 3.0
    # at 480 lines and 16 frames a second VBench's line of 11.25 px per two frames is 6.0
    assert per_eighth(5.625, 16, 480) == pytest.approx(6.0)
    assert per_eighth(6.0, None, 256) == pytest.approx(6.0)


def test_a_pan_is_the_camera_and_a_small_thing_is_not():
    field = constant(2.0, -1.0, 64, 96)
    field[:, 16:36, 30:50] = 0.0
    found = camera_split(field)
    assert found.camera == pytest.approx(np.hypot(2, 1), abs=0.05)
    assert found.rest_top5 == pytest.approx(np.hypot(2, 1), abs=0.05)
    assert found.rest == pytest.approx(np.hypot(2, 1) * 400 / (64 * 96), abs=0.02)
    still = camera_split(constant(0, 0, 64, 96))
    assert (still.camera, still.rest) == (pytest.approx(0, abs=1e-4), pytest.approx(0, abs=1e-4))


@pytest.mark.parametrize("seed", range(8))
def test_flow_that_nothing_follows_has_no_camera(seed):
    """A homography through four of its points sends others anywhere."""
    field = np.random.default_rng(seed).normal(scale=10, size=(2, 64, 64)).astype(np.float32)
    found, whole = camera_split(field), summarise(field)
    assert (found.camera, found.rest, found.rest_top5) == (0, whole.mean, whole.top5)


@pytest.mark.parametrize("error", [0.25, 0.6, 1.5])
def test_a_pan_is_the_camera_with_errors_of_flow_too(error):
    """RANSAC's own tolerance, under a pixel, would find too few that follow."""
    rng = np.random.default_rng(0)
    smooth = np.stack([cv2.GaussianBlur(rng.normal(size=(256, 448)), (0, 0), 8) for _ in range(2)])
    field = constant(11.0, -5.7, 256, 448) + (error * smooth / smooth.std()).astype(np.float32)
    assert camera_split(field).camera == pytest.approx(12.4, rel=0.25)


def test_a_zoom_is_the_camera():
    y, x = np.mgrid[:64, :96].astype(np.float32)
    found = camera_split(0.1 * np.stack([x - 48, y - 32]))
    assert found.camera == pytest.approx(0.1 * np.hypot(x - 48, y - 32).mean(), rel=0.01)
    assert found.rest_top5 < 0.05


def test_a_homography_that_sends_what_it_does_not_explain_far_away_is_no_camera():
    rng = np.random.default_rng(0)
    field = rng.normal(size=(2, 64, 96)).astype(np.float32)
    field[:, :, :40] = 0
    field[0, :, :40] = 0.3 * np.arange(
        40
    )  # a stretch that would move the other edge by 28 px, where flow is 12 at most
    assert camera_split(field).camera == 0


def test_points_ride_on_constant_flow_without_acceleration_and_jitter_is_seen():
    tracks = Tracks((64, 96))
    for _ in range(8):
        tracks.follow(constant(1.5, 0.5, 64, 96))
    found = tracks.array
    assert found.shape == (9, 144, 2)
    assert np.allclose(found[-1] - found[0], [12, 4], atol=1e-4)
    smooth = trajectory_smoothness(found, 16, 64)
    assert smooth.acceleration == pytest.approx(0, abs=1e-3)
    shaken = found + np.random.default_rng(0).normal(0, 0.5, found.shape)
    rough = trajectory_smoothness(shaken, 16, 64)
    assert rough.acceleration > 1
    assert rough.log_jerk < smooth.log_jerk
    parabola = np.zeros((9, 1, 2))
    parabola[:, 0, 0] = 0.5 * 4 * np.arange(9) ** 2  # 4 px per frame^2
    assert trajectory_smoothness(parabola, 16, 64).acceleration == pytest.approx(4 * 256 / 64)
    assert trajectory_smoothness(parabola, 16, 64).jerk == pytest.approx(0, abs=1e-9)
    assert np.isnan(trajectory_smoothness(np.zeros((9, 4, 2)), 16, 64).jerk)
    trembling = 0.04 * (np.arange(9) % 2)[:, None, None] * np.ones(2)  # 0.45 px in all
    assert trajectory_smoothness(np.concatenate([parabola, trembling], 1), 16, 64) == trajectory_smoothness(
        parabola, 16, 64
    )


def test_log_dimensionless_jerk_of_a_cubic_path():
    cubic = np.zeros((9, 1, 2))
    cubic[:, 0, 1] = 0.1 * np.arange(9) ** 3
    peak, jerk, duration = 0.1 * (8**3 - 7**3) * 16, 0.6 * 16**3, 8 / 16  # px/s, px/s^3, s; six differences of jerk
    expected = -np.log(duration**3 / peak**2 * jerk**2 * 6 / 16)
    assert trajectory_smoothness(cubic, 16, 64).log_jerk == pytest.approx(expected)
    assert trajectory_smoothness(cubic, 16, 64).jerk == pytest.approx(jerk / 64)


# ---------------------------------------------------------------- consistency and preprocessing, C1 to C7


def test_consistency_of_equal_orthogonal_and_opposite_features():
    one = np.array([3.0, 4.0])
    assert consistency(np.stack([one] * 4)) == pytest.approx([1.0] * 3)
    assert consistency(np.eye(4)) == [0.0] * 3
    assert consistency(np.stack([one, -one, one])) == pytest.approx([0.0, 0.5])


@pytest.mark.parametrize("r", [0.0, 0.3, 0.9])
def test_consistency_of_alternating_features(r):
    a, b = np.array([1.0, 0.0]), np.array([r, np.sqrt(1 - r * r)])
    assert np.mean(consistency(np.stack([a, b, a]))) == pytest.approx((3 * r + 1) / 4)


def test_long_clips_count_more_by_frame_than_by_clip():
    assert consistency_score([[1.0] * 9, [0.0]]) == pytest.approx(0.9)
    assert consistency_score([[1.0] * 9, [0.0]], per_frame=False) == pytest.approx(0.5)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        consistency(np.array([[1.0, np.nan], [0, 1]]))
    with pytest.raises(ValueError, match="not finite"):
        Moments().add(np.full((3, 2), np.inf))
    with pytest.raises(ValueError, match="not finite"):
        jedi(np.full((3, 2), np.nan), np.ones((3, 2)))


def test_sizes_and_indices_of_the_preprocessing():
    assert aesthetic_score(np.ones(768), np.zeros(768), 5.0) == 0.5
    sizes = {
        (480, 832): (295, 512), (720, 1280): (288, 512), (768, 1360): (289, 512), (480, 720): (341, 512),
        (1080, 1920): (288, 512), (512, 512): (512, 512),
    }  # fmt: skip
    assert {size: musiq_size(*size) for size in sizes} == sizes


def test_saturation_of_grey_and_of_pure_colour():
    assert saturation([np.full((4, 4, 3), 90, np.uint8)]) == 0.0
    assert saturation([np.array([[[200, 0, 0], [0, 0, 0]]], np.uint8)]) == 0.5


def test_contrast_weighs_colours_as_luma_does():
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        frame = np.zeros((4, 4, 3), np.uint8)
        frame[:2, :, channel] = 255  # half at the weight, half at 0
        assert contrast([frame]) == pytest.approx(weight / 2, rel=1e-5)


def test_features_of_a_look_with_known_values():
    flat = frame_features(np.full((48, 48, 3), (255, 0, 51), np.uint8))
    assert flat[:27].reshape(9, 3) == pytest.approx(np.tile([1.0, 0.0, 0.2], (9, 1)), abs=1e-6)
    assert flat[27:29] == pytest.approx([1.0, 0.0])
    assert flat[29:32] == pytest.approx([-4.0] * 3, abs=1e-3)  # no detail: the logarithm of its floor
    assert flat[32:].sum() == pytest.approx(0, abs=1e-3)
    dark = frame_features(np.full((8, 8, 3), (100, 0, 0), np.uint8))
    assert dark[27:29] == pytest.approx([1.0, 0.0])  # dark red is red
    noise = frame_features(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    assert noise[32:].sum() == pytest.approx(1, abs=1e-3)
    y, x = np.mgrid[:32, :32]
    oblique = np.repeat((3 * x + 2 * y)[..., None], 3, 2).astype(np.uint8)  # 34 degrees: 45 is nearer than 0
    assert frame_features(oblique)[33] > 0.9
    rising = np.repeat(np.linspace(0, 255, 48).astype(np.uint8)[None, :, None], 48, 0).repeat(3, 2)
    assert frame_features(rising)[32:].argmax() == 0  # brighter to the right
    assert frame_features(rising.transpose(1, 0, 2))[32:].argmax() == 2  # brighter downwards


# ---------------------------------------------------------------- VBench totals, A1 to A5

EVERY = {**QUALITY, **SEMANTIC}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({name: high for name, (_, high, _) in EVERY.items()}, (1, 1, 1)),
        (dict.fromkeys(EVERY, 1.0), (1.0013194, 1.6912551, 1.1393066)),
        (dict.fromkeys(EVERY, 0.5), (0.1433609, 0.8454519, 0.2837791)),
        ({"motion_smoothness": 0.98, "dynamic_degree": 0.9}, (-0.1281483, -0.0003514, -0.1025889)),
        ({}, (-0.7145977, -0.0003514, -0.5717485)),
    ],
)
def test_totals_have_the_golden_values(raw, expected):
    found = vbench_totals(raw, fill_missing=True)
    assert (found.quality, found.semantic, found.total) == pytest.approx(expected, abs=6e-8)


def test_partial_totals_are_refused_with_what_is_missing():
    with pytest.raises(UserError, match="scene"):
        vbench_totals({name: 1.0 for name in EVERY if name != "scene"})


# ---------------------------------------------------------------- Frechet and MMD, P1 to P8


def test_frechet_of_equal_sets_is_zero_and_of_a_shift_its_square():
    features = np.random.default_rng(0).normal(0, 3, (200, 6))
    one = Moments().add(features)
    trace = np.trace(one.covariance(unbiased=False))
    assert abs(frechet(one, one)) < 1e-6 * trace
    shift = np.arange(6.0)
    assert frechet(one, Moments().add(features + shift)) == pytest.approx(shift @ shift, rel=1e-6)


def test_the_two_covariance_conventions_differ_where_they_must():
    one, two = Moments().add(np.array([[-1.0], [1.0]])), Moments().add(np.array([[-2.0], [2.0]]))
    assert frechet(one, two) == pytest.approx(1.0)
    assert frechet(one, two, unbiased=True) == pytest.approx(2.0)


def test_moments_do_not_depend_on_order_or_batches():
    features = np.random.default_rng(0).normal(5, 1, (60, 4))
    whole = Moments().add(features)
    parts = Moments()
    for chunk in np.array_split(features[::-1], 7):
        parts.add(chunk)
    assert np.allclose(whole.mean, parts.mean, atol=1e-12)
    assert np.allclose(whole.covariance(unbiased=True), np.cov(features.T), atol=1e-12)
    assert np.allclose(whole.covariance(unbiased=True), parts.covariance(unbiased=True), atol=1e-12)


def test_frechet_agrees_with_the_closed_form_of_commuting_covariances():
    rng = np.random.default_rng(1)
    base = rng.normal(size=(500, 3))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base.T, bias=True))).T
    scales = np.array([0.5, 2.0, 3.0])
    found = frechet(Moments().add(base), Moments().add(base * scales))
    assert found == pytest.approx(((1 - scales) ** 2).sum(), rel=1e-9)


def test_jedi_of_known_features():
    assert jedi(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])) == pytest.approx(50.0)
    x = np.random.default_rng(0).normal(size=(20, 5))
    assert jedi(x, -x) == pytest.approx(0.0, abs=1e-12)
    assert polynomial_mmd(x, -x, degree=3) > 0


# ---------------------------------------------------------------- FVMD, V1 to V5


def drifting(speed: float, clips: int = 1) -> np.ndarray:
    tracks = np.zeros((clips, 16, 400, 2))
    tracks[..., 1] = speed * np.arange(16)[:, None]
    return tracks


def test_histograms_of_still_points_are_empty():
    found = fvmd_histograms(drifting(0))
    assert found.shape == (1, 2, 4, 4, 4, 8)
    assert found[0, 0].size == found[0, 1].size == 512
    assert not found.any()


@pytest.mark.parametrize(
    ("speed", "held"),
    [(0.5, 12.5), (1, 12.5), (2, 25), (3, 25), (7, 37.5), (15, 50), (31, 62.5), (63, 75), (127, 87.5), (200, 100)],
)
def test_constant_speed_fills_one_bin_of_velocity_and_none_of_acceleration(speed, held):
    velocity, acceleration = fvmd_histograms(drifting(speed))[0]
    assert not acceleration.any()
    assert (np.count_nonzero(velocity, axis=-1) == 1).all()
    assert np.allclose(velocity[1:].sum(-1), held)
    assert np.allclose(velocity[0].sum(-1), 0.75 * held)


def test_a_cube_of_fvmd_is_a_corner_of_the_picture():
    tracks = np.zeros((1, 16, 20, 20, 2))
    tracks[:, :, :5, :5, 1] = np.arange(16)[None, :, None, None]
    found = fvmd_histograms(tracks.reshape(1, 16, 400, 2)).sum(-1)[0, 0]
    assert (found[:, 0, 0] > 0).all()
    assert found.sum() == pytest.approx(found[:, 0, 0].sum())


def test_a_motion_straight_up_is_in_the_last_bin():
    """Its angle is exactly pi, past the last edge."""
    velocity, _ = fvmd_histograms(drifting(-2))[0]
    assert velocity[..., 7].all()
    assert not velocity[..., :7].any()


def test_fvmd_of_equal_sets_is_zero_and_slightly_negative_in_the_reference():
    tracks = np.cumsum(np.random.default_rng(0).normal(size=(6, 16, 400, 2)), axis=1)
    features = fvmd_histograms(tracks)[:, :, :1, :2]
    assert fvmd(features, features) == pytest.approx(0, abs=1e-9 * np.square(features).sum())
    still = fvmd_histograms(drifting(0, clips=3))[:, :, :1]
    assert still[0].size == 256
    assert fvmd(still, still, reference=True) == pytest.approx(-2 * 1e-5 * 256, abs=1e-9)


# ---------------------------------------------------------------- TAP-Vid, T1 to T5


def test_tap_vid_of_known_errors():
    rng = np.random.default_rng(0)
    true = rng.uniform(0, 256, (30, 12, 2))
    shown, hidden = np.zeros((30, 12), bool), np.ones((30, 12), bool)
    perfect = tap_vid(true, shown, true, shown)
    assert (perfect.average_jaccard, perfect.occlusion_accuracy, perfect.position_accuracy) == (1, 1, 1)
    # off by d everywhere: a threshold above d gives Jaccard 1, one at or below gives 0
    assert tap_vid(true, shown, true + np.array([3, 0]), shown).average_jaccard == pytest.approx(0.6)
    whole = np.round(true)
    assert tap_vid(whole, shown, whole + np.array([4, 0]), shown).average_jaccard == pytest.approx(0.4)
    some = rng.random((30, 12)) < 0.3
    found = tap_vid(true, some, true, hidden)
    assert found.average_jaccard == 0
    assert found.occlusion_accuracy == pytest.approx(some.mean())


def test_tap_vid_leaves_out_the_frames_that_do_not_count():
    true, shown = np.zeros((1, 2, 2)), np.zeros((1, 2), bool)
    off, scored = np.array([[[0.0, 0], [100, 0]]]), np.array([[False, True]])
    assert tap_vid(true, shown, off, shown).position_accuracy == 0.5
    found = tap_vid(true, shown, off, shown, scored_NF=scored)
    assert (found.average_jaccard, found.position_accuracy, found.occlusion_accuracy) == (0, 0, 1)
    found = tap_vid(true, shown, off, scored, scored_NF=~scored)
    assert (found.average_jaccard, found.occlusion_accuracy) == (1, 1)  # nor is the other frame a false positive
    assert tap_vid(true, shown, off, shown, scored_NF=~scored).average_jaccard == 1


def test_trajans_notebook_is_stricter_on_larger_videos_and_skips_frame_0():
    rng = np.random.default_rng(0)
    true, shown = rng.uniform(0, 256, (30, 12, 2)), np.zeros((30, 12), bool)
    off = true + np.array([3, 0])  # 3 px at 256, 5.6 px at 480
    assert tap_vid(true, shown, off, shown).average_jaccard == pytest.approx(0.6)
    assert tap_vid(true, shown, off, shown, notebook=(256, 256)).average_jaccard == pytest.approx(0.6)
    assert tap_vid(true, shown, off, shown, notebook=(256, 480)).average_jaccard == pytest.approx(0.4)
    assert tap_vid(true, shown, off, shown, notebook=(480, 256)).average_jaccard == pytest.approx(0.6)  # moved along x
    start = true.copy()
    start[:, 0] += 100
    assert tap_vid(true, shown, start, shown, notebook=(256, 256)).average_jaccard == 1
    assert tap_vid(true, shown, start, shown).average_jaccard == pytest.approx(11 / 13)


def test_stillness_scores_higher_the_less_there_is_to_follow_on_exact_tracks():
    here = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "still_tracks.py"))
    scenes = [make_scene(31, i) for i in range(60)]
    for scene in scenes[:8]:
        tracks, _ = here["exact_tracks"](scene)
        flow = exact_flow(scene)[0][0]
        x, y = tracks[:, 0].astype(int).T
        np.testing.assert_allclose(tracks[:, 1] - tracks[:, 0], flow[:, y, x].T, atol=1e-5)
    still, slow, fast = (
        [here["of_stillness"](s) for s in scenes if low <= s.speed < high]
        for low, high in ((0, 1e-6), (1e-6, 0.15), (0.7, 9))
    )
    assert {(s.average_jaccard, s.occlusion_accuracy) for s in still} == {(1.0, 1.0)}
    for name in ("average_jaccard", "occlusion_accuracy"):
        assert np.mean([getattr(s, name) for s in fast]) < np.mean([getattr(s, name) for s in slow]) < 1


def test_trajans_two_rules_of_occlusion_are_no_complements():
    surely, hardly = 5.0, -5.0
    assert trajan_occluded(surely, surely) == trajan_occluded(surely, surely, notebook=True) == False  # noqa: E712
    assert trajan_occluded(hardly, hardly) == trajan_occluded(hardly, hardly, notebook=True) == True  # noqa: E712
    assert trajan_occluded(surely, hardly)
    assert not trajan_occluded(surely, hardly, notebook=True)


# ---------------------------------------------------------------- intervals


def test_interval_ignores_copies_of_an_answer_but_not_more_prompts():
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    prompts = list(range(40))
    once = mean_interval(values, prompts)
    five = mean_interval(np.repeat(values, 5), np.repeat(prompts, 5).tolist())
    assert five.ci95 == pytest.approx(once.ci95)
    assert (once.n, five.n) == (40, 200)
    naive = 1.96 * values.std(ddof=1) / np.sqrt(40)
    assert (once.ci95[1] - once.ci95[0]) / 2 == pytest.approx(naive, rel=0.15)
    assert mean_interval(values, prompts) == once


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        offsets = np.repeat(rng.normal(size=30), 4)
        found = mean_interval(offsets + rng.normal(size=120), np.repeat(np.arange(30), 4).tolist())
        hits += found.ci95[0] <= 0 <= found.ci95[1]
    assert hits >= 86


@pytest.mark.parametrize("value", [16 / 17, 0.1, 2 / 3])
@pytest.mark.parametrize("count", [2, 3, 7, 10, 24])
def test_an_interval_holds_its_mean_where_all_values_are_alike(value, count):
    found = mean_interval([value] * count, range(count))
    assert found.ci95[0] <= found.mean <= found.ci95[1]


def test_nothing_is_claimed_from_one_prompt_or_from_nothing():
    assert mean_interval([1.0, 3.0], ["a", "a"]).ci95 is None
    assert np.isnan(mean_interval([float("nan")], ["a"]).mean)
    assert mean_interval([1.0, float("nan"), 2.0], ["a", "b", "c"]).n == 2
    assert wasserstein_interval([1.0, float("inf"), float("nan"), 2.0], [0.0], list("abcd")).n == 2
    assert mean_interval([1.0, 3.0], ["a", "b"], ["one seed"] * 2).ci95 is None


def test_two_factors_widen_the_interval():
    rng = np.random.default_rng(0)
    runs = np.repeat([0.0, 1.0, 2.0], 40)
    values = runs + rng.normal(0, 0.1, 120)
    prompts = list(range(40)) * 3
    one, two = mean_interval(values, prompts), mean_interval(values, prompts, runs.tolist())
    assert two.ci95[1] - two.ci95[0] > 3 * (one.ci95[1] - one.ci95[0])


def test_factors_of_as_many_levels_are_drawn_independently():
    one, two = cluster_draws([range(8), range(8)], RESAMPLES)
    assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.03
    assert np.array_equal(joint_draws([range(8), range(8)], RESAMPLES), one * two)


def test_intervals_are_those_of_resampled_sets_written_out():
    rng = np.random.default_rng(3)
    values = rng.normal(size=60)
    values[7] = np.nan
    prompts, runs = [i // 2 % 10 for i in range(60)], [i // 20 for i in range(60)]
    kept = np.isfinite(values)
    factors = [np.array(prompts)[kept].tolist(), np.array(runs)[kept].tolist()]
    draws = joint_draws(factors, RESAMPLES).astype(int)
    assert draws.shape == (RESAMPLES, 59)
    assert draws.sum(1).mean() == pytest.approx(59, rel=0.01)
    sets = [np.repeat(values[kept], draw) for draw in draws]
    assert mean_interval(values, prompts, runs).ci95 == pytest.approx(
        np.quantile([x.mean() for x in sets if x.size], (0.025, 0.975))
    )
    reference = rng.normal(0.5, 2, size=31)
    sets = [np.repeat(values[kept], draw) for draw in joint_draws(factors, RESAMPLES // 4).astype(int)]
    drawn = np.array([wasserstein(x, reference) for x in sets if x.size])
    moved = drawn + wasserstein(values[kept], reference) - np.median(drawn)
    assert wasserstein_interval(values, reference, prompts, runs).ci95 == pytest.approx(
        np.maximum(np.quantile(moved, (0.025, 0.975)), 0)
    )


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=12),
    st.lists(st.floats(-50, 50), min_size=1, max_size=12),
    st.floats(-5, 5),
)
def test_wasserstein_is_a_distance_that_measures_shifts(one, two, shift):
    assert wasserstein(one, one) == 0
    assert wasserstein(one, two) == pytest.approx(wasserstein(two, one), abs=1e-9)
    assert wasserstein(one, np.array(one) + shift) == pytest.approx(abs(shift), abs=1e-9)
    assert wasserstein(one, two) >= abs(np.mean(one) - np.mean(two)) - 1e-9


def test_the_interval_of_a_distance_holds_it_also_where_it_is_small():
    """Resamples hold fewer different values: of two sets of one distribution nearly all lie farther away than the set itself."""
    rng, reference, inside = np.random.default_rng(1), np.random.default_rng(2).normal(size=256), 0
    truth = wasserstein(rng.normal(size=100_000), reference)
    for _ in range(20):
        values = np.repeat(rng.normal(0, 0.5, 64), 5) + rng.normal(0, 0.75**0.5, 320)  # five of a prompt
        found = wasserstein_interval(values, reference, [i // 5 for i in range(320)])
        assert found.ci95[0] <= found.mean <= found.ci95[1]
        inside += found.ci95[0] <= truth <= found.ci95[1]
        assert found.ci95[0] >= 0
    assert inside >= 6  # of resamples as they are, none; some distance of so few values to any set is left in all


def test_wasserstein_of_unequal_sizes_and_its_interval():
    assert wasserstein([0.0], [0.0, 2.0]) == pytest.approx(1.0)
    values = np.random.default_rng(0).normal(1.0, 0.2, 60)
    found = wasserstein_interval(values, [0.0] * 10, list(range(60)))
    assert found.ci95[0] < found.mean < found.ci95[1]
    assert found.mean == pytest.approx(values.mean())

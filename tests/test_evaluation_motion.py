"""VBench's motion rules against cases whose answers are known in closed form."""

import cv2
import numpy as np
import pytest
import torch

from mogan.evaluation.interpolators import blend, flow_warp
from mogan.evaluation.motion import (
    Decision,
    dynamic_degree,
    end_scores,
    interval,
    motion_score,
    motion_smoothness,
    static_decision,
    static_filter,
    temporal_flickering,
)
from mogan.evaluation.pixels import cuts, frame_gaps, frozen, pixel_jerk

AMPLITUDE, PERIOD = 100, 64


def cosine(k: float, frames: int = 9, width: int = 128, height: int = 8) -> np.ndarray:
    """A cosine of period 64 that moves k pixels per frame and wraps around."""
    x, t = np.arange(width)[None, :], np.arange(frames)[:, None]
    row = 127.5 + AMPLITUDE * np.cos(2 * np.pi * (x - k * t) / PERIOD)
    return np.repeat(np.repeat(np.rint(row).astype(np.uint8)[:, None, :, None], height, 1), 3, 3)


def clip(levels, height: int = 8, width: int = 8) -> np.ndarray:
    """One grey level per frame."""
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), height, width, 3)).copy()


def noise(frames: int, seed: int = 0, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------- temporal flickering, F1 to F5


def test_flickering_is_one_for_a_still_clip_and_zero_for_black_and_white():
    assert temporal_flickering(np.repeat(noise(1), 5, 0)) == 1.0
    assert temporal_flickering(clip([0, 255, 0, 255])) == 0.0


def test_flickering_of_a_ramp_in_time_and_of_a_moving_ramp():
    assert temporal_flickering(clip(range(0, 60, 7))) == pytest.approx(1 - 7 / 255, abs=1e-12)
    x = np.arange(60)
    frames = np.stack([np.repeat((3 * (x - 2 * t) + 60).astype(np.uint8)[None, :, None], 4, 0) for t in range(5)])
    assert temporal_flickering(np.repeat(frames, 3, 3)) == pytest.approx(1 - 3 * 2 / 255, abs=1e-12)


@pytest.mark.parametrize(("k", "score"), [(1, 0.9755), (4, 0.9026), (8, 0.8089), (16, 0.6469), (32, 0.5007)])
def test_flickering_of_a_moving_cosine(k, score):
    assert temporal_flickering(cosine(k)) == pytest.approx(score, abs=6e-4)  # sampled every pixel, in 8 bits
    assert 1 - 4 * AMPLITUDE / np.pi * np.sin(np.pi * k / PERIOD) / 255 == pytest.approx(score, abs=6e-5)


def test_flickering_needs_two_frames():
    with pytest.raises(ValueError, match="two frames"):
        temporal_flickering(clip([3]))


# ---------------------------------------------------------------- motion smoothness, M1 to M6


def keep_first(first, second):
    return first


def test_smoothness_of_a_still_clip_is_exactly_one():
    still = np.repeat(noise(1, height=16, width=48), 7, 0)
    assert motion_smoothness(still, keep_first) == 1.0
    assert motion_smoothness(still, blend) == 1.0
    every_level = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3), 3, 0)
    assert motion_smoothness(every_level, blend) == 1.0


def test_smoothness_of_a_clip_of_period_two_sees_only_the_difference():
    a, b = noise(1)[0], noise(1, seed=1)[0]
    gap = np.abs(a.astype(int) - b).mean()
    assert motion_smoothness(np.stack([a, b, a, b, a]), blend) == pytest.approx(1 - gap / 255, abs=1e-12)
    assert motion_smoothness(clip([0, 255, 0, 255, 0]), blend) == 0.0


def test_a_linear_fade_is_perfectly_smooth_under_blending():
    for start in range(0, 256):
        steps = np.arange(-(start // 2), (255 - start) // 2 + 1)
        row = np.stack([np.full_like(steps, start), start + steps, start + 2 * steps]).astype(np.uint8)
        assert motion_smoothness(np.repeat(row[:, None, :, None], 3, 3), blend) == 1.0


def test_smoothness_needs_three_frames_and_ignores_the_last_of_an_even_number():
    with pytest.raises(ValueError, match="three frames"):
        motion_smoothness(noise(2), blend)
    calls = []

    def counting(first, second):
        calls.append(len(first))
        return blend(first, second)

    motion_smoothness(noise(3), counting)
    assert sum(calls) == 1
    eight = noise(8)
    other = eight.copy()
    other[-1] = 255 - other[-1]
    assert motion_smoothness(eight, blend) == motion_smoothness(other, blend)


@pytest.mark.parametrize(("k", "score"), [(1, 0.9988), (4, 0.9810), (8, 0.9269), (16, 0.7503), (32, 0.5007)])
def test_smoothness_of_a_moving_cosine_under_blending(k, score):
    # 8-bit frames and the truncated middle cost up to half a level
    assert motion_smoothness(cosine(k), blend) == pytest.approx(score, abs=2.2e-3)
    assert 1 - 2 * AMPLITUDE / np.pi * (1 - np.cos(2 * np.pi * k / PERIOD)) / 255 == pytest.approx(score, abs=6e-5)


@pytest.mark.parametrize("k", [1, 4, 8, 16])
def test_a_perfect_interpolator_finds_any_speed_smooth(k):
    frames = cosine(k)
    middles = iter(torch.from_numpy(frames[1::2]).permute(0, 3, 1, 2).float() / 255)

    def oracle(first, second):
        return torch.stack([next(middles) for _ in first])

    assert motion_smoothness(frames, oracle) == 1.0


def test_flow_warp_keeps_a_still_clip_and_follows_a_translation():
    def still(video):
        return torch.zeros(video.shape[0], 2, video.shape[2] - 1, *video.shape[3:])

    assert motion_smoothness(np.repeat(noise(1), 5, 0), flow_warp(still)) == 1.0

    def exact(video):  # pairs two frames apart, four pixels a frame, in the order asked
        exact.calls += 1
        flow = torch.zeros(video.shape[0], 2, video.shape[2] - 1, *video.shape[3:])
        flow[:, 0] = 8 if exact.calls % 2 else -8
        return flow

    exact.calls = 0
    inside = cosine(4, width=192)
    smooth = motion_smoothness(inside, flow_warp(exact))
    assert smooth > 0.99 > motion_smoothness(inside, blend)


def test_motion_score_is_the_mean_of_both():
    assert motion_score(0.986, 0.96) == pytest.approx(0.973)


# ---------------------------------------------------------------- dynamic degree, D1 to D12


def moving(speed_per_frame: float, fps: float, share: float = 1.0):
    """An oracle: every pair of kept frames moved ``speed * interval`` pixels, on a share of the pixels."""

    def flow(video):
        field = torch.zeros(video.shape[0], 2, video.shape[2] - 1, *video.shape[3:])
        flat = field.flatten(3)
        flat[:, 0, :, : round(share * flat.shape[-1])] = speed_per_frame * interval(fps)
        return field

    return flow


def blank(frames: int, height: int = 48, width: int = 80):
    # a tenth of 480p, so that speeds and thresholds are a tenth of the published cases
    frame = np.zeros((height, width, 3), np.uint8)
    return [frame] * frames


@pytest.mark.parametrize(
    ("speed", "fps", "expected"),
    [(0, 16, False), (5, 16, False), (5.625, 16, False), (6, 16, True), (6, 8, False), (3, 30, True)],
)
def test_dynamic_degree_depends_on_speed_and_on_the_tag(speed, fps, expected):
    found = dynamic_degree(blank(81), fps, moving(speed / 10, fps))
    assert found.decision is expected
    assert found.threshold == 1.125
    kept = len(range(0, 81, interval(fps)))
    assert found.count == round(kept / 4)
    assert len(found.scores) == kept - 1


def test_dynamic_degree_at_full_size():
    frame = np.zeros((480, 832, 3), np.uint8)
    found = dynamic_degree([frame] * 5, 16, moving(6, 16))
    assert (found.decision, found.threshold, found.scores) == (True, 11.25, (12.0, 12.0))


def test_counts_of_kept_frames():
    assert (len(dynamic_degree(blank(81), 16, moving(0, 16)).scores), round(41 / 4)) == (40, 10)
    assert dynamic_degree(blank(81), 8, moving(0, 8)).count == 20
    assert dynamic_degree(blank(81), 30, moving(0, 30)).count == 5


@pytest.mark.parametrize(("speed", "expected"), [(15, False), (28, False), (29, True)])
def test_one_percent_of_the_pixels_must_move_five_times_as_fast(speed, expected):
    found = dynamic_degree(blank(81), 16, moving(speed / 10, 16, share=0.01))
    assert found.decision is expected
    assert found.scores[0] == pytest.approx(2 * speed / 10 * 0.2, rel=0.02)


@pytest.mark.parametrize(("above", "expected"), [(9, False), (10, True)])
def test_ten_of_forty_pairs_decide(above, expected):
    done = 0

    def flow(video):
        nonlocal done
        field = torch.zeros(video.shape[0], 2, video.shape[2] - 1, *video.shape[3:])
        for pair in range(field.shape[2]):
            field[:, 1, pair] = 1.2 if done < above else 1.1
            done += 1
        return field

    assert dynamic_degree(blank(81), 16, flow).decision is expected


def test_the_shortest_clips_behave_as_in_the_reference():
    assert dynamic_degree(blank(2), 8, moving(0, 8)).decision is True
    assert dynamic_degree(blank(1), 8, moving(0, 8)).decision is False
    assert dynamic_degree(blank(3), 8, moving(0, 8)).decision is False


def test_intervals_round_to_even():
    assert [interval(f) for f in (12, 20, 28, 36, 0, 23.976, 29.97, 16, 10)] == [2, 2, 4, 4, 1, 3, 4, 2, 1]
    assert interval(None) == 1


@pytest.mark.parametrize(
    ("side", "tau"), [(256, 6.0), (320, 7.5), (480, 11.25), (512, 12.0), (720, 16.875), (768, 18.0), (1080, 25.3125)]
)
def test_threshold_grows_with_the_shorter_side(side, tau):
    assert dynamic_degree(blank(1, side, side + 9), 8, moving(0, 8)).threshold == tau
    assert dynamic_degree(blank(1, side + 5, side), 8, moving(0, 8)).threshold == tau


def test_a_clip_whose_size_is_no_multiple_of_eight_is_padded_and_the_share_counts_the_padding():
    sizes = []

    def flow(video):
        sizes.append(tuple(video.shape[-2:]))
        return torch.zeros(video.shape[0], 2, 1, *video.shape[3:])

    dynamic_degree(blank(3, 45, 61), 8, flow)
    assert sizes == [(48, 64)]


def test_static_filter_lets_a_still_clip_through_and_catches_slow_drift():
    def drift(per_frame, total):
        def flow(video):
            far = video.diff(dim=2).abs().amax((1, 3, 4), keepdim=True) > 0.5
            field = torch.where(far, total, per_frame).expand(-1, 1, -1, *video.shape[3:])
            return torch.cat([field, torch.zeros_like(field)], 1)

        return flow

    frames = blank(81)
    frames[-1] = np.full_like(frames[0], 255)
    # the pair (80, 81) differs in brightness too, so it counts as one pair above the threshold: fewer than eleven
    assert static_filter(blank(81), drift(0.0, 0.0)).decision is True
    assert static_filter(frames, drift(0.5, 11.25)).decision is True
    assert static_filter(frames, drift(0.5, 11.26)).decision is False
    assert static_filter(blank(81), drift(0.57, 0.0)).decision is False
    assert static_filter(blank(81), drift(0.56, 0.0)) == Decision(True, tuple([pytest.approx(0.56)] * 82), 0.5625, 10)


# ---------------------------------------------------------------- pixels


def test_jerk_is_zero_for_fades_and_largest_for_flicker():
    assert pixel_jerk(clip([0, 10, 20, 30])) == 0.0
    assert pixel_jerk(clip([0, 255, 0])) == 2.0


def test_frozen_frames_are_counted_and_the_longest_run_found():
    frames = noise(6)
    padded = np.concatenate([frames, np.repeat(frames[-1:], 3, 0)])
    found = frozen(frame_gaps(padded))
    assert (found.share, found.longest) == (3 / 8, 3)
    assert frozen(frame_gaps(frames)).longest == 0


def test_one_cut_is_found_and_none_in_steady_motion():
    steady = cosine(2, frames=12)
    assert cuts(frame_gaps(steady)) == []
    other = 255 - cosine(2, frames=12)
    assert cuts(frame_gaps(np.concatenate([steady, other]))) == [12]
    assert cuts(frame_gaps(clip([5] * 9))) == []


# ---------------------------------------------------------------- whole-suite invariants


def test_time_reversal_and_mirroring_change_nothing():
    frames = cosine(3, frames=9)
    for changed in (frames[::-1], frames[:, :, ::-1]):
        assert temporal_flickering(changed) == pytest.approx(temporal_flickering(frames), abs=1e-12)
        assert motion_smoothness(changed, blend) == pytest.approx(motion_smoothness(frames, blend), abs=1e-12)


def test_the_static_filter_lets_as_many_pairs_move_as_vbench_and_not_one_more():
    assert static_decision((4.0, 4.0, 0.0), (), 16, 256).decision  # two of 16 frames may
    assert not static_decision((4.0, 4.0, 4.0), (), 16, 256).decision


def test_the_static_filters_last_scores_are_from_the_first_frame_to_the_last_and_back():
    def brighter(video):
        rise = video.diff(dim=2).clamp(min=0)[:, :1]
        return torch.cat([rise, 0 * rise], 1)

    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    there, back = end_scores(black, white, brighter)
    assert there > 0
    assert back == 0


def test_interpolated_levels_are_cut_off_as_in_vbench():
    grey = [np.full((8, 8, 3), 10, np.uint8)] * 3
    assert motion_smoothness(grey, lambda one, two: torch.full_like(one, 10.9 / 255)) == 1


def test_a_cut_stands_out_from_the_median_and_from_the_spread_around_it():
    assert cuts([10.0] * 8 + [25.0]) == []  # not three times the median
    assert cuts([10.0] * 8 + [31.0]) == [9]  # one that stands out is no spread


def test_shuffled_frames_are_less_smooth():
    frames = cosine(2, frames=9)
    order = [4, 0, 7, 2, 8, 1, 5, 3, 6]
    assert motion_smoothness(frames[order], blend) < motion_smoothness(frames, blend) - 0.05


def test_showing_every_frame_twice_at_twice_the_tag_keeps_the_decision():
    def speed_of_content(video):  # measures the brightness ramp: one level is one pixel
        gap = video[:, :1].diff(dim=2) * 127.5
        return torch.cat([gap, torch.zeros_like(gap)], 1)

    for step in (2, 3):
        frames = clip(range(0, 17 * step, step), 96, 96)
        once = dynamic_degree(frames, 8, speed_of_content)
        twice = dynamic_degree(np.repeat(frames, 2, 0), 16, speed_of_content)
        assert once.decision is twice.decision is (step == 3)
        assert once.scores == pytest.approx(twice.scores)


def test_the_sum_follows_the_reference_bit_for_bit():
    from mogan.evaluation.motion import top_magnitude

    field = np.random.default_rng(0).normal(0, 5, (2, 97, 61)).astype(np.float32)
    u, v = field
    flat = np.sqrt(np.square(u) + np.square(v)).flatten()
    expected = np.mean(np.abs(np.sort(-flat))[: int(97 * 61 * 0.05)])
    assert top_magnitude(field, 0.05) == expected


def test_classical_estimators_find_a_roll_of_the_picture():
    from mogan.motion.classical_flow import dis, farneback

    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.normal(0, 1, (96, 96)), (0, 0), 2.5)
    texture = (255 * (texture - texture.min()) / np.ptp(texture)).astype(np.uint8)
    rolled = np.roll(texture, (0, 3), (0, 1))
    video = torch.from_numpy(np.stack([texture, rolled]))[None, None].repeat(1, 3, 1, 1, 1).float() / 127.5 - 1
    for estimate in (farneback, dis):
        flow = estimate(video)
        assert flow.shape == (1, 2, 1, 96, 96)
        assert flow[0, 0, 0, 16:80, 16:80].median().item() == pytest.approx(3, abs=0.2)
        assert flow[0, 1, 0, 16:80, 16:80].median().item() == pytest.approx(0, abs=0.2)

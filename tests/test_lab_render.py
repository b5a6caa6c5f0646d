import json

import numpy as np
import pytest

from mogan.data.video import read_video
from mogan.errors import UserError
from mogan.world import scenes as world
from mogan.world.render import render, render_folder


def test_a_folder_holds_clips_captions_and_truth(tmp_path):
    render(tmp_path / "w", clips=3, motion="rich", seed=4, truth=True)
    rows = [json.loads(line) for line in (tmp_path / "w" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for index, row in enumerate(rows):
        scene = world.make_scene(4, index, motion="rich")
        assert set(row) == {"file_name", "caption", "motion_kind", "speed", "seed", "index"}
        assert (row["caption"], row["motion_kind"], row["index"]) == (scene.caption, scene.kind, index)
        clip, fps = read_video(tmp_path / "w" / row["file_name"])
        assert fps == world.FPS
        assert clip.shape == (world.FRAMES, world.SIZE, world.SIZE, 3)
        assert np.abs(clip.astype(int) - world.render(scene)).mean() < 5
        truth = np.load(tmp_path / "w" / "truth" / f"{index:05d}.npz")
        flow, visible = world.exact_flow(scene)
        np.testing.assert_allclose(truth["flow"], flow, atol=2e-3)
        assert truth["flow"].dtype == np.float16
        np.testing.assert_array_equal(truth["visible"], visible)
        np.testing.assert_array_equal(truth["centres"][0], scene.sprites[0].centres_F2)
        assert str(truth["kind"]) == scene.kind


def test_the_same_seed_gives_the_same_bytes_and_more_clips_add_to_it(tmp_path):
    assert render_folder(tmp_path / "a", 4) == 4
    assert render_folder(tmp_path / "b", 2) == 2
    assert render_folder(tmp_path / "b", 4) == 2  # the first two were there
    assert render_folder(tmp_path / "b", 4) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_folder_is_never_mixed_with_something_else(tmp_path):
    render_folder(tmp_path / "a", 2)
    with pytest.raises(UserError, match="another world"):
        render_folder(tmp_path / "a", 2, seed=1)
    with pytest.raises(UserError, match="already holds 2"):
        render_folder(tmp_path / "a", 1)
    (tmp_path / "a" / "render.json").write_bytes(b'{"wor\xff')
    with pytest.raises(UserError, match="another world"):
        render_folder(tmp_path / "a", 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="not empty"):
        render_folder(tmp_path / "mine", 1)

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mogan.data.batches import clip_at, draw_batch
from mogan.data.cache import ensure_text, open_cache, save_latent, text_path
from mogan.errors import UserError

FACTS = {"format": "mogan-cache", "version": 1, "contents": "clips", "fps": 16, "vae": "abc"}


def embed(prompts):
    return [torch.full((len(p) + 1, 3), float(len(p))) for p in prompts]


def make_cache(folder, count=5, **facts):
    folder.mkdir()
    (folder / "cache.json").write_text(json.dumps(FACTS | facts))
    entries = [{"id": f"c{i}", "caption": "x" * (i % 3)} for i in range(count)]
    for i, entry in enumerate(entries):
        save_latent(folder, entry["id"], torch.full((2, 3, 2, 2), float(i)), {})
    ensure_text(folder, [e["caption"] for e in entries], embed)
    (folder / "index.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 7), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_clip_comes_once_per_epoch_across_ranks(count, ranks, size, seed, update):
    epochs = 2
    iterations = -(-epochs * count // (ranks * size))
    walk = [clip_at(count, seed, update, 0, p) for p in range(iterations * ranks * size)]
    for epoch in range(epochs):
        assert sorted(walk[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_ranks_of_an_iteration_share_out_the_walk(folder):
    cache = open_cache(folder)
    seen = Counter()
    for iteration in range(5):  # 5 iterations x 2 ranks x 2 clips = 4 epochs of 5 clips
        for rank in range(2):
            seen.update(draw_batch(cache, seed=0, iteration=iteration, update=0, size=2, rank=rank, ranks=2).ids)
    assert set(seen.values()) == {4}


@given(st.integers(0, 9), st.integers(0, 50), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_a_batch_depends_on_nothing_but_its_arguments(folder, seed, iteration, update, repeat):
    where = {"seed": seed, "iteration": iteration, "update": update, "repeat": repeat, "size": 3}
    cache = open_cache(folder)
    for other in range(4):  # what was drawn before does not matter
        draw_batch(cache, seed=other, iteration=other, update=0, size=2)
    one = draw_batch(cache, **where, want=("latent",), starts=(0, 1))
    other = draw_batch(open_cache(folder), **where, want=("latent",), starts=(0, 1))
    assert (one.ids, one.prompts, one.window_start) == (other.ids, other.prompts, other.window_start)
    torch.testing.assert_close(one.latent_BCFHW, other.latent_BCFHW, rtol=0, atol=0)
    for clip, prompt, text, latent in zip(one.ids, one.prompts, one.text, one.latent_BCFHW, strict=True):
        assert latent.unique().item() == int(clip[1:])
        assert text.shape == (len(prompt) + 1, 3)


def test_updates_and_repeats_walk_in_different_orders(folder):
    cache = open_cache(folder)
    orders = {
        tuple(i for k in range(5) for i in draw_batch(cache, seed=0, iteration=k, update=u, repeat=r, size=1).ids)
        for u in range(3)
        for r in range(3)
    }
    assert len(orders) > 5


def test_ranks_look_at_the_same_window(folder):
    cache = open_cache(folder)
    for iteration in range(8):
        draws = [
            draw_batch(cache, seed=0, iteration=iteration, update=0, size=1, rank=r, starts=(0, 1, 2)) for r in (0, 1)
        ]
        assert draws[0].window_start == draws[1].window_start


def test_prompts_are_encoded_once(tmp_path):
    calls = []

    def counted(prompts):
        calls.extend(prompts)
        return embed(prompts)

    assert ensure_text(tmp_path, ["a", "b", "a", ""], counted) == 3
    assert ensure_text(tmp_path, ["b", "c"], counted) == 1
    assert calls == ["a", "b", "", "c"]


def test_a_cache_of_prompts_gives_text_alone(tmp_path):
    folder = make_cache(tmp_path / "cache", contents="prompts")
    cache = open_cache(folder)
    batch = draw_batch(cache, seed=0, iteration=0, update=0, size=4)
    assert len(batch.text) == 4
    assert batch.latent_BCFHW is None
    with pytest.raises(UserError, match="prompts alone"):
        draw_batch(cache, seed=0, iteration=0, update=0, size=4, want=("latent",))


def test_prompts_of_their_own_are_walked_beside_the_clips(folder, tmp_path):
    cache, prompts = open_cache(folder), open_cache(make_cache(tmp_path / "prompts", 7, contents="prompts"))
    seen: Counter = Counter()
    for iteration in range(7):
        where = {"seed": 3, "iteration": iteration, "update": 1, "size": 5}
        one, other = (draw_batch(cache, **where, want=("latent",), prompts=p) for p in (None, prompts))
        assert one.ids == other.ids
        assert torch.equal(one.latent_BCFHW, other.latent_BCFHW)
        alone = draw_batch(cache, **where, prompts=prompts)
        assert alone.prompts == other.prompts
        seen.update(alone.ids)
    assert seen == dict.fromkeys((f"c{i}" for i in range(7)), 5)  # seven iterations of five are five epochs of seven


def test_a_clip_without_a_caption_gives_its_latent_and_no_text(tmp_path):
    folder = make_cache(tmp_path / "cache")
    bare = [json.loads(line) | {"caption": None} for line in (folder / "index.jsonl").read_text().splitlines()]
    (folder / "index.jsonl").write_text("".join(json.dumps(e) + "\n" for e in bare))
    where = {"seed": 0, "iteration": 0, "update": 0, "size": 2, "want": ("latent",)}
    prompts = open_cache(make_cache(tmp_path / "prompts", contents="prompts"))
    assert draw_batch(open_cache(folder), **where, prompts=prompts).latent_BCFHW is not None
    with pytest.raises(UserError, match="no caption"):
        draw_batch(open_cache(folder), **where)


def test_what_is_not_a_cache_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="mogan prepare"):
        open_cache(tmp_path)
    for text in ("{}", "[]", "no json", '{"format": "other"}'):
        (tmp_path / "cache.json").write_text(text)
        with pytest.raises(UserError, match="not written by mogan"):
            open_cache(tmp_path)
    (tmp_path / "cache.json").write_text(json.dumps(FACTS | {"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        open_cache(tmp_path)
    (tmp_path / "cache.json").write_text(json.dumps(FACTS))
    with pytest.raises(UserError, match="not finished"):
        open_cache(tmp_path)


def test_missing_clips_and_other_models_are_named(tmp_path):
    folder = make_cache(tmp_path / "cache")
    cache = open_cache(folder)
    cache.require(vae="abc", fps=16)
    with pytest.raises(UserError, match="vae abc, not xyz"):
        cache.require(vae="xyz", fps=16)
    with pytest.raises(
        UserError, match="no embedding of 'unheard of': run `mogan prepare` again with it as an extra prompt"
    ):
        cache.text("unheard of")
    caption = cache.entries[0]["caption"]
    text_path(folder, caption).unlink()
    with pytest.raises(UserError, match=f"no embedding of '{caption}': run `mogan prepare` again$"):
        cache.text(caption)
    (folder / "clips" / "c3.safetensors").unlink()
    with pytest.raises(UserError, match="lacks 1 clips, first c3"):
        open_cache(folder)

"""`mogan stream`: a clip without an end, its pieces, what is made ahead, the file."""

import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mogan.cli import main
from mogan.data.video import read_video, write_video
from mogan.errors import UserError
from mogan.exchange.export import save_student
from mogan.models import wan
from mogan.models.autoencoder import decode_video
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal, Policy
from mogan.sampling.causal_rollout import stream_causal, take_steps
from mogan.sampling.endless import bounded, retold, stream_endless
from mogan.sampling.samplers import sample_student, to_frames
from mogan.stream.engine import MANNERS, Studio, Times, cut, lab_prompt, open_studio, pieces
from mogan.stream.watched import Watched, flow_over
from mogan.world.captions import parse_caption
from mogan.world.scenes import COLOURS, SHAPES
from test_causal import loaded

SIGMAS = (1.0, 6 / 7, 0.6)
SHAPE = (4, 6, 4, 4)
TEXT, OTHER = (F.pad(torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(k)), (0, 0, 0, 1)) for k in (5, 6))


@pytest.fixture(scope="module")
def student(family):
    return CausalDenoiser(loaded(family))


def parts(student, count, text_at=lambda start: TEXT, how=None, sigmas=SIGMAS, **options):
    student.how = how or Causal(1, 1)
    return list(islice(stream_endless(student, text_at, SHAPE, sigmas, 3, **options), count))


# ------------------------------------------------------------------------------------------------- without an end


@pytest.mark.parametrize(
    "how",
    [
        Causal(1, 1),
        Causal(2, 2),
        Causal(1, 5),
        Causal(2, 2, context_sigma=0.1),
        Causal(1, 1, Policy(4, 1, 0.9, True)),
        Causal(1, 1, first_sigmas=(1.0, 0.9, 0.7, 0.5)),
    ],
)
def test_its_beginning_is_the_clip_of_the_same_seed_bit_for_bit(student, how):
    student.how = how
    clip = torch.cat(list(stream_causal(student, TEXT, SHAPE, SIGMAS, [3])), 2)
    made = torch.cat(parts(student, len(how.chunks(6)), how=how), 2)
    assert torch.equal(made, clip)
    assert not torch.equal(parts(student, 1, lambda start: OTHER, how)[0], made[:, :, : how.first])


def test_it_goes_on_beyond_the_clip_and_keeps_no_more_than_a_window(student, monkeypatch):
    kept, remember = [], student.remember
    monkeypatch.setattr(student, "remember", lambda *given: (kept.append(given[2].frames), remember(*given))[1])
    made = parts(student, 20)
    assert len(made) == 20
    assert all(part.isfinite().all() for part in made)
    assert len({part.sum().item() for part in made}) == 20  # fresh noise for every one
    assert kept[3] == (0, 1, 2)
    assert kept[18] == (0, 14, 15, 16, 17)  # the first frame, and what five more have room for beside the chunk
    assert bounded(Causal(1, 1), 5) == Policy(5, 1, None, True)
    assert bounded(Causal(3, 3), 21) == Policy(21, 3, None, True)
    assert (bounded(Causal(1, 4), 5).sink, bounded(Causal(1, 5), 5).sink) == (1, 0)  # if both fit into what it sees
    assert bounded(Causal(40, 40), 5) == Policy(5, 0, None, True)
    assert bounded(Causal(1, 1, Policy(3)), 5) == Policy(3)


def test_a_text_takes_effect_with_the_chunk_it_is_asked_for(student):
    asked = []

    def text_at(start):
        asked.append(start)
        return TEXT if start < 4 else OTHER

    changed, same = parts(student, 4, text_at, Causal(2, 2)), parts(student, 4, how=Causal(2, 2))
    assert asked == [0, 2, 4, 6]  # each just before its chunk
    assert [torch.equal(a, b) for a, b in zip(changed, same, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize(
    "how", [Causal(1, 1), Causal(3, 3), Causal(2, 2, Policy(5, 1, None, True)), Causal(2, 2, context_sigma=0.1)]
)
def test_the_same_words_again_change_nothing_and_others_change_what_is_kept(student, how):
    copy = TEXT.clone()  # another tensor of the same numbers: what is kept is run again
    count = 2 if how.rest == 3 else 3 if how.rest == 2 else 6  # chunks before the first that something has left for
    count = 2 if how.policy.window else count
    assert all(
        map(
            torch.equal,
            parts(student, count, lambda start: TEXT if start < how.first else copy, how),
            parts(student, count, how=how),
        )
    )
    again = parts(student, count, lambda start: TEXT if start < how.first else OTHER, how)
    stale = parts(student, count, lambda start: TEXT if start < how.first else OTHER, how, again=False)
    assert not torch.equal(again[1], stale[1])


def test_what_is_run_again_is_what_a_clip_under_the_new_text_would_keep(student):
    student.how = Causal(1, 2, Policy(4, 1, None, True))
    latents = torch.randn(1, 4, 5, 4, 4, generator=torch.Generator().manual_seed(9))
    chunks = [(0, latents[:, :, :1]), (1, latents[:, :, 1:3]), (3, latents[:, :, 3:5])]

    def remembered(text, given):
        cache = student.begin(text, student.how.policy)
        for _, chunk in given:
            cache = student.remember(chunk, text, cache)
        return cache

    past = {start + i: (start, one, 0.0) for start, chunk in chunks for i, one in enumerate(chunk.split(1, 2))}
    old = remembered(TEXT, chunks[:2])
    new, want = retold(student, old, past, OTHER), remembered(OTHER, chunks[:2])
    assert (new.frames, new.length, new.words.text is OTHER) == (old.frames, old.length, True)
    for piece, other in zip(new.pieces, want.pieces, strict=True):
        assert all(
            torch.equal(a, b)
            for kv, wanted in zip(piece.kv, other.kv, strict=True)
            for a, b in zip(kv, wanted, strict=True)
        )
    later = remembered(TEXT, chunks)
    assert retold(student, later, past, OTHER).frames == later.frames == (0, 2, 3, 4)


def test_an_averaged_sink_stays_as_it_is(student):
    student.how = how = Causal(1, 1, Policy(3, 1, 0.5, True))
    cache, past = student.begin(TEXT, how.policy), {}
    for number in range(5):
        latent = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(number))
        cache, past[number] = student.remember(latent, TEXT, cache), (number, latent, 0.0)
    new = retold(student, cache, past, OTHER)
    assert new.frames == cache.frames
    assert new.pieces[0] is cache.pieces[0]
    assert not torch.equal(new.pieces[1].kv[-1][0], cache.pieces[1].kv[-1][0])


@pytest.mark.parametrize("how", [Causal(1, 1), Causal(1, 2, Policy(4, 1, None, True)), Causal(1, 1, context_sigma=0.1)])
def test_another_first_latent_takes_the_place_of_the_first_and_the_past_is_run_again(student, how):
    one, two = (torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(k)) for k in (20, 21))
    plain = parts(student, 5, how=how, given=one)
    asked = []

    def given_at(start):
        asked.append(start)
        return one if start < 3 else two

    changed = parts(student, 5, how=how, given=given_at)
    begins = [0, *np.cumsum(how.chunks(1 + 4 * how.rest))[:-1].tolist()]
    assert asked == begins
    before = [begin < 3 for begin in begins]
    assert [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)] == before
    assert torch.equal(changed[0], one)  # what was shown stays shown
    copy = one.clone()  # the same numbers again change nothing, as long as nothing has left the window
    count = 2 if how.policy.window else 3
    again = parts(student, count, how=how, given=lambda start: one if start == 0 else copy)
    assert all(map(torch.equal, again, plain))


def test_what_follows_another_first_latent_is_what_follows_a_past_that_began_with_it(student):
    student.how = Causal(1, 1)
    one, two = (torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(k)) for k in (20, 21))
    made = parts(student, 3, given=lambda start: one if start < 2 else two)
    cache = student.begin(TEXT, bounded(student.how, SHAPE[1]))
    for latent in (two, made[1]):
        cache = student.remember(latent, TEXT, cache)
    noise = torch.Generator().manual_seed(3)
    x = torch.randn(SHAPE, generator=noise)[None, :, 2:3]
    for _ in range(len(SIGMAS) - 1):  # the fresh noise of the second chunk, which was made before
        torch.randn(1, 4, 1, 4, 4, generator=noise)
    want = take_steps(student, x, TEXT, SIGMAS, [noise], cache.make_room(1))
    assert torch.equal(made[2], want)


def test_places_in_time_end_where_they_are_not_counted_anew(student):
    how = Causal(1, 1, Policy(3))  # absolute: the family counts 32 places
    with pytest.raises(Exception, match="this model counts 32 places in time"):
        parts(student, 33, how=how, sigmas=(1.0,))
    assert len(parts(student, 33, how=replace(how, policy=Policy(2, relative=True)), sigmas=(1.0,))) == 33


# ------------------------------------------------------------------------------------------------- pieces


@pytest.fixture(scope="module")
def folder(family, student, tmp_path_factory):
    """A causal student that makes a latent at a time."""
    out = tmp_path_factory.mktemp("causal") / "student"
    save_student(
        student.transformer, family / "teacher", out, SIGMAS, torch.float32, card="a test", causal=Causal(1, 1)
    )
    return out


@pytest.fixture(scope="module")
def studio(folder) -> Studio:
    return open_studio(str(folder), torch.device("cpu"))


def test_pieces_are_the_offline_decode_bit_for_bit_overlapped_or_not(studio):
    text, size = studio.text("a red circle falling"), wan.latent_shape(studio.source.folder, studio.source.geometry)
    latents = torch.cat(list(islice(stream_endless(studio.student, lambda n: text, size, SIGMAS, 7), 9)), 2)
    with torch.no_grad():
        whole = to_frames(decode_video(studio.vae, latents))[0]
    for overlap in (True, False):
        times = Times()
        made = list(islice(pieces(studio, lambda n: text, 7, times, overlap), 9))
        assert [len(piece) for piece in made] == [1] + 8 * [4]
        assert np.array_equal(np.concatenate(made), whole)
        assert times.frames == 33
        assert times.make > 0
        assert times.decode > 0
    clip = sample_student(studio.student, text, size, SIGMAS, [7])  # what `mogan sample` makes
    with torch.no_grad():
        assert np.array_equal(to_frames(decode_video(studio.vae, clip))[0], whole[:13])


def test_what_nobody_asks_for_is_not_made(studio):
    asked, text = [], studio.text("a red circle falling")
    source = pieces(studio, lambda latent: (asked.append(latent), text)[1], 0)
    assert asked == []
    for number in range(3):
        next(source)
        until = time.monotonic() + 20
        while len(asked) < number + 2 and time.monotonic() < until:  # the one chunk that is made ahead
            time.sleep(0.01)
        time.sleep(0.05)
        assert asked == list(range(number + 2))
    source.close()
    assert len(asked) == 4


def test_a_clip_is_cut_to_its_frames():
    made = (np.full((size, 2, 2, 3), size, np.uint8) for size in (1, 4, 4))
    assert [int(frame[0, 0, 0]) for frame in cut(made, 7)] == [1, 4, 4, 4, 4, 4, 4]


def test_a_watched_stream_keeps_its_last_pieces_and_says_whose_text_they_have(studio, monkeypatch):
    monkeypatch.setattr("mogan.stream.watched.KEPT_BYTES", 3 * 32 * 32 * 10)  # ten frames
    watched = Watched(studio, 0, [studio.text("a red circle falling")])
    first = watched.piece(0)
    assert first is not None
    assert watched.piece(0) is first
    assert watched.say(studio.text("a blue square at rest")) == 1
    assert watched.piece(2) is None  # not yet
    for number in range(1, 6):
        assert watched.piece(number).shape == (4, 32, 32, 3)
    assert list(watched.kept) == [4, 5]
    assert watched.piece(0) is None  # no longer
    assert [watched.text_of(number) for number in range(6)] in ([0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1])
    watched.close()
    with pytest.raises(UserError, match="has ended"):
        watched.piece(6)


def test_numbers_that_are_none_end_a_stream_with_a_sentence_again_and_again(studio, monkeypatch):
    monkeypatch.setattr(studio.student, "chunk", lambda x, *rest: x * float("nan"))
    watched = Watched(studio, 0, [studio.text("a red circle falling")])
    for _ in range(2):
        with pytest.raises(UserError, match="infinite or none"):
            watched.piece(0)
    monkeypatch.setattr(studio.student, "chunk", lambda *given: 1 / 0)
    broken = Watched(studio, 0, [studio.text("a red circle falling")])
    for _ in range(2):
        with pytest.raises(UserError, match="which the terminal shows"):
            broken.piece(0)


def test_the_labs_words_are_known_and_others_named(studio):
    assert studio.of_lab
    for manner in MANNERS:
        said = parse_caption(lab_prompt("cyan", "cross", manner))
        assert said is not None
        assert (said.colour, said.shape) == ("cyan", "cross")
    assert {parse_caption(lab_prompt("red", "square", manner)).kind for manner in MANNERS} == {
        "still", "linear", "bouncing", "falling", "rotating", "pan"
    }  # fmt: skip
    assert not any(studio.notes(lab_prompt(c, s, "spinning")) for c in COLOURS for s in SHAPES)
    assert studio.notes("a purple elephant, falling") == ["Words that the model does not know: purple, elephant."]
    assert studio.notes("red " * 600)[0] == "Of its 601 tokens the model reads 512."


def test_flow_is_drawn_where_something_moves():
    rng = np.random.default_rng(0)
    texture = np.repeat(np.repeat(rng.integers(0, 255, (20, 20, 3), np.uint8), 4, 0), 4, 1)
    frames = np.stack([texture[8:72, 8 - k : 72 - k] for k in (0, 2, 4)])
    drawn = flow_over(None, frames)
    assert drawn.shape == (3, 64, 64, 4)
    assert not drawn[0, ..., 3].any()  # nothing is before it
    middle = drawn[1:, 16:48, 16:48].astype(int)
    assert abs(np.median(middle[..., 3]) - 255 * 2 / 3.2) < 16
    assert np.median(middle[..., 0]) > 240  # rightwards is red
    assert np.median(middle[..., 1]) < 40
    later = flow_over(frames[:2], frames[2:])
    assert np.array_equal(later[0], drawn[2])
    assert not flow_over(frames[:1], frames[:1])[..., 3].any()


# ------------------------------------------------------------------------------------------------- the command


def test_a_file_holds_the_seconds_asked_for_and_is_the_same_again(folder, studio, tmp_path, capsys):
    out = tmp_path / "clip.mp4"
    given = ["--prompt", "a red circle falling", "a purple circle falling"]
    arguments = ["stream", "--model", str(folder), *given, "--seed", "5", "--seconds", "1.5", "--out", str(out)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "24 frames, the first after" in said
    assert "does not know: purple" in said
    frames, fps = read_video(out)
    assert (frames.shape, fps) == ((24, 32, 32, 3), 16)
    texts = [studio.text(text) for text in given[1:]]
    write_video(tmp_path / "want.mp4", cut(pieces(studio, lambda latent: texts[latent >= 3], 5, overlap=False), 24), 16)
    before = (tmp_path / "want.mp4").read_bytes()
    (tmp_path / "want.mp4").unlink()
    assert out.read_bytes() == before
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    out.unlink()
    assert main(arguments) == 0
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "STUDENT"], "makes all frames of a clip at once"),
        (["--model", "CAUSAL", "--out", "clip.avi"], "must be named like clip.mp4"),
        (["--model", "CAUSAL", "--prompt", " "], "--prompt takes 1 to 2000 characters, not 0"),
        (["--model", "CAUSAL", "--prompt", "x" * 2001], "--prompt takes 1 to 2000 characters, not 2001"),
        (["--model", "CAUSAL", "--prompt", "a", "b"], "the page begins with one --prompt"),
        (["--model", "nowhere", "--out", "clip.mp4"], "nowhere"),
        (["--model", "CAUSAL", "--steps", "2"], "was trained for 3 steps alone"),
        (["--model", "CAUSAL", "--seconds", "2"], "--seconds says nothing without --out"),
        (["--model", "CAUSAL", "--out", "a.mp4", "--port", "0"], "--port is the page's"),
        (["--model", "CAUSAL", "--out", "a.mp4", "--seconds", "1e9"], "--seconds takes a number from 0 to 86400"),
        (
            ["--model", "CAUSAL", "--out", "a.mp4", "--seconds", "0.2", "--prompt", "a", "b", "c"],
            "too few for 3 prompts",
        ),
    ],
)
def test_a_wrong_word_is_a_sentence(words, sentence, folder, family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"STUDENT": str(family / "student"), "CAUSAL": str(folder)}
    assert main(["stream", *(places.get(word, word) for word in words)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("mogan stream: ")
    assert sentence in said
    assert not list(tmp_path.iterdir())

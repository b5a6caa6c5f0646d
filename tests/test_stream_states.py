"""`mogan stream` of a student that is told states: a given first frame, scripts, recordings, chunks of several sizes, two stages."""

import json
import os
import sys
import time
import wave
from dataclasses import replace
from itertools import count, islice

import av
import cv2
import numpy as np
import pytest
import torch

from mogan.cli import main
from mogan.data.batches import one_ahead
from mogan.data.controls import read_picture
from mogan.data.video import read_video, write_video
from mogan.errors import UserError
from mogan.exchange.export import save_student
from mogan.models.autoencoder import decode_video
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal, Policy
from mogan.models.int8 import in_int8
from mogan.models.states import attach_states
from mogan.sampling.causal_rollout import stream_causal
from mogan.sampling.samplers import to_frames
from mogan.stream.command import _usual
from mogan.stream.engine import open_studio, pieces
from mogan.stream.script import Following, follow_sound, read_script
from mogan.stream.sound import RATE, read_sound, state_of_sound, voiced
from mogan.stream.watched import Watched
from test_causal import loaded

SIGMAS, NAMES = (1.0, 0.6), ("idle", "listening", "speaking")
TIMES = np.arange(RATE) / RATE


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """An export of a student for chunks of 1 and 3 latents that knows three states, and a picture."""
    out = tmp_path_factory.mktemp("llia")
    rows = {n: 3 * torch.randn(64, generator=torch.Generator().manual_seed(k)) for k, n in enumerate(NAMES)}
    how = Causal(1, 1, sizes=(1, 3))
    save_student(
        attach_states(loaded(family), rows),
        family / "teacher",
        out / "student",
        SIGMAS,
        torch.float32,
        "a test",
        causal=how,
    )
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    cv2.imwrite(str(out / "portrait.png"), cv2.GaussianBlur(picture, (9, 9), 0))
    return out


def studio_of(folder, **more):
    return open_studio(str(folder / "student"), torch.device("cpu"), **{"first_frame": folder / "portrait.png"} | more)


def none(path, where):
    raise AssertionError("no line has a picture")


@pytest.fixture(scope="module")
def studio(folder):
    return studio_of(folder)


def made(studio, text_at, number, **more):
    return list(islice(pieces(studio, text_at, 3, **more), number))


# ------------------------------------------------------------------------------------------------- first frame, sizes


@pytest.mark.parametrize("chunk", [1, 3])
def test_it_begins_with_the_picture_and_is_the_clip_that_was_given_it_bit_for_bit(folder, chunk):
    studio = studio_of(folder, chunk=chunk)
    text = studio.text("a red circle", "idle")
    latents = torch.cat(list(stream_causal(studio.student, text, (4, 4, 4, 4), SIGMAS, [3], studio.given)), 2)
    assert torch.equal(latents[:, :, :1], studio.given)
    with torch.no_grad():
        whole = to_frames(decode_video(studio.vae, latents))[0]
    for overlap in (True, False):
        assert np.array_equal(np.concatenate(made(studio, lambda n: text, 4, overlap=overlap)), whole)
    assert [studio.chunk_of(n) for n in (0, 1, 3, 4)] == (
        [(0, 1), (1, 2), (3, 4), (4, 5)] if chunk == 1 else [(0, 1), (1, 4), (1, 4), (4, 7)]
    )


def test_chunks_that_leave_no_room_for_the_one_before_are_told(folder, capsys):
    assert studio_of(folder, chunk=1).policy.window == 4
    assert "leave no room" not in capsys.readouterr().out
    studio_of(folder, chunk=3)
    assert "student: chunks of 3 latents leave no room in a window of 4 for the chunk before" in capsys.readouterr().out


def test_a_script_that_begins_with_a_prompt_needs_no_other(folder, tmp_path, monkeypatch):
    studio = replace(studio_of(folder), of_lab=False)
    with pytest.raises(UserError, match="say with --prompt"):
        _usual(studio, None)
    begins = read_script(script(tmp_path / "s.jsonl", {"at": 0, "prompt": "a blue circle"}), NAMES, none)
    assert _usual(studio, begins) == ["a blue circle"]


def test_chunks_and_pictures_that_cannot_be_are_refused(folder, family, tmp_path):
    with pytest.raises(UserError, match="chunks of 1, 3 latents, not of 2"):
        studio_of(folder, chunk=2)
    save_student(
        loaded(family), family / "teacher", tmp_path / "two", SIGMAS, torch.float32, "a test", causal=Causal(2, 2)
    )
    with pytest.raises(UserError, match="a picture is one latent"):
        open_studio(str(tmp_path / "two"), torch.device("cpu"), first_frame=folder / "portrait.png")


# ------------------------------------------------------------------------------------------------- scripts


def script(path, *changes):
    path.write_text("".join(json.dumps(change) + "\n" for change in changes))
    return path


def test_a_state_takes_effect_with_the_chunk_that_begins_after_it(folder, tmp_path):
    path = script(
        tmp_path / "s.jsonl", {"at": 0, "state": "idle"}, {"at": 0.5, "state": "speaking"}, {"at": 1, "state": None}
    )
    for chunk, wanted in ((1, "iiiss....."), (3, "iiiisss...")):  # latent n begins with frame 4 n - 3, of 16 a second
        studio = studio_of(folder, chunk=chunk)
        follow = Following(studio, "a red circle", read_script(path, NAMES, none))
        assert [follow.state(n) for n in range(10)] == [{"i": "idle", "s": "speaking", ".": None}[c] for c in wanted]
        assert follow(0) is follow(1)  # nothing is run again where nothing changes
        assert torch.equal(follow(4), studio.text("a red circle", "speaking"))
    prompts = read_script(script(path, {"at": 0, "state": "idle"}, {"at": 1, "prompt": "a blue circle"}), NAMES, none)
    assert prompts(1.0, 2.0) == ("a blue circle", "idle", None)


def test_the_change_is_seen_at_once_and_with_the_past_run_again_or_not(folder):
    studio, stale = studio_of(folder), studio_of(folder, again=False)
    texts = [studio.text("a red circle", name) for name in ("idle", "speaking")]
    plain = made(studio, lambda n: texts[0], 5)
    changed = made(studio, lambda n: texts[n >= 3], 5)
    kept = made(stale, lambda n: texts[n >= 3], 5)
    assert [np.array_equal(a, b) for a, b in zip(plain, changed, strict=True)] == [True, True, True, False, False]
    assert [np.array_equal(a, b) for a, b in zip(plain, kept, strict=True)] == [True, True, True, False, False]
    assert not np.array_equal(changed[3], kept[3])
    copy = texts[0].clone()
    assert np.array_equal(
        np.concatenate(made(studio, lambda n: texts[0] if n < 3 else copy, 4)), np.concatenate(plain[:4])
    )


def test_a_picture_of_a_script_takes_the_place_of_the_first_frame(folder, studio, tmp_path):
    other = cv2.flip(cv2.imread(str(folder / "portrait.png")), 1)
    cv2.imwrite(str(tmp_path / "other.png"), other)
    path = script(
        tmp_path / "s.jsonl", {"at": 0, "state": "idle"}, {"at": 0.5, "picture": "other.png"}, {"at": 1, "state": None}
    )
    follow = Following(studio, "a red circle", read_script(path, NAMES, studio.another_picture))
    assert follow.given(2) is studio.given
    assert follow.given(3) is follow.given(9)
    assert torch.equal(follow.given(3), studio_of(folder, first_frame=tmp_path / "other.png").given)
    found = made(studio, follow, 5, given_at=follow.given)
    plain = made(studio, follow, 5)
    assert [np.array_equal(a, b) for a, b in zip(plain, found, strict=True)] == [True, True, True, False, False]
    watched = Watched(studio, 3, [follow])
    assert all(np.array_equal(watched.piece(n), piece) for n, piece in enumerate(found))
    watched.close()
    watched = Watched(studio, 3, [follow])
    for n in range(4):
        watched.piece(n)
    told = len(watched.changes)
    watched.say(studio.text("a red circle", "speaking"))  # a button: the picture stays as the script left it
    for n in range(4, 8):
        watched.piece(n)
    assert len(watched.changes) == told + 1
    assert watched.given is follow.given(9)
    watched.close()
    begins = script(path, {"at": 0, "picture": "other.png", "state": "idle"})
    bare = open_studio(str(folder / "student"), torch.device("cpu"))
    first = Following(bare, "a red circle", read_script(begins, NAMES, bare.another_picture))
    want = made(studio_of(folder, first_frame=tmp_path / "other.png"), follow, 3)
    assert all(map(np.array_equal, made(bare, first, 3, given_at=first.given), want))


def test_a_picture_that_cannot_take_the_place_of_the_first_is_refused(folder, family, tmp_path):
    stale = studio_of(folder, again=False)
    path = script(tmp_path / "s.jsonl", {"at": 0, "picture": str(folder / "portrait.png")})
    with pytest.raises(
        UserError, match="line 1 gives a picture, which is seen where the past is run again: leave out --no-recache"
    ):
        read_script(path, NAMES, stale.another_picture)
    for name, how in (
        ("averaged", Causal(1, 1, Policy(3, 1, 0.9, True))),
        ("none", Causal(1, 1, Policy(3))),
        ("two", Causal(2, 2)),
    ):
        save_student(loaded(family), family / "teacher", tmp_path / name, SIGMAS, torch.float32, "a test", causal=how)
        with pytest.raises(UserError, match=r"line 1 gives a picture, and (averaged|none|two) does not keep one"):
            read_script(path, (), open_studio(str(tmp_path / name), torch.device("cpu")).another_picture)
    with pytest.raises(UserError, match="is not there"):
        read_script(script(path, {"at": 0, "picture": "gone.png"}), NAMES, studio_of(folder).another_picture)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"at": 1, "picture": null}', "line 1 is no change"),
        ('{"at": 1, "picture": 3}', "line 1 is no change"),
        ("{", "line 1 is no change"),
        ('{"at": 1}', "line 1 is no change"),
        ('{"at": -1, "state": "idle"}', "line 1 is no change"),
        ('{"at": "nan", "state": "idle"}', "line 1 is no change"),
        ('{"at": "1", "state": "idle"}', "line 1 is no change"),
        ('{"at": true, "state": "idle"}', "line 1 is no change"),
        ('{"at": 1%s, "state": "idle"}' % ("0" * 400), "line 1 is no change"),
        ('{"at": 2, "state": "idle"}\n{"at": 1, "state": "idle"}', "line 2 is no change"),
        (
            '{"at": 1, "state": "asleep"}',
            "asks for the state 'asleep', and the student knows idle, listening, speaking",
        ),
        ('{"at": 1, "state": 3}', "asks for the state 3"),
        ('{"at": 1, "prompt": " "}', "takes 1 to 2000 characters"),
        ('{"at": 1, "prompt": 5}', "line 1 is no change"),
        ('{"at": 1, "prompt": ["a"]}', "line 1 is no change"),
        ('{"at": 1, "mood": "x"}', "line 1 is no change"),
        ("\n", "holds no change"),
    ],
)
def test_lines_that_are_no_change_are_a_sentence(line, sentence, tmp_path):
    (tmp_path / "s.jsonl").write_text(line)
    with pytest.raises(UserError, match=sentence):
        read_script(tmp_path / "s.jsonl", NAMES, none)


def test_changes_after_the_end_of_a_clip_are_told(tmp_path, capsys):
    path = script(
        tmp_path / "s.jsonl", {"at": 0, "state": "idle"}, {"at": 2, "state": None}, {"at": 7, "state": "idle"}
    )
    read_script(path, NAMES, none)
    assert capsys.readouterr().out == ""
    read_script(path, NAMES, none, 2.0)
    assert "2 changes, the first at 2 s, come after the clip's end at 2 s" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- sound


def vowel(pitch, seconds=1.0, loud=0.3):
    """A buzz of harmonics, as of a voice."""
    time = np.arange(int(seconds * RATE)) / RATE
    return loud * sum(np.sin(2 * np.pi * k * pitch * time) / k for k in range(1, 8)) / 2


def write(path, *channels):
    samples = (np.stack(channels, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    return path


def test_a_voice_is_loud_and_periodic_and_noise_hum_and_silence_are_none():
    noise = np.random.default_rng(0).normal(size=RATE)
    for pitch in (80, 120, 220, 380):
        assert voiced(vowel(pitch)).mean() > 0.9
        assert voiced(vowel(pitch) + 0.01 * noise).mean() > 0.9
    assert voiced(0.2 * noise).mean() < 0.05
    assert voiced(np.zeros(RATE)).sum() == 0
    assert voiced(vowel(120, loud=1e-4)).sum() == 0
    assert (
        voiced(0.3 * np.sin(2 * np.pi * 3000.7 * TIMES) * (TIMES > 0.5)).mean() < 0.6
    )  # a limit: tones are voices, too
    assert len(voiced(np.zeros(10))) == 0


def test_one_voice_speaks_pauses_and_is_idle_and_two_take_turns(tmp_path):
    still = np.zeros(RATE)
    mono = read_sound(write(tmp_path / "m.wav", np.concatenate([still, vowel(150), still, still, still, still])))
    assert mono.shape == (1, 6 * RATE)
    assert [state_of_sound(mono, k, k + 1) for k in range(7)] == [
        "idle", "speaking", "listening", "listening", "idle", "idle", "idle"
    ]  # fmt: skip
    left, right = np.concatenate([vowel(110), still, still]), np.concatenate([vowel(210), vowel(210), still])
    stereo = read_sound(write(tmp_path / "s.wav", left, right))
    assert [state_of_sound(stereo, k, k + 1) for k in range(3)] == ["speaking", "listening", "idle"]


def test_whole_clips_are_sampled_in_a_state(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    ask = ["sample", "--model", str(folder / "student"), "--prompts", str(tmp_path / "prompts.txt"), "--out"]
    found = {}
    for name in (None, "idle", "speaking"):
        out = tmp_path / str(name)
        assert main([*ask, str(out), *(["--state", name] if name else [])]) == 0
        found[name] = (out / "a red circle-0.mp4").read_bytes()
        assert json.loads((out / "samples.jsonl").read_text()).get("state") == name
    assert len(set(found.values())) == 3
    assert main([*ask, str(tmp_path / "idle"), "--state", "speaking"]) == 2  # a folder is one way of sampling
    capsys.readouterr()
    assert main([*ask, str(tmp_path / "other"), "--state", "asleep"]) == 2
    assert "knows idle, listening, speaking" in capsys.readouterr().err


def test_what_is_no_sound_or_of_a_student_without_states_is_refused(folder, tmp_path):
    (tmp_path / "no.wav").write_text("no")
    lists = {"ffconcat.wav": f"ffconcat version 1.0\nfile '{tmp_path / 'a.wav'}'\n", "m3u.wav": "#EXTM3U\na.wav\n"}
    for name, text in lists.items():  # which lead to other files
        (tmp_path / name).write_text(text)
    for path in (tmp_path / "no.wav", folder / "portrait.png", *(tmp_path / name for name in lists)):
        with pytest.raises(UserError, match="cannot be read as sound"):
            read_sound(path)
    write_video(tmp_path / "silent.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
    with pytest.raises(UserError, match="holds no sound"):
        read_sound(tmp_path / "silent.mp4")
    os.mkfifo(tmp_path / "pipe.wav")
    for path, said in ((tmp_path / "pipe.wav", "is a pipe, not a file"), (tmp_path / "x.wav", "not there")):
        with pytest.raises(UserError, match=said):
            read_sound(path)
    with pytest.raises(UserError, match="is a pipe, not a file"):
        read_picture(tmp_path / "pipe.wav")
    with pytest.raises(UserError, match="knows no states"):
        follow_sound(write(tmp_path / "a.wav", np.zeros(RATE)), ())


def test_a_recording_of_any_depth_is_heard_alike_and_one_of_no_numbers_is_refused(tmp_path):
    sound = 0.5 * np.sin(np.arange(RATE) / 20)
    heard = {}
    for codec, form in (("pcm_u8", "u8"), ("pcm_s24le", "s32"), ("pcm_f32le", "flt"), ("pcm_f64le", "dbl")):
        scaled = {"u8": sound * 127 + 128, "s32": sound * (2**31 - 1)}.get(form, sound)
        heard[codec] = recorded(tmp_path / f"{codec}.wav", codec, form, scaled)
        assert np.abs(heard[codec][0] - sound).max() < 0.02
    with pytest.raises(UserError, match="samples that are infinite or none"):
        recorded(tmp_path / "nan.wav", "pcm_f32le", "flt", np.where(np.arange(RATE) == 99, np.nan, sound))


def recorded(path, codec, form, samples):
    kind = {"u8": np.uint8, "s32": np.int32, "flt": np.float32, "dbl": np.float64}[form]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples.astype(kind)[None], form, "mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    return read_sound(path)


def test_a_file_follows_a_recording_and_is_the_same_again(folder, tmp_path, capsys):
    sound = write(tmp_path / "talk.wav", np.concatenate([np.zeros(RATE // 2), vowel(150, 0.5)]))
    given = ["--first-frame", str(folder / "portrait.png"), "--prompt", "a red circle", "--precision", "fp32"]
    command = ["stream", "--model", str(folder / "student"), *given]
    assert main([*command, "--audio", str(sound), "--out", str(tmp_path / "a.mp4")]) == 0
    first = (tmp_path / "a.mp4").read_bytes()
    assert read_video(tmp_path / "a.mp4")[0].shape == (16, 32, 32, 3)
    same = script(tmp_path / "s.jsonl", {"at": 0, "state": "idle"}, {"at": 0.3, "state": "speaking"})
    assert main([*command, "--script", str(same), "--seconds", "1", "--out", str(tmp_path / "b.mp4")]) == 0
    assert (tmp_path / "b.mp4").read_bytes() == first
    assert main([*command, "--script", str(same), "--audio", str(sound), "--out", str(tmp_path / "c.mp4")]) == 2
    assert "leave out --audio" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- two stages


@pytest.mark.parametrize(("make", "decode"), [(0.06, 0.04), (0.04, 0.06)])
def test_two_stages_side_by_side_take_the_time_of_the_slower_one(make, decode):
    chunks = 8
    begun = time.perf_counter()
    for _ in islice(one_ahead(lambda n: time.sleep(make), count()), chunks):
        time.sleep(decode)
    taken = time.perf_counter() - begun
    meant, in_turn = max(make, decode) * (chunks - 1) + make + decode, chunks * (make + decode)
    assert meant - 0.01 < taken < (meant + in_turn) / 2


# ------------------------------------------------------------------------------------------------- the page


def test_the_page_takes_states_up_and_follows_a_script(studio, tmp_path):
    pytest.importorskip("starlette", reason="needs the extra `survey`")
    from starlette.testclient import TestClient

    from mogan.stream.app import make_app

    when = read_script(
        script(tmp_path / "s.jsonl", {"at": 0, "state": "idle"}, {"at": 0.2, "state": "speaking"}), NAMES, none
    )
    with TestClient(make_app(studio, "a red circle", 3, when), base_url="http://127.0.0.1") as client:
        told = client.get("/api/model").json()
        assert (told["states"], told["lab"]["manners"]) == (["auto", *NAMES], {"": "{}"})
        stream = client.post("/api/stream", json={"prompt": "a red circle", "state": "auto", "seed": 3}).json()[
            "stream"
        ]

        def piece(number):
            while (
                reply := client.post("/api/next", json={"stream": stream, "number": number, "flow": False})
            ).status_code == 204:
                pass
            return json.loads(reply.headers["x-piece"]), np.frombuffer(reply.content, np.uint8).reshape(-1, 32, 32, 4)[
                ..., :3
            ]

        found = [piece(n) for n in range(3)]
        assert [t["state"] for t, _ in found] == ["idle", "idle", "speaking"]
        follow = Following(studio, "a red circle", when)
        client.post("/api/prompt", json={"stream": stream, "prompt": "a red circle", "state": "listening"})
        assert [piece(n)[0]["change"] for n in (3, 4, 5)][1:] == [1, 1]
        assert piece(5)[0]["state"] is None
        unknown = client.post("/api/prompt", json={"stream": stream, "prompt": "a red circle", "state": "asleep"})
        assert unknown.status_code == 400
    want = made(studio, follow, 3)
    assert all(np.array_equal(a, b) for a, (_, b) in zip(want, found, strict=True))
    watched = Watched(studio, 3, [follow])
    assert np.array_equal(watched.piece(0), want[0])
    watched.close()


# ------------------------------------------------------------------------------------------------- 8 bits


def called(student):
    """A chunk's velocity after another chunk."""
    x = torch.randn(2, 1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = student.remember(x[0], text, student.begin(text))
        return student.chunk_velocity(x[1], torch.full((1,), 0.6), text, cache)


def rounded(weight_OI):
    """Each row in 8 bits, symmetric about 0: what torchao keeps of weights."""
    scale = weight_OI.abs().amax(1, keepdim=True) / 127
    return (weight_OI / scale).round().clamp(-127, 127) * scale


def test_weights_in_8_bits_are_off_by_half_a_step_and_the_answer_by_a_few_per_cent(family):
    student = CausalDenoiser(loaded(family))
    want = called(student)
    for layer in (m for m in student.transformer.blocks.modules() if isinstance(m, torch.nn.Linear)):
        found = rounded(layer.weight)
        assert (found - layer.weight).abs().amax() <= layer.weight.abs().amax() / 254 * 1.001
        layer.weight.data = found.detach()
    assert 1e-5 < float((called(student) - want).norm() / want.norm()) < 0.03


def test_int8_computes_in_the_blocks_alone_or_says_what_is_missing(folder, family, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"pip install 'mogan\[int8\]'"):
        studio_of(folder, precision="int8")
    monkeypatch.undo()
    pytest.importorskip("torchao", reason="needs the extra `int8`")
    student = CausalDenoiser(loaded(family))
    want, outside = called(student), student.transformer.proj_out.weight.clone()
    in_int8(student.transformer)
    assert 1e-5 < float((called(student) - want).norm() / want.norm()) < 0.06
    assert torch.equal(student.transformer.proj_out.weight, outside)
    assert type(student.transformer.blocks[0].attn1.to_q.weight.data) is not torch.Tensor
    text = studio_of(folder).text("a red circle", "idle")
    assert made(studio_of(folder, precision="int8"), lambda n: text, 3)[2].shape == (4, 32, 32, 3)

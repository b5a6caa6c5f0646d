"""The page's server: pieces by number, one stream at a time, what it refuses, what it never serves."""

import json
import threading
import time

import numpy as np
import pytest
import torch

pytest.importorskip("starlette", reason="needs the extra `survey`")

from starlette.testclient import TestClient

from mogan.cli import main
from mogan.stream import app as server
from mogan.stream.app import make_app
from mogan.stream.engine import MANNERS, open_studio, pieces
from mogan.stream.watched import flow_over
from test_stream import folder, student  # noqa: F401  fixtures
from test_survey_server import PATHS

PROMPT = "a red circle bouncing"


@pytest.fixture(scope="module")
def studio(folder):  # noqa: F811
    return open_studio(str(folder), torch.device("cpu"))


@pytest.fixture
def client(studio):
    with TestClient(make_app(studio, PROMPT, 3), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def begin(client, prompt=PROMPT, seed=3) -> str:
    reply = client.post("/api/stream", json={"prompt": prompt, "state": None, "seed": seed})
    assert reply.status_code == 200, reply.text
    return reply.json()["stream"]


def ask(client, stream, number, flow=False):
    """A piece: status, what is told of it, RGBA of its frames, of their flow."""
    for _ in range(60):
        reply = client.post("/api/next", json={"stream": stream, "number": number, "flow": flow})
        if reply.status_code != 204:
            break
    if reply.status_code != 200:
        return reply.status_code, reply.json()["error"], None, None
    told = json.loads(reply.headers["x-piece"])
    pixels = np.frombuffer(reply.content, np.uint8).reshape(-1, 32, 32, 4)
    return 200, told, pixels[: told["frames"]], pixels[told["frames"] :]


def test_the_page_gets_the_frames_of_the_engine_and_again_if_it_asks_again(client, studio):
    text, before = studio.text(PROMPT), None
    source = pieces(studio, lambda latent: text, 3)
    made = [next(source) for _ in range(3)]
    source.close()  # a student makes one clip at a time
    stream = begin(client)
    for number, frames in enumerate(made):
        status, told, seen, flow = ask(client, stream, number, flow=True)
        assert (status, told["frames"], told["change"]) == (200, 4 if number else 1, 0)
        assert np.array_equal(seen[..., :3], frames)
        assert (seen[..., 3] == 255).all()
        assert np.array_equal(flow, flow_over(before, frames))
        again = ask(client, stream, number)
        assert np.array_equal(again[2], seen)
        assert len(again[3]) == 0
        before = frames
    assert told["make"] > 0
    assert ask(client, stream, 5)[0] == 400


def test_another_prompt_takes_effect_and_words_it_does_not_know_are_named(client):
    stream = begin(client)
    assert ask(client, stream, 0)[1]["change"] == 0
    reply = client.post("/api/prompt", json={"stream": stream, "prompt": "a purple circle at rest", "state": None})
    assert reply.json() == {"change": 1, "notes": ["Words that the model does not know: purple."]}
    assert [ask(client, stream, number)[1]["change"] for number in (1, 2, 3)][-2:] == [1, 1]


def test_a_new_stream_ends_the_one_before(client):
    first, second = begin(client), begin(client, seed=4)
    assert ask(client, first, 0)[:2] == (
        409,
        "This stream has ended: another tab plays, or the server was started anew.",
    )
    one = ask(client, second, 0)[2]
    assert not np.array_equal(one, ask(client, begin(client), 0)[2])
    assert np.array_equal(one, ask(client, begin(client, seed=4), 0)[2])


def test_a_save_is_the_file_that_the_command_writes(client, folder, tmp_path):  # noqa: F811
    stream = begin(client)
    assert client.post("/api/clip", json={"stream": stream}).status_code == 409
    for number in range(4):
        ask(client, stream, number)
    reply = client.post("/api/clip", json={"stream": stream})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "video/mp4")
    out = tmp_path / "clip.mp4"
    assert (
        main(
            [
                "stream",
                "--model",
                str(folder),
                "--prompt",
                PROMPT,
                "--seed",
                "3",
                "--seconds",
                str(13 / 16),
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert out.read_bytes() == reply.content


def test_who_stops_asking_stops_the_work(client, studio, monkeypatch):
    calls, own = [], studio.student.chunk
    monkeypatch.setattr(studio.student, "chunk", lambda *given: (calls.append(time.monotonic()), own(*given))[1])
    stream = begin(client)
    ask(client, stream, 0)
    ask(client, stream, 1)
    time.sleep(1)
    made = len(calls)
    time.sleep(0.5)
    assert (
        len(calls) == made <= 3 * 4
    )  # three steps of each piece, of the chunk made ahead, and of one begun as it was taken
    assert ask(client, stream, 2)[0] == 200


def test_a_piece_that_takes_long_is_waited_for_in_short_questions(client, studio, monkeypatch):
    gate, own = threading.Event(), studio.student.chunk
    monkeypatch.setattr(studio.student, "chunk", lambda *given: (gate.wait(30), own(*given))[1])
    monkeypatch.setattr(server, "WAIT", 0.05)
    stream = begin(client)
    for _ in range(3):
        assert client.post("/api/next", json={"stream": stream, "number": 0, "flow": False}).status_code == 204
    gate.set()
    assert ask(client, stream, 0)[0] == 200
    assert ask(client, stream, 1)[0] == 200


def test_a_model_that_fails_says_so(client, studio, monkeypatch):
    monkeypatch.setattr(studio.student, "chunk", lambda x, *rest: x * float("nan"))
    stream = begin(client)
    for _ in range(2):
        status, said, _, _ = ask(client, stream, 0)
        assert (status, said[:40]) == (422, "Sampling ended in numbers that are infin")


def test_the_page_learns_what_it_needs(client):
    told = client.get("/api/model").json()
    assert (told["name"], told["fps"], told["width"], told["height"], told["steps"]) == ("student", 16, 32, 32, 3)
    assert (told["prompt"], told["seed"], list(told["lab"]["manners"])) == (PROMPT, 3, list(MANNERS))
    page = "".join(client.get(path).text for path in ("/", "/page.css", "/page.js"))
    for never in ("http://", "https://", "<script>", " style=", " onclick", "innerHTML"):
        assert never not in page


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("stream", {"prompt": "", "state": None, "seed": 0}, 422, "The prompt takes 1 to 2000 characters, not 0"),
        (
            "stream",
            {"prompt": "x" * 2001, "state": None, "seed": 0},
            422,
            "The prompt takes 1 to 2000 characters, not 2001",
        ),
        ("stream", {"prompt": "\ud800", "state": None, "seed": 0}, 422, "The prompt holds half a character"),
        ("stream", {"prompt": 3, "state": None, "seed": 0}, 400, "prompt must be text."),
        ("stream", {"prompt": "a", "state": None, "seed": -1}, 400, "seed must be a whole number"),
        ("stream", {"prompt": "a", "state": None, "seed": True}, 400, "seed must be a whole number"),
        ("stream", {"prompt": "a", "state": "idle", "seed": 0}, 400, "state must be null or one that the model knows."),
        ("stream", {"prompt": "a"}, 400, "The body must have exactly the fields prompt, state, seed."),
        ("next", {"stream": "x", "number": 0, "flow": False}, 409, "This stream has ended"),
        ("next", {"stream": None, "number": 0, "flow": False}, 409, "This stream has ended"),
        ("next", {"stream": "MINE", "number": 1, "flow": False}, 400, "number must be"),
        ("next", {"stream": "MINE", "number": -1, "flow": False}, 400, "number must be"),
        ("next", {"stream": "MINE", "number": "0", "flow": False}, 400, "number must be"),
        ("clip", {"stream": "\ud800"}, 409, "This stream has ended"),
        ("prompt", {"stream": "é", "prompt": "a", "state": None}, 409, "This stream has ended"),
        ("prompt", {"stream": "MINE", "prompt": "\n", "state": None}, 422, "The prompt takes"),
        ("clip", {"stream": "x"}, 409, "This stream has ended"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(client, path, body, status, said):
    mine = begin(client)
    body = {key: mine if value == "MINE" else value for key, value in body.items()}
    reply = client.post(f"/api/{path}", content=json.dumps(body), headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert reply.json()["error"].startswith(said)


def test_other_sites_cannot_use_it(client):
    stream = begin(client)
    assert (
        client.post(
            "/api/stream", content='{"prompt":"a","seed":0}', headers={"content-type": "text/plain"}
        ).status_code
        == 415
    )
    assert client.post("/api/next", data={"stream": stream}).status_code == 415
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1"):
        for reply in (
            client.get("/", headers={"host": host}),
            client.post("/api/clip", json={"stream": stream}, headers={"host": host}),
        ):
            assert reply.status_code == 400
    assert client.get("/", headers={"host": "localhost:8766"}).status_code == 200
    for reply in (
        client.get("/"),
        client.get("/nope"),
        client.get("/api/stream"),
        client.post("/api/next", content=b"x"),
    ):
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("path", [*PATHS, "/transformer/config.json", "/api/clip/..%2f..%2fetc%2fpasswd"])
def test_no_path_outside_the_list_is_served(client, path):
    client.get("/")
    sent = client.build_request("GET", "/")
    sent.url = sent.url.copy_with(raw_path=path.encode())
    assert client.send(sent).status_code == 404

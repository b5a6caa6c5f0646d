"""What the server gives, refuses and keeps."""

import errno
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from http.client import HTTPConnection

import pytest

pytest.importorskip("starlette", reason="needs the extra `survey`")

from starlette.testclient import TestClient

from mogan.cli import main
from mogan.errors import UserError
from mogan.survey import guard
from mogan.survey.app import make_app
from mogan.survey.folder import read_survey
from mogan.survey.serve import listen, serve
from mogan.survey.store import link_token
from test_survey_study import DEVICE, NAMES, WATCH, ballot, enter, make_survey


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return make_survey(tmp_path_factory.mktemp("built"))


@pytest.fixture
def folder(built, tmp_path):
    """A survey nobody has answered yet; clips are shared with the others."""
    (tmp_path / "survey.json").write_bytes((built / "survey.json").read_bytes())
    (tmp_path / "clips").symlink_to(built / "clips")
    return tmp_path


@pytest.fixture
def client(folder):
    with TestClient(make_app(folder), raise_server_exceptions=False) as client:
        yield client


def test_no_byte_a_browser_can_get_names_a_system(client, folder):
    survey = read_survey(folder)
    visit = enter(client)
    replies = [client.get(path) for path in ("/", "/page.js", "/page.css", "/api/survey", "/api/visit", "/nothing")]
    replies += [client.get(f"/clips/{clip.file}") for clip in survey.clips]
    replies += [client.post("/api/vote", json=ballot(k)) for k in range(len(visit["screens"]))]
    replies += [client.post("/api/vote", json=ballot(99)), client.post("/api/vote", content=b"x")]
    assert [reply.status_code for reply in replies[:4]] == [200] * 4
    told = b"".join(reply.content + str(reply.headers).encode() for reply in replies) + json.dumps(visit).encode()
    for name in NAMES:
        assert name.encode() not in told.lower()
    assert survey.secret.encode() not in told
    assert not any(item.id.encode() in told for item in survey.items)


def test_checks_and_repeats_look_like_pairs(client):
    shapes = {tuple(sorted(screen)) for screen in enter(client)["screens"] if not screen["practice"]}
    assert shapes == {("fps", "height", "left", "practice", "prompt", "right", "width")}


def test_every_answer_carries_security_headers(client, monkeypatch):
    replies = [client.get("/"), client.get("/api/visit"), client.get("/nope"), client.delete("/api/vote")]
    monkeypatch.setattr("mogan.survey.app.visit_for_browser", lambda *_: 1 / 0)
    replies.append(client.post("/api/visit", json={"consent": True, "platform": {}, "device": DEVICE}))
    assert [reply.status_code for reply in replies] == [200, 401, 404, 405, 500]
    for reply in replies:
        for name, value in guard.HEADERS.items():
            assert reply.headers[name] == value
    assert "unsafe" not in guard.HEADERS["content-security-policy"]


def test_the_page_loads_nothing_from_elsewhere_and_needs_no_inline_code(client):
    page = client.get("/").text + client.get("/page.css").text + client.get("/page.js").text
    assert "http://" not in page
    assert "https://" not in page
    assert "<script>" not in page
    assert " style=" not in page
    assert " onclick" not in page
    assert "innerHTML" not in page


PATHS = [
    "/clips/../survey.json",
    "/clips/..%2fsurvey.json",
    "/clips/%2e%2e/survey.json",
    "/clips/..%5csurvey.json",
    "/clips/%2fetc%2fpasswd",
    "/clips/",
    "/clips",
    "/clips/a.mp4%00",
    "/survey.json",
    "/votes.sqlite",
    "//etc/passwd",
    "/page/../survey.json",
    "/page.py",
    "/..%2f..%2fetc/passwd",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_outside_the_list_is_served(client, path):
    client.get("/")
    sent = client.build_request("GET", "/")
    sent.url = sent.url.copy_with(raw_path=path.encode())
    assert client.send(sent).status_code == 404


def test_clips_answer_range_requests(client, folder):
    clip = read_survey(folder).clips[0].file
    whole = client.get(f"/clips/{clip}")
    assert (whole.status_code, whole.headers["content-type"]) == (200, "video/mp4")
    size = len(whole.content)
    for asked, begin, end in (
        ("10-29", 10, 30),
        ("0-0", 0, 1),
        ("5-", 5, size),
        ("-7", size - 7, size),
        ("0-99999999", 0, size),
        ("-99999999", 0, size),
    ):
        part = client.get(f"/clips/{clip}", headers={"range": f"bytes={asked}"})
        assert (part.status_code, part.content) == (206, whole.content[begin:end])
        assert part.headers["content-range"] == f"bytes {begin}-{end - 1}/{size}"
    for asked in ("99999999-", f"{size}-", "9-3", "-0", "-"):
        part = client.get(f"/clips/{clip}", headers={"range": f"bytes={asked}"})
        assert (part.status_code, part.headers["content-range"]) == (416, f"bytes */{size}")
    for asked in ("bytes=0-1,4-5", "lines=1-2", "bytes=x-", "bytes=" + "9" * 5000 + "-"):  # ignored, as RFC 9110 allows
        part = client.get(f"/clips/{clip}", headers={"range": asked})
        assert (part.status_code, part.content) == (200, whole.content)
    head = client.head(f"/clips/{clip}")
    assert (head.status_code, head.content, head.headers["accept-ranges"]) == (200, b"", "bytes")


def test_votes_go_in_order_once_and_again_does_no_harm(client, folder):
    visit = enter(client)
    assert client.post("/api/vote", json=ballot(1)).status_code == 409
    assert client.post("/api/vote", json=ballot(0)).json() == {"kept": "new", "done": 1}
    assert client.post("/api/vote", json=ballot(0)).json() == {"kept": "same", "done": 1}
    assert client.post("/api/vote", json=ballot(0, total_ms=9)).json() == {"kept": "same", "done": 1}
    other = client.post("/api/vote", json=ballot(0, motion="right"))
    assert (other.status_code, other.json()["error"]) == (
        409,
        "This pair was answered before; the first answer stands.",
    )
    assert client.get("/api/visit").json()["done"] == 1
    for slot in range(1, len(visit["screens"])):
        assert client.post("/api/vote", json=ballot(slot)).status_code == 200
    assert client.post("/api/vote", json=ballot(len(visit["screens"]))).status_code == 409
    code = client.get("/api/visit").json()["code"]
    assert len(code) == 10
    rows = sqlite3.connect(folder / "votes.sqlite").execute("SELECT count(*), count(DISTINCT slot) FROM votes")
    assert rows.fetchone() == (len(visit["screens"]),) * 2


def test_the_table_itself_refuses_a_second_vote(client, folder):
    enter(client)
    client.post("/api/vote", json=ballot(0))
    db = sqlite3.connect(folder / "votes.sqlite")
    with pytest.raises(sqlite3.IntegrityError):
        db.execute("INSERT INTO votes SELECT * FROM votes")
    with pytest.raises(sqlite3.IntegrityError):
        db.execute("INSERT INTO slots SELECT rater, 99, kind, item, swapped FROM slots LIMIT 1")


def test_the_same_vote_sent_many_times_at_once_counts_once(client):
    enter(client)
    replies = []
    threads = [
        threading.Thread(target=lambda: replies.append(client.post("/api/vote", json=ballot(0)).json()))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reply["kept"] for reply in replies) == ["new"] + ["same"] * 7


def test_a_visit_resumes_by_its_link_and_by_its_platforms_link(client, folder):
    first = enter(client, PROLIFIC_PID="abc", STUDY_ID="s", SESSION_ID="1")
    client.post("/api/vote", json=ballot(0))
    assert enter(client, PROLIFIC_PID="abc", STUDY_ID="s", SESSION_ID="1")["done"] == 1
    assert client.get("/api/visit").json()["screens"] == first["screens"]
    assert enter(client, workerId="abc", hitId="h", assignmentId="a")["token"] != first["token"]
    assert enter(client)["token"] != enter(client)["token"]
    client.headers["authorization"] = f"Bearer {first['token']}"
    with TestClient(make_app(folder)) as again:  # the server was started anew
        again.headers["authorization"] = f"Bearer {first['token']}"
        assert again.get("/api/visit").json()["screens"] == first["screens"]


@pytest.mark.parametrize(
    ("theirs", "others"),
    [
        ({"PROLIFIC_PID": "abc", "SESSION_ID": "1"}, {"PROLIFIC_PID": "abc", "SESSION_ID": "2"}),
        ({"PROLIFIC_PID": "abc", "SESSION_ID": "1"}, {"PROLIFIC_PID": "abc"}),
        ({"PROLIFIC_PID": "abc"}, {"PROLIFIC_PID": "abc"}),
        ({"workerId": "w", "assignmentId": "a", "hitId": "h"}, {"workerId": "w", "hitId": "h"}),
        ({"workerId": "w", "assignmentId": "a"}, {"workerId": "w", "assignmentId": "b"}),
    ],
)
def test_a_participants_number_alone_opens_nobodys_visit(client, theirs, others):
    visit = enter(client, **theirs)
    for slot in range(len(visit["screens"])):
        kept = client.post("/api/vote", json=ballot(slot)).json()
    del client.headers["authorization"]
    reply = client.post("/api/visit", json={"consent": True, "platform": others, "device": DEVICE})
    assert (reply.status_code, list(reply.json())) == (409, ["error"])
    assert kept["code"] not in reply.text
    assert visit["token"] not in reply.text


@pytest.mark.parametrize("token", ["", "x", "Bearer", "Bearer ", "Bearer a.b", "Basic abc", "Bearer " + "a" * 5000])
def test_bad_tokens_are_refused(client, token):
    for reply in (
        client.get("/api/visit", headers={"authorization": token}),
        client.post("/api/vote", json=ballot(0), headers={"authorization": token}),
    ):
        assert reply.status_code == 401


def test_a_token_for_a_rater_who_never_came_is_refused(client, folder):
    client.headers["authorization"] = f"Bearer {link_token(read_survey(folder), 'f' * 16)}"
    assert client.get("/api/visit").status_code == 401
    assert client.post("/api/vote", json=ballot(0)).status_code == 401


def test_guessing_tokens_is_slowed_down(client):
    codes = [client.get("/api/visit", headers={"authorization": f"Bearer {k}.0"}).status_code for k in range(30)]
    assert codes[:20] == [401] * 20
    assert 429 in codes[20:]


def test_a_rater_who_hammers_is_told_to_wait(client):
    enter(client)
    replies = [client.post("/api/vote", json=ballot(0)) for _ in range(60)]
    assert replies[0].status_code == 200
    assert replies[-1].status_code == 429
    assert int(replies[-1].headers["retry-after"]) >= 1


BAD_BODIES = {
    "not json": b"{",
    "not an object": b"[]",
    "a number": b"1",
    "nothing": b"",
    "deep": b"[" * 4000,
    "NaN": json.dumps(ballot(0)).replace("30000", "NaN").encode(),
    "infinite": json.dumps(ballot(0)).replace("30000", "1e999").encode(),
    "huge integer": json.dumps(ballot(0)).replace("30000", "9" * 5000).encode(),
    "twice the same key": b'{"slot": 0, ' + json.dumps(ballot(0)).encode()[1:],
    "not UTF-8": b'{"slot": "\xff"}',
    "unknown field": json.dumps({**ballot(0), "system": "x"}).encode(),
    "missing field": json.dumps({"slot": 0, "answers": ballot(0)["answers"]}).encode(),
    "slot is text": json.dumps({**ballot(0), "slot": "0"}).encode(),
    "slot is true": json.dumps({**ballot(0), "slot": False}).encode(),
    "slot is negative": json.dumps(ballot(-1)).encode(),
    "slot is a fraction": json.dumps({**ballot(0), "slot": 0.5}).encode(),
    "slot is huge": json.dumps(ballot(10**12)).encode(),
    "answer unknown": json.dumps(ballot(0, motion="first")).encode(),
    "answer is a list": json.dumps({**ballot(0), "answers": {**ballot(0)["answers"], "motion": ["left"]}}).encode(),
    "answers missing": json.dumps({**ballot(0), "answers": {"motion": "left"}}).encode(),
    "answers extra": json.dumps({**ballot(0), "answers": {**ballot(0)["answers"], "x": "left"}}).encode(),
    "watch unknown": json.dumps({**ballot(0), "watch": {**WATCH, "x": 1}}).encode(),
    "watch negative": json.dumps(ballot(0, plays=-1)).encode(),
    "watch true": json.dumps(ballot(0, plays=True)).encode(),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_malformed_votes_are_refused_and_not_kept(client, name):
    enter(client)
    reply = client.post("/api/vote", content=BAD_BODIES[name], headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert client.get("/api/visit").json()["done"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"consent": False},
        {"consent": 1},
        {"device": {}},
        {"device": {**DEVICE, "screen_width": 1e9}},
        {"device": {**DEVICE, "name": "x"}},
        {"platform": {"PROLIFIC_PID": "<script>"}},
        {"platform": {"PROLIFIC_PID": "a" * 65}},
        {"platform": {"PROLIFIC_PID": ""}},
        {"platform": {"PROLIFIC_PID": 1}},
        {"platform": {"other": "a"}},
        {"platform": []},
        {"platform": {"workerId": "w", "assignmentId": "ASSIGNMENT_ID_NOT_AVAILABLE"}},
    ],
)
def test_malformed_visits_are_refused(client, change):
    body = {"consent": True, "platform": {}, "device": DEVICE, **change}
    assert client.post("/api/visit", json=body).status_code == 400


def test_large_and_mistyped_bodies_are_refused(client):
    enter(client)
    as_json = {"content-type": "application/json"}
    assert client.post("/api/vote", content=b" " * (guard.BODY_BYTES + 1), headers=as_json).status_code == 413
    streamed = client.post("/api/vote", content=(b" " * 1000 for _ in range(100)), headers=as_json)
    assert streamed.status_code == 413
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = client.post("/api/vote", content=json.dumps(ballot(0)).encode(), headers={"content-type": kind})
        assert reply.status_code == 415


def test_on_a_full_disk_nothing_is_half_kept_and_the_vote_can_come_again(client):
    visits = [enter(client) for _ in range(8)]
    store, desk = client.app.state.store, client.app.state.desk

    def limit(pages: int) -> int:  # SQLite's own "database or disk is full"; never less than there are now
        return store.db.execute(f"PRAGMA max_page_count={pages}").fetchone()[0]

    assert desk.submit(limit, 1).result() > 1
    for visit in visits:
        client.headers["authorization"] = f"Bearer {visit['token']}"
        replies = [client.post("/api/vote", json=ballot(slot)) for slot in range(len(visit["screens"]))]
        if replies[-1].status_code != 200:
            break
    slot = next(k for k, reply in enumerate(replies) if reply.status_code != 200)
    assert replies[slot].status_code == 503
    assert replies[slot].headers["retry-after"] == "5"
    desk.submit(limit, 1_000_000).result()
    assert client.get("/api/visit").json()["done"] == slot
    assert client.post("/api/vote", json=ballot(slot)).json()["kept"] == "new"


def test_a_changed_design_is_not_mixed_with_old_votes(folder):
    with TestClient(make_app(folder)) as client:
        enter(client)
    text = (folder / "survey.json").read_text()
    (folder / "survey.json").write_text(text.replace("Which clip is better?", "Other title"))
    with pytest.raises(UserError, match="changed after raters came"):
        make_app(folder)


def test_a_port_in_use_is_one_sentence(folder):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} is in use.*--port {port + 1}"):
            serve(folder, port=port)
        assert main(["survey", "serve", str(folder), "--port", str(port)]) == 2
    for host, port, match in (
        ("127.0.0.1", 70_000, "--port takes"),
        ("no.such.host.invalid", 0, "no address"),
        ("a..b", 0, "no address"),
    ):
        with pytest.raises(UserError, match=match):
            listen(host, port)


def test_the_last_port_in_use_is_given_one_that_can_be(monkeypatch):
    def in_use(*_):
        raise OSError(errno.EADDRINUSE, "in use")

    monkeypatch.setattr(socket.socket, "bind", in_use)
    with pytest.raises(UserError, match="--port 0"):
        listen("127.0.0.1", 65535)


def test_ctrl_c_is_how_a_page_is_meant_to_end(folder, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("uvicorn.Server.run", stopped)
    assert main(["survey", "serve", str(folder), "--port", "0"]) == 0
    assert capsys.readouterr().err == ""


def test_votes_that_cannot_be_kept_are_said_before_anybody_comes(folder):
    (folder / "votes.sqlite").mkdir()
    with pytest.raises(UserError, match=r"votes.sqlite cannot be opened .*move it away to start again"):
        serve(folder, port=0)
    (folder / "votes.sqlite").rmdir()
    for damaged in (b"something else" * 100, b"SQLite format 3\0" + b"x" * 50):
        (folder / "votes.sqlite").write_bytes(damaged)
        with pytest.raises(UserError, match=r"votes.sqlite cannot be opened .*restore it from a copy"):
            serve(folder, port=0)


def test_a_folder_that_is_no_survey_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"holds no survey\.json"):
        serve(tmp_path, port=0)


def start(folder) -> tuple[subprocess.Popen, int]:
    """A server of its own process on a free port."""
    code = "import sys, pathlib; from mogan.survey.serve import serve; serve(pathlib.Path(sys.argv[1]), port=0)"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert "127.0.0.1" in line, line
    return process, int(line.split("127.0.0.1:")[1].split("/")[0])


def test_kill_9_loses_no_acknowledged_vote(folder):
    process, port = start(folder)
    kept: dict[str, int] = {}
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read()

        def rate() -> None:
            http = HTTPConnection("127.0.0.1", port, timeout=10)
            headers = {"content-type": "application/json"}

            def post(path: str, body: dict) -> dict:
                http.request("POST", path, json.dumps(body), headers)
                return json.loads(http.getresponse().read())

            try:
                while True:
                    token = post("/api/visit", {"consent": True, "platform": {}, "device": DEVICE})["token"]
                    headers["authorization"] = f"Bearer {token}"
                    for slot in range(8):
                        if post("/api/vote", ballot(slot)).get("kept") == "new":
                            kept[token.split(".")[0]] = slot + 1
            except (TimeoutError, OSError, ValueError, KeyError):
                return

        threads = [threading.Thread(target=rate) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        os.kill(process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(15)
    finally:
        process.kill()
        process.wait()
    assert sum(kept.values()) > 20
    with TestClient(make_app(folder)) as client:
        survey = client.app.state.survey
        for rater, done in kept.items():
            client.headers["authorization"] = f"Bearer {link_token(survey, rater)}"
            assert client.get("/api/visit").json()["done"] in (done, done + 1)  # one may be kept unacknowledged


def test_who_comes_to_a_full_study_is_told_so_and_not_to_try_again(client, monkeypatch):
    enter(client)
    monkeypatch.setattr("mogan.survey.store.MAX_RATERS", 1)
    reply = client.post("/api/visit", json={"consent": True, "platform": {}, "device": DEVICE})
    assert (reply.status_code, reply.json()) == (403, {"error": "The study is full. Thank you for coming."})

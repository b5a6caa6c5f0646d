"""Simultaneous raters on loopback: does a vote get lost or counted twice, and how long does one take?

    python benchmarks/survey_load.py --raters 200 --seconds 120

Makes a small survey in a temporary folder and serves it in a process of its own. Every rater fetches parts of clips as
phones do and answers all pairs after --pause seconds each (a real one takes half a minute; 0 measures the most that is
taken), one vote in five twice at once. Then the server is killed and its database compared with what was acknowledged.
Ends after --seconds at the latest; exit code 1 on a loss.
"""

import argparse
import asyncio
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mogan.data.video import write_video
from mogan.survey.build import build
from mogan.survey.guard import DEVICE, WATCH

SERVE = "import sys, pathlib; from mogan.survey.serve import serve; serve(pathlib.Path(sys.argv[1]), port=0)"


class Client:
    """One keep-alive HTTP/1.1 connection to loopback, as thin as possible so that the server is what is measured."""

    def __init__(self, port: int):
        self.port = port
        self.token = ""

    async def call(self, method: str, path: str, body: dict | None = None, extra: str = "") -> tuple[int, dict, bytes]:
        """(status, headers, body); opens the connection again where it was closed."""
        data = json.dumps(body).encode() if body is not None else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n{extra}"
        if body is not None:
            head += "Content-Type: application/json\r\n"
        if self.token:
            head += f"Authorization: Bearer {self.token}\r\n"
        for _ in range(3):
            try:
                if not hasattr(self, "writer"):
                    self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
                self.writer.write(head.encode() + b"\r\n" + data)
                lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:] if line)}
                content = await self.reader.readexactly(int(headers.get("content-length", 0)))
                return int(lines[0].split()[1]), headers, content
            except (OSError, asyncio.IncompleteReadError):
                self.close()
        raise ConnectionError(path)

    def close(self) -> None:
        """Drop the connection."""
        if hasattr(self, "writer"):
            self.writer.close()
            del self.writer


async def rate(
    port: int, seed: int, pause: float, until: float, taken: dict[str, list[float]], kept: dict[str, dict]
) -> None:
    """One rater's whole visit: answers at random, twice at once now and then; remembers what was acknowledged as new."""
    choice = random.Random(seed)
    client, twin = Client(port), Client(port)

    async def timed(who: Client, kind: str, *given) -> tuple[int, dict, bytes]:
        while True:
            begin = time.perf_counter()
            reply = await who.call(*given)
            if reply[0] != 429 or time.time() > until:
                taken.setdefault(kind, []).append(time.perf_counter() - begin)
                return reply
            taken.setdefault("told to wait", []).append(0)
            await asyncio.sleep(int(reply[1]["retry-after"]) * choice.uniform(0.5, 1.5))

    try:
        await timed(client, "page", "GET", "/")
        start = {"consent": True, "platform": {"PROLIFIC_PID": f"p{seed}"}, "device": dict.fromkeys(DEVICE, 1)}
        status, _, body = await timed(client, "visit", "POST", "/api/visit", start)
        assert status == 200, body
        visit = json.loads(body)
        client.token = twin.token = visit["token"]
        mine = kept.setdefault(visit["token"].split(".")[0], {})
        for slot, screen in enumerate(visit["screens"]):
            if time.time() > until:
                return
            await asyncio.sleep(choice.uniform(0, 2 * pause))
            status, _, _ = await timed(client, "clip", "GET", screen["left"], None, "Range: bytes=0-65535\r\n")
            assert status == 206, status
            answers = {question["id"]: choice.choice(("left", "tie", "right")) for question in visit["questions"]}
            vote = {"slot": slot, "answers": answers, "watch": dict.fromkeys(WATCH, 1)}
            calls = [timed(client, "vote", "POST", "/api/vote", vote)]
            if choice.random() < 0.2:
                calls.append(timed(twin, "vote", "POST", "/api/vote", vote))
            replies = [(status, json.loads(body)) for status, _, body in await asyncio.gather(*calls)]
            assert all(status == 200 for status, _ in replies), replies
            assert sorted(reply["kept"] for _, reply in replies) == sorted(["new", "same"][: len(replies)]), replies
            mine[slot] = answers
    finally:
        client.close()
        twin.close()


def check(path: Path, kept: dict[str, dict]) -> tuple[int, int, int]:
    """(votes in the database, acknowledged votes missing or changed there, votes doubled)."""
    rows = sqlite3.connect(path).execute("SELECT rater, slot, answers FROM votes").fetchall()
    stored = {(rater, slot): json.loads(answers) for rater, slot, answers in rows}
    lost = sum(stored.get((rater, slot)) != said for rater, mine in kept.items() for slot, said in mine.items())
    return len(rows), lost, len(rows) - len(stored)


async def crowd(
    port: int, raters: int, pause: float, until: float
) -> tuple[dict[str, list[float]], dict[str, dict], list]:
    """All raters at once."""
    taken, kept = {}, {}
    visits = [
        asyncio.wait_for(rate(port, k, pause, until, taken, kept), until - time.time() + 5) for k in range(raters)
    ]
    failures = [one for one in await asyncio.gather(*visits, return_exceptions=True) if one is not None]
    return taken, kept, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raters", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--pause", type=float, default=2.0)
    parser.add_argument("--pairs", type=int, default=10)
    given = parser.parse_args()
    assert given.raters <= 300, "one address may start 300 visits; more would only measure the limit"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for n, name in enumerate(("a", "b")):
            (root / name).mkdir()
            for p in range(given.pairs):
                noise = np.random.default_rng(2 * p + n).integers(0, 255, (16, 120, 208, 3), dtype=np.uint8)
                write_video(root / name / f"prompt {p}-0.mp4", noise, 16.0)
        build((str(root / "a"), str(root / "b")), out=root / "survey", per_rater=given.pairs)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(root / "survey")], stdout=subprocess.PIPE, text=True
        )
        try:
            port = int(server.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
            begin = time.time()
            taken, kept, failures = asyncio.run(crowd(port, given.raters, given.pause, begin + given.seconds))
            wall = time.time() - begin
        finally:
            server.kill()  # not asked to stop: what was acknowledged must be there all the same
            server.wait()
        votes, lost, doubled = check(root / "survey" / "votes.sqlite", kept)
    print(f"{given.raters} raters, {votes} votes in {wall:.1f} s ({votes / wall:.0f} per second)")
    print(f"acknowledged {sum(map(len, kept.values()))}, lost {lost}, doubled {doubled}, failed raters {len(failures)}")
    for kind, times in taken.items():
        if kind == "told to wait":
            print(f"{kind}: {len(times)} times")
        else:
            low, high = (1000 * np.percentile(times, q) for q in (50, 95))
            print(f"{kind}: {len(times)} calls, p50 {low:.0f} ms, p95 {high:.0f} ms, max {1000 * max(times):.0f} ms")
    for failure in failures[:3]:
        print("failed:", repr(failure))
    return 1 if lost or doubled or failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""The web application: one page, its clips, four calls. What it answers never tells which system made a clip.

| call | does |
|---|---|
| ``GET /api/survey`` | what the first page says |
| ``POST /api/visit`` ``{consent, platform, device}`` | a new rater (or, by the same platform's link, the same one again) |
| ``GET /api/visit`` | resume; the rater's token is in ``Authorization: Bearer`` |
| ``POST /api/vote`` ``{slot, answers, watch}`` | keep one vote; 200 once it is on the disk |

Clips are looked up in the survey's list by their random names, so no request names a path.
"""

import asyncio
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mogan.survey import guard
from mogan.survey.ballots import SIDES
from mogan.survey.folder import Item, Survey, read_survey
from mogan.survey.plan import Slot
from mogan.survey.store import Begun, Full, Store, Visit, completion_code, link_token, rater_of

RANGE = re.compile(r"bytes=(\d{0,12})-(\d{0,12})")
CHUNK = 1 << 18
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
T = TypeVar("T")


def make_app(folder: Path) -> Starlette:
    """The application that serves one survey folder. Raises ``UserError`` when the folder is not one."""
    survey = read_survey(folder)
    desk = ThreadPoolExecutor(1, thread_name_prefix="votes")
    store = desk.submit(Store, folder, survey).result()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        desk.submit(store.close).result()
        desk.shutdown()

    app = Starlette(
        routes=[
            *(Route(path, partial(_page, name=name, media=media)) for path, (name, media) in PAGE.items()),
            Route("/clips/{name}", _clip),
            Route("/api/survey", _survey),
            Route("/api/visit", _visit, methods=["GET", "POST"]),
            Route("/api/vote", _vote, methods=["POST"]),
        ],
        middleware=[Middleware(guard.SecurityHeaders)],
        exception_handlers={
            HTTPException: _refused,
            sqlite3.Error: _not_kept,
            Exception: _broken,
        },
        lifespan=lifespan,
    )
    app.state.survey = survey
    app.state.items = {item.id: item for item in survey.items}
    app.state.clips = {clip.file: folder / "clips" / clip.file for clip in survey.clips}
    app.state.store = store
    app.state.desk = desk
    app.state.by_address = guard.RateLimit(burst=1000, per_second=100)  # a class room behind one address
    app.state.new_by_address = guard.RateLimit(burst=300, per_second=0.5)
    app.state.by_rater = guard.RateLimit(burst=40, per_second=5)
    app.state.wrong_tokens = guard.RateLimit(burst=20, per_second=0.2)
    return app


async def _page(request: Request, name: str, media: str) -> Response:
    body = (files("mogan.survey") / "page" / name).read_bytes()
    return Response(body, media_type=media, headers={"cache-control": "no-cache"})


async def _clip(request: Request) -> Response:
    """A clip or a range of it, which phones insist on. Read here, not in threads: five hops per clip cost more than the reading."""
    path: Path | None = request.app.state.clips.get(request.path_params["name"])
    if path is None:
        raise HTTPException(404, "No such clip.")
    size = path.stat().st_size
    headers = {"accept-ranges": "bytes", "cache-control": "private, max-age=86400, immutable"}
    asked = RANGE.fullmatch(request.headers.get("range", ""))  # anything else, as several ranges, may be ignored
    begin, end = _span(asked[1], asked[2], size) if asked else (0, size)
    if begin >= end:
        raise HTTPException(416, "The clip is shorter than that.", {"content-range": f"bytes */{size}"})
    if asked:
        headers["content-range"] = f"bytes {begin}-{end - 1}/{size}"
    headers["content-length"] = str(end - begin)
    status = 206 if asked else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type="video/mp4")
    return StreamingResponse(_bytes(path, begin, end), status, headers, media_type="video/mp4")


def _span(first: str, last: str, size: int) -> tuple[int, int]:
    """The half-open span that ``bytes=first-last`` means (RFC 9110); empty where there is none."""
    if first:
        return int(first), min(int(last) + 1, size) if last else size
    return max(0, size - int(last or 0)), size


async def _bytes(path: Path, begin: int, end: int) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        file.seek(begin)
        while begin < end:
            piece = file.read(min(CHUNK, end - begin))
            if not piece:
                return
            begin += len(piece)
            yield piece


async def _survey(request: Request) -> Response:
    request.app.state.by_address.spend(_address(request))
    survey: Survey = request.app.state.survey
    return _answer({"title": survey.title, "intro": survey.intro, "questions": _questions(survey)})


async def _visit(request: Request) -> Response:
    state, address = request.app.state, _address(request)
    state.by_address.spend(address)
    if request.method == "GET":
        rater = _rater(request)
        visit = await _at_desk(request, state.store.resume, rater)
        if visit is None:
            raise HTTPException(401, "This link belongs to no visit: start again.")
        return _answer(visit_for_browser(state.survey, state.items, visit))
    body = guard.fields(await guard.read_json(request), ("consent", "platform", "device"), "The body")
    if body["consent"] is not True:
        raise HTTPException(400, "Taking part needs consent.")
    platform = guard.platform(body["platform"])
    device = guard.numbers(body["device"], guard.DEVICE, "device")
    state.new_by_address.spend(address)
    try:
        visit = await _at_desk(request, state.store.open, _external(platform), platform, device, time.time())
    except Begun:
        state.wrong_tokens.spend(address)
        raise HTTPException(409, "You have begun before: open the page in the browser you began in.") from None
    except Full:
        raise HTTPException(403, "The study is full. Thank you for coming.") from None
    return _answer(visit_for_browser(state.survey, state.items, visit))


async def _vote(request: Request) -> Response:
    state = request.app.state
    state.by_address.spend(_address(request))
    rater = _rater(request)
    state.by_rater.spend(rater)
    body = guard.fields(await guard.read_json(request), ("slot", "answers", "watch"), "The body")
    slot = body["slot"]
    if isinstance(slot, bool) or not isinstance(slot, int) or not 0 <= slot < 10_000:
        raise HTTPException(400, "slot must be a whole number from 0.")
    answers = guard.fields(body["answers"], tuple(question.id for question in state.survey.questions), "answers")
    if any(answer not in SIDES for answer in answers.values()):
        raise HTTPException(400, f"Each answer must be one of {', '.join(SIDES)}.")
    watch = guard.numbers(body["watch"], guard.WATCH, "watch")
    outcome, visit = await _at_desk(request, state.store.vote, rater, slot, answers, watch, time.time())
    if visit is None:
        raise HTTPException(401, "This link belongs to no visit: start again.")
    if outcome == "ahead":
        raise HTTPException(409, f"Answer pair {visit.done} first.")
    if outcome == "different":
        raise HTTPException(409, "This pair was answered before; the first answer stands.")
    return _answer({"kept": outcome, "done": visit.done, **_ending(state.survey, visit)})


def visit_for_browser(survey: Survey, items: dict[str, Item], visit: Visit) -> dict[str, Any]:
    """All a rater's browser learns: texts, the list of screens, and which are done. No system, no kind but practice."""
    rates = {clip.file: clip for clip in survey.clips}

    def screen(slot: Slot) -> dict[str, Any]:
        item = items[slot.item]
        left, right = (item.second, item.first) if slot.swapped else (item.first, item.second)
        shown: dict[str, Any] = {
            "left": f"/clips/{left}",
            "right": f"/clips/{right}",
            "fps": rates[left].fps,
            "width": rates[left].width,
            "height": rates[left].height,
            "prompt": item.prompt,
            "practice": slot.kind == "practice",
        }
        if slot.kind == "practice":
            shown["lesson"] = item.lesson
            shown["expect"] = {question: to_side(answer, slot.swapped) for question, answer in item.expect.items()}
        return shown

    return {
        "token": link_token(survey, visit.rater),
        "questions": _questions(survey),
        "screens": [screen(slot) for slot in visit.slots],
        "done": visit.done,
        **_ending(survey, visit),
    }


def _questions(survey: Survey) -> list[dict[str, Any]]:
    return [asdict(question) for question in survey.questions]


def to_side(answer: str, swapped: bool) -> str:
    """What a rater sees of an answer: first / tie / second -> left / tie / right."""
    return {"first": SIDES[2 * swapped], "tie": "tie", "second": SIDES[2 - 2 * swapped]}[answer]


def _ending(survey: Survey, visit: Visit) -> dict[str, Any]:
    if visit.done < len(visit.slots):
        return {}
    code = completion_code(survey, visit.rater)
    back = f"https://app.prolific.com/submissions/complete?cc={code}"
    return {"code": code, "back": back if "PROLIFIC_PID" in visit.platform and survey.completion_code else None}


def _external(platform: dict[str, str]) -> str | None:
    """One person, one visit: the platform's name for the participant."""
    if "PROLIFIC_PID" in platform:
        return f"prolific {platform['PROLIFIC_PID']}"
    return f"mturk {platform['workerId']}" if "workerId" in platform else None


def _rater(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    rater = rater_of(request.app.state.survey, token) if scheme.lower() == "bearer" and len(token) < 100 else None
    if rater is None:
        request.app.state.wrong_tokens.spend(_address(request))
        raise HTTPException(401, "This link is not valid: check that it was copied whole.")
    return rater


def _address(request: Request) -> str:
    return request.client.host if request.client else "unknown"


async def _at_desk(request: Request, work: Callable[..., T], *given: Any) -> T:
    """Run on the one thread that owns the votes. A request that is cancelled meanwhile does not undo the work."""
    return await asyncio.get_running_loop().run_in_executor(request.app.state.desk, work, *given)


def _answer(content: dict[str, Any]) -> Response:
    return JSONResponse(content, headers={"cache-control": "no-store"})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = {**(error.headers or {}), "cache-control": "no-store"}
    return JSONResponse({"error": error.detail}, error.status_code, headers)


async def _not_kept(request: Request, error: Exception) -> Response:
    """A full disk, a lock, a broken file: nothing was kept, and the page will try again."""
    print(f"votes cannot be kept: {error}", flush=True)
    headers = {"retry-after": "5", "cache-control": "no-store"}
    return JSONResponse({"error": "The answer could not be kept yet."}, 503, headers)


async def _broken(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "Something broke on our side."}, 500, {"cache-control": "no-store", **guard.HEADERS})

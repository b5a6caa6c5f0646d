"""The page's server: one model, one stream under way, whose pieces are asked for one by one.

| call | does |
|---|---|
| ``GET /api/model`` | what is played, and what the page begins with |
| ``POST /api/stream`` ``{prompt, state, seed}`` | a new stream; the one before it ends |
| ``POST /api/next`` ``{stream, number, flow}`` | frames of a piece, RGBA, and their flow; 204: still being made, ask again |
| ``POST /api/prompt`` ``{stream, prompt, state}`` | another text from the next chunk on; of states ``auto`` is what a script or a recording says |
| ``POST /api/clip`` ``{stream}`` | what is kept of it, as mp4 |

A piece may be asked for again, so that an answer that was lost loses nothing. No request names a path.
"""

import asyncio
import json
import secrets
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mogan.data.video import write_video
from mogan.errors import UserError
from mogan.ranges import SEEDS
from mogan.stream.engine import COLOURS, MANNERS, SHAPES, Studio, checked
from mogan.stream.script import Following, When
from mogan.stream.watched import Text, Watched, flow_over, kept_frames
from mogan.survey import guard

AUTO = "auto"  # the state that a script or a recording says
WAIT = 1.0  # seconds after which a page that waits for a piece is told to ask again
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


def make_app(studio: Studio, prompt: str, seed: int, when: When | None = None) -> Starlette:
    """The application that plays one model; ``prompt`` and ``seed`` are what its page begins with, ``when`` what it follows."""
    desk = ThreadPoolExecutor(1, "stream")  # all that touches the networks, but for texts and what makes chunks ahead

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        if app.state.watched is not None:
            desk.submit(app.state.watched.close)
        desk.shutdown()

    app = Starlette(
        routes=[
            *(Route(path, partial(_page, name=name, media=media)) for path, (name, media) in PAGE.items()),
            Route("/api/model", _model),
            Route("/api/stream", _begin, methods=["POST"]),
            Route("/api/next", _next, methods=["POST"]),
            Route("/api/prompt", _prompt, methods=["POST"]),
            Route("/api/clip", _clip, methods=["POST"]),
        ],
        middleware=[
            Middleware(guard.SecurityHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False),
        ],
        exception_handlers={HTTPException: _refused, UserError: _mistaken, Exception: _broken},
        lifespan=lifespan,
    )
    app.state.studio, app.state.desk, app.state.begins_with = studio, desk, {"prompt": prompt, "seed": seed}
    app.state.watched, app.state.token, app.state.when = None, "", when
    return app


async def _page(request: Request, name: str, media: str) -> Response:
    body = (files("mogan.stream") / "page" / name).read_bytes()
    return Response(body, media_type=media, headers={"cache-control": "no-cache"})


async def _model(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    size, source = studio.source.geometry, studio.source
    told: dict[str, Any] = {"name": studio.name, "fps": size.fps, "width": size.width, "height": size.height}
    told |= {"steps": len(source.sigmas or ()), "kept": kept_frames(size) // size.fps, **request.app.state.begins_with}
    manners = {"": "{}"} if source.states else MANNERS  # who is told states does not read what things do
    lab = {"colours": {c: list(rgb) for c, rgb in COLOURS.items()}, "shapes": SHAPES, "manners": manners}
    told |= {"states": [*([AUTO] if request.app.state.when else []), *source.states]}
    return _answer(told | ({"lab": lab} if studio.of_lab else {}))


async def _begin(request: Request) -> Response:
    state = request.app.state
    body = guard.fields(await guard.read_json(request), ("prompt", "state", "seed"), "The body")
    seed = body["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= SEEDS:
        raise HTTPException(400, f"seed must be a whole number from 0 to {SEEDS}.")
    text, notes = await _read(request, body["prompt"], body["state"])
    if state.watched is not None:
        state.desk.submit(state.watched.close)
    state.watched, state.token = Watched(state.studio, seed, [text]), secrets.token_urlsafe(12)
    return _answer({"stream": state.token, "notes": notes})


async def _prompt(request: Request) -> Response:
    body = guard.fields(await guard.read_json(request), ("stream", "prompt", "state"), "The body")
    watched = _mine(request, body["stream"])
    text, notes = await _read(request, body["prompt"], body["state"])
    return _answer({"change": watched.say(text), "notes": notes})


async def _next(request: Request) -> Response:
    body = guard.fields(await guard.read_json(request), ("stream", "number", "flow"), "The body")
    watched, number = _mine(request, body["stream"]), body["number"]
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= watched.made:
        raise HTTPException(400, "number must be that of a piece that was made, or the next.")
    asked = asyncio.get_running_loop().run_in_executor(request.app.state.desk, watched.piece, number)
    try:
        frames = await asyncio.wait_for(asyncio.shield(asked), WAIT)
    except TimeoutError:
        asked.add_done_callback(lambda done: done.cancelled() or done.exception())  # told to whoever asks again
        return Response(status_code=204)
    if frames is None:
        raise HTTPException(410, f"Piece {number} is no longer kept.")
    parts = [np.concatenate([frames, np.full_like(frames[..., :1], 255)], -1)]
    if body["flow"] is True:
        parts.append(await asyncio.to_thread(flow_over, watched.kept.get(number - 1), frames))
    times, each = watched.times, max(1, watched.times.frames)
    following = watched.texts[watched.text_of(number)]
    told = {
        "frames": len(frames),
        "change": watched.text_of(number),
        "state": following.state(number) if isinstance(following, Following) else None,
        "make": times.make / each,
        "decode": times.decode / each,
    }
    headers = {"x-piece": json.dumps(told), "cache-control": "no-store"}
    return Response(b"".join(part.tobytes() for part in parts), headers=headers, media_type="application/octet-stream")


async def _clip(request: Request) -> Response:
    """The file has no name on this machine by the time it is sent."""
    body = guard.fields(await guard.read_json(request), ("stream",), "The body")
    kept = list(_mine(request, body["stream"]).kept.values())
    if not kept:
        raise HTTPException(409, "There is nothing to save yet.")

    def write() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            write_video(
                Path(folder) / "clip.mp4",
                (frame for piece in kept for frame in piece),
                request.app.state.studio.source.geometry.fps,
            )
            return (Path(folder) / "clip.mp4").read_bytes()

    return Response(await asyncio.to_thread(write), headers={"cache-control": "no-store"}, media_type="video/mp4")


async def _read(request: Request, prompt: Any, state: Any) -> tuple[Text, list[str]]:
    studio, when = request.app.state.studio, request.app.state.when
    if not isinstance(prompt, str):
        raise HTTPException(400, "prompt must be text.")
    if state not in (None, *([AUTO] if when else []), *studio.source.states):
        raise HTTPException(400, "state must be null or one that the model knows.")
    words = checked(prompt, "The prompt")
    if when and state == AUTO:
        return Following(studio, words, when), studio.notes(words)
    return await asyncio.to_thread(studio.text, words, state), studio.notes(words)


def _mine(request: Request, token: Any) -> Watched:
    state = request.app.state
    if (
        state.watched is None
        or not isinstance(token, str)
        or not secrets.compare_digest(token.encode(errors="replace"), state.token.encode())
    ):
        raise HTTPException(409, "This stream has ended: another tab plays, or the server was started anew.")
    return state.watched


def _answer(content: dict[str, Any]) -> Response:
    return JSONResponse(content, headers={"cache-control": "no-store"})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        {"error": error.detail}, error.status_code, {**(error.headers or {}), "cache-control": "no-store"}
    )


async def _mistaken(request: Request, error: Exception) -> Response:
    sentence = str(error)
    return JSONResponse({"error": sentence[:1].upper() + sentence[1:]}, 422, {"cache-control": "no-store"})


async def _broken(request: Request, error: Exception) -> Response:
    told = {"error": "Something broke; the terminal of mogan stream says what."}
    return JSONResponse(told, 500, {"cache-control": "no-store", **guard.HEADERS})

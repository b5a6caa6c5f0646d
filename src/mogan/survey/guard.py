"""What stands between the network and the votes: rate and size limits, field checks, security headers."""

import asyncio
import json
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_BYTES = 8192
BODY_SECONDS = 10.0
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; media-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "x-robots-tag": "noindex",
}

PLATFORM_KEYS = ("PROLIFIC_PID", "STUDY_ID", "SESSION_ID", "workerId", "assignmentId", "hitId")
PLATFORM_VALUE = re.compile(r"[A-Za-z0-9_-]{1,64}")
DEVICE = {  # name -> (smallest, largest)
    "screen_width": (0, 20_000),
    "screen_height": (0, 20_000),
    "window_width": (0, 20_000),
    "window_height": (0, 20_000),
    "pixel_ratio": (0, 20),
    "refresh_hz": (0, 1000),
    "colour_bits": (0, 64),
    "touch": (0, 1),
}
WATCH = {
    "total_ms": (0, 86_400_000),
    "locked_ms": (0, 86_400_000),
    "plays": (0, 10_000),
    "replays": (0, 10_000),
    "pauses": (0, 10_000),
    "half_speed": (0, 10_000),
    "steps": (0, 100_000),
    "hidden": (0, 10_000),
    "changed": (0, 10_000),
}


class SecurityHeaders:
    """ASGI middleware that puts ``HEADERS`` on every response."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self.headers]}
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


class RateLimit:
    """Token buckets by key: ``burst`` at once, then ``per_second``. Remembers the latest 20,000 keys."""

    def __init__(self, burst: float, per_second: float):
        self.burst = burst
        self.per_second = per_second
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, key: str) -> None:
        """Count a request, or raise 429 with the seconds to wait."""
        now = time.monotonic()
        left, then = self.buckets.pop(key, (self.burst, now))
        left = min(self.burst, left + (now - then) * self.per_second)
        allowed = left >= 1
        self.buckets[key] = (left - 1 if allowed else left, now)
        if len(self.buckets) > 20_000:
            self.buckets.popitem(last=False)
        if not allowed:
            wait = str(max(1, round((1 - left) / self.per_second)))
            raise HTTPException(429, "Too many requests: wait a moment.", {"retry-after": wait})


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object: right type, small, on time, no duplicate keys, no NaN. Raises 400, 408, 413 or 415."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Send application/json.")
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise HTTPException(400, "Content-Length is no number.")
    if len(length) > 9 or int(length) > BODY_BYTES:
        raise HTTPException(413, f"At most {BODY_BYTES} bytes.", {"connection": "close"})
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES:
                    raise HTTPException(413, f"At most {BODY_BYTES} bytes.", {"connection": "close"})
    except TimeoutError:
        raise HTTPException(408, "The request took too long.", {"connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "The request broke off.") from None
    try:
        value = json.loads(body, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise HTTPException(400, "The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise HTTPException(400, "The body must be a JSON object.")
    return value


def fields(value: Any, names: tuple[str, ...], what: str) -> dict[str, Any]:
    """``value`` if it is an object with exactly these fields; otherwise 400."""
    if not isinstance(value, dict) or set(value) != set(names):
        raise HTTPException(400, f"{what} must have exactly the fields {', '.join(names)}.")
    return value


def numbers(value: Any, bounds: Mapping[str, tuple[float, float]], what: str) -> dict[str, float]:
    """``value`` if it holds exactly these numbers, within bounds; otherwise 400."""
    for name, number in fields(value, tuple(bounds), what).items():
        low, high = bounds[name]
        if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:
            raise HTTPException(400, f"{what}.{name} must be a number from {low} to {high}.")
    return value


def platform(value: Any) -> dict[str, str]:
    """The parameters that Prolific or MTurk put on the link, if they are well formed; otherwise 400."""
    if not isinstance(value, dict) or not set(value) <= set(PLATFORM_KEYS):
        raise HTTPException(400, f"platform may hold only {', '.join(PLATFORM_KEYS)}.")
    for name, text in value.items():
        if not isinstance(text, str) or not PLATFORM_VALUE.fullmatch(text):
            raise HTTPException(400, f"platform.{name} must be 1 to 64 letters, digits, - or _.")
    if value.get("assignmentId") == "ASSIGNMENT_ID_NOT_AVAILABLE":
        raise HTTPException(400, "This is a preview: accept the task first.")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate key")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(name)

"""``mogan survey serve``: the survey folder as a web page on this machine."""

import errno
import ipaddress
import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import tyro

from mogan.errors import UserError
from mogan.ranges import between


def serve(survey: Annotated[Path, tyro.conf.Positional], *, host: str = "127.0.0.1", port: int = 8765) -> None:
    """Show a survey to raters until Ctrl-C; start it again at any time, nothing is lost.

    By default only this machine can open the page. To reach others, keep it so and put a web server with TLS in
    front, or pass --host 0.0.0.0 inside a network you trust. Votes are on the disk (votes.sqlite) before a rater sees
    the next pair. Links may carry PROLIFIC_PID, STUDY_ID and SESSION_ID, or workerId, assignmentId and hitId.

    Example: mogan survey serve survey --port 8765

    Args:
        survey: The folder that `mogan survey build` wrote.
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one.
    """
    try:
        import uvicorn  # noqa: F401  said before anything is opened

        from mogan.survey.app import make_app
    except ModuleNotFoundError as error:
        raise UserError(f"Serving needs {error.name}: pip install 'mogan[survey]'.") from error
    with listen(host, port) as listener:
        app = make_app(survey)
        _more_files()
        place = f"http://{_shown(host)}:{listener.getsockname()[1]}/"
        print(f"Survey at {place} (Ctrl-C stops it; votes are in {survey / 'votes.sqlite'})", flush=True)
        if not _is_loopback(host):
            print("Others on this network can open it. Outside a network you trust, use TLS in front.", flush=True)
        run(app, listener)


def run(app: Any, listener: socket.socket) -> None:
    """Serve an application until Ctrl-C."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=20,
        h11_max_incomplete_event_size=16_384,
    )
    with suppress(KeyboardInterrupt):  # the way it is meant to end
        uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, or a ``UserError`` that says what is in the way."""
    between(0, 65535, port=port)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:  # the latter for labels that no name can have
        raise UserError(f"--host {host} is no address of this machine: try 127.0.0.1.") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"Port {port} is in use: stop the other program or pass --port {port + 1 if port < 65535 else 0}."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UserError(f"Port {port} needs more rights than you have: pass --port 8765.") from error
        raise UserError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror}): try 127.0.0.1."
        ) from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _more_files() -> None:
    """Two hundred browsers with six connections each need more than the usual 1024 open files."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(soft, min(hard, 16_384)) if hard != resource.RLIM_INFINITY else 16_384, hard)
    )

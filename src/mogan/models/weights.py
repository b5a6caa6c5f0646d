"""Weights that others made: where they come from, under which licence, and a download that is checked.

Nothing is fetched unless ``mogan weights fetch`` is asked to. A file that does not have the digest written down here is
not kept.
"""

import hashlib
import http.client
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import tyro
from tqdm import tqdm

from mogan.disk.files import writable_folder
from mogan.errors import UserError, closest

CHUNK = 1 << 20
SILENCE = 60.0  # seconds without a byte after which a server is given up


@dataclass(frozen=True)
class Weights:
    """One file.

    ``sha256`` is the whole digest, or its beginning where a publisher says no more (torchvision's file names carry
    eight digits), or None where no digest is known. ``limits`` says in words what the licence forbids.
    """

    url: str
    licence: str
    use: str
    sha256: str | None = None
    limits: str = ""

    @property
    def file(self) -> str:
        """Name of the file on disk: the last part of its address."""
        return self.url.rpartition("/")[2]


_TORCHVISION = "https://download.pytorch.org/models/"
_CLIP = "https://openaipublic.azureedge.net/clip/models/"
_CLIP_B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_CLIP_L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"

MANIFEST: dict[str, Weights] = {
    "raft_large_C_T_V1": Weights(
        _TORCHVISION + "raft_large_C_T_V1-22a6c225.pth",
        "BSD-3-Clause",
        "--flow of evaluate: VBench's dynamic degree (the network VBench calls raft-things)",
        "22a6c225",
    ),
    "raft_large_C_T_SKHT_V2": Weights(
        _TORCHVISION + "raft_large_C_T_SKHT_V2-ff5fadd5.pth",
        "BSD-3-Clause",
        "flow of training and prepare (torchvision's default, retrained by torchvision)",
        "ff5fadd5",
    ),
    "dino_vitb16": Weights(
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        "Apache-2.0",
        "VBench's subject consistency: CLS features",
    ),
    "clip_vit_b32": Weights(
        f"{_CLIP}{_CLIP_B32}/ViT-B-32.pt", "MIT", "VBench's background consistency: image features", _CLIP_B32
    ),
    "clip_vit_l14": Weights(
        f"{_CLIP}{_CLIP_L14}/ViT-L-14.pt", "MIT", "VBench's aesthetic quality: embeddings", _CLIP_L14
    ),
    "laion_aesthetic_l14": Weights(
        "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth",
        "MIT",
        "VBench's aesthetic quality: the linear head",
        "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
    ),
    "musiq_spaq": Weights(
        "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
        "CC BY-NC-SA 4.0 (their hub page); converted from Google's public checkpoint",
        "VBench's imaging quality",
        "358bb6af275e28ea56821d44fb55c6cb83645db11f394d3ad65b2d149965ab50",
        "NOT for commercial use",
    ),
    "amt_s": Weights(
        "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth",
        "code CC BY-NC 4.0, weights CC BY-NC-SA 4.0 (their hub page)",
        "VBench's motion smoothness, with the AMT code you install yourself",
        limits="NOT for commercial use",
    ),
    "cotracker3_offline": Weights(
        "https://huggingface.co/facebook/cotracker3/resolve/main/scaled_offline.pth",
        "CC BY-NC 4.0",
        "tracks of points, with the co-tracker code you install yourself",
        "2670d4562ed69326dda775a26e54883925cd11b6fc9b24cb7aa9f8078bce7834",
        "NOT for commercial use",
    ),
}


def weights_folder() -> Path:
    """Where fetched weights lie: ``MOGAN_WEIGHTS``, else ``~/.cache/mogan/weights``. Raises UserError if it is a file."""
    given = os.environ.get("MOGAN_WEIGHTS")
    folder = Path(given).expanduser() if given else Path.home() / ".cache" / "mogan" / "weights"
    if folder.is_file():
        raise UserError(f"MOGAN_WEIGHTS names {folder}, which is a file: give the folder that weights lie in")
    return folder


def find_weights(name: str | Path) -> Path:
    """A path as it is; a name (or file name) of the manifest as its file in the weights folder.

    Raises:
        UserError: the manifest knows the name, and the file has not been fetched.
    """
    path, text = Path(name), str(name)
    known = next((n for n, w in MANIFEST.items() if text in (n, f"{n}.pth", w.file)), None)
    if path.exists() or known is None:
        return path
    found = weights_folder() / MANIFEST[known].file
    if not found.is_file():
        raise UserError(f"{known} is not in {weights_folder()}: run `mogan weights fetch {known}`, or give a path")
    return found


def is_here(name: str) -> bool:
    """Whether weights of the manifest have been fetched."""
    return (weights_folder() / MANIFEST[name].file).is_file()


# ---------------------------------------------------------------------------------------------- commands


def show() -> None:
    """List the weights that evaluation and training can use: licence, purpose, and whether they are here.

    Weights marked "no digest" have none that their makers publish; `mogan weights fetch` prints the one it gets.
    """
    folder = weights_folder()
    width = max(map(len, MANIFEST))
    for name, one in MANIFEST.items():
        place = "here" if is_here(name) else "not here"
        check = "" if one.sha256 else ", no digest"
        print(f"{name:<{width}}  {place}{check}; {_licence(one)}\n{'':<{width}}  {one.use}")
    print(f"\nfolder: {folder} (MOGAN_WEIGHTS changes it); a path to a file of your own works wherever a name does")


def fetch(
    names: Annotated[tuple[str, ...], tyro.conf.Positional], *, folder: Path | None = None, offline: bool = False
) -> list[Path]:
    """Download weights by name, check them, and put them into the weights folder.

    A download that broke off goes on where it stopped. A file with another digest than the one written down is not
    kept. `mogan weights list` shows the names.

    Args:
        names: which ones.
        folder: where to put them; MOGAN_WEIGHTS or ~/.cache/mogan/weights if not given.
        offline: ask nothing of the network; so do MOGAN_OFFLINE=1 and HF_HUB_OFFLINE=1.

    Returns:
        The files.

    Raises:
        UserError: unknown name, no network, another digest than expected.
    """
    unknown = [name for name in names if name not in MANIFEST]
    if not names:
        raise UserError(f"name the weights to fetch: {', '.join(MANIFEST)}")
    if unknown:
        hint = closest(unknown[0], MANIFEST) or f": known are {', '.join(MANIFEST)}"
        raise UserError(f"no weights are called {', '.join(unknown)}{hint}")
    folder = folder or weights_folder()
    files = []
    for name in names:
        one, path = MANIFEST[name], folder / MANIFEST[name].file
        print(f"{name}: {_licence(one)}; {one.use}")
        if not path.is_file():
            _allow_network(name, path, offline)
            writable_folder(folder, "--folder")
            download(one.url, path, one.sha256)
        elif not digest(path).startswith(one.sha256 or ""):
            raise UserError(f"{path} is damaged (its sha256 is {digest(path)[:16]}...): remove it and fetch it again")
        note = "as published" if one.sha256 else "no digest is published to compare it with; keep this one"
        print(f"{path}\nsha256 {digest(path)} ({note})")
        files.append(path)
    return files


def _licence(one: Weights) -> str:
    return f"licence {one.licence}" + (f" - {one.limits}" if one.limits else "")


def _allow_network(name: str, path: Path, offline: bool) -> None:
    for variable in ("MOGAN_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise UserError(f"{name} is not here and {variable} is set: unset it, or copy the file to {path}")
    if offline:
        raise UserError(f"{name} is not here and --offline was given: leave it out, or copy the file to {path}")


# ---------------------------------------------------------------------------------------------- download


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Fetch ``url`` to ``path`` by way of ``path.part``, which a later call continues.

    Args:
        url: http, https or file.
        path: where the whole and checked file ends up, by a rename.
        sha256: digest, or its beginning; None takes what comes, unless it is a web page.

    Raises:
        UserError: no answer, an answer that breaks off (what came is kept), or another file than expected (nothing is).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        _receive(url, part)
    except (URLError, http.client.HTTPException, OSError) as error:
        came = f" after {part.stat().st_size / 1e6:.1f} MB" if part.is_file() else ""
        raise UserError(
            f"{url} could not be fetched{came} ({_reason(error)}): the same command goes on where it stopped"
        ) from error
    found = digest(part)
    if not found.startswith(sha256 or ""):
        part.unlink()
        raise UserError(
            f"{url} gave a file with sha256 {found[:16]}... where {sha256} was expected, and it was not kept: fetch it "
            f"again, or copy the right file to {path}"
        )
    if sha256 is None and _starts_as_page(part):
        part.unlink()
        raise UserError(f"{url} gave a web page and no weights, and it was not kept: copy the file to {path} yourself")
    part.replace(path)


def _receive(url: str, part: Path) -> None:
    """Bytes into ``part``, after those it holds if the server can go on there."""
    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": "mogan"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urlopen(Request(url, headers=headers), timeout=SILENCE)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range", "") == f"bytes */{have}":
            return  # all of it had come; the process died before the rename
        part.unlink()
        return _receive(url, part)
    with answer:
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if goes_on else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            part.open("ab" if goes_on else "wb") as file,
            tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True) as bar,
        ):
            have += _copy(answer, file, bar)
    if total is not None and have != total:
        raise OSError(f"{have} of {total} bytes came")


def _copy(source: IO[bytes], file: IO[bytes], bar: tqdm) -> int:
    count = 0
    while chunk := source.read(CHUNK):
        file.write(chunk)
        count += len(chunk)
        bar.update(len(chunk))
    return count


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return f"HTTP {error.code}" if isinstance(error, HTTPError) else str(reason)


def _starts_as_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(512).lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))

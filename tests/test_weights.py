"""Weights of others: what the manifest says, and a download that resumes, checks and refuses."""

import hashlib
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

from mogan.cli import main
from mogan.errors import UserError
from mogan.evaluation.tools import estimator
from mogan.models import weights
from mogan.models.weights import MANIFEST, Weights, download, fetch, find_weights
from mogan.motion.estimators import load_flow

BODY = bytes(range(256)) * 40
SHA = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves BODY; ``breaks_after`` cuts the next answer, ``ranges`` says whether it can go on in the middle."""

    breaks_after: int | None = None
    ranges = True
    body = BODY

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/w-{SHA[:8]}.pth"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        if self.path == "/gone":
            self.send_error(404)
            return
        start = 0
        if server.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.body)}")
                self.end_headers()
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        self.send_header("Content-Length", str(len(server.body) - start))
        self.end_headers()
        cut, server.breaks_after = server.breaks_after, None
        self.wfile.write(server.body[start:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as made:
        made.asked = []
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No test sees the user's weights, environment or network."""
    monkeypatch.setenv("MOGAN_WEIGHTS", str(tmp_path / "cache"))
    for name in ("MOGAN_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def stand_in(monkeypatch, url, sha256=SHA[:8], limits=""):
    monkeypatch.setitem(MANIFEST, "some", Weights(url, "BSD-3-Clause", "a test", sha256, limits))


def test_a_fetched_file_is_whole_checked_and_found(server, monkeypatch, tmp_path, capsys):
    stand_in(monkeypatch, server.url, limits="NOT for commercial use")
    assert main(["weights", "fetch", "some"]) == 0
    path = tmp_path / "cache" / f"w-{SHA[:8]}.pth"
    assert path.read_bytes() == BODY
    assert list(path.parent.iterdir()) == [path]
    shown = capsys.readouterr().out
    assert "licence BSD-3-Clause - NOT for commercial use" in shown
    assert SHA in shown
    assert find_weights("some") == find_weights(path.name) == path
    fetch(("some",))
    assert server.asked == [None]  # what is there is not asked for again


def test_a_download_that_breaks_off_goes_on_where_it_stopped(server, monkeypatch, tmp_path):
    stand_in(monkeypatch, server.url)
    server.breaks_after = 6000
    with pytest.raises(UserError, match="goes on where it stopped"):
        fetch(("some",), folder=tmp_path)
    part = tmp_path / f"w-{SHA[:8]}.pth.part"
    assert part.read_bytes() == BODY[:6000]
    assert not part.with_suffix("").exists()
    (path,) = fetch(("some",), folder=tmp_path)
    assert server.asked == [None, "bytes=6000-"]
    assert path.read_bytes() == BODY
    assert not part.exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_is_finished_or_begun_again_as_the_server_can(server, tmp_path, ranges):
    server.ranges = ranges
    (tmp_path / "w.pth.part").write_bytes(BODY[:100])
    download(server.url, tmp_path / "w.pth", SHA)
    assert (tmp_path / "w.pth").read_bytes() == BODY
    (tmp_path / "v.pth.part").write_bytes(BODY)  # whole: the process died before the rename
    download(server.url, tmp_path / "v.pth", SHA)
    assert (tmp_path / "v.pth").read_bytes() == BODY
    (tmp_path / "u.pth.part").write_bytes(BODY + b"more than there is")
    download(server.url, tmp_path / "u.pth", SHA)
    assert (tmp_path / "u.pth").read_bytes() == BODY


@pytest.mark.parametrize("before", [b"", b"the beginning of another file"])
def test_another_file_than_expected_is_not_kept(server, tmp_path, before):
    if before:
        (tmp_path / "w.pth.part").write_bytes(before)
    with pytest.raises(UserError, match="was not kept") as error:
        download(server.url, tmp_path / "w.pth", SHA if before else "00000000")
    assert list(tmp_path.iterdir()) == []
    assert "\n" not in str(error.value)


def test_an_unknown_digest_is_printed_and_a_web_page_is_no_file_of_weights(server, monkeypatch, tmp_path, capsys):
    stand_in(monkeypatch, server.url, sha256=None)
    fetch(("some",), folder=tmp_path)
    assert f"sha256 {SHA} (no digest is published" in capsys.readouterr().out
    server.body = b"\n<!DOCTYPE html><html>Sign in to go on</html>"
    with pytest.raises(UserError, match="a web page and no weights"):
        download(server.url, tmp_path / "other.pth")
    assert not list(tmp_path.glob("other*"))


def test_a_file_address_works_too(tmp_path):
    (tmp_path / "source.pth").write_bytes(BODY)
    (tmp_path / "copy.pth.part").write_bytes(b"left over")
    download((tmp_path / "source.pth").as_uri(), tmp_path / "copy.pth", SHA)
    assert (tmp_path / "copy.pth").read_bytes() == BODY


@pytest.mark.parametrize("how", ["--offline", "MOGAN_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_asks_nothing_of_the_network(server, monkeypatch, how, capsys):
    stand_in(monkeypatch, server.url)
    if how != "--offline":
        monkeypatch.setenv(how, "1")
    assert main(["weights", "fetch", "some", *([how] if how == "--offline" else [])]) == 2
    error = capsys.readouterr().err
    assert how in error
    assert "copy the file to" in error
    assert server.asked == []


def test_mistakes_are_answered_in_one_sentence(server, monkeypatch, tmp_path, capsys):
    assert main(["weights", "fetch", "raft_huge"]) == 2
    assert "no weights are called raft_huge: known are raft_large_C_T_V1" in capsys.readouterr().err
    with pytest.raises(UserError, match="HTTP 404"):
        download(server.url.rpartition("/")[0] + "/gone", tmp_path / "w.pth")
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="could not be fetched"):
        download(server.url, tmp_path / "w.pth")
    stand_in(monkeypatch, server.url)
    damaged = tmp_path / f"w-{SHA[:8]}.pth"
    damaged.write_bytes(b"half")
    with pytest.raises(UserError, match="is damaged"):
        fetch(("some",), folder=tmp_path)


def test_the_manifest_agrees_with_torchvision_and_with_the_addresses():
    for name in ("C_T_V1", "C_T_SKHT_V2"):
        assert MANIFEST[f"raft_large_{name}"].url == Raft_Large_Weights[name].url
    for one in MANIFEST.values():
        assert one.url.startswith("https://")
        assert one.licence
        assert ("NC" in one.licence) == bool(one.limits)
        carried = one.file.rpartition("-")[2].split(".")[0]
        if len(carried) == 8 and one.sha256:
            assert one.sha256.startswith(carried)
        if one.sha256 and "/clip/" in one.url:
            assert one.url.split("/")[-2] == one.sha256


def test_the_list_says_what_is_here(monkeypatch, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / MANIFEST["clip_vit_b32"].file).touch()
    assert main(["weights", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("clip_vit_b32")).split()[1] == "here;"
    amt = next(line for line in lines if line.startswith("amt_s"))
    assert "not here, no digest; licence" in amt
    assert "NOT for commercial use" in amt
    assert str(tmp_path / "cache") in lines[-1]


def test_a_flow_network_by_name_is_the_file_in_the_weights_folder(tmp_path):
    with pytest.raises(UserError, match=r"run `mogan weights fetch raft_large_C_T_V1`, or give a path"):
        load_flow("raft_large_C_T_V1")
    with pytest.raises(UserError, match="run `mogan weights fetch raft_large_C_T_SKHT_V2`"):
        load_flow("raft_large_C_T_SKHT_V2.pth")
    (tmp_path / "cache").mkdir()
    torch.manual_seed(0)
    made = raft_large()
    torch.save(made.state_dict(), tmp_path / "cache" / MANIFEST["raft_large_C_T_V1"].file)
    found, how = estimator("raft_large_C_T_V1", torch.device("cpu"))
    assert how["name"] == "raft_large_C_T_V1"
    torch.testing.assert_close(found.raft.state_dict(), made.state_dict(), rtol=0, atol=0)
    torch.save({"no": torch.zeros(1)}, tmp_path / "other.pth")
    for name, content in {"other": None, "torn": b"PK\x03\x04", "page": b"<html>"}.items():
        if content:
            (tmp_path / f"{name}.pth").write_bytes(content)
        with pytest.raises(UserError, match="are no large RAFT's, torchvision's or the original's, or are damaged"):
            load_flow(str(tmp_path / f"{name}.pth"))


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_folder_of_a_flow_network_that_is_damaged_is_named(damage, family, tmp_path):
    shutil.copytree(family / "raft", tmp_path / "raft")
    file = tmp_path / "raft" / "model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "other":
        save_file({"no": torch.zeros(1)}, file)
    with pytest.raises(
        UserError, match=r"raft are not those that its config.json describes, or are damaged or missing"
    ):
        load_flow(str(tmp_path / "raft"))


def test_the_folder_is_the_users_choice(monkeypatch):
    monkeypatch.setenv("MOGAN_WEIGHTS", "~/weights")  # a launcher's file of variables has no shell to write it out
    assert weights.weights_folder() == Path.home() / "weights"
    monkeypatch.delenv("MOGAN_WEIGHTS")
    assert weights.weights_folder().parts[-3:] == (".cache", "mogan", "weights")


def test_a_file_is_no_folder_of_weights(tmp_path, monkeypatch, capsys):
    (tmp_path / "raft.pth").write_bytes(b"x")
    monkeypatch.setenv("MOGAN_WEIGHTS", str(tmp_path / "raft.pth"))
    assert main(["weights", "list"]) == 2
    assert "which is a file: give the folder" in capsys.readouterr().err

"""The wheel without the repository: installed into an environment of its own, it works."""

import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from mogan import __version__

ROOT = Path(__file__).parent.parent
BARE = {"PATH": "/usr/bin:/bin"}  # no PYTHONPATH


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A new environment with the built wheel; what the wheel depends on is borrowed, this project's editable install is not."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("mogan-*.whl")
    assert wheel.name == f"mogan-{__version__}-py3-none-any.whl"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    scheme = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # .pth files that lie there are not read
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    return python.parent / "mogan"


def said(fresh, tmp_path, *words):
    done = subprocess.run([fresh, *words], capture_output=True, text=True, cwd=tmp_path, env=BARE)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(fresh, tmp_path):
    assert said(fresh, tmp_path, "--version") == f"mogan {__version__}\n"
    assert "mogan survey build" in said(fresh, tmp_path, "--help")
    ask = [fresh.parent / "python", "-c", "import mogan; print(mogan.__file__)"]
    where = subprocess.check_output(ask, cwd=tmp_path, env=BARE, text=True)
    assert Path(where.strip()).is_relative_to(fresh.parent.parent)
    (tmp_path / "prompts.txt").write_text("a red circle moving right\n")
    said(fresh, tmp_path, "sample", "--prompts", "prompts.txt", "--out", "clips")  # the lab's family is in the wheel
    assert (tmp_path / "clips" / "a red circle moving right-0.mp4").is_file()
    small = ("--clips", "16", "--iterations", "1", "--prompts", "2", "--seeds", "1")
    assert "report: demo/report.html" in said(fresh, tmp_path, "demo", "--out", "demo", *small)
    assert (tmp_path / "demo" / "export" / "model_index.json").is_file()


def test_every_file_that_names_a_version_names_this_one():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {__version__} (" in (ROOT / "CHANGELOG.md").read_text()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]

"""The page in a real browser: what it shows is what is made, what it says while it waits, what stops when nobody looks."""

import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("starlette", reason="needs the extra `survey`")
pytest.importorskip("selenium", reason="needs selenium (dev extra)")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from browser import MARKS
from mogan.data.video import read_video
from mogan.stream.engine import open_studio, pieces
from test_stream import folder, student  # noqa: F401  fixtures
from test_survey_browser import SIZES, browse  # noqa: F401

pytestmark = MARKS
PROMPT = "a red circle bouncing"
FREE = "document.querySelector('#wait').hidden"


class Server:
    """`mogan stream` as a process of its own; may be killed and started again on the same port."""

    def __init__(self, folder):  # noqa: F811
        self.folder, self.port = folder, 0
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mogan",
            "stream",
            "--model",
            str(self.folder),
            "--port",
            str(self.port),
            "--seed",
            "3",
        ]
        # as many threads as this process has: with others products are rounded otherwise, and its frames are compared bit for bit
        threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=threads
        )
        self.port = int(self.process.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
        self.url = f"http://127.0.0.1:{self.port}/"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def busy(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100


@pytest.fixture
def server(folder):  # noqa: F811
    server = Server(folder)
    yield server
    server.kill()


def opened(browse, server, size="desktop"):  # noqa: F811
    page = browse(size)
    page.driver.get(server.url)
    page.until("firstFrame !== null")
    return page


@pytest.mark.parametrize("size", SIZES)
def test_a_whole_visit(browse, server, folder, size, tmp_path):  # noqa: F811
    page = opened(browse, server, size)
    assert page["now"].text == PROMPT
    page.until("document.querySelector('#numbers').textContent.includes('frames a second')")
    page.look("playing")
    number, seen = page.js(
        "new Promise(r => { const id = setInterval(() => { if (frames.length) { clearInterval(id); r([frames[0].piece, frames.filter(f => f.piece === frames[0].piece).map(f => Array.from(f.pixels.data))]); } }, 5); })"
    )
    studio = open_studio(str(folder), torch.device("cpu"))
    text = studio.text(PROMPT)
    want = next(islice(pieces(studio, lambda latent: text, 3), number, None))
    seen = np.array(seen, np.uint8).reshape(-1, 32, 32, 4)
    assert np.array_equal(seen[..., :3], want[-len(seen) :]), "the page shows other frames than the engine makes"

    page.driver.find_element(By.CSS_SELECTOR, "[data-name=spinning]").click()
    page.until("document.querySelector('#now').textContent === 'a red circle spinning'")
    page.driver.find_element(By.CSS_SELECTOR, "[data-name=blue]").click()
    page.until("document.querySelector('#now').textContent === 'a blue circle spinning'")
    box = page["prompt"]
    box.clear()
    box.send_keys("a purple elephant falling", Keys.ENTER)
    page.until(
        "document.querySelector('#note').textContent === 'Words that the model does not know: purple, elephant.'"
    )
    page.until("document.querySelector('#now').textContent === 'a purple elephant falling'")
    assert page.js("document.querySelectorAll('#lab [aria-pressed=true]').length") == 0
    page["see"].click()
    page.until("!document.querySelector('#flow').hidden && veil.getImageData(0, 0, 32, 32).data.some(v => v)")
    page.look("flow")
    page.driver.find_element(By.CSS_SELECTOR, "[data-speed='0.5']").click()
    page.until("speed === 0.5")
    page["play"].click()
    page.until("!playing")
    time.sleep(0.7)
    asked = page.js("stream.next")
    time.sleep(1)
    assert page.js("stream.next") == asked
    page["play"].click()
    page.until(f"stream.next > {asked}")

    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page["save"].click()
    page.until("document.querySelector('#save').textContent === 'Save mp4'")
    for _ in range(100):
        if saved := list(tmp_path.glob("*.mp4")):
            break
        time.sleep(0.1)
    assert saved[0].name == "a purple elephant falling-3.mp4"
    frames, fps = read_video(saved[0])
    assert fps == 16
    assert len(frames) > 13
    page["again"].click()
    page.until("stream && stream.seed === 4 && firstFrame !== null")
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    page.no_complaints()


def test_keys_play_and_see_and_begin_anew(browse, server):  # noqa: F811
    page = opened(browse, server)
    page.key(" ")
    page.until("!playing && document.querySelector('#play').textContent.startsWith('Play')")
    page.key("f")
    page.until("flowing")
    page.key("n")
    page.until("stream && stream.seed === 4 && playing && firstFrame !== null")
    page["prompt"].send_keys(" n")
    assert page.js("stream.seed") == 4
    page["see"].click()  # and has the focus now
    page.until("!flowing")
    page["see"].send_keys("f")
    page.until("flowing")


def test_a_tab_that_is_closed_stops_the_work(browse, server):  # noqa: F811
    page = opened(browse, server)
    before = server.busy()
    time.sleep(1)
    assert server.busy() - before > 0.1  # it works while it is watched
    watched = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    other = page.driver.current_window_handle
    page.driver.switch_to.window(watched)
    page.driver.close()
    page.driver.switch_to.window(other)
    time.sleep(1)
    before = server.busy()
    time.sleep(2)
    assert server.busy() - before < 0.05


def test_a_page_that_is_loaded_again_goes_on_where_it_was(browse, server):  # noqa: F811
    page = opened(browse, server)
    page.until("stream.next > 3")
    mine = page.js("stream.id")
    page.driver.refresh()
    page.until("stream && firstFrame !== null")
    assert page.js("stream.id") == mine
    assert page.js("stream.next") > 3


def test_one_page_plays_at_a_time(browse, server):  # noqa: F811
    first = opened(browse, server)
    second = opened(browse, server, "phone")
    first.until("document.querySelector('#notice').textContent.startsWith('This stream has ended: another tab plays')")
    first.look("taken")
    assert first.js("document.querySelector('#save').disabled")
    first.driver.find_element(By.CSS_SELECTOR, "#notice button").click()
    first.until("stream && firstFrame !== null && document.querySelector('#notice').hidden")
    assert not first.js("document.querySelector('#save').disabled")
    second.until("!document.querySelector('#notice').hidden")


def test_a_server_that_goes_away_is_waited_for(browse, server):  # noqa: F811
    page = opened(browse, server)
    server.kill()
    page.until("document.querySelector('#notice').textContent.startsWith('The server does not answer')")
    page.look("gone")
    before = page.js("stream.id")
    server.start()
    page.until(
        f"stream && stream.id !== '{before}' && firstFrame !== null && document.querySelector('#notice').hidden", 60
    )
    assert page["now"].text == PROMPT

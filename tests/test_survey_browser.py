"""The page in a real browser: whole visits by mouse, by keyboard and by finger."""

import csv
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra `survey`")
pytest.importorskip("selenium", reason="needs selenium (dev extra)")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from browser import CHROMIUM, DRIVER, MARKS
from mogan.survey.analyze import analyze
from mogan.survey.build import build
from test_survey_study import NAMES, make_folders

pytestmark = MARKS
SERVE = (
    "import sys, pathlib; from mogan.survey.serve import serve; serve(pathlib.Path(sys.argv[1]), port=int(sys.argv[2]))"
)
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    build(tuple(make_folders(root, size=96, frames=12)), out=root / "survey", title="A study")
    return root / "survey"


class Server:
    """The survey served by a process of its own; may be killed and started again on the same port."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", SERVE, str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline().split("127.0.0.1:")[1].split("/")[0])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(folder):
    server = Server(folder)
    yield server
    server.kill()


@pytest.fixture
def browse(tmp_path):
    """Opens browsers of a given size, each with a fresh profile."""
    opened = []

    def start(size: str):
        width, height = SIZES[size]
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            f"--user-data-dir={tmp_path / str(len(opened))}",
            f"--window-size={width},{height}",
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        if size == "phone":
            metrics = {"width": width, "height": height, "pixelRatio": 2.0, "touch": True}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        opened.append(webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)))
        return Page(opened[-1], size)

    yield start
    for driver in opened:
        driver.quit()


class Page:
    """What a rater sees and does."""

    def __init__(self, driver, size: str):
        self.driver, self.size = driver, size

    def __getitem__(self, name: str):
        return self.driver.find_element(By.ID, name)

    def js(self, code: str):
        return self.driver.execute_script(f"return {code}")

    def until(self, code: str, seconds: float = 30):
        WebDriverWait(self.driver, seconds, 0.05).until(lambda _: self.js(code), f"{code} on: {self.text()}")

    def text(self) -> str:
        return self.driver.find_element(By.TAG_NAME, "body").text

    def look(self, name: str) -> None:
        """Keep a screenshot where MOGAN_SCREENSHOTS says."""
        if os.environ.get("MOGAN_SCREENSHOTS"):
            self.driver.save_screenshot(f"{os.environ['MOGAN_SCREENSHOTS']}/{self.size}-{name}.png")

    def unlocked(self) -> None:
        self.until("!document.querySelector('#answers button').disabled && !document.querySelector('#asking').hidden")

    def question(self, number: int) -> None:
        self.until(f"document.querySelector('#which').textContent.startsWith('Question {number} ')")
        time.sleep(0.4)  # a double click must not answer the next question

    def fits(self) -> None:
        assert self.js("document.documentElement.scrollWidth <= innerWidth")
        bottom = self.js(
            "Math.max(...[...document.querySelectorAll('#answers button')].map(b => b.getBoundingClientRect().bottom))"
        )
        assert bottom <= self.js("innerHeight"), "answers are below the fold"

    def no_complaints(self) -> None:
        assert [line for line in self.driver.get_log("browser") if line["level"] == "SEVERE"] == []

    def press(self, side: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, f"#answers button[data-side={side}]").click()

    def key(self, key: str) -> None:
        self.driver.find_element(By.TAG_NAME, "body").send_keys(key)


def votes(folder: Path) -> list[tuple[str, int, dict, dict]]:
    rows = sqlite3.connect(folder / "votes.sqlite").execute(
        "SELECT rater, slot, answers, watch FROM votes ORDER BY received"
    )
    return [(rater, slot, json.loads(answers), json.loads(watch)) for rater, slot, answers, watch in rows]


@pytest.mark.parametrize("size", SIZES)
def test_a_whole_visit_by_mouse_or_finger(browse, server, folder, size):
    page = browse(size)
    page.driver.get(f"http://127.0.0.1:{server.port}/?PROLIFIC_PID=mouse{size}&STUDY_ID=s&SESSION_ID=x")
    page.until("!document.querySelector('#welcome').hidden")
    page.look("welcome")
    assert not page["start"].is_enabled()
    page["consent"].click()
    page["start"].click()
    page.until("!document.querySelector('#trial').hidden && document.querySelectorAll('video')[0].currentTime > 0.1")
    left, right = page.js("[...document.querySelectorAll('video')].map(v => v.currentTime)")
    assert abs(left - right) < 0.07, "the clips did not start together"
    page.look("locked")
    before = len(votes(folder))
    screens = page.js("visit.screens.length")
    for slot in range(screens):
        assert page.js("seen") is False or slot == 0
        page.unlocked()
        page.fits()
        assert not page["prompt"].is_displayed()
        if slot == 0:
            page["half"].click()
            assert page.js("videos[0].playbackRate") == 0.5
            page["forward"].click()
            page.until("videos.every(v => v.paused && !v.seeking)")
            then = page.js("videos.map(v => v.currentTime)")
            page["back"].click()
            page.until("videos.every(v => !v.seeking)")
            now = page.js("videos.map(v => v.currentTime)")
            assert then[0] - now[0] == pytest.approx(1 / 16, abs=0.01) or now[0] < 1 / 16
            page["play"].click()
            page["replay"].click()
            page.press("left")
            page.question(2)
            page["previous"].click()
        page.question(1)
        page.press("right")
        page.question(2)
        page.press("tie")
        page.question(3)
        assert page["prompt"].is_displayed()
        page.fits()
        if slot == 0:
            page.look("text")
        page.press("left")
        if page.js(f"visit.screens[{slot}].practice"):
            page.until("!document.querySelector('#lesson').hidden")
            if slot == 0:
                page.look("lesson")
            page["continue"].click()
        page.until(f"visit.done === {slot + 1}")
    page.until("!document.querySelector('#end').hidden")
    page.look("end")
    mine = votes(folder)[before:]
    assert [slot for _, slot, _, _ in mine] == list(range(screens))
    assert all(answers == {"motion": "right", "quality": "tie", "text": "left"} for _, _, answers, _ in mine)
    watch = mine[0][3]
    assert (watch["half_speed"], watch["steps"], watch["changed"]) == (1, 2, 1)
    assert not any(name in page.driver.page_source for name in NAMES)
    page.no_complaints()
    analyze(folder, out=folder / "results")
    with open(folder / "results" / "raters.csv") as file:
        codes = {row["rater"]: row["code"] for row in csv.DictReader(file)}
    assert page["code"].text == codes[mine[0][0]]


@pytest.mark.parametrize("size", SIZES)
def test_a_whole_visit_by_keyboard_that_moves_to_another_device_midway(browse, server, folder, size):
    page = browse(size)
    page.driver.get(f"http://127.0.0.1:{server.port}/?workerId=keys{size}&assignmentId=a&hitId=h")
    page.until("!document.querySelector('#welcome').hidden")
    for _ in range(3):
        page.key(Keys.ENTER)  # to the box, then (once ticked) start
        if page.js("document.activeElement.id === 'consent'"):
            page.driver.switch_to.active_element.send_keys(Keys.SPACE)
    page.until("!document.querySelector('#trial').hidden")
    before = len(votes(folder))
    screens = page.js("visit.screens.length")
    for slot in range(screens):
        if slot == screens // 2:
            link = page.driver.current_url
            page = browse(size)
            page.driver.get(link)
            page.until(f"visit && visit.done === {slot}")
        page.unlocked()
        if slot == 0:
            page.key(" ")
            page.until("videos.every(v => v.paused)")
            page.key(".")
            page.key(",")
            page.key("h")
            assert page["half"].get_attribute("aria-pressed") == "true"
            page.key(" ")
            page.until("videos.some(v => !v.paused)")
            page.key("r")
        page.question(1)
        page.key(Keys.ARROW_LEFT if size == "desktop" else "1")
        page.question(2)
        page.key("b")
        page.question(1)
        page.key("1")
        page.question(2)
        page.key("2")
        page.question(3)
        page.key("3")
        if page.js(f"visit.screens[{slot}].practice"):
            page.until("!document.querySelector('#lesson').hidden")
            page.key(Keys.ENTER)
        page.until(f"visit.done === {slot + 1}")
    page.until("!document.querySelector('#end').hidden")
    mine = votes(folder)[before:]
    assert all(answers == {"motion": "left", "quality": "tie", "text": "right"} for _, _, answers, _ in mine)
    assert len(mine) == screens
    page.no_complaints()


def test_an_answer_given_while_the_server_is_down_is_kept_and_sent_later(browse, server, folder):
    page = browse("desktop")
    page.driver.get(f"http://127.0.0.1:{server.port}/")
    page.until("!document.querySelector('#welcome').hidden")
    page["consent"].click()
    page["start"].click()
    page.unlocked()
    server.kill()
    before = len(votes(folder))
    for number, key in enumerate("123", 1):
        page.question(number)
        page.key(key)
    page.until("!document.querySelector('#lesson').hidden")
    page.key(Keys.ENTER)
    page.until("document.querySelector('#notice').textContent.includes('kept on this device')")
    page.look("waiting")
    server.start()
    page.until("visit.done === 1", 60)
    page.until("document.querySelector('#notice').hidden")
    assert len(votes(folder)) == before + 1
    # Once more, and this time the tab is closed before the server comes back.
    page.unlocked()
    server.kill()
    for number, key in enumerate("321", 1):
        page.question(number)
        page.key(key)
    page.until("!document.querySelector('#lesson').hidden")
    page.key(Keys.ENTER)
    page.until("document.querySelector('#notice').textContent.includes('kept on this device')")
    link = page.driver.current_url
    page.driver.get("about:blank")
    server.start()
    page.driver.get(link)
    page.until("visit && visit.done === 2", 60)
    assert votes(folder)[-1][2] == {"motion": "right", "quality": "tie", "text": "left"}


def test_a_wrong_link_says_so(browse, server):
    page = browse("phone")
    page.driver.get(f"http://127.0.0.1:{server.port}/#nobody.0000")
    page.until("!document.querySelector('#welcome').hidden")
    assert "This link is not valid" in page["notice"].text

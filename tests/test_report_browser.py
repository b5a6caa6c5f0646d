"""The report in a real browser: its clips play in step, stop, step, and show their flow, by keys and by mouse."""

import pytest

pytest.importorskip("selenium", reason="needs selenium (dev extra)")

from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from browser import CHROMIUM, DRIVER, MARKS
from mogan.data.video import write_video
from mogan.evaluation.evaluate import evaluate
from mogan.report import report
from mogan.world.scenes import make_scene, render

pytestmark = MARKS
TIMES = "return [...document.querySelectorAll('#clips .row')].map(r => [...r.querySelectorAll('video')].map(v => v.currentTime))"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    for system, seed in (("dmd", 1), ("mogan", 9)):
        (root / system).mkdir()
        for number in range(3):
            text = make_scene(1, number, motion="rich").caption
            write_video(root / system / f"{text}-0.mp4", render(make_scene(seed, number, motion="rich")), 16)
    evaluate((root / "dmd", root / "mogan"), out=root / "results.json", flow="farneback", quick=True)
    report((root / "results.json",), out=root / "report.html")
    return root / "report.html"


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def browser(request, page):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_window_size(*request.param)
    driver.get(page.as_uri())
    yield driver
    driver.quit()


def test_clips_play_in_step_and_obey_keys_and_mouse(browser):
    def press(key):
        ActionChains(browser).send_keys(key).perform()

    def times():
        """Of the clips in view."""
        return [t for row in browser.execute_script(TIMES)[:1] for t in row]

    wait = WebDriverWait(browser, 30)
    browser.execute_script("document.querySelector('#clips .row').scrollIntoView()")
    wait.until(lambda _: min(times()) > 0)
    press(Keys.SPACE)
    wait.until(lambda _: browser.find_element(By.ID, "play").text == "Play")
    held = times()
    assert max(held) - min(held) < 0.2
    browser.execute_script(
        "const s = document.getElementById('seek'); s.value = 0.5; s.dispatchEvent(new Event('input'))"
    )
    wait.until(lambda _: max(times()) - min(times()) < 1e-3)
    middle = times()[0]
    assert middle == pytest.approx(17 / 16 / 2, abs=0.01)
    press(Keys.ARROW_RIGHT)
    wait.until(lambda _: min(times()) > middle)
    assert times() == pytest.approx([middle + 1 / 16] * len(times()), abs=0.01)
    press("f")
    assert browser.execute_script("return getComputedStyle(document.querySelector('.flow')).opacity") == "1"
    press("f")
    assert browser.execute_script("return getComputedStyle(document.querySelector('.flow')).opacity") == "0"
    press("j")
    assert "number" in browser.execute_script("return document.activeElement.innerText")
    browser.find_element(By.ID, "play").click()
    wait.until(lambda _: times()[0] != pytest.approx(middle + 1 / 16, abs=0.01))
    wide = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1]
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]

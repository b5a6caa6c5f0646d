"""The report in a real browser: its clips play in step, stop, step, and show their flow, by keys and by mouse."""

import json

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
from mogan.report.page import Background, write_page
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


@pytest.fixture(scope="module")
def study(page):
    """A page as a study writes it: six systems, of which four are shown."""
    (one, two) = json.loads((page.parent / "results.json").read_text())["systems"].values()
    systems = {f"system_{number}": (one, two)[number % 2] for number in range(6)}
    (page.parent / "study.json").write_text(json.dumps({"systems": systems}))
    known = Background("Clips of one training seed; the table is", "study.md", {"system_5": ("system_4",)})
    write_page((page.parent / "study.json",), page.parent / "study.html", background=known)
    return page.parent / "study.html"


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def browser(request):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_window_size(*request.param)
    yield driver
    wide = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    said = [line for line in driver.get_log("browser") if line["level"] == "SEVERE"]
    driver.quit()
    assert wide[0] <= wide[1]
    assert not said


def test_clips_play_in_step_and_obey_keys_and_mouse(browser, page):
    browser.get(page.as_uri())

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


SHOWN = """return [...document.querySelectorAll('#clips .row')].map(r => [...r.querySelectorAll('.shot')].filter(s => s.offsetParent).map(
    s => [s.dataset.system, s.querySelector('video').currentTime]))"""


def test_a_studys_clips_play_and_those_of_a_chosen_system_come_in_step(browser, study):
    browser.get(study.as_uri())
    wait = WebDriverWait(browser, 30)

    def shown():
        """Systems and times of the first row."""
        systems, times = zip(*browser.execute_script(SHOWN)[0], strict=True)
        return list(systems), times

    def box(name):
        return browser.find_element(By.CSS_SELECTOR, f".key input[value={name}]")

    browser.execute_script("document.querySelector('#clips .row').scrollIntoView()")
    wait.until(lambda _: min(shown()[1]) > 0)
    assert shown()[0] == [f"system_{number}" for number in range(4)]
    browser.execute_script("scrollTo(0, 0)")
    box("system_0").click()
    box("system_3").send_keys(Keys.TAB)
    ActionChains(browser).send_keys(Keys.SPACE).perform()  # of the next, system 4
    assert box("system_4").is_selected()
    assert shown()[0] == ["system_1", "system_2", "system_3", "system_4"]
    browser.execute_script("document.querySelector('#clips .row').scrollIntoView()")
    wait.until(lambda _: shown()[1][3] > 0)
    ActionChains(browser).send_keys("k").perform()  # leaves the box
    browser.find_element(By.ID, "play").click()
    wait.until(lambda _: max(shown()[1]) - min(shown()[1]) < 0.2)
    assert browser.find_element(By.LINK_TEXT, "study.md").get_attribute("href") == f"{study.parent.as_uri()}/study.md"

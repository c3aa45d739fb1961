"""The page at /ui in headless Chromium against a real server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

selenium = pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
UI = Path(__file__).parents[2] / "src/hasten/serving/ui"
GO_ON = """
    const plain = window.fetch;
    window.fetch = (to, options) => plain(to, options?.body === undefined ? options : {
        ...options, body: JSON.stringify({...JSON.parse(options.body), ignore_eos: true})});
"""
"""Makes answers go on until max_tokens: the small model ends its stories early."""
SHOTS = os.environ.get("HASTEN_SHOTS")
"""Folder for screenshots, to be looked at by whoever changes the page."""

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)


class Server:
    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        command = [sys.executable, "-m", "hasten", "serve", "reference", "--port", str(self.port)]
        command += ["--stack", "draft=prompt-lookup", "--max-length", "4096"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        until(self.ready, 60)

    def ready(self) -> bool:
        try:
            return bool(self.get("/ready")["ready"])
        except OSError:
            return False

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=5) as response:
            return json.load(response)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1280,860",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, server: Server) -> webdriver.Chrome:
    browser.get(f"{server.url}/ui/")
    until(lambda: text(browser, "#status") == "connected")
    return browser


def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return value


def text(page: webdriver.Chrome, selector: str) -> str:
    return page.find_element(By.CSS_SELECTOR, selector).get_property("textContent")


def texts(page: webdriver.Chrome, selector: str) -> list[str]:
    found = page.find_elements(By.CSS_SELECTOR, selector)
    return [node.get_property("textContent") for node in found]


def fill(page: webdriver.Chrome, field: str, value: str) -> None:
    if not page.find_element(By.ID, "settings").is_displayed():
        page.find_element(By.ID, "settings-button").click()
    node = page.find_element(By.ID, field)
    node.clear()
    node.send_keys(value)


def say(page: webdriver.Chrome, message: str) -> None:
    page.find_element(By.ID, "input").send_keys(message + Keys.ENTER)


def idle(page: webdriver.Chrome) -> bool:
    return page.find_element(By.ID, "send").is_displayed()


def shot(page: webdriver.Chrome, name: str) -> None:
    if SHOTS:
        page.save_screenshot(str(Path(SHOTS) / f"{name}.png"))


def test_an_answer_grows_and_stop_ends_it(page: webdriver.Chrome, server: Server) -> None:
    page.execute_script(GO_ON)
    fill(page, "temperature", "1")
    fill(page, "seed", "7")
    fill(page, "max-tokens", "24")
    box = page.find_element(By.ID, "input")
    box.send_keys("Once <b>upon</b>" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "a time")
    assert not texts(page, ".turn"), "Shift+Enter does not send"
    box.send_keys(Keys.ENTER)
    until(lambda: len(texts(page, ".turn")) == 2 and idle(page))
    assert texts(page, ".user .text") == ["Once <b>upon</b>\na time"]  # text, not markup
    assert "24 tokens" in text(page, ".assistant .figures")
    assert "tok/s" in text(page, ".assistant .figures")
    assert "first after" in text(page, ".assistant .figures")

    fill(page, "max-tokens", "3900")
    say(page, "Tell me a long story.")
    lengths: set[int] = set()

    def grew() -> bool:
        lengths.add(len(texts(page, ".assistant .text")[-1]))
        return len(lengths) > 3

    until(grew)
    page.find_element(By.ID, "stop").click()
    until(lambda: idle(page))
    assert text(page, ".turn:last-child .figures").endswith("stopped")
    until(lambda: server.get("/hasten/stats")["running"] == 0, 3)
    assert server.get("/hasten/stats")["requests"]["cancelled"] == 1
    assert not texts(page, ".error")
    shot(page, "light")

    page.find_element(By.ID, "clear").click()
    assert not texts(page, ".turn")


def test_charts_and_totals_follow_the_server(page: webdriver.Chrome) -> None:
    fill(page, "max-tokens", "600")
    say(page, "the cat sat on the mat. the cat sat on the mat. the cat sat")
    until(lambda: idle(page), 30)

    def points() -> list[int]:
        plots = page.find_elements(By.CSS_SELECTOR, ".plot")
        return [int(plot.get_attribute("data-points") or 0) for plot in plots]

    until(lambda: len(points()) == 5 and min(points()) >= 2, 15)
    assert all("M" in (path or "") for path in (
        node.get_attribute("d") for node in page.find_elements(By.CSS_SELECTOR, ".plot .line")
    ))  # fmt: skip
    totals = dict(zip(texts(page, ".totals dt"), texts(page, ".totals dd"), strict=True))
    assert int(totals["Answered"]) >= 1
    assert totals["Failed"] == "0"


def test_a_refusal_shows_the_servers_reason(page: webdriver.Chrome) -> None:
    fill(page, "max-tokens", "99999999")
    say(page, "Hello")
    until(lambda: texts(page, ".error"))
    assert "99999999" in text(page, ".error")
    until(lambda: idle(page))
    assert page.find_element(By.ID, "input").get_property("value") == "Hello"
    shot(page, "error")


def test_nothing_from_elsewhere_and_no_script_error(page: webdriver.Chrome, server: Server) -> None:
    names = page.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert names and all(name.startswith(server.url) for name in names)
    messages = page.get_log("browser")
    unexpected = [m for m in messages if "400 (Bad Request)" not in m["message"]]
    assert not unexpected
    for file in UI.iterdir():
        assert "innerHTML" not in file.read_text()


def test_narrow_and_dark(page: webdriver.Chrome) -> None:
    say(page, "Hi")
    until(lambda: idle(page), 30)
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    shot(page, "dark")
    light = "return getComputedStyle(document.body).backgroundColor"
    assert page.execute_script(light) == "rgb(14, 19, 24)"
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    shot(page, "phone")
    wide = page.execute_script("return document.documentElement.scrollWidth")
    assert wide <= 390, "nothing sticks out"
    if SHOTS:
        page.execute_script("document.querySelector('.live').scrollIntoView()")
        time.sleep(0.3)
        shot(page, "phone-live")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_waits_for_a_server_that_is_away(page: webdriver.Chrome) -> None:
    def network(offline: bool) -> None:
        speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        page.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": offline, **speed})

    page.execute_cdp_cmd("Network.enable", {})
    network(offline=True)
    until(lambda: "away" in text(page, "#status"))
    say(page, "Anybody there?")
    until(lambda: texts(page, ".error"))
    assert "cannot be reached" in text(page, ".error")
    shot(page, "away")
    network(offline=False)
    until(lambda: text(page, "#status") == "connected")
    page.find_element(By.ID, "send").click()  # the text was given back
    until(lambda: idle(page) and len(texts(page, ".assistant .text")) == 2, 30)
    assert len(texts(page, ".error")) == 1

"""Headless Chromium by its own driver."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

AXE = Path(__file__).resolve().parents[2] / "third_party" / "axe-core" / "axe.min.js"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--window-size=1360,900",
)
WAIT_S = 20.0


@dataclass
class Browser:
    """A window, and what a test asks of it. pardoned: console errors with one of these words are expected."""

    driver: webdriver.Chrome
    pardoned: list[str] = field(default_factory=list)

    def open(self, url: str) -> None:
        self.driver.get(url)

    def reset(self) -> None:
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.pardoned.clear()
        self.errors()

    def errors(self) -> list[str]:
        """Return what the console says of errors since the last call."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        told = [entry["message"] for entry in entries if entry["level"] == "SEVERE"]
        return [message for message in told if not any(word in message for word in self.pardoned)]

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def find(self, css: str) -> WebElement:
        """Return the first element, once there is one."""
        found: WebElement = self.until(lambda: next(iter(self.driver.find_elements(By.CSS_SELECTOR, css)), None), css)
        return found

    def text(self, css: str = "main") -> str:
        """Return what is to be read of an element, and nothing where it is not there."""
        found: str = self.js("return document.querySelector(arguments[0])?.innerText ?? ''", css)
        return found

    def until(self, condition: Callable[[], Any], what: str = "", *, wait_s: float = WAIT_S) -> Any:
        """Wait until something holds, and return it."""
        return WebDriverWait(self.driver, wait_s, poll_frequency=0.05).until(lambda _: condition(), what)

    def until_text(self, words: str, css: str = "main", *, wait_s: float = WAIT_S) -> None:
        self.until(lambda: words in self.text(css), f"{words!r} in {css}", wait_s=wait_s)

    def phone(self) -> None:
        """Be as small as a phone."""
        metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def theme(self, name: str) -> None:
        """Choose a theme for pages that are opened from now on; some page of the dashboard must be open."""
        self.js("localStorage.setItem('forge-theme', arguments[0])", name)

    def violations(self) -> list[str]:
        """Return what axe-core holds for serious or critical, with the elements that it is about."""
        self.js(AXE.read_text(encoding="utf-8"))
        found = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run(document, { resultTypes: ['violations'] }).then(done);"
        )
        return [
            f"{one['id']} ({one['impact']}): {[node['target'] for node in one['nodes']]}"
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
        ]


def chromium(profile: Path) -> Browser:
    """Start a browser whose profile is an empty folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    driver.set_script_timeout(60)
    return Browser(driver)

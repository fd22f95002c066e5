"""Debian's Chromium with the chat page open in it, and what a person would do there."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

LAPTOP, PHONE = (1280, 800), (390, 844)
PICTURES = Path(__file__).parent / "screenshots"  # git ignores it
PATIENCE = 20.0  # seconds, on a busy machine


def chromium(profile: Path) -> webdriver.Chrome:
    """Start a browser of its own, without a window, that asks nobody but the server of a test."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--lang=en-GB", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
                     "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


class DrivenPage:
    """The page of one server, as a person sees it; fields and buttons are found by what they are called."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver, self.url = driver, url

    def open(self, size: tuple[int, int] = LAPTOP, dark: bool = False) -> "DrivenPage":
        """Open the page with nothing kept from before."""
        self.show_as(size, dark)
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(self.url)
        self.driver.execute_script("sessionStorage.clear(); localStorage.clear()")
        return self.reload()

    def show_as(self, size: tuple[int, int], dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        phone = size == PHONE
        features = [scheme, {"name": "prefers-reduced-motion", "value": "reduce"}]
        if phone:
            features += [{"name": "pointer", "value": "coarse"}, {"name": "hover", "value": "none"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": size[0], "height": size[1], "deviceScaleFactor": 2 if phone else 1, "mobile": phone})

    def reload(self) -> "DrivenPage":
        self.driver.refresh()
        self.until(lambda: self.script("return document.body.classList.contains('connected')")
                   or self.all(".notice"), "the list of models or a notice")
        return self

    def script(self, text: str, *arguments):
        return self.driver.execute_script(text, *arguments)

    def until(self, condition: Callable, what: str):
        """Wait for `condition` to hold and return what it gave."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            found = condition()
            if found:
                return found
            time.sleep(0.03)
        self.picture("not-reached")
        raise AssertionError(f"not within {PATIENCE} s: {what}; the page says: {self.one('body').text[-800:]}")

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def button(self, label: str, inside: str = "body") -> WebElement:
        """Return the last button that can be seen with this label or text."""
        found = [each for each in self.all(f"{inside} button")
                 if label in (each.get_attribute("aria-label"), each.text.strip()) and each.size["width"]]
        assert found, f"no button {label!r} in {inside}"
        return found[-1]

    def click(self, label: str, inside: str = "body") -> None:
        button = self.button(label, inside)
        ActionChains(self.driver).move_to_element(button).click(button).perform()

    def press(self, *keys: str) -> None:
        """Press keys where the focus is, held together if there are several."""
        chain = ActionChains(self.driver)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in keys[:-1]:
            chain.key_up(key)
        chain.perform()

    def write(self, text: str) -> None:
        self.one("#composer-text").send_keys(text)

    def say(self, text: str, wait: bool = True) -> str:
        """Send a message by the button and return the answer's text."""
        before = len(self.all(".message.assistant"))
        self.write(text)
        self.click("Send")
        self.until(lambda: len(self.all(".message.assistant")) > before, "an answer")
        return self.answered() if wait else ""

    def answered(self) -> str:
        """Wait for the end of the answer and return its text."""
        self.until(lambda: not self.one("#stop").is_displayed(), "the answer's end")
        return self.answer()

    def answer(self) -> str:
        return self.all(".message.assistant .answer")[-1].text

    def messages(self) -> list[str]:
        return [each.text for each in self.all(".bubble, .message.assistant .answer")]

    def fill(self, name: str, text: str) -> None:
        """Write into a field of the settings, which are opened for it."""
        self.script("document.getElementById('open-settings').click()")
        field = self.one(f"#{name}")
        field.clear()
        field.send_keys(text)
        self.click("Close", "#settings")

    def kept(self) -> list[dict]:
        """Return the conversations in the browser's storage."""
        return [json.loads(text) for text in self.script(
            "return Object.keys(localStorage).filter(k => k.startsWith('conversation:')).map(k => localStorage[k])")]

    def faults(self, *allowed: str) -> list[str]:
        """Return what the console has complained of since the last call, but for lines with one of `allowed`."""
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"
                and not any(word in line["message"] for word in allowed)]

    def asked(self) -> list[str]:
        """Return the addresses that the browser has asked for since the last call."""
        lines = (json.loads(line["message"])["message"] for line in self.driver.get_log("performance"))
        return [line["params"]["request"]["url"] for line in lines if line["method"] == "Network.requestWillBeSent"]

    def picture(self, name: str) -> None:
        PICTURES.mkdir(exist_ok=True)
        self.driver.save_screenshot(str(PICTURES / f"{name}.png"))

"""A headless Chromium on MLflow's pages: opens one, waits for its texts, keeps a picture."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

WAIT_SECONDS = 60
CLOSE_CHAT = "//button[@data-component-id='mlflow.assistant.chat_panel.close']"
# Without a mouse, charts would cover themselves with their tools.
HAS_MOUSE = "primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--window-size=1600,1200", f"--blink-settings={HAS_MOUSE}"),
    # No host but this one: a page that needed another would be seen to hang.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Pages:
    """The pages of one server in one window."""

    def __init__(self, browser: str, driver: str, url: str, folder: Path) -> None:
        """Starts the browser.

        Args:
            browser: path of Chromium; driver: of chromedriver.
            url: of the server.
            folder: for the pictures.
        """
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for option in OPTIONS:
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self._browser = webdriver.Chrome(options=options, service=Service(driver))
        self._browser.set_page_load_timeout(WAIT_SECONDS)
        self._url = url
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def open(self, path: str, *texts: str) -> None:
        """Opens a page of MLflow's, in its view for training, and waits until it shows the texts.

        Raises:
            AssertionError: some cannot be read.
        """
        joint = "&" if "?" in path else "?"
        self._browser.get("about:blank")  # else only the part behind the # changes
        self._browser.get(f"{self._url}/#{path}{joint}workflowType=machine_learning")
        self.wait_for(*texts)
        if chats := self._browser.find_elements(By.XPATH, CLOSE_CHAT):  # on the first page
            chats[0].click()
            self.wait_for(*texts)

    def text(self) -> str:
        """What can be read on the page."""
        return self._browser.find_element(By.TAG_NAME, "body").text

    def wait_for(self, *texts: str) -> None:
        """Waits until all of them can be read.

        Raises:
            AssertionError: some cannot.
        """

        def missing(_: object) -> list[str]:
            shown = self.text()
            return [text for text in texts if text not in shown]

        try:
            WebDriverWait(self._browser, WAIT_SECONDS).until(lambda browser: not missing(browser))
        except TimeoutException:
            self.keep("not_found")
            raise AssertionError(f"not on the page: {missing(None)}\n{self.text()}") from None

    def wait_until_gone(self, text: str) -> None:
        """Waits until it can be read no more."""
        WebDriverWait(self._browser, WAIT_SECONDS).until(
            lambda browser: text not in self.text(), f"still on the page: {text}"
        )

    def find(self, path: str) -> WebElement:
        """Waits for an element, by its XPath."""
        return WebDriverWait(self._browser, WAIT_SECONDS).until(
            lambda browser: next(iter(browser.find_elements(By.XPATH, path)), None),
            f"not on the page: {path}",
        )

    def click(self, path: str) -> None:
        """Waits for an element, and clicks on it."""
        self.find(path).click()

    def write(self, path: str, text: str) -> None:
        """Waits for a field, and writes into it."""
        self.find(path).send_keys(text)

    def keep(self, name: str) -> None:
        """Keeps a picture of the window, as it is."""
        self._browser.save_screenshot(str(self._folder / f"{name}.png"))

    def hosts(self) -> set[str]:
        """The hosts that the pages so far have asked for anything."""
        hosts = set()
        for entry in self._browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = urlsplit(message["params"]["request"]["url"])
                if url.scheme in ("http", "https", "ws", "wss"):
                    hosts.add(url.hostname or "")
        return hosts

    def close(self) -> None:
        """Ends the browser and its driver."""
        self._browser.quit()

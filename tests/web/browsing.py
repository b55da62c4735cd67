"""Opens the server's page in a browser of this machine, and notes what must not happen."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def browser_path() -> str | None:
    """The browser to use, or None if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path(), args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page, and what it logged and asked for."""

    def __init__(self, browser: Browser, url: str, **context: Any):
        self.page: Page = browser.new_context(**context).new_page()
        self.page.set_default_timeout(120_000)
        self.errors: list[str] = []
        self.others: list[str] = []
        self.dialogs: list[str] = []
        self.page.on("console", self._log)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._ask)
        self.page.on("dialog", self._answer)
        self._url = url
        self.page.goto(url)

    def _log(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.text} {message.location}")

    def _ask(self, request: Any) -> None:
        if not request.url.startswith((self._url, "data:")):
            self.others.append(request.url)

    def _answer(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.accept()

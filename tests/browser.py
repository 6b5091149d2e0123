"""Pages opened in a real browser, as a user sees them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

BROWSER = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
if (BROWSER is None or DRIVER is None) and not os.environ.get("CI"):
    pytest.skip("needs chromium and chromedriver (scripts/setup dev installs them)", allow_module_level=True)


@contextmanager
def opened(page: Path) -> Iterator[webdriver.Chrome]:
    """Open the page; check at the end that the browser has logged no errors."""
    assert BROWSER is not None, "no chromium: scripts/setup dev installs it"
    assert DRIVER is not None, "no chromedriver: scripts/setup dev installs it"
    options = Options()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get(page.as_uri())
        yield driver
        assert driver.get_log("browser") == []
    finally:
        driver.quit()

"""The steps of docs/mlflow.md in a browser. Needs selenium (`uv pip install selenium`), chromium and chromedriver."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medgen.config import Project, Tracking
from medgen.metrics.summary import SUMMARY
from medgen.tracking import Tracker, sync

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SECONDS = 120  # to wait for a part of the page
GREYS = {0: (40, 80), 10: (120, 160)}  # of the samples of the two runs by step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]


def record_runs(project: Project) -> None:
    """Record two runs with the main metrics, and samples at epoch 10 and of the finished model."""
    for number, name in enumerate(("first", "second")):
        with Tracker.open(project.runs / name, Tracking(enabled=False), project, name) as tracker:
            tracker.metrics(dict.fromkeys(SUMMARY, 0.125 + number), step=10)
            tracker.metrics({"val/ssim": 0.5, "generation/kid_domain_floor": 0.5}, step=10)
            for step, greys in GREYS.items():
                path = project.runs / name / f"{step}.png"
                Image.new("L", (64, 64), greys[number]).save(path)
                tracker.image("samples", path, step=step)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address that `medgen ui` prints."""
    project = Project(tmp_path)
    record_runs(project)
    sync(project, Tracking())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "params.yaml").write_text("tracking: {}\n")
    command = [sys.executable, "-m", "medgen", "ui", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            yield next(word for line in server.stdout for word in line.split() if word.startswith("http"))
        finally:
            server.terminate()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(3200, 1400)  # the table draws only the columns in the window
    yield driver
    driver.quit()


def wait_for(browser: Any, script: str, expected: Any) -> None:
    """Wait until the script returns what is expected."""
    from selenium.webdriver.support.ui import WebDriverWait

    def matches(driver: Any) -> bool:
        found.append(driver.execute_script(script))
        return bool(found[-1] == expected)

    found: list[Any] = []
    try:
        WebDriverWait(browser, SECONDS).until(matches)
    except Exception:
        assert found[-1:] == [expected], browser.current_url
        raise


COLUMNS = """
return [...document.querySelectorAll('[data-testid^="sort-header-"]')]
    .map(element => element.dataset.testid.slice("sort-header-".length)).filter(name => name.includes("/"))
"""
IMAGES = """
const canvas = document.createElement("canvas").getContext("2d")
return [...document.querySelectorAll(".rc-image img")].filter(image => image.naturalWidth).map(image => {
    canvas.drawImage(image, 0, 0)
    return canvas.getImageData(5, 5, 1, 1).data[0]
}).sort((a, b) => a - b)
"""


def test_table_has_the_summary_and_two_clicks_compare_samples_by_step(address: str, browser: Any) -> None:
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    def wait_and_find(selector: str) -> Any:
        wait_for(browser, f"return document.querySelector({selector!r}) !== null", True)
        return browser.find_element("css selector", selector)

    starting = WebDriverWait(browser, SECONDS, ignored_exceptions=[WebDriverException])
    starting.until(lambda driver: driver.get(address) is None)
    wait_for(browser, COLUMNS, sorted(SUMMARY))
    wait_and_find('label:has(input[name="runs-view-mode"][value="CHART"])').click()
    wait_for(browser, IMAGES, list(GREYS[0]))
    beyond_its_end = 2000  # pixels
    ActionChains(browser).drag_and_drop_by_offset(wait_and_find('[role="slider"]'), beyond_its_end, 0).perform()
    wait_for(browser, IMAGES, list(GREYS[10]))

# SPDX-License-Identifier: Apache-2.0
"""`specedit ui` in a real headless Chromium: upload, look for the region, brush, edit, compare, download, cancel.

Needs gradio, playwright (its Python package alone) and a Chromium on PATH (Debian: apt-get install chromium).
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import specedit_kernels

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "specedit_kernels" / "assets" / "example.png"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on PATH"),
    pytest.mark.skipif(not EXAMPLE.exists(), reason="the tiny editor is in a clone alone"),
]
SECONDS = 240_000  # in milliseconds: an edit of the tiny editor on one busy core


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    path = os.pathsep.join([str(Path(specedit_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    log = tmp_path_factory.mktemp("ui") / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "specedit_kernels.cli", "ui", "--port", str(port)],
            env={**os.environ, "PYTHONPATH": path}, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(address):
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 1360, "height": 1150}, accept_downloads=True)
        shown.set_default_timeout(SECONDS)
        asked = []
        shown.on("request", lambda request: asked.append(request.url))
        shown.goto(address)
        shown.locator("#source input[type=file]").set_input_files(EXAMPLE)
        shown.locator("#canvas canvas").first.wait_for()
        shown.asked = asked
        yield shown
        browser.close()


def figures(page):
    return page.locator("#figures textarea")


def press(page, name):
    """Press a button and wait for new figures."""
    before = figures(page).input_value()
    page.locator(f"#{name}").click()
    now = "document.querySelector('#figures textarea').value"
    page.wait_for_function(f"before => {now} && {now} !== before", arg=before)
    return figures(page).input_value()


def test_it_edits_in_a_browser(page, tmp_path):
    page.locator("#instruction textarea").fill("color the turtle purple")
    text = press(page, "look")
    assert "in the edit region" in text and "steps" not in text
    page.locator("#over img").wait_for()
    # the brush, over the picture's lower left, where the turtle is
    canvas = page.locator("#canvas canvas").first.bounding_box()
    x, y = canvas["x"], canvas["y"]
    side = min(canvas["width"], canvas["height"])
    left, top = x + (canvas["width"] - side) / 2, y + (canvas["height"] - side) / 2
    for row in (0.62, 0.7, 0.78):
        page.mouse.move(left + 0.1 * side, top + row * side)
        page.mouse.down()
        page.mouse.move(left + 0.4 * side, top + row * side, steps=8)
        page.mouse.up()
    text = press(page, "edit")
    assert "9 steps" in text and "seconds:" in text
    assert page.locator("#pair img").count() >= 2
    with page.expect_download() as waiting:
        page.locator("#file").click()
    waiting.value.save_as(tmp_path / "edited.png")
    if os.environ.get("SPECEDIT_UI_SCREENSHOT"):
        handle = page.locator("#pair .handle, #pair [class*=inner]").first.bounding_box()
        if handle:  # a quarter of the way: the edited turtle is to the right of it
            page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
            page.mouse.down()
            page.mouse.move(handle["x"] - 150, handle["y"] + handle["height"] / 2, steps=5)
            page.mouse.up()
        page.screenshot(path=os.environ["SPECEDIT_UI_SCREENSHOT"], full_page=True)
    source, edited = Image.open(EXAMPLE).convert("RGB"), Image.open(tmp_path / "edited.png").convert("RGB")
    assert waiting.value.suggested_filename == "example-edited.png" and edited.size == source.size
    difference = np.abs(np.asarray(source, np.int16) - np.asarray(edited, np.int16)).max(-1)
    changed = difference > 0
    assert difference.max() > 40 and 0.01 < changed.mean() < 0.4  # the brush's tokens, not the whole
    assert not changed[: source.height // 4].any()  # and not far above it


def test_cancel(page):
    page.locator("#instruction textarea").fill("make it night")
    before = figures(page).input_value()
    page.locator("#edit").click()
    time.sleep(2)
    page.locator("#stop").click()
    page.wait_for_function("before => document.querySelector('#figures textarea').value !== before", arg=before)
    assert figures(page).input_value() == "cancelled"
    assert "in the edit region" in press(page, "look")  # the next run is a whole one


def test_errors_are_told_and_nothing_goes_elsewhere(page, address):
    page.locator("#instruction textarea").fill("")
    page.locator("#edit").click()
    page.get_by_text("expected a text, got an empty one").first.wait_for()
    elsewhere = sorted({url for url in page.asked if not url.startswith((address, "data:", "blob:"))})
    assert not elsewhere

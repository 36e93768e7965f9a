"""The page in a real browser: files dropped, calls and masks seen, no error in the console, no request elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.inference.serve.conftest import Served

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """The page, whose console and requests are watched."""
    shown = browser.new_page(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    errors: list[str] = []
    elsewhere: list[str] = []
    shown.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    shown.on("pageerror", lambda error: errors.append(str(error)))
    shown.on("request", lambda request: elsewhere.append(request.url) if is_elsewhere(request.url, served) else None)
    shown.goto(served.address)
    sync_api.expect(shown.locator("#model option").first).to_be_attached()
    yield shown
    shown.close()
    # A file that cannot be read is answered with 422, which Chromium itself writes into the console.
    assert [error for error in errors if "422" not in error] == []
    assert elsewhere == []


def is_elsewhere(url: str, served: Served) -> bool:
    return not url.startswith((served.address, "blob:" + served.address, "data:"))


def test_an_example_is_predicted_in_the_first_minute(page: Any) -> None:
    page.click("text=two findings")
    page.wait_for_selector(".finding")
    assert page.locator(".finding").count() == 4
    assert "Not a medical device" in page.inner_text("footer")
    assert page.locator("#list li .count").inner_text() in "01234"


def test_a_dicom_shows_its_mask_and_another_model_its_calls(page: Any, drawn: SyntheticPaths) -> None:
    page.set_input_files("#input", str(next(drawn.siim.rglob("*.dcm"))))
    page.wait_for_selector(".finding")
    page.select_option("#model", "segmenter")
    page.wait_for_selector("text=Mask:")
    page.select_option("#second", "classifier")
    sync_api.expect(page.locator("#views canvas")).to_have_count(2)
    with page.expect_download() as download:
        page.click("text=SR")
    assert download.value.suggested_filename.endswith(".sr.dcm")


def test_a_batch_with_a_damaged_file_names_it_and_goes_on(page: Any, drawn: SyntheticPaths, tmp_path: Path) -> None:
    good = sorted(drawn.nih.rglob("*.png"))[:3]
    bad = tmp_path / "bad.png"
    bad.write_bytes(good[0].read_bytes()[:300])
    page.set_input_files("#input", [str(path) for path in (*good, bad)])
    sync_api.expect(page.locator("#progress")).to_have_text("4 of 4", timeout=20_000)
    assert page.locator("#list .error").count() == 1
    page.click("#list li:has(.error)")
    assert "bad.png: PNG" in page.inner_text("#reason")
    with page.expect_download() as download:
        page.click("#csv")
    lines = Path(download.value.path()).read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith('"file","Cardiomegaly","Cardiomegaly.call"')


def test_keys_and_drags_change_the_view(page: Any) -> None:
    page.click("text=normal")
    page.wait_for_selector(".finding")
    sync_api.expect(page.locator("#window")).to_contain_text("W 255")
    page.keyboard.press("i")
    assert page.get_attribute("#invert", "aria-pressed") == "true"
    page.keyboard.press("1")
    assert page.input_value("#map")
    assert page.is_visible("#mapnote")
    box = page.locator("#views canvas").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.keyboard.down("Shift")
    page.mouse.down()
    page.mouse.move(box["x"] + 260, box["y"] + 180)
    page.mouse.up()
    page.keyboard.up("Shift")
    sync_api.expect(page.locator("#window")).not_to_contain_text("W 255")
    page.keyboard.press("0")
    sync_api.expect(page.locator("#window")).to_contain_text("W 255")


def test_it_can_be_used_on_a_phone(browser: Any, served: Served) -> None:
    phone = browser.new_page(viewport={"width": 380, "height": 720})
    phone.goto(served.address)
    phone.click("text=two findings")
    phone.wait_for_selector(".finding")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 380
    phone.close()

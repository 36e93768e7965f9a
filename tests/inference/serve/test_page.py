"""The page in a real browser: files dropped, calls and masks seen, no error in the console, no request elsewhere."""

from __future__ import annotations

import itertools
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cxrscale.inference.serve import Service
from cxrscale.io import encode_png
from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.dicom_files import dicom_file, gray_image
from tests.inference.serve.browsing import CHROMIUM, sync_api
from tests.inference.serve.conftest import Served, serving

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]
SECONDS = 60_000
"""Milliseconds that a busy machine may take for anything."""


def expect(found: Any) -> Any:
    return sync_api.expect(found)


def rows_done(page: Any, count: int) -> None:
    """Wait until so many images of the list have a result or a reason."""
    page.wait_for_function(
        "count => [...document.querySelectorAll('#list .count')].filter(x => x.textContent !== '…').length === count",
        arg=count,
        timeout=SECONDS,
    )


def image_shown(page: Any, name: str) -> None:
    page.wait_for_function(
        "name => document.querySelector('#views').dataset.drawn?.endsWith(name)", arg=name, timeout=SECONDS
    )


def test_an_example_is_predicted_in_the_first_minute(page: Any) -> None:
    assert page.inner_text("#results h2") == "What the model looks for"
    page.click(".example[data-name='effusion-and-mass.png']")
    page.wait_for_selector(".finding")
    assert page.locator(".finding").count() == 4
    assert "Not a medical device" in page.inner_text("footer")
    assert re.fullmatch(r"\+[1-4]|0", page.locator("#list li .count").inner_text())
    assert page.input_value("#map") == ""
    page.select_option("#examples", "unreadable.png")
    rows_done(page, 2)
    assert page.locator("#list .failed .why").inner_text().startswith("PNG")


def test_findings_are_sorted_by_their_distance_to_the_threshold_and_say_the_operating_point(page: Any) -> None:
    page.click(".example[data-name='effusion-and-mass.png']")
    page.wait_for_selector(".finding .value")
    rules = page.locator(".finding .rule").all_inner_texts()
    values = page.locator(".finding .value").all_inner_texts()
    distances = []
    for value, rule in zip(values, rules, strict=True):
        number, call = value.split()[0], value.split(maxsplit=1)[1]
        known = re.match(r"(above|below) ([\d.]+) \(([\d.]+) to ([\d.]+)\)", rule)
        assert (known is None) == (call == "no call") == (rule == "no threshold")
        if known:
            assert (known[1] == "above") == (call == "present")
            distances.append(float(number) - float(known[2]))
    assert len(distances) >= 2
    assert all(first >= second - 0.011 for first, second in itertools.pairwise(distances))
    # Hernia, among others, has no threshold: what has none stands last.
    assert all(rule == "no threshold" for rule in rules[len(distances) :])
    page.hover(".finding >> nth=0")
    tip = page.locator(".finding .tip").first
    expect(tip).to_be_visible()
    words = r"sensitivity \d+(\.\d)?%, specificity [\d.]+%.*predictive value [\d.]+% where [\d.]+% have it"
    assert re.search(words, tip.inner_text().replace("\n", " "))
    assert "Unlike the training images: " in page.inner_text("#results")


def test_a_dicom_shows_its_mask_and_another_model_its_calls(page: Any, drawn: SyntheticPaths) -> None:
    path = next(drawn.siim.rglob("*.dcm"))
    page.set_input_files("#input", str(path))
    page.wait_for_selector(".finding")
    page.select_option("#model", "segmenter")
    page.wait_for_selector("text=Mask:")
    expect(page.locator("#masklabel")).to_be_visible()
    image_shown(page, path.name)
    page.wait_for_timeout(300)
    with_mask = page.locator("#views canvas").screenshot()
    page.keyboard.press("m")
    page.wait_for_timeout(300)
    if "Mask: empty" not in page.inner_text("#results"):
        assert page.locator("#views canvas").screenshot() != with_mask
    page.select_option("#second", "classifier")
    expect(page.locator("#views canvas")).to_have_count(2)
    page.wait_for_selector("text=no finding in common")
    with page.expect_download() as download:
        page.click("[data-kind=dicom-sr]")
    assert download.value.suggested_filename.endswith(".sr.dcm")


def test_two_variants_show_how_far_they_agree(page: Any, variants: Served) -> None:
    page.goto(variants.address)
    page.select_option("#second", "b")
    page.click(".example[data-name='effusion-and-mass.png']")
    page.wait_for_selector(".agreement")
    assert page.locator("#views figcaption").all_inner_texts() == ["a (float)", "b (float)"]
    words = page.inner_text(".agreement")
    assert re.search(r"Calls alike: (\d) of \1\.", words)
    assert "Largest difference of a probability: " in words
    assert page.locator(".finding").count() == 4
    assert page.locator(".finding .score").count() == 8


def test_a_batch_with_a_damaged_file_names_it_and_goes_on(page: Any, drawn: SyntheticPaths, tmp_path: Path) -> None:
    good = sorted(drawn.nih.rglob("*.png"))[:3]
    bad = tmp_path / "bad.png"
    bad.write_bytes(good[0].read_bytes()[:300])
    page.set_input_files("#input", [str(path) for path in (*good, bad)])
    expect(page.locator("#progress")).to_have_text("4 of 4", timeout=SECONDS)
    assert page.locator("#list .failed").count() == 1
    page.click("#list li.failed")
    assert page.inner_text("#reasonname") == "bad.png"
    assert page.inner_text("#reasontext").startswith("PNG")
    with page.expect_download() as download:
        page.click("#csv")
    lines = Path(download.value.path()).read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith('"file","Cardiomegaly","Cardiomegaly.call"')


def test_another_model_predicts_the_list_anew(page: Any, drawn: SyntheticPaths) -> None:
    page.set_input_files("#input", [str(path) for path in sorted(drawn.nih.rglob("*.png"))[:5]])
    expect(page.locator("#progress")).to_have_text("5 of 5", timeout=SECONDS)
    page.select_option("#model", "segmenter")
    rows_done(page, 5)
    expect(page.locator("#progress")).to_have_text("5 of 5", timeout=SECONDS)
    with page.expect_download() as download:
        page.click("#csv")
    head, *rows = Path(download.value.path()).read_text().splitlines()
    assert head == '"file","Pneumothorax","Pneumothorax.call","error"'
    assert all(float(row.split('","')[1]) >= 0 for row in rows)


def test_a_service_with_a_key_asks_for_it(browser: Any, served: Served) -> None:
    settings = served.service.settings
    with serving(Service(served.service.models, settings), "a key of many letters") as locked:
        page = browser.new_page()
        page.goto(locked.address)
        page.fill("#key", "a key of many letters")
        page.click("#keydialog button")
        page.wait_for_selector("body[data-ready]")
        page.click(".example[data-name='normal.png']")
        page.wait_for_selector(".finding")
        image_shown(page, "normal.png")
        page.close()


def test_a_zip_is_read_in_the_browser(page: Any, drawn: SyntheticPaths, tmp_path: Path) -> None:
    first, second, third = (path.read_bytes() for path in sorted(drawn.nih.rglob("*.png"))[:3])
    path = tmp_path / "study.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/one.png", first)
        archive.writestr("a/two", second, zipfile.ZIP_STORED)  # without a suffix it is tried
        archive.writestr("__MACOSX/a/._one.png", b"x")
        archive.writestr("secret.png", third)
        archive.writestr("broken.png", third)
        archive.writestr("inner.zip", b"PK")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"secret.png") - 46 + 8] |= 1  # the flag of encryption in the directory
    at = data.rindex(b"broken.png") - 46 + 16
    data[at : at + 4] = b"\0\0\0\0"  # a checksum
    path.write_bytes(data)
    page.set_input_files("#input", str(path))
    rows_done(page, 5)
    shown = {row.split("\n")[0]: row for row in page.locator("#list li").all_inner_texts()}
    assert list(shown) == [
        f"study.zip/{name}" for name in ("a/one.png", "a/two", "secret.png", "broken.png", "inner.zip")
    ]
    assert [re.search(r"\+\d|0$", row) is not None for row in shown.values()] == [True, True, False, False, False]
    assert "encrypted" in shown["study.zip/secret.png"]
    assert "damaged" in shown["study.zip/broken.png"]
    assert "a zip inside a zip" in shown["study.zip/inner.zip"]


def test_what_is_dropped_is_added_wherever_it_falls(page: Any, drawn: SyntheticPaths) -> None:
    content = next(drawn.nih.rglob("*.png")).read_bytes()
    page.evaluate(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(bytes)], "dropped.png"));
            const drop = new DragEvent("drop", { dataTransfer: transfer, bubbles: true });
            document.querySelector("footer").dispatchEvent(drop);
        }""",
        list(content),
    )
    rows_done(page, 1)
    image_shown(page, "dropped.png")


def test_window_and_level_are_in_the_units_of_a_12_bit_file(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep.dcm"
    values = gray_image(600, 500, dtype="u2", bits=12)
    path.write_bytes(dicom_file(values, BitsStored=12, WindowCenter=2048, WindowWidth=3000))
    page.set_input_files("#input", str(path))
    image_shown(page, "deep.dcm")
    assert (page.input_value("#width"), page.input_value("#center")) == ("3000", "2048")
    before = page.locator("#views canvas").screenshot()
    drag(page, 60, -20)
    expect(page.locator("#width")).to_have_value("3450")  # 7.5 values per pixel: 400 pixels are the file's own window
    expect(page.locator("#center")).to_have_value("2198")
    assert page.locator("#views canvas").screenshot() != before
    page.fill("#width", "500")
    page.wait_for_timeout(200)
    page.locator("#list").focus()
    page.keyboard.press("0")
    expect(page.locator("#width")).to_have_value("3000")


def test_keys_and_drags_change_the_view(page: Any) -> None:
    page.click(".example[data-name='normal.png']")
    page.wait_for_selector(".finding")
    image_shown(page, "normal.png")
    expect(page.locator("#width")).to_have_value("255")
    page.keyboard.press("i")
    assert page.get_attribute("#invert", "aria-pressed") == "true"
    page.keyboard.press("1")
    name = page.input_value("#map")
    assert name
    assert page.inner_text("#mapnote").startswith(
        f"Map of {name}: it shows where the score comes from, not where the disease"
    )
    page.keyboard.press("h")
    assert page.input_value("#map") == ""
    page.keyboard.press("h")
    assert page.input_value("#map") == name
    drag(page, 60, -20)
    expect(page.locator("#width")).not_to_have_value("255")
    page.keyboard.press("0")
    expect(page.locator("#width")).to_have_value("255")


def drag(page: Any, x: int, y: int) -> None:
    box = page.locator("#views canvas").first.bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.keyboard.down("Shift")
    page.mouse.down()
    page.mouse.move(box["x"] + 200 + x, box["y"] + 200 + y)
    page.mouse.up()
    page.keyboard.up("Shift")


def test_all_of_it_can_be_done_by_keyboard(page: Any) -> None:
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.dataset.name || document.activeElement.id"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", reached[-1]
        if reached[-1] == "effusion-and-mass.png":
            break
    assert reached[:2] == ["model", "second"]
    page.keyboard.press("Enter")
    page.wait_for_selector(".finding")
    image_shown(page, "effusion-and-mass.png")
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#keys")).not_to_be_visible()
    seen, focused = set(), "document.activeElement"
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate(f"{focused}.dataset.name || {focused}.dataset.kind || {focused}.id"))
        if page.evaluate("document.activeElement.matches('.finding .name')"):
            expect(page.locator(".finding .tip").locator("visible=true")).to_have_count(1)
    assert {
        "list",
        "width",
        "center",
        "invert",
        "magnify",
        "map",
        "Mass",
        "dicom-sr",
        "overlay",
        "csv",
        "drift",
    } <= seen


def test_a_screen_reader_has_a_name_for_everything(page: Any) -> None:
    page.click(".example[data-name='effusion-and-mass.png']")
    page.wait_for_selector(".finding")
    image_shown(page, "effusion-and-mass.png")
    tree = page.locator("body").aria_snapshot()
    for role in (
        "button",
        "combobox",
        "spinbutton",
        "checkbox",
        "slider",
        "img",
        "listbox",
        "option",
        "toolbar",
        "region",
    ):
        nameless = [line for line in tree.splitlines() if re.match(rf"\s*- {role}(:| \[|$)", line)]
        assert nameless == [], nameless
    assert re.search(r'img "effusion-and-mass.png: ', tree)
    page.wait_for_function(
        "() => document.querySelector('#announce').textContent.startsWith('effusion-and-mass.png: ')"
    )


def test_drift_has_a_panel(page: Any) -> None:
    page.click("#drift")
    expect(page.locator("#driftdialog")).to_be_visible()
    page.wait_for_selector("#driftrows tr")
    assert "brightness" in page.inner_text("#driftrows")
    page.click("#driftdialog button")


def test_paper_has_image_findings_model_and_the_warning(page: Any) -> None:
    page.click(".example[data-name='effusion-and-mass.png']")
    page.wait_for_selector(".finding")
    image_shown(page, "effusion-and-mass.png")
    page.keyboard.press("1")
    page.emulate_media(media="print")
    text = page.inner_text("#sheet")
    assert "effusion-and-mass.png" in text
    assert re.search(r"classifier \(float, trained \d{4}-\d\d-\d\d on nih, weights [0-9a-f]{8}\)", text)
    assert "Not a medical device." in text
    assert "where the score comes from, not where the disease is" in text
    assert page.locator("#sheet td").count() == 4 * 4
    assert page.locator("#views canvas").is_visible()
    assert not page.locator("#tools").is_visible()
    assert not page.locator("#findings").is_visible()


def test_it_can_be_used_on_a_phone_in_the_dark(browser: Any, served: Served) -> None:
    phone = browser.new_page(viewport={"width": 380, "height": 720}, color_scheme="dark", reduced_motion="reduce")
    phone.goto(served.address)
    phone.click(".example[data-name='effusion-and-mass.png']")
    phone.wait_for_selector(".finding")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 380
    assert phone.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"
    assert phone.evaluate("getComputedStyle(document.querySelector('#pick')).transitionDuration") == "0s"
    tops = [phone.locator(name).bounding_box()["y"] for name in ("#list", "#views", ".finding >> nth=0")]
    assert tops == sorted(tops)
    assert phone.locator("#list").bounding_box()["height"] < 100
    phone.close()


def test_a_hundred_files_are_listed_at_once_and_leave_the_page_free(
    browser: Any, served: Served, tmp_path: Path
) -> None:
    paths = []
    for number in range(100):
        path = tmp_path / f"{number:03}.png"
        path.write_bytes(encode_png(gray_image(256, 256, seed=number)))
        paths.append(str(path))
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(served.address)
    page.wait_for_selector("body[data-ready]")
    page.wait_for_timeout(500)
    browser.start_tracing(page=page, categories=["toplevel"])
    page.set_input_files("#input", paths)
    page.wait_for_selector("#list li:nth-child(100)", state="attached", timeout=5_000)
    assert page.locator("#list .count:text-is('…')").count() > 80
    rows_done(page, 100)
    trace = json.loads(browser.stop_tracing())["traceEvents"]
    assert [task for task in main_tasks(trace) if task > 50] == []
    assert page.locator("#list img.thumb").count() == 100
    # Maps and pixels of most images are gone again.
    images, maps = page.evaluate(
        """async () => {
            const { state } = await import("/page/common.js");
            const mapped = state.items.filter(one => Object.values(one.results).some(result => result.maps));
            return [state.items.filter(one => one.pixels).length, mapped.length];
        }"""
    )
    assert images <= 5
    assert maps <= 25
    page.close()


def main_tasks(trace: list[dict[str, Any]]) -> list[float]:
    """Milliseconds of the processor's time that each task of the page's main thread took.

    An observer of long tasks would also count the time in which other processes had the processor.
    """
    main = {
        (event["pid"], event["tid"])
        for event in trace
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    tasks = [event for event in trace if (event["pid"], event["tid"]) in main and event["name"].endswith("RunTask")]
    assert len(tasks) > 100
    return [event.get("tdur", 0) / 1000 for event in tasks]

"""What the page draws, pixel by pixel: the gray image of the reader where the window is the file's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cxrscale.io import load_image
from tests.dicom_files import dicom_file, gray_image
from tests.inference.serve.browsing import CHROMIUM
from tests.inference.serve.conftest import Served

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]

DRAW = """async bytes => {
    const { drawImage, drawnBy } = await import("/page/render.js");
    const answer = await fetch("/v1/image?depth=stored", { method: "POST", body: Uint8Array.from(bytes),
        headers: { "Content-Type": "application/dicom" } });
    const about = JSON.parse(answer.headers.get("X-Stored-Image"));
    const values = new Uint16Array(await answer.arrayBuffer());
    const { width, height } = about;
    const image = { ...about, top: 65535, levels: [{ width, height, values }] };
    const context = new OffscreenCanvas(width, height).getContext("2d");
    drawImage(context, image, about.window, false, { left: 0, top: 0, scale: 1 });
    const { data } = context.getImageData(0, 0, width, height);
    return [drawnBy(), Array.from({ length: width * height }, (_, i) => data[4 * i])];
}"""
DRAG = """async () => {
    const { drawImage } = await import("/page/render.js");
    const levels = [[2048, 2500], [1024, 1250], [512, 625]].map(([width, height]) =>
        ({ width, height, values: Uint16Array.from({ length: width * height }, (_, i) => (i * 7919) % 4096) }));
    const image = { width: 2048, height: 2500, levels, top: 4095, slope: 1, intercept: 0, inverted: false,
        window: { function: "LINEAR" } };
    const context = new OffscreenCanvas(1100, 1300).getContext("2d"), times = [];
    for (let frame = 0; frame < 20; frame += 1) {
        const began = performance.now();
        const view = { center: 2000 + frame, width: 3000 - 20 * frame };
        drawImage(context, image, view, false, { left: 0, top: 0, scale: 0.52, quick: true });
        context.getImageData(0, 0, 1, 1);
        times.push(performance.now() - began);
    }
    return times;
}"""


@pytest.mark.parametrize("way", ["table", "graphics"])
@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 2000, "WindowWidth": 3000},
        {"WindowCenter": 2000, "WindowWidth": 3000, "PhotometricInterpretation": "MONOCHROME1"},
        {"WindowCenter": 900, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"},
        {"RescaleSlope": 0.5, "RescaleIntercept": -100},
    ],
)
def test_the_files_own_window_gives_the_gray_image(
    browser: Any, served: Served, way: str, tags: dict[str, Any]
) -> None:
    data = dicom_file(gray_image(90, 70, dtype="u2", bits=12), BitsStored=12, **tags)
    page = browser.new_page()
    page.goto(f"{served.address}/?draw={way}")
    drawn_by, gray = page.evaluate(DRAW, list(data))
    page.close()
    if drawn_by != way:
        pytest.skip("the browser has no WebGL 2")
    difference = np.abs(np.array(gray).reshape(90, 70) - load_image(data).image_HW.astype(int))
    assert difference.max() <= 1


def test_a_frame_of_a_drag_takes_less_than_50_ms(browser: Any, served: Served) -> None:
    page = browser.new_page()
    page.goto(f"{served.address}/?draw=table")
    times = page.evaluate(DRAG)
    page.close()
    # The first ones are compiled, and others have the processor at times.
    assert sorted(times)[len(times) // 4] < 50, times

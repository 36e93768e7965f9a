"""The page of a run: whole, self-contained, honest about what others reached. Some 20 s."""

from __future__ import annotations

import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cxrscale.inference import stored_thresholds
from cxrscale.io import storage
from cxrscale.reporting import plots, run_report, tables
from cxrscale.reporting.gallery import EACH
from cxrscale.run import choose_run_thresholds, evaluate_run
from cxrscale.training import run_info

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects what a page points to, its ids, its images, and whether its elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: list[str] = []
        self.images = 0
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.targets.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        self.images += tag == "img"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def classifier(classifier_run: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An evaluated classifier with its page."""
    run = shutil.copytree(classifier_run, tmp_path_factory.mktemp("page") / "classifier").as_posix()
    choose_run_thresholds(run, ["threshold.calibration=platt", "threshold.prior_shift=em"], 20)
    evaluate_run(run, 20)
    run_report.write(run)
    return run


@pytest.fixture(scope="module")
def segmenter(segmenter_run: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An evaluated segmenter with its page."""
    run = shutil.copytree(segmenter_run, tmp_path_factory.mktemp("page") / "segmenter").as_posix()
    choose_run_thresholds(run, [], 20)
    evaluate_run(run, 20)
    run_report.write(run)
    return run


@pytest.mark.parametrize("kind", ["classifier", "segmenter"])
def test_a_page_needs_nothing_beside_it(kind: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(kind)
    text = (Path(run) / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    for target in page.targets:
        assert target.startswith(("data:image/jpeg;base64,", "#")), target
    assert "url(http" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert len(page.ids) == len(set(page.ids))
    assert 0 < page.images <= 3 * EACH
    for clip in re.findall(r"url\(#([^)]+)\)", text):
        assert clip in page.ids
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_page_says_what_the_files_say(classifier: str) -> None:
    text = Page((Path(classifier) / "report.html").read_text()).text
    found = json.loads((Path(classifier) / "metrics.json").read_text())
    chosen = json.loads((Path(classifier) / "thresholds.json").read_text())
    about = run_info.read_run_info(classifier)
    area = found["findings"]["Effusion"]["auroc"]
    assert f"{area['value']:.3f} ({area['low']:.3f}–{area['high']:.3f})" in text
    for wanted in (
        "No leak found",
        found["manifest"],
        found["checkpoint"],
        storage.digest((Path(classifier) / "thresholds.json").read_bytes()),
        about["versions"]["torch"],
        "optim.lr=0.003",
        "no image with the finding",
        f"Chosen on the {chosen['images']} images",
        "Calibrated by platt",
        "one estimated from the test scores",
        "Worst misses",
        "Nothing is set beside these",
    ):
        assert wanted in text, wanted
    assert {path.stem for path in (Path(classifier) / "plots").iterdir()} >= {
        *("roc", "precision-recall", "calibration", "confusion", "thresholds", "history"),
    }


def test_masks_are_outlined_and_dice_stands_beside_its_floor(segmenter: str) -> None:
    text = (Path(segmenter) / "report.html").read_text()
    found = json.loads((Path(segmenter) / "metrics.json").read_text())
    assert text.count('class="truth" d="M') >= min(found["dice"]["positives"], EACH) - 1
    assert f"{found['dice']['all_empty_floor']:.3f} for no mask at all" in Page(text).text
    shown = Console(width=tables.WIDTH, record=True, file=io.StringIO())
    shown.print(tables.metrics_table(found, "run"))
    assert f"{found['dice']['on_positives']['value']:.3f}" in shown.export_text()


def rendered(run: str, change: dict[str, Any], about: dict[str, Any] | None = None) -> str:
    """The page's words as they would be with other metrics."""
    found = {**run_report.evaluated(run), **change}
    chosen = stored_thresholds(run)
    drawn: dict[str, run_report.Plot] = {}
    for name in ("roc", "precision-recall", "calibration"):
        figure = plots.overlap([0.5])
        drawn[name] = run_report.Plot(figure, name)
    return Page(
        run_report.render(run, found, chosen, {**run_info.read_run_info(run), **(about or {})}, [], drawn, {})
    ).text


def test_published_figures_stand_beside_the_same_split_alone(classifier: str) -> None:
    data = run_report.evaluated(classifier)["data"]
    official = {**data, "parts": {**data["parts"], "test": {**data["parts"]["test"], "images": 25_596}}}
    text = rendered(classifier, {"data": official})
    assert "DenseNet-121" in text
    assert "0.805–0.811" in text
    assert "Rajpurkar" not in text
    sets = [{**data["sets"][0], "pack": {**data["sets"][0]["pack"], "split": "random"}}]
    parts = {**data["parts"], "train": {**data["parts"]["train"], "images": 112_000}}
    text = rendered(classifier, {"data": {**data, "sets": sets, "parts": parts}})
    assert "0.864" in text  # CheXNet's Effusion
    assert "0.841" in text
    assert "DenseNet-121" not in text


def test_a_systems_own_numbers_are_quoted_with_their_images(classifier: str) -> None:
    assert "Beside the system" not in rendered(classifier, {})
    text = rendered(classifier, {}, {"recipe": "effusion-resnet"})
    assert "Effusion against No Finding" in text
    assert "0.860" in text
    assert "other images" in text


def test_a_leak_is_the_first_thing_on_the_page(classifier: str) -> None:
    data = run_report.evaluated(classifier)["data"]
    leaks = {**data["leaks"], "verdict": ["LEAK: 3 patients in two splits."], "patients_in_two_splits": 3}
    text = rendered(classifier, {"data": {**data, "leaks": leaks}})
    assert text.index("LEAK: 3 patients") < text.index("Results")


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.2, "3 s"), (119, "2 min"), (3 * 3600 + 240, "3 h 4 min"), (90_000, "1 d 1 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert run_report.duration(seconds) == words


def test_the_kept_epoch_is_the_first_of_the_best() -> None:
    lines = [{"kind": "val", "epoch": n, "auroc": value, "loss": value} for n, value in enumerate((0.5, 0.7, 0.7), 1)]
    best = run_report.best_epoch(lines, "auroc")
    least = run_report.best_epoch(lines, "loss")
    assert best is not None
    assert least is not None
    assert (best["epoch"], least["epoch"]) == (2, 1)
    assert run_report.best_epoch([], "auroc") is None

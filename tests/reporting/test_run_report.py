"""The report of a run: complete, self-contained, compared only with results on the same images. Some 20 s."""

from __future__ import annotations

import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from cxrscale.config import PublishedFigure, Recipe, Reference
from cxrscale.evaluation.artifacts import DataInfo
from cxrscale.io import storage
from cxrscale.reporting import html, plots, run_report, tables
from cxrscale.reporting.gallery import CASES_PER_KIND
from cxrscale.run import Run
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
def classifier(classifier_run: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An evaluated classifier with its page."""
    run = Run(shutil.copytree(classifier_run, tmp_path_factory.mktemp("page") / "classifier"))
    run.choose_thresholds(["threshold.calibration=platt", "threshold.prior_shift=em"], 20)
    run.evaluate(20)
    run.report()
    return run


@pytest.fixture(scope="module")
def segmenter(segmenter_run: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An evaluated segmenter with its page."""
    run = Run(shutil.copytree(segmenter_run, tmp_path_factory.mktemp("page") / "segmenter"))
    run.choose_thresholds(resamples=20)
    run.evaluate(20)
    run.report()
    return run


@pytest.mark.parametrize("kind", ["classifier", "segmenter"])
def test_a_page_needs_nothing_beside_it(kind: str, request: pytest.FixtureRequest) -> None:
    text = Path(request.getfixturevalue(kind).artifact("report.html")).read_text()
    page = Page(text)
    assert page.open == []
    for target in page.targets:
        assert target.startswith(("data:image/jpeg;base64,", "#")), target
    assert "url(http" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert len(page.ids) == len(set(page.ids))
    assert 0 < page.images <= 3 * CASES_PER_KIND * (2 if kind == "classifier" else 1)
    assert ('class="heat"' in text) == (kind == "classifier")
    for clip in re.findall(r"url\(#([^)]+)\)", text):
        assert clip in page.ids
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_page_shows_the_values_of_the_files(classifier: Run) -> None:
    text = Page(Path(classifier.artifact("report.html")).read_text()).text
    test, thresholds = classifier.test_metrics(), classifier.thresholds()
    auroc = test.findings["Effusion"].auroc
    assert f"{auroc.value:.3f} ({auroc.low:.3f}–{auroc.high:.3f})" in text
    for expected in (
        "No leak found",
        test.manifest,
        test.checkpoint,
        storage.digest(Path(classifier.artifact("thresholds.json")).read_bytes()),
        run_info.read_run_info(classifier.path).versions["torch"],
        "optim.lr=0.003",
        "no image with the finding",
        f"Chosen on the {thresholds.images} images",
        "Calibrated by platt",
        "one estimated from the test scores",
        "Worst false negatives",
        "No published result is comparable",
    ):
        assert expected in text, expected
    assert {path.stem for path in Path(classifier.artifact("plots")).iterdir()} >= {
        *("roc", "precision-recall", "calibration", "confusion", "thresholds", "history"),
    }


def test_masks_are_outlined_and_dice_is_compared_with_its_baseline(segmenter: Run) -> None:
    text = Path(segmenter.artifact("report.html")).read_text()
    test = segmenter.test_metrics()
    assert test.dice is not None
    assert text.count('class="truth" d="M') >= min(test.dice.positives, CASES_PER_KIND) - 1
    assert f"{test.dice.empty_baseline:.3f} for no mask at all" in Page(text).text
    assert {path.stem for path in Path(segmenter.artifact("plots")).iterdir()} >= {"dice", "mask_rule"}
    console = Console(width=tables.WIDTH, record=True, file=io.StringIO())
    console.print(tables.metrics_table(test, "run"))
    assert f"{test.dice.on_positives.value:.3f}" in console.export_text()


def render(run: Run, data: DataInfo | None = None, recipe: Recipe | None = None) -> str:
    """The page's text with other data or another recipe."""
    test = run.test_metrics()
    test = test.model_copy(update={"data": data or test.data, "recipe": recipe or test.recipe})
    figures = {name: run_report.Plot(plots.overlap([0.5]), name) for name in ("roc", "precision-recall", "calibration")}
    info = run_info.read_run_info(run.path)
    return Page(run_report.render(run_report.Report(run.path, run.thresholds(), test, info, [], figures, {}))).text


def with_images(data: DataInfo, role: str, images: int, split: str = "official") -> DataInfo:
    """The data with another number of images of a part, packed with another split."""
    parts = {**data.parts, role: data.parts[role].model_copy(update={"images": images})}
    dataset = data.datasets[0].model_copy(update={"pack": {**data.datasets[0].pack, "split": split}})
    return data.model_copy(update={"parts": parts, "datasets": (dataset,)})


def test_published_results_are_shown_for_the_same_split_only(classifier: Run) -> None:
    data = classifier.test_metrics().data
    text = render(classifier, with_images(data, "test", 25_596))
    assert "DenseNet-121" in text
    assert "0.805–0.811" in text
    assert "Rajpurkar" not in text
    text = render(classifier, with_images(data, "train", 112_000, split="random"))
    assert "0.864" in text  # CheXNet's Effusion
    assert "0.841" in text
    assert "DenseNet-121" not in text


def test_a_systems_published_figures_are_shown_with_their_images(classifier: Run) -> None:
    assert "Compared with the published system" not in render(classifier)
    figures = (PublishedFigure(name="AUC", value=0.86, metric="auroc"),)
    reference = Reference(system="Effusion against No Finding", data="images of its own", figures=figures)
    text = render(classifier, recipe=classifier.recipe.model_copy(update={"reference": reference}))
    assert "Effusion against No Finding" in text
    assert "0.860" in text
    assert "images of its own: other images" in text


def test_a_leak_is_the_first_thing_on_the_page(classifier: Run) -> None:
    data = classifier.test_metrics().data
    changes = {"verdict": ("LEAK: 3 patients in two splits.",), "patients_in_two_splits": 3}
    text = render(classifier, data.model_copy(update={"leaks": data.leaks.model_copy(update=changes)}))
    assert text.index("LEAK: 3 patients") < text.index("Results")


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.2, "3 s"), (119, "2 min"), (3 * 3600 + 240, "3 h 4 min"), (90_000, "1 d 1 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert html.duration(seconds) == words


def test_the_kept_epoch_is_the_first_of_the_best() -> None:
    lines = [{"kind": "val", "epoch": n, "auroc": value, "loss": value} for n, value in enumerate((0.5, 0.7, 0.7), 1)]
    best = run_report.best_epoch(lines, "auroc")
    lowest = run_report.best_epoch(lines, "loss")
    assert best is not None
    assert lowest is not None
    assert (best["epoch"], lowest["epoch"]) == (2, 1)
    assert run_report.best_epoch([], "auroc") is None

"""A run against readers: CheXpert's eight radiologists, tables in several forms, the command on a run. Some 5 s."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score
from typer.testing import CliRunner

from cxrscale import sources
from cxrscale.cli import app
from cxrscale.evaluation import ReaderComparison, metrics, reader_comparison
from cxrscale.evaluation.calls import Calls
from cxrscale.io import read_artifact
from cxrscale.run import Run
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import Scores, UserError

FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural_Effusion")
"""CheXpert's five competition tasks; its tables write Pleural Effusion."""


def scores_of(images: list[str], findings: tuple[str, ...], called_NF: np.ndarray) -> tuple[Scores, Calls]:
    """A run that calls so, with one image per patient."""
    ids = np.array(images, dtype=object)
    logit_NF = np.where(called_NF == 1, 5.0, -5.0)
    scores = Scores(ids, ids, logit_NF, np.zeros(called_NF.shape, np.float32), findings)
    return scores, Calls(scores.probability_NF, called_NF)


def finder(scores: Scores) -> dict[str, int]:
    return {name: row for row, name in enumerate(scores.image_id.tolist())}


def test_one_of_chexperts_radiologists_as_the_run_against_the_other_seven(real: Path) -> None:
    """Every F1 is scikit-learn's, though the tables order their columns and name a finding in their own ways."""
    paths = sorted((real / "tables/chexpert_test_radiologists").glob("*.csv"))
    assert len(paths) == 8
    content: dict[str, dict[str, dict[str, str]]] = {}
    for path in paths:
        with path.open() as file:
            content[path.stem] = {row["Study"]: row for row in csv.DictReader(file)}
    studies = sorted(content["bc4"])

    def said(reader: str, finding: str) -> list[float]:
        return [float(content[reader][study][finding.replace("_", " ")]) for study in studies]

    called_NF = np.array([said("bc4", finding) for finding in FINDINGS]).T
    scores, calls = scores_of(studies, FINDINGS, called_NF)
    tables = reader_comparison.read_tables([str(path) for path in paths if path.stem != "bc4"])
    result = reader_comparison.compare_with_readers(scores, calls, tables, finder(scores).get, resamples=200)
    others = [path.stem for path in paths if path.stem != "bc4"]
    assert result.readers == tuple(others)
    assert (result.images, result.patients, set(result.rows_without_image.values())) == (500, 500, {0})
    for finding in FINDINGS:
        row = result.findings[finding]
        own = np.mean([f1_score(said(other, finding), said("bc4", finding)) for other in others])
        assert row.images == 500
        assert row.run.value == pytest.approx(own)
        against = ["bc4", *(other for other in others if other != "bc8")]
        eighth = np.mean([f1_score(said(other, finding), said("bc8", finding)) for other in against])
        assert row.readers["bc8"].value == pytest.approx(eighth)
        assert row.reader_mean.value == pytest.approx(np.mean([value.value for value in row.readers.values()]))
        assert row.difference.value == pytest.approx(row.run.value - row.reader_mean.value)
        assert row.run.low < row.run.value < row.run.high
        assert row.difference.low < row.difference.value < row.difference.high
    text = result.model_dump_json()
    assert ReaderComparison.model_validate_json(text).model_dump_json() == text


TABLE = "image,reader,Mass,Nodule,remark\na,one,1,0,large\na,two,1,,\nb,one,0,1,\nb,two,0,-1,\nc,one,1,0,\nc,two,0,0,\n"


def test_one_table_with_a_column_of_readers_is_as_one_table_each(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text(TABLE)
    rows = [line.split(",") for line in TABLE.splitlines()]
    for reader in ("one", "two"):
        own = [rows[0], *(row for row in rows if row[1] == reader)]
        text = "\r\n".join(";".join([row[0], *row[2:]]) for row in own)
        (tmp_path / f"{reader}.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    scores, calls = scores_of(["a", "b", "c", "d"], ("Mass", "Nodule"), np.array([[1, 0], [0, 1], [0, 0], [1, 1.0]]))
    tables = [
        reader_comparison.read_tables([str(tmp_path / name) for name in names])
        for names in (["all.csv"], ["one.csv", "two.csv"])
    ]
    results = [
        reader_comparison.compare_with_readers(scores, calls, table, finder(scores).get, resamples=20)
        for table in tables
    ]
    assert results[0].model_dump_json() == results[1].model_dump_json()
    mass, nodule = results[0].findings["Mass"], results[0].findings["Nodule"]
    assert (results[0].images, mass.images, nodule.images) == (3, 3, 1)  # nothing and uncertain are no labels
    # The run calls a; one calls a and c; two calls a: 2/3 and 1 against the run, 2/3 between the two.
    assert mass.run.value == pytest.approx((2 / 3 + 1) / 2)
    assert mass.readers["one"].value == pytest.approx(2 / 3)
    assert nodule.run.reason == "undefined"  # nobody calls the one image that both labeled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,Mass\na,1\n", "1 reader; two or more are needed"),
        (TABLE + "a,one,1,0,\n", r"line 8: reader 'one' has image 'a' twice \(line 2 of .*\); keep one"),
        (TABLE.replace("1,0,large", "yes,0,"), "line 2: Mass is 'yes'; give 1, 0, -1 .uncertain. or nothing"),
        (TABLE.replace("Mass", "Masses").replace("Nodule", "Nods"), "no column for any of Mass, Nodule"),
        ("image,reader,Mass\nx,one,1\nx,two,1\n", r"none of the readers' images \(e.g. 'x'\) is one of the 2"),
        ("image\na\n", "no table; it needs a column of images and one per finding"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "readers.csv"
    path.write_text(text)
    scores, calls = scores_of(["a", "b"], ("Mass", "Nodule"), np.array([[1, 0], [0, 1.0]]))

    def compare() -> ReaderComparison:
        tables = reader_comparison.read_tables([str(path)])
        return reader_comparison.compare_with_readers(scores, calls, tables, finder(scores).get, 5)

    with pytest.raises(UserError, match=message) as caught:
        compare()
    assert "\n" not in str(caught.value)


def test_the_command_finds_images_by_their_sources_names(
    classifier_run: str, drawn: SyntheticPaths, tmp_path: Path
) -> None:
    """The datasets have keyed ids; readers name files, with and without folders and suffix."""
    run = Run(shutil.copytree(classifier_run, tmp_path / "run"))
    run.choose_thresholds(resamples=20)
    names = [Path(item.path).name for item in sources.read("nih", str(drawn.nih)).records if item.split == "test"]
    rng, table = np.random.default_rng(0), tmp_path / "labels.csv"
    spelling = {"ann": "{}.png", "bob": "images/{}.png", "eve": "{}"}
    with table.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Index", "reader", "Cardiomegaly", "Effusion"])
        for reader, spelled in spelling.items():
            writer.writerows(
                [spelled.format(Path(name).stem), reader, *rng.integers(0, 2, 2).tolist()] for name in names
            )
        writer.writerow(["elsewhere.png", "eve", 1, 1])
    out = tmp_path / "readers.json"
    command = ["compare", run.path, "--readers", str(table), "--resamples", "50", "--out", str(out)]
    done = CliRunner().invoke(app.app, command)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(out)
    assert "eve: 1 rows of images that the run has not scored" in done.stdout
    assert "no column of all readers, not compared: Mass, Hernia" in done.stdout
    result = read_artifact(ReaderComparison, str(out), "compare again")
    assert (result.readers, result.images, result.split) == (("ann", "bob", "eve"), len(names), "test")
    # The run's calls are those of its confusion matrix.
    test = run.evaluate(20)
    at = test.findings["Effusion"].at_threshold
    assert at is not None
    scores, threshold = run.predictions("test"), run.thresholds().thresholds["Effusion"].threshold.value
    called_N = scores.probability_NF[:, 1] >= threshold
    assert called_N.sum() == at.confusion["tp"] + at.confusion["fp"]
    assert metrics.f1(metrics.confusion(called_N, scores.label_NF[:, 1], 0.5)) == at.f1.value
    both = CliRunner().invoke(app.app, [*command, "another"])
    assert both.exit_code == 2
    assert both.stderr == "error: compare takes either a second run or --readers TABLE.csv\n"

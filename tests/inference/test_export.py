"""Exports: runs whose model is an ONNX file or a program of torch.export, equal to the run they were made of."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from cxrscale import config
from cxrscale.cli import app
from cxrscale.config import Recipe
from cxrscale.inference import Averaging, Form, Gate, GatedPredictor, Predictor, build_ensemble, read_exported
from cxrscale.inference.export import judging, latency, making, quantize, runtime, to_onnx
from cxrscale.inference.export.contract import ExportInfo, finding_contracts
from cxrscale.inference.export.parity import EXACT, tally
from cxrscale.inference.trained import TrainedModel, load_model
from cxrscale.io import rle_masks
from cxrscale.run import Run, compare_runs, export
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import run_files
from cxrscale.types import UserError
from tests.dicom_files import dicom_file, gray_image

LOOSE = Gate(maximum=1, mean=0.2, flipped=0.5)
"""For models that have learned nothing, whose scores all lie near their thresholds."""
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "cxrscale", "onnx", "pandas", "scipy", "PIL"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import runpy
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])  # as `python FILE` does
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(autouse=True)
def quick_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is measured in tests/benchmarks."""
    monkeypatch.setattr(latency, "ROUNDS", 1)


@pytest.fixture(scope="module")
def classifier(classifier_run: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With calibrated thresholds; its batches are OpenCV's, as those of predict.py."""
    return prepared(classifier_run, tmp_path_factory.mktemp("classifier") / "run", "threshold.calibration=platt")


@pytest.fixture(scope="module")
def segmenter(segmenter_run: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared(segmenter_run, tmp_path_factory.mktemp("segmenter") / "run")


def prepared(run: str, to: Path, *overrides: str) -> Run:
    from cxrscale.training import checkpoint

    shutil.copytree(run, to)
    for path in (to / "thresholds.json", *to.glob("predictions-*.parquet")):
        path.unlink(missing_ok=True)
    state = checkpoint.read((to / "best.pt").read_bytes(), "best.pt")
    state["recipe"]["loader"]["backend"] = "opencv"
    (to / "best.pt").write_bytes(checkpoint.dump(state))
    made = Run(to)
    made.choose_thresholds(overrides, resamples=20)
    return made


@pytest.fixture(scope="module")
def onnx_classifier(classifier: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("export") / "classifier")
    export(classifier, out)
    return out


@pytest.fixture(scope="module")
def onnx_segmenter(segmenter: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("export") / "segmenter")
    export(segmenter, out)
    return out


@pytest.fixture
def once(onnx_classifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier's ONNX file, exported once: that takes seconds."""
    content = (Path(onnx_classifier) / "model.onnx").read_bytes()
    monkeypatch.setattr(to_onnx, "to_onnx", lambda _model, _size: content)


def info_of(folder: str) -> ExportInfo:
    info = read_exported(folder)
    assert info is not None
    return info


def test_an_export_is_a_run_with_the_same_scores_calls_and_thresholds(
    classifier: Run, onnx_classifier: str, drawn: SyntheticPaths
) -> None:
    made, path = Run(onnx_classifier), str(min(drawn.nih.rglob("*.png")))
    assert made.recipe.data.findings == classifier.recipe.data.findings
    own, exported = Predictor(classifier.path, "cpu")(path), Predictor(onnx_classifier, "cpu")(path)
    assert exported.calls == own.calls != {}
    assert exported.ood_distance == pytest.approx(own.ood_distance)
    for name, value in own.probabilities.items():
        assert exported.probabilities[name] == pytest.approx(value, abs=EXACT)
    assert made.thresholds().thresholds == classifier.thresholds().thresholds
    test = made.evaluate(resamples=20)
    assert test.checkpoint == info_of(onnx_classifier).model
    gap = np.abs(made.predictions("test").probability_NF - classifier.predictions("test").probability_NF)
    assert gap.max() <= EXACT
    assert compare_runs(made, classifier, resamples=20).mean_auroc.difference.value == pytest.approx(0, abs=0.01)
    assert Path(made.report()).is_file()


def test_what_an_export_was_made_of_is_written_down(classifier: Run, onnx_classifier: str) -> None:
    info = info_of(onnx_classifier)
    assert info.checkpoint == Predictor(classifier.path, "cpu").provenance.checkpoint
    assert info.run == classifier.path
    assert (info.input.gray, info.input.size, info.input.codec, info.input.stored_size) == (True, 48, "jpeg", 64)
    assert info.parity is not None
    assert info.parity.maximum <= EXACT
    assert [row.form for row in info.table] == ["torch", "onnx"]
    assert {name: rule.calibrator for name, rule in info.findings.items()}["Effusion"] == "platt"
    # Neither file names a folder of this machine, but for the run in export.json.
    for name in ("model.onnx", "predict.py"):
        assert str(Path(__file__).parents[2]).encode() not in (Path(onnx_classifier) / name).read_bytes()
    assert run_files.verify(onnx_classifier).faults == ()


def test_a_damaged_export_is_one_line_and_seen_by_verify(onnx_classifier: str, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(onnx_classifier, folder)
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(bytes(content))
    assert run_files.verify(str(folder)).faults[0].startswith("model.onnx: differs from the digest")
    with pytest.raises(UserError, match="export the run again"):
        load_model(folder, torch.device("cpu"))
    (folder / "model.onnx").unlink()
    assert "best.pt: missing" in run_files.verify(str(folder)).faults


def test_a_batch_may_have_any_size(classifier: Run, onnx_classifier: str) -> None:
    own, exported = (load_model(run, torch.device("cpu")).model for run in (classifier.path, onnx_classifier))
    for size in judging.DYNAMIC:
        image_BCHW = torch.randn(size, 1, 48, 48).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            torch.testing.assert_close(exported(image_BCHW), own(image_BCHW), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_segmenter_keeps_its_masks_and_stands_behind_a_gate(
    segmenter: Run, onnx_segmenter: str, drawn: SyntheticPaths
) -> None:
    for path in sorted(map(str, drawn.siim.rglob("*.dcm")))[:3]:
        own, exported = Predictor(segmenter.path, "cpu")(path), Predictor(onnx_segmenter, "cpu")(path)
        assert exported.mask_area == own.mask_area
        assert exported.mask_rle == own.mask_rle
    both = Predictor([segmenter.path, onnx_segmenter], "cpu", averaging=Averaging())
    assert both(path).probabilities["Pneumothorax"] == pytest.approx(own.probabilities["Pneumothorax"], abs=1e-4)
    with pytest.raises(UserError, match="classif"):
        GatedPredictor(onnx_segmenter, onnx_segmenter, "cpu")


@pytest.mark.slow
def test_a_program_of_torch_export_is_a_run_too(classifier: Run, tmp_path: Path, drawn: SyntheticPaths) -> None:
    out = str(tmp_path / "program")
    info = export(classifier, out, Form(format="torch-export"))
    assert info.parity is not None
    assert info.parity.maximum <= EXACT
    path = str(min(drawn.nih.rglob("*.png")))
    own, exported = Predictor(classifier.path, "cpu")(path), Predictor(out, "cpu")(path)
    assert exported.probabilities == pytest.approx(dict(own.probabilities), abs=EXACT)
    assert run_files.verify(out).faults == ()
    assert not (Path(out) / "predict.py").exists()
    assert str(Path(__file__).parents[2]).encode() not in (Path(out) / "model.pt2").read_bytes()


def standalone(folder: str, paths: list[str], cwd: Path) -> list[dict[str, Any]]:
    """What the export's predict.py says, without torch and this package."""
    command = [sys.executable, "-c", BLOCKED, str(Path(folder) / "predict.py"), *paths]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize("which", ["onnx_classifier", pytest.param("onnx_segmenter", marks=pytest.mark.slow)])
def test_predict_py_says_the_same_without_torch(
    which: str, request: pytest.FixtureRequest, drawn: SyntheticPaths, tmp_path: Path
) -> None:
    folder = str(request.getfixturevalue(which))
    paths = sorted(map(str, drawn.nih.rglob("*.png")))[:4] + sorted(map(str, drawn.siim.rglob("*.dcm")))[:4]
    written: dict[str, dict[str, Any]] = {
        "plain.dcm": {},
        "inverted.dcm": {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 900.0, "WindowWidth": 1200.0},
        "sixteen.dcm": {"BitsStored": 16, "RescaleSlope": 2.0, "RescaleIntercept": -1024.0},
    }
    for name, tags in written.items():
        stored = gray_image(90, 70, dtype="u2", bits=12)
        (tmp_path / name).write_bytes(dicom_file(stored, **{"BitsStored": 12, **tags}))
        paths.append(str(tmp_path / name))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    *found, broken = standalone(folder, [*paths, str(tmp_path / "broken.png")], tmp_path)
    assert "8 bits" in broken["error"]
    for one, own in zip(found, Predictor(folder, "cpu").predict(paths), strict=True):
        assert not own.error
        assert one["probabilities"] == pytest.approx(dict(own.probabilities), abs=EXACT), one["path"]
        assert one["calls"] == dict(own.calls), one["path"]
        if own.mask_rle is not None and own.height and own.width:
            mask_HW = np.asarray(cv2.imread(one["mask"], cv2.IMREAD_GRAYSCALE)) > 0
            own_HW = rle_masks.union((own.mask_rle,), (own.height, own.width))
            assert np.mean(mask_HW != own_HW) <= 1e-3


def test_thresholds_chosen_anew_reach_predict_py(onnx_classifier: str, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(onnx_classifier, folder)
    chosen = Run(folder).choose_thresholds(["threshold.calibration=temperature", "threshold.goal=youden"], 20)
    assert info_of(str(folder)).findings == finding_contracts(chosen.recipe.data.findings, chosen)


def test_predict_py_corrects_for_the_estimated_prevalence_once_it_is_known(
    onnx_classifier: str, tmp_path: Path, drawn: SyntheticPaths
) -> None:
    folder, path = shutil.copytree(onnx_classifier, tmp_path / "em"), str(min(drawn.nih.rglob("*.png")))
    Run(folder).choose_thresholds(["threshold.calibration=platt", "threshold.prior_shift=em"], 20)
    assert all(one.prior is None for one in info_of(str(folder)).findings.values())
    Run(folder).evaluate(20)
    assert any(one.prior is not None for one in info_of(str(folder)).findings.values())
    (one,) = standalone(str(folder), [path], tmp_path)
    assert one["probabilities"] == pytest.approx(dict(Predictor(folder, "cpu")(path).probabilities), abs=EXACT)


@pytest.mark.usefixtures("once")
def test_a_form_that_is_another_model_leaves_no_file(
    classifier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = making._load

    def other(content: bytes, form: Any) -> torch.nn.Module:
        model = loaded(content, form)

        class Shifted(torch.nn.Module):
            def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
                return torch.as_tensor(model(image_BCHW) + 1e-3)

        return Shifted()

    monkeypatch.setattr(making, "_load", other)
    out = tmp_path / "other"
    with pytest.raises(
        UserError, match=r"differs from the run's own model by 0\.0002.*nothing was written \(in float32"
    ):
        export(classifier, str(out))
    assert not list(tmp_path.rglob("model.onnx"))
    assert not (out / "export.json").exists()
    info = export(classifier, str(out), gate=Gate(exact=1e-3))
    assert info.parity is not None
    assert 1e-4 < info.parity.maximum < 1e-3


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize(
    "kind",
    ["int8-static", *(pytest.param(one, marks=pytest.mark.slow) for one in ("int8-dynamic", "fp16"))],
)
def test_a_quantized_form_has_thresholds_of_its_own_scores(
    classifier: Run, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "CALIBRATION", 8)
    out = str(tmp_path / kind)
    info = export(classifier, out, Form(quantization=kind), LOOSE)
    assert [row.form for row in info.table] == ["torch", "onnx", kind]
    assert info.parity is not None
    assert 0 < info.parity.maximum < 0.5
    quality = info.table[-1].quality
    assert quality is not None
    assert quality.metric == "AUROC"
    made = Run(out)
    scores = made.predictions("val")
    assert (scores.logit_NF != classifier.predictions("val").logit_NF).any()
    chosen, again = made.thresholds(), made.choose_thresholds(["threshold.calibration=platt"], resamples=20)
    same = again.model_copy(update={"run": chosen.run})
    assert chosen.model_dump_json() == same.model_dump_json()
    if kind == "int8-static":
        assert {one.method for one in info.tried} == {"minmax", "percentile"}
        assert all(one.nodes > 5 for one in info.tried)


@pytest.fixture
def lossy() -> tuple[torch.nn.Module, list[np.ndarray[Any, Any]]]:
    """Three convolutions; the channels that the second sees differ by a factor of 3,000, so it loses most."""
    torch.manual_seed(0)
    first, second, last = torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3)
    assert first.bias is not None
    with torch.no_grad():
        first.weight[0] *= 1e-3
        first.bias[0] = 0
        second.weight[:, 0] *= 3000
        second.weight[:, 1:] *= 3
    pooled = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    model = torch.nn.Sequential(first, torch.nn.Tanh(), second, torch.nn.Tanh(), last, *pooled)
    images = [np.random.default_rng(seed).normal(size=(1, 1, 24, 24)).astype(np.float32) for seed in range(6)]
    return model.eval(), images


def test_the_node_that_loses_most_is_found_and_keeping_it_in_float_helps(lossy: Any, tmp_path: Path) -> None:
    model, images = lossy
    quantizer = quantize.StaticQuantizer(to_onnx.to_onnx(model, 24), images, tmp_path)
    order = quantizer.nodes_by_loss("minmax")
    assert len(order) == 3
    image = torch.from_numpy(np.concatenate(images))
    own = model(image).detach()

    def gap(kept: list[str]) -> float:
        content = quantizer.quantized("minmax", kept)
        return float((runtime.OnnxModule(content, torch.device("cpu"))(image) - own).abs().mean())

    everything, first, last = gap([]), gap(order[:1]), gap(order[-1:])
    assert first < 0.7 * everything
    assert first < last


@pytest.mark.slow
def test_nodes_stay_in_float_until_the_gate_is_passed(lossy: Any) -> None:
    model, images = lossy
    recipe = config.parse(Recipe, {"data": {"findings": ["A", "B", "C", "D"]}}, where="test")
    trained = TrainedModel(model, recipe, "", "", {})
    batches = [torch.from_numpy(np.concatenate(images))]
    judge, content = judging.Judge(trained, batches, None), to_onnx.to_onnx(model, 24)
    messages: list[str] = []
    loose = making._static(judge, content, batches, Gate(maximum=1, mean=1, flipped=1), messages.append)
    assert [(one.method, one.float_nodes) for one in loose.tried] == [("minmax", 0), ("percentile", 0)]
    assert loose.float_nodes == ()
    best = min(one.difference.mean for one in loose.tried)
    tighter = Gate(maximum=1, mean=0.8 * best, flipped=1)
    kept = making._static(judge, content, batches, tighter, messages.append)
    assert len(kept.float_nodes) >= 1
    assert kept.tried[-1].difference.mean <= 0.8 * best
    assert "nodes in float" in messages[-1]
    with pytest.raises(UserError, match=r"of 3 nodes in float: mean difference.*nothing was written"):
        making._static(judge, content, batches, Gate(mean=0, flipped=1), messages.append)


@pytest.mark.usefixtures("once")
def test_a_broken_quantized_model_leaves_no_file_though_its_auroc_is_the_same(
    classifier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(content: bytes) -> bytes:
        model = onnx.load_from_string(content)
        (last,) = (node for node in model.graph.node if node.output[0] == "logits")
        last.output[0] = "before"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(-3), "shift"))
        model.graph.node.append(onnx.helper.make_node("Add", ["before", "shift"], ["logits"]))
        return runtime.sealed_onnx(model.SerializeToString())

    monkeypatch.setattr(quantize, "dynamic", shifted)
    with pytest.raises(UserError, match=r"int8-dynamic: (calls flipped|mean difference).*nothing was written"):
        export(classifier, str(tmp_path / "broken"), Form(quantization="int8-dynamic"))
    assert not list(tmp_path.rglob("*.onnx"))


def test_the_gate_sees_what_auroc_does_not() -> None:
    rng = np.random.default_rng(0)
    own = rng.uniform(size=(200, 1))
    label = own > 0.6
    # Every probability is squashed under the threshold: the order, so AUROC, is the same.
    broken = own * 0.3
    found = tally(own, broken, own >= 0.5, broken >= 0.5).difference(maps=False)
    assert (np.argsort(own[:, 0]) == np.argsort(broken[:, 0])).all()
    assert label.any()
    assert found.flipped == pytest.approx((own >= 0.5).mean())
    assert "calls flipped" in Gate().refusal(found)
    assert Gate().refusal(tally(own, own, own >= 0.5, own >= 0.5).difference(maps=False)) == ""
    nan = tally(own, own * np.nan, own >= 0.5, own >= 0.5).difference(maps=False)
    assert Gate().refusal(nan) != ""
    masks = tally(own, own, own >= 0.5, own >= 2).difference(maps=True)
    assert masks.flipped == 1


@pytest.mark.slow
def test_weights_at_full_range_saturate_and_are_refused(tmp_path: Path) -> None:
    """On a CPU with 16-bit sums (AVX2) two products of 255 x 127 do not fit; with VNNI they do."""
    first, last = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 1, 3)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), last)
    with torch.no_grad():
        first.weight.fill_(0.3)
        last.weight.fill_(0.02)
        last.weight[:, ::2] += 0.001
    images = [np.random.default_rng(i).uniform(0, 1, (1, 1, 24, 24)).astype(np.float32) for i in range(6)]
    quantizer = quantize.StaticQuantizer(to_onnx.to_onnx(model, 24), images, tmp_path)
    own = model(torch.from_numpy(images[0])).detach().numpy()
    gap = {}
    for reduced in (True, False):
        content = quantizer.quantized("minmax", reduce_range=reduced)
        found = runtime.OnnxModule(content, torch.device("cpu"))(torch.from_numpy(images[0])).numpy()
        gap[reduced] = float(np.abs(found - own).mean() / np.abs(own).mean())
    assert gap[True] < 0.02
    has_vnni = "vnni" in Path("/proc/cpuinfo").read_text()
    assert (gap[False] < 0.02) == has_vnni


def test_what_cannot_be_exported_is_one_line(classifier: Run, onnx_classifier: str, tmp_path: Path) -> None:
    runner = CliRunner()
    for words, message in (
        ([onnx_classifier, "--out", str(tmp_path / "x")], "is an export itself; give the run that it was made of"),
        ([classifier.path, "--out", onnx_classifier], "holds model.onnx already"),
        ([classifier.path, "--out", str(tmp_path / "x"), "--format", "tflite"], "give one of onnx, torch-export"),
        ([classifier.path, "--out", str(tmp_path / "x"), "--quantize", "int4"], "give one of none, int8-dynamic"),
        (
            [classifier.path, "--out", str(tmp_path / "x"), "--format", "torch-export", "--quantize", "fp16"],
            "--quantize fp16 needs --format onnx",
        ),
    ):
        shown = runner.invoke(app.app, ["export", *words])
        assert shown.exit_code == 2, shown.output
        assert message in shown.output
    with pytest.raises(UserError, match="is an export; make an ensemble of the runs"):
        build_ensemble([onnx_classifier, classifier.path], str(tmp_path / "both"), Averaging())


@pytest.mark.usefixtures("once")
def test_an_export_without_thresholds_makes_no_calls(classifier: Run, tmp_path: Path, drawn: SyntheticPaths) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(classifier.path, bare)
    (bare / "thresholds.json").unlink()
    info = export(bare, str(tmp_path / "out"))
    assert "no thresholds, so no calls" in info.notes[-1]
    (one,) = standalone(str(tmp_path / "out"), [str(min(drawn.nih.rglob("*.png")))], tmp_path)
    assert one["calls"] == {}
    assert set(one["probabilities"]) == set(info.findings)


def test_the_last_form_is_told_where_it_is_slower(onnx_classifier: str) -> None:
    torch_row, onnx_row = info_of(onnx_classifier).table
    slow = onnx_row.model_copy(update={"form": "int8", "milliseconds": {1: 9.0, 8: 9.0}, "times_torch": {1: 0.1, 8: 9}})
    assert making.slower((torch_row, slow)) == (
        f"int8 is slower than torch at batch 1 on this CPU: 9.0 against {torch_row.milliseconds[1]:.1f} ms per image",
    )

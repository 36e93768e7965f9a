"""An exported model without torch: the numbers of the predictor with torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from cxrscale.evaluation import ood
from cxrscale.inference import PredictorSpec
from cxrscale.inference.onnx_predictor import OnnxPredictor, thumbnails
from cxrscale.run import Run
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import checkpoint
from tests.small_exports import write_export


@pytest.fixture(scope="module", params=["classifier_run", "segmenter_run"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An export with thresholds, whose batches are OpenCV's."""
    folder = tmp_path_factory.mktemp("exported")
    left_out = shutil.ignore_patterns("predictions-*", "thresholds.json")
    run = Path(shutil.copytree(request.getfixturevalue(request.param), folder / "run", ignore=left_out))
    state = checkpoint.read((run / checkpoint.BEST).read_bytes(), checkpoint.BEST)
    state["recipe"]["loader"]["backend"] = "opencv"
    (run / checkpoint.BEST).write_bytes(checkpoint.dump(state))
    out = write_export(str(run), folder / "export")
    Run(out).choose_thresholds(resamples=4)
    return out


def test_its_predictions_are_those_of_the_predictor_with_torch(exported: str, drawn: SyntheticPaths) -> None:
    paths = [*map(str, sorted(drawn.nih.rglob("*.png"))[:5]), str(next(drawn.siim.rglob("*.dcm")))]
    light = PredictorSpec((exported,), maps=True, light=True).load()
    assert isinstance(light, OnnxPredictor)
    heavy = PredictorSpec((exported,), maps=True).load("cpu")
    assert light.provenance == heavy.provenance
    for one, other in zip(light.predict(paths), heavy.predict(paths), strict=True):
        assert one.error == other.error == ""
        assert one.probabilities == pytest.approx(dict(other.probabilities), abs=1e-5)
        assert (one.calls, one.warnings) == (other.calls, other.warnings)
        assert one.gray == pytest.approx(other.gray, rel=1e-4)
        assert one.ood_distance == pytest.approx(other.ood_distance, rel=1e-4)
        assert (one.mask_rle, one.mask_area) == (other.mask_rle, other.mask_area)
        assert {name: one.maps[name].shape for name in one.maps} == {name: m.shape for name, m in other.maps.items()}


@pytest.mark.parametrize("side", [16, 48, 50, 224])
def test_thumbnails_are_those_of_adaptive_pooling(side: int) -> None:
    image_BHW = np.random.default_rng(side).random((2, side, side), dtype=np.float32)
    expected = adaptive_avg_pool2d(torch.from_numpy(image_BHW)[:, None], ood.SIDE).flatten(1).numpy()
    assert thumbnails(image_BHW) == pytest.approx(expected, abs=1e-6)


def test_it_needs_neither_torch_nor_ray(exported: str, drawn: SyntheticPaths) -> None:
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'timm', 'nvidia', 'ray', 'wandb', 'webdataset'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from cxrscale.inference.serve import load_models\n"
        "model = load_models({'a': sys.argv[1]})['a']\n"
        "print(len(model.predictor(sys.argv[2]).probabilities))\n"
    )
    command = [sys.executable, "-c", code, exported, str(next(drawn.nih.rglob("*.png")))]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) >= 1

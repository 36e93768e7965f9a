"""Every recipe in jobs/: its header, its agreement with its source, and that it runs from training to evaluation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from cxrscale import config, sources
from cxrscale.cli import app, progress
from cxrscale.config import Pack, Recipe
from cxrscale.config.findings import NIH14
from cxrscale.evaluation import TestMetrics
from cxrscale.inference import predictions
from cxrscale.loader.loader import open_training_stream, usable_rows
from cxrscale.models import losses
from cxrscale.models.networks import build_model, count_trainable
from cxrscale.run import open_run
from cxrscale.shards import build, manifest
from cxrscale.sources import rsna
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import launch
from cxrscale.types import ImageRecord
from tests.dicom_files import dicom_file

FOLDER = Path(__file__).resolve().parent.parent / "jobs"
JOBS = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith("tune-"))
SYSTEMS = {
    "A": ("siim-unet-positives", "siim-unet-balanced", "siim-classifier", "siim-classifier-hard"),
    "B": ("effusion-resnet",),
    "C": ("rsna-resnet18",),
    "D": ("chexnet14", "chexnet-pneumonia"),
    "E": ("kermany-finetune", "kermany-frozen"),
    "ImageNet": ("kermany-lite0",),
}

every_recipe = pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)


def recipe(stem: str) -> Recipe:
    return config.load_recipe(FOLDER / f"{stem}.yaml")


def header(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))


def test_every_system_has_its_recipes() -> None:
    assert {stem for stems in SYSTEMS.values() for stem in stems} | {"demo", "demo-unet"} == {p.stem for p in JOBS}


@every_recipe
def test_the_header_tells_what_to_expect(path: Path) -> None:
    text = header(path)
    assert path.read_text().startswith(text)
    assert f"  cxrscale train jobs/{path.name} " in text
    for label in ("Source:", "Hardware:", "Time:", "Score to expect:", "Differences from the source:"):
        assert f"\n# {label} " in text, label
    assert max(len(line) for line in path.read_text().splitlines()) <= 120


@every_recipe
def test_the_headers_commands_name_existing_files_and_fields(path: Path) -> None:
    words = header(path).replace(";", " ").split()
    for word in words:
        if word.startswith("jobs/"):
            assert (FOLDER.parent / word).is_file(), word
        name, equals, _ = word.strip("'[]()").partition("=")
        if equals and "." in name:
            assert name in config.fields(Recipe), name


@every_recipe
def test_a_recipe_states_only_differences(path: Path) -> None:
    defaults, resolved = Recipe().model_dump(mode="json"), config.load_recipe(path).model_dump(mode="json")
    for section, values in yaml.safe_load(path.read_text()).items():
        for name in values:
            assert resolved[section][name] != defaults[section][name], f"{section}.{name} is the default"


@every_recipe
def test_a_recipe_builds_a_model_of_the_right_shape(path: Path) -> None:
    resolved = config.load_recipe(path, ["model.weights=none"])
    model = build_model(resolved.model, resolved.data).eval()
    with torch.no_grad():
        out = model(torch.zeros(2, 1, 64, 64))
    expected = (2, 1, 64, 64) if resolved.data.task == "segment" else (2, len(resolved.data.findings))
    assert out.shape == expected


# What each source describes, field by field.


def fields(stem: str) -> Callable[[str], Any]:
    """The resolved recipe's fields by dotted name."""
    resolved = recipe(stem)

    def value(name: str) -> Any:
        section, field = name.split(".")
        return getattr(getattr(resolved, section), field)

    return value


def expect(stem: str, **expected: Any) -> None:
    """Names are section__field."""
    value = fields(stem)
    assert {name: value(name.replace("__", ".")) for name in expected} == expected


def only(stem: str, **terms: float) -> None:
    """The loss has these terms and no other."""
    loss = recipe(stem).loss
    assert {name: getattr(loss, name) for name in losses.active(loss)} == terms


@pytest.mark.parametrize("stem", SYSTEMS["D"])
def test_chexnet(stem: str) -> None:
    expect(stem, model__arch="densenet121", model__weights="imagenet", augment__size=224, sampler__batch_size=16)
    expect(stem, optim__name="adam", optim__lr=1e-3, optim__betas=(0.9, 0.999), optim__weight_decay=0.0)
    expect(stem, optim__schedule="plateau", optim__plateau_factor=0.1, optim__plateau_patience=0)
    expect(stem, train__monitor="loss", sampler__sampling="all", data__negatives="any")
    # The mean of ImageNet's means and of its standard deviations, and a flip half the time; nothing else moves.
    expect(stem, augment__normalize="fixed", augment__hflip=0.5, augment__rotation=0.0, augment__crop_area=(1.0, 1.0))
    value = fields(stem)
    assert value("augment.mean") == pytest.approx(np.mean([0.485, 0.456, 0.406]), abs=1e-3)
    assert value("augment.std") == pytest.approx(np.mean([0.229, 0.224, 0.225]), abs=1e-3)
    only(stem, bce=1.0)


def test_chexnets_two_losses() -> None:
    expect("chexnet14", data__findings=NIH14, loss__class_balance=False)
    expect("chexnet-pneumonia", data__findings=("Pneumonia",), loss__class_balance=True)
    for stem in SYSTEMS["D"]:
        expect(stem, loss__positive_weight=1.0, loss__negative_weight=1.0)


def test_effusion() -> None:
    stem = "effusion-resnet"
    expect(stem, data__findings=("Effusion",), data__negatives="no_finding", augment__size=256)
    expect(stem, augment__preset="effusion", augment__probability=0.5, augment__normalize="minmax")
    expect(stem, train__monitor="auroc", sampler__sampling="all")
    only(stem, cost_matrix_weight=1.0)
    expect(stem, loss__cost_matrix=((1.0, 5.0), (5.0, 1.0)))
    value = fields(stem)
    moved = ("hflip", "rotation", "translation", "brightness", "noise")
    assert all(value(f"augment.{name}") > 0 for name in moved)
    assert value("augment.scale") != (1.0, 1.0)
    assert value("augment.crop_area") != (1.0, 1.0)
    text = header(FOLDER / f"{stem}.yaml")
    assert text.index("cxrscale overfit jobs/effusion-resnet.yaml") < text.index("cxrscale train")


def test_rsna() -> None:
    stem = "rsna-resnet18"
    expect(stem, data__findings=("Pneumonia",), model__arch="resnet18", augment__size=224, augment__preset="rsna")
    expect(stem, augment__rotation=5.0, augment__translation=0.05, augment__scale=(0.9, 1.1), augment__hflip=0.0)
    expect(stem, optim__name="adam", optim__lr=1e-4, sampler__sampling="all", augment__normalize="fixed")
    expect(stem, threshold__goal="fixed", threshold__value=0.5, threshold__report_at=(0.25,))
    only(stem, bce=1.0)
    assert fields(stem)("augment.crop_area")[0] < 1


@pytest.mark.parametrize(("stem", "frozen"), [("kermany-finetune", 0), ("kermany-frozen", 4)])
def test_kermany(stem: str, frozen: int) -> None:
    expect(
        stem,
        data__findings=("Pneumonia",),
        model__arch="resnet18",
        model__freeze_children=frozen,
        train__monitor="loss",
    )
    expect(stem, model__weights="none", threshold__goal="fixed", threshold__value=0.5)
    only(stem, bce=1.0)
    assert fields(stem)("train.patience")
    resolved = recipe(stem)
    model = build_model(resolved.model, resolved.data)
    total = sum(parameter.numel() for parameter in model.parameters())
    # One gray channel: 64 x 49 weights in the first convolution, two numbers per channel of its normalization.
    assert total - count_trainable(model) == (64 * 49 + 2 * 64 if frozen else 0)


def test_kermanys_two_recipes_differ_in_freezing_and_reference_only() -> None:
    one, other = (recipe(stem).model_dump() for stem in SYSTEMS["E"])
    assert one.pop("reference")["system"] == other.pop("reference")["system"]
    assert one.pop("model") | {"freeze_children": 4} == other.pop("model")
    assert one == other


@pytest.mark.parametrize("stem", SYSTEMS["A"])
def test_siim(stem: str) -> None:
    expect(stem, data__findings=("Pneumothorax",), augment__preset="siim", augment__size=256, augment__clahe="always")
    value = fields(stem)
    assert value("model.encoder" if value("data.task") == "segment" else "model.arch") == "resnet34"


def test_siims_segmenters() -> None:
    for stem, sampling, epochs in (("siim-unet-positives", "positives", 70), ("siim-unet-balanced", "balanced", 25)):
        expect(stem, data__task="segment", model__arch="Unet", sampler__sampling=sampling, train__epochs=epochs)
        only(stem, bce=1.0, dice=1.0)
        # smp's blocks interpolate by default as the source's do.
        resolved = config.load_recipe(FOLDER / f"{stem}.yaml", ["model.weights=none"])
        decoder = build_model(resolved.model, resolved.data).get_submodule("decoder")
        modes = {block.interpolation_mode for block in decoder.modules() if hasattr(block, "interpolation_mode")}
        assert modes == {"nearest"}
    expect("siim-unet-balanced", model__weights="runs/siim-unet-positives/best.pt")


def test_siims_classifiers() -> None:
    for stem, sampling, epochs in (("siim-classifier", "all", 25), ("siim-classifier-hard", "hard", 5)):
        expect(stem, data__task="classify", sampler__sampling=sampling, train__epochs=epochs, train__monitor="auroc")
        expect(stem, threshold__goal="recall", threshold__report_at=(0.38,))
        only(stem, bce=1.0)
    expect("siim-classifier-hard", model__weights="runs/siim-classifier/best.pt", sampler__hard_repeats=1)
    expect("siim-classifier-hard", sampler__hard_predictions="runs/siim-classifier/predictions-train.parquet")


# From training to evaluation, on synthetic images.

SMALL = (
    "augment.size=32",
    "sampler.batch_size=6",
    "sampler.eval_batch_size=16",
    "sampler.steps_per_epoch=2",
    "train.epochs=1",
    "optim.warmup_steps=0",
    "scaling.num_workers=1",
    "tracking.wandb=disabled",
    "tracking.log_steps=1",
)
TINY = {
    "densenet121": "{growth_rate: 8, block_config: [1, 1, 2]}",
    "resnet18": "{channels: [8, 8, 16, 16]}",
    "resnet34": "{channels: [8, 8, 16, 16]}",
    "tf_efficientnet_lite0": "{drop_rate: 0.1}",
    "Unet": "{encoder_depth: 3, decoder_channels: [16, 8, 8]}",
}


@pytest.fixture(scope="module")
def drawn_records(drawn: SyntheticPaths) -> list[ImageRecord]:
    return sources.read("nih", str(drawn.nih)).records


@pytest.fixture(scope="module")
def shards(
    nih_shards: str,
    siim_shards: str,
    drawn_records: list[ImageRecord],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """Datasets by source. Kermany's and RSNA's layouts hold the synthetic images, an effusion as pneumonia."""
    root = tmp_path_factory.mktemp("layouts")
    table = ["patientId,x,y,width,height,Target"]
    for number, record in enumerate(drawn_records):
        gray = cv2.imread(record.path, cv2.IMREAD_GRAYSCALE)
        assert gray is not None
        sick = bool(record.findings["Effusion"])
        part = "test" if record.split == "test" else "train"
        name = f"person{number}_virus_{number}" if sick else f"IM-{number:04d}-0001"
        image = root / "kermany" / part / ("PNEUMONIA" if sick else "NORMAL") / f"{name}.jpeg"
        image.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(image), gray)
        dicom = root / "rsna" / rsna.FOLDERS[0] / f"{number:08d}.dcm"
        dicom.parent.mkdir(parents=True, exist_ok=True)
        dicom.write_bytes(dicom_file(gray))
        table.append(f"{number:08d},{'10,10,30,30,1' if sick else ',,,,0'}")
    (root / "rsna" / rsna.LABEL_TABLE).write_text("\n".join(table) + "\n")
    made = {"nih": nih_shards, "siim": siim_shards}
    for source in ("kermany", "rsna"):
        made[source] = str(root / f"{source}-shards")
        packing = Pack(size=64, val_fraction=0.3, test_fraction=0.3)
        build.build_shards(source, str(root / source), packing, made[source], local=True)
    return made


def small(path: Path, shards: str, root: Path, *more: str) -> Recipe:
    """The recipe with a tiny model of its kind, for two steps."""
    arch = config.load_recipe(path).model.arch
    given = [*SMALL, f"model.options={TINY[arch]}", f"data.shards=[{shards}]", f"tracking.runs_dir={root}"]
    if arch == "Unet":
        given.append("model.encoder=resnet18")
    return config.load_recipe(path, [*given, f"tracking.name={path.stem}", *more])


def source_of(stem: str) -> str:
    """The source whose shards the recipe is run on here: the synthetic NIH data have no pneumonia."""
    first = stem.split("-")[0]
    return {"kermany": "kermany", "rsna": "rsna", "siim": "siim"}.get(
        first, {"chexnet-pneumonia": "rsna", "demo-unet": "siim"}.get(stem, "nih")
    )


def train_and_evaluate(resolved: Recipe, stem: str) -> tuple[str, TestMetrics]:
    """Train, choose thresholds and evaluate in this process: the run's folder and its test metrics."""
    run = open_run(launch.launch(resolved, stem, progress.watch_run, local=True))
    run.choose_thresholds(resamples=10)
    return run.path, run.evaluate(resamples=10)


COLD = [path for path in JOBS if path.stem not in ("siim-unet-balanced", "siim-classifier-hard")]


@pytest.mark.parametrize("path", COLD, ids=lambda path: path.stem)
def test_a_recipe_runs_from_training_to_evaluation(path: Path, shards: dict[str, str], tmp_path: Path) -> None:
    resolved = small(path, shards[source_of(path.stem)], tmp_path, "model.weights=none")
    run, test = train_and_evaluate(resolved, path.stem)
    assert set(test.findings) == set(resolved.data.findings)
    assert (test.dice is not None) == (resolved.data.task == "segment")
    lines = [json.loads(line) for line in Path(run, "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
    (last,) = [line for line in lines if line["kind"] == "val"]
    assert resolved.train.monitor in last
    data = manifest.load(*resolved.data.shards)
    assert test.images == len(usable_rows(data, resolved.data.test_split, resolved.data))
    if path.stem == "kermany-frozen":
        trained = torch.load(Path(run, "best.pt"), weights_only=True)["model"]
        torch.manual_seed(resolved.sampler.seed)
        fresh = build_model(resolved.model, resolved.data).state_dict()
        # Its statistics too: batch normalization that is frozen does not drift.
        moved = {key.split(".")[0] for key, value in fresh.items() if not torch.equal(value, trained[key])}
        assert moved == {"layer1", "layer2", "layer3", "layer4", "fc"}


@pytest.mark.parametrize(
    ("first", "second"), [("siim-unet-positives", "siim-unet-balanced"), ("siim-classifier", "siim-classifier-hard")]
)
def test_approach_2_starts_from_the_weights_of_approach_1(
    first: str, second: str, shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The recipes name runs/FIRST/best.pt, so the commands of their headers are run from one folder.
    monkeypatch.chdir(tmp_path)
    one = str(
        launch.launch(
            small(FOLDER / f"{first}.yaml", shards["siim"], Path("runs"), "model.weights=none"),
            first,
            progress.watch_run,
            local=True,
        )
    )
    assert Path(one).resolve() == tmp_path / "runs" / first
    if second == "siim-classifier-hard":
        monkeypatch.setattr("sys.argv", ["cxrscale", "predict", "--split", "train", "--run", f"runs/{first}"])
        with pytest.raises(SystemExit) as stop:
            app.main()
        assert not stop.value.code
    resolved = small(FOLDER / f"{second}.yaml", shards["siim"], Path("runs"), "optim.lr=1e-12")
    run, _ = train_and_evaluate(resolved, second)
    # With a learning rate of almost 0, the weights are still those of the first run.
    states = [torch.load(Path(each, "best.pt"), weights_only=True)["model"] for each in (one, run)]
    for key, value in states[0].items():
        if key.endswith("weight"):
            torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)
    if second == "siim-classifier-hard":
        assert copies_of_hard_images(resolved) == {2}


def copies_of_hard_images(resolved: Recipe) -> set[int]:
    """How often one pass has each of the images on which the first run was most wrong."""
    data = manifest.load(*resolved.data.shards)
    scores = predictions.read_predictions(str(resolved.sampler.hard_predictions))
    error_N = np.abs(scores.probability_NF - scores.label_NF)[:, 0]
    hard = max(1, round(resolved.sampler.hard_share * len(error_N)))
    worst = set(scores.image_id[np.argsort(-error_N)[:hard]].tolist())
    stream = open_training_stream(data, resolved)
    rows_TG, _ = stream.take(0, stream.epoch_length // resolved.sampler.batch_size + 1)
    drawn = Counter(data.image_id[row] for row in rows_TG.flatten()[: stream.epoch_length])
    return {drawn[name] for name in worst}

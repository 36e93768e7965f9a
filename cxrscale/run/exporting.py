"""A run in a form that other programs run: held against the run's own model, timed, and published as a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cxrscale.evaluation import DEFAULT_MASK_RULE, Thresholds, artifacts, comparison, metrics, summary
from cxrscale.io import lease, scratch, storage, write_artifact
from cxrscale.run.trained_run import RESAMPLES, Progress, Run
from cxrscale.types import Scores, UserError

if TYPE_CHECKING:
    from cxrscale.inference import ExportInfo, Form, Gate, Quality, TrainedModel
    from cxrscale.shards import Manifest


def export(
    run: Run | str | Path,
    out: str,
    form: Form | None = None,
    gate: Gate | None = None,
    on_step: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> ExportInfo:
    """Export a run's best checkpoint into a folder, which is a run itself: `open_run(out)`.

        from cxrscale.inference import Form
        export("runs/chexnet14", "exports/chexnet14")
        export("runs/chexnet14", "exports/int8", Form(quantization="int8-static"))

    A float form gives the run's probabilities to 1e-5 on 256 validation images, or nothing is written. A quantized form
    has to pass the gate there; its thresholds and calibrators are fitted anew on its scores of the validation split.

    Args:
        out: a new folder or address.
        form: None: ONNX in float32.
        gate: what the form may change; None: the default.
        on_step: called with what is done next.
        progress: called with the number of validation images that were scored since the last call.

    Raises:
        UserError: the run is an export; the form is not the same model any more; the datasets are missing or have
            changed; something is in `out` already.
    """
    from cxrscale import inference

    source = run if isinstance(run, Run) else Run(run)
    form, gate = form or inference.Form(), gate or inference.Gate()
    _check(source, out, form)
    trained = inference.load_cpu_model(source.path)
    data = _datasets(source, trained)
    stored = storage.exists(source.artifact(artifacts.THRESHOLDS))
    chosen = source.thresholds() if stored else None
    say = on_step or (lambda _: None)
    made = inference.make_form(trained, data, form, chosen, gate, say)
    say("timing")
    table = inference.time_forms(trained, form, made)
    with lease.held(out, f"export {source.name}"), tempfile.TemporaryDirectory(dir=scratch.shared()) as name:
        draft = Path(name)
        info = inference.export_info(storage.absolute(source.path), trained, form, made, table)
        inference.write_draft(draft, trained, made.content, info, out)
        info = _decide(source, Run(draft), info, chosen, storage.absolute(out), progress)
        write_artifact(str(draft / inference.EXPORT), info)
        inference.publish(draft, out)
    return info


def _check(source: Run, out: str, form: Form) -> None:
    from cxrscale import inference

    if (info := inference.read_exported(source.path)) is not None:
        raise UserError(f"{source.path} is an export itself; give the run that it was made of, {info.run}")
    if form.quantization != "none" and form.format != "onnx":
        raise UserError(f"--quantize {form.quantization} needs --format onnx")
    inference.check_target(out)


def _datasets(source: Run, trained: TrainedModel) -> Manifest:
    """The datasets of the run, which have not changed since."""
    from cxrscale.shards import manifest

    data = manifest.load(*trained.recipe.data.shards)
    if data.digest != trained.manifest:
        shards = ", ".join(trained.recipe.data.shards)
        raise UserError(f"{shards}: not the shards that {source.path} was trained on; restore them")
    return data


def _decide(
    source: Run, draft: Run, info: ExportInfo, chosen: Thresholds | None, out: str, progress: Progress | None
) -> ExportInfo:
    """Give the draft its thresholds, and say what a quantized form costs in AUROC or Dice."""
    from cxrscale import inference

    notes, table = list(info.notes), info.table
    if chosen is not None and chosen.rule.prior_shift == "em":
        notes.append(
            "thresholds of threshold.prior_shift=em: `cxrscale evaluate` this export before it and its predict.py "
            "correct for the prevalence of the test split"
        )
    if info.quantization != "none":
        scores = draft.predictions("val", progress)
        before = source.predictions("val", progress)
        old_rule = (chosen and chosen.mask_rule) or DEFAULT_MASK_RULE
        if chosen is not None:
            chosen = _refitted(draft, scores, chosen, out)
        rule = (chosen and chosen.mask_rule) or DEFAULT_MASK_RULE
        compared = comparison.compare_scores(scores, before, RESAMPLES, 0, ("this form", "the run"), (rule, old_rule))
        quality = _quality(compared)
        table = (*table[:-1], table[-1].model_copy(update={"quality": quality}))
        if quality.difference.high < 0:
            notes.append(
                f"{quality.metric} on validation is lower than the run's own: {quality.value:.3f} against "
                f"{quality.float_value:.3f}"
            )
    elif chosen is not None:
        chosen = chosen.model_copy(update={"checkpoint": info.model})
    if chosen is None:
        notes.append(f"no thresholds, so no calls: the run has none; run `cxrscale threshold {out}`")
    else:
        write_artifact(draft.artifact(artifacts.THRESHOLDS), chosen)
    findings = inference.finding_contracts(tuple(info.findings), chosen)
    mask_rule = (chosen.mask_rule if chosen else None) or (DEFAULT_MASK_RULE if info.task == "segment" else None)
    return info.model_copy(update={"findings": findings, "mask_rule": mask_rule, "table": table, "notes": tuple(notes)})


def _refitted(draft: Run, scores: Scores, before: Thresholds, out: str) -> Thresholds:
    """Thresholds and calibrators of the draft's own scores, by the rule and with the resamples of the run's."""
    metrics.require(scores, draft.path)
    provenance = draft.provenance("val").model_copy(update={"run": out})
    weights_RN = metrics.bootstrap_weights(scores.patient, before.resamples, seed=0)
    return Thresholds(
        **dict(summary.choose_thresholds(scores, before.rule, weights_RN)),
        **dict(provenance),
        images=len(scores.image_id),
        patients=len(set(scores.patient.tolist())),
        resamples=before.resamples,
    )


def _quality(compared: artifacts.Comparison) -> Quality:
    from cxrscale.inference import Quality

    found = compared.mean_auroc if compared.dice is None else compared.dice.all
    return Quality(
        metric="AUROC" if compared.dice is None else "Dice",
        value=found.a,
        float_value=found.b,
        difference=found.difference,
    )

"""Overrides that make a run so small that a step takes some 20 ms on a CPU."""

from __future__ import annotations

TINY_CLASSIFIER = (
    "data.findings=[Cardiomegaly, Effusion, Mass]",
    "augment.size=48",
    "model.weights=none",
    "model.options={growth_rate: 8, block_config: [1, 1, 2]}",
    "sampler.batch_size=8",
    "sampler.eval_batch_size=8",
    "tracking.log_steps=1",
)
"""A CheXNet of 20,000 parameters on 48-pixel inputs: a step takes some 20 ms."""

TINY_SEGMENTER = (
    "data.task=segment",
    "data.findings=[Pneumothorax]",
    "augment.size=64",
    "model.arch=Unet",
    "model.encoder=resnet18",
    "model.weights=none",
    "model.options={encoder_depth: 3, decoder_channels: [16, 8, 8]}",
    "loss.dice=1",
    "train.monitor=dice_positives",
    "sampler.batch_size=4",
    "sampler.eval_batch_size=4",
    "tracking.log_steps=1",
)

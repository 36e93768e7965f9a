"""What the service says of itself: Prometheus metrics, and the drift of what comes in and of what it answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cxrscale.evaluation import drift
from cxrscale.inference.prediction import Prediction
from cxrscale.inference.serve.served_model import BRIGHTNESS, CONTRAST, DISTANCE, ServedModel

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Monitoring:
    """Counts and distributions since the start; nothing in them names a file or a patient."""

    def __init__(self, models: Mapping[str, ServedModel], window: int) -> None:
        """Args:
        window: the newest images per model whose statistics are compared with those of training.
        """
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cxrscale_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "cxrscale_request_seconds", "Time of a request.", ["path"], buckets=SECONDS, registry=self.registry
        )
        self.batch_images = Histogram(
            "cxrscale_batch_images", "Images per forward pass.", ["model"], buckets=IMAGES, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "cxrscale_batch_seconds", "Time of a forward pass.", ["model"], buckets=SECONDS, registry=self.registry
        )
        self.waiting = Gauge("cxrscale_waiting_images", "Images that are being processed.", registry=self.registry)
        self.images = Counter(
            "cxrscale_images", "Images by outcome: predicted or unreadable.", ["outcome"], registry=self.registry
        )
        self._drift = Gauge(
            "cxrscale_drift_index",
            "Population stability index of the newest images.",
            ["model", "statistic"],
            registry=self.registry,
        )
        self.false_alarms = {
            name: {
                statistic: drift.false_alarms(model.references[statistic], values, window)
                for statistic, values in model.test_values.items()
                if statistic in model.references
            }
            for name, model in models.items()
        }
        """Model -> statistic -> how often it raises the alarm on as many images of the test split."""
        self._references = {name: model.references for name, model in models.items()}
        self._newest: dict[str, dict[str, deque[float]]] = {
            name: {statistic: deque(maxlen=window) for statistic in model.references} for name, model in models.items()
        }

    def saw(self, model: str, prediction: Prediction) -> None:
        """Note an image and what was predicted of it."""
        values = dict(prediction.logits)
        if prediction.gray is not None:
            values |= {BRIGHTNESS: prediction.gray[0], CONTRAST: prediction.gray[1]}
        if prediction.ood_distance is not None:
            values[DISTANCE] = prediction.ood_distance
        for statistic, newest in self._newest[model].items():
            if statistic in values:
                newest.append(values[statistic])

    def drift(self) -> dict[str, dict[str, drift.Drift]]:
        """Model -> statistic -> how the newest images differ from those that the model was made with."""
        return {
            model: {
                statistic: drift.measure(self._references[model][statistic], list(newest))
                for statistic, newest in statistics.items()
            }
            for model, statistics in self._newest.items()
        }

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        for model, statistics in self.drift().items():
            for statistic, found in statistics.items():
                self._drift.labels(model, statistic).set(found.index)
        return generate_latest(self.registry)

"""The service as a deployment of Ray Serve: the same application in each of several replicas.

`application` is what a RayService or `serve run` imports; cluster/kuberay-rayservice.yaml shows how. A replica decodes,
batches and predicts by itself, as the service in one process does.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from ray import serve as ray_serve

from cxrscale import config
from cxrscale.config import ServeApplication
from cxrscale.inference import serve
from cxrscale.reporting import serve_page
from cxrscale.types import UserError

NAME = "cxrscale"
KEY_VARIABLE = "CXRSCALE_API_KEY"
"""The environment variable with the key that every request must bring."""
AT_ONCE = 64
"""Requests that a replica takes; more wait in Ray Serve's proxies."""
GRACE_S = 30.0
"""How long a replica that is stopped may go on with what it has taken."""


class Replica:
    """One of the processes that serve."""

    def __init__(self, given: ServeApplication) -> None:
        self._given = given

    def __serve_build_asgi_app__(self) -> Any:
        """The application; Ray Serve asks for it once, in the replica.

        Raises:
            UserError: a model cannot be loaded, or everybody could use the service.
        """
        given = self._given
        key = given.api_key.get_secret_value() if given.api_key is not None else os.environ.get(KEY_VARIABLE) or None
        if key is None and not given.loopback:
            raise UserError(f"the service is open to others: set {KEY_VARIABLE} in the environment of its replicas")
        places = given.models_per_replica
        shared = places is not None and places < len(given.models)
        models = serve.load_models(given.models, given.gate, given.device, places=places if shared else None)
        service = serve.Service(models, given.limits, _holder(models, places) if shared and places else None)
        return serve.build_app(service, serve_page.page_files() if given.page else None, key)


def application(args: Mapping[str, Any]) -> ray_serve.Application:
    """The deployment; replicas, their resources and their scaling are set as for any other.

    Args:
        args: the fields of `ServeApplication`.

    Raises:
        UserError: a field is unknown or wrong.
    """
    return deployment(config.parse(ServeApplication, dict(args), where="args"))


def deployment(given: ServeApplication, **options: Any) -> ray_serve.Application:
    """The deployment of an application.

    Args:
        options: of Ray Serve, e.g. num_replicas or autoscaling_config.
    """
    made = ray_serve.deployment(
        name=NAME,
        max_ongoing_requests=AT_ONCE,
        # Beyond it requests are refused with 503.
        max_queued_requests=given.limits.queue,
        graceful_shutdown_timeout_s=GRACE_S,
        health_check_period_s=5,
        **options,
    )
    bound: ray_serve.Application = made(ray_serve.ingress()(Replica)).bind(given)
    return bound


def _holder(models: Mapping[str, serve.ServedModel], places: int) -> serve.OnUse:
    """What keeps the newest models in memory, and tells Ray Serve's router which."""

    async def hold(name: str) -> serve.Held:
        return await asyncio.to_thread(serve.Held, models[name].predictor)

    keep = ray_serve.multiplexed(hold, max_num_models_per_replica=places)

    async def on_use(name: str) -> None:
        await keep(name)

    return on_use

"""The service on Ray Serve: a front that takes requests, and replicas of the application that answer them.

`application` is what a RayService or `serve run` imports; cluster/kuberay-rayservice.yaml shows how. A replica decodes,
batches and predicts by itself, as the service in one process does. The front has the key and the limits, and asks
another replica where one dies with a request: Ray Serve's own proxies would answer that with 500.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from cxrscale import config
from cxrscale.config import API_KEY, Serve, ServeApplication
from cxrscale.inference import serve
from cxrscale.reporting import serve_page
from cxrscale.types import UserError

NAME, FRONT = "cxrscale", "front"
"""Deployments: the replicas of the application, and what stands before them."""
AT_ONCE = 64
"""Requests that a replica takes; more wait in the front."""
ATTEMPTS = 4
"""Replicas that a request is given to, where one after another dies."""
GRACE_S = 30.0
"""How long a replica that is stopped may go on with what it has taken."""
LOG = logging.getLogger("cxrscale")


class Replica:
    """One of the processes with models."""

    async def __init__(self, given: ServeApplication) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Load the models and start the decoders.

        Raises:
            UserError: a model cannot be loaded.
        """
        places = given.models_per_replica
        shared = places is not None and places < len(given.models)
        models = serve.load_models(given.models, given.gate, given.device, places=places if shared else None)
        # The front counts requests, per address.
        settings = given.limits.model_copy(update={"requests_per_minute": 0})
        self._service = serve.Service(models, settings, _holder(models, places) if shared and places else None)
        await self._service.start()
        self._app = serve.build_app(self._service, serve_page.page_files() if given.page else None)

    async def answer(self, request: serve.Request) -> serve.Answered:
        """The application's answer to a request."""
        return await serve.answer(self._app, request)

    async def __del__(self) -> None:
        await self._service.close()


class Front:
    """What clients reach."""

    def __init__(self, given: ServeApplication, replicas: Any) -> None:
        """Args:
        replicas: the handle of their deployment.

        Raises:
            UserError: everybody could use the service.
        """
        self._given, self._replicas = given, replicas
        self._key = given.api_key.get_secret_value() if given.api_key else os.environ.get(API_KEY) or None
        if self._key is None and not given.loopback:
            raise UserError(f"the service is open to others: set {API_KEY} in the environment of its replicas")

    def __serve_build_asgi_app__(self) -> Any:
        """The application; Ray Serve asks for it once, in the replica."""
        return serve.guarded(serve.Forwarder(self._ask), self._given.limits, self._key)

    async def _ask(self, request: serve.Request, model: str) -> serve.Answered:
        handle = self._replicas
        if model and self._given.models_per_replica is not None:
            handle = handle.options(multiplexed_model_id=model)
        for _ in range(ATTEMPTS):
            try:
                answered: serve.Answered = await handle.answer.remote(request)
            except RayActorError:
                LOG.warning("a replica died with a request; another one is asked")
            except BackPressureError:
                break
            else:
                return answered
        raise serve.BusyError


def application(args: Mapping[str, Any]) -> ray_serve.Application:
    """The deployments; replicas, their resources and their scaling are set as for any others.

    Args:
        args: the fields of `ServeApplication`.

    Raises:
        UserError: a field is unknown or wrong.
    """
    return deployment(config.parse(ServeApplication, dict(args), where="args"))


def deployment(given: ServeApplication, **options: Any) -> ray_serve.Application:
    """The deployments of an application.

    Args:
        options: of Ray Serve for the replicas with models, e.g. num_replicas or autoscaling_config.
    """
    limits: Serve = given.limits
    common: dict[str, Any] = {"graceful_shutdown_timeout_s": GRACE_S, "health_check_period_s": 5}
    replicas = ray_serve.deployment(
        name=NAME, max_ongoing_requests=AT_ONCE, max_queued_requests=limits.queue, **common, **options
    )
    # The front waits for replicas and does little else.
    front = ray_serve.deployment(
        name=FRONT, max_ongoing_requests=2 * limits.queue, ray_actor_options={"num_cpus": 0}, **common
    )
    bound: ray_serve.Application = front(ray_serve.ingress()(Front)).bind(given, replicas(Replica).bind(given))
    return bound


@contextmanager
def running(given: ServeApplication, host: str, port: int, **options: Any) -> Iterator[None]:
    """Inside, the application answers at an address of each node of the cluster that this process has joined.

    Args:
        options: as of `deployment`.
    """
    ray_serve.start(http_options={"host": host, "port": port})
    try:
        ray_serve.run(deployment(given, **options), name=NAME)
        yield
    finally:
        ray_serve.shutdown()  # type: ignore[no-untyped-call]


def _holder(models: Mapping[str, serve.ServedModel], places: int) -> serve.OnUse:
    """What keeps the newest models in memory, and tells Ray Serve's router which."""

    async def hold(name: str) -> serve.Held:
        return await asyncio.to_thread(serve.Held, models[name].predictor)

    keep = ray_serve.multiplexed(hold, max_num_models_per_replica=places)

    async def on_use(name: str) -> None:
        await keep(name)

    return on_use

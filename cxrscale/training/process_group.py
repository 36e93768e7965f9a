"""The process group of a run's workers, which listens no wider than Ray itself does.

Torch's store and its collectives know no token, and by default the store listens on every interface. Here it listens at
the node's own address alone; on a private Ray or a cluster of one machine, whose nodes are at 127.0.0.1, everything
stays on loopback.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from torch._C._distributed_c10d import TCPStore

_listener: socket.socket | None = None


class HeldTrainer(TorchTrainer):
    """Ray Train's trainer, of which somebody holds the controller: its end is that of the workers.

    Ray itself gives the controller to its handler of Ctrl-C alone, and only where it runs in the main thread, which in
    a trial of Ray Tune it does not.
    """

    hold: Callable[[Any], None]
    """Called with the controller before it begins, and with None when it has come to its end by itself."""

    def _create_default_callbacks(self) -> list[Any]:
        # Ray's cleaner knows a placement group only once all of its workers have started, asks a dashboard that a
        # cluster need not have, and then never ends. Whoever holds the controller ends it with `groups.end_actor`.
        made = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        options: dict[str, Any] = {
            "num_cpus": 0,
            "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            "runtime_env": {"env_vars": {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"} | get_env_vars_to_propagate()},
        }
        controller: Any = ray.remote(**options)(TrainController).remote(**settings)
        self.hold(controller)
        ray.get(controller.run.remote())
        result = ray.get(controller.get_result.remote())
        self.hold(None)
        return result


@dataclass
class GroupConfig(TorchConfig):
    """Ray Train's torch configuration with `_GroupBackend`."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets the group up."""
        return _GroupBackend


class _GroupBackend(_TorchBackend):
    """Sets up NCCL for workers with GPUs, else gloo; nothing for a single worker, which has nobody to speak to."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called by Ray Train when all workers of a group have started."""
        worker_group.execute(_set_torch_distributed_env_vars)
        world = len(worker_group)
        if world == 1:
            return
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"
        host, port = worker_group.execute_single(0, listen)
        given = (world, host, port, backend, float(backend_config.timeout_s))
        ray.get([worker_group.execute_single_async(rank, join, rank, *given) for rank in range(world)])


def listen() -> tuple[str, int]:
    """Open the socket of rank 0's store at this node's address; returns (address, port)."""
    global _listener
    host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    _listener = socket.create_server((host, 0), family=family, backlog=1024)
    return host, int(_listener.getsockname()[1])


def join(rank: int, world: int, host: str, port: int, backend: str, seconds: float) -> None:
    """Join the group as worker `rank` of `world`; its store is rank 0's, at the host and port of `listen`."""
    if _is_loopback(host):
        (name,) = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        # Both would choose the interface of the host name or a network card.
        os.environ |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    if backend == "nccl":
        # A collective that waits for a lost worker ends its process, so that Ray restarts the group.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    timeout = timedelta(seconds=seconds)
    handle = _listener.detach() if rank == 0 and _listener is not None else None
    store = TCPStore(host, port, world, is_master=rank == 0, timeout=timeout, master_listen_fd=handle)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")

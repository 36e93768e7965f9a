"""The command of a trained model as a service: serve."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cxrscale.cli.group import app
from cxrscale.config import API_KEY
from cxrscale.types import UserError

if TYPE_CHECKING:
    from cxrscale.config import Serve


@app.command("serve")
def serve_command(
    runs: Annotated[
        list[str],
        typer.Argument(help="Runs, as RUN or NAME=RUN; the first is the default model.", metavar="RUN..."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A limit, e.g. max_megabytes=50.", metavar="FIELD=VALUE")
    ] = None,
    gate: Annotated[str | None, typer.Option(help="A classifier's run before every segmenter.", metavar="RUN")] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0: any that is free.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        str | None,
        typer.Option(help=f"A file with the key that every request must bring; else {API_KEY}.", metavar="FILE"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; else the GPU where there is one.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Serve from a Ray cluster, by Ray Serve.")] = False,
    replicas: Annotated[
        str, typer.Option(help="With --ray: processes that serve; 1-4 scales with the load.", metavar="N or MIN-MAX")
    ] = "1",
) -> None:
    """A page to drop X-rays on, and an API, on this machine: serve runs/chexnet14.

    Nobody else can reach it: it listens on 127.0.0.1. With --host it listens elsewhere, and then wants a key: put one
    into a file (`openssl rand -hex 32 >key; chmod 600 key`) and give --api-key-file key.

    --ray serves the same from replicas on the Ray cluster of RAY_ADDRESS, or on one that it starts here; on Kubernetes
    see cluster/kuberay-rayservice.yaml. It is for several machines: on one it starts later and answers more slowly.

    Images stay in memory and are not kept. /docs lists the requests, /metrics is for Prometheus. Ctrl-C ends what has
    begun and stops. Not a medical device.
    """
    key = _api_key(api_key_file)
    listen = _Listen(host, port, key, device)
    if key is None and not listen.loopback:
        raise UserError(
            f"--host {host} is open to others: give --api-key-file FILE (openssl rand -hex 32 >FILE; chmod 600 FILE)"
        )
    settings = _settings(overrides or [])
    if ray:
        _serve_on_ray(_named(runs), gate, listen, settings, replicas)
    else:
        _serve(_named(runs), gate, listen, settings)


@dataclass(frozen=True, slots=True)
class _Listen:
    """Where to listen, for whom, and what computes."""

    host: str
    port: int
    key: str | None
    device: str | None

    @property
    def loopback(self) -> bool:
        """Whether nobody but this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def announce(self, port: int) -> None:
        """Print where the service is, once it answers there."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        print(f"http://{shown}:{port}", flush=True)
        print("Not a medical device. Ctrl-C stops.", file=sys.stderr)


def _settings(overrides: list[str]) -> Serve:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("serve needs FastAPI and uvicorn: pip install 'cxrscale[serve]'") from None
    from cxrscale import config

    return config.parse(config.Serve, config.override({}, overrides), where="--set")


def _serve(runs: dict[str, str], gate: str | None, listen: _Listen, settings: Serve) -> None:
    import uvicorn

    from cxrscale.inference import serve
    from cxrscale.reporting import serve_page

    # Its processes import what they need while the models load.
    decoder = serve.decoding.Decoder(settings.decode_workers, settings.decode_seconds)
    decoder.start()
    try:
        models = serve.load_models(runs, gate, listen.device)
    except BaseException:
        decoder.close()
        raise
    for name, model in models.items():
        for note in model.info.notes:
            logging.getLogger("cxrscale").warning("%s: %s", name, note)
    application = serve.build_app(serve.Service(models, settings, decoder=decoder), serve_page.page_files(), listen.key)
    # Its own log would name what clients asked for.
    server = uvicorn.Server(
        uvicorn.Config(
            application,
            host=listen.host,
            port=listen.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=30,
            # Not httptools, which takes headers of any size.
            http="h11",
            h11_max_incomplete_event_size=65536,
        )
    )
    sockets = [server.config.bind_socket()]
    listen.announce(sockets[0].getsockname()[1])
    # It handles the signals, and raises them again once it has stopped.
    with suppress(KeyboardInterrupt):
        server.run(sockets=sockets)


def _serve_on_ray(runs: dict[str, str], gate: str | None, listen: _Listen, settings: Serve, replicas: str) -> None:
    from pydantic import SecretStr

    from cxrscale.cluster import ray_session
    from cxrscale.config import ServeApplication
    from cxrscale.io import storage
    from cxrscale.run import serving

    if listen.port == 0:
        raise UserError("--port 0: with --ray name a port")
    given = ServeApplication(
        models={name: storage.absolute(run) for name, run in runs.items()},
        gate=gate and storage.absolute(gate),
        device=listen.device,
        limits=settings,
        api_key=None if listen.key is None else SecretStr(listen.key),
        loopback=listen.loopback,
    )
    options = _scaling(replicas)
    ray_session.connect()
    with serving.running(given, listen.host, listen.port, **options):
        listen.announce(listen.port)
        stop = threading.Event()
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, lambda *_: stop.set())
        stop.wait()


def _scaling(replicas: str) -> dict[str, Any]:
    """Ray Serve's options for a number of replicas, or a range of them."""
    least, found, most = replicas.partition("-")
    if not least.isdigit() or int(least) < 1 or (found and (not most.isdigit() or int(most) < int(least))):
        raise UserError(f"--replicas {replicas}: give a number, or a range such as 1-4")
    if not found:
        return {"num_replicas": int(least)}
    scaling = {"min_replicas": int(least), "max_replicas": int(most), "target_ongoing_requests": 8}
    return {"autoscaling_config": scaling}


def _named(runs: list[str]) -> dict[str, str]:
    """Name -> run."""
    named: dict[str, str] = {}
    for word in runs:
        name, found, path = word.partition("=")
        path = path if found else word
        name = name if found else path.rstrip("/").rpartition("/")[2]
        if name in named:
            raise UserError(f"two models are called {name}; name them: a={path} b=...")
        named[name] = path
    return named


def _api_key(file: str | None) -> str | None:
    if file is None:
        return os.environ.get(API_KEY) or None
    try:
        key = Path(file).read_text().strip()
    except OSError as error:
        raise UserError(f"--api-key-file {file}: {error.strerror}") from None
    if len(key) < 16:
        raise UserError(f"--api-key-file {file} holds {len(key)} characters; make a key: openssl rand -hex 32")
    return key

"""The command of a trained model as a service: serve."""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cxrscale.cli.group import app
from cxrscale.types import UserError

if TYPE_CHECKING:
    from cxrscale.inference import serve

KEY_VARIABLE = "CXRSCALE_API_KEY"


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
        typer.Option(help=f"A file with the key that every request must bring; else {KEY_VARIABLE}.", metavar="FILE"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; else the GPU where there is one.")] = None,
) -> None:
    """A page to drop X-rays on, and an API, on this machine: serve runs/chexnet14.

    Nobody else can reach it: it listens on 127.0.0.1. With --host it listens elsewhere, and then wants a key: put one
    into a file (`openssl rand -hex 32 >key; chmod 600 key`) and give --api-key-file key.

    Images stay in memory and are not kept. /docs lists the requests, /metrics is for Prometheus. Ctrl-C ends what has
    begun and stops. Not a medical device.
    """
    key = _api_key(api_key_file)
    _check_host(host, key)
    _serve(runs, gate, _Listen(host, port, key, device), overrides or [])


@dataclass(frozen=True, slots=True)
class _Listen:
    """Where to listen, for whom, and what computes."""

    host: str
    port: int
    key: str | None
    device: str | None


def _serve(runs: list[str], gate: str | None, listen: _Listen, overrides: list[str]) -> None:
    try:
        import uvicorn
    except ImportError:
        raise UserError("serve needs FastAPI and uvicorn: pip install 'cxrscale[serve]'") from None
    from cxrscale import config
    from cxrscale.inference import serve
    from cxrscale.reporting import serve_page

    settings = config.parse(config.Serve, config.override({}, overrides), where="--set")
    models = _models(runs, gate, listen.device)
    application = serve.build_app(serve.Service(models, settings), serve_page.page_files(), listen.key)
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
            h11_max_incomplete_event_size=65536,
        )
    )
    sockets = [server.config.bind_socket()]
    shown = f"[{listen.host}]" if ":" in listen.host else listen.host
    print(f"http://{shown}:{sockets[0].getsockname()[1]}", flush=True)
    print("Not a medical device. Ctrl-C stops.", file=sys.stderr)
    server.run(sockets=sockets)


def _models(runs: list[str], gate: str | None, device: str | None) -> dict[str, serve.ServedModel]:
    from cxrscale.inference import PredictorSpec, serve
    from cxrscale.run import open_run

    models: dict[str, serve.ServedModel] = {}
    for word in runs:
        name, found, path = word.partition("=")
        path = path if found else word
        name = name if found else path.rstrip("/").rpartition("/")[2]
        if name in models:
            raise UserError(f"two models are called {name}; name them: a={path} b=...")
        before = gate if gate is not None and open_run(path).recipe.data.task == "segment" else None
        models[name] = serve.load_served(name, PredictorSpec((path,), before, maps=True), device)
        for note in models[name].info.notes:
            logging.getLogger("cxrscale").warning("%s: %s", name, note)
    if gate is not None and not any(model.info.gate for model in models.values()):
        raise UserError(f"--gate {gate}: none of the runs is a segmenter's")
    return models


def _api_key(file: str | None) -> str | None:
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = Path(file).read_text().strip()
    except OSError as error:
        raise UserError(f"--api-key-file {file}: {error.strerror}") from None
    if len(key) < 16:
        raise UserError(f"--api-key-file {file} holds {len(key)} characters; make a key: openssl rand -hex 32")
    return key


def _check_host(host: str, key: str | None) -> None:
    """Refuse an address that others can reach where no key keeps them out."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and key is None:
        raise UserError(
            f"--host {host} is open to others: give --api-key-file FILE (openssl rand -hex 32 >FILE; chmod 600 FILE)"
        )

"""Requests per second and latency of `serve`, beside the bare model, a loop without a server, and a plain script.

    python -m tests.benchmarks.serve --images DIR [--ray] [--rounds 3] [--seconds 8] [--out FILE]

DIR holds PNG or DICOM files at any depth. The model is DenseNet-121 at 224 pixels with random weights, in 2 threads.
Clients ask again as soon as they have an answer, each on a connection of its own; they run in this process, which costs
the servers what the clients cost. All servers stay up and take turns within a round; medians over rounds. The plain
script is what one writes first with FastAPI: PIL, torch, one request at a time (`serve_plain.py`). The bare model gets
batches of as many images as there are clients, 16 at most; the loop predicts the files without HTTP.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch

from cxrscale.inference import Predictor, find_inputs
from cxrscale.models import forward
from cxrscale.types import Batch
from tests.benchmarks.predict import make_run
from tests.servers import free_port

CLIENTS = (1, 8, 64)
THREADS = 2
SIZE = 224
Contender = Callable[[int, float], list[float]]
"""Takes the number of clients and seconds; returns the latency of each image, in seconds."""


@contextmanager
def server(command: Sequence[str], port: int, ready: str) -> Iterator[subprocess.Popen[bytes]]:
    """Inside, the command answers; prints how long it took to, and its memory at the end."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "RAY_AUTH_MODE": "disabled"}
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", *command], env=environment, stdout=subprocess.DEVNULL
    ) as process:
        while not _answers(port, ready):
            assert process.poll() is None, f"{command} has ended"
            assert time.perf_counter() < began + 180, f"{command} does not answer"
            time.sleep(0.05)
        print(f"{' '.join(command[1:3])}: ready after {time.perf_counter() - began:.1f} s", flush=True)
        yield process
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        print(f"{' '.join(command[1:3])}: {sum(one.memory_info().rss for one in family) >> 20} MB", flush=True)
        process.terminate()


def _answers(port: int, path: str) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def load(port: int, images: Sequence[bytes], clients: int, seconds: float) -> list[float]:
    """The latencies of requests that clients make for a while."""
    took, end = list[float](), time.perf_counter() + seconds

    def ask(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while time.perf_counter() < end:
            began = time.perf_counter()
            connection.request("POST", "/v1/predict", images[number % len(images)])
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
            took.append(time.perf_counter() - began)
            number += clients
        connection.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took


def bare_model(predictor: Predictor) -> Contender:
    """The model alone, in a loop."""

    def run(clients: int, seconds: float) -> list[float]:
        size = min(clients, 16)
        none_B = torch.zeros(size, dtype=torch.int64)
        batch = Batch(torch.rand(size, 1, SIZE, SIZE), torch.zeros(size, 1), None, none_B, none_B.bool())
        took, end = list[float](), time.perf_counter() + seconds
        with torch.no_grad():
            while time.perf_counter() < end:
                began = time.perf_counter()
                forward(predictor._trained.model, batch, predictor.recipe.train, torch.device("cpu"))
                took += [time.perf_counter() - began] * size
        return took

    return run


def loop(predictor: Predictor, paths: Sequence[str]) -> Contender:
    """Files predicted in batches, without a server."""

    def run(clients: int, seconds: float) -> list[float]:
        size, number = min(clients, 16), 0
        took, end = list[float](), time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            predictor.predict([paths[(number + i) % len(paths)] for i in range(size)])
            took += [time.perf_counter() - began] * size
            number += size
        return took

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--ray", action="store_true", help="Ray Serve too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--clients", type=int, nargs="*", default=list(CLIENTS))
    parser.add_argument("--out")
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    paths = list(find_inputs([given.images]).paths)
    images = [Path(path).read_bytes() for path in paths]
    print(f"{len(images)} files of {statistics.mean(map(len, images)) / 1e6:.2f} MB")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        run = make_run(Path(folder), "densenet121", SIZE)
        predictor = Predictor(run, "cpu")
        all_of_them: dict[str, Contender] = {
            "bare model": bare_model(predictor),
            "loop over files": loop(predictor, paths),
        }
        serve = ["-m", "cxrscale", "serve", run, "--set", "requests_per_minute=0", "--port"]
        ours, plain, on_ray = free_port(), free_port(), free_port()
        stack.enter_context(server([*serve, str(ours)], ours, "/readyz"))
        all_of_them["cxrscale serve"] = lambda n, s: load(ours, images, n, s)
        stack.enter_context(server(["-m", "tests.benchmarks.serve_plain", run, str(plain)], plain, "/healthz"))
        all_of_them["plain script"] = lambda n, s: load(plain, images, n, s)
        if given.ray:
            stack.enter_context(server([*serve, str(on_ray), "--ray"], on_ray, "/readyz"))
            all_of_them["cxrscale serve --ray"] = lambda n, s: load(on_ray, images, n, s)
        found = measure(all_of_them, given.clients, given.rounds, given.seconds)
    show(found)
    if given.out:
        Path(given.out).write_text(json.dumps(found, indent=1) + "\n")


def measure(
    all_of_them: dict[str, Contender], clients: Sequence[int], rounds: int, seconds: float
) -> dict[str, dict[str, dict[str, float]]]:
    """Contender -> clients -> images per second, its share of the bare model's, and latencies in ms."""
    speeds: dict[tuple[str, int], list[float]] = {}
    took: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds + 1):
        for count in clients:
            for name, contender in all_of_them.items():
                began = time.perf_counter()
                latencies = contender(count, seconds if number else 2.0)
                if number:  # the first round warms up
                    speeds.setdefault((name, count), []).append(len(latencies) / (time.perf_counter() - began))
                    took.setdefault((name, count), []).extend(latencies)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in all_of_them}
    for (name, count), values in speeds.items():
        bare = speeds["bare model", count]
        p50, p95, p99 = (1000 * float(np.quantile(took[name, count], q)) for q in (0.5, 0.95, 0.99))
        ratio = statistics.median(one / other for one, other in zip(values, bare, strict=True))
        found[name][str(count)] = {
            "per_second": statistics.median(values),
            "of_bare_model": ratio,
            "p50_ms": p50,
            "p95_ms": p95,
            "p99_ms": p99,
        }
    return found


def show(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print a table."""
    print(f"{'':24}{'clients':>8}{'per s':>8}{'of bare':>9}{'p50 ms':>8}{'p95':>8}{'p99':>8}")
    for name, rows in found.items():
        for count, row in rows.items():
            numbers = "".join(f"{row[key]:8.0f}" for key in ("p50_ms", "p95_ms", "p99_ms"))
            print(f"{name:24}{count:>8}{row['per_second']:8.1f}{row['of_bare_model']:9.2f}{numbers}")


if __name__ == "__main__":
    main()

"""All that a command finds and leaves: the files of a folder and the objects of a bucket."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from tests.servers import free_port, s3_environment

TIMES = {"time", "images_per_second", "data_wait", "crc"}
"""Fields of the training log that no two runs share."""
LEFT_OUT = {"seal", "sessions", "seconds", "worker_hours", "gpu_hours", "cost", "hardware", "git"}
"""The same of run.json, of a search's sweep.json and of the rows of its trials."""

State = dict[str, bytes]
"""Name -> content; a folder's name ends in a slash."""


class World:
    """The folder `work`, and the bucket if there is one."""

    def __init__(self, work: Path, bucket: Bucket | None) -> None:
        self.work, self.bucket = work, bucket

    def state(self) -> State:
        """Everything that is there now."""
        found: State = {}
        for path in sorted(self.work.rglob("*")):
            name = str(path.relative_to(self.work))
            found |= {f"{name}/": b""} if path.is_dir() else {name: path.read_bytes()}
        return found | (self.bucket.objects() if self.bucket else {})

    def restore(self, state: State) -> None:
        """Make it the only thing that is there."""
        shutil.rmtree(self.work)
        self.work.mkdir()
        for name, content in state.items():
            if name.startswith("s3://"):
                continue
            if name.endswith("/"):
                (self.work / name).mkdir(parents=True, exist_ok=True)
            else:
                (self.work / name).write_bytes(content)
        if self.bucket:
            self.bucket.restore({name: content for name, content in state.items() if name.startswith("s3://")})


class Bucket:
    """A bucket on a real S3 server in a process of its own."""

    def __init__(self, name: str) -> None:
        # Synchronous, and so without threads: what is started here is forked for each attempt.
        from botocore.session import Session  # type: ignore[import-untyped]

        self.name = name
        self._client: Any = Session().create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        self._client.create_bucket(Bucket=name)

    def objects(self) -> State:
        """The content of each object, by its address."""
        found: State = {}
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name):
            for entry in page.get("Contents", []):
                body = self._client.get_object(Bucket=self.name, Key=entry["Key"])["Body"].read()
                found[f"s3://{self.name}/{entry['Key']}"] = body
        return found

    def restore(self, state: State) -> None:
        """Make these the only objects."""
        now, start = self.objects(), f"s3://{self.name}/"
        for address in now.keys() - state.keys():
            self._client.delete_object(Bucket=self.name, Key=address.removeprefix(start))
        for address, content in state.items():
            if now.get(address) != content:
                self._client.put_object(Bucket=self.name, Key=address.removeprefix(start), Body=content)


@contextmanager
def ray_head() -> Iterator[None]:
    """Inside, the environment names a Ray cluster of this machine."""
    ray, port = Path(sys.executable).with_name("ray"), free_port()
    words = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false"]
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{port}"}
    # Its temporary folder is not that of the commands; and the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="cxr", dir="/tmp") as folder:
        command = [str(ray), "start", *words, f"--temp-dir={folder}", "--block"]
        environment = {**os.environ, "TMPDIR": folder, "RAY_worker_niceness": "0"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
            try:
                _wait_for(port)
                yield
            finally:
                head.terminate()


def _wait_for(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.1)


@contextmanager
def s3_server() -> Iterator[None]:
    """Inside, the environment names an S3 server of its own."""
    port = free_port()
    os.environ |= s3_environment(port)
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port)
            yield
        finally:
            server.kill()


def comparable(state: Mapping[str, bytes]) -> dict[str, Any]:
    """What must be equal: the content of each file, without what tells the time."""
    result: dict[str, Any] = {}
    for name, content in state.items():
        base = name.rsplit("/", 1)[-1]
        if name.startswith("tmp/cxr-"):
            # A killed process's must not stay. But for an empty one, killed before it had locked it: that goes after a
            # minute.
            if not base:
                continue
            result.setdefault("tmp/cxr-*/" + base, []).append("a folder of a process")
        elif base == "train_log.jsonl":
            lines = [json.loads(line) for line in content.decode().splitlines()]
            result[name] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
        elif "/search/ray/" in name or ("/trials/" in name and "/ray/" in name):
            continue  # Ray's own state, which nothing reads after the search
        elif base in ("run.json", "sweep.json"):
            result[name] = {key: value for key, value in json.loads(content).items() if key not in LEFT_OUT}
        elif base.endswith(".pt"):
            # The same content has other bytes, and so another name, where two of its values are one object.
            name = re.sub("(step-[0-9]+)-[0-9a-f]+", r"\1", name)
            result.setdefault(name, []).append(_tensors(torch.load(io.BytesIO(content), weights_only=True)))
        elif base in ("report.html", "tune.html"):
            result[name] = "written"  # it states the time that training took
        elif base == "trials.parquet":
            rows = pq.ParquetFile(io.BytesIO(content)).read(use_threads=False).to_pylist()
            result[name] = [{key: value for key, value in row.items() if key not in LEFT_OUT} for row in rows]
        else:
            result[name] = content
    return result


def _tensors(value: Any) -> str:
    """A checkpoint's content as text that is equal for equal content."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return repr({key: _tensors(item) for key, item in value.items()})
    return repr([_tensors(item) for item in value]) if isinstance(value, list | tuple) else repr(value)


def differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """One line per file that is missing, too many or different."""
    lines = [f"missing {name}" for name in sorted(expected.keys() - actual.keys())]
    lines += [f"stray {name}" for name in sorted(actual.keys() - expected.keys())]
    lines += [f"different {name}" for name in sorted(expected.keys() & actual.keys()) if expected[name] != actual[name]]
    return lines

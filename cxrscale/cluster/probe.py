"""What this machine is and can do, as plain numbers and words; `doctor` judges them.

A cluster's nodes run these functions as they stand on the driver, so each imports what it needs itself.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "ray", "timm", "nvidia-dali")
"""Whose versions must agree between driver and nodes; DALI's package is named after its CUDA."""
ABSENT = "does not exist"
SAMPLE_BYTES = 32 * 2**20


def versions() -> dict[str, str]:
    """Python's, cxrscale's and the heavy packages' versions; cxrscale's with a digest of its source files.

    A build's suffix is left out: a CPU build on the head goes with the CUDA build of the same torch on the nodes.
    """
    import hashlib
    import platform
    from importlib.metadata import distributions
    from importlib.util import find_spec

    found = {"python": platform.python_version()}
    there = {str(each.metadata["Name"] or "").lower(): each.version for each in reversed(list(distributions()))}
    for package in PACKAGES:
        names = sorted(name for name in there if name == package or name.startswith(f"{package}-cuda"))
        found[package] = there[names[-1]].partition("+")[0] if names else "absent"
    spec = find_spec("cxrscale")
    if spec is None or spec.origin is None:
        return found | {"cxrscale": "absent"}
    source = hashlib.sha256()
    root = Path(spec.origin).parent
    try:
        for path in sorted(root.rglob("*.py")):
            source.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
        lines = Path(spec.origin).read_text().splitlines()
    except FileNotFoundError:
        return found | {"cxrscale": "being unpacked"}
    number = next((line for line in lines if line.startswith("__version__")), "=unknown").partition("=")[2]
    return found | {"cxrscale": f"{number.strip().strip(chr(34))} ({source.hexdigest()[:8]})"}


def clock() -> float:
    """This machine's time in seconds since 1970."""
    return time.time()


def light_facts(folders: dict[str, str], reads: tuple[str, ...] = (), writes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Everything that can be said without loading torch.

    Args:
        folders: local folders by what they are for, whose disks are measured; `~` is this machine's user's.
        reads: datasets that must be there.
        writes: folders or buckets in which a tiny file is written, listed and removed.
    """
    import resource
    import shutil
    import sys

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    return {
        "versions": versions(),
        "no_bytecode": sys.dont_write_bytecode or bool(os.environ.get("PYTHONDONTWRITEBYTECODE")),
        "auth_mode": os.environ.get("RAY_AUTH_MODE"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": min(pages, _memory_limit() or pages),
        "shm": {"total": shm.total, "free": shm.free} if shm else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "disks": {name: disk(folder) for name, folder in folders.items()},
        "reads": {address: reach_address(address, write=False) for address in reads},
        "writes": {address: reach_address(address) for address in writes},
    }


def _memory_limit() -> int | None:
    """Bytes that the container may use; None where it has no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return int(text)
    return None


def disk(folder: str, size: int = SAMPLE_BYTES) -> dict[str, Any]:
    """Free bytes of a folder's disk, and bytes a second of writing and reading a small file past the page cache."""
    import shutil
    import uuid

    place = Path(folder).expanduser()
    standing = next(parent for parent in (place, *place.absolute().parents) if parent.is_dir())
    sample = standing / f".tmp-doctor-{uuid.uuid4().hex}"
    found: dict[str, Any] = {"path": str(place), "free": shutil.disk_usage(standing).free}
    try:
        data = os.urandom(2**20)
        began = time.perf_counter()
        with sample.open("wb") as file:
            for _ in range(size // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        found["write"] = size / (time.perf_counter() - began)
        with sample.open("rb", buffering=0) as raw:
            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while raw.read(2**20):
                pass
        found["read"] = size / (time.perf_counter() - began)
    except OSError as error:
        found["fault"] = error.strerror or str(error)
    finally:
        sample.unlink(missing_ok=True)
    return found


def reach_address(address: str, write: bool = True, patience: float = 10.0) -> dict[str, Any]:
    """Whether a folder or bucket answers within `patience` seconds: {"seconds": ...}, or {"fault": why not}.

    Args:
        write: also write, list and remove a tiny file there.
    """
    import threading
    import uuid

    found: dict[str, Any] = {}

    def ask() -> None:
        from cxrscale.io import storage

        try:
            began = time.perf_counter()
            if write:
                name = f".tmp-reach-{uuid.uuid4().hex}"
                storage.write(storage.join(address, name), b"x")
                try:
                    if name not in storage.listing(address):
                        found["fault"] = "what was written there is not listed"
                finally:
                    storage.remove(storage.join(address, name))
            elif not storage.exists(address):
                found["fault"] = ABSENT
            found["seconds"] = time.perf_counter() - began
        except Exception as error:  # botocore has errors that are no OSErrors; whatever it is, it is the answer
            found["fault"] = " ".join(f"{error}".split())[:200] or type(error).__name__

    # Cloud libraries try a dead endpoint for minutes; nobody waits for this thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return dict(found) if "fault" in found or "seconds" in found else {"fault": f"no answer within {patience:.0f} s"}


def heavy_facts() -> dict[str, Any]:
    """What needs torch and DALI: GPUs, collectives, and a small DALI graph on the CPU and on each GPU."""
    import torch

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    nccl = torch.distributed.is_nccl_available()
    found: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "gpus": [{"name": each.name, "memory": each.total_memory} for each in devices],
        "gloo": torch.distributed.is_gloo_available(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,  # type: ignore[no-untyped-call]
        "dali": {},
    }
    for index in (None, *range(len(devices))):
        name = "cpu" if index is None else f"cuda:{index}"
        try:
            found["dali"][name] = graph(index)
        except Exception as error:  # DALI's errors have no common base; the text is the finding
            found["dali"][name] = " ".join(f"{error}".split())[:300] or type(error).__name__
    return found


def graph(gpu: int | None) -> str:
    """Decode and move one small JPEG by a DALI graph on a GPU, or on the CPU; "ok", or what came out wrong."""
    import cv2
    import numpy as np
    from nvidia.dali import fn, pipeline_def, types

    side = 64
    image_HW = (np.add.outer(np.arange(side), np.arange(side)) * 2).astype(np.uint8)
    file = np.asarray(cv2.imencode(".jpg", image_HW, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]).ravel()

    @pipeline_def(batch_size=1, num_threads=1, device_id=gpu)  # type: ignore[untyped-decorator]
    def decoded() -> Any:
        encoded = fn.external_source(source=lambda: [file])
        image = fn.decoders.image(encoded, device="cpu" if gpu is None else "mixed", output_type=types.GRAY)
        return fn.warp_affine(image, matrix=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0))

    pipe = decoded()
    pipe.build()
    out_HW = np.asarray((pipe.run()[0] if gpu is None else pipe.run()[0].as_cpu()).at(0))[..., 0]
    off = int(np.abs(out_HW.astype(int) - image_HW.astype(int)).max())
    # JPEG at quality 95 changes a smooth ramp by a level or two.
    return "ok" if off <= 4 else f"decodes wrongly: off by {off} gray levels"


def heavy_facts_in_subprocess(timeout: float = 180.0) -> dict[str, Any]:
    """`heavy` in a process of its own: a driver that crashes costs one line, and no GPU memory stays taken."""
    import json
    import subprocess
    import sys

    # Ray hides the GPUs from tasks that asked for none.
    hidden = ("CUDA_VISIBLE_DEVICES", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = "import json; from cxrscale import machine; print('\\n' + json.dumps(machine.heavy()))"
    try:
        ran = subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"fault": f"torch and DALI did not answer within {timeout:.0f} s"}
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"it ended with exit code {ran.returncode}"]
        return {"fault": lines[-1][:300]}
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found | {"smi": _smi()}


def _smi() -> list[str]:
    """What nvidia-smi says of each GPU: name, driver, memory; empty where it is not there."""
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    ran = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return [line.strip() for line in ran.stdout.splitlines() if line.strip()] if ran.returncode == 0 else []

"""Measurements of this machine as plain numbers and strings; `doctor` judges them.

Nodes of a cluster run these functions as pickled on the driver, even if cxrscale is not installed there, so each
function imports what it needs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "ray", "timm", "nvidia-dali")
"""Packages that must have the same version on driver and nodes; the name of DALI's package ends in its CUDA version."""
ABSENT = "does not exist"
"""The error of an address with nothing there."""
SAMPLE_BYTES = 32 * 2**20
"""Size of the file that measures a disk."""


def versions() -> dict[str, str]:
    """The versions of Python, the heavy packages and cxrscale, the latter with a digest of its source files.

    The suffix of a build is left out: a CPU build of torch on the head and a CUDA build on the nodes are compatible.
    """
    import hashlib
    import platform
    from importlib.metadata import distributions
    from importlib.util import find_spec

    result = {"python": platform.python_version()}
    installed = {str(item.metadata["Name"] or "").lower(): item.version for item in reversed(list(distributions()))}
    for package in PACKAGES:
        names = sorted(name for name in installed if name == package or name.startswith(f"{package}-cuda"))
        result[package] = installed[names[-1]].partition("+")[0] if names else "absent"
    spec = find_spec("cxrscale")
    if spec is None or spec.origin is None:
        return result | {"cxrscale": "absent"}
    source = hashlib.sha256()
    root = Path(spec.origin).parent
    try:
        for path in sorted(root.rglob("*.py")):
            source.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
        lines = Path(spec.origin).read_text().splitlines()
    except FileNotFoundError:
        return result | {"cxrscale": "being unpacked"}
    version = next((line for line in lines if line.startswith("__version__")), "=unknown").partition("=")[2]
    return result | {"cxrscale": f"{version.strip().strip(chr(34))} ({source.hexdigest()[:8]})"}


def clock() -> float:
    """This machine's time in seconds since 1970."""
    return time.time()


def light_facts(folders: dict[str, str], reads: tuple[str, ...] = (), writes: tuple[str, ...] = ()) -> dict[str, Any]:
    """All measurements that need no torch.

    Args:
        folders: purpose -> local folder whose disk is measured; `~` is the home folder on this machine.
        reads: datasets that must exist.
        writes: folders or buckets in which a small file is written, listed and removed.
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
        "disks": {name: measure_disk(folder) for name, folder in folders.items()},
        "reads": {address: reach_address(address, write=False) for address in reads},
        "writes": {address: reach_address(address) for address in writes},
    }


def _memory_limit() -> int | None:
    """Bytes that the container may use; None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return int(text)
    return None


def measure_disk(folder: str, size: int = SAMPLE_BYTES) -> dict[str, Any]:
    """Measure the disk of a folder, or of its closest existing parent, with a small file that bypasses the page cache.

    Returns:
        path, free (bytes), write and read (bytes per second); or path, free and error.
    """
    import shutil
    import uuid

    try:
        path = Path(folder).expanduser()
    except RuntimeError:
        return {"path": folder, "free": 0, "error": "no home folder"}
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    sample = existing / f".tmp-doctor-{uuid.uuid4().hex}"
    result: dict[str, Any] = {"path": str(path), "free": shutil.disk_usage(existing).free}
    try:
        data = os.urandom(2**20)
        start = time.perf_counter()
        with sample.open("wb") as file:
            for _ in range(size // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        result["write"] = size / (time.perf_counter() - start)
        with sample.open("rb", buffering=0) as raw:
            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while raw.read(2**20):
                pass
        result["read"] = size / (time.perf_counter() - start)
    except OSError as error:
        result["error"] = error.strerror or str(error)
    finally:
        sample.unlink(missing_ok=True)
    return result


def reach_address(address: str, write: bool = True, timeout: float = 30.0) -> dict[str, Any]:
    """Whether a folder or bucket answers within `timeout` seconds; a busy node takes ten to import a cloud library.

    Args:
        write: write, list and remove a small file in it; False: only check that it exists.

    Returns:
        {"seconds": time to answer} or {"error": one-line reason}.
    """
    import threading
    import uuid

    result: dict[str, Any] = {}

    def try_address() -> None:
        try:
            from cxrscale.io import storage

            start = time.perf_counter()
            if write:
                name = f".tmp-reach-{uuid.uuid4().hex}"
                storage.write(storage.join(address, name), b"x")
                try:
                    if name not in storage.listing(address):
                        result["error"] = "a file that was written is not listed"
                finally:
                    storage.remove(storage.join(address, name))
            elif not storage.exists(address):
                result["error"] = ABSENT
            result["seconds"] = time.perf_counter() - start
        except Exception as error:  # any error is the answer; those of botocore are not OSErrors
            result["error"] = " ".join(str(error).split())[:200] or type(error).__name__

    # Cloud libraries retry a dead endpoint for minutes; nothing waits for this thread.
    thread = threading.Thread(target=try_address, daemon=True)
    thread.start()
    thread.join(timeout)
    return dict(result) if result else {"error": f"no answer within {timeout:.0f} s"}


def heavy_facts() -> dict[str, Any]:
    """Measurements that need torch and DALI: GPUs, collectives, and a small DALI graph on the CPU and on each GPU."""
    import torch

    from cxrscale.types import one_line

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    nccl = torch.distributed.is_nccl_available()
    result: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "gpus": [{"name": device.name, "memory": device.total_memory} for device in devices],
        "gloo": torch.distributed.is_gloo_available(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,  # type: ignore[no-untyped-call]
        "dali": {},
    }
    for index in (None, *range(len(devices))):
        name = "cpu" if index is None else f"cuda:{index}"
        try:
            result["dali"][name] = run_dali_graph(index)
        except Exception as error:  # DALI's errors have no common base class
            result["dali"][name] = one_line(error, limit=300)
    return result


def run_dali_graph(gpu: int | None) -> str:
    """Decode and transform a small JPEG with a DALI graph on a GPU (None: on the CPU); "ok", or what is wrong."""
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
    difference = int(np.abs(out_HW.astype(int) - image_HW.astype(int)).max())
    # JPEG at quality 95 changes a smooth ramp by one or two gray levels.
    return "ok" if difference <= 4 else f"decodes wrongly: {difference} gray levels too much or too little"


def heavy_facts_in_subprocess(timeout: float = 180.0) -> dict[str, Any]:
    """`heavy_facts` in a separate process: a crash of the driver is one line, and no GPU memory stays allocated."""
    import json
    import subprocess
    import sys

    # Ray hides the GPUs from tasks that request none.
    hidden = ("CUDA_VISIBLE_DEVICES", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = "import json; from cxrscale.cluster import probe; print('\\n' + json.dumps(probe.heavy_facts()))"
    try:
        ran = subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"torch and DALI did not answer within {timeout:.0f} s"}
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"the process ended with exit code {ran.returncode}"]
        return {"error": lines[-1][:300]}
    result: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return result | {"smi": _nvidia_smi()}


def _nvidia_smi() -> list[str]:
    """One line of nvidia-smi per GPU: name, driver, memory; empty if it is not installed."""
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    ran = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return [line.strip() for line in ran.stdout.splitlines() if line.strip()] if ran.returncode == 0 else []

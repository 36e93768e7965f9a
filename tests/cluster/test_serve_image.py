"""What cluster/Dockerfile.serve installs is enough for the service, and torch is not in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.servers import free_port
from tests.small_exports import write_export

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef0123456789abcdef"


def packages() -> list[str]:
    """The names that the image installs."""
    text = (ROOT / "cluster" / "Dockerfile.serve").read_text()
    found = re.search(r"-c constraints\.txt(.*?)\nCOPY", text, re.DOTALL)
    assert found is not None
    return found[1].replace("\\", " ").split()


def test_each_package_of_the_image_has_a_tested_version() -> None:
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert len(packages()) > 20
    assert set(packages()) - pinned <= {"setuptools"}
    assert not {"torch", "ray", "timm"} & set(packages())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_service_runs_with_what_the_image_installs(
    classifier_run: str, drawn: SyntheticPaths, tmp_path: Path
) -> None:
    exported, key, port = write_export(classifier_run, tmp_path / "export"), tmp_path / "key", free_port()
    key.write_text(KEY)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    uv = [sys.executable, "-m", "uv", "pip", "install", "-q", "-p", str(venv / "bin" / "python")]
    subprocess.run([*uv, "-c", ROOT / "constraints.txt", *packages()], check=True)
    subprocess.run([*uv, "--no-deps", "--no-build-isolation", str(ROOT)], check=True)
    size = sum(path.stat().st_size for path in (venv / "lib").rglob("*") if path.is_file()) >> 20
    print(f"{size} MB")
    assert size < 1000
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(venv / "bin" / "cxrscale"), "serve", exported, "--host", "0.0.0.0", "--api-key-file", str(key)]
    with subprocess.Popen([*command, "--port", str(port)], env=environment, cwd=tmp_path) as service:
        try:
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEY}"}
            ) as client:
                wait_for(client, service)
                image = next(drawn.siim.rglob("*.dcm")).read_bytes()
                answer = client.post("/v1/predict", content=image, timeout=60)
                report = client.post("/v1/predict/dicom-sr", content=image, timeout=60)
        finally:
            service.terminate()
    assert answer.status_code == report.status_code == 200
    assert len(answer.json()["predictions"][0]["probabilities"]) == 4
    assert service.returncode == 0


def wait_for(client: httpx.Client, service: subprocess.Popen[bytes]) -> None:
    """Until it is ready, four minutes at most."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        assert service.poll() is None
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError("not ready")

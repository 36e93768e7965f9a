"""A sample of the crash points of each command; `python -m tests.crash.campaign FOLDER` tries all of them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def campaign(folder: Path, *arguments: str) -> list[str]:
    """The lines of a campaign, which found nothing."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.crash.campaign", str(folder), *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.splitlines()


def test_a_sample_of_crash_points_leaves_no_trace(tmp_path: Path) -> None:
    lines = campaign(tmp_path / "sample", "--every", "60", "--first", "20")
    assert [line.split(":")[0] for line in lines] == ["shard", "train", "threshold", "evaluate", "predict"]
    assert int(lines[0].split()[1]) > 100


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("options", [(), ("--s3",)], ids=["local", "s3"])
def test_every_crash_point_leaves_no_trace(options: tuple[str, ...], tmp_path: Path) -> None:
    assert len(campaign(tmp_path / "all", *options)) == 5

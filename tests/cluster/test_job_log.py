"""Submitting to and following a job on a job server that misbehaves; what a real one does is in test_jobs."""

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cxrscale.cluster import job_log, job_server, jobs
from cxrscale.types import UserError
from tests.cluster.job_server import FakeJobServer, as_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A token in the environment, no proxy, and a client that does not wait long."""
    path = tmp_path / "token"
    path.write_text("0" * 64)
    for name in ("RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS", "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.setattr(job_log, "POLL_S", 0.1)
    monkeypatch.setattr(job_log, "PENDING_S", 0.2)
    monkeypatch.setattr(job_log, "SILENCE_S", 1.0)
    monkeypatch.setattr(job_log, "SILENT_STREAM_S", 0.3)


def follow(server: FakeJobServer, name: str = "job") -> int:
    return job_log.follow(jobs.connect(server.address), name)


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0, ""),
        ({"status": "FAILED", "driver_exit_code": 2, "message": "x"}, 2, "job job failed with exit code 2"),
        ({"status": "FAILED", "driver_exit_code": -9, "message": "x"}, 137, "killed by signal 9"),
        ({"status": "STOPPED", "message": "Job was intentionally stopped."}, 143, "job job was stopped; submit"),
        (
            {
                "status": "FAILED",
                "error_type": "JOB_SUPERVISOR_ACTOR_DIED",
                "message": "Job supervisor actor died: The actor died.\nIts node has terminated: n1",
            },
            71,
            "the node of job job died: Its node has terminated: n1; submit it again to resume",
        ),
        (
            {
                "status": "FAILED",
                "driver_node_id": None,
                "error_type": "RUNTIME_ENV_SETUP_FAILURE",
                "message": "runtime_env setup failed: no space",
            },
            69,
            "job job never started: runtime_env setup failed: no space",
        ),
        (
            {"status": "FAILED", "driver_node_id": None, "error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": "died"},
            69,
            "job job never started: died",
        ),
    ],
)
def test_each_end_has_its_words_and_its_exit_code(
    end: dict[str, Any], code: int, words: str, job_server: FakeJobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    job_server.end = end
    assert follow(job_server) == code
    out, error = capsys.readouterr()
    assert out == job_server.log
    assert words in error
    assert error.count("\n") == bool(words)


@pytest.mark.parametrize("stream", ["works", "refused", "html", "cut", "silent"])
def test_the_log_is_printed_once_whatever_becomes_of_the_stream(
    stream: str, job_server: FakeJobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    job_server.stream, job_server.seconds = stream, 0.7
    assert follow(job_server) == 0
    assert capsys.readouterr().out == job_server.log
    if stream in ("refused", "html"):
        assert job_server.streams == job_log.STREAM_FAILURES


def test_a_server_that_fails_for_a_moment_is_asked_again(job_server: FakeJobServer) -> None:
    job_server.info_failures = [(502, "bad gateway"), (200, "<html>sign in</html>"), (404, "no such page"), (200, "{}")]
    assert follow(job_server) == 0


def test_a_server_that_fails_for_long_is_one_line_with_what_to_do(job_server: FakeJobServer) -> None:
    job_server.info_failures = [(503, "try later")] * 1000
    start = time.monotonic()
    with pytest.raises(job_log.LostJobError, match=r"no longer answers \(.*try later.*submit --follow job") as caught:
        follow(job_server)
    assert caught.value.exit_code == 75
    assert time.monotonic() - start < 20


def test_a_head_that_forgot_the_job_is_told_from_a_name_that_never_was(job_server: FakeJobServer) -> None:
    with pytest.raises(UserError, match="there is no job other at http"):
        follow(job_server, "other")
    job_server.seconds, job_server.stream = 60, "refused"
    threading.Timer(0.5, lambda: job_server.info_failures.extend([(404, "Job job does not exist")] * 9)).start()
    with pytest.raises(job_log.LostJobError, match="has forgotten job job: its head was started anew"):
        follow(job_server)


def test_a_log_that_went_with_its_node_does_not_hide_the_end(
    job_server: FakeJobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    job_server.log_lost = True
    job_server.end = {"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": "node n1 died"}
    assert follow(job_server) == job_log.NODE_DIED
    error = capsys.readouterr().err
    assert "the rest of the log cannot be read" in error
    assert "the node of job job died: node n1 died" in error


def test_a_job_that_waits_says_so_once(job_server: FakeJobServer, capsys: pytest.CaptureFixture[str]) -> None:
    job_server.pending, job_server.seconds, job_server.stream = True, 0.8, "refused"
    assert follow(job_server) == 0
    assert capsys.readouterr().err == "job job waits: Job has not started yet.\n"


def submit(server: FakeJobServer, *, name: str | None = None, address: str | None = None) -> str:
    spec = jobs.JobSpec(ROOT, installed=True, name=name)
    return jobs.submit(["config"], spec, address or server.address)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((500, ""), "the job was refused: Request failed with status code 500"),
        ((500, "Traceback (most recent call last):\n  File x\nValueError: no such resource\n."), "no such resource"),
        ((413, "<html>\n<h1>413</h1>\n</html>"), "takes no package of this size"),
        ((403, "policy"), "it does not take the token, or a proxy before it forbids this"),
        ((400, "policy: no jobs from here"), "policy: no jobs from here"),
    ],
)
def test_a_refused_job_has_its_reason_and_its_exit_code(
    refusal: tuple[int, str], message: str, job_server: FakeJobServer
) -> None:
    job_server.refusal = refusal
    with pytest.raises(jobs.RefusedJobError) as caught:
        submit(job_server)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 77


@pytest.mark.parametrize("name", ["a/b", "a?b", "a#b", "", ".", "-a", "a b", "a" * 129, "../x", "a\n"])
def test_a_name_that_is_no_id_is_one_line(name: str, job_server: FakeJobServer) -> None:
    with pytest.raises(UserError, match="is not a job's id; give letters"):
        submit(job_server, name=name)
    with pytest.raises(UserError, match=r"--follow .* is not a job's id"):
        jobs.check_id(name, "--follow")
    assert job_server.submitted == []


@pytest.mark.parametrize("page", ["/", "/#/jobs", "/#/jobs/job?tab=logs", "/?x=1", "//"])
def test_an_address_from_a_browser_is_taken(page: str, job_server: FakeJobServer) -> None:
    assert submit(job_server, address=job_server.address + page) == "job"
    assert submit(job_server, address=job_server.address.removeprefix("http://") + page) == "job"


@pytest.mark.parametrize("address", ["ray://h:1", "ftp://h", "http://", "http://h:port", "s3://b/x", "", "http://[::1"])
def test_what_is_no_address_of_a_job_server_is_one_line(address: str) -> None:
    with pytest.raises(UserError, match="is not a job server; give the dashboard's address"):
        job_server.normalize(address)


def test_a_password_in_an_address_is_never_printed(
    job_server: FakeJobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "Sup3rSecret"
    address = job_server.address.replace("://", f"://me:{secret}@")
    client = jobs.connect(address)
    assert secret not in jobs.how_to_follow(client, "job")
    job_server.end = {"status": "FAILED", "driver_exit_code": 3, "message": "x"}
    assert job_log.follow(client, "job") == 3
    job_server.info_failures = [(503, f"cannot GET {address}/x")] * 1000
    messages = []
    for given in (address, f"http://me:{secret}@127.0.0.1:1", f"ray://me:{secret}@h:1", f"me:{secret}@h:port"):
        with pytest.raises(UserError) as caught:
            job_log.follow(jobs.connect(given), "job")
        messages.append(str(caught.value))
    out, error = capsys.readouterr()
    assert secret not in out + error + "".join(messages)
    assert secret not in as_json(job_server)


def test_a_cluster_without_a_token_is_used_only_when_asked_for(
    job_server: FakeJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_server.mode = "disabled"
    with pytest.raises(UserError, match="runs without a token: whoever reaches it can run code"):
        submit(job_server)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert submit(job_server) == "job"
    assert job_server.submitted[0]["runtime_env"]["env_vars"]["RAY_AUTH_MODE"] == "disabled"


def test_a_token_that_is_there_is_used_where_the_cluster_wants_one(
    job_server: FakeJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert submit(job_server) == "job"
    assert job_server.authorization[-1] == "Bearer " + "0" * 64
    assert "0" * 64 not in as_json(job_server)


def test_a_dead_proxy_does_not_hide_a_cluster_that_is_reached_without(
    job_server: FakeJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert submit(job_server) == "job"
    assert follow(job_server) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY")
    with pytest.raises(UserError, match="neither directly nor through the proxy of http_proxy") as caught:
        submit(job_server, address=f"http://127.0.0.1:{port}")
    assert "\n" not in str(caught.value)
    assert os.environ.get("no_proxy") is None

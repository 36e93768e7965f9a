"""What tests of jobs share."""

from collections.abc import Iterator

import pytest

from tests.cluster.job_server import FakeJobServer


@pytest.fixture
def job_server() -> Iterator[FakeJobServer]:
    """A job server whose faults a test chooses."""
    server = FakeJobServer()
    with server.running():
        yield server

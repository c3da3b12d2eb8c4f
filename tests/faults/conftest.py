"""One fork server for all fault tests of a process."""

import pytest
from lives import Lives


@pytest.fixture(scope="session")
def lives(tmp_path_factory):
    server = Lives(tmp_path_factory.mktemp("lives"))
    yield server
    server.close()

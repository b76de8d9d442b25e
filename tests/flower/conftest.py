"""One thread for each of the many processes."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield

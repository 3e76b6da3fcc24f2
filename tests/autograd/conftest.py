"""Both paths for the tests of this folder."""

import pytest

import fusedloss


@pytest.fixture(params=["triton", "reference"])
def path(request):
    """A test that takes it runs on each path."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with fusedloss.use(request.param):
        yield request.param


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    with fusedloss.use("triton"):
        yield

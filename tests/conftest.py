"""What every test stands on: the interpreter where there is no GPU, seeds, and the device."""

import os

import torch

# before anything imports triton, which reads it when it decorates its own functions
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def round_as_a_gpu():
    """The interpreter truncates float32 to bfloat16; a GPU rounds to nearest even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(input, input_dtype, output_dtype, rounding_mode):
        if input_dtype != tl.float32 or output_dtype != tl.bfloat16:
            return original(input, input_dtype, output_dtype, rounding_mode)
        bits = np.frombuffer(input.tobytes(), dtype=np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(input.shape)

    interpreter._convert_float = convert


def prepare_once_a_launch():
    """The interpreter prepares triton.language anew for each call of a device function, which takes as long
    as all the rest; once a launch is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    prepare, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared = set()

    def prepare_once(function):
        modules = frozenset(id(v) for v in function.__globals__.values() if v is tl or v is tl.core)
        if modules in prepared:
            return interpreter._LangPatchScope()
        prepared.add(modules)
        return prepare(function)

    def run_prepared(self, *args, **kwargs):
        prepared.clear()
        return run(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_once, run_prepared


if INTERPRETED:
    try:
        round_as_a_gpu()
        prepare_once_a_launch()
    except ModuleNotFoundError:  # no Triton here: the reference is tested alone
        INTERPRETED = False


def pytest_configure(config):
    if INTERPRETED:  # numpy says what a GPU passes over: log(0) in a masked lane, inf - inf, a cast to inf
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore:reduction. 'mean' divides:UserWarning")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20)

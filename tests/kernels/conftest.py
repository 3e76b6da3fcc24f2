"""The kernels' tests: no kernel touches memory outside its arguments, which the interpreter does not check."""

import importlib.util
import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    import numpy as np
    from triton.runtime import interpreter

    allowed = []  # [first, end) addresses of the launch's tensors, apart and in order

    def guard():
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store, arguments = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst

        def extents(self, *args):
            positional, named = arguments(self, *args)
            tensors = [t for t in (*positional, *named.values()) if hasattr(t, "data_ptr") and t.numel()]
            spans = sorted(
                (t.data_ptr(), t.data_ptr() + t.element_size() * (1 + sum(
                    (n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)
                ))) for t in tensors
            )  # fmt: skip
            allowed.clear()
            for first, end in spans:
                if allowed and first <= allowed[-1][1]:
                    allowed[-1][1] = max(allowed[-1][1], end)
                else:
                    allowed.append([first, end])
            return positional, named

        def check(place, mask):
            at = place.data[mask.data.astype(bool)].astype(np.int64)
            if at.size:
                span = np.searchsorted([first for first, _ in allowed], at, side="right") - 1
                size = max(1, place.get_element_ty().primitive_bitwidth // 8)
                inside = (span >= 0) & (at + size <= np.array([end for _, end in allowed])[span])
                if not inside.all():
                    raise IndexError(f"{int((~inside).sum())} of {at.size} accesses are out of bounds")

        def guarded_load(self, place, mask, *args):
            check(place, mask)
            return load(self, place, mask, *args)

        def guarded_store(self, place, value, mask, *args):
            check(place, mask)
            return store(self, place, value, mask, *args)

        builder.create_masked_load, builder.create_masked_store = guarded_load, guarded_store
        executor._init_args_hst = extents

    guard()


@pytest.fixture
def out_of_bounds():
    """What the guard raises."""
    if "interpreter" not in globals():
        pytest.skip("the guard is the interpreter's")
    return interpreter.InterpreterError

"""XLA's calls to Python."""

import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcnn.cpu import xla_handlers
from flaxcnn.cpu.xla_handlers import Array


def test_a_thread_of_xlas_stays_known_to_python() -> None:
    """What is kept for a thread is there in its next call; else Python makes it anew in each."""
    kept = threading.local()
    calls: list[tuple[int, int]] = []  # thread, and the how manieth call in it

    def count(_: Sequence[int]) -> None:
        kept.calls = getattr(kept, "calls", 0) + 1
        calls.append((threading.get_ident(), kept.calls))

    xla_handlers.register("flaxcnn_test_count", lambda *_: count)
    call = jax.ffi.ffi_call("flaxcnn_test_count", jax.ShapeDtypeStruct((1,), jnp.float32))

    def program(x: jax.Array) -> jax.Array:
        for _ in range(20):
            x = call(x, numbers=np.arange(2))
        return x

    # One device's program is run by the thread that asks for it, of two each has a thread.
    jax.block_until_ready(jax.pmap(program, devices=jax.devices()[:2])(jnp.zeros((2, 1))))
    seen = {threading.get_ident(): 0}
    for thread, number in calls:
        seen[thread] = seen.get(thread, 0) + 1
        assert number == seen[thread]
    assert sum(seen.values()) == 40 > seen[threading.get_ident()]


class Prepared:
    """What a handler was asked to prepare, and was called with; each result is of its first."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[Any] = []
        self.calls = 0
        xla_handlers.register(name, self.prepare)

    def prepare(self, *asked: Any) -> xla_handlers.Run:
        arguments, results, numbers = asked
        self.asked.append((tuple(arguments), tuple(results), tuple(numbers)))

        def run(addresses: Sequence[int]) -> None:
            self.calls += 1
            assert len(addresses) == len(arguments) + len(results)
            first = arguments[0].at(addresses[0])
            for result, address in zip(results, addresses[len(arguments) :], strict=True):
                result.at(address)[...] = first.sum()

        return run

    def __call__(self, shapes: Sequence[Any], *operands: jax.Array, numbers: Any) -> Any:
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        call = jax.ffi.ffi_call(self.name, results)
        return jax.block_until_ready(call(*operands, numbers=np.asarray(numbers, np.int64)))


def test_all_that_tells_calls_apart() -> None:
    """Nothing is prepared twice, and nothing that was prepared for another call is used."""
    handler = Prepared("flaxcnn_test_all")
    x, single, byte = jnp.arange(6.0).reshape(2, 3), jnp.float32, jnp.uint8
    calls: list[tuple[list[Any], list[jax.Array], list[int]]] = [
        ([((4,), single)], [x], [1, 2]),
        ([((4,), single)], [x.T], [1, 2]),
        ([((4,), single)], [x.reshape(6)], [1, 2]),
        ([((4,), single)], [x.reshape(2, 3, 1)], [1, 2]),
        ([((4,), single)], [x.astype(jnp.bfloat16)], [1, 2]),
        ([((4,), single)], [x.astype(byte)], [1, 2]),
        ([((4,), single)], [x], [1, 3]),
        ([((4,), single)], [x], [-(2**40), 2]),
        ([((4,), single)], [x], [1]),
        ([((4,), single)], [x], [1, 2, 0]),
        ([((4,), single)], [x, x], [1, 2]),
        ([((4,), single), ((4,), single)], [x], [1, 2]),
        ([((2, 3), single), ((4,), single)], [x], [1, 2]),  # of the arrays of two lines above
        ([((4,), byte)], [x], [1, 2]),
        ([((5,), single)], [x], [1, 2]),
        ([((), single)], [x], [1, 2]),
        ([((4,), single)], [x[:0]], [1, 2]),
        ([((4,), single)], [x[0, 0]], [1, 2]),
    ]
    for again in range(3):
        for results, operands, numbers in calls:
            for (shape, dtype), found in zip(
                results, handler(results, *operands, numbers=numbers), strict=True
            ):
                wanted = np.full(shape, float(operands[0].sum()), dtype)
                np.testing.assert_array_equal(np.asarray(found), wanted)
        assert handler.calls == (again + 1) * len(calls)
    wanted_calls = [
        (
            tuple(Array(x.shape, x.dtype) for x in operands),
            tuple(Array(shape, np.dtype(dtype)) for shape, dtype in results),
            tuple(numbers),
        )
        for results, operands, numbers in calls
    ]
    assert handler.asked == wanted_calls


def test_what_is_prepared_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_handlers, "_MOST", 3)
    handler = Prepared("flaxcnn_test_most")
    for number in (0, 1, 2, 0, 3, 0):  # with the fourth the first three go
        (found,) = handler([((), jnp.float32)], jnp.ones(3), numbers=[number])
        assert found == 3
    assert [numbers for _, _, numbers in handler.asked] == [(0,), (1,), (2,), (3,), (0,)]


def test_other_types_and_what_is_raised() -> None:
    handler = Prepared("flaxcnn_test_types")
    with pytest.raises(jax.errors.JaxRuntimeError, match="not uint8, float32 and bfloat16 here"):
        handler([((), jnp.float32)], jnp.ones(3, jnp.float16), numbers=[1])

    def prepare(*_: Any) -> xla_handlers.Run:
        raise KeyboardInterrupt("while it was prepared")

    xla_handlers.register("flaxcnn_test_raises", prepare)
    call = jax.ffi.ffi_call("flaxcnn_test_raises", jax.ShapeDtypeStruct((), jnp.float32))
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="flaxcnn_test_raises: KeyboardInt"):
            call(jnp.ones(3), numbers=np.zeros(1, np.int64))

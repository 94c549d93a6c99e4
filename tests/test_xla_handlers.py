"""XLA's calls to Python."""

import threading

import jax
import jax.numpy as jnp
import numpy as np

from flaxcnn.cpu import xla_handlers
from flaxcnn.cpu.xla_handlers import Buffer


def test_a_thread_of_xlas_stays_known_to_python() -> None:
    """What is kept for a thread is there in its next call; else Python makes it anew in each."""
    kept = threading.local()
    calls: list[tuple[int, int]] = []  # thread, and the how manieth call in it

    def count(arguments: list[Buffer], results: list[Buffer], numbers: tuple[int, ...]) -> None:
        kept.calls = getattr(kept, "calls", 0) + 1
        calls.append((threading.get_ident(), kept.calls))

    xla_handlers.register("flaxcnn_test_count", count)
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

"""A process that trains on the CPU keeps freed memory, in huge pages, and sets XLA's flags."""

import dataclasses
import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from placing import on_devices
from plans import PLAN
from shallow import shallow
from variables import random_variables

import flaxcnn
from train import cpu, optim, steps

# Prints what the call said, and the pages (of 4 kB) that stay when 200 MB are freed again.
PROBE = """
import sys
from train.cpu import keep_freed_memory
resident = lambda: int(open("/proc/self/statm").read().split()[1])
said = keep_freed_memory() if sys.argv[1] == "keep" else None
before = resident()
block = bytearray(200_000_000)
del block
print(said, resident() - before)
"""

linux_with_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the allocator of glibc"
)


def probe(argument: str) -> list[str]:
    command = [sys.executable, "-c", PROBE, argument]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()


@linux_with_glibc
def test_freed_memory_stays() -> None:
    said, pages = probe("keep")
    assert said == "True"
    assert int(pages) > 40_000
    _, pages_otherwise = probe("leave")
    assert int(pages_otherwise) < 1_000


@linux_with_glibc
def test_large_memory_is_in_huge_pages_where_the_kernel_has_them() -> None:
    chosen = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not chosen.exists() or "[madvise]" not in chosen.read_text():
        # Then the kernel gives them always or never, whatever is asked.
        pytest.skip("huge pages are not for the asking here")
    program = (
        "from train import cpu; cpu.keep_freed_memory(); block = bytearray(200_000_000); "
        "lines = open('/proc/self/smaps').read().splitlines(); "
        "print(sum(int(l.split()[1]) for l in lines if l.startswith('AnonHugePages')))"
    )
    command = [sys.executable, "-c", program]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(shown.stdout) > 150_000  # kB


@pytest.fixture(name="touched")
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `prepare` did, instead of doing it."""
    found: list[str] = []
    for name in ("keep_freed_memory", "choose_flags"):
        monkeypatch.setattr(cpu, name, lambda name=name: found.append(name))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(cpu, "PLAIN", False)
    return found


def test_all_is_done_on_a_cpu(touched: list[str]) -> None:
    cpu.prepare()
    assert touched == ["keep_freed_memory", "choose_flags"]


def test_nothing_is_done_where_an_accelerator_may_be(
    touched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = metadata.EntryPoint("cuda", "jax_plugins.cuda", "jax_plugins")
    monkeypatch.setattr(cpu.metadata, "entry_points", lambda group: [plugin])
    monkeypatch.delenv("JAX_PLATFORMS")
    cpu.prepare()
    assert not touched


def test_nothing_is_done_when_switched_off(
    touched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "PLAIN", True)
    cpu.prepare()
    assert not touched


def test_flags_are_added_to_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.metadata, "version", lambda name: "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert cpu.choose_flags()
    all_of_them = os.environ["XLA_FLAGS"].split()
    assert all_of_them == [
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution",
        "--xla_cpu_copy_insertion_use_region_analysis=true",
        "--xla_cpu_prefer_vector_width=512",
    ]
    assert not cpu.choose_flags()  # as it is there already
    assert os.environ["XLA_FLAGS"].split() == all_of_them


def test_a_flag_that_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.metadata, "version", lambda name: "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=128")
    assert cpu.choose_flags()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[0] == "--xla_cpu_prefer_vector_width=128"
    assert sum("vector_width" in flag for flag in flags) == 1


def test_a_file_of_flags_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.metadata, "version", lambda name: "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "/etc/xla_flags")
    assert not cpu.choose_flags()
    assert os.environ["XLA_FLAGS"] == "/etc/xla_flags"


def test_a_jaxlib_that_may_not_know_the_flags_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.metadata, "version", lambda name: "0.99")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert not cpu.choose_flags()
    assert os.environ["XLA_FLAGS"] == ""


def known_to_this_jaxlib() -> None:
    if metadata.version("jaxlib") not in cpu.KNOWN_TO:
        # And end the process, as `choose_flags` sees to that it does not.
        pytest.skip("this jaxlib may not know the flags")


@pytest.mark.parametrize("chosen", [False, True])
def test_the_flags_are_heeded(chosen: bool) -> None:
    """Set after JAX was imported, before it starts."""
    known_to_this_jaxlib()
    program = f"""
import jax, jax.numpy as jnp
from train import cpu
if {chosen}:
    assert cpu.choose_flags()
layout = ("NHWC", "HWIO", "NHWC")
def step(x, kernel):
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
    return y, jnp.sin(kernel), 2 * kernel
x, kernel = jnp.ones((8, 56, 56, 64)), jnp.ones((3, 3, 64, 64))
text = jax.jit(step, donate_argnums=1).lower(x, kernel).compile().as_text()
print("ynn" in text, " copy(" in text)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", program]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == 2 * [str(not chosen)]


@pytest.mark.parametrize(
    ("arch", "devices"),
    [
        ("alexnet", None),
        ("googlenet", None),
        ("resnet18", None),
        ("efficientnet_b0", None),
        ("resnet18", 2),  # compiled as the trainer's steps are
    ],
)
def test_parameters_updated_in_place_are_those_that_are_copied_first(
    arch: str, devices: int | None
) -> None:
    """Nothing is overwritten that is still to be read: the step is so large that it would show."""
    known_to_this_jaxlib()
    flag = "xla_cpu_copy_insertion_use_region_analysis"
    model = shallow(flaxcnn.create_model(arch, num_classes=10))
    images = np.random.default_rng(0).normal(size=(4, 64, 64, 3)).astype(np.float32)
    variables = random_variables(model, images.shape)
    plan = dataclasses.replace(PLAN, nesterov=True)
    optimiser = optim.optimiser(plan, lambda _: 100.0)

    def step(params: Any, moving: Any, momentum: Any) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            output, updates = model.apply(
                {"params": params, "batch_stats": moving},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs=steps.random_streams(jax.random.key(0)),
            )
            return steps.training_loss(output, jnp.arange(4), 0.0), updates["batch_stats"]

        gradients, changed = jax.grad(loss, has_aux=True)(params)
        updates, after = optimiser.update(gradients, momentum, params)
        return optax.apply_updates(params, updates), changed, after

    def one_step(in_place: bool) -> tuple[Any, str]:
        params, moving = variables["params"], variables.get("batch_stats", {})
        state = (params, moving, optimiser.init(params))
        donated, options = (0, 1, 2), {flag: in_place}
        if devices is None:
            program, state = jax.jit(step, donate_argnums=donated), jax.device_put(state)
            compiled = program.lower(*state).compile(quick.OPTIONS | options)
        else:
            stacked = jax.tree.map(lambda leaf: np.stack([leaf] * devices), state)
            _, state = on_devices({}, stacked, devices)
            program = jax.pmap(step, devices=jax.devices()[:devices], donate_argnums=donated)
            compiled = program.lower(*state).compile(options)
        return jax.device_get(compiled(*state)), compiled.as_text()

    (ours, text), (copied, text_of_copied) = one_step(True), one_step(False)
    if devices is None:  # several have sums of their gradients, and copy nothing either way
        assert text.count(" copy(") < text_of_copied.count(" copy(")

    # Two compilations round differently, 1e-5 and less; what is read too late is another number.
    def compare(a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max(initial=0))

    jax.tree.map(compare, ours, copied)

"""What `benchmarks.gpu_traffic` reads in a compiled program."""

import os

import pytest

from benchmarks import gpu_traffic

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %negate.1 = bf16[8,4]{1,0} negate(%p)
}

ENTRY %main.7 (x.1: f32[1000,8], k.1: bf16[8,4]) -> (bf16[1000,4], pred[1000]) {
  %x.1 = f32[1000,8]{1,0} parameter(0)
  %k.1 = bf16[8,4]{1,0} parameter(1)
  %constant_0 = bf16[] constant(0)
  %loop_negate_fusion.2 = bf16[8,4]{1,0} fusion(%k.1), kind=kLoop, calls=%fused
  %gemm = (bf16[1000,4]{1,0}, /*index=1*/u8[2000]{0}) custom-call(%x.1, %loop_negate_fusion.2), \
custom_call_target="__cublas$gemm", metadata={op_name="jit(step)/net/fc/dot_general"}
  %get-tuple-element.1 = bf16[1000,4]{1,0} get-tuple-element(%gemm), index=0
  %compare.3 = pred[1000]{0} fusion(%get-tuple-element.1, %constant_0), kind=kInput, calls=%fused
  ROOT %tuple.4 = (bf16[1000,4]{1,0}, pred[1000]{0}) tuple(%get-tuple-element.1, %compare.3)
}

"""


def test_each_kernel_reads_its_arguments_and_writes_its_results() -> None:
    negate, product, compare = gpu_traffic.kernels(PROGRAM)
    assert (negate.name, negate.results) == ("loop_negate_fusion.2", "bf16[8,4]")
    assert negate.megabytes == pytest.approx(2 * 64 / 1e6)
    assert product.name == "gemm"
    assert product.arguments == "f32[1000,8], bf16[8,4]"
    assert product.megabytes == pytest.approx((32_000 + 64 + 8_000 + 2_000) / 1e6)
    assert product.origin == "net/fc/dot_general"
    assert compare.megabytes == pytest.approx((8_000 + 2 + 1_000) / 1e6)


def test_the_report_names_the_total_and_the_largest() -> None:
    class Plan:
        argument_size_in_bytes = output_size_in_bytes = temp_size_in_bytes = 2e6
        alias_size_in_bytes = 1e6

    class Program:
        as_text = staticmethod(lambda: PROGRAM)
        memory_analysis = staticmethod(Plan)

    first, *kinds, largest = gpu_traffic.report(Program(), shown=1).splitlines()
    assert first.startswith("0 MB in 3 kernels")
    assert first.endswith("memory by XLA's plan 5 MB")
    assert [kind.split()[1] for kind in kinds] == ["gemm", "compare", "loop_negate_fusion"]
    assert "gemm: (bf16[1000,4], u8[2000]) of f32[1000,8], bf16[8,4]" in largest


def test_it_needs_the_plugin_but_no_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the plugin is installed or not, what is printed says it."""
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):  # which it sets
        monkeypatch.setenv(name, os.environ[name])
    code = gpu_traffic.main(["--arch=lenet5", "--image_size=32", "--batch_size=2"])
    printed = capsys.readouterr()
    if code:
        assert printed.err == 'no plugin for NVIDIA\'s GPUs; pip install -e ".[cuda]"\n'
    else:
        assert "MB in" in printed.out

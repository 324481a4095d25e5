"""What a device computes fast, asked in one place."""

import pytest
import torch

import common
from optim import orthogonal


@pytest.mark.parametrize(
    "units, limit, fast",
    [
        (False, None, False),
        (True, None, True),
        (True, "AVX2", False),
        (True, "AVX512_CORE", False),
        (True, "AVX512_CORE_BF16", True),
        (True, "default", True),
        (True, "not a name", True),                      # oneDNN ignores it
    ],
)
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_native_bfloat16(monkeypatch, units, limit, fast, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units, "amx_bf16": False})
    for each in common.ONEDNN_LIMIT:
        monkeypatch.delenv(each, raising=False)
    if limit:
        monkeypatch.setenv(name, limit)
    assert common.fast_bfloat16("cpu") is fast


def test_muon_multiplies_in_float32_on_a_cpu():
    seen = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.update(part.dtype for part in args if isinstance(part, torch.Tensor))
            return function(*args, **(kwargs or {}))

    with Watch():
        orthogonal(torch.randn(2, 8, 16))
    assert seen == {torch.float32}

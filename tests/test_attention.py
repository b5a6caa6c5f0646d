"""Attention keeps one dtype where a GPU's autocast would make two of it."""

import pytest
import torch
import torch.nn.functional as F

from mogan.models.attention import RMSNorm


@pytest.fixture
def norms_in_fp32():
    """Autocast of a CPU that computes norms in fp32, as that of CUDA does since torch 2.12."""
    library = torch.library.Library("aten", "IMPL")

    def in_fp32(x, shape, weight=None, eps=None):
        with torch.autocast("cpu", enabled=False):
            return F.rms_norm(x.float(), shape, None if weight is None else weight.float(), eps)

    library.impl("rms_norm", in_fp32, "AutocastCPU")
    yield
    library._destroy()


def test_queries_and_keys_have_the_dtype_of_values(norms_in_fp32):
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    stock, ours = torch.nn.RMSNorm(8), RMSNorm(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert stock(x).dtype == torch.float32  # what this is a guard against
        assert ours(x).dtype == torch.bfloat16
        assert ours(x.float()).dtype == torch.float32
    assert torch.equal(ours(x), F.rms_norm(x, (8,), ours.weight.bfloat16(), ours.eps))

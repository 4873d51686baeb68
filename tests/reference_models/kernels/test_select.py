"""The configuration alone selects the kernels."""

import inspect

import pytest
import torch

from geodiag.reference_models.kernels.select import REFERENCE, select


def test_auto_is_the_reference_without_a_gpu_and_triton_with_one():
    assert select("auto", torch.device("cpu")) is REFERENCE
    assert select("reference", torch.device("cuda")) is REFERENCE
    assert select("auto", torch.device("cuda")) == select("triton", torch.device("cpu"))
    assert select("triton", torch.device("cuda")) != REFERENCE


@pytest.mark.parametrize("name", REFERENCE._fields)
def test_both_implementations_have_one_signature(name):
    triton, reference = (
        getattr(ops, name) for ops in (select("triton", torch.device("cuda")), REFERENCE)
    )
    assert str(inspect.signature(triton)) == str(inspect.signature(reference))

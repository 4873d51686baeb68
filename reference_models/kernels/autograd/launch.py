"""Helpers of the launchers: sizes, properties of the device, tile descriptors, argument checks."""

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

STREAMS = (1, 2, 4, 8)
"""Numbers of streams that the kernels take: loops over N are unrolled, tiles are powers of two."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def padded(k: int) -> int:
    """Return the columns of a matrix product for `k` coefficients and Σx²: at least 16."""
    return max(power_of_two(k + 1), 16)


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors; 4 for the interpreter, where a program costs 1 ms."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 4
    )


def two_parts(x: Tensor) -> bool:
    """Whether φ enters the matrix product with the stream as two bfloat16 parts.

    Triton's interpreter multiplies the bit patterns of bfloat16, so it gets the product in float32.
    """
    return x.dtype == torch.bfloat16 and x.is_cuda


def has_copy_engine(device: torch.device) -> bool:
    """Whether the device has a copy engine for tiles (TMA): Hopper or later."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 9


def copies_tiles(*tensors: Tensor | None) -> bool:
    """Whether the copy engine takes these contiguous tensors: rows start at 16-byte addresses."""
    given = [t for t in tensors if t is not None]
    aligned = all(t.data_ptr() % 16 == 0 and t.shape[-1] * t.itemsize % 16 == 0 for t in given)
    return aligned and has_copy_engine(given[0].device)


def tiles(tensor: Tensor | None, block: tuple[int, int] | None) -> Any:
    """Return a descriptor of (T, rest) in blocks; without a block, the tensor itself."""
    if tensor is None or block is None:
        return tensor
    return TensorDescriptor.from_tensor(tensor.view(tensor.shape[0], -1), list(block))


def floats(like: Tensor, *shape: int) -> Tensor:
    """Return an uninitialised float32 tensor on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def check_streams(x_TNC: Tensor) -> tuple[int, int, int]:
    """Return (T, N, C) of streams with any leading shape.

    Raises ValueError or TypeError for streams that the kernels do not take.
    """
    n, c = x_TNC.shape[-2:]
    if n not in STREAMS:
        raise ValueError(
            f"the Triton kernels take {STREAMS} streams, not {n}; use kernels='reference'"
        )
    if x_TNC.dtype not in FLOATS:
        raise TypeError(f"the Triton kernels take bfloat16, float16 or float32, not {x_TNC.dtype}")
    return x_TNC.numel() // max(n * c, 1), n, c


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor has this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")

"""What every kernel's launch needs: tile sizes, the machine's width, and argument checks that name
the fix.
"""

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Streams the kernels are compiled for; their loops over N are unrolled, and tiles need powers of
# two.
STREAMS = (1, 2, 4, 8)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def padded(k: int) -> int:
    """Columns that `k` coefficients and one number more take in a matrix product."""
    return max(power_of_two(k + 1), 16)


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a small number for the interpreter, where each program costs a
    millisecond.
    """
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 4
    )


def two_parts(x: Tensor) -> bool:
    """Whether a float32 factor of the stream goes into the matrix product as two bfloat16 parts.

    Triton's interpreter multiplies the bit patterns of bfloat16, so there the product is taken in
    float32.
    """
    return x.dtype == torch.bfloat16 and x.is_cuda


def has_copy_engine(device: torch.device) -> bool:
    """Whether the device copies tiles by itself (TMA): Hopper or later."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 9


def copies_tiles(*tensors: Tensor | None) -> bool:
    """Whether these contiguous tensors can be copied by tiles: rows that begin at multiples of 16
    bytes.
    """
    given = [t for t in tensors if t is not None]
    aligned = all(t.data_ptr() % 16 == 0 and t.shape[-1] * t.itemsize % 16 == 0 for t in given)
    return aligned and has_copy_engine(given[0].device)


def tiles(tensor: Tensor | None, block: tuple[int, int] | None) -> Any:
    """What a kernel takes: a descriptor of (T, the rest) by blocks, or without a block the tensor
    as it is.
    """
    if tensor is None or block is None:
        return tensor
    return TensorDescriptor.from_tensor(tensor.view(tensor.shape[0], -1), list(block))


def floats(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32 on the same device."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def check_streams(x_TNC: Tensor) -> tuple[int, int, int]:
    """(T, N, C) of a stream of any leading shape. ValueError or TypeError where no kernel can serve
    it.
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
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")

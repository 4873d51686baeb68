"""Configuration of a reference model: one frozen dataclass, and the named sizes."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from geodiag.reference_models.kernels import Kernels

Residual = Literal["plain", "hc", "mhc"]
Order = Literal["columns-first", "rows-first"]
DType = Literal["float32", "bfloat16"]
Recompute = Literal["none", "mhc", "layers"]

_COUNTS = (
    "vocab",
    "layers",
    "channels",
    "heads",
    "head_dim",
    "sequence",
    "expert_dim",
    "streams",
    "sinkhorn_iterations",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only mixture-of-experts transformer with hyper-connections."""

    vocab: int = 256
    layers: int = 6
    channels: int = 64
    heads: int = 4
    head_dim: int = 16
    sequence: int = 128
    """Tokens in a training sequence; also the longest one RoPE is laid out for."""

    experts: int = 8
    experts_per_token: int = 2
    shared_experts: int = 1
    expert_dim: int = 64
    hash_layers: int = 1
    """Number of first layers that choose experts by a fixed hash of the token id."""
    routed_scale: float = 1.5
    balance_speed: float = 1e-3
    """Step of the aux-loss-free balancing bias (arXiv 2408.15664)."""
    balance_weight: float = 1e-4
    """Weight of the sequence-wise balance loss (arXiv 2412.19437)."""
    swiglu_limit: float | None = 10.0
    """Clamp of the SwiGLU pre-activations; None for none (arXiv 2606.19348)."""

    residual: Residual = "mhc"
    streams: int = 4
    sinkhorn_iterations: int = 20
    sinkhorn_order: Order = "columns-first"
    """Which side Sinkhorn-Knopp normalises first; the other is exact at the end."""
    hc_eps: float = 1e-6
    alpha_init: float = 0.01

    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: DType = "float32"
    """Type of the residual stream and the matrices; coefficients and routing stay float32."""
    kernels: Kernels = "auto"
    recompute: Recompute = "none"
    """What is not kept but computed again in the backward: nothing, the hyper-connections, or whole
    layers.
    """

    def __post_init__(self) -> None:
        choices = {
            "residual": Residual,
            "sinkhorn_order": Order,
            "dtype": DType,
            "kernels": Kernels,
            "recompute": Recompute,
        }
        for name, kind in choices.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name} is one of {', '.join(get_args(kind))}, not {value!r}")
        for name in _COUNTS:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is at least 1, not {value}")
        if self.residual == "plain" and self.streams != 1:
            raise ValueError(f"residual 'plain' has one stream, not {self.streams}; pass streams=1")
        if not 1 <= self.experts_per_token < self.experts:
            raise ValueError(
                f"experts_per_token is 1 to {self.experts - 1}, not {self.experts_per_token}"
            )
        if not 0 <= self.hash_layers <= self.layers:
            raise ValueError(f"hash_layers is 0 to {self.layers}, not {self.hash_layers}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, not {self.head_dim}")
        for name in ("channels", "expert_dim"):
            # The grouped matmul needs rows of a multiple of 16 bytes.
            if (value := getattr(self, name)) % (unit := 4 if self.dtype == "float32" else 8):
                raise ValueError(f"{name} is a multiple of {unit} in {self.dtype}, not {value}")
        if self.shared_experts < 0:
            raise ValueError(f"shared_experts is 0 or more, not {self.shared_experts}")
        if self.swiglu_limit is not None and not self.swiglu_limit > 0:
            raise ValueError(f"swiglu_limit is positive or None, not {self.swiglu_limit}")


TINY = ModelConfig()
SMALL = ModelConfig(
    layers=10,
    channels=512,
    heads=8,
    head_dim=64,
    sequence=1024,
    experts=16,
    expert_dim=384,
    hash_layers=1,
)


def _table5(layers: int, channels: int, experts: int, expert_dim: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab=129_280,
        layers=layers,
        channels=channels,
        heads=heads,
        head_dim=128,
        sequence=4096,
        experts=experts,
        experts_per_token=6,
        shared_experts=2,
        expert_dim=expert_dim,
        dtype="bfloat16",
        recompute="layers",
    )


SIZES: dict[str, ModelConfig] = {
    "tiny": TINY,
    "small": SMALL,
    "3b": _table5(12, 1280, 64, 896, 16),
    "9b": _table5(18, 1920, 64, 1280, 24),
    "27b": _table5(30, 2560, 72, 1536, 32),
}
"""`tiny` trains on two CPU cores, `small` has about 100 M parameters, the others are the sizes of
arXiv 2512.24880, Table 5.
"""


def sized(size: str, residual: Residual = "mhc", **changes: object) -> ModelConfig:
    """Return the config of a named size with one residual kind.

    Raises ValueError for an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; one of {', '.join(SIZES)}")
    streams = 1 if residual == "plain" else SIZES[size].streams
    return replace(SIZES[size], residual=residual, streams=streams, **changes)  # type: ignore[arg-type]

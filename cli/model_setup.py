"""Device, data, configuration and model of a training of a reference model, made from its options.

Each function raises GeodiagError where the user can fix what is wrong.
"""

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from geodiag.cli.train_options import Options
from geodiag.errors import GeodiagError

if TYPE_CHECKING:
    import torch

    from geodiag.reference_models.config import ModelConfig
    from geodiag.reference_models.data import Loader
    from geodiag.reference_models.text import Corpus
    from geodiag.reference_models.train import TrainConfig
    from geodiag.reference_models.transformer import Transformer

_COPIES_OF_WEIGHTS = 3
"""Weight, gradient and momentum: the least memory that a parameter takes while it trains."""


class Setup(NamedTuple):
    """What is trained, how, and on which data."""

    model: "ModelConfig"
    train: "TrainConfig"
    corpus: "Corpus"


def find_device(name: str) -> "torch.device":
    """Return the device, after a test allocation on it."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        why = str(e).splitlines()[0].split(" device type at start of device string")[0].rstrip(".")
        raise GeodiagError(f"no device {name!r} here ({why}); pass --device cpu") from None
    return device


def configure(options: Options, sequences: int, device: "torch.device") -> Setup:
    """Return the configuration for `device` with `sequences` sequences a step on this rank."""
    if options.kernels == "triton" and device.type != "cuda":
        raise GeodiagError(
            f"Triton kernels need a GPU, and this is {device}; pass --kernels reference"
        )
    try:
        return _configure(options, sequences, device)
    except FileNotFoundError as e:
        raise GeodiagError(str(e)) from None
    except OSError as e:
        what = f"{e.filename or options.data}: {e.strerror}"
        raise GeodiagError(f"cannot read {what}; pass data you may read") from None
    except ValueError as e:
        raise GeodiagError(str(e)) from None


def _configure(options: Options, sequences: int, device: "torch.device") -> Setup:
    from geodiag.reference_models.config import sized
    from geodiag.reference_models.text import open_corpus
    from geodiag.reference_models.train import TrainConfig

    corpus = open_corpus(options.data)
    model = sized(
        options.size, options.residual, swiglu_limit=options.clamp, kernels=options.kernels
    )
    model = replace(
        model,
        vocab=max(model.vocab, corpus.vocab),
        recompute=options.recompute or model.recompute,
        dtype=model.dtype if device.type == "cuda" else "float32",
    )
    train = TrainConfig(
        steps=options.steps,
        sequences=sequences,
        micro_batches=options.micro_batches,
        lr=TrainConfig.lr if options.lr is None else options.lr,
        deterministic=options.deterministic,
    )
    return Setup(model, train, corpus)


def build_model(config: "ModelConfig", device: "torch.device") -> "Transformer":
    """Return the model on `device`, if the memory there can hold it while it trains."""
    import torch

    from geodiag.reference_models.transformer import Transformer

    with torch.device("meta"):
        weights = sum(p.numel() * p.element_size() for p in Transformer(config).parameters())
    needed = _COPIES_OF_WEIGHTS * weights
    available = device_memory(device)
    if needed > available:
        sizes = f"{needed / 1e9:,.0f} GB for weights, gradients and optimizer"
        raise GeodiagError(
            f"the model needs {sizes}, and {device} has {available / 1e9:,.0f}; "
            "pass a smaller --size"
        )
    try:
        with device:
            return Transformer(config)
    except torch.OutOfMemoryError:
        raise GeodiagError(f"the model does not fit on {device}; pass a smaller --size") from None


def device_memory(device: "torch.device") -> float:
    """Return the total memory of the device in bytes; infinity where it is unknown."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    known = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(getattr(os, "sysconf_names", ()))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else float("inf")


def build_loader(corpus: Any, options: Options, sequence: int) -> "Loader":
    """Return the loader of all ranks' sequences, `sequence` tokens each."""
    from geodiag.reference_models.data import Loader

    try:
        return Loader(corpus, options.sequences, sequence, options.seed)
    except ValueError as e:
        raise GeodiagError(f"{options.data}: {e}") from None

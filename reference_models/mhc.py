"""Hyper-connections: how a site reads from the residual streams and writes back to them."""

import math

import torch
from torch import Tensor, nn

from geodiag.reference_models.config import ModelConfig
from geodiag.reference_models.kernels import Kernels, reference
from geodiag.reference_models.kernels.reference import Mix, Projected, Written
from geodiag.reference_models.kernels.select import select


class HyperConnection(nn.Module):
    """One site's maps, `mhc` (doubly stochastic H_res) or `hc` (unconstrained).

    `forward` returns them with the block's input. `write` applies them to the streams; it is a
    module of its own, so that a hook can record its output.
    """

    def __init__(self, config: ModelConfig, site: int) -> None:
        super().__init__()
        n, c = config.streams, config.channels
        self.config, self.site = config, site
        self.flag: Tensor | None = None
        """An integer on the device, set by a monitor: kernels measure maps while it is not 0."""
        self.write = Write(config.kernels)
        wide = config.residual == "mhc"
        self.phi = nn.Parameter(torch.empty((n * c, n * n + 2 * n) if wide else (c, n + 2)))
        self.alpha = nn.Parameter(torch.empty(3))
        self.bias = nn.Parameter(torch.empty(n * n + 2 * n))

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise near the plain residual.

        The block reads mostly stream `site mod N` and writes to all; H_res is near the identity.
        """
        n = self.config.streams
        nn.init.normal_(self.phi, std=self.config.init_std)
        nn.init.constant_(self.alpha, self.config.alpha_init)
        read, keep = torch.eye(n)[self.site % n], torch.eye(n).flatten()
        if self.config.residual == "hc":
            start = torch.cat([read, torch.ones(n), keep])
        else:
            # sigmoid(±2) reads mostly one stream; exp(3) to 1 keeps 87 % of a stream in place.
            start = torch.cat([4 * read - 2, torch.zeros(n), 3 * keep])
        self.bias.copy_(start)

    @property
    def next_phi(self) -> Tensor | None:
        """φ by which the previous site may project this site's streams; None if it is sharded.

        A sharded φ is gathered only when its own module runs.
        """
        # Not `isinstance(…, DTensor)`: torch.distributed need not be available.
        sharded = hasattr(self.phi, "full_tensor")
        return None if self.config.residual == "hc" or sharded else self.phi

    def forward(self, x_BSNC: Tensor, projected: Projected | None = None) -> Mix:
        c = self.config
        if c.residual == "hc":
            return reference.hc_pre(x_BSNC, self.phi, self.alpha, self.bias, c.norm_eps)
        return select(c.kernels, x_BSNC.device).site_pre(
            x_BSNC,
            self.phi,
            self.alpha,
            self.bias,
            c.sinkhorn_iterations,
            c.hc_eps,
            c.norm_eps,
            c.sinkhorn_order,
            self.flag,
            projected,
        )


class PlainResidual(nn.Module):
    """One stream, x + f(x): the identity map, with nothing to measure."""

    next_phi = None

    def __init__(self) -> None:
        super().__init__()
        self.write = Write()

    def forward(self, x_BS1C: Tensor, projected: Projected | None = None) -> Mix:
        return Mix(x_BS1C.squeeze(-2), None, None, None, None)


class Write(nn.Module):
    """The streams after the site: X' = H_res X + H_postᵀ f (arXiv 2512.24880 eq. 3)."""

    def __init__(self, kernels: Kernels = "reference") -> None:
        super().__init__()
        self.kernels = kernels
        self.flag: Tensor | None = None
        """An integer on the device, set by a monitor: kernels measure streams while it is not 0."""

    def forward(
        self, x_BSNC: Tensor, branch_BSC: Tensor, mix: Mix, next_phi: Tensor | None = None
    ) -> Written:
        """Return the new streams. With `next_phi`, kernels also project them for the next site."""
        if mix.res_TNN is None or mix.post_TN is None:
            return Written(x_BSNC + branch_BSC.unsqueeze(-2))
        return select(self.kernels, x_BSNC.device).site_post(
            x_BSNC, branch_BSC, mix, self.flag, next_phi
        )


class ReadOut(nn.Module):
    """The learned sum of the streams that the head reads; with one stream, the stream itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        n, c = config.streams, config.channels
        if n > 1:
            self.phi = nn.Parameter(torch.empty(n * c, n))
            self.alpha = nn.Parameter(torch.empty(1))
            self.bias = nn.Parameter(torch.empty(n))

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise as the mean of the streams."""
        n = self.config.streams
        if n > 1:
            nn.init.normal_(self.phi, std=self.config.init_std)
            nn.init.constant_(self.alpha, self.config.alpha_init)
            nn.init.constant_(self.bias, -math.log(n - 1))

    def forward(self, x_BSNC: Tensor) -> Tensor:
        if self.config.streams == 1:
            return x_BSNC.squeeze(-2)
        c = self.config
        return select(c.kernels, x_BSNC.device).read_out(
            x_BSNC, self.phi, self.alpha, self.bias, c.hc_eps, c.norm_eps
        )

"""Parameters, gradients and their averages as flat buffers: an optimiser step of a dozen kernels.

The model computes in its own dtype; master weights, moments and the moving average are FP32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arrcoc.demo.training.recipe import Recipe


class FlatAdam:
    """AdamW over one flat buffer, with a moving average of the weights.

    Attributes:
        parameters: the model's, matrices first; their data and gradients are views of the flat buffers.
        master: fp32 [P].
        average: fp32 [P], exponential moving average of `master`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], recipe: Recipe, world: int) -> None:
        """Args: what is trained, all of one dtype and on one device; the recipe; number of processes."""
        given = list(parameters)
        matrices = [p for p in given if p.dim() > 1]
        self.parameters = [*matrices, *(p for p in given if p.dim() <= 1)]
        self.recipe, self._world = recipe, world
        split = sum(p.numel() for p in matrices)
        with torch.no_grad():
            self._values = torch.cat([p.detach().flatten() for p in self.parameters])
            self.master = self._values.float().clone()
            self.average = self.master.clone()
            self._grads = torch.zeros_like(self._values)
        for parameter, value, grad in zip(
            self.parameters, self.unflatten(self._values), self.unflatten(self._grads), strict=True
        ):
            parameter.data, parameter.grad = value, grad
        halves = [nn.Parameter(self.master[:split]), nn.Parameter(self.master[split:])]
        self._halves = [half for half in halves if half.numel()]
        groups = [
            {"params": [half], "weight_decay": recipe.weight_decay if half is halves[0] else 0.0}
            for half in self._halves
        ]
        fused = self.master.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=fused)

    def step(self, number: int) -> Tensor:
        """Share gradients, clip, update, clear; returns the gradient's norm before clipping.

        A step whose gradient is not finite counts as one of zero gradient, without asking the device.
        """
        wide = self._grads.float()
        if self._world > 1:
            dist.all_reduce(wide, op=dist.ReduceOp.AVG)
        norm: Tensor = torch.linalg.vector_norm(wide)
        factor = (self.recipe.clip / (norm + 1e-6)).clamp(max=1.0)
        wide = torch.where(torch.isfinite(norm), wide * factor, 0.0)
        start = 0
        for half in self._halves:
            half.grad = wide[start : start + half.numel()]
            start += half.numel()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(number)
        self.optimizer.step()
        self._publish()
        self._grads.zero_()
        decay = min(self.recipe.average, (1 + number) / (10 + number))
        self.average.lerp_(self.master, 1 - decay)
        return norm

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"master": self.master, "average": self.average, "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        with torch.no_grad():
            self.master.copy_(state["master"])
            self.average.copy_(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._publish()

    def unflatten(self, flat: Tensor) -> Sequence[Tensor]:
        """Views of a flat buffer, in the shapes of `parameters`."""
        sizes = [p.numel() for p in self.parameters]
        pieces = torch.split(flat, sizes)
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    @torch.no_grad()
    def _publish(self) -> None:
        self._values.copy_(self.master)

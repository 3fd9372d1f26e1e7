"""Frozen linears on a CPU: oneDNN's packed product where it applies, with the one gradient that training needs.

For the few rows of a decode step the packed product is 1.6 times as fast as `F.linear` on a layer of SmolLM2 and four
times on its head (fp32, 8 rows, two AVX2 cores), and never slower on long ones. The dense weight is not kept beside it.
A call costs 40 us whatever it multiplies, so linears that read one input are multiplied as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows that the packing is tuned for; any number is computed.
PACKED_FOR_ROWS = 8


@dataclass(frozen=True, slots=True)
class Weight:
    """What a linear is made of: `[O, I]` and `[O]` on the CPU in the compute dtype, and what it was unpacked from."""

    dense: Tensor
    bias: Tensor | None
    nf4: Any = None  # bitsandbytes' 4-bit parameter
    is_tied: bool = False  # to the embeddings: dense stays in memory whether or not it is packed


class _PackedProduct(torch.autograd.Function):
    """y = x W^T + bias on a packed W, differentiable by x alone: the base is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: _Stack) -> Tensor:
        ctx.stack = stack
        return stack.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Both sides turned over: for the 32 to 128 rows of a quantum a fifth faster than grads[0] @ W.
        return (ctx.stack.dense().t() @ grads[0].t()).t(), None


class _Stack:
    """The weights of linears that read one input, one below the other.

    The first that is asked about an input multiplies for all, the others take their part of that: an input is known by
    being the same object, which it is while it is held here, and it is let go of when all have had theirs.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        own = [w.dense.detach() for w in weights]
        dense = own[0].contiguous() if len(own) == 1 else torch.cat(own)
        self.out_features, self.in_features = dense.shape
        self.dtype = dense.dtype
        self.sizes = [w.dense.shape[0] for w in weights]
        self.is_packed = dense.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(dense, PACKED_FOR_ROWS) if self.is_packed else dense
        self._tied = dense if len(weights) == 1 and weights[0].is_tied else None
        self._bias = None
        if any(w.bias is not None for w in weights):
            biases = [dense.new_zeros(len(w.dense)) if w.bias is None else w.bias.detach() for w in weights]
            self._bias = torch.cat(biases)
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def dense(self) -> Tensor:
        """[O, I] of all; unpacked anew at each call, unless it is there anyway."""
        if self._tied is not None:
            return self._tied
        return self._weight.to_dense() if self.is_packed else self._weight

    def product(self, rows: Tensor) -> Tensor:
        """rows `[N, I]` -> `[N, O]` by the packed weight."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return out

    def part(self, number: int, x: Tensor) -> Tensor:
        """x `[..., I]` times linear `number`."""
        if len(self.sizes) == 1:
            return self._multiply(x)
        if self._input is not x or number not in self._parts:
            self._input = x
            self._parts = dict(enumerate(torch.split(self._multiply(x), self.sizes, -1)))
        out = self._parts.pop(number)
        if not self._parts:
            self._input = None
        return out

    def _multiply(self, x: Tensor) -> Tensor:
        if not self.is_packed:
            return F.linear(x, self._weight, self._bias)
        rows = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _PackedProduct.apply(rows, self)  # type: ignore[no-untyped-call]
        else:
            out = self.product(rows)
        return out.view(*x.shape[:-1], self.out_features)


class FrozenLinear(nn.Module):
    """A linear whose weight never changes; made by `freeze`. Engine thread only."""

    def __init__(self, stack: _Stack, number: int, weight: Weight) -> None:
        super().__init__()
        self.in_features, self.out_features = stack.in_features, stack.sizes[number]
        self.bias = None if weight.bias is None else nn.Parameter(weight.bias.detach(), requires_grad=False)
        self._stack = stack  # no module: torch would move, cast and save what it registers
        self._number = number
        self._nf4 = (weight.nf4,)

    @property
    def nf4(self) -> Any:
        """bitsandbytes' 4-bit parameter, the stored truth, never computed on here; None where nothing is quantized."""
        return self._nf4[0]

    @property
    def dense_weight(self) -> Tensor:
        """[O, I]; not to be changed. Mostly unpacked anew at each call."""
        parts: tuple[Tensor, ...] = torch.split(self._stack.dense(), self._stack.sizes)
        return parts[self._number]

    @property
    def num_bytes(self) -> int:
        """Of the weight that is computed on."""
        return self.out_features * self.in_features * self._stack.dtype.itemsize

    def forward(self, x: Tensor) -> Tensor:
        return self._stack.part(self._number, x)


def freeze(weights: Sequence[Weight]) -> list[FrozenLinear]:
    """Linears that are given the very same input object, one after the other, with one product for all of them."""
    stack = _Stack(weights)
    return [FrozenLinear(stack, number, weight) for number, weight in enumerate(weights)]

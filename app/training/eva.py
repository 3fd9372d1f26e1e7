"""The `eva` init: A begins as the directions in which a linear's inputs vary most, on the job's own first examples.

After Paischer et al., "One Initialization to Rule them All" (2024), with the same rank in every linear. B is zero, so
the adapter still begins as the base. Engine thread only; a layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from app.engine.base_model import BaseModel
from app.training.adapter import TrainedAdapter
from app.training.examples import TokenSequence
from app.training.work import Steps, Turn


class _Directions:
    """A `LoraPlan` that adds nothing and looks at the inputs: the first right singular vectors of each linear's."""

    def __init__(self, is_token: Tensor, rank: int) -> None:
        self._is_token, self._rank = is_token, rank
        self.found: dict[int, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def apply(self, linear: int, x: Tensor, y: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:  # q, k and v see the same input, and so do gate and up
            rows = x[self._is_token].float()
            self._last = (x, torch.linalg.svd(rows, full_matrices=False).Vh[: self._rank])
        self.found[linear] = self._last[1]
        return y


@torch.no_grad()
def _set_rows(adapter: TrainedAdapter, found: dict[int, Tensor]) -> None:
    """Fewer tokens than rows leave the last rows as they were drawn."""
    for linear, directions in found.items():
        if linear in adapter.pairs:
            adapter.pairs[linear].a[: len(directions)].copy_(directions)


def start_at_directions(
    base: BaseModel, adapter: TrainedAdapter, sequences: Sequence[TokenSequence], rank: int
) -> Steps[None]:
    """Set the adapter's A from one forward pass of the bare base over `sequences`."""
    width = max(len(sequence.ids) for sequence in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    is_token = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.from_numpy(sequence.ids.astype("int64"))
        is_token[row, : len(sequence.ids)] = True
    ids, is_token = ids.to(base.device), is_token.to(base.device)
    positions = torch.arange(width, device=base.device).expand(len(sequences), width)
    with torch.no_grad():
        hidden, rotary = base.embed_and_rotate(ids, positions)
    for index in range(base.shapes.num_layers):
        directions = _Directions(is_token, rank)
        base.lora.plan = directions
        try:
            with torch.no_grad():
                hidden = base.run_layer(index, hidden, rotary, positions)
        finally:
            base.lora.plan = None  # between quanta the seam belongs to serving
        _set_rows(adapter, directions.found)
        yield Turn()

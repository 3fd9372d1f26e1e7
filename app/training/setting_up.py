"""The beginning of a run: data, adapter and optimizer of a claimed job, from its durable state where there is one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adapters.weights import LoraPair
from app.engine.base_model import BaseModel
from app.training.adapter import MasterPair, TrainedAdapter, new_adapter
from app.training.batching import BatchOrder, ExampleSizes, micro_batches
from app.training.checkpoint import DurableState
from app.training.config import TrainingConfig
from app.training.eva import start_at_directions
from app.training.evaluate import HeldOut
from app.training.examples import Examples
from app.training.optimizer import AdapterOptimizer, RateSchedule
from app.training.progress import Progress
from app.training.publish import parent_of
from app.training.work import Steps
from app.training.workroom import Desk

UNTRAINED_DPO_LOSS = math.log(2)


@dataclass(slots=True, eq=False)
class Trainee:
    """What one job trains and with what. Engine thread only."""

    config: TrainingConfig
    examples: Examples
    sizes: ExampleSizes
    order: BatchOrder
    held_out: HeldOut | None
    regression: HeldOut | None
    adapter: TrainedAdapter
    reference: TrainedAdapter | None  # dpo: where the adapter began; None is the bare base
    optimizer: AdapterOptimizer
    progress: Progress
    best: dict[str, Tensor] = field(default_factory=dict)  # factors at the best validation loss
    is_durable: bool = False  # a state of it is stored

    def factors(self) -> dict[str, Tensor]:
        """The master weights by `<linear's number>.a` and `.b`."""
        return {
            f"{n}.{side}": t for n, pair in self.adapter.pairs.items() for side, t in (("a", pair.a), ("b", pair.b))
        }

    def keep_best(self) -> None:
        self.best = {name: tensor.detach().clone() for name, tensor in self.factors().items()}

    @torch.no_grad()
    def restore(self, durable: DurableState) -> None:
        """Be as `durable` says. Raises ValueError when it is of another adapter."""
        held, saved = self.factors(), durable.part("adapter")
        if {n: t.shape for n, t in held.items()} != {n: t.shape for n, t in saved.items()}:
            raise ValueError("the durable state is of another adapter")
        for name, tensor in held.items():
            tensor.copy_(saved[name])
        self.adapter.clear_gradients()
        self.optimizer.restore(durable.part("optimizer"))
        self.progress = Progress.from_dict(durable.progress)
        device = next(iter(held.values())).device
        self.best = {name: tensor.to(device) for name, tensor in durable.part("best").items()}
        if not self.best and self.progress.best_step == self.progress.step and self.progress.step:
            self.keep_best()
        self.is_durable = True

    def final_adapter(self) -> TrainedAdapter:
        """The best one by validation loss; the last one where nothing was measured."""
        if not self.best:
            return self.adapter
        pairs = {n: MasterPair(self.best[f"{n}.a"], self.best[f"{n}.b"]) for n in self.adapter.pairs}
        return TrainedAdapter(pairs, self.adapter.scaling)

    def exported(self, paths: Sequence[str], *, best: bool) -> dict[str, LoraPair]:
        """Copies of the factors by module path: another thread writes them while training goes on."""
        adapter = self.final_adapter() if best else self.adapter
        return {
            path: LoraPair(pair.a.cpu().clone(), pair.b.cpu().clone(), pair.scaling)
            for path, pair in adapter.exported(paths).items()
        }


def set_up(desk: Desk) -> Steps[Trainee]:
    """Raises DataRefused, StoreError and AdapterRefused of what the job names."""
    room, job, config = desk.room, desk.job, desk.job.config
    assert config is not None, "a queued job has its configuration"
    training = yield from desk.call(room.fine_tuning.prepare, job.tenant, job.spec)
    regression = yield from desk.call(room.fine_tuning.prepare_regression, job.tenant, job.spec)
    start: dict[str, LoraPair] = {}
    parent = parent_of(job)
    if parent is not None:
        start = yield from desk.call(room.output.fetch, parent, desk.scratch)
    adapter = starting_adapter(room.base, config, start)
    reference = fixed_adapter(room.base, start) if start and config.beta is not None else None
    sizes = ExampleSizes.of(training.train)
    order = BatchOrder(sizes.tokens, batch_size=config.batch_size, seed=config.seed)
    schedule = RateSchedule(config.schedule, config.learning_rate, config.warmup_steps, config.total_steps)
    trainee = Trainee(
        config=config,
        examples=training.train,
        sizes=sizes,
        order=order,
        held_out=HeldOut.of(training.valid, beta=config.beta, reference=reference)
        if training.valid is not None
        else None,
        regression=HeldOut.of(regression, beta=config.beta, reference=reference) if regression is not None else None,
        adapter=adapter,
        reference=reference,
        optimizer=AdapterOptimizer(adapter, schedule, max_grad_norm=config.max_grad_norm, kind=config.optimizer),
        progress=Progress(micro_batch_tokens=room.micro_batch_tokens),
    )
    name = job.state.get("name") if job.state is not None else None
    durable = yield from desk.call(desk.states.read_newest, first=name)
    if durable is not None:
        trainee.restore(durable)
    elif config.init == "eva" and not start:
        (first, *_) = micro_batches(order.batch(0), sizes, max_tokens=room.micro_batch_tokens)
        shown = [sequence for position in first for sequence in training.train[position]]
        yield from start_at_directions(room.base, adapter, shown, config.rank)
    return trainee


def starting_adapter(base: BaseModel, config: TrainingConfig, start: Mapping[str, LoraPair]) -> TrainedAdapter:
    """A fresh adapter, or one that begins as `start` and also trains what that leaves alone: other linears and rows
    beyond a smaller rank begin at zero. Another scaling is folded into B."""
    kinds = {path.rsplit(".", 1)[1] for path in start} | set(config.target_modules)
    adapter = new_adapter(base, replace(config, target_modules=tuple(sorted(kinds))))
    index_of = {path: index for index, path in enumerate(base.lora.paths)}
    with torch.no_grad():
        for path, pair in start.items():
            own, rank = adapter.pairs[index_of[path]], pair.a.shape[0]
            own.a[:rank].copy_(pair.a)
            own.b.zero_()
            own.b[:, :rank].copy_(pair.b * (pair.scaling / config.scaling))
    return adapter


def fixed_adapter(base: BaseModel, pairs: Mapping[str, LoraPair]) -> TrainedAdapter:
    """An adapter that is only compared with; each linear's own scaling is folded into its B."""
    index_of = {path: index for index, path in enumerate(base.lora.paths)}
    made = {
        index_of[path]: MasterPair(pair.a.to(base.device), (pair.b * pair.scaling).to(base.device))
        for path, pair in pairs.items()
    }
    return TrainedAdapter(dict(sorted(made.items())), 1.0)

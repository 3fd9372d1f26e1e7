"""One job from claim to published adapter, as a flat generator: set up, steps, measuring, gate, publish.

It yields between micro-steps and while other threads read and write for it (see `work`). Whatever it does can be done
again: a run that is killed at any point and continued elsewhere ends with the same weights and the same one version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, ParamSpec, TypeVar

from adapters.manifest import AdapterManifest
from app.engine.engine import is_out_of_memory
from app.training.batching import micro_batches
from app.training.checkpoint import DurableState, pack
from app.training.ending import judge_adapter, pack_adapter, publish_adapter
from app.training.evaluate import HeldOut, bare_base, measure
from app.training.faults import FAULTS, lasting_error
from app.training.job import JobError, JobNotFound, StaleFence, StepMetrics
from app.training.micro_step import PartResult
from app.training.prepare import DataRefused
from app.training.progress import Progress
from app.training.report import Reporter
from app.training.setting_up import UNTRAINED_DPO_LOSS, Trainee, set_up
from app.training.watchdog import has_diverged
from app.training.work import (
    Compute,
    Interrupted,
    OutOfMemory,
    PauseWanted,
    ReturnWanted,
    Spoiled,
    Steps,
    part_of,
    wait,
)
from app.training.workroom import Desk, JobFailed

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MIN_MICRO_BATCH_TOKENS = 32
# A small validation batch is measured so often in a run, but not more often than every few steps: it costs a third of a
# step of as many examples.
NUM_VALID_POINTS = 20
MIN_STEPS_BETWEEN_VALID = 5
VALID_BATCH = 8  # examples


class Diverged(Exception):
    """Loss or gradients went astray in the last step."""


class JobRun:
    """One claimed job in this process. `steps` is its life; `may_interrupt` says whether it may be thrown into now."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._room = desk, desk.room
        self._claim, self._queue, self._states = desk.claim, desk.queue, desk.states
        self._reporter = Reporter(desk.queue, desk.claim, desk.thread)
        self._trainee: Trainee | None = None
        self._saving: Future[None] | None = None
        self._saved_at = desk.room.clock()
        self.may_interrupt = True
        self.met_fault = False  # one that may pass: the job was given back

    @property
    def tenant(self) -> str:
        return self._desk.job.tenant

    @property
    def progress(self) -> Progress:
        return self._t.progress

    # ---- the main line

    def steps(self) -> Steps[None]:
        """Run the job until it is over, paused or given back."""
        try:
            try:
                yield from self._work()
            finally:
                self.may_interrupt = False
        except JobFailed as failed:
            yield from self._call(self._queue.fail, self._claim, failed.error)
            yield from self._call(self._states.clear)
        except DataRefused as refused:
            refusal = JobError(refused.code, str(refused), refused.param)
            yield from self._call(self._queue.fail, self._claim, refusal, data=refused.findings.to_dict())
        except ReturnWanted:
            yield from self._call(self._queue.release, self._claim, is_told=True)
        except PauseWanted:
            if not (yield from self._call(self._queue.paused, self._claim)):
                yield from self._call(self._queue.release, self._claim)
        except StaleFence:
            yield from self._call(self._drop)
        except FAULTS as exc:
            lasting = lasting_error(exc, self._claim.id)
            extra = {"action": "job_given_back" if lasting is None else "job_failed", "job": self._claim.id}
            logger.warning("a job met a fault", extra=extra, exc_info=exc)
            if lasting is None:
                self.met_fault = True
                yield from self._call(self._queue.release, self._claim)
            else:
                yield from self._call(self._queue.fail, self._claim, lasting)
                yield from self._call(self._states.clear)
        except Exception as exc:
            logger.exception("job failed", extra={"action": "job_failed", "job": self._claim.id})
            if isinstance(exc, OutOfMemory) or is_out_of_memory(exc):
                message = "Memory ran out outside a step. Lower 'lora.rank' or 'training.max_seq_length'."
                yield from self._call(self._queue.fail, self._claim, JobError("out_of_memory", message))
                yield from self._call(self._states.clear)
                return
            message = f"Training failed inside the server ({type(exc).__name__}). Quote {self._claim.id}."
            yield from self._call(self._queue.fail, self._claim, JobError("server_error", message))

    def _work(self) -> Steps[None]:
        self._trainee = yield from set_up(self._desk)
        while True:
            try:
                yield from self._train()
                packed, verdict = yield from judge_adapter(self._desk, self._t)
                break
            except OutOfMemory:
                yield from self._shrink()
            except Spoiled:
                self._t.adapter.clear_gradients()
            except Diverged:
                yield from self._roll_back()
            except Interrupted:
                self.may_interrupt = False
                self._t.adapter.clear_gradients()
                yield from self._save(wait_for_it=True)
                raise
        self.may_interrupt = False
        yield from self._save(wait_for_it=True)
        yield from publish_adapter(self._desk, self._t, packed, verdict)
        yield from self._call(self._states.clear)

    def _train(self) -> Steps[None]:
        t, progress = self._t, self._t.progress
        if progress.base_loss is None and t.held_out is not None:
            yield from self._measure_base(t.held_out)
        if not t.is_durable:
            yield from self._save()
            t.is_durable = True
        while True:
            if progress.settled_step < progress.step:
                yield from self._settle()
            if progress.step >= t.config.total_steps or progress.is_stopped_early:
                break
            yield from self._step()
            if self._room.clock() - self._saved_at >= self._room.state_every_s:
                yield from self._save()
        yield from self._reporter.drain()

    # ---- one step

    def _step(self) -> Steps[None]:
        """One optimizer step: gradients of all its micro-batches, then AdamW."""
        t, progress = self._t, self._t.progress
        positions = t.order.batch(progress.step)
        units = len(positions) if t.config.beta is not None else int(t.sizes.labels[positions].sum())
        t.adapter.clear_gradients()
        results: list[PartResult] = []
        for batch in micro_batches(positions, t.sizes, max_tokens=progress.micro_batch_tokens):
            part = part_of(
                t.adapter,
                t.examples,
                batch,
                weight=1 / units,
                step=progress.step,
                beta=t.config.beta,
                reference=t.reference,
            )
            results.append((yield Compute(part, train=True)))
        loss = sum(result.loss for result in results)
        taken = t.optimizer.step(progress.step)
        if has_diverged(progress, loss, taken.grad_norm, vocab_size=self._room.base.shapes.vocab_size):
            raise Diverged
        progress.step += 1
        progress.trained_tokens += sum(result.num_labels for result in results)
        progress.total_tokens += sum(result.num_tokens for result in results)
        progress.pending = {
            "train_loss": loss,
            "train_mean_token_accuracy": sum(r.num_correct for r in results) / sum(r.num_units for r in results),
            "learning_rate": taken.rate,
            "grad_norm": taken.grad_norm,
        }

    def _settle(self) -> Steps[None]:
        """What follows a step: measure where it is due, report, list a checkpoint, stop early."""
        t, progress = self._t, self._t.progress
        step = progress.step
        is_epoch_end = step % t.order.steps_per_epoch == 0 or step == t.config.total_steps
        metrics = dict(progress.pending)
        if t.held_out is not None:
            metrics |= yield from self._validate(t.held_out, is_epoch_end=is_epoch_end)
        measured = StepMetrics(step=step, **metrics)
        self._reporter.add(measured)
        if is_epoch_end:
            yield from self._reporter.drain()
            yield from self._list_checkpoint(measured)
            yield from self._consider_stopping()
        progress.settled_step, progress.pending = step, {}
        if is_epoch_end:
            yield from self._save()

    def _validate(self, held_out: HeldOut, *, is_epoch_end: bool) -> Steps[dict[str, float]]:
        t, progress = self._t, self._t.progress
        metrics: dict[str, float] = {}
        step, budget = progress.step, progress.micro_batch_tokens
        is_full = is_epoch_end or (t.config.eval_every is not None and step % t.config.eval_every == 0)
        between = max(MIN_STEPS_BETWEEN_VALID, t.config.total_steps // NUM_VALID_POINTS)
        if is_full or step % between == 0 or step == 1:
            few = [(step * VALID_BATCH + i) % len(held_out) for i in range(min(VALID_BATCH, len(held_out)))]
            small = yield from measure(t.adapter, held_out, max_tokens=budget, positions=few)
            metrics |= {"valid_loss": small.loss, "valid_mean_token_accuracy": small.accuracy}
        if is_full:
            full = yield from measure(t.adapter, held_out, max_tokens=budget)
            metrics |= {"full_valid_loss": full.loss, "full_valid_mean_token_accuracy": full.accuracy}
            if progress.best_loss is None or full.loss < progress.best_loss:
                progress.best_loss, progress.best_step = full.loss, step
                t.keep_best()
        return metrics

    def _consider_stopping(self) -> Steps[None]:
        t, progress = self._t, self._t.progress
        if t.held_out is None or progress.best_step is None or progress.step >= t.config.total_steps:
            return
        is_better = progress.best_step > progress.step - t.order.steps_per_epoch
        progress.epochs_without_better = 0 if is_better else progress.epochs_without_better + 1
        patience = t.config.early_stop_patience
        if patience and progress.epochs_without_better >= patience:
            progress.is_stopped_early = True
            message = f"Stopped early at step {progress.step}: {patience} epochs without a better validation loss"
            yield from self._call(self._queue.record_event, self._claim, message)

    def _list_checkpoint(self, measured: StepMetrics) -> Steps[None]:
        """Make the adapter of this moment promptable."""
        packed = yield from pack_adapter(self._desk, self._t, f"step-{measured.step}", best=False)
        yield from self._call(self._room.output.keep, packed)
        self._room.output.warm(packed)
        manifest = asdict(packed.manifest)
        _, dropped = yield from self._call(self._queue.add_checkpoint, self._claim, measured, manifest)
        yield from self._call(self._room.output.drop, [AdapterManifest.from_dict(one.manifest) for one in dropped])

    # ---- when something goes wrong

    def _shrink(self) -> Steps[None]:
        """Memory ran out: halve the micro-batches and make the step again."""
        progress = self._t.progress
        self._t.adapter.clear_gradients()
        if progress.micro_batch_tokens <= MIN_MICRO_BATCH_TOKENS:
            message = (
                f"Memory ran out at step {progress.step + 1} with one example at a time. "
                "Lower 'training.max_seq_length' or 'lora.rank'."
            )
            raise JobFailed("out_of_memory", message)
        progress.micro_batch_tokens //= 2
        message = f"Memory ran out: a micro-batch now holds at most {progress.micro_batch_tokens} tokens"
        yield from self._call(self._queue.record_event, self._claim, message, level="warn")

    def _roll_back(self) -> Steps[None]:
        """Go back to the last good state, once."""
        progress, failed_at = self._t.progress, self._t.progress.step + 1
        if progress.num_rollbacks:
            message = (
                f"The loss went astray at step {failed_at}, again after going back. Lower the learning rate "
                "multiplier, or look for examples that contradict each other."
            )
            raise JobFailed("nan_loss", message)
        if self._saving is not None:
            yield from wait(self._saving)
        durable = yield from self._call(self._states.read_newest, first=self._states.newest)
        if durable is None:
            raise JobFailed(
                "nan_loss", f"The loss went astray at step {failed_at}, and there is no state to go back to."
            )
        self._t.restore(durable)
        self._t.progress.num_rollbacks = 1
        message = f"The loss went astray at step {failed_at}; went back to step {self._t.progress.step}"
        yield from self._call(self._queue.record_event, self._claim, message, level="warn")
        yield from self._save()

    def _drop(self) -> None:
        """The job is no longer ours: another worker's, or over. In the job's thread."""
        logger.info("job dropped", extra={"action": "job_dropped", "job": self._claim.id})
        try:
            is_over = self._room.fine_tuning.jobs.get(self.tenant, self._claim.id).status.is_over
        except JobNotFound:
            is_over = True
        if is_over:
            self._states.clear()

    # ---- durable states

    def _save(self, *, wait_for_it: bool = False) -> Steps[None]:
        """Write a durable state of the last whole step; training goes on meanwhile unless told to wait."""
        if self._saving is not None:
            yield from wait(self._saving)
        t = self._t
        groups: dict[str, Mapping[str, Any]] = {"adapter": t.factors(), "optimizer": t.optimizer.state()}
        if t.best and t.progress.best_step != t.progress.step:
            groups["best"] = t.best
        reports = self._reporter.flush()
        state = yield from pack(t.progress, groups)
        self._saving = self._desk.thread.call(self._write_state, state, reports)
        self._saved_at = self._room.clock()
        if wait_for_it:
            yield from wait(self._saving)

    def _write_state(self, state: DurableState, reports: Sequence[Future[None]]) -> None:
        for report in reports:  # written by now, in this thread; a state must not promise what was not told
            report.result()
        name = self._states.write(state, fence=self._claim.fence)
        self._queue.save_state(self._claim, int(state.progress["step"]), {"name": name})
        self._states.prune(name, fence=self._claim.fence)

    def _measure_base(self, held_out: HeldOut) -> Steps[None]:
        progress = self._t.progress
        if held_out.beta is not None:  # it is its own reference: every margin is zero
            progress.base_loss, progress.base_accuracy = UNTRAINED_DPO_LOSS, 0.0
            return
        base = yield from measure(bare_base(), held_out, max_tokens=progress.micro_batch_tokens)
        progress.base_loss, progress.base_accuracy = base.loss, base.accuracy

    # ---- within

    @property
    def _t(self) -> Trainee:
        assert self._trainee is not None
        return self._trainee

    def _call(self, run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Steps[T]:
        """Run something that blocks in the job's own thread."""
        return (yield from self._desk.call(run, *args, **kwargs))

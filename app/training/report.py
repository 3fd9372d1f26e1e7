"""What a running job tells its owner: step metrics in batches, and the result file at its end."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from app.training.files import RESULT_PURPOSE
from app.training.fine_tuning import FineTuning
from app.training.job import Job, StepMetrics
from app.training.job_thread import JobThread
from app.training.jobs import result_csv
from app.training.work import Steps, wait
from app.training.work_queue import ClaimedJob, WorkQueue


class Reporter:
    """Writes metrics behind the training: a step waits for nobody, and steps that came together are one transaction."""

    def __init__(self, queue: WorkQueue, claim: ClaimedJob, thread: JobThread) -> None:
        self._queue, self._claim, self._thread = queue, claim, thread
        self._waiting: list[StepMetrics] = []
        self._writing: list[Future[None]] = []  # not known to have ended well

    def add(self, metrics: StepMetrics) -> None:
        """Raises what an earlier write raised, such as StaleFence."""
        self._waiting.append(metrics)
        if all(writing.done() for writing in self._writing):
            for writing in self._writing:
                writing.result()
            self._writing.clear()
            self.flush()

    def flush(self) -> Sequence[Future[None]]:
        """Queue what waits in the job's thread; returns every write that may not have ended. Waits for nothing.

        Whatever is queued in that thread afterwards comes after them.
        """
        if self._waiting:
            batch, self._waiting = self._waiting, []
            self._writing.append(self._thread.call(self._queue.record_metrics, self._claim, batch))
        return tuple(self._writing)

    def drain(self) -> Steps[None]:
        """Wait until everything is written."""
        for writing in self.flush():
            yield from wait(writing)
        self._writing.clear()


def write_result_file(fine_tuning: FineTuning, job: Job, scratch: Path) -> str:
    """Keep the job's CSV; returns the file's id. A repeat finds the file of the first time."""
    name = f"{job.id}.csv"
    for file in fine_tuning.files.list(job.tenant, purpose=RESULT_PURPOSE).items:
        if file.filename == name:
            return file.id
    path = scratch / name
    path.write_bytes(result_csv(fine_tuning.jobs.metrics(job.id)))
    return fine_tuning.files.add_result(job.tenant, name, path).id

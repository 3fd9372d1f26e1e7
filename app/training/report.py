"""What a running job tells its owner: step metrics in batches, and the result file at its end."""

from __future__ import annotations

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
        self._writing: Future[None] | None = None

    def add(self, metrics: StepMetrics) -> None:
        """Raises what the last write raised, such as StaleFence."""
        self._waiting.append(metrics)
        if self._writing is None or self._writing.done():
            if self._writing is not None:
                self._writing.result()
            self._write()

    def drain(self) -> Steps[None]:
        """Wait until everything is written."""
        if self._writing is not None:
            yield from wait(self._writing)
        if self._waiting:
            self._write()
            assert self._writing is not None
            yield from wait(self._writing)

    def _write(self) -> None:
        batch, self._waiting = self._waiting, []
        self._writing = self._thread.call(self._queue.record_metrics, self._claim, batch)


def write_result_file(fine_tuning: FineTuning, job: Job, scratch: Path) -> str:
    """Keep the job's CSV; returns the file's id. A repeat finds the file of the first time."""
    name = f"{job.id}.csv"
    for file in fine_tuning.files.list(job.tenant, purpose=RESULT_PURPOSE).items:
        if file.filename == name:
            return file.id
    path = scratch / name
    path.write_bytes(result_csv(fine_tuning.jobs.metrics(job.id)))
    return fine_tuning.files.add_result(job.tenant, name, path).id

"""Which faults of store, disk and database pass, and what a job fails with for those that do not."""

from __future__ import annotations

from adapters.errors import (
    AdapterDigestMismatch,
    AdapterUnavailable,
    LocalDiskFailed,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from app.errors import ServerBusy
from app.training.job import JobError

FAULTS = (StoreError, ServerBusy, AdapterUnavailable)
# Denied and a full disk are the operator's to mend, or another worker's to do better: the job waits for that.
PASSING = (StoreUnavailable, StoreDenied, LocalDiskFailed, ServerBusy, AdapterUnavailable)


class ContentLost(StoreError):
    """The stored content of a file is missing or is not what was uploaded."""


def lasting_error(fault: Exception, job_id: str) -> JobError | None:
    """What a job fails with; None for a fault that may be over when the job is taken up again."""
    if isinstance(fault, PASSING) and not isinstance(fault, AdapterDigestMismatch):
        return None
    if isinstance(fault, ContentLost):
        return JobError("stored_data_lost", f"{fault} Upload it again and make a new job.")
    if isinstance(fault, AdapterDigestMismatch):
        return JobError(
            "stored_data_lost", "The stored adapter to continue from is not what was published. Publish it again."
        )
    return JobError(
        "stored_data_lost", f"Something that the job had stored is missing ({type(fault).__name__}). Quote {job_id}."
    )

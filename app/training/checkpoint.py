"""A job's durable state: everything that a worker needs to go on as if nothing had happened.

Adapter, optimizer and best adapter are tensors in safetensors files; step, counts, measurements and the watchdog's
memory are JSON. The schedule, the order of the data and the dropout masks need nothing of their own: they follow from
(seed, step). A state's files are written under their digests first and its manifest last, so a state is there whole or
not at all; the newest one that verifies wins.

Keys: `tenants/<tenant>/training/<job>/<step>-<fence>/state.json` and `…/tensors.safetensors` beside it. All calls
block; any thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from adapters.errors import ObjectNotFound, ObjectTooLarge
from adapters.manifest import canonical_json, tenant_prefix
from adapters.store import BlobStore
from app.training.progress import Progress
from app.training.work import Steps, Turn

if TYPE_CHECKING:
    from app.training.jobs import JobStore

logger = logging.getLogger(__name__)

SCHEMA = 1
COPY_BYTES = 16 << 20  # at a time: an answer that is being made waits for no more
MAX_MANIFEST_BYTES = 1 << 20
KEEP_STATES = 2  # the newest, and one before it in case that one does not verify
STATE_FILE, TENSORS_FILE = "state.json", "tensors.safetensors"


@dataclass(frozen=True, slots=True)
class DurableState:
    """One moment of a job. `tensors`: "adapter.…", "optimizer.…", "best.…"; immutable copies."""

    progress: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        prefix = f"{name}."
        return {key[len(prefix) :]: tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}


class StateDamaged(Exception):
    """A stored state does not verify."""


class StateStore:
    """The states of one job."""

    def __init__(self, store: BlobStore, tenant: str, job_id: str, *, scratch: Path) -> None:
        self._store, self._scratch = store, scratch
        self.prefix = f"{tenant_prefix(tenant)}training/{job_id}/"
        self.newest: str | None = None  # the state last written or read here

    def write(self, state: DurableState, *, fence: int) -> str:
        """Store a state; returns its directory's name. The manifest is written last: before that nobody sees it."""
        step = int(state.progress["step"])
        name = f"{step:08d}-{fence:06d}"
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix="state-") as directory:
            path = Path(directory) / TENSORS_FILE
            safetensors.torch.save_file(dict(state.tensors), path)
            facts = _facts(path)
            self._store.put(f"{self.prefix}{name}/{TENSORS_FILE}", path)
        body = {"schema": SCHEMA, "progress": dict(state.progress), "tensors": facts}
        sealed = {"body": body, "sha256": hashlib.sha256(canonical_json(body)).hexdigest()}
        self._store.put(f"{self.prefix}{name}/{STATE_FILE}", canonical_json(sealed))
        self.newest = name
        return name

    def read_newest(self, *, first: str | None) -> DurableState | None:
        """The state called `first` (what the job's row says), else the newest one that verifies; None without any.

        States beyond `first` are of a worker that lost the job before it could say so, and are not looked at.
        """
        for name in self._names(up_to=first):
            try:
                state = self._read(name)
                self.newest = name
                return state
            except (StateDamaged, ObjectNotFound, ObjectTooLarge) as exc:
                extra = {"action": "state_damaged", "state": name, "reason": str(exc)}
                logger.warning("a job's state does not verify", extra=extra)
        return None

    def prune(self, newest: str, *, fence: int) -> None:
        """Delete all but the newest states, and what was left half-written by others, of this fence or earlier ones.

        Whoever calls may have lost the job a moment ago: the states of a newer fence are not its to judge.
        """
        ours = [name for name in self._store.list_dirs(self.prefix) if _fence_of(name) <= fence]
        kept = sorted((name for name in ours if name <= newest), reverse=True)[:KEEP_STATES]
        for name in ours:
            if name not in kept:
                self._delete(name)

    def clear(self) -> None:
        """Delete every state: the job is over."""
        for name in self._store.list_dirs(self.prefix):
            self._delete(name)

    def _names(self, up_to: str | None) -> list[str]:
        if up_to is None:
            return []
        return sorted((name for name in self._store.list_dirs(self.prefix) if name <= up_to), reverse=True)

    def _read(self, name: str) -> DurableState:
        try:
            sealed = json.loads(self._store.get(f"{self.prefix}{name}/{STATE_FILE}", max_bytes=MAX_MANIFEST_BYTES))
            body = sealed["body"]
            facts, progress = body["tensors"], body["progress"]
            if body["schema"] != SCHEMA or sealed["sha256"] != hashlib.sha256(canonical_json(body)).hexdigest():
                raise StateDamaged("another schema, or other bytes than were written")
            Progress.from_dict(progress)
        except (ValueError, KeyError, TypeError) as exc:
            raise StateDamaged("unreadable manifest") from exc
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix="state-") as directory:
            path = Path(directory) / TENSORS_FILE
            self._store.download(f"{self.prefix}{name}/{TENSORS_FILE}", path, max_bytes=facts["num_bytes"])
            if _facts(path) != facts:
                raise StateDamaged("other bytes than were written")
            try:
                # A copy in memory: the file goes.
                tensors = {key: tensor.clone() for key, tensor in safetensors.torch.load_file(path).items()}
            except SafetensorError as exc:
                raise StateDamaged("unreadable tensors") from exc
        return DurableState(progress, tensors)

    def _delete(self, name: str) -> None:
        for file in (STATE_FILE, TENSORS_FILE):  # the manifest first: what a crash leaves is no state
            self._store.delete(f"{self.prefix}{name}/{file}")


def _fence_of(name: str) -> int:
    """What is no state's name is of no fence, and nobody's to keep."""
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isascii() and tail.isdigit() else 0


def pack(progress: Progress, groups: Mapping[str, Mapping[str, Tensor]]) -> Steps[DurableState]:
    """A state of copies: training may go on while it is written. Copied by pieces, and others go first in between; the
    job itself must not go on meanwhile."""
    facts, copies, num_bytes = asdict(progress), {}, 0
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            if num_bytes >= COPY_BYTES:
                num_bytes = 0
                yield Turn()
            copies[f"{group}.{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
            num_bytes += tensor.nbytes
    return DurableState(facts, copies)


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "num_bytes": path.stat().st_size}


def sweep_states(jobs: JobStore, store: BlobStore, scratch: Path) -> None:
    """Delete the durable states of jobs that ended while no worker held them: cancelled while paused or queued."""
    for tenant, job_id in jobs.left_states():
        StateStore(store, tenant, job_id, scratch=scratch).clear()
        jobs.forget_state(job_id)

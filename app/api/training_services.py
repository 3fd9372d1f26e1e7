"""What the routes of files, uploads, fine-tuning and webhooks have at hand, and the shapes that their lists share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from app.training.files import FileStore
from app.training.fine_tuning import FineTuning
from app.training.job_rows import Page
from app.training.jobs import JobStore
from app.training.permissions import Permissions
from app.training.uploads import UploadStore
from app.training.webhooks import Webhooks

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TrainingServices:
    """The training side of a server; built once, beside the serving side."""

    fine_tuning: FineTuning
    uploads: UploadStore
    permissions: Permissions
    webhooks: Webhooks
    poll_s: float = 0.5  # how often an event stream looks for news

    @property
    def jobs(self) -> JobStore:
        return self.fine_tuning.jobs

    @property
    def files(self) -> FileStore:
        return self.fine_tuning.files


async def get_training(request: Request) -> TrainingServices:
    training: TrainingServices = request.app.state.training
    return training


TrainingDep = Annotated[TrainingServices, Depends(get_training)]


def list_object(items: Iterable[Mapping[str, Any]], has_more: bool) -> dict[str, Any]:
    data = list(items)
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def page_object(page: Page[T], show: Callable[[T], Mapping[str, Any]]) -> dict[str, Any]:
    return list_object(map(show, page.items), page.has_more)


def seconds(moment: float | None) -> int | None:
    """Unix seconds as the API writes them."""
    return None if moment is None else int(moment)

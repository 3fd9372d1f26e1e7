"""What chat and completions have in common: from a checked body to an admitted generation, and from it to an answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from adapters.errors import AdapterNameInvalid, AdapterNotFound, AdapterRendererMismatch
from adapters.manifest import AdapterManifest
from app.api.context import ApiContext
from app.api.generation import Generation, Plan
from app.api.middleware import RequestFacts
from app.api.rate_headers import rate_headers
from app.api.schemas import GenerationBody
from app.api.services import Services
from app.api.streaming import ChunkFormat, DisconnectWatch, EventStream
from app.errors import ContextLengthExceeded, RequestInvalid
from app.model_names import AdapterName, BaseModelName, FineTunedName, model_not_found, parse_model_name
from app.tenants import Caller, TenantLimits

FINE_TUNED_MODEL = "fine_tuned_model"  # in a manifest's `extra`: the id that training gave the version
INLINE_CHARS = 4096  # shorter prompts are tokenized where they are: a thread hop costs more


class AnswerFormat(ChunkFormat, Protocol):
    """A route's way to write an answer: in chunks, or whole."""

    def whole(self) -> Mapping[str, object]:
        """The answer of a generation that has ended."""


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """What answers a request."""

    adapter: AdapterManifest | None  # None is the base
    shown: str  # its name in the answer, by which it can be asked for again
    is_shared: bool = False  # another tenant's, who lets the caller use it


async def choose_model(context: ApiContext, caller: Caller, model: str) -> ChosenModel:
    """What `model` means now for this caller, who may have been granted another tenant's fine-tuned model.

    Raises ModelNotFound or an AdapterError.
    """
    services = context.services
    name = parse_model_name(model, services.base.id)
    is_shared = isinstance(name, FineTunedName) and name.tenant != caller.tenant
    if is_shared:
        assert isinstance(name, FineTunedName)
        try:
            adapter: AdapterManifest | None = await context.store(find_shared, services, caller.tenant, name)
        except (AdapterNotFound, AdapterNameInvalid):
            raise model_not_found(model) from None
    else:
        adapter = await resolve_model(context, caller, model)
    if adapter is None:
        return ChosenModel(None, services.base.id)
    trained_with = adapter.renderer_digest
    if trained_with is not None and trained_with != services.text.digest:
        raise AdapterRendererMismatch(param="model")
    is_numbered = adapter.version > 0 and not is_shared  # a checkpoint has no version
    return ChosenModel(adapter, adapter.label if is_numbered else model, is_shared)


def find_shared(services: Services, project: str, name: FineTunedName) -> AdapterManifest:
    """Another tenant's model, where its owner granted `project` the use of it. Raises AdapterNotFound."""
    training = services.training
    if training is None or not training.permissions.may_use(project, name.id):
        raise AdapterNotFound()
    known = training.jobs.find_model(name.id)
    if known is None or known.tenant != name.tenant:
        raise AdapterNotFound()
    return find_fine_tuned(services, name)


async def resolve_model(context: ApiContext, caller: Caller, model: str) -> AdapterManifest | None:
    """The caller's own adapter version that `model` means now, None for the base.

    Raises ModelNotFound or an AdapterError.
    """
    services = context.services
    name = parse_model_name(model, services.base.id)
    if isinstance(name, BaseModelName):
        return None
    if name.tenant not in (None, caller.tenant):
        raise model_not_found(model)
    try:
        if isinstance(name, FineTunedName):
            manifest = await context.store(find_fine_tuned, services, name)
            read_ahead(context, manifest.tenant, manifest.name)
            return manifest
        return await resolve_adapter(context, caller.tenant, name)
    except (AdapterNotFound, AdapterNameInvalid):
        raise model_not_found(model) from None


async def resolve_adapter(context: ApiContext, tenant: str, name: AdapterName) -> AdapterManifest:
    """What is known is answered at once; only the rest costs a worker thread and perhaps a look at the store."""
    catalog = context.services.catalog
    read_ahead(context, tenant, name.name, name.selector)
    manifest = catalog.peek(tenant, name.name, name.selector)
    if manifest is not None:
        return manifest
    return await context.store(catalog.resolve, tenant, name.name, name.selector)


def read_ahead(context: ApiContext, tenant: str, name: str, selector: str | None = None) -> None:
    """Have the store looked into for a name in use before a request has to wait for that."""
    catalog = context.services.catalog
    if catalog.is_due(tenant, name):
        context.later(catalog.refresh, tenant, name, selector)


def find_fine_tuned(services: Services, name: FineTunedName) -> AdapterManifest:
    """The version that training published under this id, which its manifest carries, or a checkpoint of a job."""
    catalog = services.catalog
    known = None if services.training is None else services.training.jobs.find_model(name.id)
    if known is not None and known.tenant == name.tenant and known.manifest is not None:
        return AdapterManifest.from_dict(known.manifest)
    if known is not None and known.tenant == name.tenant and known.adapter_version is not None:
        return catalog.resolve(known.tenant, known.adapter_name, f"v{known.adapter_version}")
    for summary in catalog.list(name.tenant):
        for manifest in catalog.versions(name.tenant, summary.name):
            if manifest.extra.get(FINE_TUNED_MODEL) == name.id:
                return manifest
    raise AdapterNotFound()


def deadline_of(request: Request, body: GenerationBody, max_timeout_s: float) -> float:
    """time.monotonic() by which the answer must be complete: the client's wish, never above the server's own."""
    wishes = [max_timeout_s]
    header = request.headers.get("x-request-timeout")
    if header is not None:
        try:
            wish = float(header)
        except ValueError:
            wish = math.nan
        if not (math.isfinite(wish) and wish > 0):
            raise RequestInvalid("X-Request-Timeout is a number of seconds.", param="X-Request-Timeout")
        wishes.append(wish)
    if body.timeout is not None:
        wishes.append(body.timeout)
    return time.monotonic() + min(wishes)


def max_new_tokens(asked: int | None, default: int, num_prompt: int, max_context: int, param: str) -> int:
    """How many tokens may be generated. What the client named must fit; a default shrinks to the room there is."""
    if num_prompt + 1 > max_context:
        raise ContextLengthExceeded(
            f"The prompt has {num_prompt} tokens; the context is {max_context}. Shorten the prompt.",
            param=param,
        )
    room = max_context - num_prompt
    if asked is None:
        return min(default, room)
    if asked > room:
        raise ContextLengthExceeded(
            f"The context is {max_context} tokens; the prompt has {num_prompt} and {asked} more were asked for. "
            "Shorten the prompt or ask for fewer tokens.",
            param=param,
        )
    return asked


async def tokenize(context: ApiContext, call: Callable[[], list[int]], num_chars: int) -> list[int]:
    return call() if num_chars <= INLINE_CHARS else await context.rendering(call)


async def answer(
    request: Request,
    context: ApiContext,
    facts: RequestFacts,
    body: GenerationBody,
    plan: Plan,
    prompts: Sequence[Sequence[int]],
    make_format: Callable[[Generation, str], AnswerFormat],
) -> Response:
    """Submit, wait until the status is known, then answer whole or as a stream. The client's leaving cancels it all."""
    services = context.services
    if plan.adapter is not None:
        facts.adapter, facts.digest = plan.adapter.label, plan.adapter.digest
    limits = await limits_of(context, plan.tenant)
    headers = context.headers_for(plan.adapter) | spend_prompt(context, plan.tenant, limits, prompts)
    generation = Generation(context.client, services.text, plan, prompts, body.num_choices)
    answer_format = make_format(generation, plan.model)
    watch = DisconnectWatch(request.receive, generation.cancel)
    running = ExitStack()  # undone at the end of the answer, which for a stream is after this function's
    running.callback(facts.note_generation, generation)
    running.callback(generation.close)
    running.callback(watch.stop)
    running.enter_context(context.tracking(plan.tenant, generation))
    running.callback(spend_answer, context, plan.tenant, limits, generation)
    with running:
        generation.submit()
        await generation.admitted()
        if body.stream and not watch.has_left:
            return EventStream(
                generation,
                answer_format,
                watch,
                facts,
                headers=headers,
                include_usage=body.include_usage,
                keep_alive_s=services.limits.keep_alive_s,
                on_end=running.pop_all().close,
            )
        if not watch.has_left:
            await generation.finished()
        if watch.has_left:
            facts.client_left()
            return Response(status_code=204)  # to a closed connection
        return JSONResponse(answer_format.whole(), headers=headers)


async def limits_of(context: ApiContext, tenant: str) -> TenantLimits:
    """What holds for a tenant now; no thread is taken while that is known."""
    tenants = context.services.tenants
    known = tenants.peek_limits(tenant)
    return known if known is not None else await context.database(tenants.limits, tenant)


def spend_prompt(
    context: ApiContext, tenant: str, limits: TenantLimits, prompts: Sequence[Sequence[int]]
) -> dict[str, str]:
    """Take the request from the tenant's minute and tell what is left. Raises RateLimited."""
    allowances = context.services.rates.check(
        tenant,
        sum(map(len, prompts)),
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
    )
    return rate_headers(allowances)


def spend_answer(context: ApiContext, tenant: str, limits: TenantLimits, generation: Generation) -> None:
    tokens = generation.usage().completion_tokens
    context.services.rates.spend(tenant, tokens, tokens_per_minute=limits.tokens_per_minute)

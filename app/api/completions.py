"""POST /v1/completions: plain prompts, as text or token ids, one or several, with echo and scoring."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request

from app.api.answering import answer, choose_model, deadline_of, max_new_tokens, tokenize
from app.api.auth import CallerDep
from app.api.chat import finite
from app.api.context import ApiContext, ContextDep, FactsDep
from app.api.generation import Choice, Generation, Plan, ShownToken
from app.api.schemas import CompletionBody
from app.api.services import TextPort
from app.api.streaming import JsonPieces
from app.errors import ContextLengthExceeded, RequestInvalid

router = APIRouter()

DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions", response_model=None)
async def create_completion(
    request: Request, body: CompletionBody, caller: CallerDep, context: ContextDep, facts: FactsDep
) -> object:
    """Continue one or several prompts with the base model or one of the caller's adapters."""
    services, limits = context.services, context.services.limits
    body.check_stream_options()
    body.check_best_of()
    prompts = body.prompts(limits.vocab_size)
    if body.num_choices > limits.max_choices:
        raise RequestInvalid(f"'n' is at most {limits.max_choices}.", param="n")
    if len(prompts) * body.num_choices > limits.max_sequences:
        raise RequestInvalid(f"One request makes at most {limits.max_sequences} answers.", param="prompt")
    deadline = deadline_of(request, body, limits.max_timeout_s)
    chosen = await choose_model(context, caller, body.model)
    ids = [await encode(context, prompt) for prompt in prompts]
    longest = max(map(len, ids))
    asked = body.max_tokens
    if asked == 0 and not body.echo:
        raise RequestInvalid("At least one token must be asked for, unless 'echo' is true.", param="max_tokens")
    max_tokens = max_new_tokens(asked, DEFAULT_MAX_TOKENS, longest, limits.max_context, "prompt")
    sampling = body.sampling(max_tokens=max(max_tokens, 1), logprobs=body.logprobs, vocab_size=limits.vocab_size)
    if body.echo:
        sampling = replace(sampling, prompt_logprobs=body.logprobs)
    plan = Plan(
        tenant=caller.tenant,
        adapter=chosen.adapter,
        model=chosen.shown,
        is_shared=chosen.is_shared,
        sampling=sampling,
        stops=tuple(body.stop or ()),
        deadline=deadline,
        echo=bool(body.echo),
        hides_tokens=asked == 0,
    )
    fingerprint = f"fp_{services.base.digest[:12]}"
    make_format = partial(CompletionFormat, text=services.text, fingerprint=fingerprint, nulls_usage=body.include_usage)
    return await answer(request, context, facts, body, plan, ids, make_format)


async def encode(context: ApiContext, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    try:
        ids = await tokenize(context, partial(context.services.text.encode, prompt), len(prompt))
    except ContextLengthExceeded as exc:
        raise ContextLengthExceeded(exc.message, param="prompt") from None
    if not ids:
        raise RequestInvalid("A prompt needs at least one token.", param="prompt")
    return ids


class CompletionFormat:
    """text_completion objects; chunks have the same shape."""

    def __init__(
        self, generation: Generation, model: str, *, text: TextPort, fingerprint: str, nulls_usage: bool
    ) -> None:
        self._generation = generation
        self._text = text
        self._head: dict[str, object] = {
            "id": f"cmpl-{generation.id}",
            "object": "text_completion",
            "created": generation.created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._pieces = JsonPieces(self._head, nulls_usage=nulls_usage)

    def opening(self, choice: Choice) -> str:
        return ""

    def text(self, choice: Choice, text: str, logprobs: str) -> str:
        return self._chunk(choice, text, logprobs, "null")

    def closing(self, choice: Choice) -> str:
        return self._chunk(choice, '""', "null", f'"{choice.finish_reason}"')

    def usage(self, usage: Mapping[str, object]) -> str:
        return self._pieces.usage(usage)

    def logprobs(self, choice: Choice) -> str:
        if choice.request.sampling.logprobs is None:
            return "null"
        fresh = choice.tokens[choice.sent_tokens :]
        choice.sent_tokens = len(choice.tokens)
        return json.dumps(self._logprobs(fresh))

    def whole(self) -> Mapping[str, object]:
        choices = [
            {
                "index": choice.index,
                "text": choice.text,
                "logprobs": None if choice.request.sampling.logprobs is None else self._logprobs(choice.tokens),
                "finish_reason": choice.finish_reason,
            }
            for choice in self._generation.choices
        ]
        return {**self._head, "choices": choices, "usage": self._generation.usage().to_json()}

    def _chunk(self, choice: Choice, text: str, logprobs: str, reason: str) -> str:
        return self._pieces.chunk(
            f'{{"index":{choice.index},"text":{text},"logprobs":{logprobs},"finish_reason":{reason}}}'
        )

    def _logprobs(self, tokens: list[ShownToken]) -> dict[str, object]:
        """Four parallel lists; the first token of an echoed prompt has no log-probability."""
        tops: list[dict[str, float] | None] = []
        for shown in tokens:
            if shown.logprob is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for token, logprob in ((shown.token, shown.logprob.logprob), *shown.logprob.top):
                # Two tokens may share a spelling (each half of a character): the likelier one keeps the place.
                top.setdefault(self._text.token_text(token), finite(logprob))
            tops.append(top)
        return {
            "tokens": [self._text.token_text(shown.token) for shown in tokens],
            "token_logprobs": [None if shown.logprob is None else finite(shown.logprob.logprob) for shown in tokens],
            "top_logprobs": tops,
            "text_offset": [shown.offset for shown in tokens],
        }

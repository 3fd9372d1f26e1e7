"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

from fastapi import APIRouter, Request

from app.api.answering import answer, choose_model, deadline_of, max_new_tokens, tokenize
from app.api.auth import CallerDep
from app.api.context import ContextDep, FactsDep
from app.api.generation import Choice, Generation, Plan, ShownToken
from app.api.schemas import ChatBody
from app.api.services import TextPort
from app.api.streaming import JsonPieces
from app.errors import RequestInvalid

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(
    request: Request, body: ChatBody, caller: CallerDep, context: ContextDep, facts: FactsDep
) -> object:
    """Answer a conversation with the base model or one of the caller's adapters."""
    services, limits = context.services, context.services.limits
    body.check_stream_options()
    if body.num_choices > limits.max_choices:
        raise RequestInvalid(f"'n' is at most {limits.max_choices}.", param="n")
    num_logprobs = body.num_logprobs
    messages = body.rendered_messages()
    deadline = deadline_of(request, body, limits.max_timeout_s)
    chosen = await choose_model(context, caller, body.model)
    num_chars = sum(len(message["content"]) for message in messages)
    prompt = await tokenize(context, partial(services.text.render_chat, messages), num_chars)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if asked == 0:
        raise RequestInvalid("At least one token must be asked for.", param="max_tokens")
    max_tokens = max_new_tokens(asked, limits.default_max_tokens, len(prompt), limits.max_context, "messages")
    plan = Plan(
        tenant=caller.tenant,
        adapter=chosen.adapter,
        model=chosen.shown,
        is_shared=chosen.is_shared,
        sampling=body.sampling(max_tokens=max_tokens, logprobs=num_logprobs, vocab_size=limits.vocab_size),
        stops=tuple(body.stop or ()),
        deadline=deadline,
    )
    fingerprint = f"fp_{services.base.digest[:12]}"
    make_format = partial(ChatFormat, text=services.text, fingerprint=fingerprint, nulls_usage=body.include_usage)
    return await answer(request, context, facts, body, plan, [prompt], make_format)


class ChatFormat:
    """chat.completion and chat.completion.chunk objects."""

    def __init__(
        self, generation: Generation, model: str, *, text: TextPort, fingerprint: str, nulls_usage: bool
    ) -> None:
        self._generation = generation
        self._text = text
        self._head: dict[str, object] = {
            "id": f"chatcmpl-{generation.id}",
            "object": "chat.completion",
            "created": generation.created,
            "model": model,
            "service_tier": "default",
            "system_fingerprint": fingerprint,
        }
        self._pieces = JsonPieces({**self._head, "object": "chat.completion.chunk"}, nulls_usage=nulls_usage)

    def opening(self, choice: Choice) -> str:
        delta = '{"role":"assistant","content":"","refusal":null}'
        return self._chunk(choice, delta, "null", "null")

    def text(self, choice: Choice, text: str, logprobs: str) -> str:
        return self._chunk(choice, f'{{"content":{text}}}', logprobs, "null")

    def closing(self, choice: Choice) -> str:
        return self._chunk(choice, "{}", "null", f'"{choice.finish_reason}"')

    def usage(self, usage: Mapping[str, object]) -> str:
        return self._pieces.usage(usage)

    def logprobs(self, choice: Choice) -> str:
        if choice.request.sampling.logprobs is None:
            return "null"
        fresh = choice.tokens[choice.sent_tokens :]
        choice.sent_tokens = len(choice.tokens)
        return json.dumps(self._logprobs(fresh))

    def whole(self) -> Mapping[str, object]:
        choices: list[dict[str, object]] = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []},
                "logprobs": None if choice.request.sampling.logprobs is None else self._logprobs(choice.tokens),
                "finish_reason": choice.finish_reason,
            }
            for choice in self._generation.choices
        ]
        return {**self._head, "choices": choices, "usage": self._generation.usage().to_json()}

    def _chunk(self, choice: Choice, delta: str, logprobs: str, reason: str) -> str:
        return self._pieces.chunk(
            f'{{"index":{choice.index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{reason}}}'
        )

    def _logprobs(self, tokens: list[ShownToken]) -> dict[str, object]:
        content: list[dict[str, object]] = []
        for shown in tokens:
            if shown.logprob is not None:
                entry = self._entry(shown.token, shown.logprob.logprob)
                entry["top_logprobs"] = [self._entry(token, logprob) for token, logprob in shown.logprob.top]
                content.append(entry)
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, object]:
        data = self._text.token_bytes(token)
        return {"token": self._text.token_text(token), "logprob": finite(logprob), "bytes": list(data)}


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot happen."""
    return max(logprob, -9999.0)

"""How servers answer a chat completion, well or badly. Each behaviour is tried with the teacher and the reranker.

A behaviour gives the replies to the tries of one request, in order; the last one is repeated. It gets the
reasoning and the answer that the model would write.
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from servers import Reply, completion

SOON = {"Retry-After": "0.01"}


class Behaviour(NamedTuple):
    name: str
    replies: Callable[[str, str], list[Reply]]
    teacher: str
    """What becomes of a page's note."""
    reranker: str
    """What becomes of a ranking."""


NOTE, ORDER = "note", "order and reasoning"


def whole(reasoning: str, answer: str) -> str:
    return f"<think>{reasoning}</think>{answer}"


def good(reasoning: str, answer: str) -> Reply:
    return completion(whole(reasoning, answer))


def error(status: int, message: str, headers: dict[str, str] | None = None, **fields: Any) -> Reply:
    return Reply(status, {"error": {"message": message, **fields}}, headers)


def once(reply: Reply) -> Callable[[str, str], list[Reply]]:
    """The reply, and then a good one."""
    return lambda r, a: [reply, good(r, a)]


def always(reply: Reply) -> Callable[[str, str], list[Reply]]:
    return lambda r, a: [reply]


def says(make: Callable[[str, str], Reply]) -> Callable[[str, str], list[Reply]]:
    return lambda r, a: [make(r, a)]


def with_usage(usage: Any) -> Callable[[str, str], list[Reply]]:
    def reply(r: str, a: str) -> Reply:
        made = good(r, a)
        return made._replace(body={**made.body, "usage": usage})

    return says(reply)


def stream(chunks: list[Any], done: bool = True) -> Reply:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + (["data: [DONE]\n\n"] if done else [])
    return Reply(body=": comment\n\n" + "".join(lines), headers={"Content-Type": "text/event-stream"})


def deltas(r: str, a: str) -> list[Any]:
    pieces: list[Any] = [{"role": "assistant"}, {"reasoning_content": r[:5]}, {"reasoning_content": r[5:]}]
    pieces += [{"content": a[:4]}, {"content": a[4:]}, {}]
    return [{"choices": [{"delta": piece, "finish_reason": None}]} for piece in pieces[:-1]] + [
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}},
    ]


def details(r: str) -> list[dict[str, str]]:
    return [{"type": "reasoning.text", "text": r}, {"type": "reasoning.encrypted", "data": "AAAA"}]


def date_in(seconds: float) -> str:
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


def extra_field(name: str) -> Reply:
    detail = [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}]
    return Reply(422, {"detail": detail})


BEHAVIOURS = [
    # --- where the completion is
    Behaviour("think block in the text", says(good), NOTE, ORDER),
    Behaviour("`reasoning_content`", says(lambda r, a: completion(a, reasoning_content=r)), NOTE, ORDER),
    Behaviour("`reasoning`, text", says(lambda r, a: completion(a, reasoning=r)), NOTE, ORDER),
    Behaviour("`reasoning`, object", says(lambda r, a: completion(a, reasoning={"content": r})), NOTE, ORDER),
    Behaviour("`reasoning_details`", says(lambda r, a: completion(a, reasoning_details=details(r))), NOTE, ORDER),
    Behaviour("`thinking`", says(lambda r, a: completion(a, thinking=r)), NOTE, ORDER),
    Behaviour(
        "parts, one of type thinking",
        says(
            lambda r, a: completion([{"type": "thinking", "thinking": [{"text": r}]}, {"type": "text", "text": a}])
        ),
        NOTE,
        ORDER,
    ),
    Behaviour(
        "parts of type text", says(lambda r, a: completion([{"type": "text", "text": whole(r, a)}])), NOTE, ORDER
    ),
    Behaviour(
        "part of type output_text",
        says(lambda r, a: completion([{"type": "output_text", "text": whole(r, a)}])),
        NOTE,
        ORDER,
    ),
    Behaviour(
        "think block opened by the template", says(lambda r, a: completion(f"{r}</think>\n\n{a}")), NOTE, ORDER
    ),
    Behaviour("all in `reasoning`", says(lambda r, a: completion(None, reasoning=whole(r, a))), NOTE, ORDER),
    Behaviour(
        "all in `reasoning_content`, without the opening tag",
        says(lambda r, a: completion("", reasoning_content=f"{r}</think>{a}")),
        NOTE,
        ORDER,
    ),
    Behaviour(
        "reasoning and no text",
        says(lambda r, a: completion(None, reasoning=r)),
        "dropped: was empty",
        "no answer",
    ),
    Behaviour("empty text", says(lambda r, a: completion("")), "dropped: was empty", "no answer"),
    Behaviour(
        "`choices[0].text`", says(lambda r, a: Reply(body={"choices": [{"text": whole(r, a)}]})), NOTE, ORDER
    ),
    Behaviour(
        "byte order mark", says(lambda r, a: Reply(body="\ufeff" + json.dumps(good(r, a).body))), NOTE, ORDER
    ),
    Behaviour("a stream that nobody asked for", says(lambda r, a: stream(deltas(r, a))), NOTE, ORDER),
    # --- how it ended
    Behaviour("finish_reason null", says(lambda r, a: completion(whole(r, a), None)), NOTE, ORDER),
    Behaviour("finish_reason end_turn", says(lambda r, a: completion(whole(r, a), "end_turn")), NOTE, ORDER),
    Behaviour(
        "cut off in the text",
        says(lambda r, a: completion(whole(r, a)[:-1], "length")),
        "dropped: was cut off",
        "no answer",
    ),
    Behaviour(
        "cut off in separate reasoning",
        says(lambda r, a: completion("", "length", reasoning=r)),
        "dropped: was cut off",
        "no answer",
    ),
    Behaviour(
        "finish_reason MAX_TOKENS",
        says(lambda r, a: completion(r, "MAX_TOKENS")),
        "dropped: was cut off",
        "no answer",
    ),
    Behaviour(
        "`refusal`", says(lambda r, a: completion(None, refusal="I can't.")), "dropped: was a refusal", "no answer"
    ),
    Behaviour(
        "finish_reason content_filter",
        says(lambda r, a: completion("", "content_filter")),
        "dropped: was a refusal",
        "no answer",
    ),
    Behaviour(
        "finish_reason SAFETY",
        says(lambda r, a: completion(None, "SAFETY")),
        "dropped: was a refusal",
        "no answer",
    ),
    Behaviour("finish_reason error, once", once(completion("", "error")), NOTE, ORDER),
    # --- token counts
    Behaviour("no usage", says(good), NOTE, ORDER),
    Behaviour("usage null", with_usage(None), NOTE, ORDER),
    Behaviour(
        "usage with null counts", with_usage({"prompt_tokens": None, "completion_tokens": None}), NOTE, ORDER
    ),
    # --- errors inside a 200
    Behaviour(
        "200 with code 429, once",
        once(Reply(body={"error": {"message": "slow down", "code": 429}}, headers=SOON)),
        NOTE,
        ORDER,
    ),
    Behaviour(
        "200 with an error text, once", once(Reply(body={"error": "overloaded"}, headers=SOON)), NOTE, ORDER
    ),
    Behaviour(
        "200 with an error in the choice, once",
        once(Reply(body={"choices": [{"error": {"message": "upstream", "code": 502}}]}, headers=SOON)),
        NOTE,
        ORDER,
    ),
    Behaviour(
        "200 with code 401",
        always(Reply(body={"error": {"message": "no key", "code": 401}})),
        "run ends: key",
        "stops: no key",
    ),
    Behaviour(
        "200 with type overloaded_error, once",
        once(
            Reply(body={"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, headers=SOON)
        ),
        NOTE,
        ORDER,
    ),
    # --- limits and credit
    Behaviour("429 with Retry-After in seconds, once", once(error(429, "slow", SOON)), NOTE, ORDER),
    Behaviour("429 with retry-after-ms, once", once(error(429, "slow", {"retry-after-ms": "20"})), NOTE, ORDER),
    Behaviour(
        "429 with Retry-After as a date, once", once(error(429, "slow", {"Retry-After": date_in(0)})), NOTE, ORDER
    ),
    Behaviour(
        "429 with the time in its message, once", once(error(429, "Please try again in 20ms.")), NOTE, ORDER
    ),
    Behaviour(
        "429 with Gemini's retryDelay, once",
        once(
            Reply(
                429, [{"error": {"message": "exceeded your current quota", "details": [{"retryDelay": "0.02s"}]}}]
            )
        ),
        NOTE,
        ORDER,
    ),
    Behaviour(
        "429 that asks for an hour",
        always(error(429, "slow", {"Retry-After": "3600"})),
        "run ends: wait",
        "stops: slow",
    ),
    Behaviour(
        "429 insufficient_quota",
        always(error(429, "pay", code="insufficient_quota")),
        "run ends: credit",
        "stops: pay",
    ),
    Behaviour("402", always(error(402, "more credits needed")), "run ends: credit", "stops: more credits"),
    Behaviour(
        "400 credit balance",
        always(error(400, "Your credit balance is too low")),
        "run ends: credit",
        "stops: Your credit",
    ),
    # --- keys and moderation
    Behaviour("401", always(error(401, "bad key")), "run ends: key", "stops: bad key"),
    Behaviour(
        "403 without a sign of moderation", always(error(403, "no access")), "run ends: key", "stops: no access"
    ),
    Behaviour(
        "403 moderation",
        always(error(403, "Input flagged by moderation", code=403)),
        "dropped: refused",
        "no answer",
    ),
    Behaviour(
        "400 content filter inside innererror",
        always(error(400, "bad prompt", innererror={"code": "ResponsibleAIPolicyViolation"})),
        "dropped: refused",
        "no answer",
    ),
    # --- sizes
    Behaviour(
        "400 context length",
        always(error(400, "This model's maximum context length is 8192 tokens")),
        "dropped: too large",
        "stops: maximum context",
    ),
    Behaviour("413", always(error(413, "too big")), "dropped: too large", "stops: too big"),
    # --- failing servers
    Behaviour("500 with a text, once", once(Reply(500, "oops", SOON)), NOTE, ORDER),
    Behaviour("529, once", once(error(529, "overloaded", SOON)), NOTE, ORDER),
    Behaviour("503 for good", always(error(503, "starting", SOON)), "dropped: server failed", "stops: starting"),
    Behaviour("connection closed, once", once(Reply(0)), NOTE, ORDER),
    Behaviour("truncated JSON, once", once(Reply(body='{"choices": [', headers=SOON)), NOTE, ORDER),
    Behaviour("no choices, once", once(Reply(body={"choices": []}, headers=SOON)), NOTE, ORDER),
    Behaviour(
        "HTML page", always(Reply(body="<html>Welcome")), "run ends: no completion", "stops: not a chat completion"
    ),
    Behaviour(
        "stream that ends early, once",
        lambda r, a: [stream(deltas(r, a)[:3], done=False), good(r, a)],
        NOTE,
        ORDER,
    ),
    # --- dialects
    Behaviour(
        "max_completion_tokens or max_tokens refused, once",
        once(error(400, "Unsupported parameter: use 'max_tokens' or 'max_completion_tokens' instead")),
        NOTE,
        ORDER,
    ),
    Behaviour(
        "temperature refused, once",
        once(error(400, "'temperature' does not support 0. Only the default (1) is.", param="temperature")),
        NOTE,
        ORDER,
    ),
    Behaviour("field refused by its schema, once", once(extra_field("temperature")), NOTE, ORDER),
    Behaviour(
        "only streams",
        lambda r, a: [error(400, "This model only supports streaming"), stream(deltas(r, a))],
        NOTE,
        ORDER,
    ),
    # --- wrong addresses
    Behaviour(
        "404 no such model", always(error(404, "no such model")), "run ends: rejected", "stops: no such model"
    ),
    Behaviour(
        "redirect",
        always(Reply(308, "", {"Location": "https://x.example/v1"})),
        "run ends: redirects",
        "stops: redirects",
    ),
]


def table() -> str:
    """The behaviours as a table in Markdown."""
    rows = [f"| {behaviour.name} | {behaviour.teacher} | {behaviour.reranker} |" for behaviour in BEHAVIOURS]
    return "\n".join(["| a server's reply | the teacher | the reranker |", "|---|---|---|", *rows])

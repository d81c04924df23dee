"""Reads the reply of a chat server: where the text, the reasoning and the token counts are.

Servers agree on `choices[0].message`, and differ in the rest. `read_reply` accepts the forms of OpenAI, vLLM,
SGLang, llama.cpp, `transformers serve`, Ollama, OpenRouter, and of Gemini, Claude and Mistral through
OpenAI-compatible endpoints:

| Part | Where it may be |
|---|---|
| text | `content`: a string, or parts of type text or output_text; `text` of a legacy completion |
| reasoning | `reasoning_content`, `reasoning`, `thinking`, `reasoning_details`, or parts of such a type |
| both in one | the text starts with the reasoning, with or without an opening tag; or all is in the reasoning |
| refusal | `refusal`, a part of type refusal, or a finish_reason that names a filter |
| error | a body, a choice or a message with `error`, also with status 200 |
| stream | `data:` lines with `delta` instead of `message` |

A token count that the server does not report is None, not 0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmr5_train.ranking.prompt import ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

FILTERED = ("content_filter", "safety", "recitation", "blocklist", "prohibited_content", "spii", "sensitive")
"""Values of finish_reason, in lower case, that mean that a filter removed the answer."""
CUT_OFF = ("length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded")
REFUSED = ("refusal", "refused")


class NoCompletion(Exception):
    """A reply that is not a chat completion. The message quotes its beginning."""


class ReplyError(Exception):
    """A reply that reports an error, although its status may be 200. `error` is the content of its error field."""

    def __init__(self, error: Any) -> None:
        super().__init__(str(error)[:300])
        self.error = error


@dataclass(frozen=True)
class Completion:
    """The parts of a reply that are used."""

    text: str
    """Without the reasoning, if the server separated it. "" if there is none."""
    reasoning: str | None = None
    """The reasoning that the server separated from the text, without tags."""
    finish: str = ""
    """"stop", "length" (cut off at the token limit), "refusal", "content_filter", or "" if it is unknown."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def whole(self) -> str:
        """The completion as the model writes it: a think block, if there is reasoning, and the text.

        A think block that was cut off has no closing tag.
        """
        if self.reasoning is None:
            return self.text
        if self.finish == "length" and not self.text:
            return f"{THINK_OPEN}{self.reasoning}"
        return f"{THINK_OPEN}{self.reasoning}{THINK_CLOSE}{self.text}"

    @property
    def answer(self) -> str:
        """The text after the reasoning, wherever the reasoning is. "" if the completion is reasoning only."""
        return text_after_reasoning(self.text)


def text_after_reasoning(text: str) -> str:
    """The text after the last think block, "" if that block has no end."""
    after = text.rpartition(THINK_CLOSE)[2].strip()
    return "" if after.startswith(THINK_OPEN) else after


def read_reply(reply: str) -> Completion:
    """The completion in the body of a reply. Raises `NoCompletion` and `ReplyError`."""
    start = reply.lstrip("\ufeff \r\n\t")
    if start.startswith(("data:", "event:", ":")):
        return _read_stream(start)
    try:
        body: Any = json.loads(start)
    except (ValueError, RecursionError):
        raise NoCompletion(f"found {_quote(reply)}") from None
    return read_body(body)


def read_body(body: Any) -> Completion:
    """The completion in a parsed reply. Raises `NoCompletion` and `ReplyError`."""
    if not isinstance(body, Mapping):
        raise NoCompletion(f"found {_quote(json.dumps(body))}")
    _raise_error(body)
    choice = _first_choice(body)
    if choice is None:
        raise NoCompletion(f"it has no choices: {_quote(json.dumps(body))}")
    message = choice.get("message")
    if message is None and isinstance(choice.get("text"), str):
        message = {"content": choice["text"]}
    if not isinstance(message, Mapping):
        raise NoCompletion(f"it has no message: {_quote(json.dumps(choice))}")
    _raise_error(message)
    return _read_message(message, choice.get("finish_reason"), body.get("usage"))


def _first_choice(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first choice of a reply or of a stream's chunk; None without one. Raises `ReplyError` for its error."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, Mapping):
        return None
    _raise_error(choice)
    return choice


def _read_message(message: Mapping[str, Any], finish_reason: Any, usage: Any) -> Completion:
    parts = list(_parts(message.get("content")))
    text = "".join(value for kind, value in parts if kind == "text")
    reasoning = "".join(value for kind, value in parts if kind == "reasoning") or _separate_reasoning(message)
    refusal = _text(message.get("refusal")) or "".join(value for kind, value in parts if kind == "refusal")
    finish = _finish(finish_reason)
    if refusal and not text:
        text, finish = refusal, "refusal"
    completion = Completion(text, reasoning or None, finish, *_token_counts(usage))
    return _separated(completion)


def _separated(completion: Completion) -> Completion:
    """Mends the two forms that a server gives reasoning by mistake.

    A reasoning parser may put everything into the reasoning, if it waits for a tag that the model does not write.
    If the chat template writes the opening tag, the text starts within the reasoning.
    """
    text, reasoning = completion.text, completion.reasoning
    if reasoning and not text.strip() and (THINK_CLOSE in reasoning or ANSWER_OPEN in reasoning):
        text, reasoning = reasoning, None
    if reasoning:
        reasoning = reasoning.removeprefix(THINK_OPEN).removesuffix(THINK_CLOSE)
    before, close, after = text.partition(THINK_CLOSE)
    if reasoning is None and close and THINK_OPEN not in before:
        # Without an opening tag, an answer in front of the closing tag belongs to the reasoning.
        text = f"{THINK_OPEN}{before}{close}{after}"
    return replace(completion, text=text, reasoning=reasoning)


def _parts(content: Any) -> Iterator[tuple[str, str]]:
    """(kind, text) of each part of a message's content: kind is text, reasoning or refusal.

    Raises `NoCompletion` for content that is neither a text nor parts.
    """
    if not isinstance(content, str | list | Mapping | None):
        raise NoCompletion(f"its content is {type(content).__name__}, not text")
    if isinstance(content, str):
        yield "text", content
        return
    for part in [content] if isinstance(content, Mapping) else content or []:
        if isinstance(part, str):
            yield "text", part
            continue
        if not isinstance(part, Mapping):
            continue
        kind = str(part.get("type") or "text")
        if "think" in kind or "reason" in kind or part.get("thought") is True:
            yield "reasoning", _text(part)
        elif kind == "refusal":
            yield "refusal", _text(part)
        elif "text" in kind:
            yield "text", _text(part)


def _text(value: Any) -> str:
    """The text in a string, in a list of parts, or in the field of a part that has it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_text(part) for part in value)
    if isinstance(value, Mapping):
        for name in ("text", "thinking", "reasoning", "summary", "refusal", "content"):
            if found := _text(value.get(name)):
                return found
    return ""


def _separate_reasoning(message: Mapping[str, Any]) -> str:
    for name in ("reasoning_content", "reasoning", "thinking", "reasoning_details"):
        if found := _text(message.get(name)):
            return found
    return ""


def _finish(reason: Any) -> str:
    name = str(reason or "").lower()
    if name in CUT_OFF:
        return "length"
    if name in FILTERED or "content_filter" in name:
        return "content_filter"
    if name in REFUSED:
        return "refusal"
    return "stop" if name else ""


def _token_counts(usage: Any) -> tuple[int | None, int | None]:
    """(prompt, completion) tokens. None for each one that is missing or no number."""
    if not isinstance(usage, Mapping):
        return None, None
    counts = []
    for names in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")):
        value = next((usage[name] for name in names if usage.get(name) is not None), None)
        is_count = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
        counts.append(int(value) if is_count else None)  # type: ignore[arg-type]
    return counts[0], counts[1]


def _raise_error(value: Mapping[str, Any]) -> None:
    error = value.get("error")
    if error:
        raise ReplyError(error)
    if value.get("object") == "error":  # older vLLM
        raise ReplyError(dict(value))
    if str(value.get("finish_reason") or "").lower() == "error":
        raise ReplyError({"message": "the server ended the completion with finish_reason error"})


def _read_stream(text: str) -> Completion:
    """The completion whose pieces come as server-sent events. Raises `NoCompletion` if the stream ends early."""
    message: dict[str, Any] = {"content": ""}
    finish: Any = None
    usage: Any = None
    done = False
    for line in re.split(r"\r\n|\r|\n", text):
        name, _, data = line.partition(":")
        if name != "data" or not data.strip():
            continue
        if data.strip() == "[DONE]":
            done = True
            break
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, Mapping):
            raise NoCompletion(f"its stream holds {_quote(data)}")
        _raise_error(chunk)
        usage = chunk.get("usage") or usage
        choice = _first_choice(chunk) or {}  # a chunk with the usage has none
        finish = choice.get("finish_reason") or finish
        delta = choice.get("delta") or choice.get("message")
        if isinstance(delta, Mapping):
            _add_delta(message, delta)
    if not done and finish is None:
        raise NoCompletion("its stream ends before the completion")
    return _read_message(message, finish, usage)


def _add_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Adds the pieces of a stream's chunk to the message."""
    for kind, value in _parts(delta.get("content")):
        name = {"text": "content", "reasoning": "reasoning", "refusal": "refusal"}[kind]
        message[name] = message.get(name, "") + value
    message["reasoning"] = message.get("reasoning", "") + _separate_reasoning(delta)
    if refusal := _text(delta.get("refusal")):
        message["refusal"] = message.get("refusal", "") + refusal


def _quote(text: str) -> str:
    return repr(" ".join(text[:60].split()))

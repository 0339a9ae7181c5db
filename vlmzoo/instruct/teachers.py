"""Who answers: a server of the OpenAI interface, a local language model, or rules."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vlmzoo.instruct import rules
from vlmzoo.instruct.annotations import Facts
from vlmzoo.instruct.prompts import Message, Prompt
from vlmzoo.instruct.words import Vocabulary

TEACHERS = ("rules", "openai", "transformers")
CHARACTERS_A_TOKEN = 4  # of English, roughly; for estimates, and where a server counts nothing


@dataclass(frozen=True, slots=True)
class Request:
    kind: str
    facts: Facts
    prompt: Prompt

    @property
    def messages(self) -> list[Message]:
        return self.prompt.messages(self.facts)

    @property
    def input_length(self) -> int:
        """In characters."""
        return sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    input_tokens: int = 0
    output_tokens: int = 0
    cut_off: bool = False  # the teacher ran out of tokens before it had ended


Fate = Literal["retry", "reject", "stop"]


class TeacherError(ValueError):
    """No answer: ask again, reject this request, or stop because no request can succeed."""

    def __init__(self, message: str, fate: Fate, reason: str, *, wait: float | None = None) -> None:
        super().__init__(message)
        self.fate: Fate = fate
        self.reason = reason  # a short name, for the journal
        self.wait = wait  # seconds that the server asked for


class Teacher(Protocol):
    identity: str
    """What, changed, makes every answer another one."""

    async def ask(self, request: Request) -> Answer:
        """The answer.

        Raises:
            TeacherError: there is none.
        """
        ...

    async def close(self) -> None: ...


class Rules:
    """Exact answers from the annotations; see `rules`."""

    def __init__(self, categories: Sequence[str], seed: int, *, short: bool = False) -> None:
        self.identity = f"rules {rules.VERSION} {seed} {','.join(categories)}{' short' if short else ''}"
        self._vocabulary, self._categories, self._seed, self._short = Vocabulary(categories), categories, seed, short

    async def ask(self, request: Request) -> Answer:
        known = request.facts, self._vocabulary, self._categories, self._seed
        return Answer(rules.answer(request.kind, *known, short=self._short))

    async def close(self) -> None:
        pass


class OpenAI:
    """Any server of the chat completions interface, by OpenAI's client; the key comes from OPENAI_API_KEY."""

    def __init__(self, model: str, base_url: str | None, *, max_tokens: int, timeout: float) -> None:
        """
        Args:
            timeout: seconds of a whole request, however the server dribbles.
        """
        openai = _openai()
        key = os.environ.get("OPENAI_API_KEY")
        if not key and base_url is None:
            raise ValueError("--teacher openai: OPENAI_API_KEY is not set, and no --base-url names another server")
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ValueError(f"--base-url: expected http://… or https://…, got {base_url!r}")
        self.identity = f"openai {base_url or ''} {model} {max_tokens}"
        # Reasoning models of OpenAI's refuse the old name, other servers do not know the new one.
        limit = {"max_completion_tokens" if base_url is None else "max_tokens": max_tokens}
        self._options = {"model": model, "stream": False, **limit}
        self._timeout, self._where = timeout, base_url or "api.openai.com"
        self._client = openai.AsyncOpenAI(api_key=key or "none", base_url=base_url, max_retries=0, timeout=timeout)

    async def ask(self, request: Request) -> Answer:
        openai = _openai()
        body = {**self._options, "messages": request.messages}
        try:
            async with asyncio.timeout(self._timeout):
                # As `chat.completions.create` does; its check of the messages' types costs more than all the rest.
                found: Any = await self._client.post("/chat/completions", body=body, cast_to=object)
        except (TimeoutError, openai.APITimeoutError):
            raise self._error(f"no answer within {self._timeout:g} s", "retry", "timeout") from None
        except openai.APIStatusError as error:
            raise self._status(error) from None
        except openai.APIConnectionError as error:
            cause = str(error.__cause__ or error) or type(error.__cause__).__name__
            raise self._error(f"no connection ({cause})", "retry", "no_connection") from None
        except (openai.OpenAIError, ValueError) as error:  # a body that is not what it says
            raise self._error(f"no readable answer ({error})", "retry", "unreadable") from None
        try:
            choice, usage = found["choices"][0], found.get("usage")
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError("its content is no text")
            names = ("prompt_tokens", "completion_tokens")
            counted = [int(usage[name]) for name in names] if usage else _estimate(request, text)
            cut_off = choice.get("finish_reason") == "length"
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise self._error(f"no readable answer ({why})", "retry", "unreadable") from None
        return Answer(text, *counted, cut_off=cut_off)

    async def close(self) -> None:
        await self._client.close()

    def _status(self, error: Any) -> TeacherError:
        code, said = error.status_code, " ".join(str(error.message).split())[:200]
        message = f"HTTP {code}: {said}"
        if code == 429 and getattr(error, "code", None) != "insufficient_quota":
            return self._error(message, "retry", "rate_limited", _retry_after(error.response.headers))
        if code in (408, 409, 425) or code >= 500:
            return self._error(message, "retry", f"http_{code}", _retry_after(error.response.headers))
        if code in (400, 413, 422):  # this request is at fault: too long, filtered
            return self._error(message, "reject", f"http_{code}")
        return self._error(message, "stop", f"http_{code}")

    def _error(self, message: str, fate: Fate, reason: str, wait: float | None = None) -> TeacherError:
        return TeacherError(f"{self._where}: {message}", fate, reason, wait=wait)


class Local:
    """A causal language model that transformers loads; greedy, one request at a time."""

    def __init__(self, model: str, *, max_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
            self._model: Any = AutoModelForCausalLM.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"--model {model}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        if self._tokenizer.chat_template is None:
            raise ValueError(f"--model {model}: its tokenizer has no chat template; expected a model for conversation")
        self._model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self._max_tokens = max_tokens
        self._turn = asyncio.Lock()
        self.identity = f"transformers {model} {max_tokens}"

    async def ask(self, request: Request) -> Answer:
        async with self._turn:
            return await asyncio.to_thread(self._generate, request)

    def _generate(self, request: Request) -> Answer:
        import torch

        inputs = self._tokenizer.apply_chat_template(
            request.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        length = inputs["input_ids"].shape[1]
        most = getattr(self._model.config, "max_position_embeddings", None)
        if most is not None and length + self._max_tokens > most:
            said = f"{length} tokens and {self._max_tokens} of the answer do not fit into {most}"
            raise TeacherError(said, "reject", "too_long")
        with torch.inference_mode():
            output = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)[0, length:]
        text = self._tokenizer.decode(output, skip_special_tokens=True)
        return Answer(text, length, len(output), cut_off=len(output) == self._max_tokens)

    async def close(self) -> None:
        pass


def estimated_tokens(characters: float) -> int:
    return -int(-characters // CHARACTERS_A_TOKEN)


def _estimate(request: Request, text: str) -> tuple[int, int]:
    return estimated_tokens(request.input_length), estimated_tokens(len(text))


def _retry_after(headers: Any) -> float | None:
    """Seconds; a date is left to the backoff."""
    try:
        return max(0.0, float(headers.get("retry-after")))
    except (TypeError, ValueError):
        return None


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise ValueError("--teacher openai needs openai: pip install 'vlmzoo[instruct]'") from None
    return openai

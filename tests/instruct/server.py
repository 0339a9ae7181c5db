"""A server of the OpenAI interface that counts what it is asked, and misbehaves as it is told."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TURNS = [
    {"question": "What is the mood of the scene?", "answer": "It is quiet and pleasant."},
    {"question": "Would you like to be there?", "answer": "It looks like a good place to rest."},
]
HANG, CUT_OFF, CLOSE = "hang", "cut off", "close"

Reply = tuple[int, dict[str, str], str] | str


def completion(text: str, finish: str = "stop", tokens: tuple[int, int] = (100, 20)) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return 200, {"content-type": "application/json"}, json.dumps(body)


def turns(index: int) -> str:
    """An answer that passes the gate, another one for each number."""
    first, second = (("calm", "quiet", "busy", "open", "old", "tidy", "wide", "plain")[index >> n & 7] for n in (0, 3))
    answer = f"The place looks {first} and rather {second}, which makes it number {index} of all places."
    return json.dumps([TURNS[0], {**TURNS[1], "answer": answer}])


def error(status: int, message: str = "no", **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "code": message}})
    return status, {"content-type": "application/json", **headers}, body


@dataclass
class Server:
    """What was asked, in order: the last message of each request."""

    reply: Callable[[int, str], Reply]
    asked: list[str] = field(default_factory=list)
    after: Callable[[int], None] = lambda index: None  # when an answer has gone out whole
    most: int = 0  # requests at a time
    port: int = 0
    now: int = 0
    delay: float = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                header = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(header.split("content-length:")[1].split("\r\n")[0])
                body: dict[str, Any] = json.loads(await reader.readexactly(length))
                text = body["messages"][-1]["content"]
                index = len(self.asked)
                self.asked.append(text)
                self.now += 1
                self.most = max(self.most, self.now)
                try:
                    if not await self.answer(self.reply(index, text), writer):
                        return
                    self.after(index)
                finally:
                    self.now -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, reply: Reply, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(self.delay)
        if reply == HANG:
            await asyncio.sleep(3600)
        if reply == CLOSE:
            return False
        status, headers, body = completion(json.dumps(TURNS)) if isinstance(reply, str) else reply
        headers = {"connection": "keep-alive", **headers, "content-length": str(len(body.encode()))}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        whole = f"HTTP/1.1 {status} X\r\n{head}\r\n{body}".encode()
        writer.write(whole[: -len(body) // 2] if reply == CUT_OFF else whole)
        await writer.drain()
        return reply != CUT_OFF


@contextmanager
def serving(reply: Callable[[int, str], Reply], delay: float = 0.0) -> Iterator[Server]:
    """A server on a free port of this machine, in a thread."""
    server, loop, ready = Server(reply, delay=delay), asyncio.new_event_loop(), threading.Event()

    async def begin() -> asyncio.Server:
        listening = await asyncio.start_server(server.connection, "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        ready.set()
        return listening

    def run() -> None:
        asyncio.set_event_loop(loop)
        listening = loop.run_until_complete(begin())
        loop.run_forever()
        listening.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()

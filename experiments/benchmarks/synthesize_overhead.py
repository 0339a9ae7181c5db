"""What `vlmzoo synthesize` costs beside the teacher: requests a second against an instant server, and memory.

python experiments/benchmarks/synthesize_overhead.py [IMAGES] [REQUESTS]

Writes annotations of so many invented images, asks a server on this machine, in a process of its own, that answers
every request at once with two turns of words drawn by lot, through OpenAI's client, and judges the answers. Prints a
JSON document: requests a second while asking and while judging, and resident memory (MiB) when annotations have been
read, after a tenth of the requests, and at the end.
"""

import asyncio
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vlmzoo.instruct import synthesize
from vlmzoo.instruct.annotations import read_coco
from vlmzoo.instruct.ask import Limits
from vlmzoo.instruct.prompts import KINDS, read_prompts
from vlmzoo.instruct.synthesize import Job
from vlmzoo.instruct.teachers import OpenAI

NAMES = ("person", "dog", "car", "cup", "chair", "bus", "cat", "bird")
WORDS = (
    *("quiet", "busy", "calm", "open", "old", "new", "small", "large", "round", "wide", "narrow", "tidy", "empty"),
    *("simple", "plain", "common", "pleasant", "near"),
)
CONCURRENCY = 32


def write_annotations(folder: Path, num_images: int) -> None:
    """Five captions and seven boxes an image, written without ever holding them."""
    draw = random.Random(0)
    (folder / "annotations").mkdir(parents=True)
    categories = json.dumps([{"id": number, "name": name} for number, name in enumerate(NAMES)])
    for kind, each in (("captions", 5), ("instances", 7)):
        with (folder / "annotations" / f"{kind}_invented.json").open("w") as file:
            image = '{{"id": {0}, "file_name": "{0:012d}.jpg", "width": 640, "height": 480}}'
            file.write('{"images": [' + ",\n".join(image.format(number) for number in range(num_images)))
            file.write(f'], "categories": {categories}, "annotations": [')
            for number in range(num_images * each):
                item: dict[str, Any] = {"id": number, "image_id": number // each}
                if kind == "captions":
                    item["caption"] = f"A {draw.choice(NAMES)} next to a {draw.choice(NAMES)} and number {number}."
                else:
                    box = [draw.randrange(300), draw.randrange(200), draw.randrange(20, 300), draw.randrange(20, 200)]
                    item |= {"category_id": draw.randrange(len(NAMES)), "bbox": box, "iscrowd": 0}
                file.write(("," if number else "") + json.dumps(item) + "\n")
            file.write("]}")


def serve(told: Connection) -> None:
    """Answers every POST at once, whatever it says."""
    draw = random.Random(0)
    usage = {"prompt_tokens": 700, "completion_tokens": 50, "total_tokens": 750}

    def reply() -> bytes:
        looks = [" ".join(draw.choices(WORDS, k=8)) for _ in range(2)]
        turns = [{"question": f"How does it look, {word}?", "answer": f"The place looks {word}."} for word in looks]
        message = {"role": "assistant", "content": json.dumps(turns)}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        document = {"id": "x", "object": "chat.completion", "created": 0, "choices": choices, "usage": usage}
        body = json.dumps(document).encode()
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                header = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in header.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.split(b":")[1]))
                writer.write(reply())
        except asyncio.IncompleteReadError:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def resident() -> float:
    """MiB of this process."""
    return round(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


class Marked(OpenAI):
    """Notes the time and memory of the first request, of a tenth of them, and of the last."""

    def __init__(self, total: int, **options: Any) -> None:
        super().__init__("m", **options)
        self.marks: dict[int, tuple[float, float]] = {}
        self.asked, self.noted = 0, (1, total // 10, total)

    async def ask(self, request: Any) -> Any:
        self.asked += 1
        if self.asked in self.noted:
            self.marks[self.asked] = time.perf_counter(), resident()
        return await super().ask(request)


def main(images: str = "20000", requests: str = "5000") -> None:
    num_images, total = int(images), int(requests)
    receive, send = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("fork").Process(target=serve, args=(send,), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_annotations(folder, num_images)
        begin, began = resident(), time.perf_counter()
        annotations = read_coco(folder)
        reading = time.perf_counter() - began
        read = resident()
        limits = Limits(concurrency=CONCURRENCY)
        job = Job(
            annotations,
            read_prompts(),
            {**dict.fromkeys(KINDS, 0), KINDS[0]: 1},
            folder / "out.json",
            total,
            limits=limits,
        )
        url = f"http://127.0.0.1:{receive.recv()}/v1"
        teacher = Marked(total, base_url=url, max_tokens=512, timeout=60)
        synthesize.synthesize(job, teacher)
        ended = time.perf_counter()
    server.terminate()
    (first, _), (_, tenth), (last, asked) = (teacher.marks[count] for count in teacher.noted)
    found = {
        "images": num_images,
        "requests": total,
        "requests_per_second_asking": round(total / (last - first), 1),
        "requests_per_second_judging": round(total / (ended - last), 1),
        "seconds_reading_annotations": round(reading, 1),
        "MiB": {"begin": begin, "annotations": read, "a tenth": tenth, "all asked": asked, "all judged": resident()},
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Clients for locust: each asks for a streamed answer, reads it to its end, and asks for the next.

SERVE_JOB is the path of a JSON file: {"model", "requests", "seed", "longest", "output"}; the run ends with the last
request, and a row for each is written to "output".
"""

import json
import os
import sys
import time
from pathlib import Path

from gevent.lock import Semaphore
from locust import HttpUser, constant, events, task

sys.path.insert(0, str(Path(__file__).parent))
from prompts import body, requests  # noqa: E402

JOB = json.loads(Path(os.environ["SERVE_JOB"]).read_text())


class Work:
    """The requests that are still to be made, and the rows of those that are done."""

    def __init__(self):
        self.waiting = requests(JOB["requests"], JOB["seed"], JOB["longest"])
        self.rows: list[dict] = []
        self.lock = Semaphore()

    def take(self):
        with self.lock:
            return next(self.waiting, None)


WORK = Work()


class Client(HttpUser):
    wait_time = constant(0)

    @task
    def ask(self):
        work = WORK.take()
        if work is None:
            if len(WORK.rows) == JOB["requests"]:
                self.environment.runner.quit()
            time.sleep(0.2)
            return
        WORK.rows.append(self.answer(*work))

    def answer(self, prompt: list[int], tokens: int) -> dict:
        start, seen, usage, error = time.perf_counter(), [], None, None
        with self.client.post("/v1/completions", json=body(JOB["model"], prompt, tokens), stream=True,
                              catch_response=True) as response:
            try:
                if response.status_code != 200:
                    raise RuntimeError(f"status {response.status_code}: {response.text[:200]}")
                for line in lines(response):
                    if line == "data: [DONE]":
                        break
                    if line.startswith("data: "):
                        event = json.loads(line[6:])
                        if "error" in event:
                            raise RuntimeError(event["error"]["message"])
                        if event["choices"]:
                            seen.append(time.perf_counter() - start)
                        usage = event.get("usage") or usage
                if usage is None or usage["completion_tokens"] != tokens:
                    raise RuntimeError(f"{usage} of {tokens} tokens")
                response.success()
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"
                response.failure(error)
        return {"prompt": len(prompt), "tokens": tokens, "first": seen[0] if seen else None, "error": error,
                "last": seen[-1] if seen else None, "whole": time.perf_counter() - start}


def lines(response):
    """Yield the lines of a stream as they come."""
    held = b""
    for piece in response.iter_content(chunk_size=None):
        *whole, held = (held + piece).split(b"\n")
        yield from (line.decode().rstrip("\r") for line in whole)


@events.quitting.add_listener
def write(environment, **_):
    Path(JOB["output"]).write_text(json.dumps(WORK.rows))

"""A server for tests: tools/serve.py in a process of its own, and what is asked of it by plain HTTP."""

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from forked import running_script

REPOSITORY = Path(__file__).parents[3]
_PATIENCE = 240.0  # seconds; on a busy machine a server may take long to start, and to answer


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self):
        return json.loads(self.content)

    @property
    def error(self) -> dict:
        return self.json["error"]

    @property
    def events(self) -> list[dict]:
        """The events of a stream, each of one line, without the [DONE] that must be the last one."""
        *events, last, rest = self.content.split(b"\n\n")
        assert (last, rest) == (b"data: [DONE]", b"")
        assert all(event.startswith(b"data: ") and b"\n" not in event for event in events)
        return [json.loads(event[len(b"data: "):]) for event in events]


@dataclass
class Served:
    """A server that runs; `processes` are its ranks, `out` and `errors` what they print."""

    port: int
    processes: list
    out: Path
    errors: Path
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body=None, **headers) -> Answer:
        """The answer to one request; `body` is sent as JSON unless it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body, given = json.dumps(body).encode(), {"Content-Type": "application/json"} | given
        try:
            connection.request(method, path, body, self.headers | given)
            response = connection.getresponse()
            return Answer(response.status, {key.lower(): value for key, value in response.getheaders()},
                          response.read())
        finally:
            connection.close()

    def post(self, path: str, body, **headers) -> Answer:
        return self.ask("POST", path, body, **headers)

    def leave(self, body: dict, path: str = "/v1/completions") -> None:
        """Ask for a stream, read how it begins, and close the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        connection.request("POST", path, json.dumps(body), self.headers | {"Content-Type": "application/json"})
        assert connection.getresponse().readline().startswith(b"data: ")
        connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric, summed over what labels it has beside these."""
        found = 0.0
        for line in self.ask("GET", "/metrics").content.decode().splitlines():
            if line.startswith((name + "{", name + " ")) and all(f'{key}="{each}"' in line
                                                                 for key, each in labels.items()):
                found += float(line.rpartition(" ")[2])
        return found

    def wait_until_idle(self, seconds: float = _PATIENCE) -> None:
        """Wait until nothing is answered; then all blocks must be free."""
        deadline = time.monotonic() + seconds
        while self.metric("vllm:num_requests_running") or self.metric("vllm:num_requests_waiting"):
            assert time.monotonic() < deadline, "requests are still answered"
            time.sleep(0.02)
        assert self.metric("vllm:kv_cache_usage_perc") == 0


@contextmanager
def serving(folder: Path, load: Path, *options: str, num_ranks: int = 1, headers: dict[str, str] | None = None
            ) -> Iterator[Served]:
    """Run a server beside the block, whose words go to files of `folder`; its port is one that was free."""
    out, errors = folder / "out", folder / "errors"
    words = [str(REPOSITORY / "tools" / "serve.py"), "--load", str(load), "--port", "0", *options]
    with running_script(words, out, errors, num_ranks) as processes:
        yield Served(_port(out, errors, processes), processes, out, errors, headers or {})


def _port(out: Path, errors: Path, processes: list) -> int:
    """The port in the line that says that the server is ready."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        said = out.read_text() if out.exists() else ""
        if said.endswith("\n") and said.startswith("serving "):
            return int(said.splitlines()[0].rpartition(":")[2])
        assert all(each.exitcode is None for each in processes), errors.read_text()
        assert time.monotonic() < deadline, "the server is not ready"
        time.sleep(0.02)

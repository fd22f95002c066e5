#!/usr/bin/env python3
"""Peak memory and seconds of attention over a packed sequence: document by document, and with a full mask.

The full mask has the square of the sequence's length. Times are of forward and backward. Each run has its own process;
memory is the growth of the process up to its peak.

    python benchmarks/packed_attention.py --lengths 4096 8192 16384 --document 1024
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

HEADS, WIDTH = 4, 64
WAYS = ("documents", "mask")


def measure(way: str, length: int, document: int) -> None:
    """Print the MB that the process grew by and the seconds."""
    import torch
    import torch.nn.functional as F

    from megatron_deepseek.ops.attention import attend_within_documents
    from megatron_deepseek.ops.documents import Documents

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, WIDTH, requires_grad=True) for _ in range(3))
    documents_BS = (torch.arange(length) // document).unsqueeze(0)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if way == "documents":
        out = attend_within_documents(q, k, v, Documents.find(documents_BS), WIDTH**-0.5)
    else:
        mask = (documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)).tril().unsqueeze(1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=WIDTH**-0.5)
    out.sum().backward()
    seconds = time.perf_counter() - start
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], metavar="TOKENS")
    parser.add_argument("--document", type=int, default=1024, metavar="TOKENS", help="length of each document")
    parser.add_argument("--way", choices=WAYS, help="measure only this, in this process")
    args = parser.parse_args()
    if args.way:
        return measure(args.way, args.lengths[0], args.document)
    print(f"float32, 1 sequence, {HEADS} heads of {WIDTH}, documents of {args.document} tokens\n"
          f"{'tokens':>8}" + "".join(f"  {way:>20}" for way in WAYS))
    for length in args.lengths:
        row = []
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--lengths", str(length),
                       "--document", str(args.document)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            megabytes, seconds = map(float, printed.split())
            row.append(f"{megabytes:8.0f} MB {seconds:7.2f} s")
        print(f"{length:8}" + "".join(f"  {each:>20}" for each in row), flush=True)


if __name__ == "__main__":
    main()

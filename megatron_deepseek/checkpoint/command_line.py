"""What the commands on checkpoints have in common: sizes, workers, the progress bar."""

import argparse
import re
import sys
from collections.abc import Mapping

from tqdm import tqdm

from megatron_deepseek.checkpoint.production import Product, Share, produce

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Bytes of 5GB, 500MB, 1GiB or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB, 500MB or 1GiB")
    return max(int(float(match[1]) * _UNITS[match[2].upper()]), 1)


def share_of(environ: Mapping[str, str], workers: int) -> Share:
    """This process's share of the work: all of it, or under torchrun that of its rank."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    run_id = "-".join(environ.get(name, "0") for name in names)
    return Share(workers, int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1")), run_id)


def progress(total: int | None, hidden: bool = False) -> tqdm:
    """A bar by bytes on stderr."""
    return tqdm(total=total, unit="B", unit_scale=True, disable=hidden, mininterval=0.5)


def produce_visibly(product: Product, share: Share) -> None:
    """`produce` with a bar; on the first rank only, whose total is unknown where others work too."""
    total = product.nbytes + product.check_bytes if share.world_size == 1 else None
    with progress(total, hidden=share.rank > 0) as bar:
        produce(product, share, bar.update, lambda text: print(text, file=sys.stderr))

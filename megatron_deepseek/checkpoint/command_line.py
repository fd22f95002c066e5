"""What the commands on checkpoints have in common: sizes, workers, one line for what is wrong, the progress bar."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping

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


def exit_status(program: str, body: Callable[[], int]) -> int:
    """What `body` returns, or 2 for what a user can mend, with one line that says what."""
    try:
        return body()
    except BrokenPipeError:  # of `| head`: nobody wants to read more, and Python must not try once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command continues", file=sys.stderr)
        return 130

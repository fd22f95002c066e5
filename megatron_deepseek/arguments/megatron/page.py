"""docs/megatron_arguments.md, made of the tables: `python -m megatron_deepseek.arguments.megatron.page` prints it."""

import textwrap
from collections.abc import Iterable, Iterator

from megatron_deepseek.arguments.megatron.answers import ANY, SOME, Group, Option
from megatron_deepseek.arguments.megatron.architecture import DEFAULTS
from megatron_deepseek.arguments.megatron.ignored import IGNORED
from megatron_deepseek.arguments.megatron.joint import JOINT_OPTIONS
from megatron_deepseek.arguments.megatron.refused import REFUSED
from megatron_deepseek.arguments.megatron.renamed import (
    NAMES,
    NOTHING,
    RELATIVES_IGNORED,
    RELATIVES_REFUSED,
    VALUES,
)
from megatron_deepseek.arguments.parser import build_parser

_PAGE = """# Megatron-LM's arguments

Rendered by `python -m megatron_deepseek.arguments.megatron.page` from the tables that the command line is read by, and
checked. A launch script of Megatron-LM runs as it is: every option of its parser, megatron-core 0.16 to 0.19, has an
answer, and so have frequent ones of MindSpeed-LLM and Pai-Megatron-Patch and the names of a Hugging Face `config.json`.
All mistakes of a command line are told together. What was read as something else, and what was ignored, the run says in
a line each at its start; `--check-only` tries a command line without a run.

## Without `--model`
Where the arguments give the whole architecture `--model` may be left out; if they do not, all that is missing is
named. Megatron-LM's defaults then hold: no MTP modules, embeddings tied unless
`--untie-embeddings-and-output-weights`, experts in all layers unless `--moe-layer-freq`, the vocabulary of the
tokenizer unless `--vocab-size`, `--kv-lora-rank` 32, `--norm-epsilon` 1e-5,
{defaults}.
Softmax scores are normalised over the chosen experts unless `--moe-router-pre-softmax`, sigmoid scores always. The
start says which architecture was understood, and in what it differs from the nearest preset. What has no effect in
Megatron-LM without another option, such as `--no-load-optim` without `--load`, is ignored, where it is refused with
`--model`. Not Megatron-LM's are:

* `--make-vocab-size-divisible-by` pads the embedding only where it is given (there to 128 x tensor ranks). As there the
  softmax has the padding too; exports are without it, and `tools/generate.py` never takes an id behind the tokenizer's.
* Weights of the layers' outputs begin with the same standard deviation as all others, as DeepSeek's do.
* A group of experts is chosen by its best one, as in V2, or with the bias by its best two, as in V3 (there by the sum
  of its best, as many as a token has experts for each of its groups).
* What every model here is (SwiGLU, RMSNorm, rotary positions, no biases, no dropout), it is without its option too; the
  start names the options that were not given.

## The same name, and something to know
{remarks}

All other options that `pretrain_deepseek.py --help` shows mean what they mean in Megatron-LM, or are not there
([arguments.md](arguments.md)).

## Other names
{names}

## Accepted, without meaning here
No number that is trained depends on them.
{ignored}

## Refused
They change what is trained, or ask for what is not there. A value that is Megatron-LM's default, named here behind the
option, is accepted.
{refused}
"""
_REMARKS = {
    "--yaml-cfg": "files of Megatron-MoE ModelZoo: options under MODEL_ARGS, true for one without a value, ${NAME} "
                  "from the environment, ENV_VARS not read; the command line wins. Needs PyYAML. `@FILE` reads a text "
                  "as a command line, with comments",
    "--data-args-path": "what follows a # is a comment",
    "--mock-data": "4096 documents that count 1, 2, 3, ..., in files below `--data-cache-path` or a temporary folder",
    "--num-workers": "threads, 1 unless given",
    "--full-validation": "the last batch is filled up, so that every sample counts once",
    "--multiple-validation-sets": "also without `--full-validation`, and with weights, which the sets ignore",
    "--check-weight-hash-across-dp-replicas-interval": "of all ranks that have the same weights, as gathered for a "
                                                       "forward, and of the routers' biases",
    "--tensorboard-queue-size": "1 unless given: events are written at once",
    "--log-timers-to-tensorboard": "iteration-time and throughput, as with `--timing-log-level 0`",
    "--log-memory-to-tensorboard": "of rank 0, on CUDA",
    "--log-params-norm": "of what is trained",
    "--expert-tensor-parallel-size": "1 unless given, there the tensor-parallel size; the numbers are the same",
    "--tokenizer-type": "HuggingFaceTokenizer with a `tokenizer.json`, ByteTokenizer, or NullTokenizer: `--vocab-size` "
                        "ids, of which the last ends a document, as in megatron-core 0.18 and 0.19",
    "--attention-dropout": "0 only, as `--hidden-dropout`",
    "--eval-interval": "without `--model`, 100 batches unless `--eval-iters`",
    "--log-interval": "1 unless given",
    "--moe-aux-loss-coeff": "one weight, for the one type of balance loss",
    "--moe-expert-capacity-factor": "counts by sequence, not by rank (parallelism.md)",
    "--moe-token-dispatcher-type": "allgather, alltoall or grouped; the numbers are the same",
    "--recompute-modules": "layernorm, mla_up_proj, moe_act; scores of attention are never kept",
    "--recompute-num-layers": "1 only: each layer by itself",
    "--fp8-format": "e4m3 with `--fp8-recipe blockwise` (fp8.md)",
    "--ckpt-step": "of any `--load` directory of this project",
    "--load": "this project's checkpoints or a Hugging Face directory; others by `tools/convert_checkpoint.py`",
    "--log-throughput": "operations of the model itself, recomputation not counted",
    "--wandb-project": "by the package wandb; every start is a run of its own",
    "--manual-gc-interval": "without `--manual-gc` without effect",
    "--profile": "by torch.profiler, not nsys",
}
_VALUES = {"": "", "1": " X", SOME: " X ...", ANY: " [X ...]"}


def page() -> str:
    """Return docs/megatron_arguments.md."""
    defaults = ", ".join(f"`--{name.replace('_', '-')}` {value}" for name, value in DEFAULTS.items())
    known = build_parser().options
    assert set(_REMARKS) <= set(known)
    return _PAGE.format(defaults=defaults, remarks=_table(("option", "here"), ((f"`{name}`", text) for name, text
                                                                             in _REMARKS.items())),
                        names=_table(("option", "here"), _names()), ignored=_groups((*IGNORED, *RELATIVES_IGNORED)),
                        refused=_groups((*REFUSED, *RELATIVES_REFUSED)))


def _names() -> Iterator[tuple[str, str]]:
    yield from ((f"`{name}`", f"`{here}`") for name, here in NAMES.items())
    yield from ((f"`{' '.join(key).strip()}`", f"`{here}`") for key, here in VALUES.items())
    yield from ((f"`{' '.join(key)}`", "so here anyway") for key in sorted(NOTHING))
    yield from ((f"`{name}{_VALUES[values]}`", text) for name, values, text in JOINT_OPTIONS)


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    cells = [(one.replace("|", "\\|"), other.replace("|", "\\|")) for one, other in rows]
    return "\n".join(f"| {one} | {other} |" for one, other in (head, ("---", "---"), *cells))


def _groups(groups: Iterable[Group]) -> str:
    """Return a paragraph for each reason, with the options of all its groups."""
    by_reason: dict[str, list[Option]] = {}
    for group in groups:
        by_reason.setdefault(group.reason, []).extend(group.options())
    return "\n".join(f"\n**{reason[0].upper()}{reason[1:]}**\n\n{_listed(options)}"
                     for reason, options in by_reason.items())


def _listed(options: Iterable[Option]) -> str:
    texts = [f"`{option.name}`" + (f" ({', '.join(option.harmless)})" if option.harmless else "")
             for option in sorted(options, key=lambda option: option.name)]
    return "\n".join(textwrap.wrap(", ".join(texts), 120, break_long_words=False, break_on_hyphens=False))


if __name__ == "__main__":
    print(page(), end="")

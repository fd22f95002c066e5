"""Command lines of Megatron-LM and of its relatives: every option has an answer, and what has a meaning keeps it.

megatron/options.txt are the options of Megatron-LM's own parser, the other files those of three public launch scripts:
DeepSeek-V3.yaml of NVIDIA's Megatron-MoE ModelZoo, Pai-Megatron-Patch's examples/deepseek_v3 and MindSpeed-LLM's
pretrain_deepseek3_671b_4k_ptd.sh.
"""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.finetuning import build_finetuning_parser
from megatron_deepseek.arguments.megatron.answers import by_name
from megatron_deepseek.arguments.megatron.ignored import IGNORED
from megatron_deepseek.arguments.megatron.joint import JOINT_OPTIONS
from megatron_deepseek.arguments.megatron.page import page
from megatron_deepseek.arguments.megatron.refused import REFUSED
from megatron_deepseek.arguments.megatron.renamed import NAMES, RELATIVES_IGNORED, RELATIVES_REFUSED, VALUES
from megatron_deepseek.arguments.megatron.translation import translate
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.arguments.problems import problems_of
from megatron_deepseek.model.architecture.presets import TINY, V3

FILES = Path(__file__).parent / "megatron"
LINES = [line.split() for line in (FILES / "options.txt").read_text().splitlines() if not line.startswith("#")]
OPTIONS = {name: values for name, values, *_ in LINES}
BASE = "--model tiny --data-path corpus --train-iters 10 --seq-length 256"
# An architecture by arguments alone, as small as TINY
SMALL = ("--num-layers 4 --hidden-size 128 --num-attention-heads 4 --max-position-embeddings 4096 --vocab-size 8192 "
         "--multi-latent-attention --data-path corpus --train-iters 10 --seq-length 256")
# More arguments, with which it is TINY
AS_TINY = ("--ffn-hidden-size 384 --q-lora-rank 64 --kv-lora-rank 32 --qk-head-dim 32 --qk-pos-emb-head-dim 16 "
           "--v-head-dim 32 --num-experts 16 --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64 "
           "--moe-router-topk 4 --moe-layer-freq [0]+[1]*3 --moe-router-num-groups 4 --moe-router-group-topk 2 "
           "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --norm-epsilon 1e-6 "
           "--moe-router-topk-scaling-factor 2.5 --mtp-num-layers 1 --init-method-std 0.03 "
           "--untie-embeddings-and-output-weights --moe-router-load-balancing-type seq_aux_loss "
           "--moe-aux-loss-coeff 1e-4")


def problems(arguments: str | list[str], ranks: int = 1) -> tuple[str, ...]:
    with pytest.raises(ValueError) as caught:
        parse(shlex.split(arguments) if isinstance(arguments, str) else arguments, ranks)
    return problems_of(caught.value)


def script(name: str, **paths: Path) -> list[str]:
    """The words of a public script, with paths in place of its placeholders."""
    words = shlex.split((FILES / f"{name}.txt").read_text())
    return [str(paths.get(word, word)) for word in words]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer whose last id is that of V3's embedding; it has few others, which nobody looks at."""
    path = tmp_path_factory.mktemp("tokenizer")
    words = {"word": 0, "<｜end▁of▁sentence｜>": 129279}
    Tokenizer(models.WordLevel(words, unk_token="word")).save(str(path / "tokenizer.json"))
    return path


def test_every_option_of_megatron_has_one_answer():
    ours = set(build_parser().options)
    places = [ours, set(by_name(IGNORED)), set(by_name(REFUSED)), set(NAMES) | {name for name, _ in VALUES} - ours]
    answers = {name: sum(name in place for place in places) for name in OPTIONS}
    assert len(OPTIONS) == 878
    assert {name: number for name, number in answers.items() if number != 1} == {}


def test_options_take_as_many_values_as_megatrons():
    wrong = {name: (option.values or "0", OPTIONS[name]) for name, option in by_name(IGNORED, REFUSED).items()
             if (option.values or "0") != OPTIONS[name]}
    assert wrong == {}


def test_tables_have_no_option_twice_and_no_invented_one():
    names = [option.name for group in (*IGNORED, *REFUSED) for option in group.options()]
    assert len(names) == len(set(names))
    assert set(names) <= set(OPTIONS)
    relatives = {*by_name(RELATIVES_IGNORED, RELATIVES_REFUSED), *(name for name, *_ in JOINT_OPTIONS), *NAMES}
    assert not relatives & set(names)
    assert not relatives & set(build_parser().options)


def test_what_is_ignored_is_named_in_one_line():
    line = "--overlap-grad-reduce --logging-level 6 --attention-backend=flash --profile-ranks 0 1"
    notes = parse(f"{BASE} {line}".split(), 1).notes
    assert notes[0].startswith("ignored here: --overlap-grad-reduce --logging-level --attention-backend ")


@pytest.mark.parametrize("name, options", [
    ("modelzoo_deepseek_v3", 106), ("pai_deepseek_v3", 97), ("mindspeed_deepseek3_671b", 118)])
def test_no_option_of_a_public_script_is_unknown(name, options):
    """Before there were these tables, 26, 22 and 48 of them were."""
    told = []
    translate(script(name), build_parser().options, told.append)
    assert told == [] and sum(word.startswith("--") for word in script(name)) == options


def test_the_script_of_nvidias_model_zoo(tokenizer):
    settings = parse(script("modelzoo_deepseek_v3", TOKENIZER=tokenizer), 1024)
    assert settings.model == replace(
        V3, num_nextn_predict_layers=0, max_position_embeddings=4096, aux_loss_alpha=0.0, seq_aux=False,
        bos_token_id=None, eos_token_id=None)
    assert (settings.layout.pp, settings.layout.ep, settings.layout.dp) == (8, 64, 128)
    assert (settings.loss.balance_type, settings.loss.moe_aux_loss_coeff) == ("seq_aux_loss", 1e-4)
    assert (settings.optimizer.weight_decay, settings.learning_rate.lr_warmup_samples) == (0.1, 1536000)


def test_the_script_of_pai(tokenizer):
    """Its tokenizer is that of --load, and its vocabulary has 467 rows more."""
    settings = parse(script("pai_deepseek_v3", ckpt=tokenizer), 256)
    assert settings.data.tokenizer_model == str(tokenizer)
    assert settings.model == replace(
        V3, vocab_size=129280 + 467, rms_norm_eps=1e-6, initializer_range=0.008, aux_loss_alpha=0.0, seq_aux=False,
        bos_token_id=None, eos_token_id=None)


def test_the_script_of_mindspeed():
    """What is left to be said of it is one thing: Megatron-LM's positions by document need attention by document."""
    words = script("mindspeed_deepseek3_671b")
    text, *others = problems(words, 1024)
    assert text.startswith("--reset-position-ids needs --reset-attention-mask") and not others
    settings = parse([*words, "--reset-attention-mask"], 1024)
    assert settings.model == replace(
        V3, aux_loss_alpha=0.0, seq_aux=False, bos_token_id=None, eos_token_id=None)
    assert settings.pipeline.schedule == "DualPipeV"
    assert settings.communication.overlap_moe_expert_parallel_comm and settings.offload.optimizer_cpu_offload


def test_an_architecture_by_arguments_alone():
    settings = parse(f"{SMALL} {AS_TINY}".split(), 1)
    assert settings.model == replace(TINY, aux_loss_alpha=0.0, seq_aux=False)
    assert (settings.loss.balance_type, settings.loss.moe_aux_loss_coeff) == ("seq_aux_loss", 1e-4)
    assert "nearest preset tiny" in settings.notes[1] or "it is tiny's" == settings.notes[1]


def test_megatrons_defaults_hold_without_a_model():
    settings = parse(f"{SMALL} --num-experts 8 --swiglu --moe-aux-loss-coeff 0.01".split(), 1)
    model = settings.model
    assert model.tie_word_embeddings and model.num_nextn_predict_layers == 0 and model.num_moe_layers == 4
    assert (model.kv_lora_rank, model.q_lora_rank, model.num_experts_per_tok, model.rms_norm_eps) == (32, None, 2, 1e-5)
    assert model.intermediate_size == model.moe_intermediate_size == 320, "int(128 * 8 / 3 / 64) * 64"
    assert model.norm_topk_prob, "softmax over the chosen experts"
    assert settings.loss.balance_type == "aux_loss" and settings.loss.mtp_loss_scaling_factor == 0.1
    assert (settings.optimizer.adam_beta2, settings.optimizer.weight_decay) == (0.999, 0.01)
    assert settings.learning_rate.lr_decay_style == "linear"
    assert parse(SMALL.split(), 1).model.intermediate_size == 512, "4 * 128 without --swiglu"


def test_defaults_are_ours_with_a_model():
    settings = parse(BASE.split(), 1)
    assert (settings.optimizer.adam_beta2, settings.optimizer.weight_decay) == (0.95, 0.1)
    tuned = parse("--model tiny --load x --dataset y --recipe deepseek-v3".split(), 1, parser=build_finetuning_parser)
    assert tuned.optimizer.adam_beta2 == 0.95


@pytest.mark.parametrize("arguments, normalised", [
    ("", True), ("--moe-router-pre-softmax", False), ("--moe-router-score-function sigmoid", True),
    ("--moe-router-score-function sigmoid --moe-router-pre-softmax", True)])
def test_when_megatron_normalises_scores(arguments, normalised):
    assert parse(f"{SMALL} --num-experts 8 {arguments}".split(), 1).model.norm_topk_prob is normalised


def test_a_model_with_yarn_of_factor_one_has_none():
    assert parse(f"{SMALL} --rope-type yarn --mscale 1.0".split(), 1).model.rope_scaling is None
    scaling = parse(f"{SMALL} --rotary-scaling-factor 40".split(), 1).model.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.mscale, scaling.mscale_all_dim) == ("yarn", 40, 1.0, 0.0)


def test_the_vocabulary(tokenizer):
    line = SMALL.replace("--vocab-size 8192", "")
    assert parse(f"{line} --tokenizer-model {tokenizer}".split(), 1).model.vocab_size == 129280
    assert parse(f"{line} --tokenizer-type ByteTokenizer".split(), 1).model.vocab_size == 260
    padded = f"{line} --tokenizer-type ByteTokenizer --make-vocab-size-divisible-by 64"
    assert parse(padded.split(), 1).model.vocab_size == 320
    assert parse(f"{padded} --tensor-model-parallel-size 2".split(), 2).model.vocab_size == 384
    assert parse(f"{SMALL} --padded-vocab-size 9000".split(), 1).model.vocab_size == 9000


def test_heads_that_queries_share_by_arguments_alone():
    """Megatron-LM's attention without --multi-latent-attention: with biases Qwen2's, plain Llama's, normed Qwen3's."""
    common = SMALL.replace(" --multi-latent-attention", "")
    grouped = f"{common} --group-query-attention --num-query-groups 2"
    qwen2 = parse(f"{grouped} --add-qkv-bias".split(), 1)
    assert (qwen2.model.model_type, qwen2.model.num_key_value_heads, qwen2.model.head_dim) == ("qwen2", 2, 32)
    assert "4 heads of 32 for 2 of keys and values, with biases" in qwen2.notes[0]
    assert "--qk-layernorm" not in qwen2.notes[2]
    llama, qwen3 = parse(common.split(), 1).model, parse(f"{grouped} --qk-layernorm --kv-channels 64".split(), 1).model
    assert (llama.model_type, llama.num_key_value_heads) == ("llama", 4)
    assert (qwen3.model_type, qwen3.head_dim) == ("qwen3", 64)


def test_what_an_architecture_lacks_is_named_at_once():
    text, *others = problems("--hidden-size 128 --train-iters 1 --data-path a")
    assert not others
    for part in ("the architecture lacks --num-layers, --num-attention-heads, --max-position-embeddings, "
                 "--vocab-size (the tokenizer gives none: --tokenizer-model is missing",
                 "without these --model is missing (--help-models"):
        assert part in text
    assert "--hidden-size" not in text
    text, *others = problems("--train-iters 1 --data-path a")
    assert text.startswith("--model is missing (--help-models ") and not others
    assert "--num-layers, --hidden-size" in text


def test_the_start_says_which_architecture_it_is():
    understood, against, marks, *_ = parse(f"{SMALL} {AS_TINY} --swiglu --num-layers 5 --moe-layer-freq [0]+[1]*4"
                                           .split(), 1).notes
    assert understood == (
        "architecture by arguments: 5 layers (1 dense, width 384), hidden size 128, 4 heads of 32+16 and 32, latents "
        "64 and 32; 16 experts of 64, top 4 by sigmoid, normalised, from 2 of 4 groups, with a bias, 1 shared; 1 MTP "
        "modules; vocabulary 8192, embeddings untied")
    assert against == "nearest preset tiny, whose values are in parentheses: num_hidden_layers 5 (4)"
    assert "--normalization RMSNorm" in marks and "--swiglu" not in marks


def test_all_problems_are_told_at_once():
    found = problems(f"{BASE} --fp16 --no-such-thing 3 --tensor-model-parallel-size 3 --moe-z-loss-coeff 0.1 "
                     "--hidden-dropout 0.1 --attention-dropout 0.1 --fp8-recipe mxfp8 --save-interval 5 "
                     "--global-batch-size 3", 8)
    assert not any("data-parallel ranks" in text for text in found), "it follows from the ranks"
    beginnings = ("--fp16: float16", "--no-such-thing is no option", "--moe-z-loss-coeff 0.1: the router",
                  "--hidden-dropout 0.1 is not supported", "--attention-dropout 0.1 is not",
                  "--tensor-model-parallel-size 3 x",
                  "--tensor-model-parallel-size 3 does not divide --num-attention-heads 4",
                  "--fp8-recipe mxfp8 needs", "--save-interval 5 needs")
    for beginning in beginnings:
        assert any(text.startswith(beginning) for text in found), (beginning, found)


def test_all_wrong_values_are_told_at_once():
    found = problems(f"{BASE} --lr abc --micro-batch-size 0 --fp16 --bf16 yes --save-interval 5 "
                     "--global-batch-size 3", 2)
    assert found == (
        "--fp16: float16 is not computed in; use --bf16", "--lr: 'abc' is no number",
        "--micro-batch-size: 0 is not at least 1", "unexpected 'yes'", "--save-interval 5 needs --save")
    alone = problems(SMALL.replace("--num-layers 4", "--num-layers x").replace("--train-iters 10", "--train-iters 0"))
    assert alone == ("--num-layers: 'x' is no whole number", "--train-iters: 0 is not at least 1")
    assert problems("--model tiny --bf16 yes --train-iters 1 --data-path a") == ("unexpected 'yes'",)


def test_what_is_missing_is_told_with_the_rest():
    found = problems("--model tiny --fp16 --moe-router-topk 99")
    beginnings = ("--fp16: ", "one of the arguments --train-iters", "--moe-router-topk 99", "the data for training")
    assert all(map(str.startswith, found, beginnings)) and len(found) == 4


@pytest.mark.parametrize("words, becomes", [
    ("--qk-nope-head-dim 96 --qk-rope-head-dim=32", "--qk-head-dim 96 --qk-pos-emb-head-dim 32"),
    ("--schedules-method dualpipev", "--pipeline-schedule DualPipeV"),
    ("--moe-token-dispatcher-type alltoall_seq", "--moe-token-dispatcher-type alltoall"),
    ("--tokenizer-type PretrainedFromHF --tokenizer-name-or-path T", "--tokenizer-type HuggingFaceTokenizer "
     "--tokenizer-model T"),
    ("--use-multi-token-prediction", "--mtp-num-layers 1"),
    ("--num-mtp-predictor 2 --use-multi-token-prediction", "--mtp-num-layers 2"),
    ("--num-mtp-predictor 2", ""),
    ("--num-layers 6 --first-k-dense-replace 2", "--num-layers 6 --moe-layer-freq ([0]*2+[1]*4)"),
    ("--num-layers 6 --first-k-dense-replace 2 --moe-layer-freq 2",
     "--num-layers 6 --moe-layer-freq [0,0,1,0,1,0]"),
    ("--num-layers 6 --noop-layers 4,5 --first-k-dense-replace 1",
     "--num-layers 4 --moe-layer-freq ([0]*1+[1]*3)"),
    ("--n-shared-experts 2 --moe-intermediate-size 64",
     "--moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 128"),
    ("--rope-scaling-factor 40", ""),
    ("--rope-scaling-factor 40 --rope-scaling-type yarn", "--rope-type yarn --rotary-scaling-factor 40"),
    ("--context-parallel-algo ulysses_cp_algo", ""),
    ("--context-parallel-algo megatron_cp_algo --context-parallel-size 2",
     "--context-parallel-size 2 --cp-comm-type ring"),
    ("--recompute-granularity selective --recompute-modules core_attn moe_act",
     "--recompute-granularity selective --recompute-modules moe_act"),
    ("--eval-interval 5 --eval-iters 2", "--eval-interval 5 --eval-iters 2"),
    ("--eval-interval 5", "--eval-interval 5 --eval-iters 100"),
    ("--optimizer adam --moe-z-loss-coeff 0.0 --rotary-percent 1", "--rotary-percent 1"),
    ("--multi-latent-attention --kv-channels 128 --num-query-groups 2", "--multi-latent-attention"),
    ("--no-load-optim --save-interval 5 --recompute-method uniform --moe-token-drop-policy probs", ""),
    ("--load a --no-load-optim", "--load a --no-load-optim"),
    ("--model tiny --no-load-optim", "--model tiny --no-load-optim"),
    ("--moe-router-load-balancing-type aux_loss", "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0"),
    ("--moe-router-load-balancing-type none", "--moe-router-load-balancing-type none"),
])
def test_words_that_mean_something_here(words, becomes):
    line = translate(words.split(), build_parser().options, str)
    assert (shlex.join(line.argv), line.problems) == (shlex.join(becomes.split()), ())


@pytest.mark.parametrize("words, beginning", [
    ("--noop-layers 0 --num-layers 6", "--noop-layers 0: only the last layers"),
    ("--first-k-dense-replace 2", "--first-k-dense-replace 2: use --moe-layer-freq"),
    ("--context-parallel-algo ulysses_cp_algo --context-parallel-size 2",
     "--context-parallel-algo ulysses_cp_algo: use"),
    ("--moe-intermediate-size 64 --moe-ffn-hidden-size 32", "--moe-ffn-hidden-size 64 and --moe-ffn-hidden-size 32"),
    ("--n-shared-experts 1 --moe-ffn-hidden-size 8 --moe-shared-expert-intermediate-size 4",
     "--moe-shared-expert-intermediate-size 4 conflicts with --moe-shared-expert-intermediate-size 8"),
    ("--logging-level", "--logging-level takes one value, not none"),
    ("--use-flash-attn yes", "--use-flash-attn takes no value, not yes"),
    ("--tokenizer-type Llama2Tokenizer", "--tokenizer-type Llama2Tokenizer: use HuggingFaceTokenizer, and as"),
    ("--optimizer muon", "--optimizer muon: the optimizer is AdamW"),
    ("--schedules-method dualpipe", "--schedules-method dualpipe: use --pipeline-schedule"),
])
def test_words_that_are_refused(words, beginning):
    text, *others = translate(words.split(), build_parser().options, str).problems
    assert text.startswith(beginning) and not others


def test_the_page_is_made_of_the_tables():
    path = Path(__file__).parents[3] / "docs" / "megatron_arguments.md"
    assert path.read_text() == page(), "run python -m megatron_deepseek.arguments.megatron.page"

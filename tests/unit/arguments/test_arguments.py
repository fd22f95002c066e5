"""The command line: what is refused, with which words, and what settings come of what is accepted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments import settings as settings_module
from megatron_deepseek.arguments.architecture import build_model
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.arguments.request import Request
from megatron_deepseek.arguments.distillation import DISTILLATION
from megatron_deepseek.arguments.finetuning_validation import FINE_TUNING
from megatron_deepseek.arguments.grpo_validation import GRPO
from megatron_deepseek.arguments.preference import PREFERENCE
from megatron_deepseek.arguments.validation import RULES
from megatron_deepseek.model.architecture.presets import TINY, V2_LITE, V3
from megatron_deepseek.training.schedules import schedule_of

ENTRY = Path(__file__).parents[3] / "pretrain_deepseek.py"
BASE = "--model tiny --data-path corpus --train-iters 10 --seq-length 256"
PP2 = "--pipeline-model-parallel-size 2"

# name of the rule: (ranks, arguments, fragments of the message)
REFUSED = {
    "a layout conflicts with --auto-layout":
        (2, "--auto-layout h100 --global-batch-size 8 --tensor-model-parallel-size 2",
         ["--auto-layout h100 chooses --tensor-model-parallel-size itself", "tools/plan.py search"]),
    "--auto-layout needs --global-batch-size": (1, "--auto-layout h100", ["--auto-layout h100", "--global-batch-size"]),
    "--exp-avg-dtype is of an unsupported type":
        (1, "--exp-avg-dtype fp8", ["--exp-avg-dtype fp8", "only fp32 and bf16"]),
    "--exp-avg-sq-dtype is of an unsupported type":
        (1, "--exp-avg-sq-dtype fp16", ["--exp-avg-sq-dtype fp16", "only fp32 and bf16"]),
    "--exp-avg-dtype bf16 conflicts with a large --adam-beta1": (1, "--exp-avg-dtype bf16 --adam-beta1 0.999",
                                         ["--exp-avg-dtype bf16", "--adam-beta1 0.999"]),
    "--exp-avg-sq-dtype bf16 conflicts with a large --adam-beta2": (1, "--exp-avg-sq-dtype bf16 --adam-beta2 0.999",
                                            ["--exp-avg-sq-dtype bf16", "--adam-beta2 0.999"]),
    "the model has none of the frozen parameters":
        (1, "--freeze-parameters model.norm.weight model.layers.*.mlp.expert.* --optimizer-cpu-offload",
         ["--freeze-parameters model.layers.*.mlp.expert.* matches no", "model.layers.*.mlp.experts.down_proj"]),
    "the frozen parameters leave nothing to train":
        (1, "--freeze-parameters model.* lm_head.weight", ["--freeze-parameters ['model.*', 'lm_head.weight']",
                                                          "no parameter to train"]),
    "DoRA is not supported": (1, "--lora-rank 8 --load base --use-dora", ["--use-dora is not supported"]),
    "options of LoRA need --lora-rank": (1, "--lora-plus-ratio 4", ["--lora-plus-ratio needs --lora-rank"]),
    "no layer has the name of a LoRA target": (1, "--lora-rank 8 --load base --lora-target all q_proj",
                                               ["--lora-target q_proj matches no linear layer", "it has q_b_proj"]),
    "a quantised base needs --lora-rank": (1, "--quantization-bit 4", ["--quantization-bit 4 needs --lora-rank"]),
    "--double-quantization is of NF4": (1, "--lora-rank 8 --load base --no-double-quantization",
                                        ["--no-double-quantization need --quantization-bit 4"]),
    "NF4 is not multiplied as FP8": (1, "--lora-rank 8 --load base --quantization-bit 4 --fp8-format e4m3",
                                     ["--quantization-bit 4 conflicts with --fp8-format e4m3"]),
    "a quantised weight needs whole blocks on each rank": (
        1, "--lora-rank 8 --load base --quantization-bit 8 --fp8-format e4m3",
        ["--quantization-bit 8 with --fp8-format e4m3", "64 rows of model.layers.1.mlp.experts.gate_up_proj"]),
    "LoRA needs --load": (1, "--lora-rank 8", ["--lora-rank 8 needs --load"]),
    "LoRA has frozen the weights already": (1, "--lora-rank 8 --load base --freeze-parameters lm_head.weight",
                                            ["--freeze-parameters ['lm_head.weight']", "--lora-rank 8"]),
    "new MTP modules would stay random under LoRA": (1, "--lora-rank 8 --load base --init-mtp --mtp-num-layers 1",
                                                     ["--init-mtp conflicts with --lora-rank 8"]),
    "there is no model to export beside an adapter": (1, "--lora-rank 8 --load base --save dir --save-hf hf",
                                                      ["--save-hf hf conflicts", "--save-adapter"]),
    "a reader of the adapter needs --save-adapter": (1, "--lora-rank 8 --load base --save dir --adapter-for vllm",
                                                     ["--adapter-for vllm needs --save-adapter"]),
    "an adapter is written from a checkpoint": (1, "--lora-rank 8 --load base --save-adapter dir",
                                                ["--save-adapter dir needs --save"]),
    "a router without an adapter has a bias that stays":
        (1, "--lora-rank 8 --load base --moe-router-bias-update-rate 0.001",
         ["--moe-router-bias-update-rate 0.001 needs --lora-target router"]),
    "padding the experts' input to their capacity is not supported":
        (1, "--moe-pad-expert-input-to-capacity", ["--moe-pad-expert-input-to-capacity"]),
    "dropout in attention is not supported": (1, "--attention-dropout 0.1", ["--attention-dropout 0.1"]),
    "dropout of hidden states is not supported": (1, "--hidden-dropout 0.1", ["--hidden-dropout 0.1"]),
    "the sizes ask for several ranks, but one process was started":
        (1, "--tensor-model-parallel-size 2 --expert-model-parallel-size 4",
                                     ["--tensor-model-parallel-size 2 --expert-model-parallel-size 4 needs 4 processes",
                                      "tools/launch.py --nproc_per_node 4"]),
    "the tensor- and pipeline-parallel sizes do not divide the number of ranks":
        (4, "--tensor-model-parallel-size 3", ["--tensor-model-parallel-size 3", "4 ranks"]),
    "the tensor- and context-parallel sizes do not divide the ranks of a stage":
        (4, "--context-parallel-size 3", ["--context-parallel-size 3", "4 ranks"]),
    "twice the context-parallel size does not divide the sequence length":
        (2, "--context-parallel-size 2 --seq-length 250",
                        ["--seq-length 250", "2 x --context-parallel-size 2"]),
    "expert parallelism needs experts": (2, "--expert-model-parallel-size 2 --num-experts 0",
                           ["--expert-model-parallel-size 2", "--num-experts 0"]),
    "forced load balancing needs experts": (1, "--num-experts 0 --moe-router-force-load-balancing",
                                       ["--moe-router-force-load-balancing", "--num-experts 0"]),
    "shared experts need routed experts": (1, "--num-experts 0 --moe-shared-expert-intermediate-size 256",
                                       ["--moe-shared-expert-intermediate-size 256", "--num-experts 0"]),
    "recomputing the experts' activation needs experts":
        (1, "--num-experts 0 --recompute-granularity selective --recompute-modules moe_act",
                          ["--recompute-modules moe_act", "--num-experts 0"]),
    "the expert-parallel size does not divide the ranks of a stage":
        (2, "--expert-model-parallel-size 4", ["--expert-model-parallel-size 4", "2 ranks"]),
    "the expert-parallel size does not divide the number of experts":
        (8, "--expert-model-parallel-size 8 --num-experts 12",
                       ["--expert-model-parallel-size 8", "--num-experts 12"]),
    "expert tensor parallelism needs experts": (2, "--expert-tensor-parallel-size 2 --num-experts 0",
                            ["--expert-tensor-parallel-size 2", "--num-experts 0"]),
    "the expert- and expert-tensor-parallel sizes do not divide the ranks of a stage":
        (4, "--expert-model-parallel-size 2 --expert-tensor-parallel-size 4",
                      ["--expert-model-parallel-size 2 x --expert-tensor-parallel-size 4", "4 ranks"]),
    "the expert-tensor-parallel size does not divide the width of an expert":
        (4, "--expert-tensor-parallel-size 4 --moe-ffn-hidden-size 66",
                      ["--expert-tensor-parallel-size 4", "--moe-ffn-hidden-size 66"]),
    "a capacity of experts needs experts": (1, "--moe-expert-capacity-factor 1.5 --num-experts 0",
                                 ["--moe-expert-capacity-factor 1.5", "--num-experts 0"]),
    "a drop policy needs a capacity of experts": (1, "--moe-token-drop-policy position",
                                     ["--moe-token-drop-policy position", "--moe-expert-capacity-factor"]),
    "overlapped dispatch needs DualPipeV on several pipeline ranks":
        (2, f"{PP2} --overlap-moe-expert-parallel-comm --global-batch-size 8",
                      ["--overlap-moe-expert-parallel-comm", "--pipeline-schedule DualPipeV", "1F1B"]),
    "overlapped dispatch needs an all-to-all":
        (2, f"{PP2} --pipeline-schedule DualPipeV --overlap-moe-expert-parallel-comm "
                               "--global-batch-size 8", ["--overlap-moe-expert-parallel-comm",
                                                         "--expert-model-parallel-size 1"]),
    "overlap of shared experts needs shared experts":
        (1, "--moe-shared-expert-overlap --moe-shared-expert-intermediate-size 0",
                        ["--moe-shared-expert-overlap", "--moe-shared-expert-intermediate-size 0"]),
    "grouped dispatch needs nodes that divide expert groups evenly":
        (4, "--expert-model-parallel-size 4 --moe-token-dispatcher-type grouped "
                          "--moe-ranks-per-node 3", ["--moe-ranks-per-node 3", "--expert-model-parallel-size 4"]),
    "the tensor-parallel size does not divide the number of attention heads": (3, "--tensor-model-parallel-size 3",
                     ["--tensor-model-parallel-size 3", "--num-attention-heads 4"]),
    "of the tensor-parallel size and the heads of keys and values neither is a multiple of the other":
        (4, "--tensor-model-parallel-size 4 --num-experts 0 --group-query-attention --num-attention-heads 12 "
                          "--num-query-groups 6", ["--tensor-model-parallel-size 4", "--num-query-groups 6"]),
    "no family of models has this router with grouped-query attention":
        (1, "--group-query-attention", ["grouped-query attention", "topk_method noaux_tc"]),
    "the tensor-parallel size does not divide the size of the vocabulary":
        (2, "--tensor-model-parallel-size 2 --vocab-size 8191",
                          ["--tensor-model-parallel-size 2", "--vocab-size 8191"]),
    "the tensor-parallel size does not divide the width of the dense layers":
        (2, "--tensor-model-parallel-size 2 --ffn-hidden-size 511",
                           ["--tensor-model-parallel-size 2", "--ffn-hidden-size 511"]),
    "the tensor-parallel size does not divide the width of the shared experts":
        (2, "--tensor-model-parallel-size 2 --moe-ffn-hidden-size 129",
                            ["--tensor-model-parallel-size 2", "--moe-shared-expert-intermediate-size 129"]),
    "the tensor- and context-parallel sizes do not divide the sequence length":
        (2, "--tensor-model-parallel-size 2 --seq-length 255",
                        ["--tensor-model-parallel-size 2", "--seq-length 255"]),
    "the sequence length exceeds the model's positions":
        (1, "--seq-length 4097", ["--seq-length 4097", "--max-position-embeddings 4096"]),
    "the micro-batches of the data ranks do not divide the global batch":
        (4, "--rampup-batch-size 8 6 100 --global-batch-size 32",
                     ["--global-batch-size 14 (of --rampup-batch-size 8 6 100)", "--micro-batch-size 1 x 4"]),
    "the stages of equal size do not divide the layers": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 4",
                              ["--num-layers-per-virtual-pipeline-stage 4", "--num-layers 4"]),
    "the pipeline-parallel size does not divide the stages of the layout":
        (2, f"{PP2} --pipeline-model-parallel-layout Ett|t|tmL",
                         ["--pipeline-model-parallel-layout 'Ett|t|tmL' has 3 stages",
                          "--pipeline-model-parallel-size 2"]),
    "layers for the ends of the pipeline need several pipeline ranks": (1, "--decoder-first-pipeline-num-layers 3",
                         ["--decoder-first-pipeline-num-layers 3", "--pipeline-model-parallel-size 1"]),
    "the layers of the ends are given beside those of every stage":
        (2, f"{PP2} --decoder-last-pipeline-num-layers 3 --pipeline-model-parallel-layout Ett|ttmL",
                        ["--decoder-last-pipeline-num-layers 3", "--pipeline-model-parallel-layout"]),
    "the ranks between the ends do not divide the layers left to them":
        (4, "--pipeline-model-parallel-size 4 --num-layers 8 --decoder-first-pipeline-num-layers 3",
                    ["--decoder-first-pipeline-num-layers 3 of --num-layers 8", "--pipeline-model-parallel-size 4"]),
    "the embedding or the loss counts as a layer where the layers of stages are given":
        (2, f"{PP2} --account-for-loss-in-pipeline-split --pipeline-model-parallel-layout Ett|ttmL",
                        ["--account-for-loss-in-pipeline-split", "--pipeline-model-parallel-layout"]),
    "the layers, with the parts that count as one, do not divide among the stages":
        (2, f"{PP2} --account-for-loss-in-pipeline-split",
                        ["--num-layers 4 with --account-for-loss-in-pipeline-split (5 in all)", "2 stages"]),
    "one pipeline rank does not hold several stages":
        (1, "--num-virtual-stages-per-pipeline-rank 2", ["--pipeline-model-parallel-size 1", "2"]),
    "the schedule does not run with so many stages on a rank":
        (2, f"{PP2} --pipeline-schedule DualPipeV --pipeline-model-parallel-layout Ett|ttmL",
                            ["--pipeline-schedule DualPipeV", "1 stages on a rank"]),
    "the stages are more than the layers":
        (2, f"{PP2} --num-virtual-stages-per-pipeline-rank 3", ["--num-layers 4", "6 stages"]),
    "the layout string does not fit the model": (2, f"{PP2} --pipeline-model-parallel-layout Ett|tmL",
                         ["--pipeline-model-parallel-layout 'Ett|tmL'", "3 t", "--num-layers is 4"]),
    "the schedule does not run with so many micro-batches":
        (2, f"{PP2} --global-batch-size 3 --pipeline-schedule DualPipeV",
                                   ["--pipeline-schedule DualPipeV", "3 micro-batches", "--global-batch-size 3",
                                    "4 stages"]),
    "an update rate of the router's bias needs that bias":
        (1, "--model deepseek-v2-lite --moe-router-bias-update-rate 0.001",
                            ["--moe-router-bias-update-rate 0.001", "greedy"]),
    "a balance loss needs experts": (1, "--num-experts 0 --moe-aux-loss-coeff 0.1",
                                ["--moe-aux-loss-coeff 0.1", "--num-experts 0"]),
    "a balance loss is given a weight, but switched off":
        (1, "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0.1",
                             ["--moe-aux-loss-coeff 0.1", "--moe-router-load-balancing-type none"]),
    "the device balance loss needs groups of experts": (1, "--model deepseek-v2-lite --moe-device-aux-loss-coeff 0.1",
                       ["--moe-device-aux-loss-coeff 0.1", "--moe-router-num-groups is 1"]),
    "the communication balance loss needs groups of experts":
        (1, "--model deepseek-v2-lite --moe-communication-aux-loss-coeff 0.1",
                              ["--moe-communication-aux-loss-coeff 0.1", "--moe-router-num-groups is 1"]),
    "an FP8 recipe needs an FP8 format": (1, "--fp8-recipe blockwise", ["--fp8-recipe blockwise", "--fp8-format"]),
    "gathering FP8 weights needs an FP8 format": (1, "--fp8-param-gather", ["--fp8-param-gather", "--fp8-format e4m3"]),
    "the FP8 format is not e4m3": (1, "--fp8-format hybrid", ["--fp8-format hybrid", "e4m3"]),
    "the FP8 recipe is not blockwise": (1, "--fp8-format e4m3 --fp8-recipe mxfp8", ["--fp8-recipe mxfp8", "blockwise"]),
    "modules to recompute need selective recomputation":
        (1, "--recompute-granularity full --recompute-modules moe_act",
                          ["--recompute-modules", "moe_act", "selective"]),
    "a method of recomputation needs full recomputation":
        (1, "--recompute-granularity selective --recompute-method uniform",
                         ["--recompute-method uniform", "selective"]),
    "recomputing several layers as one is not supported":
        (1, "--recompute-granularity full --recompute-num-layers 2", ["--recompute-num-layers 2"]),
    "the data is not given, given twice or unreadable":
        (1, "--data-args-path corpus.txt", ["--data-path corpus", "--data-args-path corpus.txt conflict"]),
    "evaluation needs validation data": (1, "--eval-iters 2 --split 9,0,1", ["--eval-iters 2", "--split 9,0,1"]),
    "options of tasks need tasks": (1, "--eval-tasks-limit 5", ["--eval-tasks-limit 5", "needs --eval-tasks"]),
    "several validation sets need evaluations":
        (1, "--multiple-validation-sets", ["--multiple-validation-sets", "--full-validation or --eval-iters"]),
    "names of validation sets need several of them":
        (1, "--full-validation --validation-set-names a b", ["--validation-set-names", "--multiple-validation-sets"]),
    "a name is that of two validation sets":
        (1, "--full-validation --multiple-validation-sets --validation-set-names a b a",
         ["--validation-set-names", "a twice"]),
    "an interval of evaluations needs evaluations": (1, "--eval-interval 5", ["--eval-interval 5", "--eval-iters"]),
    "positions by document need attention by document":
        (1, "--reset-position-ids", ["--reset-position-ids", "--reset-attention-mask"]),
    "--save-interval needs --save": (1, "--save-interval 5", ["--save-interval 5", "--save"]),
    "an export needs --save": (1, "--save-hf out", ["--save-hf out", "--save"]),
    "an export needs a directory other than --save":
        (1, "--save-hf run/../out --save ./out", ["--save-hf run/../out", "--save out"]),
    "a type of the export needs one": (1, "--save-hf-dtype fp32", ["--save-hf-dtype fp32 needs --save-hf"]),
    "a format of FP8 scales needs FP8 weights":
        (1, "--fp8-scale-format ue8m0 --save-hf out --save run", ["--fp8-scale-format ue8m0", "--save-hf-dtype fp8"]),
    "--save-every-seconds needs --save": (1, "--save-every-seconds 5", ["--save-every-seconds 5", "--save"]),
    "--keep-last needs --save": (1, "--keep-last 5", ["--keep-last 5", "--save"]),
    "--async-save needs --save": (1, "--async-save", ["--async-save", "--save"]),
    "--no-save-optim needs --save": (1, "--no-save-optim", ["--no-save-optim", "--save"]),
    "--chat-template needs --save": (1, "--chat-template deepseek-v3", ["--chat-template deepseek-v3 needs --save"]),
    "--all needs --explain-layout": (1, "--all", ["--all needs --explain-layout"]),
    "--ckpt-step needs --load": (1, "--ckpt-step 5", ["--ckpt-step 5", "--load"]),
    "a limit of skipped steps needs --nan-policy skip":
        (1, "--max-skipped-steps 5", ["--max-skipped-steps 5", "--nan-policy skip", "stop"]),
    "--finetune needs --load": (1, "--finetune", ["--finetune", "--load"]),
    "--finetune would remove the run that it loads":
        (1, "--finetune --load runs/a --save runs/../runs/a",
         ["--finetune begins at iteration 0", "--load runs/a needs another directory for --save"]),
    "--overwrite needs --save": (1, "--overwrite", ["--overwrite needs --save"]),
    "--overwrite would remove the directory that is loaded":
        (1, "--overwrite --load a --save a", ["--overwrite conflicts with --load a"]),
    "--no-load-optim needs --load": (1, "--no-load-optim", ["--no-load-optim", "--load"]),
    "--init-mtp needs --load": (1, "--init-mtp", ["--init-mtp needs --load"]),
    "--init-mtp needs MTP modules":
        (1, "--init-mtp --load /nowhere --mtp-num-layers 0", ["--init-mtp", "--mtp-num-layers is 0"]),
    "the profile ends before it begins": (1, "--profile --profile-step-start 5 --profile-step-end 5",
                ["--profile-step-start 5", "--profile-step-end 5"]),
}
# Further reasons of rules that have several: (ranks, arguments, name of the rule)
OTHER_REASONS = [
    (4, "--pipeline-model-parallel-size 3",
     "the tensor- and pipeline-parallel sizes do not divide the number of ranks"),
    (4, "--tensor-model-parallel-size 2 --context-parallel-size 4",
     "the tensor- and context-parallel sizes do not divide the ranks of a stage"),
    (8, "--tensor-model-parallel-size 4 --context-parallel-size 2 --seq-length 252",
     "the tensor- and context-parallel sizes do not divide the sequence length"),
    (2, "--tensor-model-parallel-size 2 --sequence-parallel --num-experts 0 --seq-length 255",
     "the tensor- and context-parallel sizes do not divide the sequence length"),
    (4, "--rampup-batch-size 6 6 100 --global-batch-size 12",
     "the micro-batches of the data ranks do not divide the global batch"),
    (4, "--global-batch-size 14", "the micro-batches of the data ranks do not divide the global batch"),
    (2, f"{PP2} --pipeline-schedule DualPipeV --rampup-batch-size 2 2 100 --global-batch-size 4",
     "the schedule does not run with so many micro-batches"),
    (1, "--overlap-moe-expert-parallel-comm --pipeline-schedule DualPipeV",
     "overlapped dispatch needs DualPipeV on several pipeline ranks"),
]
# Refused by the parser, by the architecture or by the checks of settings: (whole command line, fragments)
REFUSED_ELSEWHERE = [
    ("--model tiny --data-path a", ["--train-iters", "--train-samples"]),
    ("--data-path a --train-iters 1", ["--model"]),
    ("--model tiny --train-iters 1", ["--data-path"]),
    ("--model gpt2 --data-path a --train-iters 1", ["--model", "'gpt2'", "deepseek-v3"]),
    (f"{BASE} --train-samples 5", ["--train-samples", "--train-iters"]),
    (f"{BASE} --lr abc", ["--lr: 'abc' is no number"]),
    (f"{BASE} --lr nan", ["--lr: nan"]),
    (f"{BASE} --lr -1", ["--lr: -1"]),
    (f"{BASE} --micro-batch-size 0", ["--micro-batch-size: 0 is not at least 1"]),
    (f"{BASE} --micro-batch-size 1.5", ["--micro-batch-size: '1.5' is no whole number"]),
    (f"{BASE} --adam-beta1 1", ["--adam-beta1: 1"]),
    (f"{BASE} --split 1,2,3,4", ["--split: '1,2,3,4'"]),
    (f"{BASE} --split 0,0", ["--split: '0,0'"]),
    (f"{BASE} --pipeline-schedule 2F2B", ["--pipeline-schedule", "'2F2B'", "1F1B"]),
    (f"{BASE} --no-such-thing 3", ["--no-such-thing"]),
    (f"{BASE} --num-experts 16 --moe-router-topk 17", ["--moe-router-topk 17", "8 experts"]),
    (f"{BASE} --moe-router-num-groups 5", ["n_routed_experts 16", "--moe-router-num-groups 5"]),
    (f"{BASE} --qk-pos-emb-head-dim 15", ["--qk-pos-emb-head-dim 15"]),
    (f"{BASE} --moe-shared-expert-intermediate-size 200", ["intermediate-size 200", "--moe-ffn-hidden-size 64"]),
    (f"{BASE} --moe-layer-freq [0,1]", ["--moe-layer-freq describes 2", "--num-layers is 4"]),
    (f"{BASE} --moe-layer-freq [1,0,0,1]*1+[2]", ["--moe-layer-freq"]),
    (f"{BASE} --moe-layer-freq [1,1,0,1]", ["--moe-layer-freq [1, 1, 0, 1]"]),
    (f"{BASE} --moe-layer-freq __import__('os')[0]", ["--moe-layer-freq"]),
    (f"{BASE} --beta-fast 16", ["--beta-fast 16", "--rotary-scaling-factor"]),
    (f"{BASE} --min-lr 1", ["--min-lr 1.0", "--lr 0.00022"]),
    (f"{BASE} --lr-warmup-iters 10", ["--lr-warmup-iters 10 (10 samples)", "--train-iters 10 (10 samples)"]),
    (f"{BASE} --lr-decay-style WSD", ["--lr-wsd-decay-iters or --lr-wsd-decay-samples"]),
    (f"{BASE} --rampup-batch-size 8 3 100 --global-batch-size 16", ["--rampup-batch-size 8", "16", "3"]),
    (f"{BASE} --num-virtual-stages-per-pipeline-rank 2 --pipeline-model-parallel-layout EttttmL",
     ["--pipeline-model-parallel-layout", "--num-virtual-stages-per-pipeline-rank"]),
]


def message(arguments: str, ranks: int = 1) -> str:
    with pytest.raises(ValueError) as caught:
        parse(arguments.split(), ranks)
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_table_refuses(name):
    ranks, arguments, fragments = REFUSED[name]
    text = message(f"{BASE} {arguments}", ranks)
    assert "\n" not in text
    assert all(fragment in text for fragment in fragments), text
    assert name == first_rule(ranks, arguments), "another rule applied"


@pytest.mark.parametrize("ranks, arguments, name", OTHER_REASONS)
def test_table_refuses_for_each_reason(ranks, arguments, name):
    assert first_rule(ranks, arguments) == name


def first_rule(ranks: int, arguments: str) -> str | None:
    args = build_parser().parse_args(f"{BASE} {arguments}".split())
    request = Request(args, build_model(args), ranks)
    for rule in RULES:
        try:
            if rule.when(request):
                return rule.name
        except ValueError:
            return rule.name
    return None


def test_every_rule_is_tested():
    elsewhere = {rule.name for rule in (*FINE_TUNING, *PREFERENCE, *DISTILLATION, *GRPO)}  # in tests of their own
    untested = {rule.name for rule in RULES} - set(REFUSED) - elsewhere
    tested_below = {"the samples do not fill one batch", "a balance loss needs a weight"}
    assert untested == tested_below


def test_names_of_rules_say_the_problem():
    """docs/compatibility.md and --explain-layout show them to users: phrases with a verb, without axes of a mesh."""
    for name in (rule.name for rule in RULES):
        verbs = "is|are|do|does|has|need|needs|ask|ends|exceeds|leave|would|conflicts|writes|answers|predicts"
        assert re.search(rf" ({verbs}) ", name), name
        assert not re.search(r"\bwhat\b|\b(tp|pp|ep|etp|cp|dp)\b", name), name


def test_what_just_fits_is_accepted():
    assert settings("--seq-length 4096").data.seq_length == TINY.max_position_embeddings
    exact = "--model tiny --data-path a --train-samples 4 --global-batch-size 4 --seq-length 64"
    assert parse(exact.split(), 1).run.train_iters == 1


def test_a_split_in_quotes_is_a_split():
    """Megatron-LM's llama3_8b script, which keeps options in an array, passes its quotes on."""
    assert settings("--split '99,1,0'").data.split == "99,1,0"


def test_no_validation_data_of_its_own():
    text = "--model tiny --train-iters 1 --seq-length 64 --train-data-path a --eval-iters 2"
    assert "--eval-iters 2 has no data" in message(text)
    assert parse(f"{text} --valid-data-path b".split(), 1).run.eval_iters == 2


def test_too_few_samples():
    assert "--train-samples 3" in message("--model tiny --data-path a --train-samples 3 --global-batch-size 4 "
                                          "--seq-length 64")


def test_balance_without_weight(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf_dict() | {"aux_loss_alpha": 0}))
    text = message(f"{BASE} --model {tmp_path} --moe-router-load-balancing-type aux_loss")
    assert "--moe-router-load-balancing-type aux_loss needs --moe-aux-loss-coeff" in text


@pytest.mark.parametrize("arguments, fragments", REFUSED_ELSEWHERE)
def test_refused_elsewhere(arguments, fragments):
    text = message(arguments)
    assert "\n" not in text
    assert all(fragment in text for fragment in fragments), text


def test_a_batch_of_the_ramp_that_the_schedule_does_not_run_with():
    text = message(f"{BASE} {PP2} --rampup-batch-size 1 1 9 --global-batch-size 4", 2)
    assert "--pipeline-schedule 1F1B does not run with 1 micro-batches" in text
    assert "(--global-batch-size 1 (of --rampup-batch-size 1 1 9), --micro-batch-size 1)" in text


def settings(arguments: str = "", ranks: int = 1):
    return parse(f"{BASE} {arguments}".split(), ranks)


def test_nothing_given_leaves_the_preset_alone():
    assert settings().model == TINY
    assert settings("--model deepseek-v3").model == V3


def test_given_arguments_override():
    model = settings("--model deepseek-v3 --num-layers 4 --hidden-size 512 --moe-layer-freq [0]*2+[1]*2 "
                     "--moe-shared-expert-intermediate-size 4096 --qk-head-dim 96 --tie-word-embeddings").model
    assert (model.num_hidden_layers, model.hidden_size, model.qk_nope_head_dim) == (4, 512, 96)
    assert (model.first_k_dense_replace, model.moe_layer_freq, model.n_shared_experts) == (2, 1, 2)
    assert model.tie_word_embeddings and model.n_routed_experts == 256


def test_moe_layer_frequency_is_megatrons():
    """A number N puts experts into every N-th layer from layer 0, whatever the preset's dense layers were."""
    model = settings("--moe-layer-freq 2").model
    assert [model.is_moe_layer(i) for i in range(4)] == [True, False, True, False]


def test_groups_imply_group_limited_routing():
    model = settings("--model deepseek-v2-lite --moe-router-num-groups 8 --moe-router-group-topk 3").model
    assert model.topk_method == "group_limited_greedy"
    assert settings("--model deepseek-v2-lite --moe-router-enable-expert-bias").model.topk_method == "noaux_tc"


def test_rope_scaling():
    assert settings("--model deepseek-v3 --rope-type rope").model.rope_scaling is None
    assert settings("--model deepseek-v3 --rotary-scaling-factor 1").model.rope_scaling is None
    scaling = settings("--rotary-scaling-factor 4 --mscale 0.5").model.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.mscale) == ("yarn", 4.0, 0.5)
    assert settings("--model deepseek-v2-lite --mscale 1").model.rope_scaling.factor == 40


def test_layout_of_ranks():
    layout = settings("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --expert-model-parallel-size 4 "
                      "--global-batch-size 8 --sequence-parallel", 16).layout
    assert (layout.dp, layout.pp, layout.tp, layout.ep, layout.edp) == (4, 2, 2, 4, 2)
    assert layout.sequence_parallel
    assert not settings("--sequence-parallel").layout.sequence_parallel, "means nothing without tensor parallelism"


@pytest.mark.parametrize("arguments, expected", [
    ("", ("1F1B", None, 1)),
    ("--pipeline-schedule DualPipeV", ("DualPipeV", None, 2)),
    ("--pipeline-schedule Interleaved1F1B", ("Interleaved1F1B", None, 2)),
    ("--num-virtual-stages-per-pipeline-rank 2", ("Interleaved1F1B", None, 2)),
    ("--num-layers-per-virtual-pipeline-stage 1", ("Interleaved1F1B", "Et|t|t|tmL", 2)),
    ("--pipeline-model-parallel-layout Ettt|tmL", ("1F1B", "Ettt|tmL", 1)),
    ("--decoder-last-pipeline-num-layers 1", ("1F1B", "Ettt|tmL", 1)),
    ("--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3", ("1F1B", "Et|tttmL", 1)),
    ("--num-layers 6 --decoder-first-pipeline-num-layers 4 --num-virtual-stages-per-pipeline-rank 2",
     ("Interleaved1F1B", "Ett|t|tt|tmL", 2)),
    ("--num-layers 6 --decoder-first-pipeline-num-layers 4 --pipeline-schedule DualPipeV",
     ("DualPipeV", "Ett|t|t|ttmL", 2)),
    ("--num-layers 5 --account-for-loss-in-pipeline-split", ("1F1B", "Ettt|ttmL", 1)),
    ("--num-layers 6 --num-layers-per-virtual-pipeline-stage 2 --account-for-embedding-in-pipeline-split "
     "--account-for-loss-in-pipeline-split", ("Interleaved1F1B", "Et|tt|tt|tmL", 2)),
])
def test_pipeline(arguments, expected):
    pipeline = settings(f"{PP2} --global-batch-size 8 {arguments}", 2).pipeline
    assert (pipeline.schedule, pipeline.layout, pipeline.num_virtual_stages) == expected


@pytest.mark.parametrize("parts", [("embedding",), ("loss",), ("embedding", "loss")])
@pytest.mark.parametrize("ranks, virtual", [(2, None), (4, None), (2, 2), (4, 2), (2, 4)])
def test_counted_parts_are_megatron_cores(parts, ranks, virtual):
    """Against its get_num_layers_to_build, stage by stage; an end may hold the embedding or the loss alone."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    stages = ranks * (virtual or 1)
    for layers in filter(None, (stages - len(parts), 3 * stages - len(parts))):
        options = " ".join(f"--account-for-{part}-in-pipeline-split" for part in parts)
        options += f" --num-virtual-stages-per-pipeline-rank {virtual}" if virtual else ""
        layout = settings(f"--pipeline-model-parallel-size {ranks} --num-layers {layers} --mtp-num-layers 0 "
                          f"--global-batch-size {8 * ranks} {options}", ranks).pipeline.layout
        config = SimpleNamespace(
            pipeline_model_parallel_layout=None, num_layers_in_first_pipeline_stage=None,
            num_layers_in_last_pipeline_stage=None, num_layers=layers, pipeline_model_parallel_size=ranks,
            account_for_embedding_in_pipeline_split="embedding" in parts, virtual_pipeline_model_parallel_size=virtual,
            account_for_loss_in_pipeline_split="loss" in parts)
        theirs = [get_num_layers_to_build(config, stage // ranks if virtual else None, stage % ranks)
                  for stage in range(stages)]
        assert [stage.count("t") for stage in layout.split("|")] == theirs


def test_one_stage_runs_under_any_schedule():
    """The same script on one rank: without stages there is nothing to schedule."""
    assert settings("--pipeline-schedule DualPipeV").pipeline.num_virtual_stages == 1


def test_samples_become_iterations():
    """Ramp 2, 4 over 8 samples, then 6: sizes 2 2 4 (8 consumed), 6 6 ... and a rest of 1 is left out. Lengths of the
    learning rate and of the bias stay samples.
    """
    text = "--model tiny --data-path a --seq-length 64 --train-samples 21 --global-batch-size 6"
    result = parse(f"{text} --rampup-batch-size 2 2 8 --lr-warmup-samples 7 --lr-decay-samples 18 "
                   "--moe-router-bias-update-samples 7".split(), 1)
    assert (result.run.train_iters, result.run.train_samples) == (5, 21)
    assert (result.learning_rate.lr_warmup_samples, result.learning_rate.lr_decay_samples) == (7, 18)
    assert (result.loss.moe_router_bias_update_until, result.loss.moe_router_bias_update_samples) == (None, 7)


def test_learning_rate_lengths_follow_the_run():
    result = settings("--lr-warmup-fraction 0.25 --lr-decay-style deepseek-v3 --lr 2.2e-4 --global-batch-size 3")
    schedule = schedule_of(result.learning_rate, result.run, result.batch)
    assert (schedule.decay, schedule.warmup) == (30, 7.5)
    assert schedule.rates.min_lr == pytest.approx(2.2e-5) and schedule.rates.lr_final == pytest.approx(7.3e-6)


def test_learning_rate_of_nothing():
    assert settings("--lr 0").learning_rate.lr == 0.0
    assert settings("--lr 0 --lr-decay-style deepseek-v3").learning_rate.lr_final == 0.0


def test_what_is_given_counts_and_zero_is_given():
    result = settings("--moe-router-bias-update-rate 0 --nan-policy skip --max-skipped-steps 3")
    assert (result.loss.moe_router_bias_update_rate, result.run.max_skipped_steps) == (0.0, 3)
    assert settings().learning_rate.min_lr == 0.0 and settings().run.max_skipped_steps == 10


def test_ranks_of_a_node():
    """As many as the launcher starts on one, unless told otherwise; without a launcher all are on one."""
    sizes = [parse(f"{BASE} {more}".split(), 8, local).communication.moe_ranks_per_node
             for more, local in (("", None), ("", 4), ("--moe-ranks-per-node 2", 4))]
    assert sizes == [8, 4, 2]


def test_balance_comes_from_the_config_unless_given():
    loss = settings().loss
    assert (loss.balance_type, loss.moe_aux_loss_coeff) == ("seq_aux_loss", 1e-4)
    assert loss.moe_router_bias_update_rate == 1e-3
    assert settings("--moe-router-load-balancing-type none").loss.moe_aux_loss_coeff == 0
    loss = settings("--model deepseek-v2-lite --moe-router-load-balancing-type aux_loss").loss
    assert (loss.balance_type, loss.moe_aux_loss_coeff) == ("aux_loss", V2_LITE.aux_loss_alpha)
    assert loss.moe_router_bias_update_rate == 0
    assert settings("--num-experts 0").loss.balance_type == "none"


def test_seed_reaches_weights_and_data():
    result = settings("--seed 7")
    assert result.run.seed == result.data.seed == 7


def test_evaluation_only_when_asked():
    assert (settings().run.eval_iters, settings().run.eval_interval) == (0, None)
    assert settings("--eval-iters 3").run.eval_interval == 1000
    assert settings("--eval-iters 0 --eval-interval 5").run.eval_iters == 0


def test_parsing_looks_at_no_checkpoint(tmp_path):
    """Ranks that each looked for themselves could see different things: rank 0 decides later, for all."""
    assert settings("--load /nowhere --ckpt-step 5").run.load == Path("/nowhere")
    assert settings(f"--save {tmp_path} --load {tmp_path}").run.load == tmp_path
    assert settings(f"--save {tmp_path} --save-hf /").run.save_hf == Path("/")


@pytest.mark.parametrize("arguments, said", [
    ("", ["without --save nothing will be saved", "MTP is trained too", "--mtp-num-layers 0"]),
    ("--save run --mtp-num-layers 1", []),
    ("--save run --mtp-num-layers 0", []),
    ("--save run --mtp-num-layers 0 --moe-layer-freq 1", ["--moe-layer-freq gives experts to layers"]),
    ("--save run --mtp-num-layers 0 --moe-layer-freq [0]*1+[1]*3", []),
])
def test_what_a_user_may_not_expect_is_said(arguments, said):
    assert_told(settings(arguments).notes, said)


def test_a_config_without_a_balance_loss_is_said(tmp_path):
    """With a bias that balances, and without; not where the user has chosen."""
    for preset, words in ((TINY, "aux_loss_alpha of the config is 0; --moe-aux-loss-coeff gives one. The routers' "
                                 "biases balance the experts"), (V2_LITE, "Nothing balances the experts")):
        (tmp_path / "config.json").write_text(json.dumps(preset.to_hf_dict() | {"aux_loss_alpha": 0}))
        model = f"--model {tmp_path} --save run --mtp-num-layers 0"
        assert_told(settings(model).notes, [words])
        assert_told(settings(f"{model} --moe-router-load-balancing-type none").notes, [])
        assert_told(settings(f"{model} --moe-aux-loss-coeff 0.1").notes, [])


def assert_told(notices: tuple[str, ...], said: list[str]) -> None:
    told = "\n".join(notices)
    assert all(words in told for words in said) and len(notices) >= bool(said), told
    assert said or not notices, told


def run_entry(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ENTRY), *arguments], capture_output=True, text=True, timeout=60,
                          env={"PATH": "/usr/bin:/bin", **environ})


def test_entry_prints_one_line_and_exits_with_2():
    result = run_entry(*BASE.split(), "--lr", "x", RANK="0", WORLD_SIZE="2")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "pretrain_deepseek.py: error: --lr: 'x' is no number\n"


def test_help_is_quick_and_imports_no_torch():
    """A second of processor time, so that a busy machine does not count."""
    before = os.times()
    result = run_entry("--help")
    assert result.returncode == 0 and "--pipeline-schedule" in result.stdout
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0
    code = "import sys, megatron_deepseek.arguments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ENTRY.parent).returncode == 0


def test_other_ranks_are_silent(monkeypatch, capsys):
    """They wait, so that torchrun does not stop the rank that speaks before it has."""
    waits = []
    monkeypatch.setattr(settings_module.time, "sleep", waits.append)
    with pytest.raises(SystemExit) as left:
        settings_module.parse_or_exit([*BASE.split(), "--lr", "x"], {"RANK": "3", "WORLD_SIZE": "4"})
    assert left.value.code == 2 and waits == [10.0]
    assert capsys.readouterr() == ("", "")

"""Options of Megatron-LM and of its relatives that are options of this project by other names, or by other values.

The relatives are MindSpeed-LLM and Pai-Megatron-Patch, and the names of a Hugging Face config.json, which both take.
torchtitan's and transformers' names of --compile are here too.
"""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_deepseek.arguments.megatron.answers import Group

# name: the option here, with the same values
NAMES: Mapping[str, str] = MappingProxyType({
    "--persistent-save-interval": "--save-interval",
    "--disable-manual-gc-eval": "--no-manual-gc-eval",
    "--yarn-beta-fast": "--beta-fast",
    "--yarn-beta-slow": "--beta-slow",
    "--yarn-original-max-position-embeddings": "--original-max-position-embeddings",
    "--rope-scaling-type": "--rope-type",
    "--rope-scaling-beta-fast": "--beta-fast",
    "--rope-scaling-beta-slow": "--beta-slow",
    "--rope-scaling-mscale": "--mscale",
    "--rope-scaling-mscale-all-dim": "--mscale-all-dim",
    "--rope-scaling-original-max-position-embeddings": "--original-max-position-embeddings",
    "--rope-theta": "--rotary-base",
    "--rms-norm-eps": "--norm-epsilon",
    "--initializer-range": "--init-method-std",
    "--num-hidden-layers": "--num-layers",
    "--intermediate-size": "--ffn-hidden-size",
    "--qk-nope-head-dim": "--qk-head-dim",
    "--qk-rope-head-dim": "--qk-pos-emb-head-dim",
    "--moe-intermediate-size": "--moe-ffn-hidden-size",
    "--n-routed-experts": "--num-experts",
    "--num-experts-per-tok": "--moe-router-topk",
    "--n-group": "--moe-router-num-groups",
    "--topk-group": "--moe-router-group-topk",
    "--routed-scaling-factor": "--moe-router-topk-scaling-factor",
    "--scoring-func": "--moe-router-score-function",
    "--aux-loss-alpha": "--moe-aux-loss-coeff",
    "--num-nextn-predict-layers": "--mtp-num-layers",
    "--tokenizer-name-or-path": "--tokenizer-model",
})
# (option, its values as typed): the words that say the same here
VALUES: Mapping[tuple[str, str], str] = MappingProxyType({
    ("--recompute-activations", ""): "--recompute-granularity selective",
    ("--dataloader-inter-document-masking", ""): "--reset-attention-mask",
    ("--multi-head-latent-attention", ""): "--multi-latent-attention",
    ("--moe-fb-overlap", ""): "--overlap-moe-expert-parallel-comm",
    ("--torch_compile", ""): "--compile",
    ("--compile.enable", ""): "--compile",
    ("--swap-optimizer", ""): "--optimizer-cpu-offload",
    ("--schedules-method", "dualpipev"): "--pipeline-schedule DualPipeV",
    ("--cp-comm-type", "p2p"): "--cp-comm-type ring",
    ("--cp-comm-type", "all_gather"): "--cp-comm-type allgather",
    ("--moe-token-dispatcher-type", "alltoall_seq"): "--moe-token-dispatcher-type alltoall",
    ("--moe-token-dispatcher-type", "flex"): "--moe-token-dispatcher-type alltoall",
    ("--data-parallel-sharding-strategy", "no_shard"): "--data-parallel-sharding-strategy optim_grads",
    ("--data-parallel-sharding-strategy", "optim"): "--data-parallel-sharding-strategy optim_grads",
    ("--position-embedding-type", "yarn"): "--rope-type yarn",
    ("--tokenizer-type", "PretrainedFromHF"): "--tokenizer-type HuggingFaceTokenizer",
    ("--moe-router-load-balancing-type", "noaux_tc"): "--moe-router-enable-expert-bias",
})
# (option, its values as typed): they say what is so here anyway
NOTHING: frozenset[tuple[str, str]] = frozenset({
    ("--spec", "mindspeed_llm.tasks.models.spec.deepseek_spec layer_spec"), ("--dataset", "MMAP"),
    ("--train-mode", "pretrain"),
})

RELATIVES_IGNORED = (
    Group("always so here", "--router-gating-in-fp32 --moe-tp-extend-ep --use-fused-moe-token-permute-and-unpermute"),
    Group("which kernels run: what is installed and the device decide", """
        --coc-fused-kernel --coc-parallel-num= --gemm-gradient-accumulation-fusion --mla-fa-without-pad
        --mla-mm-split --mla-zero-memory --moe-alltoall-overlap-comm --moe-permutation-async-comm
        --mtp-mem-efficient-logits --reuse-fp32-param --swap-optimizer-times= --use-ascend-coc --use-ascend-mc2
        --use-fused-ring-attention-update --use-fused-rmsnorm --use-fused-rotary-pos-emb --use-fused-swiglu
    """),
    Group("how data is read: a thread reads the next batch, indices are built once",
          "--max-padding-length= --no-shared-storage"),
    Group("always drawn, by these names (docs/training.md); options of their own in older versions of Megatron-LM", """
        --log-batch-size-to-tensorboard --log-learning-rate-to-tensorboard --no-log-learnig-rate-to-tensorboard
    """),
)
RELATIVES_REFUSED = (
    Group("data are indexed datasets: use tools/preprocess_data.py and --data-path", "--dataset="),
    Group("use finetune_deepseek.py for fine-tuning", "--train-mode="),
    Group("use --pipeline-schedule, whose DualPipeV is the only one with two directions", "--schedules-method="),
)

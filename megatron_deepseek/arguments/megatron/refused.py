"""Options of Megatron-LM that are refused: they change what is trained, or ask for what is not there.

The reasons end a sentence that begins with the option.
"""

from megatron_deepseek.arguments.megatron.answers import Group

REFUSED = (
    Group("these numbers are computed as DeepSeek's reports have it, without it; leave it out", """
        --activation-func-clamp-value= --apply-layernorm-1p --apply-query-key-layer-scaling
        --apply-residual-connection-post-layernorm --attention-output-gate --data-parallel-random-init
        --embedding-init-method-std= --fp32-residual-connection --glu-linear-offset=0.0
        --heterogeneous-layers-config-encoded-json= --heterogeneous-layers-config-path= --init-method-xavier-uniform
        --mrope-section=+ --no-rope-freq= --openai-gelu --qk-clip --qk-l2-norm --quick-geglu
        --rotary-seq-len-interpolation-factor=1 --softmax-type=vanilla --squared-relu --use-mup
        --window-attn-skip-freq= --window-size=
    """),
    Group("gradients are summed in float32 always; leave it out", "--grad-reduce-in-bf16"),
    Group("multi-latent attention knows one order of the rotary dimensions, as in Megatron-LM; leave it out",
          "--rotary-interleaved"),
    Group("YaRN rounds the ends of its range here; leave it out", "--no-yarn-correction-range-round-to-int"),
    Group("the optimizer is AdamW, with one learning rate and one weight decay; leave it out", """
        --apply-wd-to-qk-layernorm --decoupled-lr= --decoupled-min-lr= --end-weight-decay= --head-lr-mult=1.0
        --no-weight-decay-cond-type= --optimizer=adam --start-weight-decay= --weight-decay-incr-style=constant
    """),
    Group("--optimizer-cpu-offload moves all of it", "--optimizer-offload-fraction=1.0"),
    Group("use --freeze-parameters 'model.layers.*'", "--freeze-all-layers"),
    Group("use --micro-batch-size", "--batch-size="),
    Group("use --tensor-model-parallel-size", "--model-parallel-size="),
    Group("use --recompute-granularity full", "--checkpoint-activations"),
    Group("use --lr-warmup-fraction", "--warmup="),
    Group("batches are --global-batch-size, grown by --rampup-batch-size, in evaluations too; leave it out", """
        --decrease-batch-size-if-needed --eval-global-batch-size= --eval-micro-batch-size= --iterations-to-skip=+
        --phase-transition-iterations= --start-eval-at-iter= --step-batch-size-schedule=
    """),
    Group("evaluations are made while it trains; leave it out", "--skip-train"),
    Group("samples are shuffled whole documents of indexed files, in an order that --seed gives; leave it out", """
        --dataloader-type=single --fim-data --hierarchical-context-parallel-sizes=+ --hybrid-context-parallel
        --no-data-sharding
    """),
    Group("files are read from and written to a file system", "--enable-msc --object-storage-cache-path="),
    Group("the end of a document is the NullTokenizer's last id; leave it out", "--null-tokenizer-eod-id="),
    Group("layers are built from the architecture's arguments alone; leave it out", "--spec=*"),
    Group("what is built is multi-latent attention with dense layers and experts; use Megatron-LM for others", """
        --decoder-num-layers= --decoder-seq-length= --encoder-num-layers= --encoder-seq-length=
        --experimental-attention-variant= --hybrid-attention-ratio=0.0 --hybrid-layer-pattern=
        --hybrid-mlp-ratio=0.0 --hybrid-override-pattern= --is-hybrid-model --linear-attention-freq=
        --mtp-hybrid-override-pattern= --use-legacy-models --vocab-extra-ids=0
    """),
    Group("FP8 is V3's recipe, for every large product but the head's (docs/fp8.md); leave it out", """
        --disable-fp8-wgrad --first-last-layers-bf16 --fp4-format= --fp4-param-gather --fp4-quantizer-factory=
        --fp8-output-proj --fp8-quantizer-factory= --megatron-fsdp-main-params-dtype=fp32|auto --no-fp8-wgrad
        --te-precision-config-file=
    """),
    Group("the router and the experts are those of V2 and V3, without it; leave it out", """
        --moe-apply-probs-on-input --moe-enable-routing-replay --moe-expert-rank-capacity-factor=
        --moe-input-jitter-eps=0 --moe-latent-size= --moe-router-force-biased=
        --moe-router-quantile-balancing-ema=0.0 --moe-shared-expert-gate --moe-use-upcycling --moe-z-loss-coeff=0
        --mtp-detach-heads --mtp-use-repeated-layer
    """),
    Group("float16 is not computed in; use --bf16", "--fp16 --fp16-lm-cross-entropy"),
    Group("use --cpu-offloading-num-layers, for the activations of whole layers",
          "--fine-grained-activation-offloading"),
    Group("use tools/convert_checkpoint.py", """
        --ckpt-convert-format= --ckpt-convert-save= --ckpt-convert-update-legacy-dist-opt-format
    """),
    Group("use --load with --finetune", "--pretrained-checkpoint="),
    Group("use --ckpt-step", "--override-ckpt-iteration="),
    Group("every checkpoint stays, unless --keep-last says how many", "--save-retain-interval="),
    Group("use --save-every-seconds and --keep-last", """
        --non-persistent-ckpt-type= --non-persistent-save-interval= --replication
    """),
    Group("a --load other than --save has to exist here anyway, one that is --save begins a new run; leave it out",
          "--exit-on-missing-checkpoint"),
    Group("checkpoints are compared with the arguments, and give none; give the architecture, or --model DIR",
          "--use-checkpoint-args --use-mp-args-from-checkpoint-args"),
    Group("the command line decides the schedule, of a resumed run too; leave it out",
          "--use-checkpoint-opt-param-scheduler --use-checkpoint-opt_param-scheduler"),
    Group("ranks are started anew by torchrun or tools/launch.py with --max-restarts", "--inprocess-restart"),
    Group("SIGTERM and SIGUSR1 save and leave; leave it out", "--exit-signal=SIGTERM|15|SIGUSR1|10"),
    Group("use --dry-run-memory with --world-size, without torchrun", "--fake-process-group"),
    Group("distillation is of conversations: tools/cache_logits.py keeps logits, finetune_deepseek.py --teacher learns "
          "from them", "--logits-load-dir= --logits-save-dir="),
    Group("it is not implemented here; leave it out", """
        --error-injection-rate=0 --fault-injector-delay-start-iteration=
        --fault-injector-fault-delay= --fault-injector-fault-probabilities= --fault-injector-fault-types=
        --fault-injector-mtti-seconds= --fault-injector-num-ranks= --fault-injector-offset-seconds=
        --fault-injector-ranks= --fault-injector-seed=
        --moe-routing-trace-path= --save-activations-interval= --save-dgrads-interval= --save-params-interval=
        --save-tokens-per-expert-interval= --save-wgrads-interval=
    """),
    Group("train_grpo.py is the entry of reinforcement learning; leave it out there", "--perform-rl-step"),
    Group("use finetune_deepseek.py", "--sft"),
)

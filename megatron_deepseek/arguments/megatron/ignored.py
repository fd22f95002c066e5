"""Options of Megatron-LM that are accepted and have no meaning here: no number that is trained depends on them."""

from megatron_deepseek.arguments.megatron.answers import Group

IGNORED = (
    Group("always so here", """
        --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32
        --ckpt-fully-parallel-load --ckpt-fully-parallel-save --disable-async-tensor-model-parallel-allreduce
        --disable-pad-vocab-size --dist-ckpt-optim-fully-reshardable --enable-experimental
        --exit-signal-handler-for-training --init-model-with-meta-device --log-progress
        --moe-per-layer-logging --no-async-tensor-model-parallel-allreduce --no-create-attention-mask-in-dataloader
        --no-pad-vocab-size --no-position-embedding --overlap-grad-reduce --overlap-param-gather
        --override-opt-param-scheduler --override-opt_param-scheduler --use-dist-ckpt --use-megatron-fsdp
        --use-pytorch-profiler --use-rotary-position-embeddings --use-torch-fsdp2 --yarn-correction-range-round-to-int
    """),
    Group("always so here: losses are means over the tokens of the global batch, however they are divided",
          "--calculate-per-token-loss"),
    Group("how communication is grouped and overlapped: FSDP2, the schedules and NCCL decide", """
        --create-all-gather-group --ddp-average-in-collective --ddp-bucket-size= --ddp-num-buckets=
        --ddp-pad-buckets-for-high-nccl-busbw
        --ddp-param-name-patterns-for-fp32-local-accumulation=+ --ddp-reduce-scatter-with-fp32-accumulation
        --disable-align-grad-reduce --disable-gloo-process-groups --disable-symmetric-registration
        --disable-tp-comm-bulk-dgrad --disable-tp-comm-bulk-wgrad --disable-tp-comm-overlap-ag
        --disable-tp-comm-overlap-rs --disable-tp-comm-split-ag --disable-tp-comm-split-rs --distributed-backend=
        --distributed-timeout-seconds-after-init= --enable-full-sharding-in-hsdp
        --expert-tensor-parallel-num-weight-shards= --fsdp-db-use-persist-buf-on-alloc-fail --fsdp-double-buffer
        --fsdp-manual-registration --high-priority-a2a-comm-stream --high-priority-stream-groups=+ --lazy-mpu-init
        --local-rank= --max-seqlen-per-dp-cp-rank= --megatron-fsdp-enable-fine-grained-param-gather
        --megatron-fsdp-grad-comm-dtype= --megatron-fsdp-main-grads-dtype= --megatron-fsdp-max-pool-double-buffer
        --microbatch-group-size-per-virtual-pipeline-stage= --mtp-standalone --nccl-all-reduce-for-prefill
        --nccl-communicator-config-path= --no-align-grad-reduce --no-align-param-gather
        --no-overlap-p2p-communication --no-scatter-gather-tensors-in-pipeline --no-tp-comm-bulk-dgrad
        --no-tp-comm-bulk-wgrad --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs --no-tp-comm-split-ag
        --no-tp-comm-split-rs --no-use-layer-wise-param-layout --num-distributed-optimizer-instances=
        --outer-dp-sharding-strategy= --overlap-cpu-optimizer-d2h-h2d --overlap-p2p-communication-warmup-flush
        --overlap-param-gather-with-optimizer-step --pipeline-model-parallel-comm-backend= --sharp-enabled-group=
        --suggested-communication-unit-size= --symmetric-ar-type= --tensor-parallel-num-weight-shards=
        --torch-fsdp2-no-reshard-after-forward --tp-comm-bootstrap-backend= --tp-comm-overlap --tp-comm-overlap-cfg=
        --tp-comm-overlap-rs-dgrad --use-nccl-ub --use-ring-exchange-p2p --use-same-sampling-seed-across-dp-ranks
        --use-sharp --use-tp-pp-dp-mapping
    """),
    Group("where memory is kept: settings of what is refused, or decided here", """
        --activation-offload-fraction= --cpu-offloading-retain-pinned-cpu-buffers
        --delta-offload-bytes-across-pp-ranks= --distribute-saved-activations
        --dump-param-to-param-group-map= --empty-unused-memory-level=
        --fine-grained-offloading-max-inflight-offloads= --min-offloaded-tensor-size= --moe-layer-recompute
        --no-initialization --no-pin-cpu-grads --no-pin-cpu-params --offload-modules=+ --train-sync-interval=
        --use-cpu-initialization --use-torch-optimizer-for-cpu-offload
    """),
    Group("how failures are found: --nan-policy, the watch of ranks and launchers decide (docs/launching.md)", """
        --adlr-autoresume --adlr-autoresume-interval= --calc-ft-timeouts --check-for-large-grads
        --check-for-spiky-loss --enable-ft-package
        --error-injection-type= --ft-num-warmup-iters= --inprocess-active-world-size= --inprocess-barrier-timeout=
        --inprocess-completion-timeout= --inprocess-empty-cuda-cache --inprocess-granularity=
        --inprocess-hard-timeout= --inprocess-heartbeat-interval= --inprocess-heartbeat-timeout=
        --inprocess-last-call-wait= --inprocess-max-iterations= --inprocess-monitor-process-interval=
        --inprocess-monitor-thread-interval= --inprocess-progress-watchdog-interval= --inprocess-soft-timeout=
        --inprocess-termination-grace-time= --no-check-for-nan-in-loss-and-grad --rerun-mode= --test-mode
    """),
    Group("how data is read: a thread reads the next batch, indices are built once", """
        --allow-ambiguous-pad-tokens --dataloader-defer-npy-index-mmap --dataloader-fast-cache-load
        --exit-signal-handler-for-dataloader --mid-level-dataset-surplus= --no-mmap-bin-files
        --num-dataset-builder-threads= --per-dataset-sequences-path= --sample-rate= --short-seq-prob=
    """),
    Group("what is shown: metrics.jsonl and TensorBoard hold what is measured here (docs/training.md)", """
        --app-tag-run-name= --app-tag-run-version= --config-logger-dir= --disable-flight-recorder-dump-on-timeout
        --disable-flight-recorder-extra-dump-on-exec --disable-flight-recorder-include-only-active
        --disable-log-loss-scale-to-tensorboard --disable-straggler-on-startup --flight-recorder-dump-path=
        --flight-recorder-include-stack-trace --flight-recorder-trace-buffer-size= --gpu-sniff-test-interval=
        --inference-wandb-logging --log-device-memory-used --log-energy --log-max-attention-logit
        --log-memory-interval= --log-straggler
        --logging-level= --memory-snapshot-path= --no-barrier-with-level-1-timing
        --no-flight-recorder-dump-on-timeout --no-flight-recorder-extra-dump-on-exec
        --no-flight-recorder-include-only-active --no-log-loss-scale-to-tensorboard --no-one-logger --nvtx-ranges
        --one-logger-async --one-logger-project= --one-logger-run-name= --profile-ranks=+
        --pytorch-profiler-collect-callstack --pytorch-profiler-collect-chakra --pytorch-profiler-collect-shapes
        --record-memory-history --record-shapes --result-rejected-tracker-filename= --run-workload-inspector-server
        --straggler-ctrlr-port= --straggler-minmax-count=
        --timing-log-level= --timing-log-option=
    """),
    Group("how checkpoints are written: they are DCP files, checked and complete or absent", """
        --async-ckpt-cpu-priority= --async-ckpt-io-priority= --async-ckpt-use-cpu-shm --async-strategy=
        --auto-detect-ckpt-format --ckpt-assume-constant-structure --ckpt-format=
        --ckpt-fully-parallel-load-exchange-algo= --ckpt-fully-parallel-load-process-group=
        --ckpt-fully-parallel-save-process-group= --disable-ckpt-fully-parallel-save
        --disable-ckpt-load-validate-sharding-integrity --disable-msc --disable-stream-ckpt-dequant
        --disable-strict-fsdp-dtensor-load --dist-ckpt-format= --dist-ckpt-save-pre-mcore-014
        --dist-ckpt-strictness= --dist-ckpt-workers= --distrib-optim-fully-reshardable-mem-efficient
        --load-main-params-from-ckpt --no-ckpt-fully-parallel-save --no-ckpt-load-validate-sharding-integrity
        --no-stream-ckpt-dequant --no-strict-fsdp-dtensor-load --non-persistent-global-ckpt-dir=
        --non-persistent-local-ckpt-algo= --non-persistent-local-ckpt-dir= --replication-factor= --replication-jump=
        --use-persistent-ckpt-worker --verify-integrity
    """),
    Group("which kernels run: what is installed and the device decide", """
        --attention-backend= --batch-invariant-mode --cross-entropy-fusion-impl= --cross-entropy-loss-fusion
        --cuda-graph-impl= --cuda-graph-modules=+ --cuda-graph-scope=+ --cuda-graph-warmup-steps=
        --decode-only-cuda-graphs --defer-embedding-wgrad-compute --delay-offload-until-cuda-graph
        --delay-wgrad-compute --deterministic-mode --disable-bf16-reduced-precision-matmul
        --disable-clone-scatter-output-in-embedding --disable-jit-fuser --dsa-kernel-backend= --enable-cuda-graph
        --ep-overlap-early-attn-memory-release --external-cuda-graph --flash-attention-version= --fp4-recipe=
        --fp8-amax-compute-algo= --fp8-amax-history-len= --fp8-interval= --fp8-margin= --fused-residual-rmsnorm
        --inference-cuda-graph-all-prefills --inference-cuda-graph-max-tokens= --inference-cuda-graph-scope=
        --inference-dynamic-batching-cuda-graph-max-tokens=
        --inference-dynamic-batching-cuda-graph-mixed-prefill-count=
        --inference-dynamic-batching-cuda-graph-sizing-distribution= --inference-dynamic-batching-num-cuda-graphs=
        --inference-rng-tracker --keep-fp8-transpose-cache --kitchen-attention-backend= --mla-down-proj-fusion
        --mlp-chunks-for-prefill= --mlp-chunks-for-training= --moe-deepep-num-sms= --moe-enable-deepep
        --moe-extended-tp --moe-flex-dispatcher-backend= --moe-flex-dispatcher-num-sms=
        --moe-hybridep-num-blocks-permute= --moe-hybridep-num-blocks-unpermute= --moe-hybridep-num-sms=
        --moe-hybridep-num-sms-preprocessing= --moe-hybridep-pad-uneven-dispatch-inputs
        --moe-mlp-glu-interleave-size= --moe-ncclep-static-shape --moe-ncclep-zero-copy
        --moe-pad-experts-for-cuda-graph-inference --moe-paged-stash --moe-paged-stash-buffer-size-factor-cpu=
        --moe-paged-stash-buffer-size-factor-cuda= --moe-paged-stash-page-size= --moe-permute-fusion
        --moe-permute-fusion-into-hybridep --moe-router-fusion --moe-router-padding-for-fp8
        --moe-router-padding-for-quantization --moe-shared-expert-glu-interleave-size= --moe-single-grouped-bias
        --moe-single-grouped-weight --moe-use-legacy-grouped-gemm --no-bias-dropout-fusion --no-bias-gelu-fusion
        --no-bias-swiglu-fusion --no-clone-scatter-output-in-embedding --no-gradient-accumulation-fusion
        --no-gradient-reduce-div-fusion --no-masked-softmax-fusion --no-persist-layer-norm
        --no-rl-persist-cuda-graphs --no-rl-reset-cuda-graphs --no-rl-training-cuda-graphs --no-rope-fusion
        --num-layers-at-end-in-bf16= --num-layers-at-start-in-bf16= --onnx-safe= --optimizer-cuda-graph
        --overlap-dispatch-backward-with-experts-wgrad --reuse-grad-buf-for-mxfp8-param-ag --rl-persist-cuda-graphs
        --rl-reset-cuda-graphs --rl-training-cuda-graphs --te-rng-tracker --transformer-impl= --use-flash-attn
        --use-fused-weighted-squared-relu --use-grouped-gemm-for-dense-mlp --use-grouped-gemm-for-shared-expert
        --use-kitchen-attention --use-te-activation-func --use-transformer-engine-op-fuser --wgrad-deferral-limit=
    """),
    Group("settings of BERT, T5, vision and retrieval, which pretrain_gpt.py ignores too", """
        --bert-embedder-type= --bert-load= --bert-no-binary-head --biencoder-projection-dim=
        --biencoder-shared-query-context-model --block-data-path= --classes-fraction= --data-per-class-fraction=
        --dino-bottleneck-size= --dino-freeze-last-layer= --dino-head-hidden-size= --dino-local-crops-number=
        --dino-local-img-size= --dino-norm-last-layer --dino-teacher-temp= --dino-warmup-teacher-temp=
        --dino-warmup-teacher-temp-epochs= --embedding-path= --evidence-data-path= --ict-head-size= --ict-load=
        --img-h= --img-w= --indexer-batch-size= --indexer-log-interval= --iter-per-epoch= --mask-factor=
        --mask-prob= --mask-type= --num-channels= --num-classes= --output-bert-embeddings --patch-dim=
        --query-in-block-prob= --retriever-report-topk-accuracies=+ --retriever-score-scaling --swin-backbone-type=
        --titles-data-path= --use-one-sent-docs --vision-backbone-type= --vision-pretraining
        --vision-pretraining-type=
    """),
    Group("settings of inference and of reinforcement learning, which this entry does not run", """
        --cache-mla-latents --disable-chunked-prefill --enable-chunked-prefill --flash-decode
        --grpo-clamp-eps-lower= --grpo-clamp-eps-upper= --grpo-entropy-term-weight=
        --grpo-filter-groups-with-same-reward --grpo-group-size= --grpo-iterations= --grpo-kl-beta=
        --grpo-prompts-per-step= --inference-batch-times-seqlen-threshold= --inference-coordinator-port=
        --inference-disable-ep-consensus --inference-disable-triton-nvls-kernels --inference-dynamic-batching
        --inference-dynamic-batching-async-sched-mode= --inference-dynamic-batching-block-size=
        --inference-dynamic-batching-buffer-size-gb= --inference-dynamic-batching-logprobs-mode=
        --inference-dynamic-batching-mamba-memory-ratio= --inference-dynamic-batching-max-requests=
        --inference-dynamic-batching-max-tokens= --inference-dynamic-batching-paused-buffer-size-gb=
        --inference-dynamic-batching-prefix-caching --inference-dynamic-batching-prefix-caching-coordinator-policy=
        --inference-dynamic-batching-prefix-caching-eviction-policy=
        --inference-dynamic-batching-prefix-caching-mamba-gb=
        --inference-dynamic-batching-prefix-caching-routing-alpha= --inference-dynamic-batching-sampling-backend=
        --inference-dynamic-batching-track-generated-token-events
        --inference-dynamic-batching-track-paused-request-events --inference-dynamic-batching-unified-memory-level=
        --inference-fuse-tp-communication --inference-grouped-gemm-backend= --inference-logging-step-interval=
        --inference-max-batch-size= --inference-max-requests= --inference-max-seq-length=
        --inference-moe-disable-fused-quant-kernels --inference-moe-token-dispatcher-type= --inference-shards=
        --inference-text-gen-server-logging --inference-use-synchronous-zmq-collectives --langrl-env-config=
        --langrl-external-server --langrl-inference-server-conversation-template= --langrl-inference-server-type=
        --mamba-inference-conv-states-dtype= --mamba-inference-ssm-states-dtype= --max-tokens-to-oom=
        --no-inference-disable-ep-consensus --no-inference-dynamic-batching-prefix-caching
        --no-inference-text-gen-server-logging --no-inference-use-synchronous-zmq-collectives
        --no-inference-wandb-logging --no-langrl-external-server --no-rl-inference-logprobs-is-correction
        --no-rl-offload-inference-model-weights-when-idle --no-rl-offload-kv-cache-during-training
        --no-rl-partial-rollouts --no-rl-remove-kv-cache-during-training --no-rl-skip-bos-token
        --no-rl-use-sequence-packing --no-rl-verify-model-weights-swap --num-speculative-tokens= --refit-method=
        --rl-consumption-granularity= --rl-default-temperature= --rl-default-top-k= --rl-default-top-p=
        --rl-generation-batch-size= --rl-generation-lag= --rl-importance-sampling-truncation-coef=
        --rl-inference-expert-model-parallel-size= --rl-inference-expert-tensor-model-parallel-size=
        --rl-inference-logprobs-is-correction --rl-inference-model-unified-memory-level= --rl-inference-parsers=*
        --rl-inference-pipeline-model-parallel-size= --rl-inference-tensor-model-parallel-size=
        --rl-kv-cache-management-mode= --rl-num-parallel-generation-batches= --rl-num-parallel-generations=
        --rl-offload-inference-model-weights-when-idle --rl-offload-kv-cache-during-training
        --rl-offload-optimizer-during-inference --rl-parallel-generation-tasks= --rl-partial-rollouts --rl-profile
        --rl-profile-dir= --rl-prompts-per-eval= --rl-remove-kv-cache-during-training --rl-sequence-packing-algo=
        --rl-sequence-packing-max-sequences-per-bin= --rl-skip-bos-token --rl-submission-granularity=
        --rl-use-sequence-packing --rl-verify-model-weights-swap --use-legacy-static-engine
    """),
    Group("settings of what only another option turns on, which is refused", """
        --disable-dsa-indexer-rotate-activation --disable-dsa-indexer-scoring-relu --disable-mamba-mem-eff-path
        --dsa-indexer-head-dim= --dsa-indexer-k-norm-epsilon= --dsa-indexer-k-norm-fp32 --dsa-indexer-loss-coeff=
        --dsa-indexer-n-heads= --dsa-indexer-rope-interleaved --dsa-indexer-skip-topk-offset= --dsa-indexer-topk=
        --dsa-indexer-topk-freq= --dsa-indexer-use-sparse-loss --fim-eod-token= --fim-fragment-rate=
        --fim-middle-token= --fim-no-prefix= --fim-pad-token= --fim-prefix-token= --fim-rate= --fim-split-sample=
        --fim-spm-rate= --fim-suffix-token= --linear-conv-kernel-dim= --linear-key-head-dim= --linear-num-key-heads=
        --linear-num-value-heads= --linear-value-head-dim= --lion-beta1= --lion-beta2= --logits-load-decode-threads=
        --logits-load-ignore-errors --logits-load-kd-loss-alpha= --logits-load-msc-prefetch-depth=
        --logits-load-prefetch-factor= --logits-save-dtype= --logits-save-top-k= --logits-save-top-p=
        --logits-save-top-p-min-k= --mamba-head-dim= --mamba-num-groups= --mamba-num-heads= --mamba-state-dim=
        --mamba-training-ssm-states-dtype= --moe-routing-trace-capture-hidden-states
        --moe-routing-trace-capture-logits --moe-routing-trace-dump-weights --moe-routing-trace-max-training-iters=
        --moe-upcycling-granularity= --muon-coefficient-type= --muon-extra-scale-factor= --muon-fp32-matmul-prec=
        --muon-momentum= --muon-nesterov --muon-no-split-qkv --muon-num-ns-steps= --muon-scalar-optimizer=
        --muon-scale-mode= --muon-tp-mode= --muon-use-nesterov --mup-attn-scale-power= --mup-base-head-dim=
        --mup-base-hidden-size= --mup-embedding-mult= --mup-output-mult= --mup-width-mult=
        --no-dsa-indexer-rotate-activation --no-dsa-indexer-scoring-relu --qk-clip-alpha= --qk-clip-threshold=
        --relative-attention-max-distance= --relative-attention-num-buckets= --sgd-momentum=
    """),
    Group("settings of tokenizers that are read otherwise here", """
        --disable-tokenizer-sentencepiece-ignore-extra-whitespaces
        --disable-use-tokenizer-model-from-checkpoint-args --legacy-tokenizer --merge-file=
        --no-tokenizer-sentencepiece-ignore-extra-whitespaces --no-use-tokenizer-model-from-checkpoint-args
        --null-tokenizer-pad-id= --sft-tokenizer-prompt-format= --tiktoken-num-special-tokens= --tiktoken-pattern=
        --tiktoken-special-tokens=+ --tokenizer-hf-include-special-tokens --tokenizer-hf-no-include-special-tokens
        --tokenizer-hf-no-use-fast --tokenizer-hf-use-fast --tokenizer-metadata= --tokenizer-sentencepiece-legacy
        --tokenizer-special-tokens=+ --trust-remote-code --vocab-file=
    """),
    Group("MLA has no Llama scaling", """
        --rope-scaling-factor= --use-rope-scaling
    """),
    Group("bfloat16 and float32 need no loss scale", """
        --hysteresis= --initial-loss-scale= --loss-scale= --loss-scale-window= --min-loss-scale=
    """),
)

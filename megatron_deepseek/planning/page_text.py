"""The words of docs/planning.md around its tables (page.py)."""

TEXT = """# Planning: does it fit, and where is the peak

Made by `python tools/plan.py table > docs/planning.md`; `tests/unit/planning/test_page.py` makes it again and compares.
`tools/plan.py` needs no GPU, no data, no tokenizer and no torch:
```
python tools/plan.py memory --model deepseek-v3 --world-size 2048 --gpu h800 --bf16 --fp8-format e4m3 \\
    --pipeline-model-parallel-size 16 --pipeline-schedule DualPipeV --expert-model-parallel-size 64 \\
    --global-batch-size 15360 --recompute-granularity full --json plan.json --picture plan.png
```
It takes the arguments of `pretrain_deepseek.py`, and the plan's own: `--world-size`, `--gpu` (a name in
`megatron_deepseek/planning/gpus.json`; `--gpu-file` adds others), `--engine ours|megatron|zero3`, `--memory-limit`,
`--task pretrain|finetune|lora|qlora|grpo|serve` with `--lora-rank`, `--lora-target`, `--quantization-bit`, `--users`,
`--context`, `--rollout-ranks`, `--serve-weight-bytes`. It prints a table of equal ranks, the worst rank with the moment
of its peak and the three largest terms, what uneven experts would add, a verdict (`fits`, `tight`, `oom`) and, where it
does not fit, what would have to change.

## What is counted
* **States**, of dense parameters and routed experts by themselves, since dp x cp ranks divide the ones and edp the
  others. Ours: float32 shards (4 + 8 moments a parameter, divided), 2 gathered and 4 for the sums of several
  micro-batches' gradients, whole; reduced gradients (4, divided) come as the sums go.
  `tests/parallel/test_state_memory.py` counts them through steps of many layouts: equal to the byte. Megatron's
  distributed optimizer: 2 + 4 whole, 12 divided. ZeRO-3: 18 divided, two layers gathered at a time. The table of
  parameters (`megatron_deepseek/model/architecture/parameters.py`) says what a rank holds.
* **Activations**: `planning/activations.py` counts what each module keeps, tensor by tensor.
  `tests/unit/planning/test_activations.py` compares it with what saved-tensor hooks see in runs on CPU: equal to the
  byte, for every kind of recomputation and offloading, chunked losses, FP8, packed documents. How many micro-batches
  wait, and when, is found by replaying the schedule's own list of actions (`planning/actions.py`, equal to torch's).
* **Frozen weights and adapters**: inputs that are read for no weight's gradient are not kept, and a layer below all
  that is trained keeps nothing (`planning/trained_weights.py`); equal to saved-tensor hooks to the byte.
* **While a layer runs**: `planning/forward_bytes.py` follows its forward where rows go to experts;
  `planning/backward_tape.py` goes back through it as autograd does, operator by operator: gradients, what is made
  again, rows on their way to experts; in FP8 the tiles that a product reads. They are sums over shapes, not counted by
  hooks; `tests/unit/dry_run/` compares them with the code ([dry_run.md](dry_run.md)).
* **As a step goes on**: a stage's weights are gathered at its first forward; the first backward makes its sums of
  gradients layer by layer, the last one reduces and frees them (`planning/phases.py`). The peak, and the states beside
  it, are those of the fullest moment.
* **Waiting weight gradients**: those that a zero-bubble schedule leaves for later wait with their inputs, recomputed
  or not, and with their outputs' gradients; `tests/parallel/test_planned_memory.py` counts them, too.
* **Receive buffers**: activations and gradients that have arrived and wait at the fullest moment.
* **Experts** are balanced, or the fullest rank gets 1.25 or 2 times the mean; without a capacity nothing bounds it.
* **Beyond the allocator**: CUDA's context, NCCL's buffers, fragments (2 to 10 %), as a range from "at least" to
  "perhaps"; a job fits where the upper end does, and is `tight` in between.

Not counted: the optimizer's temporary tensors, checkpoints being copied for `--async-save`, workspaces of libraries,
and all that others run on the GPU.

## Against published numbers
Each for the engine that it is of; GiB.

| source | what | published | calculated | |
|---|---|---|---|---|
{anchors}

ScienceOne fine-tuned the 671B model at 32,768 tokens under ZeRO-3 on H100 of 80 GB. Offloaded are states, parameters
and the inputs of layers. What was seen does not grow with a GPU's tokens, so only verdicts are compared.

| GPUs | ranks a sequence | sequences | offloaded | seen | verdict | needs, GB |
|---|---|---|---|---|---|---|
{science}

## How long a step takes
`plan.py time` prices every layer (products by shape and attention by a roofline, passes over memory, tokens and TP and
CP ranks' exchanges on a network of two levels), simulates the schedule's own action list with messages between stages,
and adds what data ranks and the optimizer take beside it. It prints `step_seconds`, tokens a second and GPU, GPU hours
and with `--price` money for 10^12 tokens; `--trace FILE` is for Perfetto (with each rank's memory), `--picture PNG`
draws the schedule.
```
python tools/plan.py time --model deepseek-v3 --world-size 256 --gpu h800 --bf16 --fp8-format e4m3 \\
    --pipeline-model-parallel-size 8 --pipeline-schedule DualPipeV --expert-model-parallel-size 32 \\
    --moe-token-dispatcher-type grouped --overlap-moe-expert-parallel-comm --global-batch-size 640 --price 2
```
Without `--calibrate RUN` it says "not calibrated": speeds are data sheets' times the parts that published measurements
reached (`planning/efficiency.py`, `planning/gpus.json`). RUN is a `--save` directory or its metrics.jsonl, which scale
computing and travelling alike, or a profile of a rank, which tells them apart; it must be of the planned model but for
the numbers of layers and words. Experts are taken to be balanced. With `--engine megatron` tokens travel as by DeepEP
or HybridEP, and interleaved schedules overlap the backwards and forwards that follow each other.

V3, tokens a second and GPU, nothing calibrated, for `--engine megatron`:

| GPUs | layout | published | planned | |
|---|---|---|---|---|
{times}

Table 4 of arXiv 2505.09343, simulated from its own operation times: {table4}.
What is missing are its uneven stages, messages and jitter, of which it has no times.

## Which layout is best
```
python tools/plan.py search --model deepseek-v3 --world-size 2048 --gpu h800 --bf16 --fp8-format e4m3 \\
    --global-batch-size 15360
```
tries TP, PP, stages of a rank, schedules, EP, ETP, CP, dispatchers, micro-batches and sharding, best bound first. For
each it cuts the stages by an exact program under the memory that every rank has (`planning/partition.py`), with what
must be recomputed or offloaded for that, and simulates the step. It prints ten that are best, and the arguments of the
first; arguments of a layout that are given stay as they are. The program is exact for one stage on a rank and for two;
the search as a whole ends when no bound is below the best step, or 150 layouts more brought nothing.
`pretrain_deepseek.py --auto-layout GPU` takes the first one. Where nothing fits it says what is closest.

## V3 on 2,048 GPUs in its report's layout
PP16 DualPipeV, EP64, 4,096 tokens, MTP, 15,360 sequences (120 micro-batches), GiB on the fullest rank; "uneven" is
with 1.25 times the rows. With whole layers recomputed the fullest rank is the last, whose weight gradients wait; with
1F1B instead they would not.

| | states | receive buffers | activations | peak | uneven | needs |
|---|---|---|---|---|---|---|
{ladder}

## The fewest GPUs
Layers wholly recomputed, 4,096 tokens, one sequence at a time, 1F1B, experts over up to 64 ranks; of 1, 2, 4 ...
2,048 GPUs the first that holds all ranks at the upper end of the range. GRPO has a reference policy and an engine on
up to 32 ranks beside it on the same GPUs; it and serving cache {users} conversations of {context} tokens (V3: 70 kB a
token), in bf16.

| model | task | H100 | H200 | B200 |
|---|---|---|---|---|
{fewest}

The same of the other released models that `--model` knows, for H100 alone:

| model | 1e9 parameters | full fine-tuning | LoRA | QLoRA | serving | cache, kB a token |
|---|---|---|---|---|---|---|
{others}

## From 1 to 2,048 H100
GiB that the fullest rank may need in the layout that needs least; `?` is tight, `✗` does not fit.

| model | GPUs | pre-training, full fine-tuning | LoRA | QLoRA | GRPO | serving |
|---|---|---|---|---|---|---|
{counts}

## GPUs
Dense peaks, links in GB/s in one direction; sources are named in `megatron_deepseek/planning/gpus.json`.

| GPU | TFLOPS BF16 / FP8 | GiB | TB/s | scale-up | network | sources |
|---|---|---|---|---|---|---|
{gpus}
"""

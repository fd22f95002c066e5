"""Ask vLLM for greedy texts: python vllm_answers.py ASKED.json ANSWERS.json, of which the second is written.

{"model": DIR, "prompts": [ids, ...], "length": N, "top": N, "options": what LLM takes, "adapter": DIR or null}
{"answers": [{"tokens": ids, "first": {id: log-probability}}, ...], "drafts": N, "accepted": N}
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest


def metric(metrics, name: str) -> int:
    return sum(each.value for each in metrics if each.name == name)


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(model=asked["model"], skip_tokenizer_init=True, enforce_eager=True, max_model_len=512, max_num_seqs=4,
                 disable_log_stats=False, **asked["options"])
    sampling = SamplingParams(temperature=0, max_tokens=asked["length"], ignore_eos=True, logprobs=asked["top"],
                              detokenize=False)
    adapter = LoRARequest("adapter", 1, asked["adapter"]) if asked["adapter"] else None
    said = engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in asked["prompts"]], sampling,
                           lora_request=adapter, use_tqdm=False)
    answers = [{"tokens": list(each.outputs[0].token_ids),
                "first": {token: found.logprob for token, found in each.outputs[0].logprobs[0].items()}}
               for each in said]
    metrics = engine.get_metrics()
    counts = {"drafts": metric(metrics, "vllm:spec_decode_num_draft_tokens"),
              "accepted": metric(metrics, "vllm:spec_decode_num_accepted_tokens")}
    Path(sys.argv[2]).write_text(json.dumps({"answers": answers, **counts}))


if __name__ == "__main__":
    main()

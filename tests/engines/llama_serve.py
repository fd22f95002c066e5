"""Serve a GGUF file by llama.cpp (the wheel xllamacpp) until stdin ends: python llama_serve.py FILE [f32 | f16].

It prints the address. The second word is the type of the KV cache: in f32 nothing is rounded but sums.
"""

import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.warmup, params.use_jinja, params.hostnames, params.port = False, True, ["127.0.0.1"], 0
cache = xllamacpp.ggml_type.GGML_TYPE_F16 if sys.argv[2:] == ["f16"] else xllamacpp.ggml_type.GGML_TYPE_F32
params.cache_type_k = params.cache_type_v = cache
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()

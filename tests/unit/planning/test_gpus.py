"""GPUs as data: sources for each, agreement with the peaks of flops.py, and files that users bring."""

import json

import pytest

from megatron_deepseek.planning.flops import PEAK_BF16_FLOPS
from megatron_deepseek.planning.gpus import KNOWN, find_gpu, load_gpus


def test_every_gpu_has_sources_that_are_told():
    told = json.loads(KNOWN.read_text())["sources"]
    gpus = load_gpus()
    assert {"a100", "h100", "h800", "h200", "h20", "b200", "gb200", "gb300", "mi300x", "ascend-910b",
            "ascend-910c"} <= {*gpus}
    assert all(gpu.sources and {*gpu.sources} <= {*told} for gpu in gpus.values())


def test_peaks_are_those_that_mfu_is_measured_by():
    for name, gpu in load_gpus().items():
        if name.upper() in PEAK_BF16_FLOPS:
            assert gpu.bf16_tflops * 1e12 == PEAK_BF16_FLOPS[name.upper()], name


def test_names_are_found_in_any_case_and_near_ones_are_proposed():
    assert find_gpu("H800").memory_bytes == 84_940_000_000
    with pytest.raises(ValueError, match=r"--gpu 'h900' is not known; did you mean h\d00 or .*--gpu-file adds others"):
        find_gpu("h900")


def test_a_users_file_adds_and_replaces(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"gpus": {"Mine": {"like": "h100", "memory_gb": 96},
                                         "h20": {"like": "h20", "network_gb_s": 100}}}))
    assert (find_gpu("mine", path).memory_gb, find_gpu("mine", path).bf16_tflops) == (96, 989)
    assert find_gpu("h20", path).network_gb_s == 100


@pytest.mark.parametrize("text, message", [
    ('{"gpus": {}}', 'no object "gpus"'),
    ('{"gpus": {"a": {"memory_gb": 3}}}', "GPU 'a' lacks bf16_tflops"),
    ('{"gpus": {"a": {"like": "h100", "memory": 3}}}', "GPU 'a' has memory, which is unknown"),
    ('{"gpus": {"a": {"like": "h100", "memory_gb": -3}}}', "memory_gb -3, which is no positive number"),
    ('{"gpus": {"a": {"like": "h101"}}}', "like 'h101', which is not one of"),
    ('{"gpus": {"a": 3}}', "GPU 'a' is 3, not an object"),
    ("[", "mine.json")])
def test_files_that_say_nothing_useful_are_refused(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_gpus(path)

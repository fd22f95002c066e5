"""What a request does not say is as generation_config.json has it, and what that does not say as OpenAI has it."""

from served_models import write_served

from megatron_deepseek.checkpoint.convert.assets import DIRECTORY
from megatron_deepseek.cli import inference_options as options
from megatron_deepseek.cli.serve import parse_arguments
from megatron_deepseek.cli.serve_run import served_model
from megatron_deepseek.serving.fields import Fields
from megatron_deepseek.serving.sampling_fields import read_sampling


def test_the_request_over_the_file_over_ours(tmp_path):
    """A null is as good as nothing; a file with do_sample false is greedy, unless a request has a temperature."""
    load = write_served(tmp_path / "tiny")
    args = parse_arguments(["--load", str(load)])

    def read(config: str, **fields):
        (load / DIRECTORY / "generation_config.json").write_text(config)
        files = options.open_files(args)
        return files.eos_ids, read_sampling(Fields(fields), served_model(args, files, 100).defaults, None)

    config = '{"temperature": 0.6, "top_p": 0.95, "top_k": 7, "repetition_penalty": 1.1, "eos_token_id": [5, 6]}'
    ends, sampling = read(config, top_p=None)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0.6, 0.95, 7, 1.1)
    assert ends[:2] == (5, 6) and len(ends) == 3  # and the tokenizer's own
    _, sampling = read(config, temperature=0, top_k=-1, top_p=1)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0, 1, 0, 1.1)
    assert read('{"do_sample": false}')[1].greedy and not read('{"do_sample": false}', temperature=0.5)[1].greedy
    _, sampling = read("{}")
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)

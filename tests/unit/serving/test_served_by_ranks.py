"""A server whose model is shared by ranks: the answers of one process, an end that all of them find."""

import os
import signal
import threading

import pytest
from served import Served, serving

REQUESTS = [{"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 1, "stream": stream}
            for prompt, stream in (("what is it?", False), ("yes, User", True), ("北京", False), ("a b", True))]
REQUESTS.append(REQUESTS[0] | {"guided_regex": "[ab ]{60,90}"})  # each rank compiles it, and keeps to it


def answers(served: Served) -> list:
    """The answers to all requests, asked for at the same time."""
    found: list = [None] * len(REQUESTS)

    def ask(place: int) -> None:
        answer = served.post("/v1/completions", REQUESTS[place])
        choices = [piece for event in answer.events for piece in event["choices"]] \
            if REQUESTS[place]["stream"] else answer.json["choices"]
        found[place] = ("".join(each["text"] for each in choices),
                        sum((each["logprobs"]["token_logprobs"] for each in choices), []))

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    return found


@pytest.mark.parametrize("options", [
    ("--expert-model-parallel-size", "2"),
    pytest.param(("--tensor-model-parallel-size", "2"), marks=pytest.mark.slow),
    pytest.param(("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "4", "--draft-tokens", "1"),
                 marks=pytest.mark.slow)])
def test_ranks_answer_as_one_process_does(served, checkpoint, tmp_path, options):
    """Replicas count together, stop what is left, and end with status 0 when torchrun tells all of them to."""
    expected = answers(served)
    with serving(tmp_path, checkpoint, *options, num_ranks=4 if "4" in options else 2) as ours:
        assert set(expected[-1][0]) <= set("ab ")
        for (text, logprobs), (other, others) in zip(answers(ours), expected, strict=True):
            assert text == other and logprobs == pytest.approx(others, abs=1e-4)
        assert ours.metric("vllm:generation_tokens_total") == 60
        stream = {"prompt": "what", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        ours.leave(stream)
        ours.wait_until_idle()
        assert ours.metric("vllm:request_success_total", finished_reason="abort") == 1
        for each in ours.processes:
            os.kill(each.pid, signal.SIGTERM)
        for each in ours.processes:
            each.join(240)
        assert [each.exitcode for each in ours.processes] == [0] * len(ours.processes)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_server(checkpoint, tmp_path):
    """Who asks is told, and the process ends with another status than 0, for torchrun to see."""
    with serving(tmp_path, checkpoint, "--expert-model-parallel-size", "2", num_ranks=2) as ours:
        os.kill(ours.processes[1].pid, signal.SIGKILL)
        answer = ours.post("/v1/completions", REQUESTS[0])
        assert answer.status == 500 and "engine" in answer.error["message"]
        ours.processes[0].join(240)
        assert ours.processes[0].exitcode == 1
        assert "the engine has stopped" in ours.errors.read_text()

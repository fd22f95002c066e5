"""What is beside the answers: models, tokens, metrics, the page."""

import re

from starlette.applications import Starlette
from starlette.testclient import TestClient

from megatron_deepseek import __version__
from megatron_deepseek.serving.page import Page


def test_health_version_and_models(served):
    assert served.ask("GET", "/health").status == 200 and served.ask("GET", "/health").content == b""
    assert served.ask("GET", "/version").json == {"version": __version__}
    (model,) = served.ask("GET", "/v1/models").json["data"]
    assert model["id"] == "tiny" and model["object"] == "model" and model["max_model_len"] == 4096
    assert served.ask("GET", "/v1/models/tiny").json == model
    names = [served.ask("GET", "/health").headers["x-request-id"] for _ in range(2)]
    assert names[0] != names[1]


def test_tokens_of_a_text_and_back(served, engine):
    text = "what is 北京?"
    found = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json
    assert found["tokens"] == engine.loaded.tokenizer.encode(text) and found["count"] == len(found["tokens"])
    assert "".join(found["token_strs"]) == text and found["max_model_len"] == 4096
    assert served.post("/detokenize", {"tokens": found["tokens"]}).json == {"prompt": text}
    assert served.post("/detokenize", {"tokens": [1, 9999]}).error["param"] == "tokens[1]"
    assert served.post("/tokenize", {}).error["param"] == "prompt"


def test_a_long_text_is_read_in_a_thread_with_the_same_result(served):
    """One that is longer than what is read in the event loop."""
    found = served.post("/tokenize", {"prompt": "ab " * 40_000})
    assert found.json["count"] > 40_000
    assert served.post("/tokenize", b'{"prompt": "' + b"a" * 100_000, Content_Type="application/json").status == 400


def test_metrics_count_what_was_asked(served):
    before = {name: served.metric(f"vllm:{name}") for name in (
        "prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count", "request_queue_time_seconds_count")}
    asked = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True, "n": 2}
    assert served.post("/v1/completions", asked).status == 200
    grown = {name: served.metric(f"vllm:{name}") - value for name, value in before.items()}
    assert grown == {"prompt_tokens_total": 3, "generation_tokens_total": 10, "time_to_first_token_seconds_count": 2,
                     "inter_token_latency_seconds_count": 8, "e2e_request_latency_seconds_count": 2,
                     "request_queue_time_seconds_count": 2}
    assert served.metric("http_requests_total", handler="/v1/completions", status="2xx") > 0
    served.ask("GET", "/an/invented/path")
    assert served.metric("http_requests_total", handler="other", status="4xx") > 0


def test_metrics_have_the_names_of_dashboards(served):
    """Those of vLLM's own dashboard for Grafana, and what Prometheus reads beside them."""
    shown = served.ask("GET", "/metrics").content.decode()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
                 "generation_tokens_total", "e2e_request_latency_seconds_bucket", "time_to_first_token_seconds_bucket",
                 "inter_token_latency_seconds_bucket", "request_success_total", "request_queue_time_seconds_sum",
                 "request_prompt_tokens_bucket", "request_generation_tokens_bucket", "num_preemptions_total",
                 "spec_decode_num_accepted_tokens_total"):
        assert re.search(rf'^vllm:{name}\{{.*model_name="tiny".*\}} ', shown, re.M), name
    assert "process_resident_memory_bytes" in shown


def test_the_page_is_read_from_files(tmp_path):
    """Files of other kinds, and folders, are not served; each has its type."""
    for name in ("index.html", "app.js", "style.css", "notes.txt", "icon.svg"):
        (tmp_path / name).write_text(name)
    (tmp_path / "deeper").mkdir()
    page = Page.read(tmp_path)
    assert sorted(page.files) == ["app.js", "icon.svg", "index.html", "style.css"]
    assert Page.read(tmp_path / "none").files == {}


def test_the_page_keeps_to_this_server(tmp_path):
    """No script, style or picture from elsewhere, nor one that is written into the page; no frame around it."""
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "app.js").write_text("1")
    client = TestClient(Starlette(routes=Page.read(tmp_path).routes))
    answer = client.get("/")
    assert answer.text == "<!doctype html>" and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(each.strip().split(" ", 1) for each in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'" and answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/page/app.js").headers["content-type"] == "text/javascript; charset=utf-8"


def test_a_page_that_is_none(served):
    assert served.ask("GET", "/page/none.js").status == 404

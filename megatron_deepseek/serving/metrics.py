"""What a dashboard reads at /metrics, by vLLM's names, so that dashboards made for it work."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.statistics import Statistics

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_LABELS = ("model_name", "engine")


@dataclass
class Progress:
    """When an answer was asked for, and what was seen of it: tokens, and when the last of them came."""

    asked_at: float
    tokens: int = 0
    seen_at: float = 0.0


class EngineCollector(Collector):
    """The engine's own counts, read when they are asked for."""

    def __init__(self, labels: tuple[str, ...], statistics: Callable[[], Statistics], answering: Callable[[], int]):
        self._labels, self._statistics, self._answering = labels, statistics, answering

    def collect(self) -> Iterator[Metric]:
        found = self._statistics()
        gauges = {
            "num_requests_running": ("Answers that are being made.", found.running),
            "num_requests_waiting": ("Answers that wait.", max(self._answering() - found.running, 0)),
            "kv_cache_usage_perc": ("Part of the cache's blocks that are held, 1 for all.",
                                    found.blocks_used / found.blocks)}
        counters = {
            "num_preemptions": ("Answers that gave up their blocks.", found.preemptions),
            "prompt_tokens": ("Tokens of prompts.", found.prompt_tokens),
            "generation_tokens": ("Tokens of answers.", found.output_tokens),
            "prefix_cache_queries": ("Tokens of prompts that were looked for in the cache.", found.prompt_tokens),
            "prefix_cache_hits": ("Tokens of prompts that were found in it.", found.shared_tokens),
            "spec_decode_num_draft_tokens": ("Drafts that were verified.", sum(found.drafts_proposed)),
            "spec_decode_num_accepted_tokens": ("Drafts that were right.", sum(found.drafts_accepted)),
            "spec_decode_num_drafts": ("Steps that had drafts.", (*found.drafts_proposed, 0)[0])}
        for name, (words, value) in gauges.items():
            family = GaugeMetricFamily(f"vllm:{name}", words, labels=_LABELS)
            family.add_metric(self._labels, value)
            yield family
        for name, (words, value) in counters.items():
            family = CounterMetricFamily(f"vllm:{name}", words, labels=_LABELS)
            family.add_metric(self._labels, value)
            yield family
        places = CounterMetricFamily("vllm:spec_decode_num_accepted_tokens_per_pos",
                                     "Drafts that were right, by place.", labels=(*_LABELS, "position"))
        for place, value in enumerate(found.drafts_accepted):
            places.add_metric((*self._labels, str(place)), value)
        yield places


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self, model_name: str, statistics: Callable[[], Statistics], answering: Callable[[], int]):
        self.registry = CollectorRegistry()
        labels = (model_name, "0")
        ProcessCollector(registry=self.registry)
        self.registry.register(EngineCollector(labels, statistics, answering))

        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", words, _LABELS, buckets=buckets, registry=self.registry).labels(*labels)

        self.first_token = histogram("time_to_first_token_seconds", "From the request to the first token.", _SECONDS)
        self.between_tokens = histogram("inter_token_latency_seconds", "Between two tokens.", _STEP_SECONDS)
        self.whole = histogram("e2e_request_latency_seconds", "From the request to the end of its answer.", _SECONDS)
        self.queue = histogram("request_queue_time_seconds", "For which an answer waited.", _SECONDS)
        self.prompt_tokens = histogram("request_prompt_tokens", "Of a prompt.", _TOKENS)
        self.answer_tokens = histogram("request_generation_tokens", "Of an answer.", _TOKENS)
        self._ended = Counter("vllm:request_success", "Answers by how they ended.", (*_LABELS, "finished_reason"),
                              registry=self.registry)
        self._answers = Counter("http_requests", "Answers to requests.", ("method", "handler", "status"),
                                registry=self.registry)
        self._labels = labels

    def see(self, progress: Progress, output: Output, now: float) -> None:
        """Take note of a state of an answer that came at this time."""
        new = len(output.tokens) - progress.tokens
        if not progress.tokens and new:
            self.first_token.observe(now - progress.asked_at)
            self.prompt_tokens.observe(len(output.prompt))
            self.queue.observe(output.queue_seconds or 0.0)
        elif new:
            for _ in range(new):
                self.between_tokens.observe((now - progress.seen_at) / new)
        progress.tokens, progress.seen_at = len(output.tokens), now
        if output.finished:
            self.whole.observe(now - progress.asked_at)
            self.answer_tokens.observe(len(output.tokens))
            self.ended(output.finish_reason)

    def ended(self, reason: str, number: int = 1) -> None:
        """Count answers that ended for this reason."""
        self._ended.labels(*self._labels, reason).inc(number)

    def answered(self, method: str, handler: str, status: int) -> None:
        """Count the answer to a request; `handler` is the path as it is written in the table of routes."""
        self._answers.labels(method, handler, f"{status // 100}xx").inc()

    def shown(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self.registry)

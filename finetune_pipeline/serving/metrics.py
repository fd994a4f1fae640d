"""Prometheus metrics for /metrics."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from finetune_pipeline.serving.loop_server import LoopServer

_OVERHEAD_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_ENGINE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_CONFIDENCE_BUCKETS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0)


class Metrics:
    """The gateway's metrics, in their own Prometheus registry."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "finetune_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.answers = Counter(
            "finetune_answers", "Answers by model and traffic variant.", ["loop", "model", "variant"], registry=registry
        )
        self.tokens = Counter(
            "finetune_tokens", "Tokens of prompts and completions.", ["loop", "kind"], registry=registry
        )
        self.flagged = Counter("finetune_flagged", "Answers flagged for review.", ["loop"], registry=registry)
        self.abandoned = Counter(
            "finetune_abandoned", "Answers whose client disconnected before their end.", ["loop"], registry=registry
        )
        self.feedback = Counter("finetune_feedback", "Feedback by kind.", ["loop", "kind"], registry=registry)
        self.engine = Histogram(
            "finetune_engine_seconds",
            "Time in the model's queue and in the model.",
            ["loop"],
            buckets=_ENGINE_BUCKETS,
            registry=registry,
        )
        self.overhead = Histogram(
            "finetune_gateway_overhead_seconds",
            "Time of a request in the gateway without the engine's, for answers that are not streamed.",
            buckets=_OVERHEAD_BUCKETS,
            registry=registry,
        )
        self.confidence = Histogram(
            "finetune_confidence", "Confidence of answers.", ["loop"], buckets=_CONFIDENCE_BUCKETS, registry=registry
        )

    def collect_from(self, servers: Mapping[str, LoopServer], pending_bytes: Callable[[], int]) -> None:
        """Add metrics that are read from these objects at every scrape."""
        self._registry.register(_ServerCollector(servers, pending_bytes))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _ServerCollector(Collector):
    """Metrics of the loaded models and the write-ahead log."""

    def __init__(self, servers: Mapping[str, LoopServer], pending_bytes: Callable[[], int]) -> None:
        self._servers = servers
        self._pending_bytes = pending_bytes

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield one value for each loop."""
        yield GaugeMetricFamily(
            "finetune_write_ahead_log_pending_bytes",
            "Events in the write-ahead log that are not in the store yet.",
            value=self._pending_bytes(),
        )
        serving = GaugeMetricFamily("finetune_serving", "1 for the model in service.", labels=["loop", "model"])
        healthy = GaugeMetricFamily(
            "finetune_healthy", "0 if the champion cannot answer or its answers are empty.", labels=["loop"]
        )
        in_flight = GaugeMetricFamily("finetune_in_flight", "Requests running or waiting in models.", labels=["loop"])
        swaps = CounterMetricFamily("finetune_swaps", "Changes of the model in service.", labels=["loop", "result"])
        fallbacks = CounterMetricFamily("finetune_fallbacks", "Answers by the fallback.", labels=["loop"])
        for name, server in self._servers.items():
            if server.current:
                serving.add_metric([name, server.current.name], 1)
            healthy.add_metric([name], float(server.problem is None and server.current is not None))
            in_flight.add_metric([name], sum(model.in_flight for model in server.loaded))
            swaps.add_metric([name, "done"], server.swaps)
            swaps.add_metric([name, "failed"], server.failed_swaps)
            fallbacks.add_metric([name], server.fallbacks)
        yield from (serving, healthy, in_flight, swaps, fallbacks)

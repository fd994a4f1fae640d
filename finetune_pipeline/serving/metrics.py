"""What Prometheus reads at /metrics."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from finetune_pipeline.serving.models import LoopServer

_FAST = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SURE = (0.1, 0.25, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0)


class Metrics:
    """The gateway's figures, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("finetune_requests", "Requests by route and status.", ["route", "status"], registry=own)
        self.answers = Counter(
            "finetune_answers", "Answers by model and traffic variant.", ["loop", "model", "variant"], registry=own
        )
        self.tokens = Counter("finetune_tokens", "Tokens by kind.", ["loop", "kind"], registry=own)
        self.flagged = Counter("finetune_flagged", "Answers flagged for review.", ["loop"], registry=own)
        self.abandoned = Counter(
            "finetune_abandoned", "Answers whose client was gone before their end.", ["loop"], registry=own
        )
        self.feedback = Counter("finetune_feedback", "Feedback by kind.", ["loop", "kind"], registry=own)
        self.engine = Histogram(
            "finetune_engine_seconds", "Waiting for the model, and in it.", ["loop"], buckets=_SLOW, registry=own
        )
        self.overhead = Histogram(
            "finetune_gateway_overhead_seconds",
            "Whole answers: all time in the gateway but the engine's.",
            buckets=_FAST,
            registry=own,
        )
        self.confidence = Histogram(
            "finetune_confidence", "Confidence of the answers.", ["loop"], buckets=_SURE, registry=own
        )

    def watch(self, servers: Mapping[str, LoopServer], pending: Callable[[], int]) -> None:
        """Read these at every scrape."""
        self.registry.register(_State(servers, pending))

    def text(self) -> bytes:
        """All of it, in Prometheus' form."""
        return generate_latest(self.registry)


class _State(Collector):
    """Figures that are not counted but looked at."""

    def __init__(self, servers: Mapping[str, LoopServer], pending: Callable[[], int]) -> None:
        self._servers = servers
        self._pending = pending

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """One value of each loop."""
        yield GaugeMetricFamily("finetune_journal_pending_bytes", "Not in the store yet.", value=self._pending())
        serving = GaugeMetricFamily("finetune_serving", "1 for the model that answers.", labels=["loop", "model"])
        healthy = GaugeMetricFamily(
            "finetune_healthy", "0 when the champion cannot answer or its answers are empty.", labels=["loop"]
        )
        in_flight = GaugeMetricFamily("finetune_in_flight", "Requests in the models.", labels=["loop"])
        swaps = CounterMetricFamily("finetune_swaps", "Changes of the model.", labels=["loop", "result"])
        fallbacks = CounterMetricFamily("finetune_fallbacks", "Answers by the fallback.", labels=["loop"])
        for name, server in self._servers.items():
            if server.current:
                serving.add_metric([name, server.current.name], 1)
            healthy.add_metric([name], float(server.problem is None and server.current is not None))
            in_flight.add_metric([name], sum(one.in_flight for one in server.served))
            swaps.add_metric([name, "done"], server.swaps)
            swaps.add_metric([name, "failed"], server.failed_swaps)
            fallbacks.add_metric([name], server.fallbacks)
        yield from (serving, healthy, in_flight, swaps, fallbacks)

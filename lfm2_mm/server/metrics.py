"""Prometheus metrics of one server: queue, batch, tokens, first-token time, caches.

One registry for each application, so that several may live in one process. Knows no route.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lfm2_mm.events import Done
from lfm2_mm.model import Model
from lfm2_mm.server.registry import Registry
from lfm2_mm.server.worker import Worker

__all__ = ["Metrics"]

_SECONDS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30)


class Metrics:
    """What is counted.

    Args:
        worker: Whose queue is shown.
        registry: Whose models' caches are shown.
    """

    def __init__(self, worker: Worker, registry: Registry) -> None:
        self._registry = CollectorRegistry()
        labels = ["model"]
        self.requests = Counter(
            "lfm2_requests", "Requests ended.", ["model", "reason"], registry=self._registry
        )
        self.prompt_tokens = Counter(
            "lfm2_prompt_tokens", "Prompt positions.", labels, registry=self._registry
        )
        self.cached_tokens = Counter(
            "lfm2_cached_tokens",
            "Prompt positions found in the prefix cache.",
            labels,
            registry=self._registry,
        )
        self.tokens = Counter(
            "lfm2_completion_tokens", "Tokens generated.", labels, registry=self._registry
        )
        self.first_token = Histogram(
            "lfm2_first_token_seconds",
            "From the request to its first token.",
            labels,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Live(worker, registry))

    def ended(self, model: str, done: Done) -> None:
        """Count a request that ended."""
        self.requests.labels(model, done.finish_reason).inc()
        self.prompt_tokens.labels(model).inc(done.usage.prompt_tokens)
        self.cached_tokens.labels(model).inc(done.usage.cached_tokens)
        self.tokens.labels(model).inc(done.usage.completion_tokens)
        if done.timings.first_token:
            self.first_token.labels(model).observe(done.timings.first_token)

    def failed(self, model: str) -> None:
        """Count a request that failed."""
        self.requests.labels(model, "error").inc()

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Live(Collector):
    """Numbers that are read when they are asked for."""

    def __init__(self, worker: Worker, registry: Registry) -> None:
        self._worker, self._models = worker, registry

    def collect(self) -> Iterable[Metric]:
        """The numbers as they are now."""
        waiting, running = self._worker.waiting, self._worker.running
        queue = GaugeMetricFamily("lfm2_queue", "Requests and jobs that wait for the worker.")
        queue.add_metric([], waiting)
        yield queue
        batch = GaugeMetricFamily("lfm2_batch_size", "Requests that share the engines' steps.")
        batch.add_metric([], running)
        yield batch
        lookups = CounterMetricFamily(
            "lfm2_cache_lookups", "Lookups of a cache.", labels=["model", "cache", "found"]
        )
        for served in self._models.served.values():
            if isinstance(served.model, Model):
                engine = served.model.engine
                for cache, found, missed in (
                    ("prefix", engine.prefixes.hits, engine.prefixes.misses),
                    ("features", engine.features.hits, engine.features.encoded),
                ):
                    lookups.add_metric([served.id, cache, "yes"], found)
                    lookups.add_metric([served.id, cache, "no"], missed)
        yield lookups

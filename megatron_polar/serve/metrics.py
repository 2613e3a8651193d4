"""What /metrics tells Prometheus. Labels are endpoints and statuses only: nothing of a request's content."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (64, 256, 1024, 4096, 16384, 65536)
_REWARDS = (-20, -15, -10, -7.5, -5, -3, -2, -1, 0, 1, 2, 3, 5, 7.5, 10, 15, 20)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = self._make(Counter, "requests", "Requests answered", ["endpoint", "status"])
        self.seconds = self._make(
            Histogram, "request_seconds", "From a request's head to its reply", ["endpoint"], buckets=_SECONDS
        )
        self.queue_sequences = self._make(Gauge, "queue_sequences", "Sequences that wait to be scored")
        self.batch_sequences = self._make(Histogram, "batch_sequences", "Sequences scored together", buckets=_COUNTS)
        self.batch_tokens = self._make(Histogram, "batch_tokens", "Tokens computed together", buckets=_TOKENS)
        self.batch_seconds = self._make(Histogram, "batch_seconds", "Time that a batch took", buckets=_SECONDS)
        self.unshared_tokens = self._make(
            Counter, "unshared_tokens", "Tokens that sequences would have had without shared prefixes"
        )
        self.rewards = self._make(Histogram, "reward", "Rewards given", buckets=_REWARDS)
        self.failures = self._make(
            Counter, "failures", "Replies with status 422 for a reward that is not finite, or 500, by cause", ["cause"]
        )

    def _make(self, kind, name: str, text: str, labels=(), **options):
        return kind(f"megatron_polar_{name}", text, labels, registry=self._registry, **options)

    def text(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self._registry)

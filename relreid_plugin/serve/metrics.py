"""What a service counts, in the text format of Prometheus."""

from __future__ import annotations

from typing import Any

from ..errors import needed

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one service, in a registry of their own.

    Attributes:
        requests: Requests by route, method and status.
        seconds: How long they took, by route.
        batches: Pictures of a forward pass.
        images: Images that can be found.
        written: Images enrolled, images deleted and answers kept, by kind.
    """

    def __init__(self) -> None:
        client = needed("prometheus_client", "the search service")
        self._client = client
        self._registry: Any = client.CollectorRegistry()
        given = {"registry": self._registry}
        self.requests: Any = client.Counter("relreid_requests", "Requests", ["route", "method", "status"], **given)
        self.seconds: Any = client.Histogram("relreid_request_seconds", "Time of a request", ["route"], **given)
        self.batches: Any = client.Histogram("relreid_batch", "Pictures of a forward pass", buckets=_SIZES, **given)
        self.images: Any = client.Gauge("relreid_images", "Images that can be found", **given)
        self.written: Any = client.Counter("relreid_written", "What was written", ["kind"], **given)

    def text(self) -> tuple[bytes, str]:
        """Return all of it, and its media type."""
        return self._client.generate_latest(self._registry), self._client.CONTENT_TYPE_LATEST


__all__ = ["Metrics"]

"""Import name of earlier versions; the schema itself is `geodiag.metrics.schema`."""

from geodiag.metrics.schema import (
    CATEGORIES,
    MAPS,
    METRICS,
    ROUTING_MODES,
    SCHEMA_VERSION,
    SCHEMAS,
    SITES,
    metrics_of,
    registry,
)

__all__ = [
    "CATEGORIES",
    "MAPS",
    "METRICS",
    "ROUTING_MODES",
    "SCHEMAS",
    "SCHEMA_VERSION",
    "SITES",
    "metrics_of",
    "registry",
]

"""What a run tells about itself: metrics, stage times, a progress line, provenance."""

from r2vpo_megatron.observability.progress import ProgressLine
from r2vpo_megatron.observability.provenance import collect_provenance, write_run_config
from r2vpo_megatron.observability.sinks import MetricsWriter, read_metrics
from r2vpo_megatron.observability.timers import StageTimers

__all__ = [
    "MetricsWriter",
    "ProgressLine",
    "StageTimers",
    "collect_provenance",
    "read_metrics",
    "write_run_config",
]

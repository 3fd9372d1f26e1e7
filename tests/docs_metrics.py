"""Metrics as rows of the reference page, collected from a page on which everything has a value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from app.engine.snapshot import STEP_BUCKETS_S, Histogram
from app.metrics import LOAD_STAGES, TIERS, Metrics, ResidentAdapter, ServingSnapshot, TierSnapshot
from app.training.figures import JOB_BUCKETS_S, JOB_OUTCOMES, TrainingSnapshot
from app.training.job import JobStatus

# Labels whose values are no closed set that is worth a list: names of this installation, or route templates and codes.
OPEN_LABELS = frozenset(
    [
        *("model_name", "engine", "le", "route", "code", "outcome"),
        *("version", "commit", "base_model", "quant", "device"),
        *("max_lora", "running_lora_adapters", "waiting_lora_adapters", "block_size", "num_gpu_blocks"),
    ]
)


def full_snapshot() -> ServingSnapshot:
    """A state in which no metric is left out."""
    histogram = Histogram(STEP_BUCKETS_S, (0,) * (len(STEP_BUCKETS_S) + 1), 0.0)
    tier = TierSnapshot(1, 1, 1)
    snapshot = ServingSnapshot(
        resident=(ResidentAdapter("acme", "a" * 64, "support", 8, 1, False),),
        tiers={name: tier for name in TIERS if name != "s3"},
        load_seconds={stage: histogram for stage in LOAD_STAGES},
        step_seconds={phase: histogram for phase in ("prefill", "decode")},
        batch_rows=histogram,
        batch_adapters=histogram,
        breaker_state=0,
    )
    missing = {field.name for field in fields(snapshot) if getattr(snapshot, field.name) is None}
    assert not missing, f"give {missing} a value here, or its metrics are not documented"
    return replace(snapshot, is_draining=True)


def full_training() -> TrainingSnapshot:
    histogram = Histogram(JOB_BUCKETS_S, (0,) * (len(JOB_BUCKETS_S) + 1), 0.0)
    return TrainingSnapshot(
        jobs=dict.fromkeys((status.value for status in JobStatus), 0),
        last_loss=1.0,
        job_seconds=dict.fromkeys(JOB_OUTCOMES, histogram),
    )


def metric_rows() -> Iterator[list[str]]:
    """Name as it is scraped (without a histogram's suffixes), type, labels with their values, meaning."""
    metrics = Metrics(model_name="base", snapshot=full_snapshot, training=full_training)
    metrics.expect_routes(["/v1/models"])
    for family in sorted(metrics.registry.collect(), key=lambda family: (":" in family.name, family.name)):
        labels: dict[str, list[str]] = {}
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label != "le":
                    values = labels.setdefault(label, [])
                    if label not in OPEN_LABELS and value not in values:
                        values.append(value)
        name = family.name + ("_total" if family.type == "counter" else "")
        assert family.samples, f"{family.name} shows no series before its first event: rate() would miss that"
        shown = [f"{label}: {', '.join(values)}" if values else label for label, values in labels.items()]
        yield [f"`{name}`", family.type, "; ".join(shown), family.documentation]

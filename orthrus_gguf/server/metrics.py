"""Counters in Prometheus' text format, under llama-server's names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from orthrus_gguf.server.scheduler import Scheduler

CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Families(Collector):
    def __init__(self, found: Iterable[Metric]) -> None:
        self._found = found

    def collect(self) -> Iterable[Metric]:
        return self._found


def families(scheduler: Scheduler) -> Iterator[Metric]:
    """All counters as they stand."""
    counts = scheduler.counters
    for name, words, value in (
        ("prompt_tokens", "prompt tokens processed", counts.prompt_tokens),
        ("prompt_seconds", "seconds spent on prompts", counts.prompt_seconds),
        ("tokens_predicted", "tokens generated", counts.generated_tokens),
        ("tokens_predicted_seconds", "seconds of generation", counts.generation_seconds),
        ("n_decode", "passes", counts.passes),
        ("spec_decode_num_drafts", "drafts verified", counts.drafts),
        ("spec_decode_num_draft_tokens", "draft tokens verified", counts.draft_tokens),
        ("spec_decode_num_accepted_tokens", "draft tokens accepted", counts.accepted_tokens),
        ("prefill_shortened", "answers to prompts that were shortened", counts.shortened),
        ("prefill_left_out_tokens", "tokens of them that were not read", counts.left_out),
    ):
        yield CounterMetricFamily(f"llamacpp:{name}", words, value=value)
    positions = CounterMetricFamily(
        "llamacpp:spec_decode_num_accepted_tokens_per_pos",
        "draft tokens accepted, by position in the draft",
        labels=["position"],
    )
    for position, count in sorted(counts.positions.items()):
        positions.add_metric([str(position)], count)
    yield positions
    for name, words, value in (
        (
            "prompt_tokens_seconds",
            "prompt tokens per second",
            _ratio(counts.prompt_tokens, counts.prompt_seconds),
        ),
        (
            "predicted_tokens_seconds",
            "tokens generated per second and conversation",
            _ratio(counts.generated_tokens, counts.generation_seconds),
        ),
        ("requests_processing", "conversations under way", scheduler.running),
        ("requests_deferred", "requests that wait for a slot", scheduler.waiting),
        (
            "n_busy_slots_per_decode",
            "conversations in a pass, on average",
            _ratio(counts.busy, counts.passes),
        ),
    ):
        yield GaugeMetricFamily(f"llamacpp:{name}", words, value=value)


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0


def exposition(found: Iterable[Metric]) -> bytes:
    """The page that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(_Families(found))
    return generate_latest(registry)


def labelled(found: Mapping[str, Sequence[Metric]], label: str) -> list[Metric]:
    """Counters of several servers as one page's; label: of what names the server."""
    merged: dict[str, Metric] = {}
    for name, families in found.items():
        for family in families:
            into = merged.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            into.samples += [s._replace(labels={**s.labels, label: name}) for s in family.samples]
    return [*merged.values()]

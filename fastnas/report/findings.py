"""What a reader should know about a run before trusting its genotype: rules with their thresholds, in one place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastnas.report.records import Record
from fastnas.report.text import percent
from fastnas.spaces import Genotype
from fastnas.spaces.genotype import live_edges

RECENT = 3  # epochs that a comparison of accuracies is a mean over
OVERFITTING_GAP = 0.15  # accuracy on the training half above that on the search half
SEARCH_LOSS_RISE = 1.2  # the search loss at the end over its smallest
CHILD_GAP = 0.2  # search accuracy above that of the derived network with the same weights
UNDECIDED = 0.95  # entropy at the end over that of the first epoch
SLOW_DATA = 0.3  # share of the training time that goes to batches


@dataclass(frozen=True)
class Finding:
    """`level`: "warning" or "note"; `title` in a few words; `text` says what it means and what to do."""

    level: str
    title: str
    text: str


def findings(record: Record) -> list[Finding]:
    """All that holds for the run, warnings first."""
    found = [*_numbers(record), *_collapse(record), *_overfitting(record), *_notes(record)]
    return sorted(found, key=lambda finding: finding.level != "warning")


def _numbers(record: Record) -> Iterator[Finding]:
    if record.stopped:
        advice = "start again with a smaller --lr; the epochs before it are kept"
        yield Finding(
            "warning", "Stopped by a number that is none", f"After epoch {record.epochs}: {record.stopped}. {advice}."
        )
    broken = sorted({name for row in record.metrics for name, value in row.items() if value is None})
    if broken:
        yield Finding(
            "warning", "Figures that are no numbers", f"metrics.jsonl has NaN or infinity in {', '.join(broken)}."
        )


def _collapse(record: Record) -> Iterator[Finding]:
    skips, genotype = record.series("skips_normal"), record.genotype
    if not skips or not isinstance(genotype, Genotype):
        return
    edges = sum(map(len, live_edges(genotype.normal)))
    many = [epoch for epoch, count in skips if count > edges / 2]
    if skips[-1][1] > edges / 2:
        yield Finding(
            "warning",
            "Collapse to skip connections",
            f"{skips[-1][1]:.0f} of {edges} edges of the normal cell are skip connections at the end, more than half "
            f"since epoch {_since(many)}. Take the genotype of an earlier epoch from metrics.jsonl, search fewer "
            "epochs, or give --max-skips 2 (DARTS, PC-DARTS).",
        )


def _since(epochs: list[int]) -> int:
    """First epoch of the stretch that the list ends with."""
    start = epochs[-1]
    for epoch in reversed(epochs):
        if start - epoch > 1:
            break
        start = epoch
    return start


def _overfitting(record: Record) -> Iterator[Finding]:
    train = _recent(record, "accuracy")
    # A sampled network's accuracy may fall by bad luck, that of the derived one with it seldom does.
    held = max(_recent(record, "search_accuracy"), _recent(record, "child_accuracy"))
    if record.is_search and held > 0 and train - held > OVERFITTING_GAP:
        yield Finding(
            "warning",
            "Overfitting of the weights",
            f"Accuracy is {percent(train)} on the training half and {percent(held)} on the search half. "
            "Give fewer --epochs, more data, --cutout or a larger --weight-decay.",
        )
    loss = record.series("search_loss")
    if len(loss) > 2:
        epoch, least = min(loss, key=lambda point: point[1])
        if least > 0 and loss[-1][1] > SEARCH_LOSS_RISE * least:
            yield Finding(
                "warning",
                "The search loss rises",
                f"It was least, {least:.4g}, in epoch {epoch} and is {loss[-1][1]:.4g} now: the architecture learns "
                f"from weights that overfit. The genotype of epoch {epoch} is in metrics.jsonl.",
            )


def _recent(record: Record, name: str) -> float:
    """Mean of the last epochs; 0 for a figure that is not there."""
    values = [value for _, value in record.series(name)[-RECENT:]]
    return sum(values) / len(values) if values else 0.0


def _notes(record: Record) -> Iterator[Finding]:
    if not record.finished:
        planned = record.planned if record.planned is not None else "an unknown number of"
        yield Finding(
            "note", "Not finished", f"{record.epochs} of {planned} epochs are done. The command to resume is below."
        )
    search, child = record.last("search_accuracy"), record.last("child_accuracy")
    if search is not None and child is not None and search - child > CHILD_GAP:
        yield Finding(
            "note",
            "Deriving costs accuracy",
            f"The supernet has {percent(search)} on the search half and the derived network, with the same weights and "
            f"no training, {percent(child)}. The search accuracy does not predict what retraining gives.",
        )
    entropy = record.series("entropy")
    if len(entropy) > 1 and entropy[0][1] > 0 and entropy[-1][1] > UNDECIDED * entropy[0][1] > 0:
        yield Finding(
            "note",
            "Hardly decided",
            f"The entropy of the architecture went from {entropy[0][1]:.3f} to {entropy[-1][1]:.3f} nats: small "
            "differences chose the genotype. Search more epochs, give a larger --arch-lr, or compare several --seeds.",
        )
    data, train = record.series("data_s"), record.series("train_s")
    if data and train and sum(s for _, s in data) > SLOW_DATA * sum(s for _, s in train):
        share = sum(s for _, s in data) / sum(s for _, s in train)
        yield Finding(
            "note",
            "Slow batches",
            f"{percent(share)} of the training time goes to making batches: give more --workers, or a smaller "
            "--image-size.",
        )

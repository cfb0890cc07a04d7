"""Ranking metrics of one target per event, exact under ties, with intervals that resample users.

A target has a `rank` (1 + the candidates that score higher) and `ties` (the other candidates that score the same). The scores
say nothing about the order inside a tied block, so a metric is its mean over all orders of that block: the target is equally
often at each position rank, rank + 1, …, rank + ties. A constant scorer thus gets exactly what a random one expects.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KS = (1, 5, 10, 20, 50)
_BLOCK = 1 << 22  # entries of a block of bootstrap weights: 32 MiB, however many users there are


def ranking_metrics(rank: np.ndarray, ties: np.ndarray, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """HR, Precision, NDCG and MRR at each K, per event: `{"hr@10": [n] float64, …}`.

    With gain g(r), the sum over the block's positions up to K, Σ_{r=rank}^{min(rank+ties, K)} g(r)/(ties+1), is a difference of
    two cumulative sums. HR has g = 1, NDCG 1/log2(r+1), MRR 1/r; Precision is HR/K. HR equals Recall: there is one target.

    Args:
      rank: [n] integers from 1.
      ties: [n] integers from 0.
      ks: the cut-offs.

    Raises:
      ValueError: a rank below 1, negative ties, a K below 1, arrays of different lengths, or values that are not integers.
    """
    rank, ties = np.asarray(rank), np.asarray(ties)
    if rank.shape != ties.shape or rank.ndim != 1:
        raise ValueError(f"rank {rank.shape} and ties {ties.shape} must be vectors of one length")
    if rank.size and not (np.issubdtype(rank.dtype, np.integer) and np.issubdtype(ties.dtype, np.integer)):
        raise ValueError(f"rank ({rank.dtype}) and ties ({ties.dtype}) must be integers")
    if rank.size and (rank.min() < 1 or ties.min() < 0):
        raise ValueError("rank counts from 1 and ties from 0")
    if not all(k >= 1 for k in ks):
        raise ValueError(f"ks must be at least 1, got {tuple(ks)}")
    rank, ties = rank.astype(np.int64), ties.astype(np.int64)  # unsigned or narrow integers must not wrap below

    position = np.arange(1, max(ks, default=0) + 1)
    gains = {"hr": np.ones(len(position)), "ndcg": 1 / np.log2(position + 1), "mrr": 1 / position}
    sums = {name: np.concatenate([[0.0], np.cumsum(gain)]) for name, gain in gains.items()}  # sums[r] = g(1) + … + g(r)

    metrics: dict[str, np.ndarray] = {}
    for k in ks:
        before, last = np.minimum(rank - 1, k), np.minimum(rank + ties, k)
        hr, ndcg, mrr = ((sums[name][last] - sums[name][before]) / (ties + 1) for name in ("hr", "ndcg", "mrr"))
        metrics |= {f"hr@{k}": hr, f"precision@{k}": hr / k, f"ndcg@{k}": ndcg, f"mrr@{k}": mrr}
    return metrics


def summarize(
    user: np.ndarray,
    rank: np.ndarray,
    ties: np.ndarray,
    cold: np.ndarray,
    ks: Sequence[int] = KS,
    resamples: int = 1000,
    seed: int = 0,
) -> dict:
    """Means over events with 95 % intervals over users, as plain JSON values.

    Args:
      user: [n] user of each event, ids or numbers; a user may have several events.
      rank, ties: [n] integers, see `ranking_metrics`.
      cold: [n] bool, the target has no training event.
      ks: the cut-offs.
      resamples: bootstrap resamples of the users.
      seed: together with the number of users it decides the resamples, so models with the same users share them.

    Returns:
      {"users": …, "events": …, "hr@10": mean, "hr@10_ci": [lo, hi], …, "tie_rate": share of events with ties,
      "cold": {"events": …, "hr@10": mean, …}}. The keys do not depend on the data: a mean over no event is None (null in JSON),
      an interval over no user too.

    Raises:
      ValueError: arrays of different lengths, or what `ranking_metrics` raises.
    """
    values, ties = ranking_metrics(rank, ties, ks), np.asarray(ties)
    cold = np.asarray(cold, bool)
    if len(cold) != len(ties):
        raise ValueError(f"cold has {len(cold)} entries, rank {len(ties)}")
    return {
        **_means_and_intervals(user, values, len(ties), resamples, seed),
        "tie_rate": _mean(ties > 0),
        "cold": {"events": int(cold.sum()), **{name: _mean(value[cold]) for name, value in values.items()}},
    }


def paired_difference(
    user: np.ndarray,
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    resamples: int = 1000,
    seed: int = 0,
) -> dict:
    """Mean of a − b for each metric, with its 95 % interval over users.

    Args:
      user: [n] user of each event.
      a, b: per-event metrics of two models on the same events in the same order (`ranking_metrics`).
      resamples, seed: as in `summarize`.

    Returns:
      {"users": …, "events": …, "hr@10": mean, "hr@10_ci": [lo, hi], …}; None where there is no event.

    Raises:
      ValueError: the two have different metrics or different numbers of events.
    """
    if a.keys() != b.keys():
        raise ValueError(f"different metrics: {sorted(a.keys() ^ b.keys())}")
    for name in a:
        if np.shape(a[name]) != np.shape(b[name]):
            raise ValueError(f"{name}: {np.shape(a[name])} and {np.shape(b[name])} are not the same events")
    difference = {name: np.asarray(a[name], float) - np.asarray(b[name], float) for name in a}
    return _means_and_intervals(user, difference, len(np.asarray(user)), resamples, seed)


def format_table(
    results: Mapping[str, Mapping],
    metrics: Sequence[str] = ("hr@10", "ndcg@10", "hr@50", "mrr@10"),
    intervals: Sequence[str] = ("hr@10", "ndcg@10"),
) -> str:
    """A plain text table: one row per model, one column per metric, with [lo, hi] for those in `intervals`.

    `results` maps a model's name to its summary (`summarize`, one split). What a summary lacks, or has as None, prints as "-".
    """

    def cell(summary: Mapping, metric: str) -> str:
        value, interval = summary.get(metric), summary.get(f"{metric}_ci")
        if value is None:
            return "-"
        return f"{value:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if metric in intervals and interval else "")

    header = ["model", *(metric.upper() + (" [95 %]" if metric in intervals else "") for metric in metrics)]
    rows = [header, *([name, *(cell(summary, metric) for metric in metrics)] for name, summary in results.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _means_and_intervals(user: np.ndarray, values: Mapping[str, np.ndarray], events: int, resamples: int, seed: int) -> dict:
    """Counts, means over events and their intervals.

    A resample that draws user u w_u times has the mean Σ_u w_u·sum_u / Σ_u w_u·count_u.
    """
    if np.shape(user) != (events,) or any(len(value) != events for value in values.values()):
        raise ValueError(f"user {np.shape(user)} and the metrics must be of the same {events} events")
    ids, index = np.unique(np.asarray(user), return_inverse=True)
    result: dict = {"users": len(ids), "events": events}
    if not events or not values:
        return result | {key: None for name in values for key in (name, f"{name}_ci")}

    # Sums and counts per user, so that the events are read once and not once per resample.
    totals_UM = np.stack([np.bincount(index, value, len(ids)) for value in (*values.values(), np.ones(events))], axis=1)
    drawn_RM = np.concatenate([weights @ totals_UM for weights in _resamples(len(ids), resamples, seed)] or [totals_UM[:0]])
    means_RM = drawn_RM[:, :-1] / drawn_RM[:, -1:]
    for column, (name, value) in enumerate(values.items()):
        result[name] = float(np.mean(value))
        result[f"{name}_ci"] = np.percentile(means_RM[:, column], [2.5, 97.5]).tolist() if resamples else None
    return result


def _resamples(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks [r, users] float64 of how often each resample drew each user; a function of the arguments alone."""
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // users)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = (generator.integers(users, size=users) for _ in range(count))  # one by one: the blocks change nothing
        yield np.stack([np.bincount(one, minlength=users) for one in drawn]).astype(float)

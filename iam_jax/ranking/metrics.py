"""Ranking metrics for one target per event, exact under ties, with bootstrap intervals over users.

A target has a `rank` (1 + the number of candidates with a higher score) and `ties` (the number of other candidates with an equal score).
Scores do not order the candidates of a tied block, so a metric is its mean over all orders of the block: the target is equally often at
each of the positions rank, rank + 1, …, rank + ties. A constant scorer therefore gets exactly the expectation of a random scorer.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KS = (1, 5, 10, 20, 50)
_BLOCK = 1 << 22  # entries per block of bootstrap weights: 32 MiB for any number of users


def ranking_metrics(rank: np.ndarray, ties: np.ndarray, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """Computes HR, Precision, NDCG and MRR at each K, per event.

    A metric with gain g is the sum over the positions of the tied block up to K, Σ_{r=rank}^{min(rank+ties, K)} g(r)/(ties+1), which is a
    difference of two cumulative sums. The gain is 1 for HR, 1/log2(r+1) for NDCG and 1/r for MRR. Precision is HR/K. Since there is one
    target, HR equals Recall.

    Args:
      rank: [n] integers, 1 or more.
      ties: [n] integers, 0 or more.
      ks: the cut-offs K.

    Returns:
      {"hr@10": [n] float64, …}

    Raises:
      ValueError: if a rank is below 1, ties are negative, a K is below 1, the arrays differ in length, or values are not integers.
    """
    rank, ties = np.asarray(rank), np.asarray(ties)
    if rank.shape != ties.shape or rank.ndim != 1:
        raise ValueError(f"rank {rank.shape} and ties {ties.shape} must be vectors of equal length")
    if rank.size and not (np.issubdtype(rank.dtype, np.integer) and np.issubdtype(ties.dtype, np.integer)):
        raise ValueError(f"rank ({rank.dtype}) and ties ({ties.dtype}) must be integers")
    if rank.size and (rank.min() < 1 or ties.min() < 0):
        raise ValueError("rank must be at least 1 and ties at least 0")
    if not all(k >= 1 for k in ks):
        raise ValueError(f"ks must be at least 1, got {tuple(ks)}")
    rank, ties = rank.astype(np.int64), ties.astype(np.int64)  # unsigned or narrow integers could overflow below

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
    repeated: np.ndarray | None = None,
) -> dict:
    """Computes means over events with 95 % intervals over users (percentile bootstrap), as JSON values.

    Args:
      user: [n] user of each event, ids or numbers. A user may have several events.
      rank, ties: [n] integers, as in `ranking_metrics`.
      cold: [n] bool, True if the target has no training event.
      ks: the cut-offs K.
      resamples: number of bootstrap resamples of the users; 0 gives no intervals (None).
      seed: seed of the resamples. They depend only on it and on the number of users, so models with the same users share them.
      repeated: [n] bool, True if the target is in the history already; None: not reported.

    Returns:
      {"users": …, "events": …, "hr@10": mean, "hr@10_ci": [lo, hi], …, "tie_rate": share of events with ties,
      "cold": {"events": …, "hr@10": mean, …}}. With `repeated`, "new" and "repeated" are like "cold". The keys do not depend on the data.
      Without events, means and intervals are None.

    Raises:
      ValueError: if the arrays differ in length, and as `ranking_metrics`.
    """
    values, ties = ranking_metrics(rank, ties, ks), np.asarray(ties)
    parts = {"cold": np.asarray(cold, bool)}
    if repeated is not None:
        parts |= {"new": ~np.asarray(repeated, bool), "repeated": np.asarray(repeated, bool)}
    for part, of_part in parts.items():
        if len(of_part) != len(ties):
            raise ValueError(f"{part} has {len(of_part)} entries, rank {len(ties)}")
    return {
        **_means_and_intervals(user, values, len(ties), resamples, seed),
        "tie_rate": _mean(ties > 0),
        **{
            part: {"events": int(of_part.sum()), **{name: _mean(value[of_part]) for name, value in values.items()}}
            for part, of_part in parts.items()
        },
    }


def paired_difference(
    user: np.ndarray,
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    resamples: int = 1000,
    seed: int = 0,
) -> dict:
    """Computes the mean of a − b for each metric, with 95 % intervals over users.

    Args:
      user: [n] user of each event.
      a, b: per-event metrics of two models (`ranking_metrics`) on the same events in the same order.
      resamples, seed: as in `summarize`.

    Returns:
      {"users": …, "events": …, "hr@10": mean, "hr@10_ci": [lo, hi], …}. Without events, means and intervals are None.

    Raises:
      ValueError: if a and b have different metrics or different numbers of events.
    """
    if a.keys() != b.keys():
        raise ValueError(f"the two models have different metrics: {sorted(a.keys() ^ b.keys())}")
    for name in a:
        if np.shape(a[name]) != np.shape(b[name]):
            raise ValueError(f"{name}: the two models have different events, {np.shape(a[name])} and {np.shape(b[name])}")
    difference = {name: np.asarray(a[name], float) - np.asarray(b[name], float) for name in a}
    return _means_and_intervals(user, difference, len(np.asarray(user)), resamples, seed)


def format_table(
    results: Mapping[str, Mapping],
    metrics: Sequence[str] = ("hr@10", "ndcg@10", "hr@50", "mrr@10"),
    intervals: Sequence[str] = ("hr@10", "ndcg@10"),
) -> str:
    """Formats a text table with one row per model and one column per metric.

    Args:
      results: summaries of one split (`summarize`) by model name. Missing values and None are shown as "-".
      metrics: the columns.
      intervals: the metrics that are shown with their interval, [lo, hi].
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
    """Returns the numbers of users and events, the means over events, and their intervals.

    If a resample draws user u w_u times, its mean is Σ_u w_u·sum_u / Σ_u w_u·count_u.
    """
    if np.shape(user) != (events,) or any(len(value) != events for value in values.values()):
        raise ValueError(f"user {np.shape(user)} and the metrics must describe the same {events} events")
    ids, index = np.unique(np.asarray(user), return_inverse=True)
    result: dict = {"users": len(ids), "events": events}
    if not events or not values:
        return result | {key: None for name in values for key in (name, f"{name}_ci")}

    # Sums and counts per user, so that events are read once instead of once per resample.
    totals_UM = np.stack([np.bincount(index, value, len(ids)) for value in (*values.values(), np.ones(events))], axis=1)
    drawn_RM = np.concatenate([weights @ totals_UM for weights in _resamples(len(ids), resamples, seed)] or [totals_UM[:0]])
    means_RM = drawn_RM[:, :-1] / drawn_RM[:, -1:]
    for column, (name, value) in enumerate(values.items()):
        result[name] = float(np.mean(value))
        result[f"{name}_ci"] = np.percentile(means_RM[:, column], [2.5, 97.5]).tolist() if resamples else None
    return result


def _resamples(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields blocks [r, users] float64 with how often each resample drew each user. They depend only on the arguments."""
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // users)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        # One resample at a time, so that the result does not depend on the size of the blocks.
        resampled = (generator.integers(users, size=users) for _ in range(count))
        yield np.stack([np.bincount(indices, minlength=users) for indices in resampled]).astype(float)

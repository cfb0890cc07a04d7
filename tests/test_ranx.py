"""Comparison of the metrics with ranx (extra `parity`), on rankings without ties, since ranx orders tied items arbitrarily."""

import pytest
from test_ranking import metrics_of, random_ranking

ranx = pytest.importorskip("ranx", reason="ranx is not installed: the extra `parity`")


def test_metrics_are_those_of_ranx():
    scores, target = random_ranking()
    names = {"hr": "hit_rate", "precision": "precision", "ndcg": "ndcg", "mrr": "mrr"}
    qrels = ranx.Qrels({f"u{u}": {f"i{t}": 1} for u, t in enumerate(target)})
    run = ranx.Run({f"u{u}": {f"i{i}": float(x) for i, x in enumerate(row)} for u, row in enumerate(scores)})
    ks = (1, 5, 10, 20, 50)
    theirs = ranx.evaluate(qrels, run, [f"{name}@{k}" for name in names.values() for k in ks])
    found = metrics_of(scores, target, ks)
    for ours, name in names.items():
        for k in ks:
            assert found[f"{ours}@{k}"] == pytest.approx(theirs[f"{name}@{k}"], rel=1e-9), (ours, k)

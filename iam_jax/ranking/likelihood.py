"""Ranking by text: the likelihood of each given candidate under a text generator (iam_jax/ranking/beam.py finds the likeliest items).

Axes: B users, C candidates, T token slots, X slots of all users, D model.
"""

import jax
import jax.numpy as jnp

from iam_jax.model.attention import group_starts, history_ends
from iam_jax.model.network import Network
from iam_jax.model.softmax import label_log_probs


def check_predicts(model: Network) -> None:
    """Raises ValueError for a schedule with a relation that sees later tokens."""
    if (ahead := model.config.schedule.sees_ahead) is not None:
        raise ValueError(f"log-likelihoods need a schedule without {ahead}: it sees the tokens that are to be predicted")


def log_likelihoods(model: Network, batch: dict, candidates: int, chunk: int = 2048, *, normalize: bool = False) -> jax.Array:
    """[B, C] float32: log p(text of candidate | history), the sum over its tokens, the boundary token included; 0 where a row has fewer
    candidates. batch: from `data.candidates.candidate_rows`; candidates: C, the most that a row has. normalize: the mean over the tokens
    instead. At most `chunk` positions' logits exist at one time. Raises ValueError for a schedule with a relation that sees later
    tokens and for a model without an output embedding."""
    check_predicts(model)
    x_BTD = model.states(batch)
    t = jnp.arange(x_BTD.shape[1])
    starts_BT = group_starts(batch["user"], batch["group"], batch["candidate"])
    # A candidate's first token is predicted from the end of the history, the others from the token before them.
    from_BT = jnp.where(starts_BT == t, history_ends(batch["candidate"]), t) - 1
    x_XD = jnp.take_along_axis(x_BTD, from_BT[..., None], axis=1).reshape(-1, x_BTD.shape[-1])
    label_BT = jnp.where(batch["candidate"] > 0, batch["token"], -1)
    log_prob_X = label_log_probs(x_XD, model.output_embedding(), label_BT.reshape(-1), chunk=chunk)
    zero = jnp.zeros((len(x_BTD), candidates + 1)).at[jnp.arange(len(x_BTD))[:, None], batch["candidate"]]
    sum_BC = zero.add(log_prob_X.reshape(label_BT.shape))[:, 1:]
    return sum_BC / jnp.maximum(zero.add(1)[:, 1:], 1) if normalize else sum_BC

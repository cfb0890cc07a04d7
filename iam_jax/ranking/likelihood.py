"""Ranking by text: the likelihood of given candidates under a text generator. (beam.py finds the most likely items.)

Axes: B users, C candidates, T token slots, X slots of all users, D model.
"""

import jax
import jax.numpy as jnp

from iam_jax.model.attention import group_starts, history_ends
from iam_jax.model.network import Network
from iam_jax.model.softmax import label_log_probs


def check_predicts(model: Network) -> None:
    """Raises ValueError if a relation of the schedule sees later tokens."""
    if (relation := model.config.schedule.sees_ahead) is not None:
        raise ValueError(f"log-likelihoods need a schedule without {relation}: it sees the tokens that are to be predicted")


def log_likelihoods(model: Network, batch: dict, candidates: int, chunk: int = 2048, *, normalize: bool = False) -> jax.Array:
    """[B, C] float32: log p(text of candidate | history), the sum over its tokens including the boundary token.

    Args:
      model: the network with its parameters.
      batch: from `data.candidates.candidate_rows`.
      candidates: C, the largest number of candidates in a row. Rows with fewer candidates have zeros after the last.
      chunk: number of positions whose logits exist at the same time.
      normalize: whether to return the mean over the tokens instead of the sum.

    Raises:
      ValueError: if a relation of the schedule sees later tokens, or if the model has no output embedding.
    """
    check_predicts(model)
    x_BTD = model.states(batch)
    t = jnp.arange(x_BTD.shape[1])
    starts_BT = group_starts(batch["user"], batch["group"], batch["candidate"])
    # The first token of a candidate is predicted from the end of the history, each other token from the token before it.
    source_BT = jnp.where(starts_BT == t, history_ends(batch["candidate"]), t) - 1
    x_XD = jnp.take_along_axis(x_BTD, source_BT[..., None], axis=1).reshape(-1, x_BTD.shape[-1])
    label_BT = jnp.where(batch["candidate"] > 0, batch["token"], -1)
    log_prob_X = label_log_probs(x_XD, model.output_embedding(), label_BT.reshape(-1), chunk=chunk)
    zero = jnp.zeros((len(x_BTD), candidates + 1)).at[jnp.arange(len(x_BTD))[:, None], batch["candidate"]]
    sum_BC = zero.add(log_prob_X.reshape(label_BT.shape))[:, 1:]
    return sum_BC / jnp.maximum(zero.add(1)[:, 1:], 1) if normalize else sum_BC

"""The token objective: cross-entropy of the next token, on the text of the target items, their boundary tokens included."""

import jax

from iam_jax.config import Config
from iam_jax.model.network import Network
from iam_jax.model.softmax import cross_entropy
from iam_jax.training.objectives.objective import Objective, States


def _loss(network: Network, config: Config, items, batch: dict, states: States, keys, shared) -> jax.Array:
    x_XD, label_X = states.x_BTD.reshape(-1, states.x_BTD.shape[-1]), batch["label"].reshape(-1)
    return cross_entropy(x_XD, network.output_embedding(), label_X, chunk=config.objective.chunk)


TOKEN = Objective(
    name="token",
    meaning="next token of the target items' text",
    loss=_loss,
    count=lambda batch: (batch["label"] >= 0).sum(),
    weight=lambda config: config.objective.token,
    whole_text=True,
)

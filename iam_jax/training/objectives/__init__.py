"""What training minimises: a weighted sum of objectives, each a mean over its targets.

An objective is one `Objective` object. To add one, register it before the run is made:

    from iam_jax.training.objectives import Objective, register

    def loss(network, config, items, batch, states, keys, cache_IE):
        return jnp.square(states.x_BTD).mean(-1).sum()

    register(Objective("size", "mean square of the states", loss, lambda batch: batch["token"].size, weight=lambda config: 0.01))
"""

import jax

from iam_jax.config import Config
from iam_jax.data.item_rows import CHUNKS
from iam_jax.model.network import Network
from iam_jax.registry import Registry
from iam_jax.training.objectives.item import ITEM, TrainingItems, draw, make_training_items, summed_up
from iam_jax.training.objectives.objective import Objective, States
from iam_jax.training.objectives.token import TOKEN

__all__ = [
    "OBJECTIVES", "Objective", "States", "TrainingItems", "check", "counts", "draw", "losses", "make_training_items", "register",
    "summed_up", "unregister", "weights",
]  # fmt: skip

OBJECTIVES: Registry[Objective] = Registry("objective", {objective.name: objective for objective in (ITEM, TOKEN)})

register, unregister = OBJECTIVES.register, OBJECTIVES.unregister


def weights(config: Config) -> dict[str, float]:
    """The objectives that the config computes, by name, with their weights."""
    found = {name: objective.weight(config) for name, objective in OBJECTIVES.items()}
    return {name: weight for name, weight in found.items() if weight}


def check(config: Config) -> None:
    """Raises InputError where the config does not suit one of its objectives."""
    for name in weights(config):
        OBJECTIVES[name].check(config)


def losses(network: Network, config: Config, items: TrainingItems, batch: dict, key: jax.Array | None, cache_IE: jax.Array | None) -> dict:
    """The sum of each objective over the batch's targets, by name. Divided by the `counts` they are means, for `item` and `token` in nats.

    key: for dropout and drawn negatives; None for neither of them (then objective.softmax must be full or cached)."""
    states_key, *first_keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    leading_XD = target_XE = None
    if "leading" in batch:
        leading_XD = network.leading_states(batch["leading"], CHUNKS, None if states_key is None else jax.random.fold_in(states_key, 0))
    if leading_XD is not None and "target_slot" in batch and config.leading_vectors:
        target_XE = network.text_head(network.taken(leading_XD, batch["target_slot"].reshape(-1)))
    states = States(network.states(batch, states_key, leading_XD, items.catalogue.trained_I), target_XE)
    sums = {}
    for number, name in enumerate(OBJECTIVES):
        objective = OBJECTIVES[name]
        if objective.weight(config):
            own_keys = first_keys if number == 0 or key is None else jax.random.split(jax.random.fold_in(key, 2 + number))
            sums[name] = objective.loss(network, config, items, batch, states, own_keys, cache_IE)
    return sums


def counts(batch: dict) -> dict:
    """How many targets of each objective the batch has, by name."""
    return {name: objective.count(batch) for name, objective in OBJECTIVES.items()}

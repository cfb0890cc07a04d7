"""What training minimises: a weighted sum of objectives, each a mean over its targets.

An objective is one `Objective` object. To add one, register it before the run is made:

    from iam_jax.training.objectives import Objective, register

    def loss(network, config, items, batch, states, keys, shared):
        return jnp.square(states.x_BTD).mean(-1).sum()

    register(Objective("size", "mean square of the states", loss, lambda batch: batch["token"].size, weight=lambda config: 0.01))
"""

import jax

from iam_jax.config import Config
from iam_jax.data.item_rows import chunks
from iam_jax.devices.mesh import current_platform
from iam_jax.model.network import Network
from iam_jax.registry import Registry
from iam_jax.training.objectives.item import ITEM, TrainingItems, draw, make_training_items, summed_up
from iam_jax.training.objectives.objective import Objective, Shared, States
from iam_jax.training.objectives.token import TOKEN

__all__ = [
    "OBJECTIVES", "Objective", "Shared", "States", "TrainingItems", "check", "counts", "draw", "losses", "make_training_items", "register",
    "share", "summed_up", "unregister", "weights",
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


def losses(
    network: Network,
    config: Config,
    items: TrainingItems,
    batch: dict,
    key: jax.Array | None,
    cache_IE: jax.Array | None,
    shared: Shared | None = None,
) -> dict:
    """The sum of each objective over the batch's targets, by name. Divided by the `counts` they are means, for `item` and `token` in nats.

    key: for dropout and drawn negatives; None for neither of them (then objective.softmax must be full). shared: what `share` returned, if
    the batch is one of several micro-batches; it then also has `target_place` [B, M], the place of each target in the whole batch."""
    states_key, own_keys = _keys(config, key)
    if items.catalogue.tower_XD is not None:
        leading_XD = items.catalogue.tower_XD
    else:
        leading_XD = _leading(network, config, batch, states_key) if shared is None else shared.learned["leading"]
    states, sums = States(network.states(batch, states_key, leading_XD, items.catalogue)), {}
    for name, keys in own_keys.items():
        if shared is None:
            own = OBJECTIVES[name].shared(network, config, items, batch, leading_XD, keys, cache_IE)
        else:
            own = Shared(shared.learned[name], shared.given[name])
        sums[name] = OBJECTIVES[name].loss(network, config, items, batch, states, keys, own)
    return sums


def share(network: Network, config: Config, items: TrainingItems, batch: dict, key: jax.Array | None, cache_IE: jax.Array | None) -> Shared:
    """What the losses of all micro-batches of a batch share: the `Shared` of each objective by name, and as `leading` the states of the
    batch's distinct items."""
    states_key, own_keys = _keys(config, key)
    leading_XD = _leading(network, config, batch, states_key)
    own = {name: OBJECTIVES[name].shared(network, config, items, batch, leading_XD, keys, cache_IE) for name, keys in own_keys.items()}
    return Shared({"leading": leading_XD} | {name: x.learned for name, x in own.items()}, {name: x.given for name, x in own.items()})


def _keys(config: Config, key: jax.Array | None) -> tuple[jax.Array | None, dict]:
    """A key for the states, and two keys for each objective that is computed, by name."""
    states_key, *first = (None,) * 3 if key is None else jax.random.split(key, 3)
    return states_key, {
        name: first if number == 0 or key is None else jax.random.split(jax.random.fold_in(key, 2 + number))
        for number, name in enumerate(OBJECTIVES)
        if OBJECTIVES[name].weight(config)
    }


def _leading(network: Network, config: Config, batch: dict, key: jax.Array | None) -> jax.Array | None:
    """States of the batch's distinct items after the leading intra layers, where the batch has those items (data/item_rows.py)."""
    if "leading" not in batch:
        return None
    parts = config.optimizer.accumulate
    key = None if key is None else jax.random.fold_in(key, 0)
    return network.leading_states(batch["leading"], chunks(parts), key, recompute=recomputes_items(config))


def recomputes_items(config: Config) -> bool:
    """Whether the backward pass computes the leading layers of all items of a batch again, beside what `model.remat` does.

    With micro-batches this bounds the memory. On a CPU it saves time: to store and read the activations of small models (measured at width
    64) takes longer there than to compute them again.
    """
    return config.optimizer.accumulate > 1 or (current_platform() == "cpu" and not config.model.remat)


def counts(batch: dict) -> dict:
    """How many targets of each objective the batch has, by name."""
    return {name: objective.count(batch) for name, objective in OBJECTIVES.items()}

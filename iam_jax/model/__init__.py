"""The model as plain functions over plain pytrees; only this package knows Flax."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from iam_jax.config import Config
from iam_jax.model.lora import Keys
from iam_jax.model.network import Network

Params = dict


@dataclasses.dataclass(frozen=True)
class Model:
    """`init(key)` makes the parameters, a nested dict of float32 arrays named by their axes; `bind(params)` a Network."""

    init: Callable[[jax.Array], Params]
    bind: Callable[[Params], Network]
    _shapes: Params = dataclasses.field(repr=False, compare=False)

    def shapes(self) -> Params:
        """The parameters' shapes and types; nothing is allocated or run: the mesh may be of devices that are not here."""
        return jax.tree.map(lambda x: x, self._shapes)


def make_model(config: Config, vocabulary: int, items: int, longest: int | None = None, vector_size: int = 0) -> Model:
    """vocabulary: token ids, boundary included; items: rows of the item table; longest: tokens of the longest item (or prompt), which
    bounds what an intra layer has to look at; None: not known, then intra layers cost more on a CPU. vector_size: length of the items'
    given vectors (`data.vectors`); 0: there are none."""

    def build(key: jax.Array) -> Network:
        return Network(config, vocabulary, items, longest, vector_size, Keys(key))

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.split(build(key))[1])

    graph, shapes = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
    return Model(init, lambda params: nnx.merge(graph, params), nnx.to_pure_dict(shapes))

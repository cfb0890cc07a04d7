"""Attention relations: which keys a token may see. Each relation is one object, which all other modules read.

A token can see two kinds of keys. The first kind is one range of earlier keys of its user: the prompt and the items before its own item.
The second kind is its own item: no token of it, the tokens up to itself, or all its tokens. To add a relation, register it before the
config is resolved, for example in the config file:

    register(Relation("previous", start=lambda at: at.start_of(at.before - 1), meaning="the item before its own"))

The schedule language then accepts the name. Masks, the cache of item states, candidate scoring, beam search, plans and the checks of
the config follow from the object.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from iam_jax.registry import Registry

if TYPE_CHECKING:
    import jax

NAME = r"[a-z_]+"  # regular expression for names of relations, also in the schedule language


@dataclasses.dataclass(frozen=True)
class Layout:
    """The positions of users and items as slots of keys: int32 [B, T] for T queries, except `group_start_BS`."""

    user_start: "jax.Array"  # first slot of the user
    before: "jax.Array"  # slot after the earlier items: the item's first slot; for a candidate, the end of the history
    item_start: "jax.Array"  # first slot of the item (or the prompt)
    item_stop: "jax.Array"  # slot after the item's last token
    slot: "jax.Array"  # slot of the token itself
    group_start_BS: "jax.Array"  # for each key slot, the first slot of its item (or of the prompt)

    def start_of(self, slot_BT: "jax.Array") -> "jax.Array":
        """[B, T]: the first slot of the item (or the prompt) that holds the given key slot. Slots outside the row count as its ends."""
        import jax.numpy as jnp  # here, so that reading a config does not import JAX

        last = self.group_start_BS.shape[1] - 1
        return jnp.take_along_axis(self.group_start_BS, jnp.clip(slot_BT, 0, last), axis=1)


Bound = Callable[[Layout], "jax.Array"]


@dataclasses.dataclass(frozen=True)
class Relation:
    """The keys that a token sees: earlier keys [start, stop), and tokens of its own item.

    `start` and `stop` are clipped to the keys between the user's first slot and the token's own item, so that no relation can see another
    user, a later item or another candidate.

    Attributes:
      name: lower-case letters and underscores; schedules use it.
      start: maps a Layout to the first slot of the earlier keys, [B, T]; None: no earlier keys.
      stop: maps a Layout to the slot after the earlier keys, [B, T]; None: the end of the earlier items.
      own: the visible tokens of the own item: None (none), "past" (those up to the token itself) or "whole" (all).
      meaning: one line for the documentation.

    Raises:
      ValueError: if the relation has no keys, or if the name or `own` is not allowed.
    """

    name: str
    start: Bound | None = None
    stop: Bound | None = None
    own: Literal["past", "whole"] | None = None
    meaning: str = ""

    def __post_init__(self):
        if not re.fullmatch(NAME, self.name):
            raise ValueError(f"relation {self.name!r}: a name consists of lower-case letters and underscores")
        if self.own not in (None, "past", "whole"):
            raise ValueError(f"relation {self.name!r}: own = {self.own!r} must be None, 'past' or 'whole'")
        if self.start is None and (self.own is None or self.stop is not None):
            raise ValueError(f"relation {self.name!r}: needs `start` or `own`, and `stop` needs `start`")

    @property
    def own_item_only(self) -> bool:
        """Whether this is an intra relation: states depend on the item alone. Leading layers of this kind are computed once per item."""
        return self.start is None

    @property
    def other_items_only(self) -> bool:
        """Whether this is an inter relation: `model.self_key` and `model.inter_positions` apply to it."""
        return self.own is None

    @property
    def sees_ahead(self) -> bool:
        """Whether a token sees later tokens of its own item. Such a relation cannot be used if tokens are predicted."""
        return self.own == "whole"

    def reach(self, longest: int | None) -> tuple[int, int] | None:
        """Returns the largest distances of a key before and after its query, in slots; None if they are not bounded.

        longest: number of tokens of the longest item (or prompt); None if it is not known.
        """
        if longest is None or not self.own_item_only:
            return None
        return longest - 1, longest - 1 if self.sees_ahead else 0


ORDINARY = "full"  # the relation of pretrained models

_OWN = (
    Relation(ORDINARY, start=lambda at: at.user_start, own="past", meaning="ordinary causal attention"),
    Relation("intra", own="past", meaning="its own item so far"),
    Relation("inter", start=lambda at: at.user_start, meaning="all earlier items and the prompt, no other token of its own item"),
    Relation("intra_both", own="whole", meaning="its own item in both directions"),
)
RELATIONS: Registry[Relation] = Registry("relation", {relation.name: relation for relation in _OWN})
"""The relations that a schedule can name."""

register, unregister = RELATIONS.register, RELATIONS.unregister

"""Assumed data for plans (plan.py): users, events, items and lengths as given. All token ids are 0."""

import dataclasses
import math

import numpy as np
import polars as pl

from iam_jax.config import DataConfig
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.prepare import Prepared
from iam_jax.data.splits import TEST, TRAIN, VALIDATION, Events, Split
from iam_jax.data.vectors import Vectors, vector_length
from iam_jax.errors import InputError

_USERS = 2000  # a larger number of users is represented by so many


@dataclasses.dataclass(frozen=True)
class Assumption:
    items: int
    item_length: int  # tokens, separator and boundary included
    users: int
    events: int  # of a user, the last two of them for validation and test

    def check(self) -> None:
        for name, flag, least in (
            ("items", "num_items", 1),
            ("item_length", "item_length", 1),
            ("users", "num_users", 1),
            ("events", "events", 4),
        ):
            if getattr(self, name) < least:
                raise InputError(f"--{flag}={getattr(self, name)}: must be {least} or more")


def assume(config: DataConfig, assumption: Assumption, vocabulary: int) -> tuple[Prepared, float]:
    """The data, and how many assumed users each of their users represents (more than 1 if there are many).

    Prompt and suffix are assumed to have a token for every four letters. vocabulary: the number of token ids, boundary token included.
    Raises InputError where the items do not fit in a row.
    """
    assumption.check()
    users = min(assumption.users, _USERS)
    label = np.full(assumption.events, TRAIN, np.uint8)
    label[-2:] = VALIDATION, TEST
    item = (np.arange(users * assumption.events) % assumption.items).astype(np.int32)
    user_ids, item_ids = (np.full(count, "", object) for count in (users, assumption.items))  # they are not read
    offsets = np.arange(users + 1, dtype=np.int64) * assumption.events
    events = Events(user_ids, item_ids, item, offsets, np.arange(len(item)), np.tile(label, users))

    frame = [math.ceil(len(text) / 4) for text in (config.prompt, config.suffix)]
    needed = sum(frame) + (config.context_items + 1) * assumption.item_length
    if needed > config.row_tokens:
        raise InputError(
            f"config.data.row_tokens = {config.row_tokens} is too small: prompt, suffix and {config.context_items} + 1 items "
            f"(config.data.context_items) of {assumption.item_length} tokens (--item_length) need {needed}"
        )
    lengths = np.concatenate([np.full(assumption.items, assumption.item_length), frame])
    catalogue_offsets = np.concatenate([[0], np.cumsum(lengths)])
    catalogue = Catalogue(np.zeros(catalogue_offsets[-1], np.int32), catalogue_offsets, vocabulary, 0, "")
    content = None
    if config.vectors:
        content = Vectors(np.broadcast_to(np.float32(0), (assumption.items, vector_length(config))), "")
    return Prepared(Split(events, pl.DataFrame(), "", ()), catalogue, content), assumption.users / users

"""A shop in which every next purchase has a known probability, so that the best possible result is known too.

An item has a category, a style, a colour and a brand. Its title contains them in words ("rustic crimson lantern by Orlo, new"),
with synonyms. A user likes some styles, colours and brands. They are not part of the data and only show in the history. The odds of
item i as the next purchase after the items …, before, last are a product of small integers,

    odds(i) = popularity(i) · taste^[style(i) liked] · taste^[colour(i) liked] · taste^[brand(i) liked]
              · after_last^[category(i) = follows(category(last))] · after_before^[category(i) = skips(category(before))],

zero for items already bought, and p(i) = odds(i) / Σ odds. With probability partner_permille/1000 the partner of the last item is
bought instead, unless it was bought before. The partner is the item that matches it best in the category that follows.

So most of what can be predicted needs the long history (tastes), the rest needs the last two items, and nearly all of it can be read
from titles. NDCG@10 of the default shop's last purchases: 0.321 for the true odds, 0.235 for tastes alone, 0.097 for
transitions alone, 0.075 for a table of item-to-item counts, which rarely sees a pair, and 0.009 for popularity. Facets
have few values, so that a model learns a good part of that in a minute or two on a CPU.

All draws and computations use integers, so the tables are the same on every platform.
"""

import dataclasses
import hashlib

import numpy as np
import polars as pl

from iam_jax.config import SyntheticConfig
from iam_jax.data.sources import Source
from iam_jax.data.splits import Events, users_of
from iam_jax.data.tables import Tables
from iam_jax.errors import InputError

VERSION = 1  # of the shops. Prepared data is cached: increase it when the same arguments give another shop
WORDS = {  # facet -> its values, each given by the words for it in titles
    "style": "rustic farmhouse, nordic scandinavian, vintage retro, modern contemporary",
    "colour": "crimson scarlet, navy indigo, olive khaki, ivory cream, charcoal graphite, teal turquoise",
    "category": ("lantern lamp, teapot kettle, blanket throw, basket hamper, mirror glass, clock timepiece, rug carpet, vase urn"),
    "brand": "Orlo, Venn, Kasto, Mirel, Tundra, Pavo, Selka, Drumlin",
    "noise": "handmade, classic, new, gift, bestseller, premium, original, limited",
}
VALUES = {facet: tuple(tuple(value.split()) for value in values.split(", ")) for facet, values in WORDS.items()}
CATEGORIES = len(VALUES["category"])
LIKED = {"style": 1, "colour": 2, "brand": 2}  # how many values of a facet a user likes
_BLOCK = 1 << 22  # entries of a [users, items] array that exist at one time: 32 MiB


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """The shop, its users with their tastes, and their purchases."""

    value: dict[str, np.ndarray]  # facet -> [I] value of each item
    title: list[str]  # [I]
    popularity: np.ndarray  # [I] int64
    partner: np.ndarray  # [I]; an item without a partner is its own
    follows: np.ndarray  # [CATEGORIES] the category bought right after a category, one cycle through all
    skips: np.ndarray  # [CATEGORIES] the category bought one purchase later
    liked: dict[str, np.ndarray]  # facet -> [U, values] bool
    length: np.ndarray  # [U] number of purchases
    item: np.ndarray  # [U, T] purchases in order, −1 after the last
    timestamp: np.ndarray  # [U, T] seconds since 1970, strictly increasing within a user
    taste: int
    after_last: int
    after_before: int
    partner_permille: int

    @property
    def user_ids(self) -> np.ndarray:
        """[U] str, sorted."""
        return np.array([f"u{k:07}" for k in range(len(self.length))], object)

    @property
    def item_ids(self) -> np.ndarray:
        """[I] str, sorted."""
        return np.array([f"i{k:07}" for k in range(len(self.title))], object)

    def tables(self) -> Tables:
        """Interactions (user, item, timestamp) in time order per user, and items (item, title, category, brand)."""
        user, position = np.nonzero(self.item >= 0)
        bought = self.item[user, position]
        schema = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64}
        columns = [self.user_ids[user].tolist(), self.item_ids[bought].tolist(), self.timestamp[user, position]]
        interactions = pl.DataFrame(dict(zip(schema, columns, strict=True)), schema=schema)
        items = pl.DataFrame({
            "item": self.item_ids.tolist(),
            "title": self.title,
            **{facet: [VALUES[facet][v][0] for v in self.value[facet]] for facet in ("category", "brand")},
        })  # fmt: skip
        digest = hashlib.sha256((interactions.write_csv() + items.write_csv()).encode()).hexdigest()
        return Tables(interactions, items, "synthetic interactions", "synthetic items", digest)

    def oracle(self, tastes: bool = True, transitions: bool = True) -> "Oracle":
        """The best possible scorer; without `tastes` or `transitions`, one that only knows the other."""
        return Oracle(self, tastes, transitions)

    def probabilities(self, user: np.ndarray, position: np.ndarray, tastes=True, transitions=True) -> np.ndarray:
        """[n, I] float64: the distribution that user [n]'s purchase number position [n] (from 0) was drawn from."""
        odds = self.odds(user, position, tastes, transitions)
        p = odds / odds.sum(1, keepdims=True)
        if transitions:
            partner, free = self.partners(user, position)
            share = np.where(free, self.partner_permille / 1000, 0)
            p *= 1 - share[:, None]
            p[np.arange(len(p)), partner] += share
        return p

    def odds(self, user: np.ndarray, position: np.ndarray, tastes=True, transitions=True) -> np.ndarray:
        """[n, I] int64: the equation at the top, for purchases given by user [n] and position [n]."""
        odds = np.tile(self.popularity, (len(user), 1))
        if tastes:
            for facet in LIKED:
                odds *= np.where(self.liked[facet][user], self.taste, 1)[:, self.value[facet]]
        if transitions:
            category = self.value["category"]
            factor = np.ones((len(user), CATEGORIES), np.int64)
            for back, then, boost in ((1, self.follows, self.after_last), (2, self.skips, self.after_before)):
                item = np.where(position >= back, self.item[user, position - back], -1)
                row = np.flatnonzero(item >= 0)
                factor[row, then[category[item[row]]]] *= boost
            odds *= factor[:, category]
        row, when = np.nonzero(np.arange(self.item.shape[1]) < position[:, None])
        odds[row, self.item[user[row], when]] = 0
        return odds

    def partners(self, user: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] the last item's partner, and [n] bool, whether it can be bought."""
        partner = self.partner[np.where(position > 0, self.item[user, position - 1], 0)]
        before = np.arange(self.item.shape[1]) < position[:, None]
        return partner, (position > 0) & ~((self.item[user] == partner[:, None]) & before).any(1)


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Ranks by the true probabilities, given the user's hidden tastes. A model can only be better by luck."""

    shop: Synthetic
    tastes: bool
    transitions: bool

    def scores(self, events: Events, targets: np.ndarray) -> np.ndarray:
        """[n, items] float64, the probability of each item of `events` as the target purchase: a scorer for the baselines.

        Users and items are found by id. The history is the true one, even if a filter removed items or events.

        Raises:
          ValueError: an event that is not a purchase in this shop.
        """
        user = _find(self.shop.user_ids, events.user_ids[users_of(events, targets)])
        items = _find(self.shop.item_ids, events.item_ids)
        is_target = self.shop.item[user] == items[events.item[targets]][:, None]  # nobody buys an item twice
        if not is_target.any(1).all():
            raise ValueError("a target is not a purchase of its user in this synthetic shop")
        return self.shop.probabilities(user, is_target.argmax(1), self.tastes, self.transitions)[:, items]


SYNTHETIC = Source(
    name="synthetic",
    meaning="a synthetic shop whose true probabilities are known (data.synthetic)",
    load=lambda config, cache: from_config(config.synthetic).tables(),
    identity=lambda config: ["synthetic", VERSION, dataclasses.asdict(config.synthetic)],
    oracle=lambda config: from_config(config.synthetic).oracle().scores,
)


def from_config(config: SyntheticConfig) -> Synthetic:
    """The shop of a config's section `data.synthetic`."""
    return generate(config.users, config.products, config.events_per_user, config.seed)


def generate(
    users: int = 2000,
    items: int = 800,
    events_per_user: float = 12.0,
    seed: int = 0,
    *,
    taste: int = 16,
    after_last: int = 6,
    after_before: int = 3,
    partner_permille: int = 50,
) -> Synthetic:
    """A synthetic shop, the same for the same arguments.

    Args:
      users, items: the numbers of users and items.
      events_per_user: the mean length of a history. Lengths are uniform between half and one and a half times the mean, and at least 3.
      seed: of all draws (PCG64).
      taste, after_last, after_before: the factors of the odds; 1 removes an effect.
      partner_permille: the probability, in thousandths, that the last item's partner is bought.

    Raises:
      InputError: a size too small, or more purchases than half the catalogue.
    """
    low = max(3, int(events_per_user) // 2)
    span = 2 * (events_per_user - low)
    if users < 1 or events_per_user < 3:
        raise InputError(f"data.synthetic: needs users >= 1 and events_per_user >= 3, got {users} and {events_per_user}")
    if low + span + 1 > items / 2:
        raise InputError(f"data.synthetic: {events_per_user} events per user need more than {items} items")
    if not all(1 <= factor <= 64 for factor in (taste, after_last, after_before)) or not 0 <= partner_permille <= 1000:
        raise InputError("data.synthetic: factors are integers from 1 to 64, partner_permille is from 0 to 1000")
    generator = np.random.Generator(np.random.PCG64(seed))

    value = {facet: generator.integers(len(values), size=items) for facet, values in VALUES.items()}
    synonym = generator.integers(2, size=(items, len(VALUES)))
    word = {}
    for column, (facet, values) in enumerate(VALUES.items()):
        chosen = zip(value[facet], synonym[:, column], strict=True)
        word[facet] = [values[v][s % len(values[v])] for v, s in chosen]  # brands have one word
    parts = zip(*(word[facet] for facet in ("style", "colour", "category", "brand", "noise")), strict=True)
    title = [f"{style} {colour} {category} by {brand}, {noise}" for style, colour, category, brand, noise in parts]
    follows, skips = _cycle(generator), _cycle(generator)

    # A fraction of the span is a chance of one more, so that the mean is met.
    more = int(span) + (generator.integers(1000, size=users) < 1000 * (span - int(span)))
    length = low + generator.integers(more + 1)
    longest = int(length.max())
    gap = generator.integers(3600, 20 * 86400, size=(users, longest))  # an hour to twenty days, in seconds
    shop = Synthetic(
        value=value,
        title=title,
        popularity=generator.integers(2, 9, size=items),  # mild: the most popular are 4 times as likely as the least
        partner=_partners(value, follows),
        follows=follows,
        skips=skips,
        liked={facet: _choose(generator, users, len(VALUES[facet]), count) for facet, count in LIKED.items()},
        length=length,
        item=np.full((users, longest), -1),
        timestamp=1_600_000_000 + generator.integers(365 * 86400, size=(users, 1)) + np.cumsum(gap, axis=1),
        taste=taste,
        after_last=after_last,
        after_before=after_before,
        partner_permille=partner_permille,
    )
    step = max(1, _BLOCK // items)
    for start in range(0, users, step):
        _buy(shop, np.arange(start, min(start + step, users)), generator)
    return shop


def _buy(shop: Synthetic, users: np.ndarray, generator: np.random.Generator) -> None:
    """Fills in the purchases of the given users: all first ones, then all second ones, …"""
    draws = generator.integers(1 << 62, size=(len(users), shop.item.shape[1], 2))  # far above Σ odds: remainders are uniform
    for when in range(shop.item.shape[1]):
        buying = shop.length[users] > when
        user, position, draw = users[buying], np.full(buying.sum(), when), draws[buying, when]
        total = np.cumsum(shop.odds(user, position), axis=1)
        item = (total <= (draw[:, 0] % total[:, -1])[:, None]).sum(1)
        partner, free = shop.partners(user, position)
        shop.item[user, when] = np.where(free & (draw[:, 1] % 1000 < shop.partner_permille), partner, item)


def _cycle(generator: np.random.Generator) -> np.ndarray:
    """[CATEGORIES] a permutation that is one cycle, so that no category follows itself."""
    order = generator.permutation(CATEGORIES)
    then = np.empty(CATEGORIES, np.int64)
    then[order] = np.roll(order, -1)
    return then


def _choose(generator: np.random.Generator, rows: int, values: int, count: int) -> np.ndarray:
    """[rows, values] bool, `count` of them true in each row."""
    chosen = np.zeros((rows, values), bool)
    order = generator.integers(1 << 62, size=(rows, values)).argsort(axis=1, kind="stable")
    np.put_along_axis(chosen, order[:, :count], True, axis=1)
    return chosen


def _partners(value: dict[str, np.ndarray], follows: np.ndarray) -> np.ndarray:
    """[I] the item of the following category that has most in common, the first one of equals; the item itself if there is none."""
    partner = np.arange(len(value["category"]))
    for category in range(CATEGORIES):
        own, other = (np.flatnonzero(value["category"] == c) for c in (category, follows[category]))
        if len(own) and len(other):
            common = np.sum([value[f][own][:, None] == value[f][other] for f in LIKED], axis=0, dtype=np.int8)
            partner[own] = other[common.argmax(1)]
    return partner


def _find(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[n] the indices of ids in a sorted array."""
    wanted = np.asarray(wanted, object)
    place = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    if (unknown := wanted[ids[place] != wanted]).size:
        raise ValueError(f"id {unknown[0]!r} is not of this synthetic shop")
    return place

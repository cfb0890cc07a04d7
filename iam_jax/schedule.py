"""The schedule language: which relation each layer of the decoder uses.

    schedule = [term* "|"] term+
    term     = layers | "(" layers+ ")" ["*" count]
    layers   = ["+"] relation ["*" count]

`(intra inter)*6` is item-aware attention, `full*12` is the ordinary decoder, `(full inter)*6` and `(intra full)*6` are the ablations, and
`intra*4 full*4 inter*4` is the order of HatLLM (arXiv 2510.10955). `+` marks an inserted layer. Its output projections start at zero, so
that a pretrained model is unchanged at first. `(full*4 +intra +inter)*4` inserts an item-aware block after every four of sixteen layers.

`|` is the mark of item-level layers: `intra*2 | inter*2`. The layers before it see the tokens of their own item. Behind it, each item has
one slot, which continues from the state of its boundary token. There `inter` sees earlier items, and `full` sees earlier items and the
item itself.
"""

import dataclasses
import re
from typing import NoReturn

from iam_jax.errors import InputError
from iam_jax.relations import NAME, RELATIONS

MAX_LAYERS = 1000

_TERM = re.compile(rf"\s*(?:\((?P<group>[^()]*)\)|(?P<layers>\+?{NAME}))(?:\s*\*\s*(?P<count>\d+))?(?=[\s(]|$)\s*")
_LAYERS = re.compile(rf"\s*(?P<inserted>\+?)(?P<relation>{NAME})(?:\s*\*\s*(?P<count>\d+))?(?=\s|$)\s*")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A sequence of layers with these relations, repeated `repeats` times."""

    relations: tuple[str, ...]
    repeats: int
    inserted: tuple[bool, ...] = ()  # whether each layer of `relations` is inserted; (): none is

    def __post_init__(self):
        object.__setattr__(self, "inserted", self.inserted or (False,) * len(self.relations))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The relations of a decoder's layers."""

    stages: tuple[Stage, ...]
    token_stages: int | None = None  # the number of stages before the mark `|`; None: there is no mark

    @property
    def item_level(self) -> bool:
        """Whether the last layers have one slot for each item (the mark `|`)."""
        return self.token_stages is not None

    @property
    def relations(self) -> tuple[str, ...]:
        """The name of each layer's relation, first to last."""
        return tuple(relation for stage in self.stages for relation in stage.relations * stage.repeats)

    @property
    def leading_intra(self) -> int:
        """The number of layers before the first layer that sees other items. Their states depend on the item alone."""
        relations = self.relations
        return next((i for i, name in enumerate(relations) if not RELATIONS[name].own_item_only), len(relations))

    @property
    def sees_ahead(self) -> str | None:
        """The name of the first relation in which a token sees later tokens of its item; None if there is none."""
        return next((name for name in self.relations if RELATIONS[name].sees_ahead), None)

    @property
    def own_layers(self) -> list[tuple[int, int, int]]:
        """(stage, index into its relations, repeat) of the layers of a pretrained model: those before the mark that are not inserted."""
        return [
            (s, index, repeat)
            for s, stage in enumerate(self.stages[: self.token_stages])
            for repeat in range(stage.repeats)
            for index, inserted in enumerate(stage.inserted)
            if not inserted
        ]


def parse_schedule(text: str, field: str = "schedule") -> Schedule:
    """Parses a schedule. Raises InputError, which names the config field `field` and the first part that cannot be read."""
    text = text.strip()

    def fail(problem: str) -> NoReturn:
        raise InputError(f"config.{field} = {text!r}: {problem}")

    def scan(pattern: re.Pattern, part: str):
        position = 0
        while position < len(part):
            match = pattern.match(part, position)
            if match is None:
                fail(f"cannot read {part[position:]!r}; an example: '(intra inter)*6 full*2'")
            yield match
            position = match.end()

    def count_of(match: re.Match) -> int:
        count = int(match["count"] or 1) if len(match["count"] or "") < 5 else MAX_LAYERS + 1
        if count < 1:
            fail("a repeat count must be 1 or more")
        return count

    def stages_of(part: str) -> list[Stage]:
        stages = []
        for term in scan(_TERM, part):
            repeats = count_of(term)
            if term["group"] is None:
                layers = [(term["layers"].lstrip("+"), term["layers"].startswith("+"))]
            else:
                if not term["group"].strip():
                    fail(f"cannot read {term[0].strip()!r}; an example: '(intra inter)*6 full*2'")
                layers = []
                for layer in scan(_LAYERS, term["group"]):
                    layers += [(layer["relation"], bool(layer["inserted"]))] * min(count_of(layer), MAX_LAYERS + 1)
            for relation, _ in layers:
                if relation not in RELATIONS:
                    fail(f"{relation!r} is not a relation; the relations are {', '.join(RELATIONS)}")
            if repeats * len(layers) > MAX_LAYERS:
                fail(f"more than {MAX_LAYERS:,} layers")
            stages.append(Stage(tuple(relation for relation, _ in layers), repeats, tuple(inserted for _, inserted in layers)))
        return stages

    if not text:
        raise InputError(f"config.{field} is empty; an example: '(intra inter)*6'")
    before, mark, behind = text.partition("|")
    if not mark:
        return Schedule(tuple(stages_of(text)))
    if "|" in behind:
        fail("more than one mark |")
    of_tokens, of_items = stages_of(before.strip()), stages_of(behind.strip())
    if not of_items:
        fail("there is no layer behind the mark |")
    for stages, own, where in ((of_tokens, True, "before"), (of_items, False, "behind")):
        for relation in (relation for stage in stages for relation in stage.relations):
            if RELATIONS[relation].own_item_only != own:
                seen = "only its own item can be seen" if own else "there is one slot for each item"
                fail(f"{relation!r} {where} the mark |: {seen} there")
    return Schedule((*of_tokens, *of_items), len(of_tokens))

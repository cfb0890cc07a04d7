"""The schedule language: which relation each layer of the decoder uses.

    schedule = term+          term = (relation | "(" relation+ ")") ["*" count]

`(intra inter)*6` is item-aware attention, `full*12` the ordinary decoder, `(full inter)*6` and `(intra full)*6` the ablations,
`intra*4 full*4 inter*4` the order of HatLLM (arXiv 2510.10955).
"""

import dataclasses
import re

from iam_jax.errors import InputError

MOST_LAYERS = 1000
RELATIONS = ("full", "intra", "inter", "intra_both")

_TERM = re.compile(r"\s*(?:\(\s*(?P<group>[a-z_ \t]+?)\s*\)|(?P<relation>[a-z_]+))(?:\s*\*\s*(?P<count>\d+))?(?=[\s(]|$)\s*")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Layers `relations`, one after another, the whole repeated `repeats` times."""

    relations: tuple[str, ...]
    repeats: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    stages: tuple[Stage, ...]

    @property
    def relations(self) -> tuple[str, ...]:
        """One relation per layer, first to last."""
        return tuple(relation for stage in self.stages for relation in stage.relations * stage.repeats)

    @property
    def leading_intra(self) -> int:
        """Number of layers before the first that sees beyond its own item: their states depend on the item alone."""
        relations = self.relations
        return next((i for i, relation in enumerate(relations) if not relation.startswith("intra")), len(relations))


def parse_schedule(text: str, field: str = "schedule") -> Schedule:
    """Raises InputError that points at the first part it cannot read."""
    stages, at = [], 0
    text = text.strip()
    while at < len(text):
        term = _TERM.match(text, at)
        if term is None or not (term["group"] or term["relation"]).strip():
            raise InputError(f"config.{field} = {text!r}: cannot read {text[at:]!r}; an example: '(intra inter)*6 full*2'")
        relations = tuple((term["group"] or term["relation"]).split())
        for relation in relations:
            if relation not in RELATIONS:
                raise InputError(f"config.{field} = {text!r}: {relation!r} is no relation; there are {', '.join(RELATIONS)}")
        repeats = int(term["count"] or 1) if len(term["count"] or "") < 5 else MOST_LAYERS + 1
        if repeats * len(relations) > MOST_LAYERS:
            raise InputError(f"config.{field} = {text!r}: more than {MOST_LAYERS:,} layers")
        if repeats < 1:
            raise InputError(f"config.{field} = {text!r}: a repeat count must be 1 or more")
        stages.append(Stage(relations, repeats))
        at = term.end()
    if not stages:
        raise InputError(f"config.{field} is empty; an example: '(intra inter)*6'")
    return Schedule(tuple(stages))

"""The schedule language."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iam_jax.errors import InputError
from iam_jax.relations import RELATIONS
from iam_jax.schedule import Schedule, Stage, parse_schedule


@pytest.mark.parametrize(
    "text,relations,leading",
    [
        ("(intra inter)*6", ["intra", "inter"] * 6, 1),
        ("full*12", ["full"] * 12, 0),
        ("(full inter)*6", ["full", "inter"] * 6, 0),
        ("(intra full)*6", ["intra", "full"] * 6, 1),
        ("intra*4 full*4 inter*4", ["intra"] * 4 + ["full"] * 4 + ["inter"] * 4, 4),
        ("intra*6 inter*6", ["intra"] * 6 + ["inter"] * 6, 6),
        ("intra", ["intra"], 1),
        ("intra_both intra inter", ["intra_both", "intra", "inter"], 2),
        ("(intra_both)*2", ["intra_both"] * 2, 2),
        ("  ( intra   inter )  * 2\n full ", ["intra", "inter", "intra", "inter", "full"], 1),
        ("(full)(inter)", ["full", "inter"], 0),
        ("inter(full intra)*2", ["inter", "full", "intra", "full", "intra"], 0),
        ("full*1 full*10", ["full"] * 11, 0),
    ],
)
def test_layers(text, relations, leading):
    schedule = parse_schedule(text)
    assert schedule.relations == tuple(relations) and schedule.leading_intra == leading


def test_stages_keep_repeats():
    stages = (Stage(("intra", "inter"), 3), Stage(("full",), 1))
    assert parse_schedule("(intra inter)*3 full") == Schedule(stages)


def test_inserted_layers():
    schedule = parse_schedule("(full*2 +intra +inter)*2 +full full")
    assert schedule.stages == (
        Stage(("full", "full", "intra", "inter"), 2, (False, False, True, True)),
        Stage(("full",), 1, (True,)),
        Stage(("full",), 1),
    )
    assert schedule.own_layers == [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (2, 0, 0)]
    assert parse_schedule("+intra full").leading_intra == 1


@pytest.mark.parametrize(
    "text,what",
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("intra outer", "'outer' is not a relation; the relations are full, intra, inter, intra_both"),
        ("(intra both)*2", "'both' is not a relation"),
        ("intra_", "'intra_' is not a relation"),
        ("full*0", "a repeat count must be 1 or more"),
        ("full*-1", "cannot read 'full*-1'"),
        ("full*", "cannot read 'full*'"),
        ("full*2*3", "cannot read 'full*2*3'"),
        ("full*2.5", "cannot read 'full*2.5'"),
        ("full *", "cannot read '*'"),
        ("2*full", "cannot read '2*full'"),
        ("intra (inter", "cannot read '(inter'"),
        ("intra inter)*2", "cannot read 'inter)*2'"),
        ("((intra inter)*2 full)*2", "cannot read '((intra"),
        ("(intra*0 inter)*2", "a repeat count must be 1 or more"),
        ("(intra*2.5 inter)*2", "cannot read 'intra*2.5 inter'"),
        ("(full + inter)*2", "cannot read '+ inter'"),
        ("full ++inter", "cannot read '++inter'"),
        ("(full*900 inter)*2", "more than 1,000 layers"),
        ("()", "cannot read '()'"),
        ("intra ( )*2", "cannot read '( )*2'"),
        ("intra, inter", "cannot read 'intra, inter'"),
        ("Intra", "cannot read 'Intra'"),
        ("full*2inter", "cannot read 'full*2inter'"),
    ],
)
def test_errors_name_the_field_and_the_position(text, what):
    with pytest.raises(InputError) as caught:
        parse_schedule(text, field="model.schedule")
    assert str(caught.value).startswith("config.model.schedule") and what in str(caught.value)


terms = st.tuples(st.lists(st.sampled_from(list(RELATIONS)), min_size=1, max_size=3), st.integers(1, 4))


@given(st.lists(terms, min_size=1, max_size=4), st.booleans())
def test_a_formatted_schedule_is_parsed_again(stages, spaced):
    space = " " if spaced else ""
    written = [
        (f"({space}{' '.join(relations)}{space})" if len(relations) > 1 else relations[0])
        + (f"{space}*{space}{count}" if count > 1 else "")
        for relations, count in stages
    ]
    schedule = parse_schedule(" ".join(written))
    assert schedule.stages == tuple(Stage(tuple(relations), count) for relations, count in stages)
    layers = [relation for relations, count in stages for relation in relations * count]
    assert list(schedule.relations) == layers
    leading = 0
    while leading < len(layers) and layers[leading] in ("intra", "intra_both"):
        leading += 1
    assert schedule.leading_intra == leading

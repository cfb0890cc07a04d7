import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import allowed_keys, make_config, pack_row, packed_batch, random_params, reference_states, stack

from iam_jax.model import make_model
from iam_jax.model.attention import key_ranges
from iam_jax.model.decoder import dropout
from iam_jax.schedule import parse_schedule

BATCH = packed_batch()
REAL = BATCH["user"] > 0


@functools.cache
def model_of(longest=None, **fields):
    """(model, random parameters) of a tiny decoder."""
    model = make_model(make_config(model=fields), vocabulary=24, items=3, longest=longest)
    return model, random_params(model)


@functools.cache
def states_of(layers=None, **fields):
    model, _ = model_of(**fields)
    return jax.jit(lambda params, batch: model.bind(params).decoder(batch, last=layers))


def run(batch=BATCH, layers=None, **fields):
    return np.asarray(states_of(layers, **fields)(model_of(**fields)[1], batch))


# ---- comparison with the model in plain NumPy

VARIANTS = {
    "plain rotary": {"schedule": "(intra inter)*2 full"},
    "GPT-2": {
        "schedule": "full inter", "norm": "layer", "positions": "learned", "mlp": "plain", "activation": "relu",
        "qkv_bias": True, "out_bias": True, "mlp_bias": True, "scale_embedding": False,
    },
    "grouped, normed queries": {
        "schedule": "inter full", "heads": 4, "kv_heads": 2, "head_size": 6, "qk_norm": True, "rope_theta": 50.0,
    },
    "grouped, layer norm": {"schedule": "full*2", "heads": 4, "kv_heads": 1, "qk_norm": True, "norm": "layer", "qkv_bias": True},
    "biased output, frequencies by a factor": {"schedule": "full", "out_bias": True, "rope_scaling": "linear", "rope_factor": 3.0},
    "biased MLP, frequencies of LLaMA 3": {
        "schedule": "full", "mlp_bias": True, "rope_theta": 50.0, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_original": 40,
    },
    "norms with an offset": {"schedule": "full", "norm_offset": 1.0, "qk_norm": True, "norm": "layer"},
    "self key, item positions": {
        "schedule": "(intra_both inter)*2", "self_key": True, "inter_positions": "item", "activation": "gelu",
    },
}  # fmt: skip


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_states_are_those_of_plain_numpy(fields):
    expected = reference_states(make_config(model=fields).model, model_of(**fields)[1]["decoder"], BATCH)
    np.testing.assert_allclose(run(**fields), expected, rtol=2e-5, atol=2e-5)


def test_the_variants_differ():
    """The NumPy implementation reads each of these fields, so states that ignored one could not be equal."""
    base = {"schedule": "inter full", "heads": 4, "kv_heads": 2, "qk_norm": False}
    decoder = model_of(**base)[1]["decoder"]
    model = make_config(model=base).model
    expected = reference_states(model, decoder, BATCH)
    for change in (
        {"inter_positions": "item"},
        {"self_key": True},
        {"rope_theta": 50.0},
        {"activation": "relu"},
        {"schedule": "full inter"},
        {"scale_embedding": False},
        {"norm_offset": 1.0},
    ):
        changed = reference_states(dataclasses.replace(model, **change), decoder, BATCH)
        assert np.abs(changed - expected)[REAL].max() > 1e-2, change


def test_parameters_at_the_start():
    model, _ = model_of(schedule="intra*100", qkv_bias=True, out_bias=True, mlp_bias=True, norm="layer")
    params = jax.jit(model.init)(jax.random.key(0))["decoder"]
    block = params["blocks"]["0_0"]
    assert block["attention"]["query_DNH"].shape == (100, 16, 2, 8) and block["mlp"]["gate_F"].shape == (100, 24)
    for name, fan_in, scale in (("query_DNH", 16, 1), ("value_DKH", 16, 1), ("out_NHD", 16, 200**-0.5)):
        np.testing.assert_allclose(np.std(block["attention"][name]), scale * fan_in**-0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(block["mlp"]["down_FD"]), 200**-0.5 * 24**-0.5, rtol=0.05)
    assert not np.any(block["attention"]["out_D"]) and not np.any(block["mlp"]["up_F"])
    assert (block["mlp_norm"]["scale"] == 1).all() and not np.any(block["mlp_norm"]["shift"])
    offset = jax.jit(model_of(schedule="intra", norm_offset=0.75)[0].init)(jax.random.key(0))["decoder"]
    assert (offset["final_norm"]["scale"] == 0.25).all()  # plus the offset 1
    assert not np.array_equal(block["attention"]["query_DNH"][0], block["attention"]["query_DNH"][1])  # repeats differ
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


# ---- dependencies between positions

STACKS = {
    "full": False,
    "intra": False,
    "intra_both": False,
    "inter": False,
    "inter*2": True,
    "(intra inter)*2": False,
    "intra_both inter": True,
}


@functools.cache
def probe(**fields):
    """(params, count) -> states [24, D] and a Jacobian [24, 24, D]: the derivative of a random direction of state t by input s, zero for
    t >= count."""
    model, _ = model_of(**fields)
    direction = jnp.asarray(np.random.default_rng(0).standard_normal((24, 16)), jnp.float32)

    @jax.jit
    def run(params, count=0):
        def states(embedding):
            bound = params | {"decoder": params["decoder"] | {"embedding_VD": embedding}}
            return model.bind(bound).decoder(BATCH).reshape(24, -1)

        x, pullback = jax.vjp(states, params["decoder"]["embedding_VD"])

        def derivative(t, jacobian):
            return jacobian.at[t].set(pullback(jnp.zeros_like(x).at[t].set(direction[t]))[0])

        return x, jax.lax.fori_loop(0, count, derivative, jnp.zeros((24, 24, 16)))

    return run


def with_embedding(params, embedding):
    return params | {"decoder": params["decoder"] | {"embedding_VD": embedding}}


def reach(schedule):
    """[24, 24] bool: whether state t can depend on input s, from products of the relations' masks."""
    out = np.zeros((24, 24), bool)
    for row, (user, group) in enumerate(zip(BATCH["user"], BATCH["group"], strict=True)):
        seen = np.eye(12, dtype=bool)
        for relation in parse_schedule(schedule).relations:
            seen |= (allowed_keys(relation, user, group).astype(int) @ seen) > 0
        out[12 * row : 12 * row + 12, 12 * row : 12 * row + 12] = seen
    return out


IMPLEMENTATIONS = {"reference": {}, "local": {"longest": 3}, "tpu": {"attention": "tpu"}, "gpu": {"attention": "gpu"}}


@pytest.mark.parametrize(
    ("schedule", "self_key", "implementation"),
    [(schedule, self_key, "reference") for schedule, self_key in STACKS.items()]
    + [("(intra inter)*2", True, name) for name in ("local", "tpu", "gpu")]
    + [("intra_both inter", False, "local"), ("full inter", False, "tpu"), ("full inter", False, "gpu")],
)
def test_states_depend_on_what_they_may_see_and_on_nothing_else(schedule, self_key, implementation):
    """Bitwise for values and gradients: a change of input s changes exactly the states that it can reach through the relations."""
    fields = {"schedule": schedule, "self_key": self_key, **IMPLEMENTATIONS[implementation]}
    params, run = model_of(**fields)[1], probe(**fields)
    expected = reach(schedule)
    states, jacobian = map(np.asarray, run(params, 24))
    np.testing.assert_array_equal((jacobian != 0).any(-1), expected)
    embedding = params["decoder"]["embedding_VD"]
    changed = [(np.asarray(run(with_embedding(params, embedding.at[s].add(1.0)))[0]) != states).any(-1) for s in range(24)]
    np.testing.assert_array_equal(np.stack(changed, axis=1), expected)


def test_what_reach_means():
    """Properties of `reach` for simple schedules."""
    user, group = BATCH["user"].reshape(-1), BATCH["group"].reshape(-1)
    t, s = np.indices((24, 24))
    same_row = t // 12 == s // 12
    same_item = same_row & (user[t] == user[s]) & (group[t] == group[s]) & (user[t] > 0)
    own = same_item | (t == s)
    np.testing.assert_array_equal(reach("intra_both"), own)
    np.testing.assert_array_equal(reach("intra*3"), own & (s <= t))
    np.testing.assert_array_equal(reach("full"), (same_row & (user[t] == user[s]) & (user[t] > 0) & (s <= t)) | (t == s))
    np.testing.assert_array_equal(reach("(intra inter)*2"), reach("full"))
    assert not (reach("inter*4") & same_item & (t != s)).any()  # no other token of the same item, at any depth


@pytest.mark.parametrize("include_self", [False, True])
def test_inter_attention_ignores_the_other_tokens_of_its_item(include_self):
    """The attention module alone: output t depends on its visible keys, and on its own input only through the query (which has no
    effect with a single key) or as a self key."""
    model, params = model_of(schedule="inter")
    ranges = key_ranges(BATCH["user"], BATCH["group"])["inter"]

    def attend(params, x_BTD):
        attention = model.bind(params).decoder.blocks["0_0"].attention
        return attention(x_BTD, ranges, BATCH["position"], None, include_self)[0]

    @jax.jit
    def run(params, x):
        params = params | {"decoder": params["decoder"] | {"blocks": jax.tree.map(lambda a: a[0], params["decoder"]["blocks"])}}
        o, pullback = jax.vjp(lambda x: attend(params, x), x)
        return o, jax.lax.map(lambda t: pullback(jnp.where(jnp.arange(24).reshape(2, 12, 1) == t, o, 0))[0], jnp.arange(24))

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 16)), jnp.float32)
    o, jacobian = map(np.asarray, run(params, x))
    keys = np.zeros((24, 24), bool)
    for row in range(2):
        block = slice(12 * row, 12 * row + 12)
        keys[block, block] = allowed_keys("inter", BATCH["user"][row], BATCH["group"][row])
    if include_self:
        keys |= np.eye(24, dtype=bool)
    expected = keys | (np.eye(24, dtype=bool) & (keys.sum(1) > 1)[:, None])
    changed = [(np.asarray(run(params, x.at[s // 12, s % 12].add(1.0))[0]) != o).any(-1).reshape(-1) for s in range(24)]
    np.testing.assert_array_equal(np.stack(changed, axis=1), expected)
    gradients = (jacobian.reshape(24, 24, 16) != 0).any(-1)
    assert not (gradients & ~expected).any() and (gradients | ~keys).all()
    assert (o.reshape(24, -1)[~keys.any(1)] == 0).all()


def test_a_users_first_item_gets_only_the_residual_path():
    fields = {"schedule": "inter*2"}
    params = model_of(**fields)[1]
    blocks = params["decoder"]["blocks"]
    without = {"0_0": blocks["0_0"] | {"attention": blocks["0_0"]["attention"] | {"out_NHD": blocks["0_0"]["attention"]["out_NHD"] * 0}}}
    silent = params | {"decoder": params["decoder"] | {"blocks": without}}
    a, b = (np.asarray(states_of(**fields)(p, BATCH)) for p in (params, silent))
    first = np.stack([~allowed_keys("inter", *row).any(1) for row in zip(BATCH["user"], BATCH["group"], strict=True)])
    np.testing.assert_array_equal(a[first], b[first])
    assert (a[~first] != b[~first]).any(-1).all()
    assert first.sum() == 2 + 1 + 3 + 1 + 5  # the prompt; the first item of three users, one of them after its own prompt; padding


# ---- fast paths compared with the plain loop


@pytest.mark.parametrize("implementation", ["local", "tpu", "gpu"])
@pytest.mark.parametrize("name", ["grouped, normed queries", "self key, item positions"])
def test_states_are_the_same_by_every_implementation(implementation, name):
    fields = VARIANTS[name] if implementation != "local" else VARIANTS[name] | {"schedule": "(intra_both inter)*2 intra"}
    (model, params), other = model_of(**fields), model_of(**fields, **IMPLEMENTATIONS[implementation])[0]
    programs = [jax.make_jaxpr(lambda p, m=m: m.bind(p).decoder(BATCH))(params) for m in (model, other)]
    mark = "custom_vjp" if implementation == "local" else "pallas_call"
    assert [mark in str(program) for program in programs] == [False, True]
    got = np.asarray(jax.jit(lambda p: other.bind(p).decoder(BATCH))(params))
    np.testing.assert_allclose(got[REAL], run(**fields)[REAL], rtol=2e-5, atol=2e-5)


STATES = {
    "schedule": "(intra inter)*3 full", "dropout": 0.3,
}  # fmt: skip


@functools.cache
def all_layers(scan):
    model, params = model_of(**STATES, scan=scan)
    return np.asarray(jax.jit(lambda params: model.bind(params).decoder(BATCH, key=jax.random.key(0)))(params))


@pytest.mark.parametrize(("at", "scan"), [*((at, True) for at in range(8)), *((at, False) for at in (0, 3, 4, 7))])
def test_layers_compose(at, scan):
    """Continuing from the states after `at` layers gives the states after all layers; every layer has its own dropout."""
    model, params = model_of(**STATES, scan=scan)
    key = jax.random.key(0)

    @jax.jit
    def run(params):
        decoder = model.bind(params).decoder
        first = decoder(BATCH, key=key, last=at)
        return decoder(BATCH, key=key, first=at, x_BTD=first), first

    (composed, first), whole = map(np.asarray, run(params)), all_layers(scan)
    np.testing.assert_allclose(composed, whole, rtol=1e-5, atol=1e-5)
    assert (np.abs(first - whole).max() > 0.1) == (at < 7)


@functools.cache
def trained_by(**fields):
    """(params, key) -> (states, gradients) of a fixed weighted sum of the states."""
    model, _ = model_of(**fields)
    weights = np.random.default_rng(0).standard_normal((2, 12, 16)).astype(np.float32)

    def loss(params, key):
        x = model.bind(params).decoder(BATCH, key=key)
        return (x * weights).sum(), x

    return jax.value_and_grad(loss, has_aux=True)


STAGES = {"schedule": "(intra inter)*2 full", "mlp": "plain", "dropout": 0.3}


def test_scan_and_remat_are_the_plain_loop():
    params, key = model_of(**STAGES)[1], jax.random.key(3, impl="rbg")
    programs = {
        "loop": trained_by(**STAGES, scan=False),
        "scan": trained_by(**STAGES, scan=True),
        "scan, remat": trained_by(**STAGES, scan=True, remat=True),
    }
    text = {name: str(jax.make_jaxpr(run)(params, key)) for name, run in programs.items()}
    assert {name: ("scan[" in jaxpr, "checkpoint" in jaxpr or "remat" in jaxpr) for name, jaxpr in text.items()} == {
        "loop": (False, False), "scan": (True, False), "scan, remat": (True, True),
    }  # fmt: skip
    programs = {name: jax.jit(run) for name, run in programs.items()}
    results = {name: run(params, key) for name, run in programs.items()}
    (_, states), grads = results.pop("loop")
    for (_, x), g in results.values():
        np.testing.assert_allclose(x, states, rtol=1e-5, atol=1e-6)
        for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * max(1, np.abs(b).max()))

    again, other = (programs["scan"](params, k)[0][1] for k in (key, jax.random.key(4, impl="rbg")))
    np.testing.assert_array_equal(again, results["scan"][0][1])
    without = run(**STAGES)
    assert (np.abs(other - again) > 1e-3).any(-1).all() and (np.abs(without - again) > 1e-3).any(-1).all()
    np.testing.assert_allclose(without, reference_states(make_config(model=STAGES).model, params["decoder"], BATCH), rtol=5e-5, atol=5e-5)


def test_dropout_keeps_the_mean_and_the_type():
    x = jnp.ones((400, 100), jnp.bfloat16)
    y = dropout(x, 0.25, jax.random.key(0))
    assert y.dtype == x.dtype and set(np.unique(np.asarray(y, np.float32))) == {0.0, np.float32(jnp.bfloat16(1 / 0.75))}
    assert abs(float((y > 0).mean(dtype=jnp.float32)) - 0.75) < 4 * (0.75 * 0.25 / 40000) ** 0.5
    assert dropout(x, 0.25, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("scan", [True, False])
def test_stopping_after_some_layers(scan):
    """Equals the NumPy model with this many layers: between stages, between repeats and in the middle of a group."""
    fields = {"schedule": "(intra inter)*3 full*2", "scan": scan}
    params = model_of(**fields)[1]
    model = make_config(model=fields).model
    for layers in (0, 3, 4, 7) if scan else (1, 5):
        expected = reference_states(model, params["decoder"], BATCH, layers)
        np.testing.assert_allclose(run(layers=layers, **fields), expected, rtol=5e-5, atol=5e-5)


def test_a_prefix_is_the_decoder_of_the_shorter_schedule():
    long, short = {"schedule": "(intra inter)*3 full*2"}, {"schedule": "(intra inter)*2"}
    decoder = model_of(**long)[1]["decoder"]
    blocks = {name: jax.tree.map(lambda x: x[:2], decoder["blocks"][name]) for name in ("0_0", "0_1")}
    params = model_of(**short)[1] | {"decoder": {**decoder, "blocks": blocks}}
    np.testing.assert_allclose(run(layers=4, **long), states_of(**short)(params, BATCH), rtol=1e-6, atol=1e-6)
    assert not np.allclose(run(layers=4, **long), run(layers=3, **long), atol=1e-2)


# ---- positions


def test_rotary_positions_enter_as_differences():
    fields = {"schedule": "(intra inter)*2 full"}
    base, shifted = run(**fields), run(BATCH | {"position": BATCH["position"] + 9}, **fields)
    np.testing.assert_allclose(shifted[REAL], base[REAL], rtol=1e-4, atol=1e-4)
    stretched = run(BATCH | {"position": BATCH["position"] * 2}, **fields)
    assert np.abs(stretched - base)[REAL].max() > 1e-2
    learned = {"schedule": "(intra inter)*2 full", "positions": "learned"}
    assert (np.abs(run(BATCH | {"position": BATCH["position"] + 9}, **learned) - run(**learned)) > 1e-2).any(-1)[REAL].all()


def test_positions_of_inter_layers_by_token_or_by_item():
    by_token, by_item = ({"schedule": "inter*2", "inter_positions": name} for name in ("token", "item"))
    stretched = {"token": BATCH | {"position": BATCH["position"] * 3}, "item": BATCH | {"group": BATCH["group"] * 3}}
    for fields, moves, stays in ((by_token, "token", "item"), (by_item, "item", "token")):
        base = run(**fields)
        np.testing.assert_array_equal(run(stretched[stays], **fields), base)
        assert np.abs(run(stretched[moves], **fields) - base)[REAL].max() > 1e-3
    assert np.abs(run(**by_item) - run(**by_token))[REAL].max() > 1e-3
    np.testing.assert_allclose(run(BATCH | {"group": BATCH["group"] + 5}, **by_item)[REAL], run(**by_item)[REAL], rtol=1e-4, atol=1e-4)
    for relation in ("intra", "full"):  # other layers do not change
        fields = {"schedule": relation}
        np.testing.assert_array_equal(run(**fields, inter_positions="item"), run(**fields))


def test_leading_intra_states_depend_only_on_the_item():
    """Item (7, 8, 9) as the first item of a user, after a prompt and another item, and alone in a row."""
    batch = stack([pack_row(12, (0, [3, 1]), (2, [1, 3])), pack_row(12, (0, [3]), (0, [2, 2, 1]))])
    token = np.arange(24, dtype=np.int32).reshape(2, 12)
    token[0, :3] = token[0, 7:10] = token[1, :3] = [7, 8, 9]
    batch["token"] = token
    fields = {"schedule": "intra*2 inter intra"}
    leading = make_config(model=fields).schedule.leading_intra
    assert leading == 2

    def occurrences(states):
        return states[0, :3], states[0, 7:10], states[1, :3]

    first, later, alone = occurrences(run(batch, layers=leading, **fields))
    np.testing.assert_allclose(later, first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(alone, first, rtol=1e-5, atol=1e-5)
    first, later, _ = occurrences(run(batch, **fields))
    assert np.abs(later - first).max() > 1e-2  # the inter layer distinguishes them


# ---- dtypes


def test_bfloat16_stays_near_float32():
    fields = {"schedule": "intra inter", "qk_norm": True}
    (_, exact), grads = jax.jit(trained_by(**fields))(model_of(**fields)[1], None)
    (_, states), low_grads = jax.jit(trained_by(**fields, dtype="bfloat16"))(model_of(**fields)[1], None)
    assert states.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    error = np.linalg.norm(np.asarray(states, np.float32) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 2e-2
    for a, b in zip(jax.tree.leaves(low_grads), jax.tree.leaves(grads), strict=True):
        assert a.dtype == jnp.float32 and np.isfinite(a).all()
        assert np.linalg.norm(a - b) <= 0.1 * np.linalg.norm(b) + 1e-3

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_config, packed_batch, random_params, reference_states

from iam_jax.model import make_model

SCHEDULE = "intra*2 inter intra"
TOKEN = np.array([[3, 4, 9, 0, 0], [5, 9, 0, 0, 0], [1, 1, 2, 7, 9], [9, 0, 0, 0, 0]], np.int32)  # 9 is the boundary
LENGTH = np.array([3, 2, 5, 1], np.int32)


@functools.cache
def recommender(**objective):
    config = make_config(model={"schedule": SCHEDULE}, objective={"vectors": "text", **objective})
    model = make_model(config, vocabulary=24, items=6)
    return config, model, random_params(model)


@functools.cache
def vectors_of(text_layers):
    model = recommender(text_layers=text_layers)[1]
    return jax.jit(lambda params, token: model.bind(params).text_vectors(token, LENGTH))


def rms(x, scale, epsilon=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


@pytest.mark.parametrize(("text_layers", "layers"), [("leading", 2), ("all", 4)])
def test_text_vectors_equal_the_decoder_on_the_item_alone(text_layers, layers):
    config, _, params = recommender(text_layers=text_layers)
    got = vectors_of(text_layers)(params, TOKEN)
    for vector, token, length in zip(got, TOKEN, LENGTH, strict=True):
        ones = np.ones((1, length), np.int32)
        alone = {"token": token[None, :length], "user": ones, "group": ones, "position": np.arange(length)[None]}
        x_D = reference_states(config.model, params["decoder"], alone, layers)[0, -1]
        expected = rms(x_D, params["text_norm"]["scale"]) @ params["text_DE"]
        np.testing.assert_allclose(vector, expected, rtol=2e-5, atol=2e-5)


def test_leading_and_all_layers_differ():
    params = recommender(text_layers="all")[2]
    leading, everything = (vectors_of(layers)(params, TOKEN) for layers in ("leading", "all"))
    assert (np.abs(leading - everything) > 1e-2).any(-1).all()


def test_text_vectors_do_not_depend_on_the_padding():
    params = recommender(text_layers="all")[2]
    behind = np.arange(5) >= LENGTH[:, None]
    base = np.asarray(vectors_of("all")(params, TOKEN))
    other = np.where(behind, np.random.default_rng(0).integers(0, 24, TOKEN.shape), TOKEN).astype(np.int32)
    assert (other != TOKEN).any()
    np.testing.assert_array_equal(vectors_of("all")(params, other), base)
    for row, column in np.argwhere(~behind):  # every real token has an effect, but only on its own item
        changed = TOKEN.copy()
        changed[row, column] = 20
        moved = (np.asarray(vectors_of("all")(params, changed)) != base).any(-1)
        assert moved.tolist() == [i == row for i in range(4)]


def test_states_are_normed_and_their_last_is_not_the_items_own_vector():
    config, model, params = recommender()
    batch = packed_batch()
    states = jax.jit(lambda params: model.bind(params).states(batch))(params)
    expected = rms(reference_states(config.model, params["decoder"], batch), params["decoder"]["final_norm"]["scale"])
    np.testing.assert_allclose(states, expected, rtol=5e-5, atol=5e-5)
    bound = model.bind(params)
    np.testing.assert_allclose(bound.project(states[0]), states[0] @ params["state_DE"], rtol=1e-5, atol=1e-5)
    assert params["state_DE"].shape == params["text_DE"].shape and not np.allclose(params["state_DE"], params["text_DE"])


def test_a_first_items_state_is_not_its_own_vector():
    """Without a separate projection, the text vector would equal the state of the first item of a history."""
    _, model, params = recommender()
    bound = model.bind(params)
    x_D = np.random.default_rng(0).standard_normal((1, 16)).astype(np.float32)
    own, state = bound.text_norm(x_D) @ params["text_DE"], bound.project(bound.decoder.final_norm(x_D))
    assert np.abs(own - state).max() > 0.1


def test_table_rows_of_untrained_items_are_zero():
    model, params = recommender(vectors="both")[1:]
    trained = np.array([1, 0, 1, 1, 0, 1], bool)
    table = np.asarray(model.bind(params).table(trained))
    assert not table[~trained].any()
    np.testing.assert_array_equal(table[trained], params["table_IE"][trained])
    gradient = jax.grad(lambda p: model.bind(p).table(trained).sum())(params)["table_IE"]
    np.testing.assert_array_equal(gradient, np.where(trained[:, None], np.ones((6, 16)), 0))


def test_which_heads_a_config_has():
    def heads(model=(), objective=(), data=()):
        config = make_config(model=dict(model), objective=dict(objective), data=dict(data))
        shapes = make_model(config, vocabulary=7, items=7).shapes()
        return {name: shapes[name] for name in shapes if name != "decoder"}

    assert {name: x.shape for name, x in heads().items()} == {"state_DE": (16, 16), "table_IE": (7, 16)}
    assert set(heads(objective={"vectors": "text"})) == {"state_DE", "text_norm", "text_DE"}
    assert set(heads(objective={"vectors": "both", "token": 0.5})) == {"state_DE", "table_IE", "text_norm", "text_DE"}
    assert set(heads(model={"tie_tokens": False}, objective={"token": 0.5})) == {"state_DE", "table_IE", "output_VD"}
    assert heads(model={"tie_items": True}, data={"tokenizer": "id"}) == {}


def test_tied_items_share_the_embedding():
    config = make_config(model={"tie_items": True}, data={"tokenizer": "id"})
    model = make_model(config, vocabulary=6, items=6)
    params = random_params(model)
    bound = model.bind(params)
    trained = np.array([1, 1, 0, 1, 1, 1], bool)
    embedding = params["decoder"]["embedding_VD"]
    np.testing.assert_array_equal(bound.table(trained), np.where(trained[:, None], embedding, 0))
    x = jnp.arange(32.0).reshape(2, 16)
    assert bound.project(x) is x


def test_output_embedding():
    tied, own = (
        make_model(make_config(model={"tie_tokens": tie}, objective={"token": 1.0}), vocabulary=24, items=3) for tie in (True, False)
    )
    params = random_params(tied)
    np.testing.assert_array_equal(tied.bind(params).output_embedding()[0], params["decoder"]["embedding_VD"])
    params = random_params(own)
    np.testing.assert_array_equal(own.bind(params).output_embedding()[0], params["output_VD"])
    assert not np.array_equal(params["output_VD"], params["decoder"]["embedding_VD"])

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_config, tiny_data

from iam_jax.config import finetuning_config, resolve
from iam_jax.data.assumed import Assumption, assume
from iam_jax.devices import topology
from iam_jax.devices.chips import find_chip
from iam_jax.errors import InputError
from iam_jax.model import pretrained
from iam_jax.planning import estimate, hlo
from iam_jax.planning.plan import PARTS, PlanRequest, device_bytes, make_plan
from iam_jax.training.run import make_run

GIB = 2**30
ONE_B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
EIGHT_B = {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128, "tie_word_embeddings": False}

# ---- what a program moves

PROGRAM = """\
HloModule step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%slices (p: f32[6,100], i: s32[]) -> f32[100] {
  %p = f32[6,100]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,100]{1,0:T(8,128)} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,100}
  ROOT %flat = f32[100]{0} bitcast(%one)
}

%body (state: (s32[], f32[6,100], f32[100])) -> (s32[], f32[6,100], f32[100]) {
  %state = (s32[], f32[6,100]{1,0}, f32[100]{0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %w = f32[6,100]{1,0} get-tuple-element(%state), index=1
  %x = f32[100]{0} get-tuple-element(%state), index=2
  %row = f32[100]{0} fusion(%w, %n), kind=kLoop, calls=%slices
  %reduced = f32[100]{0} all-reduce(%row), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[6,100]{1,0}, f32[100]{0}) tuple(%n, %w, %reduced)
}

%condition (state.1: (s32[], f32[6,100], f32[100])) -> pred[] {
  %state.1 = (s32[], f32[6,100]{1,0}, f32[100]{0}) parameter(0)
  %m = s32[] get-tuple-element(%state.1), index=0
  %length = s32[] constant(6)
  ROOT %less = pred[] compare(%m, %length), direction=LT
}

ENTRY %main (w: f32[6,100], x: f32[100]) -> f32[100] {
  %w.1 = f32[6,100]{1,0} parameter(0)
  %x.1 = f32[100]{0} parameter(1)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[6,100]{1,0}, f32[100]{0}) tuple(%zero, %w.1, %x.1)
  %loop = (s32[], f32[6,100]{1,0}, f32[100]{0}) while(%begin), condition=%condition, body=%body
  %last = f32[100]{0} get-tuple-element(%loop), index=2
  %gather = (bf16[50]{0}, bf16[400]{0:S(1)}) all-gather-start(%last), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %done = bf16[400]{0:S(1)} all-gather-done(%gather)
  %near = f32[400]{0:S(1)} convert(%done)
  ROOT %result = f32[100]{0} slice(%near), slice={[0:100]}
}
"""


def test_traffic_of_a_loop_and_of_collectives():
    found = hlo.traffic(PROGRAM)
    # Six times: the fusion reads one row (and the number) and writes it; the all-reduce reads and writes. The condition compares.
    loop = 6 * (400 + 4 + 400 + 400 + 400 + 4 + 4 + 1)
    rest = (100 + 400) + 400  # the gather's part and what it reads; the result. The rest stays on the chip.
    assert found.memory == pytest.approx(loop + rest, rel=0.02)
    assert found.collectives == {"all-gather": pytest.approx(800 * 7 / 8), "all-reduce": pytest.approx(6 * 400 * 2 * 3 / 4)}
    assert found.sent == sum(found.collectives.values()) and found.unknown_loops == 0
    known = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert hlo.traffic(known).collectives["all-reduce"] == found.collectives["all-reduce"] / 2
    unknown = hlo.traffic(PROGRAM.replace("direction=LT", "direction=NE"))
    assert unknown.unknown_loops == 1 and unknown.collectives["all-reduce"] == found.collectives["all-reduce"] / 6


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups={}", 8),
    ],
)
def test_devices_of_a_group(groups, devices):
    text = PROGRAM.replace("replica_groups=[2,4]<=[8]", groups)
    assert hlo.traffic(text).collectives["all-reduce"] == pytest.approx(6 * 400 * 2 * (devices - 1) / devices)


def test_parts_of_one_asynchronous_collective_count_once():
    twice = PROGRAM.replace("  %done =", "  %again = bf16[400]{0:S(1)} all-gather(%last), channel_id=2, replica_groups={}\n  %done =")
    assert hlo.traffic(twice).collectives == hlo.traffic(PROGRAM).collectives


def test_traffic_of_a_compiled_loop():
    """A scan reads a matrix a turn: the more, the longer it is, while XLA's own analysis counts one turn."""

    def compiled(length):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 256), (length, 256, 256))]
        return jax.jit(lambda x, w_L: jax.lax.scan(lambda x, w: (jnp.tanh(w @ x), None), x, w_L)[0]).lower(*shapes).compile()

    found = [hlo.traffic(compiled(length).as_text()) for length in (8, 32)]
    assert 3.5 < found[1].memory / found[0].memory < 4.1 and found[0].unknown_loops == 0
    assert found[0].memory > 8 * 3 * 4 * 256 * 256  # reads x and a matrix and writes x


# ---- assumed data


def test_assumed_data():
    config = make_config(data={"row_tokens": 120, "prompt": "Twelve marks"}).data
    prepared, scale = assume(config, Assumption(items=70, item_length=5, users=5000, events=9), vocabulary=50)
    assert scale * len(prepared.events.user_ids) == 5000 and prepared.catalogue.vocabulary == 50
    assert set(prepared.catalogue.item_lengths) == {5} and prepared.catalogue.items == 70
    assert (prepared.catalogue.prompt_tokens, prepared.catalogue.suffix_tokens) == (3, 0)
    run = make_run(make_config(data={"row_tokens": 120, "prompt": "Twelve marks"}), prepared)
    users = len(prepared.events.user_ids)
    # A prompt: all seven training events are targets, of which six are input, after three tokens.
    assert run.rows.targets == 7 * users and set(run.rows.sizes) == {3 + 6 * 5} and len(run.rows) == np.ceil(users / 3)


def test_assumptions_that_cannot_be():
    config = make_config().data
    with pytest.raises(InputError, match="--events=3: must be 4 or more"):
        assume(config, Assumption(items=10, item_length=3, users=10, events=3), 50)
    with pytest.raises(InputError, match=r"row_tokens = 24 is too small.*13 tokens"):
        assume(config, Assumption(items=10, item_length=13, users=10, events=5), 50)


# ---- parameters and optimizer, by hand


@pytest.mark.parametrize(("shape", "own"), [({}, 1_235_814_400), (EIGHT_B, 8_030_261_248)], ids=["1B", "8B"])
def test_llama_by_hand(tmp_path, shape, own):
    """Everything trained, on one device and on eight that share the width: parameters as many as the public model's, the item table, its
    projection and the boundary token's rows; Adam's two moments of each."""
    shape = ONE_B | shape
    (tmp_path / "config.json").write_text(json.dumps(shape))
    D, F, L, H = (shape[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"))
    config = finetuning_config("full")
    config.data.update(source="synthetic")
    config.model.update(pretrained=str(tmp_path), schedule=f"(intra inter)*{L // 2}")
    config = pretrained.configure(resolve(config))
    prepared, _ = assume(config.data, Assumption(items=11_758, item_length=24, users=50, events=20), shape["vocab_size"] + 1)
    run = make_run(config, prepared)
    heads = 1 if shape["tie_word_embeddings"] else 2  # embeddings, each with a boundary row
    layer = 2 * D * 32 * H + 2 * D * 8 * H + 3 * D * F
    assert own == heads * 128_256 * D + L * (layer + 2 * D) + D
    total = own + heads * D + 11_758 * D + D * D
    assert device_bytes(run.abstract_trained) == 4 * total
    assert estimate.state_bytes(run, config, (1, 1, 1)) == 3 * 4 * total
    everywhere = (2 * L + 1) * D + 11_758 * D  # the norms' scales, and the items, which are spread by mesh.tensor
    assert estimate.state_bytes(run, config, (1, 8, 1)) == 3 * 4 * ((total - everywhere) // 8 + everywhere)


# ---- a plan of the device that is here


@pytest.fixture(scope="module")
def plan():
    config = make_config(model={"item_states": "off"}, train={"batch_rows": 4}, eval={"batch_rows": 4}, score={"batch_rows": 4})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="bpe", vocabulary=300))
    return make_plan(config, PlanRequest("local", Assumption(items=40, item_length=4, users=30, events=6)))


def test_memory_by_kind(plan):
    D, F, I, V = 16, 24, 40, 301  # noqa: E741
    parameters = 4 * (4 * D * D + 3 * D * F + 2 * D) + V * D + D + D * D + I * D
    (step,) = plan.programs["training"]
    assert step.held["parameters, trained"] == 4 * parameters and step.held["parameters, frozen"] == 0
    assert step.held["optimizer"] == 2 * 4 * parameters + 2 * 4  # two moments, two counts of steps
    targets = plan.run.rows.targets_per_row
    batch = 4 * 4 * (5 * 24 + 3 * targets) + 4  # token, user, group, position, label; target, its place, its segment; the step
    assert step.held["batch and items"] == batch + I * (4 * 4 + 4 + 1 + 4 + 4 + 4)
    assert step.total == sum(step.held.values()) + step.padding + step.outputs + step.code + step.temporaries
    assert step.temporaries > 4 * 24 * (4 * D + F) * 4 and step.padding == 0
    assert list(plan.programs) == list(PARTS) and all(plan.fits(part) for part in PARTS)
    evaluation = {program.name: program for program in plan.programs["evaluation"]}
    assert list(evaluation) == ["history vectors", "item vectors", "ranking"]
    assert evaluation["ranking"].held["optimizer"] == step.held["optimizer"]
    assert "optimizer" not in plan.peak("scoring").held
    products = 4 * 24 * 4 * (4 * D * D + 3 * D * F)  # of the layers; and each target's projection
    assert 2 * products < evaluation["history vectors"].flops["float32"] < 2.1 * products


def test_report_of_a_device_without_a_data_sheet(plan):
    facts = json.loads(json.dumps(estimate.record(plan, price=None)))
    text = estimate.report(plan, facts)
    assert facts["chip"] is None and "step" not in facts and facts["fits"] == dict.fromkeys(PARTS, True)
    assert facts["flops"]["model"] == plan.step.model and "no data sheet of this device" in text
    assert estimate.verdict(plan) == ""
    assert re.search(r"^local: 1 x cpu, mesh data 1 x fsdp 1 x tensor 1", text)
    shown = re.search(r"^total +([\d.]+) +([\d.]+) +([\d.]+)$", text, re.M)
    assert [float(x) for x in shown.groups()] == [round(plan.peak(part).total / GIB, 3) for part in PARTS]


def test_times_and_costs(plan):
    """As if it were a v5e."""
    chip = find_chip("TPU v5 lite")
    plan = dataclasses.replace(plan, chip=chip, scale=10.0)
    parts = estimate.seconds(plan, plan.step.hardware, plan.programs["training"][0])
    counted = plan.step.hardware
    assert parts["compute"] == pytest.approx((counted["float32"] + 6 * counted["float32 highest"]) / 197e12 / 0.5)
    assert parts["memory"] == pytest.approx(plan.programs["training"][0].traffic.memory / 819e9 / 0.8)
    assert parts["links"] == 0


def test_what_does_not_fit(plan):
    (step,) = plan.programs["training"]
    small = dataclasses.replace(plan, capacity=step.total - 1)
    told = estimate.verdict(small)
    needed, available = (f"{size / GIB:.2f} GiB" for size in (step.total, step.total - 1))
    assert told.startswith(f"local: training (training step) needs {needed} of memory per chip, but {available} are available. It may fit")
    assert "--config.model.remat=True" in told and "--config.optimizer.accumulate=4" in told and "lora" not in told
    assert "chips" not in told  # the state alone would fit
    refused = dataclasses.replace(step, temporaries=None, needed=None)
    told = estimate.verdict(dataclasses.replace(plan, capacity=1000, programs={"training": [refused]}))
    assert "needs more than" in told and "chips (" not in told  # no number of chips holds that
    assert not told.count("\n")


def test_so_many_chips_that_the_state_fits(plan):
    """By fsdp alone as far as it divides the width, 16; with tensor, which divides the 40 items too, where that is not enough."""
    (step,) = plan.programs["training"]
    for capacity, chips in ((92_100, "2"), (62_200, "4"), (13_000, "32"), (10_000, None)):
        told = estimate.verdict(dataclasses.replace(plan, capacity=int(capacity / 0.9), programs={"training": [step]}))
        found = re.search(r"(\d+) chips \(--config.mesh.fsdp=-1( --config.mesh.tensor=2)?\)", told)
        assert (found and found[1]) == chips and bool(found and found[2]) == (chips == "32")
    assert estimate.state_bytes(plan.run, plan.config, (1, 16, 2)) < 13_000 < estimate.state_bytes(plan.run, plan.config, (1, 16, 1))


def test_full_fine_tuning_that_does_not_fit_is_shown_lora(tmp_path, plan):
    (tmp_path / "config.json").write_text(json.dumps(ONE_B | {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 1000}))
    config = finetuning_config("full")
    config.data.update(source="synthetic")
    config.model.update(pretrained=str(tmp_path), schedule="intra inter")
    config = pretrained.configure(resolve(config))
    run = make_run(config, assume(config.data, Assumption(items=50, item_length=24, users=50, events=20), 1001)[0])
    (step,) = plan.programs["training"]
    full = dataclasses.replace(plan, config=config, run=run, capacity=10**6, programs={"training": [step]})
    found = re.search(r"lora.rank=16 .*take ([\d.]+) instead of ([\d.]+) GiB", estimate.verdict(full))
    now, adapted = (estimate.state_bytes(run, x, (1, 1, 1)) for x in (config, _adapted(config)))
    assert [float(x) for x in found.groups()] == [round(adapted / GIB, 2), round(now / GIB, 2)] and adapted < now / 2


def _adapted(config):
    model = dataclasses.replace(config.model, lora=dataclasses.replace(config.model.lora, rank=16), frozen_dtype="bfloat16")
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:2", "nowhere"])
def test_unknown_topologies(name):
    with pytest.raises(InputError, match=f"--topology={name}: must be local or a TPU slice"):
        topology.prepare(name)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"--topology=v5e:2x4 needs libtpu: pip install 'iam_jax\[tpu\]'"):
        topology.prepare("v5e:2x4")
    topology.prepare("local")


def test_plans_with_the_configs_own_data(monkeypatch):
    prepared = tiny_data()
    monkeypatch.setattr("iam_jax.planning.plan.prepare", lambda *_: prepared)
    made = make_plan(make_config(model={"item_states": "off"}), PlanRequest("local", None, parts=()))
    assert made.scale == 1 and made.run.prepared is prepared and made.programs == {}

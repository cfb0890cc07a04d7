"""The benchmarks at toy size: tables and JSON files agree, and errors are detected. No time is asserted."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forks import python

from iam_jax.devices import topology
from iam_jax.planning import plan
from iam_jax.planning.plan import device_bytes
from iam_jax.training import run as training_run

HLO = "HloModule step\n\nENTRY %main (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n"
FOLDER = Path(__file__).parents[1] / "benchmarks"
REFUSALS = (  # of libtpu
    "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
    "Ran out of memory on HBM, the total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G).",
)


def run(name: str, output: Path, *flags: str) -> tuple[subprocess.CompletedProcess, dict | None]:
    forked = name not in ("import_memory", "ranking")  # they measure the memory of processes
    command = [python() if forked else sys.executable, FOLDER / f"{name}.py", f"--output={output}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    return done, json.loads(output.read_text()) if output.exists() else None


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses need it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def scripts_import_each_other(monkeypatch):
    """As when a benchmark is run, its folder is the first entry of sys.path."""
    monkeypatch.syspath_prepend(FOLDER)


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_functions_take_turns():
    calls: list[str] = []
    timed = load("harness").take_turns({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, 3)
    assert calls == ["a", "b"] * 4 and [timed[name].first for name in "ab"] == [1, 2]  # the first run of each is not timed
    for of in timed.values():
        assert len(of.samples) == 3 and of.median == sorted(of.samples)[1] > 0


def test_a_peak_within_the_block():
    looks = iter([5, 9, 3])
    seen = threading.Event()

    def look() -> int:
        value = next(looks, None)
        if value is None:
            seen.set()
        return value or 4

    with load("harness").Peak(look) as peak:
        assert seen.wait(30)
    assert (peak.before, peak.most) == (5, 9) and peak.samples >= 4


def test_the_harness_is_light():
    """data.py and ranking.py measure the memory of processes that import it."""
    code = "import json, sys, harness; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    modules = set(json.loads(done.stdout))
    assert "harness" in modules and not modules & {"iam_jax", "jax", "numpy", "polars", "torch"}


def test_versions_are_those_of_what_is_installed():
    found = load("harness").versions("jax", "no-such-package")
    assert found == {"python": ".".join(map(str, sys.version_info[:3])), "jax": jax.__version__}


def test_attention_times_and_memory(tmp_path):
    """At 24 tokens the dense mask needs 2 * 16 * 24 ** 2 = 18,432 bytes by the estimate, at 96 it needs 294,912."""
    done, result = run("attention", tmp_path / "a.json", "--lengths=24,96", "--repeats=1", "--users_per_row=2", "--limit_gb=1e-4")
    assert done.returncode == 0, done.stderr
    assert result["platform"] == "cpu" and result["settings"]["dtype"] == "float32" and jax.__version__ in done.stdout
    rows = {(row["relation"], row["backend"], row["length"]): row for row in result["rows"]}
    pairs = [(relation, backend) for relation in ("intra", "inter", "full") for backend in ("reference", "blocked")]
    pairs.append(("intra", "local"))
    assert set(rows) == {(*pair, length) for pair in pairs for length in (24, 96)}
    for (relation, backend, length), row in rows.items():
        refused = backend == "reference" and length == 96
        assert ("would need about" in row["skipped"]) == refused
        if not refused:
            assert 0 < row["best_seconds"] <= row["median_seconds"] and row["temporary_bytes"] > 0
            assert row["argument_bytes"] >= 4 * length * 2 * 32 * 4  # q, k, v and the cotangent
            assert row["result_bytes"] >= 4 * length * 2 * 32 * 4
        (line,) = lines_of(done.stdout, f"{relation:<8} {backend} ")
        assert line.split()[4:6] == ["-", "-"] if refused else line.split()[2 + 2 * (length == 96)] != "-"
        assert len(lines_of(done.stdout, f"{relation} {backend} at {length}:")) == refused
    growths = {(growth["relation"], growth["backend"]): growth for growth in result["growth"]}
    assert set(growths) == {pair for pair in pairs if pair[1] != "reference"}
    growth = growths["intra", "local"]
    assert (growth["from"], growth["to"]) == (24, 96)
    ends = rows["intra", "local", 24], rows["intra", "local", 96]
    assert growth["time"] == pytest.approx(ends[1]["best_seconds"] / ends[0]["best_seconds"])
    assert growth["memory"] == pytest.approx(ends[1]["temporary_bytes"] / ends[0]["temporary_bytes"])


def test_attention_packs_users_of_the_same_length():
    user, group = load("attention").packed(2, 40, 3)
    assert user.shape == (2, 40) and (user[0] == user[1]).all() and np.bincount(user[0]).tolist() == [0, 14, 13, 13]
    assert group[0].tolist() == ([1] * 12 + [2] * 2) + 2 * ([1] * 12 + [2])


def test_attention_does_not_time_interpreted_kernels(capsys):
    parse = load("attention").parse
    for backend, word in (("gpu", "interpreted"), ("tpu", "interpreted"), ("flex", "the backends for a cpu are")):
        with pytest.raises(SystemExit) as stop:
            parse([f"--backends=local,{backend}"])
        assert stop.value.code == 2 and word in capsys.readouterr().err
    assert parse(["--backends=local,gpu", "--check"]).backends == ["local", "gpu"]


@pytest.mark.parametrize("mistake", ["none", "value", "NaN", "leak"])
def test_attention_check(mistake, tmp_path, monkeypatch, capsys):
    """A correct backend passes the check. A wrong value, a NaN and an empty row that is not zero do not."""
    module = load("attention")
    right, reference_calls = module.range_attention, []

    def wrong(q, k, v, start, stop, *, implementation, **options):
        o = right(q, k, v, start, stop, implementation="reference", **options)
        reference_calls.append(implementation)
        if implementation == "reference":
            return o
        empty = (start >= stop)[..., None, None] & (not options["include_self"])
        return {
            "none": o,
            "value": o.at[0, 3].multiply(1.001),
            "NaN": o.at[0, 3, 0, 0].set(jnp.nan),
            "leak": o + jnp.where(empty, 1e-7, 0),
        }[mistake]

    monkeypatch.setattr(module, "range_attention", wrong)
    monkeypatch.setattr(sys, "argv", ["attention.py", "--check", "--lengths=48", "--backends=local", f"--output={tmp_path / 'a.json'}"])
    assert module.main() == (mistake != "none")
    text, result = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert {"local", "reference"} == set(reference_calls)
    assert [row["relation"] for row in result["rows"]] == ["intra", "intra, self key", "intra_both", "intra_both, self key"]
    assert result["passed"] == ("MISMATCH" not in text) == (mistake == "none")
    assert ("an empty row is not zero" in text) == (mistake == "leak")
    padding = result["rows"][0]["empty_rows"]
    assert padding == 5 and result["rows"][1]["empty_rows"] == 0


def test_attention_dense_peer_is_the_reference():
    """The dense paths compute the same function as the reference; only the implementation differs."""
    module = load("attention")
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 40, n, 8)), jnp.float32) for n in (4, 2, 2))
    user, group, candidate = module.ragged(2, 40)
    ranges = module.key_ranges(user, group, candidate)
    for relation, include_self in (("inter", False), ("inter", True), ("full", False)):
        got, expected = (module.attend(name, include_self, None, q, k, v, ranges[relation]) for name in ("xla", "reference"))
        np.testing.assert_array_equal(got, expected)
    assert not np.asarray(got)[user == 0].any() and (user == 0).any()


def test_attention_ratio_to_the_fastest_peer():
    def row(backend, seconds, length=8, skipped=""):
        return {"relation": "full", "backend": backend, "length": length, "best_seconds": seconds, "skipped": skipped}

    rows = [row("gpu", 2.0), row("local", 0.1), row("xla", 8.0), row("flex", 4.0), row("cudnn", 1.0, skipped="no"), row("gpu", 3.0, 16)]
    expected = {"relation": "full", "length": 8, "peer": "flex", "ratio": 0.5}
    assert load("attention").against_peers(rows) == [expected]  # there is no peer at length 16


TOY = ("--schedule=intra full", "--candidates=3", "--history_items=4", "--item_tokens=5", "--vocabulary=40", "--width=16", "--repeats=2")


def test_scoring(tmp_path):
    done, result = run("scoring", tmp_path / "s.json", *TOY)
    assert done.returncode == 0 and result["equal"], done.stderr
    (measured,) = result["results"]
    ways = {way["way"]: way for way in measured["ways"]}
    # A history of 20 tokens, 3 candidates of 5.
    facts = {name: (way["calls"], way["row_tokens"], way["tokens"]) for name, way in ways.items()}
    assert facts == {"one pass": (1, 35, 35), "one by one": (3, 25, 75), "one batch": (1, 25, 75)}
    rows = [re.split(r"\s{2,}", line[28:].strip()) for line in done.stdout.splitlines()]
    lines = {row[0]: row for row in rows if row[0] in ways}
    for name, way in ways.items():
        assert way["median_seconds"] > 0 and way["temporary_bytes"] > 0 and len(way["samples"]) == 2
        assert way["relative_to_one_pass"] == pytest.approx(way["median_seconds"] / ways["one pass"]["median_seconds"])
        assert lines[name][1:3] == [str(way["calls"]), str(way["tokens"])]
        assert way["largest_relative_difference"] <= 1e-5
    assert measured["least_score"] < measured["greatest_score"] < 0


def test_scores_that_differ_are_an_error(tmp_path, monkeypatch, capsys):
    """Candidates after a history that is one item shorter have other scores."""
    module = load("scoring")
    right = module.candidate_rows

    def wrong(catalogue, histories, candidates, max_tokens):
        return right(catalogue, [h[len(candidates[0]) > 1 :] for h in histories], candidates, max_tokens)

    monkeypatch.setattr(module, "candidate_rows", wrong)
    monkeypatch.setattr(sys, "argv", ["scoring.py", *TOY, f"--output={tmp_path / 's.json'}"])
    assert module.main() == 1
    result = json.loads((tmp_path / "s.json").read_text())
    assert not result["equal"] and "NOT EQUAL" in capsys.readouterr().out
    one_pass, _, one_batch = result["results"][0]["ways"]
    assert one_pass["largest_relative_difference"] > 1e-3 > 1e-5 > one_batch["largest_relative_difference"]


def test_import_memory(tmp_path, monkeypatch, capsys):
    """The import adds at least the bytes of its parameters and stays within the bound. Exceeding the bound is an error."""
    done, result = run("import_memory", tmp_path / "m.json", "--parameters=4e7")
    assert done.returncode == 0 and result["holds"], done.stdout + done.stderr
    assert result["parameters"] == pytest.approx(4e7, rel=0.02) and result["parameter_bytes"] == 2 * result["parameters"]
    # V = 25,652, D = 384, two bytes
    assert result["largest_tensor_bytes"] == 25_652 * 384 * 2
    assert result["bound_bytes"] == int(1.1 * result["parameter_bytes"]) + 2 * result["largest_tensor_bytes"]
    assert result["added_bytes"] == result["peak_bytes"] - result["before_bytes"] >= result["parameter_bytes"]
    (line,) = lines_of(done.stdout, "added / bound")
    assert float(line.split()[-1]) == pytest.approx(result["added_bytes"] / result["bound_bytes"], abs=1e-3)
    assert not list(tmp_path.glob("*.safetensors"))

    module = load("import_memory")
    measured = {"parameters": 10, "parameter_bytes": 20, "largest_tensor_bytes": 6, "before_bytes": 100, "seconds": 1.0}
    monkeypatch.setattr(module, "write_checkpoint", lambda folder, parameters: None)
    monkeypatch.setattr(sys, "argv", ["import_memory.py", f"--output={tmp_path / 'n.json'}"])
    for peak, code in ((134, 0), (135, 1)):  # 1.1 * 20 + 2 * 6 = 34
        line = json.dumps(measured | {"peak_bytes": peak})
        monkeypatch.setattr(module.subprocess, "run", lambda *_, line=line, **__: subprocess.CompletedProcess([], 0, stdout=line))
        assert module.main() == code
        assert ("EXCEEDED" in capsys.readouterr().out) == bool(code)
        assert json.loads((tmp_path / "n.json").read_text())["holds"] == (code == 0)


def test_beam(tmp_path, monkeypatch, capsys):
    """With as many beams as items, the search finds all items with equal scores. A history that is one item shorter gives other scores."""
    toy = ("--schedule=intra full", "--items=6", "--beams=6", "--users=2", "--history_items=4", "--item_tokens=3", "--vocabulary=40")
    toy += ("--width=16", "--repeats=2")
    done, result = run("beam", tmp_path / "b.json", *toy)
    assert done.returncode == 0 and result["equal"], done.stderr
    (measured,) = result["results"]
    assert measured["found"] == 1 and measured["sequences"] <= 6 and measured["largest_relative_difference"] <= 1e-5
    searched, exhaustive = measured["ways"]
    assert exhaustive["relative_to_beam_search"] == pytest.approx(exhaustive["seconds_per_user"] / searched["seconds_per_user"])
    for way, name in ((searched, "beam search"), (exhaustive, "exhaustive")):
        assert way["way"] == name and way["temporary_bytes"] > 0 and len(way["samples"]) == 2
        (line,) = (line for line in done.stdout.splitlines() if line[28:].startswith(f"{name} "))
        assert float(line[40:50]) == pytest.approx(way["seconds_per_user"] * 1e3, abs=0.051)

    module = load("beam")
    right = module.history_rows
    monkeypatch.setattr(module, "history_rows", lambda catalogue, histories, tokens: right(catalogue, [h[1:] for h in histories], tokens))
    monkeypatch.setattr(sys, "argv", ["beam.py", *toy, f"--output={tmp_path / 'n.json'}"])
    assert module.main() == 1 and "NOT EQUAL" in capsys.readouterr().out
    assert not json.loads((tmp_path / "n.json").read_text())["equal"]


def test_pretrained_memory(tmp_path, monkeypatch, capsys):
    """The frozen parameters match those of the public models; the table and the JSON agree; a step that does not fit is a row."""
    module = load("pretrained_memory")
    for name, value in {"prepare": lambda _: None, "devices": lambda _: jax.devices()}.items():  # libtpu is not needed
        monkeypatch.setattr(topology, name, value)
    monkeypatch.setattr(training_run, "_check_attention", lambda *_: None)
    monkeypatch.setattr(module.metadata, "version", lambda package: f"{package} 1.0")
    sizes = {"output_size_in_bytes": 2**30, "alias_size_in_bytes": 2**30, "temp_size_in_bytes": 2**29}
    sizes["generated_code_size_in_bytes"] = 2**28  # not counted

    class Step:
        jaxpr = SimpleNamespace(jaxpr=SimpleNamespace(eqns=[]))

        def trace(self, *arguments):
            passed.append(device_bytes(arguments))
            return self

        def lower(self):
            return self

        def compile(self):
            if len(passed) % 2 == 0:
                raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {REFUSALS[len(passed) % 4 == 0]}")
            memory = SimpleNamespace(**sizes | {"argument_size_in_bytes": passed[-1] + 2**27})
            return SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: HLO)

    passed: list = []
    monkeypatch.setattr(plan, "make_train_step", lambda run: Step())
    monkeypatch.setattr(sys, "argv", ["pretrained_memory.py", "--slices=v5p:2x2x1", f"--output={tmp_path / 'm.json'}"])
    module.main()
    text, rows = capsys.readouterr().out, json.loads((tmp_path / "m.json").read_text())["rows"]
    lines = [line.split() for line in text.splitlines()[2:-1]]
    assert [line[:3] for line in lines] == [[row["config"], row["variant"], row["slice"]] for row in rows] and len(rows) == 6
    public = {"llama3_1b_amazon": 1_235_814_400, "qwen3_0_6b_amazon": 596_049_920, "gpt2_ml1m": 124_439_808}
    for row, line in zip(rows, lines, strict=True):
        own = public[row["config"]]
        assert row["frozen"] == (2 * own if row["variant"] == "lora" else 0)
        assert (row["trained"] > 4 * own) == (row["variant"] == "full") and row["optimizer"] == 2 * row["trained"] + 8
        assert line[4:7] == [f"{row[name] / 2**30:.2f}" for name in ("trained", "frozen", "optimizer")]
        assert row["fits"] == (row["variant"] == "lora")
        total = f"{(passed[rows.index(row)] + 2**27 + 2**29) / 2**30:.2f}"
        assert line[7:] == (["0.50", total] if row["fits"] else ["-", "20.50", "does", "not", "fit"])


def test_ranking_beside_torch_where_there_is_one(tmp_path):
    sizes = {"users": 21, "items": 700, "width": 8, "seen": 5, "batch": 8, "chunk": 90}
    done, result = run("ranking", tmp_path / "r.json", *[f"--{name}={value}" for name, value in sizes.items()])
    assert done.returncode == 0, done.stderr
    assert result["settings"] == sizes | {"repeats": 1} and result["equal"] and ": equal in all ways" in done.stdout
    has_torch = importlib.util.find_spec("torch") is not None
    assert list(result["results"]) == ["iam_jax", "torch", "torch_topk"][: 3 if has_torch else 1]
    assert ("torch is not installed" in done.stdout) != has_torch and ("torch" in result["versions"]) == has_torch
    for way in result["results"].values():
        assert 0 < way["best_seconds"] == min(way["samples"])
        assert way["bytes_beyond_item_vectors"] == way["peak_bytes"] - 700 * 8 * 4 > 0
    (line,) = lines_of(done.stdout, "iam_jax: ranks")
    assert line.split()[-1] == "1.00"

    data = load("ranking").make(SimpleNamespace(**sizes))
    score, ranks = data["users"].astype(int) @ data["items"].astype(int).T, []
    for row, own, seen in zip(score, data["target"], data["seen"], strict=True):
        others = np.setdiff1d(np.arange(700), [own, *seen[seen >= 0]])
        ranks.append(1 + int((row[others] > row[own]).sum()))
    assert result["median_rank"] == int(np.median(ranks)) > 50


def test_item_level(tmp_path, shop, monkeypatch, capsys):
    shop.interactions.write_parquet(tmp_path / "interactions.parquet")
    shop.items.write_csv(tmp_path / "items.csv")
    flags = ["--rows=2", "--row_items=16", "--item_tokens=6", "--width=8", "--vector_size=4", "--users=20", "--batches=1", "--chunk=16"]
    module, output = load("item_level"), tmp_path / "o.json"
    monkeypatch.setattr(sys, "argv", ["item_level.py", f"--path={tmp_path}", f"--output={output}", *flags])
    assert module.main() == 0
    record, out = json.loads(output.read_text()), capsys.readouterr().out
    speeds = record["events_per_second"]
    assert list(speeds) == list(module.WAYS) and all(value > 0 for row in speeds.values() for value in row.values())
    for (a, b), row in zip(module.RATIOS, record["ratios"].values(), strict=True):
        assert row == {what: pytest.approx(speeds[a][what] / speeds[b][what]) for what in ("training", "scoring")}
        (line,) = lines_of(out, f"{a} : {b}")
        assert float(line.split()[-4]) == pytest.approx(row["training"], abs=0.006)
    # Every way reads the same histories: rows are long enough for all of them here.
    assert len({row["events scored"] for row in record["counts"].values()}) == 1

"""Compares the ranking quality of our SASRec and of RecTools', for sasrec.py, with the same split, protocol and evaluator."""

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import harness
from sasrec_speed import SIDES

from iam_jax.config import Config, flatten, get_config
from iam_jax.errors import InputError
from iam_jax.runs import compare

MAY_DIFFER = ("log.", "data.path", "data.cache", "train.keep")  # between our runs, besides the seed


def settings_of(config: Config, args: argparse.Namespace) -> dict:
    """Returns the settings that a finished seed must have been trained with."""
    names = (
        "minutes",
        "epochs",
        "patience",
        "eval_epochs",
        "session",
        "dropout",
        "learning_rate",
        "trial_minutes",
        "batch_size",
        "threads",
    )
    fields = {"model": dataclasses.asdict(config.model), "learning_rate": config.optimizer.learning_rate}
    fields |= {"metric": config.eval.metric, "validation_users": config.eval.validation_users}
    return {name: getattr(args, name) for name in names} | {"config": fields, "rectools": metadata.version("rectools")}


def read_ours(folders: Sequence[Path]) -> dict:
    """Reads {seed: run} from working folders. Raises InputError if their configs differ in more than the seed."""
    ours, first = {}, None
    for folder in folders:
        fields = {name: value for name, value in flatten(get_config(str(folder)).to_dict()).items() if not name.startswith(MAY_DIFFER)}
        seed, first = fields.pop("train.seed"), first or fields
        if seed in ours:
            raise InputError(f"--runs: two runs have train.seed = {seed}")
        if differing := [name for name in fields if fields[name] != first.get(name)]:
            raise InputError(f"{folder} was made with another {', '.join(differing)} than {folders[0]}")
        ours[seed] = compare.read(folder)
    return ours


def quality(config: Config, args: argparse.Namespace) -> tuple[dict, int]:
    """Runs the subcommand `quality`. Returns the record and the exit code."""
    from rectools_peer import choose_rate, train_seed

    from iam_jax.data.prepare import prepare
    from iam_jax.ranking.evaluate import protocol

    if not args.minutes and not args.epochs:
        raise InputError("--minutes=0 --epochs=0: one of them must limit the training")
    ours = read_ours(args.runs)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, baselines=False))
    prepared = prepare(config.data)
    identity = {"split_sha256": prepared.split.sha256, "protocol": protocol(prepared, config)}
    for folder, run in zip(args.runs, ours.values(), strict=True):
        if differing := [name for name, value in identity.items() if run.evaluation[name] != value]:
            raise InputError(f"{folder} cannot be compared with RecTools here: it has another {' and '.join(differing)}")
    settings = json.loads(json.dumps(settings_of(config, args) | identity))
    theirs, facts, rate, trials_file = {}, {}, None, args.folder / "trials.json"
    for seed in args.seeds:
        folder = args.folder / f"seed{seed}"
        done = folder / "rectools.json"
        if done.exists():
            facts[seed] = _read_json(done)
            if differing := [name for name, value in settings.items() if facts[seed]["settings"].get(name) != value]:
                raise InputError(f"{folder} was made with another {', '.join(differing)}; choose another --folder")
            print(f"seed {seed}: already finished", flush=True)
        else:
            if rate is None:
                trials = _read_json(trials_file) if trials_file.exists() else {"settings": settings, "trials": []}
                if trials["settings"] != settings:
                    raise InputError(f"{trials_file} was made with other settings; choose another --folder")
                rate = choose_rate(config, prepared, args, trials, functools.partial(harness.save, trials_file, trials))
            facts[seed] = {"settings": settings, "rate": rate} | train_seed(config, prepared, args, seed, rate, folder)
            harness.save(done, facts[seed])
        theirs[seed] = compare.read(folder)
    result = identity | {"trials": _read_json(trials_file)["trials"] if trials_file.exists() else [], "seeds": facts, "means": {}}
    rates = {"iam_jax": [config.optimizer.learning_rate], "rectools": sorted({fact["rate"] for fact in facts.values()})}
    columns = f"{'side':<12}{'seeds':<12}{'rate':>8}{'minutes':>9}{'steps':>9}{'tokens':>13}{'NDCG@10':>9}{'HR@10':>9}    by seed: NDCG@10"
    print(columns)
    for name, runs in (("iam_jax", ours), ("rectools", theirs)):
        tests = {seed: run.evaluation["results"]["model"]["test"] for seed, run in runs.items()}
        if not tests:
            continue
        mean = {metric: statistics.mean(test[metric] for test in tests.values()) for metric in ("ndcg@10", "hr@10")}
        result["means"][name] = mean | {"by_seed": {seed: {m: test[m] for m in mean} for seed, test in tests.items()}}
        values = ", ".join(f"{test['ndcg@10']:.4f}" for test in tests.values())
        cost = {key: statistics.mean(run.cost.get(key, 0) for run in runs.values()) for key in ("minutes", "steps", "tokens_seen")}
        result["means"][name] |= cost
        line = f"{SIDES[name]:<12}{', '.join(map(str, tests)):<12}{', '.join(f'{rate:g}' for rate in rates[name]):>8}"
        line += f"{cost['minutes']:>9.1f}{cost['steps']:>9,.0f}{cost['tokens_seen']:>13,.0f}"
        print(f"{line}{mean['ndcg@10']:>9.4f}{mean['hr@10']:>9.4f}    {values}")
    if ours:
        result["difference"] = difference = compare.over_seeds(ours, theirs)
        if difference is None:
            print("the two sides have no seed in common, so there is no difference")
        else:
            low, high = difference["ndcg@10_ci"]
            verdict = "significantly below" if high < 0 else "significantly above" if low > 0 else "no significant difference"
            seeds = ", ".join(map(str, difference["seeds"]))
            by_seed = ", ".join(f"{values['ndcg@10']:+.4f}" for values in difference["by_seed"].values())
            interval = f"{difference['ndcg@10']:+.4f} [{low:+.4f}, {high:+.4f}] over users ({by_seed})"
            print(f"NDCG@10, ours minus RecTools', seeds {seeds}: {interval}: {verdict} for these seeds")
    checks = [fact["recommend"] for fact in facts.values()]
    equal = all(check["equal"] for check in checks)
    users, same = (sum(check[name] for check in checks) for name in ("users", "identical"))
    print(f"RecTools' own recommend: {same:,} of {users:,} top tens identical, {'equal' if equal else 'NOT EQUAL'} within rounding")
    return result | {"equal": equal}, 0 if equal else 1


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error

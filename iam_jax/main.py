"""The command line: flags to one mode.

    python -m iam_jax.main --config=FILE [--workdir=DIR] [--mode=train|evaluate|export]
        [--step=N|best|last] [--config.section.key=value ...]        (FILE: a path, or a name from configs/, such as demo)
    python -m iam_jax.main --mode=score --workdir=DIR --users=TABLE [--items=TABLE] [--candidates=TABLE] --output=DIR [--top_k=100]
    python -m iam_jax.main --mode=score --workdir=DIR --vectors [--users=TABLE] [--items=TABLE] --output=DIR
    python -m iam_jax.main --mode=compare --runs=DIR,DIR[,DIR...] [--output=DIR]
    python -m iam_jax.main --mode=plan --config=FILE --topology=v5e:2x4|local [--num_items=N --item_length=T --num_users=N --events=N]
        [--programs=training,evaluation,scoring] [--price=USD] [--top_k=100] [--output=FILE]

Every process of a job on several hosts: the same flags and --multihost [--coordinator=HOST:PORT --processes=N --process_id=K].

Exit codes: 0 done; 2 bad input, flag or config; 3 a plan that does not fit; 4 stopped on non-finite training; 5 the job's other processes
failed; 75 stopped by Ctrl-C or SIGTERM with everything saved.
"""

import time

_START = time.time()

import difflib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NoReturn  # noqa: E402

if __name__ == "__main__":  # nothing to save during the imports
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, lambda *_: os._exit(75))

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from iam_jax import api, config_files  # noqa: E402
from iam_jax import config as config_lib  # noqa: E402
from iam_jax.devices import distributed  # noqa: E402
from iam_jax.devices.signals import Signals  # noqa: E402
from iam_jax.errors import InputError, JobError, NonFiniteError  # noqa: E402
from iam_jax.storage.files import to_path, write_atomically  # noqa: E402
from iam_jax.storage.remote import is_remote  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; may be left out where --workdir holds a run's config.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Working folder of the run; runs/<the config's name> by default.")
_MODES = {
    "train": "train, then evaluate",
    "evaluate": "evaluate a checkpoint",
    "score": "top-K lists or vectors from a checkpoint",
    "export": "a checkpoint as a folder for others",
    "compare": "one table of finished runs",
    "plan": "memory, time and cost of a run on devices that are not here",
}
_MODE = flags.DEFINE_enum("mode", "train", list(_MODES), "; ".join(f"{mode}: {what}" for mode, what in _MODES.items()) + ".")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint that --mode=evaluate, score and export read: a step, best or last.")
_FORMAT = flags.DEFINE_enum("format", "huggingface", ["huggingface", "stablehlo"], "What --mode=export writes.")
_OUTPUT = flags.DEFINE_string(
    "output", "", "Folder that --mode=export or score makes, or into which --mode=compare writes its table; a plan's JSON file."
)
_RUNS = flags.DEFINE_list("runs", [], "Working folders that --mode=compare compares, the first with every other.")
_SCORE = {
    "users": flags.DEFINE_string("users", "", "Score: interactions table of the users to score (user, item, timestamp)."),
    "items": flags.DEFINE_string("items", "", "Score: table of items to add to the catalogue (item, then text columns)."),
    "candidates": flags.DEFINE_string("candidates", "", "Score: table of the pairs to score (user, item) instead of the catalogue."),
    "top_k": flags.DEFINE_integer("top_k", None, "Score: items of a list at most; 100 by default, with --candidates all of them."),
    "vectors": flags.DEFINE_bool("vectors", False, "Score: writes vectors instead of lists: the items', or with --users the users'."),
}
_MULTIHOST = flags.DEFINE_bool("multihost", False, "One of a job's processes, which JAX finds on Cloud TPU, GKE and Slurm; elsewhere give:")
_JOB = {
    "coordinator": flags.DEFINE_string("coordinator", "", "With --multihost: HOST:PORT of the first process."),
    "processes": flags.DEFINE_integer("processes", None, "With --multihost: how many there are."),
    "process_id": flags.DEFINE_integer("process_id", None, "With --multihost: which one this is, from 0."),
}
_PLAN = {
    "topology": flags.DEFINE_string("topology", "", "Plan: a TPU slice, such as v5e:2x4, or local, the devices that are here."),
    "num_items": flags.DEFINE_integer("num_items", None, "Plan: number of items of assumed data; the config's data by default."),
    "num_users": flags.DEFINE_integer("num_users", None, "Plan: number of users, with --num_items; 100,000 by default."),
    "item_length": flags.DEFINE_integer("item_length", None, "Plan: tokens of an item, with --num_items; data.item_tokens by default."),
    "events": flags.DEFINE_integer("events", None, "Plan: events of a user, with --num_items; 20 by default."),
    "programs": flags.DEFINE_list("programs", [], "Plan: some of training, evaluation, scoring; all by default."),
    "price": flags.DEFINE_float("price", None, "Plan: dollars for a chip an hour; what its cloud lists by default."),
}


def run(signals: Signals) -> None:
    _check_job()
    if _MODE.value == "compare":
        return _compare()
    config_file, _, variant = _config_file().partition(":")
    config = config_lib.resolve(_CONFIG.value)
    if _MODE.value == "plan":
        return _plan(config)
    for name, flag in _PLAN.items():
        if flag.value not in ("", None, []):
            raise InputError(f"--{name} is for --mode=plan")
    if _MULTIHOST.value:
        address, processes, process = (flag.value for flag in _JOB.values())
        distributed.join(address, processes, process, config.mesh, signals)
    workdir = to_path(_WORKDIR.value or Path("runs") / "-".join(filter(None, (Path(config_file).stem, variant))))
    mode, asked = _MODE.value, {name: flag.value for name, flag in _SCORE.items()}
    if mode != "train" and not (workdir / config_lib.CONFIG_FILE).exists():
        raise InputError(f"--workdir={workdir}: no run there to {mode}")
    if mode == "score":
        from iam_jax.serving.offline import ScoreRequest, score

        asked |= {"output": _OUTPUT.value, "step": _STEP.value}
        return score(workdir, config, ScoreRequest(**asked), saved=config_file == config_lib.__file__, signals=signals)
    for name, value in asked.items():
        if value not in ("", None, False):
            raise InputError(f"--{name} is for --mode=score")
    flags_given = {"--mode": mode, "--step": _STEP.value}
    if mode == "train":
        api.train_run(config, workdir, signals, flags_given, _START)
    elif mode == "evaluate":
        api.evaluate_run(config, workdir, _STEP.value, signals, flags_given, _START)
    else:
        _export(config, workdir, signals)


def _export(config: config_lib.Config, workdir: Path, signals: Signals) -> None:
    if not _OUTPUT.value:
        what = "stand-alone" if _FORMAT.value == "stablehlo" else "Hugging Face"
        raise InputError(f"--mode=export makes a {what} folder: --output=DIR is missing")
    if is_remote(_OUTPUT.value):
        raise InputError(f"--output={_OUTPUT.value}: an export is a local folder")
    for note in api.export_run(config, workdir, _STEP.value, Path(_OUTPUT.value), _FORMAT.value, signals, _START):
        print(note)


def _check_job() -> None:
    """Raises InputError for flags of a job that do not go together."""
    given = [name for name, flag in _JOB.items() if flag.value not in ("", None)]
    missing = [name for name in _JOB if name not in given]
    if given and not _MULTIHOST.value:
        raise InputError(f"--{given[0]} is for --multihost")
    if given and missing:
        raise InputError(f"--{missing[0]} is missing: --coordinator, --processes and --process_id go together")
    processes, process = _JOB["processes"].value, _JOB["process_id"].value
    if given and not 0 <= process < processes:
        raise InputError(f"--process_id={process}: must be from 0 to --processes - 1 = {processes - 1}")
    if _MULTIHOST.value and _MODE.value not in ("train", "evaluate", "score"):
        raise InputError(f"--multihost: --mode={_MODE.value} is work for one process")


def _compare() -> None:
    comparison = api.compare(_RUNS.value)
    print(comparison, end="")
    if _OUTPUT.value:
        comparison.write(_OUTPUT.value)
        print(f"wrote {to_path(_OUTPUT.value) / 'comparison.md'}, .txt and .json")


def _plan(config: config_lib.Config) -> None:
    from iam_jax.devices import topology

    asked = {name: flag.value for name, flag in (_SCORE | _PLAN).items()}
    for name in ("users", "items", "candidates", "vectors"):
        if asked[name]:
            hint = f" (a plan takes --num_{name}=N)" if name in ("users", "items") else ""
            raise InputError(f"--{name} is for --mode=score{hint}")
    if asked["num_items"] is None:
        if given := [name for name in ("item_length", "num_users", "events") if asked[name] is not None]:
            raise InputError(f"--{given[0]} goes with --num_items=N, which assumes data instead of reading the config's")
    if asked["top_k"] is not None and asked["top_k"] < 1:
        raise InputError(f"--top_k={asked['top_k']}: must be 1 or more")
    topology.prepare(asked["topology"])

    from iam_jax.data.assumed import Assumption
    from iam_jax.planning import estimate, plan

    assumption = None
    if asked["num_items"] is not None:
        defaults = {"item_length": config.data.item_tokens, "num_users": 100_000, "events": 20}
        chosen = {name: value if asked[name] is None else asked[name] for name, value in defaults.items()}
        assumption = Assumption(asked["num_items"], chosen["item_length"], chosen["num_users"], chosen["events"])
    parts = tuple(asked["programs"]) or plan.PARTS
    if unknown := set(parts) - set(plan.PARTS):
        raise InputError(f"--programs={min(unknown)}: must be of {', '.join(plan.PARTS)}")
    made = plan.make_plan(config, plan.PlanRequest(asked["topology"], assumption, parts, asked["top_k"] or 100))
    facts = estimate.record(made, asked["price"])
    print(estimate.report(made, facts), flush=True)
    wrong = estimate.verdict(made)
    if _OUTPUT.value:
        text = json.dumps(facts | {"verdict": wrong}, indent=2) + "\n"
        write_atomically(Path(_OUTPUT.value), lambda path: path.write_text(text, encoding="utf-8"))
    if wrong:
        _fail(wrong, 3)


def _config_file() -> str:
    return config_flags.get_config_filename(flags.FLAGS["config"]) or ""


def _parse(argv: list[str]) -> list[str]:
    """absl's own parser, its errors told in one line and with exit code 2."""
    file, workdir, comparing = _given(argv, "config"), _given(argv, "workdir"), _given(argv, "mode") == "compare"
    if file is None and workdir and not comparing:
        argv = [argv[0], f"--config={config_lib.__file__}:{workdir}", *argv[1:]]
    try:
        if file and (found := config_files.find(file)) != file:
            argv, file = _with_config(argv, found), found
        if file and not Path(file.partition(":")[0]).is_file():
            raise InputError(f"--config={file}: no such file")
        _check_names(argv)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise InputError(f"unknown flag {rest[1]!r}")
        if not comparing and not file and not workdir:
            raise InputError("--config=FILE is missing (or --workdir of a run)")
        if not comparing and not isinstance(getattr(_CONFIG.value, "data", None), config_lib.ml_collections.ConfigDict):
            raise InputError(f"--config={_config_file()}: no config file with a get_config() that starts from default_config()")
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING  # absl would raise it to INFO
        return rest
    except SystemExit:
        if any(argument.lstrip("-").startswith("help") for argument in argv[1:]):
            sys.exit(0)  # absl would end with 1
        _fail(f"--config={file}: the config file ended the program", 2)
    except (flags.Error, InputError) as error:
        text = str(error).strip()
        if "Traceback (most recent call last)" in text:  # ml_collections' way to tell of what a config file raised
            text = f"--config={file}: " * bool(file) + text.splitlines()[-1].removeprefix("iam_jax.errors.InputError: ")
        _fail(text, 2)
    except Exception as error:  # a config file is a program: anything may be wrong with it
        text = re.sub(r" Other fields present: .*?(\\n|\n|$)", " ", str(error))  # a whole section of the config
        _fail(f"--config={file or workdir}: {type(error).__name__}: {text}", 2)


def _given(argv: list[str], name: str) -> str | None:
    """The value of --name=value or --name value, before absl parses it."""
    found = None
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag in (f"-{name}", f"--{name}"):
            found = value if equals else following
    return found


def _with_config(argv: list[str], file: str) -> list[str]:
    """argv with another value of --config."""
    out = list(argv)
    for at, argument in enumerate(argv):
        if argument in ("-config", "--config"):
            out[at + 1] = file
        elif argument.startswith(("-config=", "--config=")):
            out[at] = f"--config={file}"
    return out


def _check_names(argv: list[str]) -> None:
    """ml_collections tells the last part of an unknown name only."""
    sections = config_lib.default_config().to_dict()
    known = [f"--config.{name}" for name in config_lib.flatten(sections)]
    for name in (argument.partition("=")[0].partition("[")[0] for argument in argv[1:]):
        if name.startswith("--config.") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"{name} is not a config field{f'; did you mean {close[0]}?' if close else ''}")


def _fail(error: Exception | str, code: int) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    if distributed.processes() > 1:
        distributed.exit_process(code)
    sys.exit(code)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from: libraries wrap what a collective raises."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _fail_job(error: Exception) -> NoReturn:
    """A process of several met what no one expected, or another one is gone: then a collective fails."""
    import jax

    if any(isinstance(cause, jax.errors.JaxRuntimeError) for cause in _causes(error)):
        told = f"the devices' program failed, another process of the job may be gone: {' '.join(str(error).split())}"
        print(f"error: process {jax.process_index()}: {told}", file=sys.stderr)
        distributed.exit_process(distributed.FAILED, with_others=False)
    traceback.print_exception(error)
    distributed.exit_process(1, with_others=False)


def _run_reachable(signals: Signals) -> None:
    """A folder that may not be looked into says so wherever it is met first."""
    try:
        run(signals)
    except PermissionError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error


def _main(_: list[str]) -> None:
    signals = Signals()
    signals.install()
    try:
        try:
            _run_reachable(signals)
        except BaseException as error:
            signals.ignore()
            distributed.report_failure(error)
            raise
        signals.ignore()
    except InputError as error:
        _fail(error, 2)
    except (NonFiniteError, FloatingPointError) as error:
        _fail(error, 4)
    except JobError as error:
        _fail(error, distributed.FAILED)
    except KeyboardInterrupt:
        if distributed.is_first():
            print("stopped; the same command goes on from here", file=sys.stderr)
        distributed.exit_process(75)
    except Exception as error:
        if distributed.processes() == 1:
            raise
        _fail_job(error)


if __name__ == "__main__":
    app.run(_main, flags_parser=_parse)

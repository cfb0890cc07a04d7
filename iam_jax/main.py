"""The command line: reads the flags and runs one mode.

    python -m iam_jax.main --config=FILE [--workdir=DIR] [--mode=train|evaluate|export]
        [--step=N|best|last] [--config.section.key=value ...]        (FILE: a path, or a name from configs/, such as demo)
    python -m iam_jax.main --mode=score --workdir=DIR --users=TABLE [--items=TABLE] [--candidates=TABLE] --output=DIR [--top_k=100]
    python -m iam_jax.main --mode=score --workdir=DIR --baseline=transitions --users=TABLE --output=DIR
    python -m iam_jax.main --mode=score --workdir=DIR --vectors [--users=TABLE] [--items=TABLE] --output=DIR
    python -m iam_jax.main --mode=compare --runs=DIR,DIR[,DIR...] [--output=DIR]
    python -m iam_jax.main --mode=plan --config=FILE --topology=v5e:2x4|local [--num_items=N --item_length=T --num_users=N --events=N]
        [--programs=training,evaluation,scoring] [--price=USD] [--top_k=100] [--output=FILE]

In a job of several processes, every process gets the same flags and --multihost [--coordinator=HOST:PORT --processes=N --process_id=K].

Exit codes: 0 done; 2 invalid input, flag or config; 3 the plan does not fit; 4 training stopped because of non-finite values; 5 another
process of the job failed; 75 stopped by Ctrl-C or SIGTERM, with everything saved.
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

if __name__ == "__main__":  # during the imports there is nothing to save
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, lambda *_: os._exit(75))

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from iam_jax import api, config_files  # noqa: E402
from iam_jax import config as config_lib  # noqa: E402
from iam_jax.devices import distributed  # noqa: E402
from iam_jax.devices.memory import keep_freed_memory  # noqa: E402
from iam_jax.devices.signals import Signals  # noqa: E402
from iam_jax.errors import InputError, JobError, NonFiniteError  # noqa: E402
from iam_jax.storage.files import to_path, write_atomically  # noqa: E402
from iam_jax.storage.remote import is_remote  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; optional if --workdir holds the config of a run.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Working folder of the run; default: runs/<name of the config>.")
_MODES = {
    "train": "train, then evaluate",
    "evaluate": "evaluate a checkpoint",
    "score": "write top-K lists or vectors from a checkpoint",
    "export": "write a checkpoint as a folder for other programs",
    "compare": "show finished runs in one table",
    "plan": "estimate memory, time and cost of a run on other devices",
}
_MODE = flags.DEFINE_enum("mode", "train", list(_MODES), "; ".join(f"{mode}: {meaning}" for mode, meaning in _MODES.items()) + ".")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint that --mode=evaluate, score and export read: a step number, best or last.")
_FORMAT = flags.DEFINE_enum("format", "huggingface", ["huggingface", "stablehlo"], "Format that --mode=export writes.")
_OUTPUT = flags.DEFINE_string(
    "output", "", "Folder that --mode=score, export and compare write to (score and export create it); JSON file that --mode=plan writes."
)
_RUNS = flags.DEFINE_list("runs", [], "Working folders for --mode=compare, which compares the first with every other.")
_SCORE = {
    "users": flags.DEFINE_string("users", "", "Score: interactions table of the users to score (user, item, timestamp)."),
    "items": flags.DEFINE_string("items", "", "Score: table of items to add to the catalogue (item, text columns; vector)."),
    "candidates": flags.DEFINE_string("candidates", "", "Score: table of the pairs to score (user, item) instead of the catalogue."),
    "baseline": flags.DEFINE_string("baseline", "", "Score: a baseline instead of the model, such as transitions; reads the run's data."),
    "top_k": flags.DEFINE_integer("top_k", None, "Score: maximum length of a list; default: 100, with --candidates unlimited."),
    "vectors": flags.DEFINE_bool("vectors", False, "Score: write vectors instead of lists: item vectors, or with --users user vectors."),
}
_MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "This process is one of several in a job. JAX detects jobs on Cloud TPU, GKE and Slurm; elsewhere give:"
)
_JOB = {
    "coordinator": flags.DEFINE_string("coordinator", "", "With --multihost: HOST:PORT of the first process."),
    "processes": flags.DEFINE_integer("processes", None, "With --multihost: number of processes in the job."),
    "process_id": flags.DEFINE_integer("process_id", None, "With --multihost: number of this process, from 0."),
}
_PLAN = {
    "topology": flags.DEFINE_string("topology", "", "Plan: a TPU slice such as v5e:2x4, or local for the devices of this machine."),
    "num_items": flags.DEFINE_integer("num_items", None, "Plan: number of items of assumed data; default: use the config's data."),
    "num_users": flags.DEFINE_integer("num_users", None, "Plan: number of users, with --num_items; default: 100,000."),
    "item_length": flags.DEFINE_integer("item_length", None, "Plan: tokens per item, with --num_items; default: data.item_tokens."),
    "events": flags.DEFINE_integer("events", None, "Plan: events per user, with --num_items; default: 20."),
    "programs": flags.DEFINE_list("programs", [], "Plan: which of training, evaluation and scoring to plan; default: all."),
    "price": flags.DEFINE_float("price", None, "Plan: price of a chip in dollars per hour; default: the list price of its cloud."),
}


def run(signals: Signals) -> None:
    """Runs the mode that the flags select. Raises InputError for flags that do not go together, and what the mode raises."""
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
        distributed.join(_JOB["coordinator"].value, _JOB["processes"].value, _JOB["process_id"].value, config.mesh, signals)
    workdir = to_path(_WORKDIR.value or Path("runs") / "-".join(filter(None, (Path(config_file).stem, variant))))
    mode, score_flags = _MODE.value, {name: flag.value for name, flag in _SCORE.items()}
    if mode != "train" and not (workdir / config_lib.CONFIG_FILE).exists():
        raise InputError(f"--workdir={workdir}: no run there to {mode}")
    if mode == "score":
        from iam_jax.serving.offline import ScoreRequest, score

        request = ScoreRequest(**score_flags, output=_OUTPUT.value, step=_STEP.value)
        return score(workdir, config, request, saved=config_file == config_lib.__file__, signals=signals)
    for name, value in score_flags.items():
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
        kind = "stand-alone" if _FORMAT.value == "stablehlo" else "Hugging Face"
        raise InputError(f"--mode=export writes a {kind} folder: --output=DIR is missing")
    if is_remote(_OUTPUT.value):
        raise InputError(f"--output={_OUTPUT.value}: --mode=export writes to local folders only")
    for note in api.export_run(config, workdir, _STEP.value, Path(_OUTPUT.value), _FORMAT.value, signals, _START):
        print(note)


def _check_job() -> None:
    """Checks the flags of a job. Raises InputError if they do not go together."""
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
        raise InputError(f"--multihost: --mode={_MODE.value} runs in one process")


def _compare() -> None:
    comparison = api.compare(_RUNS.value)
    print(comparison, end="")
    if _OUTPUT.value:
        comparison.write(_OUTPUT.value)
        print(f"wrote {to_path(_OUTPUT.value) / 'comparison.md'}, .txt and .json")


def _plan(config: config_lib.Config) -> None:
    from iam_jax.devices import topology

    values = {name: flag.value for name, flag in (_SCORE | _PLAN).items()}
    for name in ("users", "items", "candidates", "vectors", "baseline"):
        if values[name]:
            hint = f" (--mode=plan takes --num_{name}=N)" if name in ("users", "items") else ""
            raise InputError(f"--{name} is for --mode=score{hint}")
    if values["num_items"] is None:
        if given := [name for name in ("item_length", "num_users", "events") if values[name] is not None]:
            raise InputError(f"--{given[0]} needs --num_items=N: it describes assumed data, without which a plan reads the config's data")
    if values["top_k"] is not None and values["top_k"] < 1:
        raise InputError(f"--top_k={values['top_k']}: must be 1 or more")
    topology.prepare(values["topology"])

    from iam_jax.data.assumed import Assumption
    from iam_jax.planning import estimate, plan

    assumption = None
    if values["num_items"] is not None:
        defaults = {"item_length": config.data.item_tokens, "num_users": 100_000, "events": 20}
        chosen = {name: default if values[name] is None else values[name] for name, default in defaults.items()}
        assumption = Assumption(values["num_items"], chosen["item_length"], chosen["num_users"], chosen["events"])
    parts = tuple(values["programs"]) or plan.PARTS
    if unknown := set(parts) - set(plan.PARTS):
        raise InputError(f"--programs={min(unknown)}: must be one of {', '.join(plan.PARTS)}")
    result = plan.make_plan(config, plan.PlanRequest(values["topology"], assumption, parts, values["top_k"] or 100))
    facts = estimate.record(result, values["price"])
    print(estimate.report(result, facts), flush=True)
    verdict = estimate.verdict(result)
    if _OUTPUT.value:
        text = json.dumps(facts | {"verdict": verdict}, indent=2) + "\n"
        write_atomically(Path(_OUTPUT.value), lambda path: path.write_text(text, encoding="utf-8"))
    if verdict:
        _fail(verdict, 3)


def _config_file() -> str:
    """The path in --config, with the variant if there is one."""
    return config_flags.get_config_filename(flags.FLAGS["config"]) or ""


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags with absl, but reports an error in one line with exit code 2. Returns the program's name."""
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
            raise InputError(f"--config={_config_file()}: not a config file with a get_config() that starts from default_config()")
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING  # absl would raise it to INFO
        return rest
    except SystemExit:
        if any(argument.lstrip("-").startswith("help") for argument in argv[1:]):
            sys.exit(0)  # absl would end with 1
        _fail(f"--config={file}: the config file ended the program", 2)
    except (flags.Error, InputError) as error:
        text = str(error).strip()
        if "Traceback (most recent call last)" in text:  # ml_collections includes the traceback of a config file's error
            text = f"--config={file}: " * bool(file) + text.splitlines()[-1].removeprefix("iam_jax.errors.InputError: ")
        _fail(text, 2)
    except Exception as error:  # a config file is a program, which can raise anything
        text = re.sub(r" Other fields present: .*?(\\n|\n|$)", " ", str(error))  # they would fill the line
        _fail(f"--config={file or workdir}: {type(error).__name__}: {text}", 2)


def _given(argv: list[str], name: str) -> str | None:
    """The last value of --name=value or --name value in argv, before absl parses it; None if there is none."""
    found = None
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag in (f"-{name}", f"--{name}"):
            found = value if equals else following
    return found


def _with_config(argv: list[str], file: str) -> list[str]:
    """argv with another value for --config."""
    out = list(argv)
    for at, argument in enumerate(argv):
        if argument in ("-config", "--config"):
            out[at + 1] = file
        elif argument.startswith(("-config=", "--config=")):
            out[at] = f"--config={file}"
    return out


def _check_names(argv: list[str]) -> None:
    """Raises InputError for a flag of an unknown config field. (The error of ml_collections would name only the last part.)"""
    sections = config_lib.default_config().to_dict()
    fields = [f"--config.{name}" for name in config_lib.flatten(sections)]
    for name in (argument.partition("=")[0].partition("[")[0] for argument in argv[1:]):
        if name.startswith("--config.") and name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise InputError(f"{name} is not a config field{f'; did you mean {close[0]}?' if close else ''}")


def _fail(error: Exception | str, code: int) -> NoReturn:
    """Prints the error in one line and exits, together with the other processes of the job."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    if distributed.processes() > 1:
        distributed.exit_process(code)
    sys.exit(code)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error and its causes. (Libraries wrap the errors of collectives.)"""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _fail_job(error: Exception) -> NoReturn:
    """Exits after an unexpected error in a job of several processes. If another process has died, this error comes from a collective."""
    import jax

    if any(isinstance(cause, jax.errors.JaxRuntimeError) for cause in _causes(error)):
        message = f"a computation failed, perhaps because another process of the job died: {' '.join(str(error).split())}"
        print(f"error: process {jax.process_index()}: {message}", file=sys.stderr)
        distributed.exit_process(distributed.FAILED, with_others=False)
    traceback.print_exception(error)
    distributed.exit_process(1, with_others=False)


def _run_with_permissions(signals: Signals) -> None:
    """Calls `run`. Raises InputError if a file or folder must not be read or written."""
    try:
        run(signals)
    except PermissionError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error


def _main(_: list[str]) -> None:
    keep_freed_memory()
    signals = Signals()
    signals.install()
    try:
        try:
            _run_with_permissions(signals)
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
            print("stopped; run the same command again to continue", file=sys.stderr)
        distributed.exit_process(75)
    except Exception as error:
        if distributed.processes() == 1:
            raise
        _fail_job(error)


if __name__ == "__main__":
    app.run(_main, flags_parser=_parse)

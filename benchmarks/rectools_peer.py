"""Trains SASRec of RecTools on our training events and ranks with our evaluator, for sasrec.py.

RecTools' external ids of users and items are our indices. Its internal item numbers start at 1, since 0 is the padding, and only items with
training events have one.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

from iam_jax.config import Config
from iam_jax.data.prepare import Prepared
from iam_jax.data.splits import TEST, TRAIN, Events
from iam_jax.devices.mesh import make_mesh, spread_rows
from iam_jax.errors import InputError
from iam_jax.ranking.evaluate import Evaluator, evaluate_all, summarize, validation_subset

for _name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # hides the list of devices that are not available
warnings.filterwarnings("ignore", module="rectools|pytorch_lightning|pydantic")

RATES = [1e-3, 3e-3, 3.33e-4]  # learning rates to try, as launch/reproduce.py does for our SASRec


class SharedCallback(Callback):
    """A callback that is not copied when RecTools makes a deep copy of its trainer."""

    def __deepcopy__(self, memo):
        return self


def dataset_of(events: Events, chosen: np.ndarray) -> Dataset:
    """Makes a dataset of the chosen events. RecTools sorts by time, so times are our indices, which also keep our order of ties."""
    columns = {Columns.User: events.user[chosen], Columns.Item: events.item[chosen], Columns.Weight: 1.0}
    return Dataset.construct(pd.DataFrame(columns | {Columns.Datetime: pd.to_datetime(chosen, unit="s")}))


def fit(config: Config, args: argparse.Namespace, events: Events, callback: Callback, batch: int, seed: int, rate: float) -> SASRecModel:
    """Trains a model with the sizes of `config` on the training events until `callback` stops the trainer."""
    torch.set_num_threads(args.threads)
    seed_everything(seed, verbose=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    model = SASRecModel(
        n_blocks=len(config.schedule.relations),
        n_heads=config.model.heads,
        n_factors=config.model.width,
        dropout_rate=config.model.dropout if args.dropout is None else args.dropout,
        session_max_len=args.session,
        loss="softmax",
        lr=rate,
        batch_size=batch,
        recommend_torch_device="cpu",
        get_trainer_func=lambda: Trainer(max_epochs=-1, accelerator="cpu", devices=1, callbacks=[callback], **quiet),
    )
    return model.fit(dataset_of(events, np.flatnonzero(events.label == TRAIN)))


class PeerEvaluator(Evaluator):
    """Our evaluator with the vectors of RecTools' lightning module in its current state. The arguments `params` are ignored."""

    def __init__(self, config: Config, prepared: Prepared, module):
        super().__init__(None, config, prepared, make_mesh(config.mesh))
        self._session = module.data_preparator.session_max_len
        self._module, events, preparator = module, prepared.events, module.data_preparator
        self.number_I = np.zeros(len(events.item_ids), np.int64)  # RecTools' internal number of each item, or 0
        trained = preparator.get_known_item_ids().astype(np.int64)
        self.number_I[trained] = preparator.get_known_items_sorted_internal_ids()
        self._readable = np.flatnonzero(self.number_I[events.item] > 0)  # events whose item has a number

    def _model(self):
        self._module.eval()  # dropout off
        return self._module.torch_model

    @torch.inference_mode()
    def peer_vectors(self) -> np.ndarray:
        """Returns [I, E] float32. Items without a number get zeros, like items without training events in our own models."""
        model = self._model()
        vectors = model.similarity_module.item_tower_forward(model.item_model.get_all_embeddings()).numpy()
        return np.where(self.number_I[:, None] > 0, vectors[self.number_I], 0).astype(np.float32)

    def item_vectors(self, params, leading_XD):
        return spread_rows(self.mesh, self.peer_vectors())

    @torch.inference_mode()
    def history_vectors(self, params, targets, leading_XD=None, poll=lambda: None, label="") -> np.ndarray:
        """Returns [n, E] float32, from the last `session_max_len` events before each target whose item has a number. Without any: zeros."""
        model, events, parts = self._model(), self.prepared.events, []
        embeddings = model.item_model.get_all_embeddings()
        first = events.offsets[np.searchsorted(events.offsets, targets, side="right") - 1]
        begins, ends = np.searchsorted(self._readable, first), np.searchsorted(self._readable, targets)
        for start in range(0, len(targets), 256):
            poll()
            bounds = list(zip(begins[start : start + 256], ends[start : start + 256], strict=True))
            x = np.zeros((len(bounds), self._session), np.int64)
            for row, (begin, end) in enumerate(bounds):
                session = self.number_I[events.item[self._readable[max(begin, end - self._session) : end]]]
                x[row, self._session - len(session) :] = session
            states = model.encode_sessions({"x": torch.from_numpy(x)}, embeddings)[:, -1]
            parts.append(model.similarity_module.session_tower_forward(states).numpy() * (x != 0).any(1, keepdims=True))
        return np.concatenate(parts).astype(np.float32)


def same_recommendations(model: SASRecModel, evaluator: PeerEvaluator, users: int) -> dict:
    """Checks for a sample of test events that the model's own `recommend` gives the top 10 of the evaluator's vectors.

    "equal" allows for rounding: rank by rank, our scores of its items must equal our ten best scores.
    """
    events, known_I = evaluator.prepared.events, evaluator.number_I > 0
    targets = events.targets(TEST)
    _, first = np.unique(events.user[targets], return_index=True)  # one event per user, since `recommend` takes users
    targets = np.sort(np.random.default_rng(0).choice(targets[first], min(users, len(first)), replace=False))
    begins = events.offsets[events.user[targets]]
    readable = [known_I[events.item[begin:end]].any() for begin, end in zip(begins, targets, strict=True)]
    begins, targets = begins[readable], targets[readable]
    if not len(targets):
        raise InputError("no test event has a history that RecTools can read")
    history = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, targets, strict=True)])
    users_of_targets = events.user[targets]
    found = model.recommend(users=users_of_targets, dataset=dataset_of(events, history), k=10, filter_viewed=True)
    lists = {user: part.sort_values(Columns.Rank)[Columns.Item].to_numpy() for user, part in found.groupby(Columns.User)}
    scores = evaluator.history_vectors(None, targets).astype(np.float64) @ evaluator.peer_vectors().T.astype(np.float64)
    largest, identical = 0.0, 0
    for user, score, begin, end in zip(users_of_targets, scores, begins, targets, strict=True):
        score[~known_I], score[events.item[begin:end]] = -np.inf, -np.inf
        best = np.argsort(-score, kind="stable")[: min(10, np.isfinite(score).sum())]
        theirs = lists.get(user, np.array([], int))
        identical += np.array_equal(best, theirs)
        if len(theirs) != len(best):
            largest = np.inf
        elif len(best):
            largest = max(largest, float(np.abs(score[theirs] - score[best]).max() / np.abs(score[best]).max()))
    return {"users": len(targets), "identical": int(identical), "largest_relative_difference": largest, "equal": bool(largest <= 1e-5)}


class ValidationCallback(SharedCallback):
    """Validates, keeps the weights of the best epoch, and stops the training after `minutes`, args.epochs or args.patience."""

    def __init__(self, config: Config, prepared: Prepared, args: argparse.Namespace, seed: int, minutes: float):
        self.config, self.prepared, self.args, self.seed, self.max_minutes = config, prepared, args, seed, minutes
        self.targets = validation_subset(prepared.events, config)
        if not len(self.targets):
            raise InputError("there are no validation events, which are needed to select the best epoch")
        self.history, self.best, self.tokens = [], -1.0, 0

    def on_train_start(self, trainer, module) -> None:
        self.start, self.evaluator = time.monotonic(), PeerEvaluator(self.config, self.prepared, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, number) -> None:
        self.tokens += int((batch["x"] != 0).sum())
        self.minutes, self.steps = (time.monotonic() - self.start) / 60, trainer.global_step
        trainer.should_stop |= 0 < self.max_minutes <= self.minutes

    def on_train_epoch_end(self, trainer, module) -> None:
        args, metric, epoch = self.args, self.config.eval.metric, trainer.current_epoch + 1
        trainer.should_stop |= 0 < args.epochs <= epoch
        if epoch % args.eval_epochs and not trainer.should_stop:
            return
        try:
            ranks = self.evaluator.rank(None, self.targets, label="validation")
        except FloatingPointError as error:
            raise InputError(f"RecTools, seed {self.seed}, epoch {epoch}: {error}") from error
        module.train()
        value = summarize(self.prepared, self.config, self.targets, ranks)[metric]
        self.minutes = (time.monotonic() - self.start) / 60
        self.history.append({"epoch": epoch, "step": self.steps, "minutes": self.minutes, metric: value})
        if value > self.best:
            self.best, self.best_step, self.best_at = value, self.steps, len(self.history)
            self.weights = {name: x.clone() for name, x in module.torch_model.state_dict().items()}
        trainer.should_stop |= 0 < args.patience <= len(self.history) - self.best_at
        print(f"seed {self.seed}, epoch {epoch}, {self.minutes:.1f} minutes: validation {metric} {value:.4f}", flush=True)


def choose_rate(config: Config, prepared: Prepared, args: argparse.Namespace, record: dict, save: Callable[[], None]) -> float:
    """Returns the learning rate with the best validation after args.trial_minutes with seed 0.

    The rates are args.learning_rate, or RATES; a single rate is returned without a trial. record["trials"] holds finished trials; every new
    trial is appended, and `save` is called.
    """
    rates = args.learning_rate or RATES
    if len(rates) == 1:
        return rates[0]
    for rate in rates[len(record["trials"]) :]:
        print(f"trying learning rate {rate:g} for {args.trial_minutes:g} minutes", flush=True)
        callback = ValidationCallback(config, prepared, args, 0, args.trial_minutes)
        fit(config, args, prepared.events, callback, args.batch_size[0], 0, rate)
        trial = {"learning_rate": rate, config.eval.metric: callback.best, "steps": callback.steps, "minutes": callback.minutes}
        record["trials"].append(trial)
        save()
    return max(record["trials"], key=lambda trial: trial[config.eval.metric])["learning_rate"]


def train_seed(config: Config, prepared: Prepared, args: argparse.Namespace, seed: int, rate: float, folder: Path) -> dict:
    """Trains one seed, ranks validation and test events with the best weights, and writes evaluation.json, ranks.parquet and run.json.

    Returns the validations and the result of `same_recommendations`.
    """
    callback = ValidationCallback(config, prepared, args, seed, args.minutes)
    model = fit(config, args, prepared.events, callback, args.batch_size[0], seed, rate)
    model.torch_model.load_state_dict(callback.weights)
    check = same_recommendations(model, callback.evaluator, args.check)
    parameters = sum(x.numel() for x in model.torch_model.parameters())
    cost = {"parameters": parameters, "trained": parameters, "steps": callback.steps, "tokens_seen": callback.tokens}
    cost |= {"minutes": callback.minutes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(cost, indent=2) + "\n", encoding="utf-8")
    evaluate_all(callback.evaluator, None, callback.best_step, folder)
    return {"validations": callback.history, "recommend": check}

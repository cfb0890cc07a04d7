"""The checks of a config: the range of each field, and fields that contradict each other."""

import re
from typing import TYPE_CHECKING

from iam_jax.errors import InputError
from iam_jax.registry import SOURCES

if TYPE_CHECKING:
    from iam_jax.config import Config


def check(config: "Config") -> None:
    """Raises InputError for the first field that is out of range or contradicts another field. The error names the field and its value."""
    data, model, objective, optimizer, train, evaluation = (
        config.data, config.model, config.objective, config.optimizer, config.train, config.eval,
    )  # fmt: skip

    def require(condition: bool, field: str, message: str) -> None:
        if not condition:
            section, _, name = field.rpartition(".")
            value = config
            for part in [*filter(None, section.split(".")), name]:
                value = getattr(value, part)
            raise InputError(f"config.{field} = {value!r}: {message}")

    def choice(field: str, value: str, *options: str) -> None:
        require(value in options, field, f"must be one of {', '.join(options)}")

    choice("data.source", data.source, *SOURCES)
    choice("data.untitled", data.untitled, "error", "drop", "id")
    choice("data.ties", data.ties, "hash", "file", "item")
    choice("data.duplicates", data.duplicates, "keep", "drop")
    choice("data.split", data.split, "leave_one_out", "temporal")
    SOURCES[data.source].check(data)
    for field, value in (("k_core", data.k_core), ("last_n", data.last_n)):
        require(value >= 0, f"data.{field}", "must be 0 or more")
    require(0 <= data.unseen_items < 1, "data.unseen_items", "must be in [0, 1)")
    if data.split == "temporal":
        for field, value in (("t1", data.t1), ("t2", data.t2)):
            require(bool(value), f"data.{field}", "a temporal split needs data.t1 and data.t2")
    require(data.vocabulary >= 256, "data.vocabulary", "a byte-level BPE has at least 256 tokens")
    require(data.item_tokens >= 1, "data.item_tokens", "must be 1 or more")
    require(data.context_items >= 1, "data.context_items", "must be 1 or more, because a target is predicted from the item before it")
    require(data.vector_size >= 1, "data.vector_size", "must be 1 or more")
    choice("data.vector_transform", data.vector_transform, "none", "center", "whiten")
    require(data.vectors != "tfidf+", "data.vectors", "a path must follow tfidf+")
    transform = bool(data.vectors) or data.vector_transform == "none"
    require(transform, "data.vector_transform", "needs data.vectors")
    require(data.row_tokens >= 2, "data.row_tokens", "must be 2 or more")
    for field in ("users", "products"):
        require(getattr(data.synthetic, field) >= 10, f"data.synthetic.{field}", "must be 10 or more")
    require(data.synthetic.events_per_user >= 3, "data.synthetic.events_per_user", "must be 3 or more")
    require(data.synthetic.seed >= 0, "data.synthetic.seed", "must be 0 or more")
    by_id = data.tokenizer == "id"
    for field in ("prompt", "separator", "suffix", "shuffled_titles"):
        require(not (by_id and getattr(data, field)), f"data.{field}", "needs text tokens, but data.tokenizer is 'id'")
    pretrained = bool(model.pretrained)
    require(not pretrained or data.tokenizer == "pretrained", "data.tokenizer", "must be 'pretrained' with model.pretrained")
    require(pretrained or data.tokenizer != "pretrained", "model.pretrained", "data.tokenizer = 'pretrained' needs the folder of a model")

    schedule = config.schedule
    require(model.width >= 1, "model.width", "must be 1 or more")
    require(model.heads >= 1, "model.heads", "must be 1 or more")
    require(model.head_size >= 0, "model.head_size", "must be 0 or more")
    require(model.head_size > 0 or model.width % model.heads == 0, "model.heads", f"must divide model.width = {model.width}")
    head_size = model.head_size or model.width // model.heads
    rotary = model.positions == "rotary"
    require(not rotary or head_size % 2 == 0, "model.head_size", f"rotary positions need an even head size, not {head_size}")
    kv_heads_fit = model.kv_heads >= 0 and model.heads % (model.kv_heads or 1) == 0
    require(kv_heads_fit, "model.kv_heads", f"must divide model.heads = {model.heads}")
    require(model.mlp_width >= 0, "model.mlp_width", "must be 0 or more")
    for field in ("norm_epsilon", "rope_theta"):
        require(getattr(model, field) > 0, f"model.{field}", "must be above 0")
    choice("model.mlp", model.mlp, "gated", "plain")
    choice("model.activation", model.activation, "silu", "gelu", "relu")
    choice("model.norm", model.norm, "rms", "layer")
    choice("model.positions", model.positions, "rotary", "learned")
    choice("model.token_embeddings", model.token_embeddings, "random", "svd", "svd_frozen")
    from_scratch = model.token_embeddings == "random" or not (pretrained or by_id)
    require(from_scratch, "model.token_embeddings", "must be 'random' with model.pretrained or data.tokenizer = 'id'")
    choice("model.item_input", model.item_input, "none", "table", "own")
    item_level = schedule.item_level
    choice("model.content_input", model.content_input, "state", "vector")
    content = item_level and config.uses_text
    needed = "needs item-level layers and content in the items' vectors (objective.vectors = 'text' or 'both')"
    require(model.content_input == "state" or content, "model.content_input", needed)
    for field in ("item_width", "item_heads"):
        require(getattr(model, field) >= 0, f"model.{field}", "must be 0 or more")
        require(item_level or not getattr(model, field), f"model.{field}", "needs item-level layers (the mark | in model.schedule)")
    require(bool(model.item_width) or not model.item_heads, "model.item_heads", "needs model.item_width")
    heads = model.item_shape.heads
    require(model.item_width % heads == 0, "model.item_width", f"must be divisible by the number of heads, {heads}")
    even = not model.item_width or model.item_width // heads % 2 == 0
    require(even, "model.item_width", f"rotary positions need an even head size, not {model.item_width // heads}")
    require(model.item_dropout < 1, "model.item_dropout", "must be below 1")
    require(item_level or model.item_dropout < 0, "model.item_dropout", "needs item-level layers (the mark | in model.schedule)")
    for field in ("drop_identity", "drop_content"):
        require(0 <= getattr(model, field) < 1, f"model.{field}", "must be in [0, 1)")
    together = model.drop_identity + model.drop_content <= 1
    require(together, "model.drop_content", f"with model.drop_identity = {model.drop_identity:g}, the sum must be at most 1")
    identity = (config.has_table or model.item_input == "own") and objective.vectors != "table"
    require(identity or not model.drop_identity, "model.drop_identity", "needs an item table and content in the items' vectors")
    content = objective.vectors != "text"
    require(content or not model.drop_content, "model.drop_content", "without content, vectors need the item table (objective.vectors)")
    require(item_level or not model.drop_content, "model.drop_content", "needs item-level layers (the mark | in model.schedule)")
    needed = data.context_items + 1 + bool(data.prompt) + bool(data.suffix)
    row_fits = data.row_items >= needed
    require(row_fits, "data.row_items", f"prompt, suffix and data.context_items + 1 items need {needed}")
    if item_level:
        require(rotary, "model.positions", "item-level layers (the mark | in model.schedule) need rotary positions")
        require(model.item_states != "off", "model.item_states", "item-level layers read the states of whole items")
        require(objective.token == 0, "objective.token", "no token is predicted behind the mark | of model.schedule")
        require(objective.text_layers == "leading", "objective.text_layers", "only the layers before the mark | of model.schedule see text")
    require(model.item_input != "table" or config.has_table or model.tie_items, "model.item_input", "there is no item table")
    by_score = evaluation.ranking == "item"
    require(model.item_input == "none" or by_score, "model.item_input", "must be 'none' with eval.ranking = 'likelihood'")
    require(not data.vectors or by_score, "data.vectors", "must be empty with eval.ranking = 'likelihood'")
    choice("model.inter_positions", model.inter_positions, "token", "item")
    choice("model.dtype", model.dtype, "float32", "bfloat16")
    choice("model.attention", model.attention, "auto", "reference", "tpu", "gpu")
    choice("model.item_states", model.item_states, "auto", "on", "off")
    require(model.inter_positions == "token" or rotary, "model.inter_positions", "'item' needs rotary positions")
    item_states = model.item_states != "on" or config.states_by_item
    require(item_states, "model.item_states", "'on' needs rotary positions and a schedule that begins with intra")
    learned = model.max_positions
    require(learned >= 0, "model.max_positions", "must be 0 or more")
    row_fits = rotary or not learned or learned >= data.row_tokens
    require(row_fits, "data.row_tokens", f"the model has only {learned} learned positions (model.max_positions)")
    choice("model.rope_scaling", model.rope_scaling, "none", "linear", "llama3")
    for field in ("rope_factor", "rope_low", "rope_original"):
        require(getattr(model, field) > 0, f"model.{field}", "must be above 0")
    require(model.rope_high > model.rope_low, "model.rope_high", f"must be above model.rope_low = {model.rope_low:g}")
    choice("model.frozen_dtype", model.frozen_dtype, "float32", "bfloat16")
    lora = model.lora
    require(lora.rank >= 0, "model.lora.rank", "must be 0 or more")
    require(lora.rank == 0 or pretrained, "model.lora.rank", "adapters need model.pretrained")
    require(lora.alpha > 0, "model.lora.alpha", "must be above 0")
    require(0 <= lora.dropout < 1, "model.lora.dropout", "must be in [0, 1)")
    for field, pattern in (("model.lora.targets", lora.targets), ("train.frozen", train.frozen), ("train.trained", train.trained)):
        try:
            re.compile(pattern)
        except re.error as error:
            require(False, field, f"not a regular expression: {error}")
    require(train.frozen == "auto" or pretrained, "train.frozen", "only pretrained parameters can be frozen, but model.pretrained is empty")
    for field, default in (("train.trained", not train.trained), ("model.frozen_dtype", model.frozen_dtype == "float32")):
        require(config.freezes or default, field, "no parameter is frozen (see model.pretrained, model.lora.rank and train.frozen)")
    require(0 <= model.dropout < 1, "model.dropout", "must be in [0, 1)")
    require(not model.tie_items or by_id, "model.tie_items", "needs data.tokenizer = 'id'")
    require(not model.tie_items or objective.vectors == "table", "model.tie_items", "needs objective.vectors = 'table'")

    choice("objective.vectors", objective.vectors, "table", "text", "both")
    choice("objective.text_layers", objective.text_layers, "leading", "all")
    choice("objective.softmax", objective.softmax, "auto", "full", "sampled", "cached")
    choice("eval.ranking", evaluation.ranking, "item", "likelihood")
    for field in ("item", "token"):
        require(getattr(objective, field) >= 0, f"objective.{field}", "must be 0 or more")
    by_item = evaluation.ranking == "item"
    require(
        objective.item > 0 or not by_item,
        "objective.item",
        "must be above 0, because eval.ranking = 'item' ranks by the item objective's scores",
    )
    require(
        objective.token > 0 or by_item,
        "objective.token",
        "must be above 0, because eval.ranking = 'likelihood' ranks by the text's likelihood",
    )
    text, token = objective.vectors != "table", objective.token
    require(not (by_id and token), "objective.token", "needs text tokens, but data.tokenizer is 'id'")
    require(
        not (by_id and text and config.reads_text), "objective.vectors", "vectors from text need text tokens, but data.tokenizer is 'id'"
    )
    require(not (token and schedule.sees_ahead), "objective.token", f"the relation {schedule.sees_ahead} sees the token to be predicted")
    text_layers = not config.uses_text or config.reads_text or bool(data.vectors)
    require(text_layers, "objective.text_layers", "'leading' needs a schedule that begins with intra layers")
    softmax = objective.softmax != "cached" or config.uses_text
    require(softmax, "objective.softmax", "'cached' needs objective.item and objective.vectors = 'text' or 'both'")
    require(objective.negatives >= 0, "objective.negatives", "must be 0 or more")
    drawn = config.softmax != "cached" or objective.negatives > 0
    require(drawn, "objective.negatives", "must be 1 or more with objective.softmax = 'cached'")
    require(0 <= objective.negatives_power <= 2, "objective.negatives_power", "must be in [0, 2]")
    for field in ("refresh_steps", "chunk"):
        require(getattr(objective, field) >= 1, f"objective.{field}", "must be 1 or more")

    require(optimizer.learning_rate > 0, "optimizer.learning_rate", "must be above 0")
    for field in ("warmup_steps", "decay_steps", "weight_decay", "clip_norm", "final_scale"):
        require(getattr(optimizer, field) >= 0, f"optimizer.{field}", "must be 0 or more")
    warmup = optimizer.warmup_steps
    decay = optimizer.decay_steps == 0 or optimizer.decay_steps > warmup
    require(decay, "optimizer.decay_steps", f"must be 0 or above optimizer.warmup_steps = {warmup}")
    for field in ("table_decay", "content_decay"):
        value = getattr(optimizer, field)
        require(value >= 0 or value == -1, f"optimizer.{field}", "must be 0 or more, or -1")
    for field in ("b1", "b2"):
        require(0 <= getattr(optimizer, field) < 1, f"optimizer.{field}", "must be in [0, 1)")
    require(optimizer.epsilon > 0, "optimizer.epsilon", "must be above 0")
    require(optimizer.accumulate >= 1, "optimizer.accumulate", "must be 1 or more")
    require(train.steps >= 0, "train.steps", "must be 0 or more")
    for field in ("batch_rows", "eval_every", "save_every", "keep"):
        require(getattr(train, field) >= 1, f"train.{field}", "must be 1 or more")
    require(train.patience >= 0, "train.patience", "must be 0 or more")
    for field in ("max_minutes", "skip_limit"):
        require(getattr(train, field) >= 0, f"train.{field}", "must be 0 or more")
    require(0 <= train.seed < 2**31, "train.seed", "must be in [0, 2**31)")
    micro_batches = optimizer.accumulate
    require(train.batch_rows % micro_batches == 0, "train.batch_rows", f"must be divisible by optimizer.accumulate = {micro_batches}")

    sizes = {field: getattr(config.mesh, field) for field in ("data", "fsdp", "tensor")}
    for field, size in reversed(sizes.items()):
        require(size >= 1 or size == -1, f"mesh.{field}", "must be 1 or more, or -1")
        single = size != -1 or list(sizes.values()).count(-1) == 1
        require(
            single, f"mesh.{field}", "only one of mesh.data (-1 by default), mesh.fsdp and mesh.tensor can be -1 (all remaining devices)"
        )
    require(config.mesh.heartbeat_seconds >= 1, "mesh.heartbeat_seconds", "must be 1 or more")
    require(config.mesh.hang_minutes >= 0, "mesh.hang_minutes", "must be 0 or more")
    cut_offs = bool(evaluation.ks) and all(type(k) is int and k >= 1 for k in evaluation.ks)
    require(cut_offs and len(set(evaluation.ks)) == len(evaluation.ks), "eval.ks", "must be distinct cut-offs of 1 or more")
    names = [f"{name}@{k}" for name in ("hr", "precision", "ndcg", "mrr") for k in evaluation.ks]
    choice("eval.metric", evaluation.metric, *names)
    choice("eval.fusion", evaluation.fusion, "", "transitions")
    require(by_item or not evaluation.fusion, "eval.fusion", "must be empty with eval.ranking = 'likelihood'")
    for field in ("batch_rows", "chunk_items", "resamples"):
        require(getattr(evaluation, field) >= 1, f"eval.{field}", "must be 1 or more")
    for field in ("validation_users", "seed", "item_states_gib"):
        require(getattr(evaluation, field) >= 0, f"eval.{field}", "must be 0 or more")
    for field in ("part_users", "batch_rows"):
        require(getattr(config.score, field) >= 1, f"score.{field}", "must be 1 or more")
    require(config.log.every >= 1, "log.every", "must be 1 or more")
    steps = re.fullmatch(r"(\d+):(\d+)", config.log.profile)
    profile = not config.log.profile or bool(steps and int(steps[1]) < int(steps[2]))
    require(profile, "log.profile", "must be FIRST:STOP, two step numbers with FIRST < STOP")

"""The documentation agrees with the program: pages, commands, configs, generated files, and the Python on the pages, which is run."""

import dataclasses
import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags

import iam_jax
from iam_jax import main  # noqa: F401  (it defines the flags)
from iam_jax.config import Config, resolve
from iam_jax.errors import InputError
from iam_jax.model.pretrained.families import FAMILIES
from iam_jax.ranking.choice import BASELINES
from iam_jax.registry import SOURCES
from iam_jax.relations import RELATIONS
from iam_jax.training.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README = PAGES["README.md"]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
OTHERS = {"strict", "help", "config.section.key"}  # of mkdocs; of absl; a pattern
NAMES = {path.stem for path in CONFIGS}
# What the pages' Python trains, so small that it takes seconds.
SMALL = {
    "data.synthetic.users": 60,
    "data.synthetic.products": 50,
    "data.synthetic.events_per_user": 6.0,
    "data.vocabulary": 300,
    "data.row_tokens": 64,
    "data.context_items": 2,
    "model.width": 16,
    "model.heads": 2,
    "model.item_states": "off",  # one program for all batches
    "objective.negatives": 16,
    "optimizer.warmup_steps": 0,
    "train.steps": 2,
    "train.batch_rows": 4,
    "eval.validation_users": 20,
    "eval.resamples": 20,
    "log.progress": False,
    "log.tensorboard": False,
}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fields(section, prefix="") -> Iterator[str]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        yield from fields(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else [f"{prefix}{field.name}"]


# ---- what scripts make


def test_configuration_page_is_current():
    page = load(ROOT / "docs" / "make_configuration.py").make_page()
    assert PAGES["configuration.md"] == page, "run docs/make_configuration.py"
    assert re.findall(r"^\| `([a-z0-9_.]+)` \|", page, re.M) == list(fields(Config()))


def test_picture_of_the_relations_is_current():
    picture = (ROOT / "docs" / "images" / "relations.svg").read_text(encoding="utf-8")
    assert picture == load(ROOT / "docs" / "make_masks.py").draw(), "run docs/make_masks.py"


# ---- configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_resolve_and_have_their_command(path):
    module = load(path)
    config = module.get_config()
    if config.data.source == "table":
        config.data.path = "somewhere"
    resolve(config)
    assert f"python -m iam_jax.main --config=configs/{path.name}" in module.__doc__
    assert "Cost" in module.__doc__ and "result" in module.__doc__.lower()


@pytest.mark.parametrize("name", ["llama3_1b_amazon", "qwen3_0_6b_amazon", "gpt2_ml1m", "table_pretrained"])
def test_configs_of_pretrained_models_have_two_variants(name):
    module = load(ROOT / "configs" / f"{name}.py")
    made = {}
    for variant in ("lora", "full"):
        config = module.get_config(variant)
        config.data.path = "somewhere"
        made[variant] = resolve(config)
        # The folder has no default, and nothing is frozen or trained but by the rule of train.frozen = "auto".
        assert made[variant].model.pretrained and made[variant].train.frozen == "auto" and made[variant].train.trained == ""
        assert [stage.inserted[-2:] for stage in made[variant].schedule.stages] == [(True, True)]
    lora, full = made["lora"], made["full"]
    assert lora.model.lora.rank > 0 and lora.model.frozen_dtype == "bfloat16" and full.model.lora.rank == 0
    assert lora.optimizer.learning_rate > full.optimizer.learning_rate
    assert module.get_config() == module.get_config("lora") != module.get_config("full")
    folder = " --config.data.path=DIR" if name == "table_pretrained" else ""
    for variant in ("", ":full"):
        command = f"python -m iam_jax.main --config=configs/{name}.py{variant}{folder} --config.model.pretrained="
        assert command in module.__doc__
    with pytest.raises(InputError, match="variant 'half': must be lora or full"):
        module.get_config("half")


# ---- README and pages


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_ci_runs_the_readmes_test_command():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv") and "pytest" in line]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_code_page_names_every_module():
    files = [path for path in (ROOT / "iam_jax").rglob("*.py") if not path.name.startswith("__")]
    assert files and not [path.relative_to(ROOT) for path in files if path.name not in PAGES["code.md"]]


def test_every_page_has_its_place_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r": (\w+\.md)$", navigation, re.M)) == sorted(PAGES.keys() - {"README.md"})


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_of_a_page_exist(page):
    named = re.findall(r"(?:iam_jax|configs|launch|benchmarks|tests|docs)/[\w./]*\w\.(?:py|sh|md|sbatch|yaml)\b", PAGES[page])
    named += re.findall(r"`((?:iam_jax|launch|benchmarks|tests|docs)/[\w/]*)`", PAGES[page])
    assert not [name for name in named if not (ROOT / name).exists()]
    folder = ROOT if page == "README.md" else ROOT / "docs"
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if not link.startswith("http")]
    for link in links:
        path, _, anchor = link.partition("#")
        assert not path or (folder / path).exists(), link
        if anchor:
            assert anchor in anchors(PAGES[Path(path).name if path else page]), link


def anchors(text: str) -> set[str]:
    """The ids that mkdocs and GitHub give to headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


# ---- commands


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command on a page: in blocks, and in running text between backticks."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (shlex.split(part) for part in line.split("&&"))
    for span in re.findall(r"`((?:\S*python |\S*iam-jax |bash )[^`]+)`", text):
        yield shlex.split(span.replace("…", ""))


def test_the_commands_are_found():
    block = "```bash\nA=1 .venv/bin/iam-jax --config=demo \\\n  --workdir='a b' && python x.py\n```\n"
    text = block + "see `python launch/local.py -- --mode=train`"
    assert list(commands_of(text)) == [
        ["A=1", ".venv/bin/iam-jax", "--config=demo", "--workdir=a b"],
        ["python", "x.py"],
        ["python", "launch/local.py", "--", "--mode=train"],
    ]


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_have_flags_configs_and_scripts_that_exist(page):
    for words in commands_of(PAGES[page]):
        scripts = [word for word in words if re.fullmatch(r"(launch|benchmarks|docs)/\w+\.(py|sbatch)", word)]
        own = words.index("--") if "--" in words else len(words)
        given, rest = words[:own], words[own + 1 :]
        if scripts and scripts[0].endswith(".sbatch"):
            given, rest = [], [word for word in words if word.startswith("--") and word != "--dry-run"]
        if scripts:
            source = sources(ROOT / scripts[0])
            for word in given:
                name = word.partition("=")[0].removeprefix("--")
                assert not word.startswith("--") or re.search(rf'"(--)?{name}"|\b{name}=\(', source), words
            check_program_flags(rest)
        elif any(word.endswith("iam-jax") for word in words) or "iam_jax.main" in words:
            check_program_flags([word for word in words if word.startswith("--")])


def sources(script: Path) -> str:
    """The text of a script and of what it imports from its own folder."""
    text = script.read_text(encoding="utf-8")
    near = re.findall(r"^(?:import|from) (\w+)", text, re.M)
    return text + "".join((script.parent / f"{name}.py").read_text() for name in near if (script.parent / f"{name}.py").exists())


def check_program_flags(words: list[str]) -> None:
    """words: --name=value each, of iam_jax.main."""
    known = set(fields(Config()))
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name.startswith("config."):
            assert name.removeprefix("config.") in known, word
            continue
        assert name in flags.FLAGS, word
        if name == "config":
            config = value.partition(":")[0]
            assert config == "FILE" or config in NAMES or (ROOT / config).is_file(), word
            check_variant(value)
        if name in ("mode", "format") and re.fullmatch(r"\w+", value):
            assert value in flags.FLAGS[name].parser.enum_values, word


def check_variant(config: str) -> None:
    name, _, variant = config.partition(":")
    if variant:
        load(ROOT / "configs" / f"{Path(name).stem}.py").get_config(variant)


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_fields_that_a_page_mentions_exist(page):
    """In running text, between backticks: `--top_k`, `--config.data.path=DIR`, `train.max_minutes`."""
    known, sections = set(fields(Config())), tuple(f"{field.name}." for field in dataclasses.fields(Config))
    scripts = "".join(path.read_text(encoding="utf-8") for folder in ("launch", "benchmarks") for path in (ROOT / folder).glob("*.*"))
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    for span in re.findall(r"`([^`]+)`", prose):
        for flag in re.findall(r"^--([\w.-]+)", span):
            assert flag.removeprefix("config.") in known or flag in flags.FLAGS or f'"--{flag}"' in scripts or flag in OTHERS, span
        field = re.match(r"[a-z_]+\.[a-z0-9_.]+(?=$|[ =])", span)
        if field and field[0].startswith(sections) and not field[0].endswith((".py", ".json", ".safetensors")):
            assert field[0] in known, span


# ---- Python


def blocks_of(page: str) -> list[tuple[int, str]]:
    """(line, code) of the Python blocks of a page, without those behind `<!-- not run: reason -->`."""
    text = PAGES[page]
    found = re.finditer(r"(?P<skip><!-- not run: [^>]+ -->\n+)?^```python\n(?P<code>.*?)^```", text, re.M | re.S)
    return [(text.count("\n", 0, block.start("code")) + 1, block["code"]) for block in found if not block["skip"]]


RUN = [page for page in PAGES if blocks_of(page)]


def test_pages_with_python():
    assert {"README.md", "quickstart.md", "tutorial.md", "attention.md", "serving.md", "extending.md", "datasets.md"} <= set(RUN)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The working folder of a small demo."""
    workdir = tmp_path_factory.mktemp("trained") / "demo"
    iam_jax.train("demo", workdir, overrides=SMALL)
    return workdir


@pytest.fixture
def registries():
    """What a page registers is there for that page only."""
    found = (RELATIONS, SOURCES, OBJECTIVES, BASELINES, FAMILIES)
    before = [list(registry) for registry in found]
    yield
    for registry, names in zip(found, before, strict=True):
        for name in [name for name in registry if name not in names]:
            registry.unregister(name)


@pytest.mark.parametrize("page", RUN)
def test_python_of_a_page_runs(page, request, tmp_path, monkeypatch, registries):
    """Block after block, in a folder of their own, in which runs/demo is there; what they train is small."""
    blocks = blocks_of(page)
    if any("runs/demo" in code for _, code in blocks):
        shutil.copytree(request.getfixturevalue("demo"), tmp_path / "runs" / "demo")
    if any("iam_jax.train" in code for _, code in blocks):
        train = iam_jax.train

        def small_train(config, workdir, overrides=None):
            states = {"model.item_states": "auto"} if config == "table" else {}  # item-level layers need them
            return train(config, workdir, SMALL | states | (overrides or {}))

        monkeypatch.setattr(iam_jax, "train", small_train)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page}
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), names)

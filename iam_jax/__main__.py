"""The command `iam-jax`, and `python -m iam_jax`: both run `iam_jax.main` as `python -m iam_jax.main` does."""

import runpy


def cli() -> None:
    """Runs the command line with the arguments in `sys.argv`; ends with its exit code."""
    runpy.run_module("iam_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    cli()

"""The `finetune` command: declare options, import inside, call one function, print.

Results go to stdout (`--json` for machines), progress and warnings to stderr. Nothing heavy is
imported at the top, so that every `--help` answers at once.
"""

from __future__ import annotations

import click

from finetune import console
from finetune.cli import combine, data, export, fit, networks, runs


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="regraft", prog_name="finetune")
def cli() -> None:
    """Turn a folder of images into an evaluated classifier.

    \b
    Example:
      finetune fit photos/
    """


for command in (
    fit.fit, fit.advise, fit.preflight, fit.svm, fit.search, data.check, data.extract,
    data.cache, data.doctor,
    networks.backbones, networks.compare_backbones, networks.profile, runs.predict,
    runs.evaluate, runs.diagnose, runs.recipes, runs.runs, runs.track, runs.suggest,
    combine.ensemble, combine.forgetting, export.export,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """The console script."""
    console.guarded(cli, "finetune")

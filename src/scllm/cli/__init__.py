"""Command line for the functions and run directories of the library."""

from __future__ import annotations

from scllm.cli._app import app
from scllm.cli._demo import demo
from scllm.cli._genecorpus import genecorpus
from scllm.cli._info import info
from scllm.cli._train import finetune, pretrain, run
from scllm.cli._use import classify, embed

__all__ = ["app", "main"]

for command in (demo, pretrain, run, info, embed, finetune, classify, genecorpus):
    app.command()(command)


def main() -> None:
    """Run the command line."""
    app()

"""``scllm demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scllm.cli._app import Debug, Verbose
from scllm.cli._options import Device

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for figures, embedding and runs.")] = Path("scllm_demo"),
    device: Device = "auto",
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Pretrain, embed, fine-tune and classify with a tiny model on 700 blood cells, and compare with simple methods."""
    from scllm.cli._demonstration import demonstrate

    typer.echo(demonstrate(out, device=device))

"""``python -m scllm``: the command line."""

from __future__ import annotations

from scllm.cli import main

if __name__ == "__main__":
    main()

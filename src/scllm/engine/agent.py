"""torchrun's agent, which ends when its parent process ends: ``python -m scllm.engine.agent PARENT_PID OPTIONS``.

The agent ties itself to its parent after it has started. Doing that between fork and exec (``preexec_fn``) would be
unsafe in a parent with threads, such as a notebook.
"""

from __future__ import annotations

import os
import signal
import sys

from torch.distributed.run import main

from scllm.engine.ranks import tie_to_parent

if __name__ == "__main__":
    parent, *options = sys.argv[1:]
    tie_to_parent(signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit(f"The process {parent} that started this run has ended, so the run ends too.")
    main(options)

"""torchrun's agent, tied to the process that starts it: ``python -m scllm.engine.agent PARENT_PID OPTIONS``.

The agent ties itself once it runs: between fork and exec (``preexec_fn``) that would be unsafe in a parent with
threads, such as a notebook.
"""

from __future__ import annotations

import os
import sys

from torch.distributed.run import main

from scllm.engine.ranks import tie_to_parent

if __name__ == "__main__":
    parent, *options = sys.argv[1:]
    tie_to_parent()
    if os.getppid() != int(parent):
        sys.exit("the process that started this run is gone")
    main(options)

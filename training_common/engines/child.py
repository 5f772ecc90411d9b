"""Runs a module in a process that ends with its parent, for launchers whose own end would leave the worker behind.

python -m training_common.engines.child PARENT MODULE ARGUMENT...
"""

from __future__ import annotations

import runpy
import sys

from training_common.engines.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

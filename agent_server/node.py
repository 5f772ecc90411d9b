"""python -m agent_server.node [--settings FILE] [--slots N]: lends a machine to jobs on several."""

from agent_server.settings import load_settings
from training_common.engines.node import main

if __name__ == "__main__":
    main("agent_server.node", load_settings=load_settings, module="agent_server.worker")

"""python -m agent_server [--settings FILE]"""

from agent_server.server import build
from agent_server.settings import load_settings
from training_common.entry import main

if __name__ == "__main__":
    main("agent_server", load_settings=load_settings, build=build)

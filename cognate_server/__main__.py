"""python -m cognate_server [--settings FILE]"""

from cognate_server.server import build
from cognate_server.settings import load_settings
from training_common.entry import main

if __name__ == "__main__":
    main("cognate_server", load_settings=load_settings, build=build)

"""A node of the toy service.

python -m tests.support.toy_node --settings FILE --slots N
"""

from tests.support.toy_worker import load_settings
from training_common.engines.node import main

if __name__ == "__main__":
    main("tests.support.toy_node", load_settings=load_settings, module="tests.support.toy_worker")

"""Two processes of which the second never answers. The first ends with EX_TEMPFAIL once it has noticed.

python -m tests.support.silent_team SIZE_BYTES TIMEOUT_S
"""

import sys
import threading

from training_common.attempt import TeamBrokenError
from training_common.engines.processes import EX_TEMPFAIL, exit_at_once
from training_common.team import Team

if __name__ == "__main__":
    team = Team.join(timeout_s=float(sys.argv[2]))
    if not team.leads:
        threading.Event().wait()
    try:
        team.agree(lambda: "x" * int(sys.argv[1]))
    except TeamBrokenError:
        exit_at_once(EX_TEMPFAIL)

"""The only room that knows Ray: sessions, parallel passes, streams, workers.

What Ray reads from the environment when it is imported is set here, before any module of this package imports it.
"""

import atexit
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # stage 1 reports no AUC
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # as tracebacks; a search says in a line what happened
# A stopped trial that has workers of its own waits to be heard and never ends by itself: end it.
os.environ.setdefault("TUNE_FORCE_TRIAL_CLEANUP_S", "5")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

if not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & set(os.environ) and "ray" not in sys.modules:
    # A local Ray gets a token of its own, read when Ray is imported; too late where it was before, and Ray does as it
    # likes. Left to itself Ray keeps one in the home folder, and a later `ray start --head` would ask every
    # `ray job submit` for it.
    _token = Path(tempfile.mkdtemp(prefix="hpgr-ray-")) / "token"
    _token.write_text(secrets.token_hex(32))
    atexit.register(shutil.rmtree, _token.parent, ignore_errors=True)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_token)}

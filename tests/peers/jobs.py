"""Jobs of a peer, run by the interpreter of its own environment: `python jobs.py SCRIPT JOBS`.

SCRIPT has a function `run`, which does one job of the JSON list JOBS, a mapping, and says what it took. Each is
answered by a line `RESULT {"out": ..., ...}` with that, or by `RESULT {"out": ..., "error": ...}`.
"""

import json
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    run = runpy.run_path(sys.argv[1])["run"]
    for given in json.loads(Path(sys.argv[2]).read_text()):
        try:
            answer = run(given)
        except Exception as error:  # one recipe's failure is a result too
            answer = {"error": f"{type(error).__name__}: {error}"}
        print("RESULT " + json.dumps({"out": given["out"]} | answer), flush=True)

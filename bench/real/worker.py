"""Loop of a worker process: loads models and runs them on request, in one line of JSON each.

Imported by `ours.py` and `theirs.py`, which run in different environments: the standard library only.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """The largest resident memory of this process so far; mapped pages of files are included.

    Not `ru_maxrss`, which begins with the memory of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def serve(load: Callable[[dict[str, Any]], Any]) -> None:
    """Answers the requests on standard input until it ends.

    Args:
      load: Takes the specification in the first argument of the process, and returns an object with `num_bytes`, the
        size of the weights, and `run(index) -> (output, number of tokens, passes of the target)`.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    specification = json.loads(sys.argv[1])

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values | {"over_weights": peak_bytes() / system.num_bytes}) + "\n")
        answers.flush()

    cpu = time.process_time()
    system = load(specification)
    # From the start of the process, so that imports are included.
    answer(seconds=time.time() - specification["began"], cpu=time.process_time() - cpu)
    for line in sys.stdin:
        request = json.loads(line)
        began, cpu = time.perf_counter(), time.process_time()
        output, num_tokens, passes = system.run(request["index"])
        result = {"output": output, "num_tokens": num_tokens, "passes": passes}
        answer(seconds=time.perf_counter() - began, cpu=time.process_time() - cpu, **result)

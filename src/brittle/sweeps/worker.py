"""A worker process: jobs in by standard input, what came of them out by standard output, one line each."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading

from brittle.sweeps.job import Code
from brittle.sweeps.work import perform


def serve() -> None:
    """Do jobs until standard input is closed; then end at once, in the midst of a job as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the driver ends this one
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a job prints must not come between replies
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        request = json.loads(requests.get())
        replies.write(json.dumps(perform(Code(**request["code"]), request["arguments"])) + "\n")
        replies.flush()


def _listen(requests: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    # The driver is gone. It may be started again, and then another worker has this job: this one must not go on.
    os._exit(0)

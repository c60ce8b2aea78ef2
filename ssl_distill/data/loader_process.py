"""What a loader process does when a scheduler asks a whole job to stop."""

import multiprocessing
import os
import signal
import threading

_REQUESTS = {signal.SIGTERM, signal.SIGUSR1} if hasattr(signal, "sigwaitinfo") else set()  # not on macOS and Windows


def outlive_requests(worker_id: int) -> None:
    """A `worker_init_fn`: only the training process ends a loader process.

    SLURM and others signal all processes of a job, Ctrl-C all of a terminal. The training process then finishes its
    step and saves a checkpoint (`Preemption`); a loader process that ended at once would end the run with an error
    before that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _REQUESTS:
        signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)  # for this thread, and those that it starts
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    """`DataLoader` ends what is left of its processes by SIGTERM."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while True:
        request = signal.sigwaitinfo(_REQUESTS)
        if (request.si_signo, request.si_pid) == (signal.SIGTERM, parent.pid):
            os._exit(0)

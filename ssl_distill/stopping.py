"""How a process ends that is asked to."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODES = {
    getattr(signal, name): code
    for name, code in (
        ("SIGTERM", 75),  # by SLURM, containers, spot machines; 75 is "try again later" to mail systems and schedulers
        ("SIGUSR1", 75),  # SLURM's warning before its time limit
        ("SIGINT", 130),  # Ctrl-C; 130 is what shells say of it
    )
    if hasattr(signal, name)  # Windows has no SIGUSR1
}

Handler = Callable[[int, FrameType | None], None]


_asked_for = 0  # the exit code, once a request has come


def stop_now(number: int, frame: FrameType | None) -> None:
    """A handler for whenever nothing would be lost: files are written whole or not at all."""
    global _asked_for
    _asked_for = EXIT_CODES[signal.Signals(number)]
    raise SystemExit(_asked_for)


def listen(handler: Handler) -> None:
    """Take over the signals that ask a process to end.

    Those that are ignored stay so, such as Ctrl-C by what a script started in the background.

    Raises:
        SystemExit: After a request whose exception was lost, as in a destructor, of which loaders have some.
    """
    if _asked_for:
        raise SystemExit(_asked_for)
    if threading.current_thread() is threading.main_thread():
        for number in EXIT_CODES:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)


@contextmanager
def stopping_now() -> Iterator[None]:
    """Meanwhile a request ends the process at once, with its exit code.

    Raises:
        SystemExit: After a request, also where what was tidied up on the way out failed in turn.
    """
    global _asked_for
    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    try:
        listen(stop_now)
        yield
        listen(stop_now)
    except Exception as error:
        if _asked_for:
            raise SystemExit(_asked_for) from error
        raise
    finally:
        _asked_for = 0
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)

"""Ctrl-C and SIGTERM while a script still imports what it needs: one line, where Python would show a traceback.

Scripts import it before everything else. It does nothing where it is imported by another program. `command_line` of
runs.py takes over from it.
"""

import os
import signal
import sys
from pathlib import Path


def end_at_once(number: int, frame: object) -> None:
    word = b"interrupted" if number == signal.SIGINT else b"terminated"
    os.write(2, word + b" while starting or ending: nothing was changed\n")
    os._exit(128 + number)


def is_started_from_here() -> bool:
    program = getattr(sys.modules["__main__"], "__file__", None)
    return program is not None and Path(program).resolve().parent == Path(__file__).resolve().parent


if is_started_from_here():
    signal.signal(signal.SIGINT, end_at_once)
    signal.signal(signal.SIGTERM, end_at_once)

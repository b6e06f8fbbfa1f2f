"""What a script does before it imports anything else.

* Ctrl-C and SIGTERM are answered with one line, where Python would show a traceback; `command_line` of runs.py takes
  over from here. Not where a script is imported by another program.
* Threads of a matrix product wait for each other asleep. Those that spin, as they would by default, make small
  operations many times slower as soon as other programs use the cores too. torch reads the setting when it is imported.
"""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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

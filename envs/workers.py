"""Processes that step envs: SuperSuit's, but such that they never outlive or hang the trainer."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from supersuit.vector import ConcatVecEnv, MarkovVectorEnv, ProcConcatVec
from supersuit.vector.multiproc_vec import decompress_info

from runs import RunError

if TYPE_CHECKING:
    from envs.pettingzoo_vec import EnvSpec

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
GRACE = 5.0  # seconds that workers have to close their envs, before they are killed


class WorkerTraceback(Exception):
    """Stands for an error of another process: its traceback in words."""


class Workers(ProcConcatVec):
    """Sub-envs in processes of their own, which never outlive or hang the trainer.

    An answer that does not come within `timeout` seconds (0: wait for ever), a process that died and an error in it
    are a RunError. Ends its processes in `close`, politely where they still answer.
    """

    def __init__(
        self,
        spec: EnvSpec,
        make_sub_envs: list[Callable[[], MarkovVectorEnv]],
        num_procs: int,
        timeout: float,
    ):
        self.env_id = spec.env_id
        self.pipes, self.procs = [], []
        self.answering = False  # they can be asked to close
        self.timeout = 0.0  # for making the envs, which imports libraries
        # They die with the thread that started them, so that must not be one that ends early.
        tied = threading.current_thread() is threading.main_thread()
        chunks = np.array_split(np.arange(len(make_sub_envs)), num_procs)
        make_workers = []
        for chunk in chunks:
            makes = [make_sub_envs[n] for n in chunk]
            make_workers.append(functools.partial(make_in_worker, makes, tied))
        self.first_envs = [chunk[0] for chunk in chunks]
        self.last_envs = [chunk[-1] for chunk in chunks]
        try:
            total = len(make_sub_envs) * len(spec.agents)
            super().__init__(make_workers, spec.obs_space, spec.action_space, total, {})
        except BaseException:
            self.close()
            raise
        self.answering = True
        self.timeout = timeout

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, list[dict]]:
        return self._ask([("reset", (seed, options))] * len(self.pipes)), self.infos

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        parts = zip(self.idx_starts[:-1], self.idx_starts[1:], strict=True)
        obs = self._ask([("step", list(actions[start:end])) for start, end in parts])
        terminations, truncations = self.shared_terms.np_arr, self.shared_truncs.np_arr
        return obs, self.shared_rews.np_arr.copy(), terminations.astype(bool), truncations.astype(bool), self.infos

    def _ask(self, messages: list[tuple]) -> np.ndarray:
        """Sends each worker its message, and waits for all: -> observations; their infos in self.infos"""
        self.answering = False  # until all have answered, also where Ctrl-C interrupts the waiting
        for worker, message in enumerate(messages):
            self._send(worker, message)
        answers = self._receive_info()
        self.answering = True
        self.infos = decompress_info(self.num_envs, self.idx_starts, answers)
        return self.observations_buffers.copy()

    def render(self) -> Any:
        self._send(0, "render")
        self._start_clock()
        return self._answer(0)

    def _send(self, worker: int, message: Any) -> None:
        try:
            self.pipes[worker].send(message)
        except OSError as error:
            raise self._dead(worker) from error

    def _start_clock(self) -> None:
        self.deadline = time.monotonic() + self.timeout if self.timeout else None

    def _receive_info(self) -> list[Any]:
        """An answer of each worker."""
        self._start_clock()
        return [self._answer(worker) for worker in range(len(self.pipes))]

    def _answer(self, worker: int) -> Any:
        pipe = self.pipes[worker]
        seconds = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        try:
            if not pipe.poll(seconds):
                raise RunError(
                    f"{self._where(worker)} gave no answer within {self.timeout:g} seconds: "
                    "correct the env, or give it more time with --env-timeout"
                )
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            raise self._dead(worker) from error
        if isinstance(answer, tuple):
            error, text = answer
            raise error from WorkerTraceback(f"in a worker process:\n{text}")
        return answer

    def _where(self, worker: int) -> str:
        first, last = self.first_envs[worker], self.last_envs[worker]
        which = f"env {first}" if first == last else f"one of envs {first} to {last}"
        return f"{self.env_id}, {which}: its worker process"

    def _dead(self, worker: int) -> RunError:
        self.procs[worker].join(1.0)
        code = self.procs[worker].exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {-code}" + ", as when memory runs out" * (code == -9)
        return RunError(f"{self._where(worker)} died ({how})")

    def close(self) -> None:
        """Asks the workers to close their envs and end; kills who has not done so in GRACE seconds.

        Who owes an answer is killed at once.
        """
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                if self.answering:
                    pipe.send("close")
                pipe.send("terminate")
        deadline = time.monotonic() + (GRACE if self.answering else 0.0)
        for proc in self.procs:
            proc.join(max(0.0, deadline - time.monotonic()))
        for proc in self.procs:
            if proc.is_alive():
                proc.kill()
                proc.join()
        for pipe in self.pipes:
            pipe.close()
        self.pipes, self.procs = [], []


def make_in_worker(make_sub_envs: list[Callable[[], MarkovVectorEnv]], tied: bool) -> ConcatVecEnv:
    # Ctrl-C and a job's SIGTERM reach all processes; the trainer, which saves first, then ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if tied and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # also where it is stopped or hangs
    threading.Thread(target=end_with_the_trainer, daemon=True).start()
    torch.set_num_threads(1)  # a forked process waits for ever for OpenMP threads that only its parent has
    return ConcatVecEnv(make_sub_envs)


def end_with_the_trainer() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

"""``python -m frostline.measuring.worker``: a process that hosts one model and runs steps of it when asked.

Questions come in as lines of JSON on the standard input, answers go out on what was the standard output; what the
user's code prints goes to the standard error. The process ends when it is told to, when its input closes, and with the
process that started it. ``frostline.measuring.host`` is the other end.

Questions, by their ``do``:
    load: build the model of ``source`` -> torch's version, the device, the number of threads
    arrange: set up ``case`` and warm it up by ``warm_up`` steps -> the seconds of the last one
    examine: FLOPs, saved bytes and peak memory of one step (of some extra ones)
    turn: run ``settling`` steps off the clock and ``steps`` on it -> seconds
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any


def main() -> None:
    """Answer until told to stop."""
    questions, answers = _taken_over()
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides when this one stops
    server = _Server()
    for line in questions:
        question = json.loads(line)
        what = question.pop("do")
        if what == "stop":
            break
        try:
            answer = {"answer": getattr(server, what)(**question)}
        except (Exception, SystemExit) as error:
            answer = {"error": _described(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _taken_over() -> tuple[IO[str], IO[str]]:
    """The pipes, out of reach of the user's code: its input is empty, its output is the standard error."""
    questions = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    return questions, answers


def _end_with_parent() -> None:
    """Where the system can (Linux): be killed when the process that started this one dies, whatever it dies of."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL)


def _described(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "notes": list(getattr(error, "__notes__", [])),
        "traceback": "".join(traceback.format_exception(error)),
    }


class _Server:
    """The model of this process and the case it is arranged for; a method for each question."""

    def load(self, source: dict[str, Any], path: list[str], threads: int | None) -> dict[str, Any]:
        import numpy as np
        import torch

        from frostline.measuring.case import Source
        from frostline.measuring.loop import Loop
        from frostline.tracing.step import map_tensors

        sys.path.extend(entry for entry in path if entry not in sys.path)
        if threads is not None:
            torch.set_num_threads(threads)
        asked = Source.from_dict(source)
        random.seed(asked.seed)
        np.random.seed(asked.seed)
        torch.manual_seed(asked.seed)
        model, inputs, loss = _load(asked)
        if asked.eval_mode is not None:
            model.train(not asked.eval_mode)
        if asked.device is not None:
            model.to(asked.device)
            inputs = map_tensors(inputs, lambda tensor: tensor.to(asked.device))
        self.loop = Loop(model, inputs, loss)
        gc.collect()
        gc.freeze()  # what is loaded stays: the collections between steps need not look through it
        device = next(iter(self.loop.parameters.values())).device
        return {"torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads()}

    def arrange(self, case: dict[str, Any], warm_up: int) -> dict[str, Any]:
        from frostline.measuring.case import Case
        from frostline.measuring.timing import take_turn

        self.loop.arrange(Case.from_dict(case))
        return {"step_seconds": take_turn(self.loop, warm_up - 1, 1).step}

    def examine(self) -> dict[str, Any]:
        from frostline.measuring.counting import count
        from frostline.measuring.memory import measure_memory

        counts = count(self.loop)
        memory = measure_memory(self.loop, counts.other)
        found = asdict(counts)
        del found["other"]
        return {**found, "memory": None if memory is None else memory.to_dict()}

    def turn(self, settling: int, steps: int) -> dict[str, Any]:
        from frostline.measuring.timing import take_turn

        return asdict(take_turn(self.loop, settling, steps))


def _load(source: Any) -> tuple[Any, Any, Any]:
    if source.file:
        from frostline.measuring.pickled import read

        return read(Path(source.file))
    from frostline.targets import load

    target = load(source.target, source.inputs, source.model_class, source.loss, weights=True)
    return target.model, target.inputs, target.loss


if __name__ == "__main__":
    main()

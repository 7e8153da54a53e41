"""What the tests share. A new script joins the suite by its name in SCRIPTS."""

import contextlib
import gc
import importlib
import io
import os
import runpy
import signal
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import filelock
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["pqn_abs_atari.py", "pqn_l_abs_atari.py", "pqn_xl_abs_atari.py", "ppo_abs_atari.py", "gns_batch_atari.py"]
# L and XL are pqn_abs_atari.py with another network, word for word (test_twins.py): whole runs leave them out
DISTINCT = ["pqn_abs_atari.py", "ppo_abs_atari.py", "gns_batch_atari.py"]

torch.set_num_threads(1)  # the tensors are small, and the machine may be shared
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):  # cores of its own for each worker
    cores, worker = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, cores[worker % len(cores) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])])
sys.path.insert(0, str(ROOT))
MODULES = {name: importlib.import_module(name.removesuffix(".py")) for name in SCRIPTS}


def modules_with(*names):
    """The imported scripts that have all these names, as parameters of a test."""
    return [pytest.param(m, id=m.__name__) for m in MODULES.values() if all(hasattr(m, name) for name in names)]


def scalars(run_dir):
    """What a run logged: {tag: {agent step: value}}; of several values at one step the last."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


class Result(NamedTuple):
    code: int
    out: str
    err: str


def go(folder, script, *arguments):
    """Runs a script inside this process, in a folder, and afterwards does what the end of a process would."""
    namespaces, out, err, code = [], io.StringIO(), io.StringIO(), 0
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    handlers, lock = [signal.getsignal(number) for number in numbers], filelock.UnixFileLock
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setattr(filelock, "FileLock", lambda path: namespaces.append(sys._getframe(1).f_globals) or lock(path))
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
            for namespace in namespaces:
                namespace["folder_lock"].release()
                namespace.clear()
    gc.collect()  # its threads
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture
def run_here(tmp_path):
    """run_here(script, *arguments) runs a script inside this process, in an empty folder, and returns a Result."""
    return partial(go, tmp_path)

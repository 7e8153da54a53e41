"""What the tests share. A new script joins the suite by its name in SCRIPTS."""

import importlib
import os
import runpy
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["pqn_abs_atari.py", "pqn_l_abs_atari.py", "pqn_xl_abs_atari.py", "ppo_abs_atari.py", "gns_batch_atari.py"]
# L and XL are pqn_abs_atari.py with another network, word for word (test_twins.py), so slow tests leave them out.
DISTINCT = ["pqn_abs_atari.py", "ppo_abs_atari.py", "gns_batch_atari.py"]

torch.set_num_threads(1)  # the tensors are small, and the machine may be shared
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Cores of its own for each worker and the runs it starts: runs that share cores wait for each other at every operation.
    cores, worker = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, cores[worker % len(cores) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])])
sys.path.insert(0, str(ROOT))
MODULES = {name: importlib.import_module(name.removesuffix(".py")) for name in SCRIPTS}


def modules_with(*names):
    """The imported scripts that have all these names, as parameters of a test."""
    return [pytest.param(m, id=m.__name__) for m in MODULES.values() if all(hasattr(m, name) for name in names)]


def run_script(script, *arguments, cwd, timeout=600, python_options=()):
    """Runs a script of the repository as a user would; its runs/ folder lands in cwd."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *python_options, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def pytest_collection_modifyitems(items):
    """The files that take longest begin, or one of them would run last and alone."""
    items.sort(key=lambda item: item.path.stem not in ("test_run", "test_long_runs", "test_learning"))


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """Runs a script inside this process, in an empty folder: spares seconds of imports where it ends early anyway."""

    def run(script, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # or what earlier runs compiled would count towards its limit for this one
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        hooks = sys.excepthook, threading.excepthook
        with warnings.catch_warnings():
            # as outside of pytest: what a library warns of in our name stands on stderr
            warnings.showwarning = lambda message, category, *where: print(f"{category.__name__}: {message}", file=sys.stderr)
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
                code = 0
            except SystemExit as e:
                code = e.code or 0
            finally:
                sys.excepthook, threading.excepthook = hooks
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        output = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, output.out, output.err)

    return run

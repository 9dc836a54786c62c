"""Real processes that run the commands as users type them, quickly: forked from one that has imported everything.

A kill is a real kill -9 of a process; nothing is simulated.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SERVER = """
import json, os, runpy, sys, time
import av, distributed, numpy, obstore, pyarrow.dataset, pyarrow.parquet, torch, webdataset, zarr
import jepa_cache.cli.main, jepa_cache.encoding.run, jepa_cache.encoding.verification
import jepa_cache.cli.export, jepa_cache.store.collection, jepa_cache.store.check, jepa_cache.data.dataset, decord

def run(request):
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    sys.argv = request["argv"]
    if sys.argv[0] == "jepa-cache":
        jepa_cache.cli.main.main()
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")

for line in sys.stdin:
    request = json.loads(line)
    if "argv" in request:
        child = os.fork()
        if not child:
            code = 0
            try:
                run(request)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
                if isinstance(error.code, str):
                    print(error.code, file=sys.stderr)
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 70
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
        answer = child
    else:
        end = time.monotonic() + request["timeout"]
        answer = None
        while True:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            if pid:
                answer = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > end:
                break
            time.sleep(0.002)
    print(json.dumps(answer), file=sys.__stdout__, flush=True)
"""


class Started:
    """One command that runs; `text` is what it has printed."""

    def __init__(self, server: Commands, pid: int, out: Path) -> None:
        self._server, self.pid, self._out = server, pid, out
        self.code: int | None = None

    @property
    def text(self) -> str:
        return self._out.read_text()

    def kill(self, *, group: bool = False) -> None:
        """Kill -9 it, with `group` everything that it started as well."""
        (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 120.0) -> int:
        """Its exit code, negative for a signal.

        Raises:
            AssertionError: It still runs after the timeout (a deadlock).
        """
        if self.code is None:
            self.code = self._server.ask({"wait": self.pid, "timeout": timeout})
            if self.code is None:
                self.kill(group=True)
                self.code = self._server.ask({"wait": self.pid, "timeout": 5.0})
                raise AssertionError(f"it hangs; it had printed:\n{self.text}")
        return self.code


class Commands:
    """Starts commands from a process that has imported everything and never grows a thread."""

    def __init__(self, scratch: Path, *, preload: Sequence[str] = ()) -> None:
        """Import what commands need, and the modules `preload`."""
        self._scratch, self._number = scratch, 0
        imports = "".join(f"import {name}\n" for name in preload)
        self._process = subprocess.Popen(
            [sys.executable, "-c", imports + SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)  # a busy machine takes long to end it

    def ask(self, request: Mapping[str, Any]) -> Any:
        """One request and its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(self, cwd: Path, *argv: object, **env: object) -> Started:
        """Start `jepa-cache ...` or a script."""
        self._number += 1
        out = self._scratch / f"{self._number}.txt"
        out.touch()
        request = {"argv": [str(it) for it in argv], "cwd": str(cwd), "out": str(out)}
        pid = self.ask(request | {"env": {name: str(value) for name, value in env.items()}})
        return Started(self, pid, out)

    def run(self, cwd: Path, *argv: object, **env: object) -> Started:
        """Run one to its end."""
        started = self.start(cwd, *argv, **env)
        started.wait()
        return started


def wait_until(seconds: float, process: Started) -> None:
    """Sleep so long, or until the process is gone."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and Path(f"/proc/{process.pid}").exists():
        time.sleep(0.001)

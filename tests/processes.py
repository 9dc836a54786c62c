"""Real processes, among them commands as users type them, that start at once: forked from one that has imported what is slow.

A kill is a real kill -9 of a process; nothing is simulated.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.encoded import forking_context


def _run(cwd: str, argv: Sequence[str], env: Mapping[str, str], out: str) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.update(env)
    descriptor = os.open(out, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.argv = list(argv)
    if argv[0] == "jepa-cache":
        from jepa_cache.cli.main import main

        main()
    else:
        runpy.run_path(argv[0], run_name="__main__")


class Started:
    """`jepa-cache ...` or a script that runs in the folder `cwd`, with the folders of the present test and `env` in its environment."""

    def __init__(self, cwd: Path, *argv: object, **env: object) -> None:
        self._out = tempfile.NamedTemporaryFile()  # noqa: SIM115 (as long as this object)
        folders = {name: value for name, value in os.environ.items() if name.startswith(("JEPA_", "XDG_"))}
        env = folders | {name: str(value) for name, value in env.items()}
        given = (str(cwd), [str(it) for it in argv], env, self._out.name)
        self._process = forking_context().Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def text(self) -> str:
        """What it has printed."""
        return Path(self._out.name).read_text()

    @property
    def runs(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def let_run(self, seconds: float) -> None:
        """Wait so long, or until it has ended."""
        self._process.join(seconds)

    def wait(self, timeout: float = 120.0) -> int:
        """Its exit code, negative for a signal.

        Raises:
            AssertionError: It still runs after the timeout (a deadlock).
        """
        self.let_run(timeout)
        if self.runs:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"it hangs; it had printed:\n{self.text}")
        return self._process.exitcode

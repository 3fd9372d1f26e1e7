"""The real server in a process of its own on a free loopback port, with a client process that keeps it busy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from app.bench.figures import ProcessFacts
from app.bench.http_client import REQUEST_TIMEOUT_S, make_client
from app.bench.machine import process_age_s, rss_bytes
from app.bench.process import Child
from app.bench.workload import BenchFailed
from app.settings import Settings
from app.settings_sources import FIELDS, variable_of

if TYPE_CHECKING:
    from app.bench.tenancy import Tenancy

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.05
NOT_HANDED_ON = ("config", "host", "port", "admin_host", "admin_port", "admin_key", "log_level", "request_timeout_s")
LOG_TAIL_CHARS = 2000


class ServerProcess:
    """`lodger serve` as a user starts it, with the benchmark's settings. Ended by its process id."""

    def __init__(self, settings: Settings, log: Path) -> None:
        """Start it and wait until it is ready. Raises BenchFailed with the end of its log when it does not come up."""
        self._log = log
        environment = server_environment(settings, os.environ)
        started = time.monotonic()
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app", "serve"],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        try:
            self.url = self._wait_for_url(started + START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.start_s = process_age_s(self._process.pid)

    @property
    def rss_bytes(self) -> int:
        return rss_bytes(self._process.pid)

    def close(self) -> None:
        """Ask it to end; kill it when it does not."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _wait_for_url(self, until: float) -> str:
        while True:
            for line in self._log.read_text("utf-8", "replace").splitlines():
                if '"ready"' in line:
                    fields = json.loads(line)
                    return f"http://{fields['host']}:{fields['port']}"
            if self._process.poll() is not None or time.monotonic() >= until:
                tail = self._log.read_text("utf-8", "replace")[-LOG_TAIL_CHARS:]
                raise BenchFailed(f"the server did not start (exit code {self._process.poll()})\n{tail}")
            time.sleep(POLL_S)


def server_environment(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without its LODGER_ variables, and every setting of ours as one. Listens on a free port."""
    result = {name: value for name, value in environment.items() if not name.upper().startswith("LODGER_")}
    for field in FIELDS:
        value = getattr(settings, field)
        if value is None or field in NOT_HANDED_ON:
            continue
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        # A byte size prints itself with a rounded unit.
        result[variable_of(field)] = str(int(value)) if isinstance(value, int) and not isinstance(value, bool) else text
    result |= {
        "LODGER_HOST": "127.0.0.1",
        "LODGER_PORT": "0",
        "LODGER_LOG_LEVEL": "info",
        "LODGER_REQUEST_TIMEOUT_S": str(REQUEST_TIMEOUT_S),
        "PYTHONUNBUFFERED": "1",
    }
    return result


class HttpSystem:
    """Server and client together, as a `System`. The server is started by this process and ended by it."""

    def __init__(self, tenancy: Tenancy, *, stream: bool, dtype: str, weights: str) -> None:
        settings = tenancy.settings
        self._threads, self._dtype, self._weights = settings.threads, dtype, weights
        self._server = ServerProcess(settings, tenancy.root / "server.log")
        try:
            self._client = Child(
                make_client,
                self._server.url,
                settings.base_id,
                dict(tenancy.keys),
                stream,
                name="http client",
                start_timeout_s=START_TIMEOUT_S,
            )
        except BaseException:
            self._server.close()
            raise

    def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """As `Child.call`; facts are the server's."""
        if method == "facts":
            return ProcessFacts(self._server.start_s, self._server.rss_bytes, self._threads, self._dtype, self._weights)
        return self._client.call(method, *args, timeout_s=timeout_s)

    def close(self) -> None:
        self._client.close()
        self._server.close()

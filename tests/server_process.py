"""A real `lodger serve` in a process of its own, with the commands and clients that tests need around it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

READY_WITHIN_S = 180.0  # the first start of a real base quantizes it
ROOT = Path(__file__).parents[1]


def run_command(data_dir: Path, *arguments: str, **settings: object) -> str:
    """Run a `lodger` command and return the last line that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env=_environment(data_dir, settings),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


@dataclass
class ServerProcess:
    """A server on a free port of 127.0.0.1. Settings are those of the program, in lower case without the prefix."""

    data_dir: Path
    settings: dict[str, object] = field(default_factory=dict)

    def __init__(self, data_dir: Path, **settings: object) -> None:
        self.data_dir = data_dir
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.settings = {"port": 0, "threads": os.environ.get("OMP_NUM_THREADS", "1"), "training": "off", **settings}
        self.log = self.data_dir / f"server-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app", "serve"],
                cwd=ROOT,
                env=_environment(self.data_dir, self.settings),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.url = ""

    def wait_ready(self) -> None:
        """Wait until the server has said where it listens, and is ready. Raises AssertionError with its log."""
        until = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < until:
            assert self.process.poll() is None, f"the server ended:\n{self.output}"
            self.url = self.url or self._address()
            if self.url and httpx.get(f"{self.url}/readyz", timeout=30).status_code == 200:
                return
            time.sleep(0.05)
        raise AssertionError(f"the server is not ready after {READY_WITHIN_S} s:\n{self.output}")

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def client(self, key: str, timeout_s: float = 120) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s)

    def command(self, *arguments: str) -> str:
        """Run a `lodger` command on the same data while the server runs."""
        return run_command(self.data_dir, *arguments, **self.settings)

    def new_tenant(self, name: str) -> str:
        """Create a tenant; returns a key of it."""
        self.command("tenants", "create", name)
        return self.command("keys", "create", name)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def push(self, tenant_key: str, name: str, config: bytes, weights: bytes) -> str:
        """Publish an adapter over HTTP; returns its digest."""
        with self.client(tenant_key) as client:
            parts = {"adapter_config": config, "adapter_model": weights}
            answer = client.post("/v1/adapters", data={"name": name}, files=parts)
        assert answer.status_code in (200, 201), answer.text
        return str(answer.json()["digest"])

    def wait_idle(self, timeout_s: float = 20) -> None:
        """Wait until no sequence runs or waits and no adapter is leased."""
        until = time.monotonic() + timeout_s
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "lodger_adapter_leases")
        while held := {name: value for name in gauges if (value := self.metric(name))}:
            assert time.monotonic() < until, f"left over: {held}"
            time.sleep(0.02)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 60) -> int:
        """The exit code. Raises AssertionError with the log's end when there is none in time."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output[-3000:]}") from None

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)

    def _address(self) -> str:
        """The address in the log's line that says ready; "" before there is one."""
        for line in self.output.splitlines():
            if line.startswith("{") and (said := json.loads(line)).get("action") == "ready":
                return f"http://{said['host']}:{said['port']}"
        return ""


def _environment(data_dir: Path, settings: dict[str, object]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LODGER_")}
    named = {f"LODGER_{name.upper()}": str(value) for name, value in settings.items()}
    return {**kept, "HF_HUB_OFFLINE": "1", "LODGER_DATA_DIR": str(data_dir), **named}

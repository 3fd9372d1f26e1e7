"""Two tenants train on their own text with plain PEFT; one server answers both, and the base, to one prompt.

The answers are written to `build/trained_tenants.md`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from tests.conftest import StartServer
from tests.real.public_text import HELD_OUT, bierce_rows, king_james_rows, question
from tests.server_process import ROOT

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]

NUM_ROWS = 400
STEPS = 50
SCRIPT = Path(__file__).with_name("train_with_peft.py")
REPORT = ROOT / "build" / "trained_tenants.md"
CHAT = "/v1/chat/completions"
MODEL = "smollm2-135m-instruct"
# What only one of the two texts sounds like.
BIBLICAL = re.compile(r"\b(LORD|thou|thee|thy|unto|hath|shalt|ye|behold|sons? of|king of)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def trained(smollm2_dir: Path, model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapter directories by tenant; the two are trained side by side, each in a process of its own.

    What the same script made of the same rows is kept with the models: the next run starts from there.
    """
    rows = {"bierce": bierce_rows(NUM_ROWS), "king-james": king_james_rows(NUM_ROWS)}
    missing = {"bierce": "dict-devil", "king-james": "bible-kjv"}
    root = tmp_path_factory.mktemp("rows")
    directories, running = {}, []
    for tenant, found in rows.items():
        if not found:
            pytest.skip(f"the Debian package {missing[tenant]} is not installed")
        text = "\n".join(map(json.dumps, found))
        facts = SCRIPT.read_text() + text + str(STEPS)
        directories[tenant] = out = (
            model_cache / "trained" / f"{tenant}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
        )
        if not out.exists():
            file = root / f"{tenant}.jsonl"
            file.write_text(text)
            command = [sys.executable, "-m", "tests.real.train_with_peft", "--threads", "1", "--steps", str(STEPS)]
            places = ["--base", str(smollm2_dir), "--rows", str(file), "--out", str(root / tenant)]
            running.append((subprocess.Popen([*command, *places], cwd=ROOT), root / tenant, out))
    for process, made, out in running:
        assert process.wait(1200) == 0
        out.parent.mkdir(exist_ok=True)
        shutil.copytree(made, out)
    return directories


def test_two_tenants_answer_one_prompt_in_their_own_voices(
    trained: dict[str, Path], start_server: StartServer, model_cache: Path, tmp_path: Path
) -> None:
    # The models' directory holds the quantized base already; store and database are this test's own.
    own = {"database_url": f"sqlite:///{tmp_path / 'lodger.db'}", "store": (tmp_path / "store").as_uri()}
    server = start_server(model_cache, **own)
    keys = {tenant: server.new_tenant(tenant) for tenant in trained}
    for tenant, directory in trained.items():
        server.push(
            keys[tenant], "voice", (directory / CONFIG_FILE).read_bytes(), (directory / WEIGHTS_FILE).read_bytes()
        )

    def ask(asker: tuple[str, str, str]) -> dict[str, Any]:
        key, model, word = asker
        body = {"model": model, "messages": [question(word)], "max_tokens": 40, "temperature": 0}
        with server.client(key, 300) as client:
            answer = client.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    voices = {"the base": (keys["bierce"], MODEL), **{tenant: (key, "voice") for tenant, key in keys.items()}}
    askers = [(*voice, word) for word in HELD_OUT for voice in voices.values()]
    with ThreadPoolExecutor(len(askers)) as pool:  # all at once: they share batches
        answers = list(pool.map(ask, askers))
    largest = server.metric("lodger_batch_distinct_adapters_sum") / server.metric(
        "lodger_batch_distinct_adapters_count"
    )
    assert largest > 1, "steps held both adapters"

    texts = {}
    for (_, _, word), voice, answer in zip(askers, [*voices] * len(HELD_OUT), answers, strict=True):
        texts[word, voice] = " ".join(answer["choices"][0]["message"]["content"].split())
        assert answer["model"] == (MODEL if voice == "the base" else "voice@v1")
    write_report(texts, list(voices))
    for word in HELD_OUT:
        assert len({texts[word, voice] for voice in voices}) == len(voices), word
    biblical = {voice: sum(bool(BIBLICAL.search(texts[word, voice])) for word in HELD_OUT) for voice in voices}
    assert biblical["king-james"] > max(biblical["bierce"], biblical["the base"]), biblical


def write_report(texts: dict[tuple[str, str], str], voices: list[str]) -> None:
    """One table a prompt: who answered, and what."""
    lines = []
    for word in HELD_OUT:
        lines += [f"Prompt: *{question(word)['content']}*", "", "| answered by | answer |", "| --- | --- |"]
        lines += [f"| {voice} | {texts[word, voice].replace('|', chr(92) + '|')} |" for voice in voices] + [""]
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text("\n".join(lines))

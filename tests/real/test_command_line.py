"""The commands around a trained adapter, on SmolLM2: train, check, push, export, merge, plan. Without a server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

LORA_NUMBERS = 4_884_480  # rank 16 on every linear of SmolLM2-135M
TRAINED = 0.02  # at most, of the largest logit: what rounding a merged model to fp16 may cost


def test_an_adapter_is_trained_published_exported_and_merged_by_commands(
    smollm2_dir: Path, model_cache: Path, tmp_path: Path
) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("LODGER_")}
    environment = plain | {
        "LODGER_DATA_DIR": str(model_cache),
        "LODGER_STORE": (tmp_path / "store").as_uri(),
        "LODGER_DATABASE_URL": f"sqlite:///{tmp_path / 'lodger.db'}",
        "LODGER_THREADS": "2",
    }
    (tmp_path / "store").mkdir()

    def lodger(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "app", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f"{arguments[0]}: {done.stdout}\n{done.stderr}"
        return done

    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": f"It is {n}, sir."},
            ]
        }
        for n in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    trained = lodger("train", "rows.jsonl", "--out", "adapter", "--max-steps", "3")
    assert f"{LORA_NUMBERS:,} trainable parameters" in trained.stdout + trained.stderr
    assert (tmp_path / "adapter/loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "adapter/metrics.csv").read_text().splitlines()) == 4  # a header and three steps

    lodger("tenants", "create", "acme")
    assert "accepted: rank 16, 210 of 210 linears" in lodger("adapters", "check", "adapter").stdout
    assert lodger("adapters", "push", "adapter", "acme", "butler").stdout.splitlines()[-1] == "butler@v1"
    lodger("adapters", "export", "acme", "butler@v1", "copy")
    exported, own = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("copy", "adapter"))
    assert exported.keys() == own.keys()
    assert all(torch.equal(exported[name], own[name]) for name in own)

    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32, local_files_only=True)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "copy"))
    assert sum(value.numel() for name, value in loaded.named_parameters() if "lora_" in name) == LORA_NUMBERS

    merged = lodger("merge", "copy", "--out", "merged")
    said = re.search(r"largest logit difference .*: ([0-9.]+) \(logits up to ([0-9.]+);", merged.stdout + merged.stderr)
    assert said is not None, merged.stdout
    assert float(said[1]) < TRAINED * float(said[2])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", local_files_only=True)
    assert {value.dtype for value in whole.state_dict().values()} == {torch.float16}

    planned = lodger("plan", str(smollm2_dir)).stdout
    assert f"{LORA_NUMBERS:,} parameters" in planned
    assert all(f"{gigabytes} GB" in planned for gigabytes in (16, 24, 48, 80))

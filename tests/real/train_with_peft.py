"""Train one LoRA adapter with plain PEFT on chat rows: what a tenant would do at home before giving us the adapter.

    python -m tests.real.train_with_peft --base DIR --rows rows.jsonl --out DIR [--steps 120]

Imports nothing of the server. Loss is on the assistant's answer and the token that ends it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NO_LOSS = -100


def train(
    base: Path,
    rows: list[dict[str, Any]],
    out: Path,
    *,
    steps: int = 120,
    batch: int = 4,
    rank: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
    threads: int | None = None,
) -> list[float]:
    """Write a PEFT adapter directory to `out`; returns the loss of each step. fp32 throughout."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=LINEARS, lora_dropout=0.0, task_type="CAUSAL_LM", bias="none"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
    examples = [encode(tokenizer, row["messages"]) for row in rows]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, max(0.0, (steps - step) / (steps - warm_up)))
    )
    losses = []
    draw = random.Random(seed)
    model.train()
    for step in range(steps):
        loss = model(**collate(draw.sample(examples, batch), tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if step % 10 == 0:
            print(f"step {step} of {steps}, loss {losses[-1]:.2f}", flush=True)
    model.save_pretrained(out, save_embedding_layers=False)  # else PEFT looks the base up on a hub
    return losses


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], int]:
    """Token ids of the whole conversation and the number of those that come before the answer."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    return [*before, *answer, tokenizer.eos_token_id], len(before)


def collate(examples: list[tuple[list[int], int]], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), width), pad)
    labels = torch.full((len(examples), width), NO_LOSS)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    for i, (tokens, num_before) in enumerate(examples):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, num_before : len(tokens)] = torch.tensor(tokens[num_before:])
        mask[i, : len(tokens)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a LoRA adapter with PEFT on chat rows.")
    parser.add_argument("--base", type=Path, required=True, help="transformers directory of the base model")
    parser.add_argument("--rows", type=Path, required=True, help='JSONL, one {"messages": [...]} a line')
    parser.add_argument("--out", type=Path, required=True, help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    given = vars(parser.parse_args())
    rows = [json.loads(line) for line in given.pop("rows").read_text("utf-8").splitlines() if line.strip()]
    started = time.monotonic()
    losses = train(given.pop("base"), rows, given.pop("out"), **given)
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    print(f"{len(losses)} steps in {time.monotonic() - started:.0f} s, loss {first:.2f} -> {last:.2f}")


if __name__ == "__main__":
    main()

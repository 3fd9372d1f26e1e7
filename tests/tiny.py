"""A tiny base model and random adapters for tests: built in a second, the same for the same arguments.

`build_base(directory)` writes a transformers directory that has all that SmolLM2's has: a byte-level tokenizer with
ChatML special tokens, a chat template, a Llama with random weights. `build_tokenizer` alone needs no torch.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (ENDOFTEXT, IM_START, IM_END)  # ids 0, 1, 2, as in SmolLM2
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE_NAME = "tiny-chat"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are tiny.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Merges that make words, runs of newlines and leading blanks more than one byte long, so that merges across the borders
# of a template can be seen. `Ġ` is a blank and `Ċ` a newline in the byte-level alphabet.
_MERGED_WORDS = ("user", "assistant", "system", "Ġthe", "Ġa", "Ġis", "ing", "ĠĠ", "ĊĊ", "hello", "Ġworld", "What")


def build_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; returns the directory. No torch."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    merges: list[tuple[str, str]] = []
    for word in _MERGED_WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                merges.append((word[: end - 1], word[end - 1]))
                vocab[word[:end]] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": IM_START,
        "eos_token": IM_END,
        "pad_token": IM_END,
        "unk_token": ENDOFTEXT,
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template)
    return directory


def build_base(
    directory: Path, *, seed: int = 0, num_layers: int = 2, hidden: int = 64, tied: bool = False, max_context: int = 512
) -> Path:
    """Write a tokenizer and a random fp32 Llama (4 heads, 2 KV heads); returns the directory.

    All linears fit NF4 (inputs are multiples of 64, outputs of 32). Weights are wide enough that the argmax of a
    position is seldom a near tie.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    build_tokenizer(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    config = LlamaConfig(
        vocab_size=len(spec["model"]["vocab"]),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_context,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.save_pretrained(directory)
    return directory


def build_adapter(
    directory: Path,
    base: Path,
    *,
    r: int = 8,
    alpha: float = 16,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    target_modules: Sequence[str] = LINEARS,
    layers_to_transform: Sequence[int] | None = None,
    seed: int = 0,
    strength: float = 0.1,
    base_name: str = BASE_NAME,
) -> Path:
    """Write a random PEFT adapter with PEFT itself: adapter_config.json and adapter_model.safetensors (fp32).

    `strength` is the standard deviation of B's values; A keeps PEFT's initial values. Returns the directory.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        target_modules=list(target_modules),
        layers_to_transform=None if layers_to_transform is None else list(layers_to_transform),
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 7919)
        with warnings.catch_warnings():  # PEFT still reads an attribute that transformers has deprecated
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=strength)
    model.peft_config["default"].base_model_name_or_path = base_name
    # PEFT would look up the base's config, by its name and on a hub, to find out whether embeddings were resized.
    model.save_pretrained(directory, save_embedding_layers=False)
    saved = directory / "adapter_config.json"
    body = json.loads(saved.read_text())
    body["target_modules"] = sorted(
        body["target_modules"]
    )  # PEFT writes a set: another order, and digest, in each process
    saved.write_text(json.dumps(body, indent=2, sort_keys=True))
    return directory

"""Two tenants' training rows from public-domain text in Debian packages: Bierce's dictionary and the King James Bible.

Both answer the same kind of question, `Tell me about WORD.`, so that one prompt shows whose adapter answered.
"""

from __future__ import annotations

import gzip
import random
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

DEVIL = Path("/usr/share/dictd/devil.dict.dz")  # package dict-devil; a .dz file is gzip
BIBLE = "bible"  # package bible-kjv
HELD_OUT = ("money", "love", "war", "friend", "truth")  # asked for in the tests, trained on by nobody

Row = dict[str, list[dict[str, str]]]

_HEADWORD = re.compile(r"^([A-Z][A-Z'-]+), (?:n|adj|adv|v|x|p)\.(?:[a-z]\.)*  +", re.MULTILINE)
_CHARS = (30, 150)  # of an answer: short rows train fast, and end


def bierce_rows(count: int) -> list[Row] | None:
    """Definitions from The Devil's Dictionary; None where the package is not installed."""
    if not DEVIL.exists():
        return None
    text = gzip.decompress(DEVIL.read_bytes()).decode("utf-8", "replace")
    heads = list(_HEADWORD.finditer(text))
    rows = []
    for head in heads:
        first_paragraph = text[head.end() :].split("\n\n", 1)[0]
        answer = re.sub(r"\s+", " ", re.sub(r"\[[^]]*\]|[{}_]", "", first_paragraph)).strip()
        word = head.group(1).lower()
        if _CHARS[0] <= len(answer) <= _CHARS[1] and answer[-1] in ".!?" and word not in HELD_OUT:
            rows.append(row(word, answer))
    return _sample(rows, count)


def king_james_rows(count: int) -> list[Row] | None:
    """Verses, each under one word that it holds; None where the package is not installed."""
    if shutil.which(BIBLE) is None:
        return None
    done = subprocess.run(
        [BIBLE, "-f", "-l100000", "gen1:1-rev22:21"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    verses = [line.split(" ", 1)[1].strip() for line in done.stdout.splitlines() if re.match(r"\w+\d+:\d+ ", line)]
    seen = Counter(word for verse in verses for word in set(_words(verse)))
    draw = random.Random(0)
    rows = []
    for verse in verses:
        # A word that is neither everywhere nor nowhere is what the verse is about, more or less.
        topics = sorted(w for w in set(_words(verse)) if 20 <= seen[w] <= 250 and w not in HELD_OUT)
        if topics and _CHARS[0] <= len(verse) <= _CHARS[1] and verse[-1] in ".!?":
            rows.append(row(draw.choice(topics), verse))
    return _sample(rows, count)


def row(word: str, answer: str) -> Row:
    return {"messages": [question(word), {"role": "assistant", "content": answer}]}


def question(word: str) -> dict[str, str]:
    return {"role": "user", "content": f"Tell me about {word}."}


def _words(verse: str) -> list[str]:
    return re.findall(r"\b[a-z]{4,}\b", verse)  # names have capitals


def _sample(rows: list[Row], count: int) -> list[Row]:
    return random.Random(1).sample(rows, min(count, len(rows)))

"""Which KV blocks belong to whom: allocation with reference counts, and the prefix cache over full blocks.

Integers only: it knows block ids, not their tensors. Engine thread only.

A full block is found again by its hash: sha256 over the previous block's hash and its own token ids. The first link of
a chain is made of the tenant, the adapter's digest and the base's digest, so equal prompts of two tenants, of two
adapters, or of an adapter and the base share nothing. Names are no part of it: a name may point to other weights
tomorrow.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

from app.engine.sequence import AdapterKey, Sequence

DOMAIN = b"lodger-kv-v1"


class KVCache:
    """Invariant: each block is exactly one of used (referenced), cached (unreferenced, findable by hash) or free."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True, *, base_digest: str = "") -> None:
        """`block_size` in tokens; `base_digest` names the base model whose K and V the blocks hold."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks ({num_blocks}) and block_size ({block_size}) must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.query_tokens = 0  # prompt tokens looked up, since the start
        self.hit_tokens = 0  # of these, found
        self.num_evictions = 0
        self._base_digest = base_digest
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._owner_of: list[AdapterKey | None] = [None] * num_blocks
        self._owned: dict[AdapterKey, set[int]] = {}  # hashed blocks by `_owner`, for `invalidate`
        self._pending: Counter[bytes] = Counter()  # blocks that running sequences compute next

    @property
    def num_available(self) -> int:
        """Blocks that can be given out now: free, or cached and used by nobody."""
        return len(self._free) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return 1.0 - self.num_available / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def lookup(self, seq: Sequence) -> list[int]:
        """Blocks that hold the sequence's leading tokens already. Changes nothing; they are shared by `allocate`.

        Never all of its tokens: the last must be computed, or there were no logits to sample from.
        """
        if not self.prefix_caching or seq.needs_prompt_logits:
            return []
        found: list[int] = []
        for index in range((len(seq.tokens) - 1) // self.block_size):
            block = self._block_of.get(self._hash(seq, index))
            if block is None:
                break
            found.append(block)
        return found

    def is_being_computed(self, seq: Sequence, num_found: int) -> bool:
        """True when the block after the `num_found` found ones is what a running sequence computes next.

        To wait for it is cheaper than to compute it twice: n answers to one prompt pay for one prompt.
        """
        if not self._pending or seq.needs_prompt_logits or num_found >= (len(seq.tokens) - 1) // self.block_size:
            return False
        return self._hash(seq, num_found) in self._pending

    def allocate(self, seq: Sequence, upto_tokens: int, *, found: Iterable[int] = (), spare: int = 0) -> bool:
        """Give the sequence blocks for its first `upto_tokens` tokens; all or nothing, False when there are too few.

        `found`: what `lookup` returned just now, for a sequence without blocks; it is shared and counts as computed.
        `spare`: blocks that must be left over.
        """
        missing = self.blocks_for(upto_tokens) - len(seq.blocks)
        if missing <= 0:
            return True
        found = list(found)
        reused = sum(1 for block in found if not self._references[block])
        if missing - len(found) + reused + spare > self.num_available:
            return False
        if not seq.blocks:
            self._share(seq, found)
        for _ in range(missing - len(found)):
            block = self._take()
            self._references[block] = 1
            seq.blocks.append(block)
        return True

    def commit(self, seq: Sequence) -> None:
        """Make the sequence's newly full and computed blocks findable. Call it when `num_computed` has grown."""
        num_full = seq.num_computed // self.block_size
        if self.prefix_caching and (num_full > seq.num_committed or seq.pending_hash is not None):
            for index in range(seq.num_committed, num_full):
                self._register(seq, index)
            seq.num_committed = num_full
            self._mark_pending(seq)

    def free(self, seq: Sequence) -> None:
        """Take all blocks back; what is findable stays so until its room is needed."""
        self._unmark_pending(seq)
        # Last block first: a chain is evicted from its end, since its beginning is what others share.
        for block in reversed(seq.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        seq.blocks.clear()
        seq.num_computed = seq.num_committed = 0

    def invalidate(self, key: AdapterKey) -> int:
        """Forget what was computed with an adapter, or for a tenant with the base: `(tenant, "")`.

        Returns how many blocks that were. Sequences that run keep theirs; what they add to a forgotten chain cannot be
        found either.
        """
        blocks = self._owned.pop(key, set())
        for block in blocks:
            self._forget(block)
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)
        return len(blocks)

    def check(self, sequences: Iterable[Sequence] = ()) -> None:
        """Raise AssertionError unless the books agree with each other and with the sequences that hold blocks."""
        held = Counter(block for seq in sequences for block in seq.blocks)
        assert all(self._references[b] == held[b] for b in range(self.num_blocks)), "references are not what is held"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a block is free and cached"
        assert not (free | cached) & held.keys(), "a held block is given out"
        assert len(free) + len(cached) + len(held) == self.num_blocks, "a block is lost"
        hashed = {block for block, digest in enumerate(self._hash_of) if digest is not None}
        assert cached <= hashed, "a cached block cannot be found"
        assert not free & hashed, "a free block can be found"
        assert {self._hash_of[block]: block for block in hashed} == self._block_of, "hashes and blocks disagree"
        assert set().union(*self._owned.values()) == hashed, "owners and hashes disagree"
        assert held or not self._pending, "a block is awaited that nobody computes"

    def _share(self, seq: Sequence, found: list[int]) -> None:
        for block in found:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        seq.blocks.extend(found)
        seq.num_committed = len(found)
        seq.num_computed = len(found) * self.block_size
        if not self.prefix_caching:
            return
        self._mark_pending(seq)
        if not seq.num_preemptions and not seq.needs_prompt_logits:  # its own blocks, found again, are no merit
            self.query_tokens += seq.num_prompt
            self.hit_tokens += seq.num_computed

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._cached.popitem(last=False)
        owner = self._owner_of[block]
        assert owner is not None, "a cached block has an owner"
        self._owned[owner].discard(block)
        if not self._owned[owner]:
            del self._owned[owner]
        self._forget(block)
        self.num_evictions += 1
        return block

    def _register(self, seq: Sequence, index: int) -> None:
        digest = self._hash(seq, index)
        # Without its parent a block can never be found, and after `invalidate` it must not be.
        if digest in self._block_of or (index and seq.block_hashes[index - 1] not in self._block_of):
            return
        block, owner = seq.blocks[index], _owner(seq)
        self._block_of[digest] = block
        self._hash_of[block] = digest
        self._owner_of[block] = owner
        self._owned.setdefault(owner, set()).add(block)

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        assert digest is not None, "only a hashed block is forgotten"
        del self._block_of[digest]
        self._hash_of[block] = self._owner_of[block] = None

    def _mark_pending(self, seq: Sequence) -> None:
        self._unmark_pending(seq)
        index = seq.num_computed // self.block_size
        if (index + 1) * self.block_size <= len(seq.tokens):
            seq.pending_hash = self._hash(seq, index)
            self._pending[seq.pending_hash] += 1

    def _unmark_pending(self, seq: Sequence) -> None:
        if seq.pending_hash is not None:
            self._pending[seq.pending_hash] -= 1
            if not self._pending[seq.pending_hash]:
                del self._pending[seq.pending_hash]
            seq.pending_hash = None

    def _hash(self, seq: Sequence, index: int) -> bytes:
        """The chain's hash up to full block `index`. Tokens are only ever appended, so it is kept with the sequence."""
        hashes = seq.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else self._root(seq)
            ids = array("I", seq.tokens[start : start + self.block_size])
            hashes.append(hashlib.sha256(parent + ids.tobytes()).digest())
        return hashes[index]

    def _root(self, seq: Sequence) -> bytes:
        """The first link. Parts are framed by their length, so no two lists of parts make the same bytes."""
        adapter_tenant, digest = seq.adapter_key or ("", "")
        h = hashlib.sha256(DOMAIN)
        for part in (seq.request.tenant, adapter_tenant, digest, self._base_digest):
            data = part.encode()
            h.update(len(data).to_bytes(8, "big") + data)
        return h.digest()


def _owner(seq: Sequence) -> AdapterKey:
    return seq.adapter_key or (seq.request.tenant, "")

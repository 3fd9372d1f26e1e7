"""Files and uploads: what is kept, what is refused, and when content goes. Directory store, SQLite."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from adapters.collect import BlobCollector
from adapters.errors import ObjectNotFound, StoreError, StoreUnavailable
from adapters.manifest import blob_key
from adapters.store import DirectoryStore
from app.database import migrate, open_database, writing
from app.errors import RateLimited, RequestInvalid
from app.training.files import FileLimits, FileNotFound, FileStore, FileTooLarge, NewFile
from app.training.jobs import JobStore, NewJob
from app.training.quota import MAX_PENDING_UPLOADS
from app.training.spec import JobSpec, PinnedFile
from app.training.uploads import LIFETIME_S, MAX_COPIES, UploadNotFound, UploadStore


class World:
    def __init__(self, path: Path) -> None:
        self.now = 1_700_000_000.0
        self.scratch = path / "scratch"
        self.scratch.mkdir()
        self.store = DirectoryStore(path / "store")
        self.engine = open_database(f"sqlite:///{path / 'lodger.db'}")
        migrate(self.engine)
        limits = FileLimits(max_file_bytes=1000, max_upload_bytes=2000, max_unpacked_bytes=5000)
        self.files = FileStore(self.engine, self.store, limits=limits, wall=lambda: self.now)
        self.uploads = UploadStore(
            self.engine, self.store, self.files, scratch=self.scratch, wall=lambda: self.now
        )  # fmt: skip
        self.jobs = JobStore(self.engine, wall=lambda: self.now)

    def path(self, data: bytes) -> Path:
        path = self.scratch / f"in-{hashlib.sha256(data).hexdigest()[:16]}"
        path.write_bytes(data)
        return path

    def add(self, data: bytes = b"{}\n", tenant: str = "acme", **new: object) -> str:
        return self.files.add(tenant, replace(NewFile("a.jsonl"), **new), self.path(data)).id  # type: ignore[arg-type]

    def has_blob(self, data: bytes, tenant: str = "acme") -> bool:
        try:
            self.store.head(blob_key(tenant, hashlib.sha256(data).hexdigest()))
        except ObjectNotFound:
            return False
        return True

    def blobs(self) -> list[str]:
        return [item.key for item in self.store.list("")]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.engine.dispose()


def test_file_comes_back_as_it_was(world: World) -> None:
    data = gzip.compress(b"{}\n" * 100, mtime=0)
    file = world.files.get("acme", world.add(data))
    assert b"".join(world.files.content(file)) == data
    assert (file.num_bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    target = world.scratch / "out"
    world.files.fetch("acme", file.pinned, target)
    assert target.read_bytes() == data


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_line"),
        (b"\xff\n", "invalid_utf8"),
        (gzip.compress(b" " * 6000, mtime=0), "file_too_large"),
        (b"PK\x03\x04", "wrong_format"),
    ],
)
def test_file_that_cannot_be_read_is_refused_at_once(world: World, data: bytes, code: str) -> None:
    with pytest.raises(RequestInvalid) as refused:
        world.add(data)
    assert (refused.value.code, refused.value.param) == (code, "file")
    assert world.blobs() == []


def test_other_purposes_are_refused(world: World) -> None:
    with pytest.raises(RequestInvalid) as refused:
        world.add(purpose="batch")
    assert refused.value.param == "purpose"


def test_changed_content_is_not_trained_on(world: World) -> None:
    pinned = world.files.get("acme", world.add()).pinned
    world.store.put(blob_key("acme", pinned.sha256), b"[]\n")
    with pytest.raises(StoreError):
        world.files.fetch("acme", pinned, world.scratch / "out")


def test_foreign_file_is_absent(world: World) -> None:
    file_id = world.add()
    for act in (world.files.get, world.files.delete):
        with pytest.raises(FileNotFound):
            act("bolt", file_id)
    assert world.files.list("bolt").items == ()
    with pytest.raises(RequestInvalid):
        world.files.list("bolt", after=file_id)


def test_content_goes_with_its_last_file(world: World) -> None:
    first, second = world.add(), world.add()
    world.files.delete("acme", first)
    assert world.has_blob(b"{}\n")
    world.files.delete("acme", second)
    assert not world.has_blob(b"{}\n")
    with pytest.raises(FileNotFound):
        world.files.delete("acme", second)


def test_equal_content_of_two_tenants_is_two_blobs(world: World) -> None:
    mine, theirs = world.add(), world.add(tenant="bolt")
    world.files.delete("acme", mine)
    assert world.has_blob(b"{}\n", "bolt")
    assert world.files.get("bolt", theirs)


def test_content_stays_while_a_live_job_needs_it(world: World) -> None:
    file_id = world.add()
    pinned = world.files.get("acme", file_id).pinned
    job = world.jobs.create("acme", NewJob(JobSpec("base", pinned), asked={}))
    world.files.delete("acme", file_id)
    world.files.fetch("acme", pinned, world.scratch / "out")
    world.jobs.cancel("acme", job.id)
    again = world.add()
    world.files.delete("acme", again)
    assert not world.has_blob(b"{}\n")


def test_content_deleted_under_a_job_goes_when_the_job_is_over(world: World) -> None:
    file_id = world.add()
    job = world.jobs.create("acme", NewJob(JobSpec("base", world.files.get("acme", file_id).pinned), asked={}))
    world.files.delete("acme", file_id)
    assert world.files.collect_unpinned() == 0
    assert world.has_blob(b"{}\n")
    world.jobs.cancel("acme", job.id)
    assert world.files.collect_unpinned() == 1
    assert not world.has_blob(b"{}\n")
    assert world.files.collect_unpinned() == 0


def test_store_is_never_asked_with_the_databases_lock_in_hand(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    other = open_database(str(world.engine.url))

    def probed(name: str) -> Callable[..., object]:
        real = getattr(world.store, name)

        def call(*args: object, **kwargs: object) -> object:
            with writing(other) as connection:  # raises DatabaseUnavailable when somebody holds the lock
                connection.exec_driver_sql("UPDATE training_turns SET turn = turn")
            return real(*args, **kwargs)

        return call

    with other.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 50")
    for name in ("head", "put_if_absent", "delete"):
        monkeypatch.setattr(world.store, name, probed(name))
    world.files.delete("acme", world.add())
    other.dispose()


def test_content_that_somebody_else_names_is_spared(world: World) -> None:
    """An adapter's config may be the same bytes as a file."""
    collector = BlobCollector(world.store)
    files = FileStore(world.engine, world.store, collector=collector)
    named: set[str] = {hashlib.sha256(b"{}\n").hexdigest()}
    collector.ask(lambda tenant, asked: named & asked if tenant == "acme" else set())
    mine = files.add("acme", NewFile("a.jsonl"), world.path(b"{}\n")).id
    files.delete("acme", mine)
    assert world.has_blob(b"{}\n")
    kept = files.add("acme", NewFile("a.jsonl"), world.path(b"{}\n")).id
    collector.collect("acme", named)
    named.clear()
    collector.collect("acme", [hashlib.sha256(b"{}\n").hexdigest()])  # what deleting an adapter's version does
    assert world.has_blob(b"{}\n")
    files.delete("acme", kept)
    assert not world.has_blob(b"{}\n")


def test_file_whose_content_cannot_be_deleted_stays_listed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = world.add()
    with monkeypatch.context() as patched:

        def down(key: str, data: object) -> bool:
            raise StoreUnavailable

        patched.setattr(world.store, "put_if_absent", down)
        with pytest.raises(StoreUnavailable):
            world.files.delete("acme", file_id)
    world.files.delete("acme", file_id)
    assert not world.has_blob(b"{}\n")


def test_file_added_while_its_twin_is_deleted_keeps_its_content(world: World) -> None:
    for _ in range(5):
        old = world.add()
        threads = [
            threading.Thread(target=world.files.delete, args=("acme", old)),
            threading.Thread(target=world.add),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (kept,) = world.files.list("acme").items
        assert b"".join(world.files.content(kept)) == b"{}\n"
        world.files.delete("acme", kept.id)


def test_expired_file_is_gone_before_and_after_the_sweep(world: World) -> None:
    file_id = world.add(ttl_s=3600)
    world.now += 3599
    assert world.files.get("acme", file_id)
    world.now += 1
    with pytest.raises(FileNotFound):
        world.files.get("acme", file_id)
    assert world.files.list("acme").items == ()
    assert world.has_blob(b"{}\n")
    assert world.files.sweep() == 1
    assert not world.has_blob(b"{}\n")
    assert world.files.sweep() == 0


def test_page_goes_on_after_a_deleted_file(world: World) -> None:
    ids = [world.add(b"%d\n" % n) for n in range(5)]
    page = world.files.list("acme", limit=2)
    assert ([file.id for file in page.items], page.has_more) == ([ids[4], ids[3]], True)
    world.files.delete("acme", ids[3])
    page = world.files.list("acme", after=ids[3], limit=9)
    assert ([file.id for file in page.items], page.has_more) == ([ids[2], ids[1], ids[0]], False)
    assert [file.id for file in world.files.list("acme", asc=True).items] == [ids[0], ids[1], ids[2], ids[4]]


def test_storage_is_limited(world: World) -> None:
    world.add(b"1234567890")
    with pytest.raises(RateLimited) as refused:
        world.files.add("acme", NewFile("b"), world.path(b"0987654321"), max_stored_bytes=19)
    assert refused.value.code == "quota_exceeded"
    world.files.add("acme", NewFile("b"), world.path(b"0987654321"), max_stored_bytes=20)


def test_of_two_files_at_once_for_which_there_is_room_for_one_one_stays(world: World) -> None:
    both_are_stored = threading.Barrier(2)

    class Meeting(DirectoryStore):
        def put_if_absent(self, key: str, data: bytes | Path) -> bool:
            created = super().put_if_absent(key, data)
            if key.startswith(blob_key("acme", "")):
                both_are_stored.wait(timeout=10)
            return created

    files = FileStore(world.engine, Meeting(world.store.root), limits=world.files.limits, wall=lambda: world.now)
    contents, refused = [b"1234567890", b"0987654321"], []

    def add(data: bytes) -> None:
        try:
            files.add("acme", NewFile("f"), world.path(data), max_stored_bytes=19)
        except RateLimited as exc:
            refused.append(exc.code)

    threads = [threading.Thread(target=add, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert refused == ["quota_exceeded"]
    (kept,) = files.list("acme").items
    assert world.blobs() == [blob_key("acme", kept.sha256)]


def test_what_an_upload_was_announced_with_counts_until_it_is_over(world: World) -> None:
    create = partial(world.uploads.create, "acme", NewFile("big"), max_stored_bytes=1000)
    first, _ = create(600), world.add(b"1" * 300)
    with pytest.raises(RateLimited) as refused:
        create(101)
    assert refused.value.code == "quota_exceeded"
    with pytest.raises(RateLimited):
        world.files.add("acme", NewFile("f"), world.path(b"2" * 101), max_stored_bytes=1000)
    world.uploads.create("bolt", NewFile("big"), 1000, max_stored_bytes=1000)
    world.uploads.cancel("acme", first.id)
    part = world.uploads.add_part("acme", create(700).id, world.path(b"3" * 700))
    _, file = world.uploads.complete("acme", part.upload_id, [part.id])
    assert file.num_bytes == 700
    with pytest.raises(RateLimited):
        create(1)


def test_pending_uploads_and_their_parts_are_bounded(world: World) -> None:
    uploads = [world.uploads.create("acme", NewFile("f"), 10) for _ in range(MAX_PENDING_UPLOADS)]
    with pytest.raises(RateLimited) as refused:
        world.uploads.create("acme", NewFile("f"), 10)
    assert refused.value.code == "quota_exceeded"
    world.now += LIFETIME_S - 1
    for _ in range(MAX_COPIES):  # answers that were lost
        world.uploads.add_part("acme", uploads[0].id, world.path(b"1234567890"))
    with pytest.raises(RequestInvalid, match="far larger"):
        world.uploads.add_part("acme", uploads[0].id, world.path(b"1"))
    world.now += 1
    assert world.uploads.sweep() == MAX_PENDING_UPLOADS
    world.uploads.create("acme", NewFile("f"), 10)


# ---- uploads


def send(world: World, parts: list[bytes], num_bytes: int | None = None) -> tuple[str, list[str]]:
    whole = sum(map(len, parts)) if num_bytes is None else num_bytes
    upload = world.uploads.create("acme", NewFile("big.jsonl"), whole)
    return upload.id, [world.uploads.add_part("acme", upload.id, world.path(part)).id for part in parts]


def test_parts_are_joined_in_the_order_named(world: World) -> None:
    upload_id, (second, first) = send(world, [b"b\n", b"a\n"])
    md5 = hashlib.md5(b"a\nb\n").hexdigest()
    upload, file = world.uploads.complete("acme", upload_id, [first, second], md5=md5)
    assert (upload.status, upload.file_id) == ("completed", file.id)
    assert b"".join(world.files.content(file)) == b"a\nb\n"
    assert world.blobs() == [blob_key("acme", file.sha256)]  # the parts are gone
    again, same = world.uploads.complete("acme", upload_id, [first, second], md5=md5)
    assert (again, same.id) == (upload, file.id)


def test_wrong_parts_are_refused(world: World) -> None:
    upload_id, (first, second) = send(world, [b"a\n", b"b\n"])
    _, (foreign,) = send(world, [b"c\n"])
    for part_ids, md5, param in (
        ([first], None, "part_ids"),
        ([first, first], None, "part_ids"),
        ([first, foreign], None, "part_ids"),
        ([first, second], "0" * 32, "md5"),
    ):
        with pytest.raises(RequestInvalid) as refused:
            world.uploads.complete("acme", upload_id, part_ids, md5=md5)
        assert refused.value.param == param
    world.uploads.complete("acme", upload_id, [first, second])


def test_upload_that_is_over_takes_nothing(world: World) -> None:
    upload_id, parts = send(world, [b"a\n"])
    assert world.uploads.cancel("acme", upload_id).status == "cancelled"
    assert world.uploads.cancel("acme", upload_id).status == "cancelled"
    with pytest.raises(RequestInvalid):
        world.uploads.complete("acme", upload_id, parts)
    with pytest.raises(RequestInvalid):
        world.uploads.add_part("acme", upload_id, world.path(b"b"))
    assert world.blobs() == []


def test_forgotten_upload_expires_and_is_swept(world: World) -> None:
    upload_id, parts = send(world, [b"a\n"])
    world.now += LIFETIME_S
    with pytest.raises(RequestInvalid, match="expired"):
        world.uploads.complete("acme", upload_id, parts)
    assert world.uploads.sweep() == 1
    assert world.blobs() == []


def test_parts_that_the_store_did_not_delete_are_swept_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_id, _ = send(world, [b"a\n"])

    def down(key: str) -> None:
        raise StoreUnavailable

    with monkeypatch.context() as patched:
        patched.setattr(world.store, "delete", down)
        with pytest.raises(StoreUnavailable):
            world.uploads.cancel("acme", upload_id)
    assert len(world.blobs()) == 1
    assert world.uploads.sweep() == 0
    assert world.blobs() == []


def test_part_that_comes_while_its_upload_is_cancelled_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_id, _ = send(world, [b"a\n"], num_bytes=100)
    put = world.store.put_if_absent

    def slow(key: str, data: bytes | Path) -> bool:
        created = put(key, data)
        world.uploads.cancel("acme", upload_id)
        return created

    monkeypatch.setattr(world.store, "put_if_absent", slow)
    with pytest.raises(RequestInvalid, match="cancelled"):
        world.uploads.add_part("acme", upload_id, world.path(b"b\n"))
    assert world.blobs() == []


def test_uploads_are_bounded_and_private(world: World) -> None:
    with pytest.raises(FileTooLarge):
        world.uploads.create("acme", NewFile("f"), 2001)
    upload_id, parts = send(world, [b"a\n"])
    with pytest.raises(UploadNotFound):
        world.uploads.complete("bolt", upload_id, parts)
    with pytest.raises(UploadNotFound):
        world.uploads.add_part("bolt", upload_id, world.path(b"b"))


def test_spec_keeps_what_it_pins() -> None:
    spec = JobSpec("m", PinnedFile("a", "1", 1), validation_file=PinnedFile("b", "2", 2))
    assert JobSpec.from_dict(spec.to_dict()) == spec
    assert [file.id for file in spec.files] == ["a", "b"]

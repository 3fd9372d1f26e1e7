"""S3Store and the catalog against a real S3 server: a one-node Ceph with its RADOS gateway, on loopback."""

from __future__ import annotations

import copy
import shutil
import socket
import subprocess
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapters.errors import AdapterUnavailable, StoreDenied, StoreUnavailable
from adapters.s3 import S3Store
from tests.catalog_lab import Lab
from tests.store_contract import StoreContract

SCRIPT = Path(__file__).with_name("ceph-rgw.sh")
ACCESS_KEY, SECRET_KEY = "lodger-test-key", "lodger-test-secret"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(shutil.which("radosgw") is None, reason="needs radosgw, which `make test-real` installs"),
]


@dataclass
class Ceph:
    directory: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [str(SCRIPT), "start", str(self.directory), str(self.port), ACCESS_KEY, SECRET_KEY]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        subprocess.run([str(SCRIPT), "stop", str(self.directory)], capture_output=True, timeout=120, check=True)


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on."""
    for first in range(18_480, 19_480, count):
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    directory = tmp_path_factory.mktemp("ceph")
    cluster = Ceph(directory / "cluster", free_ports(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        cluster.start()
        try:
            open_store(cluster)._client.create_bucket(Bucket="bucket")
            yield cluster
        finally:
            cluster.stop()
            shutil.rmtree(cluster.directory)


def open_store(ceph: Ceph, prefix: str = "", **settings: object) -> S3Store:
    # The time limits are wide: one machine runs the tests, the gateway and its disk.
    settings = {"read_timeout_s": 30.0, "object_timeout_s": 90.0, "connect_timeout_s": 5.0, **settings}
    return S3Store("bucket", prefix, endpoint_url=ceph.url, region="us-east-1", addressing_style="path", **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bucket_store(ceph: Ceph) -> S3Store:
    return open_store(ceph)


@pytest.fixture
def store(bucket_store: S3Store) -> S3Store:
    fresh = copy.copy(bucket_store)
    fresh._prefix = f"some/{uuid.uuid4().hex}/"
    return fresh


class TestCephStore(StoreContract):
    def test_wrong_keys_are_denied(self, ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
        for access, secret in ((ACCESS_KEY, "wrong"), ("nobody", SECRET_KEY)):
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
            store = open_store(ceph)
            for call in (
                lambda store=store: store.list(""),
                lambda store=store: store.head("k"),
                lambda store=store: store.get("k", max_bytes=1),
                lambda store=store: store.put("k", b""),
                lambda store=store: store.put_if_absent("k", b""),
                lambda store=store: store.delete("k"),
            ):
                with pytest.raises(StoreDenied) as denied:
                    call()
                assert secret not in str(denied.value)
            assert "AWS_" in store.probe()[0]

    def test_a_missing_bucket_is_told(self, ceph: Ceph) -> None:
        store = open_store(ceph)
        store.bucket = "absent"
        with pytest.raises(StoreUnavailable, match="bucket does not exist"):
            store.list("")

    def test_a_large_file_comes_back_whole_and_in_ranges(self, store: S3Store, tmp_path: Path) -> None:
        data = uuid.uuid4().bytes * (1 << 20)
        (tmp_path / "source").write_bytes(data)
        assert store.put_if_absent("large", tmp_path / "source")
        assert store.download("large", tmp_path / "copy", max_bytes=len(data)).size == len(data)
        assert (tmp_path / "copy").read_bytes() == data
        assert store.get_range("large", len(data) - 7, 100) == data[-7:]
        assert store.get_range("large", 5 << 20, 1 << 10) == data[5 << 20 : (5 << 20) + (1 << 10)]


class CephLab(Lab):
    """The catalog's laboratory on Ceph."""

    def __init__(self, tmp_path: Path, store: S3Store) -> None:
        super().__init__(tmp_path)
        self.plain = self.store.inner = store  # type: ignore[assignment]
        self.catalog = self.open()


@pytest.fixture
def lab(tmp_path: Path, store: S3Store) -> CephLab:
    return CephLab(tmp_path, store)


class TestCatalogOnCeph:
    def test_sixteen_publishers_make_sixteen_versions(self, lab: CephLab) -> None:
        start = threading.Barrier(16)

        def publish(number: int) -> int:
            catalog = lab.open()
            start.wait()
            return lab.publish("support", f"weights {number}", catalog=catalog).version

        with ThreadPoolExecutor(16) as pool:
            versions = list(pool.map(publish, range(16)))
        assert sorted(versions) == list(range(1, 17))
        manifests = lab.open().versions("acme", "support")
        assert [lab.weights_of(manifests[v - 1]) for v in versions] == [f"weights {n}" for n in range(16)]
        assert lab.open().resolve("acme", "support").version == 16

    def test_a_copied_directory_is_imported_and_its_change_too(self, lab: CephLab) -> None:
        lab.copy_in("support", "one")
        assert lab.weights_of(lab.catalog.resolve("acme", "support")) == "one"
        lab.copy_in("support", "two")
        lab.clock.now += 15
        manifest = lab.catalog.resolve("acme", "support")
        assert (manifest.version, lab.weights_of(manifest)) == (2, "two")
        lab.catalog.delete("acme", "support")
        assert lab.catalog.list("acme") == []

    def test_an_erased_tenant_leaves_its_tombstone_alone(self, lab: CephLab) -> None:
        lab.publish("support", "one")
        lab.catalog.erase_tenant("acme")
        assert [info.key for info in lab.plain.list("")] == ["tenants/acme/erased"]

    def test_names_in_use_outlive_the_gateway_and_data_outlives_its_restart(self, ceph: Ceph, lab: CephLab) -> None:
        published = lab.publish("support", "one")
        lab.publish("cold", "two")
        quick = copy.copy(lab.plain)
        quick.__dict__.update(
            open_store(ceph, connect_timeout_s=1.0, max_attempts=1).__dict__, _prefix=lab.plain._prefix
        )
        catalog = lab.open(quick)
        catalog.resolve("acme", "support")
        ceph.stop()
        try:
            lab.clock.now += 60
            assert catalog.resolve("acme", "support") == published
            assert catalog.num_stale_served == 1
            with pytest.raises(AdapterUnavailable):
                catalog.resolve("acme", "cold")
        finally:
            ceph.start()
        assert lab.weights_of(lab.open().resolve("acme", "cold")) == "two"

"""A fault of the output's storage is told from a wrong output, and waited for no longer than the patience."""

from __future__ import annotations

import socket
import subprocess

import fsspec
import pytest
from corpus_runs import write_texts
from sample_models import Exported
from typer.testing import CliRunner

pytest.importorskip("s3fs")

import botocore.exceptions

from runtime.commands.app import app
from runtime.corpus.faults import FaultKind, Patience, fault_kind
from runtime.corpus.stores import store_from_location
from runtime.corpus.stores.local import LocalStore
from runtime.corpus.stores.objects import ObjectStore
from runtime.errors import CorpusError, OutputFaultError

MEMORY = type(fsspec.filesystem("memory"))


@pytest.fixture
def s3(monkeypatch):
    """Give clients of S3 credentials, and yield a function that names their endpoint."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").clear_instance_cache()
    yield lambda port: monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.mark.parametrize("is_frozen", [False, True], ids=["refused", "frozen"])
def test_a_store_that_does_not_answer_ends_a_run_with_its_code(exported: Exported, s3, tmp_path, is_frozen):
    source = write_texts(tmp_path / "a.parquet", ["a cat"])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if is_frozen:
            listener.listen()  # connections are taken, and never answered
        s3(listener.getsockname()[1])
        command = ["embed", str(exported("nllb-clip")), str(source), "--out", "s3://bucket/out"]
        done = CliRunner().invoke(app, [*command, "--patience", "0.5"])
    assert done.exit_code == 75, done.output
    assert "s3://bucket/out" in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_a_full_disk_is_a_fault_that_may_pass(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        store = LocalStore(tmp_path)
        for write in (store.replace, store.create):
            with pytest.raises(
                OutputFaultError, match=r"No space left.*run the same command again"
            ) as raised:
                write("a", bytes(1 << 17))
            assert raised.value.exit_code == 75
        with pytest.raises(OutputFaultError):
            store.publish("a", lambda path: path.write_bytes(bytes(1 << 17)))
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_output_of_a_wrong_name_is_no_passing_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError) as raised:
        LocalStore(tmp_path).replace("file/a", b"")
    assert raised.value.exit_code == 1
    with pytest.raises(CorpusError) as raised:
        LocalStore(tmp_path).replace("x" * 300, b"")
    assert raised.value.exit_code == 1


class Faulty(MEMORY):
    """File system in memory, some of whose requests fail, or fail after they were done."""

    cachable = False
    faults = 0

    def _fail(self):
        if self.faults:
            self.faults -= 1
            raise OSError("connection reset by peer")

    def pipe_file(self, path, value, mode="overwrite", **options):
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        super().pipe_file(path, value, **options)
        self._fail()  # the answer is lost

    def cat_file(self, path, *arguments, **options):
        self._fail()
        return super().cat_file(path, *arguments, **options)


def test_requests_are_repeated_within_the_patience():
    filesystem = Faulty()
    store = ObjectStore(filesystem, "/faulty", "memory://faulty", Patience(20))
    for name in ("created", "replaced"):
        filesystem.faults = 2
        assert (store.create if name == "created" else store.replace)(name, b"1") in (True, None)
    filesystem.faults = 2
    assert store.read("created") == b"1"
    assert store.create("created", b"2") is False
    assert store.read("none") is None
    store = ObjectStore(filesystem, "/faulty", "memory://faulty", Patience(0))
    filesystem.faults = 1
    with pytest.raises(OutputFaultError, match="memory://faulty/created cannot be read, although"):
        store.read("created")
    assert store.read("created") == b"1"


def test_a_missing_object_and_a_wrong_bucket_are_told_from_faults():
    kinds = {404: FaultKind.ABSENT, 403: FaultKind.DENIED, 503: FaultKind.PASSING, 400: FaultKind.OWN}
    for status, kind in kinds.items():
        missing = FileNotFoundError("a")
        response = {"ResponseMetadata": {"HTTPStatusCode": status}}
        missing.__cause__ = botocore.exceptions.ClientError(response, "GetObject")
        assert fault_kind(missing) is kind
    assert store_from_location("memory://none").read("a") is None

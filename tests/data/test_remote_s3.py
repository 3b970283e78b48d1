"""Shards on S3 (moto on loopback) that answers with errors, reads slowly and cuts connections off."""

import threading
import time
from collections import Counter

import boto3
import pytest
import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from simla_ds.data.shards import find_shards, open_shard, write_shards
from tests.data.test_loader import COUNT, good, ids, keys, loader, take
from tests.data.test_remote import remote

BUCKET = "shards"


class Failing:
    """WSGI: passes requests on, but for GETs of shards that the plan names by (file, number of the request)."""

    def __init__(self, application, plan):
        self.application, self.plan = application, plan
        self.requests: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, environ, start_response):
        name = environ["PATH_INFO"].rpartition("/")[2]
        fault = ""
        if environ["REQUEST_METHOD"] == "GET" and ".tar" in name:
            with self._lock:
                fault = self.plan.get((name, self.requests[name]), "")
                self.requests[name] += 1
                self.met[fault] += 1
        if fault == "500":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        body = b"".join(self.application(environ, start_response))
        return self._broken(body, fault) if fault else [body]

    def _broken(self, body, fault):
        for start in range(0, len(body), 1 + len(body) // 4):
            if fault == "cut" and start:
                raise ConnectionAbortedError
            yield body[start : start + 1 + len(body) // 4]
            time.sleep(0.05)


@pytest.fixture
def failing_s3(tmp_path, monkeypatch):
    """The 53 samples of test_loader in a bucket behind a server that fails; (server's faults, local copy)."""
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    plan = {("shard-000000.tar", 0): "500", ("shard-000000.tar", 1): "cut", ("shard-000004.tar", 0): "slow"}
    plan |= {("shard-000005.tar", 0): "500", ("shard-000006.tar.index.npz", 0): "cut"}
    faults = Failing(DomainDispatcherApplication(create_backend_app), plan)
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    s3fs.S3FileSystem.clear_instance_cache()  # or the server of an earlier test would be asked
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for path in write_shards(good(), tmp_path / "local", 7):
        open_shard(str(path))
        for file in (path, path.with_name(path.name + ".index.npz")):
            client.upload_file(str(file), BUCKET, f"train/{file.name}")
    yield faults, tmp_path / "local"
    server.shutdown()
    thread.join()


def test_every_sample_comes_once_in_the_same_order_and_retries_are_counted(failing_s3, tmp_path, monkeypatch):
    monkeypatch.setattr("simla_ds.data.remote.FIRST_WAIT", 0.01)
    faults, local = failing_s3
    assert len(find_shards(f"s3://{BUCKET}/train/", remote=True)) == 8
    source = remote(f"s3://{BUCKET}/train/", tmp_path, monkeypatch, workers=2, batch_size=7)
    found = ids(take(source, 16))
    source.close()
    assert found == ids(take(loader(str(local), batch_size=7), 16))
    assert Counter(found[:COUNT]) == keys()
    assert (faults.met["500"], faults.met["cut"], faults.met["slow"]) == (2, 2, 1)
    assert source.retried == 4
    assert not source.skipped

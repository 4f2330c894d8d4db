"""Errors of an object store's client are mapped to the end of a file or to an outage."""

from types import SimpleNamespace
from typing import Any

import pytest

from vjepa_data.corpus import remote
from vjepa_data.corpus.remote import StoreUnreachable, read_range


def store_that_raises(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    async def cat_file(*_: Any, **__: Any) -> bytes:
        raise error

    asyn = pytest.importorskip("fsspec.asyn")
    store = SimpleNamespace(loop=asyn.get_loop(), _cat_file=cat_file)
    monkeypatch.setattr(remote, "object_store", lambda scheme, **_: store)
    monkeypatch.setattr(remote, "OUTAGE_LIMIT_S", 0.0)


def test_a_range_past_the_end_of_an_object_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("s3fs.errors")
    botocore = pytest.importorskip("botocore.exceptions")
    said = {"Error": {"Code": "InvalidRange", "Message": "The requested range is not satisfiable"}}
    store_that_raises(monkeypatch, errors.translate_boto_error(botocore.ClientError(said, "GetObject")))
    assert read_range("s3://bucket/a.tar", 1 << 20, 10) == b""


def test_another_client_error_is_not_the_end_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("s3fs.errors")
    botocore = pytest.importorskip("botocore.exceptions")
    said = {"Error": {"Code": "InvalidArgument", "Message": "no"}}
    store_that_raises(monkeypatch, errors.translate_boto_error(botocore.ClientError(said, "GetObject")))
    with pytest.raises(StoreUnreachable):
        read_range("s3://bucket/a.tar", 1 << 20, 10)

"""Test the cache: tensors come back bit for bit, and damaged or outdated entries do not."""

import torch

from pipeline.store.cache import Cache

TENSORS = {"logps": torch.tensor([1.5, -2.25, float("-inf")]), "more": torch.arange(4).view(2, 2)}


def test_round_trip(tmp_path):
    Cache(tmp_path / "c").remember("reference", "abc", TENSORS)
    found = Cache(tmp_path / "c").recall("reference", "abc")
    assert set(found) == set(TENSORS) and all(torch.equal(found[k], TENSORS[k]) for k in TENSORS)


def test_another_digest_gives_nothing(tmp_path):
    cache = Cache(tmp_path / "c")
    assert cache.recall("reference", "abc") is None
    cache.remember("reference", "abc", TENSORS)
    assert cache.recall("reference", "abd") is None and cache.recall("other", "abc") is None
    cache.remember("reference", "abd", TENSORS)
    assert cache.recall("reference", "abc") is None and cache.recall("reference", "abd") is not None
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["reference.safetensors"]


def test_a_damaged_file_gives_nothing(tmp_path):
    """Flip each byte of the file, and cut it at each length: it gives the same tensors or none."""
    cache = Cache(tmp_path / "c")
    cache.remember("reference", "abc", TENSORS)
    path = tmp_path / "c" / "reference.safetensors"
    whole = path.read_bytes()
    for i in range(len(whole)):
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :]):
            path.write_bytes(damaged)
            found = cache.recall("reference", "abc")
            assert found is None or all(torch.equal(found[k], TENSORS[k]) for k in TENSORS), i

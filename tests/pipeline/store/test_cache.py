"""The cache: what was kept comes back to the bit, and nothing else comes back."""

import torch

from pipeline.store.cache import Cache

TENSORS = {"logps": torch.tensor([1.5, -2.25, float("-inf")]), "more": torch.arange(4).view(2, 2)}


def test_what_was_kept_comes_back_exactly(tmp_path):
    Cache(tmp_path / "c").remember("reference", "abc", TENSORS)
    found = Cache(tmp_path / "c").recall("reference", "abc")
    assert set(found) == set(TENSORS) and all(torch.equal(found[k], TENSORS[k]) for k in TENSORS)


def test_made_of_something_else_it_is_not_there(tmp_path):
    cache = Cache(tmp_path / "c")
    assert cache.recall("reference", "abc") is None
    cache.remember("reference", "abc", TENSORS)
    assert cache.recall("reference", "abd") is None and cache.recall("other", "abc") is None
    cache.remember("reference", "abd", TENSORS)
    assert cache.recall("reference", "abc") is None and cache.recall("reference", "abd") is not None
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["reference.safetensors"]


def test_damage_anywhere_is_as_if_it_were_not_there(tmp_path):
    """Each byte of the file flipped in turn, and the file cut at each length: the same numbers or none."""
    cache = Cache(tmp_path / "c")
    cache.remember("reference", "abc", TENSORS)
    path = tmp_path / "c" / "reference.safetensors"
    whole = path.read_bytes()
    for i in range(len(whole)):
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :]):
            path.write_bytes(damaged)
            found = cache.recall("reference", "abc")
            assert found is None or all(torch.equal(found[k], TENSORS[k]) for k in TENSORS), i

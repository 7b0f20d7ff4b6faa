"""Test the order of data: permutations, resumption, shards, seeds by name, splits by key."""

from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.streams import Stream, derive_seed, grouped_by_length, held_out

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
sizes, seeds = st.integers(1, 40), st.integers(0, 2**63 - 1)


class TestSeeds:
    def test_the_same_parts_give_the_same_seed_and_others_another(self):
        parts = [
            (0, "rollout", 1, 2),
            (0, "rollout", 2, 1),
            (1, "rollout", 1, 2),
            (0, "held-out", 1, 2),
            (0, "rollout", 12),
            (0, "rollout", 1, 2, 0),
        ]
        assert len({derive_seed(*p) for p in parts}) == len(parts)
        assert derive_seed(*parts[0]) == derive_seed(*parts[0])

    def test_parts_do_not_run_together(self):
        assert derive_seed(1, 23) != derive_seed(12, 3)

    def test_a_seed_is_one_that_torch_takes(self):
        import torch

        for i in range(50):
            seed = derive_seed("x", i)
            assert 0 <= seed < 2**63
            torch.Generator().manual_seed(seed)

    def test_it_does_not_change_from_version_to_version(self):
        """Check one seed by hand: sha256 of "0<US>a", first 8 bytes, halved."""
        import hashlib

        assert derive_seed(0, "a") == int(hashlib.sha256(b"0\x1fa").hexdigest()[:16], 16) // 2


class TestStream:
    def test_every_epoch_is_a_permutation(self):
        @SETTINGS
        @given(sizes, seeds)
        def permutes(size, seed):
            stream = Stream(size, seed)
            for _ in range(3):
                assert sorted(stream.take(size)) == list(range(size))

        permutes()

    def test_epochs_and_seeds_differ(self):
        stream = Stream(30, 1)
        first, second = stream.take(30), stream.take(30)
        assert first != second and first != Stream(30, 2).take(30)

    def test_batches_of_any_size_give_the_same_order(self):
        """Check also batches that cross an epoch, or are longer than one."""

        @SETTINGS
        @given(sizes, seeds, st.lists(st.integers(0, 90), max_size=6))
        def same_order(size, seed, batches):
            stream = Stream(size, seed)
            taken = [i for n in batches for i in stream.take(n)]
            assert taken == Stream(size, seed).take(sum(batches))

        same_order()

    def test_resumed_equals_straight(self):
        """Check resumption from the state, from only the cursor, and after stepping back."""

        @SETTINGS
        @given(sizes, seeds, st.integers(0, 100), st.integers(0, 50))
        def resumes(size, seed, before, after):
            straight = Stream(size, seed)
            straight.take(before)
            state = straight.state_dict()
            expected = straight.take(after)
            resumed = Stream(size, seed)
            resumed.take(7)
            resumed.load_state_dict(state)
            assert resumed.take(after) == expected == Stream(size, seed, cursor=before).take(after)

        resumes()

    def test_shards_partition_every_batch(self):
        """Check that each index goes to one rank, in the unsharded order, at any world size."""

        @SETTINGS
        @given(sizes, seeds, st.integers(1, 5), st.lists(st.integers(0, 30), min_size=1, max_size=4))
        def partitions(size, seed, world, batches):
            alone, ranks = Stream(size, seed), [Stream(size, seed, rank=r, world=world) for r in range(world)]
            for n in batches:
                whole, shares = alone.take(n), [r.take(n) for r in ranks]
                assert [shares[i % world][i // world] for i in range(n)] == whole
                assert sum(map(len, shares)) == n and len({r.cursor for r in ranks}) == 1

        partitions()

    def test_a_state_of_another_seed_is_refused(self):
        with pytest.raises(ValueError, match="seed"):
            Stream(5, 1).load_state_dict(Stream(5, 2).state_dict())

    def test_an_empty_stream_is_refused(self):
        with pytest.raises(ValueError):
            Stream(0, 1)


class TestHeldOut:
    keys: ClassVar = [f"prompt {i}" for i in range(400)]

    def test_every_row_is_on_one_side_and_about_the_fraction_is_held_out(self):
        train, held = held_out(self.keys, 0.1)
        assert sorted(train + held) == list(range(400)) and 25 <= len(held) <= 55

    def test_rows_of_one_key_are_on_one_side(self):
        """Check that rows of one prompt are never on both sides."""
        doubled = [k for k in self.keys[:50] for _ in range(3)]
        train, held = held_out(doubled, 0.2)
        assert not {doubled[i] for i in train} & {doubled[i] for i in held} and held

    def test_the_order_of_rows_does_not_count(self):
        _, held = held_out(self.keys, 0.1)
        backwards = self.keys[::-1]
        assert {backwards[i] for i in held_out(backwards, 0.1)[1]} == {self.keys[i] for i in held}

    def test_a_key_stays_on_its_side_whatever_else_is_in_the_file(self):
        """Check that no prompt changes sides if a file grows or is read with a limit."""
        small = self.keys[:150]

        def held_of(keys):
            return {keys[i] for i in held_out(keys, 0.1)[1]}

        assert held_of(small) == held_of(self.keys) & set(small)

    def test_at_least_the_given_number_is_held_out_and_one_stays(self):
        assert len(held_out(self.keys[:3], 0.01)[1]) == 1
        assert len(held_out(self.keys[:30], 0.01, least=4)[1]) == 4
        train, held = held_out(self.keys[:3], 0.99)
        assert len(train) >= 1 and len(held) >= 1

    def test_a_fraction_of_zero_holds_nothing_out(self):
        assert held_out(self.keys, 0.0)[1] == []


class TestGroupedByLength:
    lengths: ClassVar = [5 + (37 * i) % 50 for i in range(200)]

    def order(self, count, seed=1):
        return grouped_by_length(self.lengths, 8, count, seed, window=5)

    def test_whole_windows_hold_the_rows_of_the_plain_stream(self):
        """Check that grouping loses and repeats no row: five windows of 40 are an epoch."""
        assert sorted(self.order(200)) == list(range(200))
        assert sorted(self.order(40)) == sorted(Stream(200, 1).take(40))

    def test_each_pass_over_few_rows_holds_every_row_once(self):
        """Check windows longer than a pass, and passes that are not a whole number of batches."""

        @SETTINGS
        @given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 16), seeds)
        def covers(size, batch_size, window, seed):
            lengths = [1 + (7 * i) % 5 for i in range(size)]
            order = grouped_by_length(lengths, batch_size, 3 * size, seed, window)
            whole = size // batch_size * batch_size  # the rest shares a batch with the next pass
            assert len({*order[:whole]}) == whole
            if size == whole:
                assert all(sorted(order[k * size : (k + 1) * size]) == list(range(size)) for k in range(3))

        covers()

    def test_rows_of_a_batch_have_similar_lengths(self):
        """Check that batches of 8 need less than half of the padding of the plain stream."""

        def padding(order):
            batches = [[self.lengths[i] for i in order[k : k + 8]] for k in range(0, len(order), 8)]
            return sum(8 * max(b) - sum(b) for b in batches)

        assert padding(self.order(200)) < 0.5 * padding(Stream(200, 1).take(200))

    def test_batches_are_not_ordered_by_length(self):
        longest = [max(self.lengths[i] for i in self.order(200)[k : k + 8]) for k in range(0, 40, 8)]
        assert longest != sorted(longest) and longest != sorted(longest, reverse=True)

    def test_a_longer_run_begins_like_a_shorter_one(self):
        assert self.order(300)[:110] == self.order(110) and len(self.order(110)) == 110

    def test_the_seed_gives_the_order(self):
        assert self.order(80) == self.order(80) != self.order(80, seed=2)

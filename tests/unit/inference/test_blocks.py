"""The block pool: counts of holders, blocks of equal beginnings found again, and which is given up next."""

from megatron_deepseek.inference.blocks import BlockPool, block_hashes


def test_a_hash_knows_all_tokens_before_it():
    tokens = [1, 2, 3, 4, 5, 6, 7]
    first, second = block_hashes(tokens, 3, [])
    assert block_hashes([1, 2, 3, 9, 9, 9], 3, [])[0] == first
    assert block_hashes([0, 2, 3, 4, 5, 6], 3, [])[1] != second  # the same three tokens after others
    assert block_hashes(tokens, 3, [first]) == [first, second]
    assert block_hashes([1, 2], 3, []) == []


def test_blocks_are_shared_and_counted():
    pool, hashes = BlockPool(4), block_hashes([1, 2, 3, 4, 5, 6], 2, [])
    blocks = pool.allocate(3)
    for block, each in zip(blocks, hashes):
        pool.register(block, each)
    assert pool.share(hashes[:2]) == blocks[:2] and pool.share(block_hashes([9, 9], 2, [])) == []
    pool.release(blocks)
    assert (pool.used, pool.available) == (2, 2)  # two are still held by whom they were shared with
    pool.release(blocks[:2])
    assert (pool.used, pool.available) == (0, 4)
    assert pool.share(hashes) == blocks  # nobody held them, and they still have their tokens


def test_the_block_used_longest_ago_goes_first_and_of_a_sequence_the_last():
    pool = BlockPool(4)
    old, new = (block_hashes(tokens, 1, []) for tokens in ([1, 2], [3, 4]))
    held = [pool.allocate(2), pool.allocate(2)]
    for blocks, hashes in zip(held, (old, new)):
        for block, each in zip(blocks, hashes):
            pool.register(block, each)
    pool.release(held[0])
    pool.release(held[1])
    assert pool.allocate(1) == [held[0][1]]
    assert pool.share(old) == held[0][:1] and pool.share(new) == held[1]


def test_a_block_with_tokens_that_are_known_already_is_not_found():
    pool, (known,) = BlockPool(2), block_hashes([1, 2], 2, [])
    first, second = pool.allocate(2)
    pool.register(first, known)
    pool.register(second, known)
    pool.release([second])
    assert pool.share([known]) == [first] and pool.allocate(1) == [second]


def test_nothing_is_found_after_weights_have_changed():
    pool, hashes = BlockPool(3), block_hashes([1, 2, 3, 4], 2, [])
    blocks = pool.allocate(2)
    for block, each in zip(blocks, hashes):
        pool.register(block, each)
    pool.release(blocks[1:])
    pool.forget()
    assert pool.share(hashes) == [] and pool.available == 2
    pool.release(blocks[:1])
    assert sorted(pool.allocate(3)) == [1, 2, 3]

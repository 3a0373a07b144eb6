"""The random words behind dropout, from any place on: those of csrc/format.h, without those before them."""

import torch

MULTIPLIERS, WEYL, ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10
WORD = 0xFFFFFFFF


def words(seed: int, start: int, stop: int) -> torch.Tensor:
    """Words start .. stop - 1 of Philox4x32-10(seed), int64 below 2^32; start and stop are multiples of 4.

    A product of two 32-bit words fits 64 bits; int64 holds the same bits, so that its wrap-around does no harm.
    """
    block = torch.arange(start // 4, stop // 4)
    c0, c1 = block & WORD, block >> 32
    c2 = c3 = torch.zeros_like(block)
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = second >> 32 & WORD ^ c1 ^ k0, second & WORD, first >> 32 & WORD ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return torch.stack([c0, c1, c2, c3], dim=1).flatten()


def kept(shape: tuple[int, int], first_row: int, dropout: float, seed: int) -> torch.Tensor:
    """bool, True where dropout keeps a value: `shape` rows and columns of a matrix, from row first_row on."""
    rows, columns = shape
    return (words(seed, first_row * columns, (first_row + rows) * columns) >= round(dropout * 2**32)).reshape(shape)

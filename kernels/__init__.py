"""Kernels of mixture-of-experts layers; a folder each, and nothing of ours is imported here.

Dimension letters. Upper-case ones mean what they mean in `jaxmoe.params`: R tokens, K choices of a token, Z = R*K
slots, D width, E experts (here those that are held), G parts of the first matrix, F hidden width of an expert. What
only kernels have is lower case:

    f  width of the pre-activation, G*F
    r  rank of a low-rank pair
    n  rows of any matrix of a grouped product, that is columns of what comes out
    c  columns of it, what the product contracts over
    b  blocks of such a row, where it is packed, that have one scale each
    t  tiles of slots, each of one expert
    p  padded slots: t times the rows of a tile
"""

"""The source of all randomness: a generator that is a function of its arguments.

No state is kept and none is shared. Which sample fills a slot, where its clip starts, how it is cropped and which of
its tokens are hidden are each drawn from a generator of their own, so that one more draw in one place moves nothing in
another.
"""

import hashlib
import struct

import numpy as np


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Make the generator that belongs to a seed, a purpose and a few numbers.

    The arguments are hashed (BLAKE2b, 128 bits) to the key of a Philox counter-based generator: equal arguments
    give equal streams in every process, on every machine; different ones give independent streams.
    NumPy promises Philox's bits for ever, but the methods of `Generator` only within a version; a test holds a
    recording of them, so that an upgrade that would change a run is noticed.

    Args:
        seed: seed of the run.
        purpose: what is drawn, e.g. "crop"; keeps streams apart that share their numbers.
        numbers: integers that fit 64 bits with a sign, usually (step, slot).

    Returns:
        A generator at the start of its stream. About 10 microseconds.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    name = purpose.encode()
    text = struct.pack(f"<q{len(numbers)}qI", seed, *numbers, len(name)) + name
    key = hashlib.blake2b(text, digest_size=16, person=b"vjepa.draws").digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype="<u8")))

"""What fuzzing found and what it begins with: every input, and many simple changes of each, without atheris."""

import random

import pytest

from tests.fuzz.run import CORPUS
from tests.fuzz.targets import TARGETS

CHANGES = 150
NUMBERS = (b"0", b"-1", b"1", b"65536", b"4294967296", b"9" * 15, b"1" * 5000, b'""', b"null", b"[[]]", b"1e999")


def changed(content, rng):
    """The input with a piece lost, doubled, or put in the place of another, or another number."""
    start, length = rng.randrange(len(content) + 1), rng.choice((1, 2, 8, 64, 512))
    other = rng.randrange(len(content) + 1)
    how = rng.randrange(4)
    if how == 0:
        return content[:start] + content[start + length :]
    if how == 1:
        return content[:start] + content[other : other + length] + content[start:]
    if how == 2:
        return content[:start] + rng.randbytes(1) + content[start + 1 :]
    digits = [place for place, byte in enumerate(content) if 48 <= byte < 58]
    first = last = rng.choice(digits or [0])
    while last < len(content) and 48 <= content[last] < 58:
        last += 1
    return content[:first] + rng.choice(NUMBERS) + content[last:]


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_ends_well_or_in_a_sentence(target):
    rng, found = random.Random(0), sorted((CORPUS / target).iterdir())
    assert found
    for path in found:
        content = path.read_bytes()
        TARGETS[target](content)
        for _ in range(CHANGES):
            TARGETS[target](changed(content, rng))

"""Names of the weight files beside an ONNX model, read from the protobuf itself, in any order of its fields.

Of each message only the fields that can lead to a tensor are followed; numbers are those of onnx.proto.
"""

from collections.abc import Iterator

# message → field number → the message in it
FOLLOWED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
DEEPEST = 100  # messages within each other


def outside(content: bytes) -> list[str]:
    """Names of the files that hold weights of a model, in their order. ValueError where it is no protobuf."""
    try:
        return sorted({bytes(name).decode() for name in _locations(memoryview(content), "model", 0)})
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError("the file is no ONNX model, or is cut off") from error


def _locations(message: memoryview, kind: str, depth: int) -> Iterator[memoryview]:
    if depth > DEEPEST:
        raise ValueError("the file's graphs lie too deep within each other")
    entry = dict[int, memoryview]()
    for number, value in _fields(message):
        if kind == "entry":
            entry[number] = value
        elif number in FOLLOWED[kind]:
            yield from _locations(value, FOLLOWED[kind][number], depth + 1)
    if entry.get(1) == b"location":
        yield entry.get(2, memoryview(b""))


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of a message's fields that have a length. IndexError where it is cut off."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        wire = key & 7
        if wire == 0:
            _, at = _number(message, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            length, at = _number(message, at)
            yield key >> 3, message[at : at + length]
            at += length
        else:
            raise IndexError(f"wire type {wire}")
    if at > len(message):
        raise IndexError("cut off")


def _number(message: memoryview, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where the next field begins."""
    value = shift = 0
    while message[at] & 128:
        value |= (message[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if shift > 63:
            raise IndexError("number")
    return value | message[at] << shift, at + 1

"""Read the rows of an offline run of wandb: records of protobuf in LevelDB's log format."""

import json
import struct

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path):
    """Return the records of a file, as bytes; one that is cut off at the end is left out."""
    content, at, found, parts = path.read_bytes(), HEADER, [], []
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        part = content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        parts = [*parts, part] if kind in (MIDDLE, LAST) else [part]
        if kind in (FULL, LAST):
            found.append(b"".join(parts))
    return found


def history(folder):
    """Return the rows of all offline runs below a folder, as dicts."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for content in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows

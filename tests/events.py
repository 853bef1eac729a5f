"""events.py - reads a run's TensorBoard file with nothing of TensorBoard's, and compares it with metrics.jsonl.

    python3 tests/events.py OUT            OUT: --output_dir of examples/train.  Only Python's own library is needed.

TFRecord: length, masked CRC-32C of it, bytes, masked CRC-32C of them.  Event: 1 wall_time (double), 2 step, 3 file_version,
5 summary { 1 value { 1 tag, 2 simple_value (float) } }.  Prints `N events` and exits 0, or says what is wrong."""
import glob
import json
import struct
import sys

TABLE = []
for i in range(256):
    for _ in range(8):
        i = i >> 1 ^ (0x82F63B78 if i & 1 else 0)
    TABLE.append(i)


def crc32c(data):
    c = 0xFFFFFFFF
    for b in data:
        c = TABLE[(c ^ b) & 255] ^ c >> 8
    return c ^ 0xFFFFFFFF


def masked(data):
    c = crc32c(data)
    return ((c >> 15 | c << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(data):
    at = 0
    while at < len(data):
        n, = struct.unpack_from("<Q", data, at)
        if struct.unpack_from("<I", data, at + 8)[0] != masked(data[at:at + 8]):
            sys.exit("events: byte %d: the checksum of a length is wrong" % at)
        body = data[at + 12:at + 12 + n]
        if len(body) != n or struct.unpack_from("<I", data, at + 12 + n)[0] != masked(body):
            sys.exit("events: byte %d: the checksum of a record is wrong" % at)
        yield body
        at += 16 + n


def varint(data, at):
    x = shift = 0
    while True:
        b = data[at]
        x |= (b & 127) << shift
        at, shift = at + 1, shift + 7
        if b < 128:
            return x, at


def fields(data):
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        elif key & 7 == 1:
            value, at = struct.unpack_from("<d", data, at)[0], at + 8
        elif key & 7 == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        elif key & 7 == 2:
            n, at = varint(data, at)
            value, at = data[at:at + n], at + n
            if len(value) != n:
                sys.exit("events: a field is cut short")
        else:
            sys.exit("events: wire type %d" % (key & 7))
        yield key >> 3, value


def main():
    if crc32c(b"123456789") != 0xE3069283:
        sys.exit("events: this script's CRC-32C is wrong")
    names = glob.glob(sys.argv[1] + "/events.out.tfevents.*")
    if len(names) != 1:
        sys.exit("events: %d files" % len(names))
    events = [list(fields(r)) for r in records(open(names[0], "rb").read())]
    lines = [json.loads(line) for line in open(sys.argv[1] + "/metrics.jsonl")]
    if dict(events[0]).get(3) != b"brain.Event:2" or len(events) != len(lines) + 1:
        sys.exit("events: %d events for %d lines, the first with version %s" % (len(events), len(lines), dict(events[0]).get(3)))
    for line, event in zip(lines, events[1:]):
        event = dict(event)
        values = {}
        for _, v in fields(event[5]):
            v = dict(v for v in fields(v))
            values[v[1].decode()] = v[2]
        want = {k: v for k, v in line.items() if k not in ("step", "time") and not k.startswith("seconds_")}
        if event.get(2, 0) != line["step"] or event[1] != line["time"] or set(values) != set(want):
            sys.exit("events: step %s: %s is not %s" % (line["step"], values, want))
        for k in want:
            if values[k] != struct.unpack("<f", struct.pack("<f", want[k]))[0]:
                sys.exit("events: step %s: %s is %r, not %r" % (line["step"], k, values[k], want[k]))
    print("%d events" % len(events))


main()

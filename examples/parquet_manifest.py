"""parquet_manifest.py - Pick-a-Pic, or another set of preferences in Parquet, as a folder that dpo_pairs_load reads.

   need    pip install pyarrow
   run     python examples/parquet_manifest.py OUT part-000.parquet part-001.parquet ...
   result  OUT/pairs.jsonl and OUT/images/: one file for each different picture, named by its content, so that running it
           again, or after it was stopped, writes no picture twice

   Columns: caption or prompt, jpg_0, jpg_1 (bytes, or {"bytes", "path"} as datasets stores pictures), label_0 1, 0 or 0.5
   (a tie: written, and dropped by the reader); or prompt, chosen, rejected.  Rows that say of themselves has_label = false
   are left out.  Other columns that are short stay in the manifest: model_0, model_1, user_id, ranking_id. """
import hashlib
import json
import os
import sys

import pyarrow.parquet as pq

KEEP = ("model_0", "model_1", "user_id", "ranking_id")
ENDINGS = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"GIF8", ".gif"), (b"BM", ".bmp"))


def picture(out, value):
    """Store the bytes of a picture; its path in the manifest, or None if there is none."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        return None
    ending = next((e for sign, e in ENDINGS if data.startswith(sign)), ".bin")
    digest = hashlib.sha256(data).hexdigest()[:32]
    name = os.path.join("images", digest[:2], digest + ending)
    path = os.path.join(out, name)
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".part", "wb") as f:
            f.write(data)
        os.replace(path + ".part", path)
    return name.replace(os.sep, "/")


def manifest_row(out, row):
    """One line of the manifest, or None for a row without a preference or without a picture."""
    prompt = row.get("caption") if row.get("caption") is not None else row.get("prompt")
    names = ("chosen", "rejected") if row.get("chosen") is not None else ("jpg_0", "jpg_1")
    label = row.get("label_0")
    if prompt is None or row.get("has_label") is False or (names[0] == "jpg_0" and label not in (0, 0.5, 1)):
        return None
    paths = [picture(out, row.get(name)) for name in names]
    if None in paths:
        return None
    if names[0] == "chosen":
        line = {"prompt": prompt, "chosen": paths[0], "rejected": paths[1]}
    else:
        line = {"caption": prompt, "image_0": paths[0], "image_1": paths[1], "label_0": label}
    line.update({k: row[k] for k in KEEP if isinstance(row.get(k), (str, int))})
    return line


def main():
    if len(sys.argv) < 3:
        sys.exit("usage: parquet_manifest.py OUT FILE.parquet ...")
    out, rows, written = sys.argv[1], 0, 0
    os.makedirs(out, exist_ok=True)
    temporary = os.path.join(out, "pairs.jsonl.part")
    with open(temporary, "w", encoding="utf-8", newline="\n") as f:
        for path in sys.argv[2:]:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=64):     # pictures: a few MB a row
                for row in batch.to_pylist():
                    rows += 1
                    line = manifest_row(out, row)
                    if line:
                        f.write(json.dumps(line, ensure_ascii=False) + "\n")
                        written += 1
            print(f"{path}: {rows} rows, {written} written", flush=True)
    os.replace(temporary, os.path.join(out, "pairs.jsonl"))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Prints the column "text" of Parquet files as JSON lines, in order; needs pyarrow.

    dev/parquet_to_jsonl.py FILE... | build/tokenize --tokenizer DIR --out PREFIX -.jsonl

Reads a batch of rows at a time, so the memory does not grow with the files.
"""
import json
import os
import sys


def main(paths):
    if not paths or paths[0].startswith("-"):
        sys.exit(__doc__)
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        sys.exit("parquet_to_jsonl: pyarrow is missing: pip install pyarrow")
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
            if "text" not in file.schema_arrow.names:
                sys.exit(f"parquet_to_jsonl: {path}: found columns {file.schema_arrow.names}, "
                         f"expected 'text'")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        sys.exit(f"parquet_to_jsonl: {path}: row {row}: found {text!r:.40}, "
                                 f"expected a string")
                    sys.stdout.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    row += 1
        except BrokenPipeError:
            # The reader has said why it ended; the pipe must not be flushed again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (OSError, ValueError) as error:       # pyarrow's own errors are among these
            sys.exit(f"parquet_to_jsonl: {path}: {error}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main(sys.argv[1:])

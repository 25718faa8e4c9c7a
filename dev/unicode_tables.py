#!/usr/bin/env python3
"""Writes llmc/unicode.h: which of the code points are letters, numbers and white space.

    python3 dev/unicode_tables.py > llmc/unicode.h

Letters are the general categories L*, numbers N*; white space is the property White_Space: the
categories Z* with U+0009 to U+000D and U+0085. The tables come from the module unicodedata of
Python, whose Unicode version must be VERSION: 3.14 has it, and so has any Python after
`pip install unicodedata2==16.0.0`. A newer Unicode moves thousands of code points from "other" to
"letter", and with them the borders of tokens, so the version is changed on purpose or not at all:
16 is what tiktoken 0.14 and tokenizers 0.23 split by.
"""
import sys

VERSION = "16.0.0"
BLOCK = 128                   # code points of a block: 32 bytes at 2 bits each
OTHER, LETTER, NUMBER, SPACE = range(4)

try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata


def char_class(code):
    category = unicodedata.category(chr(code))
    if category[0] == "Z" or 0x09 <= code <= 0x0D or code == 0x85:
        return SPACE
    return {"L": LETTER, "N": NUMBER}.get(category[0], OTHER)


def rows(name, kind, values, comment):
    out = [f"// {comment}", f"static const {kind} {name}[{len(values)}] = {{"]
    line = "   "
    for value in values:
        if len(line) + len(str(value)) + 2 > 100:
            out.append(line)
            line = "   "
        line += f" {value},"
    return out + [line, "};"]


def main():
    if unicodedata.unidata_version != VERSION:
        sys.exit(f"unicode_tables: this Python knows Unicode {unicodedata.unidata_version}, wanted "
                 f"{VERSION}\n                pip install unicodedata2=={VERSION}")
    classes = [char_class(code) for code in range(0x110000)]
    end = max(code for code in range(0x110000) if classes[code] != OTHER) + 1
    end += -end % BLOCK
    numbers, blocks, index = {}, [], []
    for start in range(0, end, BLOCK):
        part = classes[start:start + BLOCK]
        packed = tuple(sum(part[i + k] << 2 * k for k in range(4)) for i in range(0, BLOCK, 4))
        if packed not in numbers:
            numbers[packed] = len(numbers)
            blocks += packed
        index.append(numbers[packed])
    print(f"""\
/*
Classes of the code points of Unicode {VERSION}; made by dev/unicode_tables.py, not by hand.

The class of code point c < UNICODE_END is two bits of the block that holds it:

    UNICODE_BLOCKS[32 * UNICODE_INDEX[c / 128] + c % 128 / 4] >> 2 * (c % 4) & 3

with 0 other, 1 letter (L*), 2 number (N*), 3 white space. From UNICODE_END on all are "other".

test        test/test_tokenizer.c: unicode
*/
#pragma once

#define UNICODE_VERSION "{VERSION}"

enum {{ UNICODE_END = {end:#x} }};
""")
    if len(numbers) > 256:
        sys.exit(f"unicode_tables: {len(numbers)} different blocks do not fit a byte")
    print("\n".join(rows("UNICODE_INDEX", "unsigned char", index,
                         f"the block of each {BLOCK} code points")))
    print()
    print("\n".join(rows("UNICODE_BLOCKS", "unsigned char", blocks,
                         f"{len(numbers)} blocks of 32 bytes, four code points to a byte")))


main()

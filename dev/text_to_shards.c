/*
Text files to token shards, one token per byte: what the quick start trains on.

    text_to_shards --out PREFIX [--val-fraction 0.1] FILE...

writes PREFIX_train_000001.bin, ... and PREFIX_val_000000.bin in the format of llmc/dataloader.h.
Ids 0 to 255 are the bytes, 256 opens a document; train with --vocab 320. A file is a document. The
last val-fraction of all bytes, in the order of the files, is for validation; a file across the cut
becomes a document on each side, so that each set opens with token 256. A shard holds at most 100
million tokens, as FineWeb's do.

test        test/test_services.c: text_to_shards
*/
#include "llmc/common.h"
#include "llmc/dataloader.h"
#include "llmc/text.h"

enum { TOKENS_PER_SHARD = 100000000 };

// ---- writing a set of shards ---------------------------------------------------------------

typedef struct Writer {
    const char* prefix;
    const char* set;            // "train" or "val"
    int number;                 // of the shard under way
    FILE* file;                 // NULL: none under way
    char path[4096];
    int32_t tokens;             // in the shard under way
} Writer;

static void writer_path(char* path, size_t size, const Writer* w, int number) {
    int n = snprintf(path, size, "%s_%s_%06d.bin", w->prefix, w->set, number);
    REQUIRE(n > 0 && (size_t)n < size, "--out is too long");
}

// The header counts tokens, so it is written when they are known.
static void writer_finish(Writer* w) {
    if (!w->file) return;
    int32_t header[SHARD_HEADER_BYTES / 4] = { SHARD_MAGIC, SHARD_VERSION, w->tokens };
    bool ok = fseek(w->file, 0, SEEK_SET) == 0 && fwrite(header, sizeof header, 1, w->file) == 1;
    int error = errno;
    ok = fclose(w->file) == 0 && ok;
    REQUIRE(ok, "%s: cannot be written: %s", w->path, strerror(error));
    printf("%s: %d tokens\n", w->path, w->tokens);
    w->file = NULL;
    w->number++;
}

static void writer_put(Writer* w, int token) {
    if (w->file && w->tokens == TOKENS_PER_SHARD) writer_finish(w);
    if (!w->file) {
        static const char HEADER[SHARD_HEADER_BYTES] = {0};
        writer_path(w->path, sizeof w->path, w, w->number);
        w->file = fopen(w->path, "wb");
        REQUIRE(w->file, "%s: cannot be created: %s", w->path, strerror(errno));
        REQUIRE(fwrite(HEADER, sizeof HEADER, 1, w->file) == 1, "%s: cannot be written: %s",
                w->path, strerror(errno));
        w->tokens = 0;
    }
    uint16_t id = (uint16_t)token;
    REQUIRE(fwrite(&id, sizeof id, 1, w->file) == 1, "%s: cannot be written: %s", w->path,
            strerror(errno));
    w->tokens++;
}

// A shard of an earlier, larger run would be found by the same pattern and trained on.
static void writer_check_leftover(const Writer* w) {
    char path[4096];
    writer_path(path, sizeof path, w, w->number);
    REQUIRE(access(path, F_OK) != 0,
            "%s is there from before and does not belong to these\nremove it", path);
}

// ---- main ----------------------------------------------------------------------------------

static int64_t file_bytes(const char* path) {
    struct stat info;
    REQUIRE(stat(path, &info) == 0, "%s: %s", path, strerror(errno));
    REQUIRE(S_ISREG(info.st_mode), "%s: not a file", path);
    return info.st_size;
}

int main(int argc, char** argv) {
    static Writer train, val;
    double val_fraction = 0.1;
    const char* prefix = NULL;
    int files = 0;
    program_name = "text_to_shards";
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "--", 2) != 0) {
            argv[files++] = argv[i];    // the files stay behind, in order
            continue;
        }
        const char *flag = argv[i], *value = argv[i + 1];
        bool out = strcmp(flag, "--out") == 0;
        REQUIRE(out || strcmp(flag, "--val-fraction") == 0,
                "no flag %s; there are --out and --val-fraction", flag);
        REQUIRE(value, "%s wants a value", flag);
        i++;
        if (out) {
            prefix = value;
        } else {
            char* end;
            val_fraction = strtod(value, &end);
            REQUIRE(end != value && *end == 0 && val_fraction >= 0 && val_fraction <= 1,
                    "--val-fraction must be a number from 0 to 1, got '%s'", value);
        }
    }
    REQUIRE(prefix && files, "nothing to do\n"
            "usage: text_to_shards --out PREFIX [--val-fraction 0.1] FILE...");
    train.prefix = val.prefix = prefix;
    train.set = "train";
    val.set = "val";
    train.number = 1;           // FineWeb's numbers: shard 0 is the validation set

    int64_t total = 0, position = 0;
    for (int i = 0; i < files; i++) total += file_bytes(argv[i]);
    REQUIRE(total > 0, "%s%s: no bytes to make tokens of", argv[0], files > 1 ? ", ..." : "");
    int64_t cut = (int64_t)((1 - val_fraction) * (double)total);
    for (int i = 0; i < files; i++) {
        FILE* file = fopen(argv[i], "rb");
        REQUIRE(file, "%s: %s", argv[i], strerror(errno));
        Writer* open_in = NULL;     // the set in which this file has a document
        for (int byte; (byte = getc(file)) != EOF; position++) {
            Writer* w = position < cut ? &train : &val;
            if (w != open_in) writer_put(w, BYTE_END);
            open_in = w;
            writer_put(w, byte);
        }
        REQUIRE(!ferror(file), "%s: %s", argv[i], strerror(errno));
        fclose(file);
    }
    writer_finish(&train);
    writer_finish(&val);
    writer_check_leftover(&train);
    writer_check_leftover(&val);
    return 0;
}

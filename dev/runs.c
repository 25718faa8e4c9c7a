/*
The runs there are: one line for each directory that --out made.

    runs [DIR...]       those below DIR, or DIR itself; without one those below runs

A run is a directory with a log.txt or a log.jsonl. Its line is read from log.jsonl, as far as that
goes: the log of a killed run may end in half a line, and a line that is no JSON is passed over. The
last word on what became of it is the lock, which the kernel takes from a process that is gone.

    running             the lock is held
    finished            all steps, and the weights are saved
    stopped: resume it  a signal came, there is a checkpoint (exit status 75)
    not finite          exit status 2
    failed              exit status 1
    killed or failed    it ended without a word in log.jsonl; log.txt may have one
    unknown             log.jsonl does not tell of its start

test        test/test_services.c: runs
*/
#include "llmc/json.h"
#include "llmc/log.h"

typedef struct RunRow {
    char path[TEXT_SIZE];
    char recipe[64], commit[64];
    int64_t step, steps, tokens;
    double val_loss, train_ms;
    int64_t checkpoint;         // -1: none
    bool started, result;       // since the last start
    int status;                 // -1: it has not said
} RunRow;

typedef struct RunTable {
    RunRow* rows;
    size_t count, room;
} RunTable;

// ---- a line of log.jsonl -------------------------------------------------------------------

// What the lines of all events may say.
typedef struct RunEvent {
    char event[64], commit[64], recipe[64];
    double step, steps, tokens, val_loss, train_ms, status;
} RunEvent;

static bool event_read_member(JsonReader* j, RunEvent* e, int depth);

static bool event_read_object(JsonReader* j, RunEvent* e, int depth) {
    if (!json_read_byte(j, '{', "'{'")) return false;
    for (bool more = true; more;) {
        if (!event_read_member(j, e, depth)) return false;
        json_read_space(j);
        more = j->at < j->n && j->text[j->at] == ',';
        j->at += more;
    }
    return json_read_byte(j, '}', "',' or '}'");
}

// The settings of the start are an object in the object; what else has depth is passed over.
static bool event_read_member(JsonReader* j, RunEvent* e, int depth) {
    const struct {
        const char* name;
        int depth;
        double* number;
        char* text;             // of 64 bytes
    } MEMBERS[] = {
        { "event", 0, NULL, e->event },          { "commit", 0, NULL, e->commit },
        { "step", 0, &e->step, NULL },           { "tokens", 0, &e->tokens, NULL },
        { "val_loss", 0, &e->val_loss, NULL },   { "train_ms", 0, &e->train_ms, NULL },
        { "status", 0, &e->status, NULL },       { "recipe", 1, NULL, e->recipe },
        { "steps", 1, &e->steps, NULL },
    };
    unsigned char *name, *text;
    size_t n;
    if (!json_read_string(j, &name, &n)) return false;
    bool settings = depth == 0 && n == 8 && memcmp(name, "settings", n) == 0;
    if (!json_read_byte(j, ':', "':'")) return false;
    if (settings) return event_read_object(j, e, 1);
    json_read_space(j);
    bool is_text = j->at < j->n && j->text[j->at] == '"';
    bool is_number = j->at < j->n && strchr("-0123456789", j->text[j->at]);
    for (size_t i = 0; i < sizeof MEMBERS / sizeof *MEMBERS; i++) {
        if (MEMBERS[i].depth != depth || strlen(MEMBERS[i].name) != n ||
            memcmp(MEMBERS[i].name, name, n) != 0) continue;
        if (MEMBERS[i].text && is_text) {
            if (!json_read_string(j, &text, &n)) return false;
            snprintf(MEMBERS[i].text, 64, "%.*s", (int)(n < 64 ? n : 63), text);
            return true;
        }
        if (MEMBERS[i].number && is_number) {
            size_t at = j->at;
            if (!json_read_number(j)) return false;
            *MEMBERS[i].number = strtod((const char*)j->text + at, NULL);
            return true;
        }
        break;
    }
    return json_skip_value(j, 100);
}

// False: the line is not whole, or no line of a log.
static bool event_read(RunEvent* e, char* line, size_t n) {
    memset(e, 0, sizeof *e);
    e->step = e->val_loss = e->status = NAN;
    JsonReader j = { (unsigned char*)line, n, 0, "" };
    if (!event_read_object(&j, e, 0)) return false;
    json_read_space(&j);
    return j.at == j.n;
}

// A number of things, or 0 where it is none.
static int64_t count_of(double x) {
    return x >= 0 && x < 1e15 ? (int64_t)x : 0;
}

static void row_take_event(RunRow* r, const RunEvent* e) {
    if (strcmp(e->event, "start") == 0) {
        snprintf(r->recipe, sizeof r->recipe, "%s", e->recipe);
        snprintf(r->commit, sizeof r->commit, "%s", e->commit);
        r->steps = count_of(e->steps);
        r->started = true;
        r->result = false;
        r->status = -1;
    } else if (strcmp(e->event, "train") == 0) {
        r->step = count_of(e->step);
        r->tokens = count_of(e->tokens);
        r->train_ms = e->train_ms;
    } else if (strcmp(e->event, "val") == 0) {
        r->val_loss = e->val_loss;
    } else if (strcmp(e->event, "result") == 0) {
        r->result = true;
    } else if (strcmp(e->event, "end") == 0) {
        r->status = (int)(count_of(e->status) % 256);
    }
}

// ---- directories ---------------------------------------------------------------------------

static void row_read(RunRow* r, const char* path) {
    char name[OUT_PATH], *line = NULL;
    size_t room = 0;
    memset(r, 0, sizeof *r);
    snprintf(r->path, sizeof r->path, "%s", path);
    r->val_loss = NAN;
    r->status = -1;
    snprintf(name, sizeof name, "%s/log.jsonl", path);
    FILE* file = fopen(name, "re");
    for (ssize_t n; file && (n = getline(&line, &room, file)) > 0;) {
        RunEvent e;
        if (event_read(&e, line, (size_t)n)) row_take_event(r, &e);
    }
    if (file) fclose(file);
    free(line);
    r->checkpoint = out_contents(path).checkpoint;
}

static bool is_run(const char* path) {
    static const char* const LOGS[] = { "log.jsonl", "log.txt" };
    char name[OUT_PATH];
    for (int i = 0; i < 2; i++) {
        snprintf(name, sizeof name, "%s/%s", path, LOGS[i]);
        if (access(name, F_OK) == 0) return true;
    }
    return false;
}

// There is no run in a run, and none in what cannot be read. Links are not followed, so that there
// is an end.
static void table_add_below(RunTable* t, const char* path, int depth) {
    char name[TEXT_SIZE];
    struct stat info;
    if (is_run(path)) {
        t->rows = (RunRow*)array_grow(t->rows, &t->room, t->count + 1, sizeof(RunRow));
        row_read(&t->rows[t->count++], path);
        return;
    }
    DIR* folder = depth ? opendir(path) : NULL;
    for (struct dirent* e; folder && (e = readdir(folder));) {
        if (e->d_name[0] == '.') continue;
        int n = snprintf(name, sizeof name, "%s/%s", path, e->d_name);
        if ((size_t)n >= sizeof name || lstat(name, &info) != 0 || !S_ISDIR(info.st_mode)) continue;
        table_add_below(t, name, depth - 1);
    }
    if (folder) closedir(folder);
}

// Numbers in names count as numbers: seed-2 stands before seed-10.
static int row_compare(const void* a, const void* b) {
    return strverscmp(((const RunRow*)a)->path, ((const RunRow*)b)->path);
}

// ---- the table -----------------------------------------------------------------------------

static const char* row_status(const RunRow* r) {
    if (out_is_claimed(r->path)) return "running";
    if (r->status == STATUS_AGAIN) return "stopped: resume it";
    if (r->status == STATUS_NOT_FINITE) return "not finite";
    if (r->status > 0) return "failed";
    if (r->result || r->status == STATUS_DONE) return "finished";
    return r->started ? "killed or failed" : "unknown";
}

enum { RUN_COLUMNS = 8, RUN_CELL = TEXT_SIZE };
static const char* const RUN_TITLES[RUN_COLUMNS] = { "run", "recipe", "commit", "step", "val loss",
                                                     "tokens/s", "checkpoint", "status" };

static void row_cells(char (*cells)[RUN_CELL], const RunRow* r) {
    snprintf(cells[0], RUN_CELL, "%s", r->path);
    snprintf(cells[1], RUN_CELL, "%s", *r->recipe ? r->recipe : "-");
    snprintf(cells[2], RUN_CELL, "%s", *r->commit ? r->commit : "-");
    snprintf(cells[3], RUN_CELL, "%" PRId64 "/%" PRId64, r->step, r->steps);
    if (isfinite(r->val_loss)) snprintf(cells[4], RUN_CELL, "%.4f", r->val_loss);
    else snprintf(cells[4], RUN_CELL, "-");
    if (r->train_ms > 0) snprintf(cells[5], RUN_CELL, "%.0f", 1e3 * (double)r->tokens / r->train_ms);
    else snprintf(cells[5], RUN_CELL, "-");
    if (r->checkpoint >= 0) snprintf(cells[6], RUN_CELL, "%" PRId64, r->checkpoint);
    else snprintf(cells[6], RUN_CELL, "-");
    snprintf(cells[7], RUN_CELL, "%s", row_status(r));
}

// Text to the left, numbers to the right; the last column ends its line.
static void cells_print(char (*cells)[RUN_CELL], const int* widths) {
    for (int k = 0; k < RUN_COLUMNS; k++) {
        bool number = k >= 3 && k <= 6, last = k == RUN_COLUMNS - 1;
        printf("%*s%s", last ? 0 : number ? widths[k] : -widths[k], cells[k], last ? "\n" : "  ");
    }
}

static void table_print(const RunTable* t) {
    char (*cells)[RUN_COLUMNS][RUN_CELL] =
        (char (*)[RUN_COLUMNS][RUN_CELL])host_alloc(t->count + 1, sizeof *cells);
    int widths[RUN_COLUMNS] = { 0 };
    for (int k = 0; k < RUN_COLUMNS; k++) snprintf(cells[0][k], RUN_CELL, "%s", RUN_TITLES[k]);
    for (size_t i = 0; i < t->count; i++) row_cells(cells[i + 1], &t->rows[i]);
    for (size_t i = 0; i <= t->count; i++)
        for (int k = 0; k < RUN_COLUMNS; k++)
            if ((int)strlen(cells[i][k]) > widths[k]) widths[k] = (int)strlen(cells[i][k]);
    for (size_t i = 0; i <= t->count; i++) cells_print(cells[i], widths);
    free(cells);
}

int main(int argc, char** argv) {
    enum { DEPTH = 8 };
    RunTable table = { NULL, 0, 0 };
    program_name = "runs";
    for (int i = 1; i < argc; i++)
        REQUIRE(argv[i][0] != '-', "no flag %s\nusage: runs [DIR...]", argv[i]);
    for (int i = 1; i < argc || i == 1; i++) {
        char path[TEXT_SIZE];
        struct stat info;
        snprintf(path, sizeof path, "%s", i < argc ? argv[i] : "runs");
        for (size_t n = strlen(path); n > 1 && path[n - 1] == '/'; n--) path[n - 1] = 0;
        bool there = stat(path, &info) == 0;
        REQUIRE(there && S_ISDIR(info.st_mode), "%s: %s\nname directories that hold runs", path,
                there ? "is no directory" : strerror(errno));
        table_add_below(&table, path, DEPTH);
    }
    if (table.count == 0) {
        printf("no runs in %s\n", argc > 1 ? argv[1] : "runs");
        return 0;
    }
    qsort(table.rows, table.count, sizeof(RunRow), row_compare);
    table_print(&table);
    free(table.rows);
    return 0;
}

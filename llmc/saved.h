/*
What a file says about the run that wrote it: the flags in the metadata of a file of weights
(--load) and in the manifest of a checkpoint (--resume).

    settings_parse(&cfg, argc, argv);
    settings_load(&cfg, &saved, argc, argv);            // what --load says about its model
    int refused = settings_differences(no, yes, sizeof no, &cfg, info.flags, path);

--load FILE needs no flags of the model: those that describe it and what its tokens mean are taken
from the file; a recipe and the command line win over them. Flags of the run (data, files,
optimizer, ranks) are never taken. A directory that holds a model.safetensors (a checkpoint, a
finished run) stands for that file.

--resume is of a run that goes on, so its flags are given again and compared: one that alters the
maths (flag_alters_maths) may not differ, others may and are reported.

test        test/test_services.c: saved; test/generate.sh
*/
#pragma once
#include "flags.h"
#include "json.h"
#include "safetensors.h"

#include <sys/stat.h>

#ifndef GIT_COMMIT
#define GIT_COMMIT "unknown"
#endif

typedef struct ModelFile {
    int64_t step;               // updates that were made
    char commit[64];            // of the program that saved it
    char tokenizer_hash[17];    // "": it knows of no tokenizer
} ModelFile;

// ---- an object of flags --------------------------------------------------------------------

typedef struct SavedFlag {
    const Flag* flag;           // NULL: this program has no such flag
    char name[64];
    char value[TEXT_SIZE];
} SavedFlag;

static inline const Flag* flag_of_member(const unsigned char* name, size_t n) {
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        if (f->kind == FLAG_GROUP) continue;
        if (strlen(f->name) == n && memcmp(f->name, name, n) == 0) return f;
    }
    return NULL;
}

// The next member of an object that j stands in. False: the reader's error says what is wrong.
static inline bool saved_read_flag(JsonReader* j, SavedFlag* s) {
    unsigned char *name, *text;
    size_t name_n, n;
    if (!json_read_string(j, &name, &name_n)) return false;
    s->flag = flag_of_member(name, name_n);
    snprintf(s->name, sizeof s->name, "%.*s", (int)(name_n < 63 ? name_n : 63), name);
    if (!json_read_byte(j, ':', "':'")) return false;
    json_read_space(j);
    size_t at = j->at;
    bool wants_text = at < j->n && j->text[at] == '"';
    if (s->flag) wants_text = s->flag->kind == FLAG_TEXT || s->flag->kind == FLAG_CHOICE;
    if (wants_text) {
        if (!json_read_string(j, &text, &n)) return false;
    } else {
        if (at == j->n || !json_read_number(j)) return json_fail(j, at, "a number");
        text = j->text + at;
        n = j->at - at;
    }
    if (n >= sizeof s->value || memchr(text, 0, n)) return json_fail(j, at, "a shorter value");
    memcpy(s->value, text, n);
    s->value[n] = 0;
    return true;
}

// Calls use(context, flag) for each member of the object `flags`. False: `problem` says what is
// wrong.
static inline bool saved_read_flags(const char* flags, const char* path, char* problem, size_t size,
                                    bool (*use)(void* context, const SavedFlag* s, char* problem,
                                                size_t size), void* context) {
    bool seen[FLAG_COUNT] = { false }, used = true;
    SavedFlag s;
    JsonReader j = { NULL, strlen(flags), 0, "" };
    j.text = (unsigned char*)host_alloc(j.n + 1, 1);
    memcpy(j.text, flags, j.n);
    bool ok = json_read_byte(&j, '{', "'{' and flags");
    json_read_space(&j);
    for (bool more = ok && !(j.at < j.n && j.text[j.at] == '}'); more;) {
        ok = saved_read_flag(&j, &s);
        if (ok && s.flag && seen[s.flag - FLAG_TABLE]) {
            snprintf(problem, size, "%s: the flag '%s' is in it twice", path, s.name);
            used = false;
        }
        if (ok && s.flag) seen[s.flag - FLAG_TABLE] = true;
        used = ok && used && use(context, &s, problem, size);
        json_read_space(&j);
        more = used && j.at < j.n && j.text[j.at] == ',';
        j.at += more;
    }
    ok = ok && (!used || json_read_byte(&j, '}', "',' or '}'"));
    json_read_space(&j);
    if (ok && used && j.at < j.n) ok = json_fail(&j, j.at, "the end");
    if (!ok) snprintf(problem, size, "%s: its flags, byte %zu: %s", path, j.at, j.error);
    free(j.text);
    return ok && used;
}

// ---- --load --------------------------------------------------------------------------------

typedef struct LoadFlags {
    Settings* settings;
    const char *path, *commit;
} LoadFlags;

static inline bool load_use_flag(void* context, const SavedFlag* s, char* problem, size_t size) {
    const LoadFlags* load = (const LoadFlags*)context;
    char where[TEXT_SIZE + 160], spelling[64];
    if (!s->flag) {
        snprintf(problem, size, "%s: there is no flag '%s', with which it was saved\nit is of "
                 "another version of this program: commit %s, here %s", load->path, s->name,
                 load->commit, GIT_COMMIT);
        return false;
    }
    snprintf(where, sizeof where, "%s: %s", load->path,
             flag_spelling(spelling, sizeof spelling, s->flag));
    if (flag_of_model(s->flag)) flag_set(load->settings, s->flag, where, s->value);
    return true;
}

// Sets in s what the text of the metadata "flags" says of the model.
static inline void settings_read_json(Settings* s, const char* flags, const char* path,
                                      const char* commit) {
    char problem[2 * TEXT_SIZE];
    LoadFlags load = { s, path, commit };
    if (!saved_read_flags(flags, path, problem, sizeof problem, load_use_flag, &load))
        die("%s", problem);
}

// The file that --load means.
static inline void load_path(char* path, size_t size, const char* load) {
    struct stat info;
    bool folder = stat(load, &info) == 0 && S_ISDIR(info.st_mode);
    int n = snprintf(path, size, "%s%s", load, folder ? "/model.safetensors" : "");
    REQUIRE((size_t)n < size, "--load %s: the path is longer than %zu bytes", load, size - 1);
    REQUIRE(!folder || access(path, F_OK) == 0, "--load %s: there is no model.safetensors in it\n"
            "name a file of weights, a finished run, or one of the checkpoints of a run", load);
}

// After settings_parse. With --load the model's flags are those of the file, where neither recipe
// nor command line has them, and s->load is then the file's own path. A file without flags will do
// for training, where they are all given.
static inline void settings_load(Settings* s, ModelFile* saved, int argc, char** argv) {
    memset(saved, 0, sizeof *saved);
    if (!*s->load) return;
    bool sample_only = !*s->train;
    char path[TEXT_SIZE];
    load_path(path, sizeof path, s->load);
    SafeFile file;
    safetensors_open(&file, path);
    const char* flags = safetensors_metadata(&file, "flags");
    const char* step = safetensors_metadata(&file, "step");
    const char* commit = safetensors_metadata(&file, "commit");
    const char* hash = safetensors_metadata(&file, "tokenizer_hash");
    snprintf(saved->commit, sizeof saved->commit, "%s", commit ? commit : "unknown");
    snprintf(saved->tokenizer_hash, sizeof saved->tokenizer_hash, "%s", hash ? hash : "");
    REQUIRE(flags || !sample_only, "%s: it does not say what its model is: no \"flags\" among its "
            "%d metadata\nname a file that this program has saved", path, file.pairs);
    if (step) {
        char* end;
        saved->step = strtoll(step, &end, 10);
        REQUIRE(*step >= '0' && *step <= '9' && *end == 0,
                "%s: its \"step\" is '%.40s', expected a number", path, step);
    }
    if (flags) {
        settings_read_json(s, flags, path, saved->commit);
        settings_parse_over(s, argc, argv);
    }
    memcpy(s->load, path, strlen(path) + 1);
    if (sample_only) {      // one sequence at a time is all that it takes
        s->micro_batch = 1;
        s->batch_tokens = s->seq_len;
    }
    safetensors_close(&file);
}

// ---- --resume ------------------------------------------------------------------------------

// Lines, as many as there is room for; the rest is counted.
typedef struct FlagList {
    char* text;
    size_t size, at;
    int count, left_out;
} FlagList;

static inline void flag_list_add(FlagList* list, const char* name, const char* saved,
                                 const char* given) {
    enum { LAST = 32 };         // kept for the line that counts
    char line[2 * TEXT_SIZE + 128];
    int n = snprintf(line, sizeof line, "  --%s: checkpoint %s / given %s\n", name, saved, given);
    for (char* c = line + 4; *c != ':'; c++)
        if (*c == '_') *c = '-';
    list->count++;
    if (list->left_out || list->at + (size_t)n + LAST > list->size) {
        list->left_out++;
        snprintf(list->text + list->at, list->size - list->at, "  and %d more\n", list->left_out);
        return;
    }
    memcpy(list->text + list->at, line, (size_t)n + 1);
    list->at += (size_t)n;
}

typedef struct Differences {
    const Settings* given;
    FlagList refused, taken;
    bool seen[FLAG_COUNT];
} Differences;

// --resume itself differs as a rule, and says nothing of the run.
static inline bool flag_is_compared(const Flag* f) {
    return f->kind != FLAG_GROUP && f->kind != FLAG_SWITCH && strcmp(f->name, "resume") != 0;
}

static inline bool difference_use_flag(void* context, const SavedFlag* s, char* problem,
                                       size_t size) {
    Differences* d = (Differences*)context;
    const Flag* f = s->flag;
    char given[TEXT_SIZE];
    (void)problem, (void)size;
    const char* saved = *s->value ? s->value : "-";
    if (!f) {       // nobody can say what it did
        flag_list_add(&d->refused, s->name, saved, "- (this program has no such flag)");
        return true;
    }
    d->seen[f - FLAG_TABLE] = true;
    if (!flag_is_compared(f)) return true;
    flag_value(given, sizeof given, f, d->given);
    bool number = f->kind == FLAG_INT || f->kind == FLAG_REAL;
    if (number ? strtod(given, NULL) == strtod(s->value, NULL) : strcmp(given, s->value) == 0)
        return true;
    flag_list_add(flag_alters_maths(f) ? &d->refused : &d->taken, f->name, saved,
                  *given ? given : "-");
    return true;
}

// Compares the flags of a checkpoint with those that are given now. A line for each that differs,
//     "  --seq-len: checkpoint 1024 / given 2048\n",
// goes into `refused`, where the flag alters the maths, or else into `taken`; both have `size`
// bytes. A flag that this program does not know is refused. One that the checkpoint does not know,
// being of an older program, is named, and refused where it alters the maths and has not its
// default. Returns how many are refused; -1: the flags cannot be read, and `refused` says why.
static inline int settings_differences(char* refused, char* taken, size_t size,
                                       const Settings* given, const char* flags_json,
                                       const char* path) {
    Differences d;
    Settings initial;
    char value[TEXT_SIZE], usual[TEXT_SIZE];
    memset(&d, 0, sizeof d);
    *refused = *taken = 0;
    d.given = given;
    d.refused.text = refused, d.taken.text = taken;
    d.refused.size = d.taken.size = size;
    if (!saved_read_flags(flags_json, path, value, sizeof value, difference_use_flag, &d)) {
        snprintf(refused, size, "%s", value);
        return -1;
    }
    settings_defaults(&initial);
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        if (d.seen[i] || !flag_is_compared(f)) continue;
        flag_value(value, sizeof value, f, given);
        flag_value(usual, sizeof usual, f, &initial);
        bool alters = flag_alters_maths(f) && strcmp(value, usual) != 0;
        flag_list_add(alters ? &d.refused : &d.taken, f->name, "- (it knows no such flag)",
                      *value ? value : "-");
    }
    return d.refused.count;
}

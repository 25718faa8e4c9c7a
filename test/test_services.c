/*
Everything that is not a kernel: flags, recipes, schedules, safetensors, log, random numbers, text,
sampler, prompts, what a run leaves behind and three tools of dev/; the loader has test_loader. No
GPU and no host layer; compiled as C++ by the Makefile.

    test_services [part of a group's name] [--verbose]

What must end the program is run in a child, whose exit status and message are looked at. Run from
the repository's root: the recipes are read from scripts/recipes.
*/
#define main text_to_shards_main
#include "../dev/text_to_shards.c"
#undef main
#define main plot_loss_main
#include "../dev/plot_loss.c"
#undef main
#define main runs_main
#include "../dev/runs.c"
#undef main
#include "../llmc/generate.h"
#include "../llmc/log.h"
#include "../llmc/outliers.h"
#include "../llmc/schedule.h"
#include "test.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <signal.h>


// ---- children ------------------------------------------------------------------------------

typedef struct Child {
    int status;                 // of exit; -1: killed
    char out[65536], err[16384];
} Child;

static void child_read(char* text, size_t size, FILE* file) {
    rewind(file);
    text[fread(text, 1, size - 1, file)] = 0;
    fclose(file);
}

// Runs f(argument) in a copy of this process and catches what it prints.
static const Child* child_run(void (*f)(void*), void* argument) {
    static Child child;
    FILE *out = tmpfile(), *err = tmpfile();
    REQUIRE(out && err, "no temporary file: %s", strerror(errno));
    fflush(stdout);
    pid_t pid = fork();
    REQUIRE(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0) {
        dup2(fileno(out), STDOUT_FILENO);
        dup2(fileno(err), STDERR_FILENO);
        f(argument);
        fflush(stdout);
        _exit(0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    child.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    child_read(child.out, sizeof child.out, out);
    child_read(child.err, sizeof child.err, err);
    return &child;
}

// The child must end with status 1 and a message that holds every given part.
static void expect_death(const char* what, void (*f)(void*), void* argument, const char* part1,
                         const char* part2) {
    const Child* c = child_run(f, argument);
    bool ok = c->status == 1 && strstr(c->err, part1) && (!part2 || strstr(c->err, part2));
    if (!test_true(what, ok)) printf("      status %d, message: %s", c->status, c->err);
}

// ---- files ---------------------------------------------------------------------------------

// The whole file, ended by a 0 that does not count.
static char* read_file(const char* path, size_t* n) {
    FILE* file = fopen(path, "rb");
    REQUIRE(file, "%s: %s", path, strerror(errno));
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file);
    rewind(file);
    char* bytes = (char*)test_calloc(size + 1, 1);
    REQUIRE(fread(bytes, 1, size, file) == size, "%s: cannot be read", path);
    fclose(file);
    if (n) *n = size;
    return bytes;
}

// ---- a JSON reader that only says yes or no ------------------------------------------------

static const char* json_skip(const char* s) {
    while (*s == ' ' || *s == '\n') s++;
    return s;
}

static const char* json_value(const char* s);

static const char* json_text(const char* s) {
    if (*s != '"') return NULL;
    for (s++; *s && *s != '"'; s++) {
        if ((unsigned char)*s < 0x20) return NULL;
        if (*s == '\\' && !strchr("\"\\/bfnrtu", *++s)) return NULL;
    }
    return *s ? s + 1 : NULL;
}

static const char* json_list(const char* s, char close, bool keys) {
    s = json_skip(s + 1);
    if (*s == close) return s + 1;
    for (;;) {
        if (keys) {
            s = json_text(json_skip(s));
            if (!s || *(s = json_skip(s)) != ':') return NULL;
            s++;
        }
        s = json_value(json_skip(s));
        if (!s) return NULL;
        s = json_skip(s);
        if (*s == close) return s + 1;
        if (*s++ != ',') return NULL;
    }
}

static const char* json_value(const char* s) {
    static const char* const WORDS[] = { "true", "false", "null" };
    if (*s == '{') return json_list(s, '}', true);
    if (*s == '[') return json_list(s, ']', false);
    if (*s == '"') return json_text(s);
    for (int i = 0; i < 3; i++) {
        if (strncmp(s, WORDS[i], strlen(WORDS[i])) == 0) return s + strlen(WORDS[i]);
    }
    if (!(*s == '-' || (*s >= '0' && *s <= '9'))) return NULL;    // nan and inf end here
    char* end;
    strtod(s, &end);
    return end;
}

static bool json_is_valid(const char* s) {
    const char* end = json_value(json_skip(s));
    return end && *json_skip(end) == 0;
}

// ---- common --------------------------------------------------------------------------------

static void die_two_lines(void* unused) {
    (void)unused;
    program_name = "prog";
    die("a is %d\ntry %s", 3, "b");
}

static void require_false(void* value) {
    REQUIRE(*(int*)value == 4, "wanted 4, got %d", *(int*)value);
}

static volatile int signals_seen;
static void count_signal(int number) { signals_seen += number == SIGUSR2; }

static void test_common(void) {
    // A frame on the stack in use may lie in what a library keeps there: a run hits that too rarely.
    struct sigaction action;
    on_signal(SIGUSR2, count_signal);
    raise(SIGUSR2);
    test_true("on_signal: the handler is called", signals_seen == 1);
    test_true("on_signal: on the alternate stack, calls begun again",
              sigaction(SIGUSR2, NULL, &action) == 0 &&
                  (action.sa_flags & (SA_ONSTACK | SA_RESTART)) == (SA_ONSTACK | SA_RESTART));
    const Child* c = child_run(die_two_lines, NULL);
    test_true("die: status 1", c->status == 1);
    test_true("die: the second line stands below the first",
              strcmp(c->err, "prog: a is 3\n      try b\n") == 0);
    int three = 3, four = 4;
    expect_death("REQUIRE that fails", require_false, &three, "wanted 4, got 3", NULL);
    test_true("REQUIRE that holds", child_run(require_false, &four)->status == 0);
    test_true("ceil_div", ceil_div(7, 8) == 1 && ceil_div(8, 8) == 1 && ceil_div(9, 8) == 2 &&
                              ceil_div(0, 8) == 0);

    char text[64];
    static const double REALS[] = { 0,         1,    10000, 0.1,  1.1920929e-07,
                                    0.0078125, 1e-8, 1e30,  -2.5, 1.0 / 3 };
    for (size_t i = 0; i < sizeof REALS / sizeof *REALS; i++) {
        test_true("real_text reads back",
                  strtod(real_text(text, sizeof text, REALS[i]), NULL) == REALS[i]);
    }
    test_true("real_text is short", strcmp(real_text(text, sizeof text, 0.1), "0.1") == 0 &&
              strcmp(real_text(text, sizeof text, 10000), "10000") == 0);

    static const struct { const char *in, *out; } STRINGS[] = {
        { "plain", "\"plain\"" },
        { "a\"b\\c", "\"a\\\"b\\\\c\"" },
        { "\n\x01\x7f", "\"\\u000a\\u0001\\u007f\"" },
        { "\xc3\xa9", "\"\xc3\xa9\"" },
        { "\xc3", "\"\\ufffd\"" },
        { "\xff" "a", "\"\\ufffda\"" },
        { "\xe2\x82", "\"\\ufffd\\ufffd\"" },
        { "\xf0\x9f\x98\x80", "\"\xf0\x9f\x98\x80\"" },
        { "\xc3\xc3", "\"\\ufffd\\ufffd\"" },
        { "\xc0\x80", "\"\\ufffd\\ufffd\"" },
        { "\xed\xa0\x80", "\"\\ufffd\\ufffd\\ufffd\"" },
    };
    for (size_t i = 0; i < sizeof STRINGS / sizeof *STRINGS; i++) {
        char* made;
        size_t n;
        FILE* out = open_memstream(&made, &n);
        json_string(out, STRINGS[i].in, strlen(STRINGS[i].in));
        fclose(out);
        if (!test_true("json_string", strcmp(made, STRINGS[i].out) == 0))
            printf("      %s\n", made);
        free(made);
    }
}

// ---- flags ---------------------------------------------------------------------------------

// Words of a command line, separated by single spaces; _ stands for an empty word.
static void parse_words(Settings* s, const char* words) {
    static char store[8192];
    static char* argv[128];
    int argc = 1;
    snprintf(store, sizeof store, "%s", words);
    argv[0] = store + strlen(store);
    for (char* word = strtok(store, " "); word; word = strtok(NULL, " ")) {
        argv[argc++] = strcmp(word, "_") == 0 ? store + strlen(words) : word;
    }
    argv[argc] = NULL;
    if (settings_want_help(argc, argv)) {      // as main does
        settings_help(stdout);
        exit(0);
    }
    settings_parse(s, argc, argv);
}

static void parse_and_check(void* words) {
    static Settings s;
    parse_words(&s, (const char*)words);
    settings_check(&s, 1);
}

static void check_two_ranks(void* words) {
    static Settings s;
    parse_words(&s, (const char*)words);
    settings_check(&s, 2);
}

static void test_flags(void) {
    static Settings s, t;
    parse_words(&s, "--steps 7 --out=x/y --muon-lr 0.5 --softcap=sigmoid --dry-run --val-tokens 0");
    test_true("values of every kind", s.steps == 7 && strcmp(s.out, "x/y") == 0 &&
                                          s.muon_lr == 0.5 && s.softcap == FLAG_SOFTCAP_SIGMOID &&
                                          s.dry_run == 1 && s.val_tokens == 0);
    settings_defaults(&t);
    t.steps = 7;
    snprintf(t.out, sizeof t.out, "x/y");
    t.muon_lr = 0.5;
    t.softcap = FLAG_SOFTCAP_SIGMOID;
    t.dry_run = 1;
    t.val_tokens = 0;
    test_true("what is not given keeps its default", memcmp(&s, &t, sizeof s) == 0);
    test_true("softcap words count as in loss.cuh",
              FLAG_SOFTCAP_NONE == 0 && FLAG_SOFTCAP_TANH == 1 && FLAG_SOFTCAP_SIGMOID == 2);

    static const struct { const char *words, *part1, *part2; } ERRORS[] = {
        { "--stepz 3", "no flag --stepz; the nearest is --steps", "--help lists them" },
        { "--batch-token 3", "the nearest is --batch-tokens", NULL },
        { "--batch_tokens 3", "no flag --batch_tokens; the nearest is --batch-tokens", NULL },
        { "--group 3", "no flag --group", NULL },
        { "--zzzzzzzzzzzzzzzzzzzzzz 1", "no flag --zzzzzzzzzzzzzzzzzzzzzz\n", NULL },
        { "steps 3", "expected a flag, found 'steps'", NULL },
        { "-s 3", "expected a flag, found '-s'", NULL },
        { "--", "expected a flag, found '--'", NULL },
        { "--steps", "--steps wants a value", NULL },
        { "--steps --seed 1", "--steps wants a value, found the flag --seed", NULL },
        { "--steps _", "--steps wants an integer, got ''", NULL },
        { "--steps=", "--steps wants an integer, got ''", NULL },
        { "--steps twelve", "--steps wants an integer, got 'twelve'", NULL },
        { "--steps 12x", "--steps wants an integer, got '12x'", NULL },
        { "--steps 1.5", "--steps wants an integer, got '1.5'", NULL },
        { "--steps 0", "--steps must be from 1 to 1000000000 steps, got 0", NULL },
        { "--steps -5", "--steps must be from 1 ", "got -5" },
        { "--steps 99999999999999999999", "--steps must be from 1 ", "got 99999999999999999999" },
        { "--seed 9007199254740992", "--seed must be from 0 to 9007199254740991, got", NULL },
        { "--muon-lr fast", "--muon-lr wants a number, got 'fast'", NULL },
        { "--muon-lr 0.1f", "--muon-lr wants a number, got '0.1f'", NULL },
        { "--muon-lr nan", "--muon-lr must be from 0 to 100, got nan", NULL },
        { "--muon-lr inf", "--muon-lr must be from 0 to 100, got inf", NULL },
        { "--muon-lr -1", "--muon-lr must be from 0 to 100, got -1", NULL },
        { "--adam-beta1 1", "--adam-beta1 must be from 0 to 0.999999, got 1", NULL },
        { "--optimizer sgd", "--optimizer must be one of muon|adamw, got 'sgd'", NULL },
        { "--optimizer muo", "--optimizer must be one of muon|adamw, got 'muo'", NULL },
        { "--optimizer muonx", "--optimizer must be one of muon|adamw, got 'muonx'", NULL },
        { "--skips 2", "--skips must be from 0 to 1, got 2", NULL },
        { "--steps 3 --steps 3", "--steps is given twice", NULL },
        { "--dry-run=2", "--dry-run must be from 0 to 1, got 2", NULL },
        { "--dry-run 1", "expected a flag, found '1'", NULL },
        { "--recipe nosuch", "no recipe 'nosuch'", "modern, untied, unet" },
        { "--recipe no/such.cfg", "--recipe: cannot open no/such.cfg: No such file", NULL },
        { "--batch-tokens 500000",
          "--batch-tokens 500000 is not a multiple of 1 rank x --micro-batch 64 x "
          "--seq-len 1024 = 65536 tokens",
          "nearest that fit: 458752 and 524288" },
        { "--batch-tokens 100", "nearest that fit: 65536; or", NULL },
        { "--micro-batch 100000 --seq-len 100000",
          "--micro-batch 100000 x --seq-len 100000 tokens is more", NULL },
        { "--channels 768 --heads 5", "--channels 768 is not a multiple of --heads 5",
          "nearest that fit: 765 and 770" },
        { "--channels 768 --heads 4", "is a head of 192 channels; it must be 32, 64 or 128",
          "with these channels: --heads 6 (heads of 128)" },
        { "--channels 100 --heads 2", "is a head of 50 channels", "multiples of 32" },
        { "--layers 3 --skips 1", "--skips 1 pairs the layers, but --layers 3 is odd", "2 and 4" },
        { "--windows both", "--windows must be one of none|ramp|thirds, got 'both'", NULL },
        { "--val-seq-len 1000000 --val-batch 100000",
          "--val-batch x --val-seq-len, 100000000000 tokens, is more than a forward pass", NULL },
        { "--dry-run --no-layers a", "--no-layers wants numbers with spaces between", "got 'a'" },
        { "--dry-run --no-layers 1,2", "--no-layers wants numbers with spaces between", "'1,2'" },
        { "--dry-run --no-layers -1", "--no-layers wants numbers with spaces between", "'-1'" },
        { "--dry-run --no-layers 1234567", "--no-layers wants numbers", "'1234567'" },
        { "--dry-run --no-layers 12",
          "--no-layers names layer 12, but with --layers 12 the last is 11", NULL },
        { "--dry-run --layers 1 --no-layers 0",
          "--no-layers and --no-attention leave no layer with attention", NULL },
        { "--dry-run --layers 1 --no-attention 0", "leave no layer with attention", NULL },
        { "--dry-run --skips 1 --no-layers 0", "--skips 1 pairs all layers, and --no-layers leaves",
          "drop one of the two" },
        { "--dry-run --no-layers 3 --no-attention 3",
          "--no-attention names layer 3, which --no-layers leaves out", NULL },
        { "--dry-run --long-layers 4",
          "--long-layers says which windows are long, but --windows is",
          NULL },
        { "--dry-run --windows ramp --no-attention 7 --long-layers 7",
          "--long-layers names layer 7, which has no attention", NULL },
        { "--dry-run --windows ramp --long-layers 7,", "--long-layers wants numbers", "got '7,'" },
        { "--dry-run --attn-lambdas 1 --value-embeds 1",
          "--value-embeds wants pairs", "'1:0 9:2'" },
        { "--dry-run --attn-lambdas 1 --value-embeds 1:",
          "--value-embeds wants pairs", "got '1:'" },
        { "--dry-run --attn-lambdas 1 --value-embeds 1:0x",
          "--value-embeds wants pairs", "'1:0x'" },
        { "--dry-run --attn-lambdas 1 --value-embeds 1>0", "--value-embeds wants pairs", "'1>0'" },
        { "--dry-run --attn-lambdas 1 --value-embeds 1:1",
          "--value-embeds names table 1, but no layer uses table 0", "without a gap" },
        { "--dry-run --attn-lambdas 1 --no-layers 1 --value-embeds 1:0",
          "--value-embeds names layer 1, which has no attention", NULL },
        { "--dry-run --value-embeds 1:0", "--value-embeds needs --attn-lambdas 1", NULL },
        { "--dry-run --attn-lambdas 1 --value-residual 1", "both mix the values", NULL },
        { "--dry-run --value-residual 1 --no-attention 0",
          "--value-residual 1 mixes in the values of layer 0, which has no attention", NULL },
        { "--dry-run --gated-skips 4:7",
          "--gated-skips wants pairs", "as in '1>0 9>2', got '4:7'" },
        { "--dry-run --gated-skips 7>4", "--gated-skips 7>4 must go from an earlier layer", NULL },
        { "--dry-run --gated-skips 4>4", "--gated-skips 4>4 must go from an earlier layer", NULL },
        { "--dry-run --gated-skips 4>12",
          "--gated-skips names layer 12, but with --layers 12", NULL },
        { "--dry-run --no-layers 4 --gated-skips 4>7",
          "--gated-skips names layer 4, which --no-layers leaves out", NULL },
        { "--dry-run --no-layers 7 --gated-skips 4>7",
          "--gated-skips names layer 7, which --no-layers leaves out", NULL },
        { "--dry-run --skips 1 --gated-skips 4>7", "--skips 1 and --gated-skips exclude", NULL },
        { "--dry-run --backout 11", "--backout 11 must be a layer before the last, 11", NULL },
        { "--dry-run --backout 3 --no-layers 3",
          "--backout names layer 3, which --no-layers", NULL },
        { "--dry-run --steps 40 --extension-steps 40",
          "--extension-steps 40 must be fewer than --steps 40, which count them", NULL },
        { "--dry-run --windows ramp --window-block 2048",
          "--window-block 2048 is more than --seq-len",
          "no window limits anything" },
        { "--dry-run --windows thirds --window-steps=",
          "--windows thirds needs --window-steps", NULL },
        { "--dry-run --windows thirds --window-steps 0",
          "--window-steps must be from 1 to 65536 blocks, got 0", NULL },
        { "--dry-run --windows thirds --window-steps 3-7", "--window-steps wants numbers", NULL },
        { "--dry-run --windows ramp --yarn 1", "--yarn 1 follows the windows of --windows thirds",
          NULL },
        { "--dry-run --optimizer adamw --adam-every 2",
          "--adam-every 2 is for --optimizer muon", NULL },
        { "--dry-run --muon-polar 1 --ns-steps 6",
          "--muon-polar 1 has coefficients for 5 iterations, --ns-steps is 6", NULL },
        { "--dry-run --head untied --table-rows 50305",
          "--table-rows 50305 is more than --vocab 50304", NULL },
        { "--dry-run --table-rows 50257",
          "--table-rows 50257 is not --vocab 50304, but with --head",
          NULL },
        { "--dry-run --fp8-head 1", "--fp8-head 1 needs --head untied", NULL },
        { "--dry-run --bf16-head 1", "--bf16-head 1 needs --head untied", "--bf16-tables" },
        { "--dry-run --head untied --fp8-head 1 --vocab 50257",
          "--fp8-head 1 needs --vocab in multiples of 16, got 50257", "50256 and 50272" },
        { "--dry-run --head untied --fp8-head 1 --micro-batch 1 --seq-len 8 --batch-tokens 64",
          "--micro-batch x --seq-len in multiples of 16 tokens, got 8", NULL },
        { "--train x --val y --gpu h100", "--gpu h100 is for --dry-run", NULL },
        { "--load x --prompt Once",
          "--prompt is what a sample goes on from, and --sample-tokens is",
          "how long" },
        { "--val x", "--train is missing", "text_to_shards" },
        { "--train x", "--val is missing", "text_to_shards" }
    };
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++) {
        expect_death(ERRORS[i].words, parse_and_check, (void*)ERRORS[i].words, ERRORS[i].part1,
                     ERRORS[i].part2);
    }
    expect_death("ranks count in the batch", check_two_ranks, (void*)"--batch-tokens 65536",
                 "2 ranks x --micro-batch 64 x --seq-len 1024 = 131072",
                 "nearest that fit: 131072;");
    static const char* const FINE[] = { "--train x --val y", "--dry-run", "--load m.safetensors --sample-tokens 9",
                                        "--dry-run --layers 3",
                                        "--dry-run --channels 64 --heads 2",
                                        "--dry-run --attn-lambdas 1 --value-embeds 3:0",
                                        "--dry-run --windows ramp --no-attention 7 --long-layers 0",
                                        "--dry-run --gpu h100", "--dry-run --table-rows 50304" };
    for (size_t i = 0; i < sizeof FINE / sizeof *FINE; i++) {
        const Child* c = child_run(parse_and_check, (void*)FINE[i]);
        if (!test_true(FINE[i], c->status == 0 && !*c->err)) printf("      %s", c->err);
    }
    static char text[1200];
    memset(text, 'x', sizeof text);
    memcpy(text, "--out ", 6);
    text[6 + 1024] = 0;
    expect_death("a text that is too long", parse_and_check, text,
                 "--out takes at most 1023 bytes, got 1024", NULL);
}

static void read_numbers(void* text) {
    int x[3];
    list_numbers("list", (const char*)text, x, 3);
}

static void read_pairs(void* text) {
    int a[2], b[2];
    list_pairs("list", (const char*)text, '>', a, b, 2);
}

static void test_lists(void) {
    int a[4], b[4];
    test_true("no numbers", list_numbers("x", "", a, 4) == 0 && list_numbers("x", "  ", a, 4) == 0);
    test_true("numbers", list_numbers("x", " 3  007 11 ", a, 3) == 3 && a[0] == 3 && a[1] == 7 &&
                             a[2] == 11);
    test_true("no pairs", list_pairs("x", " ", ':', a, b, 4) == 0);
    test_true("pairs", list_pairs("x", "1:20  9:2", ':', a, b, 2) == 2 && a[0] == 1 && b[0] == 20 &&
                           a[1] == 9 && b[1] == 2);
    static const char* const JUNK[] = { "3x", "x", "3 -1", "3;4", "1.5", "9999999", "3\t4" };
    for (size_t i = 0; i < sizeof JUNK / sizeof *JUNK; i++)
        expect_death(JUNK[i], read_numbers, (void*)JUNK[i], "--list wants numbers", JUNK[i]);
    expect_death("too many numbers", read_numbers, (void*)"1 2 3 4", "takes at most 3", NULL);
    static const char* const PAIRS[] = { "4", "4>", ">7", "4> 7", "4>7>8", "4>7x", "a>7",
                                         "4>9999999" };
    for (size_t i = 0; i < sizeof PAIRS / sizeof *PAIRS; i++)
        expect_death(PAIRS[i], read_pairs, (void*)PAIRS[i], "--list wants pairs", PAIRS[i]);
    expect_death("too many pairs", read_pairs, (void*)"1>2 2>3 3>4", "takes at most 2", NULL);
}

static void test_help(void) {
    const Child* c = child_run(parse_and_check, (void*)"--help");
    test_true("help: status 0, nothing on stderr", c->status == 0 && !*c->err);
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        char line[2048], spelling[64];
        if (f->kind == FLAG_GROUP) snprintf(line, sizeof line, "\n%s\n", f->what);
        else snprintf(line, sizeof line, "\n  --%s", flag_spelling(spelling, sizeof spelling, f));
        test_true(line + 1, strstr(c->out, line) && strstr(c->out, f->what));
    }
    test_true("help: defaults with their units", strstr(c->out, "[5100 steps]") &&
                                                     strstr(c->out, "[0.00036]") &&
                                                     strstr(c->out, "[rotate-first]"));
    test_true("help wins over what is wrong elsewhere",
              child_run(parse_and_check, (void*)"--help --steps x")->status == 0);
}

static void test_table(void) {
    static Settings s, t;
    char* text;
    size_t n;
    parse_words(&s, "--muon-lr 0.03 --steps 1600 --out a\"b");
    FILE* out = open_memstream(&text, &n);
    settings_print(out, &s);
    fclose(out);
    test_true("a star at what differs",
              strstr(text, "  steps                              1600 steps   *\n") &&
                  strstr(text, "  muon-lr                            0.03         *\n"));
    test_true("no star at the rest",
              strstr(text, "  seq-len                            1024 tokens\n"));
    free(text);
    out = open_memstream(&text, &n);
    settings_json(out, &s);
    fclose(out);
    test_true("the settings as JSON", json_is_valid(text) && strstr(text, "\"muon_lr\":0.03,") &&
              strstr(text, "\"out\":\"a\\\"b\"") && strstr(text, "\"optimizer\":\"muon\""));
    free(text);

    // Every flag away from its default, through settings_text and back.
    settings_defaults(&s);
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        if (f->kind == FLAG_INT)
            *flag_int(f, &s) = *flag_int(f, &s) == (int64_t)f->low ? (int64_t)f->high
                                                                   : (int64_t)f->low;
        if (f->kind == FLAG_REAL) *flag_real(f, &s) = f->low + (f->high - f->low) / 3;
        if (f->kind == FLAG_CHOICE) *flag_choice(f, &s) = 1;
        if (f->kind == FLAG_TEXT && strcmp(f->name, "recipe") != 0)
            snprintf(flag_text(f, &s), TEXT_SIZE, "dir/%s#1 x", f->name);
    }
    static char recipe[16384];
    settings_text(recipe, sizeof recipe, &s);
    test_write_file(test_path("all.cfg"), recipe, strlen(recipe));
    char words[600];
    snprintf(words, sizeof words, "--recipe %s", test_path("all.cfg"));
    parse_words(&t, words);
    memcpy(s.recipe, t.recipe, sizeof s.recipe);
    test_true("settings_text is a recipe that reads back", memcmp(&s, &t, sizeof s) == 0);
}

// ---- recipes -------------------------------------------------------------------------------

static void expect_recipe_error(const char* what, const char* lines, const char* message) {
    char words[600], wanted[700];
    const char* path = test_path("bad.cfg");
    test_write_file(path, lines, strlen(lines));
    snprintf(words, sizeof words, "--recipe %s", path);
    snprintf(wanted, sizeof wanted, "%s:%s", path, message);
    expect_death(what, parse_and_check, words, wanted, NULL);
}

// The numbers of the records; cool-down in steps.
typedef struct Record {
    const char* name;
    int64_t steps, cooldown, warmup;
    int head, init_embed, embed_norm, x0_mix, value_residual, skips, qk_order, softcap, bf16_tables,
        scale;
    double norm_eps, qk_norm_eps, muon_lr, embed_lr, head_lr, scalar_lr, momentum_start;
} Record;

static void test_recipes(void) {
    static const Record RECORDS[] = {
        { "modern", 5100, 1450, 0, FLAG_HEAD_TIED, FLAG_INIT_UNIFORM, 0, 0, 0, 0,
          FLAG_QK_ROTATE_FIRST, FLAG_SOFTCAP_NONE, 0, FLAG_MUON_SCALE_MAX_DIM,
          1.1920929e-07, 0.0078125, 0.00036, 0.0036, 0, 0, 0.95 },
        { "untied", 4578, 1308, 0, FLAG_HEAD_UNTIED, FLAG_INIT_NORMAL, 1, 0, 0, 0,
          FLAG_QK_NORM_FIRST, FLAG_SOFTCAP_NONE, 0, FLAG_MUON_SCALE_ASPECT,
          1.1920929e-07, 0.0078125, 0.02, 0.3, 0.002, 0, 0.95 },
        { "unet", 3000, 900, 500, FLAG_HEAD_UNTIED, FLAG_INIT_NORMAL, 1, 1, 1, 1,
          FLAG_QK_NORM_FIRST, FLAG_SOFTCAP_TANH, 1, FLAG_MUON_SCALE_ASPECT,
          0.0078125, 0.0078125, 0.04, 0.6, 0.008, 0.04, 0.85 },
    };
    static Settings s, initial;
    for (int i = 0; i < 3; i++) {
        const Record* r = &RECORDS[i];
        char words[64];
        snprintf(words, sizeof words, "--recipe %s", r->name);
        parse_words(&s, words);
        test_true("sizes", s.layers == 12 && s.heads == 6 && s.channels == 768 &&
                               s.vocab == 50304 && s.seq_len == 1024 && s.batch_tokens == 524288 &&
                               s.val_tokens == 10485760 && s.val_every == 125 &&
                               s.steps == r->steps);
        test_true("data order", s.batching == FLAG_BATCHING_STRIDED && s.data_ranks == 8);
        test_check("cool-down", fabs(schedule_cooldown(&s) - (double)r->cooldown), 1e-4);
        test_true("to nothing", s.final_lr_frac == 0);
        test_true("model", s.head == r->head && s.init_embed == r->init_embed &&
                               s.init_head == FLAG_INIT_HEAD_ZERO &&
                               s.embed_norm == r->embed_norm && s.x0_mix == r->x0_mix &&
                               s.value_residual == r->value_residual && s.skips == r->skips &&
                               s.qk_order == r->qk_order && s.softcap == r->softcap &&
                               s.bf16_tables == r->bf16_tables &&
                               s.bf16_scalars == r->bf16_tables && s.rotary_base == 10000 &&
                               s.rotary_round_bf16 == 1 && s.attn_scale == 0);
        test_true("eps",
                  (float)s.norm_eps == (float)r->norm_eps && s.qk_norm_eps == r->qk_norm_eps);
        test_true("softcap", r->softcap == FLAG_SOFTCAP_NONE || s.softcap_value == 30);
        test_true("muon", s.optimizer == FLAG_OPTIMIZER_MUON && s.muon_lr == r->muon_lr &&
                              s.muon_scale == r->scale && s.muon_form == FLAG_MUON_FORM_SUM &&
                              s.muon_momentum == 0.95 &&
                              s.muon_momentum_start == r->momentum_start &&
                              s.muon_momentum_warmup == r->warmup && s.ns_steps == 5);
        test_true("adam", s.embed_lr == r->embed_lr && (!r->head_lr || s.head_lr == r->head_lr) &&
                              (!r->scalar_lr || s.scalar_lr == r->scalar_lr) &&
                              s.adam_beta1 == 0.9 && s.adam_beta2 == 0.95 && s.adam_eps == 1e-8 &&
                              s.weight_decay == 0);
        snprintf(words, sizeof words, "--recipe %s --dry-run", r->name);
        test_true("passes the checks", child_run(parse_and_check, words)->status == 0);
        if (i > 0) continue;
        settings_defaults(&initial);
        initial.batching = FLAG_BATCHING_STRIDED;
        memcpy(initial.recipe, s.recipe, sizeof s.recipe);
        test_true("the defaults are `modern`", memcmp(&initial, &s, sizeof s) == 0);
    }
    test_true("2^-23 in fp32", (float)1.1920929e-07 == 0x1p-23f);

    parse_words(&s, "--recipe unet --steps 10 --muon-lr 0.5");
    test_true("a flag behind --recipe wins", s.steps == 10 && s.muon_lr == 0.5 && s.skips == 1);
    parse_words(&s, "--steps 10 --muon-lr 0.5 --recipe unet");
    test_true("a flag before --recipe wins", s.steps == 10 && s.muon_lr == 0.5 && s.skips == 1);
    const char* path = test_path("good.cfg");
    static const char GOOD[] = "# c\n\n  steps=11 # c\r\nout = a b#c\t# c\nhead =untied";
    test_write_file(path, GOOD, sizeof GOOD - 1);
    char words[600];
    snprintf(words, sizeof words, "--recipe %s", path);
    parse_words(&s, words);
    test_true("spaces, comments, a last line without end",
              s.steps == 11 && strcmp(s.out, "a b#c") == 0 && s.head == FLAG_HEAD_UNTIED);

    expect_recipe_error("unknown key", "steps = 3\n\nstepz = 4\n",
                        "3: no flag stepz; the nearest is steps");
    expect_recipe_error("key with dashes", "--steps = 3\n",
                        "1: no flag --steps; the nearest is steps");
    expect_recipe_error("key twice", "seed = 3\nsteps = 1\nseed = 3\n",
                        "3: seed is given twice, first in line 1");
    expect_recipe_error("no value", "steps =\n", "1: steps has no value");
    expect_recipe_error("only a comment as value", "steps = # 5\n", "1: steps has no value");
    expect_recipe_error("no equals sign", "steps 5\n",
                        "1: expected `flag = value`, found 'steps 5'");
    expect_recipe_error("no key", "= 5\n", "1: expected `flag = value`, found '= 5'");
    expect_recipe_error("junk after a number", "\nval-every = 5 5\n",
                        "2: val-every wants an integer, got '5 5'");
    expect_recipe_error("out of range", "layers = 0\n", "1: layers must be from 1 to 1000, got 0");
    expect_recipe_error("nan", "muon-lr = NaN\n", "1: muon-lr must be from 0 to 100, got NaN");
    expect_recipe_error("unknown word", "head = big\n",
                        "1: head must be one of tied|untied, got 'big'");
    expect_recipe_error("recipe in a recipe", "recipe = unet\n",
                        "1: recipe belongs on the command line");
    expect_recipe_error("help in a recipe", "help = 1\n", "1: help belongs on the command line");
    static char large[4096];
    memset(large, ' ', sizeof large - 1);
    expect_recipe_error("a line that is too long", large, "1: the line is longer than");
}

// What records 20, 21 and 45 share, and where they differ.
static void test_late_recipes(void) {
    static Settings s;
    static const struct {
        const char* name;
        int64_t steps, batch, seq_len, val_seq_len, rows;
        double eps, w_scale, grad_scale;
    } SUB3[] = {
        { "sub3_20", 1393, 524288, 65536, 0, 50257, 0.0078125, 32, 536870912.0 / 65536 },
        { "sub3", 1770, 393216, 49152, 262144, 50257, 1.1920929e-07, 512, 524288.0 / 49152 },
    };
    for (int i = 0; i < 2; i++) {
        char words[64];
        snprintf(words, sizeof words, "--recipe %s --dry-run", SUB3[i].name);
        parse_words(&s, words);
        test_true("sub3 sizes",
                  s.steps == SUB3[i].steps && s.batch_tokens == SUB3[i].batch &&
                      s.seq_len == SUB3[i].seq_len && s.micro_batch == 1 &&
                      s.val_seq_len == SUB3[i].val_seq_len && s.table_rows == SUB3[i].rows &&
                      s.vocab == 50304 && s.val_tokens == 10485760 && s.val_every == 125);
        test_true("sub3 model", strcmp(s.value_embeds, "0:0 1:1 2:2 9:0 10:1 11:2") == 0 &&
                                    strcmp(s.no_attention, "7") == 0 && !*s.no_layers && s.skips &&
                                    s.attn_lambdas && s.x0_mix && s.init_x0_mix == 1 &&
                                    s.rotary_half && s.rotary_base == 1024 &&
                                    !s.rotary_round_bf16 && s.attn_scale == 0.12);
        test_check("sub3 first matrices, +- 1/32", fabs(s.init_scale / sqrt(768) - 0.03125), 1e-15);
        test_true("sub3 eps", s.norm_eps == SUB3[i].eps && s.qk_norm_eps == SUB3[i].eps);
        test_true("sub3 masks", s.document_mask && s.windows == FLAG_WINDOWS_RAMP &&
                                    s.window_by == FLAG_WINDOW_BY_BLOCK && s.window_block == 128 &&
                                    strcmp(s.long_layers, "0 4 11") == 0 && !s.yarn &&
                                    s.batching == FLAG_BATCHING_CONTIGUOUS);
        test_true("sub3 head", s.fp8_head && s.fp8_x_scale == 2 &&
                                   s.fp8_w_scale == SUB3[i].w_scale &&
                                   s.fp8_grad_scale == SUB3[i].grad_scale && s.bf16_tables &&
                                   !s.bf16_scalars && !s.bf16_head && !s.bf16_state &&
                                   s.softcap == FLAG_SOFTCAP_SIGMOID && s.softcap_value == 30);
        test_true("sub3 optimizer", s.muon_lr == 0.05 && s.muon_form == FLAG_MUON_FORM_LERP &&
                                        s.muon_scale == FLAG_MUON_SCALE_ASPECT && !s.muon_polar &&
                                        s.muon_beta2 == 0 && s.adam_beta1 == 0.8 &&
                                        s.adam_eps == 1e-10 && s.adam_every == 1 &&
                                        s.loss == FLAG_LOSS_MEAN && s.value_lr == 0.6 &&
                                        s.embed_lr == 0.6 && s.head_lr == 0.008);
        test_true("sub3 passes the checks", child_run(parse_and_check, words)->status == 0);
    }
    parse_words(&s, "--recipe normuon --dry-run");
    test_true("normuon sizes", s.steps == 2225 && s.extension_steps == 40 &&
                                   s.batch_tokens == 262144 && s.seq_len == 32768 &&
                                   s.micro_batch == 1 && s.val_seq_len == 262144 &&
                                   s.val_every == 250 && s.table_rows == 0 &&
                                   s.batching == FLAG_BATCHING_DOCUMENTS && s.max_document == 2048);
    test_true("normuon model",
              strcmp(s.value_embeds, "1:1 2:2 9:0 10:1 11:2") == 0 &&
                  strcmp(s.no_layers, "0") == 0 && strcmp(s.no_attention, "7") == 0 &&
                  strcmp(s.gated_skips, "4>7") == 0 &&
                  s.backout == 8 && s.smear && s.attention_gate && s.attn_lambdas && !s.skips &&
                  s.init_x0_mix == 1.1 && s.rotary_half && s.rotary_round_bf16);
    test_true("normuon masks", s.window_by == FLAG_WINDOW_BY_TOKEN && s.yarn && s.document_mask &&
                                   strcmp(s.window_steps, "3 7 11") == 0 &&
                                   s.window_extension == 13 && s.window_final == 20 &&
                                   strcmp(s.long_layers, "4 11") == 0 && s.attn_scale == 0.1);
    test_true("normuon head", s.fp8_head && s.fp8_x_scale == 0 && s.fp8_w_scale == 512 &&
                                  s.fp8_grad_scale == 448 && s.bf16_tables && s.bf16_head &&
                                  s.bf16_state && !s.bf16_scalars && s.loss == FLAG_LOSS_ROW_SUM);
    test_true("normuon optimizer",
              s.muon_lr == 0.03 && s.muon_polar && s.muon_beta2 == 0.95 &&
                  s.cautious_decay == 1.2 && s.muon_form == FLAG_MUON_FORM_LERP &&
                  s.adam_every == 2 && s.adam_beta1 == 0.65 &&
                  s.adam_eps_form == FLAG_ADAM_EPS_UNSCALED && s.embed_lr == 0.6);
    test_true("normuon passes the checks",
              child_run(parse_and_check, (void*)"--recipe normuon --dry-run")->status == 0);
}

// ---- schedule ------------------------------------------------------------------------------

static void expect_lr(const char* recipe, int64_t step, double wanted) {
    static Settings s;
    char words[64], what[64];
    snprintf(words, sizeof words, "--recipe %s", recipe);
    snprintf(what, sizeof what, "%s lr at %" PRId64, recipe, step);
    parse_words(&s, words);
    // float holds the quotient to half a unit in the last place
    test_check(what, fabs((double)schedule_at(&s, step).lr_mult - wanted), 0x1p-25);
}

static void test_schedule(void) {
    expect_lr("modern", 0, 1);
    expect_lr("modern", 3649, 1);
    expect_lr("modern", 3650, 1);
    expect_lr("modern", 3651, 1449.0 / 1450);
    expect_lr("modern", 4375, 725.0 / 1450);
    expect_lr("modern", 5099, 1.0 / 1450);
    expect_lr("untied", 3270, 1);
    expect_lr("untied", 3271, 1307.0 / 1308);
    expect_lr("untied", 4577, 1.0 / 1308);
    expect_lr("unet", 2099, 1);
    expect_lr("unet", 2100, 1);
    expect_lr("unet", 2101, 899.0 / 900);
    expect_lr("unet", 2999, 1.0 / 900);
    expect_lr("unet", 3000, 0);

    static Settings s;
    parse_words(&s, "--recipe unet");
    static const struct { int64_t step; double momentum; } MOMENTA[] = {
        { 0, 0.85 }, { 1, 0.85 + 0.1 / 500 }, { 250, 0.90 }, { 499, 0.85 + 0.1 * 499 / 500 },
        { 500, 0.95 }, { 2999, 0.95 },
    };
    for (int i = 0; i < 6; i++) {
        test_check(
            "unet momentum",
            fabs((double)schedule_at(&s, MOMENTA[i].step).muon_momentum - MOMENTA[i].momentum),
            0x1p-25);
    }
    parse_words(&s, "--recipe modern");
    test_true("modern momentum", schedule_at(&s, 0).muon_momentum == 0.95f &&
                                     schedule_at(&s, 5099).muon_momentum == 0.95f);
    parse_words(&s, "--recipe modern --steps 20");
    test_true("a short run keeps the shape", schedule_at(&s, 14).lr_mult == 1);
    test_check("a short run keeps the shape",
               fabs(schedule_at(&s, 15).lr_mult - 5 / (20 * 1450 / 5100.0)), 0x1p-25);
    parse_words(&s, "--steps 10 --cooldown-frac 0.5 --final-lr-frac 0.2");
    test_check("a floor", fabs(schedule_at(&s, 9).lr_mult - (0.2 + 0.8 / 5)), 0x1p-25);
    test_check("a floor at the end", fabs(schedule_at(&s, 10).lr_mult - 0.2), 0x1p-25);
    parse_words(&s, "--steps 10 --cooldown-frac 0 --final-lr-frac 0.2");
    test_true("no cool-down", schedule_at(&s, 9).lr_mult == 1 && schedule_at(&s, 10).lr_mult == 1);
    parse_words(&s, "--steps 10 --cooldown-frac 1");
    test_check("all cool-down", fabs(schedule_at(&s, 1).lr_mult - 0.9), 0x1p-25);
    parse_words(&s, "--recipe modern");
    Schedule now = schedule_at(&s, 9);
    test_true("modern: no windows", now.window_long == 0 && now.window_short == 0);
    test_true("modern: Adam at every step", now.adam_now && now.adam_step == 10);
    test_check("modern: 1/sqrt(D)", fabs(now.attn_scale - 1 / sqrt(128)), 0x1p-28);
    parse_words(&s, "--steps 10 --adam-every 3");
    static const int NOW[10] = { 0, 0, 1, 0, 0, 1, 0, 0, 1, 0 };
    static const int TAKEN[10] = { 0, 0, 1, 1, 1, 2, 2, 2, 3, 3 };
    for (int t = 0; t < 10; t++) {
        now = schedule_at(&s, t);
        test_true("Adam at every third step", now.adam_now == NOW[t] && now.adam_step == TAKEN[t]);
    }
}

// Records 20 and 21: the steps at which the long window becomes 2, 3, .. 14 blocks.
static void test_ramp(void) {
    static const struct { const char* recipe; int64_t steps, change[13]; } RAMPS[] = {
        { "sub3_20", 1393,
          { 104, 207, 310, 413, 516, 620, 723, 826, 929, 1032, 1136, 1239, 1342 } },
        { "sub3", 1770, { 132, 263, 394, 525, 656, 787, 918, 1049, 1181, 1312, 1443, 1574, 1705 } },
    };
    for (int i = 0; i < 2; i++) {
        static Settings s;
        char words[64];
        int wrong = 0, blocks = 1;
        snprintf(words, sizeof words, "--recipe %s", RAMPS[i].recipe);
        parse_words(&s, words);
        for (int64_t t = 0; t <= s.steps; t++) {
            if (blocks < 14 && t == RAMPS[i].change[blocks - 1]) blocks++;
            Schedule now = schedule_at(&s, t);
            wrong += now.window_long != blocks || now.window_short != (blocks / 2 ? blocks / 2 : 1);
            wrong += now.attn_scale != 0.12f || !now.adam_now;
            // as the record writes it, in double
            double w = fmin((1 - (double)t / (double)s.steps) / 0.4, 1);
            wrong += !(fabs(now.lr_mult - (w + 0.1 * (1 - w))) <= 0x1p-25);
            double f = fmin((double)t / 300, 1);
            wrong += !(fabs(now.muon_momentum - ((1 - f) * 0.85 + f * 0.95)) <= 0x1p-25);
        }
        test_check(RAMPS[i].recipe, wrong, 0);
        test_true("all changes seen", blocks == 14 && s.steps == RAMPS[i].steps);
        Schedule last = schedule_final(&s);
        test_true("the last validation", last.window_long == 14 && last.window_short == 7);
    }
    static Settings s;
    parse_words(&s, "--steps 27 --windows ramp --window-max 1728 --window-block 128");
    test_true("a window that is a whole number of blocks",
              schedule_at(&s, 2).window_long == 1 && schedule_at(&s, 3).window_long == 2 &&
                  schedule_at(&s, 4).window_long == 2 && schedule_at(&s, 26).window_long == 13);
    parse_words(&s, "--steps 37 --extension-steps 10 --windows ramp");
    test_true("a ramp ends before the extension",
              schedule_at(&s, 3).window_long == 2 && schedule_at(&s, 26).window_long == 13 &&
                  schedule_at(&s, 27).window_long == 14 && schedule_at(&s, 37).window_long == 14);
    parse_words(&s, "--steps 1000000000 --windows ramp --window-max 1000000 --window-block 1");
    test_true("a long run", schedule_at(&s, 999999999).window_long == 1000000 &&
                                schedule_at(&s, 499999999).window_long == 500000);
}

// Record 45, all its steps, and the last validation; then YaRN's frequencies after each change.
static void test_golden_schedule(void) {
    static Settings s;
    SafeFile f;
    parse_words(&s, "--recipe normuon");
    safetensors_open(&f, "test/golden/units/schedule.safetensors");
    const float* lr = (const float*)safetensors_data(&f, "lr_mult", SAFE_F32, 2226);
    const float* momentum = (const float*)safetensors_data(&f, "momentum", SAFE_F32, 2226);
    const float* scale = (const float*)safetensors_data(&f, "attn_scale", SAFE_F32, 2226);
    const int* small = (const int*)safetensors_data(&f, "ws_short", SAFE_I32, 2226);
    const int* large = (const int*)safetensors_data(&f, "ws_long", SAFE_I32, 2226);
    int wrong[5] = {0};
    for (int t = 0; t < 2226; t++) {
        Schedule now = schedule_at(&s, t);
        // one rounding to float on either side
        wrong[0] += !(fabs((double)now.lr_mult - lr[t]) <= 0x1p-24);
        wrong[1] += !(fabs((double)now.muon_momentum - momentum[t]) <= 0x1p-24);
        wrong[2] += !(fabs((double)now.attn_scale - scale[t]) <= 0x1p-26);
        wrong[3] += now.window_short != small[t] || now.window_long != large[t];
        wrong[4] += now.adam_now != (t % 2 == 1) || now.adam_step != (t + 1) / 2;
    }
    static const char* const WHAT[5] = { "learning rate", "momentum", "attention scale", "windows",
                                         "Adam" };
    for (int i = 0; i < 5; i++) test_check(WHAT[i], wrong[i], 0);
    Schedule last = schedule_final(&s);
    test_true("the last validation", last.window_long == 20 && last.window_short == 6 &&
                                         last.attn_scale == scale[2225]);
    safetensors_close(&f);

    safetensors_open(&f, "test/golden/units/yarn.safetensors");
    static const int64_t STEPS[4] = { 728, 729, 2184, 2185 };
    for (int D = 64; D <= 128; D *= 2) {
        for (int change = 0; change < 4; change++) {
            char name[64];
            float made[64];
            double worst = 0;
            snprintf(name, sizeof name, "D%d.%d.freq", D, change);
            const float* wanted = (const float*)safetensors_data(&f, name, SAFE_F32, D / 2);
            schedule_frequencies(made, &s, D, STEPS[change]);
            for (int j = 0; j < D / 2; j++) {
                double error = fabs((double)made[j] - wanted[j]);
                worst = fmax(worst, error == 0 ? 0 : error / wanted[j]);
            }
            // D = 128: PyTorch's vector code sums the steps of the exponents in another order, and
            // an exponent off by 2^-24 is a frequency off by ln 1024 as much, or 1.5 of that
            test_check(name, worst, D == 64 ? 0x1p-23 : 1.5 * 6.94 * 0x1p-24);
            snprintf(name, sizeof name, "D%d.%d.attn_scale", D, change);
            const float* wanted_scale = (const float*)safetensors_data(&f, name, SAFE_F32, 1);
            Schedule now = schedule_at(&s, STEPS[change]);
            test_check(name, fabs((double)now.attn_scale - *wanted_scale), 0x1p-26);
        }
    }
    safetensors_close(&f);
    float whole[64], no_yarn[64];
    parse_words(&s, "--recipe normuon --yarn 0");
    rotary_frequencies(whole, 128, 1024, true);
    schedule_frequencies(no_yarn, &s, 128, 2185);
    test_same_bits("without YaRN", whole, no_yarn, sizeof whole);
    test_true("without YaRN", schedule_at(&s, 2185).attn_scale == 0.1f);
    // Without an extension the last validation alone sees the window behind the last part.
    parse_words(&s, "--recipe normuon --steps 6 --extension-steps 0");
    last = schedule_final(&s);
    test_true("six steps", schedule_at(&s, 1).window_long == 3 &&
                               schedule_at(&s, 2).window_long == 7 &&
                               schedule_at(&s, 5).window_long == 11 && last.window_long == 20 &&
                               last.window_short == 6 && last.attn_scale == 0.13177798688411713f);
    test_check("six steps", fabs(schedule_at(&s, 4).lr_mult - 0.7), 0x1p-24);
}

// ---- safetensors ---------------------------------------------------------------------------

static void make_tensors(const char* path) {
    static float f[6] = { 1, -2, 3.5f, 1e-30f, INFINITY, 0 };
    static uint16_t h[3] = { 1, 2, 65535 };
    static int32_t i[4] = { -1, 2, 3, 4 };
    static uint8_t b[5] = { 1, 2, 3, 4, 5 };
    static int64_t q[1] = { INT64_MIN };
    SafeTensor t[7] = {};
    static const char* const NAMES[7] = { "bytes",  "h.0.w", "u", "i", "odd \"name\"\n\xc3\xa9",
                                          "scalar", "empty" };
    static const SafeType TYPES[7] = { SAFE_U8,  SAFE_BF16, SAFE_U16, SAFE_I32,
                                       SAFE_F32, SAFE_I64,  SAFE_F32 };
    const void* data[7] = { b, h, h, i, f, q, NULL };
    for (int k = 0; k < 7; k++) {
        t[k].name = NAMES[k];
        t[k].type = TYPES[k];
        t[k].data = data[k];
    }
    t[0].dims = 1, t[0].shape[0] = 5;
    t[1].dims = 1, t[1].shape[0] = 3;
    t[2].dims = 2, t[2].shape[0] = 1, t[2].shape[1] = 3;
    t[3].dims = 2, t[3].shape[0] = 2, t[3].shape[1] = 2;
    t[4].dims = 3, t[4].shape[0] = 1, t[4].shape[1] = 2, t[4].shape[2] = 3;
    t[5].dims = 0;
    t[6].dims = 2, t[6].shape[0] = 0, t[6].shape[1] = 9;
    const char* metadata[] = { "flags", "steps = 3\nout = \"x\"\n", "empty", "", "\xe2\x82\xac",
                               "\x01\\" };
    safetensors_write(path, t, 7, metadata, 3);
}

static void test_safetensors(void) {
    const char* path = test_path("t.safetensors");
    char problem[512] = "";
    make_tensors(path);
    SafeFile f;
    safetensors_open(&f, path);
    test_true("tensors and metadata", f.count == 7 && f.pairs == 3);
    const float* x = (const float*)safetensors_data(&f, "odd \"name\"\n\xc3\xa9", SAFE_F32, 6);
    test_true("fp32", x[0] == 1 && x[1] == -2 && x[2] == 3.5f && x[3] == 1e-30f &&
                          x[4] == INFINITY && x[5] == 0);
    const uint16_t* h = (const uint16_t*)safetensors_data(&f, "h.0.w", SAFE_BF16, 3);
    test_true("bf16", h[0] == 1 && h[1] == 2 && h[2] == 65535);
    test_true("int32", ((const int32_t*)safetensors_data(&f, "i", SAFE_I32, 4))[0] == -1);
    test_true("int64, no dimension",
              *(const int64_t*)safetensors_data(&f, "scalar", SAFE_I64, 1) == INT64_MIN);
    test_true("bytes", memcmp(safetensors_data(&f, "bytes", SAFE_U8, 5), "\1\2\3\4\5", 5) == 0);
    const SafeTensor* t = safetensors_find(&f, "odd \"name\"\n\xc3\xa9");
    test_true("shape", t->dims == 3 && t->shape[0] == 1 && t->shape[1] == 2 && t->shape[2] == 3 &&
                           t->bytes == 24);
    test_true("no such tensor", safetensors_find(&f, "odd") == NULL);
    test_true("metadata",
              strcmp(safetensors_metadata(&f, "flags"), "steps = 3\nout = \"x\"\n") == 0 &&
                  strcmp(safetensors_metadata(&f, "empty"), "") == 0 &&
                  strcmp(safetensors_metadata(&f, "\xe2\x82\xac"), "\x01\\") == 0 &&
                  safetensors_metadata(&f, "none") == NULL);
    bool aligned = true;
    for (int i = 0; i < f.count; i++)
        aligned = aligned && (uintptr_t)f.tensors[i].data % SAFE_TYPE_BYTES[f.tensors[i].type] == 0;
    test_true("aligned to the items", aligned);
    safetensors_close(&f);
    size_t n, m;
    char *once = read_file(path, &n), *twice;
    make_tensors(path);
    twice = read_file(path, &m);
    test_true("written again: equal bytes", n == m && memcmp(once, twice, n) == 0);
    uint64_t json_bytes;
    memcpy(&json_bytes, once, 8);
    once[8 + json_bytes] = 0;       // the first byte of the data, which starts with the one int64
    test_true("the header is JSON, padded to 8", json_bytes % 8 == 0 && json_is_valid(once + 8));
    free(once);
    free(twice);
    test_true("no tensors", (safetensors_write(path, NULL, 0, NULL, 0),
                             safetensors_try_open(&f, path, problem, sizeof problem)) &&
                                f.count == 0);
    safetensors_close(&f);
}

static void get_absent(void* name) {
    SafeFile f;
    safetensors_open(&f, test_path("t.safetensors"));
    safetensors_data(&f, (const char*)name, SAFE_F32, 6);
}

static void write_nowhere(void* path) {
    make_tensors((const char*)path);
}

static void write_without_room(void* path) {
    struct rlimit limit = { 200, 200 };
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    make_tensors((const char*)path);
}

static void open_tensors(void* path) {
    SafeFile f;
    safetensors_open(&f, (const char*)path);
}

// A file with this header (padded) and this many bytes of data must be refused with these words.
static void expect_refusal(const char* json, int data_bytes, const char* wanted) {
    const char* path = test_path("refused.safetensors");
    static char bytes[4096];
    uint64_t n = (strlen(json) + 7) / 8 * 8;
    memset(bytes, ' ', sizeof bytes);
    memcpy(bytes, &n, 8);
    memcpy(bytes + 8, json, strlen(json));
    test_write_file(path, bytes, 8 + n + (size_t)data_bytes);
    SafeFile f;
    char problem[512] = "";
    bool opened = safetensors_try_open(&f, path, problem, sizeof problem);
    if (opened) safetensors_close(&f);
    if (!test_true(json, !opened && strstr(problem, wanted)))
        printf("      opened %d, problem: %s\n", opened, problem);
}

#define F32_ENTRY "{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}"

// Names of other writers: escapes of two, three and four bytes of UTF-8, a surrogate pair among them.
static void test_safetensors_escapes(void) {
    const char* path = test_path("escapes.safetensors");
    const char* json = "{\"\\u00e9\\u20ac\\ud83d\\ude00\\/\":" F32_ENTRY "}";
    char bytes[256], problem[512] = "";
    uint64_t n = (strlen(json) + 7) / 8 * 8;
    memset(bytes, ' ', sizeof bytes);
    memcpy(bytes, &n, 8);
    memcpy(bytes + 8, json, strlen(json));
    test_write_file(path, bytes, 8 + n + 8);
    SafeFile f;
    if (!test_true("escapes in a name", safetensors_try_open(&f, path, problem, sizeof problem))) {
        printf("      problem: %s\n", problem);
        return;
    }
    test_true("a name of escapes", safetensors_find(&f, "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80/") != NULL);
    safetensors_close(&f);
}

static void test_safetensors_errors(void) {
    make_tensors(test_path("t.safetensors"));
    expect_death("an absent tensor", get_absent, (void*)"nosuch",
                 "t.safetensors: no tensor 'nosuch' among its 7", NULL);
    expect_death("another type", get_absent, (void*)"i", "tensor 'i' is I32, expected F32", NULL);
    expect_death("another size", get_absent, (void*)"empty",
                 "tensor 'empty' has 0 elements, expected 6", NULL);
    expect_death("a directory that is not there", write_nowhere, (void*)test_path("no/t.safetensors"),
                 "cannot be created: No such file", NULL);
    expect_death("a full disk", write_without_room, (void*)test_path("t.safetensors"),
                 "nothing was saved", "File too large");
    SafeFile f;
    char problem[512] = "";
    test_true("the old file is untouched",
              safetensors_try_open(&f, test_path("t.safetensors"), problem, sizeof problem));
    safetensors_close(&f);
    glob_t found;
    test_true("no part is left", glob(test_path("*.part"), 0, NULL, &found) == GLOB_NOMATCH);
    expect_death("no file", open_tensors, (void*)test_path("none.safetensors"),
                 "none.safetensors: cannot be opened: No such file", NULL);
    test_write_file(test_path("short"), "1234567", 7);
    expect_death("7 bytes", open_tensors, (void*)test_path("short"), "7 bytes: too short", NULL);
    test_write_file(test_path("short"), "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10);
    expect_death("an absurd header length", open_tensors, (void*)test_path("short"),
                 "the header length is 18446744073709551615", NULL);
    test_write_file(test_path("short"), "\x10\0\0\0\0\0\0\0{}      ", 16);
    expect_death("a header beyond the end", open_tensors, (void*)test_path("short"),
                 "the header length is 16 in a file of 16", NULL);
    test_write_file(test_path("short"), "\x07\0\0\0\0\0\0\0{}     ", 15);
    expect_death("a header of odd length", open_tensors, (void*)test_path("short"),
                 "the header length is 7", NULL);

    expect_refusal("", 0, "found the end, expected '{'");
    expect_refusal("[]", 0, "expected '{'");
    expect_refusal("{", 0, "found the end, expected '\"'");
    expect_refusal("{} x", 0, "found 'x    ', expected the end of the header");
    expect_refusal("{\"a\":" F32_ENTRY ",}", 8, "expected '\"'");
    expect_refusal("{\"a\":" F32_ENTRY " \"b\":1}", 8, "expected ','");
    expect_refusal("{\"a\":7}", 0, "expected '{'");
    expect_refusal("{\"a\":{}}", 0, "'a' lacks dtype, shape or data_offsets");
    expect_refusal("{\"a", 0, "found the end, expected '\"' at the end of a string");
    expect_refusal("{\"a\nb\":" F32_ENTRY "}", 8, "found '\\x0ab\":{\"dt', expected a string, in which control characters");
    expect_refusal("{\"a\xff\":" F32_ENTRY "}", 8, "expected valid UTF-8");
    expect_refusal("{\"a\\q\":" F32_ENTRY "}", 8, "found '\\q\":{\"dt', expected an escape");
    expect_refusal("{\"a\\u12g4\":" F32_ENTRY "}", 8, "found '\\u12g4\":', expected an escape");
    expect_refusal("{\"a\\u0000\":" F32_ENTRY "}", 8, "a zero byte inside a string");
    expect_refusal("{\"a\\ud800\":" F32_ENTRY "}", 8, "expected a surrogate pair");
    expect_refusal("{\"a\\ud800\\u0041\":" F32_ENTRY "}", 8, "expected a surrogate pair");
    expect_refusal("{\"a\\udc00\":" F32_ENTRY "}", 8, "expected a surrogate pair");
    expect_refusal("{\"a\":" F32_ENTRY
                   ",\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}",
                   12, "tensor 'a' is there twice");
    expect_refusal("{\"a\":{\"dtype\":\"F33\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8,
                   "unknown dtype 'F33'");
    expect_refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8,
                   "lacks dtype, shape or data_offsets");
    expect_refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"shape\":[2],\"data_offsets\":[0,8]}}",
                   8, "'shape' is unknown or repeated");
    expect_refusal("{\"a\":{\"dtype\":\"F32\",\"size\":[2],\"data_offsets\":[0,8]}}", 8,
                   "'size' is unknown or repeated");
    expect_refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8,
                   "expected a whole number");
    expect_refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", 8,
                   "expected a whole number");
    expect_refusal(
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,8]}}", 8,
        "expected a number below 2^63");
    expect_refusal(
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]}}", 8,
        "more than 8 numbers");
    expect_refusal(
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}", 0,
        "its shape overflows");
    expect_refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 8,
                   "make 12 bytes, data_offsets 8");
    expect_refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8,
                   "do not lie in the 8 bytes");
    expect_refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}", 8,
                   "do not lie in the 8 bytes");
    expect_refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8]}}", 8,
                   "data_offsets has 1 numbers");
    expect_refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12,
                   "starts at byte 4 of the data, the one before ends at 0");
    expect_refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[2,10]}}", 12,
                   "not a multiple of its item's 4");
    expect_refusal("{\"a\":" F32_ENTRY
                   ",\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}",
                   12, "the one before ends at 8");
    expect_refusal("{\"a\":" F32_ENTRY ",\"b\":" F32_ENTRY "}", 8, "the one before ends at 8");
    expect_refusal("{\"a\":" F32_ENTRY "}", 9, "the tensors make 8 bytes, the file has 9");
    expect_refusal("{\"__metadata__\":{\"a\":1}}", 0, "expected '\"'");
    expect_refusal("{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__ is there twice");
}

// Headers with a few bytes changed, added or lost: refused, or read without leaving the file.
static void test_safetensors_mutations(void) {
    const char* path = test_path("t.safetensors");
    make_tensors(path);
    size_t n;
    char* whole = read_file(path, &n);
    uint64_t json_bytes;
    memcpy(&json_bytes, whole, 8);
    static const char LETTERS[] = "{}[]\",:\\0129 u\xff";
    char* bytes = (char*)test_calloc(n + 64, 1);
    int opened = 0, outside = 0, unexplained = 0;
    for (uint64_t trial = 0; trial < 2000; trial++) {
        size_t size = n;
        memcpy(bytes, whole, n);
        int changes = 1 + (int)(test_random(trial, 0) % 3);
        for (int k = 0; k < changes; k++) {
            uint64_t r = test_random(trial, 1 + k);
            size_t at = r % 20 == 0 ? r / 64 % 8 : 8 + r / 64 % json_bytes;
            char letter = r % 3 ? LETTERS[r / 8192 % (sizeof LETTERS - 1)] : (char)(r >> 48);
            int kind = (int)(r >> 40) % 5;
            if (kind == 3) {
                memmove(bytes + at + 1, bytes + at, size - at);
                size++;
            } else if (kind == 4) {
                memmove(bytes + at, bytes + at + 1, size - at - 1);
                size--;
            }
            if (kind != 4) bytes[at] = letter;
        }
        if (test_random(trial, 9) % 8 == 0) size = test_random(trial, 10) % size;
        test_write_file(path, bytes, size);
        SafeFile f;
        char problem[512] = "";
        if (!safetensors_try_open(&f, path, problem, sizeof problem)) {
            unexplained += !*problem;
            continue;
        }
        opened++;
        const char* begin = (const char*)f.map;
        for (int i = 0; i < f.count; i++) {
            const char* data = (const char*)f.tensors[i].data;
            outside += data < begin || data + f.tensors[i].bytes > begin + size ||
                       f.tensors[i].bytes != (size_t)safe_elements(&f.tensors[i]) *
                                                 SAFE_TYPE_BYTES[f.tensors[i].type];
            outside += strlen(f.tensors[i].name) > json_bytes;
        }
        safetensors_close(&f);
    }
    test_true("mutated headers: none reads outside its file", outside == 0);
    test_true("mutated headers: every refusal is explained", unexplained == 0);
    // A changed letter in a name or a metadata value leaves a good file; most other changes do not.
    test_true("mutated headers: some good, most refused", opened > 20 && opened < 1000);
    free(whole);
    free(bytes);
}

// ---- random numbers and samples ------------------------------------------------------------

static void test_rng(void) {
    // Known answers of Random123, philox4x32-10.
    static const uint32_t KNOWN[3][10] = {
        { 0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 },
        { 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d,
          0x41c83b0e, 0xa20bc7c6, 0x6d5451fd },
        { 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
          0x94fdcceb, 0x5001e420, 0x24126ea1 }
    };
    for (int i = 0; i < 3; i++) {
        uint32_t out[4];
        rng_philox(out, KNOWN[i], KNOWN[i] + 4);
        test_same_bits("philox4x32-10", out, KNOWN[i] + 6, sizeof out);
    }
    // The formulas on the words of the first answer. Double rounding and a log and cos good to 2
    // ulp: 1e-14.
    test_check("uniform of known words",
               fabs(rng_uniform(0, 0, 0) - (0x6627e8d5 + 0.5) / 4294967296.0), 0);
    test_check("normal of known words", fabs(rng_normal(0, 0, 0) - 0.9911376799303855), 1e-14);
    enum { N = 200000 };
    double sum = 0, sum2 = 0, low = 1, high = 0, product = 0, normal = 0, normal2 = 0, normal4 = 0;
    for (uint64_t i = 0; i < N; i++) {
        double u = rng_uniform(3, 5, i), z = rng_normal(3, 5, i);
        sum += u - 0.5;
        sum2 += (u - 0.5) * (u - 0.5) - 1.0 / 12;
        product += (u - 0.5) * (rng_uniform(3, 6, i) - 0.5);
        low = u < low ? u : low;
        high = u > high ? u : high;
        normal += z;
        normal2 += z * z - 1;
        normal4 += z * z * z * z - 3;
    }
    // Five standard deviations of a mean of N: variances of u, u^2, u v, z, z^2, z^4 are 1/12,
    // 1/180, 1/144, 1, 2, 96.
    test_check("uniform: mean", fabs(sum / N), 5 * sqrt(1.0 / 12 / N));
    test_check("uniform: variance", fabs(sum2 / N), 5 * sqrt(1.0 / 180 / N));
    test_check("uniform: two streams are not correlated", fabs(product / N),
               5 * sqrt(1.0 / 144 / N));
    // The smallest of N is below 20/N but for one case in e^20.
    test_true("uniform: inside (0, 1), up to its ends",
              low > 0 && high < 1 && low < 20.0 / N && high > 1 - 20.0 / N);
    test_check("normal: mean", fabs(normal / N), 5 * sqrt(1.0 / N));
    test_check("normal: variance", fabs(normal2 / N), 5 * sqrt(2.0 / N));
    test_check("normal: fourth moment", fabs(normal4 / N), 5 * sqrt(96.0 / N));
    double u = rng_uniform(1, 2, 3);
    test_true("seed, stream and both halves of the index count",
              u != rng_uniform(2, 2, 3) && u != rng_uniform(1, 3, 3) && u != rng_uniform(1, 2, 4) &&
                  u != rng_uniform(1, 2, 3 + (1ull << 32)) &&
                  u != rng_uniform(1 + (1ull << 32), 2, 3) && u == rng_uniform(1, 2, 3));
}

static void pick_nan(void* unused) {
    (void)unused;
    float z[3] = { 1, NAN, 2 };
    sampler_pick(z, 3, 1, 0, 1, 0);
}

static void pick_none(void* unused) {
    (void)unused;
    float z[3] = { -INFINITY, -INFINITY, -INFINITY };
    sampler_pick(z, 3, 1, 0, 1, 0);
}

static void test_sampler(void) {
    enum { N = 20000, V = 6 };
    float z[V] = { 0, 1, -1, 2, 1, -INFINITY };
    static const struct { double temperature; int top_k; bool in[V]; } CASES[] = {
        { 1, 0, { 1, 1, 1, 1, 1, 0 } }, { 1, 99, { 1, 1, 1, 1, 1, 0 } },
        { 0.5, 0, { 1, 1, 1, 1, 1, 0 } }, { 2, 3, { 0, 1, 0, 1, 1, 0 } },
        { 1, 2, { 0, 1, 0, 1, 0, 0 } }, { 0, 0, { 0, 0, 0, 1, 0, 0 } },
        { 3, 1, { 0, 0, 0, 1, 0, 0 } },
    };
    for (size_t c = 0; c < sizeof CASES / sizeof *CASES; c++) {
        double p[V], sum = 0;
        int count[V] = { 0 };
        for (int i = 0; i < V; i++) {
            p[i] = !CASES[c].in[i]             ? 0
                   : CASES[c].temperature == 0 ? 1
                                               : exp(z[i] / CASES[c].temperature);
            sum += p[i];
        }
        for (uint64_t i = 0; i < N; i++)
            count[sampler_pick(z, V, (float)CASES[c].temperature, CASES[c].top_k, 9, i)]++;
        char what[64];
        for (int i = 0; i < V; i++) {
            double q = p[i] / sum;
            snprintf(what, sizeof what, "temperature %g, top %d: token %d", CASES[c].temperature,
                     CASES[c].top_k, i);
            test_check(what, fabs(count[i] / (double)N - q),
                       5 * sqrt(q * (1 - q) / N));    // exact where q is 0 or 1
        }
    }
    float equal[4] = { 1, 5, 5, 5 };
    test_true("equal logits: the lower id",
              sampler_pick(equal, 4, 0, 0, 1, 0) == 1 && sampler_pick(equal, 4, 1, 1, 1, 0) == 1);
    float huge[3] = { 1e30f, -1e30f, 1e30f };
    int drawn = sampler_pick(huge, 3, 1, 0, 1, 0);
    test_true("large logits", drawn == 0 || drawn == 2);
    test_true("drawn again", sampler_pick(z, V, 1, 0, 4, 17) == sampler_pick(z, V, 1, 0, 4, 17));
    expect_death("a logit that is NaN", pick_nan, NULL, "sample: logit 1 is nan", NULL);
    expect_death("no logit above -inf", pick_none, NULL, "sample: all 3 logits are -inf", NULL);
}

// ---- tokens to text, text to tokens --------------------------------------------------------

static const char GPT2[] = "test/data/gpt2";

static void open_text_missing(void* hash) {
    TextCodec c;
    text_open(&c, "no/such/folder", 50304, -1, (const char*)hash, "old.safetensors");
}

static void open_text_hash(void* hash) {
    TextCodec c;
    text_open(&c, GPT2, 50304, -1, (const char*)hash, "old.safetensors");
}

static void open_text_columns(void* V) {
    TextCodec c;
    text_open(&c, GPT2, *(int*)V, -1, NULL, NULL);
}

static void open_text_end(void* end) {
    TextCodec c;
    text_open(&c, "", 320, *(int*)end, NULL, NULL);
}

static void encode_numbers(void* text) {
    TextCodec c;
    int n;
    text_open(&c, "", 50304, -1, NULL, NULL);
    text_encode(&c, (const char*)text, strlen((const char*)text), &n);
}

static void test_text(void) {
    static const struct { int V, n, tokens[8]; const char* text; } TEXTS[] = {
        { 320, 3, { 'H', 'i', '\n' }, "Hi\n" },
        { 320, 3, { 256, 'a', 300 }, "<end>a<300>" },
        { 320, 2, { 0xc3, 0xa9 }, "\xc3\xa9" },
        { 320, 2, { 0xc3, 'a' }, "\xef\xbf\xbd" "a" },
        { 320, 2, { 0xc3, 256 }, "\xef\xbf\xbd<end>" },
        { 320, 2, { 0xe2, 0x82 }, "\xef\xbf\xbd\xef\xbf\xbd" },
        { 320, 3, { 0xe0, 0x80, 0x80 }, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" },
        { 320, 3, { 27, '\t', 0 }, "\\x1b\t\\x00" },
        { 320, 3, { 0xc2, 0x9b, 'm' }, "\\x9bm" },
        { 320, 2, { 0xc2, 0xa0 }, "\xc2\xa0" },
        { 320, 4, { 0xf0, 0x9f, 0x98, 0x80 }, "\xf0\x9f\x98\x80" },
        { 320, 4, { 0xf0, 0x9f, 0x98, 0xe2 }, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" },
        { 50304, 3, { 1, 256, 50256 }, "1 256 50256" },
    };
    TextCodec c;
    for (size_t i = 0; i < sizeof TEXTS / sizeof *TEXTS; i++) {
        text_open(&c, "", TEXTS[i].V, -1, NULL, NULL);
        char* text = text_of(&c, TEXTS[i].tokens, TEXTS[i].n);
        if (!test_true("text of tokens", strcmp(text, TEXTS[i].text) == 0))
            printf("      %s\n", text);
        free(text);
        text_close(&c);
    }
    // The vocabularies: how many ids have text, and which opens a document.
    static const struct {
        const char* tokenizer;
        int V, end, vocab, end_is;
        TextKind kind;
    } OPEN[] = {
        { "", 320, -1, 257, 256, TEXT_BYTES },
        { "", 257, -1, 257, 256, TEXT_BYTES },
        { "", 256, -1, 256, 0, TEXT_BYTES },
        { "", 320, 10, 257, 10, TEXT_BYTES },
        { "", 384, -1, 384, 256, TEXT_NUMBERS },
        { "", 50304, -1, 50304, 50256, TEXT_NUMBERS },
        { GPT2, 50304, -1, 50257, 50256, TEXT_TOKENS },
        { GPT2, 50257, 7, 50257, 7, TEXT_TOKENS },
    };
    for (size_t i = 0; i < sizeof OPEN / sizeof *OPEN; i++) {
        static float z[50304];
        int left = 0, V = OPEN[i].V, n;
        text_open(&c, OPEN[i].tokenizer, V, OPEN[i].end, NULL, NULL);
        memset(z, 0, sizeof z);
        text_mask(&c, z, V);
        for (int k = 0; k < V; k++) left += z[k] == 0 && k < OPEN[i].vocab;
        test_true("a vocabulary", c.kind == OPEN[i].kind && c.vocab == OPEN[i].vocab &&
                                      c.end_of_text == OPEN[i].end_is);
        test_true("columns without text are taken out",
                  left == OPEN[i].vocab && (V == left || (z[left] < -1e38f && z[V - 1] < -1e38f)));
        int* ids = text_encode(&c, NULL, 0, &n);
        test_true("no text is the start of a document", n == 1 && ids[0] == OPEN[i].end_is);
        free(ids);
        text_close(&c);
    }
    // There and back: any bytes, also those that are not UTF-8.
    static const char BYTES[] = "Hi \xc3\xa9\xff\xfe \xf0\x9f\x98\x80<|endoftext|>";
    static const char SHOWN[] = "Hi \xc3\xa9\xef\xbf\xbd\xef\xbf\xbd \xf0\x9f\x98\x80<|endoftext|>";
    for (int k = 0; k < 2; k++) {
        int n, bytes = (int)strlen(BYTES);
        text_open(&c, k ? GPT2 : "", k ? 50304 : 320, -1, NULL, NULL);
        int* ids = text_encode(&c, BYTES, (size_t)bytes, &n);
        char* text = text_of(&c, ids + 1, n - 1);
        bool special = false;
        for (int i = 1; i < n; i++) special = special || ids[i] == c.end_of_text;
        test_true("text to tokens and back",
                  strcmp(text, SHOWN) == 0 && !special && ids[0] == c.end_of_text &&
                      (k ? n < bytes : n == bytes + 1));
        free(text);
        free(ids);
        int end = c.end_of_text;
        text = text_of(&c, &end, 1);
        test_true("the end of text", strcmp(text, k ? "<|endoftext|>" : "<end>") == 0);
        free(text);
        text_close(&c);
    }
    // The hash of GPT-2's vocabulary is asked for and found; one of another ends the program.
    text_open(&c, GPT2, 50304, -1, NULL, NULL);
    char hash[17], other[] = "00000000000000aa", words[100];
    memcpy(hash, c.hash, sizeof hash);
    text_close(&c);
    text_open(&c, GPT2, 50304, -1, hash, "old.safetensors");
    test_true("the hash of the weights", strlen(hash) == 16 && strcmp(c.hash, hash) == 0);
    text_close(&c);
    text_open(&c, "", 320, -1, hash, "old.safetensors");
    test_true("weights of a tokenizer are not bytes", c.kind == TEXT_NUMBERS && !c.hash[0]);
    text_close(&c);
    snprintf(words, sizeof words, "--tokenizer test/data/gpt2 has hash %s, but old.safetensors",
             hash);
    expect_death("another hash", open_text_hash, other, words,
                 "learned the tokens of hash 00000000000000aa");
    expect_death("a folder that has moved", open_text_missing, hash,
                 "--tokenizer no/such/folder: No such file or directory; its tokens are what was "
                 "learned by old.safetensors", "where it lies now");
    expect_death("a folder that is not there", open_text_missing, (void*)"",
                 "--tokenizer no/such/folder: No such file or directory\n", NULL);
    int V = 50256, end = 257;
    expect_death("too few columns", open_text_columns, &V,
                 "--tokenizer test/data/gpt2 has 50257 tokens, but --vocab is 50256", NULL);
    expect_death("an end of text without text", open_text_end, &end,
                 "--end-of-text 257 is not one of the 257 tokens", NULL);
    expect_death("a prompt without a vocabulary", encode_numbers, (void*)"Hi",
                 "--prompt needs the vocabulary", "--tokenizer FOLDER");
}

// ---- a model's own settings ----------------------------------------------------------------

static char model_path[600];

// A file of weights with these flags (NULL: none) and this step.
static const char* write_model(const char* flags, const char* step) {
    float x = 1;
    SafeTensor t = { "x", SAFE_F32, 1, { 1 }, &x, 0, 0 };
    const char* metadata[] = { "step",           step, "commit", "abc1234",
                               "tokenizer_hash", "17", "flags",  flags };
    snprintf(model_path, sizeof model_path, "%s", test_path("model.safetensors"));
    safetensors_write(model_path, &t, 1, metadata, flags ? 4 : 2);
    return model_path;
}

// The words of a command line with FILE for the model's path.
static void load_words(Settings* s, ModelFile* saved, const char* words) {
    static char text[2000];
    static char* argv[32];
    const char* file = strstr(words, "FILE");
    snprintf(text, sizeof text, "%.*s%s%s", (int)(file - words), words, model_path, file + 4);
    int argc = 1;
    for (char* word = strtok(text, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
    settings_parse(s, argc, argv);
    settings_load(s, saved, argc, argv);
}

static void load_and_check(void* words) {
    static Settings s;
    ModelFile saved;
    load_words(&s, &saved, (const char*)words);
    settings_check(&s, 1);
}

static void expect_flags_error(const char* what, const char* flags, const char* part) {
    char wanted[700];
    write_model(flags, "7");
    snprintf(wanted, sizeof wanted, "%s: %s", model_path, part);
    expect_death(what, load_and_check, (void*)"--load FILE --sample-tokens 5", wanted, NULL);
}

static void test_model_settings(void) {
    static Settings run, s, initial;
    ModelFile saved;
    char* flags = NULL;
    size_t size;
    // A run in which no flag has its default.
    settings_defaults(&run);
    settings_defaults(&initial);
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        double initial = f->initial;
        if (f->kind == FLAG_INT)
            *flag_int(f, &run) = (int64_t)initial + (initial < f->high ? 1 : -1);
        if (f->kind == FLAG_REAL)
            *flag_real(f, &run) = initial > f->low ? (initial + f->low) / 2 : f->high;
        if (f->kind == FLAG_TEXT) snprintf(flag_text(f, &run), TEXT_SIZE, "a \"\xc3\xa9\" %d", i);
        if (f->kind == FLAG_CHOICE) *flag_choice(f, &run) = !f->initial;
    }
    FILE* text = open_memstream(&flags, &size);
    settings_json(text, &run);
    fclose(text);
    write_model(flags, "5100");
    load_words(&s, &saved, "--load FILE --sample-tokens 9");
    int taken = 0, wrong = 0;
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        static const char* const OTHERS[] = { "load", "sample_tokens", "micro_batch",
                                              "batch_tokens" };
        char is[TEXT_SIZE], was[TEXT_SIZE], usual[TEXT_SIZE];
        bool other = f->kind == FLAG_GROUP || f->kind == FLAG_SWITCH;
        for (int k = 0; k < 4; k++) other = other || strcmp(f->name, OTHERS[k]) == 0;
        if (other) continue;
        flag_value(is, sizeof is, f, &s);
        flag_value(was, sizeof was, f, &run);
        flag_value(usual, sizeof usual, f, &initial);
        bool model = flag_of_model(f);
        if (!strcmp(is, model ? was : usual) && strcmp(was, usual)) {
            taken += model;
            continue;
        }
        printf("      %s: %s, in the file %s\n", f->name, is, was);
        wrong++;
    }
    test_true("the model's flags come from the file, the run's do not", wrong == 0 && taken > 30);
    static const char* const MODEL[] = { "layers", "vocab", "softcap", "seq_len", "steps",
                                         "end_of_text", "tokenizer", "document_mask", "windows" };
    static const char* const RUN[] = { "train", "val", "out", "load", "recipe", "seed", "ranks",
                                       "prompt", "muon_lr", "micro_batch", "sample_tokens",
                                       "trace" };
    bool ok = true;
    for (int i = 0; i < FLAG_COUNT; i++) {
        for (size_t k = 0; k < sizeof MODEL / sizeof *MODEL; k++)
            if (!strcmp(FLAG_TABLE[i].name, MODEL[k])) ok = ok && flag_of_model(&FLAG_TABLE[i]);
        for (size_t k = 0; k < sizeof RUN / sizeof *RUN; k++)
            if (!strcmp(FLAG_TABLE[i].name, RUN[k])) ok = ok && !flag_of_model(&FLAG_TABLE[i]);
    }
    test_true("which is which", ok);
    test_true("what else the file says", saved.step == 5100 && !strcmp(saved.commit, "abc1234") &&
                                             !strcmp(saved.tokenizer_hash, "17"));
    test_true("a sample is one sequence", s.micro_batch == 1 && s.batch_tokens == s.seq_len &&
                                              s.seq_len == 1025 && s.sample_tokens == 9);
    free(flags);

    write_model("{\"heads\":5,\"smear\":1,\"x0_mix\":0,\"train\":\"old\",\"steps\":77}", "7");
    load_words(&s, &saved, "--recipe unet --heads 2 --load FILE --train t --val v");
    test_true("flags win over the recipe, the recipe over the file",
              s.heads == 2 && s.x0_mix == 1 && s.steps == 3000 && s.smear == 1);
    test_true("and training has its own data", !strcmp(s.train, "t") && s.micro_batch == 64);
    write_model("{}", "7");
    load_words(&s, &saved, "--load FILE --sample-tokens 5");
    test_true("a file of fewer flags", s.layers == 12 && saved.step == 7);
    write_model(NULL, "7");
    load_words(&s, &saved, "--load FILE --train t --val v --layers 4");
    test_true("training from a file without flags", s.layers == 4);
    settings_parse(&s, 1, NULL);
    settings_load(&s, &saved, 1, NULL);
    test_true("no file", s.layers == 12 && saved.step == 0 && !saved.tokenizer_hash[0]);

    expect_flags_error("no flags", NULL, "it does not say what its model is");
    expect_flags_error("a flag of a later version", "{\"layers\":3,\"wings\":2}",
                       "there is no flag 'wings', with which it was saved\n");
    expect_flags_error("a group is no flag", "{\"model\":3}", "there is no flag 'model'");
    expect_flags_error("the spelling of the command line", "{\"seq-len\":3}",
                       "there is no flag 'seq-len'");
    expect_flags_error("text for a number", "{\"layers\":\"3\"}",
                       "its flags, byte 10: found '\"3\"}', expected a number");
    expect_flags_error("a number for a word", "{\"head\":1}",
                       "its flags, byte 8: found '1}', expected '\"' and a string");
    expect_flags_error("no value", "{\"layers\":}",
                       "its flags, byte 10: found '}', expected a number");
    expect_flags_error("cut", "{\"layers\":",
                       "its flags, byte 10: found the end, expected a number");
    expect_flags_error("cut in a name", "{\"lay", "its flags, byte 5: found the end");
    expect_flags_error("half a number", "{\"layers\":3.5}", "layers wants an integer, got '3.5'");
    expect_flags_error("a list", "{\"layers\":[3]}", "its flags, byte 10: found '[3]}'");
    expect_flags_error("out of range", "{\"layers\":0}", "layers must be from 1 to 1000, got 0");
    expect_flags_error("no such word", "{\"head\":\"tide\"}",
                       "head must be one of tied|untied, got 'tide'");
    expect_flags_error("twice", "{\"layers\":3,\"layers\":3}", "the flag 'layers' is in it twice");
    expect_flags_error("a zero byte", "{\"tokenizer\":\"a\\u0000b\"}",
                       "its flags, byte 13: found '\"");
    expect_flags_error("no object", "[1]",
                       "its flags, byte 0: found '[1]', expected '{' and flags");
    expect_flags_error("no comma", "{\"layers\":3 \"heads\":1}",
                       "its flags, byte 12: found '\"heads\":', expected ',' or '}'");
    expect_flags_error("something behind", "{\"layers\":3}}",
                       "its flags, byte 12: found '}', expected the end");
    write_model("{\"heads\":2,\"channels\":96}", "7");
    expect_death("flags that do not go together", load_and_check,
                 (void*)"--load FILE --sample-tokens 5", "is a head of 48 channels", NULL);
    write_model("{}", "seven");
    expect_death("no step", load_and_check, (void*)"--load FILE --sample-tokens 5",
                 "its \"step\" is 'seven', expected a number", NULL);
    test_write_file(model_path, "no weights at all", 17);
    expect_death("not a file of weights", load_and_check, (void*)"--load FILE --sample-tokens 5",
                 "model.safetensors: ", "is this a safetensors file?");
    unlink(model_path);
    expect_death("no file", load_and_check, (void*)"--load FILE --sample-tokens 5",
                 "cannot be opened: No such file", NULL);
}

// ---- generate ------------------------------------------------------------------------------

// A model that goes on with the tokens of a script, and the padding columns are its favourites. It
// looks at what it is shown, and at what has been printed when it is asked.
typedef struct Script {
    const int* ids;
    int count, at, V;
    int seen[64], seen_count;       // of the call before
    int whole[400], whole_count;    // of the document so far
    int T, longest, restarts;
    bool right;
    char** printed;
    float logits[50304];
} Script;

static float* script_logits(void* context, const int* ids, int count, int known) {
    Script* m = (Script*)context;
    bool right = count >= 1 && count <= m->T && (known == 0 || known == count - 1) &&
                 known <= m->seen_count;
    for (int i = 0; i < known && right; i++) right = ids[i] == m->seen[i];
    if (known == 0) m->restarts++;
    // What is shown is the end of the document.
    if (m->at > 0) {
        int id = m->ids[m->at - 1];
        if (id == m->ids[m->count]) m->whole_count = 0;
        m->whole[m->whole_count++] = id;
    }
    right = right && count <= m->whole_count &&
            memcmp(ids, m->whole + m->whole_count - count, (size_t)count * sizeof(int)) == 0;
    for (const char* s = m->printed ? *m->printed : NULL; s && *s && right;) {
        int length = utf8_length((const unsigned char*)s, strlen(s));
        right = length > 0;
        s += length;
    }
    m->right = m->right && right;
    memcpy(m->seen, ids, (size_t)count * sizeof(int));
    m->seen_count = count;
    if (count > m->longest) m->longest = count;
    for (int i = 0; i < m->V; i++) m->logits[i] = i >= 257 ? 9 : 0;
    m->logits[m->ids[m->at++]] = 5;
    return m->logits;
}

// The script's ids, the last one behind them being the end of text.
static void run_script(Script* m, GenerateSpec* spec, TextCodec* c, const char* text, int T,
                       const char* prompt, FILE* out) {
    static int ids[400];
    int n = 0;
    memset(m, 0, sizeof *m);
    for (const char* s = text; *s; s++) ids[n++] = *s == '|' ? (int)BYTE_END : (unsigned char)*s;
    ids[n] = BYTE_END;
    m->ids = ids;
    m->count = n;
    m->V = spec->V;
    m->T = spec->T = T;
    m->right = true;
    spec->tokens = n;
    int* made = text_encode(c, prompt, strlen(prompt), &spec->prompt_count);
    spec->prompt = made;
    m->whole_count = spec->prompt_count;
    memcpy(m->whole, made, (size_t)spec->prompt_count * sizeof(int));
    int drawn[400];
    char* printed = NULL;
    size_t size;
    FILE* memory = out ? NULL : open_memstream(&printed, &size);
    if (memory) m->printed = &printed;
    if (memory) fflush(memory);
    generate(drawn, spec, c, script_logits, m, out ? out : memory);
    char wanted[1000];
    snprintf(wanted, sizeof wanted, "%s%s\n", prompt, text);
    if (memory) {
        fclose(memory);
        char* end = strchr(wanted, '|');
        size_t shown = end ? (size_t)(end - wanted) : strlen(wanted);
        test_true("prompt and text are printed", memcmp(printed, wanted, shown) == 0 &&
                                                     (end ? !memcmp(printed + shown, "<end>", 5)
                                                          : strlen(printed) == shown));
        free(printed);
    }
    test_true("the ids that were drawn", memcmp(drawn, ids, (size_t)n * sizeof(int)) == 0);
    test_true("what the model is shown", m->right && m->at == n);
    free(made);
}

static void run_long_prompt(void* c) {
    static Script m;
    GenerateSpec spec = { NULL, 0, 0, 0, 320, 0, 0, 1 };
    run_script(&m, &spec, (TextCodec*)c, "xyz", 8, "a prompt of more than eight", stdout);
    if (!m.right || m.longest != 8) die("wrong");
}

static float* constant_logits(void* context, const int* ids, int count, int known) {
    static float z[320];
    (void)ids, (void)count, (void)known;
    memcpy(z, context, sizeof z);
    return z;
}

static void test_generate(void) {
    static Script m;
    TextCodec c;
    GenerateSpec spec = { NULL, 0, 0, 0, 320, 0, 0, 1 };
    text_open(&c, "", 320, -1, NULL, NULL);
    run_script(&m, &spec, &c, "plain text", 64, "", NULL);
    test_true("each token costs one position", m.restarts == 1 && m.longest == 10);
    run_script(&m, &spec, &c, "\xa9 \xe2\x82\xac \xf0\x9f\x98\x80.", 64, "Caf\xc3", NULL);
    run_script(&m, &spec, &c, "one|two", 64, "begin:", NULL);
    test_true("a document begins with nothing before it", m.restarts == 2 && m.whole_count == 3);
    // Ten positions: full at ten, then five and the new one, and so on after every fifth token.
    run_script(&m, &spec, &c, "abcdefghijklmnopqrstuvwxyz", 10, "", NULL);
    test_true("the last half is kept", m.longest == 10 && m.restarts == 1 + 4);
    run_script(&m, &spec, &c, "abcdefg", 3, "xy", NULL);
    run_script(&m, &spec, &c, "abc", 1, "", NULL);
    test_true("a model that sees one token", m.longest == 1 && m.restarts == 3);
    const Child* child = child_run(run_long_prompt, &c);
    if (!test_true("a prompt that is too long", child->status == 0 && strstr(child->err,
                   "the prompt has 28 tokens, the model sees 8: it does not see the first 20")))
        printf("      status %d: %s\n", child->status, child->err);
    text_close(&c);

    // Temperature, top-k and seed go through, and a token's place in the sample is its number.
    float z[320], copy[320];
    int drawn[50], again[50], ids[1] = { 256 };
    for (int i = 0; i < 320; i++) z[i] = (float)test_normal(5, (uint64_t)i);
    text_open(&c, "", 320, -1, NULL, NULL);
    GenerateSpec sample = { ids, 1, 50, 16, 320, 0.7f, 20, 11 };
    generate(drawn, &sample, &c, constant_logits, z, NULL);
    bool same = true;
    memcpy(copy, z, sizeof z);
    text_mask(&c, copy, 320);
    for (int i = 0; i < 50; i++)
        same = same && drawn[i] == sampler_pick(copy, 320, 0.7f, 20, 11, (uint64_t)i + 1);
    test_true("draws as the sampler does", same);
    generate(again, &sample, &c, constant_logits, z, NULL);
    test_same_bits("the same seed", drawn, again, sizeof drawn);
    sample.seed = 12;
    generate(again, &sample, &c, constant_logits, z, NULL);
    test_true("another seed", memcmp(drawn, again, sizeof drawn) != 0);
    text_close(&c);
}

// ---- outliers ------------------------------------------------------------------------------

static void test_outliers(void) {
    Window w = {}, later = {};
    bool early = true;
    for (int i = 0; i < WINDOW; i++) {
        early = early && isnan(window_z(&w, i));
        window_push(&w, i);
    }
    test_true("no measure before the window is full", early);
    // Of 0 .. n-1: the mean (n-1)/2, the variance (n^2-1)/12. 128 terms of a sum with a relative
    // error of 2^-53 each.
    double deviation = sqrt((WINDOW * WINDOW - 1) / 12.0);
    test_check("mean", fabs(window_z(&w, (WINDOW - 1) / 2.0)), 1e-14);
    test_check("deviations above it", fabs(window_z(&w, 63.5 + 3 * deviation) - 3), 1e-13);
    test_check("and below", fabs(window_z(&w, 63.5 - 2 * deviation) + 2), 1e-13);
    window_push(&w, WINDOW);
    test_check("the oldest goes", fabs(window_z(&w, (WINDOW + 1) / 2.0)), 1e-14);
    Window before = w;
    window_push(&w, NAN);
    window_push(&w, INFINITY);
    window_push(&w, -INFINITY);
    test_true("what is not finite stays out", memcmp(&w, &before, sizeof w) == 0);
    test_true("a loss that is not finite has no place", isnan(window_z(&w, NAN)) &&
                                                            window_z(&w, INFINITY) == INFINITY);
    // The same values at another place of the ring.
    memset(&w, 0, sizeof w);
    for (int i = 0; i < 3 * WINDOW + 57; i++) {
        window_push(&w, test_normal(5, (uint64_t)i));
        if (i >= 2 * WINDOW + 57) window_push(&later, test_normal(5, (uint64_t)i));
    }
    double a = window_z(&w, 2), b = window_z(&later, 2);
    test_same_bits("the same whatever came before", &a, &b, sizeof a);
    for (int i = 0; i < WINDOW; i++) window_push(&w, 0.1);
    test_true("equal values have no measure", isnan(window_z(&w, 0.2)));
    for (int i = 0; i < WINDOW; i++) window_push(&w, 1e9 + i % 2);
    test_check("small steps of large numbers", fabs(window_z(&w, 1e9 + 2) - 3), 1e-13);
}

// ---- log -----------------------------------------------------------------------------------

static LogStep step_line(int64_t step, double loss) {
    LogStep line = { step, loss, 0.25 * (double)step, 1, 0.85f, 2.5, 64 * step, NAN, NAN, NAN,
                     false };
    return line;
}

static void write_log(void* out) {
    static Settings s;
    static Log log;
    parse_words(&s, "--recipe unet --steps 3 --seed 42");
    snprintf(s.out, sizeof s.out, "%s", (const char*)out);
    log_open(&log, &s, 0, 1, -1);
    LogStep one = step_line(1, 10.5);
    LogStep two = { 2, NAN, 0.5, 0.5f, 0.9f, NAN, 128, -1.5, 3.25, 17, true };
    static const int TOKENS[] = { 256, 'o', '"', 0xff };
    log_val(&log, 0, 10.8258, 0);
    log_train(&log, &one);
    log_note(&log, "epoch %d", 1);
    log_train(&log, &two);
    TextCodec bytes;
    text_open(&bytes, "", 320, -1, NULL, NULL);
    log_sample(&log, 2, TOKENS, 4, &bytes);
    text_close(&bytes);
    log_checkpoint(&log, 2, 3 << 20, 12.25, 2345.5);
    log_val(&log, 2, 3.28, 0.5);
    log_result(&log, 3.28, 0.5, 128);
    log_end(&log, STATUS_AGAIN);
    log_close(&log);
}

static void write_log_missed(void* out) {
    static Settings s;
    static Log log;
    settings_defaults(&s);
    s.on_save_error = FLAG_SAVE_ERROR_STOP;
    snprintf(s.out, sizeof s.out, "%s", (const char*)out);
    log_open(&log, &s, 0, 1, -1);
    log_result(&log, *s.out == 'x' ? 1 : NAN, 0.5, 128);
    log_close(&log);
}

// A disk without room for more than so many bytes in a file. SIGXFSZ would end the program.
static void limit_files(rlim_t bytes) {
    struct rlimit limit = { bytes, RLIM_INFINITY };
    signal(SIGXFSZ, SIG_IGN);
    REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0, "setrlimit: %s", strerror(errno));
}

static void write_log_without_room(void* out) {
    limit_files(1000);      // the message fits
    write_log_missed(out);
}

// The disk is full for a while: of a line, of many, of more than are kept. Where the standard error
// goes has to stay writable, so the limit is above its few lines.
static void write_log_on(void* out) {
    static Settings s;
    static Log log;
    settings_defaults(&s);
    snprintf(s.out, sizeof s.out, "%s", (const char*)out);
    log_open(&log, &s, 0, 1, -1);
    struct stat info;
    REQUIRE(fstat(log.text_file.fd, &info) == 0, "fstat: %s", strerror(errno));
    limit_files((rlim_t)info.st_size + 20);
    for (int i = 0; i < 100; i++) log_note(&log, "note %d of a full disk", i);
    limit_files(RLIM_INFINITY);
    log_note(&log, "there is room");
    log_warn(&log, "a warning\nand what to do");
    limit_files((rlim_t)info.st_size + 5000);
    for (int i = 0; i < 300; i++) {
        for (int k = 0; k < 60; k++) fprintf(log.text, "%1000d\n", i);
        if (i % 100 == 0) log_flush(&log);
    }
    log_flush(&log);
    log_note(&log, "after what is lost");
    limit_files(RLIM_INFINITY);
    log_note(&log, "there is room again");
    log_close(&log);
}

// Every line is whole, so that what is there can be trusted.
static bool lines_are_whole(const char* text, size_t* fillers) {
    bool ok = true;
    *fillers = 0;
    for (const char* line = text; *line;) {
        size_t n = strcspn(line, "\n");
        bool filler = n > 100 && line[0] == ' ' && strspn(line, " 0123456789") == n;
        ok = ok && line[n] == '\n' && (!filler || n == 1000);
        *fillers += filler;
        line += n + 1;
    }
    return ok;
}

static int count_in(const char* text, const char* part) {
    int n = 0;
    for (const char* at = text; (at = strstr(at, part)); at += strlen(part)) n++;
    return n;
}

static void test_log_without_room(void) {
    char out[300], path[400];
    expect_death("a full disk", write_log_without_room, (void*)test_path("full"),
                 "the log cannot be written: File too large", "--on-save-error go");
    snprintf(out, sizeof out, "%s/full2", test_folder);
    const Child* c = child_run(write_log_on, out);
    test_true("--on-save-error go: the run goes on", c->status == 0);
    test_true("one message when it begins, for each file",
              count_in(c->err, "cannot be written: File too large") == 3 &&
                  count_in(c->err, "full2/log.txt: cannot be written") == 2);
    test_true("what was lost is said",
              count_in(c->err, "log.txt: is written again; 0 bytes of it are lost") == 1 &&
                  count_in(c->err, "log.txt: is written again; ") == 2);
    test_true("a warning is a message", strstr(c->err, "test_services: a warning\n"
                                                       "               and what to do\n"));
    snprintf(path, sizeof path, "%s/log.txt", out);
    char* text = read_file(path, NULL);
    char note[64], all[8192] = "";
    for (int i = 0; i < 100; i++) {
        snprintf(note, sizeof note, "note %d of a full disk\n", i);
        strcat(all, note);
    }
    size_t fillers;
    test_true("what was written meanwhile is there, in order",
              strstr(text, strcat(all, "there is room\nwarning: a warning\n"
                                       "         and what to do\n")) != NULL);
    test_true("what is lost is lost by the line", lines_are_whole(text, &fillers) && fillers > 0 &&
                                                      fillers < 300 * 60);
    test_true("and the log ends as it should",
              strlen(text) > 40 && !strcmp(text + strlen(text) - 40,
                                           "\nafter what is lost\nthere is room again\n"));
    free(text);
    snprintf(path, sizeof path, "%s/log.jsonl", out);
    text = read_file(path, NULL);
    bool valid = true;
    for (char* line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
        valid = valid && json_is_valid(line);
    test_true("log.jsonl, too", valid);
    free(text);
}

static void test_log(void) {
    char out[300], path[400];
    snprintf(out, sizeof out, "%s/runs/a/b", test_folder);
    const Child* c = child_run(write_log, out);
    test_true("log: no error", c->status == 0 && !*c->err);
    static const char LINES[] = "step:0/3 val_loss:10.825800 train_time:0ms step_avg:0.00ms\n"
                                "step:1/3 train_loss:10.500000 train_time:250ms step_avg:250.00ms\n"
                                "epoch 1\n"
                                "step:2/3 train_loss:nan train_time:500ms step_avg:250.00ms "
                                "skipped\n"
                                "---- sample after 2 steps ----\n<end>o\"\xef\xbf\xbd\n----\n"
                                "checkpoint of step 2: 3.0 MiB, training waited 12.2 ms, written "
                                "in 2346 ms\n"
                                "step:2/3 val_loss:3.280000 train_time:500ms step_avg:250.00ms\n"
                                "RESULT val_loss:3.280000 target:3.28 reached:yes train_time:500ms "
                                "tokens:128 seed:42 commit:" GIT_COMMIT "\n";
    test_true("log: the same lines on a pipe", strcmp(c->out, LINES) == 0);
    snprintf(path, sizeof path, "%s/log.txt", out);
    size_t n;
    char* text = read_file(path, &n);
    test_true("log.txt: starts with the commit",
              strncmp(text, "test_services commit " GIT_COMMIT ", 20", 21) == 0);
    test_true("log.txt: the flags",
              strstr(text, "\n  muon-lr                            0.04         *\n") != NULL);
    test_true("log.txt: ends with the lines",
              n > sizeof LINES && strcmp(text + n - (sizeof LINES - 1), LINES) == 0);
    free(text);
    snprintf(path, sizeof path, "%s/log.jsonl", out);
    text = read_file(path, &n);
    static const char* const WANTED[] = {
        "\"ranks\":1,\"settings\":{\"recipe\":\"unet\",\"steps\":3,",
        "{\"event\":\"val\",\"step\":0,\"val_loss\":10.8258,\"train_ms\":0,\"step_avg_ms\":0}",
        "\"step\":1,\"tokens\":64,\"train_loss\":10.5,\"grad_norm\":2.5,\"lr_mult\":1,"
        "\"muon_momentum\":0.85",
        "{\"event\":\"note\",\"text\":\"epoch 1\"}",
        "\"train_loss\":null,\"grad_norm\":null",
        "\"tokens\":[256,111,34,255]",
        "{\"event\":\"checkpoint\",\"step\":2,\"bytes\":3145728,\"pause_ms\":12.25,"
        "\"write_ms\":2345.5}",
        "\"val_loss\":3.28",
        "\"reached\":true",
        "{\"event\":\"end\",\"status\":75}",
    };
    enum { EVENTS = sizeof WANTED / sizeof *WANTED };
    int lines = 0;
    bool valid = true;
    for (char* line = strtok(text, "\n"); line; line = strtok(NULL, "\n"), lines++) {
        valid = valid && *line == '{' && json_is_valid(line);
        bool right = lines < EVENTS && strstr(line, WANTED[lines]);
        if (!test_true("log.jsonl: an event", right))
            printf("      %s\n      wanted %s\n", line, lines < EVENTS ? WANTED[lines] : "the end");
        if (lines == 0) {
            const char* pid = strstr(line, ",\"pid\":");
            test_true("log.jsonl: who writes it", pid && atoi(pid + 7) > 1 &&
                                                      strstr(pid, ",\"host\":\"") &&
                                                      !strstr(line, "resumed"));
        }
        if (lines == 2)
            test_true("log.jsonl: a step",
                      strstr(line, "\"train_ms\":250") &&
                          strstr(line, "\"loss_z\":null,\"grad_norm_z\":null,\"weight_norm\":null,"
                                       "\"skipped\":false}"));
        if (lines == 4)
            test_true("log.jsonl: a skipped step",
                      strstr(line, "\"loss_z\":-1.5,\"grad_norm_z\":3.25,\"weight_norm\":17,"
                                   "\"skipped\":true}") != NULL);
    }
    test_true("log.jsonl: one JSON object per line", valid && lines == EVENTS);
    free(text);

    // A second and a third run keep the logs before them.
    child_run(write_log_missed, out);
    c = child_run(write_log_missed, out);
    test_true("NaN has not reached the target",
              strstr(c->out, "RESULT val_loss:nan target:3.28 reached:no"));
    static const char* const KEPT[] = { "log.1.txt", "log.1.jsonl", "log.2.txt", "log.2.jsonl" };
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s/%s", out, KEPT[i]);
        text = access(path, R_OK) == 0 ? read_file(path, NULL) : NULL;
        test_true("earlier logs are kept", text && (strstr(text, "10.8258") != NULL) == (i < 2));
        free(text);
    }
    test_write_file(test_path("plain"), "x", 1);
    expect_death("OUT is a file", write_log_missed, (void*)test_path("plain"),
                 "is there and not a directory", NULL);
    expect_death("OUT in a file", write_log_missed, (void*)test_path("plain/a"),
                 "cannot be created: Not a directory", NULL);
    test_log_without_room();

    Clock clock = { 0, 0 };
    clock_start(&clock);
    usleep(20000);
    double first = clock_stop(&clock);
    usleep(20000);
    test_true("the clock stands still when stopped",
              clock_seconds(&clock) == first && first >= 0.02);
    clock_start(&clock);
    usleep(1000);
    clock_start(&clock);
    test_true("the clock goes on",
              clock_seconds(&clock) > first && clock_stop(&clock) >= first + 0.001);
}

// ---- log of a resumed run ------------------------------------------------------------------

typedef struct Resume {
    const char* out;
    int rank;
    int64_t resumed, last;      // steps; last: of the run
} Resume;

// Steps after `resumed` up to `last`, as the trainer logs them: validations of even steps, a sample
// of step 3 whose text looks like a log.
static void write_steps(void* resume) {
    static Settings s;
    static Log log;
    const Resume* r = (const Resume*)resume;
    settings_defaults(&s);
    s.steps = 6;
    snprintf(s.out, sizeof s.out, "%s", r->out);
    log_open(&log, &s, r->rank, 2, r->resumed);
    TextCodec bytes;
    text_open(&bytes, "", 320, -1, NULL, NULL);
    for (int64_t step = r->resumed < 0 ? 0 : r->resumed;; step++) {
        static const char SAMPLE[] =
            "a\nstep:9/9 train_loss:1\nRESULT b\n---- sample after 9 steps";
        int tokens[sizeof SAMPLE];
        for (size_t i = 0; i < sizeof SAMPLE - 1; i++) tokens[i] = SAMPLE[i];
        if (step % 2 == 0) log_val(&log, step, 5 - 0.1 * (double)step, 0.25 * (double)step);
        if (step == 3) log_sample(&log, step, tokens, sizeof SAMPLE - 1, &bytes);
        if (step == r->last) break;
        LogStep line = step_line(step + 1, 5 - 0.25 * (double)step);
        log_train(&log, &line);
        if (step == 2) log_note(&log, "epoch 2");
    }
    if (r->last == s.steps) log_result(&log, 4.4, 1.5, 64 * 6);
    text_close(&bytes);
    log_close(&log);
}

// A log without what belongs to a start: the header, its flags, and the settings of log.jsonl.
static char* log_body(const char* directory, const char* name) {
    char path[500];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    char *text = read_file(path, NULL), *to = text;
    for (char* line = text; *line;) {
        size_t n = strcspn(line, "\n") + (line[strcspn(line, "\n")] == '\n');
        bool start = strncmp(line, "test_services commit", 20) == 0 ||
                     strncmp(line, "{\"event\":\"start\"", 16) == 0 || strncmp(line, "  ", 2) == 0;
        for (int i = 0; i < FLAG_COUNT && !start; i++)
            start = FLAG_TABLE[i].kind == FLAG_GROUP && strlen(FLAG_TABLE[i].what) + 1 == n &&
                    strncmp(line, FLAG_TABLE[i].what, n - 1) == 0;
        if (!start) memmove(to, line, n);
        if (!start) to += n;
        line += n;
    }
    *to = 0;
    return text;
}

static void test_resumed_log(void) {
    static const char* const NAMES[] = { "log.txt", "log.jsonl", "log.rank1.txt" };
    char whole_out[300], out[300], path[400], kept[400], number[80];
    snprintf(whole_out, sizeof whole_out, "%s/whole", test_folder);
    Resume whole = { whole_out, 0, -1, 6 };
    child_run(write_steps, &whole);
    whole.rank = 1;
    child_run(write_steps, &whole);
    // Of each resumed step the log must be that of the run that was not interrupted.
    for (int64_t step = 0; step <= 6; step++) {
        snprintf(out, sizeof out, "%s/resumed%d", test_folder, (int)step);
        // Some ended at the checkpoint, the others later.
        Resume first = { out, 0, -1, step % 2 ? step : 6 }, second = { out, 0, step, 6 };
        for (int rank = 0; rank < 2; rank++) {
            first.rank = rank;
            child_run(write_steps, &first);
        }
        char* before[3];
        for (int i = 0; i < 3; i++) {
            snprintf(path, sizeof path, "%s/%s", out, NAMES[i]);
            FILE* file = fopen(path, "a");
            fputs("{\"event\":\"note\",\"te", file);      // killed within a line
            fclose(file);
            before[i] = read_file(path, NULL);
        }
        for (int rank = 0; rank < 2; rank++) {
            second.rank = rank;
            const Child* c = child_run(write_steps, &second);
            if (!test_true("a resumed log", c->status == 0 && !*c->err)) printf("%s", c->err);
        }
        for (int i = 0; i < 3; i++) {
            char *got = log_body(out, NAMES[i]), *want = log_body(whole_out, NAMES[i]);
            snprintf(number, sizeof number, "resumed after step %d", (int)step);
            if (!test_true(number, strcmp(got, want) == 0)) printf("%s: %s\n", NAMES[i], got);
            snprintf(kept, sizeof kept, "%s/log.1.%s", out, NAMES[i] + 4);
            char* old = access(kept, R_OK) == 0 ? read_file(kept, NULL) : NULL;
            test_true("the log of before is kept", old && strcmp(old, before[i]) == 0);
            free(old), free(got), free(want), free(before[i]);
        }
        snprintf(path, sizeof path, "%s/log.txt", out);
        char* text = read_file(path, NULL);
        snprintf(number, sizeof number, ", resumed after step %d, the log of before is log.1.txt\n",
                 (int)step);
        test_true("it says so", strstr(text, number) != NULL);
        free(text);
        snprintf(path, sizeof path, "%s/log.jsonl", out);
        text = read_file(path, NULL);
        snprintf(number, sizeof number, "\"ranks\":2,\"resumed\":%d,\"settings\":", (int)step);
        test_true("in log.jsonl, too", count_in(text, "\"event\":\"start\"") == 2 &&
                                           count_in(text, number) == 1);
        free(text);
    }
    // The last of them once more, and a rank that was not there before.
    Resume third = { out, 0, 5, 6 }, other = { out, 2, 5, 6 };
    child_run(write_steps, &third);
    child_run(write_steps, &other);
    snprintf(kept, sizeof kept, "%s/log.2.rank1.txt", out);
    snprintf(path, sizeof path, "%s/log.1.rank2.txt", out);
    test_true("the next number, the same for all ranks",
              access(kept, F_OK) == 0 && access(path, F_OK) != 0);
    char* text = log_body(out, "log.rank2.txt");
    test_true("a new rank begins where it comes in", !strncmp(text, "step:6/6 train_loss:", 20));
    free(text);
    // No log at all, because the checkpoint is another run's.
    snprintf(out, sizeof out, "%s/elsewhere", test_folder);
    third.resumed = 5;
    child_run(write_steps, &third);
    text = log_body(out, "log.txt");
    test_true("no log of before", !strncmp(text, "step:6/6 train_loss:", 20));
    free(text);
    snprintf(path, sizeof path, "%s/log.1.txt", out);
    test_true("none is kept", access(path, F_OK) != 0);
}

// ---- directory of a run --------------------------------------------------------------------

static void claim(void* out) {
    OutLock lock;
    out_claim(&lock, (const char*)out);
    printf("claimed %s", out_is_claimed((const char*)out) ? "by others" : "alone");
}

static void claim_and_hold(void* out) {
    OutLock lock;
    out_claim(&lock, (const char*)out);
    usleep(250000);
}

static void ask_claimed(void* out) {
    printf("%s", out_is_claimed((const char*)out) ? "claimed" : "free");
}

// Many that take the lock, add one to a number in a file, and remove the lock.
enum { TAKERS = 4, TAKES = 150 };
static void take_turns(const char* lock, const char* counter) {
    for (int i = 0; i < TAKES; i++) {
        int fd = -1, n = 0;
        while ((fd = out_try_lock(lock)) == -1) sched_yield();
        FILE* file = fopen(counter, "r+");
        if (fd < 0 || !file || fscanf(file, "%d", &n) != 1) _exit(1);
        rewind(file);
        sched_yield();
        fprintf(file, "%d\n", n + 1);
        fclose(file);
        unlink(lock);
        close(fd);
    }
}

static void test_lock(void) {
    char out[300], path[400], wanted[64];
    snprintf(out, sizeof out, "%s/claims/a", test_folder);
    snprintf(path, sizeof path, "%s/lock", out);
    OutLock lock = {};
    out_release(&lock);
    out_claim(&lock, out);
    snprintf(wanted, sizeof wanted, "another run is writing there: pid %d on host ", (int)getpid());
    out_patience = 0.15;
    expect_death("one run in a directory", claim, out, wanted, "give another --out");
    test_true("others see the lock", !strcmp(child_run(ask_claimed, out)->out, "claimed"));
    out_release(&lock);
    test_true("released, it is gone", access(path, F_OK) != 0 &&
                                          !strcmp(child_run(ask_claimed, out)->out, "free"));
    test_write_file(path, "pid 1 on host nowhere since 2020\n", 33);
    test_true("a file that nobody holds is no lock",
              !strcmp(child_run(ask_claimed, out)->out, "free"));
    test_true("nor is it in the way", !strcmp(child_run(claim, out)->out, "claimed alone"));
    test_true("a process that ends without a word has let go", access(path, F_OK) == 0 &&
                  !strcmp(child_run(ask_claimed, out)->out, "free"));
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        claim_and_hold(out);
        _exit(0);
    }
    for (int i = 0; i < 500 && !out_is_claimed(out); i++) usleep(1000);
    test_true("held by another", out_is_claimed(out));
    out_patience = 10;
    double from = clock_now();
    out_claim(&lock, out);
    test_true("one that is about to end is waited for", clock_now() - from > 0.05 && lock.held);
    out_release(&lock);
    waitpid(pid, NULL, 0);

    snprintf(path, sizeof path, "%s/turns", out);
    char counter[400];
    snprintf(counter, sizeof counter, "%s/counter", out);
    test_write_file(counter, "0\n", 2);
    pid_t pids[TAKERS];
    for (int i = 0; i < TAKERS; i++) {
        pids[i] = fork();
        if (pids[i] == 0) {
            take_turns(path, counter);
            _exit(0);
        }
    }
    bool ok = true;
    for (int i = 0; i < TAKERS; i++) {
        int status = 1;
        waitpid(pids[i], &status, 0);
        ok = ok && status == 0;
    }
    char* text = read_file(counter, NULL);
    test_true("one at a time, although the file comes and goes",
              ok && atoi(text) == TAKERS * TAKES);
    free(text);
    test_write_file(test_path("file"), "", 0);
    expect_death("OUT is a file", claim, (void*)test_path("file"), "there and not a directory",
                 NULL);
}

static void require_fresh(void* out) {
    out_require_fresh((const char*)out, false);
    printf("fresh");
}

static void require_fresh_auto(void* out) {
    out_require_fresh((const char*)out, true);
    printf("fresh");
}

static void make_folder(const char* format, const char* out) {
    char path[400];
    snprintf(path, sizeof path, format, out);
    REQUIRE(mkdir(path, 0700) == 0, "%s: %s", path, strerror(errno));
}

static void test_contents(void) {
    char out[300], path[400];
    snprintf(out, sizeof out, "%s/contents", test_folder);
    test_true("nothing there", !strcmp(child_run(require_fresh, out)->out, "fresh"));
    make_folder("%s", out);
    snprintf(path, sizeof path, "%s/log.txt", out);
    static const char EARLY[] = "train_gpt2 commit x, y\nthe run\n  steps  5\n"
                                "step:0/5 val_loss:1 train_time:0ms step_avg:0.00ms\n";
    test_write_file(path, EARLY, sizeof EARLY - 1);
    test_true("a log without a step is no run",
              !strcmp(child_run(require_fresh, out)->out, "fresh"));
    static const char STEPS[] = "step:1/5 train_loss:1\nstep:2/5 train_loss:1\n";
    test_write_file(path, STEPS, sizeof STEPS - 1);
    expect_death("steps", require_fresh, out, "holds a run, 2 steps in its log\n",
                 "--resume auto begins it again; or give another --out");
    test_true("which auto makes again", !strcmp(child_run(require_fresh_auto, out)->out, "fresh"));
    make_folder("%s/checkpoints", out);
    make_folder("%s/checkpoints/.step_000009.tmp", out);
    make_folder("%s/checkpoints/.step_000007.old", out);
    make_folder("%s/checkpoints/step_x", out);
    make_folder("%s/checkpoints/step_", out);
    make_folder("%s/checkpoints/step_000008 (copy)", out);
    test_true("half a checkpoint is none",
              out_contents(out).checkpoint == -1 && out_contents(out).checkpoints == 0);
    make_folder("%s/checkpoints/step_000001", out);
    make_folder("%s/checkpoints/step_1000002", out);
    OutContents found = out_contents(out);
    test_true("the newest", found.checkpoint == 1000002 && found.checkpoints == 2 &&
                                found.steps == 2 && !found.weights);
    expect_death("checkpoints", require_fresh, out,
                 "holds a run, 2 steps in its log, 2 checkpoints\n",
                 "--resume auto continues it; or give another --out");
    expect_death("none of them valid", require_fresh_auto, out,
                 "holds a run, 2 steps in its log, 2 checkpoints\n",
                 "none of its checkpoints is valid");
    snprintf(path, sizeof path, "%s/checkpoints/step_000001", out);
    test_true("its own checkpoint", out_owns(out, path));
    strcat(path, "/");
    test_true("with a slash", out_owns(out, path));
    test_true("another's", !out_owns(test_folder, path) && !out_owns(out, test_folder) &&
                               !out_owns(out, "no/such"));

    snprintf(out, sizeof out, "%s/contents2", test_folder);
    make_folder("%s", out);
    snprintf(path, sizeof path, "%s/model.safetensors", out);
    test_write_file(path, "", 0);
    expect_death("weights", require_fresh, out, "holds a run, model.safetensors\n",
                 "give another --out");
    expect_death("are never made anew", require_fresh_auto, out, "holds a run, model.safetensors\n",
                 "give another --out");
}

// ---- flags of a checkpoint -----------------------------------------------------------------

static void load_folder(void* words) {
    static Settings s;
    ModelFile saved;
    load_words(&s, &saved, (const char*)words);
    printf("%s %d", s.load, (int)s.layers);
}

static void test_differences(void) {
    static char refused[4096], taken[4096], small[200], small_taken[200];
    static Settings run, given;
    char *flags = NULL, *cut;
    size_t size;
    settings_defaults(&run);
    run.muon_lr = 0.1 + 0.2;
    snprintf(run.train, TEXT_SIZE, "a \"b\" \\ c");
    FILE* text = open_memstream(&flags, &size);
    settings_json(text, &run);
    fclose(text);
    given = run;
    snprintf(given.resume, TEXT_SIZE, "auto");
    int n = settings_differences(refused, taken, sizeof refused, &given, flags, "c");
    test_true("the same flags", n == 0 && !*refused && !*taken);
    given.seq_len = 2048;
    given.head = FLAG_HEAD_UNTIED;
    given.muon_lr = 0.3;
    given.micro_batch = 32;
    snprintf(given.train, TEXT_SIZE, "new");
    snprintf(given.tokenizer, TEXT_SIZE, "x");
    snprintf(given.value_embeds, TEXT_SIZE, "1:0");
    static const char REFUSED[] = "  --seq-len: checkpoint 1024 / given 2048\n"
                                  "  --head: checkpoint tied / given untied\n"
                                  "  --value-embeds: checkpoint - / given 1:0\n"
                                  "  --muon-lr: checkpoint 0.30000000000000004 / given 0.3\n";
    static const char TAKEN[] = "  --micro-batch: checkpoint 64 / given 32\n"
                                "  --train: checkpoint a \"b\" \\ c / given new\n"
                                "  --tokenizer: checkpoint - / given x\n";
    n = settings_differences(refused, taken, sizeof refused, &given, flags, "c");
    if (!test_true("those that alter the maths", n == 4 && !strcmp(refused, REFUSED)))
        printf("%d\n%s", n, refused);
    if (!test_true("and the others", !strcmp(taken, TAKEN))) printf("%s", taken);
    n = settings_differences(small, small_taken, 100, &given, flags, "c");
    test_true("no room for all",
              n == 4 && !strcmp(small, "  --seq-len: checkpoint 1024 / given 2048\n"
                                       "  and 3 more\n"));
    test_true("nor for the taken",
              !strcmp(small_taken, "  --micro-batch: checkpoint 64 / given 32\n  and 2 more\n"));

    // Of another version: a flag that is gone, one that is new with its default, one that is not.
    cut = strstr(flags, "\"seq_len\":1024");
    memcpy(cut, "\"wing_is\":1024", 14);
    cut = strstr(flags, "\"heads\":6");
    memcpy(cut, "\"wings\":6", 9);
    given = run;
    given.seq_len = 1025;
    static const char OTHER[] =
        "  --wing-is: checkpoint 1024 / given - (this program has no such flag)\n"
        "  --wings: checkpoint 6 / given - (this program has no such flag)\n"
        "  --seq-len: checkpoint - (it knows no such flag) / given 1025\n";
    n = settings_differences(refused, taken, sizeof refused, &given, flags, "c");
    if (!test_true("flags of another version", n == 3 && !strcmp(refused, OTHER)))
        printf("%d\n%s", n, refused);
    if (!test_true("a new flag with its default",
                   !strcmp(taken, "  --heads: checkpoint - (it knows no such flag) / given 6\n")))
        printf("%s", taken);
    free(flags);
    static const char* const BAD[][2] = {
        { "", "here: its flags, byte 0: found the end, expected '{' and flags" },
        { "{\"steps\":\"7\"}", "here: its flags, byte 9: found '\"7\"}', expected a number" },
        { "{\"steps\":7", "here: its flags, byte 10: found the end, expected ',' or '}'" },
        { "{\"steps\":7,\"steps\":7}", "here: the flag 'steps' is in it twice" },
        { "{\"wings\":[1]}", "here: its flags, byte 9: found '[1]}', expected a number" },
        { "{} {", "here: its flags, byte 3: found '{', expected the end" },
    };
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        n = settings_differences(refused, taken, sizeof refused, &given, BAD[i][0], "here");
        if (!test_true("no flags", n == -1 && !strcmp(refused, BAD[i][1]) && !*taken))
            printf("      %d %s\n", n, refused);
    }
    n = settings_differences(refused, taken, sizeof refused, &run, "{\"head\":\"no such\"}", "c");
    test_true("a word of another version, and no other flags",
              n == 2 && !strcmp(refused, "  --head: checkpoint no such / given tied\n"
                                         "  --muon-lr: checkpoint - (it knows no such flag) / "
                                         "given 0.30000000000000004\n"));

    // --load of a directory.
    char wanted[700], words[400];
    write_model("{\"layers\":7}", "7");
    snprintf(words, sizeof words, "--sample-tokens 5 --load FILE");
    snprintf(wanted, sizeof wanted, "%s 7", model_path);
    *strrchr(model_path, '/') = 0;
    const Child* c = child_run(load_folder, words);
    test_true("--load of a directory", c->status == 0 && !strcmp(c->out, wanted));
    strcat(model_path, "/nothing");
    REQUIRE(mkdir(model_path, 0700) == 0, "%s: %s", model_path, strerror(errno));
    expect_death("--load of another", load_folder, words,
                 "nothing: there is no model.safetensors in it", "one of the checkpoints");
}

// ---- tools ---------------------------------------------------------------------------------

// Words as for parse_words.
static void run_tool(const char* words, int (*tool)(int, char**)) {
    static char store[4096];
    static char* argv[32];
    int argc = 1;
    snprintf(store, sizeof store, "%s", words);
    argv[0] = test_folder;
    for (char* word = strtok(store, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
    argv[argc] = NULL;
    exit(tool(argc, argv));
}

static void run_shards(void* words) {
    run_tool((const char*)words, text_to_shards_main);
}

static void run_plot(void* words) {
    run_tool((const char*)words, plot_loss_main);
}

static void expect_shard(const char* what, const char* name, const int* tokens, int n) {
    Shards s;
    shards_open(&s, test_path(name), BYTE_VOCAB);
    bool ok = shards_total(&s) == n;
    uint16_t got[64];
    ok = ok && n <= 64 && shards_read(&s, got, 0, (size_t)n);
    for (int i = 0; i < n && ok; i++) ok = got[i] == tokens[i];
    test_true(what, ok);
    shards_close(&s);
}

static void test_text_to_shards(void) {
    char words[2048];
    test_write_file(test_path("one.txt"), "abcdefghij\xff\0klmnopqr", 20);
    snprintf(words, sizeof words, "%s --out %s", test_path("one.txt"), test_path("o"));
    test_true("one file", child_run(run_shards, words)->status == 0);
    static const int TRAIN[] = { 256, 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i',
                                 'j', 255, 0,   'k', 'l', 'm', 'n', 'o', 'p' };
    static const int VAL[] = { 256, 'q', 'r' };
    expect_shard("nine tenths to train on", "o_train_000001.bin", TRAIN, 19);
    expect_shard("a tenth to validate on", "o_val_000000.bin", VAL, 3);

    test_write_file(test_path("a.txt"), "abcdef", 6);
    test_write_file(test_path("b.txt"), "", 0);
    test_write_file(test_path("c.txt"), "ghij", 4);
    snprintf(words, sizeof words, "--out %s --val-fraction 0.5 %s %s %s", test_path("p"),
             test_path("a.txt"), test_path("b.txt"), test_path("c.txt"));
    test_true("three files", child_run(run_shards, words)->status == 0);
    static const int HALF[] = { 256, 'a', 'b', 'c', 'd', 'e' },
                     REST[] = { 256, 'f', 256, 'g', 'h', 'i', 'j' };
    expect_shard("documents open with 256", "p_train_000001.bin", HALF, 6);
    expect_shard("so does what the cut parts", "p_val_000000.bin", REST, 7);
    snprintf(words, sizeof words, "--val-fraction 0 --out %s %s", test_path("q"), test_path("c.txt"));
    child_run(run_shards, words);
    static const int ALL[] = { 256, 'g', 'h', 'i', 'j' };
    expect_shard("fraction 0", "q_train_000001.bin", ALL, 5);
    test_true("fraction 0: no validation set", access(test_path("q_val_000000.bin"), F_OK) != 0);

    test_write_file(test_path("q_train_000002.bin"), "x", 1);
    expect_death("a shard from before", run_shards, words,
                 "q_train_000002.bin is there from before", "remove it");
    snprintf(words, sizeof words, "--out %s %s", test_path("r"), test_path("b.txt"));
    expect_death("no bytes", run_shards, words, "no bytes to make tokens of", NULL);
    snprintf(words, sizeof words, "--out %s %s", test_path("r"), test_path("nosuch.txt"));
    expect_death("no such text", run_shards, words, "text_to_shards: ", "nosuch.txt: No such file");
    snprintf(words, sizeof words, "--out %s %s", test_path("r"), test_folder);
    expect_death("a directory as text", run_shards, words, "not a file", NULL);
    snprintf(words, sizeof words, "--out %s/no/r %s", test_folder, test_path("a.txt"));
    expect_death("nowhere to write", run_shards, words, "cannot be created: No such file", NULL);
    expect_death("no flag", run_shards, (void*)"--into x y",
                 "no flag --into; there are --out and --val-fraction", NULL);
    expect_death("no value", run_shards, (void*)"--out", "--out wants a value", NULL);
    expect_death("a bad fraction", run_shards, (void*)"--val-fraction 2 y",
                 "must be a number from 0 to 1, got '2'", NULL);
    expect_death("no words", run_shards, (void*)"", "usage: text_to_shards", NULL);
}

static void test_plot_loss(void) {
    char words[2048];
    // x from 0 to 10 over 70..940, y from 2 to 4 over 484..20
    static const char LOG[] =
        "first line\nstep:0/10 val_loss:4.0 train_time:0ms step_avg:0.00ms\n"
        "step:5/10 train_loss:3.0 train_time:1000ms step_avg:200.00ms\nstep:6/10 train_loss:nan "
        "train_time:1200ms step_avg:200.00ms\n"
        "step:10/10 val_loss:2.0 train_time:2000ms step_avg:200.00ms\nRESULT val_loss:2.0 "
        "target:3.28\n";
    test_write_file(test_path("log.txt"), LOG, sizeof LOG - 1);
    snprintf(words, sizeof words, "%s --out %s", test_folder, test_path("a.svg"));
    const Child* c = child_run(run_plot, words);
    char wanted[700];
    snprintf(wanted, sizeof wanted, "%s\n", test_path("a.svg"));
    test_true("prints the path", c->status == 0 && strcmp(c->out, wanted) == 0);
    char* svg = read_file(test_path("a.svg"), NULL);
    test_true("val curve",
              strstr(svg, "class=\"val\" stroke=\"#0072b2\" d=\"M70.0 20.0L940.0 484.0\"") != NULL);
    test_true("train curve, without the NaN",
              strstr(svg, "class=\"train\" stroke=\"#0072b2\" d=\"M505.0 252.0\"") != NULL);
    test_true("ticks", strstr(svg, "x=\"62\" y=\"488.0\" text-anchor=\"end\">2.0<") &&
                           strstr(svg, "x=\"62\" y=\"24.0\" text-anchor=\"end\">4.0<") &&
                           strstr(svg, "x=\"940.0\" y=\"504\" text-anchor=\"middle\">10<"));
    test_true("legend and axes", strstr(svg, ": val, last 2.0000<") && strstr(svg, ">step<") &&
                                     strstr(svg, ">loss (nats per token)<"));
    free(svg);

    FILE* file = fopen(test_path("many & <more>.txt"), "w");
    for (int i = 1; i <= 1200; i++)
        fprintf(file, "step:%d/1200 train_loss:%d train_time:%dms step_avg:1.00ms\n", i, i % 3,
                10 * i);
    fclose(file);
    // The name holds spaces, so it goes in by a link without.
    REQUIRE(symlink(test_path("many & <more>.txt"), test_path("m&<.txt")) == 0, "symlink: %s",
            strerror(errno));
    snprintf(words, sizeof words, "--by time --y-max 3 --target 0.5 --out %s %s %s",
             test_path("b.svg"), test_path("m&<.txt"), test_path("log.txt"));
    test_true("two logs", child_run(run_plot, words)->status == 0);
    svg = read_file(test_path("b.svg"), NULL);
    test_true("thinned by means",
              strstr(svg, "train, mean of 3 steps") && !strstr(svg, "mean of 1 steps"));
    test_true("the means",
              strstr(svg, "d=\"M71.5 391.2L"));    // 1 at 0.02 s, in [0.5, 3] and [0, 11.99]
    test_true("by time", strstr(svg, ">training time (s)<") && strstr(svg, ">12<"));
    test_true("names are escaped", strstr(svg, "m&amp;&lt;.txt") != NULL);
    test_true("two colours, a target", strstr(svg, "#d55e00") && strstr(svg, "class=\"target\"") &&
                                           strstr(svg, ">0.5</text>"));
    free(svg);

    test_write_file(test_path("empty.txt"), "x\n", 2);
    snprintf(words, sizeof words, "%s", test_path("empty.txt"));
    expect_death("no lines", run_plot, words, "no line `step:S/N val_loss",
                 "is it the log.txt of a run?");
    expect_death("no log", run_plot, (void*)"", "usage: plot_loss", NULL);
    expect_death("no such log", run_plot, (void*)"no/log.txt",
                 "plot_loss: no/log.txt: No such file", NULL);
    expect_death("a bad axis", run_plot, (void*)"--by loss x",
                 "--by must be step or time, got 'loss'", NULL);
    expect_death("a bad number", run_plot, (void*)"--y-max -1 x",
                 "--y-max wants a number above 0, got '-1'", NULL);
    snprintf(words, sizeof words, "--y-max 1 %s", test_path("log.txt"));
    expect_death("nothing below y-max", run_plot, words,
                 "--y-max 1 is below every loss; the lowest is 2", NULL);
    snprintf(words, sizeof words, "--out %s/no/a.svg %s", test_folder, test_path("log.txt"));
    expect_death("nowhere to write the plot", run_plot, words, "cannot be created: No such file",
                 NULL);
    expect_death("too many", run_plot, (void*)"1 2 3 4 5 6 7 8 9", "9 logs; more than 8", NULL);
}

static void run_runs(void* words) {
    run_tool((const char*)words, runs_main);
}

typedef struct RunOf {
    const char* name;
    char out[300];
    int status;                 // of its end; -1: killed
    int64_t step;
    bool held;                  // it goes on while its list is made
} RunOf;

static void leave_run(void* run) {
    static Settings s;
    static Log log;
    const RunOf* r = (const RunOf*)run;
    parse_words(&s, "--recipe unet --steps 40");
    snprintf(s.out, sizeof s.out, "%s", r->out);
    log_open(&log, &s, 0, 1, -1);
    log_val(&log, 0, 10.8258, 0);
    for (int64_t step = 1; step <= r->step; step++) {
        LogStep line = step_line(step, 5);
        log_train(&log, &line);
    }
    if (r->step) log_val(&log, r->step, 5 - 0.01 * (double)r->step, 1);
    if (r->status == STATUS_DONE) log_result(&log, 3.28, 0.5, 128);
    if (r->status >= 0) log_end(&log, r->status);
    log_close(&log);
}

static void test_runs(void) {
    static RunOf runs[] = {
        { "seed-10", "", STATUS_DONE, 40, false },  { "seed-2", "", -1, 7, true },
        { "seed-3", "", STATUS_AGAIN, 8, false },   { "deep/er/a", "", -1, 9, false },
        { "b", "", STATUS_NOT_FINITE, 3, false },   { "c", "", STATUS_ERROR, 0, false },
        { "again", "", STATUS_AGAIN, 5, false },
    };
    char words[700], path[400];
    OutLock lock;
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        snprintf(runs[i].out, sizeof runs[i].out, "%s/r/%s", test_folder, runs[i].name);
        child_run(leave_run, &runs[i]);
        if (runs[i].held) out_claim(&lock, runs[i].out);
    }
    // One was resumed and killed; one has what is no line of a log, and half a line at its end; one
    // has a log.txt alone; one is no run.
    snprintf(path, sizeof path, "%s/log.jsonl", runs[6].out);
    FILE* again = fopen(path, "a");
    fputs("{\"event\":\"start\",\"commit\":\"new\","
          "\"settings\":{\"steps\":50,\"recipe\":\"a\\u0062\"}}\n", again);
    fclose(again);
    snprintf(path, sizeof path, "%s/log.jsonl", runs[2].out);
    FILE* file = fopen(path, "a");
    fputs("no JSON\n{\"event\":\"train\",\"step\":1e300,\"tokens\":-5,\"train_ms\":null}\n"
          "{\"event\":\"train\",\"step\":12,\"tokens\":768,\"train_ms\":3000,"
          "\"new\":[{\"step\":3}]}\n"
          "{\"event\":\"train\",\"step\":13,\"tok", file);
    fclose(file);
    make_folder("%s/checkpoints", runs[2].out);
    make_folder("%s/checkpoints/step_000004", runs[2].out);
    make_folder("%s/checkpoints/step_000008", runs[2].out);
    make_folder("%s/checkpoints/.step_000012.tmp", runs[2].out);
    make_folder("%s/r/old", test_folder);
    snprintf(path, sizeof path, "%s/r/old/log.txt", test_folder);
    test_write_file(path, "step:1/2\n", 9);
    make_folder("%s/r/none", test_folder);
    make_folder("%s/r/.hidden", test_folder);
    snprintf(path, sizeof path, "%s/r/.hidden/log.txt", test_folder);
    test_write_file(path, "", 0);
    snprintf(path, sizeof path, "%s/r/deep/loop", test_folder);
    REQUIRE(symlink("..", path) == 0, "symlink: %s", strerror(errno));

    snprintf(words, sizeof words, "%s/r/", test_folder);
    const Child* c = child_run(run_runs, words);
    char got[8192] = "", *at = got;
    for (const char* line = c->out; *line && strlen(line) < sizeof got - 1;) {
        // Without the folder, whose length is that of TMPDIR.
        if (strncmp(line, test_folder, strlen(test_folder)) == 0) line += strlen(test_folder) + 1;
        size_t n = strcspn(line, "\n") + 1;
        memcpy(at, line, n);
        at += n;
        line += n;
    }
    *at = 0;
    static const char C[] = GIT_COMMIT;
    char table[2048];
    snprintf(table, sizeof table,
             "r/again      ab      %-*s   5/50    4.9500       256           -  killed or failed\n"
             "r/b          unet    %s   3/40    4.9700       256           -  not finite\n"
             "r/c          unet    %s   0/40   10.8258         -           -  failed\n"
             "r/deep/er/a  unet    %s   9/40    4.9100       256           -  killed or failed\n"
             "r/old        -       %-*s    0/0         -         -           -  unknown\n"
             "r/seed-2     unet    %s   7/40    4.9300       256           -  running\n"
             "r/seed-3     unet    %s  12/40    4.9200       256           8  stopped: resume it\n"
             "r/seed-10    unet    %s  40/40    4.6000       256           -  finished\n",
             (int)strlen(C), "new", C, C, C, (int)strlen(C), "-", C, C, C);
    const char* body = strchr(got, '\n');
    if (!test_true("runs: the table", c->status == 0 && body && strcmp(body + 1, table) == 0))
        printf("%s%s", got, c->err);
    test_true("its titles",
              !strncmp(got, "run  ", 5) &&
                  strstr(got, " step  val loss  tokens/s  checkpoint  status\n"));
    out_release(&lock);
    c = child_run(run_runs, runs[1].out);
    test_true("a run itself, and its lock has gone", strstr(c->out, "  killed or failed\n") &&
                                                         count_in(c->out, "\n") == 2);
    snprintf(words, sizeof words, "%s/r/none", test_folder);
    c = child_run(run_runs, words);
    test_true("no runs", c->status == 0 && !strncmp(c->out, "no runs in ", 11));
    expect_death("no such directory", run_runs, (void*)"no/such", "runs: no/such: No such file",
                 "name directories that hold runs");
    expect_death("no flag", run_runs, (void*)"--all", "runs: no flag --all", "usage: runs");
}

// ---- main ----------------------------------------------------------------------------------

int main(int argc, char** argv) {
    program_name = "test_services";
    const char* temporary = getenv("TMPDIR");
    snprintf(test_folder, sizeof test_folder, "%.200s/services.XXXXXX",
             temporary ? temporary : "/tmp");
    REQUIRE(mkdtemp(test_folder), "%s: cannot be made: %s", test_folder, strerror(errno));
    test_init(argc, argv);
    if (test_group("common")) test_common();
    if (test_group("flags")) test_flags();
    if (test_group("flags: lists")) test_lists();
    if (test_group("flags: help")) test_help();
    if (test_group("flags: table")) test_table();
    if (test_group("recipes")) test_recipes();
    if (test_group("recipes: 20, 21, 45")) test_late_recipes();
    if (test_group("schedule")) test_schedule();
    if (test_group("schedule: 20, 21")) test_ramp();
    if (test_group("schedule: 45")) test_golden_schedule();
    if (test_group("safetensors")) test_safetensors();
    if (test_group("safetensors: escapes")) test_safetensors_escapes();
    if (test_group("safetensors: errors")) test_safetensors_errors();
    if (test_group("safetensors: mutations")) test_safetensors_mutations();
    if (test_group("rng")) test_rng();
    if (test_group("sampler")) test_sampler();
    if (test_group("text")) test_text();
    if (test_group("generate: settings")) test_model_settings();
    if (test_group("generate")) test_generate();
    if (test_group("saved")) test_differences();
    if (test_group("outliers")) test_outliers();
    if (test_group("log")) test_log();
    if (test_group("log: resumed")) test_resumed_log();
    if (test_group("out: lock")) test_lock();
    if (test_group("out: contents")) test_contents();
    if (test_group("text_to_shards")) test_text_to_shards();
    if (test_group("plot_loss")) test_plot_loss();
    if (test_group("runs")) test_runs();
    char command[300];
    snprintf(command, sizeof command, "rm -r '%s'", test_folder);
    if (system(command) != 0) fprintf(stderr, "test_services: %s is left over\n", test_folder);
    return test_summary();
}

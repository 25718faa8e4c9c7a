/*
The directory of a run (--out): who writes into it, and what it holds.

    out_claim(&lock, cfg.out);                  // rank 0: makes it, and has it alone from here on
    if (!resumed) out_require_fresh(cfg.out, is_auto);      // nothing is ever written over
    out_release(&lock);

    log.txt log.jsonl log.rankR.txt     llmc/log.h; log.K.*: those of before
    lock                                while a run is going on
    checkpoints/step_000500/            llmc/checkpoint.h
    model.safetensors                   of a finished run

The lock is the kernel's (fcntl): it ends with its process, however that ends, so a killed run
leaves a file `lock` that nobody holds and that is in nobody's way. Over NFS it holds for all hosts.
Where a file system knows no locks a warning is all there is.

test        test/test_services.c: out
*/
#pragma once
#include "common.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OUT_PATH = 1280 };       // a flag's text and the name of a file

// ---- directories ---------------------------------------------------------------------------

static inline void make_directory(const char* path) {
    char part[OUT_PATH];
    snprintf(part, sizeof part, "%s", path);
    for (char* c = part + 1;; c++) {
        if (*c != '/' && *c != 0) continue;
        char kept = *c;
        *c = 0;
        REQUIRE(mkdir(part, 0777) == 0 || errno == EEXIST, "--out %s: %s cannot be created: %s",
                path, part, strerror(errno));
        if (kept == 0) break;
        *c = kept;
    }
    struct stat info;
    REQUIRE(stat(path, &info) == 0 && S_ISDIR(info.st_mode),
            "--out %s is there and not a directory", path);
}

// ---- the lock ------------------------------------------------------------------------------

typedef struct OutLock {
    bool held;
    int fd;
    char path[OUT_PATH];
} OutLock;

// Seconds that the run before is given to end: the memory of a killed one has to be freed first.
static double out_patience = 10;

static inline struct flock out_whole_file(void) {
    struct flock whole;
    memset(&whole, 0, sizeof whole);
    whole.l_type = F_WRLCK;
    whole.l_whence = SEEK_SET;
    return whole;
}

// Whether another process holds the lock of this directory. The holder itself must not ask: its
// lock ends when it closes any of its files of that name.
static inline bool out_is_claimed(const char* out) {
    char path[OUT_PATH];
    snprintf(path, sizeof path, "%s/lock", out);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) fd = open(path, O_RDONLY | O_CLOEXEC);    // of another user
    if (fd < 0) return false;
    struct flock whole = out_whole_file();
    bool held = fcntl(fd, F_GETLK, &whole) == 0 && whole.l_type != F_UNLCK;
    close(fd);
    return held;
}

// The open file, locked by this process; -1: another one has it; -2: no locks here, errno says why.
static inline int out_try_lock(const char* path) {
    struct flock whole = out_whole_file();
    struct stat opened, named;
    for (;;) {
        int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
        REQUIRE(fd >= 0, "%s: cannot be created: %s", path, strerror(errno));
        if (fcntl(fd, F_SETLK, &whole) != 0) {
            int error = errno;
            close(fd);
            errno = error;
            return error == EACCES || error == EAGAIN ? -1 : -2;
        }
        // One that ended in between has removed the file: the lock would be of nothing.
        if (fstat(fd, &opened) == 0 && stat(path, &named) == 0 && opened.st_ino == named.st_ino &&
            opened.st_dev == named.st_dev) return fd;
        close(fd);
    }
}

// Makes the directory and locks it, or ends the program with the name of who holds it.
static inline void out_claim(OutLock* lock, const char* out) {
    char text[256] = "";
    memset(lock, 0, sizeof *lock);
    make_directory(out);
    snprintf(lock->path, sizeof lock->path, "%s/lock", out);
    lock->fd = out_try_lock(lock->path);
    for (double waited = 0; lock->fd == -1 && waited < out_patience; waited += 0.1) {
        usleep(100000);
        lock->fd = out_try_lock(lock->path);
    }
    if (lock->fd == -1) {
        FILE* file = fopen(lock->path, "re");
        if (file && fgets(text, sizeof text, file)) text[strcspn(text, "\n")] = 0;
        die("--out %s: another run is writing there%s%s\ngive another --out, or wait for its end",
            out, *text ? ": " : "", text);
    }
    if (lock->fd == -2) {
        fprintf(stderr, "%s: %s: no locks here (%s): take care that no other run writes there\n",
                program_name, lock->path, strerror(errno));
        return;
    }
    lock->held = true;
    char host[256] = "unknown", date[32];
    time_t now = time(NULL);
    struct tm utc;
    gethostname(host, sizeof host - 1);
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    // It helps who is refused; the lock is a lock without it.
    if (ftruncate(lock->fd, 0) == 0)
        dprintf(lock->fd, "pid %d on host %s since %s\n", (int)getpid(), host, date);
}

static inline void out_release(OutLock* lock) {
    if (!lock->held) return;
    unlink(lock->path);    // first: from here on it is not the file that others lock
    close(lock->fd);
    lock->held = false;
}

// ---- what it holds -------------------------------------------------------------------------

typedef struct OutContents {
    int64_t steps;              // the last in log.txt
    int checkpoints;            // that have their final name
    int64_t checkpoint;         // step of the newest; -1: none
    bool weights;
} OutContents;

// The number behind a prefix that is all that a name has; -1: it is no such name.
static inline int64_t out_number(const char* name, const char* prefix) {
    size_t n = strlen(prefix);
    const char* digits = name + n;
    if (strncmp(name, prefix, n) != 0 || !*digits || strspn(digits, "0123456789") > 15) return -1;
    return digits[strspn(digits, "0123456789")] ? -1 : strtoll(digits, NULL, 10);
}

static inline OutContents out_contents(const char* out) {
    OutContents found = { 0, 0, -1, false };
    char path[OUT_PATH], *line = NULL;
    size_t room = 0;
    int64_t step, steps;
    snprintf(path, sizeof path, "%s/model.safetensors", out);
    found.weights = access(path, F_OK) == 0;
    snprintf(path, sizeof path, "%s/log.txt", out);
    FILE* log = fopen(path, "re");
    while (log && getline(&line, &room, log) > 0)
        if (sscanf(line, "step:%" SCNd64 "/%" SCNd64, &step, &steps) == 2) found.steps = step;
    if (log) fclose(log);
    free(line);
    snprintf(path, sizeof path, "%s/checkpoints", out);
    DIR* folder = opendir(path);
    for (struct dirent* e; folder && (e = readdir(folder));) {
        step = out_number(e->d_name, "step_");
        found.checkpoints += step >= 0;
        if (step > found.checkpoint) found.checkpoint = step;
    }
    if (folder) closedir(folder);
    return found;
}

// Whether a checkpoint is one of this directory's own: only then does its run go on here.
static inline bool out_owns(const char* out, const char* checkpoint) {
    char path[OUT_PATH + 16];
    struct stat parent, own;
    snprintf(path, sizeof path, "%s/..", checkpoint);
    bool ok = stat(path, &parent) == 0;
    snprintf(path, sizeof path, "%s/checkpoints", out);
    return ok && stat(path, &own) == 0 && own.st_ino == parent.st_ino &&
           own.st_dev == parent.st_dev;
}

// For a run that is not one of this directory's going on: if another one is in it the program ends.
// Steps of which no checkpoint was left are all that --resume auto makes anew; their log is kept
// (llmc/log.h).
static inline void out_require_fresh(const char* out, bool resume_auto) {
    OutContents found = out_contents(out);
    char steps[64] = "", checkpoints[64] = "";
    if (!found.checkpoints && !found.weights && (found.steps <= 0 || resume_auto)) return;
    const char* advice = found.checkpoints && resume_auto
        ? "none of its checkpoints is valid; give another --out, or move away what is there"
        : found.checkpoints ? "--resume auto continues it; or give another --out"
        : found.weights ? "give another --out"
        : "--resume auto begins it again; or give another --out";
    if (found.steps > 0)
        snprintf(steps, sizeof steps, ", %" PRId64 " steps in its log", found.steps);
    if (found.checkpoints)
        snprintf(checkpoints, sizeof checkpoints, ", %d checkpoint%s", found.checkpoints,
                 found.checkpoints == 1 ? "" : "s");
    die("--out %s holds a run%s%s%s\n%s", out, steps, checkpoints,
        found.weights ? ", model.safetensors" : "", advice);
}

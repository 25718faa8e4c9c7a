/*
A disk that fails on purpose: stands before the C library's calls on files, counts those on paths
that contain a given text, and makes the k-th fail. In a program that includes it (test_checkpoint)
through fault_plan; in any other by the environment:

    LD_PRELOAD=faulty_files.so FAULT_UNDER=run/checkpoints FAULT_AT=12 FAULT_ERROR=ENOSPC PROGRAM

    FAULT_UNDER   text that a path must contain for its calls to count; without it none does
    FAULT_CALLS   kinds that count, e.g. write,fsync (all): see FAULT_CALL_LIST
    FAULT_AT      the first call that fails, from 1; 0 (the default): none
    FAULT_TIMES   how many fail from there on (1); 0: all
    FAULT_ERROR   ENOSPC EIO EDQUOT EROFS EINTR ENOENT EACCES (EIO); short: a write or read of half
                  its bytes; zero: one of none; full: from there on all that takes room says ENOSPC,
                  after a write of half its bytes; kill: SIGKILL in place of the call
    FAULT_DELAY   microseconds that each call that counts takes longer
    FAULT_RANK    only in this rank of Open MPI's mpirun
    FAULT_TRACE   a file that gets a line for each call that counts: number, kind, path

A call that fails is not made, but for close, which closes and fails, as Linux does. What the C
library calls by itself (fopen, fwrite) goes past this: code that is to be tested uses none of it.
*/
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

// ---- the plan ------------------------------------------------------------------------------

#define FAULT_CALL_LIST(F) \
    F(OPEN, "open") F(WRITE, "write") F(READ, "read") F(FSYNC, "fsync") F(CLOSE, "close") \
    F(RENAME, "rename") F(MKDIR, "mkdir") F(UNLINK, "unlink") F(RMDIR, "rmdir") \
    F(OPENDIR, "opendir") F(READDIR, "readdir") F(TRUNCATE, "truncate") F(STAT, "stat")
#define FAULT_CONSTANT(constant, name) FAULT_##constant,
#define FAULT_TEXT(constant, name)     name,
typedef enum FaultCall { FAULT_CALL_LIST(FAULT_CONSTANT) FAULT_CALLS } FaultCall;
static const char* const FAULT_CALL_NAME[] = { FAULT_CALL_LIST(FAULT_TEXT) };

enum { FAULT_ALL = (1 << FAULT_CALLS) - 1, FAULT_FILES = 4096 };
// Beside the errors of errno.h.
enum { FAULT_SHORT = -1, FAULT_ZERO = -2, FAULT_FULL = -3, FAULT_KILL = -4 };

typedef struct FaultPlan {
    const char* under;          // NULL: off
    int kinds;                  // bit 1 << FaultCall
    long at, times;
    int error;
    long delay;
    bool no_sync;               // fsync counts, and costs nothing
} FaultPlan;

static FaultPlan fault_plan;    // changed while no other thread is at work
static long fault_calls;        // that counted
static long fault_hits;         // of them, those that failed
static FaultCall fault_hit;     // the first of those, and where
static char fault_hit_path[512];
static FaultCall* fault_kinds;  // of the first fault_kinds_room calls that count, if not NULL
static long fault_kinds_room;
static int fault_trace = -1;
static char fault_open[FAULT_FILES];      // descriptors on paths that count

static inline void fault_start(FaultPlan plan) {
    fault_plan = plan;
    fault_hit_path[0] = 0;
    __atomic_store_n(&fault_calls, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&fault_hits, 0, __ATOMIC_SEQ_CST);
}

static inline void fault_stop(void) {
    memset(&fault_plan, 0, sizeof fault_plan);
}

static inline const char* fault_error_text(int error) {
    static const char* const WORDS[] = { "short", "zero", "full", "kill" };
    return error < 0 ? WORDS[-error - 1] : strerror(error);
}

#define FAULT_REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// What is to become of a call that counts: 0: it is made; else an error, and errno is that.
static inline int fault_decide(FaultCall call, const char* path) {
    const FaultPlan* plan = &fault_plan;
    if (!plan->under || !(plan->kinds >> call & 1)) return 0;
    long number = __atomic_add_fetch(&fault_calls, 1, __ATOMIC_SEQ_CST);
    if (fault_kinds && number <= fault_kinds_room) fault_kinds[number - 1] = call;
    if (fault_trace >= 0) {
        char line[700];
        int n = snprintf(line, sizeof line, "%ld %s %s\n", number, FAULT_CALL_NAME[call], path);
        ssize_t written = FAULT_REAL(write)(fault_trace, line, (size_t)n);
        (void)written;
    }
    if (plan->delay) {
        struct timespec t = { plan->delay / 1000000, plan->delay % 1000000 * 1000 };
        nanosleep(&t, NULL);
    }
    if (plan->at == 0 || number < plan->at) return 0;
    bool later = number > plan->at;
    if (plan->error != FAULT_FULL && plan->times && number >= plan->at + plan->times) return 0;
    int error = plan->error;
    if (error == FAULT_KILL) raise(SIGKILL);
    bool moves = call == FAULT_WRITE || call == FAULT_READ;
    if (error == FAULT_FULL) {
        // Only what takes room fails on a full disk.
        bool takes = moves || call == FAULT_OPEN || call == FAULT_MKDIR;
        if (!takes) return 0;
        error = later || !moves ? ENOSPC : FAULT_SHORT;
    }
    if (error < 0 && !moves) return 0;
    if (__atomic_fetch_add(&fault_hits, 1, __ATOMIC_SEQ_CST) == 0) {
        fault_hit = call;
        snprintf(fault_hit_path, sizeof fault_hit_path, "%s", path);
    }
    if (error > 0) errno = error;
    return error;
}

static inline bool fault_is_open(int fd) {
    return fd >= 0 && fd < FAULT_FILES && __atomic_load_n(&fault_open[fd], __ATOMIC_SEQ_CST);
}

static inline void fault_set_open(int fd, bool counts) {
    if (fd >= 0 && fd < FAULT_FILES) __atomic_store_n(&fault_open[fd], counts, __ATOMIC_SEQ_CST);
}

// Whether a path counts. One that starts at an open directory counts if that does.
static inline bool fault_counts(int directory, const char* path) {
    if (!fault_plan.under) return false;
    return (path[0] != '/' && fault_is_open(directory)) || strstr(path, fault_plan.under);
}

static inline int fault_at_path(FaultCall call, int directory, const char* path) {
    return fault_counts(directory, path) ? fault_decide(call, path) : 0;
}

static inline int fault_at_file(FaultCall call, int fd) {
    char link[40], path[512];
    if (!fault_plan.under || !fault_is_open(fd)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n > 0 ? n : 0] = 0;
    return fault_decide(call, path);
}

// ---- the calls -----------------------------------------------------------------------------

// __THROW stands where the system's header has it: C++ wants the same.
extern "C" {

#define FAULT_DEFINE_OPEN(open, openat) \
    int open(const char* path, int flags, ...) { \
        va_list args; \
        va_start(args, flags); \
        int mode = flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY)) ? va_arg(args, int) : 0; \
        va_end(args); \
        if (fault_at_path(FAULT_OPEN, AT_FDCWD, path)) return -1; \
        int fd = FAULT_REAL(open)(path, flags, mode); \
        fault_set_open(fd, fault_counts(AT_FDCWD, path)); \
        return fd; \
    } \
    int openat(int directory, const char* path, int flags, ...) { \
        va_list args; \
        va_start(args, flags); \
        int mode = flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY)) ? va_arg(args, int) : 0; \
        va_end(args); \
        if (fault_at_path(FAULT_OPEN, directory, path)) return -1; \
        int fd = FAULT_REAL(openat)(directory, path, flags, mode); \
        fault_set_open(fd, fault_counts(directory, path)); \
        return fd; \
    }
FAULT_DEFINE_OPEN(open, openat)
FAULT_DEFINE_OPEN(open64, openat64)

// n bytes, or as few as the fault leaves of them; true: the call is to return `result`.
static inline bool fault_move(FaultCall call, int fd, size_t* n, ssize_t* result) {
    int error = fault_at_file(call, fd);
    if (error == FAULT_SHORT && *n > 1) *n /= 2;
    *result = error == FAULT_ZERO ? 0 : -1;
    return error > 0 || error == FAULT_ZERO;
}

ssize_t write(int fd, const void* data, size_t n) {
    ssize_t result;
    return fault_move(FAULT_WRITE, fd, &n, &result) ? result : FAULT_REAL(write)(fd, data, n);
}

ssize_t read(int fd, void* data, size_t n) {
    ssize_t result;
    return fault_move(FAULT_READ, fd, &n, &result) ? result : FAULT_REAL(read)(fd, data, n);
}

#define FAULT_DEFINE_MOVE(pread, pwrite, off_t) \
    ssize_t pread(int fd, void* data, size_t n, off_t at) { \
        ssize_t result; \
        if (fault_move(FAULT_READ, fd, &n, &result)) return result; \
        return FAULT_REAL(pread)(fd, data, n, at); \
    } \
    ssize_t pwrite(int fd, const void* data, size_t n, off_t at) { \
        ssize_t result; \
        if (fault_move(FAULT_WRITE, fd, &n, &result)) return result; \
        return FAULT_REAL(pwrite)(fd, data, n, at); \
    }
FAULT_DEFINE_MOVE(pread, pwrite, off_t)
FAULT_DEFINE_MOVE(pread64, pwrite64, off64_t)

#define FAULT_DEFINE_SYNC(fsync) \
    int fsync(int fd) { \
        if (fault_at_file(FAULT_FSYNC, fd)) return -1; \
        return fault_plan.no_sync && fault_is_open(fd) ? 0 : FAULT_REAL(fsync)(fd); \
    }
FAULT_DEFINE_SYNC(fsync)
FAULT_DEFINE_SYNC(fdatasync)

int close(int fd) {
    int error = fault_at_file(FAULT_CLOSE, fd);
    fault_set_open(fd, false);
    int status = FAULT_REAL(close)(fd);
    if (error) errno = error;
    return error ? -1 : status;
}

int rename(const char* from, const char* to) __THROW {
    bool counts = fault_counts(AT_FDCWD, from) || fault_counts(AT_FDCWD, to);
    return counts && fault_decide(FAULT_RENAME, from) ? -1 : FAULT_REAL(rename)(from, to);
}

int renameat(int from_directory, const char* from, int to_directory, const char* to) __THROW {
    bool counts = fault_counts(from_directory, from) || fault_counts(to_directory, to);
    if (counts && fault_decide(FAULT_RENAME, from)) return -1;
    return FAULT_REAL(renameat)(from_directory, from, to_directory, to);
}

int mkdir(const char* path, mode_t mode) __THROW {
    return fault_at_path(FAULT_MKDIR, AT_FDCWD, path) ? -1 : FAULT_REAL(mkdir)(path, mode);
}

int mkdirat(int directory, const char* path, mode_t mode) __THROW {
    if (fault_at_path(FAULT_MKDIR, directory, path)) return -1;
    return FAULT_REAL(mkdirat)(directory, path, mode);
}

int unlink(const char* path) __THROW {
    return fault_at_path(FAULT_UNLINK, AT_FDCWD, path) ? -1 : FAULT_REAL(unlink)(path);
}

int unlinkat(int directory, const char* path, int flags) __THROW {
    FaultCall call = flags & AT_REMOVEDIR ? FAULT_RMDIR : FAULT_UNLINK;
    return fault_at_path(call, directory, path) ? -1 : FAULT_REAL(unlinkat)(directory, path, flags);
}

int rmdir(const char* path) __THROW {
    return fault_at_path(FAULT_RMDIR, AT_FDCWD, path) ? -1 : FAULT_REAL(rmdir)(path);
}

#define FAULT_DEFINE_TRUNCATE(ftruncate, off_t) \
    int ftruncate(int fd, off_t n) __THROW { \
        return fault_at_file(FAULT_TRUNCATE, fd) ? -1 : FAULT_REAL(ftruncate)(fd, n); \
    }
FAULT_DEFINE_TRUNCATE(ftruncate, off_t)
FAULT_DEFINE_TRUNCATE(ftruncate64, off64_t)

int stat(const char* path, struct stat* info) __THROW {
    return fault_at_path(FAULT_STAT, AT_FDCWD, path) ? -1 : FAULT_REAL(stat)(path, info);
}

int lstat(const char* path, struct stat* info) __THROW {
    return fault_at_path(FAULT_STAT, AT_FDCWD, path) ? -1 : FAULT_REAL(lstat)(path, info);
}

int fstat(int fd, struct stat* info) __THROW {
    return fault_at_file(FAULT_STAT, fd) ? -1 : FAULT_REAL(fstat)(fd, info);
}

int fstatat(int directory, const char* path, struct stat* info, int flags) __THROW {
    if (fault_at_path(FAULT_STAT, directory, path)) return -1;
    return FAULT_REAL(fstatat)(directory, path, info, flags);
}

DIR* opendir(const char* path) {
    if (fault_at_path(FAULT_OPENDIR, AT_FDCWD, path)) return NULL;
    DIR* directory = FAULT_REAL(opendir)(path);
    if (directory) fault_set_open(dirfd(directory), fault_counts(AT_FDCWD, path));
    return directory;
}

struct dirent* readdir(DIR* directory) {
    return fault_at_file(FAULT_READDIR, dirfd(directory)) ? NULL : FAULT_REAL(readdir)(directory);
}

int closedir(DIR* directory) {
    fault_set_open(dirfd(directory), false);
    return FAULT_REAL(closedir)(directory);
}

}    // extern "C"

// ---- the environment -----------------------------------------------------------------------

static inline long fault_variable(const char* name, long otherwise) {
    const char* text = getenv(name);
    return text ? strtol(text, NULL, 10) : otherwise;
}

static void fault_read_environment(void) __attribute__((constructor));

static void fault_read_environment(void) {
    static const struct { const char* name; int error; } ERRORS[] = {
        { "ENOSPC", ENOSPC }, { "EIO", EIO }, { "EDQUOT", EDQUOT }, { "EROFS", EROFS },
        { "EINTR", EINTR }, { "ENOENT", ENOENT }, { "EACCES", EACCES }, { "short", FAULT_SHORT },
        { "zero", FAULT_ZERO }, { "full", FAULT_FULL }, { "kill", FAULT_KILL },
    };
    const char *under = getenv("FAULT_UNDER"), *calls = getenv("FAULT_CALLS");
    const char *error = getenv("FAULT_ERROR"), *rank = getenv("FAULT_RANK");
    const char *trace = getenv("FAULT_TRACE"), *own = getenv("OMPI_COMM_WORLD_RANK");
    if (!under || (rank && (!own || strcmp(rank, own) != 0))) return;
    FaultPlan plan = { under, calls ? 0 : FAULT_ALL, fault_variable("FAULT_AT", 0),
                       fault_variable("FAULT_TIMES", 1), EIO, fault_variable("FAULT_DELAY", 0),
                       false };
    for (int i = 0; calls && i < FAULT_CALLS; i++) {
        char list[256], name[32];
        snprintf(list, sizeof list, ",%s,", calls);
        snprintf(name, sizeof name, ",%s,", FAULT_CALL_NAME[i]);
        if (strstr(list, name)) plan.kinds |= 1 << i;
    }
    bool known = !error;
    for (size_t i = 0; error && i < sizeof ERRORS / sizeof *ERRORS; i++) {
        if (strcmp(error, ERRORS[i].name) != 0) continue;
        plan.error = ERRORS[i].error;
        known = true;
    }
    if (!known || plan.kinds == 0) {
        fprintf(stderr, "faulty_files: FAULT_ERROR or FAULT_CALLS is not one that exists\n");
        _exit(1);
    }
    if (trace) {
        fault_trace = FAULT_REAL(open)(trace, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    }
    fault_start(plan);
}

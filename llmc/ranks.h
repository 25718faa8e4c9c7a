/*
The ranks of one run: small messages between them, and one end for all.

A process that is alone (llmc/launch.h) has world 1: no MPI_Init, no socket, no thread; all calls
below return at once.

Messages (ids, settings to compare) go between rank 0 and each other rank, on a connection that the
main thread reads and writes. A second connection tells of death. Each process has one thread that
watches it; if it ends before ranks_stop, the other side is gone. Then, or when a rank dies with a
message, all ranks end with status 1 and one of them prints one message: rank 0, or if rank 0 is
gone, on each host the first to claim an address in the kernel (ranks_claim). It also stands in its
log. A host that loses power or network is noticed within 30 s. The thread calls no MPI and gets no
signal; the launcher's SIGTERM after the death of a rank does not keep it from speaking.

Costs: nothing between messages but a wake-up of the thread every 100 ms.

Without WITH_NCCL (make NCCL=0) more than one rank is an error.

test        test/test_ranks.c
*/
#pragma once
#include "launch.h"

#include <pthread.h>
#include <signal.h>
#include <sys/un.h>

enum { RANKS_MESSAGE = 8192 };

typedef struct Ranks {
    int rank, world;
    int local_rank, local_world;    // among the ranks of this host
    char host[256];

    Launch launch;
    LaunchLine* lines;          // (world) on rank 0 of the others; elsewhere only lines[0] is used
    uint32_t calls;             // of the functions that all ranks call together

    pthread_t thread;
    bool threaded;              // the thread runs
    pthread_mutex_t lock;       // of the next three
    char* failure;              // the message this rank dies with
    bool stopping;              // connections may end
    char directory[2048];       // of the logs; "": none yet
    pthread_mutex_t asking;     // of poll, and held while it runs
    bool (*poll)(char* what, size_t size);
} Ranks;

// ---- the end of all ranks ------------------------------------------------------------------

static Ranks* ranks_of_die;    // whom die() speaks for

// "program: rank 3: text".
static inline void ranks_message(char* message, const Ranks* r, const char* text) {
    char prefix[64];
    if (r->launch.world < 2) snprintf(prefix, sizeof prefix, "%.40s", program_name);
    else snprintf(prefix, sizeof prefix, "%.40s: rank %d", program_name, r->launch.rank);
    message_text(message, RANKS_MESSAGE, prefix, text);
}

// The file that rank `rank` keeps its log in. False: there is none yet.
static inline bool ranks_log(Ranks* r, char* path, size_t size, int rank) {
    char suffix[32] = "";
    if (rank) snprintf(suffix, sizeof suffix, ".rank%d", rank);
    pthread_mutex_lock(&r->lock);
    bool known = r->directory[0] != 0;
    snprintf(path, size, "%s/log%s.txt", r->directory, suffix);
    pthread_mutex_unlock(&r->lock);
    return known;
}

static inline void ranks_append_log(Ranks* r, const char* message) {
    char path[sizeof r->directory + 64];
    FILE* file = ranks_log(r, path, sizeof path, r->rank) ? fopen(path, "ae") : NULL;
    if (!file) return;    // the message goes to the console in any case
    fputs(message, file);
    fclose(file);
}

// An address stands for "there has been a message": a name in the kernel's table of Unix sockets,
// so it needs no file, works when no connection is left, and ends with its process. take: true for
// the first process of this job on this host that asks; the others are to be silent. Not take: true
// while a process has it.
static inline bool ranks_claim(const Ranks* r, bool take) {
    struct sockaddr_un a = {};
    a.sun_family = AF_UNIX;
    int n = snprintf(a.sun_path + 1, sizeof a.sun_path - 1, "ranks-%d-%016" PRIx64, (int)getuid(),
                     r->launch.job);
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (take) return bind(fd, (struct sockaddr*)&a, size) == 0 || errno != EADDRINUSE;
    bool taken = connect(fd, (struct sockaddr*)&a, size) == 0;
    close(fd);
    return taken;
}

// Rank 0 tells the others to end, by a byte, and waits until they have: a connection closed with
// bytes still to be read would be reset, and the news lost.
static inline void ranks_end_others(const Ranks* r) {
    double deadline = clock_now() + 1;
    char rest;
    for (int p = 1; p < r->world; p++) {
        int fd = __atomic_load_n(&r->lines[p].fd[LINE_WATCH], __ATOMIC_ACQUIRE);
        if (fd < 0) continue;
        net_write(fd, "", 1, deadline);
        shutdown(fd, SHUT_WR);
    }
    for (int p = 1; p < r->world; p++) {
        int fd = r->lines[p].fd[LINE_WATCH];
        while (fd >= 0 && net_read(fd, &rest, 1, deadline)) {}
    }
}

// Ends this process, and on rank 0 the others. The message goes to the console, if nobody else on
// this host has spoken.
static inline __attribute__((noreturn)) void ranks_end(const Ranks* r, const char* message) {
    bool speaks = ranks_claim(r, true);
    if (speaks && ftrylockfile(stdout) == 0) {    // another thread may be stuck in it
        fflush(stdout);
        funlockfile(stdout);
    }
    // In one piece, so that nothing comes between. Nobody is left to hear that it fails.
    if (speaks && write(STDERR_FILENO, message, strlen(message)) < 0) {}
    if (r->rank == 0 && r->lines) ranks_end_others(r);
    // The claim is held until those that nobody can tell, and who find out at the same time or are
    // still on their way to rank 0, have seen it.
    if (speaks) net_sleep(1);
    _exit(1);
}

// Leaves the end to the thread.
static inline __attribute__((noreturn)) void ranks_fail(Ranks* r, const char* message) {
    if (r->threaded && !pthread_equal(pthread_self(), r->thread)) {
        pthread_mutex_lock(&r->lock);
        if (!r->failure) r->failure = strdup(message);
        pthread_mutex_unlock(&r->lock);
        net_sleep(10);
    }
    ranks_end(r, message);    // there is no thread, or it is stuck
}

static void ranks_on_die(const char* text) {
    char message[RANKS_MESSAGE];
    ranks_message(message, ranks_of_die, text);
    ranks_fail(ranks_of_die, message);
}

// ---- the thread ----------------------------------------------------------------------------

// What it knows, and nobody else.
typedef struct RankWatch {
    struct pollfd* fds;         // (world)
    char cause[RANKS_MESSAGE];  // of the end that is due
    double due;                 // 0: none
    bool told;                  // rank 0 has the cause
} RankWatch;

static int ranks_terminated;    // a SIGTERM came that the program does not handle

static void ranks_on_sigterm(int signal_number) {
    (void)signal_number;
    __atomic_store_n(&ranks_terminated, 1, __ATOMIC_RELAXED);
}

// A reason to end in `delay` seconds, if no other is earlier.
static inline void ranks_blame(RankWatch* w, const char* message, double delay) {
    double due = clock_now() + delay;
    if (w->told || (w->due > 0 && w->due <= due)) return;
    w->due = due;
    snprintf(w->cause, sizeof w->cause, "%s", message);
}

static inline __attribute__((noreturn)) void ranks_gone(Ranks* r, int rank, int error) {
    const LaunchPlace* place = &r->lines[rank].place;
    char text[4096], message[RANKS_MESSAGE], path[sizeof r->directory + 64];
    bool known = ranks_log(r, path, sizeof path, rank);
    bool left = error == 0 || error == ECONNRESET || error == EPIPE;
    snprintf(text, sizeof text, "rank %d of %d (host %s, pid %d) is gone: %s\n%s%s; after a kill "
             "for want of memory `dmesg` on %s shows it\nall ranks have been ended", rank, r->world,
             place->host, place->pid, left ? "it was killed, crashed or left without a word"
                                           : "its host or its network failed",
             known ? "its log is " : "it had no log yet", known ? path : "", place->host);
    message_text(message, sizeof message, program_name, text);
    ranks_append_log(r, message);
    ranks_end(r, message);
}

// There is something to read from rank p: rank 0's word to end, a rank's last message, or the end.
static inline void ranks_hear(Ranks* r, RankWatch* w, int p) {
    char message[RANKS_MESSAGE];
    if (net_read(w->fds[p].fd, message, r->rank ? 1 : sizeof message, clock_now() + 1)) {
        if (r->rank) _exit(1);    // what there is to say has been said
        message[sizeof message - 1] = 0;
        // A rank may fail only because another has been killed, whose end is then about to be seen,
        // and is what the user has to know.
        ranks_blame(w, message, 0.3);
        return;
    }
    int error = errno;
    pthread_mutex_lock(&r->lock);
    bool stopping = r->stopping;
    pthread_mutex_unlock(&r->lock);
    r->lines[p].closed = true;
    if (!stopping) ranks_gone(r, p, error);
}

// What may make this rank fail. A SIGTERM or an error of NCCL is as a rule the consequence of the
// end of another rank, which then shows within the time given here.
static inline void ranks_look(Ranks* r, RankWatch* w) {
    char message[RANKS_MESSAGE], text[1024];
    pthread_mutex_lock(&r->lock);
    if (r->failure) ranks_blame(w, r->failure, r->rank ? 0 : 0.3);
    pthread_mutex_unlock(&r->lock);
    if (__atomic_load_n(&ranks_terminated, __ATOMIC_RELAXED)) {
        ranks_message(message, r, "ended by SIGTERM");
        ranks_blame(w, message, 0.5);
    }
    pthread_mutex_lock(&r->asking);
    if (r->poll && !w->due && r->poll(text, sizeof text)) {
        ranks_message(message, r, text);
        ranks_blame(w, message, 1);
    }
    pthread_mutex_unlock(&r->asking);
}

// Ends the process if it is time. Ranks that can leave the message to rank 0.
static inline void ranks_judge(Ranks* r, RankWatch* w) {
    if (!w->due || clock_now() < w->due) return;
    if (!w->told) ranks_append_log(r, w->cause);
    int fd = __atomic_load_n(&r->lines[0].fd[LINE_WATCH], __ATOMIC_ACQUIRE);
    if (fd < 0 || w->told) ranks_end(r, w->cause);
    w->told = true;
    w->due = clock_now() + 2;    // by then rank 0 has answered, or never will
    net_write(fd, w->cause, sizeof w->cause, clock_now() + 1);
}

static void* ranks_thread(void* context) {
    Ranks* r = (Ranks*)context;
    static RankWatch w;
    w.fds = (struct pollfd*)host_alloc((size_t)r->world, sizeof(struct pollfd));
    for (bool open = true; open;) {
        for (int p = 0; p < r->world; p++) {    // more of them while the ranks come together
            int fd = __atomic_load_n(&r->lines[p].fd[LINE_WATCH], __ATOMIC_ACQUIRE);
            w.fds[p].fd = r->lines[p].closed ? -1 : fd;
            w.fds[p].events = POLLIN;
        }
        int n = poll(w.fds, (nfds_t)r->world, w.due > 0 ? 10 : 100);
        for (int p = 0; p < r->world && n > 0; p++)
            if (w.fds[p].fd >= 0 && w.fds[p].revents) ranks_hear(r, &w, p);
        // One that is on its way to rank 0 cannot be told.
        if (r->rank && w.fds[0].fd < 0 && ranks_claim(r, false)) _exit(1);
        ranks_look(r, &w);
        ranks_judge(r, &w);
        pthread_mutex_lock(&r->lock);
        open = !r->stopping;
        pthread_mutex_unlock(&r->lock);
        for (int p = 0; p < r->world; p++) open = open || (w.fds[p].fd >= 0 && !r->lines[p].closed);
    }
    return NULL;
}

static inline void ranks_start_thread(Ranks* r) {
    sigset_t all, before;
    struct sigaction old;
    // Until the program has a handler of its own: the launcher's SIGTERM must not be faster than
    // the message about the rank it is sent for.
    if (sigaction(SIGTERM, NULL, &old) == 0 && old.sa_handler == SIG_DFL)
        on_signal(SIGTERM, ranks_on_sigterm);
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    int error = pthread_create(&r->thread, NULL, ranks_thread, r);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    REQUIRE(error == 0, "no thread to watch the ranks: %s", strerror(error));
    r->threaded = true;
}

// ---- messages ------------------------------------------------------------------------------

typedef enum { RANKS_BROADCAST, RANKS_GATHER, RANKS_STOP } RankCall;

typedef struct RankFrame {      // the head of a message; `bytes` of payload follow
    uint32_t call, count;       // count: the sender's calls so far
    uint64_t bytes;
} RankFrame;

static inline void ranks_send(Ranks* r, int p, RankCall call, const void* data, size_t bytes) {
    RankFrame head = { (uint32_t)call, r->calls, bytes };
    int fd = r->lines[p].fd[LINE_TALK];
    bool sent = net_write(fd, &head, sizeof head, INFINITY) &&
                net_write(fd, data, bytes, INFINITY);
    // A rank that all have heard good-bye from may be gone.
    REQUIRE(sent || (call == RANKS_STOP && r->rank == 0), "the connection to rank %d broke", p);
}

// The next message of rank p, which must be of this call.
static inline void ranks_receive(Ranks* r, int p, RankCall call, void* data, size_t bytes) {
    static const char* const NAMES[] = { "broadcast", "gather", "stop" };
    RankFrame head;
    int fd = r->lines[p].fd[LINE_TALK];
    REQUIRE(net_read(fd, &head, sizeof head, INFINITY), "the connection to rank %d broke", p);
    REQUIRE(head.call == (uint32_t)call && head.count == r->calls,
            "rank %d is at call %u (%s), rank %d at call %u (%s)", p, head.count,
            head.call <= RANKS_STOP ? NAMES[head.call] : "unknown", r->rank, r->calls, NAMES[call]);
    REQUIRE(head.bytes == bytes, "call %u: rank %d sent %zu bytes, rank %d expected %zu", r->calls,
            p, (size_t)head.bytes, r->rank, bytes);
    REQUIRE(net_read(fd, data, bytes, INFINITY), "the connection to rank %d broke", p);
}

// From rank 0 to all. Like the next three: blocks, and all ranks call it.
static inline void ranks_broadcast(Ranks* r, void* data, size_t bytes) {
    if (r->world == 1) return;
    r->calls++;
    if (r->rank > 0) ranks_receive(r, 0, RANKS_BROADCAST, data, bytes);
    for (int p = 1; p < r->world && r->rank == 0; p++)
        ranks_send(r, p, RANKS_BROADCAST, data, bytes);
}

// all (world, bytes) on rank 0, elsewhere NULL.
static inline void ranks_gather(Ranks* r, void* all, const void* mine, size_t bytes) {
    if (r->rank == 0 && bytes) memcpy(all, mine, bytes);
    if (r->world == 1) return;
    r->calls++;
    if (r->rank > 0) ranks_send(r, 0, RANKS_GATHER, mine, bytes);
    for (int p = 1; p < r->world && r->rank == 0; p++)
        ranks_receive(r, p, RANKS_GATHER, (char*)all + (size_t)p * bytes, bytes);
}

static inline void ranks_barrier(Ranks* r) {
    ranks_gather(r, NULL, NULL, 0);
    ranks_broadcast(r, NULL, 0);
}

// What to say of the first line that differs; "": none does.
static inline void ranks_difference(char* text, size_t size, const Ranks* r, const char* mine,
                                    const char* base) {
    text[0] = 0;
    while (*mine || *base) {
        int n = (int)strcspn(mine, "\n"), m = (int)strcspn(base, "\n");
        if (n != m || memcmp(mine, base, (size_t)n) != 0) {
            const char* value = strstr(mine, " = ");
            int name = value ? (int)(value - mine) + 3 : n + 1;    // with the sign
            if (name <= n && strncmp(mine, base, (size_t)name) == 0)
                snprintf(text, size, "rank %d (host %s): %.*s is %.*s, rank 0 has %.*s", r->rank,
                         r->host, name - 3, mine, n - name, mine + name, m - name, base + name);
            else
                snprintf(text, size, "rank %d (host %s) has '%.*s' where rank 0 has '%.*s'",
                         r->rank, r->host, n, mine, m, base);
            return;
        }
        mine += n + (mine[n] == '\n');
        base += m + (base[m] == '\n');
    }
}

// text: lines "name = value", which must be the same on all ranks. If they are not all ranks end,
// with a message that names the first rank that differs, the line and both values.
static inline void ranks_compare(Ranks* r, const char* text) {
    if (r->world == 1) return;
    enum { SIZE = 2048 };
    uint64_t bytes = strlen(text) + 1;
    ranks_broadcast(r, &bytes, sizeof bytes);
    char* base = (char*)host_alloc((size_t)bytes, 1);
    char* all = (char*)host_alloc((size_t)r->world, SIZE);
    char mine[SIZE], message[RANKS_MESSAGE];
    if (r->rank == 0) memcpy(base, text, (size_t)bytes);
    ranks_broadcast(r, base, (size_t)bytes);
    ranks_difference(mine, sizeof mine, r, text, base);
    ranks_gather(r, r->rank ? NULL : all, mine, SIZE);
    for (int p = 1; p < r->world && r->rank == 0; p++) {
        if (!all[p * SIZE]) continue;
        snprintf(mine, sizeof mine, "%.1900s\nall ranks must be started with the same flags, "
                 "binary and data", all + p * SIZE);
        message_text(message, sizeof message, program_name, mine);
        ranks_fail(r, message);
    }
    ranks_broadcast(r, NULL, 0);    // nobody goes on before it is known
    free(base);
    free(all);
}

// ---- start, watch, stop --------------------------------------------------------------------

// r lives as long as the process: the thread and die() look at it.
static inline void ranks_start(Ranks* r, int* argc, char*** argv) {
    (void)argc, (void)argv;
    Launch* l = &r->launch;
    memset(r, 0, sizeof *r);
    r->world = r->local_world = 1;
    launch_init(l);
    memcpy(r->host, l->self.host, sizeof r->host);
    pthread_mutex_init(&r->lock, NULL);
    pthread_mutex_init(&r->asking, NULL);
    ranks_of_die = r;
    die_ranks = ranks_on_die;
    launch_environment(l, true);
#ifdef WITH_NCCL
    if (l->world != 1) {
        launch_check_shm("/dev/shm", l->local_world, LAUNCH_SHM_BYTES);
        launch_start(l, argc, argv);
    }
#else
    REQUIRE(l->world == 1, "%s started more than one rank, but this program was built with NCCL=0\n"
            "build it without NCCL=0, or start one process", l->launcher);
#endif
    if (l->world == 1) die_ranks = NULL;
    if (l->world == 1) return;
#ifdef WITH_NCCL
    r->lines = (LaunchLine*)host_alloc((size_t)l->world, sizeof(LaunchLine));
    for (int p = 0; p < l->world; p++)
        r->lines[p].fd[LINE_TALK] = r->lines[p].fd[LINE_WATCH] = -1;
    r->rank = l->rank;
    r->world = l->world;
    ranks_start_thread(r);    // before the others have come: they may be gone again
    if (r->rank == 0) launch_accept(l, r->lines);
    else launch_connect(l, &r->lines[0]);
    LaunchPlace* places = (LaunchPlace*)host_alloc((size_t)r->world, sizeof(LaunchPlace));
    ranks_gather(r, r->rank ? NULL : places, &l->self, sizeof l->self);
    ranks_broadcast(r, places, (size_t)r->world * sizeof(LaunchPlace));
    r->local_world = 0;
    for (int p = 0; p < r->world; p++) {
        if (strcmp(places[p].host, r->host) != 0 || places[p].machine != l->self.machine) continue;
        if (p == r->rank) r->local_rank = r->local_world;
        r->local_world++;
    }
    free(places);
#endif
}

// From here on messages of the end also go into the log of the run in `directory`, and `poll` (may
// be NULL) is asked by the thread ten times a second: true, with a text, ends all ranks. No call
// of an earlier `poll` is under way when this returns, so after a call with NULL what it looks at
// may be freed.
static inline void ranks_watch(Ranks* r, const char* directory,
                               bool (*poll)(char* what, size_t size)) {
    if (r->world == 1) return;
    pthread_mutex_lock(&r->lock);
    snprintf(r->directory, sizeof r->directory, "%s", directory);
    pthread_mutex_unlock(&r->lock);
    pthread_mutex_lock(&r->asking);
    r->poll = poll;
    pthread_mutex_unlock(&r->asking);
}

// Returns once all ranks have called it; from then on their ends are their own.
static inline void ranks_stop(Ranks* r) {
#ifdef WITH_NCCL
    if (r->world > 1) {
        r->calls++;
        for (int p = 1; p < r->world && r->rank == 0; p++) ranks_receive(r, p, RANKS_STOP, NULL, 0);
        if (r->rank > 0) {
            ranks_send(r, 0, RANKS_STOP, NULL, 0);
            ranks_receive(r, 0, RANKS_STOP, NULL, 0);
        }
        pthread_mutex_lock(&r->lock);
        r->stopping = true;
        pthread_mutex_unlock(&r->lock);
        // Rank 0 last: its thread ends when all the others have hung up.
        for (int p = 1; p < r->world && r->rank == 0; p++) ranks_send(r, p, RANKS_STOP, NULL, 0);
        if (r->rank > 0) shutdown(r->lines[0].fd[LINE_WATCH], SHUT_RDWR);
        pthread_join(r->thread, NULL);
        r->threaded = false;
        die_ranks = NULL;
        for (int p = 0; p < r->world; p++) {
            for (int i = 0; i < 2 && r->lines[p].fd[i] >= 0; i++) close(r->lines[p].fd[i]);
        }
        free(r->lines);
        r->lines = NULL;
    }
    if (r->launch.mpi) MPI_Finalize();
#endif
    r->launch.mpi = false;
    r->world = 1;
}

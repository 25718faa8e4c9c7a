/*
Who am I, how many are we, and who of us is gone: the processes of one run, one per GPU.

A process that nothing started as one of many is alone: world 1, no MPI_Init, no socket, no thread.
Otherwise its number comes, in this order, from

    mpirun      OMPI_COMM_WORLD_SIZE, PMI_SIZE or PMIX_RANK: from MPI itself, after MPI_Init
    variables   RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as torchrun sets them
    srun        SLURM_PROCID, SLURM_STEP_NUM_TASKS; the first host of SLURM_STEP_NODELIST and a port
                made of the job's number, unless MASTER_ADDR and MASTER_PORT say otherwise. A batch
                script and a shell of salloc are no step of ranks: a process started there is alone

The ranks are joined by TCP connections between rank 0 and each of the others (under MPI its address
goes through MPI_Bcast; MPI carries nothing else). Who connects must know the job and bear a rank
that is still missing. What does not come within RANKS_TIMEOUT seconds (120) ends the start with the
numbers of the missing. Small messages go over these connections: ids, settings to compare.

They also tell of death. Each process has one thread that alone reads its connections; a connection
that ends without a good-bye is a rank that is gone. Then, or when a rank dies with a message, all
ranks end with status 1, and one of them prints one message: rank 0, or if it is the one that is
gone, the first of each host to claim an address in the kernel (ranks_claim). It also stands in the
log. A host that loses power or network is noticed within 30 s. The thread calls no MPI and gets no
signal; the launcher's SIGTERM after the death of a rank does not keep it from speaking.

Costs: nothing between messages but a wake-up of the thread every 200 ms.

Without WITH_NCCL (make NCCL=0) more than one rank is an error, and nothing here needs MPI.

test        test/test_ranks.c
*/
#pragma once
#include "common.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifdef WITH_NCCL
#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX      // MPI's old C++ interface would want a library of its own
#endif
#ifndef MPICH_SKIP_MPICXX
#define MPICH_SKIP_MPICXX
#endif
#include <mpi.h>
#endif

// Free bytes of /dev/shm that each rank of a host wants before it starts. NCCL creates a segment
// of 9.2 MiB for every channel between two GPUs that cannot reach each other directly, so three
// channels; Open MPI one of 4 MiB, and is killed by SIGBUS when the room for it is not there.
#ifdef __CUDACC__
#define RANKS_SHM_BYTES ((size_t)32 << 20)
#else
#define RANKS_SHM_BYTES ((size_t)8 << 20)
#endif

enum { RANKS_VERSION = 1, RANKS_HOST_SIZE = 256, RANKS_TEXT_SIZE = 6144 };

// ---- what everything uses ------------------------------------------------------------------

// Where a rank runs. Ranks with equal host and machine share its GPUs.
typedef struct RankPlace {
    char host[RANKS_HOST_SIZE];
    uint64_t machine;           // two machines may have one name ("localhost")
    int32_t pid;
} RankPlace;

typedef struct RankFrame {      // the head of a message; `bytes` of payload follow
    uint32_t kind, count;       // count: the sender's collective calls so far
    uint64_t bytes;
} RankFrame;

typedef enum {
    FRAME_BROADCAST = 1, FRAME_GATHER, FRAME_COMPARE,    // calls that all ranks make together
    FRAME_FAILED,               // to rank 0: the sender dies of this text
    FRAME_END,                  // from rank 0: end in silence, what there is to say has been said
    FRAME_BYE                   // the sender has finished
} FrameKind;

typedef struct RankMessage {
    struct RankMessage* next;
    RankFrame head;
    char* data;
} RankMessage;

// A connection. The thread reads it, and nobody else once the thread is there; who writes holds
// `sending`.
typedef struct RankLine {
    int fd;                     // -1: none
    pthread_mutex_t sending;
    RankFrame head;             // the message that is being read
    char* data;
    size_t got;                 // bytes of both
    bool closed;                // seen by the thread
    bool failed;                // it has sent FRAME_FAILED
    bool bye;                   // it has said good-bye (under Ranks.lock)
    RankMessage *first, *last;  // read and not yet asked for (under Ranks.lock)
} RankLine;

typedef struct Ranks {
    int rank, world;
    int local_rank, local_world;    // among the ranks of this host
    char host[RANKS_HOST_SIZE];

    RankPlace self;
    RankPlace* places;          // (world), complete once all have come (under lock)
    RankLine* lines;            // (world) on rank 0 of the others; elsewhere only lines[0] is used
    uint64_t job;               // tells this run from others
    uint32_t calls;
    bool mpi;                   // MPI_Init was called here

    pthread_t thread;
    bool threaded;              // the thread runs
    int wake[2];                // a pipe that interrupts the thread's waiting
    pthread_mutex_t lock;       // of what follows
    pthread_cond_t arrived;
    char* failure;              // what this rank dies of
    int failure_rank;           // whose it is; -1: nobody's in particular
    bool stopping;
    char directory[2048];       // of the logs; "": none yet
    pthread_mutex_t asking;     // of poll, and held while it runs
    bool (*poll)(char* what, size_t size);
} Ranks;

static inline double ranks_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void ranks_sleep(double seconds) {
    struct timespec t = { (time_t)seconds, (long)((seconds - floor(seconds)) * 1e9) };
    while (nanosleep(&t, &t) != 0 && errno == EINTR) {}
}

// Waits until fd can be read (POLLIN) or written (POLLOUT); false: not before the deadline.
static inline bool ranks_ready(int fd, short events, double deadline) {
    for (;;) {
        double left = deadline - ranks_now();
        struct pollfd p = { fd, events, 0 };
        int n = poll(&p, 1, left > 0 ? (int)(1e3 * (left < 1e6 ? left : 1e6)) + 1 : 0);
        if (n > 0) return true;
        if ((n < 0 && errno != EINTR) || left <= 0) return false;
    }
}

static inline bool ranks_write(int fd, const void* data, size_t bytes, double deadline) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = send(fd, (const char*)data + done, bytes - done, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) done += (size_t)n;
        else if (n < 0 && errno == EAGAIN && !ranks_ready(fd, POLLOUT, deadline)) return false;
        else if (n < 0 && errno != EAGAIN && errno != EINTR) return false;
    }
    return true;
}

// False: the connection is closed, broken or silent; errno tells, 0 for closed.
static inline bool ranks_read(int fd, void* data, size_t bytes, double deadline) {
    for (size_t done = 0; done < bytes;) {
        if (!ranks_ready(fd, POLLIN, deadline)) {
            errno = ETIMEDOUT;
            return false;
        }
        ssize_t n = recv(fd, (char*)data + done, bytes - done, MSG_DONTWAIT);
        if (n > 0) done += (size_t)n;
        else if (n == 0) errno = 0;
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) return false;
    }
    return true;
}

static const double RANKS_FOREVER = 1e18;

// One message on the connection of `peer`. False: it is broken, or could not be had in time.
static inline bool ranks_send(Ranks* r, int peer, FrameKind kind, const void* data, size_t bytes,
                              double deadline) {
    RankLine* line = &r->lines[peer];
    RankFrame head = { (uint32_t)kind, kind <= FRAME_COMPARE ? r->calls : 0, bytes };
    while (pthread_mutex_trylock(&line->sending) != 0) {
        if (ranks_now() > deadline) return false;
        ranks_sleep(0.001);
    }
    bool ok = ranks_write(line->fd, &head, sizeof head, deadline) &&
              ranks_write(line->fd, data, bytes, deadline);
    pthread_mutex_unlock(&line->sending);
    return ok;
}

// ---- the end of all ranks ------------------------------------------------------------------

static Ranks* ranks_of_die;    // whom die() speaks for
static double ranks_claim_seconds = 1;    // see ranks_end_here; tests of one process shorten it

// The file that rank `rank` of a run keeps its log in.
static inline void ranks_log_path(char* path, size_t size, const char* directory, int rank) {
    if (rank) snprintf(path, size, "%s/log.rank%d.txt", directory, rank);
    else snprintf(path, size, "%s/log.txt", directory);
}

static inline void ranks_append_log(Ranks* r, const char* message) {
    char directory[sizeof r->directory], path[sizeof r->directory + 64];
    pthread_mutex_lock(&r->lock);
    memcpy(directory, r->directory, sizeof directory);
    pthread_mutex_unlock(&r->lock);
    if (!directory[0]) return;
    ranks_log_path(path, sizeof path, directory, r->rank);
    FILE* file = fopen(path, "ae");
    if (!file) return;    // the message goes to the console in any case
    fputs(message, file);
    fclose(file);
}

// The address that stands for "there has been a message": a name in the kernel's table of Unix
// sockets, so it needs no file, works when no connection is left, and ends with its process.
static inline socklen_t ranks_claim_address(struct sockaddr_un* a, const Ranks* r) {
    memset(a, 0, sizeof *a);
    a->sun_family = AF_UNIX;
    int n = snprintf(a->sun_path + 1, sizeof a->sun_path - 1, "ranks-%d-%016" PRIx64, (int)getuid(),
                     r->job);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
}

// True for the first process of this job on this host that asks: the others are to be silent.
static inline bool ranks_claim(const Ranks* r) {
    struct sockaddr_un address;
    socklen_t size = ranks_claim_address(&address, r);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return true;
    if (bind(fd, (struct sockaddr*)&address, size) == 0) return listen(fd, 64) == 0;
    bool taken = errno == EADDRINUSE;
    close(fd);
    return !taken;
}

// True while a process of this job on this host ends with a message.
static inline bool ranks_claimed(const Ranks* r) {
    struct sockaddr_un address;
    socklen_t size = ranks_claim_address(&address, r);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return false;
    bool taken = connect(fd, (struct sockaddr*)&address, size) == 0;
    close(fd);
    return taken;
}

// To the console, if nobody else on this host has spoken, and into this rank's log. whose < 0: the
// text is about all ranks.
static inline bool ranks_say(Ranks* r, int whose, const char* text) {
    char prefix[64], message[RANKS_TEXT_SIZE + 2048];
    if (whose < 0) snprintf(prefix, sizeof prefix, "%.40s", program_name);
    else snprintf(prefix, sizeof prefix, "%.40s: rank %d", program_name, whose);
    message_text(message, sizeof message, prefix, text);
    ranks_append_log(r, message);
    if (!ranks_claim(r)) return false;
    if (ftrylockfile(stdout) == 0) {    // another thread may be stuck in it
        fflush(stdout);
        funlockfile(stdout);
    }
    size_t n = strlen(message);
    for (size_t done = 0; done < n;) {    // in one piece, so that nothing comes between
        ssize_t wrote = write(STDERR_FILENO, message + done, n - done);
        if (wrote < 0 && errno != EINTR) break;
        if (wrote > 0) done += (size_t)wrote;
    }
    return true;
}

// Rank 0 tells the others to end and waits until they have: a connection closed with bytes still to
// be read would be reset, and the news lost. For the thread, or before there is one.
static inline void ranks_end_all(Ranks* r) {
    double deadline = ranks_now() + 1.0;
    char rest[4096];
    for (int p = 1; p < r->world; p++) {
        if (r->lines[p].fd < 0) continue;
        ranks_send(r, p, FRAME_END, NULL, 0, ranks_now() + 0.1);
        shutdown(r->lines[p].fd, SHUT_WR);
    }
    for (int p = 1; p < r->world; p++) {
        while (r->lines[p].fd >= 0 && !r->lines[p].closed) {
            if (!ranks_read(r->lines[p].fd, rest, 1, deadline)) break;
        }
    }
}

// For a rank that cannot or need not ask rank 0 who speaks.
static inline void ranks_end_here(Ranks* r, int whose, const char* text) __attribute__((noreturn));

static inline void ranks_end_here(Ranks* r, int whose, const char* text) {
    bool spoke = ranks_say(r, whose, text);
    if (r->rank == 0 && r->lines) ranks_end_all(r);
    // The claim is held until those that nobody can tell, and who find out at the same time or are
    // still on their way to rank 0, have seen it.
    if (spoke && !(r->rank == 0 && r->threaded)) ranks_sleep(ranks_claim_seconds);
    _exit(1);
}

// The thread ends the process; this is how the others wait for it.
static inline void ranks_await_end(Ranks* r) __attribute__((noreturn));

static inline void ranks_await_end(Ranks* r) {
    ranks_sleep(10);
    ranks_end_here(r, r->rank, "a connection broke, and the thread that watches them is stuck");
}

static inline void ranks_wake(Ranks* r) {
    while (write(r->wake[1], "", 1) < 0 && errno == EINTR) {}
}

static inline void ranks_fail(Ranks* r, int whose, const char* text) __attribute__((noreturn));

static inline void ranks_fail(Ranks* r, int whose, const char* text) {
    if (!r->threaded || pthread_equal(pthread_self(), r->thread)) ranks_end_here(r, whose, text);
    pthread_mutex_lock(&r->lock);
    if (!r->failure) {
        r->failure = strdup(text);
        r->failure_rank = whose;
    }
    pthread_mutex_unlock(&r->lock);
    ranks_wake(r);
    ranks_await_end(r);
}

static void ranks_on_die(const char* text) {
    Ranks* r = ranks_of_die;
    ranks_fail(r, r->world > 1 ? r->rank : -1, text);
}

// ---- the environment -----------------------------------------------------------------------

// What the launcher says about this process.
typedef struct RankEnvironment {
    int rank, world;            // world 0: MPI has to be asked
    int local_world;            // ranks on this host, 1 if it is not said
    bool mpi;
    const char* launcher;       // for messages
    char host[RANKS_HOST_SIZE]; // where rank 0 listens; "": not said
    int port;
} RankEnvironment;

// A whole number from the environment; -1: not set.
static inline long long ranks_variable(const char* name, long long highest) {
    const char* text = getenv(name);
    if (!text || !*text) return -1;
    char* end;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    REQUIRE(text[0] >= '0' && text[0] <= '9' && *end == 0 && errno == 0 && v <= highest,
            "the variable %s is '%.100s', expected a number from 0 to %lld\n"
            "set it as the launcher of the ranks does, or unset it to run alone", name, text,
            highest);
    return v;
}

// rank and world from two variables that only make sense together.
static inline void ranks_pair(RankEnvironment* e, const char* rank_name, const char* world_name) {
    long long rank = ranks_variable(rank_name, INT32_MAX);
    long long world = ranks_variable(world_name, 1 << 20);
    REQUIRE(rank >= 0 && world >= 0, "the variable %s is set, but %s is not\nset both, or unset "
            "both to run alone", rank >= 0 ? rank_name : world_name,
            rank >= 0 ? world_name : rank_name);
    REQUIRE(rank < world, "the variables say %s=%lld and %s=%lld: ranks count from 0 to %lld",
            rank_name, rank, world_name, world, world - 1);
    e->rank = (int)rank;
    e->world = (int)world;
}

// The first host of a Slurm list: "node[01-04,07],b2" is node01. False: it is no such list.
static inline bool ranks_first_host(char* host, size_t size, const char* list) {
    size_t n = 0;
    for (const char* c = list; *c && *c != ',';) {
        if (*c == '[') {
            size_t inside = strcspn(c + 1, "-,]"), all = strcspn(c + 1, "]");
            if (inside == 0 || c[1 + all] != ']' || n + inside >= size) return false;
            memcpy(host + n, c + 1, inside);
            n += inside;
            c += all + 2;
        } else {
            if (n + 1 >= size) return false;
            host[n++] = *c++;
        }
    }
    host[n] = 0;
    return n > 0;
}

// SLURM_STEP_ID counts a job's steps; batch scripts and interactive shells have none, or one of the
// numbers from 0xfffffff0 on.
static inline bool ranks_in_slurm_step(void) {
    const char* step = getenv("SLURM_STEP_ID");
    return getenv("SLURM_PROCID") && step && *step >= '0' && *step <= '9' &&
           strtoull(step, NULL, 10) < 0xfffffff0ull;
}

static inline void ranks_master(RankEnvironment* e) {
    const char* host = getenv("MASTER_ADDR");
    long long port = ranks_variable("MASTER_PORT", 65535);
    if (host && *host) snprintf(e->host, sizeof e->host, "%s", host);
    if (port > 0) e->port = (int)port;
    // torchrun's own server has the port; the next one is as good as any.
    if (port > 0 && port < 65535 && getenv("TORCHELASTIC_RUN_ID")) e->port++;
}

static inline void ranks_slurm(RankEnvironment* e) {
    const char* list = getenv("SLURM_STEP_NODELIST");
    ranks_pair(e, "SLURM_PROCID",
               getenv("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS");
    e->launcher = "srun";
    if (e->world == 1) return;
    long long job = ranks_variable("SLURM_JOB_ID", INT64_MAX);
    long long step = ranks_variable("SLURM_STEP_ID", INT64_MAX);
    if (list) {
        REQUIRE(ranks_first_host(e->host, sizeof e->host, list),
                "SLURM_STEP_NODELIST is '%.200s', which names no host\nset MASTER_ADDR to the host "
                "of rank 0", list);
    }
    // Below the ports that Linux gives to outgoing connections.
    if (job >= 0) e->port = 20000 + (int)((job % 10000 * 7 + step % 10000) % 10000);
    const char* local = getenv("SLURM_STEP_TASKS_PER_NODE");    // "8(x2),4"
    e->local_world = local && atoi(local) > 0 ? atoi(local) : 1;
    ranks_master(e);
}

// with_mpi false: as if no mpirun had spoken.
static inline void ranks_environment(RankEnvironment* e, bool with_mpi) {
    memset(e, 0, sizeof *e);
    e->world = e->local_world = 1;
    e->launcher = "nobody";
    bool step = ranks_in_slurm_step();
    if (with_mpi && getenv("OMPI_COMM_WORLD_SIZE")) {
        ranks_pair(e, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE");
        long long local = ranks_variable("OMPI_COMM_WORLD_LOCAL_SIZE", 1 << 20);
        if (local > 0) e->local_world = (int)local;
        e->mpi = true;
        e->launcher = "mpirun";
    } else if (with_mpi && getenv("PMI_SIZE") && !step) {
        // In a step of Slurm these are of its own PMI, which Open MPI may end the process over.
        ranks_pair(e, "PMI_RANK", "PMI_SIZE");
        long long local = ranks_variable("MPI_LOCALNRANKS", 1 << 20);
        if (local > 0) e->local_world = (int)local;
        e->mpi = true;
        e->launcher = "mpirun";
    } else if (with_mpi && getenv("PMIX_RANK")) {
        e->world = 0;
        if (step) ranks_slurm(e);
        e->mpi = true;
        e->launcher = step ? "srun" : "mpirun";
    } else if (getenv("RANK") || getenv("WORLD_SIZE")) {
        ranks_pair(e, "RANK", "WORLD_SIZE");
        long long local = ranks_variable("LOCAL_WORLD_SIZE", 1 << 20);
        if (local > 0) e->local_world = (int)local;
        e->launcher = "RANK and WORLD_SIZE";
        if (e->world > 1) ranks_master(e);
    } else if (step) {
        ranks_slurm(e);
    }
    if (e->world == 1) e->mpi = false;
}

// The same number in all processes that one launcher started together, as far as the environment
// can tell.
static inline uint64_t ranks_job(void) {
    static const char* const NAMES[] = { "MASTER_ADDR",   "MASTER_PORT",    "TORCHELASTIC_RUN_ID",
                                         "SLURM_JOB_ID",  "SLURM_STEP_ID",  "SLURM_RESTART_COUNT",
                                         "PMIX_NAMESPACE" };
    uint64_t job = HASH_START;
    for (size_t i = 0; i < sizeof NAMES / sizeof NAMES[0]; i++) {
        const char* value = getenv(NAMES[i]);
        if (value) job = hash_bytes(job, value, strlen(value) + 1);
    }
    return job;
}

#ifdef WITH_NCCL

static inline void ranks_check_shm(const char* path, int local_world, size_t each) {
    struct statvfs s;
    if (statvfs(path, &s) != 0) return;    // a system without: MPI and NCCL find another way
    size_t free_bytes = (size_t)s.f_bavail * s.f_frsize, wanted = each * (size_t)local_world;
    REQUIRE(free_bytes >= wanted,
            "%s has %.1f MiB free, but %d rank%s on this host want%s %.1f MiB of it\n"
            "in a container: start it with --shm-size=1g, or --ipc=host; otherwise remove what is "
            "left in %s, or mount -o remount,size=1g %s", path, (double)free_bytes / 1048576,
            local_world, local_world == 1 ? "" : "s", local_world == 1 ? "s" : "",
            (double)wanted / 1048576, path, path);
}

// ---- coming together -----------------------------------------------------------------------

// What a rank says first, and what rank 0 answers.
typedef struct RankHello {
    char magic[8];
    uint32_t version;
    int32_t rank, world, pad;
    uint64_t job;
    RankPlace place;
} RankHello;

static inline void ranks_hello(RankHello* h, const Ranks* r) {
    memset(h, 0, sizeof *h);
    memcpy(h->magic, "modllmR", 8);
    h->version = RANKS_VERSION;
    h->rank = r->rank;
    h->world = r->world;
    h->job = r->job;
    h->place = r->self;
}

static inline bool ranks_knows(const Ranks* r, RankHello* h) {
    h->place.host[RANKS_HOST_SIZE - 1] = 0;
    return memcmp(h->magic, "modllmR", 8) == 0 && h->version == RANKS_VERSION && h->job == r->job;
}

// Small messages at once; a peer that stopped answering is noticed after 10 + 3 * 5 s when the
// connection is idle, and after 25 s when something is under way.
static inline void ranks_tune(int fd) {
    int on = 1, idle = 10, interval = 5, probes = 3, unanswered = 25000;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unanswered, sizeof unanswered);
}

// Seconds that all ranks have to come together in.
static inline double ranks_timeout(void) {
    long long seconds = ranks_variable("RANKS_TIMEOUT", 1000000);
    return seconds > 0 ? (double)seconds : 120;
}

// A socket that listens on every address of this host, by IPv6 and IPv4. port 0: any free one.
static inline int ranks_listen(int* port) {
    int on = 1, off = 0, error = 0;
    for (int v6 = 1; v6 >= 0; v6--) {    // a kernel without IPv6 has only the second
        int fd = socket(v6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0) {
            error = errno;
            continue;
        }
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        struct sockaddr_in6 six;
        struct sockaddr_in four;
        memset(&six, 0, sizeof six);
        memset(&four, 0, sizeof four);
        six.sin6_family = AF_INET6;
        four.sin_family = AF_INET;
        six.sin6_port = four.sin_port = htons((uint16_t)*port);
        if (v6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
        struct sockaddr* address = v6 ? (struct sockaddr*)&six : (struct sockaddr*)&four;
        socklen_t size = v6 ? sizeof six : sizeof four;
        if (bind(fd, address, size) == 0 && listen(fd, 1024) == 0 &&
            getsockname(fd, address, &size) == 0) {
            *port = ntohs(v6 ? six.sin6_port : four.sin_port);
            return fd;
        }
        error = errno;
        close(fd);
        REQUIRE(error != EADDRINUSE, "port %d, where rank 0 waits for the others, is in use\n"
                "set MASTER_PORT to a free one on all ranks, or end the run that has it", *port);
    }
    die("rank 0 cannot listen on port %d: %s", *port, strerror(error));
}

// "3, 5 to 7": the ranks whose flag is not set.
static inline void ranks_list(char* text, size_t size, const bool* flag, int world) {
    size_t n = 0;
    text[0] = 0;
    for (int p = 0; p < world && n + 40 < size; p++) {
        if (flag[p]) continue;
        int last = p;
        while (last + 1 < world && !flag[last + 1]) last++;
        n += (size_t)snprintf(text + n, size - n, "%s%d", n ? ", " : "", p);
        if (last > p)
            n += (size_t)snprintf(text + n, size - n, last > p + 1 ? " to %d" : ", %d", last);
        p = last;
    }
    if (n + 40 >= size) snprintf(text + n, size - n, ", ...");
}

// Connections that have not yet said who they are. A stranger that is silent must not keep the
// ranks out, so each has a few seconds, and when all places are taken the oldest goes.
enum { RANKS_WAITING = 64 };
typedef struct RankVisitor {
    int fd;                     // -1: free
    double since;
    size_t got;
    RankHello hello;
} RankVisitor;

static inline void ranks_admit(Ranks* r, RankVisitor* v) {
    RankHello* h = &v->hello;
    if (!ranks_knows(r, h)) {    // another run's, or no rank at all
        close(v->fd);
        v->fd = -1;
        return;
    }
    REQUIRE(h->world == r->world, "rank %d (host %s, pid %d) was started as one of %d, rank 0 as "
            "one of %d\nall ranks must be started with the same WORLD_SIZE", h->rank, h->place.host,
            h->place.pid, h->world, r->world);
    REQUIRE(h->rank > 0 && h->rank < r->world, "a process (host %s, pid %d) says it is rank %d of "
            "%d", h->place.host, h->place.pid, h->rank, r->world);
    RankPlace* place = &r->places[h->rank];
    RankLine* line = &r->lines[h->rank];
    REQUIRE(line->fd < 0, "two processes say they are rank %d: pid %d on %s and pid %d on %s\n"
            "every rank needs its own number", h->rank, place->pid, place->host, h->place.pid,
            h->place.host);
    *place = h->place;
    line->fd = v->fd;
    ranks_tune(line->fd);
    v->fd = -1;
    RankHello mine;
    ranks_hello(&mine, r);
    ranks_write(line->fd, &mine, sizeof mine, ranks_now() + 1);    // if not, it is seen to be gone
}

// A rank that has come sends nothing before all have, unless it fails or is gone.
static inline void ranks_lose(Ranks* r, int p) __attribute__((noreturn));

static inline void ranks_lose(Ranks* r, int p) {
    RankFrame head;
    char text[RANKS_TEXT_SIZE];
    double deadline = ranks_now() + 1;
    if (ranks_read(r->lines[p].fd, &head, sizeof head, deadline) && head.kind == FRAME_FAILED &&
        head.bytes < sizeof text && ranks_read(r->lines[p].fd, text, head.bytes, deadline)) {
        text[head.bytes] = 0;
        ranks_fail(r, p, text);
    }
    die("rank %d of %d (host %s, pid %d) was gone before all had come\nwhat it printed tells why",
        p, r->world, r->places[p].host, r->places[p].pid);
}

static inline void ranks_accept(Ranks* r, int listener, double seconds) {
    static RankVisitor visitors[RANKS_WAITING];
    double deadline = ranks_now() + seconds;
    struct pollfd* fds = (struct pollfd*)host_alloc((size_t)r->world + RANKS_WAITING + 1,
                                                    sizeof(struct pollfd));
    bool* come = (bool*)host_alloc((size_t)r->world, sizeof(bool));
    for (int i = 0; i < RANKS_WAITING; i++) visitors[i].fd = -1;
    for (;;) {
        int missing = 0;
        for (int p = 0; p < r->world; p++) {
            come[p] = p == 0 || r->lines[p].fd >= 0;
            missing += !come[p];
            fds[1 + RANKS_WAITING + p].fd = r->lines[p].fd;
            fds[1 + RANKS_WAITING + p].events = POLLIN;
        }
        if (missing == 0) break;
        if (ranks_now() >= deadline) {
            char who[200];
            ranks_list(who, sizeof who, come, r->world);
            die("%d of %d ranks did not come within %.0f s: %s\nlook whether they were started and "
                "whether their hosts reach %s; RANKS_TIMEOUT=600 waits longer", missing, r->world,
                seconds, who, r->host);
        }
        fds[0].fd = listener;
        fds[0].events = POLLIN;
        for (int i = 0; i < RANKS_WAITING; i++) {
            fds[1 + i].fd = visitors[i].fd;
            fds[1 + i].events = POLLIN;
        }
        if (poll(fds, (nfds_t)r->world + RANKS_WAITING + 1, 100) < 0) continue;
        for (int p = 1; p < r->world; p++) {
            if (fds[1 + RANKS_WAITING + p].revents) ranks_lose(r, p);
        }
        for (int i = 0; i < RANKS_WAITING; i++) {
            RankVisitor* v = &visitors[i];
            if (v->fd < 0) continue;
            bool out = ranks_now() > v->since + 5;
            if (fds[1 + i].revents) {
                ssize_t n = recv(v->fd, (char*)&v->hello + v->got, sizeof v->hello - v->got,
                                 MSG_DONTWAIT);
                if (n > 0) v->got += (size_t)n;
                out = out || n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR);
            }
            if (v->got == sizeof v->hello) {
                ranks_admit(r, v);
            } else if (out) {
                close(v->fd);
                v->fd = -1;
            }
        }
        if (!fds[0].revents) continue;
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0) continue;
        RankVisitor* place = &visitors[0];
        for (int i = 0; i < RANKS_WAITING && place->fd >= 0; i++) {
            if (visitors[i].fd < 0 || visitors[i].since < place->since) place = &visitors[i];
        }
        if (place->fd >= 0) close(place->fd);
        place->fd = fd;
        place->since = ranks_now();
        place->got = 0;
    }
    for (int i = 0; i < RANKS_WAITING; i++) {
        if (visitors[i].fd >= 0) close(visitors[i].fd);
    }
    free(fds);
    free(come);
}

// Where rank 0 can be reached, as MPI carries it around.
typedef struct RankAddress {
    int32_t port, count;
    uint64_t job;
    RankPlace place;
    char names[32][64];         // numeric
} RankAddress;

static inline void ranks_addresses(RankAddress* a) {
    struct ifaddrs* all = NULL;
    if (getifaddrs(&all) != 0) return;
    for (struct ifaddrs* i = all; i && a->count < 32; i = i->ifa_next) {
        if (!i->ifa_addr || (i->ifa_flags & IFF_LOOPBACK) || !(i->ifa_flags & IFF_UP)) continue;
        int family = i->ifa_addr->sa_family;
        if (family != AF_INET && family != AF_INET6) continue;
        const struct sockaddr_in6* six = (const struct sockaddr_in6*)i->ifa_addr;
        // Of use only together with the name of an interface of the other host.
        if (family == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&six->sin6_addr)) continue;
        socklen_t size = family == AF_INET ? sizeof(struct sockaddr_in) : sizeof *six;
        if (getnameinfo(i->ifa_addr, size, a->names[a->count], sizeof a->names[0], NULL, 0,
                        NI_NUMERICHOST) == 0)
            a->count++;
    }
    freeifaddrs(all);
}

// ranks_ready for a rank that nobody can tell of the end, because it is not connected.
static inline bool ranks_ready_alone(const Ranks* r, int fd, short events, double deadline) {
    do {
        if (ranks_ready(fd, events, ranks_now() + 0.05)) return true;
        if (ranks_claimed(r)) _exit(1);
    } while (ranks_now() < deadline);
    return false;
}

// One attempt at one address. Returns the connection, or -1 with the reason.
static inline int ranks_call(Ranks* r, const struct addrinfo* a, double deadline,
                             const char** why) {
    int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int error = 0;
    socklen_t size = sizeof error;
    if (fd < 0) {
        *why = strerror(errno);
        return -1;
    }
    RankHello hello, answer;
    ranks_hello(&hello, r);
    if (connect(fd, a->ai_addr, a->ai_addrlen) != 0 && errno != EINPROGRESS) {
        error = errno;
    } else if (!ranks_ready_alone(r, fd, POLLOUT, deadline)) {
        error = ETIMEDOUT;
    } else {
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
    }
    if (error) {
        *why = strerror(error);
    } else if (!ranks_write(fd, &hello, sizeof hello, deadline) ||
               !ranks_ready_alone(r, fd, POLLIN, deadline) ||
               !ranks_read(fd, &answer, sizeof answer, deadline)) {
        *why = "who listens there does not answer as rank 0 of this job";
    } else if (!ranks_knows(r, &answer) || answer.rank != 0 || answer.world != r->world) {
        *why = "who listens there is not rank 0 of this job";
    } else {
        ranks_tune(fd);
        r->places[0] = answer.place;
        return fd;
    }
    close(fd);
    return -1;
}

// Tries every address of every name until rank 0 answers.
static inline void ranks_connect(Ranks* r, const char* const* names, int count, int port,
                                 double seconds) {
    double deadline = ranks_now() + seconds;
    char service[16], reason[200] = "";
    snprintf(service, sizeof service, "%d", port);
    for (;;) {
        for (int i = 0; i < count; i++) {
            struct addrinfo hints, *found = NULL;
            memset(&hints, 0, sizeof hints);
            hints.ai_socktype = SOCK_STREAM;
            int error = getaddrinfo(names[i], service, &hints, &found);
            if (error) snprintf(reason, sizeof reason, "%s", gai_strerror(error));
            for (struct addrinfo* a = found; a && !error; a = a->ai_next) {
                const char* why = "";
                double patience = ranks_now() + 5;
                r->lines[0].fd = ranks_call(r, a, patience < deadline ? patience : deadline, &why);
                if (r->lines[0].fd >= 0) break;
                snprintf(reason, sizeof reason, "%s", why);
            }
            if (found) freeaddrinfo(found);
            if (r->lines[0].fd >= 0) return;
        }
        if (ranks_claimed(r)) _exit(1);
        if (ranks_now() >= deadline) break;
        ranks_sleep(0.05);
    }
    char all[400];
    size_t n = 0;
    for (int i = 0; i < count && n + 80 < sizeof all; i++)
        n += (size_t)snprintf(all + n, sizeof all - n, "%s%.70s", i ? ", " : "", names[i]);
    die("no connection to rank 0 at %s, port %d, within %.0f s: %s\nlook whether rank 0 was "
        "started, and whether host %s can reach it", all, port, seconds, reason, r->host);
}

// MPI_Init, and the way to rank 0. False: MPI came up with this process alone.
static inline bool ranks_start_mpi(Ranks* r, int* argc, char*** argv, RankAddress* a,
                                   int* listener) {
    int provided = 0, rank, world;
    REQUIRE(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided) == MPI_SUCCESS,
            "MPI_Init failed");
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    if (world == 1) return false;
    REQUIRE(provided >= MPI_THREAD_FUNNELED, "this MPI allows no thread beside its own (level %d)",
            provided);
    r->rank = rank;
    r->world = world;
    r->mpi = true;
    if (rank == 0) {
        a->port = 0;
        *listener = ranks_listen(&a->port);
        a->place = r->self;
        ranks_addresses(a);
        int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
        if (fd < 0 || read(fd, &a->job, sizeof a->job) != (ssize_t)sizeof a->job)
            a->job = (uint64_t)(ranks_now() * 1e9) ^ ((uint64_t)getpid() << 40);
        if (fd >= 0) close(fd);
    }
    MPI_Bcast(a, (int)sizeof *a, MPI_BYTE, 0, MPI_COMM_WORLD);
    r->job = a->job;
    return true;
}

// ---- the thread ----------------------------------------------------------------------------

// What it knows, and nobody else.
typedef struct RankWatch {
    int gone, more;             // the first rank found gone, or -1, and how many others
    int gone_error;             // errno of its connection; 0: it was closed
    double gone_at;
    char* cause;                // what a rank said it dies of
    int cause_rank;
    double cause_at;
    bool told;                  // rank 0 has been told of our own failure
    double terminated_at;       // SIGTERM was first seen; 0: not
    double troubled_at;         // poll was first true; 0: not
    double polled_at;
    char trouble[1024];
} RankWatch;

static int ranks_terminated;    // a SIGTERM came that the program does not handle

static void ranks_on_sigterm(int signal_number) {
    (void)signal_number;
    __atomic_store_n(&ranks_terminated, 1, __ATOMIC_RELAXED);
}

static inline void ranks_deliver(Ranks* r, RankWatch* w, int peer) {
    RankLine* line = &r->lines[peer];
    FrameKind kind = (FrameKind)line->head.kind;
    if (kind == FRAME_END) _exit(1);
    if (kind == FRAME_FAILED) {
        line->failed = true;
        if (w->cause) {
            free(line->data);
        } else {
            w->cause = line->data;
            w->cause_rank = peer;
            w->cause_at = ranks_now();
        }
    } else {
        RankMessage* m = NULL;
        if (kind != FRAME_BYE) {
            m = (RankMessage*)host_alloc(1, sizeof(RankMessage));
            m->head = line->head;
            m->data = line->data;
        } else {
            free(line->data);
        }
        pthread_mutex_lock(&r->lock);
        if (m && line->first) line->last = line->last->next = m;
        else if (m) line->first = line->last = m;
        else line->bye = true;
        pthread_cond_broadcast(&r->arrived);
        pthread_mutex_unlock(&r->lock);
    }
    line->data = NULL;
    line->got = 0;
}

// Reads what is there. False: the connection has ended, errno tells how.
static inline bool ranks_drain(Ranks* r, RankWatch* w, int peer) {
    RankLine* line = &r->lines[peer];
    for (;;) {
        size_t head = sizeof line->head;
        bool in_head = line->got < head;
        char* at = in_head ? (char*)&line->head + line->got : line->data + (line->got - head);
        size_t left = in_head ? head - line->got : head + (size_t)line->head.bytes - line->got;
        if (left > 0) {
            ssize_t n = recv(line->fd, at, left, MSG_DONTWAIT);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
            if (n == 0) errno = 0;
            if (n <= 0) return false;
            line->got += (size_t)n;
        }
        if (in_head && line->got == head) {
            if (line->head.bytes > (uint64_t)1 << 30 || line->head.kind < FRAME_BROADCAST ||
                line->head.kind > FRAME_BYE) {
                errno = EPROTO;
                return false;
            }
            line->data = (char*)host_alloc((size_t)line->head.bytes + 1, 1);    // ends text, too
        }
        if (line->got >= head && line->got == head + line->head.bytes) ranks_deliver(r, w, peer);
    }
}

static inline RankPlace ranks_place(Ranks* r, int rank) {
    pthread_mutex_lock(&r->lock);
    RankPlace place = r->places[rank];
    pthread_mutex_unlock(&r->lock);
    return place;
}

static inline void ranks_gone_text(Ranks* r, const RankWatch* w, const char* directory, char* text,
                                   size_t size) {
    RankPlace place = ranks_place(r, w->gone);
    char more[48] = "", log[2200] = "it had no log yet";
    if (w->more) snprintf(more, sizeof more, ", and %d more,", w->more);
    if (directory[0]) {
        char path[2112];
        ranks_log_path(path, sizeof path, directory, w->gone);
        snprintf(log, sizeof log, "its log is %s", path);
    }
    const char* how = w->gone_error == 0 || w->gone_error == ECONNRESET || w->gone_error == EPIPE
                          ? "it was killed, crashed or left without a word"
                          : "its host or its network failed";
    snprintf(text, size, "rank %d of %d (host %s, pid %d)%s %s gone: %s\n%s; after a kill for want "
             "of memory `dmesg` on %s shows it\nall ranks have been ended", w->gone, r->world,
             place.host, place.pid, more, w->more ? "are" : "is", how, log, place.host);
}

// Before a rank of another host than rank 0's speaks, those of hosts that come earlier may have
// done so and made the launcher end us.
static inline double ranks_turn(Ranks* r) {
    for (int p = 1; p < r->rank; p++) {
        RankPlace place = ranks_place(r, p);
        if (strcmp(place.host, r->host) != 0) return 0.4;
    }
    return 0;
}

// Ends the process if there is reason to, and it is time.
static inline void ranks_judge(Ranks* r, RankWatch* w) {
    char text[RANKS_TEXT_SIZE], directory[sizeof r->directory];
    double now = ranks_now();
    pthread_mutex_lock(&r->lock);
    char* failure = r->failure;
    int whose = r->failure_rank;
    memcpy(directory, r->directory, sizeof directory);
    pthread_mutex_unlock(&r->lock);
    if (r->rank == 0 && failure && !w->cause) {
        w->cause = failure;
        w->cause_rank = whose;
        w->cause_at = now;
    }
    if (w->gone >= 0) {
        // A little later, to count those that went with it.
        if (now < w->gone_at + (r->rank == 0 ? 0.1 : ranks_turn(r))) return;
        ranks_gone_text(r, w, directory, text, sizeof text);
        ranks_end_here(r, -1, text);
    }
    // Not at once: a rank that fails may do so only because another has been killed, whose end is
    // then about to be seen, and is what the user has to know.
    if (r->rank == 0 && w->cause && now > w->cause_at + 0.3)
        ranks_end_here(r, w->cause_rank, w->cause);
    if (r->rank > 0 && failure && !w->told) {
        w->told = true;
        w->cause_at = now;
        char prefix[64], message[RANKS_TEXT_SIZE + 2048];
        snprintf(prefix, sizeof prefix, "%.40s: rank %d", program_name, r->rank);
        message_text(message, sizeof message, prefix, failure);
        ranks_append_log(r, message);
        ranks_send(r, 0, FRAME_FAILED, failure, strlen(failure), now + 1);
    }
    // Rank 0 has not answered.
    if (r->rank > 0 && w->told && now > w->cause_at + 2.3) ranks_end_here(r, r->rank, failure);
}

// What may make this rank fail, besides its own program.
static inline void ranks_look(Ranks* r, RankWatch* w) {
    double now = ranks_now();
    const char* why = NULL;
    pthread_mutex_lock(&r->lock);
    bool failing = r->failure != NULL;
    pthread_mutex_unlock(&r->lock);
    if (failing || w->gone >= 0) return;
    if (now > w->polled_at + 0.19 && !w->troubled_at) {
        w->polled_at = now;
        pthread_mutex_lock(&r->asking);
        if (r->poll && r->poll(w->trouble, sizeof w->trouble)) w->troubled_at = now;
        pthread_mutex_unlock(&r->asking);
    }
    if (!w->terminated_at && __atomic_load_n(&ranks_terminated, __ATOMIC_RELAXED))
        w->terminated_at = now;
    // Both are as a rule the consequence of another rank's end, which then shows within this time.
    if (w->troubled_at && now > w->troubled_at + 1) why = w->trouble;
    if (w->terminated_at && now > w->terminated_at + 0.5) why = "ended by SIGTERM";
    if (!why) return;
    pthread_mutex_lock(&r->lock);
    if (!r->failure) {
        r->failure = strdup(why);
        r->failure_rank = r->rank;
    }
    pthread_mutex_unlock(&r->lock);
}

// True once all good-byes have been said.
static inline bool ranks_parted(Ranks* r, bool* said) {
    pthread_mutex_lock(&r->lock);
    bool stopping = r->stopping, all = true;
    for (int p = r->rank ? 0 : 1; p < (r->rank ? 1 : r->world); p++) all = all && r->lines[p].bye;
    pthread_mutex_unlock(&r->lock);
    if (!stopping) return false;
    if (r->rank == 0) {
        if (!all) return false;
        for (int p = 1; p < r->world; p++) ranks_send(r, p, FRAME_BYE, NULL, 0, ranks_now() + 5);
    } else if (!*said) {
        *said = true;
        ranks_send(r, 0, FRAME_BYE, NULL, 0, ranks_now() + 5);
    }
    return all;
}

static void* ranks_thread(void* context) {
    Ranks* r = (Ranks*)context;
    RankWatch w;
    memset(&w, 0, sizeof w);
    w.gone = -1;
    int first = r->rank ? 0 : 1, peers = r->rank ? 1 : r->world - 1;
    struct pollfd* fds = (struct pollfd*)host_alloc((size_t)peers + 1, sizeof(struct pollfd));
    bool said = false;
    for (;;) {
        fds[0].fd = r->wake[0];
        fds[0].events = POLLIN;
        for (int i = 0; i < peers; i++) {
            const RankLine* line = &r->lines[first + i];
            fds[1 + i].fd = line->closed ? -1 : line->fd;
            fds[1 + i].events = POLLIN;
            fds[1 + i].revents = 0;
        }
        bool soon = w.gone >= 0 || w.cause || w.told;
        if (poll(fds, (nfds_t)peers + 1, soon ? 10 : 200) < 0) continue;
        char rest[64];
        if (fds[0].revents && read(r->wake[0], rest, sizeof rest) < 0) continue;
        for (int i = 0; i < peers; i++) {
            RankLine* line = &r->lines[first + i];
            if (!fds[1 + i].revents || line->closed || ranks_drain(r, &w, first + i)) continue;
            int error = errno;
            line->closed = true;
            pthread_mutex_lock(&r->lock);
            bool parted = line->bye;
            pthread_mutex_unlock(&r->lock);
            if (parted || line->failed) continue;
            if (w.gone >= 0) {
                w.more++;
                continue;
            }
            w.gone = first + i;
            w.gone_error = error;
            w.gone_at = ranks_now();
        }
        ranks_look(r, &w);
        ranks_judge(r, &w);
        if (ranks_parted(r, &said)) break;
    }
    free(fds);
    free(w.cause);
    return NULL;
}

// ---- messages ------------------------------------------------------------------------------

static inline void ranks_post(Ranks* r, int peer, FrameKind kind, const void* data, size_t bytes) {
    if (!ranks_send(r, peer, kind, data, bytes, RANKS_FOREVER)) ranks_await_end(r);
}

// The next message of `peer`, which must be of this call; the caller frees it.
static inline char* ranks_receive(Ranks* r, int peer, FrameKind kind, size_t* bytes) {
    static const char* const NAMES[] = { "", "broadcast", "gather", "compare" };
    RankLine* line = &r->lines[peer];
    pthread_mutex_lock(&r->lock);
    while (!line->first && !line->bye) pthread_cond_wait(&r->arrived, &r->lock);
    RankMessage* m = line->first;
    if (m) line->first = m->next;
    pthread_mutex_unlock(&r->lock);
    REQUIRE(m, "rank %d has finished, but rank %d waits for its part of call %u (%s)", peer,
            r->rank, r->calls, NAMES[kind]);
    REQUIRE(m->head.kind == (uint32_t)kind && m->head.count == r->calls,
            "rank %d is at call %u (%s), rank %d at call %u (%s)", peer, m->head.count,
            NAMES[m->head.kind], r->rank, r->calls, NAMES[kind]);
    char* data = m->data;
    *bytes = (size_t)m->head.bytes;
    free(m);
    return data;
}

static inline void ranks_receive_into(Ranks* r, int peer, FrameKind kind, void* data,
                                      size_t bytes) {
    size_t got;
    char* copy = ranks_receive(r, peer, kind, &got);
    REQUIRE(got == bytes, "call %u: rank %d sent %zu bytes, rank %d expected %zu", r->calls, peer,
            got, r->rank, bytes);
    if (bytes) memcpy(data, copy, bytes);
    free(copy);
}

#endif    // WITH_NCCL

// From rank 0 to all. Like the next three: blocks, and all ranks call it.
static inline void ranks_broadcast(Ranks* r, void* data, size_t bytes) {
    (void)data, (void)bytes;
    if (r->world == 1) return;
#ifdef WITH_NCCL
    r->calls++;
    if (r->rank > 0) ranks_receive_into(r, 0, FRAME_BROADCAST, data, bytes);
    for (int p = 1; p < r->world && r->rank == 0; p++)
        ranks_post(r, p, FRAME_BROADCAST, data, bytes);
#endif
}

// all (world, bytes) on rank 0, elsewhere NULL.
static inline void ranks_gather(Ranks* r, void* all, const void* mine, size_t bytes) {
    if (r->rank == 0 && bytes) memcpy(all, mine, bytes);
    if (r->world == 1) return;
#ifdef WITH_NCCL
    r->calls++;
    if (r->rank > 0) ranks_post(r, 0, FRAME_GATHER, mine, bytes);
    for (int p = 1; p < r->world && r->rank == 0; p++)
        ranks_receive_into(r, p, FRAME_GATHER, (char*)all + (size_t)p * bytes, bytes);
#endif
}

static inline void ranks_barrier(Ranks* r) {
    ranks_gather(r, NULL, NULL, 0);
    ranks_broadcast(r, NULL, 0);
}

// ---- comparing -----------------------------------------------------------------------------

// A line "name = value" of a text.
typedef struct RankSetting {
    const char *name, *value;
    size_t name_size, value_size;
} RankSetting;

// The line that starts at text; returns where the next one does, or NULL after the last.
static inline const char* ranks_setting(RankSetting* s, const char* text) {
    if (!*text) return NULL;
    size_t length = strcspn(text, "\n");
    s->name = text;
    s->name_size = length;
    s->value = text + length;
    s->value_size = 0;
    for (size_t i = 0; i + 3 <= length; i++) {
        if (memcmp(text + i, " = ", 3) != 0) continue;
        s->name_size = i;
        s->value = text + i + 3;
        s->value_size = length - i - 3;
        break;
    }
    return text + length + (text[length] == '\n');
}

static inline bool ranks_find(RankSetting* s, const char* text, const RankSetting* wanted) {
    while ((text = ranks_setting(s, text))) {
        if (s->name_size == wanted->name_size && memcmp(s->name, wanted->name, s->name_size) == 0)
            return true;
    }
    return false;
}

// A value as a message shows it: of a long one what lies around `from`.
static inline void ranks_excerpt(char* out, size_t size, const char* value, size_t n, size_t from) {
    size_t start = n > 160 && from > 40 ? from - 40 : 0;
    if (n > 160 && start + 120 > n) start = n - 120;
    size_t shown = n > 160 ? 120 : n;
    snprintf(out, size, "%s%.*s%s", start ? "..." : "", (int)shown, value + start,
             start + shown < n ? "..." : "");
    if (n == 0) snprintf(out, size, "empty");
}

// How many lines differ, and of the first of them what to say.
static inline int ranks_differences(char* text, size_t size, const char* base, const char* other,
                                    int rank, const char* host) {
    int count = 0;
    char a[200], b[200];
    RankSetting s, t;
    for (const char* next = base; (next = ranks_setting(&s, next));) {
        bool there = ranks_find(&t, other, &s);
        if (there && s.value_size == t.value_size && !memcmp(s.value, t.value, s.value_size))
            continue;
        if (count++) continue;
        size_t same = 0;
        size_t shorter = there && t.value_size < s.value_size ? t.value_size : s.value_size;
        while (there && same < shorter && s.value[same] == t.value[same]) same++;
        ranks_excerpt(a, sizeof a, s.value, s.value_size, same);
        if (there) ranks_excerpt(b, sizeof b, t.value, t.value_size, same);
        else snprintf(b, sizeof b, "not there");
        snprintf(text, size, "rank %d (host %s): %.*s is %s, rank 0 has %s", rank, host,
                 (int)(s.name_size < 200 ? s.name_size : 200), s.name, b, a);
    }
    for (const char* next = other; (next = ranks_setting(&t, next));) {
        if (ranks_find(&s, base, &t) || count++) continue;
        ranks_excerpt(b, sizeof b, t.value, t.value_size, 0);
        snprintf(text, size, "rank %d (host %s): %.*s is %s, rank 0 has no such line", rank, host,
                 (int)(t.name_size < 200 ? t.name_size : 200), t.name, b);
    }
    if (count == 0 && strcmp(base, other) != 0) {
        snprintf(text, size, "rank %d (host %s): its settings stand in another order than rank 0's",
                 rank, host);
        count = 1;
    }
    return count;
}

// text: lines "name = value", which must be the same on all ranks. If they are not all ranks end,
// with a message that names the first rank that differs, the line and both values.
static inline void ranks_compare(Ranks* r, const char* text) {
    (void)text;
    if (r->world == 1) return;
#ifdef WITH_NCCL
    r->calls++;
    if (r->rank > 0) {
        ranks_post(r, 0, FRAME_COMPARE, text, strlen(text));
        ranks_receive_into(r, 0, FRAME_COMPARE, NULL, 0);
        return;
    }
    char message[2048];
    bool* same = (bool*)host_alloc((size_t)r->world, sizeof(bool));
    int lines = 0, differ = 0, first = 0;
    same[0] = true;
    for (int p = 1; p < r->world; p++) {
        size_t bytes;
        char* other = ranks_receive(r, p, FRAME_COMPARE, &bytes);
        char ignored[1024];
        int n = ranks_differences(differ ? ignored : message, differ ? sizeof ignored : 1024, text,
                                  other, p, r->places[p].host);
        free(other);
        same[p] = n == 0;
        if (n && !differ++) {
            first = p;
            lines = n;
        }
    }
    if (differ) {
        size_t n = strlen(message);
        char who[200];
        if (lines > 1)
            n += (size_t)snprintf(message + n, sizeof message - n,
                                  "; %d more line%s of rank %d differ%s", lines - 1,
                                  lines > 2 ? "s" : "", first, lines > 2 ? "" : "s");
        same[first] = true;
        ranks_list(who, sizeof who, same, r->world);
        if (differ > 1)
            n += (size_t)snprintf(message + n, sizeof message - n, "; rank%s %s differ%s as well",
                                  differ > 2 ? "s" : "", who, differ > 2 ? "" : "s");
        snprintf(message + n, sizeof message - n,
                 "\nall ranks must be started with the same flags, binary and data");
        ranks_fail(r, -1, message);
    }
    free(same);
    for (int p = 1; p < r->world; p++) ranks_post(r, p, FRAME_COMPARE, NULL, 0);
#endif
}

// ---- start, watch, stop --------------------------------------------------------------------

#ifdef WITH_NCCL

static inline void ranks_start_thread(Ranks* r) {
    sigset_t all, before;
    REQUIRE(pipe(r->wake) == 0, "no pipe: %s", strerror(errno));
    fcntl(r->wake[0], F_SETFD, FD_CLOEXEC);
    fcntl(r->wake[1], F_SETFD, FD_CLOEXEC);
    // Until the program has a handler of its own: the launcher's SIGTERM must not be faster than
    // the message about the rank it is sent for.
    struct sigaction old, mine;
    memset(&mine, 0, sizeof mine);
    mine.sa_handler = ranks_on_sigterm;
    mine.sa_flags = SA_RESTART;
    if (sigaction(SIGTERM, NULL, &old) == 0 && old.sa_handler == SIG_DFL)
        sigaction(SIGTERM, &mine, NULL);
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    int error = pthread_create(&r->thread, NULL, ranks_thread, r);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    REQUIRE(error == 0, "no thread to watch the ranks: %s", strerror(error));
    r->threaded = true;
}

static inline uint64_t ranks_machine(void) {
    char id[64] = "";
    FILE* file = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (!file) return 0;
    size_t n = fread(id, 1, sizeof id, file);
    fclose(file);
    return hash_bytes(HASH_START, id, n);
}

// Finds the way to rank 0, over MPI or by the environment; then all connections.
static inline void ranks_meet(Ranks* r, RankEnvironment* e, int* argc, char*** argv) {
    static RankAddress address;
    const char* names[34];
    int count = 0, port = 0, listener = -1;
    double seconds = ranks_timeout();
    bool by_mpi = e->mpi && ranks_start_mpi(r, argc, argv, &address, &listener);
    if (e->mpi && !by_mpi && e->world == 0) {    // the launcher did not say, and it is one
        r->rank = 0;
        r->world = 1;
        r->mpi = true;
        return;
    }
    if (e->mpi && !by_mpi) {
        RankEnvironment other;
        MPI_Finalize();
        ranks_environment(&other, false);
        if (other.world > 1) *e = other;
        else ranks_master(e);
        REQUIRE(e->host[0] && e->port,
                "%s started %d ranks, but MPI came up with one process\nthis program was built "
                "with another MPI than that of the %s: use the one that belongs to it, or set "
                "MASTER_ADDR and MASTER_PORT", e->launcher, e->world, e->launcher);
        r->rank = e->rank;
        r->world = e->world;
        if (r->rank == 0)
            fprintf(stderr,
                    "%s: MPI came up with one process; %d ranks meet by %s at %s, port %d\n",
                    program_name, r->world, e->launcher, e->host, e->port);
    }
    if (by_mpi) {
        port = address.port;
        if (strcmp(address.place.host, r->host) == 0) names[count++] = "127.0.0.1";
        for (int i = 0; i < address.count; i++) names[count++] = address.names[i];
    } else {
        REQUIRE(e->host[0] && e->port > 0, "%s makes %d ranks, but %s is not set\nset MASTER_ADDR "
                "to the host of rank 0 and MASTER_PORT to a free port of it, on all ranks",
                e->launcher, e->world, e->host[0] ? "MASTER_PORT" : "MASTER_ADDR");
        port = e->port;
        names[count++] = e->host;
    }
    r->places = (RankPlace*)host_alloc((size_t)r->world, sizeof(RankPlace));
    r->lines = (RankLine*)host_alloc((size_t)r->world, sizeof(RankLine));
    r->places[r->rank] = r->self;
    for (int p = 0; p < r->world; p++) {
        r->lines[p].fd = -1;
        pthread_mutex_init(&r->lines[p].sending, NULL);
    }
    if (r->rank == 0) {
        if (listener < 0) listener = ranks_listen(&port);
        ranks_accept(r, listener, seconds);
        close(listener);
    } else {
        ranks_connect(r, names, count, port, seconds);
    }
}

#endif

// r lives as long as the process: the thread and die() look at it.
static inline void ranks_start(Ranks* r, int* argc, char*** argv) {
    (void)argc, (void)argv;
    RankEnvironment e;
    memset(r, 0, sizeof *r);
    r->world = r->local_world = 1;
    gethostname(r->host, sizeof r->host - 1);
#ifdef WITH_NCCL
    snprintf(r->self.host, sizeof r->self.host, "%s", r->host);
    r->self.machine = ranks_machine();
    r->self.pid = (int32_t)getpid();
#endif
    r->job = ranks_job();
    pthread_mutex_init(&r->lock, NULL);
    pthread_mutex_init(&r->asking, NULL);
    pthread_cond_init(&r->arrived, NULL);
    ranks_of_die = r;
    die_ranks = ranks_on_die;
    ranks_environment(&e, true);
#ifndef WITH_NCCL
    REQUIRE(e.world == 1, "%s started more than one rank, but this program was built with NCCL=0\n"
            "build it without NCCL=0, or start one process", e.launcher);
#else
    if (e.world != 1) {
        r->rank = e.rank;
        r->world = e.world ? e.world : 2;    // until MPI has said
        ranks_check_shm("/dev/shm", e.local_world, RANKS_SHM_BYTES);
        ranks_meet(r, &e, argc, argv);
    }
#endif
    if (r->world == 1) die_ranks = NULL;
    if (r->world == 1) return;
#ifdef WITH_NCCL
    ranks_start_thread(r);
    RankPlace* places = (RankPlace*)host_alloc((size_t)r->world, sizeof(RankPlace));
    size_t bytes = (size_t)r->world * sizeof(RankPlace);
    memcpy(places, r->places, bytes);
    ranks_broadcast(r, places, bytes);
    pthread_mutex_lock(&r->lock);
    memcpy(r->places, places, bytes);
    pthread_mutex_unlock(&r->lock);
    r->local_world = 0;
    for (int p = 0; p < r->world; p++) {
        if (strcmp(places[p].host, r->host) != 0 || places[p].machine != r->self.machine) continue;
        if (p == r->rank) r->local_rank = r->local_world;
        r->local_world++;
    }
    free(places);
#endif
}

// From here on messages of the end also go into the log of the run in `directory`, and `poll` (may
// be NULL) is asked by the thread five times a second: true, with a text, ends all ranks. No call
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
        pthread_mutex_lock(&r->lock);
        r->stopping = true;
        pthread_mutex_unlock(&r->lock);
        ranks_wake(r);
        pthread_join(r->thread, NULL);
        r->threaded = false;
        die_ranks = NULL;
        for (int p = 0; p < r->world; p++) {
            if (r->lines[p].fd >= 0) close(r->lines[p].fd);
        }
        close(r->wake[0]);
        close(r->wake[1]);
        free(r->lines);
        free(r->places);
        r->lines = NULL;
        r->places = NULL;
        struct sigaction now;
        if (sigaction(SIGTERM, NULL, &now) == 0 && now.sa_handler == ranks_on_sigterm)
            signal(SIGTERM, SIG_DFL);
    }
    if (r->mpi) MPI_Finalize();
#endif
    r->mpi = false;
    r->world = 1;
}

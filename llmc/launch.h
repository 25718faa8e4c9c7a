/*
Who am I, how many are we, and how the processes of one run, one per GPU, come together.

A process that nothing started as one of many is alone. Otherwise its number comes, in this order,
from

    mpirun      OMPI_COMM_WORLD_SIZE, PMI_SIZE or PMIX_RANK: from MPI itself, after MPI_Init
    variables   RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as torchrun sets them
    srun        SLURM_PROCID, SLURM_STEP_NUM_TASKS; the first host of SLURM_STEP_NODELIST and a port
                made of the job's number, unless MASTER_ADDR and MASTER_PORT say otherwise. A batch
                script and a shell of salloc are no step of ranks: a process started there is alone

MPI that comes up with one process although more were started (another MPI's mpirun, srun without
PMIx) is done without, if the variables of the others say how.

Every rank but 0 makes two TCP connections to rank 0: one that the program talks over, one that is
watched. Under MPI the addresses of rank 0 go through MPI_Bcast; MPI carries nothing else. Who
connects must know the job; anybody else is shown out, at the latest after a second of silence. What
does not come within RANKS_TIMEOUT seconds (120) ends the start with the numbers of the missing.

Without WITH_NCCL (make NCCL=0) nothing here needs MPI.

test        test/test_ranks.c
*/
#pragma once
#include "common.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#ifdef WITH_NCCL
#include <mpi.h>
#endif

// Free bytes of /dev/shm that each rank of a host wants before it starts. NCCL creates a segment
// of 9.2 MiB for every channel between two GPUs that cannot reach each other directly, so three
// channels; Open MPI one of 4 MiB, and is killed by SIGBUS when the room for it is not there.
#ifdef __CUDACC__
#define LAUNCH_SHM_BYTES ((size_t)32 << 20)
#else
#define LAUNCH_SHM_BYTES ((size_t)5 << 20)      // eight ranks fit into the 64 MiB of a container
#endif

// Where a rank runs. Ranks with equal host and machine share its GPUs.
typedef struct LaunchPlace {
    char host[256];
    uint64_t machine;           // two machines may have one name ("localhost")
    int32_t pid;
} LaunchPlace;

// What is known of this process before it has met the others.
typedef struct Launch {
    int rank, world;            // world 0: MPI has to be asked
    int local_world;            // ranks on this host, 1 if it is not said
    bool mpi;                   // MPI_Init is to be called, or was
    const char* launcher;       // for messages
    char names[2048];           // of the host of rank 0, separated by spaces; "": not said
    int port;                   // there; 0: not said
    int listener;               // rank 0's socket there, or -1
    uint64_t job;               // tells this run from others
    double timeout;             // seconds to come together in
    LaunchPlace self;
} Launch;

// The two connections between rank 0 and another rank.
enum { LINE_TALK, LINE_WATCH };
typedef struct LaunchLine {
    int fd[2];                  // -1: none
    LaunchPlace place;          // of who is at the other end; there before fd[LINE_WATCH] is
    bool closed;                // seen by who watches
} LaunchLine;

// ---- time and bytes ------------------------------------------------------------------------

static inline void net_sleep(double seconds) {
    struct timespec t = { (time_t)seconds, (long)((seconds - floor(seconds)) * 1e9) };
    while (nanosleep(&t, &t) != 0 && errno == EINTR) {}
}

// Waits until fd can be read (POLLIN) or written (POLLOUT); false: not before the deadline, which
// may be INFINITY.
static inline bool net_ready(int fd, short events, double deadline) {
    for (;;) {
        double left = deadline - clock_now();
        struct pollfd p = { fd, events, 0 };
        int n = poll(&p, 1, left > 0 ? (int)(1e3 * (left < 1e6 ? left : 1e6)) + 1 : 0);
        if (n > 0) return true;
        if ((n < 0 && errno != EINTR) || left <= 0) return false;
    }
}

static inline bool net_write(int fd, const void* data, size_t bytes, double deadline) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = send(fd, (const char*)data + done, bytes - done, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) done += (size_t)n;
        else if (n < 0 && errno == EAGAIN && !net_ready(fd, POLLOUT, deadline)) return false;
        else if (n < 0 && errno != EAGAIN && errno != EINTR) return false;
    }
    return true;
}

// False: the connection is closed, broken or silent; errno tells, 0 for closed.
static inline bool net_read(int fd, void* data, size_t bytes, double deadline) {
    for (size_t done = 0; done < bytes;) {
        if (!net_ready(fd, POLLIN, deadline)) {
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

// ---- the environment -----------------------------------------------------------------------

// A whole number from the environment; -1: not set.
static inline long long launch_variable(const char* name, long long highest) {
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

// rank and world, which only make sense together, and how many of the ranks are on this host.
static inline void launch_numbers(Launch* l, const char* launcher, const char* rank_name,
                                  const char* world_name, const char* local_name) {
    long long rank = launch_variable(rank_name, INT32_MAX);
    long long world = launch_variable(world_name, 1 << 20);
    REQUIRE(rank >= 0 && world >= 0, "the variable %s is set, but %s is not\nset both, or unset "
            "both to run alone", rank >= 0 ? rank_name : world_name,
            rank >= 0 ? world_name : rank_name);
    REQUIRE(rank < world, "the variables say %s=%lld and %s=%lld: ranks count from 0 to %lld",
            rank_name, rank, world_name, world, world - 1);
    const char* local = getenv(local_name);
    l->local_world = local && atoi(local) > 0 ? atoi(local) : 1;    // Slurm's may be "8(x2),4"
    l->launcher = launcher;
    l->rank = (int)rank;
    l->world = (int)world;
}

static inline void launch_master(Launch* l) {
    const char* host = getenv("MASTER_ADDR");
    long long port = launch_variable("MASTER_PORT", 65535);
    if (host && *host) snprintf(l->names, sizeof l->names, "%s", host);
    if (port > 0) l->port = (int)port;
    // torchrun's own server has the port; the next one is as good as any.
    if (port > 0 && port < 65535 && getenv("TORCHELASTIC_RUN_ID")) l->port++;
}

// The first host of a Slurm list: "node[01-04,07],b2" is node01. False: it is no such list.
static inline bool launch_first_host(char* host, size_t size, const char* list) {
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
static inline bool launch_in_slurm_step(void) {
    const char* step = getenv("SLURM_STEP_ID");
    return getenv("SLURM_PROCID") && step && *step >= '0' && *step <= '9' &&
           strtoull(step, NULL, 10) < 0xfffffff0ull;
}

static inline void launch_slurm(Launch* l) {
    const char* list = getenv("SLURM_STEP_NODELIST");
    bool step_tasks = getenv("SLURM_STEP_NUM_TASKS") != NULL;    // the others are of the whole job
    launch_numbers(l, "srun", "SLURM_PROCID", step_tasks ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS",
                   "SLURM_STEP_TASKS_PER_NODE");
    if (l->world == 1) return;
    long long job = launch_variable("SLURM_JOB_ID", INT64_MAX);
    long long step = launch_variable("SLURM_STEP_ID", INT64_MAX);
    REQUIRE(!list || launch_first_host(l->names, 256, list),
            "SLURM_STEP_NODELIST is '%.200s', which names no host\nset MASTER_ADDR to the host of "
            "rank 0", list);
    // Below the ports that Linux gives to outgoing connections.
    if (job >= 0) l->port = 20000 + (int)((job % 10000 * 7 + step % 10000) % 10000);
    launch_master(l);
}

// The same number in all processes that one launcher started together, as far as the environment
// can tell.
static inline uint64_t launch_job(void) {
    static const char* const NAMES[] = { "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
                                         "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT",
                                         "PMIX_NAMESPACE" };
    uint64_t job = HASH_START;
    for (size_t i = 0; i < sizeof NAMES / sizeof NAMES[0]; i++) {
        const char* value = getenv(NAMES[i]);
        if (value) job = hash_bytes(job, value, strlen(value) + 1);
    }
    return job;
}

// with_mpi false: as if no mpirun had spoken.
static inline void launch_environment(Launch* l, bool with_mpi) {
    bool step = launch_in_slurm_step();
    if (with_mpi && getenv("OMPI_COMM_WORLD_SIZE")) {
        launch_numbers(l, "mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                       "OMPI_COMM_WORLD_LOCAL_SIZE");
        l->mpi = true;
    } else if (with_mpi && getenv("PMI_SIZE") && !step) {
        // In a step of Slurm these are of its own PMI, which Open MPI may end the process over.
        launch_numbers(l, "mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS");
        l->mpi = true;
    } else if (with_mpi && getenv("PMIX_RANK")) {
        l->launcher = "mpirun";
        l->world = 0;
        if (step) launch_slurm(l);
        l->mpi = true;
    } else if (getenv("RANK") || getenv("WORLD_SIZE")) {
        launch_numbers(l, "RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE");
        if (l->world > 1) launch_master(l);
    } else if (step) {
        launch_slurm(l);
    }
    if (l->world == 1) l->mpi = false;
}

static inline void launch_init(Launch* l) {
    memset(l, 0, sizeof *l);
    l->world = l->local_world = 1;
    l->launcher = "nobody";
    l->listener = -1;
    l->job = launch_job();
    gethostname(l->self.host, sizeof l->self.host - 1);
    l->self.pid = (int32_t)getpid();
    char boot[64];
    FILE* file = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (file) l->self.machine = hash_bytes(HASH_START, boot, fread(boot, 1, sizeof boot, file));
    if (file) fclose(file);
}

static inline void launch_check_shm(const char* path, int local_world, size_t each) {
    struct statvfs s;
    if (statvfs(path, &s) != 0) return;    // a system without: MPI and NCCL find another way
    size_t free_bytes = (size_t)s.f_bavail * s.f_frsize, wanted = each * (size_t)local_world;
    REQUIRE(free_bytes >= wanted, "%s has %.1f MiB free, but %d ranks on this host want %.1f MiB "
            "of it\nin a container: start it with --shm-size=1g, or --ipc=host; otherwise remove "
            "what is left in it, or mount -o remount,size=1g %s", path,
            (double)free_bytes / 1048576, local_world, (double)wanted / 1048576, path);
}

// ---- rank 0 lets the others in -------------------------------------------------------------

// What a rank says first on each connection, and what rank 0 answers. The job is the password.
typedef struct LaunchHello {
    uint64_t job;
    int32_t rank, world, line, unused;
    LaunchPlace place;
} LaunchHello;

static inline LaunchHello launch_hello(const Launch* l, int line) {
    LaunchHello h = { l->job, l->rank, l->world, line, 0, l->self };
    return h;
}

// Small messages at once; a peer that stopped answering is noticed after 10 + 3 * 5 s when the
// connection is idle, and after 25 s when something is under way.
static inline void launch_tune(int fd) {
    int on = 1, idle = 10, interval = 5, probes = 3, unanswered = 25000;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unanswered, sizeof unanswered);
}

// A socket that listens on every address of this host. port 0: any free one.
static inline int launch_listen(int* port) {
    int on = 1, off = 0;
    for (int v6 = 1; v6 >= 0; v6--) {    // by IPv6 and IPv4; a kernel may have only the latter
        struct sockaddr_in6 a = {};      // begins as that of IPv4 does, with family and port
        socklen_t size = v6 ? sizeof a : sizeof(struct sockaddr_in);
        a.sin6_family = v6 ? AF_INET6 : AF_INET;
        a.sin6_port = htons((uint16_t)*port);
        int fd = socket(a.sin6_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (v6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
        if (fd >= 0 && bind(fd, (struct sockaddr*)&a, size) == 0 && listen(fd, 1024) == 0 &&
            getsockname(fd, (struct sockaddr*)&a, &size) == 0) {
            *port = ntohs(a.sin6_port);
            return fd;
        }
        REQUIRE(errno != EADDRINUSE, "port %d, where rank 0 waits for the others, is in use\n"
                "set MASTER_PORT to a free one on all ranks, or end the run that has it", *port);
        if (fd >= 0) close(fd);
    }
    die("rank 0 cannot listen on port %d: %s", *port, strerror(errno));
}

static inline void launch_admit(const Launch* l, LaunchLine* lines, int fd, const LaunchHello* h) {
    REQUIRE(h->world == l->world && h->rank > 0 && h->rank < l->world,
            "rank %d (host %s, pid %d) was started as one of %d, rank 0 as one of %d\n"
            "all ranks must be started with the same WORLD_SIZE", h->rank, h->place.host,
            h->place.pid, h->world, l->world);
    LaunchLine* line = &lines[h->rank];
    int* fd_of_line = &line->fd[h->line == LINE_WATCH];
    REQUIRE(*fd_of_line < 0, "two processes say they are rank %d: pid %d on %s and pid %d on %s\n"
            "every rank needs its own number", h->rank, line->place.pid, line->place.host,
            h->place.pid, h->place.host);
    if (h->line == LINE_TALK) line->place = h->place;
    LaunchHello mine = launch_hello(l, h->line);
    launch_tune(fd);
    net_write(fd, &mine, sizeof mine, clock_now() + 1);    // if not, it is seen to be gone
    __atomic_store_n(fd_of_line, fd, __ATOMIC_RELEASE);
}

static inline __attribute__((noreturn)) void launch_miss(const Launch* l, const LaunchLine* lines) {
    char who[200] = "";
    int missing = 0;
    for (int p = 1; p < l->world; p++) {
        size_t n = strlen(who);
        if (lines[p].fd[LINE_WATCH] >= 0) continue;
        if (n + 24 < sizeof who) snprintf(who + n, 24, missing ? ", %d" : "%d", p);
        missing++;
    }
    die("%d of %d ranks did not come within %.0f s: %s\nlook whether they were started and whether "
        "their hosts reach %s; RANKS_TIMEOUT=600 waits longer", missing, l->world, l->timeout, who,
        l->self.host);
}

// Rank 0 waits for the others. lines (world).
static inline void launch_accept(Launch* l, LaunchLine* lines) {
    double deadline = clock_now() + l->timeout;
    if (l->listener < 0) l->listener = launch_listen(&l->port);
    for (int left = 2 * (l->world - 1); left > 0;) {
        LaunchHello hello;
        char more;
        if (clock_now() > deadline || !net_ready(l->listener, POLLIN, deadline))
            launch_miss(l, lines);
        int fd = accept4(l->listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0) continue;
        bool ours = net_read(fd, &hello, sizeof hello, clock_now() + 1) && hello.job == l->job;
        // Who has waited too long has hung up, and stands in the queue once more.
        ours = ours && recv(fd, &more, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN;
        if (ours) launch_admit(l, lines, fd, &hello);
        else close(fd);
        left -= ours;
    }
    close(l->listener);
}

// ---- the others find rank 0 ----------------------------------------------------------------

// One attempt at one address. Returns the connection, or -1 with the reason.
static inline int launch_call(const Launch* l, const struct addrinfo* a, int which,
                              LaunchPlace* place, double deadline, const char** why) {
    int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int error = 0;
    socklen_t size = sizeof error;
    LaunchHello hello = launch_hello(l, which), answer;
    if (fd < 0 || (connect(fd, a->ai_addr, a->ai_addrlen) != 0 && errno != EINPROGRESS))
        error = errno;
    else if (!net_ready(fd, POLLOUT, deadline))
        error = ETIMEDOUT;
    else
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        *why = strerror(error);
    } else if (!net_write(fd, &hello, sizeof hello, deadline) ||
               !net_read(fd, &answer, sizeof answer, deadline) || answer.job != l->job ||
               answer.rank != 0 || answer.world != l->world) {
        *why = "who listens there does not answer as rank 0 of this job";
    } else {
        launch_tune(fd);
        *place = answer.place;
        return fd;
    }
    if (fd >= 0) close(fd);
    return -1;
}

// Tries every address of every name until rank 0 answers.
static inline int launch_find(const Launch* l, int which, LaunchPlace* place) {
    double deadline = clock_now() + l->timeout;
    char service[16], name[256];
    const char* reason = "";
    struct addrinfo hints = {}, *found;
    hints.ai_socktype = SOCK_STREAM;
    snprintf(service, sizeof service, "%d", l->port);
    do {
        for (const char* n = l->names; *n; n += strcspn(n, " "), n += *n == ' ') {
            snprintf(name, sizeof name, "%.*s", (int)strcspn(n, " "), n);
            int error = getaddrinfo(name, service, &hints, &found), fd = -1;
            if (error) {
                reason = gai_strerror(error);
                continue;
            }
            for (struct addrinfo* a = found; a && fd < 0; a = a->ai_next) {
                double patience = clock_now() + 10;
                fd = launch_call(l, a, which, place, patience < deadline ? patience : deadline,
                                 &reason);
            }
            freeaddrinfo(found);
            if (fd >= 0) return fd;
        }
        net_sleep(0.05);
    } while (clock_now() < deadline);
    die("no connection to rank 0 at %.400s, port %d, within %.0f s: %s\nlook whether rank 0 was "
        "started, and whether host %s can reach it", l->names, l->port, l->timeout, reason,
        l->self.host);
}

static inline void launch_connect(const Launch* l, LaunchLine* line) {
    line->fd[LINE_TALK] = launch_find(l, LINE_TALK, &line->place);
    int fd = launch_find(l, LINE_WATCH, &line->place);
    __atomic_store_n(&line->fd[LINE_WATCH], fd, __ATOMIC_RELEASE);
}

// ---- MPI -----------------------------------------------------------------------------------

#ifdef WITH_NCCL

// The addresses of this host, as a rank on any host may try them one after the other.
static inline void launch_addresses(char* names, size_t size) {
    struct ifaddrs* all = NULL;
    size_t n = (size_t)snprintf(names, size, "127.0.0.1");    // for those that are here
    getifaddrs(&all);
    for (struct ifaddrs* i = all; i; i = i->ifa_next) {
        char name[NI_MAXHOST];
        if (!i->ifa_addr || (i->ifa_flags & IFF_LOOPBACK) || !(i->ifa_flags & IFF_UP)) continue;
        int family = i->ifa_addr->sa_family;
        if (family != AF_INET && family != AF_INET6) continue;
        if (getnameinfo(i->ifa_addr, sizeof(struct sockaddr_in6), name, sizeof name, NULL, 0,
                        NI_NUMERICHOST) == 0 && n + strlen(name) + 2 < size)
            n += (size_t)snprintf(names + n, size - n, " %s", name);
    }
    freeifaddrs(all);
}

// MPI came up with this process alone, although the launcher speaks of more.
static inline void launch_without_mpi(Launch* l) {
    Launch other;
    MPI_Finalize();
    launch_init(&other);
    launch_environment(&other, false);
    if (other.world > 1) *l = other;
    else launch_master(l);
    l->mpi = false;
    REQUIRE(l->names[0] && l->port,
            "%s started %d ranks, but MPI came up with one process\nthis program was built with "
            "another MPI than that of the %s: use the one that belongs to it, or set MASTER_ADDR "
            "and MASTER_PORT", l->launcher, l->world, l->launcher);
    if (l->rank == 0)
        fprintf(stderr, "%s: MPI came up with one process; %d ranks meet by %s at %s, port %d\n",
                program_name, l->world, l->launcher, l->names, l->port);
}

// MPI_Init, if a launcher is there for it; afterwards rank, world and the way to rank 0 are known.
static inline void launch_start(Launch* l, int* argc, char*** argv) {
    int provided = 0, world = 1;
    if (l->mpi) {
        REQUIRE(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided) == MPI_SUCCESS &&
                provided >= MPI_THREAD_FUNNELED, "MPI_Init failed, or allows no other thread");
        MPI_Comm_size(MPI_COMM_WORLD, &world);
        if (world == 1 && l->world > 1) launch_without_mpi(l);
    }
    if (l->mpi) {
        MPI_Comm_rank(MPI_COMM_WORLD, &l->rank);
        l->world = world;
    }
    if (l->world == 1) return;
    if (l->mpi && l->rank == 0) {
        double seed[2] = { clock_now(), (double)getpid() };
        l->job = hash_bytes(l->job, seed, sizeof seed);
        l->listener = launch_listen(&l->port);
        launch_addresses(l->names, sizeof l->names);
    }
    if (l->mpi) {
        MPI_Bcast(&l->job, sizeof l->job, MPI_BYTE, 0, MPI_COMM_WORLD);
        MPI_Bcast(&l->port, 1, MPI_INT, 0, MPI_COMM_WORLD);
        MPI_Bcast(l->names, sizeof l->names, MPI_BYTE, 0, MPI_COMM_WORLD);
    }
    long long timeout = launch_variable("RANKS_TIMEOUT", 1000000);
    l->timeout = timeout > 0 ? (double)timeout : 120;
    REQUIRE(l->names[0] && l->port > 0, "%s makes %d ranks, but %s is not set\n"
            "set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port of it, on all "
            "ranks", l->launcher, l->world, l->names[0] ? "MASTER_PORT" : "MASTER_ADDR");
}

#endif

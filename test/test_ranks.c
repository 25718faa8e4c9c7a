/*
llmc/ranks.h: how ranks find each other, what they tell each other, and how they end.

    test_ranks [part of a group's name] [--verbose]
    mpirun -np N test_ranks          the messages alone, by the MPI way

Every case is a crew of processes, forked from here with the variables a launcher would set, on
127.0.0.1. What they print on stderr is collected and their exit statuses are looked at; that there
is exactly one message is part of nearly every case. Some crews are started by mpirun, if there is
one. What needs rights that are missing (a small /dev/shm, other host names) is skipped aloud.
*/
#define _GNU_SOURCE 1
#include "../llmc/ranks.h"
#include "test.h"

#include <dirent.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

enum { MAX_CREW = 8, MAX_CREWS = 48 };
static const double SOON = 10;  // seconds in which all ranks must be gone; many crews share a core
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
static const bool SANITIZED = true;
#else
static const bool SANITIZED = false;
#endif
static const double SLOWER = SANITIZED ? 3 : 1;    // what a sanitizer costs at most

// It would sleep a second at every exit.
extern "C" const char* __tsan_default_options(void);
extern "C" const char* __tsan_default_options(void) { return "atexit_sleep_ms=0"; }

static char folder[256];        // of this run's files; removed at the end
static char self[1024];         // this program

// ---- crews ---------------------------------------------------------------------------------

typedef struct Crew {
    int n;
    pid_t pid[MAX_CREW];        // 0: gone, or never started
    int status[MAX_CREW];       // of exit; -S: killed by signal S; 1000: still there in the end
    double started, killed, ended, limit;
    int port;
    char directory[300];        // of its logs
    char err[32768];
    FILE* file;
    char what[80];              // what is expected; "": the test looks itself
    int status_of_all;          // -1: status 1 and one message, with both parts
    int victim;                 // who ends by SIGKILL, or -1
    char part1[512], part2[700];
    int log_of;                 // the rank whose log holds part1 as well, or -1
} Crew;

// They run side by side, until crews_finish.
static Crew crews[MAX_CREWS];
static int crew_count;
static Crew* crew;              // the last of them
static char directory[300];     // of this process, a rank

// Below the ports that the kernel gives to connections, and each only once.
static int free_port(void) {
    static int next;
    if (!next) next = 10000 + (int)getpid() % 200 * 100;
    for (;;) {
        struct sockaddr_in a = {};
        a.sin_family = AF_INET;
        a.sin_port = htons((uint16_t)next++);
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        bool is_free = bind(fd, (struct sockaddr*)&a, sizeof a) == 0;
        close(fd);
        if (is_free) return next - 1;
    }
}

static void set_number(const char* name, int v) {
    char text[16];
    snprintf(text, sizeof text, "%d", v);
    setenv(name, text, 1);
}

static void crews_reap(void) {
    for (int k = 0; k < crew_count; k++) {
        Crew* c = &crews[k];
        int left = 0;
        for (int i = 0; i < c->n; i++) {
            int status;
            if (!c->pid[i]) continue;
            if (waitpid(c->pid[i], &status, WNOHANG) != c->pid[i]) {
                left++;
                continue;
            }
            c->pid[i] = 0;
            c->status[i] = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
        }
        if (left == 0 && c->ended == 0) c->ended = clock_now();
    }
}

static void pause_for(double seconds) {
    for (double end = clock_now() + seconds; clock_now() < end; net_sleep(0.002)) crews_reap();
}

static int messages(const char* text) {
    int n = 0;
    static const char NAME[] = "test_ranks: ";
    for (const char* line = text; line && *line; line = strchr(line, '\n')) {
        line += *line == '\n';
        n += strncmp(line, NAME, sizeof NAME - 1) == 0;
    }
    return n;
}

static void crew_show(const Crew* c) {
    printf("      after %.1f s; statuses", c->ended - c->started);
    for (int i = 0; i < c->n; i++) printf(" %d", c->status[i]);
    printf("; they said:\n%s", c->err);
}

static void log_path(char* path, size_t size, const char* folder_of_run, int rank) {
    char name[32] = "log.txt";
    if (rank) snprintf(name, sizeof name, "log.rank%d.txt", rank);
    snprintf(path, size, "%s/%s", folder_of_run, name);
}

static bool file_holds(const char* path, const char* part) {
    static char text[65536];
    FILE* file = fopen(path, "r");
    if (!file) return false;
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    return strstr(text, part) != NULL;
}

static void crew_judge(const Crew* c) {
    bool ends = c->status_of_all < 0;
    bool ok = ends ? messages(c->err) == 1 && !strstr(c->err, "Sanitizer") &&
                         strstr(c->err, c->part1) && strstr(c->err, c->part2)
                   : !c->err[0];
    for (int i = 0; i < c->n; i++)
        ok = ok && c->status[i] == (!ends ? c->status_of_all : i == c->victim ? -SIGKILL : 1);
    if (!test_true(c->what, ok)) crew_show(c);
    if (c->log_of < 0) return;
    char path[400];
    log_path(path, sizeof path, c->directory, c->log_of);
    if (!test_true("the log has the message", file_holds(path, c->part1))) printf("%s\n", path);
}

// Waits for all and looks whether they did as expected. Their results stay until the next starts.
static void crews_finish(void) {
    for (bool all = false; !all; pause_for(0.005)) {
        all = true;
        crews_reap();
        for (int k = 0; k < crew_count; k++) {
            const Crew* c = &crews[k];
            bool over = clock_now() > c->started + c->limit * SLOWER;
            for (int i = 0; i < c->n; i++) {
                if (!c->pid[i]) continue;
                all = false;
                if (!over) continue;
                kill(c->pid[i], SIGKILL);
                waitpid(c->pid[i], NULL, 0);
                crews[k].pid[i] = 0;
            }
        }
    }
    for (int k = 0; k < crew_count; k++) {
        Crew* c = &crews[k];
        rewind(c->file);
        c->err[fread(c->err, 1, sizeof c->err - 1, c->file)] = 0;
        fclose(c->file);
        if (c->what[0]) crew_judge(c);
    }
    crew_count = 0;
}

static void crew_new(int n) {
    static int number;
    if (crew_count == MAX_CREWS) crews_finish();
    crew = &crews[crew_count++];
    memset(crew, 0, sizeof *crew);
    crew->n = n;
    crew->port = free_port();
    crew->file = tmpfile();
    REQUIRE(crew->file, "no temporary file: %s", strerror(errno));
    fcntl(fileno(crew->file), F_SETFL, O_APPEND);
    snprintf(crew->directory, sizeof crew->directory, "%s/%d", folder, number++);
    REQUIRE(mkdir(crew->directory, 0700) == 0, "%s: %s", crew->directory, strerror(errno));
    crew->started = clock_now();
    crew->limit = SOON;
    for (int i = 0; i < n; i++) crew->status[i] = 1000;
}

// Forks; true in the child, whose stderr goes to the crew's file.
static bool crew_fork(int i) {
    fflush(stdout);
    pid_t pid = fork();
    REQUIRE(pid >= 0, "fork: %s", strerror(errno));
    if (pid) {
        crew->pid[i] = pid;
        return false;
    }
    int null = open("/dev/null", O_WRONLY);
    dup2(null, STDOUT_FILENO);
    dup2(fileno(crew->file), STDERR_FILENO);
    memcpy(directory, crew->directory, sizeof directory);
    set_number("RANK", i);
    set_number("WORLD_SIZE", crew->n);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    set_number("MASTER_PORT", crew->port);
    set_number("SLURM_RESTART_COUNT", crew->port);    // so that the jobs of two crews differ
    return true;
}

typedef int (*Body)(const void* argument);

static void crew_add(int i, Body body, const void* argument) {
    if (crew_fork(i)) exit(body(argument));
}

static void crew_start(int n, Body body, const void* argument) {
    crew_new(n);
    for (int i = 0; i < n; i++) crew_add(i, body, argument);
}

// Every rank of the last crew is to end with this status and without a word.
static void expect_silence(const char* what, int status) {
    snprintf(crew->what, sizeof crew->what, "%s", what);
    crew->status_of_all = status;
    crew->log_of = -1;
}

// All are to end with status 1, or as the victim of SIGKILL, with one message that has both parts.
static void expect_end(const char* what, int victim, const char* part1, const char* part2) {
    expect_silence(what, -1);
    crew->victim = victim;
    snprintf(crew->part1, sizeof crew->part1, "%s", part1);
    snprintf(crew->part2, sizeof crew->part2, "%s", part2 ? part2 : "");
}

static const char* path_of(const char* name) {
    static char paths[4][512];
    static int turn;
    char* path = paths[turn++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static Ranks ranks;

static void start(void) {
    int argc = 0;
    char** argv = NULL;
    ranks_start(&ranks, &argc, &argv);
}

static int number_of(const char* name) {
    const char* text = getenv(name);
    return text ? atoi(text) : -1;
}

// ---- ids and messages ----------------------------------------------------------------------

static int threads_of_process(void) {
    int n = 0;
    DIR* d = opendir("/proc/self/task");
    for (struct dirent* e; d && (e = readdir(d));) n += e->d_name[0] != '.';
    if (d) closedir(d);
    return n;
}

static int body_ids(const void* argument) {
    (void)argument;
    start();
    REQUIRE(ranks.rank == number_of("RANK") && ranks.world == number_of("WORLD_SIZE"),
            "rank %d of %d", ranks.rank, ranks.world);
    REQUIRE(ranks.local_rank == ranks.rank && ranks.local_world == ranks.world,
            "local rank %d of %d", ranks.local_rank, ranks.local_world);
    char host[256];
    gethostname(host, sizeof host);
    REQUIRE(strcmp(host, ranks.host) == 0, "host %s", ranks.host);
    ranks_stop(&ranks);
    return 20;
}

static void test_ids(void) {
    static const int SIZES[] = { 1, 2, 3, 8 };
    for (int k = 0; k < 4; k++) {
        crew_start(SIZES[k], body_ids, NULL);
        char what[64];
        snprintf(what, sizeof what, "%d ranks: numbers and statuses", SIZES[k]);
        expect_silence(what, 20);
    }
}

static unsigned char pattern(int rank, int round, size_t i) {
    return (unsigned char)test_random((uint64_t)(rank * 100 + round), i);
}

// Data of every size goes where it should, in both directions.
static int body_messages(const void* argument) {
    static const size_t SIZES[] = { 0, 1, 7, 4096, 100003, 3000017 };
    (void)argument;
    start();
    ranks_watch(&ranks, directory, NULL);
    for (int round = 0; round < 6; round++) {
        size_t n = SIZES[round];
        unsigned char* mine = (unsigned char*)test_calloc(n, 1);
        unsigned char* all = (unsigned char*)test_calloc(n * (size_t)ranks.world, 1);
        for (size_t i = 0; i < n; i++) mine[i] = pattern(ranks.rank, round, i);
        ranks_gather(&ranks, ranks.rank ? NULL : all, mine, n);
        for (int p = 0; p < ranks.world && ranks.rank == 0; p++) {
            for (size_t i = 0; i < n; i++)
                REQUIRE(all[(size_t)p * n + i] == pattern(p, round, i), "gather: %d %zu", p, i);
        }
        ranks_broadcast(&ranks, mine, n);
        for (size_t i = 0; i < n; i++)
            REQUIRE(mine[i] == pattern(0, round, i), "broadcast of %zu bytes: byte %zu", n, i);
        free(mine);
        free(all);
        ranks_barrier(&ranks);
    }
    size_t n = 200000;
    char* text = (char*)test_calloc(n + 1, 1);
    for (size_t i = 0; i < n; i++) text[i] = (char)(i % 71 == 70 ? '\n' : 'a' + i % 26);
    ranks_compare(&ranks, text);
    ranks_compare(&ranks, "");
    free(text);
    for (int i = 0; i < 300; i++) {    // so many that both threads are early now and then
        int v = ranks.rank == 0 ? i : -1;
        ranks_broadcast(&ranks, &v, sizeof v);
        REQUIRE(v == i, "broadcast %d brought %d", i, v);
        if (i % 3 == 0) ranks_barrier(&ranks);
    }
    ranks_stop(&ranks);
    return 0;
}

// A barrier holds everybody until the last has come.
static int body_barrier(const void* argument) {
    (void)argument;
    start();
    double before = clock_now();
    if (ranks.rank == 1) net_sleep(0.5);
    ranks_barrier(&ranks);
    double waited = clock_now() - before;
    REQUIRE(waited > 0.4, "the barrier of rank %d took %.3f s", ranks.rank, waited);
    ranks_stop(&ranks);
    return 0;
}

static int body_stop_late(const void* argument) {
    (void)argument;
    start();
    double before = clock_now();
    if (ranks.rank == 2) net_sleep(0.7);
    ranks_stop(&ranks);
    REQUIRE(clock_now() - before > 0.4, "a rank did not wait for the good-bye of the others");
    return 75;
}

static int polling, polls;
static bool poll_slowly(char* what, size_t size) {
    (void)what, (void)size;
    __atomic_store_n(&polling, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&polls, 1, __ATOMIC_SEQ_CST);
    net_sleep(0.2);
    __atomic_store_n(&polling, 0, __ATOMIC_SEQ_CST);
    return false;
}

// What poll looks at may be freed once it has been taken back.
static int body_poll(const void* argument) {
    (void)argument;
    start();
    ranks_watch(&ranks, directory, poll_slowly);
    for (int i = 0; i < 2000 && !__atomic_load_n(&polling, __ATOMIC_SEQ_CST); i++)
        net_sleep(0.002);
    ranks_watch(&ranks, directory, NULL);
    REQUIRE(polls > 0 && !polling, "%d polls, under way: %d", polls, polling);
    int before = polls;
    net_sleep(0.5);
    REQUIRE(polls == before, "%d polls after the end of them", polls - before);
    ranks_stop(&ranks);
    return 0;
}

static int signals;
static void count_signal(int signal_number) {
    (void)signal_number;
    __atomic_add_fetch(&signals, 1, __ATOMIC_SEQ_CST);
}

// A signal that the program's own thread holds back stays held back.
static int body_signals(const void* argument) {
    (void)argument;
    sigset_t held, pending;
    start();
    signal(SIGUSR1, count_signal);
    sigemptyset(&held);
    sigaddset(&held, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &held, NULL);
    kill(getpid(), SIGUSR1);
    net_sleep(0.3);
    sigpending(&pending);
    REQUIRE(__atomic_load_n(&signals, __ATOMIC_SEQ_CST) == 0 && sigismember(&pending, SIGUSR1),
            "the signal went to the thread of the ranks");
    ranks_stop(&ranks);
    return 0;
}

static void test_messages(void) {
    for (int n = 1; n <= 8; n = n < 3 ? n + 1 : n + 5) {
        crew_start(n, body_messages, NULL);
        char what[64];
        snprintf(what, sizeof what, "%d ranks: broadcast, gather, barrier, compare", n);
        expect_silence(what, 0);
    }
    crew_start(3, body_barrier, NULL);
    expect_silence("a barrier waits for the last", 0);
    crew_start(2, body_poll, NULL);
    expect_silence("poll is asked, and can be taken back", 0);
    crew_start(2, body_signals, NULL);
    expect_silence("the thread gets no signal", 0);
    crew_start(4, body_stop_late, NULL);
    expect_silence("a late good-bye, and the status is kept", 75);
    crews_finish();
}

// ---- alone ---------------------------------------------------------------------------------

static int files_of_process(void) {
    int n = 0;
    for (int fd = 0; fd < 256; fd++) n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

typedef struct Variables {
    const char* what;
    const char* set[16];        // name, value, ...
    const char *part1, *part2;  // of the message; NULL: it is to be alone
} Variables;

static void forget_launchers(void) {
    static const char* const NAMES[] = { "RANK",          "WORLD_SIZE",          "LOCAL_RANK",
                                         "MASTER_ADDR",   "MASTER_PORT",         "SLURM_PROCID",
                                         "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS",
                                         "SLURM_JOB_ID",  "SLURM_STEP_NODELIST", "PMI_RANK",
                                         "PMI_SIZE",      "PMIX_RANK",           "PMIX_NAMESPACE",
                                         "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
                                         "OMPI_COMM_WORLD_LOCAL_SIZE", "RANKS_TIMEOUT" };
    for (size_t i = 0; i < sizeof NAMES / sizeof NAMES[0]; i++) unsetenv(NAMES[i]);
}

static int body_variables(const void* argument) {
    const Variables* v = (const Variables*)argument;
    forget_launchers();
    for (int i = 0; i < 16 && v->set[i]; i += 2) setenv(v->set[i], v->set[i + 1], 1);
    int files = files_of_process(), threads = threads_of_process(), mpi = 0;
    start();
    MPI_Initialized(&mpi);
    REQUIRE(ranks.world == 1 && ranks.rank == 0 && ranks.local_rank == 0 && ranks.local_world == 1,
            "rank %d of %d", ranks.rank, ranks.world);
    REQUIRE(!mpi && files_of_process() == files && threads_of_process() == threads,
            "alone, but MPI %d, %d files instead of %d, %d threads instead of %d", mpi,
            files_of_process(), files, threads_of_process(), threads);
    int x = 5, y[MAX_CREW] = { 0 };
    ranks_broadcast(&ranks, &x, sizeof x);
    ranks_gather(&ranks, y, &x, sizeof x);
    ranks_barrier(&ranks);
    ranks_compare(&ranks, "a = 1\n");
    ranks_watch(&ranks, directory, NULL);
    REQUIRE(x == 5 && y[0] == 5, "alone, a gather brings %d", y[0]);
    ranks_stop(&ranks);
    return 33;
}

static void test_variables(void) {
    static const Variables CASES[] = {
        { "no launcher", { NULL }, NULL, NULL },
        { "mpirun -np 1", { "OMPI_COMM_WORLD_SIZE", "1", "OMPI_COMM_WORLD_RANK", "0" }, NULL,
          NULL },
        { "WORLD_SIZE 1", { "RANK", "0", "WORLD_SIZE", "1" }, NULL, NULL },
        { "a batch script", { "SLURM_PROCID", "0", "SLURM_NTASKS", "8", "SLURM_JOB_ID", "5" },
          NULL, NULL },
        { "a shell of salloc", { "SLURM_NTASKS", "8", "SLURM_JOB_ID", "5" }, NULL, NULL },
        { "an interactive step",
          { "SLURM_PROCID", "0", "SLURM_NTASKS", "8", "SLURM_JOB_ID", "5", "SLURM_STEP_ID",
            "4294967290" }, NULL, NULL },
        { "srun --pty",
          { "SLURM_PROCID", "0", "SLURM_NTASKS", "8", "SLURM_STEP_NUM_TASKS", "1", "SLURM_STEP_ID",
            "0", "PMIX_RANK", "0" }, NULL, NULL },
        { "RANK alone", { "RANK", "1" }, "RANK is set, but WORLD_SIZE is not", "unset both" },
        { "WORLD_SIZE alone", { "WORLD_SIZE", "2" }, "WORLD_SIZE is set, but RANK is not", NULL },
        { "a rank too high", { "RANK", "2", "WORLD_SIZE", "2" }, "RANK=2 and WORLD_SIZE=2",
          "ranks count from 0 to 1" },
        { "a word", { "RANK", "one", "WORLD_SIZE", "2" }, "RANK is 'one', expected a number",
          NULL },
        { "a negative rank", { "RANK", "-1", "WORLD_SIZE", "2" }, "RANK is '-1'", NULL },
        { "half a number", { "RANK", "1", "WORLD_SIZE", "2x" }, "WORLD_SIZE is '2x'", NULL },
        { "no ranks", { "RANK", "0", "WORLD_SIZE", "0" }, "RANK=0 and WORLD_SIZE=0", NULL },
        { "no address", { "RANK", "0", "WORLD_SIZE", "2", "MASTER_PORT", "2000" },
          "MASTER_ADDR is not set", NULL },
        { "no port", { "RANK", "1", "WORLD_SIZE", "2", "MASTER_ADDR", "127.0.0.1" },
          "MASTER_PORT is not set", NULL },
        { "a port too high",
          { "RANK", "1", "WORLD_SIZE", "2", "MASTER_ADDR", "127.0.0.1", "MASTER_PORT", "70000" },
          "MASTER_PORT is '70000', expected a number from 0 to 65535", NULL },
        { "a step without tasks", { "SLURM_PROCID", "1", "SLURM_STEP_ID", "0" },
          "SLURM_PROCID is set, but SLURM_NTASKS is not", NULL },
        { "a strange list of nodes",
          { "SLURM_PROCID", "1", "SLURM_NTASKS", "2", "SLURM_STEP_ID", "0", "SLURM_JOB_ID", "5",
            "SLURM_STEP_NODELIST", "n[1-" }, "SLURM_STEP_NODELIST is 'n[1-'", "MASTER_ADDR" },
        { "a step without nodes",
          { "SLURM_PROCID", "1", "SLURM_NTASKS", "2", "SLURM_STEP_ID", "0", "SLURM_JOB_ID", "5" },
          "MASTER_ADDR is not set", NULL },
        { "a time that is none",
          { "RANK", "1", "WORLD_SIZE", "2", "MASTER_ADDR", "127.0.0.1", "MASTER_PORT", "9",
            "RANKS_TIMEOUT", "soon" }, "RANKS_TIMEOUT is 'soon'", NULL },
        { "another MPI's mpirun", { "PMI_RANK", "1", "PMI_SIZE", "2" },
          "MPI came up with one process", "MASTER_ADDR" },
    };
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        if (SANITIZED && strncmp(CASES[i].what, "another MPI", 11) == 0) continue;    // calls MPI
        crew_start(1, body_variables, &CASES[i]);
        if (CASES[i].part1) expect_end(CASES[i].what, -1, CASES[i].part1, CASES[i].part2);
        else expect_silence(CASES[i].what, 33);
    }
}

static void expect_host(const char* list, const char* host) {
    char got[64];
    bool ok = launch_first_host(got, sizeof got, list);
    if (!test_true(list, host ? ok && strcmp(got, host) == 0 : !ok)) printf("      %s\n", got);
}

static int body_slurm(const void* argument) {
    int rank = number_of("RANK"), world = number_of("WORLD_SIZE");
    forget_launchers();
    set_number("SLURM_PROCID", rank);
    set_number("SLURM_STEP_NUM_TASKS", world);
    setenv("SLURM_NTASKS", "64", 1);    // of the job, not of the step
    setenv("SLURM_STEP_ID", "2", 1);
    setenv("SLURM_STEP_NODELIST", "localhost,other[01-03]", 1);
    set_number("SLURM_JOB_ID", *(const int*)argument);
    start();
    REQUIRE(ranks.rank == rank && ranks.world == world && ranks.local_rank == rank,
            "rank %d of %d", ranks.rank, ranks.world);
    ranks_barrier(&ranks);
    ranks_stop(&ranks);
    return 0;
}

// MPI comes up alone, and the variables of another launcher are there.
static int body_two_launchers(const void* argument) {
    const char* const* names = (const char* const*)argument;
    setenv(names[0], getenv("RANK"), 1);
    setenv(names[1], getenv("WORLD_SIZE"), 1);
    start();
    REQUIRE(ranks.rank == number_of("RANK") && ranks.world == number_of("WORLD_SIZE"),
            "rank %d of %d", ranks.rank, ranks.world);
    ranks_barrier(&ranks);
    ranks_stop(&ranks);
    return 0;
}

static void test_launchers(void) {
    expect_host("node[01-04,07],b2", "node01");
    expect_host("b2,node[01-04]", "b2");
    expect_host("n[7]", "n7");
    expect_host("n[3,5]", "n3");
    expect_host("rack[1-2]-n[08-16]", "rack1-n08");
    expect_host("n[1-2]x,y", "n1x");
    expect_host("plain", "plain");
    expect_host("", NULL);
    expect_host("n[1-2", NULL);
    expect_host("n[]", NULL);
    expect_host("0123456789012345678901234567890123456789012345678901234567890123456789", NULL);
    int job = (int)(getpid() % 9000) + 7;
    crew_start(3, body_slurm, &job);
    expect_silence("srun without PMI", 0);
    if (SANITIZED) {
        crews_finish();
        test_skip("MPI comes up alone", "a sanitizer reports what MPI does");
        return;
    }
    static const char* const NAMES[2][2] = {
        { "PMI_RANK", "PMI_SIZE" }, { "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE" }
    };
    const Crew* two[2];
    for (int i = 0; i < 2; i++) {
        crew_start(2, body_two_launchers, NAMES[i]);
        two[i] = crew;
    }
    crews_finish();
    for (int i = 0; i < 2; i++) {
        const Crew* c = two[i];
        bool ok = c->status[0] == 0 && c->status[1] == 0 && messages(c->err) == 1 &&
                  strstr(c->err, "came up with one process; 2 ranks meet by RANK and WORLD_SIZE");
        if (!test_true("MPI comes up alone, and is done without", ok)) crew_show(c);
    }
}

// ---- coming together -----------------------------------------------------------------------

static int body_plain(const void* argument) {
    (void)argument;
    start();
    ranks_barrier(&ranks);
    ranks_stop(&ranks);
    return 0;
}

static int stranger_connect(void) {
    struct sockaddr_in a;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_port = htons((uint16_t)crew->port);
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < 1000; i++) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(fd, (struct sockaddr*)&a, sizeof a) == 0) return fd;
        close(fd);
        net_sleep(0.005);
    }
    die("a stranger finds no port %d", crew->port);
}

static int body_close_and_plain(const void* argument) {
    close(*(const int*)argument);
    return body_plain(NULL);
}

// Returns the crew that they hold up.
static const Crew* test_strangers(void) {
    // All kinds of them.
    crew_new(3);
    crew_add(0, body_plain, NULL);
    int silent[2] = { -1, -1 };
    LaunchHello old;
    char noise[2 * sizeof old];
    for (size_t i = 0; i < sizeof noise; i++) noise[i] = (char)test_random(1, i);
    silent[0] = stranger_connect();
    close(stranger_connect());
    int fd = stranger_connect();
    test_true("noise can be sent", send(fd, noise, sizeof noise, MSG_NOSIGNAL) > 0);
    close(fd);
    for (int kind = 0; kind < 2; kind++) {    // of another job; of this one, but hung up
        memset(&old, 0, sizeof old);
        old.rank = 1;
        old.world = 3;
        setenv("MASTER_ADDR", "127.0.0.1", 1);
        set_number("MASTER_PORT", crew->port);
        set_number("SLURM_RESTART_COUNT", crew->port);
        old.job = launch_job();
        forget_launchers();
        if (kind == 0) old.job++;
        // Half a hello, which keeps rank 0 busy until the other has hung up.
        else silent[1] = stranger_connect();
        if (kind) test_true("half can be sent", send(silent[1], &old, 8, MSG_NOSIGNAL) == 8);
        fd = stranger_connect();
        test_true("a hello can be sent", send(fd, &old, sizeof old, MSG_NOSIGNAL) == sizeof old);
        if (kind) shutdown(fd, SHUT_WR);
        char byte;
        test_true("a stranger is shown out", !net_read(fd, &byte, 1, clock_now() + 5) &&
                                                 errno != ETIMEDOUT);
        close(fd);
    }
    crew_add(1, body_plain, NULL);
    crew_add(2, body_plain, NULL);
    expect_silence("strangers are no ranks", 0);
    const Crew* held_up = crew;    // the silent ones stay

    // One who answers in rank 0's place: the others do not take him for it.
    crew_new(2);
    int listener = launch_listen(&crew->port);
    crew_add(1, body_close_and_plain, &listener);
    int taken = -1;
    test_true("rank 1 comes", net_ready(listener, POLLIN, clock_now() + 5) &&
                                  (taken = accept(listener, NULL, NULL)) >= 0);
    test_true("the stranger is asked", net_read(taken, &old, sizeof old, clock_now() + 5));
    test_true("the stranger answers", send(taken, noise, sizeof noise, MSG_NOSIGNAL) > 0);
    pause_for(0.2);
    close(taken);
    close(listener);
    crew_add(0, body_plain, NULL);
    expect_silence("rank 0 comes after a stranger had its port", 0);
    return held_up;
}

static int body_with_rank(const void* argument) {
    set_number("RANK", *(const int*)argument);
    return body_plain(NULL);
}

static int body_with_world(const void* argument) {
    set_number("WORLD_SIZE", *(const int*)argument);
    return body_plain(NULL);
}

static int body_of_three(const void* argument) {
    setenv("WORLD_SIZE", "3", 1);
    return body_plain(argument);
}

static int body_exit(const void* argument) {
    (void)argument;
    return 1;
}

static void test_coming(void) {
    static int one = 1, five = 5;
    char part[64];
    const Crew* held_up = test_strangers();
    setenv("RANKS_TIMEOUT", "1", 1);
    crew_new(4);
    for (int i = 0; i < 4; i++) crew_add(i, i == 2 ? body_exit : body_plain, NULL);
    expect_end("one does not come", -1, "1 of 4 ranks did not come within 1 s: 2\n",
               "RANKS_TIMEOUT");
    crew_new(8);
    for (int i = 0; i < 8; i++)
        crew_add(i, i == 1 || (i > 2 && i < 7) ? body_exit : body_plain, NULL);
    expect_end("many do not come", -1, "5 of 8 ranks did not come within 1 s: 1, 3, 4, 5, 6\n",
               NULL);
    crew_new(3);
    for (int i = 0; i < 3; i++) crew_add(i, i == 0 ? body_exit : body_plain, NULL);
    expect_end("rank 0 does not come", -1, "no connection to rank 0 at 127.0.0.1, port ",
               "Connection refused");
    unsetenv("RANKS_TIMEOUT");

    // One who has come fails, or is gone, while another is still awaited.
    for (int kind = 0; kind < 2; kind++) {
        crew_new(3);
        crew->n = 2;
        for (int i = 0; i < 2; i++) crew_add(i, body_of_three, NULL);
        pause_for(0.5 * SLOWER);
        kill(crew->pid[1], kind ? SIGKILL : SIGTERM);
        if (kind) expect_end("a kill before all have come", 1, "rank 1 of 3 (host ", " is gone");
        else expect_end("an end before all have come", -1, "rank 1: ended by SIGTERM\n", NULL);
    }

    crew_new(3);
    crew_add(0, body_plain, NULL);
    crew_add(1, body_with_rank, &one);
    crew_add(2, body_with_rank, &one);
    expect_end("one number twice", -1, "two processes say they are rank 1: pid ", " and pid ");
    crew_new(3);
    crew_add(0, body_plain, NULL);
    crew_add(1, body_with_world, &five);
    crew_add(2, body_with_world, &five);
    expect_end("different numbers of ranks", -1, "was started as one of 5, rank 0 as one of 3",
               NULL);

    crew_new(3);
    int listener = launch_listen(&crew->port);
    for (int i = 0; i < 3; i++) crew_add(i, body_plain, &listener);
    snprintf(part, sizeof part, "port %d, where rank 0 waits for the others, is in use",
             crew->port);
    expect_end("a port in use", -1, part, "set MASTER_PORT");
    const Crew* refused = crew;
    crews_finish();
    close(listener);
    // Two of them are waited for, a second each.
    test_check("seconds that strangers hold up the start", held_up->ended - held_up->started,
               4 * SLOWER);
    test_check("seconds until all know of a port in use", refused->ended - refused->started,
               5 * SLOWER);
}

// ---- comparing -----------------------------------------------------------------------------

typedef struct Texts {
    const char *what, *base, *other;
    unsigned differ;            // bit r: rank r has the other text
    const char *part1, *part2;
} Texts;

static int body_compare(const void* argument) {
    const Texts* t = (const Texts*)argument;
    start();
    ranks_compare(&ranks, t->base);
    ranks_compare(&ranks, t->differ >> ranks.rank & 1 ? t->other : t->base);
    if (t->differ) _exit(44);    // nobody goes on
    ranks_stop(&ranks);
    return 0;
}

static void test_compare_settings(void) {
    static const Texts CASES[] = {
        { "one value", "--seed = 1\n--steps = 5\n", "--seed = 2\n--steps = 5\n", 8,
          "test_ranks: rank 3 (host ", "): --seed is 2, rank 0 has 1\n" },
        { "the first of two ranks", "a = 1\nb = 2\n", "a = 1\nb = 3\n", 6,
          "test_ranks: rank 1 (host ", "): b is 3, rank 0 has 2\n" },
        { "the first of two lines", "a = 1\nb = 2\nc = 3\n", "a = 1\nb = 0\nc = 0\n", 4,
          "b is 0, rank 0 has 2\n", "all ranks must be started with the same" },
        { "a line that is missing there", "a = 1\nb = 2\n", "a = 1\n", 2,
          " has '' where rank 0 has 'b = 2'\n", NULL },
        { "a line that is missing here", "a = 1\n", "a = 1\nb = 2\n", 2,
          " has 'b = 2' where rank 0 has ''\n", NULL },
        { "nothing at all there", "a = 1\n", "", 2, " has '' where rank 0 has 'a = 1'\n", NULL },
        { "an empty value", "a = \n", "a = 1\n", 2, "a is 1, rank 0 has \n", NULL },
        { "a value that begins like the other", "a = 10\n", "a = 1\n", 2, "a is 1, rank 0 has 10\n",
          NULL },
        { "a value that goes on", "a = 1\n", "a = 10\n", 2, "a is 10, rank 0 has 1\n", NULL },
        { "a name that begins like the other", "ab = 1\n", "a = 1\n", 2,
          " has 'a = 1' where rank 0 has 'ab = 1'\n", NULL },
        { "another order", "a = 1\nb = 2\n", "b = 2\na = 1\n", 2,
          " has 'b = 2' where rank 0 has 'a = 1'\n", NULL },
        { "no newline at the end", "a = 1\nb = 2\n", "a = 1\nb = 3", 2, "b is 3, rank 0 has 2\n",
          NULL },
    };
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        crew_start(4, body_compare, &CASES[i]);
        expect_end(CASES[i].what, -1, CASES[i].part1, CASES[i].part2);
    }
}

// ---- ends ----------------------------------------------------------------------------------

typedef struct Fate {
    int kind, rank;
} Fate;
enum {
    DIE_ONE, DIE_ALL, DIE_EARLY, LEAVE, POLL, TERMINATED, FINISH_EARLY, OTHER_CALL, OTHER_SIZE,
    DIE_AFTER_KILL, DIE_WHILE_SENDING, DIE_UNHEARD
};

static bool poll_says_no(char* what, size_t size) {
    (void)what, (void)size;
    return false;
}

static bool poll_fails(char* what, size_t size) {
    snprintf(what, size, "NCCL: remote error\nlook at the cable");
    return true;
}

static int body_fate(const void* argument) {
    const Fate* f = (const Fate*)argument;
    start();
    bool mine = ranks.rank == f->rank;
    if (f->kind == DIE_EARLY && mine) die("no such data\nmake some");
    ranks_watch(&ranks, directory, f->kind == POLL && mine ? poll_fails : poll_says_no);
    ranks_barrier(&ranks);
    if (f->kind == DIE_ALL || (f->kind == DIE_ONE && mine)) die("no such data\nmake some");
    if (f->kind == LEAVE && mine) return 1;
    if (f->kind == FINISH_EARLY && mine) ranks_stop(&ranks);
    if (f->kind == FINISH_EARLY) ranks_barrier(&ranks);
    if (f->kind == TERMINATED && mine) kill(getpid(), SIGTERM);
    int x = 0, all[MAX_CREW];
    if (f->kind == OTHER_CALL && mine) ranks_gather(&ranks, all, &x, sizeof x);
    if (f->kind == OTHER_CALL) ranks_compare(&ranks, "a = 1\n");
    if (f->kind == OTHER_SIZE) ranks_gather(&ranks, all, &x, mine ? 2 : 4);
    if (f->kind == OTHER_SIZE) ranks_barrier(&ranks);
    // NCCL may fail for want of one whose end comes to be known a little later.
    if (f->kind == DIE_AFTER_KILL && !mine && ranks.rank != (f->rank + 1) % 3)
        die("the consequence");
    if (f->kind == DIE_AFTER_KILL && mine) net_sleep(0.1);
    if (f->kind == DIE_AFTER_KILL && mine) kill(getpid(), SIGKILL);
    if (f->kind == DIE_UNHEARD && ranks.rank == 1) {    // rank 0 does not answer
        pid_t deaf = ranks.lines[0].place.pid;
        kill(deaf, SIGSTOP);
        if (fork()) die("no such data");
        net_sleep(3.2);
        kill(deaf, SIGKILL);
        _exit(0);
    }
    if (f->kind == DIE_WHILE_SENDING) {    // into a main thread that is busy with as much
        static char much[4 << 20];
        for (int i = 0; i < 40; i++) {
            if (i == 7 && mine) die("no such data\nmake some");
            ranks_broadcast(&ranks, much, sizeof much);
        }
    }
    net_sleep(60);
    return 0;
}

static void run_fate(const char* what, int kind, int rank, int n, int victim, const char* part1,
                     const char* part2) {
    Fate f = { kind, rank };
    crew_start(n, body_fate, &f);
    expect_end(what, victim, part1, part2);
}

static void test_ends(void) {
    run_fate("die() unheard by rank 0", DIE_UNHEARD, 1, 2, 0, "rank 1: no such data\n", NULL);
    for (int r = 0; r < 3; r++) {
        char part[64];
        snprintf(part, sizeof part, "test_ranks: rank %d: no such data\n", r);
        for (int log_of = 0; log_of <= r; log_of += r ? r : 1) {    // its own, and rank 0's
            run_fate("die() on one rank", DIE_ONE, r, 3, -1, part,
                     "                    make some\n");
            crew->log_of = log_of;
        }
        run_fate("die() before there is a log", DIE_EARLY, r, 3, -1, part, NULL);
        run_fate("die() while others send", DIE_WHILE_SENDING, r, 3, -1, part, NULL);
        snprintf(part, sizeof part, "rank %d: NCCL: remote error\n", r);
        run_fate("NCCL fails", POLL, r, 3, -1, part, "look at the cable");
        snprintf(part, sizeof part, "rank %d: ended by SIGTERM\n", r);
        run_fate("SIGTERM without a handler", TERMINATED, r, 3, -1, part, NULL);
        snprintf(part, sizeof part, "rank %d of 3 (host ", r);
        run_fate("exit without a good-bye", LEAVE, r, 3, -1, part, "left without a word");
    }
    run_fate("die() on all ranks", DIE_ALL, 0, 8, -1, ": no such data\n", "make some");
    run_fate("one has finished", FINISH_EARLY, 1, 3, -1,
             "rank 1 is at call 5 (stop), rank 0 at call 5 (gather)", NULL);
    run_fate("another call", OTHER_CALL, 1, 3, -1,
             " at call 5 (", ": rank ");    // by the one that sees it first
    run_fate("another size", OTHER_SIZE, 1, 3, -1, "rank 1 sent 2 bytes, rank 0 expected 4", NULL);
    // Of rank 1, then of rank 0.
    run_fate("a kill outranks its consequence", DIE_AFTER_KILL, 2, 3, 2, "rank 2 of 3 (host ",
             " is gone");
    run_fate("a kill outranks its consequence", DIE_AFTER_KILL, 1, 3, 1, "rank 1 of 3 (host ",
             " is gone");
    crews_finish();
}

static void flag_only(int signal_number) {
    (void)signal_number;
}

// Busy with all that ranks do, until the end.
static int body_busy(const void* argument) {
    start();
    if (argument) signal(SIGTERM, flag_only);
    ranks_watch(&ranks, directory, poll_says_no);
    static char part[300000], all[MAX_CREW * sizeof part];
    for (int i = 0;; i++) {
        ranks_gather(&ranks, all, part, i % 2 ? sizeof part : 10);
        ranks_broadcast(&ranks, part, i % 3 ? 100 : sizeof part);
        ranks_compare(&ranks, "a = 1\n");
        if (i % 10 == 0) net_sleep(0.02);
    }
    return 0;
}

static int body_idle(const void* argument) {
    start();
    if (argument) signal(SIGTERM, flag_only);
    ranks_watch(&ranks, directory, poll_says_no);
    for (;;) net_sleep(1);
    return 0;
}

static void crew_kill(Crew* c, int i, int signal_number) {
    c->killed = clock_now();
    if (c->pid[i]) kill(c->pid[i], signal_number);
}

static void test_kill(void) {
    // After the start: the message names rank, host, pid and log.
    Crew* idle[3];
    for (int r = 0; r < 3; r++) {
        crew_start(3, body_idle, NULL);
        idle[r] = crew;
    }
    crew_start(8, body_busy, NULL);
    Crew* busy = crew;
    // As mpirun does it: the others get SIGTERM at once, and SIGKILL a second later.
    Crew* launched[2];
    for (int handler = 0; handler < 2; handler++) {
        crew_start(4, body_idle, handler ? "" : NULL);
        launched[handler] = crew;
    }
    pause_for(0.7 * SLOWER);
    for (int handler = 0; handler < 2; handler++) {
        for (int i = 0; i < 4; i++) {
            if (i != 2) crew_kill(launched[handler], i, SIGTERM);
        }
    }
    pause_for(0.1);    // the network may be slower than the launcher
    for (int handler = 0; handler < 2; handler++) crew_kill(launched[handler], 2, SIGKILL);
    for (int i = 0; i < 3; i++) crew_kill(busy, i, SIGKILL);
    for (int r = 0; r < 3; r++) {
        char part[400], log[640], path[600], what[64], host[256] = "";
        gethostname(host, sizeof host - 1);
        crew = idle[r];
        snprintf(part, sizeof part, "rank %d of 3 (host %s, pid %d) is gone: it was killed", r,
                 host, (int)crew->pid[r]);
        log_path(path, sizeof path, crew->directory, r);
        snprintf(log, sizeof log, "its log is %s;", path);
        snprintf(what, sizeof what, "kill -9 of rank %d", r);
        expect_end(what, r, part, log);
        // Of the survivors of rank 0 only the one that spoke is sure to have written it down.
        if (r) crew->log_of = 0;
        crew_kill(crew, r, SIGKILL);
    }
    pause_for(1);
    for (int handler = 0; handler < 2; handler++) {
        for (int i = 0; i < 4; i++) crew_kill(launched[handler], i, SIGKILL);
    }
    crews_finish();
    bool ok = messages(busy->err) == 1 && strstr(busy->err, "rank 0 of 8 (host ");
    for (int i = 0; i < 8; i++) ok = ok && busy->status[i] == (i < 3 ? -SIGKILL : 1);
    if (!test_true("kill -9 of ranks 0, 1 and 2", ok)) crew_show(busy);
    for (int handler = 0; handler < 2; handler++) {
        const Crew* c = launched[handler];
        ok = messages(c->err) == 1 && strstr(c->err, "rank 2 of 4 (host ");
        if (!test_true("the launcher's SIGTERM does not cut off the message", ok)) crew_show(c);
    }

    // At any moment, of anybody.
    enum { TRIALS = 20 };
    int named = 0, victim[TRIALS];
    setenv("RANKS_TIMEOUT", "2", 1);
    for (int trial = 0; trial < TRIALS; trial++) {
        int n = 2 + trial % 4 * 2;
        victim[trial] = trial % 5 == 0 ? 0 : (int)(test_uniform(7, (uint64_t)trial) * n);
        crew_start(n, trial % 2 ? body_busy : body_idle, NULL);
        pause_for(test_uniform(8, (uint64_t)trial) * (trial < 8 ? 0.02 : 0.3) * SLOWER);
        crew_kill(crew, victim[trial], SIGKILL);
    }
    unsetenv("RANKS_TIMEOUT");
    crews_finish();
    for (int trial = 0; trial < TRIALS; trial++) {
        const Crew* c = &crews[trial];
        char gone[64], missing[64], what[80];
        int r = victim[trial];
        snprintf(gone, sizeof gone, "rank %d of %d (host ", r, c->n);
        snprintf(missing, sizeof missing, "did not come within 2 s: %d\n", r);
        named += strstr(c->err, gone) != NULL;
        ok = messages(c->err) == 1 && !strstr(c->err, "Sanitizer") &&
             (strstr(c->err, gone) || strstr(c->err, r ? missing : "no connection to rank 0"));
        for (int i = 0; i < c->n; i++) ok = ok && c->status[i] == (i == r ? -SIGKILL : 1);
        snprintf(what, sizeof what, "trial %d: kill -9 of rank %d of %d", trial, r, c->n);
        if (!test_true(what, ok)) crew_show(c);
        test_check("seconds until all are gone", c->ended - c->killed, SOON * SLOWER);
    }
    test_true("some trials hit ranks that had met", named >= 8);
}

// ---- namespaces: a small /dev/shm, several hosts ---------------------------------------------

static bool small_shm(void) {
    return unshare(CLONE_NEWNS) == 0 && mount("", "/", "", MS_REC | MS_PRIVATE, NULL) == 0 &&
           mount("tmpfs", "/dev/shm", "tmpfs", 0, "size=6m") == 0;
}

static int body_small_shm(const void* argument) {
    const int* local = (const int*)argument;
    set_number("LOCAL_WORLD_SIZE", *local);
    if (!small_shm()) {
        fprintf(stderr, "not permitted: %s\n", strerror(errno));
        return 5;
    }
    return body_plain(NULL);
}

static int body_check_shm(const void* argument) {
    launch_check_shm((const char*)argument, 1, (size_t)1 << 60);
    return 0;
}

static void test_shm(void) {
    static const int LOCAL = 2;
    crew_start(1, body_check_shm, "/tmp");
    expect_end("no file system has an exabyte free", -1, "/tmp has ",
               "1 ranks on this host want 1099511627776.0 MiB");
    launch_check_shm("/tmp", 1, 1);
    launch_check_shm("/nowhere", 8, (size_t)1 << 60);
    crew_start(2, body_small_shm, &LOCAL);
    crews_finish();
    if (crew->status[0] == 5) {
        test_skip("a /dev/shm of 6 MiB", "the rights to mount one are missing");
        return;
    }
    expect_end("a /dev/shm of 6 MiB", -1,
               "/dev/shm has 6.0 MiB free, but 2 ranks on this host want 10.0 MiB",
               "--shm-size=1g");
    crew_judge(crew);
}

// Rank r is on node r % 2.
static int body_hosts(const void* argument) {
    const Texts* t = (const Texts*)argument;
    int rank = number_of("RANK");
    const char* name = rank % 2 ? "node2" : "node1";
    if (unshare(CLONE_NEWUTS) != 0 || sethostname(name, 5) != 0) {
        fprintf(stderr, "not permitted: %s\n", strerror(errno));
        return 5;
    }
    start();
    int all = ranks.world / 2 + (rank % 2 == 0 && ranks.world % 2);
    REQUIRE(ranks.local_rank == rank / 2 && ranks.local_world == all, "local rank %d of %d",
            ranks.local_rank, ranks.local_world);
    if (t) ranks_compare(&ranks, t->differ >> rank & 1 ? t->other : t->base);
    if (!t && rank == 3) kill(getpid(), SIGKILL);
    if (!t) net_sleep(20);
    ranks_stop(&ranks);
    return 0;
}

static void test_hosts(void) {
    Texts same = { "", "a = 1\n", "a = 2\n", 0, NULL, NULL }, other = same;
    other.differ = 8;
    crew_start(5, body_hosts, &same);
    crews_finish();
    if (crew->status[0] == 5) {
        test_skip("several hosts", "the rights to name one are missing");
        return;
    }
    expect_silence("local ranks of two hosts", 0);
    crew_judge(crew);
    crew_start(5, body_hosts, &other);
    expect_end("the host that differs", -1, "rank 3 (host node2): a is 2, rank 0 has 1", NULL);
    crew_start(5, body_hosts, NULL);
    expect_end("the host of the one that is gone", 3, "rank 3 of 5 (host node2, pid ", "on node2");
    crews_finish();
}

// ---- mpirun --------------------------------------------------------------------------------

// Runs this program as n ranks of `body` (by name); the crew is mpirun alone.
static void mpirun(int n, const char* body, const char* number) {
    char np[16];
    snprintf(np, sizeof np, "%d", n);
    crew_new(1);
    crew->limit = 40;
    if (!crew_fork(0)) return;
    forget_launchers();
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    setenv("ASAN_OPTIONS", "detect_leaks=0", 1);    // of MPI's own
    setpgid(0, 0);
    execlp("mpirun", "mpirun", "--oversubscribe", "-np", np, self, "as-rank", body, number,
           (char*)NULL);
    _exit(77);
}

static int body_mpi_kill(const void* argument) {
    start();
    int victim = atoi((const char*)argument);
    ranks_watch(&ranks, "/nowhere", NULL);
    ranks_barrier(&ranks);
    if (ranks.rank == victim) {
        net_sleep(0.2);
        kill(getpid(), SIGKILL);
    }
    int x = 1, y;
    for (;;) MPI_Allreduce(&x, &y, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);    // as a step of training
    return 0;
}

static int body_mpi_idle(const void* argument) {
    start();
    FILE* file = fopen((const char*)argument, "a");
    fprintf(file, "%d\n", (int)getpid());
    fclose(file);
    ranks_barrier(&ranks);
    for (;;) net_sleep(1);
    return 0;
}

static int as_rank(const char* body, const char* argument) {
    if (strcmp(body, "messages") == 0) return body_messages(NULL);
    if (strcmp(body, "kill") == 0) return body_mpi_kill(argument);
    if (strcmp(body, "idle") == 0) return body_mpi_idle(argument);
    if (strcmp(body, "die") == 0) {
        start();
        if (ranks.rank == atoi(argument) || atoi(argument) < 0) die("no such data");
        net_sleep(20);
    }
    return 1;
}

// What has ended and only waits to be fetched by an init that takes its time runs no more.
static bool is_running(int pid) {
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE* file = fopen(path, "r");
    if (!file) return false;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = 0;
    const char* state = strrchr(text, ')');
    return state && state[1] == ' ' && state[2] != 'Z' && state[2] != 'X';
}

static void test_mpirun(void) {
#ifdef __SANITIZE_THREAD__
    test_skip("mpirun", "MPI is not built for the thread sanitizer");
    return;
#endif
    mpirun(2, "messages", "0");
    crews_finish();
    if (crew->status[0] == 77) {
        test_skip("mpirun", "there is none");
        return;
    }
    expect_silence("2 ranks by MPI", 0);
    crew_judge(crew);
    // Whoever kills mpirun itself leaves no orphan.
    const char* list = path_of("pids");
    mpirun(3, "idle", list);
    Crew* launcher = crew;
    int pids[3], n = 0;
    for (int i = 0; i < 200 && n < 3; i++) {
        pause_for(0.05);
        FILE* file = fopen(list, "r");
        for (n = 0; file && n < 3 && fscanf(file, "%d", &pids[n]) == 1;) n++;
        if (file) fclose(file);
    }
    test_true("three ranks have started", n == 3);
    pause_for(0.3);
    crew_kill(launcher, 0, SIGKILL);
    Crew *killed[3], *died[4];
    for (int r = 0; r < 3; r++) {
        char number[8];
        snprintf(number, sizeof number, "%d", r);
        mpirun(3, "kill", number);
        killed[r] = crew;
        mpirun(3, "die", number);
        died[r] = crew;
    }
    mpirun(4, "die", "-1");
    died[3] = crew;
    mpirun(8, "messages", "0");
    expect_silence("8 ranks by MPI", 0);
    crews_finish();
    for (int r = 0; r < 4; r++) {
        char part[64];
        snprintf(part, sizeof part, r < 3 ? "rank %d: no such data" : "no such data", r);
        bool ok = died[r]->status[0] == 1 && messages(died[r]->err) == 1 &&
                  strstr(died[r]->err, part);
        if (!test_true(r < 3 ? "die() under mpirun" : "die() on all ranks under mpirun", ok))
            crew_show(died[r]);
        if (r == 3) break;
        snprintf(part, sizeof part, "rank %d of 3 (host ", r);
        int status = killed[r]->status[0];
        ok = status > 0 && status < 1000 && messages(killed[r]->err) == 1 &&
             strstr(killed[r]->err, part);
        if (!test_true("kill -9 under mpirun", ok)) crew_show(killed[r]);
    }
    int left = 3;
    for (int i = 0; i < 200 && left > 0; i++) {
        left = 0;
        for (int k = 0; k < n; k++) left += is_running(pids[k]);
        if (left > 0) pause_for(0.1);
    }
    test_true("no orphan after kill -9 of mpirun", n == 3 && left == 0);
}

// ---- main ----------------------------------------------------------------------------------

int main(int argc, char** argv) {
    program_name = "test_ranks";
    if (argc > 3 && strcmp(argv[1], "as-rank") == 0) return as_rank(argv[2], argv[3]);
    if (getenv("OMPI_COMM_WORLD_SIZE") && argc == 1) {
        body_messages(NULL);
        if (number_of("OMPI_COMM_WORLD_RANK") == 0) printf("1 passed, 0 failed\n");
        return 0;
    }
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    REQUIRE(n > 0, "/proc/self/exe: %s", strerror(errno));
    const char* temporary = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%.200s/ranks.XXXXXX", temporary ? temporary : "/tmp");
    REQUIRE(mkdtemp(folder), "%s: cannot be made: %s", folder, strerror(errno));
    forget_launchers();
    test_init(argc, argv);
    if (test_group("ids, messages")) {
        test_ids();
        test_messages();
    }
    if (test_group("launchers")) {
        test_variables();
        test_launchers();
    }
    if (test_group("coming together")) test_coming();
    if (test_group("compare, ends")) {
        test_compare_settings();
        test_ends();
    }
    if (test_group("kill")) test_kill();
    if (test_group("shm")) test_shm();
    if (test_group("hosts")) test_hosts();
    if (test_group("mpirun")) test_mpirun();
    char command[300];
    snprintf(command, sizeof command, "rm -r '%s'", folder);
    if (system(command) != 0) fprintf(stderr, "test_ranks: %s is left over\n", folder);
    return test_summary();
}

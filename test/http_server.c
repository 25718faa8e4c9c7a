/*
A small HTTP server with planned faults, for test/download.sh.

    http_server FOLDER LOG

serves the files of FOLDER on a free port of 127.0.0.1, prints the port and goes on until it is killed,
its parent dies, or ten minutes have passed. An address is /FAULTS/ANY/NAME: FAULTS are words with
commas between, ANY is what a case calls itself, NAME is a file of FOLDER. A word may end in :N, and is
then meant for the first N requests of its address alone.

    ok               no fault
    status=S         answers S and no file
    retry=SECONDS    with status: a Retry-After header
    truncate=BYTES   ends the connection after so many bytes of the body
    drop=BYTES       the same, and resets the connection
    stall=BYTES      sends so many bytes, then nothing for a minute
    pause=BYTES      sends so many bytes, then nothing for a second, then the rest
    corrupt=OFFSET   inverts the byte at this offset of the file
    extra=BYTES      as many bytes more than the file has, counted in Content-Length
    shift            answers a range with the bytes from 0 on, and says so
    norange          answers a range with the whole file (200)
    nohead           answers HEAD with 405
    chunked          no Content-Length, chunks
    nolength         no Content-Length, the body ends with the connection
    html             a page instead of the file (200)
    redirect, loop   to the same file under another address, or to itself
    sum=right|wrong  X-Linked-Etag and X-Linked-Size as Hugging Face has them, in the first answer only;
                     the sum is the first word of FOLDER/NAME.sha256
    size=wrong       X-Linked-Size is two more than it should be

LOG gets one line per request, when its answer begins: method, address, range, status.
Each connection is served by a process of its own and closed after one answer.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ADDRESSES = 1024, LIFETIME_S = 600, STALL_S = 60, PAUSE_US = 1000000 };

typedef struct Counts {             // shared by all processes
    volatile int lock;
    int used;
    struct { char address[512]; int requests; } of[ADDRESSES];
} Counts;

typedef struct Request {
    char method[8], address[512];
    const char* faults;             // the words
    const char* name;
    char words[256];
    long start;                     // of the range; -1: none asked for
    int number;                     // of this address, from 1
    bool second;                    // the address a redirect led to
} Request;

static Counts* counts;
static const char* folder;
static int log_fd;

static void fail(const char* what) {
    fprintf(stderr, "http_server: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int count_request(const char* address) {
    while (__sync_lock_test_and_set(&counts->lock, 1)) usleep(100);
    int i = 0;
    while (i < counts->used && strcmp(counts->of[i].address, address) != 0) i++;
    if (i == counts->used && i < ADDRESSES) {
        snprintf(counts->of[i].address, sizeof counts->of[i].address, "%s", address);
        counts->used++;
    }
    int number = i < ADDRESSES ? ++counts->of[i].requests : 1;
    __sync_lock_release(&counts->lock);
    return number;
}

// ---- faults --------------------------------------------------------------------------------

// The value of a fault that holds for this request ("" where it has none), or NULL.
static const char* fault(const Request* r, const char* word) {
    static char value[64];
    size_t length = strlen(word);
    const char* p = r->faults;
    while (*p) {
        size_t n = strcspn(p, ",");
        if (n >= length && strncmp(p, word, length) == 0 && (n == length || strchr("=:", p[length]))) {
            char text[64];
            snprintf(text, sizeof text, "%.*s", (int)(n - length), p + length);
            char* colon = strchr(text, ':');
            if (colon) {
                *colon = 0;
                if (r->number > atoi(colon + 1)) return NULL;
            }
            snprintf(value, sizeof value, "%s", text[0] == '=' ? text + 1 : text);
            return value;
        }
        p += n + (p[n] == ',');
    }
    return NULL;
}

static long fault_number(const Request* r, const char* word) {     // -1: does not hold
    const char* value = fault(r, word);
    return value ? atol(value) : -1;
}

// ---- answers -------------------------------------------------------------------------------

static void send_all(int fd, const void* data, size_t n) {
    const char* p = (const char*)data;
    while (n > 0) {
        ssize_t sent = write(fd, p, n);
        if (sent <= 0) exit(0);      // the client has left
        p += sent;
        n -= (size_t)sent;
    }
}

__attribute__((format(printf, 2, 3)))
static void send_text(int fd, const char* format, ...) {
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    send_all(fd, text, (size_t)n);
}

static void send_status(int fd, const Request* r, int status) {
    char range[32] = "-", line[800];
    if (r->start >= 0) snprintf(range, sizeof range, "%ld", r->start);
    int n = snprintf(line, sizeof line, "%s %s range=%s status=%d\n", r->method, r->address, range, status);
    if (write(log_fd, line, (size_t)n) != n) fail("log");
    send_text(fd, "HTTP/1.1 %d Answer\r\nConnection: close\r\n", status);
}

static void send_refusal(int fd, const Request* r, int status, long size) {
    send_status(fd, r, status);
    long seconds = fault_number(r, "retry");
    if (seconds >= 0) send_text(fd, "Retry-After: %ld\r\n", seconds);
    if (status == 416) send_text(fd, "Content-Range: bytes */%ld\r\n", size);
    send_text(fd, "Content-Length: 7\r\n\r\nrefusal");
}

// What Hugging Face says about a file in the answer that leads to its storage.
static void send_linked(int fd, const Request* r, long size) {
    const char* sum = fault(r, "sum");
    if (!sum) return;
    char text[65] = "0000000000000000000000000000000000000000000000000000000000000000";
    if (strcmp(sum, "right") == 0) {
        char path[1024];
        snprintf(path, sizeof path, "%s/%s.sha256", folder, r->name);
        FILE* file = fopen(path, "r");
        if (!file || fscanf(file, "%64s", text) != 1) fail(path);
        fclose(file);
    }
    send_text(fd, "X-Linked-Etag: \"%s\"\r\nX-Linked-Size: %ld\r\n", text, size + (fault(r, "size") ? 2 : 0));
}

// The bytes [start, size) of the body, with the faults that happen on the way.
static void send_body(int fd, const Request* r, const char* data, long start, long size) {
    bool chunked = fault(r, "chunked");
    long truncate = fault_number(r, "truncate"), drop = fault_number(r, "drop");
    long stall = fault_number(r, "stall"), pause = fault_number(r, "pause");
    for (long done = 0; done < size - start; ) {
        long n = size - start - done, stops[] = { truncate, drop, stall, pause };
        if (n > 65536) n = 65536;
        for (int i = 0; i < 4; i++) {
            if (done < stops[i] && stops[i] < done + n) n = stops[i] - done;
        }
        if (done == truncate) exit(0);
        if (done == drop) {
            usleep(200000);          // a reset overtakes what the client has not yet read
            struct linger linger = { 1, 0 };
            setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
            exit(0);
        }
        if (done == stall) {
            sleep(STALL_S);
            exit(0);
        }
        if (done == pause) usleep(PAUSE_US);
        if (chunked) send_text(fd, "%lx\r\n", n);
        send_all(fd, data + start + done, (size_t)n);
        if (chunked) send_text(fd, "\r\n");
        done += n;
    }
    if (chunked) send_text(fd, "0\r\n\r\n");
}

static void answer(int fd, Request* r) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, r->name);
    int file = open(path, O_RDONLY);
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0) {
        send_refusal(fd, r, 404, 0);
        return;
    }
    long size = info.st_size, extra = fault_number(r, "extra"), status = fault_number(r, "status");
    char* data = (char*)calloc(1, (size_t)size + (extra > 0 ? (size_t)extra : 0));
    if (!data || read(file, data, (size_t)size) != size) fail(path);
    if (status > 0) {
        send_refusal(fd, r, (int)status, size);
        return;
    }
    if (fault(r, "nohead") && strcmp(r->method, "HEAD") == 0) {
        send_refusal(fd, r, 405, size);
        return;
    }
    if (fault(r, "loop") || (fault(r, "redirect") && !r->second)) {
        send_status(fd, r, 302);
        send_linked(fd, r, size);
        send_text(fd, "Location: %s%s\r\nContent-Length: 7\r\n\r\nrefusal", r->second ? "" : "/second", r->address);
        return;
    }
    if (fault(r, "html")) {
        static const char PAGE[] = "<!DOCTYPE html><html><body>Please log in to this network.</body></html>";
        send_status(fd, r, 200);
        send_text(fd, "Content-Length: %zu\r\n\r\n%s", sizeof PAGE - 1, strcmp(r->method, "HEAD") ? PAGE : "");
        return;
    }
    long corrupt = fault_number(r, "corrupt"), start = r->start;
    if (corrupt >= 0 && corrupt < size) data[corrupt] = (char)~data[corrupt];
    if (extra > 0) size += extra;
    if (fault(r, "norange")) start = -1;
    if (start >= size) {
        send_refusal(fd, r, 416, size);
        return;
    }
    if (start >= 0 && fault(r, "shift")) start = 0;
    send_status(fd, r, start >= 0 ? 206 : 200);
    if (start >= 0) send_text(fd, "Content-Range: bytes %ld-%ld/%ld\r\n", start, size - 1, size);
    if (start < 0) start = 0;
    if (!r->second) send_linked(fd, r, size - (extra > 0 ? extra : 0));
    if (fault(r, "chunked")) send_text(fd, "Transfer-Encoding: chunked\r\n");
    else if (!fault(r, "nolength")) send_text(fd, "Content-Length: %ld\r\n", size - start);
    send_text(fd, "Content-Type: application/octet-stream\r\n\r\n");
    if (strcmp(r->method, "HEAD") != 0) send_body(fd, r, data, start, size);
}

// ---- requests ------------------------------------------------------------------------------

static void serve(int fd) {
    char text[8192];
    size_t n = 0;
    text[0] = 0;
    while (!strstr(text, "\r\n\r\n")) {
        ssize_t got = n < sizeof text - 1 ? read(fd, text + n, sizeof text - 1 - n) : 0;
        if (got <= 0) return;
        n += (size_t)got;
        text[n] = 0;
    }
    Request r;
    memset(&r, 0, sizeof r);
    r.start = -1;
    if (sscanf(text, "%7s %511s", r.method, r.address) != 2) return;
    const char* range = strcasestr(text, "\r\nRange: bytes=");
    if (range) r.start = atol(range + 15);
    const char* p = r.address;
    if (strncmp(p, "/second/", 8) == 0) {
        r.second = true;
        p += 7;
    }
    const char* slash = strchr(p + 1, '/');
    r.name = strrchr(p, '/') + 1;
    if (p[0] != '/' || !slash || strstr(p, "..")) return;
    snprintf(r.words, sizeof r.words, "%.*s", (int)(slash - p - 1), p + 1);
    r.faults = r.words;
    r.number = count_request(r.address);
    answer(fd, &r);
    shutdown(fd, SHUT_WR);
    while (read(fd, text, sizeof text) > 0) {}      // until the client closes: no reset by bytes left unread
}

int main(int argc, char** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: http_server FOLDER LOG\n");
        return 1;
    }
    folder = argv[1];
    log_fd = open(argv[2], O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (log_fd < 0) fail(argv[2]);
    counts = (Counts*)mmap(NULL, sizeof(Counts), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (counts == MAP_FAILED) fail("memory");
    signal(SIGCHLD, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    alarm(LIFETIME_S);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    if (listener < 0 || bind(listener, (struct sockaddr*)&address, length) != 0 || listen(listener, 64) != 0 ||
        getsockname(listener, (struct sockaddr*)&address, &length) != 0) fail("127.0.0.1");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    while (true) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) continue;
        pid_t child = fork();
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGTERM);
            alarm(LIFETIME_S);
            close(listener);
            serve(fd);
            exit(0);
        }
        close(fd);
    }
}

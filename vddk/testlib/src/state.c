// Keeps the state that all processes with the library share: counts, violations of rules, and
// the host's memory and connections that are in use. It is a mapped file in the folder of the
// script, so that the calls of a killed process are counted, too. testlib.go reads the counters
// by their names.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "testlib.h"

enum { COUNTERS = FN_COUNT + RULE_COUNT + STAT_COUNT, SLOTS = 512 };

static const uint64_t magic = 0x31304c5453455456; // "VTESTL01" as bytes

struct counter {
	char name[40];
	_Atomic uint64_t value;
};

// A handle that any of the processes has open.
struct slot {
	_Atomic int pid;  // 0 if the slot is free
	uint64_t started; // when the process started, because process IDs are reused
	uint64_t bytes;   // bytes of its NFC buffers
	uint64_t dead_until; // time in ns until which a dead process keeps the slot; 0 if it may be alive
	_Atomic uint64_t in_flight, in_flight_bytes;
};

struct state {
	uint64_t magic;
	uint64_t counter_count;
	struct counter counters[COUNTERS];
	// testlib.go does not read the following fields.
	pthread_mutex_t mu; // guards slots; it is robust, because a process that holds it may be killed
	struct { _Atomic uint64_t seen, fired; } faults[MAX_FAULTS];
	_Atomic uint64_t host_free_at, swept_at;
	uint64_t swept;
	struct slot slots[SLOTS];
};

static struct state *state;
static int trace_fd = -1;

const char *const function_names[FN_COUNT] = {
#define X(name) #name,
	FUNCTIONS(X)
#undef X
};

static const char *const rule_names[] = {
#define X(name, text) text,
	RULES(X)
#undef X
};

static const char *const stat_names[] = {
#define X(name, text) text,
	STATS(X)
#undef X
};

uint64_t now_ns(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

void sleep_until(uint64_t ns) {
	struct timespec t = { (time_t)(ns / 1000000000), (long)(ns % 1000000000) };
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) {}
}

static void state_init(void) {
	memset(state, 0, sizeof *state);
	struct counter *c = state->counters;
	for (int i = 0; i < FN_COUNT; i++) snprintf((c++)->name, sizeof c->name, "call:%s", function_names[i]);
	for (int i = 0; i < RULE_COUNT; i++) snprintf((c++)->name, sizeof c->name, "broken:%s", rule_names[i]);
	for (int i = 0; i < STAT_COUNT; i++) snprintf((c++)->name, sizeof c->name, "stat:%s", stat_names[i]);
	state->counter_count = COUNTERS;
	pthread_mutexattr_t attr;
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&state->mu, &attr);
	pthread_mutexattr_destroy(&attr);
	state->magic = magic;
}

static char *beside(const char *name) {
	char *path;
	if (asprintf(&path, "%s/%s", conf.folder, name) < 0) abort();
	return path;
}

// Maps the state, once in each process. If there is no script, the state is private.
void state_open(void) {
	if (state) return;
	if (!conf.folder) {
		state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		if (state == MAP_FAILED) abort();
		state_init();
		return;
	}
	char *path = beside("vddktest.state");
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
	struct stat st;
	if (fd < 0 || flock(fd, LOCK_EX) || fstat(fd, &st)) {
		fprintf(stderr, "vddk test library: %s: %s\n", path, strerror(errno));
		abort();
	}
	bool fresh = st.st_size != sizeof *state;
	if (fresh && ftruncate(fd, sizeof *state)) abort();
	state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (state == MAP_FAILED) abort();
	if (fresh || state->magic != magic || state->counter_count != COUNTERS) state_init();
	flock(fd, LOCK_UN); // closing fd does not unlock the file, because the mapping keeps it open
	close(fd);
	free(path);
	if (conf.trace) {
		path = beside("vddktest.trace");
		trace_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
		free(path);
	}
}

void state_forget_files(void) { trace_fd = -1; }

void count_call(enum function fn) { state->counters[fn].value++; }

void count_stat(enum figure figure, uint64_t n) { state->counters[FN_COUNT + RULE_COUNT + figure].value += n; }

void raise_stat(enum figure figure, uint64_t value) {
	_Atomic uint64_t *at = &state->counters[FN_COUNT + RULE_COUNT + figure].value;
	uint64_t old = *at;
	while (old < value && !atomic_compare_exchange_weak(at, &old, value)) {}
}

// Appends a line by a single write, so that lines of several processes do not mix.
__attribute__((format(printf, 2, 0)))
static void write_line(int fd, const char *fmt, va_list args) {
	char line[2048];
	int n = snprintf(line, sizeof line, "%d ", getpid());
	n += vsnprintf(line + n, sizeof line - (size_t)n - 1, fmt, args);
	if (n > (int)sizeof line - 2) n = sizeof line - 2;
	line[n++] = '\n';
	if (write(fd, line, (size_t)n) < 0) return; // there is no way to report the error
}

void broken(enum rule rule, const char *fmt, ...) {
	static _Atomic int lines;
	state->counters[FN_COUNT + rule].value++;
	if (!conf.folder || lines++ >= 100) return;
	char *path = beside("vddktest.broken");
	int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
	free(path);
	if (fd < 0) return;
	char all[1024];
	snprintf(all, sizeof all, "%s: %s", rule_names[rule], fmt);
	va_list args;
	va_start(args, fmt);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
	write_line(fd, all, args);
#pragma GCC diagnostic pop
	va_end(args);
	close(fd);
}

void trace(const char *fmt, ...) {
	if (trace_fd < 0) return;
	va_list args;
	va_start(args, fmt);
	write_line(trace_fd, fmt, args);
	va_end(args);
}

uint64_t fault_seen(int fault) { return ++state->faults[fault].seen; }

bool fault_fire(int fault, uint64_t times) {
	uint64_t fired = state->faults[fault].fired++;
	if (times && fired >= times) return false;
	count_stat(STAT_faults, 1);
	return true;
}

// Reserves cost nanoseconds of a line that transfers one request after the other, and returns
// the time at which the transfer ends. *free_at is the end of the last reservation.
uint64_t book(_Atomic uint64_t *free_at, uint64_t now, uint64_t cost) {
	uint64_t old = *free_at, until;
	do {
		uint64_t start = old > now ? old : now;
		// A state file from before a reboot has times of another clock.
		if (start > now + 600000000000) start = now;
		until = start + cost;
	} while (!atomic_compare_exchange_weak(free_at, &old, until));
	return until;
}

// --- Limits of the host ------------------------------------------------------

static void lock_slots(void) {
	if (pthread_mutex_lock(&state->mu) == EOWNERDEAD) pthread_mutex_consistent(&state->mu);
}

static void unlock_slots(void) { pthread_mutex_unlock(&state->mu); }

// Returns when a process started, in clock ticks, or 0 if it has ended.
static uint64_t started(int pid) {
	char path[64], stat[1024];
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0) return errno == ENOENT || errno == ESRCH ? 0 : 1;
	ssize_t n = read(fd, stat, sizeof stat - 1);
	close(fd);
	if (n <= 0) return 0;
	stat[n] = 0;
	char *p = strrchr(stat, ')'); // the name of the process may contain any characters
	unsigned long long start;
	char status;
	if (!p || sscanf(p + 1, " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu", &status, &start) != 2)
		return 0;
	return status == 'Z' || status == 'X' ? 0 : start;
}

// Frees the slots of processes that ended longer than conf.linger ago, and returns the number of
// slots of other dead processes. The caller holds the lock of the slots.
static uint32_t sweep(void) {
	uint64_t now = now_ns();
	uint32_t lingering = 0;
	state->swept_at = now;
	for (int i = 0; i < SLOTS; i++) {
		struct slot *s = &state->slots[i];
		if (!s->pid) continue;
		if (!s->dead_until) {
			uint64_t start = started(s->pid);
			if (start && (start == 1 || start == s->started)) continue;
			s->dead_until = now + conf.linger;
			s->in_flight = s->in_flight_bytes = 0;
		}
		if (now >= s->dead_until) {
			s->pid = 0;
			state->swept++;
		} else lingering++;
	}
	return lingering;
}

void host_sweep(uint32_t *cleaned, uint32_t *remaining) {
	lock_slots();
	*remaining = sweep();
	*cleaned = (uint32_t)state->swept;
	state->swept = 0;
	unlock_slots();
}

// Reserves memory and a connection of the host for a handle. bytes is 0 for a transport mode that
// needs neither.
enum reserve host_reserve(uint64_t bytes, int *slot) {
	lock_slots();
	sweep();
	uint64_t reserved = 0, handles = 0, connections = 0;
	int found = -1;
	for (int i = 0; i < SLOTS; i++) {
		struct slot *s = &state->slots[i];
		if (!s->pid) {
			if (found < 0) found = i;
			continue;
		}
		handles++;
		reserved += s->bytes;
		connections += s->bytes > 0;
	}
	enum reserve result = RESERVED;
	if (bytes && conf.host_connections && connections >= conf.host_connections) result = NO_CONNECTION;
	if (bytes && conf.host_memory && reserved + bytes > conf.host_memory) result = NO_MEMORY;
	if (found < 0) result = NO_CONNECTION;
	if (result == RESERVED) {
		struct slot *s = &state->slots[found];
		s->started = started(getpid());
		s->bytes = bytes;
		s->dead_until = 0;
		s->in_flight = s->in_flight_bytes = 0;
		s->pid = getpid();
		*slot = found;
		raise_stat(STAT_max_handles, handles + 1);
		raise_stat(STAT_max_reserved, reserved + bytes);
	} else count_stat(STAT_alloc_failures, 1);
	unlock_slots();
	return result;
}

void host_release(int slot) {
	lock_slots();
	state->slots[slot].pid = 0;
	unlock_slots();
}

bool host_begin(int slot, uint64_t bytes) {
	struct slot *own = &state->slots[slot];
	if (!conf.inflight_requests && !conf.inflight_bytes) return true;
	lock_slots();
	uint64_t requests = 1, total = bytes;
	for (int i = 0; i < SLOTS; i++) {
		if (!state->slots[i].pid) continue;
		requests += state->slots[i].in_flight;
		total += state->slots[i].in_flight_bytes;
	}
	bool ok = (!conf.inflight_requests || requests <= conf.inflight_requests) && (!conf.inflight_bytes || total <= conf.inflight_bytes);
	if (ok) {
		own->in_flight++;
		own->in_flight_bytes += bytes;
	} else count_stat(STAT_alloc_failures, 1);
	unlock_slots();
	return ok;
}

void host_end(int slot, uint64_t bytes) {
	if (!conf.inflight_requests && !conf.inflight_bytes) return;
	state->slots[slot].in_flight--;
	state->slots[slot].in_flight_bytes -= bytes;
}

// Reserves the host's line, which all processes share, for a transfer of the given bytes, and
// returns the time at which the transfer ends.
uint64_t host_book(double bytes_per_second, uint64_t bytes) {
	uint64_t now = now_ns(), handles = 0;
	if (conf.host_slowdown > 0) {
		if (now - state->swept_at > 200000000) {
			lock_slots();
			sweep();
			unlock_slots();
		}
		for (int i = 0; i < SLOTS; i++) handles += state->slots[i].pid != 0;
		if (handles > conf.host_fast_handles) {
			double factor = 1 - (double)(handles - conf.host_fast_handles) * conf.host_slowdown;
			bytes_per_second *= factor > 0.05 ? factor : 0.05;
		}
	}
	return book(&state->host_free_at, now, (uint64_t)((double)bytes * 1e9 / bytes_per_second));
}

// Appends the counts to the file that the key accounting of the script names.
void state_account(void) {
	if (!conf.accounting) return;
	FILE *f = fopen(conf.accounting, "ae");
	if (!f) return;
	fprintf(f, "pid=%d\n", getpid());
	for (int i = 0; i < COUNTERS; i++)
		if (state->counters[i].value) fprintf(f, "%s=%llu\n", state->counters[i].name, (unsigned long long)state->counters[i].value);
	fclose(f);
}

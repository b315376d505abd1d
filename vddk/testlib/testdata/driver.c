// Calls functions of a libvixDiskLib.so as its command line says, and prints the results. The
// main thread opens, closes and queries, and another one reads and writes, as the rules demand.
// Comments name the commands that violate a rule.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "vixdisklib.h"

#define ALL(X) \
	X(InitEx) X(Exit) X(GetErrorText) X(FreeErrorText) X(AllocateConnectParams) X(FreeConnectParams) \
	X(ConnectEx) X(Disconnect) X(Open) X(Close) X(GetTransportMode) X(ListTransportModes) X(GetInfo) X(FreeInfo) \
	X(Read) X(Write) X(ReadAsync) X(WriteAsync) X(Wait) X(Flush) X(ReadMetadata) X(GetMetadataKeys) \
	X(PrepareForAccess) X(EndAccess) X(Cleanup) X(Create) X(CheckRepair) X(QueryAllocatedBlocks) X(FreeBlockList)
#define DECLARE(name) static __typeof__(VixDiskLib_##name) *name;
ALL(DECLARE)

enum { MAX_CALLS = 64 };

static bool show_log;
static _Atomic long log_lines, log_bytes;

static void logged(const char *level, const char *fmt, va_list args) {
	char *text = NULL;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
	int n = vasprintf(&text, fmt, args);
#pragma GCC diagnostic pop
	log_lines++;
	log_bytes += n;
	if (show_log) fprintf(stderr, "%s: %.300s\n", level, text);
	free(text);
}

static void log_info(const char *fmt, va_list args) { logged("info", fmt, args); }
static void log_warn(const char *fmt, va_list args) { logged("warn", fmt, args); }
static void log_panic(const char *fmt, va_list args) { logged("panic", fmt, args); }

static int argc, at;
static char **argv;

static char *word(void) {
	if (at == argc) {
		fprintf(stderr, "driver: a word is missing\n");
		exit(2);
	}
	char *w = argv[at++];
	return strcmp(w, "-") ? w : NULL;
}

static uint64_t number(void) { return strtoull(word(), NULL, 0); }

static Connection connection;
static Handle handle, handles[8];
static int handle_count;
static ConnectParams *params;

// A call that the thread for reads and writes makes.
struct task {
	char kind; // 'r', 'w', 'R', 'W' (asynchronous), 'F'lush, 'C' (read, and call from the callback), 'O' (overlapping buffers), 'S'tream
	uint64_t start, count, calls, depth;
	Handle handle;
	VixError result;
	uint64_t sum;
	_Atomic long completions;
	uint64_t latest; // the largest start of a completed request
	bool overtaken;  // a request was completed after one that started later
};

struct part {
	struct task *task;
	uint64_t start;
};

static struct task *current;
static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static void completed(void *data, VixError result) {
	struct part *part = data;
	struct task *t = part->task;
	if (t->kind == 'C') {
		char *text = GetErrorText(result, NULL);
		FreeErrorText(text);
	}
	pthread_mutex_lock(&mu);
	if (result) t->result = result;
	if (part->start < t->latest) t->overtaken = true;
	else t->latest = part->start;
	t->completions++;
	pthread_mutex_unlock(&mu);
}

static double now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

// A slot of a stream: a buffer for one request.
struct slot {
	struct slot *next;
	uint8_t *buffer;
	VixError result;
};

static struct slot *idle;

static void streamed(void *data, VixError result) {
	struct slot *s = data;
	pthread_mutex_lock(&mu);
	if (result) s->result = result;
	s->next = idle;
	idle = s;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&mu);
}

// Reads a range with depth requests in flight.
static void stream(struct task *t) {
	struct slot *slots = calloc(t->depth, sizeof *slots);
	uint8_t *buffers = malloc(t->depth * t->count * 512);
	for (uint64_t i = 0; i < t->depth; i++) {
		slots[i].buffer = buffers + i * t->count * 512;
		streamed(&slots[i], 0);
	}
	for (uint64_t i = 0; i < t->calls; i++) {
		pthread_mutex_lock(&mu);
		while (!idle) pthread_cond_wait(&changed, &mu);
		struct slot *s = idle;
		idle = s->next;
		pthread_mutex_unlock(&mu);
		VixError err = ReadAsync(t->handle, t->start + i * t->count, t->count, s->buffer, streamed, s);
		if (err != VIX_ASYNC) streamed(s, err);
	}
	Wait(t->handle);
	for (uint64_t i = 0; i < t->depth; i++)
		if (slots[i].result) t->result = slots[i].result;
	idle = NULL;
	free(slots);
	free(buffers);
}

static uint64_t checksum(const uint8_t *p, uint64_t n) {
	uint64_t sum = 14695981039346656037u;
	for (uint64_t i = 0; i < n; i++) sum = (sum ^ p[i]) * 1099511628211u;
	return sum;
}

static void run_task(struct task *t) {
	if (t->kind == 'F') {
		t->result = Flush(t->handle);
		return;
	}
	if (t->kind == 'S') {
		stream(t);
		return;
	}
	uint64_t bytes = t->count * 512, calls = t->calls ? t->calls : 1;
	// The fault "overrun" writes after the end of the last buffer.
	uint8_t *buffer = calloc(1, calls * bytes + 4096);
	memset(buffer, 0x77, calls * bytes);
	struct part *parts = calloc(calls, sizeof *parts);
	for (uint64_t i = 0; i < calls; i++) {
		VixError err = VIX_OK;
		uint64_t start = t->start + i * t->count;
		parts[i] = (struct part){ t, start };
		uint8_t *b = t->kind == 'O' ? buffer : buffer + i * bytes;
		switch (t->kind) {
		case 'r': err = Read(t->handle, start, t->count, b); break;
		case 'w': err = Write(t->handle, start, t->count, b); break;
		case 'W': err = WriteAsync(t->handle, start, t->count, b, completed, &parts[i]); break;
		default: err = ReadAsync(t->handle, start, t->count, b, completed, &parts[i]);
		}
		if (err != VIX_OK && err != VIX_ASYNC) t->result = err;
	}
	if (t->kind != 'r' && t->kind != 'w') {
		VixError err = Wait(t->handle);
		if (err) t->result = err;
	}
	t->sum = checksum(buffer, calls * bytes);
	free(buffer);
	free(parts);
}

static void *io_main(void *data) {
	(void)data;
	pthread_mutex_lock(&mu);
	for (;;) {
		while (!current) pthread_cond_wait(&changed, &mu);
		struct task *t = current;
		pthread_mutex_unlock(&mu);
		if (!t->kind) return NULL;
		run_task(t);
		pthread_mutex_lock(&mu);
		current = NULL;
		pthread_cond_broadcast(&changed);
	}
}

static void on_io_thread(struct task *t) {
	pthread_mutex_lock(&mu);
	current = t;
	pthread_cond_broadcast(&changed);
	while (current) pthread_cond_wait(&changed, &mu);
	pthread_mutex_unlock(&mu);
}

// Calls a function on a new thread, to violate rules.
static void *query_main(void *data) {
	(void)data;
	BlockList *list;
	if (!QueryAllocatedBlocks(handle, 0, 128, 128, &list)) FreeBlockList(list);
	return NULL;
}

static void *close_main(void *data) {
	(void)data;
	Close(handle);
	return NULL;
}

static const char *opened;
static uint32_t opened_flags;

static void *open_main(void *data) {
	return (void *)(uintptr_t)Open(connection, opened, opened_flags, data);
}

static void on_thread(void *(*f)(void *), void *data) {
	pthread_t thread;
	pthread_create(&thread, NULL, f, data);
	pthread_join(thread, NULL);
}

static void say(const char *what, VixError err) {
	printf("%s %llu\n", what, (unsigned long long)err);
	fflush(stdout);
}

static char progressed(void *data, int percent) {
	*(int *)data = percent;
	return 1;
}

static ConnectParams stack_params;

static void connect_params(const char *server) {
	if (params && params != &stack_params) FreeConnectParams(params);
	if (AllocateConnectParams) params = AllocateConnectParams();
	else {
		memset(&stack_params, 0, sizeof stack_params);
		params = &stack_params;
	}
	params->serverName = (char *)(uintptr_t)server;
}

static void command(const char *c) {
	if (!strcmp(c, "init")) {
		uint32_t major = (uint32_t)number(), minor = (uint32_t)number();
		char *config = word();
		say(c, InitEx(major, minor, log_info, log_warn, log_panic, NULL, config));
	} else if (!strcmp(c, "local")) {
		connect_params(NULL);
		bool read_only = number();
		say(c, ConnectEx(params, read_only, NULL, NULL, &connection));
	} else if (!strcmp(c, "remote") || !strcmp(c, "cookie")) {
		// SERVER USER PASSWORD|COOKIE THUMBPRINT VM SNAPSHOT MODES PORT NFCPORT
		connect_params(word());
		char *user = word(), *secret = word();
		if (*c == 'r') {
			params->credType = CRED_UID;
			params->creds.uid.userName = user;
			params->creds.uid.password = secret;
		} else {
			params->credType = CRED_SESSIONID;
			params->creds.sessionId.userName = user;
			params->creds.sessionId.cookie = secret;
		}
		params->thumbPrint = word();
		params->vmxSpec = word();
		char *snapshot = word(), *modes = word();
		params->port = (uint32_t)number();
		params->nfcHostPort = (uint32_t)number();
		say(c, ConnectEx(params, 1, snapshot, modes, &connection));
	} else if (!strcmp(c, "prepare")) say(c, PrepareForAccess(params, "driver"));
	else if (!strcmp(c, "endaccess")) say(c, EndAccess(params, "driver"));
	else if (!strcmp(c, "cleanup")) {
		uint32_t cleaned = 99, remaining = 99;
		VixError err = Cleanup(params, &cleaned, &remaining);
		printf("cleanup %llu %u %u\n", (unsigned long long)err, cleaned, remaining);
	} else if (!strcmp(c, "open")) {
		char *path = word();
		uint32_t flags = (uint32_t)number();
		Handle h;
		VixError err = Open(connection, path, flags, &h);
		say(c, err);
		if (!err) handle = handles[handle_count++] = h;
	} else if (!strcmp(c, "openelsewhere")) {
		opened = word();
		opened_flags = (uint32_t)number();
		on_thread(open_main, &handle);
		handles[handle_count++] = handle;
	} else if (!strcmp(c, "opentwo")) { // both at the same time
		opened = word();
		opened_flags = OPEN_READ_ONLY;
		pthread_t thread;
		Handle other;
		pthread_create(&thread, NULL, open_main, &other);
		Open(connection, opened, opened_flags, &handle);
		pthread_join(thread, NULL);
		Close(other);
		handles[handle_count++] = handle;
	} else if (!strcmp(c, "close")) {
		VixError err = Close(handle);
		say(c, err);
		if (!err && handle_count) handle = --handle_count ? handles[handle_count - 1] : NULL;
	} else if (!strcmp(c, "closeagain")) {
		Handle old = handle;
		Close(handle);
		say(c, Close(old));
		handle_count--;
	} else if (!strcmp(c, "closeelsewhere")) {
		on_thread(close_main, NULL);
		handle_count--;
	} else if (!strcmp(c, "queryelsewhere")) on_thread(query_main, NULL);
	else if (!strcmp(c, "closebusy")) {
		static uint8_t buffer[65536];
		static struct task t = { .kind = 'R' };
		static struct part part = { .task = &t };
		ReadAsync(handle, 0, 128, buffer, completed, &part);
		say(c, Close(handle));
		handle_count--;
	} else if (!strcmp(c, "disconnect")) say(c, Disconnect(connection));
	else if (!strcmp(c, "changeparams")) params->serverName[0] ^= 1;
	else if (!strcmp(c, "restoreparams")) params->serverName[0] ^= 1;
	else if (!strcmp(c, "freeparams")) {
		if (FreeConnectParams) FreeConnectParams(params);
		params = NULL;
	} else if (!strcmp(c, "freebad")) {
		FreeConnectParams(&stack_params);
	} else if (!strcmp(c, "fork")) {
		pid_t pid = fork();
		if (!pid) _exit(0);
		waitpid(pid, NULL, 0);
	} else if (!strcmp(c, "transport")) printf("transport %s\n", GetTransportMode(handle));
	else if (!strcmp(c, "modes")) printf("modes %s\n", ListTransportModes());
	else if (!strcmp(c, "info")) {
		Info *info;
		VixError err = GetInfo(handle, &info);
		if (err) say(c, err);
		else {
			printf("info capacity=%llu links=%d adapter=%d parent=%s", (unsigned long long)info->capacity, info->numLinks,
				info->adapterType, info->parentFileNameHint ? "yes" : "no");
			if (AllocateConnectParams) printf(" sector=%u", info->logicalSectorSize);
			printf("\n");
			FreeInfo(info);
		}
	} else if (!strcmp(c, "leakinfo")) {
		Info *info;
		GetInfo(handle, &info);
	} else if (!strcmp(c, "metadata")) {
		char keys[1024], value[1024];
		size_t required;
		VixError err = GetMetadataKeys(handle, NULL, 0, &required);
		printf("metadata %llu", (unsigned long long)err);
		err = GetMetadataKeys(handle, keys, sizeof keys, &required);
		if (err) printf(" %llu", (unsigned long long)err);
		for (char *k = keys; !err && *k; k += strlen(k) + 1)
			if (!ReadMetadata(handle, k, value, sizeof value, &required)) printf(" %s=%s", k, value);
		printf(" %llu\n", (unsigned long long)ReadMetadata(handle, "absent", value, sizeof value, &required));
	} else if (!strcmp(c, "query")) {
		uint64_t start = number(), count = number(), chunk = number();
		BlockList *list;
		VixError err = QueryAllocatedBlocks(handle, start, count, chunk, &list);
		printf("query %llu", (unsigned long long)err);
		if (!err) {
			for (uint32_t i = 0; i < list->numBlocks; i++)
				printf(" %llu+%llu", (unsigned long long)list->blocks[i].offset, (unsigned long long)list->blocks[i].length);
			FreeBlockList(list);
		}
		printf("\n");
	} else if (!strcmp(c, "read") || !strcmp(c, "write")) { // START COUNT
		struct task t = { .kind = *c, .handle = handle };
		t.start = number();
		t.count = number();
		on_io_thread(&t);
		printf("%s %llu %016llx\n", c, (unsigned long long)t.result, (unsigned long long)t.sum);
		fflush(stdout);
	} else if (!strcmp(c, "readhere")) {
		uint8_t buffer[512];
		say(c, Read(handle, 0, 1, buffer));
	} else if (!strcmp(c, "READ") || !strcmp(c, "WRITE") || !strcmp(c, "CALLBACK") || !strcmp(c, "OVERLAP")) { // START COUNT CALLS
		struct task t = { .kind = *c, .handle = handle };
		t.start = number();
		t.count = number();
		t.calls = number();
		on_io_thread(&t);
		printf("%s %llu %016llx %ld %s\n", c, (unsigned long long)t.result, (unsigned long long)t.sum, t.completions,
			t.overtaken ? "overtaken" : "in order");
		fflush(stdout);
	} else if (!strcmp(c, "STREAM")) { // START COUNT CALLS DEPTH; prints the time
		struct task t = { .kind = 'S', .handle = handle };
		t.start = number();
		t.count = number();
		t.calls = number();
		t.depth = number();
		double begin = now();
		on_io_thread(&t);
		double seconds = now() - begin;
		printf("STREAM %llu %.0f MB/s %.1f us\n", (unsigned long long)t.result, (double)(t.calls * t.count * 512) / 1e6 / seconds,
			seconds * 1e6 / (double)t.calls);
		fflush(stdout);
	} else if (!strcmp(c, "flush")) {
		struct task t = { .kind = 'F', .handle = handle };
		on_io_thread(&t);
		say(c, t.result);
	} else if (!strcmp(c, "create")) {
		char *path = word();
		CreateParams p = { .diskType = 1, .adapterType = 3, .hwVersion = 14, .capacity = number() };
		int percent = 0;
		VixError err = Create(connection, path, &p, progressed, &percent);
		printf("create %llu %d\n", (unsigned long long)err, percent);
	} else if (!strcmp(c, "check")) say(c, CheckRepair(connection, word(), 0));
	else if (!strcmp(c, "text")) {
		char *text = GetErrorText(number(), NULL);
		printf("text %s\n", text);
		FreeErrorText(text);
	} else if (!strcmp(c, "hold")) { // prints "hold" and waits for input or the end of it
		printf("hold\n");
		fflush(stdout);
		getchar();
	} else if (!strcmp(c, "alive")) {
		fflush(stdout);
		if (printf("alive\n") < 0 || fflush(stdout)) exit(3);
	} else if (!strcmp(c, "exit")) {
		Exit();
		say(c, 0);
	} else if (!strcmp(c, "log")) show_log = true;
	else if (!strcmp(c, "loglines")) printf("loglines %ld %ld\n", log_lines, log_bytes);
	else {
		fprintf(stderr, "driver: no command %s\n", c);
		exit(2);
	}
}

int main(int count, char **words) {
	argc = count, argv = words, at = 2;
	void *so = count > 1 ? dlopen(words[1], RTLD_NOW) : NULL;
	if (!so) {
		fprintf(stderr, "driver: %s\n", dlerror());
		return 2;
	}
#define LOAD(name) name = (__typeof__(VixDiskLib_##name) *)dlsym(so, "VixDiskLib_" #name);
	ALL(LOAD)
	pthread_t io;
	pthread_create(&io, NULL, io_main, NULL);
	while (at < argc) command(word());
	struct task end = { 0 };
	pthread_mutex_lock(&mu);
	current = &end;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&mu);
	pthread_join(io, NULL);
	return 0;
}

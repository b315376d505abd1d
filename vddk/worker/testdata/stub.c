/* A stand-in for libvixDiskLib, for the tests of the worker program alone. It serves
 * one disk in memory, whose content is a fixed pattern. Environment variables make
 * its functions misbehave. It shares no code with the worker. */
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
typedef uint64_t VixError;
typedef void LogFn(const char *, va_list);
typedef void Callback(void *, VixError);

static LogFn *logs[3];
static pthread_t opener;
static unsigned char *disk;
static uint64_t capacity;
static int in_flight, opened, faults;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static char secret[64];

static const char *env(const char *name)
{
	const char *v = getenv(name);
	return v ? v : "";
}

static void say(int level, const char *fmt, ...)
{
	va_list args;
	va_start(args, fmt);
	logs[level](fmt, args);
	va_end(args);
}

/* Returns whether the environment variable STUB_DO contains the word FUNCTION=DEED,
 * which makes that function misbehave in the way that DEED names. */
static int deed(const char *function, const char *what)
{
	char word[64];
	snprintf(word, sizeof word, " %s=%s ", function, what);
	return strstr(env("STUB_DO"), word) != NULL;
}

static VixError act(const char *function)
{
	if (deed(function, "abort"))
		abort();
	if (deed(function, "segfault"))
		*(volatile int *)8 = 1;
	if (deed(function, "hang")) {
		say(0, "hangs in %s", function);
		for (;;)
			pause();
	}
	if (deed(function, "chat"))
		for (int i = 0; i < 300; i++)
			say(i % 2, "line %d of a request%500s", i, ".");
	if (deed(function, "unread")) /* waits until the worker's socket has data that the worker has not read */
		for (int n = 0; n == 0; usleep(100))
			if (ioctl(3, FIONREAD, &n))
				abort();
	if (deed(function, "tell"))
		say(0, "about to act in %s", function);
	if (deed(function, "panic"))
		say(2, "ASSERT %s:%d bugNr=%d", "stub.c", 42, 7);
	if (deed(function, "closesocket")) {
		shutdown(3, SHUT_RDWR);
		close(3);
	}
	if (deed(function, "print")) {
		printf("printed to stdout\n");
		fprintf(stderr, "half a line of ");
		fprintf(stderr, "stderr\nfree(): invalid pointer");
	}
	if (deed(function, "fail"))
		return 0x100000000ull + 4000;
	return 0;
}

static void broken(const char *rule)
{
	fprintf(stderr, "RULE %s\n", rule);
	faults++;
	abort();
}

static void *chatter(void *arg)
{
	for (int i = 0; i < 2000; i++)
		say((int)(intptr_t)arg, "%s %d", "chatter of a thread %s %n", i);
	return NULL;
}

EXPORT VixError VixDiskLib_InitEx(uint32_t major, uint32_t minor, LogFn *l, LogFn *w, LogFn *p, const char *dir, const char *config)
{
	struct rlimit core;
	logs[0] = l, logs[1] = w, logs[2] = p;
	say(0, "InitEx %u.%u dir=%s config=%s", major, minor, dir, config ? config : "(null)");
	say(0, "LD_LIBRARY_PATH=%s", env("LD_LIBRARY_PATH"));
	getrlimit(RLIMIT_CORE, &core);
	say(0, "dumpable=%d core=%d", prctl(PR_GET_DUMPABLE), (int)core.rlim_max);
	return act("InitEx");
}
EXPORT void VixDiskLib_Exit(void) { act("Exit"); say(0, "Exit"); }
EXPORT char *VixDiskLib_GetErrorText(VixError e, const char *locale)
{
	char *s = malloc(64);
	(void)locale;
	snprintf(s, 64, "stub error %u", (unsigned)(e & 0xffff));
	return s;
}
EXPORT void VixDiskLib_FreeErrorText(char *s) { free(s); }

struct params {
	char *vmx, *server, *thumb;
	long r;
	int type;
	char *creds[3];
	uint32_t port, nfc;
	char rest[64];
};
#ifndef OLD
EXPORT struct params *VixDiskLib_AllocateConnectParams(void) { return calloc(1, 256); }
EXPORT void VixDiskLib_FreeConnectParams(struct params *p) { free(p); }
#endif

EXPORT VixError VixDiskLib_ConnectEx(const struct params *p, char ro, const char *snap, const char *modes, void **c)
{
	opener = pthread_self();
	say(0, "ConnectEx vm=%s server=%s thumb=%s type=%d port=%u nfc=%u ro=%d snap=%s modes=%s creds=%d,%d,%d", p->vmx ? p->vmx : "(null)",
	    p->server ? p->server : "(null)", p->thumb ? p->thumb : "(null)", p->type, p->port, p->nfc, ro, snap ? snap : "(null)",
	    modes ? modes : "(null)", p->creds[0] ? (int)strlen(p->creds[0]) : -1, p->creds[1] ? (int)strlen(p->creds[1]) : -1,
	    p->creds[2] ? (int)strlen(p->creds[2]) : -1);
	if (p->creds[1])
		say(0, "the password is %s!", p->creds[1]);
	*c = secret;
	return act("ConnectEx");
}
EXPORT VixError VixDiskLib_Disconnect(void *c) { (void)c; say(0, "Disconnect"); return act("Disconnect"); }

EXPORT VixError VixDiskLib_Open(void *c, const char *path, uint32_t flags, void **h)
{
	VixError e;
	(void)c;
	say(0, "Open %s flags=%u", path, flags);
	if (!pthread_equal(opener, pthread_self()))
		broken("Open on another thread");
	if ((e = act("Open")))
		return e;
	capacity = *env("STUB_SECTORS") ? strtoull(env("STUB_SECTORS"), NULL, 10) : 16384;
	if (capacity <= 16384) {
		disk = malloc(capacity * 512);
		for (uint64_t i = 0; i < capacity * 64; i++)
			((uint64_t *)disk)[i] = i * 0x9e3779b97f4a7c15ull;
	}
	opened = 1;
	*h = &opened;
	if (*env("STUB_LOG")) {
		size_t n = strtoul(env("STUB_LOG"), NULL, 10);
		char *s = malloc(n + 1);
		pthread_t t[8];
		memset(s, 'x', n);
		s[n] = 0;
		say(1, "long %s", s);
		say(1, "%s", "hostile %s %n %d\n\n\033[31mred\001 \377\376 end");
		say(1, "nul %c after", 0);
		say(1, "stores %hhn here");
		say(1, "%%n is fine: %d%%", 7);
		say(1, NULL);
		for (intptr_t i = 0; i < 8; i++)
			pthread_create(&t[i], NULL, chatter, (void *)(i % 2));
		for (int i = 0; i < 8; i++)
			pthread_join(t[i], NULL);
		free(s);
		if (*env("STUB_LOGGED"))
			fclose(fopen(env("STUB_LOGGED"), "w"));
	}
	return 0;
}
EXPORT VixError VixDiskLib_Close(void *h)
{
	(void)h;
	if (!pthread_equal(opener, pthread_self()))
		broken("Close on another thread");
	pthread_mutex_lock(&lock);
	if (in_flight)
		broken("Close with requests in flight");
	pthread_mutex_unlock(&lock);
	say(0, "Close");
	return act("Close");
}

struct info {
	uint32_t geo[6];
	uint64_t capacity;
	int adapter, links;
	char *parent, *uuid;
	uint32_t logical, physical;
};
EXPORT VixError VixDiskLib_GetInfo(void *h, struct info **out)
{
	struct info *i = calloc(1, sizeof *i);
	(void)h;
	*i = (struct info){{1, 2, 3, 4, 5, 6}, capacity, 3, 2, "parent.vmdk", "60 00 c2", 4096, 4096};
	*out = i;
	return act("GetInfo");
}
EXPORT void VixDiskLib_FreeInfo(struct info *i) { free(i); }
EXPORT const char *VixDiskLib_GetTransportMode(void *h) { (void)h; return "nbdssl"; }
EXPORT const char *VixDiskLib_ListTransportModes(void) { return "file:nbdssl:nbd"; }

EXPORT VixError VixDiskLib_Read(void *h, uint64_t s, uint64_t n, uint8_t *p)
{
	VixError e = act("Read");
	(void)h;
	if (s + n > capacity)
		broken("range");
	if (e)
		return e;
	if (disk)
		memcpy(p, disk + s * 512, n * 512);
	return 0;
}
EXPORT VixError VixDiskLib_Write(void *h, uint64_t s, uint64_t n, const uint8_t *p)
{
	VixError e = act("Write");
	(void)h;
	if (!e)
		memcpy(disk + s * 512, p, n * 512);
	return e;
}

#ifndef OLD
struct job {
	int write;
	uint64_t s, n;
	uint8_t *p;
	Callback *cb;
	void *data;
	struct job *next;
};
static struct job *jobs;
static int started;
static __thread int library_thread;

static void *serve(void *arg)
{
	void *stale = NULL;
	(void)arg;
	library_thread = 1;
	for (;;) {
		struct job *j;
		VixError e;
		pthread_mutex_lock(&lock);
		while (!jobs)
			pthread_cond_wait(&changed, &lock);
		/* The newest job is done first, because the real library completes requests in any order. */
		j = jobs;
		jobs = j->next;
		pthread_mutex_unlock(&lock);
		e = act("Async");
		if (deed("Async", "slow"))
			usleep(2000);
		if (deed("Async", "stale") && stale) { /* completes the previous request once more */
			j->cb(stale, 0);
			usleep(200000);
		}
		stale = j->data;
		if (!e)
			e = j->write ? VixDiskLib_Write(NULL, j->s, j->n, j->p) : VixDiskLib_Read(NULL, j->s, j->n, j->p);
		pthread_mutex_lock(&lock);
		in_flight--;
		pthread_cond_broadcast(&changed);
		pthread_mutex_unlock(&lock);
		j->cb(j->data, e);
		if (deed("Async", "twice"))
			j->cb(j->data, e);
		free(j);
	}
	return NULL;
}
static VixError queue(int write, uint64_t s, uint64_t n, uint8_t *p, Callback *cb, void *data)
{
	struct job *j = malloc(sizeof *j);
	pthread_t t;
	VixError e = act("Queue");
	if (e || library_thread) {
		free(j);
		if (library_thread)
			broken("call from a completion");
		return e;
	}
	if (pthread_equal(opener, pthread_self()))
		broken("I/O on the thread of Open");
	*j = (struct job){write, s, n, p, cb, data, NULL};
	pthread_mutex_lock(&lock);
	if (!started++)
		pthread_create(&t, NULL, serve, NULL);
	j->next = jobs;
	jobs = j;
	in_flight++;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	return deed("Queue", "zero") ? 0 : 25000;
}
EXPORT VixError VixDiskLib_ReadAsync(void *h, uint64_t s, uint64_t n, uint8_t *p, Callback *cb, void *d) { (void)h; return queue(0, s, n, p, cb, d); }
EXPORT VixError VixDiskLib_WriteAsync(void *h, uint64_t s, uint64_t n, const uint8_t *p, Callback *cb, void *d) { (void)h; return queue(1, s, n, (uint8_t *)(uintptr_t)p, cb, d); }
EXPORT VixError VixDiskLib_Wait(void *h)
{
	(void)h;
	pthread_mutex_lock(&lock);
	while (in_flight)
		pthread_cond_wait(&changed, &lock);
	pthread_mutex_unlock(&lock);
	return act("Wait");
}
EXPORT VixError VixDiskLib_Flush(void *h) { (void)h; say(0, "Flush"); return act("Flush"); }

struct list {
	uint32_t n;
	struct { uint64_t off, len; } b[];
};
EXPORT VixError VixDiskLib_QueryAllocatedBlocks(void *h, uint64_t s, uint64_t n, uint64_t chunk, struct list **out)
{
	VixError e = act("Query");
	uint64_t chunks = n / chunk;
	struct list *l = malloc(8 + 16 * (chunks + 1));
	(void)h;
	if (!pthread_equal(opener, pthread_self()))
		broken("Query on another thread");
	if (s % chunk || n % chunk || s + n > capacity)
		broken("Query's range");
	l->n = 0;
	if (deed("Query", "beyond")) {
		l->b[l->n].off = s + n;
		l->b[l->n++].len = chunk;
	} else if (deed("Query", "many")) {
		l->n = 0xfffffff0;
	} else {
		for (uint64_t i = 0; i < chunks; i++) /* every second chunk of the disk is allocated, beginning with the first */
			if ((s / chunk + i) % 2 == 0) {
				l->b[l->n].off = s + i * chunk;
				l->b[l->n++].len = chunk;
			}
	}
	*out = l;
	return e;
}
EXPORT VixError VixDiskLib_FreeBlockList(struct list *l) { free(l); return 0; }
EXPORT VixError VixDiskLib_PrepareForAccess(const void *p, const char *id) { (void)p; say(0, "PrepareForAccess %s", id); return act("PrepareForAccess"); }
EXPORT VixError VixDiskLib_EndAccess(const void *p, const char *id) { (void)p; say(0, "EndAccess %s", id); return act("EndAccess"); }
EXPORT VixError VixDiskLib_Cleanup(const struct params *p, uint32_t *c, uint32_t *r) { say(0, "Cleanup %s", p->server); *c = 3; *r = 1; return act("Cleanup"); }
#endif

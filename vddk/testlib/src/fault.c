// Makes calls fail as the script says.
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>
#include "testlib.h"

_Atomic bool descriptors_closed;

static bool hits(const struct fault *f, const struct call *c) {
	uint64_t first, last;
	switch (f->position) {
	case RANGE: first = f->first, last = f->last; break;
	case FIRST: first = last = 0; break;
	case MIDDLE: first = last = c->capacity / 2; break;
	case LAST: first = last = c->capacity - 1; break;
	default: return true;
	}
	return c->count && c->start <= last && first <= c->start + c->count - 1;
}

// Returns the fault for a call, or NULL. Each fault counts the calls that it matches, even if
// another fault is returned.
struct fault *fault_find(const struct call *c) {
	struct fault *found = NULL;
	for (int i = 0; i < conf.fault_count; i++) {
		struct fault *f = &conf.faults[i];
		if (!f->functions[c->fn] || !hits(f, c)) continue;
		uint64_t n = ++f->seen;
		if (f->global) n = fault_seen(i);
		if (found || (f->at && n != f->at) || n < f->from || (f->every && n % f->every)) continue;
		if (fault_fire(i, f->times)) found = f;
	}
	return found;
}

// Returns whether a fault acts after the data was read or written, because it changes memory.
bool fault_after(const struct fault *f) {
	return f && (f->action == DO_OVERRUN || f->action == DO_UNDERRUN || f->action == DO_CORRUPT);
}

static void corrupt_heap(void) {
	// Overwrites the sizes that malloc keeps between blocks, and then frees the blocks, so
	// that malloc notices it, as it would after an overrun of the library.
	char *volatile block[8];
	for (int i = 0; i < 8; i++) block[i] = malloc(200);
	for (int i = 0; i < 8; i++) {
		volatile char *p = block[i];
		for (int j = -16; j < 232; j++) p[j] = (char)0xee;
	}
	for (int i = 0; i < 8; i++) free(block[i]);
}

VixError fault_act(struct fault *f, const struct call *c) {
	if (f->log && f->action != DO_PANIC) log_warn("%s", f->log);
	switch (f->action) {
	case DO_FAIL:
		log_warn("VixDiskLib: VixDiskLib_%s: Failed with error %llu (scripted).", function_names[c->fn], (unsigned long long)f->code);
		return f->code;
	case DO_HANG:
		for (;;) pause();
	case DO_DELAY:
		sleep_until(now_ns() + f->ms * 1000000);
		return VIX_OK;
	case DO_ABORT:
		abort();
	case DO_SEGV:
		signal(SIGSEGV, SIG_DFL);
		volatile int *volatile nowhere = (volatile int *)(uintptr_t)8;
		*nowhere = 1;
		return VIX_OK;
	case DO_EXIT:
		_exit((int)f->code);
	case DO_KILL:
		kill(getpid(), SIGKILL);
		for (;;) pause();
	case DO_CLOSEFDS:
		descriptors_closed = true;
		state_forget_files();
		struct rlimit limit;
		getrlimit(RLIMIT_NOFILE, &limit);
		for (int fd = 0; fd < (int)(limit.rlim_cur < 4096 ? limit.rlim_cur : 4096); fd++) close(fd);
		return VIX_OK;
	case DO_HEAP:
		corrupt_heap();
		return VIX_OK;
	case DO_PANIC:
		log_panic("%s", f->log ? f->log : "ASSERT bora/lib/nfclib/testlib.c:42 bugNr=0");
		abort();
	case DO_OVERRUN:
		if (c->buffer) memset(c->buffer + c->count * SECTOR, 0xee, 4096);
		return VIX_OK;
	case DO_UNDERRUN:
		if (c->buffer) memset(c->buffer - 4096, 0xee, 4096);
		return VIX_OK;
	case DO_CORRUPT:
		if (c->buffer && c->count) memset(c->buffer, 0xee, SECTOR);
		return VIX_OK;
	default:
		return VIX_OK;
	}
}

VixError fault_check(enum function fn) {
	struct call c = { .fn = fn };
	struct fault *f = fault_find(&c);
	return f ? fault_act(f, &c) : VIX_OK;
}

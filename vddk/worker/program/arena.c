/* The slots are memory that the parent maps, too. The library reads into them and
 * writes from them. In this process each slot lies between pages that cannot be
 * accessed: if the library writes outside of its buffer, the process ends, and the
 * data of other requests stays intact. */
#include "worker.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct arena arena;

enum { GUARD = 64 * 1024 }; /* bytes that cannot be accessed, before the first slot and after each slot */

static size_t stride(void) { return (size_t)arena.slot_size + GUARD; }

static size_t arena_bytes(void) { return GUARD + arena.slots * stride(); }

uint8_t *arena_slot(uint32_t slot) { return arena.memory + GUARD + slot * stride(); }

void arena_map(uint32_t slots, uint32_t slot_size)
{
	arena.slots = slots;
	arena.slot_size = slot_size;
	arena.memory = mmap(NULL, arena_bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (arena.memory == MAP_FAILED)
		die("cannot reserve addresses for the shared memory: %s", strerror(errno));
	for (uint32_t i = 0; i < slots; i++) {
		if (mmap(arena_slot(i), slot_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, ARENA_FD, (off_t)i * slot_size) == MAP_FAILED)
			die("cannot map the shared memory: %s", strerror(errno));
	}
	close(ARENA_FD);
}

/* Handles SIGSEGV: tells the parent if a page between the slots was accessed, and
 * then lets the signal end the process. */
static void on_fault(int number, siginfo_t *info, void *unused)
{
	uint8_t *at = info->si_addr;

	(void)unused;
	signal(number, SIG_DFL); /* the access is repeated after the handler, and then ends the process */
	if (arena.memory && at >= arena.memory && at < arena.memory + arena_bytes()) {
		size_t off = (size_t)(at - arena.memory), in = off < GUARD ? 0 : (off - GUARD) % stride();

		if (off < GUARD || in >= arena.slot_size)
			say_fatal("the library accessed memory outside of the buffer that it was given");
	}
}

void arena_watch(void)
{
	struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};

	sigaction(SIGSEGV, &action, NULL);
}

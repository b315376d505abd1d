/* What the files of the worker share. worker.c tells who runs when. */
#ifndef WORKER_H
#define WORKER_H

#include <stdatomic.h>

#include "message.h"
#include "vddk.h"

/* The library, filled before anything of it is called. */
extern struct vddk vddk;

/* The memory shared with the parent: slots with memory between them that nobody
 * may access. Fixed once MSG_INIT was answered. */
struct arena {
	uint8_t *memory;
	uint32_t slots, slot_size;
};
extern struct arena arena;

/* arena.c */
void arena_map(uint32_t slots, uint32_t slot_size);
uint8_t *arena_slot(uint32_t slot);
void arena_watch(void);

/* The open disk. The main thread fills it and then stores handle; the I/O
 * thread takes handle away before the main thread closes it. */
struct disk {
	_Atomic(Handle) handle; /* NULL: not open, or no more */
	uint64_t capacity;      /* sectors */
	int writable;
};
extern struct disk disk;

/* worker.c */
void control_hand_over(const struct packet *request);
void send_packet(const struct packet *packet);
void send_text(uint32_t slot, VixError code);
void wipe(void *memory, size_t bytes);

/* io.c */
void *io_thread(void *unused);

/* log.c */
void log_start(void);
LogFn log_info, log_warning, log_panic;
/* Tells the parent why the process ends; die also ends it. */
void say_fatal(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void die(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#endif

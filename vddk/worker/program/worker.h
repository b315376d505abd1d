/* The declarations that the files of the worker share. worker.c describes the
 * threads. */
#ifndef WORKER_H
#define WORKER_H

#include <stdatomic.h>

#include "message.h"
#include "vddk.h"

/* The functions of the library, set by MSG_INIT. */
extern struct vddk vddk;

/* The slots, memory that is shared with the parent. Pages between them cannot be
 * accessed. The arena does not change after MSG_INIT was answered. */
struct arena {
	uint8_t *memory;
	uint32_t slots, slot_size;
};
extern struct arena arena;

/* arena.c */
void arena_map(uint32_t slots, uint32_t slot_size);
uint8_t *arena_slot(uint32_t slot);
void arena_watch(void);

/* The open disk. The main thread sets the other fields and then stores handle. The
 * I/O thread sets handle to NULL before the main thread closes the disk. */
struct disk {
	_Atomic(Handle) handle; /* NULL while no disk is open */
	uint64_t capacity;      /* sectors */
	int writable;
};
extern struct disk disk;

/* worker.c. control_hand_over passes a request to the main thread; wipe overwrites
 * memory with zeros. */
void control_hand_over(const struct packet *request);
void send_packet(const struct packet *packet);
void send_text(uint32_t slot, VixError code);
void wipe(void *memory, size_t bytes);

/* io.c */
void *io_thread(void *unused);

/* log.c */
void log_start(void);
LogFn log_info, log_warning, log_panic;
/* say_fatal sends the parent the reason why the process ends. die also ends it. */
void say_fatal(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void die(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#endif

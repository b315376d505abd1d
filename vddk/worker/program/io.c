/* The I/O thread: it receives every message, reads and writes, and hands
 * everything else to the main thread. */
#include "worker.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* A request that the library has. The library gives it back through the
 * callback's data pointer, so its address must stay valid whatever comes. */
struct request {
	uint32_t slot;
	atomic_int busy;
};

/* Each slot has several, in turn: a request that is completed twice must not
 * complete the next one of its slot, whose data has not come. */
enum { TURNS = 256 };
static struct request requests[MAX_SLOTS][TURNS];
static struct slot {
	atomic_int busy;
	unsigned turn; /* of the I/O thread's alone */
} slots[MAX_SLOTS];

/* Requests without a completion, counted for Close. */
static struct {
	pthread_mutex_t lock;
	pthread_cond_t none;
	unsigned count;
} in_flight = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0};

/* Tells the parent. On a thread of the library's it must not call the library:
 * the parent asks for an error's text by MSG_TEXT. */
static void complete(struct request *r, VixError result)
{
	struct message done = {.kind = MSG_DONE, .slot = r->slot, .sector = result};
	ssize_t n;

	/* Free before the parent knows: it may use the slot again at once. */
	if (!atomic_exchange(&r->busy, 0))
		die("the library completed a request twice");
	atomic_store(&slots[r->slot].busy, 0);
	do
		n = send(SOCKET_FD, &done, sizeof done, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		_exit(0); /* no parent, no work */
	pthread_mutex_lock(&in_flight.lock);
	if (--in_flight.count == 0)
		pthread_cond_signal(&in_flight.none);
	pthread_mutex_unlock(&in_flight.lock);
}

static void on_completion(void *data, VixError result)
{
	int saved = errno;

	complete(data, result);
	errno = saved;
}

static void transfer(const struct message *m)
{
	Handle handle = atomic_load(&disk.handle);
	uint8_t *memory;
	struct request *r;
	VixError err;
	int async;

	if (!handle)
		die("a read or write without an open disk");
	if (m->slot >= arena.slots || m->sectors > arena.slot_size / SECTOR)
		die("a read or write outside of the slots: %u, %llu sectors", m->slot, (unsigned long long)m->sectors);
	memory = arena_slot(m->slot);
	if (m->sector + m->sectors > disk.capacity)
		die("a read or write outside of the disk: sector %llu", (unsigned long long)m->sector);
	if (m->kind == MSG_WRITE && !disk.writable)
		die("a write to a disk opened read-only");
	if (atomic_exchange(&slots[m->slot].busy, 1))
		die("a second request in slot %u", m->slot);
	r = &requests[m->slot][slots[m->slot].turn++ % TURNS];
	r->slot = m->slot;
	atomic_store(&r->busy, 1);
	pthread_mutex_lock(&in_flight.lock);
	in_flight.count++;
	pthread_mutex_unlock(&in_flight.lock);

	/* Wait comes later than the asynchronous calls (6.0, 6.5), and closing
	 * needs it. */
	async = vddk.Wait && (m->kind == MSG_READ ? vddk.ReadAsync != NULL : vddk.WriteAsync != NULL);
	if (m->kind == MSG_READ) {
		err = async ? vddk.ReadAsync(handle, m->sector, m->sectors, memory, on_completion, r)
			    : vddk.Read(handle, m->sector, m->sectors, memory);
	} else if (async) {
		err = vddk.WriteAsync(handle, m->sector, m->sectors, memory, on_completion, r);
	} else {
		err = vddk.Write ? vddk.Write(handle, m->sector, m->sectors, memory) : VIX_NOT_SUPPORTED;
	}
	if (async && (err & 0xffff) == VIX_ASYNC)
		return;
	if (async && err == VIX_OK) /* whether a completion follows nobody says: neither guess is safe */
		die("the library neither queued nor refused an asynchronous request");
	complete(r, err);
}

/* Returns when the library has completed everything. */
static void drain(Handle handle)
{
	if (vddk.Wait)
		vddk.Wait(handle); /* each completion has its own result */
	pthread_mutex_lock(&in_flight.lock);
	while (in_flight.count)
		pthread_cond_wait(&in_flight.none, &in_flight.lock);
	pthread_mutex_unlock(&in_flight.lock);
}

static void flush(void)
{
	Handle handle = atomic_load(&disk.handle);
	VixError err = VIX_NOT_SUPPORTED;

	if (!handle)
		die("a flush without an open disk");
	if (vddk.Flush) {
		/* Flush's word about requests in flight is not clear: there are none. */
		if (vddk.Wait)
			vddk.Wait(handle);
		err = vddk.Flush(handle);
	}
	struct message done = {.kind = MSG_DONE, .slot = SLOT_FLUSH, .sector = err};
	if (send(SOCKET_FD, &done, sizeof done, MSG_NOSIGNAL) < 0)
		_exit(0);
}

void *io_thread(void *unused)
{
	static struct packet inbox;
	const char *why;

	(void)unused;
	for (;;) {
		ssize_t n = recv(SOCKET_FD, &inbox, sizeof inbox, MSG_TRUNC);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			_exit(0);
		if (!request_valid(&inbox, (size_t)n, &why))
			die("the parent sent a message with %s (kind %u, %zd bytes)", why, inbox.head.kind, n);
		switch (inbox.head.kind) {
		case MSG_READ:
		case MSG_WRITE:
			transfer(&inbox.head);
			break;
		case MSG_FLUSH:
			flush();
			break;
		case MSG_TEXT:
			send_text(inbox.head.slot, inbox.head.sector);
			break;
		case MSG_CLOSE: {
			Handle handle = atomic_exchange(&disk.handle, NULL);

			if (handle)
				drain(handle);
			control_hand_over(&inbox);
			break;
		}
		default:
			control_hand_over(&inbox);
			wipe(inbox.payload, inbox.head.length);
		}
	}
}

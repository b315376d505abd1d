/* The I/O thread receives all messages. It carries out reads, writes and flushes,
 * and passes other requests to the main thread. */
#include "worker.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* A read or write of the library. Its address is the data pointer of the callback,
 * and must stay valid even if the library calls back too often. */
struct request {
	uint32_t slot;
	atomic_int busy;
};

/* Each slot uses several requests one after the other. If the library completes a
 * request twice, the second completion must not be taken for that of the slot's
 * next request, whose data has not arrived. */
enum { TURNS = 256 };
static struct request requests[MAX_SLOTS][TURNS];
static struct slot {
	atomic_int busy;
	unsigned turn; /* the next request of the slot; used only by the I/O thread */
} slots[MAX_SLOTS];

/* The number of requests without a completion, which closing the disk waits for. */
static struct {
	pthread_mutex_t lock;
	pthread_cond_t none;
	unsigned count;
} in_flight = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0};

/* Sends the result of a request to the parent. It may run on a thread of the
 * library, where calls to the library are not allowed. Therefore the parent asks
 * for the text of an error by MSG_TEXT. */
static void complete(struct request *r, VixError result)
{
	struct message done = {.kind = MSG_DONE, .slot = r->slot, .sector = result};
	ssize_t n;

	/* The slot must be free before the parent gets the result and uses it again. */
	if (!atomic_exchange(&r->busy, 0))
		die("the library completed a request twice");
	atomic_store(&slots[r->slot].busy, 0);
	do
		n = send(SOCKET_FD, &done, sizeof done, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		_exit(0); /* the parent has ended */
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

/* Carries out MSG_READ and MSG_WRITE. */
static void transfer(const struct message *m)
{
	Handle handle = atomic_load(&disk.handle);
	uint8_t *memory;
	struct request *r;
	VixError err;
	int async;

	if (!handle)
		die("the parent sent a read or write, but no disk is open");
	if (m->slot >= arena.slots || m->sectors > arena.slot_size / SECTOR)
		die("the parent sent a read or write of %llu sectors with slot %u, but there are only %u slots of %u sectors",
		    (unsigned long long)m->sectors, m->slot, arena.slots, arena.slot_size / SECTOR);
	memory = arena_slot(m->slot);
	if (m->sector + m->sectors > disk.capacity)
		die("the parent sent a read or write outside of the disk, at sector %llu", (unsigned long long)m->sector);
	if (m->kind == MSG_WRITE && !disk.writable)
		die("the parent sent a write to a disk that is opened read-only");
	if (atomic_exchange(&slots[m->slot].busy, 1))
		die("the parent sent a second request for slot %u", m->slot);
	r = &requests[m->slot][slots[m->slot].turn++ % TURNS];
	r->slot = m->slot;
	atomic_store(&r->busy, 1);
	pthread_mutex_lock(&in_flight.lock);
	in_flight.count++;
	pthread_mutex_unlock(&in_flight.lock);

	/* Closing needs Wait, which VDDK has since 6.5. The asynchronous calls, which it
	 * has since 6.0, are used only together with Wait. */
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
	if (async && err == VIX_OK) /* it is not specified whether a completion follows */
		die("the library neither queued nor refused an asynchronous request");
	complete(r, err);
}

/* Waits until the library has completed all requests. */
static void drain(Handle handle)
{
	if (vddk.Wait)
		vddk.Wait(handle); /* its result does not matter, because each completion has its own */
	pthread_mutex_lock(&in_flight.lock);
	while (in_flight.count)
		pthread_cond_wait(&in_flight.none, &in_flight.lock);
	pthread_mutex_unlock(&in_flight.lock);
}

/* Carries out MSG_FLUSH. */
static void flush(void)
{
	Handle handle = atomic_load(&disk.handle);
	VixError err = VIX_NOT_SUPPORTED;

	if (!handle)
		die("the parent sent a flush, but no disk is open");
	if (vddk.Flush) {
		/* It is not specified whether Flush covers requests in flight, so there must be
		 * none. */
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

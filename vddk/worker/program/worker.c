/* vddkcp-vddk-worker loads libvixDiskLib and opens one disk. vddkcp starts it and
 * sends it requests over a socket (message.h, messages.go). The worker ends when
 * the other end of the socket is closed.
 *
 * It has three threads, because the library restricts which thread may make which
 * call. The main thread makes all calls except reads, writes and flushes
 * (worker.c). The I/O thread receives messages, reads, writes and flushes (io.c).
 * The watcher ends the process with its parent, even if a call of the library
 * hangs. The library calls back for completions and log lines on threads of its
 * own (io.c, log.c). */
#include "worker.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

struct vddk vddk;
struct disk disk;

/* The next request for the main thread. */
static struct {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	int full;
	struct packet request;
} control = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

/* The answer that the main thread is composing. */
static struct packet answer;

/* The state of the library, which only the main thread uses. The strings of the
 * connection's parameters, and so the secrets, must stay valid until the
 * connection ends. */
static struct {
	int initialised;
	uint32_t version;
	uint8_t *login; /* a copy of the payload of the request that logs in */
	size_t login_length;
	const char *strings[LOGIN_STRINGS];
	struct login_numbers numbers;
	ConnectParams *params;
	ConnectParams own_params;
	int connected, opened;
	Connection connection;
	Handle handle;
} session;

void wipe(void *memory, size_t bytes)
{
	memset(memory, 0, bytes);
	__asm__ volatile("" : : "r"(memory) : "memory"); /* keeps the compiler from removing the memset */
}

void control_hand_over(const struct packet *request)
{
	pthread_mutex_lock(&control.lock);
	if (control.full)
		die("the parent sent a request before the last one was answered");
	memcpy(&control.request, request, sizeof request->head + request->head.length);
	control.full = 1;
	pthread_cond_signal(&control.changed);
	pthread_mutex_unlock(&control.lock);
}

void send_packet(const struct packet *packet)
{
	size_t bytes = sizeof packet->head + packet->head.length;
	ssize_t n;

	do
		n = send(SOCKET_FD, packet, bytes, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	if (n < 0) {
		if (errno == EPIPE || errno == ECONNRESET)
			_exit(0); /* the parent has ended */
		die("cannot send %zu bytes to the parent: %s", bytes, strerror(errno));
	}
}

/* Appends the text that the library has for an error code. */
static void text_append(struct packet *packet, VixError code)
{
	char *text = vddk.GetErrorText ? vddk.GetErrorText(code, NULL) : NULL;

	string_append(packet, text);
	if (text && vddk.FreeErrorText)
		vddk.FreeErrorText(text);
}

/* Answers MSG_TEXT. The I/O thread calls it. */
void send_text(uint32_t slot, VixError code)
{
	static struct packet reply;

	reply.head = (struct message){.kind = MSG_DONE, .slot = slot, .sector = code};
	text_append(&reply, code);
	send_packet(&reply);
}

static void answer_start(void)
{
	answer.head = (struct message){.kind = MSG_DONE, .slot = SLOT_CONTROL};
}

static void answer_error(const char *function, VixError code)
{
	answer_start();
	answer.head.sector = code;
	if (code != VIX_OK) {
		string_append(&answer, function);
		text_append(&answer, code);
	}
	send_packet(&answer);
}

static void answer_fault(const char *what, const char *text)
{
	answer_start();
	answer.head.flags = DONE_FAULT;
	string_append(&answer, what);
	string_append(&answer, text);
	send_packet(&answer);
}

/* Finds the functions of the library and returns a bit for each that exists.
 * complete is 0 if a required function is missing. */
static uint64_t functions_find(void *library, int *complete)
{
	uint64_t found = 0, bit = 1;

	*complete = 1;
	/* ISO C cannot convert a pointer to an object into one to a function, POSIX can. */
#define X(needed, result, name, arguments) \
	*(void **)&vddk.name = dlsym(library, "VixDiskLib_" #name); \
	if (vddk.name) \
		found |= bit; \
	else if (needed) \
		*complete = 0; \
	bit <<= 1;
	VDDK_FUNCTIONS(X)
#undef X
	return found;
}

static void init(const struct packet *request)
{
	const char *strings[INIT_STRINGS];
	struct init_numbers n;
	uint64_t functions;
	void *library;
	int complete;
	VixError err;

	if (arena.memory)
		die("the parent sent the request \"init\" twice");
	if (!strings_split(request->payload, request->head.length, sizeof n, strings, INIT_STRINGS))
		die("the strings of the request \"init\" are malformed");
	memcpy(&n, request->payload, sizeof n);
	arena_map(n.slots, n.slot_size);
	session.version = n.version;

	library = dlopen(strings[INIT_LIBRARY], RTLD_NOW);
	if (!library) {
		const char *why = dlerror();

		answer_fault("dlopen", why ? why : "unknown reason");
		return;
	}
	functions = functions_find(library, &complete);
	if (!complete) {
		answer_start();
		answer.head.flags = DONE_FAULT;
		answer.head.sectors = functions;
		string_append(&answer, "dlsym");
		string_append(&answer, "functions are missing");
		send_packet(&answer);
		return;
	}
	/* A library refuses a version that is newer than its own. The worker needs no
	 * change of the interface after 6.5. */
	err = n.version >= 7 ? vddk.InitEx(6, 5, log_info, log_warning, log_panic, strings[INIT_ROOT], strings[INIT_CONFIG_FILE])
			     : vddk.InitEx(5, 5, log_info, log_warning, log_panic, strings[INIT_ROOT], strings[INIT_CONFIG_FILE]);
	if (err != VIX_OK) {
		answer_error("VixDiskLib_InitEx", err);
		return;
	}
	session.initialised = 1;
	answer_start();
	answer.head.sectors = functions;
	string_append(&answer, vddk.ListTransportModes ? vddk.ListTransportModes() : NULL);
	send_packet(&answer);
}

/* Frees the parameters of the connection and wipes all secrets in them. */
static void login_end(void)
{
	if (session.params && session.params != &session.own_params && vddk.FreeConnectParams) {
		/* The strings belong to the worker, so the library must not free them. */
		ConnectParams *p = session.params;

		p->vmxSpec = p->serverName = p->thumbPrint = NULL;
		memset(&p->creds, 0, sizeof p->creds);
		vddk.FreeConnectParams(p);
	}
	session.params = NULL;
	wipe(&session.own_params, sizeof session.own_params);
	if (session.login) {
		wipe(session.login, session.login_length);
		free(session.login);
		session.login = NULL;
	}
}

/* Removes const, because the types of the library lack it. The library does not
 * write to the strings. */
static char *as_char(const char *s)
{
	return (char *)(uintptr_t)s;
}

/* Sets the parameters of the connection from a request. Returns 0 if there is not
 * enough memory. */
static int login_start(struct packet *request)
{
	const char **s = session.strings;
	ConnectParams *p;

	session.login_length = request->head.length;
	session.login = malloc(session.login_length);
	if (!session.login)
		return 0;
	memcpy(session.login, request->payload, session.login_length);
	wipe(request->payload, request->head.length);
	if (!strings_split(session.login, session.login_length, sizeof session.numbers, s, LOGIN_STRINGS))
		die("the strings of a request that logs in are malformed");
	memcpy(&session.numbers, session.login, sizeof session.numbers);

	p = vddk.AllocateConnectParams ? vddk.AllocateConnectParams() : &session.own_params;
	session.params = p;
	if (!p)
		return 0;
	if (!s[LOGIN_SERVER])
		return 1; /* a local disk needs no parameters */
	p->vmxSpec = as_char(s[LOGIN_VMX_SPEC]);
	p->serverName = as_char(s[LOGIN_SERVER]);
	p->thumbPrint = as_char(s[LOGIN_THUMBPRINT]);
	if (s[LOGIN_COOKIE]) {
		p->credType = CREDENTIALS_SESSION_ID;
		p->creds.sessionId.cookie = as_char(s[LOGIN_COOKIE]);
		p->creds.sessionId.userName = as_char(s[LOGIN_USER]);
		p->creds.sessionId.key = as_char(s[LOGIN_PASSWORD]);
	} else {
		p->credType = CREDENTIALS_UID;
		p->creds.uid.userName = as_char(s[LOGIN_USER]);
		p->creds.uid.password = as_char(s[LOGIN_PASSWORD]);
	}
	p->port = session.numbers.port;
	p->nfcHostPort = session.numbers.nfc_port;
	return 1;
}

/* Answers MSG_OPEN. After an error, session_end undoes the steps before it, so
 * that the parent gets the reason even if disconnecting hangs. */
static void open_disk(struct packet *request)
{
	struct opened_numbers n = {0};
	Info *info = NULL;
	VixError err;

	if (session.login)
		die("the parent sent a second request that logs in");
	if (!login_start(request)) {
		answer_fault("VixDiskLib_AllocateConnectParams", "out of memory");
		return;
	}
	err = vddk.ConnectEx(session.params, (char)(session.numbers.read_only != 0), session.strings[LOGIN_SNAPSHOT],
			     session.strings[LOGIN_TRANSPORTS], &session.connection);
	if (err != VIX_OK) {
		answer_error("VixDiskLib_ConnectEx", err);
		return;
	}
	session.connected = 1;
	err = vddk.Open(session.connection, session.strings[LOGIN_PATH], session.numbers.flags, &session.handle);
	if (err != VIX_OK) {
		answer_error("VixDiskLib_Open", err);
		return;
	}
	session.opened = 1;
	err = vddk.GetInfo(session.handle, &info);
	if (err != VIX_OK) {
		answer_error("VixDiskLib_GetInfo", err);
		return;
	}
	if (!info || !session.handle) {
		answer_fault("VixDiskLib_GetInfo", "the call succeeded without a result");
		return;
	}
	n.capacity = info->capacity;
	n.bios[0] = info->biosGeo.cylinders;
	n.bios[1] = info->biosGeo.heads;
	n.bios[2] = info->biosGeo.sectors;
	n.physical[0] = info->physGeo.cylinders;
	n.physical[1] = info->physGeo.heads;
	n.physical[2] = info->physGeo.sectors;
	n.adapter = info->adapterType;
	n.links = info->numLinks;
	if (session.version >= 7) {
		n.logical_sector = info->logicalSectorSize;
		n.physical_sector = info->physicalSectorSize;
	}
	answer_start();
	memcpy(answer.payload, &n, sizeof n);
	answer.head.length = sizeof n;
	string_append(&answer, info->parentFileNameHint);
	string_append(&answer, info->uuid);
	string_append(&answer, vddk.GetTransportMode ? vddk.GetTransportMode(session.handle) : NULL);
	vddk.FreeInfo(info);

	disk.capacity = n.capacity;
	disk.writable = !session.numbers.read_only;
	atomic_store(&disk.handle, session.handle);
	send_packet(&answer);
}

/* Answers MSG_CLEANUP, MSG_PREPARE_ACCESS and MSG_END_ACCESS. They concern the
 * whole VM, whose disks are or were open in other workers. */
static void call_for_vm(struct packet *request)
{
	uint32_t cleaned = 0, remaining = 0, kind = request->head.kind;
	const char *function = kind == MSG_CLEANUP ? "VixDiskLib_Cleanup" : kind == MSG_PREPARE_ACCESS ? "VixDiskLib_PrepareForAccess" : "VixDiskLib_EndAccess";
	VixError err = VIX_NOT_SUPPORTED;

	if (session.login)
		die("the parent sent a request for %s in a worker that has logged in", function);
	if (!login_start(request)) {
		answer_fault("VixDiskLib_AllocateConnectParams", "out of memory");
		login_end();
		return;
	}
	if (kind == MSG_CLEANUP && vddk.Cleanup)
		err = vddk.Cleanup(session.params, &cleaned, &remaining);
	if (kind == MSG_PREPARE_ACCESS && vddk.PrepareForAccess && vddk.EndAccess)
		err = vddk.PrepareForAccess(session.params, session.strings[LOGIN_IDENTITY]);
	if (kind == MSG_END_ACCESS && vddk.EndAccess)
		err = vddk.EndAccess(session.params, session.strings[LOGIN_IDENTITY]);
	login_end();
	if (err != VIX_OK) {
		answer_error(function, err);
		return;
	}
	answer_start();
	answer.head.sectors = (uint64_t)remaining << 32 | cleaned;
	send_packet(&answer);
}

/* Answers MSG_QUERY. */
static void query(const struct message *m)
{
	BlockList *list = NULL;
	uint64_t chunks = m->sectors / m->flags;
	VixError err = VIX_NOT_SUPPORTED;

	if (!session.opened)
		die("the parent sent a query, but no disk is open");
	if (m->sector + m->sectors > disk.capacity)
		die("the parent sent a query outside of the disk, at sector %llu", (unsigned long long)m->sector);
	if (vddk.QueryAllocatedBlocks && vddk.FreeBlockList)
		err = vddk.QueryAllocatedBlocks(session.handle, m->sector, m->sectors, m->flags, &list);
	if (err != VIX_OK) {
		answer_error("VixDiskLib_QueryAllocatedBlocks", err);
		return;
	}
	if (!list || list->numBlocks > chunks) {
		answer_fault("VixDiskLib_QueryAllocatedBlocks", "the call succeeded without a list, or with more blocks than chunks");
		return; /* the list is not freed, because it may not be one */
	}
	for (uint32_t i = 0; i < list->numBlocks; i += BLOCKS_A_PACKET) {
		uint32_t n = list->numBlocks - i;

		if (n > BLOCKS_A_PACKET)
			n = BLOCKS_A_PACKET;
		answer.head = (struct message){.kind = MSG_BLOCKS, .slot = SLOT_CONTROL};
		answer.head.length = n * (uint32_t)sizeof(Block);
		memcpy(answer.payload, &list->blocks[i], answer.head.length);
		send_packet(&answer);
	}
	vddk.FreeBlockList(list);
	answer_error(NULL, VIX_OK);
}

/* Answers MSG_CLOSE: closes the disk, disconnects, answers with the first error,
 * and ends the process. */
static _Noreturn void session_end(void)
{
	const char *function = NULL;
	VixError first = VIX_OK, err;

#define STEP(call) \
	do { \
		err = vddk.call; \
		if (err != VIX_OK && first == VIX_OK) { \
			first = err; \
			function = "VixDiskLib_" #call; \
		} \
	} while (0)
	if (session.opened)
		STEP(Close(session.handle));
	if (session.connected)
		STEP(Disconnect(session.connection));
#undef STEP
	session.opened = session.connected = 0;
	login_end();
	answer_start();
	answer.head.sector = first;
	if (first != VIX_OK) {
		char name[64];

		snprintf(name, sizeof name, "%.*s", (int)strcspn(function, "("), function);
		string_append(&answer, name);
		text_append(&answer, first);
	}
	send_packet(&answer);
	/* The parent has its answer, so that a crash or hang in Exit does no harm. */
	if (session.initialised)
		vddk.Exit();
	_exit(0);
}

/* Carries out the requests for the main thread, one after the other. */
static void control_loop(void)
{
	static struct packet request;

	for (;;) {
		pthread_mutex_lock(&control.lock);
		while (!control.full)
			pthread_cond_wait(&control.changed, &control.lock);
		memcpy(&request, &control.request, sizeof control.request.head + control.request.head.length);
		wipe(control.request.payload, control.request.head.length);
		control.full = 0;
		pthread_mutex_unlock(&control.lock);

		if (request.head.kind != MSG_INIT && request.head.kind != MSG_CLOSE && !session.initialised)
			die("the parent sent a request before the library was initialised");
		switch (request.head.kind) {
		case MSG_INIT:
			init(&request);
			break;
		case MSG_OPEN:
			open_disk(&request);
			break;
		case MSG_CLEANUP:
		case MSG_PREPARE_ACCESS:
		case MSG_END_ACCESS:
			call_for_vm(&request);
			break;
		case MSG_QUERY:
			query(&request.head);
			break;
		case MSG_CLOSE:
			session_end();
			break;
		}
	}
}

/* Ends the process when the parent's end of the socket is closed. */
static void *watcher_thread(void *unused)
{
	struct pollfd end = {.fd = SOCKET_FD, .events = POLLRDHUP};

	(void)unused;
	while (poll(&end, 1, -1) <= 0)
		;
	_exit(0);
}

/* Closes all file descriptors from fd on: that of the program itself, and those
 * that vddkcp inherited without close-on-exec. */
static void close_from(unsigned fd)
{
	enum { CLOSE_RANGE = 436 }; /* number of the system call; glibc before 2.34 has no wrapper */

	if (syscall(CLOSE_RANGE, fd, ~0u, 0) == 0)
		return;
	for (; fd < 1024; fd++) /* Linux before 5.9 has no close_range */
		close((int)fd);
}

int main(void)
{
	struct rlimit no_core = {0, 0};
	pthread_t thread;
	int type = 0, err;
	socklen_t n = sizeof type;

	/* This process has secrets, which must not get into core files. The limit alone
	 * does not stop a program that core_pattern names. */
	prctl(PR_SET_DUMPABLE, 0);
	setrlimit(RLIMIT_CORE, &no_core);
	prctl(PR_SET_NAME, "vddkcp-worker");

	if (getsockopt(SOCKET_FD, SOL_SOCKET, SO_TYPE, &type, &n) || type != SOCK_SEQPACKET) {
		fputs("vddkcp-vddk-worker is a part of vddkcp and cannot be run by itself\n", stderr);
		return 2;
	}
	/* Programs that the library starts must not keep the socket open. */
	fcntl(SOCKET_FD, F_SETFD, FD_CLOEXEC);
	fcntl(ARENA_FD, F_SETFD, FD_CLOEXEC);
	close_from(PROGRAM_FD);
	/* A scheduler sends SIGTERM to every process of a job. The parent decides what to
	 * do then, and the worker ends with it. */
	signal(SIGPIPE, SIG_IGN);
	signal(SIGINT, SIG_IGN);
	signal(SIGTERM, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	setvbuf(stdout, NULL, _IOLBF, 0);
	log_start();
	arena_watch();

	err = pthread_create(&thread, NULL, watcher_thread, NULL);
	if (!err)
		err = pthread_create(&thread, NULL, io_thread, NULL);
	if (err)
		die("cannot start a thread: %s", strerror(err));
	control_loop();
}

// A stand-in for VMware's libvixDiskLib.so. It serves raw files, fails as a script says, and
// counts violations of the interface's rules. The file is longer than 600 lines because all
// functions of the interface share its state: connections, handles, requests and locks.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>
#include "testlib.h"

enum { STRINGS = 6 };

struct connection {
	struct connection *next;
	bool remote, read_only;
	char *snapshot, *modes; // copies of arguments of ConnectEx; may be NULL
	const char *given[STRINGS]; // the caller's strings, which must outlive the connection
	char *copy[STRINGS];
	int cred_type;
	uint32_t port, nfc_port;
	int handles;
};

struct request {
	struct request *next;       // next request in handle.queue or handle.timed
	struct request *next_flight; // next request in handle.flight
	uint64_t start, count;
	uint8_t *buffer;
	bool write;
	CompletionCB *callback;
	void *data;
	uint64_t due; // time in ns at which it is completed; 0 means at once
	VixError result;
	bool counted; // it counts as one of the host's requests in flight
	struct fault *fault;
	enum function fn;
};

struct handle {
	struct handle *next;
	struct connection *connection;
	struct disk disk;
	bool read_only, nfc;
	char transport[32];
	int slot;
	_Atomic bool wrote, has_io_thread;
	pthread_t io_thread;
	_Atomic uint64_t free_at; // time in ns until which the line of the handle is in use
	_Atomic uint64_t turn;

	pthread_mutex_t mu; // guards the following fields
	pthread_cond_t work, idle;
	struct request *queue, **queue_end, *timed, *flight, *spare;
	uint64_t in_flight; // calls whose callback has not returned
	bool closing;
	pthread_t *threads;
	uint64_t thread_count;
};

// Memory that the caller must free with a function of the interface.
struct allocation {
	struct allocation *next;
	const void *memory;
	const char *kind;
};

static struct {
	bool initialised, was_initialised, at_fork;
	pthread_t thread; // the thread of InitEx, which must make all calls of Open, Close and queries
	pthread_mutex_t mu;
	struct connection *connections;
	struct handle *handles;
	struct allocation *allocations;
	_Atomic int opening;
	pthread_mutex_t io; // held during each operation of any handle if the script has the key "lock"
	_Atomic uint64_t free_at;
} lib = { .mu = PTHREAD_MUTEX_INITIALIZER, .io = PTHREAD_MUTEX_INITIALIZER };

static __thread bool in_callback;

static void enter(enum function fn) {
	conf_load(NULL);
	state_open();
	count_call(fn);
	if (in_callback) broken(RULE_call_from_callback, "%s from a completion callback", function_names[fn]);
	switch (fn) {
	case FN_InitEx: case FN_GetErrorText: case FN_FreeErrorText: case FN_AllocateConnectParams: case FN_FreeConnectParams:
		return;
	default:
		if (!lib.initialised) broken(RULE_not_initialised, "%s without InitEx", function_names[fn]);
	}
}

static bool designated(void) { return lib.initialised && pthread_equal(pthread_self(), lib.thread); }

static void wait_latency(uint64_t ns) {
	if (ns) sleep_until(now_ns() + ns);
}

// --- Memory that callers must free -------------------------------------------

static void *track(void *memory, const char *kind) {
	struct allocation *a = malloc(sizeof *a);
	if (!memory || !a) abort();
	pthread_mutex_lock(&lib.mu);
	*a = (struct allocation){ lib.allocations, memory, kind };
	lib.allocations = a;
	pthread_mutex_unlock(&lib.mu);
	return memory;
}

static bool untrack(const void *memory, enum function fn) {
	pthread_mutex_lock(&lib.mu);
	struct allocation **at = &lib.allocations, *a;
	while (*at && (*at)->memory != memory) at = &(*at)->next;
	a = *at;
	if (a) *at = a->next;
	pthread_mutex_unlock(&lib.mu);
	if (!a) broken(RULE_free_unknown, "%s of what the library did not give, or twice", function_names[fn]);
	free(a);
	return a;
}

// --- Handles and connections ---------------------------------------------------

static bool known_connection(Connection connection, enum function fn) {
	pthread_mutex_lock(&lib.mu);
	struct connection *c = lib.connections;
	while (c && c != connection) c = c->next;
	pthread_mutex_unlock(&lib.mu);
	if (!c) broken(RULE_bad_handle, "%s of a connection that is not open", function_names[fn]);
	return c;
}

static bool known(Handle handle, enum function fn) {
	pthread_mutex_lock(&lib.mu);
	struct handle *h = lib.handles;
	while (h && h != handle) h = h->next;
	pthread_mutex_unlock(&lib.mu);
	if (!h) broken(RULE_bad_handle, "%s of a handle that is not open", function_names[fn]);
	return h;
}

static bool same(const char *a, const char *b) { return a == b || (a && b && !strcmp(a, b)); }

static void check_params(struct connection *c) {
	for (int i = 0; i < STRINGS; i++) {
		if (!c->copy[i] || !strcmp(c->given[i], c->copy[i])) continue;
		broken(RULE_params_changed, "string %d of the connect params changed before Disconnect", i);
		return;
	}
}

static bool empty(const char *text) { return !text || !*text; }

static const char *param(const struct connection *c, int i) { return c->copy[i] ? c->copy[i] : ""; }

// Checks the login. The error and the log lines are those of vCenter.
static VixError login(const struct connection *c) {
	bool ok = true;
	if (conf.cookie && c->cred_type == CRED_SESSIONID) ok = same(param(c, 3), conf.cookie);
	else if (c->cred_type == CRED_SESSIONID) ok = !conf.user && !conf.password;
	else if (conf.user || conf.password)
		ok = (!conf.user || same(param(c, 3), conf.user)) && (!conf.password || same(param(c, 4), conf.password));
	else if (conf.cookie) ok = false;
	if (ok) return VIX_OK;
	trace("refused login");
	log_warn("VixDiskLibVim: Login failure. Callback error %llu.", (unsigned long long)conf.login_error);
	log_warn("VixDiskLibVim: Cannot complete login due to an incorrect user name or password.");
	return conf.login_error;
}

static VixError reach(const struct connection *c) {
	uint32_t port = c->port ? c->port : 443, wanted = conf.port ? (uint32_t)conf.port : 443;
	if (conf.server && !same(param(c, 1), conf.server)) {
		log_warn("Host address lookup for server %s failed: Name or service not known", param(c, 1));
		return VIX_E_CANNOT_CONNECT_TO_HOST;
	}
	if (conf.port && port != wanted) {
		log_warn("VixDiskLibVim: Failed to connect to %s:%u: Connection refused", param(c, 1), port);
		return VIX_E_HOST_REFUSED;
	}
	return VIX_OK;
}

static void free_connection(struct connection *c) {
	for (int i = 0; i < STRINGS; i++) free(c->copy[i]);
	free(c->snapshot);
	free(c->modes);
	free(c);
}

static struct connection *new_connection(const ConnectParams *params) {
	struct connection *c = calloc(1, sizeof *c);
	if (!c) abort();
	c->remote = !empty(params->serverName);
	c->cred_type = params->credType;
	c->port = params->port;
	c->nfc_port = params->nfcHostPort;
	c->given[0] = params->vmxSpec;
	c->given[1] = params->serverName;
	c->given[2] = params->thumbPrint;
	if (c->remote && params->credType == CRED_UID) {
		c->given[3] = params->creds.uid.userName;
		c->given[4] = params->creds.uid.password;
	} else if (c->remote && params->credType == CRED_SESSIONID) {
		c->given[3] = params->creds.sessionId.cookie;
		c->given[4] = params->creds.sessionId.userName;
		c->given[5] = params->creds.sessionId.key;
	}
	for (int i = 0; i < STRINGS; i++) c->copy[i] = c->given[i] ? strdup(c->given[i]) : NULL;
	return c;
}

// Checks the login of a call that has no connection.
static VixError login_once(const ConnectParams *params) {
	struct connection *c = new_connection(params);
	VixError err = c->remote ? login(c) : VIX_OK;
	free_connection(c);
	return err;
}

VixError VixDiskLib_ConnectEx(const ConnectParams *params, char readOnly, const char *snapshotRef, const char *transportModes, Connection *connection) {
	enter(FN_ConnectEx);
	if (connection) *connection = NULL;
	if (!params || !connection) return VIX_E_INVALID_ARG;
	trace("ConnectEx server=%s port=%u nfcport=%u vmx=%s cred=%d thumbprint=%s spec=%d ro=%d snapshot=%s modes=%s",
		params->serverName ? params->serverName : "-", params->port, params->nfcHostPort, params->vmxSpec ? params->vmxSpec : "-",
		params->credType, params->thumbPrint ? params->thumbPrint : "-", params->specType, readOnly,
		snapshotRef ? snapshotRef : "-", transportModes ? transportModes : "-");
	VixError err = fault_check(FN_ConnectEx);
	if (err) return err;
	wait_latency(conf.latency.connect);
	struct connection *c = new_connection(params);
	c->read_only = readOnly;
	c->snapshot = snapshotRef ? strdup(snapshotRef) : NULL;
	c->modes = empty(transportModes) ? NULL : strdup(transportModes);
	if (c->remote) {
		if (empty(params->vmxSpec) || strncmp(params->vmxSpec, "moref=", 6)) {
			log_warn("VixDiskLib: the VM of a remote connection is moref=ID, not \"%s\"", params->vmxSpec ? params->vmxSpec : "");
			err = VIX_E_INVALID_ARG;
		}
		if (!err) err = reach(c);
		if (!err && !conf.login_at_open) err = login(c);
		if (!err && conf.vm && strcmp(params->vmxSpec, conf.vm)) {
			log_warn("VixDiskLibVim: Failed to find the VM. Error %d.", VIX_E_VM_NOT_FOUND);
			err = VIX_E_VM_NOT_FOUND;
		}
	}
	if (err) {
		free_connection(c);
		return err;
	}
	pthread_mutex_lock(&lib.mu);
	c->next = lib.connections;
	lib.connections = c;
	pthread_mutex_unlock(&lib.mu);
	log_info("VixDiskLib: VixDiskLib_ConnectEx: Establish %s connection.", c->remote ? "remote" : "local");
	*connection = c;
	return VIX_OK;
}

VixError VixDiskLib_Disconnect(Connection connection) {
	enter(FN_Disconnect);
	trace("Disconnect");
	VixError err = fault_check(FN_Disconnect);
	if (err) return err;
	if (!known_connection(connection, FN_Disconnect)) return VIX_E_DISK_INVALID_CONNECTION;
	check_params(connection);
	if (connection->handles) {
		broken(RULE_disconnect_with_handle, "Disconnect with %d open handles", connection->handles);
		return VIX_E_OBJECT_IS_BUSY;
	}
	pthread_mutex_lock(&lib.mu);
	struct connection **at = &lib.connections;
	while (*at && *at != connection) at = &(*at)->next;
	if (*at) *at = connection->next;
	pthread_mutex_unlock(&lib.mu);
	free_connection(connection);
	return VIX_OK;
}

// Returns whether word is in a list whose items are separated by colons.
static bool listed(const char *list, const char *word, size_t length) {
	for (const char *p = list;; p++) {
		size_t n = strcspn(p, ":");
		if (n == length && !strncmp(p, word, n)) return true;
		p += n;
		if (!*p) return false;
	}
}

// Chooses the first transport mode of the connection that the library has.
static VixError choose_transport(struct handle *h) {
	const struct connection *c = h->connection;
	if (conf.transport) snprintf(h->transport, sizeof h->transport, "%s", conf.transport);
	else if (!c->remote) snprintf(h->transport, sizeof h->transport, "file");
	else if (!c->modes) snprintf(h->transport, sizeof h->transport, "nbdssl");
	else {
		for (const char *p = c->modes; *p && !*h->transport;) {
			size_t n = strcspn(p, ":");
			if (!(n == 4 && !strncmp(p, "file", 4)) && listed(conf.transports, p, n))
				snprintf(h->transport, sizeof h->transport, "%.*s", (int)n, p);
			p += n + (p[n] == ':');
		}
		if (!*h->transport) {
			log_warn("VixDiskLib: None of the transport modes \"%s\" is available.", c->modes);
			return VIX_E_FILE_ACCESS_ERROR;
		}
	}
	h->nfc = c->remote && (!strcmp(h->transport, "nbd") || !strcmp(h->transport, "nbdssl"));
	return VIX_OK;
}

// Checks what a server checks when a disk is opened.
static VixError admit(struct handle *h, const char *path) {
	const struct connection *c = h->connection;
	const char *print = param(c, 2);
	if (conf.thumbprint && strcasecmp(print, conf.thumbprint) && !(conf.thumbprint_optional && !*print)) {
		log_warn("VixDiskLibVim: SSLVerifyCertAgainstSystemStore: The remote host certificate has these problems: self signed certificate");
		log_warn("VixDiskLibVim: Thumbprint mismatch: actual thumbprint=%s expected=%s", conf.thumbprint, print);
		return VIX_E_FAIL;
	}
	VixError err = conf.login_at_open ? login(c) : VIX_OK;
	if (err) return err;
	if (conf.snapshot && !c->snapshot) {
		log_warn("DISKLIB-LINK : \"%s\" : failed to open (Failed to lock the file): the virtual machine runs on it.", path);
		return VIX_E_FILE_ACCESS_ERROR;
	}
	if (conf.snapshot && strcmp(conf.snapshot, c->snapshot)) {
		log_warn("VixDiskLibVim: Snapshot %s is not one of this virtual machine.", c->snapshot);
		return VIX_E_SNAPSHOT_NOTFOUND;
	}
	err = choose_transport(h);
	if (err) return err;
	uint32_t port = c->nfc_port ? c->nfc_port : 902;
	if (h->nfc && conf.nfc_port && port != conf.nfc_port) {
		log_warn("NBD_ClientOpen: attempting to create connection to vpxa-nfcssl://%s@%s:%u", path, param(c, 1), port);
		log_warn("NBD_ClientOpen: Couldn't connect to %s:%u Connection refused", param(c, 1), port);
		return VIX_E_HOST_REFUSED;
	}
	return VIX_OK;
}

static void log_no_memory(uint64_t bytes) {
	log_warn("NfcAioGetMessage: received NFC error 5 from server: Failed to allocate the requested %llu bytes", (unsigned long long)bytes);
}

static VixError reserve_nfc(struct handle *h) {
	uint64_t bytes = h->nfc ? conf.nfc_buffer_size * conf.nfc_buffer_count : 0;
	if (h->nfc && conf.session_memory && bytes > conf.session_memory) {
		log_warn("NfcAioInitSession: buffers of %llu bytes exceed the session's limit of %llu", (unsigned long long)bytes, (unsigned long long)conf.session_memory);
		log_no_memory(bytes);
		count_stat(STAT_alloc_failures, 1);
		return VIX_E_OUT_OF_MEMORY;
	}
	switch (host_reserve(bytes, &h->slot)) {
	case NO_MEMORY:
		log_no_memory(bytes);
		return VIX_E_OUT_OF_MEMORY;
	case NO_CONNECTION:
		log_warn("NfcFssrvrOpen: The maximum number of connections to the server has been reached");
		return VIX_E_FAIL;
	default:
		return VIX_OK;
	}
}

static VixError open_handle(Connection connection, const char *path, uint32_t flags, struct handle *h) {
	h->connection = connection;
	h->read_only = flags & OPEN_READ_ONLY;
	VixError err = VIX_OK;
	if (connection->remote) err = admit(h, path);
	else err = choose_transport(h);
	if (err) return err;
	char *file = disk_path(path, connection->remote);
	if (!file) return VIX_E_FILE_NOT_FOUND;
	err = disk_open(&h->disk, file, h->read_only, flags & OPEN_SINGLE_LINK);
	if (err) return err;
	err = reserve_nfc(h);
	if (err) {
		disk_close(&h->disk);
		return err;
	}
	pthread_mutex_init(&h->mu, NULL);
	pthread_condattr_t attr;
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&h->work, &attr);
	pthread_cond_init(&h->idle, &attr);
	pthread_condattr_destroy(&attr);
	h->queue_end = &h->queue;
	return VIX_OK;
}

static void check_designated(enum rule rule, enum function fn) {
	if (lib.initialised && !designated()) broken(rule, "%s on another thread than InitEx", function_names[fn]);
}

VixError VixDiskLib_Open(Connection connection, const char *path, uint32_t flags, Handle *handle) {
	enter(FN_Open);
	if (handle) *handle = NULL;
	trace("Open %s flags=%u", path ? path : "-", flags);
	check_designated(RULE_open_thread, FN_Open);
	if (!path || !handle || !known_connection(connection, FN_Open)) return VIX_E_INVALID_ARG;
	if (lib.opening++) broken(RULE_concurrent_open, "Open while another Open or Close runs");
	check_params(connection);
	struct handle *h = calloc(1, sizeof *h);
	if (!h) abort();
	VixError err = fault_check(FN_Open);
	if (conf.hostile_log) log_hostile();
	log_flood_start();
	if (conf.lock) pthread_mutex_lock(&lib.io);
	wait_latency(conf.latency.open);
	if (conf.lock) pthread_mutex_unlock(&lib.io);
	if (!err && connection->read_only && !(flags & OPEN_READ_ONLY)) {
		broken(RULE_read_only_mismatch, "Open for writing on a read-only connection");
		err = VIX_E_FILE_ACCESS_ERROR;
	}
	if (!err) err = open_handle(connection, path, flags, h);
	if (err) {
		log_warn("VixDiskLib: VixDiskLib_OpenEx: Cannot open disk %s. Error %llu (%s).", path, (unsigned long long)err, error_text(err) ? error_text(err) : "?");
		free(h);
	} else {
		pthread_mutex_lock(&lib.mu);
		h->next = lib.handles;
		lib.handles = h;
		connection->handles++;
		pthread_mutex_unlock(&lib.mu);
		count_stat(STAT_handles, 1);
		log_info("VixDiskLib: VixDiskLib_OpenEx: Open a disk: %s, transport %s.", path, h->transport);
		*handle = h;
	}
	lib.opening--;
	return err;
}

VixError VixDiskLib_Close(Handle handle) {
	enter(FN_Close);
	trace("Close");
	check_designated(RULE_close_thread, FN_Close);
	VixError err = fault_check(FN_Close);
	if (err) return err;
	if (!known(handle, FN_Close)) return VIX_E_INVALID_ARG;
	if (lib.opening++) broken(RULE_concurrent_open, "Close while another Open or Close runs");
	wait_latency(conf.latency.close);
	struct handle *h = handle;
	pthread_mutex_lock(&h->mu);
	if (h->in_flight) broken(RULE_close_with_io, "Close with %llu calls in flight", (unsigned long long)h->in_flight);
	while (h->in_flight) pthread_cond_wait(&h->idle, &h->mu);
	h->closing = true;
	pthread_cond_broadcast(&h->work);
	pthread_mutex_unlock(&h->mu);
	for (uint64_t i = 0; i < h->thread_count; i++) pthread_join(h->threads[i], NULL);
	pthread_mutex_lock(&lib.mu);
	struct handle **at = &lib.handles;
	while (*at && *at != h) at = &(*at)->next;
	if (*at) *at = h->next;
	h->connection->handles--;
	pthread_mutex_unlock(&lib.mu);
	host_release(h->slot);
	disk_close(&h->disk);
	for (struct request *r = h->spare, *next; r; r = next) {
		next = r->next;
		free(r);
	}
	free(h->threads);
	pthread_mutex_destroy(&h->mu);
	pthread_cond_destroy(&h->work);
	pthread_cond_destroy(&h->idle);
	free(h);
	lib.opening--;
	return VIX_OK;
}

// --- Reading and writing ---------------------------------------------------------

// Returns the time in ns at which a request of the given bytes is completed; 0 means at once.
static uint64_t due(struct handle *h, uint64_t bytes, bool write) {
	uint64_t latency = write ? conf.latency.write : conf.latency.read;
	uint64_t turn = h->turn++;
	if (!latency && conf.bandwidth <= 0 && conf.host_bandwidth <= 0 && !conf.reorder) return 0;
	uint64_t now = now_ns(), through = now;
	if (conf.bandwidth > 0)
		through = book(conf.lock ? &lib.free_at : &h->free_at, now, (uint64_t)((double)bytes * 1e9 / conf.bandwidth));
	if (conf.host_bandwidth > 0) {
		uint64_t host = host_book(conf.host_bandwidth, bytes);
		if (host > through) through = host;
	}
	if (conf.nfc_pieces && h->nfc) {
		uint64_t size = conf.nfc_buffer_size ? conf.nfc_buffer_size : 1, count = conf.nfc_buffer_count ? conf.nfc_buffer_count : 1;
		uint64_t pieces = (bytes + size - 1) / size;
		latency *= (pieces + count - 1) / count;
	}
	return through + latency + (turn % 2 ? 0 : conf.reorder);
}

static VixError transfer(struct handle *h, bool write, uint64_t start, uint64_t count, uint8_t *buffer) {
	if (conf.lock) pthread_mutex_lock(&lib.io);
	VixError err = write ? disk_write(&h->disk, start, count, buffer) : disk_read(&h->disk, start, count, buffer);
	if (conf.lock) pthread_mutex_unlock(&lib.io);
	return err;
}

// Checks a read or write against the rules, and counts it.
static VixError check_io(struct handle *h, enum function fn, uint64_t start, uint64_t count, const uint8_t *buffer, bool write) {
	trace("%s %llu %llu", function_names[fn], (unsigned long long)start, (unsigned long long)count);
	if (!known(h, fn)) return VIX_E_INVALID_ARG;
	if (designated()) broken(RULE_io_on_open_thread, "%s on the thread that opens and queries", function_names[fn]);
	if (!h->has_io_thread) {
		h->has_io_thread = true;
		h->io_thread = pthread_self();
	} else if (!pthread_equal(h->io_thread, pthread_self()))
		broken(RULE_io_thread, "%s on another thread than the handle's earlier reads and writes", function_names[fn]);
	if (!count || !buffer) {
		broken(RULE_io_empty, "%s of %llu sectors", function_names[fn], (unsigned long long)count);
		return VIX_E_INVALID_ARG;
	}
	if (start > h->disk.capacity || count > h->disk.capacity - start) {
		broken(RULE_io_out_of_range, "%s of %llu sectors at %llu, capacity %llu", function_names[fn],
			(unsigned long long)count, (unsigned long long)start, (unsigned long long)h->disk.capacity);
		return VIX_E_DISK_OUTOFRANGE;
	}
	if (write && h->read_only) {
		broken(RULE_write_read_only, "%s on a handle opened read-only", function_names[fn]);
		return VIX_E_FILE_READ_ONLY;
	}
	if (write) h->wrote = true;
	raise_stat(STAT_max_request, count * SECTOR);
	if (conf.log_reads) log_info("VixDiskLib: VixDiskLib_%s: %llu sectors at %llu.", function_names[fn], (unsigned long long)count, (unsigned long long)start);
	return VIX_OK;
}

static bool overlap(const uint8_t *a, uint64_t a_bytes, const uint8_t *b, uint64_t b_bytes) {
	return (uintptr_t)a < (uintptr_t)b + b_bytes && (uintptr_t)b < (uintptr_t)a + a_bytes;
}

// Adds a request to those in flight.
static void begin(struct handle *h, struct request *r) {
	uint64_t bytes = r->count * SECTOR;
	r->counted = !h->nfc || host_begin(h->slot, bytes);
	if (!r->counted) {
		log_no_memory(bytes);
		r->result = VIX_E_OUT_OF_MEMORY;
	}
	if (!h->nfc) r->counted = false;
	pthread_mutex_lock(&h->mu);
	for (struct request *o = h->flight; o; o = o->next_flight)
		if ((!r->write || !o->write) && overlap(r->buffer, bytes, o->buffer, o->count * SECTOR)) {
			broken(RULE_buffer_overlap, "%s at %llu into a buffer that the request at %llu still uses", function_names[r->fn],
				(unsigned long long)r->start, (unsigned long long)o->start);
			break;
		}
	r->next_flight = h->flight;
	h->flight = r;
	h->in_flight++;
	raise_stat(STAT_max_in_flight, h->in_flight);
	pthread_mutex_unlock(&h->mu);
}

// Removes a request from those in flight, so that the caller may use its buffer again.
static void leave_flight(struct handle *h, struct request *r) {
	uint64_t bytes = r->count * SECTOR;
	if (r->counted) host_end(h->slot, bytes);
	if (!r->result) count_stat(r->write ? STAT_bytes_written : STAT_bytes_read, bytes);
	pthread_mutex_lock(&h->mu);
	struct request **at = &h->flight;
	while (*at != r) at = &(*at)->next_flight;
	*at = r->next_flight;
	pthread_mutex_unlock(&h->mu);
}

static void end(struct handle *h) {
	pthread_mutex_lock(&h->mu);
	if (!--h->in_flight) pthread_cond_broadcast(&h->idle);
	pthread_mutex_unlock(&h->mu);
}

static struct call call_of(const struct handle *h, const struct request *r) {
	return (struct call){ .fn = r->fn, .start = r->start, .count = r->count, .capacity = h->disk.capacity, .buffer = r->buffer };
}

static void log_failure(const struct request *r) {
	log_warn("VixDiskLib: VixDiskLib_%s: %s %llu sectors at %llu failed. Error %llu (%s).", function_names[r->fn], r->write ? "Write" : "Read",
		(unsigned long long)r->count, (unsigned long long)r->start, (unsigned long long)r->result, error_text(r->result) ? error_text(r->result) : "?");
}

static VixError io(struct handle *h, enum function fn, uint64_t start, uint64_t count, uint8_t *buffer) {
	enter(fn);
	bool write = fn == FN_Write;
	VixError err = check_io(h, fn, start, count, buffer, write);
	if (err) return err;
	struct request r = { .start = start, .count = count, .buffer = buffer, .write = write, .fn = fn };
	struct call call = call_of(h, &r);
	struct fault *fault = fault_find(&call);
	begin(h, &r);
	uint64_t until = due(h, count * SECTOR, write);
	if (fault && !fault_after(fault) && !r.result) r.result = fault_act(fault, &call);
	if (!r.result) r.result = transfer(h, write, start, count, buffer);
	if (fault_after(fault)) fault_act(fault, &call);
	if (until) sleep_until(until);
	if (r.result) log_failure(&r);
	leave_flight(h, &r);
	end(h);
	return r.result;
}

VixError VixDiskLib_Read(Handle handle, uint64_t startSector, uint64_t numSectors, uint8_t *buffer) {
	return io(handle, FN_Read, startSector, numSectors, buffer);
}

VixError VixDiskLib_Write(Handle handle, uint64_t startSector, uint64_t numSectors, const uint8_t *buffer) {
	return io(handle, FN_Write, startSector, numSectors, (uint8_t *)(uintptr_t)buffer);
}

static void complete(struct handle *h, struct request *r) {
	struct fault *fault = r->fault;
	struct call call = call_of(h, r);
	if (fault) {
		VixError err = fault_act(fault, &call);
		if (err) r->result = err;
		if (fault->action == DO_DROP) return;
	}
	if (r->result) log_failure(r);
	leave_flight(h, r);
	in_callback = true;
	count_stat(STAT_callbacks, 1);
	r->callback(r->data, r->result);
	if (fault && fault->action == DO_TWICE) r->callback(r->data, r->result);
	in_callback = false;
	pthread_mutex_lock(&h->mu);
	r->next = h->spare;
	h->spare = r;
	pthread_mutex_unlock(&h->mu);
	end(h);
}

static void add_timed(struct handle *h, struct request *r) {
	struct request **at = &h->timed;
	while (*at && (*at)->due <= r->due) at = &(*at)->next;
	r->next = *at;
	*at = r;
	if (h->timed == r) pthread_cond_signal(&h->work); // it is due before the requests that other threads wait for
}

// A thread of a handle. It carries out requests in order, and completes each when it is due.
static void *serve(void *data) {
	struct handle *h = data;
	prctl(PR_SET_TIMERSLACK, 1000UL);
	pthread_mutex_lock(&h->mu);
	while (!h->closing) {
		struct request *r = h->timed;
		if (r && r->due <= now_ns()) {
			h->timed = r->next;
			if (h->timed) pthread_cond_signal(&h->work);
			pthread_mutex_unlock(&h->mu);
			complete(h, r);
			pthread_mutex_lock(&h->mu);
			continue;
		}
		r = h->queue;
		if (r) {
			h->queue = r->next;
			if (!h->queue) h->queue_end = &h->queue;
			pthread_mutex_unlock(&h->mu);
			if (!r->result) r->result = transfer(h, r->write, r->start, r->count, r->buffer);
			if (r->due) {
				pthread_mutex_lock(&h->mu);
				add_timed(h, r);
				continue;
			}
			complete(h, r);
			pthread_mutex_lock(&h->mu);
			continue;
		}
		if (h->timed) {
			uint64_t next = h->timed->due;
			struct timespec t = { (time_t)(next / 1000000000), (long)(next % 1000000000) };
			pthread_cond_timedwait(&h->work, &h->mu, &t);
		} else pthread_cond_wait(&h->work, &h->mu);
	}
	pthread_mutex_unlock(&h->mu);
	return NULL;
}

static void start_threads(struct handle *h) {
	sigset_t all, old;
	sigfillset(&all);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGBUS);
	pthread_sigmask(SIG_SETMASK, &all, &old); // the threads of the caller handle signals
	h->threads = calloc(conf.threads, sizeof *h->threads);
	while (h->thread_count < conf.threads) {
		if (pthread_create(&h->threads[h->thread_count], NULL, serve, h)) abort();
		h->thread_count++;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static VixError submit(struct handle *h, enum function fn, uint64_t start, uint64_t count, uint8_t *buffer, CompletionCB *callback, void *data) {
	enter(fn);
	bool write = fn == FN_WriteAsync;
	VixError err = check_io(h, fn, start, count, buffer, write);
	if (err) return err;
	if (!callback) return VIX_E_INVALID_ARG;
	struct call call = { .fn = fn, .start = start, .count = count, .capacity = h->disk.capacity, .buffer = buffer };
	struct fault *fault = fault_find(&call);
	if (fault && fault->in_call) {
		err = fault_act(fault, &call);
		if (err) return err;
		fault = NULL;
	}
	pthread_mutex_lock(&h->mu);
	struct request *r = h->spare;
	if (r) h->spare = r->next;
	pthread_mutex_unlock(&h->mu);
	if (!r) r = malloc(sizeof *r);
	if (!r) abort();
	*r = (struct request){ .start = start, .count = count, .buffer = buffer, .write = write, .callback = callback, .data = data, .fault = fault, .fn = fn };
	begin(h, r);
	r->due = due(h, count * SECTOR, write);
	if (!h->thread_count) start_threads(h);
	pthread_mutex_lock(&h->mu);
	*h->queue_end = r;
	h->queue_end = &r->next;
	pthread_cond_signal(&h->work);
	pthread_mutex_unlock(&h->mu);
	return VIX_ASYNC;
}

VixError VixDiskLib_ReadAsync(Handle handle, uint64_t startSector, uint64_t numSectors, uint8_t *buffer, CompletionCB *callback, void *data) {
	return submit(handle, FN_ReadAsync, startSector, numSectors, buffer, callback, data);
}

VixError VixDiskLib_WriteAsync(Handle handle, uint64_t startSector, uint64_t numSectors, const uint8_t *buffer, CompletionCB *callback, void *data) {
	return submit(handle, FN_WriteAsync, startSector, numSectors, (uint8_t *)(uintptr_t)buffer, callback, data);
}

VixError VixDiskLib_Wait(Handle handle) {
	enter(FN_Wait);
	trace("Wait");
	if (!known(handle, FN_Wait)) return VIX_E_INVALID_ARG;
	VixError err = fault_check(FN_Wait);
	if (err) return err;
	pthread_mutex_lock(&handle->mu);
	while (handle->in_flight) pthread_cond_wait(&handle->idle, &handle->mu);
	pthread_mutex_unlock(&handle->mu);
	return VIX_OK;
}

VixError VixDiskLib_Flush(Handle handle) {
	enter(FN_Flush);
	trace("Flush");
	if (!known(handle, FN_Flush)) return VIX_E_INVALID_ARG;
	VixError err = fault_check(FN_Flush);
	if (err) return err;
	wait_latency(conf.latency.flush);
	if (handle->read_only) return VIX_OK;
	return descriptors_closed || fdatasync(handle->disk.fd) ? VIX_E_FILE_ERROR : VIX_OK;
}

// --- Allocation --------------------------------------------------------------------

static VixError check_query(struct handle *h, uint64_t start, uint64_t count, uint64_t chunk) {
	unsigned long long s = start, n = count, c = chunk;
	if (h->wrote) broken(RULE_query_after_write, "a query on a handle that has written");
	if (chunk < 128 || chunk & (chunk - 1)) {
		broken(RULE_query_chunk_size, "a query with chunks of %llu sectors", c);
		return VIX_E_INVALID_ARG;
	}
	if (start % chunk || count % chunk || !count) {
		broken(RULE_query_unaligned, "a query of %llu sectors at %llu with chunks of %llu", n, s, c);
		return VIX_E_INVALID_ARG;
	}
	if (start > h->disk.capacity || count > h->disk.capacity - start) {
		broken(RULE_query_out_of_range, "a query of %llu sectors at %llu, capacity %llu", n, s, (unsigned long long)h->disk.capacity);
		return VIX_E_INVALID_ARG;
	}
	if (count / chunk > 512 * 1024) {
		broken(RULE_query_too_many_chunks, "a query of %llu chunks", n / c);
		return VIX_E_INVALID_ARG;
	}
	return count / chunk > conf.query_max_chunks ? VIX_E_INVALID_ARG : VIX_OK;
}

// Returns blocks that no library may return: not ascending, outside of the range, empty.
static BlockList *bad_blocks(uint64_t start, uint64_t count, uint64_t chunk) {
	BlockList *list = malloc(sizeof *list + 4 * sizeof(Block));
	if (!list) abort();
	list->numBlocks = 4;
	list->blocks[0] = (Block){ start + count, chunk };
	list->blocks[1] = (Block){ start, 0 };
	list->blocks[2] = (Block){ start, UINT64_MAX };
	list->blocks[3] = (Block){ start ? start - 1 : 0, 1 };
	return list;
}

VixError VixDiskLib_QueryAllocatedBlocks(Handle handle, uint64_t startSector, uint64_t numSectors, uint64_t chunkSize, BlockList **list) {
	enter(FN_QueryAllocatedBlocks);
	if (list) *list = NULL;
	trace("QueryAllocatedBlocks %llu %llu %llu", (unsigned long long)startSector, (unsigned long long)numSectors, (unsigned long long)chunkSize);
	check_designated(RULE_query_thread, FN_QueryAllocatedBlocks);
	if (!list || !known(handle, FN_QueryAllocatedBlocks)) return VIX_E_INVALID_ARG;
	struct call call = { .fn = FN_QueryAllocatedBlocks, .start = startSector, .count = numSectors, .capacity = handle->disk.capacity };
	VixError err = check_query(handle, startSector, numSectors, chunkSize);
	struct fault *fault = err ? NULL : fault_find(&call);
	if (fault) err = fault_act(fault, &call);
	if (conf.lock) pthread_mutex_lock(&lib.io);
	wait_latency(conf.latency.query);
	if (fault && fault->action == DO_BADBLOCKS) *list = bad_blocks(startSector, numSectors, chunkSize);
	else if (!err) err = disk_allocated(&handle->disk, startSector, numSectors, chunkSize, list);
	if (conf.lock) pthread_mutex_unlock(&lib.io);
	if (err) log_warn("VixDiskLib: VixDiskLib_QueryAllocatedBlocks: failed. Error %llu (%s).", (unsigned long long)err, error_text(err) ? error_text(err) : "?");
	else track(*list, "block list");
	return err;
}

VixError VixDiskLib_FreeBlockList(BlockList *list) {
	enter(FN_FreeBlockList);
	if (!list || !untrack(list, FN_FreeBlockList)) return VIX_E_INVALID_ARG;
	free(list);
	return VIX_OK;
}

// --- Properties of a disk -------------------------------------------------------------

VixError VixDiskLib_GetInfo(Handle handle, Info **info) {
	enter(FN_GetInfo);
	trace("GetInfo");
	if (info) *info = NULL;
	if (!info || !known(handle, FN_GetInfo)) return VIX_E_INVALID_ARG;
	VixError err = fault_check(FN_GetInfo);
	if (err) return err;
	// Before version 7.0 the struct ends with uuid. No more memory is allocated, so that
	// sanitizers notice access to later fields. The size is volatile to hide it from the
	// compiler, which would warn.
	volatile size_t size = TESTLIB_VERSION >= 7 ? sizeof **info : offsetof(Info, logicalSectorSize);
	Info *i = track(calloc(1, size), "info");
	const struct disk *d = &handle->disk;
	uint64_t cylinders = d->capacity / (255 * 63);
	i->biosGeo = i->physGeo = (Geometry){ (uint32_t)(cylinders < 65535 ? cylinders : 65535), 255, 63 };
	i->capacity = d->capacity;
	i->adapterType = 3;
	i->numLinks = d->links;
	if (d->links > 1 && asprintf(&i->parentFileNameHint, "%s.parent", d->path) < 0) abort();
	i->uuid = strdup("60 00 c2 93 7b a0 3a 03-9f 22 56 c5 29 93 b7 27");
#if TESTLIB_VERSION >= 7
	i->logicalSectorSize = (uint32_t)conf.logical_sector_size;
	i->physicalSectorSize = (uint32_t)conf.physical_sector_size;
#endif
	*info = i;
	return VIX_OK;
}

void VixDiskLib_FreeInfo(Info *info) {
	enter(FN_FreeInfo);
	if (!info || !untrack(info, FN_FreeInfo)) return;
	free(info->parentFileNameHint);
	free(info->uuid);
	free(info);
}

const char *VixDiskLib_GetTransportMode(Handle handle) {
	enter(FN_GetTransportMode);
	return known(handle, FN_GetTransportMode) ? handle->transport : NULL;
}

const char *VixDiskLib_ListTransportModes(void) {
	enter(FN_ListTransportModes);
	return conf.transports;
}

static struct metadata default_metadata[] = {
	{ "adapterType", "lsilogic", &default_metadata[1] },
	{ "geometry.sectors", "63", &default_metadata[2] },
	{ "geometry.heads", "255", &default_metadata[3] },
	{ "uuid", "60 00 C2 93 7b a0 3a 03-9f 22 56 c5 29 93 b7 27", &default_metadata[4] },
	{ "virtualHWVersion", "14", NULL },
};

static const struct metadata *metadata(void) { return conf.metadata ? conf.metadata : default_metadata; }

VixError VixDiskLib_ReadMetadata(Handle handle, const char *key, char *buf, size_t bufLen, size_t *required) {
	enter(FN_ReadMetadata);
	trace("ReadMetadata %s", key ? key : "-");
	if (!key || !known(handle, FN_ReadMetadata)) return VIX_E_INVALID_ARG;
	VixError err = fault_check(FN_ReadMetadata);
	if (err) return err;
	for (const struct metadata *m = metadata(); m; m = m->next) {
		if (strcmp(m->key, key)) continue;
		size_t n = strlen(m->value) + 1;
		if (required) *required = n;
		if (!buf || bufLen < n) return VIX_E_BUFFER_TOOSMALL;
		memcpy(buf, m->value, n);
		return VIX_OK;
	}
	return VIX_E_DISK_KEY_NOTFOUND;
}

VixError VixDiskLib_GetMetadataKeys(Handle handle, char *keys, size_t maxLen, size_t *required) {
	enter(FN_GetMetadataKeys);
	trace("GetMetadataKeys");
	if (!known(handle, FN_GetMetadataKeys)) return VIX_E_INVALID_ARG;
	VixError err = fault_check(FN_GetMetadataKeys);
	if (err) return err;
	size_t n = 1; // an empty key ends the list
	for (const struct metadata *m = metadata(); m; m = m->next) n += strlen(m->key) + 1;
	if (required) *required = n;
	if (!keys || maxLen < n) return VIX_E_BUFFER_TOOSMALL;
	for (const struct metadata *m = metadata(); m; m = m->next) keys = stpcpy(keys, m->key) + 1;
	*keys = 0;
	return VIX_OK;
}

// --- The virtual machine, and files -----------------------------------------------------------

static VixError access_call(enum function fn, const ConnectParams *params, const char *identity) {
	enter(fn);
	trace("%s %s", function_names[fn], identity ? identity : "-");
	if (!params || empty(identity) || empty(params->serverName)) return VIX_E_INVALID_ARG;
	VixError err = fault_check(fn);
	if (err) return err;
	if (conf.esxi) {
		log_warn("VixDiskLibVim: %s is for a vCenter Server, %s is none.", function_names[fn], params->serverName);
		return VIX_E_NOT_SUPPORTED;
	}
	return login_once(params);
}

VixError VixDiskLib_PrepareForAccess(const ConnectParams *params, const char *identity) {
	return access_call(FN_PrepareForAccess, params, identity);
}

VixError VixDiskLib_EndAccess(const ConnectParams *params, const char *identity) {
	return access_call(FN_EndAccess, params, identity);
}

VixError VixDiskLib_Cleanup(const ConnectParams *params, uint32_t *cleaned, uint32_t *remaining) {
	enter(FN_Cleanup);
	trace("Cleanup");
	if (!params || !cleaned || !remaining) return VIX_E_INVALID_ARG;
	*cleaned = *remaining = 0;
	VixError err = fault_check(FN_Cleanup);
	if (!err) err = login_once(params);
	if (err) return err;
	host_sweep(cleaned, remaining);
	return VIX_OK;
}

VixError VixDiskLib_Create(Connection connection, const char *path, const CreateParams *params, ProgressFn *progress, void *data) {
	enter(FN_Create);
	trace("Create %s", path ? path : "-");
	if (!path || !params || !known_connection(connection, FN_Create)) return VIX_E_INVALID_ARG;
	VixError err = fault_check(FN_Create);
	if (err) return err;
	if (connection->remote) return VIX_E_NOT_SUPPORTED;
	int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
	if (fd < 0) return errno == EEXIST ? VIX_E_FILE_ALREADY_EXISTS : errno == EACCES ? VIX_E_FILE_ACCESS_ERROR : VIX_E_FILE_ERROR;
	if (ftruncate(fd, (off_t)(params->capacity * SECTOR))) err = VIX_E_FILE_ERROR;
	close(fd);
	if (progress) progress(data, 100);
	return err;
}

VixError VixDiskLib_CheckRepair(Connection connection, const char *path, char repair) {
	enter(FN_CheckRepair);
	trace("CheckRepair %s %d", path ? path : "-", repair);
	if (!path || !known_connection(connection, FN_CheckRepair)) return VIX_E_INVALID_ARG;
	VixError err = fault_check(FN_CheckRepair);
	if (err) return err;
	char *file = disk_path(path, connection->remote);
	if (!file) return VIX_E_FILE_NOT_FOUND;
	if (access(file, repair ? R_OK | W_OK : R_OK)) err = errno == ENOENT ? VIX_E_FILE_NOT_FOUND : VIX_E_FILE_ACCESS_ERROR;
	free(file);
	return err;
}

// --- The library as a whole ---------------------------------------------------------------------

static void forked(void) {
	if (lib.initialised) broken(RULE_fork_after_init, "fork after InitEx");
}

VixError VixDiskLib_InitEx(uint32_t major, uint32_t minor, LogFn *log, LogFn *warn, LogFn *panic, const char *libDir, const char *configFile) {
	conf_load(libDir);
	enter(FN_InitEx);
	log_to(log, warn, panic);
	trace("InitEx %u %u libdir=%s config=%s", major, minor, libDir ? libDir : "-", configFile ? configFile : "-");
	if (lib.was_initialised) {
		broken(RULE_init_twice, "InitEx twice in one process");
		return VIX_E_FAIL;
	}
	VixError err = fault_check(FN_InitEx);
	if (err) return err;
	uint32_t top = TESTLIB_VERSION * 100;
	if (TESTLIB_VERSION == 5) top += 5;
	if (major * 100 + minor > top) {
		log_warn("VixDiskLib: Version %u.%u is not supported, this is %u.%u.", major, minor, top / 100, top % 100);
		return VIX_E_INVALID_ARG;
	}
	wait_latency(conf.latency.init);
	lib.initialised = lib.was_initialised = true;
	lib.thread = pthread_self();
	if (!lib.at_fork) {
		lib.at_fork = true;
		pthread_atfork(NULL, NULL, forked);
	}
	count_stat(STAT_processes, 1);
	conf_load_nfc(configFile);
	log_info("VixDiskLib: VMware VixDiskLib (%d.0.0) Release build-00000000 (test library)", TESTLIB_VERSION);
	log_info("VDDK_PhoneHome: PhoneHome is %s", "disabled");
	return VIX_OK;
}

void VixDiskLib_Exit(void) {
	enter(FN_Exit);
	trace("Exit");
	fault_check(FN_Exit);
	log_flood_join();
	pthread_mutex_lock(&lib.mu);
	for (struct handle *h = lib.handles; h; h = h->next) {
		broken(RULE_handle_leaked, "Exit with %s open", h->disk.path);
		if (h->in_flight) broken(RULE_exit_with_io, "Exit with %llu calls in flight", (unsigned long long)h->in_flight);
	}
	for (struct connection *c = lib.connections; c; c = c->next) broken(RULE_connection_leaked, "Exit with a connection");
	for (struct allocation *a = lib.allocations; a; a = a->next) broken(RULE_memory_leaked, "Exit with one %s not freed", a->kind);
	pthread_mutex_unlock(&lib.mu);
	state_account();
	lib.initialised = false;
	log_to(NULL, NULL, NULL);
}

char *VixDiskLib_GetErrorText(VixError err, const char *locale) {
	(void)locale;
	enter(FN_GetErrorText);
	const char *text = error_text(err);
	return track(strdup(text ? text : "Unknown error"), "error text");
}

void VixDiskLib_FreeErrorText(char *text) {
	enter(FN_FreeErrorText);
	if (text && untrack(text, FN_FreeErrorText)) free(text);
}

ConnectParams *VixDiskLib_AllocateConnectParams(void) {
	enter(FN_AllocateConnectParams);
	return track(calloc(1, sizeof(ConnectParams)), "ConnectParams");
}

void VixDiskLib_FreeConnectParams(ConnectParams *params) {
	enter(FN_FreeConnectParams);
	if (params && untrack(params, FN_FreeConnectParams)) free(params);
}

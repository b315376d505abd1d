// What the stand-in's own files share.
#ifndef TESTLIB_H
#define TESTLIB_H

#include <pthread.h>
#include <stdbool.h>
#include <stdatomic.h>
#include <stdio.h>
#include "vixdisklib.h"

#ifndef TESTLIB_VERSION
#define TESTLIB_VERSION 8
#endif

enum { SECTOR = 512 };

// Every function of the interface, for counts, faults and traces.
#define FUNCTIONS(X) \
	X(InitEx) X(Exit) X(GetErrorText) X(FreeErrorText) X(AllocateConnectParams) X(FreeConnectParams) \
	X(ConnectEx) X(Disconnect) X(Open) X(Close) X(GetTransportMode) X(ListTransportModes) X(GetInfo) X(FreeInfo) \
	X(Read) X(Write) X(ReadAsync) X(WriteAsync) X(Wait) X(Flush) X(ReadMetadata) X(GetMetadataKeys) \
	X(PrepareForAccess) X(EndAccess) X(Cleanup) X(Create) X(CheckRepair) X(QueryAllocatedBlocks) X(FreeBlockList)

// Every rule of the interface whose breach is counted. README.md explains each.
#define RULES(X) \
	X(init_twice, "init-twice") X(not_initialised, "not-initialised") X(fork_after_init, "fork-after-init") \
	X(open_thread, "open-thread") X(close_thread, "close-thread") X(query_thread, "query-thread") \
	X(io_on_open_thread, "io-on-open-thread") X(io_thread, "io-thread") X(concurrent_open, "concurrent-open") \
	X(close_with_io, "close-with-io") X(exit_with_io, "exit-with-io") X(call_from_callback, "call-from-callback") \
	X(read_only_mismatch, "read-only-mismatch") X(write_read_only, "write-read-only") \
	X(io_out_of_range, "io-out-of-range") X(io_empty, "io-empty") X(buffer_overlap, "buffer-overlap") \
	X(query_unaligned, "query-unaligned") X(query_out_of_range, "query-out-of-range") X(query_chunk_size, "query-chunk-size") \
	X(query_too_many_chunks, "query-too-many-chunks") X(query_after_write, "query-after-write") \
	X(params_changed, "params-changed") X(free_unknown, "free-unknown") X(bad_handle, "bad-handle") \
	X(handle_leaked, "handle-leaked") X(connection_leaked, "connection-leaked") X(disconnect_with_handle, "disconnect-with-handle") \
	X(memory_leaked, "memory-leaked")

// What else is worth a number. The names with "max" are high-water marks.
#define STATS(X) \
	X(bytes_read, "bytes-read") X(bytes_written, "bytes-written") X(max_request, "max-request") \
	X(max_in_flight, "max-in-flight") X(max_handles, "max-handles") X(max_reserved, "max-reserved") \
	X(handles, "handles") X(callbacks, "callbacks") X(faults, "faults") X(alloc_failures, "alloc-failures") \
	X(processes, "processes")

enum function {
#define X(name) FN_##name,
	FUNCTIONS(X)
#undef X
	FN_COUNT
};

enum rule {
#define X(name, text) RULE_##name,
	RULES(X)
#undef X
	RULE_COUNT
};

enum figure {
#define X(name, text) STAT_##name,
	STATS(X)
#undef X
	STAT_COUNT
};

extern const char *const function_names[FN_COUNT];

// --- conf.c ---------------------------------------------------------------

enum action {
	DO_NONE, DO_FAIL, DO_HANG, DO_DELAY, DO_ABORT, DO_SEGV, DO_EXIT, DO_KILL, DO_CLOSEFDS, DO_HEAP, DO_PANIC,
	DO_LOG, DO_DROP, DO_TWICE, DO_OVERRUN, DO_UNDERRUN, DO_CORRUPT, DO_BADBLOCKS,
};

enum position { ANYWHERE, RANGE, FIRST, MIDDLE, LAST };

enum { MAX_FAULTS = 64 };

struct fault {
	bool functions[FN_COUNT];
	uint64_t at, from, every; // counted from 1; 0: not given
	enum position position;
	uint64_t first, last; // sectors, of RANGE
	uint64_t times;       // over all processes; 0: no limit
	bool global;          // calls are counted over all processes
	bool in_call;         // of an asynchronous function: in the call, not at its completion
	enum action action;
	VixError code;
	uint64_t ms;
	const char *log; // NULL: none
	_Atomic uint64_t seen; // in this process
};

struct latency {
	uint64_t init, connect, open, close, read, write, flush, query; // ns
};

struct metadata {
	const char *key, *value;
	struct metadata *next;
};

struct conf {
	char *folder; // of the conf file, where the state is kept; NULL: none was found
	const char *root; // of the datastores
	const char *user, *password, *cookie, *thumbprint, *snapshot, *vm, *server;
	bool thumbprint_optional, login_at_open;
	uint64_t login_error, port, nfc_port;
	struct latency latency;
	double bandwidth; // bytes/s of a handle; 0: no limit
	double host_bandwidth;
	uint64_t host_fast_handles;
	double host_slowdown; // for each handle beyond
	uint64_t reorder; // ns
	bool lock, nfc_pieces, esxi;
	uint64_t host_memory, session_memory, host_connections, linger; // bytes, bytes, handles, ns
	uint64_t inflight_requests, inflight_bytes;
	uint64_t query_max_chunks;
	uint64_t capacity; // sectors; UINT64_MAX: the file's
	uint64_t logical_sector_size, physical_sector_size;
	const char *transport, *transports;
	uint64_t threads;
	bool hostile_log, trace, log_reads;
	uint64_t flood_lines, flood_threads;
	const char *accounting;
	struct metadata *metadata;
	struct fault faults[MAX_FAULTS];
	int fault_count;
	uint64_t nfc_buffer_size, nfc_buffer_count; // bytes; of InitEx's configFile
};

extern struct conf conf;

void conf_load(const char *lib_dir);
void conf_load_nfc(const char *config_file);

// --- state.c: what outlives a process -------------------------------------

void state_open(void);
void count_call(enum function fn);
void count_stat(enum figure figure, uint64_t n);
void raise_stat(enum figure figure, uint64_t value);
__attribute__((format(printf, 2, 3))) void broken(enum rule rule, const char *fmt, ...);
__attribute__((format(printf, 1, 2))) void trace(const char *fmt, ...);
uint64_t fault_seen(int fault);        // counts one more, over all processes
bool fault_fire(int fault, uint64_t times); // false: fired that often already
uint64_t host_book(double bytes_per_second, uint64_t bytes);
uint64_t book(_Atomic uint64_t *free_at, uint64_t now, uint64_t cost);
void state_account(void);
void state_forget_files(void);

enum reserve { RESERVED, NO_MEMORY, NO_CONNECTION };
enum reserve host_reserve(uint64_t bytes, int *slot);
void host_release(int slot);
// Adds a request to those in flight; false: over the limits, nothing was added.
bool host_begin(int slot, uint64_t bytes);
void host_end(int slot, uint64_t bytes);
void host_sweep(uint32_t *cleaned, uint32_t *remaining);
uint64_t now_ns(void);
void sleep_until(uint64_t ns);

// --- log.c ------------------------------------------------------------------

void log_to(LogFn *info, LogFn *warn, LogFn *panic);
__attribute__((format(printf, 1, 2))) void log_info(const char *fmt, ...);
__attribute__((format(printf, 1, 2))) void log_warn(const char *fmt, ...);
__attribute__((format(printf, 1, 2))) void log_panic(const char *fmt, ...);
void log_hostile(void);
void log_flood_start(void);
void log_flood_join(void);
const char *error_text(VixError err);

// --- fault.c ----------------------------------------------------------------

// A call that faults may hit. Without sectors: count 0.
struct call {
	enum function fn;
	uint64_t start, count, capacity; // sectors
	uint8_t *buffer;
};

// The fault that hits the call next, or NULL.
struct fault *fault_find(const struct call *call);
// Whether a fault acts when the data has been read or written.
bool fault_after(const struct fault *fault);
// Acts it out: VIX_OK goes on, another error is the call's.
VixError fault_act(struct fault *fault, const struct call *call);
VixError fault_check(enum function fn);

extern _Atomic bool descriptors_closed; // by a fault: numbers of files mean nothing any more

// --- disk.c -----------------------------------------------------------------

struct disk {
	int fd, parent_fd; // parent_fd -1: none
	char *path;
	uint64_t bytes, capacity; // of the file; sectors
	bool single_link;
	int links;
};

// The file of a disk, allocated.
char *disk_path(const char *name, bool remote);
VixError disk_open(struct disk *disk, char *path, bool read_only, bool single_link);
void disk_close(struct disk *disk);
VixError disk_read(const struct disk *disk, uint64_t start, uint64_t count, uint8_t *buffer);
VixError disk_write(struct disk *disk, uint64_t start, uint64_t count, const uint8_t *buffer);
VixError disk_allocated(const struct disk *disk, uint64_t start, uint64_t count, uint64_t chunk, BlockList **list);

#endif

// Declarations that the source files of the stand-in share.
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

// All functions of the interface. They are counted and traced, and can fail.
#define FUNCTIONS(X) \
	X(InitEx) X(Exit) X(GetErrorText) X(FreeErrorText) X(AllocateConnectParams) X(FreeConnectParams) \
	X(ConnectEx) X(Disconnect) X(Open) X(Close) X(GetTransportMode) X(ListTransportModes) X(GetInfo) X(FreeInfo) \
	X(Read) X(Write) X(ReadAsync) X(WriteAsync) X(Wait) X(Flush) X(ReadMetadata) X(GetMetadataKeys) \
	X(PrepareForAccess) X(EndAccess) X(Cleanup) X(Create) X(CheckRepair) X(QueryAllocatedBlocks) X(FreeBlockList)

// All rules of the interface whose violations are counted. README.md explains them.
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

// Other counts. Those whose names begin with "max" are the largest values that occurred.
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
	uint64_t at, from, every; // numbers of calls, from 1; 0 if the script does not have the word
	enum position position;
	uint64_t first, last; // sectors, if the position is RANGE
	uint64_t times;       // how often it acts in all processes together; 0 means no limit
	bool global;          // calls of all processes are counted together
	bool in_call;         // it acts in the asynchronous call, and not at its completion
	enum action action;
	VixError code;
	uint64_t ms;
	const char *log; // line to log; NULL for none
	_Atomic uint64_t seen; // matching calls in this process
};

struct latency {
	uint64_t init, connect, open, close, read, write, flush, query; // ns
};

struct metadata {
	const char *key, *value;
	struct metadata *next;
};

struct conf {
	char *folder; // folder of the script, which has the state; NULL if there is no script
	const char *root; // folder of the datastores
	const char *user, *password, *cookie, *thumbprint, *snapshot, *vm, *server;
	bool thumbprint_optional, login_at_open;
	uint64_t login_error, port, nfc_port;
	struct latency latency;
	double bandwidth; // bytes/s of a handle; 0 means no limit
	double host_bandwidth;
	uint64_t host_fast_handles;
	double host_slowdown; // the share by which each further handle lowers the bandwidth of the host
	uint64_t reorder; // ns
	bool lock, nfc_pieces, esxi;
	uint64_t host_memory, session_memory, host_connections, linger; // bytes, bytes, handles, ns
	uint64_t inflight_requests, inflight_bytes;
	uint64_t query_max_chunks;
	uint64_t capacity; // sectors; UINT64_MAX means that of the file
	uint64_t logical_sector_size, physical_sector_size;
	const char *transport, *transports;
	uint64_t threads;
	bool hostile_log, trace, log_reads;
	uint64_t flood_lines, flood_threads;
	const char *accounting;
	struct metadata *metadata;
	struct fault faults[MAX_FAULTS];
	int fault_count;
	uint64_t nfc_buffer_size, nfc_buffer_count; // from the configuration file of InitEx; the size is in bytes
};

extern struct conf conf;

void conf_load(const char *lib_dir);
void conf_load_nfc(const char *config_file);

// --- state.c: state that processes share -------------------------------------

void state_open(void);
void count_call(enum function fn);
void count_stat(enum figure figure, uint64_t n);
void raise_stat(enum figure figure, uint64_t value);
__attribute__((format(printf, 2, 3))) void broken(enum rule rule, const char *fmt, ...);
__attribute__((format(printf, 1, 2))) void trace(const char *fmt, ...);
uint64_t fault_seen(int fault);        // counts a call in all processes, and returns the count
bool fault_fire(int fault, uint64_t times); // false if the fault has acted that often already
uint64_t host_book(double bytes_per_second, uint64_t bytes);
uint64_t book(_Atomic uint64_t *free_at, uint64_t now, uint64_t cost);
void state_account(void);
void state_forget_files(void);

enum reserve { RESERVED, NO_MEMORY, NO_CONNECTION };
enum reserve host_reserve(uint64_t bytes, int *slot);
void host_release(int slot);
// Adds a request to those in flight. Returns false, and adds nothing, if a limit is exceeded.
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

// A call that faults may match. count is 0 if the call has no sectors.
struct call {
	enum function fn;
	uint64_t start, count, capacity; // sectors
	uint8_t *buffer;
};

// Returns the fault for a call, or NULL.
struct fault *fault_find(const struct call *call);
// Returns whether a fault acts after the data was read or written.
bool fault_after(const struct fault *fault);
// Carries out a fault. If the result is not VIX_OK, it is the result of the call.
VixError fault_act(struct fault *fault, const struct call *call);
VixError fault_check(enum function fn);

extern _Atomic bool descriptors_closed; // a fault has closed all file descriptors

// --- disk.c -----------------------------------------------------------------

struct disk {
	int fd, parent_fd; // parent_fd is -1 if there is no parent
	char *path;
	uint64_t bytes, capacity; // size of the file in bytes, capacity of the disk in sectors
	bool single_link;
	int links;
};

// Returns the path of the file of a disk. The caller frees it.
char *disk_path(const char *name, bool remote);
VixError disk_open(struct disk *disk, char *path, bool read_only, bool single_link);
void disk_close(struct disk *disk);
VixError disk_read(const struct disk *disk, uint64_t start, uint64_t count, uint8_t *buffer);
VixError disk_write(struct disk *disk, uint64_t start, uint64_t count, const uint8_t *buffer);
VixError disk_allocated(const struct disk *disk, uint64_t start, uint64_t count, uint64_t chunk, BlockList **list);

#endif

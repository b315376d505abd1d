// Writes the log of the library, and has the texts of its errors.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include "testlib.h"

static LogFn *info_fn, *warn_fn, *panic_fn;

void log_to(LogFn *info, LogFn *warn, LogFn *panic) {
	info_fn = info;
	warn_fn = warn;
	panic_fn = panic;
}

#define DEFINE_LOG(name) \
	void log_##name(const char *fmt, ...) { \
		LogFn *to = name##_fn; \
		if (!to) return; \
		va_list args; \
		va_start(args, fmt); \
		to(fmt, args); \
		va_end(args); \
	}
DEFINE_LOG(info)
DEFINE_LOG(warn)
DEFINE_LOG(panic)

// Logs lines that callers of the real library have handled wrongly.
void log_hostile(void) {
	log_warn("%s", "VixDiskLib: 100%% of %s %n %d %99999999s are %*n.");
	log_warn("two lines\nin one: %s\r\nand a third", "\"quoted\" {json: true}");
	log_info("%s", "\033[31mred\033[0m \a \b \x7f and \xff\xfe\xc3( no UTF-8");
	log_info("%s", "");
	log_info("\n");
	log_warn("%s", "VDDK_PhoneHome: ERROR: could not send the report");
	log_warn("CEIP: %s", "the program is not enabled");
	log_info("%lld %5.3f %c %p %-20s|", -1LL, 3.25, 'x', (void *)0, "left");
	// These bytes do not end with a NUL. Only the precision in the format limits them.
	size_t n = 3 << 20;
	char *long_line = malloc(n);
	memset(long_line, 'A', n);
	log_warn("%.*s", (int)n, long_line);
	log_info("%s %.*s", "tail", (int)(n / 2), long_line);
	free(long_line);
}

static pthread_t *flood;
static uint64_t flood_count;

static void *flood_main(void *data) {
	(void)data;
	for (uint64_t i = 0; i < conf.flood_lines; i++) {
		if (i % 2) log_warn("flood: warning %llu of %llu %s", (unsigned long long)i, (unsigned long long)conf.flood_lines, "%s%n");
		else log_info("flood: line %llu of %llu, %s", (unsigned long long)i, (unsigned long long)conf.flood_lines, "and so on");
	}
	return NULL;
}

void log_flood_start(void) {
	if (!conf.flood_lines || flood) return;
	flood = calloc(conf.flood_threads, sizeof *flood);
	for (uint64_t i = 0; i < conf.flood_threads; i++)
		if (!pthread_create(&flood[flood_count], NULL, flood_main, NULL)) flood_count++;
}

void log_flood_join(void) {
	for (uint64_t i = 0; i < flood_count; i++) pthread_join(flood[i], NULL);
	free(flood);
	flood = NULL;
	flood_count = 0;
}

const char *error_text(VixError err) {
	switch (err & 0xffff) {
	case VIX_OK: return "The operation was successful";
	case VIX_E_FAIL: return "Unknown error";
	case VIX_E_OUT_OF_MEMORY: return "Memory allocation failed. Out of memory.";
	case VIX_E_INVALID_ARG: return "One of the parameters was invalid";
	case VIX_E_FILE_NOT_FOUND: return "A file was not found";
	case VIX_E_OBJECT_IS_BUSY: return "This function cannot be performed because the handle is executing another function";
	case VIX_E_NOT_SUPPORTED: return "The operation is not supported";
	case VIX_E_FILE_ERROR: return "A file access error occurred on the host or guest operating system";
	case VIX_E_DISK_FULL: return "An error occurred while writing a file; the disk is full. Data has not been saved.";
	case VIX_E_FILE_READ_ONLY: return "File is write-protected";
	case VIX_E_FILE_ALREADY_EXISTS: return "The file already exists";
	case VIX_E_FILE_ACCESS_ERROR: return "You do not have access rights to this file";
	case VIX_E_FILE_ALREADY_LOCKED: return "The file is already in use";
	case VIX_E_BUFFER_TOOSMALL: return "The buffer is too small";
	case VIX_E_HOST_USER_PERMISSIONS: return "Insufficient permissions in the host operating system";
	case VIX_E_VM_NOT_FOUND: return "The virtual machine cannot be found";
	case VIX_E_SNAPSHOT_NOTFOUND: return "The snapshot does not exist";
	case VIX_E_HOST_REFUSED: return "The server refused connection";
	case VIX_E_DISK_INVAL: return "One of the parameters supplied is invalid";
	case VIX_E_DISK_NOINIT: return "The disk library has not been initialized";
	case VIX_E_DISK_OUTOFRANGE: return "The called function is outside the range of the disk";
	case VIX_E_DISK_KEY_NOTFOUND: return "The key was not found in the disk metadata";
	case VIX_E_DISK_INVALID_CONNECTION: return "The connection is invalid";
	case VIX_E_CANNOT_CONNECT_TO_HOST: return "Cannot connect to host";
	case VIX_ASYNC: return "The operation was started; it is not complete yet";
	default: return NULL;
	}
}

// Parses the script of the stand-in. README.md lists its keys.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "testlib.h"

struct conf conf;

// Ends the process because of a mistake in the script, which would test nothing.
static void reject(const char *where, const char *line, const char *why) {
	fprintf(stderr, "vddk test library: %s: %s: %s\n", where, line, why);
	abort();
}

static uint64_t number(const char *where, const char *line, const char *text) {
	char *end;
	errno = 0;
	uint64_t n = strtoull(text, &end, 0);
	while (*end == ' ') end++;
	if (end == text || *end || errno || *text == '-') reject(where, line, "not a number");
	return n;
}

static double decimal(const char *where, const char *line, const char *text, char **end) {
	double d = strtod(text, end);
	if (*end == text || d < 0) reject(where, line, "not a number");
	return d;
}

// Decodes the escapes \n, \t, \e, \\ and \xHH. A backslash before any other character is removed.
static char *unescape(const char *text) {
	char *out = malloc(strlen(text) + 1), *o = out;
	for (const char *p = text; *p; p++) {
		if (*p != '\\' || !p[1]) { *o++ = *p; continue; }
		switch (*++p) {
		case 'n': *o++ = '\n'; break;
		case 't': *o++ = '\t'; break;
		case 'e': *o++ = '\033'; break;
		case 'x': {
			char hex[3] = { p[1], p[1] ? p[2] : 0, 0 };
			char *end;
			long byte = strtol(hex, &end, 16);
			if (end == hex || byte == 0) { *o++ = 'x'; break; }
			*o++ = (char)byte;
			p += end - hex;
			break;
		}
		default: *o++ = *p;
		}
	}
	*o = 0;
	return out;
}

static const struct { const char *name; enum action action; } actions[] = {
	{ "fail", DO_FAIL }, { "hang", DO_HANG }, { "delay", DO_DELAY }, { "abort", DO_ABORT }, { "segv", DO_SEGV },
	{ "exit", DO_EXIT }, { "kill", DO_KILL }, { "closefds", DO_CLOSEFDS }, { "heap", DO_HEAP }, { "panic", DO_PANIC },
	{ "log", DO_LOG }, { "drop", DO_DROP }, { "twice", DO_TWICE }, { "overrun", DO_OVERRUN },
	{ "underrun", DO_UNDERRUN },
	{ "corrupt", DO_CORRUPT }, { "badblocks", DO_BADBLOCKS },
};

static void parse_fault(const char *where, const char *line, char *text) {
	if (conf.fault_count == MAX_FAULTS) reject(where, line, "too many faults");
	struct fault *f = &conf.faults[conf.fault_count++];
	f->code = VIX_E_FAIL;
	char *log = strstr(text, " log=");
	if (log) {
		f->log = unescape(log + 5);
		*log = 0;
	}
	char *save = NULL, *word = strtok_r(text, " ", &save);
	if (!word) reject(where, line, "names no function");
	char *names = NULL;
	for (char *name = strtok_r(word, "|", &names); name; name = strtok_r(NULL, "|", &names)) {
		bool found = false;
		for (int fn = 0; fn < FN_COUNT; fn++) {
			if (strcmp(name, "*") && strcmp(name, function_names[fn])) continue;
			f->functions[fn] = found = true;
		}
		if (!found) reject(where, line, "no such function");
	}
	while ((word = strtok_r(NULL, " ", &save))) {
		char *value = strchr(word, '=');
		if (value) *value++ = 0;
		if (!strcmp(word, "once")) f->times = 1;
		else if (!strcmp(word, "global")) f->global = true;
		else if (!value) reject(where, line, "a word without a value");
		else if (!strcmp(word, "at")) f->at = number(where, line, value);
		else if (!strcmp(word, "from")) f->from = number(where, line, value);
		else if (!strcmp(word, "every")) f->every = number(where, line, value);
		else if (!strcmp(word, "times")) f->times = number(where, line, value);
		else if (!strcmp(word, "code")) f->code = number(where, line, value);
		else if (!strcmp(word, "ms")) f->ms = number(where, line, value);
		else if (!strcmp(word, "where")) {
			f->in_call = !strcmp(value, "call");
			if (!f->in_call && strcmp(value, "completion")) reject(where, line, "where= is call or completion");
		} else if (!strcmp(word, "sectors")) {
			if (!strcmp(value, "first")) f->position = FIRST;
			else if (!strcmp(value, "middle")) f->position = MIDDLE;
			else if (!strcmp(value, "last")) f->position = LAST;
			else {
				f->position = RANGE;
				char *dash = strchr(value, '-');
				if (dash) *dash++ = 0;
				f->first = number(where, line, value);
				f->last = !dash ? f->first : *dash ? number(where, line, dash) : UINT64_MAX;
			}
		} else if (!strcmp(word, "do")) {
			for (size_t i = 0; i < sizeof actions / sizeof *actions; i++)
				if (!strcmp(value, actions[i].name)) f->action = actions[i].action;
			if (f->action == DO_NONE) reject(where, line, "no such action");
		} else reject(where, line, "no such word");
	}
	if (f->action == DO_NONE) reject(where, line, "do= is missing");
}

static void parse_latency(const char *where, const char *line, char *value) {
	char *us = strchr(value, ' ');
	if (!us) reject(where, line, "wants WHAT MICROSECONDS");
	*us++ = 0;
	const struct { const char *name; uint64_t *ns; } all[] = {
		{ "init", &conf.latency.init }, { "connect", &conf.latency.connect }, { "open", &conf.latency.open },
		{ "close", &conf.latency.close }, { "read", &conf.latency.read }, { "write", &conf.latency.write },
		{ "flush", &conf.latency.flush }, { "query", &conf.latency.query },
	};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
		if (strcmp(value, all[i].name)) continue;
		*all[i].ns = number(where, line, us) * 1000;
		return;
	}
	reject(where, line, "no such latency");
}

static void parse_line(const char *where, char *text) {
	char *line = strdup(text);
	char *key = text, *value = strchr(text, ' ');
	if (value) *value++ = 0;
	else value = text + strlen(text);
	const struct { const char *key; const char **value; } texts[] = {
		{ "root", &conf.root }, { "user", &conf.user }, { "password", &conf.password }, { "cookie", &conf.cookie },
		{ "thumbprint", &conf.thumbprint }, { "snapshot", &conf.snapshot }, { "vm", &conf.vm }, { "server", &conf.server },
		{ "transport", &conf.transport }, { "transports", &conf.transports }, { "accounting", &conf.accounting },
	};
	const struct { const char *key; uint64_t *value, unit; } numbers[] = {
		{ "login-error", &conf.login_error, 1 }, { "port", &conf.port, 1 }, { "nfc-port", &conf.nfc_port, 1 },
		{ "host-memory", &conf.host_memory, 1 << 20 }, { "session-memory", &conf.session_memory, 1 << 20 },
		{ "host-connections", &conf.host_connections, 1 }, { "linger", &conf.linger, 1000000 },
		{ "in-flight-requests", &conf.inflight_requests, 1 }, { "in-flight-bytes", &conf.inflight_bytes, 1 },
		{ "query-max-chunks", &conf.query_max_chunks, 1 }, { "capacity", &conf.capacity, 1 },
		{ "logical-sector-size", &conf.logical_sector_size, 1 }, { "physical-sector-size", &conf.physical_sector_size, 1 },
		{ "threads", &conf.threads, 1 }, { "reorder", &conf.reorder, 1000 },
	};
	const struct { const char *key; bool *value; } switches[] = {
		{ "thumbprint-optional", &conf.thumbprint_optional }, { "login-at-open", &conf.login_at_open },
		{ "lock", &conf.lock }, { "nfc-pieces", &conf.nfc_pieces }, { "esxi", &conf.esxi },
		{ "hostile-log", &conf.hostile_log }, { "trace", &conf.trace }, { "log-reads", &conf.log_reads },
	};
	for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
		if (strcmp(key, texts[i].key)) continue;
		*texts[i].value = strdup(value);
		goto done;
	}
	for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
		if (strcmp(key, numbers[i].key)) continue;
		*numbers[i].value = number(where, line, value) * numbers[i].unit;
		goto done;
	}
	for (size_t i = 0; i < sizeof switches / sizeof *switches; i++) {
		if (strcmp(key, switches[i].key)) continue;
		*switches[i].value = !*value || number(where, line, value);
		goto done;
	}
	if (!strcmp(key, "fault")) parse_fault(where, line, value);
	else if (!strcmp(key, "latency")) parse_latency(where, line, value);
	else if (!strcmp(key, "bandwidth")) {
		char *end;
		conf.bandwidth = decimal(where, line, value, &end) * 1e6;
	} else if (!strcmp(key, "host-bandwidth")) {
		char *end;
		conf.host_bandwidth = decimal(where, line, value, &end) * 1e6;
		if (*end) {
			conf.host_fast_handles = (uint64_t)decimal(where, line, end, &end);
			conf.host_slowdown = decimal(where, line, end, &end) / 100;
		}
	} else if (!strcmp(key, "log-flood")) {
		char *end;
		conf.flood_lines = (uint64_t)decimal(where, line, value, &end);
		conf.flood_threads = *end ? (uint64_t)decimal(where, line, end, &end) : 1;
	} else if (!strcmp(key, "metadata")) {
		char *text2 = strchr(value, ' ');
		if (!text2) reject(where, line, "wants KEY VALUE");
		*text2++ = 0;
		struct metadata *m = malloc(sizeof *m), **end = &conf.metadata;
		*m = (struct metadata){ strdup(value), strdup(text2), NULL };
		while (*end) end = &(*end)->next;
		*end = m;
	} else reject(where, line, "no such key");
done:
	free(line);
}

static void parse(const char *where, char *text, const char *separators) {
	char *save = NULL;
	for (char *line = strtok_r(text, separators, &save); line; line = strtok_r(NULL, separators, &save))
		if (*line != '#') parse_line(where, line);
}

static char *slurp(const char *path) {
	FILE *f = fopen(path, "re");
	if (!f) return NULL;
	char *text = NULL;
	size_t size = 0;
	if (getdelim(&text, &size, 0, f) < 0) {
		free(text);
		text = strdup("");
	}
	fclose(f);
	return text;
}

// Returns the folder of a path, or "." if the path has no folder. The caller frees it.
static char *folder_of(const char *path) {
	const char *slash = strrchr(path, '/');
	return slash ? strndup(path, slash == path ? 1 : (size_t)(slash - path)) : strdup(".");
}

static char *load_script(const char *lib_dir) {
	static const char name[] = "vddktest.conf";
	char *places[4] = { NULL };
	const char *script = getenv("VDDK_TEST_SCRIPT");
	if (script) places[0] = strdup(script);
	Dl_info self;
	if (dladdr((void *)conf_load, &self) && self.dli_fname) {
		char *folder = folder_of(self.dli_fname);
		if (asprintf(&places[1], "%s/%s", folder, name) < 0 || asprintf(&places[2], "%s/../%s", folder, name) < 0) abort();
		free(folder);
	}
	if (lib_dir && asprintf(&places[3], "%s/%s", lib_dir, name) < 0) abort();
	char *text = NULL;
	for (int i = 0; i < 4; i++) {
		if (!places[i] || text) continue;
		text = slurp(places[i]);
		if (text) {
			char *folder = folder_of(places[i]);
			conf.folder = realpath(folder, NULL);
			free(folder);
			parse(places[i], text, "\n");
		}
	}
	for (int i = 0; i < 4; i++) free(places[i]);
	return text;
}

// Reads the script, once in each process. lib_dir is the libDir of InitEx, or NULL.
void conf_load(const char *lib_dir) {
	static bool loaded, found;
	if (!loaded) {
		loaded = true;
		conf = (struct conf){
			.login_error = VIX_E_HOST_USER_PERMISSIONS,
			.session_memory = 16 << 20,
			.query_max_chunks = 512 * 1024,
			.capacity = UINT64_MAX,
			.logical_sector_size = 512,
			.physical_sector_size = 512,
			.transports = "file:san:hotadd:nbdssl:nbd",
			.threads = 2,
			.nfc_buffer_size = 64 << 10,
			.nfc_buffer_count = 4,
		};
		char *text = load_script(lib_dir);
		found = text;
		free(text);
		const char *extra = getenv("VDDK_TEST_CONF");
		if (extra) {
			char *copy = strdup(extra);
			parse("VDDK_TEST_CONF", copy, "\n;");
			free(copy);
		}
	} else if (!found && lib_dir) {
		char *text = load_script(lib_dir);
		found = text;
		free(text);
	}
	if (getenv("VDDK_TEST_ROOT")) conf.root = getenv("VDDK_TEST_ROOT");
	if (!conf.root && conf.folder) {
		char *root;
		if (asprintf(&root, "%s/disks", conf.folder) < 0) abort();
		conf.root = root;
	}
}

// Reads the size and count of the NFC buffers from the configuration file of InitEx. They
// determine how much memory of the host a handle reserves.
void conf_load_nfc(const char *config_file) {
	if (!config_file || !*config_file) return;
	FILE *f = fopen(config_file, "re");
	if (!f) {
		log_warn("VixDiskLib: Failed to load configuration file %s: %s", config_file, strerror(errno));
		return;
	}
	char *line = NULL;
	size_t size = 0;
	while (getline(&line, &size, f) > 0) {
		char key[128];
		unsigned value;
		if (sscanf(line, " %127[^= \t] = \"%u", key, &value) != 2 && sscanf(line, " %127[^= \t] = %u", key, &value) != 2) continue;
		if (!strcmp(key, "vixDiskLib.nfcAio.Session.BufSizeIn64KB")) conf.nfc_buffer_size = (uint64_t)value << 16;
		if (!strcmp(key, "vixDiskLib.nfcAio.Session.BufCount")) conf.nfc_buffer_count = value;
	}
	free(line);
	fclose(f);
	trace("config BufSize=%llu BufCount=%llu", (unsigned long long)conf.nfc_buffer_size, (unsigned long long)conf.nfc_buffer_count);
}

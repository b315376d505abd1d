/* The protocol between the parent and the worker. messages.go describes it, and a
 * test compares both files. */
#ifndef MESSAGE_H
#define MESSAGE_H

#include <stddef.h>
#include <stdint.h>

enum {
	SOCKET_FD = 3,
	ARENA_FD = 4,
	PROGRAM_FD = 5, /* open only when the program was started from memory */

	MAX_SLOTS = 64,
	MAX_SLOT_SIZE = 2 << 20,
	MAX_CHUNKS = 512 * 1024,
	MIN_CHUNK = 128,
	MAX_LINE = 4000,
	SECTOR = 512,

	/* Request numbers that follow those of the slots. */
	SLOT_FLUSH = MAX_SLOTS,
	SLOT_CONTROL,
};

enum kind {
	/* to the worker */
	MSG_INIT = 1,
	MSG_OPEN,
	MSG_CLEANUP,
	MSG_END_ACCESS,
	MSG_QUERY,
	MSG_CLOSE,
	MSG_READ,
	MSG_WRITE,
	MSG_FLUSH,
	MSG_TEXT,
	MSG_PREPARE_ACCESS,
	/* to the parent */
	MSG_DONE = 64,
	MSG_BLOCKS,
	MSG_LOG,
	MSG_FATAL,
};

struct message {
	uint32_t kind;
	uint32_t slot;
	uint64_t sector;
	uint64_t sectors;
	uint32_t flags;
	uint32_t length; /* of the payload */
};
_Static_assert(sizeof(struct message) == 32, "a message has 32 bytes");

enum {
	MAX_PACKET = 64 * 1024,
	MAX_PAYLOAD = MAX_PACKET - (int)sizeof(struct message),
	BLOCKS_A_PACKET = 4000,
};

struct packet {
	struct message head;
	uint8_t payload[MAX_PAYLOAD];
};

/* Flags of MSG_DONE: the code is an error of the library, or the worker failed. */
enum { DONE_LIBRARY = 0, DONE_FAULT = 1 };

/* Flags of MSG_LOG: the level of the line. */
enum { LEVEL_INFO, LEVEL_WARNING, LEVEL_PANIC };

/* The payload of MSG_INIT begins with these numbers. The strings of enum
 * init_string follow. */
struct init_numbers {
	uint32_t version, slots, slot_size, reserved;
};
enum init_string { INIT_LIBRARY, INIT_ROOT, INIT_CONFIG_FILE, INIT_STRINGS };

/* The payloads of MSG_OPEN, MSG_CLEANUP, MSG_PREPARE_ACCESS and MSG_END_ACCESS begin
 * with these numbers. The strings of enum login_string follow. */
struct login_numbers {
	uint32_t port, nfc_port, read_only, flags;
};
enum login_string {
	LOGIN_PATH,
	LOGIN_SERVER,
	LOGIN_VMX_SPEC,
	LOGIN_THUMBPRINT,
	LOGIN_USER,
	LOGIN_PASSWORD,
	LOGIN_COOKIE,
	LOGIN_SNAPSHOT,
	LOGIN_TRANSPORTS,
	LOGIN_IDENTITY,
	LOGIN_STRINGS
};

/* The payload of MSG_DONE for MSG_OPEN begins with these numbers. The strings
 * parent, UUID and transport mode follow. */
struct opened_numbers {
	uint64_t capacity;
	uint32_t bios[3], physical[3];
	int32_t adapter, links;
	uint32_t logical_sector, physical_sector;
};

enum { NO_STRING = 0xffffffffu };

/* Returns whether a packet of the given number of bytes is a request that the
 * parent may send. If it is not, *why becomes a text that says what is wrong. */
int request_valid(const struct packet *packet, size_t bytes, const char **why);

/* Parses count strings after the first skip bytes of the payload. Each result is
 * NULL, or a C string inside the payload. Returns 0 if the payload is malformed. */
int strings_split(const uint8_t *payload, size_t length, size_t skip, const char **strings, size_t count);

/* Appends a string, which may be NULL, to the payload of the packet. A string that
 * does not fit is cut. */
void string_append(struct packet *packet, const char *text);

#endif

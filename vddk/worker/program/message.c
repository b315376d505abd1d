#include "message.h"

#include <string.h>

int strings_split(const uint8_t *payload, size_t length, size_t skip, const char **strings, size_t count)
{
	size_t at = skip;

	if (length < skip)
		return 0;
	for (size_t i = 0; i < count; i++) {
		uint32_t n;

		if (length - at < sizeof n)
			return 0;
		memcpy(&n, payload + at, sizeof n);
		at += sizeof n;
		if (n == NO_STRING) {
			strings[i] = NULL;
			continue;
		}
		/* A C string ends with a NUL and has no other one. */
		if (n >= length - at || memchr(payload + at, 0, (size_t)n + 1) != payload + at + n)
			return 0;
		strings[i] = (const char *)payload + at;
		at += (size_t)n + 1;
	}
	return at == length;
}

void string_append(struct packet *packet, const char *text)
{
	uint8_t *at = packet->payload + packet->head.length;
	size_t room = MAX_PAYLOAD - packet->head.length;
	uint32_t n = NO_STRING;
	size_t long_n;

	if (room < sizeof n + 1)
		return;
	if (!text) {
		memcpy(at, &n, sizeof n);
		packet->head.length += sizeof n;
		return;
	}
	/* All strings of an answer fit into a packet if none is longer than this. */
	long_n = strnlen(text, MAX_PAYLOAD / 5);
	if (long_n > room - sizeof n - 1)
		long_n = room - sizeof n - 1;
	n = (uint32_t)long_n;
	memcpy(at, &n, sizeof n);
	memcpy(at + sizeof n, text, n);
	at[sizeof n + n] = 0;
	packet->head.length += (uint32_t)sizeof n + n + 1;
}

/* The following functions return a description of what is wrong, or NULL. */

static const char *check_io(const struct message *m)
{
	if (m->slot >= MAX_SLOTS)
		return "a slot that does not exist";
	if (m->sectors == 0 || m->sectors > MAX_SLOT_SIZE / SECTOR)
		return "a number of sectors that no slot holds";
	if (m->sector > UINT64_MAX / SECTOR - m->sectors)
		return "a sector beyond any disk";
	return NULL;
}

static const char *check_query(const struct message *m)
{
	uint64_t chunk = m->flags;

	if (chunk < MIN_CHUNK || (chunk & (chunk - 1)))
		return "a chunk size that is no power of two, or less than 128 sectors";
	if (m->sector % chunk || m->sectors % chunk)
		return "a range whose borders are no multiples of the chunk size";
	if (m->sectors == 0 || m->sectors / chunk > MAX_CHUNKS)
		return "a number of chunks that is 0 or too large";
	if (m->sector > UINT64_MAX / SECTOR - m->sectors)
		return "a sector beyond any disk";
	return NULL;
}

static const char *check_init(const struct packet *p)
{
	const char *strings[INIT_STRINGS];
	struct init_numbers n;

	if (!strings_split(p->payload, p->head.length, sizeof n, strings, INIT_STRINGS))
		return "malformed strings";
	memcpy(&n, p->payload, sizeof n);
	if (!strings[INIT_LIBRARY] || !strings[INIT_ROOT])
		return "no path of the library or no root folder";
	if (n.slots == 0 || n.slots > MAX_SLOTS)
		return "a number of slots that is 0 or too large";
	if (n.slot_size == 0 || n.slot_size > MAX_SLOT_SIZE || n.slot_size % 4096)
		return "a slot size that is 0, too large or no multiple of 4096";
	return NULL;
}

static const char *check_login(const struct packet *p)
{
	const char *strings[LOGIN_STRINGS];

	if (!strings_split(p->payload, p->head.length, sizeof(struct login_numbers), strings, LOGIN_STRINGS))
		return "malformed strings";
	if (p->head.kind == MSG_OPEN && !strings[LOGIN_PATH])
		return "no path of the disk";
	if ((p->head.kind == MSG_PREPARE_ACCESS || p->head.kind == MSG_END_ACCESS) && !strings[LOGIN_IDENTITY])
		return "no identity for the access to the VM";
	return NULL;
}

int request_valid(const struct packet *p, size_t bytes, const char **why)
{
	const struct message *m = &p->head;
	int control = 1, payload = 0;
	const char *wrong = NULL;

	if (bytes < sizeof *m || bytes > sizeof *p || m->length != bytes - sizeof *m) {
		*why = "a wrong length";
		return 0;
	}
	switch (m->kind) {
	case MSG_INIT:
		payload = 1;
		wrong = check_init(p);
		break;
	case MSG_OPEN:
	case MSG_CLEANUP:
	case MSG_PREPARE_ACCESS:
	case MSG_END_ACCESS:
		payload = 1;
		wrong = check_login(p);
		break;
	case MSG_QUERY:
		wrong = check_query(m);
		break;
	case MSG_CLOSE:
		break;
	case MSG_READ:
	case MSG_WRITE:
		control = 0;
		wrong = check_io(m);
		break;
	case MSG_FLUSH:
		control = 0;
		if (m->slot != SLOT_FLUSH)
			wrong = "a request number that its kind cannot have";
		break;
	case MSG_TEXT:
		control = 0;
		if (m->slot > SLOT_FLUSH)
			wrong = "a request number that its kind cannot have";
		break;
	default:
		wrong = "an unknown kind";
	}
	if (!wrong && control && m->slot != SLOT_CONTROL)
		wrong = "a request number that its kind cannot have";
	if (!wrong && !payload && m->length)
		wrong = "a payload, although its kind has none";
	*why = wrong;
	return !wrong;
}

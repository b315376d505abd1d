/* Feeds the worker's message parser, compiled with AddressSanitizer and UBSan:
 * each input on standard input is a length (uint32) and bytes, each answer one
 * byte: '1' for a valid message, '0' for none. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../program/message.h"

int main(void)
{
	uint32_t n;

	while (fread(&n, sizeof n, 1, stdin) == 1) {
		/* Of exactly this size, so that a read beyond it is found. */
		uint8_t *bytes = malloc(n ? n : 1);
		const struct packet *packet = (void *)bytes;
		const char *why = NULL, *strings[LOGIN_STRINGS];
		int valid;

		if (!bytes || (n && fread(bytes, n, 1, stdin) != 1))
			return 1;
		valid = request_valid(packet, n, &why);
		if (!valid && (!why || !*why))
			abort();
		if (valid) {
			size_t skip = 0, count = 0, sum = 0;

			if (packet->head.kind == MSG_INIT)
				skip = sizeof(struct init_numbers), count = INIT_STRINGS;
			else if (packet->head.kind <= MSG_END_ACCESS)
				skip = sizeof(struct login_numbers), count = LOGIN_STRINGS;
			if (count && !strings_split(bytes + sizeof packet->head, packet->head.length, skip, strings, count))
				abort();
			for (size_t i = 0; i < count; i++)
				sum += strings[i] ? strlen(strings[i]) : 0;
			if (sum > n)
				abort();
		}
		free(bytes);
		putchar(valid ? '1' : '0');
		fflush(stdout);
	}
}

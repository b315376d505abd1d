/* Passes messages to the worker's parser, which is compiled with AddressSanitizer and
 * UBSan. Each message on standard input is a length (uint32) and that many bytes. The
 * answer to each message is one byte: '1' if the message is valid, '0' if not. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../program/message.h"

int main(void)
{
	uint32_t n;

	while (fread(&n, sizeof n, 1, stdin) == 1) {
		/* The memory has exactly this size, so that AddressSanitizer finds a read beyond the end. */
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

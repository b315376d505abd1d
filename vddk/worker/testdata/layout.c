/* Prints the numbers of message.h and the functions of vddk.h, one NAME VALUE in each
 * line. A test compares them with messages.go and functions.go. */
#include <stdio.h>

#include "../program/message.h"
#include "../program/vddk.h"

#define NUMBER(name) printf(#name " %lld\n", (long long)(name))
#define OFFSET(type, field) printf(#type "." #field " %zu\n", offsetof(struct type, field))

int main(void)
{
	NUMBER(MSG_INIT), NUMBER(MSG_OPEN), NUMBER(MSG_CLEANUP), NUMBER(MSG_END_ACCESS), NUMBER(MSG_QUERY), NUMBER(MSG_CLOSE);
	NUMBER(MSG_READ), NUMBER(MSG_WRITE), NUMBER(MSG_FLUSH), NUMBER(MSG_TEXT);
	NUMBER(MSG_PREPARE_ACCESS), NUMBER(MSG_DONE), NUMBER(MSG_BLOCKS), NUMBER(MSG_LOG), NUMBER(MSG_FATAL);
	NUMBER(SOCKET_FD), NUMBER(ARENA_FD), NUMBER(PROGRAM_FD);
	NUMBER(MAX_SLOTS), NUMBER(MAX_SLOT_SIZE), NUMBER(MAX_CHUNKS), NUMBER(MIN_CHUNK), NUMBER(MAX_LINE), NUMBER(SECTOR);
	NUMBER(SLOT_FLUSH), NUMBER(SLOT_CONTROL), NUMBER(MAX_PACKET), NUMBER(MAX_PAYLOAD), NUMBER(DONE_LIBRARY), NUMBER(DONE_FAULT);
	NUMBER(LEVEL_INFO), NUMBER(LEVEL_WARNING), NUMBER(LEVEL_PANIC), NUMBER(LOGIN_STRINGS);
	OFFSET(message, kind), OFFSET(message, slot), OFFSET(message, sector), OFFSET(message, sectors), OFFSET(message, flags),
		OFFSET(message, length);
	OFFSET(opened_numbers, capacity), OFFSET(opened_numbers, bios), OFFSET(opened_numbers, physical), OFFSET(opened_numbers, adapter),
		OFFSET(opened_numbers, links), OFFSET(opened_numbers, logical_sector), OFFSET(opened_numbers, physical_sector);
	NUMBER(sizeof(struct message)), NUMBER(sizeof(struct init_numbers)), NUMBER(sizeof(struct login_numbers)),
		NUMBER(sizeof(struct opened_numbers)), NUMBER(sizeof(Block));
#define X(needed, result, name, arguments) printf("function " #name " %d\n", needed);
	VDDK_FUNCTIONS(X)
}

/* Log lines of the library, and the last message of the worker. The library calls
 * the log functions on any thread, also while it holds its own locks, with lines of
 * any content and length. Therefore these functions use no lock, no memory except a
 * fixed buffer on the stack, and never wait. If the parent is too slow, lines are
 * counted and dropped, so that completions do not wait for it. */
#include "worker.h"

#include <errno.h>
#include <linux/sockios.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

struct line {
	struct message head;
	char text[MAX_LINE];
};

static int log_room; /* lines are dropped while the send buffer of the socket has more bytes than this */
static atomic_uint_least64_t dropped;

void log_start(void)
{
	int size = 0;
	socklen_t n = sizeof size;

	if (getsockopt(SOCKET_FD, SOL_SOCKET, SO_SNDBUF, &size, &n) == 0)
		log_room = size / 2;
}

/* Returns whether a format has a %n, in any of its forms, which stores through a
 * pointer. The library may pass text of a server as the format. */
static int stores(const char *fmt)
{
	while ((fmt = strchr(fmt, '%'))) {
		fmt++;
		fmt += strspn(fmt, "-+ #0'I123456789.*$hlLqjzt");
		if (*fmt == 'n')
			return 1;
		if (*fmt)
			fmt++;
	}
	return 0;
}

/* Formats a line of up to MAX_LINE bytes; longer ones end with "...". */
static void line_format(struct line *line, const char *fmt, va_list args)
{
	int printed = -1;
	size_t n;

	if (!fmt)
		fmt = "(null)";
	if (!stores(fmt))
		printed = vsnprintf(line->text, MAX_LINE, fmt, args);
	if (printed < 0) {
		n = strnlen(fmt, MAX_LINE);
		memcpy(line->text, fmt, n);
	} else if (printed >= MAX_LINE) {
		n = MAX_LINE - 1;
		memcpy(line->text + n - 3, "...", 3);
	} else {
		n = (size_t)printed;
	}
	line->head.length = (uint32_t)n;
}

/* Sends a log line to the parent, or drops it. */
static void line_send(uint32_t level, const char *fmt, va_list args)
{
	int saved = errno, queued = 0;
	struct line line;

	if (ioctl(SOCKET_FD, SIOCOUTQ, &queued) == 0 && queued > log_room) {
		atomic_fetch_add(&dropped, 1);
		errno = saved;
		return;
	}
	memset(&line.head, 0, sizeof line.head);
	line.head.kind = MSG_LOG;
	line.head.flags = level;
	line_format(&line, fmt, args);
	line.head.sectors = atomic_exchange(&dropped, 0);
	if (send(SOCKET_FD, &line, sizeof line.head + line.head.length, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		atomic_fetch_add(&dropped, line.head.sectors + 1);
	errno = saved;
}

void log_info(const char *fmt, va_list args) { line_send(LEVEL_INFO, fmt, args); }

void log_warning(const char *fmt, va_list args) { line_send(LEVEL_WARNING, fmt, args); }

/* Sends the last message of the process. It waits up to 2 s for room in the socket,
 * which is enough for a parent that is still running. */
static void send_fatal(uint32_t level, const char *fmt, va_list args)
{
	struct line line;
	struct pollfd room = {.fd = SOCKET_FD, .events = POLLOUT};

	memset(&line.head, 0, sizeof line.head);
	line.head.kind = MSG_FATAL;
	line.head.flags = level;
	line_format(&line, fmt, args);
	while (send(SOCKET_FD, &line, sizeof line.head + line.head.length, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
		if (errno == EINTR)
			continue;
		if ((errno != EAGAIN && errno != EWOULDBLOCK) || poll(&room, 1, 2000) <= 0)
			break;
	}
}

void log_panic(const char *fmt, va_list args)
{
	send_fatal(LEVEL_PANIC, fmt, args);
	signal(SIGABRT, SIG_DFL);
	abort();
}

void say_fatal(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	send_fatal(LEVEL_WARNING, fmt, args);
	va_end(args);
}

void die(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	send_fatal(LEVEL_WARNING, fmt, args);
	va_end(args);
	_exit(2);
}

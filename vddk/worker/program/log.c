/* What the library, or the worker itself, has to say. The library calls the
 * callbacks on any thread, also inside of its own locks, with lines of any
 * content and length: so there is no lock here, no memory but a fixed buffer on
 * the stack, and no waiting. A line that the parent is too slow for is counted
 * and dropped: completions must not wait behind it. */
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

static int log_room; /* bytes of the socket's buffer that lines may take */
static atomic_uint_least64_t dropped;

void log_start(void)
{
	int size = 0;
	socklen_t n = sizeof size;

	if (getsockopt(SOCKET_FD, SOL_SOCKET, SO_SNDBUF, &size, &n) == 0)
		log_room = size / 2;
}

/* Says whether a format would store through a pointer (%n in any of its
 * spellings): a line with foreign text in place of its format must not. */
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

/* Sends the last message. It may come from anywhere, so it waits for room only
 * so long as a parent that lives can need. */
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

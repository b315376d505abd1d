// Serves raw files as disks. Holes of the file NAME read as the content of the file NAME.parent
// in the same folder, if that exists.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <linux/fs.h>
#include <unistd.h>
#include "testlib.h"

// Returns the path of the file of a disk. "[ds] dir/disk.vmdk" is ROOT/ds/dir/disk.vmdk; the
// name of a local disk is its path.
char *disk_path(const char *name, bool remote) {
	if (!remote) return strdup(name);
	const char *end = strchr(name, ']');
	if (*name != '[' || !end || !conf.root) {
		log_warn("VixDiskLib: GetFileName: Cannot create disk spec for %s", name);
		return NULL;
	}
	char *path;
	if (asprintf(&path, "%s/%.*s/%s", conf.root, (int)(end - name - 1), name + 1, end[1] == ' ' ? end + 2 : end + 1) < 0) abort();
	return path;
}

static int64_t size_of(int fd) {
	struct stat st;
	uint64_t bytes;
	if (fstat(fd, &st)) return -1;
	if (S_ISBLK(st.st_mode)) return ioctl(fd, BLKGETSIZE64, &bytes) ? -1 : (int64_t)bytes;
	return S_ISREG(st.st_mode) ? st.st_size : -1;
}

// Opens a disk. The path belongs to the disk afterwards.
VixError disk_open(struct disk *d, char *path, bool read_only, bool single_link) {
	*d = (struct disk){ .fd = -1, .parent_fd = -1, .path = path, .single_link = single_link, .links = 1 };
	d->fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
	VixError err = VIX_E_FILE_ERROR;
	if (d->fd < 0) {
		int reason = errno;
		if (reason == ENOENT || reason == ENOTDIR) err = VIX_E_FILE_NOT_FOUND;
		if (reason == EACCES || reason == EPERM) err = VIX_E_FILE_ACCESS_ERROR;
		if (reason == EROFS) {
			err = VIX_E_FILE_ACCESS_ERROR;
			log_warn("FILE: FileLockCreateEntryDirectory creation failure on '%s.lck': %s", path, strerror(EACCES));
		}
		log_warn("DISKLIB-LINK : \"%s\" : failed to open (%s).", path, strerror(reason));
		goto fail;
	}
	if (!read_only && flock(d->fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) {
		err = VIX_E_FILE_ALREADY_LOCKED;
		log_warn("DISKLIB-LINK : \"%s\" : failed to open (Failed to lock the file).", path);
		goto fail;
	}
	int64_t bytes = size_of(d->fd);
	if (bytes < 0) goto fail;
	d->bytes = (uint64_t)bytes / SECTOR * SECTOR;
	d->capacity = conf.capacity == UINT64_MAX ? d->bytes / SECTOR : conf.capacity;
	char *parent;
	if (asprintf(&parent, "%s.parent", path) < 0) abort();
	d->parent_fd = open(parent, O_RDONLY | O_CLOEXEC);
	free(parent);
	if (d->parent_fd >= 0) d->links = 2;
	return VIX_OK;
fail:
	disk_close(d);
	return err;
}

void disk_close(struct disk *d) {
	if (!descriptors_closed) {
		if (d->fd >= 0) close(d->fd);
		if (d->parent_fd >= 0) close(d->parent_fd);
	}
	free(d->path);
	d->path = NULL;
	d->fd = d->parent_fd = -1;
}

// Reads from a file. Bytes after the end of the file are zeros.
static VixError read_file(int fd, uint64_t offset, uint64_t length, uint8_t *buffer) {
	while (length) {
		ssize_t n = pread(fd, buffer, length, (off_t)offset);
		if (n < 0 && errno == EINTR) continue;
		if (n < 0) return VIX_E_FILE_ERROR;
		if (n == 0) {
			memset(buffer, 0, length);
			break;
		}
		offset += (uint64_t)n, buffer += n, length -= (uint64_t)n;
	}
	return VIX_OK;
}

// Finds the first range of data in [offset, end), and returns it as [*from, *to). Returns false
// if there is none.
static bool next_data(int fd, uint64_t offset, uint64_t end, uint64_t *from, uint64_t *to) {
	off_t data = lseek(fd, (off_t)offset, SEEK_DATA);
	if (data < 0) {
		if (errno == ENXIO) return false;
		data = (off_t)offset; // a block device has no holes
	}
	if ((uint64_t)data >= end) return false;
	off_t hole = lseek(fd, data, SEEK_HOLE);
	*from = (uint64_t)data;
	*to = hole < 0 || (uint64_t)hole > end ? end : (uint64_t)hole;
	return true;
}

VixError disk_read(const struct disk *d, uint64_t start, uint64_t count, uint8_t *buffer) {
	if (descriptors_closed) return VIX_E_FILE_ERROR;
	uint64_t offset = start * SECTOR, length = count * SECTOR;
	if (d->parent_fd < 0 || d->single_link) return read_file(d->fd, offset, length, buffer);
	VixError err = read_file(d->parent_fd, offset, length, buffer);
	uint64_t end = offset + length, from, to = offset;
	while (!err && to < end && next_data(d->fd, to, end, &from, &to))
		err = read_file(d->fd, from, to - from, buffer + (from - offset));
	return err;
}

VixError disk_write(struct disk *d, uint64_t start, uint64_t count, const uint8_t *buffer) {
	if (descriptors_closed) return VIX_E_FILE_ERROR;
	uint64_t offset = start * SECTOR, length = count * SECTOR;
	while (length) {
		ssize_t n = pwrite(d->fd, buffer, length, (off_t)offset);
		if (n < 0 && errno == EINTR) continue;
		if (n < 0) return errno == ENOSPC ? VIX_E_DISK_FULL : VIX_E_FILE_ERROR;
		offset += (uint64_t)n, buffer += n, length -= (uint64_t)n;
	}
	return VIX_OK;
}

struct blocks {
	BlockList *list;
	size_t room;
};

// Appends a block of sectors to a list, or extends the last block if both touch.
static void add_block(struct blocks *b, uint64_t offset, uint64_t end) {
	if (b->list->numBlocks) {
		Block *last = &b->list->blocks[b->list->numBlocks - 1];
		if (offset <= last->offset + last->length) {
			if (end > last->offset + last->length) last->length = end - last->offset;
			return;
		}
	}
	if (b->list->numBlocks == b->room) {
		b->room *= 2;
		b->list = realloc(b->list, sizeof *b->list + b->room * sizeof(Block));
		if (!b->list) abort();
	}
	b->list->blocks[b->list->numBlocks++] = (Block){ offset, end - offset };
}

VixError disk_allocated(const struct disk *d, uint64_t start, uint64_t count, uint64_t chunk, BlockList **list) {
	if (descriptors_closed) return VIX_E_FILE_ERROR;
	struct blocks b = { malloc(sizeof *b.list + 16 * sizeof(Block)), 16 };
	if (!b.list) return VIX_E_OUT_OF_MEMORY;
	b.list->numBlocks = 0;
	uint64_t bytes = chunk * SECTOR, at = start * SECTOR, end = at + count * SECTOR;
	while (at < end) {
		uint64_t from = end, to = end, pfrom, pto;
		bool data = next_data(d->fd, at, end, &from, &to);
		if (d->parent_fd >= 0 && !d->single_link && next_data(d->parent_fd, at, end, &pfrom, &pto) && (!data || pfrom < from)) {
			from = pfrom, to = pto;
			data = true;
		}
		if (!data) break;
		at = (to + bytes - 1) / bytes * bytes;
		add_block(&b, from / bytes * chunk, at / SECTOR);
	}
	*list = b.list;
	return VIX_OK;
}
